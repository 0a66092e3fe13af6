"""Files of an earlier version: read under the names of today.

``data/checkpoint-v1`` was written by the last version before the names of the format changed. What was exact then is
stored beside the programs: log p(x) of a few x.
"""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

import dgm_pyro as dgm
from dgm_pyro.experiments import runs, sweep

STORED = sorted((Path(__file__).parent / "data" / "checkpoint-v1").iterdir())


@pytest.mark.parametrize("folder", STORED, ids=lambda folder: folder.name)
def test_a_checkpoint_of_version_1_loads_with_every_weight_in_its_place(folder, tmp_path):
    [file] = folder.glob("*.safetensors")
    weights = safetensors.torch.load_file(file)
    program = dgm.load(folder)
    state = {**dict(program.named_parameters()), **dict(program.named_buffers())}
    assert sum(value.numel() for value in state.values()) == sum(
        value.numel() for name, value in weights.items() if not name.startswith("argument/")
    )
    extra = dgm.checkpoint.read_extra(folder)
    if extra is not None:
        x, given = torch.tensor(extra["x"]), extra["given"]
        found = program.log_prob(x) if given is None else program.log_prob(x, torch.tensor(given))
        torch.testing.assert_close(found, torch.tensor(extra["log_prob"]), rtol=1e-5, atol=1e-5)
    dgm.save(program, tmp_path / "again")
    again = dgm.load(tmp_path / "again").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in program.state_dict().items())


def test_the_stored_checkpoints_are_of_version_1():
    assert {json.loads((folder / "program.json").read_bytes())["format_version"] for folder in STORED} == {1}


def test_a_record_with_the_old_names_is_read_under_the_new_ones(tmp_path):
    folder = tmp_path / "run"
    training = dgm.TrainingOptions(epochs=1, validation=None)
    runs.train(folder, "vae", "moons", {"latent_size": 1}, training, num_data=20, progress=False)
    _, record = runs.read(folder)
    path = folder / runs.RECORD
    stored = json.loads(path.read_bytes())
    options = stored["options"]
    options["latent"], options["num"] = options.pop("latent_size"), options.pop("num_data")
    path.write_text(json.dumps(stored))
    assert runs.read(folder)[1] == record


def test_a_sweep_with_the_old_names_of_options_is_the_same_sweep(tmp_path):
    options = sweep.Options("vae", "moons", num_data=20, latent_size=1)
    recipe = options.recipe()
    recipe["latent"], recipe["num"] = recipe.pop("latent_size"), recipe.pop("num_data")
    (tmp_path / "sweep.json").write_text(json.dumps(recipe))
    sweep._open(tmp_path, options)
    with pytest.raises(ValueError, match=r"holds a sweep with other options.*latent_size"):
        sweep._open(tmp_path, sweep.Options("vae", "moons", num_data=20, latent_size=2))
