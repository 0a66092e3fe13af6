"""The page of a tour: its table, its pictures, and what they mean in plain language."""

from __future__ import annotations

import dataclasses
import datetime
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from markupsafe import Markup
from torch import Tensor

from dgm_pyro.experiments import plots, report
from dgm_pyro.experiments.tour.comparison import ANOMALY_NOISE, FALSE_ALARMS, NOISE, NOISY, SHUFFLED
from dgm_pyro.experiments.tour.results import command, versions
from dgm_pyro.families.labeled import Labeled
from dgm_pyro.uses.corruptions import add_noise

if TYPE_CHECKING:
    from dgm_pyro.experiments.tour.comparison import ClassifierComparison
    from dgm_pyro.experiments.tour.results import StopResult, Tour

FAMILIES: dict[str, tuple[str, Markup, tuple[Markup, ...]]] = {
    "autoregressive": (
        "Autoregressive models",
        Markup("p(<i>x</i>) = ∏<sub>i</sub> p(<i>x</i><sub>i</sub> | <i>x</i><sub>&lt;i</sub>)"),
        (
            Markup(
                "<strong>How p(x) is represented.</strong> By the chain rule: the probability of a picture is the "
                "product of the probabilities of its pixels, each given those before it. One masked network computes "
                "all 64 conditionals at once. MADE masks the weights of a fully connected network; PixelCNN uses "
                "convolutions that see only the pixels above and to the left."
            ),
            Markup(
                "<strong>What it is good for.</strong> Exact densities: nothing is bounded or approximated. The price "
                "is sampling, which is sequential: 64 steps for 64 pixels, even if a cache makes each of them cheap. "
                "There are no latents, so there is no representation to probe."
            ),
        ),
    ),
    "flow": (
        "Normalizing flows",
        Markup(
            "p(<i>x</i>) = p<sub>Z</sub>(<i>z</i>) |det ∂<i>z</i> / ∂<i>x</i>|, &ensp; "
            "<i>z</i> = <i>f</i><sup> −1</sup>(<i>x</i>)"
        ),
        (
            Markup(
                "<strong>How p(x) is represented.</strong> By a change of variables: an invertible map, here made of "
                "monotone splines, takes the data to a simple distribution, and the determinant accounts for how it "
                "stretches space. A flow is a density on real numbers, and gray levels are integers, so each level is "
                "spread over its unit cell by a small learned program (variational dequantization). This makes the "
                "number a bound on the mass of the integers."
            ),
            Markup(
                "<strong>What it is good for.</strong> Densities of continuous data, exact and in one pass, and a "
                "latent z for every x without an encoder. It has as many latents as pixels, so it compresses nothing."
            ),
        ),
    ),
    "vae": (
        "Variational autoencoders",
        Markup("p(<i>x</i>) = ∫ p(<i>x</i> | <i>z</i>) p(<i>z</i>) d<i>z</i>"),
        (
            Markup(
                "<strong>How p(x) is represented.</strong> As an integral over 16 latents z that a decoder turns into "
                "pixels. The integral has no closed form: an encoder q(z | x) bounds it from below. The loss has two "
                "parts, shown apart: how well the pixels are reconstructed, and how many nats the latents cost (KL). "
                "The second program is the same, trained alike, with a flow in place of the Normal prior p(z)."
            ),
            Markup(
                "<strong>What it is good for.</strong> Representations: 16 numbers that say what digit it is, as the "
                "map of the latents shows. Samples take one pass. Pixels are independent given z, which leaves noise "
                "in the samples, unless the likelihood is an autoregressive program, too."
            ),
        ),
    ),
    "diffusion": (
        "Diffusion models",
        Markup(
            "p(<i>x</i><sub>0</sub>) = ∫ p(<i>x</i><sub>T</sub>) ∏<sub>t</sub> p(<i>x</i><sub>t−1</sub> | "
            "<i>x</i><sub>t</sub>) d<i>x</i><sub>1</sub> … d<i>x</i><sub>T</sub>"
        ),
        (
            Markup(
                "<strong>How p(x) is represented.</strong> As an integral over a chain that a fixed process destroys "
                "with noise, step by step, and a network learns to restore. Training looks at random steps of the "
                "chain; their expected loss is a bound on log p(x), the same kind of bound as the VAE's."
            ),
            Markup(
                "<strong>What it is good for.</strong> Samples: every step corrects the one before. The density is "
                "a bound, and a sample takes many passes, fewer with a sampler such as DDIM. The latents are noisy "
                "pictures as large as the data, so there is no representation to probe."
            ),
        ),
    ),
    "labeled": (
        "The generative classifier",
        Markup(
            "p(<i>x</i>) = ∑<sub>y</sub> p(<i>x</i> | <i>y</i>) p(<i>y</i>), &ensp; "
            "p(<i>y</i> | <i>x</i>) = p(<i>x</i> | <i>y</i>) p(<i>y</i>) / p(<i>x</i>)"
        ),
        (
            Markup(
                "<strong>How p(x) is represented.</strong> By the product and the sum rule: p(x | y), a MADE that is "
                "told the class y, times p(y), summed over the ten classes. Bayes’ rule turns the same program into a "
                "classifier."
            ),
            Markup(
                "<strong>What it is good for.</strong> It classifies, draws digits of a chosen class, and "
                "knows when a picture is unlike anything that it has seen, because it has a p(x)."
            ),
        ),
    ),
}

COLUMNS = (
    ("program", "What was trained. Gray rows are references, counted rather than trained.", False),
    (
        "bits/dim",
        "What a pixel of an unseen digit costs, in bits, on average over the test digits: −log₂ p(x) / 64. Lower is "
        "better. Guessing among 17 gray levels costs log₂ 17 = 4.09. After ± the standard error over the test digits.",
        True,
    ),
    (
        "kind",
        "exact: p(x) itself. elbo: a bound, so that the true number may be lower. iwae-K: the same bound made tighter "
        "by K draws of the latents for each digit.",
        False,
    ),
    (
        "AUROC shuffled",
        "How often log p(x) is higher for a test digit than for a digit whose pixels were shuffled: 0.5 is guessing, "
        "1 is always.",
        True,
    ),
    (
        "AUROC noise",
        f"The same for digits with Normal noise of standard deviation {ANOMALY_NOISE:g} gray levels, rounded: a fifth "
        "of the pixels moves by one level of 16, which the eye hardly sees.",
        True,
    ),
    (
        "probe",
        "Accuracy, on test digits, of a linear classifier that sees the latents only: a VAE’s mean of q(z | x), a "
        "flow’s z. Empty where there are no latents.",
        True,
    ),
    ("accuracy", "Share of the test digits that the program itself classifies correctly, where it can.", True),
    ("parameters", "How many numbers were learned or counted.", True),
    ("seconds", "Time of the training on this machine.", True),
)


def page_of(tour: Tour) -> report.Report:
    """The report of a tour, complete or not."""
    best = min(tour.models, key=lambda result: result.bits_per_dim, default=None)
    lead = "Deep generative models, trained on the same 8 x 8 digits, and asked the same questions."
    if best is not None:
        lead += f" {_capital(best.stop.title)} explains unseen digits best, at {best.bits_per_dim:.2f} bits per pixel."
    warnings = []
    if tour.quick:
        warnings.append("This is the quick tour: every program stopped early. The full tour takes about 5 minutes.")
    if not tour.complete:
        warnings.append(
            f"This tour is not complete: {len(tour.results)} of {len(tour.stops)} programs have results. "
            + " ".join(tour.failures)
        )
    return report.Report(
        title="Ways to represent p(x)",
        lead=lead,
        table=_table(tour),
        sections=[*_overview(tour), *_families(tour), *_classifiers(tour)],
        warnings=warnings,
        facts={
            "command": command(tour),
            "data": f"scikit-learn’s digits, {len(tour.train)} for training and {len(tour.test)} for testing, "
            "17 gray levels",
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            "seed": str(tour.seed),
            "device": f"{tour.device}, {torch.get_num_threads()} threads",
            "time": f"{time.perf_counter() - tour.started:.0f} s",
            "versions": ", ".join(f"{name} {number}" for name, number in versions().items()),
        },
        commands={
            "Draw more from a program of this tour:": f"dgm sample {tour.out}/checkpoints/generative-classifier "
            "-n 64 --label 3 --out threes.png",
            "Ask for a tighter bound:": f"dgm evaluate {tour.out}/checkpoints/vae --num-particles 500",
            "Train another composition:": "dgm train vae --prior ar --encoder iaf --epochs 60 --out runs/vae-ar",
            "See what there is to combine:": "dgm list",
        },
    )


DIGITS: dict[str, tuple[int, Callable[..., float | None]]] = {
    "bits/dim": (2, min),
    "AUROC shuffled": (3, max),
    "AUROC noise": (3, max),
    "probe": (2, max),
    "accuracy": (2, max),
}
"""Number of digits shown and the best value, for each measured column."""


def _table(tour: Tour) -> report.PageTable:
    rounded = [_rounded(result) for result in tour.results]
    best = _best([each for each, result in zip(rounded, tour.results, strict=True) if not result.stop.reference])
    rows = []
    for result, values in zip(tour.results, rounded, strict=True):
        cells = {
            name: report.TableCell(
                f"{value:.{DIGITS[name][0]}f}", strong=not result.stop.reference and value == best[name]
            )
            for name, value in values.items()
        }
        cells["program"] = report.TableCell(result.stop.title)
        cells["parameters"] = report.TableCell(f"{result.parameters:,}")
        if result.evidence is None:
            cells["bits/dim"] = report.TableCell("no p(x)")
        else:
            cells["bits/dim"] = dataclasses.replace(cells["bits/dim"], note=f"± {result.evidence.stderr:.2f}")
            cells["kind"] = report.TableCell(result.evidence.kind)
        if result.history.epochs:
            cells["seconds"] = report.TableCell(f"{result.history.seconds:.0f}")
        rows.append([cells.get(name, report.TableCell("")) for name, _, _ in COLUMNS])
    muted = frozenset(i for i, result in enumerate(tour.results) if result.stop.reference)
    return report.PageTable([report.Column(*column) for column in COLUMNS], rows, muted)


def _best(models: list[dict[str, float]]) -> dict[str, float | None]:
    """The best value of each column; None where most share it."""
    best: dict[str, float | None] = {}
    for name, (_, choose) in DIGITS.items():
        values = [each[name] for each in models if name in each]
        top = choose(values, default=None)
        best[name] = top if top is None or 2 * values.count(top) <= len(values) or len(values) == 1 else None
    return best


def _rounded(result: StopResult) -> dict[str, float]:
    """The measured values by column, as they are shown."""
    values = {
        "bits/dim": None if result.evidence is None else result.evidence.bits_per_dim,
        "AUROC shuffled": result.aurocs.get(SHUFFLED),
        "AUROC noise": result.aurocs.get(NOISY),
        "probe": result.probe,
        "accuracy": result.accuracy,
    }
    return {name: round(value, DIGITS[name][0]) for name, value in values.items() if value is not None}


def _overview(tour: Tour) -> Iterator[report.Section]:
    densities = [result for result in tour.results if result.evidence is not None]
    if not densities:
        return
    evidences = {result.stop.title: result.evidence for result in densities if result.evidence is not None}
    reference = tour.result("pixels-by-class")
    line = None if reference is None else reference.bits_per_dim
    beaten = [result for result in tour.models if line is not None and result.bits_per_dim < line]
    bits_title = "Bits per pixel of unseen digits"
    if tour.models and len(beaten) == len(tour.models):
        bits_title = "Every family explains digits better than counting does"
    area, of, kind = min(
        ((area, result.stop.title, kind) for result in densities for kind, area in result.aurocs.items()),
        default=(1.0, "", ""),
    )
    auroc_title = f"log p(x) tells digits from anomalies: AUROC {math.floor(100 * area) / 100:.2f} or more"
    if area < 0.9:
        notices = "Not every p(x) notices" if area < 0.6 else "p(x) notices least well"
        auroc_title = f"{notices}: {kind}, AUROC {area:.2f} for {of}"
    rows = [result for result in densities if result.samples is not None]
    pictures = [
        report.picture(
            "bits-per-dim",
            lambda: plots.bits_per_dim(
                evidences, reference=line, reference_label="counting pixels by class", title=bits_title
            ),
            alt="Bits per dimension of each program, as in the table.",
            caption="Bars are two standard errors. An open dot is an upper bound: the true number lies at it or to "
            "its left.",
        ),
        report.picture(
            "auroc",
            lambda: plots.aurocs({result.stop.title: result.aurocs for result in densities}, title=auroc_title),
            alt="Areas under the ROC curve of each program, as in the table.",
            caption="Anomaly detection: low p(x) means “unlike the training data”.",
        ),
        report.picture(
            "samples",
            lambda: plots.images(
                torch.cat([self_or_test[:10] for self_or_test in _sample_rows(tour, rows)]),
                levels=tour.test.levels,
                num_columns=10,
                row_labels=["test digits", *(result.stop.title for result in rows)],
                title="Ten samples of each program, not selected",
            ),
            alt="A row of ten samples for each program, under a row of test digits.",
            caption="The first row is real. Classifiers draw one digit of each class, 0 to 9.",
        ),
        report.picture(
            "anomalies",
            lambda: plots.images(
                torch.cat([tour.test.x[:10], *(x[:10] for x in tour.anomalies.values())]),
                levels=tour.test.levels,
                num_columns=10,
                row_labels=["test digits", *tour.anomalies],
                title="What counts as an anomaly",
            ),
            alt="Ten test digits, the same with shuffled pixels, the same with noise.",
            caption="The noise is hard to see: it moves a fifth of the pixels by one gray level of 16.",
        ),
    ]
    yield report.Section("All programs side by side", "overview", pictures=pictures)


def _sample_rows(tour: Tour, results: Sequence[StopResult]) -> list[Tensor]:
    return [tour.test.x, *(result.samples.to(tour.test.x.dtype) for result in results if result.samples is not None)]


def _families(tour: Tour) -> Iterator[report.Section]:
    for family, (title, formula, paragraphs) in FAMILIES.items():
        results = [result for result in tour.results if result.stop.family == family]
        if not results:
            continue
        parts = [_part(tour, result) for result in results]
        yield report.Section(title, family, formula, [*paragraphs, *_prior_verdict(tour, family)], parts=parts)


def _prior_verdict(tour: Tour, family: str) -> list[str]:
    """Whether the swapped prior paid, by the paired difference on the same digits."""
    normal, flow = (tour.result(name) for name in ("vae", "vae-flow"))
    if family != "vae" or normal is None or flow is None or normal.evidence is None or flow.evidence is None:
        return []
    nats, nats_error = normal.evidence.minus(flow.evidence)
    bits, error = (value / (normal.evidence.num_dims * math.log(2)) for value in (abs(nats), nats_error))
    if bits < 2 * error:
        return [f"Here both priors explain unseen digits equally well, within {2 * error:.3f} bits per pixel."]
    better, worse = ("Normal", "flow") if nats > 0 else ("flow", "Normal")
    verdict = (
        f"Here the {better} prior explains unseen digits better than the {worse} prior, by {bits:.3f} ± {error:.3f} "
    )
    verdict += "bits per pixel on the same digits."
    if better == "Normal":
        verdict += f" With {len(tour.train):,} digits to learn from, there is little for a more flexible prior to gain."
    return [verdict]


def _part(tour: Tour, result: StopResult) -> report.Section:
    return report.Section(
        _capital(result.stop.title),
        result.stop.name,
        paragraphs=[result_line(result) + "."],
        pictures=[*_pictures(tour, result)],
    )


def _pictures(tour: Tour, result: StopResult) -> Iterator[report.Picture]:
    name, title = result.stop.name, _capital(result.stop.title)
    if result.samples is not None:
        samples = result.samples
        labels = [str(y) for y in range(10)] if isinstance(result.program, Labeled) else []
        yield report.picture(
            f"{name}-samples",
            lambda: plots.images(
                samples,
                levels=tour.test.levels,
                num_columns=10,
                column_labels=labels,
                title=f"{title}: " + ("the class is on top" if labels else "samples"),
            ),
            alt=f"Forty samples of {title}.",
        )
    if result.scores and result.evidence is not None:
        scores = {"test digits": result.evidence.values, **result.scores}
        yield report.picture(
            f"{name}-scores",
            lambda: plots.score_histograms(scores, title=f"{title}: log p(x) of digits and of anomalies"),
            alt=f"Histograms of log p(x) under {title} for test digits, shuffled pixels and additive noise.",
        )
    if result.latents is not None and tour.test.y is not None:
        z, y, share = result.latents, tour.test.y, result.probe or 0.0
        yield report.picture(
            f"{name}-latents",
            lambda: plots.latent_map(z, y, title=f"{title}: a linear probe of z is right for {share:.0%}"),
            alt=f"The latents of the test digits under {title}, projected to the plane, colored by class.",
            caption=f"The pixels themselves, probed the same way: {tour.pixel_probe:.0%}." if tour.pixel_probe else "",
        )
    if result.history.epochs:
        history = result.history
        yield report.picture(
            f"{name}-learning",
            lambda: plots.learning_curves(
                history, title=f"{title}: best after epoch {history.best_epoch} of {len(history.epochs)}"
            ),
            alt=f"Training and validation loss of {title} over the epochs.",
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
    ringing = next((scale for scale, share in zip(NOISE, comparison.alarm, strict=True) if share > 0.95), NOISE[-1])
    pictures = [
        report.picture(
            "classifiers-noise",
            lambda: plots.curves(
                NOISE,
                panels,
                xlabel="standard deviation of the noise (gray levels of 16)",
                percent=tuple(panels),
                title=f"Accuracy falls faster than confidence; p(x) rings the alarm at a noise of {ringing:g}",
            ),
            alt="Accuracy and confidence of both classifiers, and the alarm on p(x), as noise grows.",
            caption="Confidence is the mean of the highest p(y | x). The alarm rings where log p(x) is lower than for "
            f"{1 - FALSE_ALARMS:.0%} of the clean digits.",
        ),
        report.picture(
            "reliability",
            lambda: plots.reliability(
                comparison.probabilities, comparison.labels, title="Under noise, is it right as often as it says?"
            ),
            alt="Accuracy against confidence of both classifiers, over all levels of noise.",
            caption="All levels of noise together. On the dotted line, a classifier that is 80% sure is right 80% of "
            "the time.",
        ),
        report.picture(
            "noise",
            lambda: plots.images(
                noisy.flatten(0, 1),
                levels=tour.levels,
                column_labels=[f"{scale:g}" for scale in NOISE],
                title="What that noise looks like",
            ),
            alt="Three digits under growing noise.",
            caption="On top, the standard deviation of the noise in gray levels.",
        ),
    ]
    yield report.Section(
        "Generative against discriminative",
        "classifiers",
        Markup(
            "p(<i>x</i>, <i>y</i>) = p(<i>x</i> | <i>y</i>) p(<i>y</i>) &ensp; against &ensp; p(<i>y</i> | <i>x</i>)"
        ),
        _verdict(comparison),
        pictures,
        [_part(tour, result) for result in tour.results if result.stop.family == "discriminative"],
    )


def _verdict(comparison: ClassifierComparison) -> list[str]:
    """Conclusions from the comparison, in words."""

    def said(name: str, i: int) -> str:
        return f"right for {comparison.accuracy[name][i]:.0%} and {comparison.confidence[name][i]:.0%} sure"

    middle = len(NOISE) // 2
    return [
        "A discriminative classifier models p(y | x) alone. Its probabilities of the ten classes sum to one whatever "
        "it is shown, so it cannot say “none of these”. The generative one gets its p(y | x) by Bayes’ rule, which has "
        "the same flaw, but on the way it computes p(x), which has not.",
        f"On clean digits the generative classifier is right for {comparison.accuracy['generative'][0]:.0%}, the "
        f"discriminative one for {comparison.accuracy['discriminative'][0]:.0%}. At a noise of {NOISE[middle]:g} gray "
        f"levels the generative one is {said('generative', middle)}, the discriminative one "
        f"{said('discriminative', middle)}; at {NOISE[-1]:g}, {said('generative', -1)} against "
        f"{said('discriminative', -1)}. Shown shuffled pixels, where there is no digit at all, they are "
        f"{comparison.shuffled['generative']:.0%} and {comparison.shuffled['discriminative']:.0%} sure.",
        "So being generative does not by itself make answers under noise better: p(x | y) was never fitted there. What "
        f"it gives is doubt. The alarm on p(x) rings for {comparison.alarm[1]:.0%} of the digits at a noise of "
        f"{NOISE[1]:g}, for {comparison.alarm[2]:.0%} at {NOISE[2]:g} and for {comparison.alarm[-1]:.0%} at "
        f"{NOISE[-1]:g}. The discriminative classifier has no such alarm.",
    ]


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
        parts.append(f"trained in {result.history.seconds:.0f} s")
    return ", ".join(parts)
