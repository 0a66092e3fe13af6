"""Every chapter runs, and the notebook beside it is that chapter, executed: a new chapter needs no change here."""

import io
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from types import SimpleNamespace

import jupytext
import nbformat
import pyro
import pytest
import torch
from conftest import pytest_terminal_summary
from scripts import load_script

TUTORIALS = Path(__file__).parent.parent / "tutorials"
CHAPTERS = sorted(TUTORIALS.glob("[0-9]*.py"))
MEGABYTES = 2.5
OF_TORCH = "ignore:`torch.jit.script_method`:DeprecationWarning"  # when it loads its compiler
STALE = "the notebook is not that of its script: run `make tutorials`"

chapters = pytest.mark.parametrize("script", CHAPTERS, ids=lambda script: script.stem)


def test_there_are_chapters():
    assert CHAPTERS
    assert {notebook.stem for notebook in TUTORIALS.glob("*.ipynb")} == {script.stem for script in CHAPTERS}


SETTINGS = {"DGM_QUICK": "1", "MPLBACKEND": "Agg", "PYTHONDONTWRITEBYTECODE": "1"}
UNCHECKED = "what the chapters claim of models trained to the end; `make tutorials` holds them to it"


@chapters
def test_chapter_runs_without_a_warning(script, tmp_path, record_property):
    """In a process of its own, which is forked: it need not load torch again. The shortest one starts from nothing."""
    record_property("unchecked", UNCHECKED)
    code, out, err = (started if script == CHAPTERS[1] else forked)(script, tmp_path)
    assert code == 0, f"{out[-1000:]}\n{err[-5000:]}"
    assert err == ""
    assert not list(tmp_path.iterdir()), "a chapter leaves no files behind"


def started(script, folder):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-W", OF_TORCH, str(script)],
        env=os.environ | SETTINGS,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
    )
    return done.returncode, done.stdout, done.stderr


def forked(script, folder):
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python warns of forks among threads; the child has this one alone
            child = os.fork()
        if child == 0:
            code = 1
            try:
                for number, file in ((1, out), (2, err)):
                    os.dup2(file.fileno(), number)
                sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(number, "w", closefd=False)) for number in (1, 2))
                os.chdir(folder)
                os.environ.update(SETTINGS)
                torch.set_num_threads(1)  # a child has none of OpenMP's threads, and would wait for them
                warnings.resetwarnings()
                warnings.simplefilter("error")
                warnings.filterwarnings("ignore", "`torch.jit.script_method`", DeprecationWarning)
                pyro.clear_param_store()
                sys.path.insert(0, str(script.parent))
                runpy.run_path(str(script), run_name="__main__")
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        status = os.waitpid(child, 0)[1]
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
    return os.waitstatus_to_exitcode(status), *texts


@chapters
def test_notebook_is_the_script(script):
    cells = [(cell.cell_type, cell.source) for cell in jupytext.read(script).cells]
    assert [(cell.cell_type, cell.source) for cell in notebook_of(script).cells] == cells, STALE


@chapters
def test_notebook_is_executed(script):
    code = [cell for cell in notebook_of(script).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), STALE
    outputs = [output for cell in code for output in cell.outputs]
    kinds = {(output.output_type, output.get("name")) for output in outputs}
    assert kinds <= {("stream", "stdout"), ("display_data", None), ("execute_result", None)}, "an error or a warning"
    assert any("image/png" in output.get("data", {}) for output in outputs), "there is no picture"


@chapters
def test_notebook_is_free_of_its_machine(script):
    notebook = notebook_of(script)
    assert set(notebook.metadata) == {"jupytext", "kernelspec", "language_info"}
    assert all(cell.metadata == {} for cell in notebook.cells)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            text = output.get("text", "") + output.get("data", {}).get("text/plain", "")
            assert not traces_of_a_machine(text)
    assert script.with_suffix(".ipynb").stat().st_size < MEGABYTES * 1e6


def test_traces_of_a_machine_are_found():
    for text in ("saved to /opt/x/run.pt", "'/opt/x'", r"C:\runs", "<Flow at 0x7f0123456789>", "10%\r20%", "\x1b[1m"):
        assert traces_of_a_machine(text), text
    for text in ("log|det dx/dz|", "p(x)/p(z)", "1437/1437, 2 / 3", "x: (5, 2)"):
        assert not traces_of_a_machine(text), text


def test_the_chapters_after_a_broken_claim_are_executed_and_it_is_named(tmp_path, monkeypatch):
    """One that stops keeps the notebook of before."""
    monkeypatch.delenv("DGM_QUICK", raising=False)
    shutil.copy(TUTORIALS / "chapter.py", tmp_path)
    broken, whole = tmp_path / "00-broken.py", tmp_path / "01-whole.py"
    broken.write_text("# %%\nfrom chapter import claim\n\nclaim(1 < 2)\nclaim(2 < 1)\n")
    whole.write_text(
        "# %% [markdown]\n# # Title\n\n# %%\nimport matplotlib.pyplot as plt\n\nplt.plot([1, 2])\nplt.show()\n"
    )
    execute = load_script("tutorials/execute.py")
    with pytest.raises(SystemExit) as stopped:
        execute.main(chapters=tmp_path)
    assert stopped.value.code == "00-broken: AssertionError: line 4 of its cell is not so: claim(2 < 1)"
    assert not broken.with_suffix(".ipynb").exists()
    title, plot = nbformat.read(whole.with_suffix(".ipynb"), as_version=4).cells
    assert (title.cell_type, title.source) == ("markdown", "# Title")
    assert plot.execution_count == 1
    assert "image/png" in plot.outputs[0].data
    assert plot.metadata == {}


def test_the_summary_says_what_was_not_checked():
    said = []
    reports = [SimpleNamespace(user_properties=[("unchecked", "b")])] * 2 + [SimpleNamespace(user_properties=[])]
    pytest_terminal_summary(SimpleNamespace(stats={"passed": reports}, write_line=said.append))
    assert said == ["NOT CHECKED: b"]


def notebook_of(script):
    notebook = nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    nbformat.validate(notebook)
    return notebook


def traces_of_a_machine(text):
    """Absolute paths, addresses in memory, the machine's name, and what a progress bar leaves behind."""
    absolute = r"(?<![\w.:)/])/[\w.-]+(/[\w.-]+)+|\b[A-Z]:\\"
    found = re.search(rf"{absolute}|\b0x[0-9a-f]{{6,}}|\r|\x1b", text)
    node = platform.node()
    return found is not None or (len(node) > 3 and node in text)
