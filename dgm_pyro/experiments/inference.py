"""Inference on a user's Pyro model, from a file to a folder of results, for ``dgm infer``."""

from __future__ import annotations

import inspect
import io
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dgm_pyro.checks import warn
from dgm_pyro.diagnosis.messages import in_one_line
from dgm_pyro.experiments import plots
from dgm_pyro.experiments.runs import write_json
from dgm_pyro.experiments.targets import pair_from
from dgm_pyro.files import parsed_json, refuse_file, write_file, write_text
from dgm_pyro.infer.checks import Calibration, sbc
from dgm_pyro.infer.compare import GuideComparison, compare
from dgm_pyro.infer.draws import predictive_check
from dgm_pyro.posterior import Posterior

__all__ = ["arguments_in", "calibrate_into", "infer_into", "posterior_from"]

BINS = (20, 10, 5, 4, 2)


def posterior_from(target: str, data: str | Path | None = None) -> Posterior:
    """The posterior of the model that ``FILE.py:MODEL`` names.

    Args:
        target: ``FILE.py:MODEL`` or ``MODULE:MODEL``.
        data: a .json file with an object of the model's arguments by name; default the value or result of ``data`` in
            the same file. Names that the model does not take are left out.

    Raises:
        ValueError: the target names no model, the file has no such data, or the model raises an error or exits.
    """
    model, guide, args, kwargs = pair_from(target)
    if guide is not None:
        raise ValueError(f"{target!r} names a guide too: pass FILE.py:MODEL, and the guides by --guides")
    if data is not None:
        args, kwargs = (), arguments_in(model, Path(data))
    where = target if data is None else f"{target} with {data}"
    try:
        return Posterior(model, *args, **kwargs)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    except (Exception, SystemExit) as error:
        raise ValueError(f"{where} raises {type(error).__name__} when it is run: {in_one_line(error)}") from error


def arguments_in(model: Any, path: Path) -> dict[str, Any]:
    """The arguments of ``model`` that a .json file holds, as tensors.

    Raises:
        ValueError: the file is no JSON object, or lacks an argument; the message names both.
    """
    try:
        content = parsed_json(path)
    except ValueError as error:
        raise ValueError(f"{path} is no JSON file of data: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold an object of arguments by name, got a {type(content).__name__}")
    stated = model.forward if isinstance(model, torch.nn.Module) else model
    parameters = inspect.signature(stated).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    missing = [p.name for p in named if p.default is p.empty and p.name not in content]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(map(repr, missing))} of the model: it has {', '.join(content)}")
    every = any(p.kind == p.VAR_KEYWORD for p in parameters)
    names = content if every else [p.name for p in named if p.name in content]
    return {name: _as_tensor(content[name]) for name in names}


def _as_tensor(value: Any) -> Any:
    """Numbers and lists of numbers as tensors; anything else unchanged."""
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        return value


def infer_into(
    posterior: Posterior, out: str | Path, *, guides: Sequence[str], reference: Any = "nuts", **options: Any
) -> GuideComparison:
    """`dgm.infer.compare`, and a folder of the results.

    The folder gets ``table.json``, ``table.txt``, ``marginals.png``, ``k-hats.png``, and for each guide
    ``GUIDE.npz``, its draws of each latent with their log weights, ``GUIDE-pairs.png``, and ``GUIDE.pt``, the values of
    its parameters. Draws of a reference by NUTS are in ``reference.npz``, and their chains in ``traces.png``.
    Predictions of the prior and the posterior, where possible, are in ``prior-predictions.png`` and
    ``predictions.png``.

    Args:
        options: options of `dgm.infer.compare`.
    """
    folder = Path(out)
    refuse_file(folder, "the results are")  # better now than after the fits
    found = compare(posterior, guides=guides, reference=reference, **options)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "table.json", found.as_dict())
    write_text(folder / "table.txt", f"{found}\n")
    if found.rows:
        plots.write_picture(folder / "marginals.png", plots.marginals(found, title=repr(posterior)))
        plots.write_picture(folder / "k-hats.png", plots.k_hats(found, title=repr(posterior)))
    if found.chains is not None:
        _write_arrays(folder / "reference.npz", found.chains.samples)
        plots.write_picture(folder / "traces.png", plots.chains(found.chains, title=repr(posterior)))
    for row in found.rows:
        assert row.weighted.u is not None
        with torch.no_grad():
            values = posterior.constrain(row.weighted.u, deterministic=True)
        _write_arrays(folder / f"{row.name}.npz", {**values, "log_weights": row.weighted.log_weights})
        plots.write_picture(folder / f"{row.name}-pairs.png", plots.pairs(found, row.name, title=row.name))
        content = io.BytesIO()
        torch.save(row.guide.state_dict(), content)
        write_file(folder / f"{row.name}.pt", content.getvalue())
    if posterior.observed and not posterior.enumerated:
        for name, draws in (("prior-predictions", "prior"), ("predictions", found.draws())):
            if draws is not None and not (draws == "prior" and posterior.improper):
                _draw_predictions(folder / f"{name}.png", posterior, draws)
    return found


def _draw_predictions(path: Path, posterior: Posterior, draws: Any) -> None:
    """Draw a predictive check; a warning if the model has a density, but cannot be sampled."""
    try:
        checked = predictive_check(posterior, draws)
    except torch.OutOfMemoryError:
        raise
    except (NotImplementedError, RuntimeError) as error:
        warn(
            f"{path.name} is not drawn, because the model cannot be sampled: {in_one_line(error)}; in a .json file, "
            "1.0 is a real number and 1 an integer"
        )
    else:
        plots.write_picture(path, plots.predictions(checked, title=f"{checked.source} predictions"))


def calibrate_into(
    posterior: Posterior, out: str | Path, guides: Sequence[str], num_samples: int, **options: Any
) -> dict[str, Calibration]:
    """`dgm.infer.sbc` of each guide, and in a folder ``GUIDE-calibration.json`` and ``GUIDE-coverage.png``.

    Args:
        num_samples: number of simulations; the number of bins is such that each expects five of them.
        options: options of `dgm.infer.sbc`.
    """
    bins = next((bins for bins in BINS if num_samples >= 5 * bins), BINS[-1])
    found = {}
    for name in guides:
        found[name] = sbc(posterior, method=name, num_samples=num_samples, bins=bins, **options)
        write_json(Path(out) / f"{name}-calibration.json", found[name].as_dict())
        plots.write_picture(Path(out) / f"{name}-coverage.png", plots.coverage(found[name], title=name))
    return found


def _write_arrays(path: Path, arrays: dict[str, torch.Tensor]) -> None:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:  # numpy.savez has no array named file
        for name, value in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.save(file, value.detach().cpu().numpy())
    write_file(path, content.getvalue())
