"""The command line: ``dgm tour``, ``train``, ``sample``, ``evaluate``, ``list``.

A command reads its options, calls one function of the library, and prints the result. Bad input prints one line on
stderr and exits with a non-zero status; ``dgm --debug`` shows the traceback.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import glob
import inspect
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dgm_pyro.guesses import COMMANDS, EXTRA, FLAGS
from dgm_pyro.malloc import keep_freed_memory
from dgm_pyro.old_names import FLAGS as OLD_FLAGS
from dgm_pyro.training.options import TrainingOptions, option_types, value_of

# Modules that are slow to import are imported by the commands that need them.
if TYPE_CHECKING:
    from dgm_pyro.experiments.commands import OpenRun
    from dgm_pyro.results import Result
else:
    OpenRun = Any

app = typer.Typer(
    name="dgm",
    help="Deep generative models as probabilistic programs: train, evaluate and compare them.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

INTERRUPTED = 130

Command = Callable[..., None]

# -- options ----------------------------------------------------------------------------------------------------------


def _option(meaning: str, *names: str, **options: Any) -> Any:
    return typer.Option(*names, help=meaning, **options)


def _complete_run(incomplete: str) -> list[str]:
    """Folders of runs whose path starts with ``incomplete``."""
    patterns = (f"{glob.escape(incomplete)}*{below}/run.json" for below in ("", "/*"))
    return sorted({os.path.dirname(found) for pattern in patterns for found in glob.glob(pattern)})


def _complete_model(incomplete: str) -> list[str]:
    from dgm_pyro.catalog import MODELS

    return [name for name in MODELS if name.startswith(incomplete)]


def _data_sets(incomplete: str) -> list[str]:
    from dgm_pyro.data import NAMES

    return [name for name in NAMES if name.startswith(incomplete)]


def _argument(metavar: str, meaning: str, completed: Callable[[str], list[str]] | None = None) -> Any:
    return typer.Argument(metavar=metavar, help=meaning, autocompletion=completed)


def _output_option(suffix: str, meaning: str) -> Any:
    def check(path: Path | None) -> Path | None:
        if path is not None and path.suffix.lower() != suffix:
            raise ValueError(f"--out must end in {suffix}, got {path}")
        return path

    return _option(meaning, callback=check)


Device = Annotated[str, _option("Device: auto (CUDA if available), cpu, cuda or cuda:N.")]
Seed = Annotated[int, _option("Seed; the same seed on the same machine gives the same result.", min=0, max=2**32 - 1)]
DataDir = Annotated[
    str | None, _option("Folder of data sets that are read from files. Default: the environment variable DGM_DATA.")
]
Backend = Annotated[str | None, _option("Cluster to run on, instead of processes on this machine: dask or ray.")]
Address = Annotated[str | None, _option("Address of the --backend, such as tcp://10.0.0.1:8786.")]
Json = Annotated[bool, _option("Print the result as JSON.", "--json")]
Picture = Annotated[
    Path | None, _output_option(".png", "Output picture, a .png. Default: in the folder of the (first) run.")
]
Split = Annotated[str, _option("Split of the data set: train or test; also valid, if the data set has one.")]
Samples = Annotated[
    int,
    _option(
        "Number of importance samples per datum, for a model with latent variables. 1 gives the ELBO; more give the "
        "tighter IWAE bound."
    ),
]
FalseAlarms = Annotated[float, _option("Largest probability that a datum like the normal ones is flagged or rejected.")]
RunFolder = Annotated[Path, _argument("RUN", "Folder of a run, written by dgm train or dgm tour.", _complete_run)]
Inputs = Annotated[str, _argument("DATA", "Data to look at: a file, a folder of images, or a data set.", _data_sets)]
DataSet = Annotated[
    str,
    _option(
        "Data to train on: a data set of dgm list, a file (.csv, .tsv, .parquet, .npy, .npz), or a folder of images.",
        autocompletion=_data_sets,
    ),
]
OtherData = Annotated[
    str | None,
    _option(
        "Other data: a file or a folder, used in full, or the test split of a data set. Default: the run's own.",
        metavar="PATH",
        autocompletion=_data_sets,
    ),
]
Model = Annotated[str, _argument("MODEL", "Model to train: see dgm list.", _complete_model)]
NumData = Annotated[int | None, _option("Use only this many training data.")]
LatentSize = Annotated[int | None, _option("Number of features of the latent z of a vae.")]
COLUMNS = "COLUMN,COLUMN,..."
Standardizes = Annotated[bool, _option("Standardize reals inside the model. Results stay in the units of the data.")]


def _is_given(context: typer.Context, name: str) -> bool:
    """Whether an option was given in the command."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _comma_separated(text: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())


def _without_none(**options: Any) -> dict[str, Any]:
    """The options that are not None."""
    return {name: value for name, value in options.items() if value is not None}


def _replace_argument(
    argument: str, parameters: Sequence[inspect.Parameter], make: Callable[..., Any]
) -> Callable[[Command], Command]:
    """Replace the ``argument`` of a command by ``parameters``, from which ``make`` makes it.

    Arguments without a default come first.
    """

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def called(**given: Any) -> None:
            made = make(**{parameter.name: given.pop(parameter.name) for parameter in parameters})
            command(**given, **{argument: made})

        signature = inspect.signature(command, eval_str=True)
        places = [parameters if each.name == argument else [each] for each in signature.parameters.values()]
        first = [each.name for each in parameters if each.default is each.empty]
        every = sorted(itertools.chain(*places), key=lambda each: each.name not in first)
        by_name = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in every]
        called.__signature__ = signature.replace(parameters=by_name)  # type: ignore[attr-defined]
        return called

    return decorate


def _take_arguments_of(argument: str, make: Callable[..., Any]) -> Callable[[Command], Command]:
    """Replace the ``argument`` of a command by the parameters of ``make``."""
    return _replace_argument(argument, [*inspect.signature(make, eval_str=True).parameters.values()], make)


def _open_run(run: RunFolder, device: Device = "auto", data_dir: DataDir = None) -> OpenRun:
    from dgm_pyro.experiments.commands import open_run

    return open_run(run, device, data_dir)


def _open_own_run(run: RunFolder, device: Device = "auto") -> OpenRun:
    """Open a run for a command that needs no data."""
    return _open_run(run, device)


def _open_runs(
    runs: Annotated[list[Path], _argument("RUN ...", "Runs of VAEs, one for each guide.", _complete_run)],
    device: Device = "auto",
    data_dir: DataDir = None,
) -> list[OpenRun]:
    return [_open_run(run, device, data_dir) for run in runs]


def _reading_options(
    label: Annotated[
        str | None, _option("Column of a table, or array of an .npz file, that holds the labels.", metavar="COLUMN")
    ] = None,
    given: Annotated[
        str | None, _option("Columns of a table, or array of an .npz file, to condition on.", metavar=COLUMNS)
    ] = None,
    columns: Annotated[
        str | None, _option("Columns of a table that are the data. Default: all others.", metavar=COLUMNS)
    ] = None,
    kinds: Annotated[
        str | None,
        _option(
            "Kinds of columns: real, positive, count, integer, bounded:LOW:HIGH, category, ordinal:WORD:WORD:... With "
            "auto, and for columns not named here, the kind is guessed from the values.",
            metavar="auto|COLUMN=KIND,...",
        ),
    ] = None,
    levels: Annotated[
        int | None, _option("Number of integer levels: the data are 0 .. levels - 1. Default: reals; 256 for images.")
    ] = None,
    size: Annotated[
        int | None, _option("Height and width to crop and scale the images of a folder to. Default: their own.")
    ] = None,
    gray: Annotated[
        bool | None, _option("Read images as gray, or in color. Default: gray if all of them are.", "--gray/--no-gray")
    ] = None,
    crop: Annotated[
        int | None, _option("Side of the centered square in the images of a folder that is scaled to --size.")
    ] = None,
    test_data: Annotated[
        str | None, _option("File or folder of the test data. Default: a random fifth of the data.", metavar="PATH")
    ] = None,
    num_workers: Annotated[
        int | None,
        _option("Processes that decode the images of a folder larger than 1 GiB. Default: a thread does."),
    ] = None,
) -> dict[str, Any]:
    """The options by which `experiments.runs.points` reads a file."""
    lists = {
        name: None if text is None else list(_comma_separated(text))
        for name, text in (("given", given), ("columns", columns))
    }
    mixed = _parsed_kinds(kinds) if kinds not in (None, "auto") else kinds
    return _without_none(
        label=label, **lists, kinds=mixed, levels=levels, size=size, gray=gray, crop=crop, test=test_data,
        num_workers=num_workers,
    )  # fmt: skip


def _parsed_kinds(text: str) -> dict[str, list[str]]:
    """The kinds in "age=count,share=bounded:0:1"."""
    found = {}
    for each in _comma_separated(text):
        name, _, kind = each.rpartition("=")
        if not name or not kind:
            raise ValueError(f"--kinds must be auto or COLUMN=KIND,..., got {text!r}")
        found[name] = kind.split(":")
    return found


def _training_options(*without: str) -> Callable[[Command], Command]:
    """Replace the argument ``options`` of a command by one option for each field of `TrainingOptions`.

    Args:
        without: fields that keep their default.
    """
    parameters = [_parameter_of(field) for field in dataclasses.fields(TrainingOptions) if field.name not in without]

    def decorate(command: Command) -> Command:
        return _replace_argument("options", parameters, TrainingOptions)(_interruptible()(command))

    return decorate


def _parameter_of(field: dataclasses.Field[Any]) -> inspect.Parameter:
    """The option of the command line that sets a field of `TrainingOptions`."""
    (kind, meaning), default = option_types()[field.name], field.default
    annotation: Any = Annotated[kind, _option(meaning)]
    if field.name in ("seed", "device"):  # as for the other commands
        annotation = {"seed": Seed, "device": Device}[field.name]
    elif field.name in ("validation", "clip_norm"):
        annotation = Annotated[float, _option(f"{meaning} 0 for none.", callback=lambda value: value or None)]
    elif field.name == "compile":
        told = _option(meaning, "--compile/--no-compile", callback=lambda choice: "auto" if choice is None else choice)
        annotation, default = Annotated[bool | None, told], None
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _settings(texts: Sequence[str]) -> dict[str, Any]:
    """The values in "NAME=VALUE": numbers and sequences of them, or names."""
    from dgm_pyro.checks import close_to

    known, found = _names_to_set(), {}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in known or not value:
            meant = "" if name in known else close_to(name, known)
            raise ValueError(f"--set must be NAME=VALUE with a NAME of {', '.join(known)}, got {text!r}{meant}")
        found[name] = value_of(value)
    return found


def _names_to_set() -> list[str]:
    from dgm_pyro.catalog import option_names

    return [name for name in option_names() if name != "labeled"]


def _name_and_values(text: str) -> tuple[str, Sequence[Any]]:
    """The name and the values in "lr=1e-3,3e-3" or "hidden=(64,),(256,256)"."""
    name, _, values = text.partition("=")
    found = value_of(f"[{values}]")
    if not values:
        raise ValueError(f"--vary must be NAME=VALUE,VALUE,..., got {text!r}")
    return name.replace("-", "_"), found if isinstance(found, list) else _comma_separated(values)


STORED_SETTINGS, STORED_READING = "settings of --config", "reading of --config"
"""Keys under which `_apply_configuration` stores two parts of a run's record in the context: the options of `dgm.build`
that `dgm train` takes by --set alone, and the options for reading the file."""


def _apply_configuration(context: typer.Context, path: Path | None) -> None:
    """Take the options of a run's record for those that the command does not name."""
    if path is None:
        return
    from dgm_pyro.experiments import runs

    remedy = "choose the run.json of a run"
    stored = runs.read_json(path, runs.KINDS, remedy)
    runs.check_record(stored, path, remedy)
    options = stored["options"] | {name: stored[name] for name in ("model", "data", "data_dir")}
    names = {parameter.name for parameter in context.command.params}
    own = {*_names_to_set()} - names
    context.meta[STORED_SETTINGS] = {name: value for name, value in options.items() if name in own}
    # The file may have changed since: this is another training.
    reading = options.get("reading", {})
    context.meta[STORED_READING] = {name: value for name, value in reading.items() if name != "digests"}
    none = {"validation": 0, "clip_norm": 0}  # the value that means None, where None is not the default
    given = {name: none.get(name) if value is None else value for name, value in options.items() if name in names}
    given = {name: value for name, value in given.items() if value is not None and value != "auto"}
    context.default_map = {**(context.default_map or {}), **given}


# -- running a command, and printing its result -----------------------------------------------------------------------


class _Interruption(Exception):
    """The message of `Interrupted`, which typer would drop."""


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    from dgm_pyro.jobs import Interrupted

    try:
        yield
    except Interrupted as error:
        raise _Interruption(str(error), error.status) from None


def _on_a_terminal() -> bool:
    """Whether stderr is a terminal, where progress bars are shown."""
    return sys.stderr.isatty()


def _print(found: Result, as_json: bool = False) -> None:
    typer.echo(json.dumps(found.as_dict(), indent=1) if as_json else str(found))


# -- commands ---------------------------------------------------------------------------------------------------------


@app.callback(invoke_without_command=True, epilog="Example: dgm tour --quick")
def root(
    context: typer.Context,
    version: Annotated[bool, _option("Show the version and exit.", "--version")] = False,
    debug: Annotated[bool, _option("Show tracebacks, as the environment variable DGM_DEBUG does.", "--debug")] = False,
    threads: Annotated[int | None, _option("Number of CPU threads; 1 is often fastest for small networks.")] = None,
) -> None:
    if debug:
        os.environ["DGM_DEBUG"] = "1"
    if threads is not None:
        _use_threads(threads)
    if "LOCAL_RANK" in os.environ and context.invoked_subcommand not in (None, "train"):
        raise ValueError(f"torchrun works with dgm train alone: start dgm {context.invoked_subcommand} without it")
    if version:
        from importlib.metadata import version as version_of

        typer.echo(f"dgm_pyro {version_of('dgm_pyro')}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _use_threads(threads: int) -> None:
    if threads < 1:
        raise ValueError(f"--threads must be a positive integer, got {threads}")
    import torch

    os.environ["OMP_NUM_THREADS"] = str(threads)  # for child processes
    torch.set_num_threads(threads)


@app.command(epilog="Example: dgm tour --quick --out tour")
def tour(
    images: Annotated[bool, _option("Use larger digits: 28x28 pixels, drawn in many fonts.", "--images")] = False,
    quick: Annotated[bool, _option("Train for less than a minute, with worse results.", "--quick")] = False,
    longer: Annotated[int, _option("Train for this many times the epochs, for better samples.", min=1)] = 1,
    out: Annotated[Path, _option("Folder of the report; an earlier tour in it is replaced.")] = Path("tour"),
    resume: Annotated[bool, _option("Continue a tour that was interrupted.", "--resume")] = False,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Train every family on images of digits, compare them, and write a report."""
    from dgm_pyro.experiments.tour.run import run

    with _interruptible():
        failures = run(out, images=images, quick=quick, longer=longer, seed=seed, device=device, resume=resume)
    if failures:
        raise typer.Exit(1)


@app.command(epilog="Example: dgm train vae --data digits --prior flow --epochs 60 --out runs/vae-flow")
@_training_options()
@_take_arguments_of("reading", _reading_options)
def train(
    model: Annotated[
        str,
        _argument(
            "MODEL",
            "Model to train, such as vae or pixelcnn: see dgm list. After --resume: the folder of a run.",
            _complete_model,
        ),
    ],
    data: DataSet = "digits",
    reading: Any = None,
    data_dir: DataDir = None,
    num_data: NumData = None,
    prior: Annotated[str | None, _option("Prior of a vae: see dgm list.")] = None,
    encoder: Annotated[str | None, _option("Encoder of a vae: see dgm list.")] = None,
    likelihood: Annotated[str | None, _option("Likelihood of a vae: see dgm list.")] = None,
    latent_size: LatentSize = None,
    labeled: Annotated[
        bool, _option("Train a generative classifier p(y) p(x | y) with MODEL as p(x | y).", "--labeled")
    ] = False,
    standardize: Standardizes = True,
    objective: Annotated[str | None, _option("Objective to maximize, such as iwae:50: see dgm list.")] = None,
    num_labels: Annotated[
        int | None, _option("Keep only this many labels. Needs --labeled and a semi-supervised objective.")
    ] = None,
    mutate: Annotated[
        float | None, _option("Probability of replacing each feature by noise. Trains a background for dgm anomaly.")
    ] = None,
    *,
    options: TrainingOptions,
    out: Annotated[Path | None, _option("Folder of the run. Default: runs/MODEL-DATA.")] = None,
    force: Annotated[bool, _option("Overwrite the run's folder.", "--force")] = False,
    resume: Annotated[
        bool, _option("Continue an interrupted training: --resume RUN, or the original command again.", "--resume")
    ] = False,
    settings: Annotated[
        list[str] | None,
        _option("Option of the model, such as hidden=512,512; may be repeated.", "--set", metavar="NAME=VALUE"),
    ] = None,
    config: Annotated[
        Path | None,
        _option(
            "Record of a run, whose options are used where the command names none.",
            is_eager=True,
            callback=_apply_configuration,
            metavar="RUN/run.json",
        ),
    ] = None,
    context: typer.Context,
) -> None:
    """Train a model and store the run: its program, options, history and learning curves.

    The state of the training is stored every --checkpoint-minutes, and on SIGINT (Ctrl-C) and SIGTERM.

    In several processes: torchrun --nproc-per-node=N -m dgm_pyro train MODEL ...; see docs/devices.md.
    """
    from dgm_pyro.catalog import MODELS
    from dgm_pyro.experiments.commands import resume_run, train_run

    if resume and model not in MODELS:
        told = [
            name for name in context.params if _is_given(context, name) and name not in ("model", "resume", "device")
        ]
        if told:
            raise ValueError(f"--resume {model} uses the options of that run: leave out {', '.join(told)}")
        device = options.device if _is_given(context, "device") else None
        found = resume_run(Path(model), device, progress=_on_a_terminal())
    else:
        parts = _without_none(prior=prior, encoder=encoder, likelihood=likelihood, latent_size=latent_size)
        parts |= ({} if standardize else {"standardize": False}) | context.meta.get(STORED_SETTINGS, {})
        recorded = {} if _is_given(context, "data") else context.meta.get(STORED_READING, {})
        found = train_run(
            out or Path("runs") / f"{model}-{Path(data).stem}",
            model,
            data,
            parts | _settings(settings or ()),
            options,
            labeled=labeled,
            data_dir=data_dir,
            reading=recorded | reading,
            num_data=num_data,
            objective=objective,
            num_labels=num_labels,
            mutate=mutate,
            force=force,
            resume=resume,
            progress=_on_a_terminal(),
        )
    if found is not None:
        _print(found)


@app.command(epilog="Example: dgm sample runs/diffusion-digits -n 64 --class 3 --sampler dpm++ --num-steps 20")
@_take_arguments_of("run", _open_own_run)
def sample(
    *,
    num_samples: Annotated[int, _option("Number of samples.", "--num-samples", "-n")] = 64,
    class_name: Annotated[
        str | None, _option("Class to sample from, p(x | class); needs a run trained with --labeled.", "--class")
    ] = None,
    given: Annotated[
        str | None,
        _option("Values to condition on, for a run trained with --given; in its order.", metavar="NUMBER,NUMBER,..."),
    ] = None,
    sampler: Annotated[
        str | None,
        _option("Sampler of a diffusion: ancestral (the model itself), ddim, dpm++ or heun. Default: ancestral."),
    ] = None,
    num_steps: Annotated[int | None, _option("Number of time steps of a diffusion to use. Default: all.")] = None,
    spacing: Annotated[
        str | None, _option("Spacing of a diffusion's time steps: uniform, quadratic or karras. Default: uniform.")
    ] = None,
    guidance: Annotated[
        float | None,
        _option("Strength of classifier-free guidance, for a diffusion trained with --labeled. Default: 0, none."),
    ] = None,
    seed: Seed = 0,
    run: OpenRun,
    out: Picture = None,
) -> None:
    """Draw samples, and write a picture and the values, in the format of the run's data: .csv, images, or .npy."""
    from dgm_pyro.experiments.commands import sample_into

    drawn = sample_into(
        run,
        out,
        num_samples,
        class_name=class_name,
        given=None if given is None else _comma_separated(given),
        seed=seed,
        sampler=sampler,
        num_steps=num_steps,
        spacing=spacing,
        guidance=guidance,
    )
    _print(drawn)


@app.command(epilog="Example: dgm impute runs/pixelcnn-digits --region top -n 6")
@_take_arguments_of("run", _open_run)
def impute(
    *,
    region: Annotated[
        str | None,
        _option(
            "Region to hide: left, right, top, bottom, center, or a random fraction, random:0.5. Default: what the "
            "data miss; left where they miss nothing."
        ),
    ] = None,
    num_samples: Annotated[int, _option("Number of draws per datum.", "--num-samples", "-n")] = 4,
    num_data: Annotated[
        int | None, _option("Number of data, from the start. Default: 8 of the split, or all of --data.")
    ] = None,
    data: OtherData = None,
    split: Split = "test",
    num_particles: Annotated[
        int | None,
        _option(
            "Number of weighted particles per datum, from which the draws are chosen. More are more accurate. Default: "
            "depends on the method, see docs/inference.md."
        ),
    ] = None,
    num_temperatures: Annotated[
        int, _option("Number of annealing temperatures, for a VAE or a flow. More are more accurate and take longer.")
    ] = 100,
    seed: Seed = 0,
    run: OpenRun,
    out: Picture = None,
) -> None:
    """Hide features and draw them given the others. Writes a picture and the values, as dgm sample does."""
    from dgm_pyro.experiments.commands import impute_into

    drawn = impute_into(
        run,
        out,
        num_samples,
        region=region,
        num_data=num_data,
        data=data,
        split=split,
        num_particles=num_particles,
        num_temperatures=num_temperatures,
        seed=seed,
        progress=_on_a_terminal(),
    )
    _print(drawn)


@app.command(
    epilog="Examples: dgm evaluate runs/vae-digits --num-particles 64 --json; "
    "dgm evaluate runs/continuous-moons --ode; "
    "dgm evaluate runs/vae-digits --quality --classifier runs/classifier-digits"
)
@_take_arguments_of("run", _open_run)
def evaluate(
    *,
    data: OtherData = None,
    split: Split = "test",
    num_particles: Samples = 1,
    num_samples: Annotated[
        int | None,
        _option(
            "Number of ELBO samples per datum; for a diffusion, of times and noise. Default: 8. More samples lower the "
            "Monte Carlo error, but do not tighten the bound."
        ),
    ] = None,
    ode: Annotated[
        bool,
        _option(
            "Use the density of the probability-flow ODE (diffusion-continuous on real-valued data only).", "--ode"
        ),
    ] = False,
    quality: Annotated[
        bool,
        _option(
            "Measure the quality of samples instead of the evidence: Frechet and kernel distance, precision, recall, "
            "density and coverage.",
            "--quality",
        ),
    ] = False,
    classifier: Annotated[
        Path | None, _option("Run of a classifier whose features --quality compares. Default: x itself.", metavar="RUN")
    ] = None,
    seed: Seed = 0,
    run: OpenRun,
    as_json: Json = False,
) -> None:
    """Print the evidence in bits per dimension, exact or as a bound, and a classifier's accuracy.

    The evidence is log p(x). A discriminative classifier has no p(x): its evidence is log p(y | x).

    The value after +- is the standard error of the mean over the data. It includes the Monte Carlo error, but not the
    variation between trainings.
    """
    from dgm_pyro.experiments.commands import evaluate_run, quality_of_run

    if quality:
        if num_particles > 1 or num_samples is not None or ode:
            raise ValueError("--quality computes no evidence: leave out --num-particles, --num-samples and --ode")
        _print(quality_of_run(run, data, split, classifier=classifier, seed=seed), as_json)
        return
    if classifier is not None:
        raise ValueError("--classifier needs --quality: add --quality, or leave --classifier out")
    found = evaluate_run(
        run,
        data,
        split,
        num_particles=num_particles,
        num_samples=num_samples,
        ode=ode,
        seed=seed,
        progress=_on_a_terminal(),
    )
    _print(found, as_json)


@app.command(epilog="Examples: dgm doctor runs/vae-digits; dgm doctor vae --prior flow; dgm doctor my.py:model,guide")
def doctor(
    target: Annotated[str, _argument("TARGET", "Run folder, model name, or FILE.py:MODEL,GUIDE.", _complete_run)],
    data: Annotated[
        str | None,
        _option("Data set to check on. Default: that of the run; digits for a model name.", autocompletion=_data_sets),
    ] = None,
    arguments: Annotated[
        str,
        _option("Name of the value or function in FILE.py for the arguments of the pair.", "--args", metavar="NAME"),
    ] = "data",
    prior: Annotated[str | None, _option("Prior of a VAE, if TARGET is a model name.")] = None,
    encoder: Annotated[str | None, _option("Encoder of a VAE, if TARGET is a model name.")] = None,
    likelihood: Annotated[str | None, _option("Likelihood of a VAE, if TARGET is a model name.")] = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Find mistakes in a model and its guide before training.

    If it finds an error, the exit status is non-zero. In FILE.py, data() returns the arguments of model and guide: one
    argument, a tuple, or a dict of named arguments.
    """
    from dgm_pyro.experiments.commands import doctor_of

    diagnosis = doctor_of(target, data, arguments, data_dir, prior=prior, encoder=encoder, likelihood=likelihood)
    _print(diagnosis, as_json)
    if not diagnosis.ok:
        raise typer.Exit(1)


def _choices_option(what: str) -> Any:
    return _option(f"{what} to try, separated by commas: see dgm list.", metavar="NAME,NAME,...")


@app.command(epilog="Example: dgm sweep vae --data digits-binary --prior normal,flow --encoder meanfield,iaf --seeds 2")
@_training_options("seed")
@_take_arguments_of("reading", _reading_options)
def sweep(
    model: Model = "vae",
    data: DataSet = "digits-binary",
    reading: Any = None,
    prior: Annotated[str | None, _choices_option("Priors")] = None,
    encoder: Annotated[str | None, _choices_option("Encoders")] = None,
    likelihood: Annotated[str | None, _choices_option("Likelihoods")] = None,
    objective: Annotated[str | None, _choices_option("Objectives")] = None,
    vary: Annotated[
        list[str] | None,
        _option(
            "Values of another option to try, such as lr=1e-3,3e-3; may be repeated.", metavar="NAME=VALUE,VALUE,..."
        ),
    ] = None,
    seeds: Annotated[int, _option("Number of seeds, counted from 0.")] = 1,
    num_data: NumData = None,
    latent_size: LatentSize = None,
    standardize: Standardizes = True,
    num_particles: Annotated[
        int, _option("Number of particles of the IWAE bound, by which the table is sorted.")
    ] = 1000,
    jobs: Annotated[
        int | None, _option("Number of processes. Default: 1. They take turns on the GPUs, or share the CPU cores.")
    ] = None,
    backend: Backend = None,
    address: Address = None,
    *,
    options: TrainingOptions,
    data_dir: DataDir = None,
    out: Annotated[Path | None, _option("Folder of the sweep. Default: sweeps/MODEL-DATA.")] = None,
    as_json: Json = False,
) -> None:
    """Train and evaluate every combination. Writes a table, a heat map, a CSV, and a run for each cell.

    Run the same command again to resume. It keeps finished cells and retries failed ones.
    """
    from dgm_pyro.experiments.commands import sweep_into
    from dgm_pyro.jobs import on_cluster

    with on_cluster(backend, address):
        found = sweep_into(
            out or Path("sweeps") / f"{model}-{Path(data).stem}",
            model,
            data,
            reading,
            options,
            data_dir=data_dir,
            num_data=num_data,
            latent_size=latent_size,
            num_particles=num_particles,
            standardize=standardize,
            prior=_comma_separated(prior),
            encoder=_comma_separated(encoder),
            likelihood=_comma_separated(likelihood),
            objective=_comma_separated(objective),
            vary=dict(map(_name_and_values, vary or ())),
            seeds=seeds,
            jobs=jobs,
        )
    _print(found, as_json)
    if found.found.failed:
        for error, where in found.found.failures().items():
            typer.echo(_printable(f"failed: {', '.join(where)}: {error}"), err=True)
        raise typer.Exit(1)


@app.command(epilog="Example: dgm compare runs/vae-digits runs/pixelcnn-digits --num-particles 100")
def compare(
    folders: Annotated[
        list[Path], _argument("RUN RUN ...", "Runs to compare; differences are to the first.", _complete_run)
    ],
    data: OtherData = None,
    split: Split = "test",
    num_particles: Samples = 1,
    seed: Seed = 0,
    device: Device = "auto",
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Compare runs side by side, with paired differences. A mass is not compared with a density."""
    from dgm_pyro.experiments.sweep import compare as compare_runs

    found = compare_runs(
        folders,
        split=split,
        num_particles=num_particles,
        data=data,
        data_dir=data_dir,
        device=device,
        seed=seed,
        progress=_on_a_terminal(),
    )
    _print(found, as_json)


@app.command(epilog="Example: dgm gaps runs/vae-digits runs/vae-iaf --num-data 16")
@_take_arguments_of("runs", _open_runs)
def gaps(
    *,
    num_data: Annotated[int, _option("Number of data, from the start of the split.")] = 32,
    data: OtherData = None,
    split: Split = "test",
    num_particles: Annotated[
        int, _option("Number of importance samples per datum in the IWAE bound on log p(x).")
    ] = 1000,
    num_temperatures: Annotated[
        int,
        _option(
            "Number of temperatures of annealed importance sampling. More tighten its bound. 0 leaves it out, as is "
            "necessary for discrete latents."
        ),
    ] = 100,
    gradient_steps: Annotated[
        int, _option("Number of gradient steps in the search for the best q of the family.")
    ] = 400,
    seed: Seed = 0,
    runs: Any,
    out: Picture = None,
    as_json: Json = False,
) -> None:
    """Split log p(x) - ELBO into the approximation gap of the guide's family and the amortization gap.

    Prints a table and writes pictures. With the defaults, a small VAE takes about half a minute of CPU time.
    """
    from dgm_pyro.experiments.commands import gaps_into

    found = gaps_into(
        runs,
        out,
        num_data,
        data=data,
        split=split,
        num_particles=num_particles,
        num_temperatures=num_temperatures,
        gradient_steps=gradient_steps,
        seed=seed,
        progress=_on_a_terminal(),
    )
    _print(found, as_json)


@app.command(epilog="Example: dgm checks runs/vae-digits --num-samples 1000")
@_take_arguments_of("run", _open_run)
def checks(
    *,
    num_samples: Annotated[int, _option("Number of simulated pairs (z, x) for calibration.")] = 500,
    num_data: Annotated[int, _option("Number of data for the activity of units.")] = 512,
    data: OtherData = None,
    split: Split = "test",
    seed: Seed = 0,
    run: OpenRun,
    out: Picture = None,
    as_json: Json = False,
) -> None:
    """Check whether the guide is calibrated and which latents are in use: rank histograms, active units, KL, collapse.

    If a latent variable has collapsed entirely, the exit status is non-zero.
    """
    from dgm_pyro.experiments.commands import check_into

    report = check_into(
        run, out, num_data, data=data, split=split, num_samples=num_samples, seed=seed, progress=_on_a_terminal()
    )
    _print(report, as_json)
    if not report.found.ok:
        raise typer.Exit(1)


@app.command(epilog="Example: dgm infer model.py:model --data data.json --guides meanfield,nsf --out inference")
def infer(
    target: Annotated[str, _argument("TARGET", "FILE.py:MODEL or MODULE:MODEL, a Pyro model.")],
    data: Annotated[
        Path | None, _option("A .json file of the model's arguments by name. Default: the result of data() in FILE.py.")
    ] = None,
    guides: Annotated[
        str | None,
        _option(
            "Guides to fit, separated by commas: see dgm list, or name Pyro's AutoGuides. Default: "
            "meanfield,fullrank,realnvp,nsf, and for one latent meanfield,planar."
        ),
    ] = None,
    reference: Annotated[str, _option("Reference that the guides are compared with: nuts or none.")] = "nuts",
    gradient_steps: Annotated[int, _option("Number of gradient steps of each fit.")] = 1000,
    restarts: Annotated[
        int,
        _option(
            "Number of fits of each guide, from different starts. The fit with the highest mean objective over its "
            "last tenth is kept, and the table names it. AutoGuides of Pyro have one start."
        ),
    ] = 1,
    num_samples: Annotated[int, _option("Number of draws of each guide, and of the reference, at least 100.")] = 4000,
    num_temperatures: Annotated[
        int, _option("Number of temperatures of the annealing that bounds the log evidence. 0 leaves it out.")
    ] = 100,
    num_data: Annotated[
        int, _option("Number of data sets simulated by the model, for lower and upper bounds on the log evidence.")
    ] = 4,
    calibrate: Annotated[
        int,
        _option(
            "Number of data sets simulated by the model to calibrate each guide. The guide is fitted to each of them, "
            "and its ranks should be uniform. 100 find gross errors. 0 leaves it out."
        ),
    ] = 0,
    jobs: Annotated[
        int | None, _option("Number of processes for the restarts and the fits of --calibrate. Default: 1.")
    ] = None,
    backend: Backend = None,
    address: Address = None,
    seed: Seed = 0,
    out: Annotated[Path, _option("Folder of the table, the pictures and the draws.")] = Path("inference"),
    as_json: Json = False,
) -> None:
    """Fit guides to the posterior of a Pyro model and measure how good each is.

    Numbers in a .json file become tensors, which are passed to the model by the names of its parameters.
    """
    from dgm_pyro.checks import check_choice
    from dgm_pyro.experiments.commands import infer_of
    from dgm_pyro.jobs import on_cluster

    check_choice(reference, ("nuts", "none"), "--reference")
    with on_cluster(backend, address):
        found = infer_of(
            target,
            data,
            out,
            guides=None if guides is None else _comma_separated(guides),
            reference=None if reference == "none" else reference,
            gradient_steps=gradient_steps,
            restarts=restarts,
            num_samples=num_samples,
            num_temperatures=num_temperatures,
            num_data=num_data,
            calibrate=calibrate,
            jobs=jobs,
            seed=seed,
            progress=_on_a_terminal(),
        )
    _print(found, as_json)


@app.command(epilog="Example: dgm anomaly runs/vae-digits photos.npy --scores likelihood,complexity,kl")
@_take_arguments_of("run", _open_run)
def anomaly(
    *,
    data: Inputs,
    scores: Annotated[
        str,
        _option(
            "Scores: likelihood, typicality, complexity, ratio, waic, kl. The first ranks the data.",
            metavar="NAME,NAME,...",
        ),
    ] = "likelihood",
    background: Annotated[
        Path | None,
        _option("Background for ratio: a run trained with --mutate.", metavar="RUN", autocompletion=_complete_run),
    ] = None,
    ensemble: Annotated[
        str | None, _option("Ensemble for waic: further runs, from other seeds.", metavar="RUN,RUN,...")
    ] = None,
    normal: Annotated[
        str | None, _option("Normal data that were not trained on. Default: the run's test split.", metavar="DATA")
    ] = None,
    false_alarm_rate: FalseAlarms = 0.01,
    num_particles: Samples = 1,
    seed: Seed = 0,
    run: OpenRun,
    out: Picture = None,
    as_json: Json = False,
) -> None:
    """Find data unlike the run's training data. Writes a table, a picture of the most anomalous data, and a CSV.

    One random half of the normal data sets the threshold; AUROC and false alarms are measured on the other half.

    Scores and thresholds are in nats (the variance in WAIC in nats squared); higher is more anomalous.

    The AUROC is the probability that one of the DATA scores above a normal datum; 0.5 is chance.
    """
    from dgm_pyro.experiments.commands import detect_into

    found = detect_into(
        run,
        out,
        data,
        _comma_separated(scores),
        background=background,
        ensemble=_comma_separated(ensemble),
        normal=normal,
        false_alarm_rate=false_alarm_rate,
        num_particles=num_particles,
        seed=seed,
        progress=_on_a_terminal(),
    )
    _print(found, as_json)


@app.command(epilog="Example: dgm classify runs/made-digits photos.npy --false-alarm-rate 0.05")
@_take_arguments_of("run", _open_run)
def classify(
    *,
    data: Inputs,
    num_particles: Samples = 1,
    false_alarm_rate: FalseAlarms = 0.01,
    seed: Seed = 0,
    run: OpenRun,
    out: Annotated[Path | None, _output_option(".csv", "Output table, a .csv. Default: RUN/classified.csv.")] = None,
    as_json: Json = False,
) -> None:
    """Classify data, and mark the answers to reject. Writes a CSV of p(y | x) and log p(x), and a picture of images.

    A run trained with --labeled rejects by log p(x); a discriminative classifier rejects by its highest p(y | x).
    """
    from dgm_pyro.experiments.commands import classify_into

    found = classify_into(
        run,
        out,
        data,
        false_alarm_rate=false_alarm_rate,
        num_particles=num_particles,
        seed=seed,
        progress=_on_a_terminal(),
    )
    _print(found, as_json)


@app.command(epilog="Example: dgm represent runs/vae-digits")
@_take_arguments_of("run", _open_run)
def represent(
    *,
    data: Annotated[
        str | None,
        _argument("DATA", "Data to encode: a file, a folder of images, or a data set. Default: the run's test split."),
    ] = None,
    site: Annotated[str | None, _option("Level of a hierarchy, such as z2. Default: the nearest to x.")] = None,
    num_data: Annotated[int, _option("Largest number of data, and of training data for the probe.")] = 5000,
    curve: Annotated[str, _option("Curve of the interpolation: spherical or linear.")] = "spherical",
    seed: Seed = 0,
    run: OpenRun,
    out: Annotated[Path | None, _output_option(".png", "Output map, a .png. Default: RUN/representation.png.")] = None,
    as_json: Json = False,
) -> None:
    """Encode data and measure how useful the codes z are. Writes a table, a map, pictures along codes, and a .npy file.

    With labels: a linear probe, nearest neighbors and clusters of z, compared with those of x itself.
    """
    from dgm_pyro.experiments.commands import represent_into

    found = represent_into(run, out, data, num_data, curve=curve, seed=seed, site=site, progress=_on_a_terminal())
    _print(found, as_json)


Repository = Annotated[str, _argument("REPO", "Repository of the Hugging Face hub: USER/NAME.")]


@app.command(epilog="Example: dgm push runs/vae-digits alice/vae-digits")
def push(
    run: RunFolder,
    repo: Repository,
    private: Annotated[bool, _option("Make the repository private, if it is new.", "--private")] = False,
    num_particles: Samples = 1,
    data_dir: DataDir = None,
) -> None:
    """Store a run on the Hugging Face hub, with a model card: formula, data, options, and evidence of the test data.

    Log in first, with hf auth login.
    """
    from dgm_pyro.experiments import hub

    address = hub.push(
        run, repo, private=private, num_particles=num_particles, data_dir=data_dir, progress=_on_a_terminal()
    )
    typer.echo(f"{address}: pull it with dgm pull {repo}")


@app.command(epilog="Example: dgm pull alice/vae-digits --out runs/alice")
def pull(
    repo: Repository,
    out: Annotated[Path | None, _option("Folder of the run. Default: runs/NAME.")] = None,
    revision: Annotated[str | None, _option("Branch, tag or commit. Default: the newest.")] = None,
    force: Annotated[bool, _option("Overwrite the run's folder.", "--force")] = False,
) -> None:
    """Fetch a run from the Hugging Face hub. Reading it runs no code."""
    from dgm_pyro.experiments import hub

    folder = out or Path("runs") / repo.rpartition("/")[2]
    _, record = hub.pull(repo, folder, revision=revision, force=force)
    typer.echo(f"{folder}: {record}")
    typer.echo(f"next: dgm sample {folder}")


@app.command("list", epilog="Examples: dgm list; dgm list --data digits")
def list_names(
    data: Annotated[
        str | None,
        _option("Data set or path. Lists each model as built for it, with its size.", autocompletion=_data_sets),
    ] = None,
    data_dir: DataDir = None,
) -> None:
    """List the models, data sets, priors, encoders, likelihoods and objectives; with --data, the models for it."""
    from dgm_pyro.experiments.commands import list_of_models, list_of_names

    typer.echo(list_of_names() if data is None else list_of_models(data, data_dir))


# -- errors -----------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``dgm``; its exit status."""
    keep_freed_memory()
    try:
        status = app(args=None if arguments is None else list(arguments), prog_name="dgm", standalone_mode=False)
        if status == INTERRUPTED:
            raise KeyboardInterrupt
        return status if isinstance(status, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return _print_error("interrupted", INTERRUPTED) if _is_first_to_fail() else INTERRUPTED
    except _Interruption as error:
        message, ended = error.args
        return _print_error(message, ended) if _is_first_to_fail() else int(ended)
    except Exception as error:
        if not _is_first_to_fail():
            return 1
        if os.environ.get("DGM_DEBUG"):
            raise
        if hasattr(error, "format_message"):  # typer's error about the command line
            return _print_error(_about_usage(error), getattr(error, "exit_code", 2))
        if _is_out_of_memory(error):
            return _print_error(
                f"there is not enough memory: ask for fewer data, draws or particles at once ({error})", 1
            )
        if not isinstance(error, _errors_of_bad_input()):
            raise
        return _print_error(str(error), 1)


def _about_usage(error: Any) -> str:
    """The message of typer's ``error`` about the command line, with what was meant."""
    context, message = getattr(error, "ctx", None), error.format_message()
    see = f"see {context.command_path if context else 'dgm'} --help"
    if unknown := re.match(r"No such command '(.+?)'\.", message):
        meant = COMMANDS.get(unknown[1].lower())
        return f"{unknown[0]} (use {meant}, {see})" if meant else f"{message} ({see})"
    if context and "unexpected extra argument" in message and (remedy := EXTRA.get(context.command.name)):
        return f"{message} ({remedy}, {see})"
    options = {name for each in context.command.params for name in each.opts} if context else set()
    known = {**FLAGS, **OLD_FLAGS}.get(getattr(error, "option_name", "").replace("_", "-"), "").split(" or ")
    meant = " or ".join(name for name in known if name in options)
    if not meant:
        return f"{message} ({see})"
    error.possibilities = []  # which click guesses by their letters
    return f"{error.format_message()} (use {meant}, {see})"


def _is_first_to_fail() -> bool:
    if "LOCAL_RANK" not in os.environ:
        return True
    from dgm_pyro.training.distributed import is_first_to_fail

    return is_first_to_fail()


def _errors_of_bad_input() -> tuple[type[Exception], ...]:
    """Exceptions that bad input raises; any other is a bug, and shows its traceback."""
    from dgm_pyro.program import IntractableError
    from dgm_pyro.training.compilation import CompilationError
    from dgm_pyro.training.fit import NonFiniteLossError

    return ValueError, TypeError, OSError, ImportError, CompilationError, IntractableError, NonFiniteLossError


def _is_out_of_memory(error: Exception) -> bool:
    import torch

    # On the CPU, torch has no exception class for it.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def _printable(message: str) -> str:
    """The message in one printable line: names in files may hold control characters or undecodable bytes."""
    line = " ".join(message.split())
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in line)


def _print_error(message: str, status: int) -> int:
    typer.echo(f"dgm: {_printable(message)}", err=True)
    return status
