"""Data sets: what is known about them from outside, and what damaged or foreign input says."""

import gzip
import hashlib
import math
import os
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, strategies
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import dgm_pyro as dgm
from dgm_pyro.data import CHECKSUMS, NAMES, Data

GENERATED = ("moons", "rings", "checkerboard", "pinwheel")
IMAGES = ("glyphs", "glyphs-62", "glyphs-digits", "glyphs-color", "patches-8", "patches-16", "patches-32")
DIGITS = ("digits", "digits-binary")
PUBLISHED = ("cifar-10", "svhn", "imagenet32", "imagenet64", "celeba")
IDX = {"mnist": ("mnist", "MNIST/raw"), "fashion-mnist": ("fashion-mnist", "FashionMNIST/raw")}
BITS = {
    "binarized-mnist": (1, 28, 28),
    "nltcs": (16,),
    "plants": (69,),
    "mushrooms": (112,),
    "dna": (180,),
    "nips": (500,),
}


def test_names_describe_every_set():
    assert set(NAMES) == {*GENERATED, *IMAGES, *DIGITS, *PUBLISHED, *IDX, *BITS}
    assert all("\n" not in line and line for line in NAMES.values())


# -- Data --------------------------------------------------------------------------------------------------------------


def test_integers_are_a_mass_and_reals_a_density():
    integers = Data(torch.tensor([[0, 3]]), levels=4, name="mine")
    reals = Data(torch.zeros(2, 1, 3, 3))
    assert (integers.measure, integers.levels, integers.event_shape, integers.name) == ("mass", 4, (2,), "mine")
    assert (reals.measure, reals.levels, reals.event_shape, reals.y) == ("density", None, (1, 3, 3), None)


def test_labels_are_int64_and_counted():
    data = Data(torch.zeros(3, 1), torch.tensor([0, 2, 0], dtype=torch.uint8))
    assert data.y.dtype == torch.int64
    assert data.num_classes == 3
    assert Data(data.x, data.y, num_classes=5).num_classes == 5


def test_data_cannot_be_changed():
    with pytest.raises(AttributeError):
        Data(torch.zeros(1, 1)).x = torch.ones(1, 1)


@pytest.mark.parametrize(
    ("index", "rows"),
    [
        (slice(1, 3), [1, 2]),
        ([2, 0], [2, 0]),
        (torch.tensor([3, 3]), [3, 3]),
        (torch.tensor([True, False, False, True]), [0, 3]),
        (-1, [3]),
    ],
)
def test_a_subset_keeps_rows_together_and_remembers_the_whole(index, rows):
    data = Data(torch.arange(4)[:, None], torch.arange(4), levels=9, name="rows", num_classes=7)
    part = data[index]
    assert part.x[:, 0].tolist() == part.y.tolist() == rows
    assert (part.levels, part.name, part.num_classes) == (9, "rows", 7)
    assert len(data) == 4


@given(size=strategies.integers(2, 50), fraction=strategies.floats(0.01, 0.99), seed=strategies.integers(0, 9))
def test_split_is_a_partition_that_its_seed_fixes(size, fraction, seed):
    data = Data(torch.arange(size)[:, None], torch.arange(size), levels=max(size, 2))
    if not 0 < round(fraction * size) < size:
        with pytest.raises(ValueError, match="fraction"):
            data.split(fraction, seed)
        return
    rest, held_out = data.split(fraction, seed)
    assert len(held_out) == round(fraction * size)
    assert sorted([*rest.y.tolist(), *held_out.y.tolist()]) == list(range(size))
    assert torch.equal(data.split(fraction, seed)[1].x, held_out.x)
    assert torch.equal(held_out.x[:, 0], held_out.y)


@given(num_labels=strategies.integers(1, 11), seed=strategies.integers(0, 9))
def test_labels_are_kept_evenly_over_the_classes_and_are_the_true_ones(num_labels, seed):
    y = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, -1])
    data = Data(torch.arange(len(y))[:, None], y, levels=len(y))
    few = data.keep_labels(num_labels, seed)
    known = few.y >= 0
    counts = few.y[known].bincount(minlength=3)
    assert known.sum() == num_labels
    assert counts.max() - counts.min() <= 1
    assert torch.equal(few.y[known], y[known])
    assert torch.equal(few.x, data.x)
    assert torch.equal(few.y, data.keep_labels(num_labels, seed).y)
    assert few.num_classes == 3


def test_which_labels_are_kept_is_drawn_uniformly():
    data = Data(torch.zeros(7, 1), torch.tensor([0, 0, 0, 1, 1, 1, 1]))
    kept = torch.stack([data.keep_labels(3, seed).y >= 0 for seed in range(4000)]).double().mean(0)
    # Half of the time class 0 keeps two of three and class 1 one of four, else one and two.
    expected = torch.tensor([1 / 2] * 3 + [3 / 8] * 4)
    assert (kept - expected).abs().max() < 5 * (0.25 / 4000) ** 0.5


@pytest.mark.parametrize(
    ("data", "num_labels", "words"),
    [
        (Data(torch.zeros(3, 1)), 1, "has no labels to keep"),
        (Data(torch.zeros(3, 1), torch.tensor([0, 1, 1])), 3, "keeps 2 labels of class 0, but data has 1"),
        (Data(torch.zeros(3, 1), torch.tensor([0, 1, 1])), 0, "must be a positive integer, got 0"),
        (Data(torch.zeros(3, 1), torch.tensor([0, 1, 1])), True, "must be a positive integer, got True"),
    ],
)
def test_labels_that_are_not_there_cannot_be_kept(data, num_labels, words):
    with pytest.raises(ValueError, match=words):
        data.keep_labels(num_labels)


def test_repr_says_what_it_is():
    data = Data(torch.zeros(2, 3, dtype=torch.uint8), torch.tensor([0, 1]), levels=2, name="bits")
    assert repr(data) == "Data('bits', x=(2, 3) uint8 of 2 levels, y of 2 classes)"
    assert repr(Data(torch.zeros(2, 3))) == "Data('data', x=(2, 3) float32)"


@pytest.mark.gpu
def test_to_moves_x_and_y():
    data = dgm.data.load("moons", num_data=10).to("cuda")
    assert data.x.device.type == data.y.device.type == "cuda"
    assert data.split(0.5)[0].x.device.type == "cuda"


def test_all_parts_keep_their_rows_together():
    rows = torch.arange(6.0)
    mask = rows[:, None] != 5
    data = Data(rows[:, None], rows.long(), given=rows[:, None, None] + 0.5, mask=mask)
    for part in (data[[4, 5, 1]], *data.split(0.5), data.keep_labels(6), data.to("cpu")):
        where = part.mask[:, 0]
        assert torch.equal(part.given[:, 0, 0] - 0.5, part.y.to(rows.dtype))
        assert torch.equal(where, part.y != 5)
        assert torch.equal(part.x[where, 0], part.y[where].to(rows.dtype))
    batches = [*torch.utils.data.DataLoader(data, batch_size=4)]
    for column, part in zip(zip(*batches, strict=True), data.parts.values(), strict=True):
        assert torch.equal(torch.cat(column), part)
    assert repr(data) == "Data('data', x=(6, 1) float32, y of 6 classes, given (1, 1), 16.7% missing)"


def test_what_stands_at_a_missing_feature_does_not_matter():
    mask = torch.tensor([[True, False], [False, True]])
    reals = Data(torch.tensor([[1.0, math.nan], [math.inf, 2.0]]), mask=mask)
    assert reals.x.tolist() == [[1.0, 0.0], [0.0, 2.0]]
    assert Data(torch.tensor([[1, 99], [-1, 2]]), levels=3, mask=mask).x.tolist() == [[1, 0], [0, 2]]


X, BYTES = torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.uint8)
BAD_DATA = {
    "x no tensor": (dict(x=[[1.0]]), TypeError, "x must be a torch.Tensor, got list"),
    "x without features": (dict(x=torch.zeros(3)), ValueError, r"shape \(3,\).*x\[:, None\]"),
    "x empty": (dict(x=torch.zeros(0, 2)), ValueError, r"x is empty.*\(0, 2\)"),
    "integers without levels": (dict(x=BYTES), TypeError, "torch.uint8.*pass levels"),
    "NaN": (dict(x=X / 0), ValueError, "x holds NaN"),
    "infinite": (dict(x=X + math.inf), ValueError, "x holds NaN or infinite"),
    "beyond float32": (
        dict(x=torch.tensor([[0.0, 1.0], [2.0, 1e300]], dtype=torch.double)),
        ValueError,
        r"x holds 1e\+300 in row 1, but networks compute in float32, whose largest number is 3\.403e\+38: use other",
    ),
    "given beyond float32": (
        dict(x=X, given=torch.full((3, 1), -1e39, dtype=torch.double)),
        ValueError,
        r"given holds -1e\+39 in row 0, but networks compute in float32",
    ),
    "reals with levels": (dict(x=X, levels=2), TypeError, "torch.float32.*levels=2"),
    "booleans": (dict(x=X > 0, levels=2), TypeError, r"torch.bool.*x.long\(\)"),
    "complex": (dict(x=X.to(torch.complex64)), TypeError, "torch.complex64"),
    "sparse": (dict(x=X.to_sparse()), TypeError, r"x is a tensor of layout torch.sparse_coo: use x.to_dense"),
    "wide integers": (
        dict(x=torch.zeros(3, 2, dtype=torch.uint16), levels=65536),
        TypeError,
        r"torch.uint16, but levels=65536.*x.long\(\)",
    ),
    "levels 1": (dict(x=BYTES, levels=1), ValueError, "levels must be an int of at least 2, got 1"),
    "levels no int": (dict(x=BYTES, levels=2.0), ValueError, "levels.*got 2.0"),
    "x too large": (dict(x=BYTES + 2, levels=2), ValueError, "from 2 to 2.*levels=2 allows 0 .. 1"),
    "x negative": (dict(x=BYTES.long() - 1, levels=2), ValueError, "from -1 to -1"),
    "y no tensor": (dict(x=X, y=[0, 1, 2]), TypeError, "y must be a torch.Tensor, got list"),
    "y of another length": (dict(x=X, y=torch.zeros(2).long()), ValueError, r"y has shape \(2,\).*3 rows"),
    "y one-hot": (dict(x=X, y=torch.zeros(3, 4).long()), ValueError, r"y has shape \(3, 4\)"),
    "y real": (dict(x=X, y=torch.zeros(3)), TypeError, "y has dtype torch.float32"),
    "y negative": (dict(x=X, y=torch.tensor([0, -2, 0])), ValueError, "label -2.*-1 stands for an unknown one"),
    "y from 1": (dict(x=X, y=torch.tensor([3, -1, 1])), ValueError, "labels from 1 to 3.*use y - 1.*num_classes=4"),
    "num_classes no int": (dict(x=X, y=torch.tensor([0, 1, 0]), num_classes=3.0), ValueError, "num_classes must be"),
    "y unknown": (dict(x=X, y=torch.tensor([-1, -1, -1])), ValueError, "no known label: pass num_classes"),
    "num_classes too small": (
        dict(x=X, y=torch.tensor([0, 5, 0]), num_classes=5),
        ValueError,
        "label 5.*num_classes is 5",
    ),
    "mask of numbers": (dict(x=X, mask=torch.ones(3, 2)), TypeError, r"mask has dtype torch.float32: use mask.bool"),
    "mask of rows": (dict(x=X, mask=torch.ones(3).bool()), ValueError, r"mask has shape \(3,\), but x has \(3, 2\)"),
    "NaN that was observed": (
        dict(x=X + torch.tensor([0.0, math.nan]), mask=torch.tensor([[False, True]] * 3)),
        ValueError,
        "x holds NaN",
    ),
    "given of other rows": (dict(x=X, given=torch.zeros(2, 1)), ValueError, r"given has shape \(2, 1\).*3 rows"),
    "given of integers": (dict(x=X, given=torch.zeros(3).long()), TypeError, r"given.float\(\).*label is y"),
    "given NaN": (dict(x=X, given=torch.zeros(3) / 0), ValueError, "given holds NaN"),
    "num_classes without y": (dict(x=X, num_classes=5), ValueError, "num_classes is 5.*no labels"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_say_what_is_wrong(case):
    arguments, error, message = BAD_DATA[case]
    with pytest.raises(error, match=message):
        Data(**arguments)


@pytest.mark.parametrize("fraction", [0, 1, -0.5, 1.5, 0.001, math.nan])
def test_a_split_that_leaves_nothing_is_refused(fraction):
    with pytest.raises(ValueError, match="fraction must be"):
        dgm.data.load("moons", num_data=10).split(fraction)


def test_labels_that_lack_data_are_counted_where_num_classes_says_so():
    assert Data(X, torch.tensor([1, 3, 1]), num_classes=4).num_classes == 4
    assert Data(X, torch.tensor([0, 3, -1])).num_classes == 4


@pytest.mark.parametrize("labeled", [False, True])
def test_a_dataloader_of_torch_makes_batches_of_it(labeled):
    x, y = torch.arange(14.0).reshape(7, 2), torch.arange(7) % 3
    loader = torch.utils.data.DataLoader(Data(x, y if labeled else None), batch_size=3)
    batches = list(loader)
    if not labeled:
        assert torch.equal(torch.cat(batches), x)
    else:
        assert torch.equal(torch.cat([batch[0] for batch in batches]), x)
        assert torch.equal(torch.cat([batch[1] for batch in batches]), y)
    assert [len(batch[0] if labeled else batch) for batch in batches] == [3, 3, 1]


def test_an_index_that_does_not_fit_is_named_and_a_loop_ends():
    data = Data(torch.zeros(3, 2))
    for index in (3, 1.5, "a", [0, 7]):
        with pytest.raises(IndexError, match=r"index .* does not fit Data"):
            data[index]
    assert [len(part) for part in data] == [1, 1, 1]


def test_an_empty_subset_is_refused():
    with pytest.raises(ValueError, match=r"subset of Data.*empty"):
        dgm.data.load("moons", num_data=10)[5:5]


# -- digits ------------------------------------------------------------------------------------------------------------


def test_digits_are_those_of_scikit_learn():
    images, labels = load_digits(return_X_y=True)
    expected = train_test_split(images, labels, test_size=0.2, random_state=0, stratify=labels)
    for split, image, label in (("train", 0, 2), ("test", 1, 3)):
        data = dgm.data.load("digits", split)
        assert data.x.dtype == torch.uint8
        assert data.event_shape == (1, 8, 8)
        assert (data.levels, data.num_classes, data.measure) == (17, 10, "mass")
        np.testing.assert_array_equal(data.x.flatten(1).numpy(), expected[image])
        np.testing.assert_array_equal(data.y.numpy(), expected[label])


def test_binary_digits_are_the_upper_half_of_the_levels():
    gray, bits = dgm.data.load("digits", "test"), dgm.data.load("digits-binary", "test")
    assert torch.equal(bits.x.bool(), gray.x >= 8)
    assert torch.equal(bits.y, gray.y)
    assert (bits.levels, bits.x.dtype) == (2, torch.uint8)


def test_num_takes_a_random_subset_without_repetition():
    whole, part = dgm.data.load("digits"), dgm.data.load("digits", num_data=200)
    rows = {tuple(row) for row in whole.x.flatten(1).tolist()}
    assert len(part) == 200
    assert part.num_classes == 10
    assert all(tuple(row) in rows for row in part.x.flatten(1).tolist())
    assert len(torch.unique(part.x.flatten(1), dim=0)) == 200
    assert not torch.equal(dgm.data.load("digits", num_data=200, seed=1).x, part.x)


# -- generated ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GENERATED)
def test_points_are_standardized_and_repeatable(name):
    data = dgm.data.load(name, num_data=1000)
    assert data.x.dtype == torch.float32
    assert data.x.shape == (1000, 2)
    assert data.measure == "density"
    assert 1.4 < data.x.abs().max() < 5
    assert data.num_classes == len(data.y.unique())
    again, other = dgm.data.load(name, num_data=1000), dgm.data.load(name, num_data=1000, seed=1)
    test = dgm.data.load(name, "test", num_data=1000)
    assert torch.equal(again.x, data.x)
    assert not torch.equal(other.x, data.x)
    assert not torch.equal(test.x, data.x)


def test_points_take_the_default_dtype(float64):
    assert dgm.data.load("moons").x.dtype == torch.float64


@pytest.mark.parametrize("name", GENERATED)
def test_components_are_equally_likely(name):
    counts = np.bincount(dgm.data.load(name).y.numpy())
    assert stats.chisquare(counts).pvalue > 0.001


def normal(values, scale):
    """Kolmogorov-Smirnov p-value against N(0, scale^2)."""
    return stats.kstest(values, stats.norm(0, scale).cdf).pvalue


@pytest.mark.parametrize("name", GENERATED)
def test_few_points_are_of_as_many_classes_as_many(name):
    for seed in range(4):  # in one draw of one point all classes but one lack data
        assert dgm.data.load(name, num_data=1, seed=seed).num_classes == dgm.data.load(name).num_classes


def test_checkerboard_is_uniform_on_its_dark_squares():
    data = dgm.data.load("checkerboard")
    x = data.x.double().numpy()
    cells = np.floor((x + 4) / 2).astype(int)
    assert ((cells >= 0) & (cells < 4)).all()
    assert (cells.sum(1) % 2 == 0).all()
    inside = ((x + 4) / 2) % 1
    assert all(stats.kstest(inside[:, i], "uniform").pvalue > 0.001 for i in range(2))
    squares = {
        (*cell, label) for cell, label in zip(cells.tolist(), data.y.tolist(), strict=True) for cell in [tuple(cell)]
    }
    assert len(squares) == 8  # one label per square


def test_rings_have_radius_one_two_three():
    data = dgm.data.load("rings")
    x = data.x.double().numpy()
    assert normal(np.hypot(*x.T) - (data.y.numpy() + 1), 0.1) > 0.001
    assert stats.kstest(np.arctan2(*x.T) / (2 * np.pi) + 0.5, "uniform").pvalue > 0.001


def test_moons_are_half_circles():
    data = dgm.data.load("moons")
    sign = 1 - 2 * data.y.numpy()[:, None]
    # Each moon about its own center, the lower one turned over.
    x = sign * (data.x.double().numpy() - sign * (-1.0, -0.5))
    radius = np.hypot(*x.T)
    # A point on a circle of radius r with noise of scale s lies at r + s^2 / 2r on average, to first order.
    standard_error = 0.2 / math.sqrt(len(x))
    assert abs(radius.mean() - (2 + 0.2**2 / 4)) < 4 * standard_error
    assert abs(radius.std() - 0.2) < 4 * standard_error / math.sqrt(2)
    assert (x[:, 1] > -1).all()


def test_pinwheel_arms_unbend_to_normals():
    data = dgm.data.load("pinwheel")
    point = torch.view_as_complex(data.x.double()).numpy() / 2
    arm = 2 * np.pi * data.y.numpy() / 5
    # The bend depends on the coordinate along the arm: a fixed point, contracting because arms are thin.
    along = np.abs(point)
    for _ in range(60):
        straight = point * np.exp(-1j * (arm + 0.25 * np.exp(along)))
        along = straight.real
    assert normal(straight.real - 1, 0.3) > 0.001
    assert normal(straight.imag, 0.1) > 0.001


# -- files -------------------------------------------------------------------------------------------------------------


def idx(array):
    """An array of bytes in the idx format."""
    return struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def no_default(monkeypatch):
    monkeypatch.delenv("DGM_DATA", raising=False)


@pytest.fixture
def files(tmp_path, monkeypatch, no_default):
    """A writer of small data sets whose checksums are declared: ``files(name, folder, zipped)`` returns its arrays."""

    def write(name, folder, zipped=True):
        random = np.random.default_rng(0)
        (tmp_path / folder).mkdir(parents=True)
        arrays, sums = {}, {}
        if name in BITS:
            for split in ("train", "valid", "test"):
                bits = random.integers(2, size=(6, math.prod(BITS[name])), dtype=np.uint8)
                packed = np.packbits(bits, axis=1)
                np.savez(tmp_path / folder / f"{split}.npz", packed=packed, shape=bits.shape)
                arrays[split], sums[split] = bits, hashlib.sha256(packed.tobytes()).hexdigest()
        else:
            for split, prefix in (("train", "train"), ("test", "t10k")):
                images = random.integers(256, size=(5, 28, 28), dtype=np.uint8)
                labels = random.integers(10, size=5, dtype=np.uint8)
                arrays[split] = images, labels
                for stem, array in ((f"{prefix}-images-idx3-ubyte", images), (f"{prefix}-labels-idx1-ubyte", labels)):
                    content = idx(array)
                    sums[stem] = hashlib.md5(content).hexdigest()
                    path = tmp_path / folder / (stem + ".gz" * zipped)
                    path.write_bytes(gzip.compress(content) if zipped else content)
        monkeypatch.setitem(CHECKSUMS, name, sums)
        return arrays

    write.path = tmp_path
    return write


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(("name", "folder"), [(name, folder) for name in IDX for folder in IDX[name]])
def test_idx_files_are_read_from_every_layout(files, name, folder, zipped):
    arrays = files(name, folder, zipped)
    for split, (images, labels) in arrays.items():
        data = dgm.data.load(name, split, data_dir=files.path)
        np.testing.assert_array_equal(data.x.squeeze(1).numpy(), images)
        np.testing.assert_array_equal(data.y.numpy(), labels)
        assert (data.event_shape, data.levels, data.num_classes) == ((1, 28, 28), 256, 10)
        assert data.x.dtype == torch.uint8


@pytest.mark.parametrize("name", BITS)
def test_packed_bits_are_read(files, name):
    arrays = files(name, "binarized-mnist" if name == "binarized-mnist" else f"binary/{name}")
    for split, bits in arrays.items():
        data = dgm.data.load(name, split, data_dir=str(files.path))
        np.testing.assert_array_equal(data.x.flatten(1).numpy(), bits)
        assert (data.event_shape, data.levels, data.y) == (BITS[name], 2, None)


def test_the_environment_names_the_folder(files, monkeypatch):
    files("mnist", "mnist")
    monkeypatch.setenv("DGM_DATA", str(files.path))
    assert len(dgm.data.load("mnist", num_data=3)) == 3
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        dgm.data.load("mnist", data_dir="elsewhere")  # an argument goes before the environment


def test_without_a_folder_the_message_says_how_to_set_one(no_default):
    with pytest.raises(FileNotFoundError, match=r"mnist is read from files.*DGM_DATA.*mnist/ or MNIST/raw/"):
        dgm.data.load("mnist")


def test_missing_files_are_listed(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        dgm.data.load("fashion-mnist", "test", data_dir=tmp_path)
    for place in ("fashion-mnist", "FashionMNIST/raw"):
        for ending in ("", ".gz"):
            assert str(tmp_path / place / f"t10k-images-idx3-ubyte{ending}") in str(error.value)
    assert "DGM_DATA" in str(error.value)
    assert "\n" not in str(error.value)


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def flip(path):
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[-1] ^= 1
    path.write_bytes(gzip.compress(bytes(content)))


BAD_IDX = {
    "truncated gzip": (cut, r"truncated or is no gzip file.*copy it again"),
    "no gzip": (lambda path: path.write_bytes(b"<html>not found</html>"), "truncated or is no gzip file"),
    "empty gzip": (lambda path: path.write_bytes(gzip.compress(b"")), "magic number of a 3-dimensional.* is 00000803"),
    "labels for images": (
        lambda path: path.write_bytes(gzip.compress(idx(np.zeros(5, np.uint8)))),
        "starts with the bytes 00000801.*is 00000803",
    ),
    "header only": (lambda path: path.write_bytes(gzip.compress(b"\0\0\x08\x03\0\0")), "truncated"),
    "too few values": (
        lambda path: path.write_bytes(gzip.compress(idx(np.zeros((5, 28, 28), np.uint8))[:-1])),
        "3935 bytes, but its header announces 3936",
    ),
    "one bit flipped": (flip, "md5 checksum .*mnist has"),
}


@pytest.mark.parametrize("case", BAD_IDX)
def test_bad_idx_files_say_what_is_wrong(files, case):
    files("mnist", "mnist")
    path = files.path / "mnist" / "train-images-idx3-ubyte.gz"
    damage, message = BAD_IDX[case]
    damage(path)
    with pytest.raises(ValueError, match=message) as error:
        dgm.data.load("mnist", data_dir=files.path)
    assert str(path) in str(error.value)
    assert len(dgm.data.load("mnist", "test", data_dir=files.path)) == 5


def save_one(path):
    with path.open("wb") as file:
        np.save(file, np.zeros((6, 2), np.uint8))


BAD_NPZ = {
    "truncated": (cut, "truncated or is no npz file"),
    "empty": (lambda path: path.write_bytes(b""), "truncated or is no npz file"),
    "text": (lambda path: path.write_text("0 1 1 0"), "truncated or is no npz file"),
    "another array": (
        lambda path: np.savez(path, bits=np.zeros((6, 2), np.uint8)),
        "no npz file with an array 'packed'",
    ),
    "one array": (save_one, "no npz file"),
    "pickled": (lambda path: np.savez(path, packed=np.array([{}], dtype=object)), "no npz file"),
    "other bits": (lambda path: np.savez(path, packed=np.zeros((6, 2), np.uint8)), "sha256 checksum .*nltcs has"),
}


@pytest.mark.parametrize("case", BAD_NPZ)
def test_bad_npz_files_say_what_is_wrong(files, case):
    files("nltcs", "binary/nltcs")
    path = files.path / "binary" / "nltcs" / "valid.npz"
    damage, message = BAD_NPZ[case]
    damage(path)
    with pytest.raises(ValueError, match=message) as error:
        dgm.data.load("nltcs", "valid", data_dir=files.path)
    assert str(path) in str(error.value)


BAD_CALLS = {
    "unknown name": (dict(name="cifar"), "no data set 'cifar'.*digits, .*binarized-mnist"),
    "unknown split": (dict(name="digits", split="valid"), "digits has no split 'valid': choose one of train, test"),
    "num zero": (dict(name="moons", num_data=0), "num_data must be a positive integer, got 0"),
    "num real": (dict(name="moons", num_data=10.0), r"num_data.*got 10\.0"),
    "num too large": (
        dict(name="digits", num_data=5000),
        "num_data is 5000, but digits has 1437 data in its train split",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_say_what_is_wrong(case):
    arguments, message = BAD_CALLS[case]
    with pytest.raises(ValueError, match=message):
        dgm.data.load(**arguments)


# -- the real files, where they are ------------------------------------------------------------------------------------


@pytest.mark.skipif("DGM_DATA" not in os.environ, reason="DGM_DATA names no folder with the published files")
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("mnist", {"train": 60000, "test": 10000}),
        ("fashion-mnist", {"train": 60000, "test": 10000}),
        ("binarized-mnist", {"train": 50000, "valid": 10000, "test": 10000}),
        ("nltcs", {"train": 16181, "valid": 2157, "test": 3236}),
        ("plants", {"train": 17412, "valid": 2321, "test": 3482}),
        ("mushrooms", {"train": 2000, "valid": 500, "test": 5624}),
        ("dna", {"train": 1600, "valid": 400, "test": 1186}),
        ("nips", {"train": 400, "valid": 100, "test": 1240}),
    ],
)
def test_the_published_files(name, sizes):
    for split, size in sizes.items():
        data = dgm.data.load(name, split)
        assert len(data) == size
        if name == "binarized-mnist" and split == "test":
            assert data.x.double().mean().item() == pytest.approx(0.13251224, abs=1e-8)
        if name in IDX:
            assert data.y.bincount().min() >= size // 12  # ten classes of nearly equal size


@pytest.mark.parametrize("compressed", [True, False])
def test_a_small_file_that_unpacks_to_a_large_one_is_refused(tmp_path, monkeypatch, compressed):
    """No more is unpacked than the largest data set has."""
    monkeypatch.setattr(dgm.data, "LARGEST", 10_000)
    (tmp_path / "mnist").mkdir()
    content = bytes(10**7)
    name = "train-images-idx3-ubyte" + (".gz" if compressed else "")
    (tmp_path / "mnist" / name).write_bytes(gzip.compress(content) if compressed else content)
    with pytest.raises(ValueError, match="holds more than 10,000 bytes, but mnist does not"):
        dgm.data.load("mnist", data_dir=tmp_path)
    (tmp_path / "binary" / "nltcs").mkdir(parents=True)
    np.savez_compressed(tmp_path / "binary" / "nltcs" / "train.npz", packed=np.zeros((10**6, 2), np.uint8))
    with pytest.raises(ValueError, match="it holds 2,000,128 bytes, more than nltcs has"):
        dgm.data.load("nltcs", data_dir=tmp_path)
