"""The page of a tour: its table and pictures. Their explanations are in templates/tour.j2."""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from markupsafe import Markup

from dgm_pyro.experiments import plots, report
from dgm_pyro.experiments.tour.comparison import ANOMALY_NOISE, FALSE_ALARMS, NOISE, NOISY, SHUFFLED
from dgm_pyro.experiments.tour.results import NUM_SHOWN, command, versions
from dgm_pyro.families.labeled import Labeled
from dgm_pyro.uses.classification import share_stderr
from dgm_pyro.uses.corruptions import add_noise

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dgm_pyro.experiments.tour.results import StopResult, Tour

# Families with a title, a formula and paragraphs in the template; references have none.
FAMILIES = ("autoregressive", "flow", "vae", "diffusion", "labeled")


def paragraphs(name: str, *values: Any) -> list[Markup]:
    """The paragraphs of the template's text ``name``, filled with ``values``."""
    text: str = getattr(report.environment().get_template("tour.j2").module, name)(*values)
    return [Markup(" ".join(part.split())) for part in text.split("\n\n") if part.strip()]


def words(name: str, *values: Any) -> Markup:
    """The template's text ``name`` of at most one paragraph, filled with ``values``."""
    return Markup("").join(paragraphs(name, *values))


def page_of(tour: Tour) -> report.Report:
    """The report of a tour, complete or not."""
    warnings = [words("quick_warning", tour)] if tour.quick else []
    if not tour.complete:
        warnings.append(words("incomplete_warning", tour))
    return report.Report(
        title=words("title"),
        lead=words("lead", tour, min(tour.models, key=lambda result: result.bits_per_dim, default=None), tour.counting),
        table=_results_table(tour),
        sections=[*_overview(tour), *_families(tour), *_classifiers(tour)],
        warnings=warnings,
        facts={
            "command": command(tour),
            "data": words("data", tour),
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            "seed": str(tour.seed),
            "device": f"{tour.device}, {torch.get_num_threads()} threads",
            "time": f"{time.perf_counter() - tour.started:.0f} s",
            "versions": ", ".join(f"{name} {number}" for name, number in versions().items()),
        },
        commands={
            words("sample_command"): f"dgm sample {tour.out}/checkpoints/generative-classifier -n 64 --class 3 "
            "--out threes.png",
            words("evaluate_command"): f"dgm evaluate {tour.out}/checkpoints/vae --num-particles 500",
            words("train_command"): f"dgm train vae --data {tour.plan.data} --prior flow --out runs/vae-flow",
            words("list_command"): "dgm list",
        },
    )


def _columns(tour: Tour) -> list[report.Column]:
    return [
        report.Column("program", words("column_program")),
        report.Column("bits/dim", words("column_bits", tour, math.log2(tour.levels)), numeric=True),
        report.Column("kind", words("column_kind")),
        report.Column("AUROC shuffled", words("column_shuffled"), numeric=True),
        report.Column("AUROC noise", words("column_noise", ANOMALY_NOISE), numeric=True),
        report.Column("probe", words("column_probe"), numeric=True),
        report.Column("accuracy", words("column_accuracy"), numeric=True),
        report.Column("parameters", words("column_parameters"), numeric=True),
        report.Column("seconds", words("column_seconds"), numeric=True),
    ]


DIGITS: dict[str, tuple[int, Callable[..., float | None]]] = {
    "bits/dim": (2, min),
    "AUROC shuffled": (3, max),
    "AUROC noise": (3, max),
    "probe": (2, max),
    "accuracy": (2, max),
}
"""Number of digits shown and the best value, for each measured column."""


def _results_table(tour: Tour) -> report.PageTable:
    measured = [_measured(result, len(tour.test)) for result in tour.results]
    models = [each for each, result in zip(measured, tour.results, strict=True) if not result.stop.reference]
    best = _best_values([{name: value for name, (value, _) in each.items()} for each in models])
    columns, rows = _columns(tour), []
    for result, found in zip(tour.results, measured, strict=True):
        cells = {
            name: report.TableCell(
                f"{value:.{DIGITS[name][0]}f}",
                _error_note(error, DIGITS[name][0]),
                strong=not result.stop.reference and value == best[name],
            )
            for name, (value, error) in found.items()
        }
        cells["program"] = report.TableCell(result.stop.title)
        cells["parameters"] = report.TableCell(f"{result.parameters:,}")
        if result.evidence is None:
            cells["bits/dim"] = report.TableCell("no p(x)")
        else:
            cells["kind"] = report.TableCell(result.evidence.kind)
        if result.history.epochs:
            cells["seconds"] = report.TableCell(f"{result.history.seconds:.0f}")
        rows.append([cells.get(column.name, report.TableCell("")) for column in columns])
    muted = frozenset(i for i, result in enumerate(tour.results) if result.stop.reference)
    return report.PageTable(columns, rows, muted)


def _error_note(error: float, digits: int) -> str:
    """The error in small print; nothing where it rounds to 0."""
    return f"± {error:.{digits}f}" if error >= 0.5 * 10**-digits else ""


def _best_values(models: list[dict[str, float]]) -> dict[str, float | None]:
    """The best value of each column; None if most rows have it."""
    best: dict[str, float | None] = {}
    for name, (_, choose) in DIGITS.items():
        values = [each[name] for each in models if name in each]
        top = choose(values, default=None)
        best[name] = top if top is None or 2 * values.count(top) <= len(values) or len(values) == 1 else None
    return best


def _measured(result: StopResult, num_test: int) -> dict[str, tuple[float, float]]:
    """The measured values, rounded as they are shown, and their standard errors over the test data, by column."""
    found: dict[str, tuple[float, float]] = {}
    if result.evidence is not None:
        found["bits/dim"] = result.evidence.bits_per_dim, result.evidence.stderr
    for name, kind in (("AUROC shuffled", SHUFFLED), ("AUROC noise", NOISY)):
        if kind in result.separations:
            found[name] = result.separations[kind].auroc, result.separations[kind].stderr
    for name, share in (("probe", result.probe), ("accuracy", result.accuracy)):
        if share is not None:
            found[name] = share, share_stderr(share, num_test)
    return {name: (round(value, DIGITS[name][0]), error) for name, (value, error) in found.items()}


def _picture(
    name: str, draw: Callable[[], Figure], text: str, *values: Any, caption: Markup | str = ""
) -> report.Picture:
    """A picture, with the template's ``text``_alt in its place."""
    return report.picture(name, draw, alt=words(f"{text}_alt", *values), caption=caption)


def _overview(tour: Tour) -> Iterator[report.Section]:
    densities = [result for result in tour.results if result.evidence is not None]
    if not densities:
        return
    evidences = {result.stop.title: result.evidence for result in densities if result.evidence is not None}
    line, label = None, ""
    if tour.counting is not None:
        line, label = tour.counting.bits_per_dim, words("bits_reference", tour.counting.stop.title)
    beaten = [result for result in tour.models if line is not None and result.bits_per_dim < line]
    bits_title = words("bits_title", bool(tour.models) and len(beaten) == len(tour.models))
    lowest = min(
        ((area, result.stop.title, kind) for result in densities for kind, area in result.aurocs.items()),
        default=(1.0, "", ""),
    )
    rows = {result.stop.title: result.samples for result in densities if result.samples is not None}
    test = tour.test.x[:NUM_SHOWN]
    pictures = [
        _picture(
            "bits-per-dim",
            lambda: plots.bits_per_dim(evidences, reference=line, reference_label=label, title=bits_title),
            "bits",
            caption=words("bits_caption"),
        ),
        _picture(
            "auroc",
            lambda: plots.aurocs(
                {result.stop.title: result.aurocs for result in densities}, title=words("auroc_title", *lowest)
            ),
            "auroc",
            caption=words("auroc_caption"),
        ),
        _picture(
            "samples",
            lambda: plots.images(
                torch.cat([test, *(samples[:NUM_SHOWN].to(test.dtype) for samples in rows.values())]),
                levels=tour.test.levels,
                num_columns=NUM_SHOWN,
                row_labels=["test digits", *rows],
                title=words("samples_title"),
            ),
            "samples",
            caption=words("samples_caption"),
        ),
        _picture(
            "anomalies",
            lambda: plots.images(
                torch.cat([test, *(x[:NUM_SHOWN] for x in tour.anomalies.values())]),
                levels=tour.test.levels,
                num_columns=NUM_SHOWN,
                row_labels=["test digits", *tour.anomalies],
                title=words("anomalies_title"),
            ),
            "anomalies",
            caption=words("anomalies_caption"),
        ),
    ]
    yield report.Section(words("overview_title"), "overview", pictures=pictures)


def _families(tour: Tour) -> Iterator[report.Section]:
    for family in FAMILIES:
        results = [result for result in tour.results if result.stop.family == family]
        if results:
            yield report.Section(
                words(f"{family}_title"),
                family,
                words(f"{family}_formula"),
                [*paragraphs(family, tour), *(_priors(tour) if family == "vae" else [])],
                parts=[_stop_section(tour, result) for result in results],
            )


def _priors(tour: Tour) -> list[Markup]:
    """Whether the other prior is better, by the paired difference on the same digits."""
    normal, flow = (tour.result(name) for name in ("vae", "vae-flow"))
    if normal is None or flow is None or normal.evidence is None or flow.evidence is None:
        return []
    nats, nats_error = normal.evidence.minus(flow.evidence)
    bits, error = (value / (normal.evidence.num_dims * math.log(2)) for value in (abs(nats), nats_error))
    better, worse = ("Normal", "flow") if nats > 0 else ("flow", "Normal")
    return paragraphs("priors", better, worse, bits, error, len(tour.train))


def _stop_section(tour: Tour, result: StopResult) -> report.Section:
    return report.Section(
        _capital(result.stop.title),
        result.stop.name,
        Markup(result.program.formula().html()),
        [result_line(result) + "."],
        [*_pictures(tour, result)],
    )


def _pictures(tour: Tour, result: StopResult) -> Iterator[report.Picture]:
    name, title = result.stop.name, _capital(result.stop.title)
    if result.samples is not None:
        samples = result.samples
        labels = [str(y) for y in range(tour.num_classes)] if isinstance(result.program, Labeled) else []
        yield _picture(
            f"{name}-samples",
            lambda: plots.images(
                samples,
                levels=tour.test.levels,
                num_columns=tour.num_classes,
                column_labels=labels,
                title=words("program_samples_title", title, bool(labels)),
            ),
            "program_samples",
            title,
        )
    if result.reconstructions is not None:
        reconstructions = result.reconstructions
        yield _picture(
            f"{name}-reconstructions",
            lambda: plots.images(
                torch.cat([tour.test.x[: len(reconstructions)], reconstructions]),
                levels=tour.test.levels,
                num_columns=len(reconstructions),
                row_labels=["x", "from z"],
                title=words("program_reconstructions_title", title),
            ),
            "program_reconstructions",
            title,
            caption=words("program_reconstructions_caption"),
        )
    if result.scores and result.evidence is not None:
        scores = {"test digits": result.evidence.values, **result.scores}
        yield _picture(
            f"{name}-scores",
            lambda: plots.score_histograms(scores, title=words("program_scores_title", title)),
            "program_scores",
            title,
        )
    if result.latents is not None and tour.test.y is not None:
        z, y, share = result.latents, tour.test.y, result.probe or 0.0
        yield _picture(
            f"{name}-latents",
            lambda: plots.latent_map(z, y, title=words("program_latents_title", title, share)),
            "program_latents",
            title,
            caption=words("program_latents_caption", tour.pixel_probe),
        )
    if result.history.epochs:
        history = result.history
        yield _picture(
            f"{name}-learning",
            lambda: plots.learning_curves(history, title=words("program_learning_title", title, history)),
            "program_learning",
            title,
        )


def _classifiers(tour: Tour) -> Iterator[report.Section]:
    comparison = tour.comparison
    if comparison is None:
        return
    shown = [7, 20, 33]
    noisy = torch.stack([add_noise(tour.test.x, scale, tour.levels, tour.seed)[shown] for scale in NOISE], 1)
    panels = {
        "accuracy": comparison.accuracy,
        "confidence": comparison.confidence,
        "alarm on p(x)": {"generative": comparison.alarm},
    }
    alarmed = next((scale for scale, share in zip(NOISE, comparison.alarm, strict=True) if share > 0.95), NOISE[-1])
    pictures = [
        _picture(
            "classifiers-noise",
            lambda: plots.curves(
                NOISE, panels, xlabel=words("noise_axis"), percent=tuple(panels), title=words("noise_title", alarmed)
            ),
            "noise",
            caption=words("noise_caption", FALSE_ALARMS),
        ),
        _picture(
            "reliability",
            lambda: plots.reliability(comparison.probabilities, comparison.y, title=words("reliability_title")),
            "reliability",
            caption=words("reliability_caption"),
        ),
        _picture(
            "noise",
            lambda: plots.images(
                noisy.flatten(0, 1),
                levels=tour.levels,
                column_labels=[f"{scale:g}" for scale in NOISE],
                title=words("noisy_title"),
            ),
            "noisy",
            caption=words("noisy_caption"),
        ),
    ]
    yield report.Section(
        words("classifiers_title"),
        "classifiers",
        words("classifiers_formula"),
        paragraphs("classifiers", comparison, NOISE),
        pictures,
        [_stop_section(tour, result) for result in tour.results if result.stop.family == "discriminative"],
    )


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def result_line(result: StopResult) -> str:
    """The numbers of a result in one line."""
    parts = [] if result.evidence is None else [
        f"{result.evidence.bits_per_dim:.3f} ± {result.evidence.stderr:.3f} bits/dim ({result.evidence.kind})"
    ]  # fmt: skip
    if result.accuracy is not None:
        parts.append(f"accuracy {result.accuracy:.3f}")
    if result.history.epochs:
        earlier = "earlier " if result.kept else ""
        parts.append(f"trained {earlier}in {result.history.seconds:.1f} s")
    return ", ".join(parts)
