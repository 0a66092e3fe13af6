"""The command line: ``dgm tour``, ``train``, ``sample``, ``evaluate``, ``list``.

Whatever is wrong with the input ends in one line on stderr and a non-zero exit; ``dgm --debug`` shows the traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dgm_pyro.results import Result
    from dgm_pyro.training.fit import History

# Modules that take long to import are imported by the commands that need them.

app = typer.Typer(
    name="dgm",
    help="Deep generative models as probabilistic programs: train, question and compare them.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

INTERRUPTED = 130

Compile = Annotated[
    bool | None,
    typer.Option("--compile/--no-compile", help="Compile the steps; default: in trainings long enough to gain by it."),
]
Precision = Annotated[str, typer.Option(help="float32, or bf16: the networks under autocast.")]
Device = Annotated[str, typer.Option(help="auto (CUDA if there is one), cpu, cuda or cuda:N.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Same seed, same machine: same result.")]
DataDir = Annotated[
    str | None, typer.Option(help="Folder of data sets read from files; default: the environment variable DGM_DATA.")
]
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


@app.command(epilog="Example: dgm train vae --data digits --prior flow --epochs 60 --out runs/vae-flow")
def train(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model, such as vae or pixelcnn: see dgm list.")],
    data: Annotated[str, typer.Option(help="A data set: see dgm list.")] = "digits",
    data_dir: DataDir = None,
    num: Annotated[int | None, typer.Option(help="Use only this many training data.")] = None,
    prior: Annotated[str | None, typer.Option(help="Prior of a vae: see dgm list.")] = None,
    encoder: Annotated[str | None, typer.Option(help="Encoder of a vae: see dgm list.")] = None,
    likelihood: Annotated[str | None, typer.Option(help="Likelihood of a vae: see dgm list.")] = None,
    latent_size: Annotated[int | None, typer.Option(help="Number of latents of a vae.")] = None,
    labelled: Annotated[bool, typer.Option("--labelled", help="Build the generative classifier over MODEL.")] = False,
    objective: Annotated[str | None, typer.Option(help="What to maximise, such as iwae:50: see dgm list.")] = None,
    num_labels: Annotated[
        int | None, typer.Option(help="Keep only this many labels; for --labelled --objective semi-supervised:50.")
    ] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the data.")] = 50,
    batch_size: Annotated[int, typer.Option(help="Data per step.")] = 64,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 1e-3,
    weight_decay: Annotated[float, typer.Option(help="Decoupled weight decay.")] = 0.0,
    mutate: Annotated[
        float | None,
        typer.Option(help="Replace each feature by noise with this probability: a background for dgm anomaly."),
    ] = None,
    ema: Annotated[float | None, typer.Option(help="Decay of an average of the weights, such as 0.99.")] = None,
    validation: Annotated[float, typer.Option(help="Share of the data held out for validation; 0 for none.")] = 0.1,
    early_stopping: Annotated[int | None, typer.Option(help="Stop after this many epochs without gain.")] = None,
    compile: Compile = None,
    precision: Precision = "float32",
    seed: Seed = 0,
    device: Device = "auto",
    out: Annotated[Path | None, typer.Option(help="The run's folder; default: runs/MODEL-DATA.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the run's folder.")] = False,
) -> None:
    """Train a model and store the run: its program, options, history and learning curves.

    In several processes: torchrun --nproc-per-node=N -m dgm_pyro train MODEL ...; see docs/devices.md.
    """
    from dgm_pyro.experiments import runs
    from dgm_pyro.training import distributed

    processes = distributed.join(device)
    given = {"prior": prior, "encoder": encoder, "likelihood": likelihood, "latent_size": latent_size}
    swaps = {name: choice for name, choice in given.items() if choice is not None}
    name = f"{model}-{data}"
    folder = out or Path("runs") / name
    _, _, history = runs.train(
        folder,
        model,
        data,
        swaps,
        labelled=labelled,
        data_dir=data_dir,
        num=num,
        objective=objective,
        num_labels=num_labels,
        mutate=mutate,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        weight_decay=weight_decay,
        seed=seed,
        device=device,
        validation=validation,
        early_stopping=early_stopping,
        ema=ema,
        compile="auto" if compile is None else compile,
        precision=precision,
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


@app.command(epilog="Example: dgm sample runs/diffusion-digits -n 64 --label 3 --sampler dpm++ --steps 20")
def sample(
    run: RunFolder,
    num: Annotated[int, typer.Option("--num", "-n", help="How many.")] = 64,
    label: Annotated[int | None, typer.Option(help="Draw from p(x | this class); for runs trained --labelled.")] = None,
    sampler: Annotated[
        str | None, typer.Option(help="For diffusion: ancestral (the model itself), ddim, dpm++ or heun.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="For diffusion: use this many of its time steps.")] = None,
    spacing: Annotated[
        str | None, typer.Option(help="For diffusion: how the steps are spread: uniform, quadratic or karras.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="For diffusion trained --labelled: classifier-free guidance; 0 is the model.")
    ] = None,
    seed: Seed = 0,
    device: Device = "auto",
    out: Annotated[Path | None, typer.Option(help="The picture, a .png; default: RUN/samples.png.")] = None,
) -> None:
    """Draw samples: a picture, and the numbers beside it in a .npy file."""
    import torch

    from dgm_pyro.evaluation import evaluating
    from dgm_pyro.experiments import plots, runs
    from dgm_pyro.families.labelled import Labelled
    from dgm_pyro.program import seeded
    from dgm_pyro.training.fit import find_device

    where = find_device(device)
    picture = _written_to(out, run / "samples.png")
    program, record = runs.read(run, where)
    given = None if label is None else torch.tensor([label], device=where)
    options = {"sampler": sampler, "steps": steps, "spacing": spacing, "guidance": guidance}
    options = {name: value for name, value in options.items() if value is not None}
    if program.variable != "x":
        raise ValueError("this run holds a discriminative classifier: it knows p(y | x), and has no x to sample")
    if ("guidance" in options or label is not None) and not isinstance(program, Labelled):
        raise ValueError("--label and --guidance need a run with labels: train it with dgm train --labelled")
    with seeded(seed, where), evaluating(program):
        x = program.sample(num, given, **options).cpu()
    what = f"{record.model} on {record.data}" + ("" if label is None else f", class {label}")
    _save(picture, plots.samples(x, levels=program.levels, title=f"{num} samples of {what}"))
    runs.write_array(picture.with_suffix(".npy"), x)
    typer.echo(f"{picture} and {picture.with_suffix('.npy')}: {num} samples of {what}")


@app.command(epilog="Example: dgm impute runs/pixelcnn-digits --mask top -n 6")
def impute(
    run: RunFolder,
    mask: Annotated[
        str, typer.Option(help="What to hide: left, right, top, bottom, centre, or random:0.5 for a share.")
    ] = "left",
    num: Annotated[int, typer.Option("--num", "-n", help="How many draws for each datum.")] = 4,
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
        num,
        None if given is None else given.to(where),
        num_particles=num_particles,
        num_temperatures=num_temperatures,
        seed=seed,
        progress=_on_a_terminal(),
    ).cpu()
    what = f"{record.model} on {record.data}, {mask} hidden"
    _save(picture, plots.imputations(x, seen, drawn, levels=program.levels, title=what))
    runs.write_array(picture.with_suffix(".npy"), drawn)
    typer.echo(f"{picture} and {picture.with_suffix('.npy')}: {num} draws for each of {len(x)} data of {what}")


@app.command(
    epilog="Examples: dgm evaluate runs/vae-digits --num-particles 64 --json; dgm evaluate runs/continuous-moons --ode"
)
def evaluate(
    run: RunFolder,
    split: Annotated[str, typer.Option(help="train or test; valid where the data set has it.")] = "test",
    num_particles: Annotated[
        int, typer.Option(help="With latent variables: 1 for the ELBO, K for the tighter IWAE bound.")
    ] = 1,
    draws: Annotated[
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

    import dgm_pyro as dgm
    from dgm_pyro.experiments import runs
    from dgm_pyro.training.fit import find_device
    from dgm_pyro.uses import classification

    where = find_device(device)
    program, record = runs.read(run, where)
    points = dgm.data.load(record.data, split, data_dir=data_dir or record.data_dir)
    if draws is not None and (program.tractable or num_particles > 1 or ode):
        raise ValueError("--draws are those of an ELBO, but this evidence is none: leave it out")
    averaged: dict[str, Any] = {} if draws is None else {"draws": draws}
    shown = _on_a_terminal()
    evidence = dgm.evaluate(
        program, points, num_particles=num_particles, ode=ode, seed=seed, progress=shown, **averaged
    )
    of = "log p(x)" if program.variable == "x" else "log p(y | x)"
    numbers = {"run": str(run), "model": record.model, "split": split, "of": of} | evidence.as_dict()
    accuracy = None
    if isinstance(program, (dgm.Labelled, dgm.Discriminative)):
        assert points.y is not None
        probabilities, _ = classification.beliefs(program, points.x, progress=shown)
        numbers["accuracy"] = accuracy = classification.accuracy(probabilities, points.y)
    if as_json:
        typer.echo(json.dumps(numbers, indent=1))
        return
    known = "" if program.variable == "x" else f" of {of}, because it has no p(x)"
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
        points = dgm.data.load(data or "digits", data_dir=data_dir, num=64)
        diagnosis = dgm.doctor(build(target, points, **swaps), points)
    elif target.endswith(".py"):
        raise ValueError(f"{target} is a file: name what is in the file: {target}:MODEL,GUIDE")
    else:
        program, record = runs.read(target)
        points = dgm.data.load(data or record.data, data_dir=data_dir or record.data_dir, num=64)
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
def sweep(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model, such as vae: see dgm list.")] = "vae",
    data: Annotated[str, typer.Option(help="A data set: see dgm list.")] = "digits-binary",
    prior: Names = None,
    encoder: Names = None,
    likelihood: Names = None,
    objective: Names = None,
    seeds: Annotated[int, typer.Option(help="How many seeds, from 0.")] = 1,
    num: Annotated[int | None, typer.Option(help="Use only this many training data.")] = None,
    latent_size: Annotated[int | None, typer.Option(help="Number of latents of a vae.")] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the data.")] = 50,
    batch_size: Annotated[int, typer.Option(help="Data per step.")] = 64,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 1e-3,
    num_particles: Annotated[int, typer.Option(help="K of the IWAE bound that the table is sorted by.")] = 1000,
    compile: Compile = None,
    precision: Precision = "float32",
    jobs: Annotated[int, typer.Option(help="How many processes; they take the GPUs in turn, or share the cores.")] = 1,
    device: Device = "auto",
    data_dir: DataDir = None,
    out: Annotated[Path | None, typer.Option(help="The sweep's folder; default: sweeps/MODEL-DATA.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Train and evaluate every combination: a table, a heat map, CSV, and a run for each cell.

    The same command again goes on where it was killed; finished cells are kept, failed ones are tried again.
    """

    from dgm_pyro.experiments.sweep import Options
    from dgm_pyro.experiments.sweep import sweep as run_sweep

    compiling = "auto" if compile is None else compile
    options = Options(
        model, data, data_dir, num, latent_size, epochs, batch_size, lr, num_particles, device, compiling, precision
    )
    folder = out or Path("sweeps") / f"{model}-{data}"
    result = run_sweep(
        folder,
        options,
        prior=_names(prior),
        encoder=_names(encoder),
        likelihood=_names(likelihood),
        objective=_names(objective),
        seeds=seeds,
        jobs=jobs,
    )
    written = f"{folder}: table.md, table.csv, cells.csv, sweep.png; each cell is a run in {folder / 'cells'}"
    _show(result, as_json, "", {}, written)
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
        progress=_on_a_terminal(),
    )
    typer.echo(json.dumps(found.as_dict(), indent=1) if as_json else str(found))


@app.command(epilog="Example: dgm gaps runs/vae-digits runs/vae-iaf --num 64")
def gaps(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN ...", help="Runs of VAEs, one for each guide.")],
    num: Annotated[int, typer.Option(help="How many data, from the start of the split.")] = 64,
    split: Annotated[str, typer.Option(help="train or test; valid where the data set has it.")] = "test",
    num_particles: Annotated[int, typer.Option(help="K of the IWAE bound on log p(x).")] = 1000,
    num_temperatures: Annotated[
        int, typer.Option(help="Of annealed importance sampling; 0 leaves it out, as for discrete latents.")
    ] = 300,
    steps: Annotated[int, typer.Option(help="Of the search for the best q of the family.")] = 400,
    seed: Seed = 0,
    device: Device = "auto",
    data_dir: DataDir = None,
    out: Annotated[Path | None, typer.Option(help="The picture, a .png; default: RUN/gaps.png of the first.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Split log p(x) - ELBO into what the guide's family costs and what amortization costs; with pictures."""
    import json

    import dgm_pyro as dgm
    from dgm_pyro.checks import check_count, find_device
    from dgm_pyro.experiments import plots, runs

    check_count(num, "num")
    where, picture = find_device(device), _written_to(out, folders[0] / "gaps.png")
    found, loaded = {}, {folder: runs.read(folder, where) for folder in folders}
    for folder, (program, record) in loaded.items():
        points = dgm.data.load(record.data, split, data_dir=data_dir or record.data_dir)[:num].to(where)
        x, given, _ = program.arguments(points.x, points.y)
        found[folder] = dgm.infer.gaps(
            program,
            x,
            given,
            num_particles=num_particles,
            num_temperatures=num_temperatures,
            steps=steps,
            seed=seed,
            progress=_on_a_terminal(),
        )
        if not as_json:
            typer.echo(f"{folder} ({record.model} on {record.data}, {split})\n{found[folder]}")
        if program.event_shape[:1] == (1,) and len(program.event_shape) == 3:
            name = f"{picture.stem}-{folder.name}-worst" if len(folders) > 1 else f"{picture.stem}-worst"
            title = f"Worst explained by {folder.name}"
            worst = plots.worst_explained(found[folder], levels=program.levels, title=title)
            _save(picture.with_name(f"{name}.png"), worst)
    short = {folder.name for folder in found}
    names = {folder.name if len(short) == len(found) else str(folder): each for folder, each in found.items()}
    _save(picture, plots.gaps(names, title=f"Gaps on {record.data}, {len(points)} data"))
    if as_json:
        typer.echo(json.dumps({str(folder): each.as_dict() for folder, each in found.items()}, indent=1))
    else:
        typer.echo(f"{picture}: the gaps drawn")


@app.command(epilog="Example: dgm checks runs/vae-digits --num-simulations 1000")
def checks(
    run: RunFolder,
    num_simulations: Annotated[int, typer.Option(help="Pairs (z, x) simulated for calibration.")] = 500,
    num: Annotated[int, typer.Option(help="How many data the activity of units is measured on.")] = 512,
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

    import dgm_pyro as dgm
    from dgm_pyro.experiments import plots, runs
    from dgm_pyro.program import check_count
    from dgm_pyro.training.fit import find_device

    check_count(num, "num")
    where, picture = find_device(device), _written_to(out, run / "checks.png")
    program, record = runs.read(run, where)
    points = dgm.data.load(record.data, split, data_dir=data_dir or record.data_dir)[:num]
    report = dgm.infer.check(program, points, num_simulations=num_simulations, seed=seed)
    _save(picture, plots.calibration(report, title=f"The guide of {record.model} on {record.data}"))
    _show(report, as_json, "", {}, f"{picture}: rank histograms and the KL of each dimension")
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
    from dgm_pyro.checks import find_device
    from dgm_pyro.experiments import plots, runs
    from dgm_pyro.results import as_csv
    from dgm_pyro.uses.anomaly import detect

    where, picture = find_device(device), _written_to(out, run / "anomalies.png")
    program, record = runs.read(run, where)
    place = data_dir or record.data_dir
    x, _ = runs.inputs(data, program, place)
    found = detect(
        program,
        x,
        runs.inputs(normal or record.data, program, place)[0],
        _names(score),
        background=None if background is None else runs.read(background, where)[0],
        ensemble=[runs.read(folder, where)[0] for folder in _names(ensemble)],
        false_alarm_rate=false_alarm_rate,
        num_particles=num_particles,
        seed=seed,
        progress=_on_a_terminal(),
    )
    what, table = f"{record.model} on {record.data}", picture.with_suffix(".csv")
    _save(
        picture,
        plots.samples(
            x[found.ranked[:36]],
            levels=program.levels,
            title=f"Most anomalous for {what}, by {found.alarms[0].score}",
        ),
    )
    table.write_text(as_csv(found.records()), encoding="utf-8")
    written = f"{picture} and {table}: the most anomalous first"
    _show(found, as_json, f"{what}: ", {"run": str(run), "data": data}, written)


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
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """p(y | x) of each datum, log p(x), and whether to reject the answer: a CSV and a picture.

    A run trained --labelled rejects by log p(x); a discriminative one has only its highest p(y | x) to go by.
    """
    from dgm_pyro.checks import find_device
    from dgm_pyro.data import load
    from dgm_pyro.experiments import plots, runs
    from dgm_pyro.results import as_csv
    from dgm_pyro.uses.classification import answer

    where, table = find_device(device), _written_to(out, run / "classified.csv")
    program, record = runs.read(run, where)
    place = data_dir or record.data_dir
    x, _ = runs.inputs(data, program, place)
    reference = load(record.data, "test", data_dir=place)
    found = answer(
        program,
        x,
        reference.x,
        false_alarm_rate=false_alarm_rate,
        num_particles=num_particles,
        seed=seed,
        progress=_on_a_terminal(),
    )
    what, written = f"{record.model} on {record.data}", str(table)
    table.parent.mkdir(parents=True, exist_ok=True)
    table.write_text(as_csv(found.records()), encoding="utf-8")
    if x.dim() == 4 and x.shape[1] == 1:
        picture = table.with_suffix(".png")
        _save(
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
        str | None, typer.Argument(metavar="DATA", help="A .npy file, or a data set; default: the run's test split.")
    ] = None,
    site: Annotated[
        str | None, typer.Option(help="Level of a hierarchy, such as z2; default: that nearest to x.")
    ] = None,
    num: Annotated[int, typer.Option(help="Use at most so many data, and so many training data.")] = 5000,
    path: Annotated[str, typer.Option(help="Of the interpolation: spherical or linear.")] = "spherical",
    seed: Seed = 0,
    device: Device = "auto",
    data_dir: DataDir = None,
    out: Annotated[Path | None, typer.Option(help="The map, a .png; default: RUN/representation.png.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """The code z of each datum, and what it is good for: a table, a map, pictures between and around codes, a .npy.

    Where the data have labels: a linear probe, nearest neighbours and clusters of z, beside those of x itself.
    """
    import dgm_pyro as dgm
    from dgm_pyro.checks import check_count, find_device
    from dgm_pyro.experiments import plots, runs

    check_count(num, "num")
    where, picture = find_device(device), _written_to(out, run / "representation.png")
    program, record = runs.read(run, where)
    place = data_dir or record.data_dir
    if isinstance(program, dgm.Labelled):
        program.program.code_named()  # or why there is none
        raise ValueError(
            f"{run} has a code for each class, and no map of all of them; in Python: "
            f"labelled = dgm.load({str(run)!r}); dgm.representations.encode(labelled.program, x, labelled.classify(x))"
        )
    x, y = runs.inputs(data or record.data, program, place)
    points = dgm.Data(x[:num], None if y is None else y[:num], levels=program.levels)
    train = None
    if y is not None:
        train = dgm.data.load(record.data, data_dir=place)
        train = dgm.data.load(record.data, data_dir=place, num=min(num, len(train)), seed=seed)
    found = dgm.representations.represent(program, points, train, site=site, seed=seed, progress=_on_a_terminal())
    what, numbers = f"{record.model} on {record.data}", picture.with_suffix(".npy")
    title = f"{found.site} of {len(points)} data, {what}"
    figures = plots.representation(found, program, points.x, path=path, title=title)
    written = [numbers]
    for name, figure in figures.items():
        written.append(picture if name == "map" else picture.with_name(f"{picture.stem}-{name}.png"))
        _save(written[-1], figure)
    numbers.parent.mkdir(parents=True, exist_ok=True)
    runs.write_array(numbers, found.z)
    _show(found, as_json, f"{what}: ", {"run": str(run)}, ", ".join(map(str, written)))


def _on_a_terminal() -> bool:
    """Whether somebody sees the bars."""
    return sys.stderr.isatty()


def _save(path: Path, figure: Figure) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _show(found: Result, as_json: bool, before: str, facts: dict[str, Any], after: str) -> None:
    """Print what was found: as JSON, with the ``facts`` about it, or between two texts."""
    import json

    typer.echo(json.dumps(facts | found.as_dict(), indent=1) if as_json else f"{before}{found}\n{after}")


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
    try:
        status = app(args=None if arguments is None else list(arguments), prog_name="dgm", standalone_mode=False)
        if status == INTERRUPTED:
            raise KeyboardInterrupt
        return status if isinstance(status, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", INTERRUPTED) if _is_first_to_fail() else INTERRUPTED
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

    return ValueError, TypeError, OSError, CompilationError, IntractableError, NonFiniteLossError


def _is_of_memory(error: Exception) -> bool:
    import torch

    # On the CPU torch raises no class of its own.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def _fail(message: str, status: int) -> int:
    typer.echo("dgm: " + " ".join(message.split()), err=True)
    return status
