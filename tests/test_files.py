"""Files are whole whenever a writer stops, and a folder has one writer at a time."""

import os
import subprocess
import sys

import pytest

from dgm_pyro import files

DEAD = "99999999"  # above the largest number of a process


def test_a_file_is_the_old_one_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "numbers.csv"
    files.write_file(path, b"old")
    for function in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(files.os, function, lambda *_: (_ for _ in ()).throw(OSError("no space left on device")))
            with pytest.raises(OSError, match="no space left"):
                files.write_file(path, b"new")
        assert path.read_bytes() == b"old"
    files.write_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["numbers.csv"]


def test_the_next_writer_removes_what_killed_ones_left_and_nothing_else(tmp_path):
    kept = [".mine.part", ".numbers.csv.12", f".numbers.csv.{os.getppid()}.part", f"numbers.csv.{DEAD}.part"]
    left = [f".numbers.csv.{DEAD}.part", f".numbers.csv.{os.getpid()}.part"]  # containers count processes from 1
    for name in (*kept, *left):
        (tmp_path / name).write_text("")
    with files.only_writer(tmp_path):
        assert sorted(os.listdir(tmp_path)) == sorted(kept)


def test_a_folder_has_one_writer(tmp_path):
    folder = tmp_path / "deep" / "run"
    with files.only_writer(folder):
        second = files.only_writer(folder)
        with pytest.raises(BlockingIOError, match="run is being written by another process: wait"):
            second.__enter__()
        code = f"import pathlib, dgm_pyro.files as f; f.only_writer(pathlib.Path({str(folder)!r})).__enter__()"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "BlockingIOError" in done.stderr
    assert os.listdir(folder) == []
    with files.only_writer(folder):
        pass


def test_the_lock_dies_with_its_process(tmp_path):
    code = (
        "import os, pathlib, signal, dgm_pyro.files as f\n"
        f"writing = f.only_writer(pathlib.Path({str(tmp_path)!r}))\n"
        "writing.__enter__()\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    with files.only_writer(tmp_path):
        pass


@pytest.mark.parametrize("content", ["", "{", "[" * 10**5, '{"a":' * 10**5, "\xff", "NaNa"])
def test_what_is_no_json_is_a_value_error(tmp_path, content):
    (tmp_path / "it").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError):
        files.parsed_json(tmp_path / "it")


def test_a_file_too_large_to_be_ours_is_not_read(tmp_path):
    (tmp_path / "it").touch()
    os.truncate(tmp_path / "it", 10**12)
    with pytest.raises(ValueError, match="1,000,000,000,000 bytes"):
        files.parsed_json(tmp_path / "it")
