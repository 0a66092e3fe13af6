"""The command line: ``dgm tour``, ``train``, ``sample``, ``evaluate``, ``list``.

Whatever is wrong with the input ends in one line on stderr and a non-zero exit; ``dgm --debug`` shows the traceback.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import glob
import inspect
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dgm_pyro.training.options import TrainingOptions, option_types, value_of

if TYPE_CHECKING:
    import torch

    from dgm_pyro.data import Data
    from dgm_pyro.experiments.runs import Record
    from dgm_pyro.program import Program
    from dgm_pyro.results import Result
    from dgm_pyro.training.fit import History

# Modules that take long to import are imported by the commands that need them.

app = typer.Typer(
    name="dgm",
    help="Deep generative models as probabilistic programs: train, evaluate and compare them.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

INTERRUPTED = 130

Command = Callable[..., None]

Device = Annotated[str, typer.Option(help="Device: auto (CUDA if available), cpu, cuda or cuda:N.")]
Seed = Annotated[
    int, typer.Option(min=0, max=2**32 - 1, help="Seed; the same seed on the same machine gives the same result.")
]
DataDir = Annotated[
    str | None,
    typer.Option(help="Folder of data sets that are read from files. Default: the environment variable DGM_DATA."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Picture = Annotated[
    Path | None, typer.Option(help="Output picture, a .png. Default: in the folder of the (first) run.")
]
Split = Annotated[str, typer.Option(help="Split of the data set: train or test; valid where there is one.")]
Samples = Annotated[
    int,
    typer.Option(
        help="Number of importance samples per datum, for a model with latent variables. 1 gives the ELBO, "
        "K the tighter IWAE bound."
    ),
]
FalseAlarms = Annotated[
    float, typer.Option(help="Largest probability that a datum like the normal ones is flagged or rejected.")
]


def _runs(incomplete: str) -> list[str]:
    """Folders of runs that complete a word."""
    patterns = (f"{glob.escape(incomplete)}*{below}/run.json" for below in ("", "/*"))
    return sorted({os.path.dirname(found) for pattern in patterns for found in glob.glob(pattern)})


def _models(incomplete: str) -> list[str]:
    from dgm_pyro.catalog import MODELS

    return [name for name in MODELS if name.startswith(incomplete)]


def _data_sets(incomplete: str) -> list[str]:
    from dgm_pyro.data import NAMES

    return [name for name in NAMES if name.startswith(incomplete)]


RunFolder = Annotated[
    Path,
    typer.Argument(metavar="RUN", help="Folder of a run, written by dgm train or dgm tour.", autocompletion=_runs),
]
Inputs = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        help="Data to look at: a file, a folder of images, or a data set.",
        autocompletion=_data_sets,
    ),
]
DataSet = Annotated[
    str,
    typer.Option(
        help="Data to train on: a data set of dgm list, a file (.csv, .tsv, .parquet, .npy, .npz), or a folder of "
        "images.",
        autocompletion=_data_sets,
    ),
]
OtherData = Annotated[
    str | None,
    typer.Option(
        metavar="PATH",
        help="Other data: a file or folder, all of which is taken, or the test split of a data set. Default: the "
        "run's own.",
        autocompletion=_data_sets,
    ),
]
Label = Annotated[
    str | None, typer.Option(metavar="COLUMN", help="Column of a table, or array of an .npz file, that is the label.")
]
Given = Annotated[
    str | None,
    typer.Option(metavar="COLUMN,COLUMN,...", help="Columns of a table to condition on; array of an .npz file."),
]
Columns = Annotated[
    str | None,
    typer.Option(metavar="COLUMN,COLUMN,...", help="Columns of a table that are the data. Default: all others."),
]
Levels = Annotated[
    int | None,
    typer.Option(help="The data are integers from 0 to one less than this. Default: reals; images have 256."),
]
Size = Annotated[
    int | None, typer.Option(help="Height and width to crop and scale the images of a folder to. Default: their own.")
]
Gray = Annotated[
    bool | None, typer.Option("--gray/--no-gray", help="Read images as gray, or in color. Default: as they are.")
]
TestData = Annotated[
    str | None,
    typer.Option(metavar="PATH", help="File or folder of the test data. Default: a random fifth of the data."),
]
NumData = Annotated[int | None, typer.Option(help="Use only this many training data.")]
LatentSize = Annotated[int | None, typer.Option(help="Number of features of the latent z of a vae.")]


Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Option of the model, such as hidden=512,512; may be repeated."),
]
Config = Annotated[
    Path | None,
    typer.Option(
        is_eager=True, callback=lambda context, path: _configured(context, path), metavar="RUN/run.json",
        help="Record of a run, whose options are those that the command does not name.",
    ),
]  # fmt: skip


@app.callback(invoke_without_command=True, epilog="Example: dgm tour --quick")
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks, as the environment variable DGM_DEBUG does.")
    ] = False,
    threads: Annotated[
        int | None, typer.Option(help="Number of CPU threads; 1 is often fastest for small networks.")
    ] = None,
) -> None:
    if debug:
        os.environ["DGM_DEBUG"] = "1"
    if threads is not None:
        _use_threads(threads)
    if "LOCAL_RANK" in os.environ and context.invoked_subcommand not in (None, "train"):
        raise ValueError(f"torchrun is for dgm train alone: start dgm {context.invoked_subcommand} without it")
    if version:
        from importlib.metadata import version as version_of

        typer.echo(f"dgm_pyro {version_of('dgm_pyro')}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _use_threads(threads: int) -> None:
    if threads < 1:
        raise ValueError(f"--threads must be a positive integer, got {threads}")
    import torch

    os.environ["OMP_NUM_THREADS"] = str(threads)  # for processes that this one starts
    torch.set_num_threads(threads)


@app.command(epilog="Example: dgm tour --quick --out tour")
def tour(
    quick: Annotated[bool, typer.Option("--quick", help="Train for less than a minute, with worse results.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of the report; an earlier tour in it is replaced.")] = Path("tour"),
    resume: Annotated[bool, typer.Option("--resume", help="Continue a tour that was interrupted.")] = False,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Train every family on real digits, compare them, and write a report."""
    from dgm_pyro.experiments.tour.run import run

    with _interruptible():
        failures = run(out, quick=quick, seed=seed, device=device, resume=resume)
    if failures:
        raise typer.Exit(1)


def _is_told(context: typer.Context, name: str) -> bool:
    """Whether an option stands in the command."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _settings(texts: Sequence[str]) -> dict[str, Any]:
    """The values in "NAME=VALUE": numbers and sequences of them, or names."""
    from dgm_pyro.catalog import build

    known = [name for name in inspect.signature(build).parameters if name not in ("name", "data", "labeled")]
    found = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in known or not value:
            raise ValueError(f"--set must be NAME=VALUE with a NAME of {', '.join(known)}, got {text!r}")
        found[name] = value_of(value)
    return found


def _configured(context: typer.Context, path: Path | None) -> None:
    """Take what a run was made with, for options that do not stand in the command."""
    if path is None:
        return
    from dgm_pyro.experiments import runs

    stored = runs.read_json(path, runs.KINDS, "choose the run.json of a run")
    options = stored["options"] | {name: stored[name] for name in ("model", "data", "data_dir")}
    names = {parameter.name for parameter in context.command.params}
    own = _settings([f"{name}={value!r}" for name, value in options.items() if name == "hidden"])
    settings = [f"{name}={value!r}" for name, value in own.items()]
    none = {"validation": 0, "clip_norm": 0}  # what stands for None where that is not the default
    given = {name: none.get(name) if value is None else value for name, value in options.items() if name in names}
    given = {name: value for name, value in given.items() if value is not None and value != "auto"}
    context.default_map = {**(context.default_map or {}), **given, "settings": settings}


class _Interruption(Exception):
    """What `Interrupted` says, past typer, which keeps of an interrupt that there was one."""


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    from dgm_pyro.jobs import Interrupted

    try:
        yield
    except Interrupted as error:
        raise _Interruption(str(error), error.status) from None


def _in_place_of(
    argument: str, parameters: Sequence[inspect.Parameter], make: Callable[..., Any]
) -> Callable[[Command], Command]:
    """Give a command ``parameters`` in the place of its ``argument``, which ``make`` makes of them."""

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def called(**given: Any) -> None:
            made = make(**{parameter.name: given.pop(parameter.name) for parameter in parameters})
            command(**given, **{argument: made})

        signature = inspect.signature(command, eval_str=True)
        own = [parameters if each.name == argument else [each] for each in signature.parameters.values()]
        called.__signature__ = signature.replace(parameters=[*itertools.chain(*own)])  # type: ignore[attr-defined]
        return called

    return decorate


def _training_options(*without: str) -> Callable[[Command], Command]:
    """Give a command one option for each field of `TrainingOptions`, in the place of its argument ``options``.

    Args:
        without: fields that keep their default.
    """
    parameters = [_parameter_of(field) for field in dataclasses.fields(TrainingOptions) if field.name not in without]

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def interruptible(**given: Any) -> None:
            with _interruptible():
                command(**given)

        return _in_place_of("options", parameters, TrainingOptions)(interruptible)

    return decorate


def _parameter_of(field: dataclasses.Field[Any]) -> inspect.Parameter:
    """The option of the command line that sets a field of `TrainingOptions`."""
    (kind, meaning), default = option_types()[field.name], field.default
    annotation: Any = Annotated[kind, typer.Option(help=meaning)]
    if field.name in ("seed", "device"):  # as for the other commands
        annotation = {"seed": Seed, "device": Device}[field.name]
    elif field.name in ("validation", "clip_norm"):
        told = typer.Option(help=f"{meaning} 0 for none.", callback=lambda value: value or None)
        annotation = Annotated[float, told]
    elif field.name == "compile":
        told = typer.Option(
            "--compile/--no-compile", help=meaning, callback=lambda choice: "auto" if choice is None else choice
        )
        annotation, default = Annotated[bool | None, told], None
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _reading(
    label: Label = None,
    given: Given = None,
    columns: Columns = None,
    levels: Levels = None,
    size: Size = None,
    gray: Gray = None,
    test_data: TestData = None,
) -> dict[str, Any]:
    """How `experiments.runs.points` reads a file."""
    chosen = {
        "label": label,
        "given": None if given is None else list(_names(given)),
        "columns": None if columns is None else list(_names(columns)),
        "levels": levels,
        "size": size,
        "gray": gray,
        "test": test_data,
    }
    return {name: choice for name, choice in chosen.items() if choice is not None}


_reading_options = _in_place_of("reading", [*inspect.signature(_reading, eval_str=True).parameters.values()], _reading)


@app.command(epilog="Example: dgm train vae --data digits --prior flow --epochs 60 --out runs/vae-flow")
@_training_options()
@_reading_options
def train(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Model to train, such as vae or pixelcnn: see dgm list. After --resume: the folder of a run.",
            autocompletion=_models,
        ),
    ],
    data: DataSet = "digits",
    reading: Any = None,
    data_dir: DataDir = None,
    num_data: NumData = None,
    prior: Annotated[str | None, typer.Option(help="Prior of a vae: see dgm list.")] = None,
    encoder: Annotated[str | None, typer.Option(help="Encoder of a vae: see dgm list.")] = None,
    likelihood: Annotated[str | None, typer.Option(help="Likelihood of a vae: see dgm list.")] = None,
    latent_size: LatentSize = None,
    labeled: Annotated[
        bool, typer.Option("--labeled", help="Train a generative classifier p(y) p(x | y) with MODEL as p(x | y).")
    ] = False,
    standardize: Annotated[
        bool, typer.Option(help="Standardize reals inside the model; its numbers stay in the units of the data.")
    ] = True,
    objective: Annotated[str | None, typer.Option(help="Objective to maximize, such as iwae:50: see dgm list.")] = None,
    num_labels: Annotated[
        int | None, typer.Option(help="Keep only this many labels. Needs --labeled and a semi-supervised objective.")
    ] = None,
    mutate: Annotated[
        float | None,
        typer.Option(help="Probability of replacing each feature by noise. Trains a background for dgm anomaly."),
    ] = None,
    *,
    options: TrainingOptions,
    out: Annotated[Path | None, typer.Option(help="Folder of the run. Default: runs/MODEL-DATA.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the run's folder.")] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue an interrupted training: --resume RUN, or with the command that began it.",
        ),
    ] = False,
    settings: Settings = None,
    config: Config = None,
    context: typer.Context,
) -> None:
    """Train a model and store the run: its program, options, history and learning curves.

    SIGINT (Ctrl-C) and SIGTERM store the state of the training, and so does each of the checkpoint minutes.

    In several processes: torchrun --nproc-per-node=N -m dgm_pyro train MODEL ...; see docs/devices.md.
    """
    from dgm_pyro.catalog import MODELS
    from dgm_pyro.experiments import runs
    from dgm_pyro.experiments.trackers import RunFiles
    from dgm_pyro.training import distributed

    processes = distributed.join(options.device)
    shown = _on_a_terminal()
    if resume and model not in MODELS:
        folder = Path(model)
        told = [
            name for name in context.params if _is_told(context, name) and name not in ("model", "resume", "device")
        ]
        if told:
            raise ValueError(f"--resume {model} takes the options of that run: leave out {', '.join(told)}")
        device = options.device if _is_told(context, "device") else None
        _, record, history = runs.resume(folder, device, trackers=[RunFiles(folder, str(folder))], progress=shown)
        if processes.writes:
            _report_training(folder, record.model, history)
        distributed.leave()
        return
    parts = {"prior": prior, "encoder": encoder, "likelihood": likelihood, "latent_size": latent_size}
    swaps: dict[str, Any] = {name: choice for name, choice in parts.items() if choice is not None}
    if not standardize:
        swaps["standardize"] = False
    name = f"{model}-{Path(data).stem}"
    folder = out or Path("runs") / name
    _, _, history = runs.train(
        folder,
        model,
        data,
        swaps | _settings(settings or ()),
        options,
        labeled=labeled,
        data_dir=data_dir,
        reading=reading,
        num_data=num_data,
        objective=objective,
        num_labels=num_labels,
        mutate=mutate,
        force=force,
        resume=resume,
        trackers=[RunFiles(folder, name)],
        progress=shown,
    )
    if processes.writes:
        _report_training(folder, model, history)
    distributed.leave()


def _report_training(folder: Path, model: str, history: History) -> None:
    best = history.epochs[history.best_epoch - 1]
    loss = f"loss {best.loss:.3f} {history.unit}"
    if best.validation is not None:
        same = history.validation_unit == history.unit
        loss = f"loss {best.loss:.3f}, " if same else f"{loss}, "
        loss += f"validation {best.validation:.3f} {history.validation_unit}"
    typer.echo(f"{folder}: epoch {history.best_epoch} of {len(history.epochs)}, {loss}, {history.seconds:.1f} s")
    doing = {"implicit": ("sample",), "classifier": ("evaluate",)}.get(model, ("evaluate", "sample"))
    typer.echo("next: " + "; ".join(f"dgm {command} {folder}" for command in doing))


@app.command(epilog="Example: dgm sample runs/diffusion-digits -n 64 --label 3 --sampler dpm++ --num-steps 20")
def sample(
    run: RunFolder,
    num_samples: Annotated[int, typer.Option("--num-samples", "-n", help="Number of samples.")] = 64,
    label: Annotated[
        str | None, typer.Option(help="Class to sample from, p(x | class); needs a run trained with --labeled.")
    ] = None,
    given: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBER,NUMBER,...", help="Values to condition on, for a run trained with --given; in that order."
        ),
    ] = None,
    sampler: Annotated[
        str | None,
        typer.Option(
            help="Sampler of a diffusion: ancestral (the model itself), ddim, dpm++ or heun. Default: ancestral."
        ),
    ] = None,
    num_steps: Annotated[
        int | None, typer.Option(help="Number of time steps of a diffusion to use. Default: all.")
    ] = None,
    spacing: Annotated[
        str | None,
        typer.Option(help="Spacing of a diffusion's time steps: uniform, quadratic or karras. Default: uniform."),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            help="Strength of classifier-free guidance, for a diffusion trained with --labeled. Default: 0, none."
        ),
    ] = None,
    seed: Seed = 0,
    device: Device = "auto",
    out: Picture = None,
) -> None:
    """Draw samples: a picture, and the values in a .npy file."""
    import torch

    from dgm_pyro.evaluation import evaluating
    from dgm_pyro.experiments import plots, runs
    from dgm_pyro.families.labeled import Labeled
    from dgm_pyro.program import seeded

    picture = _written_to(out, run / "samples.png")
    program, record, where, _ = _opened(run, device)
    condition = None if given is None else torch.tensor([_numbers(given, record)], device=where)
    if label is not None:
        condition = torch.tensor([_class_of(label, record)], device=where)
    options = {"sampler": sampler, "num_steps": num_steps, "spacing": spacing, "guidance": guidance}
    options = {name: value for name, value in options.items() if value is not None}
    if program.variable != "x":
        raise ValueError("this run holds a discriminative classifier: it knows p(y | x), and has no x to sample")
    if ("guidance" in options or label is not None) and not isinstance(program, Labeled):
        raise ValueError("--label and --guidance need a run with labels: train it with dgm train --labeled")
    with seeded(seed, where), evaluating(program):
        x = program.sample(num_samples, condition, **options).cpu()
    what = f"{record}" + ("" if label is None else f", class {label}") + ("" if given is None else f", given {given}")
    plots.write_picture(picture, plots.samples(x, levels=program.levels, title=f"{num_samples} samples of {what}"))
    written = runs.write_alike(picture.with_suffix(""), x, record, program.levels)
    typer.echo(f"{picture} and {written}: {num_samples} samples of {what}")


def _class_of(label: str, record: Record) -> int:
    classes = record.reading.get("classes", [])
    if label in classes:
        return int(classes.index(label))
    if label.isdecimal():
        return int(label)
    known = ", ".join(classes) or "numbers from 0"
    raise ValueError(f"--label must be a class, got {label!r}: the run knows {known}")


def _numbers(text: str, record: Record) -> list[float]:
    names = record.reading.get("given", [])
    try:
        return [float(number) for number in _names(text)]
    except ValueError as error:
        raise ValueError(f"--given must be numbers, one for each of {', '.join(names)}, got {text!r}") from error


@app.command(epilog="Example: dgm impute runs/pixelcnn-digits --mask top -n 6")
def impute(
    run: RunFolder,
    mask: Annotated[
        str | None,
        typer.Option(
            help="Region to hide: left, right, top, bottom, center, or a random fraction, random:0.5. Default: what "
            "the data miss; left where they miss nothing."
        ),
    ] = None,
    num_samples: Annotated[int, typer.Option("--num-samples", "-n", help="Number of draws per datum.")] = 4,
    rows: Annotated[
        int | None, typer.Option(help="Number of data, from the start. Default: 8 of the split; all of --data.")
    ] = None,
    data: OtherData = None,
    split: Split = "test",
    num_particles: Annotated[
        int | None,
        typer.Option(
            help="Number of weighted particles per datum that the draws are chosen from; more are more accurate. "
            "Default: by method, see docs/inference.md."
        ),
    ] = None,
    num_temperatures: Annotated[
        int, typer.Option(help="Number of annealing temperatures, for a VAE or a flow; more are more accurate.")
    ] = 100,
    seed: Seed = 0,
    device: Device = "auto",
    data_dir: DataDir = None,
    out: Picture = None,
) -> None:
    """Hide features and draw them given the others: a picture, and the values in a .npy file."""
    import dgm_pyro as dgm
    from dgm_pyro.experiments import plots, runs

    picture = _written_to(out, run / "imputed.png")
    if rows is not None and rows < 1:
        raise ValueError(f"--rows must be a positive integer, got {rows}")
    program, record, where, place = _opened(run, device, data_dir)
    points = _points(record, program, split, data, place)[: rows or (8 if data is None else None)]
    x, given, _ = program.arguments(points)
    if program.variable != "x":
        raise ValueError("this run holds a discriminative classifier: it knows p(y | x), and has no x to impute")
    hidden = ("left" if points.mask is None else None) if mask is None else mask
    seen = points.mask if hidden is None else dgm.infer.hide(hidden, program.event_shape, seed)
    assert seen is not None
    if points.mask is not None:
        seen = seen & points.mask
    drawn = dgm.infer.impute(
        program,
        x.to(where),
        seen.to(where),
        num_samples,
        None if given is None else given.to(where),
        num_particles=num_particles,
        num_temperatures=num_temperatures,
        seed=seed,
        progress=_on_a_terminal(),
    ).cpu()
    what = f"{record}, {hidden} hidden" if hidden else f"{record}, missing values drawn"
    shown = plots.imputations(x[:8], seen.expand_as(x)[:8], drawn[:, :8], levels=program.levels, title=what)
    plots.write_picture(picture, shown)
    places = {
        "row": [i for _ in range(num_samples) for i in range(len(x))],
        "draw": [draw for draw in range(num_samples) for _ in range(len(x))],
    }
    written = runs.write_alike(picture.with_suffix(""), drawn, record, program.levels, **places)
    typer.echo(f"{picture} and {written}: {num_samples} draws for each of {len(x)} data of {what}")


@app.command(
    epilog="Examples: dgm evaluate runs/vae-digits --num-particles 64 --json; dgm evaluate runs/continuous-moons --ode"
)
def evaluate(
    run: RunFolder,
    data: OtherData = None,
    split: Split = "test",
    num_particles: Samples = 1,
    num_samples: Annotated[
        int | None,
        typer.Option(
            help="Number of ELBO samples per datum; for a diffusion, of times and noise. Default: 8. More samples "
            "lower the Monte Carlo error, and do not tighten the bound."
        ),
    ] = None,
    ode: Annotated[
        bool,
        typer.Option(
            "--ode", help="Use the density of the probability-flow ODE (diffusion-continuous on real-valued data only)."
        ),
    ] = False,
    seed: Seed = 0,
    device: Device = "auto",
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Print the evidence in bits per dimension, exact or as a bound, and a classifier's accuracy.

    The evidence is log p(x). A discriminative classifier has no p(x): its evidence is log p(y | x).

    The value after +- is the standard error of the mean over the data. It includes the Monte Carlo error, but not the
    variation between trainings.
    """
    import json

    import dgm_pyro as dgm
    from dgm_pyro.uses import classification

    program, record, _, place = _opened(run, device, data_dir)
    points = _points(record, program, split, data, place)
    if num_samples is not None and (program.tractable or num_particles > 1 or ode):
        raise ValueError("--num-samples is the number of ELBO samples, but this evidence is no ELBO: leave it out")
    averaged: dict[str, Any] = {} if num_samples is None else {"num_samples": num_samples}
    shown = _on_a_terminal()
    evidence = dgm.evaluate(
        program, points, num_particles=num_particles, ode=ode, seed=seed, progress=shown, **averaged
    )
    of = "log p(x)" if program.variable == "x" else "log p(y | x)"
    numbers = {"run": str(run), "model": record.model, "split": split, "of": of} | evidence.as_dict()
    accuracy = None
    if isinstance(program, (dgm.Labeled, dgm.Discriminative)) and points.y is not None:
        probabilities, _ = classification.beliefs(program, points.x, progress=shown)
        numbers["accuracy"] = accuracy = classification.accuracy(probabilities, points.y)
    if as_json:
        typer.echo(json.dumps(numbers, indent=1))
        return
    known = "" if program.variable == "x" else f" of {of}, because it has no p(x)"
    of_what = split if data is None else data
    typer.echo(f"{record} ({of_what}, {len(points)} data): {evidence}{known}")
    if accuracy is not None:
        typer.echo(f"accuracy {accuracy:.4f}")
    formula = program.formula()
    typer.echo(f"the program: {formula.p}" + (f"; its guide: {formula.q}" if formula.q else ""))


@app.command(epilog="Examples: dgm doctor runs/vae-digits; dgm doctor vae --prior flow; dgm doctor my.py:model,guide")
def doctor(
    target: Annotated[
        str,
        typer.Argument(metavar="TARGET", help="Run folder, model name, or FILE.py:MODEL,GUIDE.", autocompletion=_runs),
    ],
    data: Annotated[
        str | None,
        typer.Option(
            help="Data set to check on. Default: that of the run; digits for a model name.", autocompletion=_data_sets
        ),
    ] = None,
    arguments: Annotated[
        str,
        typer.Option(
            "--args",
            metavar="NAME",
            help="Name of the value or function in FILE.py that gives the arguments of the pair.",
        ),
    ] = "data",
    prior: Annotated[str | None, typer.Option(help="Prior of a VAE, if TARGET is a model name.")] = None,
    encoder: Annotated[str | None, typer.Option(help="Encoder of a VAE, if TARGET is a model name.")] = None,
    likelihood: Annotated[str | None, typer.Option(help="Likelihood of a VAE, if TARGET is a model name.")] = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Look for mistakes in a model and its guide before training.

    Errors end in a non-zero exit. In FILE.py, data() returns the arguments of model and guide: one argument, a tuple,
    or a dict of named arguments.
    """
    import json

    import dgm_pyro as dgm
    from dgm_pyro.catalog import MODELS, build
    from dgm_pyro.diagnosis import pair_from
    from dgm_pyro.experiments import runs

    parts = {"prior": prior, "encoder": encoder, "likelihood": likelihood}
    swaps: dict[str, Any] = {name: choice for name, choice in parts.items() if choice is not None}
    if ":" in target and not Path(target).is_dir():
        model, guide, args, kwargs = pair_from(target, arguments)
        if isinstance(model, dgm.Program):
            diagnosis = dgm.doctor(model, *args[:1])
        else:
            diagnosis = dgm.doctor(model, guide, *args, **kwargs)
    elif target in MODELS:
        points = runs.points(data or "digits", data_dir=data_dir)[:64]
        diagnosis = dgm.doctor(build(target, points, **swaps), points)
    elif target.endswith(".py"):
        raise ValueError(f"{target} is a file: name what is in the file: {target}:MODEL,GUIDE")
    else:
        program, record = runs.read(target)
        points = _points(record, program, "train", data, data_dir or record.data_dir)[:64]
        diagnosis = dgm.doctor(program, points)
    typer.echo(json.dumps(diagnosis.as_dict(), indent=1) if as_json else str(diagnosis))
    if not diagnosis.ok:
        raise typer.Exit(1)


def _tried(what: str) -> Any:
    return typer.Option(metavar="NAME,NAME,...", help=f"{what} to try, separated by commas: see dgm list.")


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())


def _values(text: str) -> tuple[str, Sequence[Any]]:
    """The name and the values in "lr=1e-3,3e-3" or "hidden=(64,),(256,256)"."""
    name, _, values = text.partition("=")
    found = value_of(f"[{values}]")
    if not values:
        raise ValueError(f"--vary must be NAME=VALUE,VALUE,..., got {text!r}")
    return name.replace("-", "_"), found if isinstance(found, list) else _names(values)


@app.command(epilog="Example: dgm sweep vae --data digits-binary --prior normal,flow --encoder meanfield,iaf --seeds 2")
@_training_options("seed")
@_reading_options
def sweep(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Model to train: see dgm list.", autocompletion=_models)
    ] = "vae",
    data: DataSet = "digits-binary",
    reading: Any = None,
    prior: Annotated[str | None, _tried("Priors")] = None,
    encoder: Annotated[str | None, _tried("Encoders")] = None,
    likelihood: Annotated[str | None, _tried("Likelihoods")] = None,
    objective: Annotated[str | None, _tried("Objectives")] = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE,VALUE,...",
            help="Values of another option to try, such as lr=1e-3,3e-3; may be repeated.",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Number of seeds; they count from 0.")] = 1,
    num_data: NumData = None,
    latent_size: LatentSize = None,
    num_particles: Annotated[
        int, typer.Option(help="Number of particles of the IWAE bound. The table is sorted by this bound.")
    ] = 1000,
    jobs: Annotated[
        int | None, typer.Option(help="Number of processes. They take the GPUs in turn, or share the CPU cores.")
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="Backend of joblib to run the cells on, in the place of processes: dask or ray.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Address of the cluster of --backend, such as tcp://10.0.0.1:8786.")
    ] = None,
    *,
    options: TrainingOptions,
    data_dir: DataDir = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the sweep. Default: sweeps/MODEL-DATA.")] = None,
    as_json: Json = False,
) -> None:
    """Train and evaluate every combination: a table, a heat map, CSV, and a run for each cell.

    Run the same command again to resume. It keeps finished cells and retries failed ones.
    """

    from dgm_pyro.experiments import runs
    from dgm_pyro.experiments.sweep import Options
    from dgm_pyro.experiments.sweep import sweep as run_sweep
    from dgm_pyro.jobs import on_cluster

    folder = out or Path("sweeps") / f"{model}-{Path(data).stem}"
    source, reading = runs.reading_of(data, reading)
    with on_cluster(backend, address):
        result = run_sweep(
            folder,
            Options(model, source, data_dir, num_data, latent_size, num_particles, options, reading),
            prior=_names(prior),
            encoder=_names(encoder),
            likelihood=_names(likelihood),
            objective=_names(objective),
            vary=dict(map(_values, vary or ())),
            seeds=seeds,
            jobs=jobs,
        )
    written = f"{folder}: table.md, table.csv, cells.csv, sweep.png; each cell is a run in {folder / 'cells'}"
    _show(result, as_json, "", {}, written)
    if result.failed:
        for error, where in result.failures().items():
            typer.echo(_printable(f"failed: {', '.join(where)}: {error}"), err=True)
        raise typer.Exit(1)


@app.command(epilog="Example: dgm compare runs/vae-digits runs/pixelcnn-digits --num-particles 100")
def compare(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN RUN ...", help="Runs to compare; differences are to the first.", autocompletion=_runs
        ),
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
    import json

    from dgm_pyro.checks import find_device
    from dgm_pyro.experiments.sweep import compare as compare_runs

    found = compare_runs(
        folders,
        split=split,
        num_particles=num_particles,
        data=data,
        data_dir=data_dir,
        device=str(find_device(device)),
        seed=seed,
        progress=_on_a_terminal(),
    )
    typer.echo(json.dumps(found.as_dict(), indent=1) if as_json else str(found))


@app.command(epilog="Example: dgm gaps runs/vae-digits runs/vae-iaf --num-data 16")
def gaps(
    folders: Annotated[
        list[Path], typer.Argument(metavar="RUN ...", help="Runs of VAEs, one for each guide.", autocompletion=_runs)
    ],
    num_data: Annotated[int, typer.Option(help="Number of data, from the start of the split.")] = 32,
    data: OtherData = None,
    split: Split = "test",
    num_particles: Annotated[
        int, typer.Option(help="Number of importance samples per datum in the IWAE bound on log p(x).")
    ] = 1000,
    num_temperatures: Annotated[
        int,
        typer.Option(
            help="Number of temperatures of annealed importance sampling; more tighten its bound. 0 leaves it out, as "
            "discrete latents need."
        ),
    ] = 100,
    gradient_steps: Annotated[
        int, typer.Option(help="Number of gradient steps in the search for the best q of the family.")
    ] = 400,
    seed: Seed = 0,
    device: Device = "auto",
    data_dir: DataDir = None,
    out: Picture = None,
    as_json: Json = False,
) -> None:
    """Split log p(x) - ELBO into the approximation gap of the guide's family and the amortization gap.

    Prints a table and writes pictures. With the defaults, a small VAE takes about half a minute of processor time.
    """
    import json

    import dgm_pyro as dgm
    from dgm_pyro.checks import check_count
    from dgm_pyro.experiments import plots

    check_count(num_data, "num_data")
    picture = _written_to(out, folders[0] / "gaps.png")
    found, loaded = {}, {folder: _opened(folder, device, data_dir) for folder in folders}
    for folder, (program, record, where, place) in loaded.items():
        points = _points(record, program, split, data, place)[:num_data].to(where)
        x, given, _ = program.arguments(points)
        found[folder] = dgm.infer.gaps(
            program,
            x,
            given,
            num_particles=num_particles,
            num_temperatures=num_temperatures,
            gradient_steps=gradient_steps,
            seed=seed,
            progress=_on_a_terminal(),
        )
        if not as_json:
            typer.echo(f"{folder} ({record}, {split if data is None else data})\n{found[folder]}")
        if plots.is_picture(points.x):
            name = f"{picture.stem}-{folder.name}-worst" if len(folders) > 1 else f"{picture.stem}-worst"
            title = f"Worst explained by {folder.name}"
            worst = plots.worst_explained(found[folder], levels=program.levels, title=title)
            plots.write_picture(picture.with_name(f"{name}.png"), worst)
    short = {folder.name for folder in found}
    names = {folder.name if len(short) == len(found) else str(folder): each for folder, each in found.items()}
    plots.write_picture(picture, plots.gaps(names, title=f"Gaps on {points.name}, {len(points)} data"))
    if as_json:
        typer.echo(json.dumps({str(folder): each.as_dict() for folder, each in found.items()}, indent=1))
    else:
        typer.echo(f"{picture}: a bar per run")


@app.command(epilog="Example: dgm checks runs/vae-digits --num-samples 1000")
def checks(
    run: RunFolder,
    num_samples: Annotated[int, typer.Option(help="Number of simulated pairs (z, x) for calibration.")] = 500,
    num_data: Annotated[int, typer.Option(help="Number of data to measure the activity of units on.")] = 512,
    data: OtherData = None,
    split: Split = "test",
    seed: Seed = 0,
    device: Device = "auto",
    data_dir: DataDir = None,
    out: Picture = None,
    as_json: Json = False,
) -> None:
    """Check whether the guide is calibrated and which latents are in use: rank histograms, active units, KL, collapse.

    A latent variable that has collapsed entirely ends in a non-zero exit.
    """

    import dgm_pyro as dgm
    from dgm_pyro.checks import check_count
    from dgm_pyro.experiments import plots

    check_count(num_data, "num_data")
    picture = _written_to(out, run / "checks.png")
    program, record, _, place = _opened(run, device, data_dir)
    points = _points(record, program, split, data, place)[:num_data]
    report = dgm.infer.check(program, points, num_samples=num_samples, seed=seed, progress=_on_a_terminal())
    plots.write_picture(picture, plots.calibration(report, title=f"The guide of {record}"))
    _show(report, as_json, "", {}, f"{picture}: rank histograms and the KL of each dimension")
    if any(finding.severity == "error" for finding in report.findings):
        raise typer.Exit(1)


@app.command(epilog="Example: dgm infer model.py:model --data data.json --guide meanfield,nsf --out inference")
def infer(
    target: Annotated[str, typer.Argument(metavar="TARGET", help="FILE.py:MODEL or MODULE:MODEL, a Pyro model.")],
    data: Annotated[
        Path | None,
        typer.Option(help="A .json file of the model's arguments by name. Default: what data() in FILE.py returns."),
    ] = None,
    guide: Annotated[
        str, typer.Option(help="Guides to fit, separated by commas: see dgm list; Pyro's AutoGuides by name, too.")
    ] = "meanfield,fullrank,realnvp,nsf",
    reference: Annotated[str, typer.Option(help="What to compare the guides with: nuts or none.")] = "nuts",
    gradient_steps: Annotated[int, typer.Option(help="Number of gradient steps of each fit.")] = 1000,
    num_samples: Annotated[int, typer.Option(help="Number of draws of each guide, and of the reference.")] = 4000,
    seed: Seed = 0,
    out: Annotated[Path, typer.Option(help="Folder of the table, the pictures and the draws.")] = Path("inference"),
    as_json: Json = False,
) -> None:
    """Fit guides to the posterior of a Pyro model and say how good each is.

    Numbers in a .json file become tensors, which are passed to the model by the names of its parameters.
    """
    from dgm_pyro.checks import check_choice
    from dgm_pyro.experiments import inference

    check_choice(reference, ("nuts", "none"), "--reference")
    posterior = inference.posterior_from(target, data)
    found = inference.infer_into(
        posterior,
        out,
        guides=_names(guide),
        reference=None if reference == "none" else reference,
        gradient_steps=gradient_steps,
        num_samples=num_samples,
        seed=seed,
        progress=_on_a_terminal(),
    )
    _show(found, as_json, f"{posterior!r}\n", {"target": target}, f"{out}: the table, pictures, and the draws of each")


@app.command(epilog="Example: dgm anomaly runs/vae-digits photos.npy --score likelihood,complexity,kl")
def anomaly(
    run: RunFolder,
    data: Inputs,
    score: Annotated[
        str,
        typer.Option(
            metavar="NAME,NAME,...",
            help="Scores: likelihood, typicality, complexity, ratio, waic, kl. The first ranks the data.",
        ),
    ] = "likelihood",
    background: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Background for ratio: a run trained with --mutate.", autocompletion=_runs),
    ] = None,
    ensemble: Annotated[
        str | None, typer.Option(metavar="RUN,RUN,...", help="Ensemble for waic: further runs, from other seeds.")
    ] = None,
    normal: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Normal data that were not trained on. Default: the run's test split."),
    ] = None,
    false_alarm_rate: FalseAlarms = 0.01,
    num_particles: Samples = 1,
    seed: Seed = 0,
    device: Device = "auto",
    data_dir: DataDir = None,
    out: Picture = None,
    as_json: Json = False,
) -> None:
    """Find data unlike those that the run was trained on: a table, a picture of the most anomalous, a CSV.

    One random half of the normal data sets the threshold; AUROC and false alarms are measured on the other half.

    Scores and thresholds are in nats (the variance in WAIC in nats squared); higher is more anomalous.

    The AUROC is the probability that one of the DATA scores above a normal datum; 0.5 is chance.
    """
    from dgm_pyro.experiments import plots, runs
    from dgm_pyro.files import write_text
    from dgm_pyro.results import as_csv
    from dgm_pyro.uses.anomaly import detect

    picture = _written_to(out, run / "anomalies.png")
    program, record, where, place = _opened(run, device, data_dir)
    points = runs.inputs(data, program, place, record.reading)
    found = detect(
        program,
        points,
        _points(record, program, "test", normal, place),
        _names(score),
        background=None if background is None else runs.read(background, where)[0],
        ensemble=[runs.read(folder, where)[0] for folder in _names(ensemble)],
        false_alarm_rate=false_alarm_rate,
        num_particles=num_particles,
        seed=seed,
        progress=_on_a_terminal(),
    )
    what, table = str(record), picture.with_suffix(".csv")
    plots.write_picture(
        picture,
        plots.samples(
            points.x[found.ranked[:36]],
            levels=program.levels,
            title=f"Most anomalous for {what}, by {found.alarms[0].score}",
        ),
    )
    write_text(table, as_csv(found.records()))
    written = f"{picture} and {table}: the most anomalous first"
    _show(found, as_json, f"{what}: ", {"run": str(run), "data": data}, written)


@app.command(epilog="Example: dgm classify runs/made-digits photos.npy --false-alarm-rate 0.05")
def classify(
    run: RunFolder,
    data: Inputs,
    num_particles: Samples = 1,
    false_alarm_rate: FalseAlarms = 0.01,
    seed: Seed = 0,
    device: Device = "auto",
    data_dir: DataDir = None,
    out: Annotated[Path | None, typer.Option(help="Output table, a .csv. Default: RUN/classified.csv.")] = None,
    as_json: Json = False,
) -> None:
    """Classify data, and say which answers to reject: p(y | x) and log p(x) in a CSV, and a picture.

    A run trained with --labeled rejects by log p(x); a discriminative classifier rejects by its highest p(y | x).
    """
    from dgm_pyro.evaluation import check_whole
    from dgm_pyro.experiments import plots, runs
    from dgm_pyro.files import write_text
    from dgm_pyro.results import as_csv
    from dgm_pyro.uses.classification import answer

    table = _written_to(out, run / "classified.csv")
    program, record, _, place = _opened(run, device, data_dir)
    points = runs.inputs(data, program, place, record.reading)
    check_whole(points, f"a run of {record.model}")
    x, reference = points.x, record.points("test", place)
    found = answer(
        program,
        x,
        reference.x,
        false_alarm_rate=false_alarm_rate,
        num_particles=num_particles,
        seed=seed,
        progress=_on_a_terminal(),
    )
    what, written = str(record), str(table)
    table.parent.mkdir(parents=True, exist_ok=True)
    write_text(table, as_csv(_by_name(found.records(), record.reading.get("classes"))))
    if plots.is_picture(x):
        picture = table.with_suffix(".png")
        plots.write_picture(
            picture,
            plots.answers(
                x[:36],
                found.probabilities[:36],
                found.rejected[:36],
                levels=reference.levels,
                title=f"{what}: answers, struck if rejected",
            ),
        )
        written += f" and {picture}"
    _show(found, as_json, f"{what}: ", {"run": str(run), "data": data}, written)


@app.command(epilog="Example: dgm represent runs/vae-digits")
def represent(
    run: RunFolder,
    data: Annotated[
        str | None, typer.Argument(metavar="DATA", help="A .npy file, or a data set. Default: the run's test split.")
    ] = None,
    site: Annotated[
        str | None, typer.Option(help="Level of a hierarchy, such as z2. Default: the nearest to x.")
    ] = None,
    num_data: Annotated[int, typer.Option(help="Largest number of data, and of training data for the probe.")] = 5000,
    curve: Annotated[str, typer.Option(help="Curve of the interpolation: spherical or linear.")] = "spherical",
    seed: Seed = 0,
    device: Device = "auto",
    data_dir: DataDir = None,
    out: Annotated[Path | None, typer.Option(help="Output map, a .png. Default: RUN/representation.png.")] = None,
    as_json: Json = False,
) -> None:
    """Encode data, and measure what the codes z are good for: a table, a map, pictures along codes, a .npy file.

    With labels: a linear probe, nearest neighbors and clusters of z, beside those of x itself.
    """
    import dgm_pyro as dgm
    from dgm_pyro.checks import check_count
    from dgm_pyro.experiments import plots, runs

    check_count(num_data, "num_data")
    picture = _written_to(out, run / "representation.png")
    program, record, _, place = _opened(run, device, data_dir)
    if isinstance(program, dgm.Labeled):
        program.program.code_named()  # or why there is none
        raise ValueError(
            f"{run} has a code for each class, and no map of all of them; in Python: "
            f"labeled = dgm.load({str(run)!r}); dgm.representations.encode(labeled.program, x, labeled.classify(x))"
        )
    points = _points(record, program, "test", data, place)[:num_data]
    train = None
    if points.y is not None:
        train = record.points("train", place)
        train = record.points("train", place, min(num_data, len(train)), seed)
    found = dgm.representations.represent(program, points, train, site=site, seed=seed, progress=_on_a_terminal())
    what, numbers = str(record), picture.with_suffix(".npy")
    title = f"{found.site} of {len(points)} data, {what}"
    figures = plots.representation(found, program, points.x, curve=curve, title=title)
    written = [numbers]
    for name, figure in figures.items():
        written.append(picture if name == "map" else picture.with_name(f"{picture.stem}-{name}.png"))
        plots.write_picture(written[-1], figure)
    numbers.parent.mkdir(parents=True, exist_ok=True)
    runs.write_array(numbers, found.z)
    _show(found, as_json, f"{what}: ", {"run": str(run)}, ", ".join(map(str, written)))


Repository = Annotated[str, typer.Argument(metavar="REPO", help="Repository of the Hugging Face hub: USER/NAME.")]


@app.command(epilog="Example: dgm push runs/vae-digits alice/vae-digits")
def push(
    run: RunFolder,
    repo: Repository,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository a private one.")] = False,
    num_particles: Samples = 1,
    data_dir: DataDir = None,
) -> None:
    """Store a run on the Hugging Face hub, with a model card: formula, data, options, and evidence of the test data.

    Log in before, by hf auth login.
    """
    from dgm_pyro.experiments import hub

    address = hub.push(
        run, repo, private=private, num_particles=num_particles, data_dir=data_dir, progress=_on_a_terminal()
    )
    typer.echo(f"{address}: pull it with dgm pull {repo}")


@app.command(epilog="Example: dgm pull alice/vae-digits --out runs/alice")
def pull(
    repo: Repository,
    out: Annotated[Path | None, typer.Option(help="Folder of the run. Default: runs/NAME.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit. Default: the newest.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the run's folder.")] = False,
) -> None:
    """Fetch a run from the Hugging Face hub. To read it runs no code."""
    from dgm_pyro.experiments import hub

    folder = out or Path("runs") / repo.rpartition("/")[2]
    _, record = hub.pull(repo, folder, revision=revision, force=force)
    typer.echo(f"{folder}: {record}")
    typer.echo(f"next: dgm sample {folder}")


def _opened(run: Path, device: str, data_dir: str | None = None) -> tuple[Program, Record, torch.device, str | None]:
    """The program of a run, its record, the device, and the folder of its data."""
    from dgm_pyro.checks import find_device
    from dgm_pyro.experiments import runs

    where = find_device(device)
    program, record = runs.read(run, where)
    return program, record, where, data_dir or record.data_dir


def _points(record: Record, program: Program, split: str, other: str | None, place: str | None) -> Data:
    """A split of the run's own data, or ``other`` data."""
    from dgm_pyro.experiments import runs

    return record.points(split, place) if other is None else runs.inputs(other, program, place, record.reading)


def _by_name(records: list[dict[str, Any]], classes: list[str] | None) -> list[dict[str, Any]]:
    """Answers with the names of the classes in the place of their numbers, where they have names."""
    if classes is None:
        return records
    names = {f"p_{i}": f"p_{name}" for i, name in enumerate(classes)}
    return [
        {names.get(key, key): classes[value] if key == "class" else value for key, value in record.items()}
        for record in records
    ]


def _on_a_terminal() -> bool:
    """Whether somebody sees the bars."""
    return sys.stderr.isatty()


def _show(found: Result, as_json: bool, before: str, facts: dict[str, Any], after: str) -> None:
    """Print what was found: as JSON, with the ``facts`` about it, or between two texts."""
    import json

    typer.echo(json.dumps(facts | found.as_dict(), indent=1) if as_json else f"{before}{found}\n{after}")


def _written_to(out: Path | None, default: Path) -> Path:
    path = out or default
    if path.suffix.lower() != default.suffix:
        raise ValueError(f"--out must end in {default.suffix}, got {path}")
    return path


@app.command("list", epilog="Examples: dgm list; dgm list --data digits")
def list_names(
    data: Annotated[
        str | None,
        typer.Option(
            help="Data set or path: list what each model is when built for it, and its size.", autocompletion=_data_sets
        ),
    ] = None,
    data_dir: DataDir = None,
) -> None:
    """List the models, data sets, priors, encoders, likelihoods and objectives; with --data, the models for it."""
    if data is not None:
        typer.echo(_models_for(data, data_dir))
        return
    from dgm_pyro.catalog import ENCODERS, LIKELIHOODS, MODELS, PRIORS
    from dgm_pyro.data import NAMES
    from dgm_pyro.families.guides import FAMILIES
    from dgm_pyro.objectives import OBJECTIVES
    from dgm_pyro.training.adversarial import COMPARISONS

    def lines(table: dict[str, tuple[Any, str]]) -> dict[str, str]:
        return {name: line for name, (_, line) in table.items()}

    sections = {
        "models: dgm train MODEL": lines(MODELS),
        "data sets: --data": NAMES,
        "priors of a vae: --prior": lines(PRIORS),
        "encoders of a vae: --encoder": lines(ENCODERS),
        "likelihoods of a vae: --likelihood": lines(LIKELIHOODS),
        "guides of any Pyro model: dgm infer --guide": lines(FAMILIES),
        "objectives: --objective NAME or NAME:NUMBER": {
            name: (each.__doc__ or "").strip().splitlines()[0].rstrip(".")
            for name, each in (OBJECTIVES | COMPARISONS).items()
        },
    }
    width = max(len(name) for names in sections.values() for name in names) + 2
    for title, names in sections.items():
        typer.echo(title)
        for name, line in names.items():
            typer.echo(f"  {name:<{width}}{line}")


def _models_for(name: str, data_dir: str | None) -> str:
    """What each model is when built for data."""
    from dgm_pyro.catalog import MODELS, build
    from dgm_pyro.experiments import runs
    from dgm_pyro.results import Table

    points, rows = runs.points(name, data_dir=data_dir), []
    for model in MODELS:
        try:
            formula = build(model, points).formula()
            rows.append([model, f"{formula.num_parameters:,}", formula.p])
        except ValueError as error:
            rows.append([model, "", str(error)])
    return f"{points}\n{Table(['model', 'parameters', 'p'], rows)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``dgm``; its exit status."""
    try:
        status = app(args=None if arguments is None else list(arguments), prog_name="dgm", standalone_mode=False)
        if status == INTERRUPTED:
            raise KeyboardInterrupt
        return status if isinstance(status, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", INTERRUPTED) if _is_first_to_fail() else INTERRUPTED
    except _Interruption as error:
        message, ended = error.args
        return _fail(message, ended) if _is_first_to_fail() else int(ended)
    except Exception as error:
        if not _is_first_to_fail():
            return 1
        if os.environ.get("DGM_DEBUG"):
            raise
        if hasattr(error, "format_message"):  # what typer has to say about the command line
            context = getattr(error, "ctx", None)
            command = context.command_path if context else "dgm"
            return _fail(f"{error.format_message()} (see {command} --help)", getattr(error, "exit_code", 2))
        if _is_of_memory(error):
            return _fail(f"there is not enough memory: ask for fewer data, draws or particles at once ({error})", 1)
        if not isinstance(error, _expected()):
            raise
        return _fail(str(error), 1)


def _is_first_to_fail() -> bool:
    if "LOCAL_RANK" not in os.environ:
        return True
    from dgm_pyro.training.distributed import is_first_to_fail

    return is_first_to_fail()


def _expected() -> tuple[type[Exception], ...]:
    """What bad input raises; anything else is a bug, and shows its traceback."""
    from dgm_pyro.program import IntractableError
    from dgm_pyro.training.compilation import CompilationError
    from dgm_pyro.training.fit import NonFiniteLossError

    return ValueError, TypeError, OSError, ImportError, CompilationError, IntractableError, NonFiniteLossError


def _is_of_memory(error: Exception) -> bool:
    import torch

    # On the CPU torch raises no class of its own.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def _printable(message: str) -> str:
    """The message in one line; names in files may hold what moves the cursor of a terminal, or is no text at all."""
    line = " ".join(message.split())
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in line)


def _fail(message: str, status: int) -> int:
    typer.echo(f"dgm: {_printable(message)}", err=True)
    return status
