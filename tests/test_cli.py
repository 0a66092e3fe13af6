"""The command line: what it writes and prints, and how bad input ends: one line, a non-zero exit and no traceback."""

import functools
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import dgm_pyro as dgm
from dgm_pyro import cli
from dgm_pyro.catalog import ENCODERS, LIKELIHOODS, MODELS, PRIORS
from dgm_pyro.experiments import runs
from dgm_pyro.families.guides import FAMILIES
from dgm_pyro.objectives import COMPARISONS, OBJECTIVES
from dgm_pyro.program import seeded
from dgm_pyro.training import compilation, step

FAST = ["--epochs", "1", "--device", "cpu"]


@pytest.fixture(autouse=True)
def plain_help(monkeypatch):
    """Help as wide as its lines, without colors, wherever the tests run."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.delenv("DGM_DEBUG", raising=False)


def width_of(path):
    with Image.open(path) as picture:
        return picture.width


def dgm_ok(*arguments):
    assert cli.main([str(argument) for argument in arguments]) == 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Runs, by name, each trained for an epoch."""
    folder = tmp_path_factory.mktemp("runs")
    recipes = {
        "vae": ["vae", "--latent-size", "4", "--num-data", "200"],
        "points": ["made", "--data", "moons", "--num-data", "300"],
        "labeled": ["pixels", "--labeled", "--num-data", "300", "--lr", "0.1"],
        "classifier": ["classifier", "--num-data", "300"],
        "diffusion": ["diffusion", "--data", "moons", "--num-data", "200", "--labeled"],
    }
    for name, recipe in recipes.items():
        dgm_ok("train", *recipe, *FAST, "--out", folder / name)
    return {name: folder / name for name in recipes}


# -- training ----------------------------------------------------------------------------------------------------------


def test_a_run_holds_the_program_and_how_it_came_about(trained):
    folder = trained["vae"]
    record = json.loads((folder / "run.json").read_text())
    assert record["model"] == "vae"
    assert record["data"] == "digits"
    assert record["options"]["latent_size"] == 4
    assert record["options"]["epochs"] == 1
    assert "prior" not in record["options"]  # left at its default
    assert len(record["history"]["epochs"]) == 1
    assert set(record["history"]["epochs"][0]["kl"]) == {"z"}
    program = dgm.load(folder)
    assert isinstance(program, dgm.VAE)
    assert program.prior.event_shape == (4,)
    assert width_of(folder / "learning-curves.png") > 400


def test_training_says_what_to_do_next(tmp_path, capsys):
    dgm_ok("train", "pixels", "--num-data", "100", *FAST, "--out", tmp_path / "run")
    out = capsys.readouterr().out
    assert f"next: dgm evaluate {tmp_path / 'run'}" in out
    assert "nats per datum" in out


def test_reals_are_trained_in_their_units_unless_told_otherwise(tmp_path):
    for name, options in (("units", []), ("bare", ["--no-standardize"])):
        dgm_ok("train", "maf", "--data", "moons", "--num-data", "60", *FAST, *options, "--out", tmp_path / name)
    assert isinstance(dgm.load(tmp_path / "units"), dgm.Standardized)
    program, record = runs.read(tmp_path / "bare")
    assert isinstance(program, dgm.Flow)
    assert record.options["standardize"] is False


def test_the_same_seed_gives_the_same_weights_and_another_does_not(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.rand(17)  # the global random state must not matter
        dgm_ok("train", "made", "--num-data", "100", *FAST, "--seed", seed, "--out", tmp_path / name)
    a, b, c = (dgm.load(tmp_path / name).state_dict() for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not all(torch.equal(a[key], c[key]) for key in a)


def test_options_reach_the_training(tmp_path):
    out = tmp_path / "run"
    dgm_ok(
        "train", "vae", "--prior", "vae", "--objective", "iwae", "--epochs", "3", "--batch-size", "50", "--lr", "0.01",
        "--num-data", "100", "--validation", "0.2", "--early-stopping", "2", "--ema", "0.9", "--weight-decay", "0.1",
        "--device", "cpu", "--out", out,
    )  # fmt: skip
    program, record = runs.read(out)
    assert program.latents("x") == ("z", "z2")
    assert record.options["objective"] == "iwae"
    assert record.options["ema"] == 0.9
    assert all(epoch["validation"] is not None for epoch in record.history["epochs"])


def test_a_run_of_few_labels_is_that_of_the_same_labels_hidden_in_python(tmp_path):
    recipe = ["--labeled", "--objective", "semi-supervised:50", "--num-labels", "20", "--num-data", "100", *FAST]
    dgm_ok("train", "vae", *recipe, "--validation", "0", "--out", tmp_path / "run")
    program, record = runs.read(tmp_path / "run")
    few = dgm.data.load("digits", num_data=100).keep_labels(20)
    with seeded(0, torch.device("cpu")):
        twin = dgm.build("vae", few, labeled=True)
    history = dgm.fit(twin, few, "semi-supervised:50", epochs=1, validation=None, device="cpu", progress=False)
    assert [epoch["loss"] for epoch in record.history["epochs"]] == [epoch.loss for epoch in history.epochs]
    assert record.options["num_labels"] == 20
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(program.parameters(), twin.parameters(), strict=True))


def test_steps_are_compiled_and_networks_reduced_on_demand(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(step, "optimized", lambda graph, **options: compilation.optimized(graph, "eager"))
    recipe = ["train", "made", "--data", "moons", "--num-data", "200", *FAST]
    dgm_ok(*recipe, "--compile", "--precision", "bf16", "--out", tmp_path / "run")
    record = runs.read(tmp_path / "run")[1]
    assert record.history["compiled"]
    assert (record.options["compile"], record.options["precision"]) == (True, "bf16")
    dgm_ok(*recipe, "--no-compile", "--out", tmp_path / "plain")
    assert not runs.read(tmp_path / "plain")[1].history["compiled"]
    capsys.readouterr()
    vae = [
        "train",
        "vae",
        "--num-data",
        "200",
        *FAST,
        "--compile",
        "--objective",
        "dreg",
        "--out",
        str(tmp_path / "no"),
    ]
    for wrong in (vae, [*map(str, recipe), "--precision", "half", "--out", str(tmp_path / "no")]):
        assert cli.main(wrong) == 1
    first, second = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dgm: ")]
    assert "DReG cannot be compiled" in first
    assert "precision must be one of float32, tf32, bf16" in second
    assert not (tmp_path / "no").exists()


def test_threads_are_set_for_this_process_and_those_that_it_starts(monkeypatch, capsys):
    taken = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    dgm_ok("--threads", "3", "list")
    assert taken == [3]
    assert os.environ["OMP_NUM_THREADS"] == "3"
    assert cli.main(["--threads", "0", "list"]) == 1
    assert "--threads must be a positive integer" in capsys.readouterr().err


def test_validation_zero_trains_on_everything(tmp_path):
    dgm_ok("train", "pixels", "--num-data", "100", *FAST, "--validation", "0", "--out", tmp_path / "run")
    assert runs.read(tmp_path / "run")[1].history["epochs"][0]["validation"] is None


def test_a_run_is_overwritten_only_on_demand(tmp_path, capsys):
    arguments = ["train", "pixels", "--num-data", "100", *FAST, "--out", str(tmp_path / "run")]
    assert cli.main(arguments) == 0
    before = (tmp_path / "run" / "run.json").read_bytes()
    capsys.readouterr()
    assert cli.main([*arguments, "--seed", "3"]) == 1
    assert "--force" in capsys.readouterr().err
    assert (tmp_path / "run" / "run.json").read_bytes() == before
    assert cli.main([*arguments, "--seed", "3", "--force"]) == 0
    assert (tmp_path / "run" / "run.json").read_bytes() != before


# -- sampling ----------------------------------------------------------------------------------------------------------


def test_samples_come_as_a_picture_and_as_numbers(trained, tmp_path, capsys):
    out = tmp_path / "new" / "some.png"
    dgm_ok("sample", trained["vae"], "-n", "9", "--out", out)
    x = np.load(out.with_suffix(".npy"))
    assert x.shape == (9, 1, 8, 8)
    assert 0 <= x.min() <= x.max() <= 16
    assert np.issubdtype(x.dtype, np.integer)
    assert width_of(out) > 400
    assert str(out) in capsys.readouterr().out


def test_samples_go_into_the_run_by_default_and_follow_the_seed(trained):
    numbers = trained["points"] / "samples.npy"
    drawn = []
    for seed in (0, 0, 1):
        dgm_ok("sample", trained["points"], "-n", "20", "--seed", seed)
        drawn.append(np.load(numbers))
    assert drawn[0].shape == (20, 2)
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])


def test_a_label_is_what_samples_are_drawn_given(trained, tmp_path):
    program = dgm.load(trained["labeled"])
    dgm_ok("sample", trained["labeled"], "-n", "400", "--class", "3", "--out", tmp_path / "three.png")
    x = torch.as_tensor(np.load(tmp_path / "three.npy")).double()
    distribution = program.program(torch.tensor([3]))
    probabilities = distribution.base_dist.probs[0].detach().double()
    levels = torch.arange(17).double()
    mean = (probabilities * levels).sum(-1)
    error = ((probabilities * levels**2).sum(-1) - mean**2).sqrt() / 400**0.5
    # 64 pixels at once: 5 standard errors.
    assert ((x.mean(0) - mean).abs() < 5 * error).all()


def test_a_diffusion_takes_its_sampler_steps_and_guidance(trained, tmp_path):
    out = tmp_path / "points.png"
    dgm_ok(
        "sample", trained["diffusion"], "-n", "7", "--class", "1", "--sampler", "dpm++", "--num-steps", "4",
        "--spacing", "karras", "--guidance", "1.5", "--out", out,
    )  # fmt: skip
    x = np.load(out.with_suffix(".npy"))
    program = dgm.load(trained["diffusion"])
    torch.manual_seed(0)
    expected = program.sample(7, torch.tensor([1]), sampler="dpm++", num_steps=4, spacing="karras", guidance=1.5)
    assert np.array_equal(x, expected.numpy())


# -- evaluating --------------------------------------------------------------------------------------------------------


def test_the_evidence_is_that_of_the_library(trained, capsys):
    capsys.readouterr()
    dgm_ok("evaluate", trained["points"], "--json", "--device", "cpu")
    numbers = json.loads(capsys.readouterr().out)
    expected = dgm.evaluate(dgm.load(trained["points"]), dgm.data.load("moons", "test"))
    assert numbers["nats"] == pytest.approx(expected.nats, abs=1e-12)
    assert numbers["kind"] == "exact"
    assert numbers["measure"] == "density"
    assert numbers["num_data"] == 5000
    assert "accuracy" not in numbers


def test_the_quality_of_samples_is_that_of_the_library(trained, capsys):
    capsys.readouterr()
    dgm_ok("evaluate", trained["vae"], "--quality", "--classifier", trained["classifier"], "--json", "--device", "cpu")
    numbers = json.loads(capsys.readouterr().out)
    classifier, test = dgm.load(trained["classifier"]), dgm.data.load("digits", "test")
    features = dgm.quality.hidden_features(classifier)
    expected = dgm.quality.program_quality(dgm.load(trained["vae"]), test.x, features)
    assert numbers["values"] == pytest.approx(expected.values)
    dgm_ok("evaluate", trained["vae"], "--quality", "--device", "cpu")
    assert "x itself" in capsys.readouterr().out
    for unused in (["--num-particles", "5"], ["--num-samples", "5"], ["--ode"]):
        assert cli.main(["evaluate", str(trained["vae"]), "--quality", *unused]) == 1
        assert "--quality computes no evidence: leave out" in capsys.readouterr().err


def test_more_particles_tighten_the_bound(trained, capsys):
    def evaluate(*options):
        capsys.readouterr()
        dgm_ok("evaluate", trained["vae"], "--json", *options)
        return json.loads(capsys.readouterr().out)

    elbo, iwae = evaluate(), evaluate("--num-particles", "20")
    assert (elbo["kind"], iwae["kind"]) == ("elbo", "iwae-20")
    # Both are means over the same 360 digits, so that the gap is far larger than its own error.
    assert iwae["bits_per_dim"] < elbo["bits_per_dim"]


def test_a_classifier_says_that_it_has_no_p_of_x(trained, capsys):
    for name, of, words in (
        ("classifier", "log p(y | x)", " of log p(y | x), because it has no p(x)\n"),
        ("vae", "log p(x)", ""),
    ):
        capsys.readouterr()
        dgm_ok("evaluate", trained[name])
        printed = capsys.readouterr().out
        assert words in printed
        assert ("p(y | x)" in printed) == bool(words)
        dgm_ok("evaluate", trained[name], "--json")
        assert json.loads(capsys.readouterr().out)["of"] == of


def test_more_draws_are_averaged(trained, capsys):
    def nats(*options):
        capsys.readouterr()
        dgm_ok("evaluate", trained["vae"], "--json", *options)
        return json.loads(capsys.readouterr().out)["nats"]

    program, test = dgm.load(trained["vae"]), dgm.data.load("digits", "test")
    assert nats() == nats("--num-samples", "8") == dgm.evaluate(program, test).nats
    assert nats("--num-samples", "1") == dgm.evaluate(program, test, num_samples=1).nats
    several = torch.tensor([[nats("--num-samples", draws, "--seed", seed) for seed in range(8)] for draws in (1, 16)])
    few, many = several.std(1)
    assert many < few / 2  # a quarter in expectation


@pytest.mark.parametrize("name", ["labeled", "classifier"])
def test_classifiers_have_an_accuracy(trained, name, capsys):
    capsys.readouterr()
    dgm_ok("evaluate", trained[name])
    program, test = dgm.load(trained[name]), dgm.data.load("digits", "test")
    right = (program.classify(test.x) == test.y).double().mean().item()
    out = capsys.readouterr().out
    assert f"accuracy {right:.4f}" in out
    assert "digits (test, 360 data)" in out


def test_the_split_is_chosen(trained, capsys):
    capsys.readouterr()
    dgm_ok("evaluate", trained["labeled"], "--split", "train", "--json")
    assert json.loads(capsys.readouterr().out)["num_data"] == 1437


# -- help, list, version -----------------------------------------------------------------------------------------------


def test_the_list_names_everything_with_a_line(capsys):
    dgm_ok("list")
    sections = re.split(r"^(?=\S)", capsys.readouterr().out, flags=re.MULTILINE)[1:]
    tables = (MODELS, dgm.data.NAMES, PRIORS, ENCODERS, LIKELIHOODS, FAMILIES, OBJECTIVES | COMPARISONS)
    for section, table in zip(sections, tables, strict=True):
        listed = dict(line.split(maxsplit=1) for line in section.splitlines()[1:])
        assert list(listed) == list(table)
        assert all(len(line) > 5 for line in listed.values())


def test_the_list_for_a_data_set_says_what_each_model_would_be(capsys):
    dgm_ok("list", "--data", "moons")
    listed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[2:])
    assert list(listed) == list(MODELS)
    size = sum(parameter.numel() for parameter in dgm.build("vae", dgm.data.load("moons")).parameters())
    assert re.split(r"\s{2,}", listed["vae"]) == [f"{size:,}", "p(z) p(x | z)"]
    assert listed["pixelcnn"].startswith("pixelcnn needs images")


def test_the_list_for_a_data_set_says_what_is_refused(capsys, monkeypatch):
    monkeypatch.setattr("dgm_pyro.experiments.commands.build", functools.partial(dgm.build, max_parameters=200_000))
    dgm_ok("list", "--data", "moons")
    listed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[2:])
    assert re.split(r"\s{2,}", listed["made"])[1] == "refused: too large, unless --set max_parameters=NUMBER"
    assert int(listed["made"].split()[0].replace(",", "")) > 200_000


COMMANDS = [command.name or command.callback.__name__ for command in cli.app.registered_commands]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example_that_parses(command, capsys):
    assert cli.main([command, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    examples = re.search(r"Examples?: ([^│╰]*)", text)[1].split("; ")
    known = set(re.findall(r"-{1,2}[a-z][a-z-]*", text.split("Options", 1)[1]))
    for example in examples:
        assert example.startswith(f"dgm {command}")
        assert {word for word in example.split() if word.startswith("-")} <= known


def test_without_a_command_there_is_help(capsys):
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    for command in COMMANDS:
        assert command in out


def completed(words, monkeypatch, capsys):
    """What bash is told to offer for the last of the words."""
    monkeypatch.setenv("_DGM_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", " ".join(words))
    monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
    with pytest.raises(SystemExit):
        cli.main([])
    return capsys.readouterr().out.split()


def test_the_shell_completes_commands_models_data_sets_and_runs(trained, monkeypatch, capsys):
    def offered(*words):
        return completed(("dgm", *words), monkeypatch, capsys)

    assert {"sample", "sweep"} <= set(offered("s"))
    assert offered("doctor", "vae", "--data", "digits-") == ["digits-binary"]
    assert {"digits", "digits-binary"} == set(offered("anomaly", "run", "dig"))
    folder = trained["vae"].parent
    assert offered("sample", f"{folder}/va") == [str(trained["vae"])]
    monkeypatch.chdir(folder.parent)
    assert set(offered("gaps", folder.name)) == {f"{folder.name}/{name}" for name in trained}
    monkeypatch.chdir(folder)
    assert set(offered("sample", "")) == set(trained)


def test_the_version(capsys):
    assert cli.main(["--version"]) == 0
    assert re.fullmatch(r"dgm_pyro \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_it_runs_as_a_module_and_shows_a_traceback_only_on_demand():
    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "dgm_pyro", *arguments], capture_output=True, text=True, timeout=120, check=False
        )

    plain, debug = run("evaluate", "/nowhere"), run("--debug", "evaluate", "/nowhere")
    assert (plain.returncode, debug.returncode) == (1, 1)
    assert plain.stderr.startswith("dgm: /nowhere")
    assert plain.stderr.count("\n") == 1
    assert "Traceback" in debug.stderr


def test_the_objectives_have_their_names_where_only_the_commands_modules_are_imported():
    code = "import dgm_pyro.experiments.runs; from dgm_pyro.objectives import objective_named; objective_named('gan:2')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert not done.returncode, done.stderr


# -- bad input ---------------------------------------------------------------------------------------------------------

BAD = [
    (["train"], 2, "MODEL"),
    (["train", "gan"], 1, "model must be one of"),
    (["train", "vea"], 1, "got 'vea' (did you mean 'vae'?)"),
    (["train", "RealNVP"], 1, "got 'RealNVP' (did you mean 'realnvp'?)"),
    (["train", "vae", "--data", "cats"], 1, "no data set 'cats'"),
    (["train", "vae", "--data", "digit"], 1, "no file or folder (did you mean 'digits'?)"),
    (["train", "vae", "--objective", "iwea:5"], 1, "(did you mean 'iwae'?)"),
    (["train", "vae", "--optimizer", "Adm"], 1, "(did you mean 'Adam'?)"),
    (["train", "made", "--mutate", "1.5"], 1, "mutate must be a number"),
    (["train", "maf", "--data", "moons", "--mutate", "0.3"], 1, "mutate replaces integers, but 'moons' has reals"),
    (["train", "vae", "--num-labels", "100"], 1, "num_labels is for labeled=True"),
    (["train", "vae", "--labeled", "--num-labels", "100"], 1, "semi-supervised"),
    (["train", "vae", "--labeled", "--num-labels", "5000"], 1, "500 labels of class"),
    (["train", "vae", "--data", "mnist"], 1, "DGM_DATA"),
    (["train", "vae", "--data", "mnist", "--data-dir", "/nowhere"], 1, "/nowhere"),
    (["train", "vae", "--prior", "gaussian"], 1, "prior must be"),
    (["train", "vae", "--encoder", "flow"], 1, "encoder must be"),
    (["train", "vae", "--likelihood", "gauss"], 1, "likelihood must be"),
    (["train", "vae", "--latent-size", "-3"], 1, "latent_size must be"),
    (["train", "vae", "--latent-size", "0"], 1, "latent_size must be"),
    (["train", "made", "--prior", "flow"], 1, "takes no prior"),
    (["train", "pixelcnn", "--data", "moons"], 1, "needs images"),
    (["train", "vae", "--objective", "mse"], 1, "objective must be one of"),
    (["train", "vae", "--epochs", "0"], 1, "epochs"),
    (["train", "vae", "--epochs", "many"], 2, "--epochs"),
    (["train", "vae", "--batch-size", "-1"], 1, "batch_size"),
    (["train", "vae", "--lr", "-1"], 1, "lr must be"),
    (["train", "vae", "--lr", "nan"], 1, "lr must be"),
    (["train", "vae", "--weight-decay", "-1"], 1, "weight_decay"),
    (["train", "vae", "--ema", "1"], 1, "ema"),
    (["train", "vae", "--validation", "1.5"], 1, "validation"),
    (["train", "vae", "--early-stopping", "0"], 1, "early_stopping"),
    (["train", "vae", "--early-stopping", "3", "--validation", "0"], 1, "early_stopping"),
    (["train", "vae", "--num-data", "0"], 1, "num_data"),
    (["train", "vae", "--device", "abacus"], 1, "device"),
    (["train", "classifier", "--labeled"], 1, "discriminative"),
    (["train", "vae", "--color", "red"], 2, "--color"),
    (["sample", "/nowhere"], 1, "/nowhere"),
    (["sample", "{vae}", "-n", "0"], 1, "num_samples"),
    (["sample", "{vae}", "-n", "1000000000000000"], 1, "there is not enough memory: ask for fewer"),
    (["sample", "{vae}", "--seed", "18446744073709551616"], 2, "--seed"),
    (["train", "vae", "--seed", "-1"], 2, "--seed"),
    (["sample", "{vae}", "--class", "3"], 1, "--labeled"),
    (["sample", "{labeled}", "--class", "12"], 1, "12"),
    (["sample", "{vae}", "--sampler", "ddim"], 1, "diffusion"),
    (["sample", "{diffusion}", "--sampler", "euler"], 1, "sampler must be"),
    (["sample", "{diffusion}", "--num-steps", "100000"], 1, "num_steps must be"),
    (["sample", "{diffusion}", "--spacing", "cosine"], 1, "spacing must be one of uniform, quadratic, karras"),
    (["sample", "{classifier}"], 1, "discriminative"),
    (["sample", "{vae}", "--out", "x.jpg"], 1, ".png"),
    (["evaluate", "/nowhere"], 1, "/nowhere"),
    (["evaluate", "{vae}", "--split", "holdout"], 1, "no split"),
    (["evaluate", "{vae}", "--num-particles", "0"], 1, "num_particles"),
    (["evaluate", "{vae}", "--ode"], 1, "ode=True is for a ContinuousDiffusion"),
    (["evaluate", "{vae}", "--num-samples", "0"], 1, "num_samples must be a positive integer"),
    (
        ["evaluate", "{vae}", "--num-samples", "3", "--num-particles", "2"],
        1,
        "--num-samples is the number of ELBO samples",
    ),
    (["evaluate", "{points}", "--num-samples", "3"], 1, "--num-samples is the number of ELBO samples"),
    (["tour", "--device", "abacus"], 1, "device"),
    (["tour", "--longer", "0"], 2, "longer"),
    (["tour", "--out", "{vae}"], 1, "no tour"),
    (["dance"], 2, "dance"),
    (["--loud"], 2, "--loud"),
]


@pytest.mark.parametrize(("arguments", "status", "words"), BAD, ids=[" ".join(case[0]) for case in BAD])
def test_bad_input_is_one_line_and_a_status(arguments, status, words, trained, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DGM_DATA", raising=False)
    capfd.readouterr()
    assert cli.main([argument.format(**trained) for argument in arguments]) == status
    out, err = capfd.readouterr()
    (line,) = err.splitlines()
    assert line.startswith("dgm: ")
    assert words in line
    assert "Traceback" not in out + err
    assert not any(path.is_file() for path in tmp_path.rglob("*")), "bad input must leave no files"


def test_a_damaged_run_is_one_line(trained, tmp_path, capfd):
    import shutil

    run = shutil.copytree(trained["vae"], tmp_path / "run")
    (weights,) = run.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    capfd.readouterr()
    assert cli.main(["sample", str(run)]) == 1
    assert "truncated" in capfd.readouterr().err
    whole = json.loads((run / "run.json").read_text())
    del whole["weights"]  # of other weights it would be of another moment
    spoilt = ["", "{", "[]", "3", "[" * 10**5, "{}", *(json.dumps(whole | {name: 3}) for name in whole)]
    for content in [*spoilt, json.dumps(whole | {"history": {}})]:
        (run / "run.json").write_text(content)
        assert cli.main(["sample", str(run)]) == 1
        (line,) = capfd.readouterr().err.splitlines()
        assert f"{run / 'run.json'} is damaged (" in line
        assert line.endswith("): train the run again")


def test_a_run_that_is_missing_is_noticed_before_the_others_are_measured(trained, monkeypatch, capfd):
    monkeypatch.setattr(dgm.infer, "gaps", lambda *arguments, **options: pytest.fail("minutes for nothing"))
    assert cli.main(["gaps", str(trained["vae"]), "/nowhere"]) == 1
    assert "/nowhere holds no run" in capfd.readouterr().err


def test_a_loss_that_is_not_finite_is_one_line_after_the_bar(tmp_path, capfd):
    arguments = [
        "train",
        "vae",
        "--data",
        "moons",
        "--num-data",
        "200",
        "--lr",
        "1e30",
        "--epochs",
        "5",
        "--device",
        "cpu",
    ]
    assert cli.main([*arguments, "--out", str(tmp_path / "run")]) == 1
    err = capfd.readouterr().err
    assert err.splitlines()[-1].startswith("dgm: the ")
    assert "not finite" in err
    assert "Traceback" not in err


def test_an_interrupt_is_one_line(monkeypatch, capfd):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(dgm.data, "load", interrupt)
    assert cli.main(["train", "vae"]) == 130
    assert capfd.readouterr().err.splitlines()[-1] == "dgm: interrupted"


def test_a_bug_shows_its_traceback(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("a bug")

    monkeypatch.setattr(dgm.data, "load", fail)
    with pytest.raises(AssertionError, match="a bug"):
        cli.main(["train", "vae"])


def test_every_picture_is_named(tmp_path, capsys):
    dgm_ok("train", "vae", "--latent-size", "4", "--num-data", "200", *FAST, "--out", tmp_path / "run")
    quick = ["--num-data", "3", "--num-particles", "4", "--num-temperatures", "3", "--gradient-steps", "3"]
    dgm_ok("gaps", tmp_path / "run", *quick)
    dgm_ok("checks", tmp_path / "run", "--num-data", "3")
    dgm_ok("sample", tmp_path / "run", "--num-samples", "2")
    printed = capsys.readouterr().out
    pictures = {path.name for path in tmp_path.rglob("*.png")}
    assert len(pictures) >= 5
    assert {name for name in pictures if name not in printed} == set()
