"""Runs on a hub that is a folder: what comes back is what was pushed, and nothing else is fetched or run."""

import fnmatch
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

import dgm_pyro as dgm
from dgm_pyro import cli
from dgm_pyro.experiments import hub, runs

huggingface_hub = pytest.importorskip("huggingface_hub")
OPTIONS = dgm.TrainingOptions(epochs=1, device="cpu", validation=None)


class Folder(huggingface_hub.HfApi):
    """A hub in a folder: the three calls, with the arguments that they have in huggingface_hub."""

    def __init__(self, folder):
        super().__init__()
        self.folder, self.private = folder, {}

    def create_repo(self, repo_id, *, private=None, exist_ok=False):
        (self.folder / repo_id).mkdir(parents=True, exist_ok=exist_ok)
        self.private.setdefault(repo_id, private)
        return f"https://hub/{repo_id}"

    def upload_folder(self, *, repo_id, folder_path, commit_message, delete_patterns):
        for path in (self.folder / repo_id).iterdir():
            if any(fnmatch.fnmatch(path.name, each) for each in delete_patterns):
                path.unlink()
        shutil.copytree(folder_path, self.folder / repo_id, dirs_exist_ok=True)

    def snapshot_download(self, repo_id, *, revision, local_dir, allow_patterns):
        if not (self.folder / repo_id).is_dir():
            raise ConnectionError(f"404: {repo_id}")
        for path in (self.folder / repo_id).iterdir():
            if any(fnmatch.fnmatch(path.name, each) for each in allow_patterns):
                shutil.copy(path, local_dir)


NO_EVIDENCE = pytest.warns(UserWarning, match=r"the model card has no evidence: .*patients\.csv")


@pytest.fixture
def api(tmp_path):
    return Folder(tmp_path / "hub")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run that was trained on a user's table with labels."""
    folder = tmp_path_factory.mktemp("home")
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    lines = [f"{a:.5f},{b:.5f}" for a, b in x.tolist()]
    (folder / "patients.csv").write_text("\n".join(["height,weight", *lines]))
    runs.train(folder / "run", "made", str(folder / "patients.csv"), {}, OPTIONS, progress=False)
    (folder / "run" / "notes.txt").write_text("of the user")
    return folder / "run"


def test_what_is_pulled_is_what_was_pushed(run, tmp_path, api):
    assert hub.push(run, "alice/made", private=True, api=api) == "https://hub/alice/made"
    assert api.private == {"alice/made": True}
    program, record = hub.pull("alice/made", tmp_path / "pulled", api=api)
    before, after = (runs.read(folder) for folder in (run, tmp_path / "pulled"))
    assert json.loads((run / "program.json").read_text())["weights"] == json.loads(
        (tmp_path / "pulled" / "program.json").read_text())["weights"]  # fmt: skip
    x = torch.randn(8, 2)
    assert torch.equal(before[0].log_prob(x), after[0].log_prob(x))
    assert torch.equal(before[0].log_prob(x), program.log_prob(x))
    assert record == after[1]
    assert record.history == before[1].history
    with NO_EVIDENCE:
        hub.push(tmp_path / "pulled", "alice/made", api=api)  # over it
    assert len([*(api.folder / "alice/made").glob("weights-*")]) == 1


def test_what_is_pushed_says_no_place_and_has_no_file_of_the_user(run, tmp_path, api):
    (run / "learning-curves.png").write_bytes(b"a picture")
    hub.push(run, "alice/made", api=api)
    there = api.folder / "alice/made"
    assert "](learning-curves.png)" in (there / "README.md").read_text()
    names = sorted(path.name for path in there.iterdir())
    assert names[:3] == ["README.md", "learning-curves.png", "program.json"]
    assert [Path(name).suffix for name in names[3:]] == [".json", ".safetensors"]
    for path in there.iterdir():
        assert str(run.parent).encode() not in path.read_bytes()
    record = runs.read(there)[1]
    assert record.data == "patients.csv"
    assert record.reading == runs.read(run)[1].reading


def test_the_card_says_what_the_record_and_the_evaluation_do(run, api):
    hub.push(run, "alice/made", api=api)
    card = (api.folder / "alice/made/README.md").read_text()
    program, record = runs.read(run)
    evidence = dgm.evaluate(program, record.points("test"))
    for said in (program.formula().p, str(evidence), evidence.digest, record.reading["digests"]["train"],
                 "| epochs | 1 |", "dgm pull alice/made"):  # fmt: skip
        assert said in card
    assert card.startswith("---\nlibrary_name: dgm_pyro\ntags: [pyro, generative-model, autoregressive]\n---\n")
    (run.parent / "patients.csv").rename(run.parent / "moved.csv")
    try:
        with NO_EVIDENCE:
            hub.push(run, "alice/blind", api=api)
        assert "test data" not in (api.folder / "alice/blind/README.md").read_text()
        (run.parent / "patients.csv").write_text("height,weight\n" + 64 * "1,2\n")
        with pytest.warns(UserWarning, match=r"no evidence: .* have changed since the run was trained"):
            hub.push(run, "alice/changed", api=api)
    finally:
        (run.parent / "moved.csv").replace(run.parent / "patients.csv")


def test_a_card_shows_no_picture_that_is_not_there(run, tmp_path, api):
    hub.push(run, "alice/made", api=api)
    hub.pull("alice/made", tmp_path / "pulled", api=api)
    with NO_EVIDENCE:
        hub.push(tmp_path / "pulled", "alice/again", api=api)
    assert not (api.folder / "alice/again/learning-curves.png").exists()
    assert "learning-curves" not in (api.folder / "alice/again/README.md").read_text()


def test_an_error_of_ours_is_not_blamed_on_the_hub(run, api, monkeypatch):
    monkeypatch.setattr(hub, "card", lambda *args: {}["key"])
    with pytest.raises(KeyError):
        hub.push(run, "alice/made", api=api)


def test_a_repository_with_more_than_a_run_brings_the_run_alone(run, tmp_path, api):
    hub.push(run, "mallory/made", api=api)
    for name in ("setup.py", "program.pkl", "pytorch_model.bin", "state.json", "run.json.py"):
        (api.folder / "mallory/made" / name).write_text("raise SystemExit")
    hub.pull("mallory/made", tmp_path / "pulled", api=api)
    kinds = sorted(path.suffix for path in (tmp_path / "pulled").iterdir())
    assert kinds == [".json", ".json", ".safetensors"]


def test_what_is_no_run_or_a_damaged_one_leaves_nothing(run, tmp_path, api):
    hub.push(run, "alice/made", api=api)
    there = api.folder / "alice/made"
    [weights] = there.glob("weights-*")
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(dgm.CheckpointError, match="the run in alice/made is damaged: pull it again"):
        hub.pull("alice/made", tmp_path / "pulled", api=api)
    for path in there.glob("*.json"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"alice/made holds no run of dgm_pyro: it has no run\.json"):
        hub.pull("alice/made", tmp_path / "pulled", api=api)
    assert not (tmp_path / "pulled").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "chapter.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="is not empty"):
        hub.pull("alice/made", tmp_path / "mine", api=api)


def test_the_commands(run, tmp_path, api, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["push", str(run), "alice/made"]) == 0
    assert capsys.readouterr().out == "https://hub/alice/made: pull it with dgm pull alice/made\n"
    assert cli.main(["pull", "alice/made"]) == 0
    assert capsys.readouterr().out == "runs/made: made on patients\nnext: dgm sample runs/made\n"
    assert cli.main(["sample", "runs/made", "-n", "2", "--device", "cpu"]) == 0
    for command, message in (
        (["pull", "alice/made"], "exists and is not empty: choose another --out"),
        (["pull", "bob/none"], "404: bob/none"),
        (["push", "nowhere", "alice/made"], "nowhere holds no run"),
    ):
        assert cli.main(command) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_the_real_hub_takes_these_arguments_and_says_when_it_cannot_be_reached(run, tmp_path):
    api = huggingface_hub.HfApi(endpoint="http://127.0.0.1:9", token="none")
    with pytest.raises(OSError, match=r"[Cc]onne"):
        hub.push(run, "alice/made", api=api)
    with pytest.raises(OSError, match=r"[Cc]onne"):
        hub.pull("alice/made", tmp_path / "pulled", api=api)
    with pytest.raises(ValueError, match="Repo id"):
        hub.push(run, "a/b/c", api=api)


def test_without_huggingface_hub_the_extra_is_named(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'dgm_pyro\[hub\]'"):
        hub.push(run, "alice/made")
