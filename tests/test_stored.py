"""Data that are read by rows: the same weights as from memory, bit for bit, and every row once in an epoch."""

import copy
import itertools
import tracemalloc

import numpy as np
import pandas
import pytest
import torch
from PIL import Image

import dgm_pyro as dgm
from dgm_pyro import cli, sources
from dgm_pyro import data as data_room
from dgm_pyro.experiments import commands, runs
from dgm_pyro.networks import MADE

REALS = np.random.default_rng(0).normal(size=(120, 3))


class Rows(torch.utils.data.Dataset):
    """Pairs of x and a label."""

    def __len__(self):
        return len(REALS)

    def __getitem__(self, i):
        return torch.from_numpy(REALS[i]), i % 3


class Stream(torch.utils.data.IterableDataset):
    def __len__(self):
        return len(REALS)

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        return itertools.islice(iter(REALS), worker and worker.id, None, worker and worker.num_workers)


@pytest.fixture
def path(tmp_path):
    np.save(tmp_path / "reals.npy", REALS)
    return tmp_path / "reals.npy"


@pytest.fixture
def windows(monkeypatch):
    """Windows of four batches of five, in blocks of three; float32 of three columns are 12 bytes."""
    monkeypatch.setattr(data_room, "WINDOW", 240)
    monkeypatch.setattr(data_room, "BLOCK", 36)
    monkeypatch.setattr(sources, "GAP", 48)


def small():
    torch.manual_seed(0)
    return dgm.Autoregressive(dgm.Normal(3, MADE(3, 2, hidden=(8,))))


def trained(data, epochs=3, **options):
    program = small()
    history = dgm.fit(program, data, epochs=epochs, batch_size=8, device="cpu", progress=False, **options)
    return {name: value.clone() for name, value in program.state_dict().items()}, history


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("source", "num_workers", "epochs"), [("path", 0, 3), ("rows", 0, 3), ("rows", 1, 1)])
def test_weights_are_those_of_data_in_memory(source, num_workers, epochs, path):
    weights, history = trained(dgm.data.open(path), epochs, accumulate=2)
    stored = dgm.data.open(path if source == "path" else Rows(), in_memory=False, num_workers=num_workers)
    assert isinstance(stored, data_room.StoredData)
    again, other = trained(stored, epochs, accumulate=2)
    assert same(again, weights)
    assert [epoch.validation for epoch in other.epochs] == [epoch.validation for epoch in history.epochs]


def test_evidence_is_that_of_data_in_memory(path):
    program = dgm.build("maf", dgm.data.open(path))
    memory, stored = (
        dgm.evaluate(program, dgm.data.open(path, in_memory=kept), batch_size=32) for kept in (True, False)
    )
    assert torch.equal(memory.values, stored.values)
    assert memory.digest == stored.digest


def test_a_network_has_the_dropout_of_the_number_of_all_data(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5_000, 1, 32, 32), dtype=np.uint8)
    images[0, 0, 0, :2] = 0, 255
    np.save(tmp_path / "images.npy", images)
    memory, stored = (dgm.data.open(tmp_path / "images.npy", in_memory=kept) for kept in (True, False))
    assert len(stored.excerpt) < 5_000 == len(stored)
    for model in ("vae", "diffusion"):
        one, other = (
            [layer.p for layer in dgm.build(model, data).modules() if isinstance(layer, torch.nn.Dropout)]
            for data in (memory, stored)
        )
        assert one == other
        assert 0.1 in one


@pytest.mark.parametrize("count", [120, 119, 113])
def test_each_datum_is_in_an_epoch_once_and_windows_are_blocks(count, tmp_path, windows):
    np.save(tmp_path / "counted.npy", np.arange(3 * count, dtype=np.float32).reshape(count, 3))
    data = dgm.data.open(tmp_path / "counted.npy", in_memory=False)
    random = torch.Generator().manual_seed(0)
    orders = []
    for _ in range(2):
        batches = data.shuffled(5, random)
        rows = [data[rows].x[:, 0] / 3 for rows in batches]
        orders.append(torch.cat(rows))
        assert orders[-1].sort().values.tolist() == [*range(count)]
        assert [len(each) for each in rows[:-1]] == [5] * (len(rows) - 1)
        window = torch.cat(rows[:4]).sort().values
        assert len((window // 3).unique()) <= 8  # of 20 data: six whole blocks, and parts of two at most
        assert not torch.equal(torch.cat(rows[:4]), window)
    assert not torch.equal(*orders)


def test_resumed_in_the_middle_of_a_window_the_weights_are_the_same(path, windows):
    data = dgm.data.open(path, in_memory=False)
    whole, _ = trained(data)
    options = dgm.TrainingOptions(epochs=3, batch_size=8, device="cpu")
    with dgm.Training(small(), data, options=options) as training:
        training.advance()
        assert training.advance(lambda: training.taken == 21) is None
        state = copy.deepcopy(training.state_dict())
    assert same(trained(data, resume=state)[0], whole)
    with pytest.raises(ValueError, match="the digest of the data"):
        trained(dgm.data.open(REALS.astype(np.float32) + 1), resume=state)


def test_a_share_is_all_that_a_process_reads(path, windows, monkeypatch):
    data = dgm.data.open(path, in_memory=False)
    read = []
    monkeypatch.setattr(data._source, "read", lambda rows, whole=data._source.read: read.extend(rows) or whole(rows))
    batches = data.shuffled(6, torch.Generator().manual_seed(0), lambda rows: rows.tensor_split(2)[1])
    for rows in batches:
        share = rows.tensor_split(2)[1]
        assert torch.equal(data[share].x, torch.from_numpy(REALS).float()[share])
    assert len(read) == 60


def test_an_index_reads_what_it_reads_of_memory(path, windows):
    memory, stored = dgm.data.open(path), dgm.data.open(path, in_memory=False)
    for index in (3, slice(100, None, 7), [5, 5, 0, -1], torch.arange(120) % 11 == 0, torch.tensor([40, 2])):
        assert torch.equal(stored[index].x, memory[index].x)
    with pytest.raises(IndexError, match="does not fit StoredData"):
        stored[[120]]
    parts = stored.split(0.25, seed=3)
    both = torch.cat([part[:].x for part in parts])
    assert (len(parts[0]), len(parts[1])) == (90, 30)
    assert torch.equal(both.sort(0).values, memory.x.sort(0).values)
    again = torch.cat([part[:].x for part in parts[1].split(0.5)])
    assert torch.equal(again.sort(0).values, parts[1][:].x.sort(0).values)


def test_many_data_are_split_by_groups(path, monkeypatch):
    monkeypatch.setattr(data_room, "GRAINS", 50)  # so that three data are a group
    stored = dgm.data.open(path, in_memory=False)
    train, test = stored.split(0.2)
    assert len(test) == 24
    rows = torch.cat([part[:].x for part in (train, test)])
    assert torch.equal(rows.sort(0).values, torch.from_numpy(REALS).float().sort(0).values)
    np.save(path, REALS[:119])
    parts = dgm.data.open(path, in_memory=False).split(0.2)
    assert sum(map(len, parts)) == 119
    assert len(torch.cat([part[:].x for part in parts]).unique(dim=0)) == 119


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_is_read_from_its_start_to_its_end(num_workers):
    stream = dgm.data.open(Stream(), num_workers=num_workers)
    with pytest.raises(ValueError, match="cannot be split at random: pass validation"):
        trained(stream)
    seen = torch.cat([stream[rows].x for rows in stream.shuffled(7, torch.Generator())])
    whole = torch.from_numpy(REALS).float()
    assert torch.equal(seen.sort(0).values, whole.sort(0).values)
    if not num_workers:
        assert torch.equal(seen, whole)
        assert same(*(trained(data, validation=None)[0] for data in (stream, dgm.data.open(Stream()))))


def test_a_stream_says_how_long_it_is():
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            return itertools.repeat(REALS[0])

    class Short(Stream):
        def __iter__(self):
            return iter(REALS[:100])

    with pytest.raises(TypeError, match="Endless without a length: give it a __len__"):
        dgm.data.open(Endless())
    with pytest.raises(ValueError, match=r"source ended before its datum 119, but its length is 120"):
        trained(dgm.data.open(Short()), validation=None)


def test_a_parquet_file_is_read_by_groups_of_rows(tmp_path, windows):
    frame = pandas.DataFrame(REALS, columns=["a", "b", "c"])
    frame.loc[7, "b"] = np.nan
    frame.to_parquet(tmp_path / "t.parquet", row_group_size=13)
    memory = dgm.data.open(tmp_path / "t.parquet", columns=["a", "b"], given="c")
    stored = dgm.data.open(tmp_path / "t.parquet", columns=["a", "b"], given="c", in_memory=False)
    rows = torch.tensor([118, 0, 7, 13, 12, 40])
    for name, part in memory[rows].parts.items():
        assert torch.equal(stored[rows].parts[name], part)
    assert stored.columns == ("a", "b")
    assert stored.misses


# -- labels, and what is given -----------------------------------------------------------------------------------------

LABELS = {
    "codes": np.arange(120) % 3,
    "years": 1999 + np.arange(120) % 4,
    "words": np.array(["b", "c", "a", "d"])[np.arange(120) % 4],
    "halves": np.arange(120) % 3 / 2,
    "unknown": np.where(np.arange(120) % 5 == 0, np.nan, np.arange(120) % 3),
}


@pytest.fixture
def few(monkeypatch):
    """An excerpt, and labels looked at together, of a few rows, in which not every class is."""
    monkeypatch.setattr(data_room, "EXCERPT", 1)
    monkeypatch.setattr(data_room, "LEAST", 2)
    monkeypatch.setattr(sources, "CHUNK", 7)


def alike(stored, memory):
    """Every part of both, in any rows."""
    assert isinstance(stored, data_room.StoredData)
    assert (stored.num_classes, stored.classes, stored.columns) == (memory.num_classes, memory.classes, memory.columns)
    for rows in (torch.tensor([118, 0, 7, 13, 12, 40]), torch.tensor([1]), slice(None)):
        one, other = stored[rows], memory[rows]
        assert one.parts.keys() == other.parts.keys()
        assert all(torch.equal(part, other.parts[name]) for name, part in one.parts.items())


@pytest.mark.parametrize("kind", LABELS)
def test_labels_are_read_beside_their_rows(kind, tmp_path, windows, few):
    label, given = LABELS[kind], REALS[:, :1] + 1
    frame = pandas.DataFrame(REALS, columns=["a", "b", "c"]).assign(label=label)
    frame.to_parquet(tmp_path / "t.parquet", row_group_size=13)
    np.savez(tmp_path / "a.npz", given=given, y=label, x=REALS)
    np.save(tmp_path / "a.npy", REALS)
    for name, options in {
        "t.parquet": {"label": "label", "given": "c"},
        "a.npz": {},
        "a.npy": {"label": label, "given": given},
    }.items():
        memory, stored = (dgm.data.open(tmp_path / name, in_memory=kept, **options) for kept in (True, False))
        assert memory.given.shape == (120, 1)
        alike(stored, memory)


def test_a_labeled_program_learns_from_stored_labels_what_it_learns_from_memory(tmp_path, few):
    np.savez(tmp_path / "a.npz", x=REALS, y=LABELS["words"])
    found = []
    for kept in (True, False):
        data = dgm.data.open(tmp_path / "a.npz", in_memory=kept)
        torch.manual_seed(0)
        program = dgm.build("pixels", data, labeled=True, standardize=False)
        dgm.fit(program, data, epochs=2, batch_size=8, device="cpu", progress=False)
        found.append(program.state_dict())
    assert same(*found)


def test_arrays_in_an_archive_are_whole(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "a.npz", x=REALS)
    with pytest.raises(
        ValueError, match=r"a\.npz is compressed, so it cannot be read by rows: write it by numpy\.savez"
    ):
        dgm.data.open(tmp_path / "a.npz", in_memory=False)
    monkeypatch.setattr(sources, "IN_MEMORY", 0)
    assert not isinstance(dgm.data.open(tmp_path / "a.npz"), data_room.StoredData)
    np.savez(tmp_path / "b.npz", x=REALS, y=np.zeros((120, 2)))
    with pytest.raises(ValueError, match=r"the labels in .*b\.npz have shape \(120, 2\): write one label per row"):
        dgm.data.open(tmp_path / "b.npz")
    np.savez(tmp_path / "b.npz", x=REALS, y=np.zeros(119))
    with pytest.raises(ValueError, match=r"label has 119 rows, but .*b\.npz has 120"):
        dgm.data.open(tmp_path / "b.npz")
    content = (tmp_path / "b.npz").read_bytes()
    (tmp_path / "b.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"b\.npz cannot be read as an \.npz file of arrays"):
        dgm.data.open(tmp_path / "b.npz")


# -- images ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path):
    """25 gray images of 6 x 5 pixels, in folders of two classes."""
    pixels = np.random.default_rng(0).integers(256, size=(25, 5, 6), dtype=np.uint8)
    for i, image in enumerate(pixels):
        file = tmp_path / "pictures" / ("dog" if i % 3 else "cat") / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
    return tmp_path / "pictures"


@pytest.mark.parametrize(
    "options", [{}, {"levels": 4}, {"size": 4}, {"gray": False, "crop": 3}, {"size": (3, 4), "gray": True}], ids=str
)
def test_a_folder_of_images_is_decoded_as_batches_need_it(options, pictures, few):
    if "size" in options:  # of a size of its own, and in color
        Image.fromarray(np.zeros((9, 8, 3), np.uint8)).save(pictures / "dog" / "odd.png")
    memory = dgm.data.open(pictures, in_memory=True, **options)
    stored = dgm.data.open(pictures, in_memory=False, **options)
    assert isinstance(stored, data_room.StoredData)
    assert (stored.classes, stored.num_classes, stored.levels) == (("cat", "dog"), 2, options.get("levels", 256))
    for rows in (torch.tensor([20, 0, 7]), slice(None)):
        assert torch.equal(stored[rows].x, memory[rows].x)
        assert torch.equal(stored[rows].y, memory[rows].y)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_weights_of_a_folder_are_those_of_memory_and_it_is_resumed_inside_an_epoch(num_workers, pictures):
    memory = dgm.data.open(pictures)
    stored = dgm.data.open(pictures, in_memory=False, num_workers=num_workers)

    def small_images():
        torch.manual_seed(0)
        return dgm.Autoregressive(dgm.Categorical((1, 5, 6), 256, MADE((1, 5, 6), 256, hidden=(2,), levels=256)))

    whole = small_images()
    dgm.fit(whole, memory, epochs=2, batch_size=4, device="cpu", progress=False)
    options = dgm.TrainingOptions(epochs=2, batch_size=4, device="cpu")
    with dgm.Training(small_images(), stored, options=options) as training:
        assert training.advance(lambda: training.taken == 3) is None
        state = copy.deepcopy(training.state_dict())
    again = small_images()
    dgm.fit(again, stored, epochs=2, batch_size=4, device="cpu", progress=False, resume=state)
    assert same(again.state_dict(), whole.state_dict())


def test_a_bad_image_is_named_as_it_is_read(pictures, few):
    data = dgm.data.open(pictures, in_memory=False)
    damaged = pictures / "dog" / "8.png"
    damaged.write_bytes(damaged.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"dog/8\.png cannot be read as an image .*: copy it again, or remove it"):
        data[:]
    Image.fromarray(np.zeros((9, 8), np.uint8)).save(damaged)
    row = [file.name for file in data._source.files].index("8.png")
    with pytest.raises(ValueError, match=r"dog/8\.png has another size than when its folder was opened"):
        data[row]
    with pytest.raises(ValueError, match=r"cat/0\.png has 6 x 5 pixels, but .*dog/8\.png has 8 x 9: pass size"):
        dgm.data.open(pictures, in_memory=False)
    damaged.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"dog/8\.png cannot be read as an image"):
        dgm.data.open(pictures, in_memory=False)


def test_a_large_folder_is_not_read_into_memory(pictures, monkeypatch):
    monkeypatch.setattr(sources, "IN_MEMORY", 25 * 30 - 1)
    assert isinstance(dgm.data.open(pictures), data_room.StoredData)
    monkeypatch.setattr(sources, "IN_MEMORY", 25 * 30)
    assert not isinstance(dgm.data.open(pictures), data_room.StoredData)


def test_a_labeled_run_on_a_stored_folder_is_evaluated_as_one_in_memory(pictures, tmp_path, monkeypatch):
    options = dgm.TrainingOptions(epochs=1, batch_size=8, device="cpu")
    found = []
    for number, largest in enumerate((10**9, 0)):
        monkeypatch.setattr(sources, "IN_MEMORY", largest)
        folder = tmp_path / str(number)
        runs.train(folder, "pixels", str(pictures), {}, options, labeled=True, progress=False)
        run = commands.open_run(folder, "cpu")
        assert isinstance(run.points("test"), data_room.StoredData) == (largest == 0)
        found.append(commands.evaluate_run(run, progress=False).as_dict() | {"run": ""})
        unlabeled = run.points("test", str(pictures / "dog"))  # whose classes the record names
        assert unlabeled.num_classes is None
    assert "accuracy" in found[0]
    assert found[0] == found[1]


def test_workers_of_the_command_line_decode_a_large_folder(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "IN_MEMORY", 0)
    seen, loader = [], sources._loader

    def noted(dataset, num_workers, *rest, **options):
        seen.append(num_workers)
        return loader(dataset, num_workers, *rest, **options)

    monkeypatch.setattr(sources, "_loader", noted)
    command = ["train", "pixels", "--data", str(pictures), "--epochs", "1", "--device", "cpu", "--out"]
    assert cli.main([*command, str(tmp_path / "without")]) == 0
    assert seen == []
    assert cli.main([*command, str(tmp_path / "with"), "--num-workers", "1"]) == 0
    assert set(seen) == {1}
    assert same(*(dgm.load(tmp_path / name).state_dict() for name in ("without", "with")))


def test_bad_values_are_found_as_they_are_read(path, monkeypatch):
    monkeypatch.setattr(data_room, "EXCERPT", 1)
    values = np.zeros((5000, 300))
    values[:, 0] = np.arange(5000)
    values[1234, 5] = np.inf
    np.save(path, values)
    data = dgm.data.open(path, in_memory=False)
    with pytest.raises(ValueError, match="row 1234 of the data holds inf in feature 5"):
        data[1230:1240]
    values[1234, 5] = np.nan
    np.save(path, values)
    with pytest.raises(ValueError, match="row 1234 of reals misses a value, but none of the 256 rows"):
        data[1230:1240]
    np.save(path, np.asfortranarray(values))
    with pytest.raises(ValueError, match="is in Fortran order"):
        dgm.data.open(path, in_memory=False)


def test_what_needs_all_of_it_says_so(path):
    stored = dgm.data.open(path, in_memory=False)
    with pytest.raises(TypeError, match=r"reals is read by rows, but this needs all of its 120 data in memory"):
        _ = stored.x
    assert stored.y is None
    assert repr(stored) == "StoredData('reals', x=(120, 3) float32)"
    with pytest.raises(ValueError, match=r"in_memory=False is for \.npy, \.npz, \.parquet files"):
        dgm.data.open(REALS, in_memory=False)
    for kept in (True, False):
        with pytest.raises(ValueError, match=r"label is 'y', but a \.npy file holds one array: pass label as an array"):
            dgm.data.open(path, in_memory=kept, label="y")
        with pytest.raises(ValueError, match=r"given is \['t'\], but a \.npy file holds one array"):
            dgm.data.open(path, in_memory=kept, given=["t"])


def test_memory_is_that_of_a_few_windows(tmp_path, monkeypatch):
    """A sparse file of 400 MB, which takes no room on the disk, in windows of 1 MB."""
    monkeypatch.setattr(data_room, "WINDOW", 2**20)
    monkeypatch.setattr(data_room, "BLOCK", 2**16)
    monkeypatch.setattr(data_room, "EXCERPT", 1)
    np.lib.format.open_memmap(tmp_path / "sparse.npy", "w+", np.float32, (100_000, 1000))
    tracemalloc.start()
    try:
        train, held_out = dgm.data.open(tmp_path / "sparse.npy", in_memory=False).split(0.1)
        batches = train.shuffled(50, torch.Generator())
        for place in range(30):
            assert len(train[batches[place]]) == 50
        assert len(held_out[:50]) == 50
        assert tracemalloc.get_traced_memory()[1] < 8e6
    finally:
        tracemalloc.stop()


def test_a_run_on_a_large_file_is_that_on_a_small_one(path, tmp_path, monkeypatch):
    options = dgm.TrainingOptions(epochs=2, batch_size=16, device="cpu")
    found = []
    for number, largest in enumerate((10**9, 0)):
        monkeypatch.setattr(sources, "IN_MEMORY", largest)
        folder = tmp_path / str(number)
        program, record, _ = runs.train(folder, "realnvp", str(path), {}, options, progress=False)
        test = record.points("test")
        assert isinstance(test, data_room.StoredData) == (largest == 0)
        found.append((program.state_dict(), dgm.evaluate(program, test).values, record.points("train", num_data=9).x))
    (weights, values, some), (again, others, few) = found
    assert same(weights, again)
    assert torch.equal(values, others)
    assert torch.equal(some, few)
    np.save(path, REALS + 1)
    with pytest.raises(ValueError, match="have changed since the run was trained"):
        record.points("test")
