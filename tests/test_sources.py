"""`dgm.data.open`: what is read is what was written, and what cannot be read is named by file, row and column."""

import math
import pickle

import numpy as np
import pandas
import pytest
import torch
from PIL import Image

import dgm_pyro as dgm

TABLE = "height,city,weight\n1.5,Bonn,60\n1.75,Rome,70\n,Bonn,80.5\n1.25,,90\n"
FRAME = pandas.DataFrame({"a": [1.0, math.nan, 3.0], "b": [4, 5, 6], "c": ["u", "v", "u"], "t": [0.1, 0.2, 0.3]})


def written(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content)
    return path


@pytest.mark.parametrize(("suffix", "separator"), [(".csv", ","), (".csv", ";"), (".tsv", "\t")])
def test_a_table_has_columns_labels_and_missing_values(tmp_path, suffix, separator):
    path = written(tmp_path / f"people{suffix}", TABLE.replace(",", separator))
    data = dgm.data.open(path, label="city")
    assert data.columns == ("height", "weight")
    assert data.x.tolist() == [[1.5, 60], [1.75, 70], [0, 80.5], [1.25, 90]]
    assert data.mask.tolist() == [[True, True], [True, True], [False, True], [True, True]]
    assert (data.y.tolist(), data.classes, data.name) == ([0, 1, 0, -1], ("Bonn", "Rome"), "people")


def test_columns_are_chosen_and_given_by_name(tmp_path):
    FRAME.to_csv(tmp_path / "t.csv", index=False)
    FRAME.to_parquet(tmp_path / "t.parquet")
    for source in (FRAME, tmp_path / "t.csv", tmp_path / "t.parquet"):
        data = dgm.data.open(source, given="t", columns=["b"], label="c")
        assert (data.columns, data.given_columns, data.classes) == (("b",), ("t",), ("u", "v"))
        assert data.x.flatten().tolist() == [4, 5, 6]
        torch.testing.assert_close(data.given, torch.tensor([[0.1], [0.2], [0.3]]))
        assert data.mask is None
    assert dgm.data.open(FRAME[["a", "b"]], levels=7).x.tolist() == [[1, 4], [0, 5], [3, 6]]
    assert dgm.data.open(FRAME["b"]).x.shape == (3, 1)


def test_labels_keep_the_numbers_that_they_are_and_the_order_that_is_asked_for():
    x = np.zeros((4, 1))
    assert dgm.data.open(x, label=np.array([1, 0, 2, -1])).classes is None
    years = dgm.data.open(x, label=np.array([1999, 2001, 1999, 2010]))
    assert (years.y.tolist(), years.classes) == ([0, 1, 0, 2], ("1999", "2001", "2010"))
    fixed = dgm.data.open(x[:2], label=np.array(["b", "c"]), classes=("c", "a", "b"))
    assert (fixed.y.tolist(), fixed.num_classes) == ([2, 0], 3)
    of_customers = dgm.data.open(np.zeros((3, 1)), label=[0, 10**12, 0])
    assert (of_customers.y.tolist(), of_customers.classes) == ([0, 1, 0], ("0", str(10**12)))


def test_arrays_come_back_as_they_were_saved(tmp_path):
    reals, images = np.random.default_rng(0).normal(size=(5, 3)), np.arange(5 * 12, dtype=np.uint8).reshape(5, 3, 2, 2)
    np.save(tmp_path / "reals.npy", reals)
    np.savez(tmp_path / "all.npz", x=images, y=np.array([0, 1, 1, 0, 2]), given=reals)
    data = dgm.data.open(tmp_path / "reals.npy")
    np.testing.assert_allclose(data.x.numpy(), reals, rtol=1e-6)
    data = dgm.data.open(tmp_path / "all.npz")
    assert torch.equal(data.x, torch.from_numpy(images))
    assert (data.levels, data.num_classes, data.given.shape) == (256, 3, (5, 3))
    np.savez(tmp_path / "named.npz", x=reals, kind=np.array(["u", "v", "u", "u", "v"]), t=reals[:, :1])
    data = dgm.data.open(tmp_path / "named.npz", label="kind", given=["t"])
    assert (data.classes, data.given.shape) == (("u", "v"), (5, 1))
    assert dgm.data.open(np.array([[1, 2]])).measure == "density"
    assert dgm.data.open(np.array([[1, 2]]), levels=3).measure == "mass"
    holes = dgm.data.open(np.array([[1.0, np.nan]]))
    assert holes.mask.tolist() == [[True, False]]


def test_channels_that_come_last_are_turned():
    images = np.random.default_rng(0).integers(256, size=(2, 5, 4, 3), dtype=np.uint8)
    data = dgm.data.open(images)
    assert data.event_shape == (3, 5, 4)
    assert np.array_equal(data.x[1, 2].numpy(), images[1, :, :, 2])
    assert dgm.data.open(images[..., 0]).event_shape == (1, 5, 4)


def folder_of_images(folder, mode="RGB"):
    shape = (4, 6, 3) if mode == "RGB" else (4, 6)
    arrays = np.random.default_rng(0).integers(256, size=(3, *shape), dtype=np.uint8)
    for array, place in zip(arrays, ("cat/1.png", "cat/2.png", "dog/1.png"), strict=True):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(folder / place)
    return arrays


def test_a_folder_of_images_has_a_class_for_each_folder(tmp_path):
    arrays = folder_of_images(tmp_path)
    data = dgm.data.open(tmp_path)
    assert np.array_equal(data.x.numpy(), arrays.transpose(0, 3, 1, 2))
    assert (data.y.tolist(), data.classes, data.levels) == ([0, 0, 1], ("cat", "dog"), 256)
    assert dgm.data.open(tmp_path, size=2, gray=True).event_shape == (1, 2, 2)
    assert dgm.data.open(tmp_path, size=(2, 3)).event_shape == (3, 2, 3)
    assert torch.equal(dgm.data.open(tmp_path, levels=4).x, data.x // 64)
    assert dgm.data.open(tmp_path / "cat").y is None


def test_gray_images_have_one_channel(tmp_path):
    arrays = folder_of_images(tmp_path, "L")
    assert np.array_equal(dgm.data.open(tmp_path).x[:, 0].numpy(), arrays)


class Pictures(torch.utils.data.Dataset):
    """As torchvision's: pairs of a picture and a label."""

    classes = ("a", "b")

    def __len__(self):
        return 4

    def __getitem__(self, i):
        if i >= 4:
            raise IndexError
        return Image.fromarray(np.full((3, 2, 3), 10 * i, dtype=np.uint8)), i % 2


class HuggingFace:
    """The part of a Hugging Face dataset that is used."""

    def __init__(self, frame, features):
        self.frame, self.features, self.column_names = frame, features, list(frame)

    def to_pandas(self):
        return self.frame

    def __len__(self):
        return len(self.frame)

    def __getitem__(self, i):
        return self.frame.iloc[i].to_dict()


class ClassLabel:
    names = ("low", "high")


def test_datasets_of_torch_and_hugging_face():
    data = dgm.data.open(Pictures())
    assert (data.event_shape, data.levels, data.classes) == ((3, 3, 2), 256, ("a", "b"))
    assert data.x[:, 0, 0, 0].tolist() == [0, 10, 20, 30]
    assert data.y.tolist() == [0, 1, 0, 1]
    plain = dgm.data.open(torch.utils.data.TensorDataset(torch.arange(6.0).reshape(3, 2)))
    assert plain.x.tolist() == [[0, 1], [2, 3], [4, 5]]
    table = HuggingFace(FRAME[["a", "b"]].assign(label=[0, 1, 1]), {"label": ClassLabel})
    data = dgm.data.open(table, label="label")
    assert (data.columns, data.y.tolist(), data.classes) == (("a", "b"), [0, 1, 1], ("low", "high"))
    pictures = HuggingFace(
        pandas.DataFrame({"image": [Pictures()[i][0] for i in range(2)], "label": [1, 0]}), {"label": ClassLabel}
    )
    data = dgm.data.open(pictures)
    assert (data.event_shape, data.y.tolist(), data.classes) == ((3, 3, 2), [1, 0], ("low", "high"))


def test_the_digest_is_that_of_the_values():
    first, other = FRAME[["a", "b"]], FRAME[["a", "b"]].assign(b=[4, 5, 7])
    assert dgm.data.open(first).digest == dgm.data.open(first.copy()).digest
    assert len({dgm.data.open(frame).digest for frame in (first, other, first[["b"]], first[::-1])}) == 4


PEOPLE = pandas.DataFrame({
    "age": [30, None, 41, 28], "job": ["cook", "nurse", None, "cook"], "grade": ["mid", "low", "high", "low"],
    "change": [-2, 3, 0, 1], "member": [True, False, False, True], "share": [0.5, 0.25, 0.75, 0.1],
})  # fmt: skip


def test_columns_have_kinds_by_their_values_or_by_name(tmp_path):
    PEOPLE.to_csv(tmp_path / "people.csv", index=False)
    for source in (PEOPLE, tmp_path / "people.csv"):
        data = dgm.data.open(source, kinds={"grade": ("ordinal", "low", "mid", "high"), "share": ("bounded", 0, 1)})
        assert data.kinds == {
            "age": ("count",), "job": ("category", "cook", "nurse"), "grade": ("ordinal", "low", "mid", "high"),
            "change": ("integer", -2, 3), "member": ("category", "False", "True"), "share": ("bounded", 0, 1),
        }  # fmt: skip
        assert data.x[:, 1:5].tolist() == [[0, 1, -2, 1], [1, 0, 3, 0], [0, 2, 0, 0], [0, 0, 1, 1]]
        assert data.mask[:, :2].tolist() == [[True, True], [False, True], [True, False], [True, True]]
        chain = dgm.build("made", data)
        assert chain.measure == "mass of features 0-4, density of the others"
        assert torch.isfinite(chain.log_prob(data.x)).all()
    plain = dgm.data.open(PEOPLE, kinds="auto")
    assert plain.kinds["share"] == ("real",)
    codes = dgm.data.open(pandas.DataFrame({"code": [7, 3, 7]}), kinds={"code": "category"})
    assert (codes.kinds["code"], codes.x.flatten().tolist()) == (("category", "3", "7"), [1, 0, 1])
    sizes = pandas.Categorical(["s", "m", "s"], categories=["s", "m", "l"], ordered=True)
    ordered = dgm.data.open(pandas.DataFrame({"size": sizes}), kinds={"size": "ordinal"})
    assert (ordered.kinds["size"], ordered.x.flatten().tolist()) == (("ordinal", "s", "m", "l"), [0, 1, 0])


BAD_KINDS = {
    "no such column": ({"force": "real"}, r"kinds names 'force', but the data have the columns age, job"),
    "no such kind": ({"age": "amount"}, r"kinds\['age'\] must be one of real, positive.*got 'amount'"),
    "no bounds": (
        {"share": "bounded"},
        r"kinds\['share'\] is bounded, which takes 2 bounds, got \[\]: write share=bounded:0:1",
    ),
    "beyond a bound": (
        {"share": ("bounded", 0, 0.5)},
        r"row 0, column 'share' holds '0.5', which is outside of .*bounded:0",
    ),
    "no count": ({"change": "count"}, r"row 0, column 'change' holds '-2', which is outside of the kind count"),
    "not whole": ({"share": "count"}, r"column 'share' holds '0.5', which is outside of the kind count"),
    "an unknown word": (
        {"job": ("category", "cook", "pilot")},
        r"row 1, column 'job' holds 'nurse'.*none of its words",
    ),
    "a word given twice": (
        {"job": ("category", "cook", "nurse", "cook")},
        r"kinds\['job'\] must have different words",
    ),
    "bounds in no order": (
        {"share": ("bounded", 1, 0)},
        r"kinds\['share'\] must have finite bounds in ascending order",
    ),
    "text": ({"job": "real"}, r"row 0, column 'job' holds 'cook', which is not a number"),
}


@pytest.mark.parametrize("case", BAD_KINDS)
def test_a_column_of_another_kind_is_named(case):
    kinds, words = BAD_KINDS[case]
    with pytest.raises(ValueError, match=words):
        dgm.data.open(PEOPLE, kinds=kinds)
    with pytest.raises(TypeError, match=r"kinds\['age'\] must be a kind, or a kind and its words or bounds, got 5"):
        dgm.data.open(PEOPLE, kinds={"age": 5})


def test_names_are_no_category():
    names = pandas.DataFrame({"name": [f"n{i}" for i in range(300)]})
    with pytest.raises(
        ValueError, match=r"column 'name' of the frame has 300 different values, but a category has 2 to 256"
    ):
        dgm.data.open(names, kinds="auto")


BAD_TABLES = {
    "text": ("a,b\n1,2\n3,x\n", r"t\.csv, line 3, column 'b' holds 'x', which is not a number: .*--columns"),
    "ragged": ("a,b\n1,2\n3\n", r"t\.csv, line 3: there are 1 values, but 2 columns"),
    "long": ("a,b\n1,2,3\n", r"t\.csv, line 2: there are 3 values, but 2 columns"),
    "infinite": ("a,b\n1,inf\n", r"t\.csv, line 2, column 'b' is infinite"),
    "empty": ("", r"t\.csv is empty: its first line must name the columns"),
    "no rows": ("a,b\n", r"t\.csv holds no rows"),
    "no header": ("1,2\n3,4\n", r"t\.csv has no header.*holds '1'"),
    "two of a name": ("a,a\n1,2\n", r"t\.csv has two columns named 'a'"),
    "an empty column": ("a,b\n1,\n2,\n", r"column 'b' of .*t\.csv is empty"),
    "no text": (b"\xff\xfe\x00a,b", r"t\.csv cannot be read as a table"),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_a_bad_table_is_named_by_line_and_column(case, tmp_path):
    content, words = BAD_TABLES[case]
    with pytest.raises(ValueError, match=words):
        dgm.data.open(written(tmp_path / "t.csv", content))


BAD_CHOICES = {
    "no such column": (FRAME, {"label": "z"}, "label names 'z', but the frame has the columns a, b, c, t"),
    "taken twice": (FRAME, {"label": "c", "given": "c"}, "columns, given and label name 'c' twice"),
    "nothing left": (FRAME[["b"]], {"given": "b"}, "no columns of the frame are left"),
    "empty given": (FRAME, {"given": "a", "columns": ["b"]}, "row 1, column 'a' is empty, but a given must not miss"),
    "text": (FRAME, {}, "row 0, column 'c' holds 'u', which is not a number"),
    "foreign label": (FRAME, {"label": "c", "columns": "b", "classes": ("u",)}, "row 1 has the label 'v', which is"),
    "a class given twice": (
        FRAME,
        {"label": "c", "columns": "b", "classes": ("u", "v", "u")},
        "classes must be different names",
    ),
    "infinite label": (np.zeros((2, 1)), {"label": [0.0, np.inf]}, "label holds an infinite value"),
    "no label": (np.zeros((2, 1)), {"label": [np.nan, np.nan]}, "label is missing in every row"),
    "no integers": (FRAME, {"columns": "t", "levels": 3}, "row 0 of the data holds 0.1 in feature 0, but levels=3"),
    "too few levels": (FRAME, {"columns": "b", "levels": 5}, "x holds values from 4 to 6, but levels=5"),
    "infinite": (np.array([[1.0, 2.0], [0.0, np.inf]]), {}, "row 1 of the data holds inf in feature 1"),
    "beyond float32": (
        np.array([[1.0, 2.0], [np.nan, 1e300]]),
        {},
        r"x holds 1e\+300 in row 1, but networks compute",
    ),
    "given beyond float32": (
        np.zeros((2, 1)),
        {"given": np.array([[0.0], [-1e39]])},
        r"given holds -1e\+39 in row 1, but networks",
    ),
    "no rows": (np.zeros((0, 2)), {}, r"source is empty: it has shape \(0, 2\)"),
    "columns of an array": (np.zeros((2, 2)), {"columns": ["a"]}, "columns is not for an array"),
    "size of an array": (np.zeros((2, 2)), {"size": 3}, "size is not for a ndarray"),
    "no size": (np.zeros((2, 2)), {"size": 0}, "size must be a positive int or a tuple of them, got 0"),
    "half a size": (np.zeros((2, 2)), {"size": (3,)}, r"size must be a number for .*, or a pair of them, got \(3,\)"),
    "no levels": (np.zeros((2, 2)), {"levels": 0}, "levels must be an int of at least 2, got 0"),
    "dates": (
        pandas.DataFrame({"day": pandas.to_datetime(["2026-01-01", None])}),
        {},
        r"column 'day' of the frame holds datetime64.*: turn it into real numbers",
    ),
    "complex": (pandas.DataFrame({"z": [1j, 2.0]}), {"kinds": "auto"}, "column 'z' of the frame holds complex128"),
}


@pytest.mark.parametrize("case", BAD_CHOICES)
def test_what_does_not_fit_the_source_is_refused(case):
    source, options, words = BAD_CHOICES[case]
    with pytest.raises(ValueError, match=words):
        dgm.data.open(source, **options)


def test_bad_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file or folder /nowhere/x\.csv"):
        dgm.data.open("/nowhere/x.csv")
    written(tmp_path / "plant.csv", "a")
    with pytest.raises(FileNotFoundError, match=r"no file or folder .*plnt\.csv \(did you mean 'plant\.csv'\?\)"):
        dgm.data.open(tmp_path / "plnt.csv")
    with pytest.raises(ValueError, match=r"x\.txt has an unknown kind: pass a file that ends in \.npy"):
        dgm.data.open(written(tmp_path / "x.txt", "1"))
    for name in ("x.npy", "x.npz", "x.parquet"):
        with pytest.raises(ValueError, match=name):
            dgm.data.open(written(tmp_path / name, b"nothing of the kind"))
    with pytest.raises(ValueError, match="holds no images"):
        dgm.data.open(tmp_path)
    np.savez(tmp_path / "two.npz", a=np.zeros(2), b=np.zeros(2))
    with pytest.raises(ValueError, match="it holds a, b: name the array of the data 'x'"):
        dgm.data.open(tmp_path / "two.npz")
    with pytest.raises(TypeError, match="a dict with the parts train, test"):
        dgm.data.open({"train": 1, "test": 2})


def test_bad_images_are_named(tmp_path):
    folder_of_images(tmp_path)
    Image.fromarray(np.zeros((5, 6, 3), dtype=np.uint8)).save(tmp_path / "dog/2.png")
    with pytest.raises(ValueError, match=r"cat/1\.png has 6 x 4 pixels, but .*dog/2\.png has 6 x 5: pass size"):
        dgm.data.open(tmp_path)
    with pytest.raises(ValueError, match=r"levels \(--levels\) is 257, but images of bytes have 256"):
        dgm.data.open(tmp_path, size=4, levels=257)
    whole = (tmp_path / "cat/1.png").read_bytes()
    written(tmp_path / "cat/1.png", whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cat/1\.png cannot be read as an image"):
        dgm.data.open(tmp_path, size=4)
    written(tmp_path / "cat/1.png", whole)
    written(tmp_path / "above.png", whole)
    with pytest.raises(ValueError, match="both images and folders of images"):
        dgm.data.open(tmp_path)
    Image.fromarray(np.zeros((4, 4), dtype=np.uint16)).save(tmp_path / "deep.png")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep.png").rename(tmp_path / "deep/1.png")
    with pytest.raises(ValueError, match=r"deep/1\.png .*pixels of mode I(;16)?, not bytes"):
        dgm.data.open(tmp_path / "deep")


class Trap:
    def __reduce__(self):
        return pytest.fail, ("code of a file was executed",)


def test_no_pickle_is_loaded(tmp_path):
    trap = np.empty(1, dtype=object)
    trap[0] = Trap()
    np.save(tmp_path / "trap.npy", trap, allow_pickle=True)
    np.savez(tmp_path / "trap.npz", x=trap)
    written(tmp_path / "raw.npy", pickle.dumps(Trap()))
    for name in ("trap.npy", "trap.npz", "raw.npy"):
        with pytest.raises((ValueError, TypeError), match=name):
            dgm.data.open(tmp_path / name)


@pytest.mark.parametrize("kind", [list, tuple])
def test_lists_of_numbers_are_an_array(kind):
    rows = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.5]]
    found = dgm.data.open(kind(map(kind, rows)))
    assert found.x.tolist() == rows
    assert found.y is None
    images = dgm.data.open([[[[1, 2], [3, 4]]], [[[5, 6], [7, 8]]]])
    assert images.event_shape == (1, 2, 2)
    assert images.y is None


def test_a_list_of_x_and_labels_is_a_dataset():
    found = dgm.data.open([(torch.tensor([1.0, 2.0]), 0), (torch.tensor([3.0, 4.0]), 1)])
    assert found.x.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert found.y.tolist() == [0, 1]


def test_read_only_arrays_are_taken():
    table = FRAME[["a", "b", "t"]]  # whose arrays pandas may make read-only
    x, given, label = (np.array(table[name]) for name in (["a"], ["t"], "b"))
    for each in (x, given, label):
        each.flags.writeable = False
    data = dgm.data.open(x, given=given, label=label)
    torch.testing.assert_close(data.given, torch.tensor(np.array(given), dtype=torch.float32))
    data.given.zero_()
    assert given[0, 0] == FRAME["t"][0], "a copy"
