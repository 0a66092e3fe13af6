"""The command line: ``dgm tour``, ``train``, ``sample``, ``evaluate``, ``list``.

Whatever is wrong with the input ends in one line on stderr and a non-zero exit; ``dgm --debug`` shows the traceback.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dgm_pyro.training.options import TrainingOptions, option_types

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure
    from torch import Tensor

    from dgm_pyro.infer import Units
    from dgm_pyro.program import Program
    from dgm_pyro.training.fit import History
    from dgm_pyro.uses.anomaly import NegativeLogLikelihood, Score

# Modules that take long to import are imported by the commands that need them.

app = typer.Typer(
    name="dgm",
    help="Deep generative models as probabilistic programs: train, question and compare them.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

INTERRUPTED = 130

Command = Callable[..., None]

Device = Annotated[str, typer.Option(help="auto (CUDA if there is one), cpu, cuda or cuda:N.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Same seed, same machine: same result.")]
DataDir = Annotated[
    str | None, typer.Option(help="Folder of data sets read from files; default: the environment variable DGM_DATA.")
]
NumData = Annotated[int | None, typer.Option(help="Use only this many training data.")]
LatentSize = Annotated[int | None, typer.Option(help="Number of latents of a vae.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A folder written by dgm train or dgm tour.")]


@app.callback(invoke_without_command=True, epilog="Example: dgm tour --quick")
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks; the environment variable DGM_DEBUG does, too.")
    ] = False,
    threads: Annotated[
        int | None, typer.Option(help="Of the processor; for small networks 1 is often fastest.")
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
    quick: Annotated[bool, typer.Option("--quick", help="Train for under a minute; the numbers suffer.")] = False,
    out: Annotated[Path, typer.Option(help="Where the report goes; an earlier tour there is replaced.")] = Path("tour"),
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Train every family on real digits, compare them, and write a report."""
    from dgm_pyro.experiments.tour.run import run

    failures = run(out, quick=quick, seed=seed, device=device)
    if failures:
        raise typer.Exit(1)


def _training_options(*without: str) -> Callable[[Command], Command]:
    """Give a command one option for each field of `TrainingOptions`, in the place of its argument ``options``.

    Args:
        without: fields that keep their default.
    """
    parameters = [_parameter_of(field) for field in dataclasses.fields(TrainingOptions) if field.name not in without]

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def called(**given: Any) -> None:
            options = TrainingOptions(**{parameter.name: given.pop(parameter.name) for parameter in parameters})
            command(**given, options=options)

        signature = inspect.signature(command, eval_str=True)
        own = [parameters if each.name == "options" else [each] for each in signature.parameters.values()]
        called.__signature__ = signature.replace(parameters=[*itertools.chain(*own)])  # type: ignore[attr-defined]
        return called

    return decorate


def _parameter_of(field: dataclasses.Field[Any]) -> inspect.Parameter:
    """The option of the command line that sets a field of `TrainingOptions`."""
    (kind, meaning), default = option_types()[field.name], field.default
    annotation: Any = Annotated[kind, typer.Option(help=meaning)]
    if field.name in ("seed", "device"):  # as for the other commands
        annotation = {"seed": Seed, "device": Device}[field.name]
    elif field.name == "validation":
        told = typer.Option(help=f"{meaning} 0 for none.", callback=lambda share: share or None)
        annotation = Annotated[float, told]
    elif field.name == "compile":
        told = typer.Option(
            "--compile/--no-compile", help=meaning, callback=lambda choice: "auto" if choice is None else choice
        )
        annotation, default = Annotated[bool | None, told], None
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


@app.command(epilog="Example: dgm train vae --data digits --prior flow --epochs 60 --out runs/vae-flow")
@_training_options()
def train(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model, such as vae or pixelcnn: see dgm list.")],
    data: Annotated[str, typer.Option(help="A data set: see dgm list.")] = "digits",
    data_dir: DataDir = None,
    num_data: NumData = None,
    prior: Annotated[str | None, typer.Option(help="Prior of a vae: see dgm list.")] = None,
    encoder: Annotated[str | None, typer.Option(help="Encoder of a vae: see dgm list.")] = None,
    likelihood: Annotated[str | None, typer.Option(help="Likelihood of a vae: see dgm list.")] = None,
    latent_size: LatentSize = None,
    labeled: Annotated[bool, typer.Option("--labeled", help="Build the generative classifier over MODEL.")] = False,
    objective: Annotated[str | None, typer.Option(help="What to maximize, such as iwae:50: see dgm list.")] = None,
    num_labels: Annotated[
        int | None, typer.Option(help="Keep only this many labels; for --labeled --objective semi-supervised:50.")
    ] = None,
    mutate: Annotated[
        float | None,
        typer.Option(help="Replace each feature by noise with this probability: a background for dgm anomaly."),
    ] = None,
    *,
    options: TrainingOptions,
    out: Annotated[Path | None, typer.Option(help="The run's folder; default: runs/MODEL-DATA.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the run's folder.")] = False,
) -> None:
    """Train a model and store the run: its program, options, history and learning curves.

    In several processes: torchrun --nproc-per-node=N -m dgm_pyro train MODEL ...; see docs/devices.md.
    """
    from dgm_pyro.experiments import runs
    from dgm_pyro.training import distributed

    processes = distributed.join(options.device)
    given = {"prior": prior, "encoder": encoder, "likelihood": likelihood, "latent_size": latent_size}
    swaps = {name: choice for name, choice in given.items() if choice is not None}
    name = f"{model}-{data}"
    folder = out or Path("runs") / name
    _, _, history = runs.train(
        folder,
        model,
        data,
        swaps,
        options,
        labeled=labeled,
        data_dir=data_dir,
        num_data=num_data,
        objective=objective,
        num_labels=num_labels,
        mutate=mutate,
        force=force,
    )
    if processes.writes:
        _report_training(folder, name, model, history)
    distributed.leave()


def _report_training(folder: Path, name: str, model: str, history: History) -> None:
    from dgm_pyro.experiments import plots

    plots.learning_curves(history, title=f"{name}: {len(history.epochs)} epochs").savefig(
        folder / "learning-curves.png"
    )
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
    num_samples: Annotated[int, typer.Option("--num-samples", "-n", help="How many.")] = 64,
    label: Annotated[int | None, typer.Option(help="Draw from p(x | this class); for runs trained --labeled.")] = None,
    sampler: Annotated[
        str | None, typer.Option(help="For diffusion: ancestral (the model itself), ddim, dpm++ or heun.")
    ] = None,
    num_steps: Annotated[int | None, typer.Option(help="For diffusion: use this many of its time steps.")] = None,
    spacing: Annotated[
        str | None, typer.Option(help="For diffusion: how the steps are spread: uniform, quadratic or karras.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="For diffusion trained --labeled: classifier-free guidance; 0 is the model.")
    ] = None,
    seed: Seed = 0,
    device: Device = "auto",
    out: Annotated[Path | None, typer.Option(help="The picture, a .png; default: RUN/samples.png.")] = None,
) -> None:
    """Draw samples: a picture, and the numbers beside it in a .npy file."""
    import torch

    from dgm_pyro.evaluation import evaluating
    from dgm_pyro.experiments import plots, runs
    from dgm_pyro.program import seeded
    from dgm_pyro.training.fit import find_device

    where = find_device(device)
    picture = _written_to(out, run / "samples.png")
    program, record = runs.read(run, where)
    given = None if label is None else torch.tensor([label], device=where)
    options = {"sampler": sampler, "num_steps": num_steps, "spacing": spacing, "guidance": guidance}
    options = {name: value for name, value in options.items() if value is not None}
    _check_sampling(program, label, options)
    with seeded(seed, where), evaluating(program):
        x = program.sample(num_samples, given, **options).cpu()
    picture.parent.mkdir(parents=True, exist_ok=True)
    what = f"{record.model} on {record.data}" + ("" if label is None else f", class {label}")
    plots.samples(x, levels=program.levels, title=f"{num_samples} samples of {what}").savefig(picture)
    _save_array(picture.with_suffix(".npy"), x)
    typer.echo(f"{picture} and {picture.with_suffix('.npy')}: {num_samples} samples of {what}")


def _check_sampling(program: Program, label: int | None, options: dict[str, Any]) -> None:
    from dgm_pyro.families.diffusion import Denoising
    from dgm_pyro.families.labeled import Labeled

    if program.variable != "x":
        raise ValueError("this run holds a discriminative classifier: it knows p(y | x), and has no x to sample")
    labeled = isinstance(program, Labeled)
    if label is not None and not labeled:
        raise ValueError("--label needs a run with labels: train it with dgm train --labeled")
    inner = program.program if isinstance(program, Labeled) else program
    if options and not isinstance(inner, Denoising):
        names = ", ".join(f"--{name}" for name in options)
        raise ValueError(f"{names} is for diffusion, but this run holds a {type(inner).__name__}: leave it out")
    if "guidance" in options and not labeled:
        raise ValueError("--guidance needs a run with labels: train it with dgm train diffusion --labeled")


@app.command(epilog="Example: dgm impute runs/pixelcnn-digits --mask top -n 6")
def impute(
    run: RunFolder,
    mask: Annotated[
        str, typer.Option(help="What to hide: left, right, top, bottom, center, or random:0.5 for a share.")
    ] = "left",
    num_samples: Annotated[int, typer.Option("--num-samples", "-n", help="How many draws for each datum.")] = 4,
    rows: Annotated[int, typer.Option(help="How many data of the split.")] = 8,
    split: Annotated[str, typer.Option(help="train or test; valid where the data set has it.")] = "test",
    num_particles: Annotated[
        int | None, typer.Option(help="Weighted draws to choose from; default: by method, see docs/inference.md.")
    ] = None,
    num_temperatures: Annotated[int, typer.Option(help="Length of annealing, for a vae or a flow.")] = 100,
    seed: Seed = 0,
    device: Device = "auto",
    data_dir: DataDir = None,
    out: Annotated[Path | None, typer.Option(help="The picture, a .png; default: RUN/imputed.png.")] = None,
) -> None:
    """Hide a part of some data, and draw it anew given the rest: a picture, and the numbers beside it."""
    import dgm_pyro as dgm
    from dgm_pyro.experiments import plots, runs
    from dgm_pyro.training.fit import find_device

    where = find_device(device)
    picture = _written_to(out, run / "imputed.png")
    if rows < 1:
        raise ValueError(f"--rows must be a positive integer, got {rows}")
    program, record = runs.read(run, where)
    points = dgm.data.load(record.data, split, data_dir=data_dir or record.data_dir)
    points = points[:rows]
    x, given, _ = program.arguments(points.x, points.y)
    if program.variable != "x":
        raise ValueError("this run holds a discriminative classifier: it knows p(y | x), and has no x to impute")
    seen = dgm.infer.hide(mask, program.event_shape, seed)
    drawn = dgm.infer.impute(
        program,
        x.to(where),
        seen.to(where),
        num_samples,
        None if given is None else given.to(where),
        num_particles=num_particles,
        num_temperatures=num_temperatures,
        seed=seed,
        progress=sys.stderr.isatty(),
    ).cpu()
    picture.parent.mkdir(parents=True, exist_ok=True)
    what = f"{record.model} on {record.data}, {mask} hidden"
    plots.imputations(x, seen, drawn, levels=program.levels, title=what).savefig(picture)
    _save_array(picture.with_suffix(".npy"), drawn)
    typer.echo(f"{picture} and {picture.with_suffix('.npy')}: {num_samples} draws for each of {len(x)} data of {what}")


@app.command(
    epilog="Examples: dgm evaluate runs/vae-digits --num-particles 64 --json; dgm evaluate runs/continuous-moons --ode"
)
def evaluate(
    run: RunFolder,
    split: Annotated[str, typer.Option(help="train or test; valid where the data set has it.")] = "test",
    num_particles: Annotated[
        int, typer.Option(help="With latent variables: 1 for the ELBO, K for the tighter IWAE bound.")
    ] = 1,
    num_samples: Annotated[
        int | None,
        typer.Option(
            help="Of the ELBO: how many draws to average for each datum, of a diffusion those of time and noise; "
            "default: 8. More leave less noise in the bound, and do not tighten it."
        ),
    ] = None,
    ode: Annotated[
        bool, typer.Option("--ode", help="Of diffusion-continuous on points: the density of its probability flow.")
    ] = False,
    seed: Seed = 0,
    device: Device = "auto",
    data_dir: DataDir = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print the evidence: bits per dimension, exact or as a bound, and a classifier's accuracy.

    The evidence is log p(x); that of a discriminative classifier, which has no p(x), is log p(y | x).

    Behind +- is the standard error of the mean over the data; it holds the noise of the draws, not that of training.
    """
    import json

    import torch

    import dgm_pyro as dgm
    from dgm_pyro.experiments import runs
    from dgm_pyro.training.fit import find_device

    where = find_device(device)
    program, record = runs.read(run, where)
    points = dgm.data.load(record.data, split, data_dir=data_dir or record.data_dir)
    if num_samples is not None and (program.tractable or num_particles > 1 or ode):
        raise ValueError("--num-samples are those of an ELBO, but this evidence is none: leave it out")
    averaged: dict[str, Any] = {} if num_samples is None else {"num_samples": num_samples}
    shown = sys.stderr.isatty()
    evidence = dgm.evaluate(
        program, points, num_particles=num_particles, ode=ode, seed=seed, progress=shown, **averaged
    )
    of = "log p(x)" if program.variable == "x" else "log p(y | x)"
    numbers = {"run": str(run), "model": record.model, "split": split, "of": of} | evidence.as_dict()
    accuracy = None
    if isinstance(program, (dgm.Labeled, dgm.Discriminative)):
        guess = program.classify(points.x.to(where)).cpu()
        accuracy = float(torch.eq(guess, torch.as_tensor(points.y)).double().mean())
        numbers["accuracy"] = accuracy
    if as_json:
        typer.echo(json.dumps(numbers, indent=1))
        return
    known = "" if program.variable == "x" else f" of {of}, for it has no p(x)"
    typer.echo(f"{record.model} on {record.data} ({split}, {len(points)} data): {evidence}{known}")
    if accuracy is not None:
        typer.echo(f"accuracy {accuracy:.4f}")


@app.command(epilog="Examples: dgm doctor runs/vae-digits; dgm doctor vae --prior flow; dgm doctor my.py:model,guide")
def doctor(
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="A run, a model's name, or FILE.py:MODEL,GUIDE of your own.")
    ],
    data: Annotated[str | None, typer.Option(help="For a model's name: a data set, see dgm list.")] = None,
    arguments: Annotated[
        str,
        typer.Option(
            "--args",
            metavar="NAME",
            help="For FILE.py: a value or function in it, what the pair is called with.",
        ),
    ] = "data",
    prior: Annotated[str | None, typer.Option(help="Prior of a vae.")] = None,
    encoder: Annotated[str | None, typer.Option(help="Encoder of a vae.")] = None,
    likelihood: Annotated[str | None, typer.Option(help="Likelihood of a vae.")] = None,
    data_dir: DataDir = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Look for mistakes in a model and its guide before training; errors end in a non-zero exit.

    In FILE.py, data() makes the arguments that model and guide are called with: one, a tuple, or a dict of named ones.
    """
    import json

    import dgm_pyro as dgm
    from dgm_pyro.catalog import MODELS, build
    from dgm_pyro.diagnosis import pair_from
    from dgm_pyro.experiments import runs

    given = {"prior": prior, "encoder": encoder, "likelihood": likelihood}
    swaps: dict[str, Any] = {name: choice for name, choice in given.items() if choice is not None}
    if ":" in target and not Path(target).is_dir():
        model, guide, args, kwargs = pair_from(target, arguments)
        if isinstance(model, dgm.Program):
            diagnosis = dgm.doctor(model, *args[:1])
        else:
            diagnosis = dgm.doctor(model, guide, *args, **kwargs)
    elif target in MODELS:
        points = dgm.data.load(data or "digits", data_dir=data_dir, num_data=64)
        diagnosis = dgm.doctor(build(target, points, **swaps), points)
    elif target.endswith(".py"):
        raise ValueError(f"{target} is a file: name what is in the file: {target}:MODEL,GUIDE")
    else:
        program, record = runs.read(target)
        points = dgm.data.load(data or record.data, data_dir=data_dir or record.data_dir, num_data=64)
        diagnosis = dgm.doctor(program, points)
    typer.echo(json.dumps(diagnosis.as_dict(), indent=1) if as_json else str(diagnosis))
    if not diagnosis.ok:
        raise typer.Exit(1)


Names = Annotated[str | None, typer.Option(metavar="NAME,NAME,...", help="Names to try: see dgm list.")]


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())


@app.command(
    epilog="Example: dgm sweep vae --data digits-binary --prior normal,vamp,flow --encoder meanfield,iaf --seeds 3"
)
@_training_options("seed")
def sweep(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model, such as vae: see dgm list.")] = "vae",
    data: Annotated[str, typer.Option(help="A data set: see dgm list.")] = "digits-binary",
    prior: Names = None,
    encoder: Names = None,
    likelihood: Names = None,
    objective: Names = None,
    seeds: Annotated[int, typer.Option(help="How many seeds, from 0.")] = 1,
    num_data: NumData = None,
    latent_size: LatentSize = None,
    num_particles: Annotated[int, typer.Option(help="K of the IWAE bound that the table is sorted by.")] = 1000,
    jobs: Annotated[int, typer.Option(help="How many processes; they take the GPUs in turn, or share the cores.")] = 1,
    *,
    options: TrainingOptions,
    data_dir: DataDir = None,
    out: Annotated[Path | None, typer.Option(help="The sweep's folder; default: sweeps/MODEL-DATA.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Train and evaluate every combination: a table, a heat map, CSV, and a run for each cell.

    The same command again goes on where it was killed; finished cells are kept, failed ones are tried again.
    """
    import json

    from dgm_pyro.experiments.sweep import Options
    from dgm_pyro.experiments.sweep import sweep as run_sweep

    folder = out or Path("sweeps") / f"{model}-{data}"
    result = run_sweep(
        folder,
        Options(model, data, data_dir, num_data, latent_size, num_particles, options),
        prior=_names(prior),
        encoder=_names(encoder),
        likelihood=_names(likelihood),
        objective=_names(objective),
        seeds=seeds,
        jobs=jobs,
    )
    if as_json:
        cells = [cell for row in result.rows for cell in row.cells]
        typer.echo(json.dumps({"folder": str(folder), "failed": result.failed, "cells": cells}, indent=1))
    else:
        typer.echo(result)
        typer.echo(f"{folder}: table.md, table.csv, cells.csv, sweep.png; each cell is a run in {folder / 'cells'}")
    if result.failed:
        for error, where in result.failures().items():
            typer.echo(f"failed: {', '.join(where)}: {error}", err=True)
        raise typer.Exit(1)


@app.command(epilog="Example: dgm compare runs/vae-digits runs/pixelcnn-digits --num-particles 100")
def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN RUN ...", help="Runs; differences are to the first.")],
    split: Annotated[str, typer.Option(help="train or test; valid where the data set has it.")] = "test",
    num_particles: Annotated[
        int, typer.Option(help="With latent variables: 1 for the ELBO, K for the tighter IWAE bound.")
    ] = 1,
    seed: Seed = 0,
    device: Device = "auto",
    data_dir: DataDir = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Runs side by side, with paired differences; a mass is not compared with a density."""
    import json

    from dgm_pyro.experiments.sweep import compare as compare_runs
    from dgm_pyro.training.fit import find_device

    found = compare_runs(
        folders,
        split=split,
        num_particles=num_particles,
        data_dir=data_dir,
        device=str(find_device(device)),
        seed=seed,
        progress=sys.stderr.isatty(),
    )
    typer.echo(json.dumps(found.as_dict(), indent=1) if as_json else str(found))


@app.command(epilog="Example: dgm gaps runs/vae-digits runs/vae-iaf --num-data 64")
def gaps(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN ...", help="Runs of VAEs, one for each guide.")],
    num_data: Annotated[int, typer.Option(help="How many data, from the start of the split.")] = 64,
    split: Annotated[str, typer.Option(help="train or test; valid where the data set has it.")] = "test",
    num_particles: Annotated[int, typer.Option(help="K of the IWAE bound on log p(x).")] = 1000,
    num_temperatures: Annotated[
        int, typer.Option(help="Of annealed importance sampling; 0 leaves it out, as for discrete latents.")
    ] = 300,
    gradient_steps: Annotated[int, typer.Option(help="Of the search for the best q of the family.")] = 400,
    seed: Seed = 0,
    device: Device = "auto",
    data_dir: DataDir = None,
    out: Annotated[Path | None, typer.Option(help="The picture, a .png; default: RUN/gaps.png of the first.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Split log p(x) - ELBO into what the guide's family costs and what amortization costs; with pictures."""
    import json

    import dgm_pyro as dgm
    from dgm_pyro.experiments import plots, runs
    from dgm_pyro.program import check_count
    from dgm_pyro.training.fit import find_device

    check_count(num_data, "num_data")
    where, picture = find_device(device), _written_to(out, folders[0] / "gaps.png")
    found, loaded = {}, {folder: runs.read(folder, where) for folder in folders}
    for folder, (program, record) in loaded.items():
        picture.parent.mkdir(parents=True, exist_ok=True)
        points = dgm.data.load(record.data, split, data_dir=data_dir or record.data_dir)[:num_data].to(where)
        x, given, _ = program.arguments(points.x, points.y)
        found[str(folder)] = dgm.infer.gaps(
            program,
            x,
            given,
            num_particles=num_particles,
            num_temperatures=num_temperatures,
            gradient_steps=gradient_steps,
            seed=seed,
            progress=sys.stderr.isatty(),
        )
        if not as_json:
            typer.echo(f"{folder} ({record.model} on {record.data}, {split})\n{found[str(folder)]}")
        if program.event_shape[:1] == (1,) and len(program.event_shape) == 3:
            worst = picture.with_name(f"{picture.stem}-{folder.name}-worst.png" if len(folders) > 1 else
                                      f"{picture.stem}-worst.png")  # fmt: skip
            plots.worst_explained(
                found[str(folder)], levels=program.levels, title=f"Worst explained by {folder.name}"
            ).savefig(worst)
    names = {folder.name: each for folder, each in zip(loaded, found.values(), strict=True)}
    plots.gaps(
        names if len(names) == len(found) else found, title=f"Gaps on {record.data}, {min(num_data, len(points))} data"
    ).savefig(picture)
    if as_json:
        typer.echo(json.dumps({name: each.as_dict() for name, each in found.items()}, indent=1))
    else:
        typer.echo(f"{picture}: the gaps drawn")


@app.command(epilog="Example: dgm checks runs/vae-digits --num-samples 1000")
def checks(
    run: RunFolder,
    num_samples: Annotated[int, typer.Option(help="Pairs (z, x) simulated for calibration.")] = 500,
    num_data: Annotated[int, typer.Option(help="How many data the activity of units is measured on.")] = 512,
    split: Annotated[str, typer.Option(help="train or test; valid where the data set has it.")] = "test",
    seed: Seed = 0,
    device: Device = "auto",
    data_dir: DataDir = None,
    out: Annotated[Path | None, typer.Option(help="The picture, a .png; default: RUN/checks.png.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Is the guide calibrated, and which latents are in use? Rank histograms, active units, KL, collapse.

    A latent of which nothing is in use ends in a non-zero exit.
    """
    import json

    import dgm_pyro as dgm
    from dgm_pyro.experiments import plots, runs
    from dgm_pyro.program import check_count
    from dgm_pyro.training.fit import find_device

    check_count(num_data, "num_data")
    where, picture = find_device(device), _written_to(out, run / "checks.png")
    program, record = runs.read(run, where)
    points = dgm.data.load(record.data, split, data_dir=data_dir or record.data_dir)[:num_data]
    report = dgm.infer.check(program, points, num_samples=num_samples, seed=seed)
    picture.parent.mkdir(parents=True, exist_ok=True)
    plots.calibration(report, title=f"The guide of {record.model} on {record.data}").savefig(picture)
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=1))
    else:
        typer.echo(report)
        typer.echo(f"{picture}: rank histograms and the KL of each dimension")
    if any(finding.severity == "error" for finding in report.findings):
        raise typer.Exit(1)


@app.command(epilog="Example: dgm anomaly runs/vae-digits photos.npy --score likelihood,complexity,kl")
def anomaly(
    run: RunFolder,
    data: Annotated[str, typer.Argument(metavar="DATA", help="What to look through: a .npy file, or a data set.")],
    score: Annotated[
        str,
        typer.Option(
            metavar="NAME,NAME,...",
            help="likelihood, typicality, complexity, ratio, waic, kl; the first ranks the picture and the numbers.",
        ),
    ] = "likelihood",
    background: Annotated[
        Path | None, typer.Option(metavar="RUN", help="For ratio: a run trained on perturbed data.")
    ] = None,
    ensemble: Annotated[
        str | None, typer.Option(metavar="RUN,RUN,...", help="For waic: further runs, of other seeds.")
    ] = None,
    normal: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Normal data that were not trained on; default: the run's test split."),
    ] = None,
    false_alarm_rate: Annotated[float, typer.Option(help="Largest probability that a normal datum is flagged.")] = 0.01,
    num_particles: Annotated[int, typer.Option(help="With latent variables: K of the bound on log p(x).")] = 1,
    seed: Seed = 0,
    device: Device = "auto",
    data_dir: DataDir = None,
    out: Annotated[Path | None, typer.Option(help="The picture, a .png; default: RUN/anomalies.png.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Which data are unlike what the run was trained on? A table, a picture of the most anomalous, a CSV.

    One random half of the normal data sets the threshold; AUROC and false alarms are measured on the other half.

    Scores and thresholds are in nats, the variance in WAIC in nats squared; the higher, the more anomalous.

    The AUROC is the probability that one of the DATA scores above a normal datum; 0.5 is a coin's toss.
    """
    import json

    import torch

    from dgm_pyro.experiments import plots, runs
    from dgm_pyro.program import check_count
    from dgm_pyro.training.fit import find_device
    from dgm_pyro.uses import anomaly
    from dgm_pyro.uses.classification import share

    check_count(num_particles, "num_particles")
    where, picture = find_device(device), _written_to(out, run / "anomalies.png")
    program, record = runs.read(run, where)
    place = data_dir or record.data_dir
    x, _ = _inputs(data, program, place)
    kept, _ = _inputs(normal or record.data, program, place)
    if len(kept) < 2:
        raise ValueError("there is one normal datum: pass at least two, to calibrate on and to measure on")
    order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(seed))
    reference, held_out = kept[order[: len(kept) // 2]], kept[order[len(kept) // 2 :]]
    other = [runs.read(folder, where)[0] for folder in _names(ensemble)]
    base = anomaly.NegativeLogLikelihood(program, num_particles)
    first, rows = None, []
    for name in _names(score) or ("likelihood",):
        chosen = _score(name, base, background, other, reference, where)
        scores, normal_scores = chosen(x), chosen(held_out)
        detector = anomaly.Detector(lambda values: values).calibrate(chosen(reference), false_alarm_rate)
        flags, found = detector.flag(scores), anomaly.separation(normal_scores, scores)
        rows.append(
            {
                "score": name,
                "threshold": detector.threshold,
                "flagged": int(flags.sum()),
                "of": len(x),
                "false_alarms": share(detector.flag(normal_scores)),
                "auroc": found.auroc,
                "auroc_stderr": found.stderr,
            }
        )
        first = first or (scores, flags, detector.p_values(scores))
    assert first is not None
    scores, flags, p_values = first
    ranked = scores.argsort(descending=True)
    picture.parent.mkdir(parents=True, exist_ok=True)
    title = f"Most anomalous for {record.model} on {record.data}, by {rows[0]['score']}"
    plots.samples(x[ranked[:36]], levels=program.levels, title=title).savefig(picture)
    table = picture.with_suffix(".csv")
    lines = ["index,score,p_value,flagged"]
    lines += [f"{i},{scores[i]:.6g},{p_values[i]:.6g},{int(flags[i])}" for i in ranked.tolist()]
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if as_json:
        typer.echo(
            json.dumps(
                {"run": str(run), "data": data, "num_reference": len(reference), "unit": "nats", "scores": rows},
                indent=1,
            )
        )
        return
    typer.echo(f"{record.model} on {record.data}: {len(x)} data against {len(held_out)} normal ones; "
               f"thresholds from {len(reference)} others, false-alarm rate {false_alarm_rate:g}")  # fmt: skip
    typer.echo(f"{'score':<12}{'threshold (nats)':>18}{'flagged':>14}{'false alarms':>14}   AUROC")
    for row in rows:
        flagged = f"{row['flagged']} of {row['of']}"
        typer.echo(f"{row['score']:<12}{row['threshold']:>18.2f}{flagged:>14}{row['false_alarms']:>14.4f}"
                   f"   {row['auroc']:.4f} +- {row['auroc_stderr']:.4f}")  # fmt: skip
    typer.echo("AUROC: how probably one of the data scores above a normal one; 0.5 is a coin's toss")
    typer.echo(f"{picture} and {table}: the most anomalous first")


def _score(
    name: str,
    base: NegativeLogLikelihood,
    background: Path | None,
    ensemble: list[Program],
    reference: Tensor,
    where: torch.device,
) -> Score:
    from dgm_pyro.experiments import runs
    from dgm_pyro.uses import anomaly

    if name == "likelihood":
        return base
    if name == "typicality":
        return anomaly.Typicality(base, reference)
    if name == "complexity":
        return anomaly.Complexity(base, "png" if len(base.program.event_shape) == 3 else "zlib")
    if name == "kl":
        return anomaly.PosteriorKL(base.program)
    if name == "ratio":
        if background is None:
            raise ValueError("--score ratio needs --background RUN, a run trained on perturbed data")
        return anomaly.Ratio(base, anomaly.NegativeLogLikelihood(runs.read(background, where)[0], base.num_particles))
    if name == "waic":
        if not ensemble:
            raise ValueError("--score waic needs --ensemble RUN,RUN,...: runs of the same program from other seeds")
        return anomaly.WAIC([base, *(anomaly.NegativeLogLikelihood(each, base.num_particles) for each in ensemble)])
    raise ValueError(f"--score must be among likelihood, typicality, complexity, ratio, waic, kl, got {name!r}")


@app.command(epilog="Example: dgm classify runs/made-digits photos.npy --false-alarm-rate 0.05")
def classify(
    run: RunFolder,
    data: Annotated[str, typer.Argument(metavar="DATA", help="What to classify: a .npy file, or a data set.")],
    num_particles: Annotated[
        int, typer.Option(help="Where p(x | y) is not exact: K of its bound, for each class.")
    ] = 1,
    false_alarm_rate: Annotated[
        float, typer.Option(help="Largest probability that a datum like the run's test data is rejected.")
    ] = 0.01,
    seed: Seed = 0,
    device: Device = "auto",
    data_dir: DataDir = None,
    out: Annotated[Path | None, typer.Option(help="The table, a .csv; default: RUN/classified.csv.")] = None,
) -> None:
    """p(y | x) of each datum, log p(x), and whether to reject the answer: a CSV and a picture.

    A run trained --labeled rejects by log p(x); a discriminative one has only its highest p(y | x) to go by.
    """
    import dgm_pyro.data as datasets
    from dgm_pyro.experiments import plots, runs
    from dgm_pyro.families.labeled import Discriminative, Labeled
    from dgm_pyro.program import check_count
    from dgm_pyro.training.fit import find_device
    from dgm_pyro.uses.anomaly import Detector
    from dgm_pyro.uses.classification import beliefs

    check_count(num_particles, "num_particles")
    where, table = find_device(device), _written_to(out, run / "classified.csv")
    program, record = runs.read(run, where)
    if not isinstance(program, (Labeled, Discriminative)):
        raise ValueError(
            f"this run holds a {type(program).__name__}, which has no p(y | x): train with --labeled, or a classifier"
        )
    place = data_dir or record.data_dir
    x, _ = _inputs(data, program, place)
    reference = datasets.load(record.data, "test", data_dir=place)
    probabilities, log_p = beliefs(program, x, num_particles=num_particles, seed=seed)
    usual, usual_log_p = beliefs(program, reference.x, num_particles=num_particles, seed=seed)
    score = -probabilities.max(-1).values if log_p is None else -log_p
    usual_score = -usual.max(-1).values if usual_log_p is None else -usual_log_p
    rejected = Detector(lambda scores: scores).calibrate(usual_score, false_alarm_rate).flag(score)
    classes = [f"p_{y}" for y in range(probabilities.shape[1])]
    lines = [",".join(["index", "class", "log_p_x", "reject", *classes])]
    for i, row in enumerate(probabilities):
        log_p_x = "" if log_p is None else f"{log_p[i]:.6g}"
        shares = [f"{share:.6g}" for share in row.tolist()]
        lines.append(",".join([str(i), str(int(row.argmax())), log_p_x, str(int(rejected[i])), *shares]))
    table.parent.mkdir(parents=True, exist_ok=True)
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    by = "log p(x)" if log_p is not None else "its highest p(y | x), for it has no p(x)"
    typer.echo(f"{record.model} on {record.data}: {int(rejected.sum())} of {len(x)} answers rejected, by {by}")
    written = str(table)
    if x.dim() == 4 and x.shape[1] == 1:
        picture = table.with_suffix(".png")
        plots.answers(
            x[:36],
            probabilities[:36],
            rejected[:36],
            levels=reference.levels,
            title=f"{record.model}: answers, struck if rejected",
        ).savefig(picture)
        written += f" and {picture}"
    typer.echo(written)


@app.command(epilog="Example: dgm represent runs/vae-digits")
def represent(
    run: RunFolder,
    data: Annotated[
        str | None, typer.Argument(metavar="DATA", help="A .npy file, or a data set; default: the run's test split.")
    ] = None,
    site: Annotated[
        str | None, typer.Option(help="Level of a hierarchy, such as z2; default: that nearest to x.")
    ] = None,
    num_data: Annotated[int, typer.Option(help="Use at most so many data, and so many training data.")] = 5000,
    path: Annotated[str, typer.Option(help="Of the interpolation: spherical or linear.")] = "spherical",
    seed: Seed = 0,
    device: Device = "auto",
    data_dir: DataDir = None,
    out: Annotated[Path | None, typer.Option(help="The map, a .png; default: RUN/representation.png.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """The code z of each datum, and what it is good for: a table, a map, pictures between and around codes, a .npy.

    Where the data have labels: a linear probe, nearest neighbors and clusters of z, beside those of x itself.
    """
    import json

    import dgm_pyro as dgm
    from dgm_pyro.experiments import plots, runs
    from dgm_pyro.families.labeled import Labeled
    from dgm_pyro.families.vae import VAE
    from dgm_pyro.program import check_count
    from dgm_pyro.training.fit import find_device
    from dgm_pyro.uses import representations

    check_count(num_data, "num_data")
    where, picture = find_device(device), _written_to(out, run / "representation.png")
    program, record = runs.read(run, where)
    place, source = data_dir or record.data_dir, data or record.data
    if isinstance(program, Labeled):
        representations.codes(program.program)  # or why there are none
        raise ValueError(
            f"{run} has a code for each class, and no map of all of them; in Python: "
            f"labeled = dgm.load({str(run)!r}); dgm.representations.encode(labeled.program, x, labeled.classify(x))"
        )
    x, y = _inputs(source, program, place)
    x, y = x[:num_data], None if y is None else y[:num_data]
    z = representations.encode(program, x, site=site, seed=seed)
    site, what = site or representations.codes(program)[0], f"{record.model} on {record.data}"
    table = {}
    if y is not None:
        train = dgm.data.load(record.data, data_dir=place)
        train = dgm.data.load(record.data, data_dir=place, num_data=min(num_data, len(train)), seed=seed)
        known = representations.encode(program, train.x, site=site, seed=seed)
        assert train.y is not None  # a data set has labels in both splits, or in none
        for name, (seen, unseen) in {site: (known, z), "x": (train.x, x)}.items():
            table[name] = representations.assess(seen, train.y, unseen, y, seed=seed)
    use = dgm.infer.units(program, x[:512], seed=seed) if isinstance(program, VAE) and len(x) > 1 else {}

    picture.parent.mkdir(parents=True, exist_ok=True)
    _save_array(picture.with_suffix(".npy"), z)
    figures = (
        {} if len(z) < 2 or z[0].numel() < 2 else {"": plots.latent_map(z, y, title=f"{site} of {len(z)} data, {what}")}
    )
    if len(program.event_shape) == 3 and not representations.is_discrete(program, site):
        figures |= _around_codes(program, x, z, site, path, use.get(site))
    written = [picture.with_suffix(".npy")]
    for name, figure in figures.items():
        written.append(picture.with_name(f"{picture.stem}{name}.png"))
        figure.savefig(written[-1])
    if as_json:
        numbers = {
            "run": str(run),
            "site": site,
            "num_data": len(z),
            "quality": {name: each.as_dict() for name, each in table.items()},
            "active": {name: int(each.active.sum()) for name, each in use.items()},
            "kl": {name: None if each.kl is None else each.kl.tolist() for name, each in use.items()},
        }
        typer.echo(json.dumps(numbers, indent=1))
        return
    typer.echo(f"{what}: {site} of {len(z)} data, {_size_of_code(program, z, site)}")
    for name, units in use.items():
        nats = "" if units.kl is None else f", {float(units.kl.sum()):.2f} nats in all"
        typer.echo(f"{name}: {int(units.active.sum())} of {len(units.active)} features active{nats}")
    if table:
        typer.echo(f"{'of':<6}{'linear probe':>18}{'5 neighbors':>18}{'clusters':>12}{'NMI':>8}{'ARI':>8}")
    for name, each in table.items():
        right = "".join(f"{f'{share:.3f} +- {each.stderr(share):.3f}':>18}" for share in (each.probe, each.knn))
        found = each.clusters
        typer.echo(f"{name:<6}{right}{found.accuracy:>12.3f}{found.nmi:>8.3f}{found.ari:>8.3f}")
    typer.echo(", ".join(map(str, written)))


def _size_of_code(program: Any, z: Tensor, site: str) -> str:
    from dgm_pyro.uses import representations

    size = z[0].numel()
    if not representations.is_discrete(program, site):
        return f"{size} features"
    prior = program.codes()[site]
    if z.shape[1:] == prior.event_shape and prior.levels == 2:
        return f"{size} bits, as their probabilities"
    values = z.shape[-1]
    if size == values:
        return f"a class among {values}, as its probabilities"
    return f"{size // values} codes of {values} values, as their probabilities"


def _around_codes(
    program: Program, x: Tensor, z: Tensor, site: str, path: str, units: Units | None
) -> dict[str, Figure]:
    """Pictures by the end of the file's name: between pairs of data, along single features, over the plane."""
    import torch

    from dgm_pyro.experiments import plots
    from dgm_pyro.uses import representations

    figures, levels, pairs = {}, program.levels, min(6, len(x) // 2)
    if site == representations.codes(program)[0] and pairs:
        a, b = x[:pairs], x[pairs : 2 * pairs]
        between = representations.interpolate(program, a, b, 8, path=path)
        rows = torch.cat([a[None].to(between), between, b[None].to(between)]).transpose(0, 1)
        labels = ("x", *("",) * 8, "x'")
        figures["-interpolation"] = plots.images(
            rows.flatten(0, 1), levels=levels, column_labels=labels, title=f"Between two data: {path} in {site}"
        )
    if units is not None:
        by_use = (units.variance if units.kl is None else units.kl).argsort(descending=True)[:8].tolist()
        values = (-3, -2, -1, 0, 1, 2, 3)
        moved = representations.traverse(program, z[:1], values, by_use, site=site)
        figures["-traversals"] = plots.images(
            moved.flatten(0, 1),
            levels=levels,
            row_labels=[f"{site}[{i}]" for i in by_use],
            column_labels=[str(value) for value in values],
            title="One feature moved at a time, the most used first",
        )
    if tuple(z.shape[1:]) == (2,) and site == representations.codes(program)[0]:
        plane = representations.grid(program)
        figures["-grid"] = plots.images(
            plane.flatten(0, 1), levels=levels, columns=plane.shape[1], title=f"What each {site} stands for"
        )
    return figures


def _inputs(source: str, program: Program, data_dir: str | None) -> tuple[Tensor, Tensor | None]:
    """The x of a .npy file, or of the test split of a data set with its labels, that fits the program."""
    import numpy as np
    import torch

    import dgm_pyro.data as datasets
    from dgm_pyro.checks import INTEGERS
    from dgm_pyro.evaluation import as_data

    if not source.endswith(".npy"):
        points = datasets.load(source, "test", data_dir=data_dir)
        if program.variable == "x":
            as_data(program, points)
        return points.x, points.y
    try:
        with Path(source).open("rb") as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"{source} is no array ({error}): write one with numpy.save") from error
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{source} holds {array.dtype}: save numbers")
    # torch reads neither foreign byte orders nor floats of more than 64 bits.
    native = np.dtype(np.float64) if array.dtype.kind == "f" else array.dtype.newbyteorder("=")
    x = torch.from_numpy(array.astype(native, order="C"))
    shape = program.event_shape if program.variable == "x" else program.given_shape or x.shape[1:]
    if x.dim() == len(shape) and len(shape) == 3 and shape[0] == 1:  # images without their channel
        x = x.unsqueeze(1)
    if x.is_floating_point():
        x = x.to(torch.get_default_dtype())
    elif x.dtype not in INTEGERS:
        x = x.long()
    if tuple(x.shape[1:]) != tuple(shape) or not len(x):
        raise ValueError(f"{source} has shape {tuple(array.shape)}, but the run takes (N, *{tuple(shape)})")
    if program.variable == "x":
        program.check(x)
    return x, None


def _save_array(path: Path, x: Tensor) -> None:
    """As a .npy file, which `_inputs` reads."""
    import io

    import numpy as np

    from dgm_pyro.checkpoint import write_file

    content = io.BytesIO()
    np.save(content, x.numpy())
    write_file(path, content.getvalue())


def _written_to(out: Path | None, default: Path) -> Path:
    path = out or default
    if path.suffix.lower() != default.suffix:
        raise ValueError(f"--out must end in {default.suffix}, got {path}")
    return path


@app.command("list", epilog="Example: dgm list")
def list_names() -> None:
    """List the models, data sets, priors, encoders, likelihoods and objectives, each with a line."""
    import dgm_pyro.data as data
    from dgm_pyro.catalog import ENCODERS, LIKELIHOODS, MODELS, PRIORS
    from dgm_pyro.objectives import COMPARISONS, OBJECTIVES

    def lines(table: dict[str, tuple[Any, str]]) -> dict[str, str]:
        return {name: line for name, (_, line) in table.items()}

    sections = {
        "models: dgm train MODEL": lines(MODELS),
        "data sets: --data": data.NAMES,
        "priors of a vae: --prior": lines(PRIORS),
        "encoders of a vae: --encoder": lines(ENCODERS),
        "likelihoods of a vae: --likelihood": lines(LIKELIHOODS),
        "objectives: --objective NAME or NAME:NUMBER": {
            name: (each.__doc__ or "").strip().splitlines()[0].rstrip(".")
            for name, each in (OBJECTIVES | COMPARISONS).items()
        },
    }
    for title, names in sections.items():
        typer.echo(title)
        for name, line in names.items():
            typer.echo(f"  {name:<22}{line}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``dgm``; its exit status."""
    from dgm_pyro.training.distributed import is_first_to_fail

    try:
        status = app(args=None if arguments is None else list(arguments), prog_name="dgm", standalone_mode=False)
        if status == INTERRUPTED:
            raise KeyboardInterrupt
        return status if isinstance(status, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", INTERRUPTED) if is_first_to_fail() else INTERRUPTED
    except Exception as error:
        if not is_first_to_fail():
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


def _expected() -> tuple[type[Exception], ...]:
    """What bad input raises; anything else is a bug, and shows its traceback."""
    from dgm_pyro.program import IntractableError
    from dgm_pyro.training.compilation import CompilationError
    from dgm_pyro.training.fit import NonFiniteLossError

    return ValueError, TypeError, OSError, CompilationError, IntractableError, NonFiniteLossError


def _is_of_memory(error: Exception) -> bool:
    import torch

    # On the CPU torch raises no class of its own.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def _fail(message: str, status: int) -> int:
    typer.echo("dgm: " + " ".join(message.split()), err=True)
    return status
