"""Images in their published layouts: tiny files written here in exactly these layouts come back, and no code is run."""

import io
import pickle
import pickletools

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

import dgm_pyro as dgm

RANDOM = np.random.default_rng(0)
PIXELS = RANDOM.integers(256, size=(3, 3, 32, 32), dtype=np.uint8)


def as_python_2(content):
    """A pickle of protocol 2 whose texts are byte strings, and whose arrays have numpy's old module, as published."""
    out = io.BytesIO()
    out.write(b"\x80\x02}q\x00(")
    for key, value in content.items():
        out.write(b"U" + bytes([len(key)]) + key.encode())
        if isinstance(value, np.ndarray):
            raw = value.tobytes()
            out.write(b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R")
            out.write(b"(K\x01" + b"".join(b"M" + n.to_bytes(2, "little") for n in value.shape) + b"\x86")
            out.write(
                b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
            )
            out.write(b"T" + len(raw).to_bytes(4, "little") + raw + b"tb")
        else:
            out.write(b"](" + b"".join(b"K" + bytes([label]) for label in value) + b"e")
    out.write(b"u.")
    pickletools.dis(out.getvalue(), out=io.StringIO())  # it is one
    return out.getvalue()


def cifar(folder, kind):
    """Two images in each of the five batches, and one in the test batch."""
    place = folder / ("cifar-10-batches-bin" if kind == "binary" else "cifar-10-batches-py")
    place.mkdir()
    for i, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        pixels, labels = PIXELS[:2].reshape(2, -1) + np.uint8(i), [i, 9 - i]
        if kind == "binary":
            rows = np.column_stack([np.array(labels, np.uint8), pixels])
            (place / f"{name}.bin").write_bytes(rows.tobytes())
        elif kind == "Python 2":
            (place / name).write_bytes(as_python_2({"data": pixels, "labels": labels}))
        else:
            (place / name).write_bytes(pickle.dumps({b"data": pixels, b"labels": labels}, protocol=2))


@pytest.mark.parametrize("kind", ["Python 2", "Python 3", "binary"])
def test_cifar_10(kind, tmp_path):
    cifar(tmp_path, kind)
    data = dgm.data.load("cifar-10", data_dir=tmp_path)
    for i in range(5):
        assert np.array_equal(data.x[2 * i : 2 * i + 2].numpy(), PIXELS[:2] + np.uint8(i))
    assert data.y.tolist() == [0, 9, 1, 8, 2, 7, 3, 6, 4, 5]
    assert (data.levels, data.classes[9]) == (256, "truck")
    assert len(dgm.data.load("cifar-10", "test", data_dir=tmp_path)) == 2


class Trap:
    def __reduce__(self):
        return pytest.fail, ("code of a file was executed",)


def test_what_a_batch_of_cifar_names_is_not_called(tmp_path):
    cifar(tmp_path, "Python 3")
    path = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    whole, objects = path.read_bytes(), np.array([Trap()], dtype=object)
    hostile = {
        "names _pytest.outcomes": pickle.dumps({b"data": Trap(), b"labels": [1]}),
        "its images are not bytes": pickle.dumps({b"data": np.zeros((1, 3072)), b"labels": [1]}, protocol=2),
        "names": pickle.dumps({b"data": objects, b"labels": [1]}, protocol=2),
        "images of shape": pickle.dumps({b"data": np.zeros((1, 7), np.uint8), b"labels": [1]}, protocol=2),
        "2 labels": pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [1, 2]}, protocol=2),
        "Ran out of input": b"",
        "truncated": whole[:-100],
        "protocol 5, but published batches have protocol 2.*up to 4 are read": pickle.dumps(
            {b"data": np.zeros((1, 3072), np.uint8), b"labels": [1]}, protocol=5
        ),
        "builtins.eval": b"cbuiltins\neval\n(V1\ntR.",
    }
    for words, content in hostile.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"data_batch_3 is not a batch of CIFAR-10 \(.*{words}.*copy it again"):
            dgm.data.load("cifar-10", data_dir=tmp_path)


def test_svhn(tmp_path):
    (tmp_path / "svhn").mkdir()
    path = tmp_path / "svhn" / "train_32x32.mat"
    savemat(path, {"X": PIXELS.transpose(2, 3, 1, 0), "y": np.array([[10], [1], [9]], np.uint8)}, do_compression=True)
    data = dgm.data.load("svhn", data_dir=tmp_path)
    assert np.array_equal(data.x.numpy(), PIXELS)
    assert data.y.tolist() == [0, 1, 9]
    for content in (path.read_bytes()[:300], b"no such file"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"train_32x32\.mat is not a file of SVHN"):
            dgm.data.load("svhn", data_dir=tmp_path)
    for label in (11, 0, 1.5, np.nan):
        savemat(path, {"X": PIXELS.transpose(2, 3, 1, 0), "y": np.array([[1], [2], [label]])}, do_compression=True)
        with pytest.raises(ValueError, match=r"is not a file of SVHN .*it has the label"):
            dgm.data.load("svhn", data_dir=tmp_path)
    savemat(path, {"X": PIXELS, "y": np.zeros((3, 1))}, do_compression=True)
    with pytest.raises(ValueError, match=r"is not a file of SVHN .*it holds"):
        dgm.data.load("svhn", data_dir=tmp_path)


def test_a_damaged_svhn_does_not_end_the_process(tmp_path):
    """Scipy's reader does where variables are not compressed and one of these three bytes is changed."""
    (tmp_path / "svhn").mkdir()
    path = tmp_path / "svhn" / "train_32x32.mat"
    for compressed, flips in ((True, range(128, 1000, 5)), (False, (184, 185, 9456))):
        savemat(path, {"X": PIXELS.transpose(2, 3, 1, 0), "y": np.ones((3, 1), np.uint8)}, do_compression=compressed)
        whole = path.read_bytes()
        for place in flips:
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
            with pytest.raises(ValueError, match=r"is not a file of SVHN .*copy it again"):
                dgm.data.load("svhn", data_dir=tmp_path)


def test_imagenet(tmp_path):
    """In ten files, of which those of 64x64 come in two folders; labels count from 1."""
    images = np.arange(20, dtype=np.uint8)[:, None] + np.zeros((20, 3 * 64 * 64), np.uint8)
    for i in range(10):
        folder = tmp_path / f"Imagenet64_train_part{1 + i // 5}_npz"
        folder.mkdir(exist_ok=True)
        rows = slice(2 * i, 2 * i + 2)
        np.savez(folder / f"train_data_batch_{i + 1}.npz", data=images[rows], labels=np.arange(1, 21)[rows])
    data = dgm.data.load("imagenet64", data_dir=tmp_path)
    assert np.array_equal(data.x[:, 1, 2, 3].numpy(), np.arange(20))
    assert data.y.tolist() == [*range(20)]
    assert data.num_classes == 1000
    some = dgm.data.load("imagenet64", data_dir=tmp_path, num_data=7)
    assert np.array_equal(some.x[:, 0, 0, 0].numpy(), some.y.numpy())
    assert len(some.y.unique()) == 7
    with pytest.raises(ValueError, match="num_data is 21, but there are 20 images"):
        dgm.data.load("imagenet64", data_dir=tmp_path, num_data=21)
    with pytest.raises(FileNotFoundError, match=r"Imagenet64_val_npz/val_data\.npz"):
        dgm.data.load("imagenet64", "test", data_dir=tmp_path)
    (tmp_path / "Imagenet32_val_npz").mkdir()
    np.savez(tmp_path / "Imagenet32_val_npz" / "val_data.npz", data=images, labels=np.arange(20))
    with pytest.raises(ValueError, match=r"val_data\.npz is not a file of ImageNet at 32x32 \(its data have shape"):
        dgm.data.load("imagenet32", "test", data_dir=tmp_path)


def faces(folder):
    """Portraits that are gray, with a square of 148 pixels around the center in red."""
    pixels = np.full((218, 178, 3), 90, np.uint8)
    pixels[35:183, 15:163] = (200, 0, 0)
    folder.mkdir(parents=True)
    for i in range(4):
        Image.fromarray(pixels).save(folder / f"{i}.png")


def test_celeba_is_cropped_around_the_center(tmp_path):
    faces(tmp_path / "celeba" / "img_align_celeba")
    partition = "".join(f"{i}.png {split}\n" for i, split in enumerate((0, 0, 1, 2)))
    (tmp_path / "celeba" / "list_eval_partition.txt").write_text(partition)
    data = dgm.data.load("celeba", data_dir=tmp_path)
    assert data.x.shape == (2, 3, 64, 64)
    assert data.x[0, 0].unique().tolist() == [200]
    assert len(dgm.data.load("celeba", "valid", data_dir=tmp_path)) == 1
    (tmp_path / "celeba" / "img_align_celeba" / "3.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"3\.png cannot be read as an image"):
        dgm.data.load("celeba", "test", data_dir=tmp_path)


def test_a_folder_of_ones_own_is_cropped_around_the_center(tmp_path):
    faces(tmp_path / "mine")
    for more in ({}, {"gray": False}):
        x = dgm.data.open(tmp_path / "mine", crop=148, size=32, **more).x
        assert x.shape == (4, 3, 32, 32)
        assert x[:, 0].unique().tolist() == [200]
    assert dgm.data.open(tmp_path / "mine", crop=150).event_shape == (3, 150, 150)
    assert 90 in dgm.data.open(tmp_path / "mine", crop=150).x[:, 0].unique()
    with pytest.raises(ValueError, match="crop is 200, but an image has 178 x 218 pixels"):
        dgm.data.open(tmp_path / "mine", crop=200, size=32)
