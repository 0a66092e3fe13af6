"""Files of an earlier version: read under the names of today. Old options of the command line: answered by today's.

``data/checkpoint-v1`` to ``-v4`` were written by the last versions before names changed. What was exact then is stored
beside the programs: log p(x) of a few x.
"""

import inspect
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
import typer

import dgm_pyro as dgm
from dgm_pyro import cli, old_names, registry
from dgm_pyro.experiments import runs, sweep

STORED = sorted((Path(__file__).parent / "data").glob("checkpoint-v*/*"))


@pytest.mark.parametrize("folder", STORED, ids=lambda folder: f"{folder.parent.name[-2:]}-{folder.name}")
def test_a_checkpoint_of_an_earlier_version_loads_with_every_weight_in_its_place(folder, tmp_path):
    [file] = folder.glob("*.safetensors")
    weights = safetensors.torch.load_file(file)
    program = dgm.load(folder)
    state = {**dict(program.named_parameters()), **dict(program.named_buffers())}
    header = json.loads((folder / "program.json").read_text())
    version = header["format_version"]
    classes = {name: type(module).__name__ for name, module in program.named_modules()}
    moved = old_names.paths([*state, *classes], classes, version)
    stored = {moved.get(name, name) for name in weights if not name.startswith("argument/")}
    # Constants that a state_dict leaves out may be younger than the checkpoint.
    assert state.keys() & program.state_dict().keys() <= stored <= state.keys()
    frozen = {name for name, parameter in program.named_parameters() if not parameter.requires_grad}
    assert frozen == {moved.get(name, name) for name in header["frozen"]}
    evaluating = {name for name, module in program.named_modules() if not module.training}
    assert evaluating == {moved.get(name, name) for name in header["evaluating"]}
    extra = dgm.checkpoint.read_extra(folder)
    if extra is not None:
        x, given = torch.tensor(extra["x"]), extra["given"]
        found = program.log_prob(x) if given is None else program.log_prob(x, torch.tensor(given))
        torch.testing.assert_close(found, torch.tensor(extra["log_prob"]), rtol=1e-5, atol=1e-5)
    dgm.save(program, tmp_path / "again")
    again = dgm.load(tmp_path / "again").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in program.state_dict().items())


def test_the_stored_checkpoints_are_of_their_versions():
    for folder in STORED:
        version = json.loads((folder / "program.json").read_bytes())["format_version"]
        assert folder.parent.name == f"checkpoint-v{version}"


def test_every_argument_that_changed_its_name_has_the_new_one():
    stored = [node for folder in STORED for node in json.loads((folder / "program.json").read_bytes())["modules"]]
    seen = {(node["class"], name) for node in stored for name in node["arguments"]}
    for cls, names in old_names.ARGUMENTS.items():
        parameters = inspect.signature(registry.REGISTRY[old_names.CLASSES.get(cls, cls)]).parameters
        assert set(names.values()) <= set(parameters)
        assert not {name for name in names if name in parameters and (cls, name) in seen}, "it means another thing now"


def test_an_old_argument_is_answered_by_the_new_one():
    with pytest.raises(TypeError, match="Normal takes no scale: it is scale_type now"):
        dgm.Normal(2, torch.nn.Linear(1, 2), scale="shared")
    with pytest.raises(TypeError, match="VAE takes no latent: it is latent_name now"):
        dgm.VAE(dgm.Normal(1), dgm.Normal(1), dgm.Normal(1), latent="z")
    with pytest.raises(TypeError, match="Autoregressive takes no features: it is factors now"):
        dgm.Autoregressive(features=dgm.Bernoulli(2, dgm.networks.MADE(2, 1)))
    with pytest.raises(TypeError, match="Discriminative takes no labels: it is classifier now"):
        dgm.Discriminative(labels=dgm.Categorical((), 2, torch.nn.Linear(2, 2)))
    with pytest.raises(TypeError, match="ConvNet takes no outputs: it is num_parameters now"):
        dgm.networks.ConvNet((1, 2, 2), (1, 2, 2), outputs=1)


@pytest.mark.parametrize("flag", old_names.FLAGS)
def test_an_old_option_is_answered_by_the_new_one(flag, capsys):
    commands = typer.main.get_command(cli.app).commands.values()
    options = {name for command in commands for each in command.params for name in each.opts}
    assert set(old_names.FLAGS[flag].split(" or ")) <= options
    for command in commands:
        has = {name for each in command.params for name in each.opts}
        if flag in has:
            continue
        now = " or ".join(name for name in old_names.FLAGS[flag].split(" or ") if name in has)
        assert cli.main([command.name, flag, "3"]) == 2
        answer = f": {flag} (use {now}, see dgm {command.name} --help)" if now else f"(see dgm {command.name} --help)"
        assert answer in capsys.readouterr().err


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
    sweep._open_sweep(tmp_path, options)
    with pytest.raises(ValueError, match=r"holds a sweep with other options.*latent_size"):
        sweep._open_sweep(tmp_path, sweep.Options("vae", "moons", num_data=20, latent_size=2))
