"""What a newcomer tries first works, or the error says what to write instead."""

import inspect
import re
import subprocess
import sys

import numpy
import pandas
import pyro.distributions as dist
import pytest
import torch
import typer
from programs import CASES
from torch import nn

import dgm_pyro as dgm
from dgm_pyro import catalog, cli, guesses

DATA = dgm.Data(torch.randn(20, 3))
FUNCTIONS = [
    dgm.build, dgm.fit, dgm.evaluate, dgm.load, dgm.save, dgm.Data, dgm.data.open, dgm.data.load,
    dgm.infer.ais, dgm.infer.check, dgm.infer.compare, dgm.infer.impute, dgm.infer.nuts, dgm.infer.psis, dgm.infer.sbc,
    dgm.infer.smc, dgm.infer.train_guide,
]  # fmt: skip
COMMANDS = typer.main.get_command(cli.app).commands


def options_of(command):
    return {name for each in COMMANDS[command].params for name in each.opts}


OPTIONS = set().union(*map(options_of, COMMANDS))


def vae():
    return dgm.VAE(dgm.Normal(2), dgm.Normal(3, nn.Linear(2, 6)), dgm.Normal(2, nn.Linear(3, 4)))


def test_encode_and_decode_are_methods():
    program, x = vae(), torch.randn(5, 3)
    assert torch.equal(program.encode(x), program.encoder(x).mean)
    assert torch.equal(program.decode(program.encode(x)), program.likelihood(program.encoder(x).mean).mean)


def test_one_sample_is_the_default():
    assert vae().sample().shape == (1, 3)


@pytest.mark.parametrize("name", ["vae", "made", "diffusion", "maf", "labeled", "dequantized"])
def test_samples_by_other_names_are_answered_with_the_right_one(name):
    program = next(case.build() for key, case in CASES.items() if key.startswith(name))
    for unknown in ({"label": 1}, {"labels": [1]}, {"n": 3}, {"temperature": 0.5}):
        with pytest.raises(TypeError, match=rf"takes no {next(iter(unknown))}: .*given=torch.tensor"):
            program.sample(**unknown)
    with pytest.raises(TypeError, match=r"num_samples must be an integer, got the shape \(3,\): use sample\(3\)"):
        program.sample((3,))
    with pytest.raises(TypeError, match=r"sample\(6\)"):
        program.sample(torch.Size((2, 3)))


def test_the_answer_names_arguments_that_there_are():
    with pytest.raises(TypeError, match="a diffusion takes") as raised:
        CASES["vae"].build().sample(steps=3)
    named = re.search("a diffusion takes (.*), too", str(raised.value))[1]
    assert set(re.findall(r"\w+", named)) - {"and"} <= set(inspect.signature(dgm.Diffusion.sample).parameters)


def test_a_program_without_codes_says_so():
    with pytest.raises(ValueError, match="this Autoregressive has no latent code: use a VAE, a flow or a diffusion"):
        CASES["made"].build().encode(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="has no latent code"):
        dgm.Normal(2).decode(torch.zeros(2, 2))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: dgm.VAE(dist.Normal(0, 1), dgm.Normal(3, nn.Linear(2, 6)), dgm.Normal(2, nn.Linear(3, 4))),
        lambda: dgm.VAE(dgm.Normal(2), dist.Normal(0, 1), dgm.Normal(2, nn.Linear(3, 4))),
        lambda: dgm.VAE(dgm.Normal(2), dgm.Normal(3, nn.Linear(2, 6)), dist.Normal(0, 1)),
        lambda: dgm.build("vae", dgm.data.load("digits", num_data=10), prior=dist.Normal(0, 1)),
        lambda: dgm.build("vae", dgm.data.load("digits", num_data=10), encoder=torch.distributions.Normal(0, 1)),
        lambda: dgm.Flow(2, [], dist.Normal(0, 1)),
        lambda: dgm.Dequantized(dist.Normal(0, 1), 4),
        lambda: dgm.Autoregressive(dist.Normal(0, 1)),
        lambda: dgm.Labeled(dgm.Categorical((), 2), dist.Normal(0, 1)),
        lambda: dgm.Implicit(2, dist.Normal(0, 1), nn.Linear(2, 2)),
        lambda: dgm.evaluate(dist.Normal(0, 1), torch.zeros(3)),
    ],
)
def test_a_distribution_where_a_program_belongs(wrong):
    with pytest.raises(TypeError, match=r"got the distribution Normal: use a program such as dgm.Normal\(shape\)"):
        wrong()


@pytest.mark.parametrize("guess", guesses.ARGUMENTS)
def test_an_argument_is_answered_by_ours(guess):
    found = set()
    for function in FUNCTIONS:
        parameters, name = inspect.signature(function).parameters, function.__name__
        meant = next((each for each in guesses.ARGUMENTS[guess] if each in parameters), None)
        if meant is None or guess in parameters or guess in guesses.REMEDIES.get(name, ()):
            continue
        with pytest.raises(TypeError, match=rf"^{name} takes no {guess} \(did you mean '{meant}'\?\)"):
            function(**{guess: None})
        found.add(meant)
    assert found == set(guesses.ARGUMENTS[guess])


@pytest.mark.parametrize(
    ("name", "guess"), [(name, guess) for name, each in guesses.REMEDIES.items() for guess in each]
)
def test_an_argument_of_which_we_have_none_is_answered_by_what_to_do(name, guess):
    remedy = guesses.REMEDIES[name][guess]
    assert guess not in inspect.signature(getattr(dgm, name)).parameters
    with pytest.raises(TypeError, match=re.escape(f"{name} takes no {guess}: {remedy}")):
        getattr(dgm, name)(**{guess: None})
    check_remedy(remedy)


@pytest.mark.parametrize(
    ("function", "guess", "meant"),
    [
        (dgm.build, "latent_dim", "latent_size"),
        (dgm.build, "hidden_dims", "hidden"),
        (dgm.fit, "num_epochs", "epochs"),
        (dgm.fit, "n_epochs", "epochs"),
        (dgm.fit, "optim", "optimizer"),
        (dgm.fit, "validation_data", "validation"),
        (dgm.evaluate, "n_particles", "num_particles"),
        (dgm.infer.compare, "restart", "restarts"),
    ],
)
def test_an_argument_that_is_spelled_much_alike_needs_no_table(function, guess, meant):
    assert guess not in guesses.ARGUMENTS
    with pytest.raises(TypeError, match=rf"takes no {guess} \(did you mean '{meant}'\?\)"):
        function(None, None, **{guess: 1})


def test_an_argument_unlike_any_is_named_alone():
    with pytest.raises(TypeError, match=r"^fit takes no xyzzy$"):
        dgm.fit(None, None, xyzzy=1)


def test_arguments_that_are_known_are_passed_on():
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'path'"):
        dgm.save(dgm.build("made", DATA))


@pytest.mark.parametrize("guess", guesses.MODELS)
def test_a_model_is_answered_by_ours(guess):
    assert guess not in catalog.MODELS
    for spelled in (guess, guess.upper(), guess.replace("-", "_"), guess.replace("-", " ")):
        meant = guesses.MODELS[guess]
        told = f" (did you mean '{meant}'?)" if meant in catalog.MODELS else f": {meant}"
        with pytest.raises(ValueError, match=re.escape(f"got {spelled!r}{told}")):
            dgm.build(spelled, DATA)


@pytest.mark.parametrize("guess", guesses.COMMANDS)
def test_a_command_is_answered_by_ours(guess, capsys):
    assert guess not in COMMANDS
    assert {each.split()[0] for each in guesses.COMMANDS[guess].split(" or ")} <= set(COMMANDS)
    assert cli.main([guess, "x"]) == 2
    assert f"No such command '{guess}'. (use {guesses.COMMANDS[guess]}, see dgm --help)" in capsys.readouterr().err


@pytest.mark.parametrize("guess", guesses.FLAGS)
def test_an_option_is_answered_by_ours(guess, capsys):
    assert guess not in OPTIONS
    for meant in guesses.FLAGS[guess].split(" or "):
        taker = next(name for name in COMMANDS if meant in options_of(name))
        for spelled in (guess, f"--{guess[2:].replace('-', '_')}"):
            assert cli.main([taker, spelled, "3"]) == 2
            assert f"No such option: {spelled} (use {meant}, see dgm {taker} --help)" in capsys.readouterr().err


def check_remedy(remedy):
    """Every name dgm.x.y and program.x in the text exists, and every call of one has the arguments that it is given."""
    kinds = (dgm.VAE, dgm.Labeled)
    for owner, found, given in re.findall(r"\b(dgm|program)\.([\w.]*\w)(?:\(([^()]*)\))?", remedy):
        places = [dgm] if owner == "dgm" else [dgm.build("vae", DATA), *kinds]
        for name in found.split("."):
            places = [getattr(place, name) for place in places if hasattr(place, name)]
            assert places, f"{owner}.{found} does not exist"
        for keyword in re.findall(r"(\w+)=", given):
            assert keyword in inspect.signature(places[0]).parameters, f"{found} takes no {keyword}"


@pytest.mark.parametrize("guess", guesses.PUBLIC)
def test_a_public_name_is_answered_by_what_to_use(guess):
    with pytest.raises(AttributeError, match=re.escape(f"dgm_pyro has no {guess!r}: use {guesses.PUBLIC[guess]}")):
        getattr(dgm, guess)
    check_remedy(guesses.PUBLIC[guess])


@pytest.mark.parametrize("command", guesses.EXTRA)
def test_an_argument_too_many_is_answered_by_what_to_do(command, capsys):
    arguments = [each.name for each in COMMANDS[command].params if each.param_type_name == "argument"]
    assert cli.main([command, *arguments, "one-more"]) == 2
    assert f"({guesses.EXTRA[command]}, see dgm {command} --help)" in capsys.readouterr().err
    named = set(re.findall(r" (--?[a-z-]+)", guesses.EXTRA[command]))
    assert named
    assert named <= options_of(command)


@pytest.mark.parametrize(
    ("module", "guess"), [(name, guess) for name, each in guesses.MODULES.items() for guess in each]
)
def test_a_name_in_a_module_is_answered_by_what_to_use(module, guess):
    remedy = guesses.MODULES[module][guess]
    with pytest.raises(AttributeError, match=re.escape(f"dgm_pyro.{module} has no {guess!r}: use {remedy}")):
        getattr(getattr(dgm, module), guess)
    check_remedy(remedy)


@pytest.mark.parametrize("guess", guesses.METHODS)
@pytest.mark.parametrize("standardize", [True, False])
def test_a_method_is_answered_by_what_to_use(guess, standardize):
    program = dgm.build("vae", DATA, standardize=standardize)
    name = type(program).__name__
    with pytest.raises(AttributeError, match=re.escape(f"{name} has no {guess!r}: use {guesses.METHODS[guess]}")):
        getattr(program, guess)
    assert not hasattr(program, guess)
    check_remedy(guesses.METHODS[guess])


def test_what_to_use_in_the_place_of_a_method_runs():
    program = dgm.build("vae", dgm.data.load("digits-binary"), latent_size=2)
    x = dgm.data.load("digits-binary").x[:4]
    bound = dgm.ELBO()(program, x).value
    assert bound.shape == dgm.evaluate(program, x).values.shape == (4,)
    assert program.decode(program.encode(x)).shape == program.sample(4).shape == x.shape


def test_a_part_may_have_a_name_that_is_a_guess():
    class Scored(dgm.Normal):
        def __init__(self):
            super().__init__(2)
            self.loss = torch.nn.Linear(2, 1)

    assert isinstance(Scored().loss, torch.nn.Linear)


def test_a_property_with_the_name_of_a_guess_fails_with_its_own_error():
    class Scored(dgm.Normal):
        @property
        def score(self):
            return self.missing

    with pytest.raises(AttributeError, match=r"missing|score") as raised:
        Scored(2).score  # noqa: B018
    assert "use program.log_prob" not in str(raised.value)


def test_training_mode_is_no_training():
    program = dgm.build("made", DATA)
    assert program.train() is program
    assert not program.train(False).training
    with pytest.raises(TypeError, match=r"mode must be a bool, got Data: to train a program, use dgm\.fit\("):
        program.train(DATA)


@pytest.mark.parametrize("x", [numpy.ones((4, 3)), pandas.DataFrame({"a": [1.0, 2.0]}), "moons"])
def test_what_is_no_data_is_answered_by_what_reads_it(x):
    program = dgm.build("made", DATA)
    for call in (lambda: dgm.build("made", x), lambda: dgm.fit(program, x), lambda: dgm.evaluate(program, x)):
        with pytest.raises(
            TypeError, match=r"dgm\.data\.open\(source\) for arrays, frames and files, dgm\.data\.load\(name\)"
        ):
            call()
    with pytest.raises(TypeError, match=r"x must be a torch\.Tensor, got") as raised:
        dgm.Data(x)
    advice = re.search("use (.*?)( or |$)", str(raised.value))[1]
    assert len(eval(advice, {"dgm": dgm, "torch": torch, "x": x})) > 1


def test_a_label_is_one_integer_per_datum():
    program = dgm.build("vae", dgm.Data(DATA.x, torch.arange(20) % 3), labeled=True)
    with pytest.raises(TypeError, match=r"got int: use torch\.tensor\(\[1\]\), one per datum"):
        program.sample(3, given=1)
    with pytest.raises(ValueError, match=r"given has shape \(\), .*: pass \(B,\), one number per datum"):
        program.sample(3, given=torch.tensor(1))
    assert program.sample(3, given=torch.tensor([1])).shape == (3, 3)
    with pytest.raises(ValueError, match="not conditional: leave it out, or build a program with labeled=True"):
        dgm.build("vae", DATA).sample(3, given=torch.tensor([1]))


@pytest.mark.parametrize("part", [{"prior": dgm.Normal(3)}, {"encoder": dgm.Normal(3, nn.Linear(3, 6))}])
def test_latents_have_one_size(part):
    assert dgm.build("vae", DATA, latent_size=3, **part).latents("x") == ("z",)
    with pytest.raises(ValueError, match=rf"latent_size is 2, but the {next(iter(part))} .* event_shape \(3,\)"):
        dgm.build("vae", DATA, latent_size=2, **part)


@pytest.mark.parametrize("guess", ["mnist", "load_digits", "digits_binary"])
def test_a_data_set_is_answered_by_load(guess):
    name = guess.removeprefix("load_").replace("_", "-")
    with pytest.raises(AttributeError, match=re.escape(f"use dgm.data.load({name!r})")):
        getattr(dgm.data, guess)


def test_the_version():
    assert dgm.__version__


@pytest.mark.parametrize("arguments", [(), ("--help",), ("train", "--help"), ("anomaly", "--help"), ("--version",)])
def test_help_imports_no_torch(arguments):
    """It takes seconds of processor time."""
    run = f"import sys\nfrom dgm_pyro.cli import main\nassert main({list(arguments)}) == 0\n"
    ask = run + "assert not {'torch', 'pyro', 'numpy', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", ask], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("warns", "message"),
    [
        (lambda: dgm.build("made", dgm.Data(torch.ones(9, 2))), "is constant"),
        (lambda: dgm.build("made", dgm.Data(torch.randn(9, 2, 2))), "treated as a vector"),
        (
            lambda: dgm.fit(
                dgm.build("made", DATA, standardize=False), DATA.x + 1000, epochs=1, validation=None, progress=False
            ),
            "has mean",
        ),
    ],
)
def test_a_warning_names_the_line_of_the_caller(warns, message):
    with pytest.warns(UserWarning, match=message) as warned:
        warns()
    assert {each.filename for each in warned} == {__file__}


def test_a_warning_needs_no_module_of_the_caller():
    with pytest.warns(UserWarning, match="is constant"):
        exec("build('made', data)", {"build": dgm.build, "data": dgm.Data(torch.ones(9, 2))})
