"""One name, one thing: the names of the package and of the arguments of its functions, and the options of `dgm`."""

import importlib
import inspect
import pkgutil
import re
from collections import defaultdict

import pytest
import typer

import dgm_pyro
from dgm_pyro import cli

MODULES = [
    importlib.import_module(info.name)
    for info in pkgutil.walk_packages(dgm_pyro.__path__, "dgm_pyro.")
    if not info.name.endswith(("__main__", "old_names"))
]

FORBIDDEN = {
    "context": "given",
    "context_levels": "given_levels",
    "context_shape": "given_shape",
    "doubt": "uncertainty",
    "draws": "num_samples for a number, samples for a tensor",
    "k": "what is counted, as in neighbors",
    "data_name": "data, by name or object",
    "labels": "y for those of data, classifier for p(y | x), num_classes for how many there are, labeled for a choice",
    "latent": "latent_name for the name of a site, latent_size for a number of features",
    "num": "what is counted: num_data, num_samples, num_points",
    "num_bins": "bins",
    "num_draws": "num_samples",
    "num_simulations": "num_samples",
    "outputs": "num_parameters of a conditional, out_features of a layer",
    "schedule": "what is scheduled: lr_schedule, noise_schedule, temperature_schedule",
    "steps": "num_steps of a chain, gradient_steps of an optimization",
    "surprise": "nll",
}

# Arguments that have one meaning, and where; elsewhere the word would mean another thing.
ONE_MEANING = {
    "features": set(),  # num_features counts them, Autoregressive(factors=) has their distributions
    "label": {  # where the labels are read; dgm sample --class is one of them
        "dgm_pyro.cli.sweep",
        "dgm_pyro.cli.train",
        "dgm_pyro.data.open",
        "dgm_pyro.sources.Arrays.__init__",
        "dgm_pyro.sources.Choice.__init__",
        "dgm_pyro.sources.StoredArray.__init__",
    },
    "size": {  # of images; rows are counted by batch_size, num_data or num_samples, processes by world_size
        "dgm_pyro.cli.sweep",
        "dgm_pyro.cli.train",
        "dgm_pyro.data.open",
        "dgm_pyro.image_sets.glyphs",
        "dgm_pyro.image_sets.patches",
        "dgm_pyro.published.imagenet",
        "dgm_pyro.sources.Choice.__init__",
    },
}

OTHERS_WORDS = {
    "dgm_pyro.cli.root(context=)": "typer passes its Context by the type",
    "dgm_pyro.cli.train(context=)": "typer passes its Context by the type",
    "dgm_pyro.families.onehot.OneHotDistribution.log_masses(k=)": "an outcome of the formula, no number to choose",
}

# Functions and classes of one name, and why it is one thing.
SHARED = {
    "compare": "the command calls the function",
    "doctor": "the command calls the function",
    "evaluate": "the command calls the function",
    "gaps": "the command calls the function, and plots.gaps draws its result",
    "impute": "the command calls the function",
    "pull": "the command calls the function",
    "push": "the command calls the function",
    "represent": "the command calls the function",
    "sweep": "the command calls the function",
    "train": "the command calls the function",
    "reliability": "plots.reliability draws its result",
    "load": "dgm.load reads a program, dgm.data.load data",
    "write": "runs.write stores a run, report.write a page",
    "Bernoulli": "a conditional has the name of its distribution",
    "Beta": "a conditional has the name of its distribution",
    "DiscretizedLogistic": "a conditional has the name of its distribution",
}

KINDS = {
    r"num_\w+|\w+_steps|epochs|bins|neighbors|rank|width|components|heads|\w+_features": {"int"},
    r"\w*_name": {"str"},
    r"(event|in|out|given)_shape": {"int", "Sequence[int]", "Shape", "torch.Size"},
    r"\w+_schedule": {"str", "Schedule", "LogSNR", "SchedulerFactory"},
    r"progress": {"bool"},
    r"elapsed|lr|fraction|tolerance|\w+_rate": {"float"},
    r"seed|batch_size": {"int"},
    r"curve|tails|divergence|game|\w+_type": {"str"},
    r"scale": {"float", "Numbers", "Tensor", "Sequence[float]", "Any"},
    r"channels|hidden": {"Sequence[int]", "tuple[int, ...]"},
    r"unit_cube|learned|labeled": {"bool"},
}

BRITISH = re.compile(
    r"centre|grey|colour|behaviour|neighbour|labell|modell|(?:maxim|optim|standard|normal|general|initial|parametr"
    r"|parameter|factor|discret|amort|organ|summar)is(?:e|ed|es|er|ing|ation)(?![a-z])",
    re.IGNORECASE,
)


# Checks take anything, to refuse it; the options of typer have their types in Annotated; a History has its Epochs.
CHECKS_AND_RESULTS = (
    "dgm_pyro.checks.", "dgm_pyro.cli.", "dgm_pyro.program.Program.check_draws", "dgm_pyro.training.fit.History.",
)  # fmt: skip


def public(module):
    """The functions and classes that ``module`` defines, by name."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == module.__name__
    }


def signatures():
    """Where each function, method and constructor is, and its parameters."""
    for module in MODULES:
        for name, value in public(module).items():
            members = {"": value} if inspect.isfunction(value) else vars(value)
            for member, function in members.items():
                function = getattr(function, "__func__", function)
                if inspect.isfunction(function) and (not member.startswith("_") or member == "__init__"):
                    where = f"{module.__name__}.{name}.{member}".rstrip(".")
                    yield where, inspect.signature(function).parameters


def test_no_argument_has_a_name_that_meant_several_things():
    found = {
        f"{where}({name}=)": FORBIDDEN[name] for where, names in signatures() for name in names if name in FORBIDDEN
    }
    assert found.keys() == OTHERS_WORDS.keys()


@pytest.mark.parametrize("name", ONE_MEANING)
def test_an_argument_of_one_meaning_is_where_it_has_it(name):
    assert {where for where, names in signatures() if name in names} == ONE_MEANING[name]


def test_no_option_of_the_command_line_has_one_of_these_names():
    command = typer.main.get_command(cli.app)
    names = {
        name.lstrip("-").replace("-", "_")
        for each in command.commands.values()
        for option in each.params
        for name in (*option.opts, *option.secondary_opts)
    }
    assert len(names) > 40
    assert not names & FORBIDDEN.keys()


@pytest.mark.parametrize("pattern", KINDS)
def test_an_argument_of_a_name_has_one_kind_of_value(pattern):
    seen = 0
    for where, parameters in signatures():
        if where.startswith(CHECKS_AND_RESULTS):
            continue
        for name, parameter in parameters.items():
            if not re.fullmatch(pattern, name) or parameter.annotation is parameter.empty:
                continue
            annotation = re.sub(r"^Annotated\[(.*?), .*", r"\1", str(parameter.annotation), flags=re.DOTALL)
            kinds = {kind.strip() for kind in annotation.split("|")} - {"None"}
            assert kinds <= KINDS[pattern], f"{where}({name}: {parameter.annotation})"
            seen += 1
    assert seen


def test_no_two_functions_or_classes_share_a_name():
    where = defaultdict(list)
    for module in MODULES:
        for name in public(module):
            where[name].append(module.__name__)
    assert {name: modules for name, modules in where.items() if len(modules) > 1}.keys() == SHARED.keys()


def test_names_are_spelled_as_in_america():
    names = {name for module in MODULES for name in public(module)} | {each.__name__ for each in MODULES}
    for where, parameters in signatures():
        names |= {where, *parameters}
    assert not [name for name in names if BRITISH.search(name)]
