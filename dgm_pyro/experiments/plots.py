"""Pictures of programs and their results: each function takes tensors or results, and returns a matplotlib Figure.

Figures are made for a narrow column, so they stay readable on a phone, in a light and a dark theme. They do not use
pyplot, so there is no global state and nothing has to be closed.

>>> import torch
>>> from dgm_pyro.experiments import plots
>>> with plots.theme("dark"):
...     figure = plots.images(torch.randint(17, (12, 1, 8, 8)), levels=17, title="Noise")
>>> len(figure.axes)
1

Series have the colors of Okabe and Ito (2008), and classes those of Petroff (2021, arXiv 2107.02270). Both can be
distinguished without full color vision, and no picture relies on color alone.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import textwrap
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib
import numpy as np
import torch
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap, ListedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

from dgm_pyro.checks import (
    check_choice,
    check_count,
    check_counts,
    check_dense,
    check_finite,
    check_labels,
    check_network_options,
    check_number,
    check_tensor,
    check_type,
)
from dgm_pyro.evaluation import Evidence
from dgm_pyro.files import write_file
from dgm_pyro.infer.checks import Calibration, Checks
from dgm_pyro.infer.compare import GuideComparison
from dgm_pyro.infer.draws import PredictiveCheck
from dgm_pyro.infer.gaps import Gaps
from dgm_pyro.infer.mcmc import Chains
from dgm_pyro.program import Program, check_program
from dgm_pyro.results import element_name
from dgm_pyro.training.fit import History
from dgm_pyro.uses.classification import reliability as bins_of_answers
from dgm_pyro.uses.representations import CURVES, Representation, codes, grid, interpolate, is_discrete, traverse

__all__ = [
    "Theme",
    "answers",
    "aurocs",
    "bits_per_dim",
    "by_column",
    "calibration",
    "chains",
    "coverage",
    "curves",
    "gaps",
    "heat_map",
    "images",
    "imputations",
    "is_picture",
    "k_hats",
    "latent_map",
    "learning_curves",
    "marginals",
    "pairs",
    "photographs",
    "plane",
    "predictions",
    "reliability",
    "representation",
    "samples",
    "score_histograms",
    "table_of_features",
    "theme",
    "worst_explained",
    "write_picture",
]

WIDTH = 4.3
"""Width of every figure, in inches: on a phone of 360 pixels, its text is 10 pixels high."""

DPI = 200


@dataclass(frozen=True)
class Theme:
    """Colors: ``paper`` behind everything, ``ink`` for text, ``muted`` for axes, ``rule`` for grid lines.

    ``photographs`` is whether gray images are drawn from black to white; by default they are ink on paper.
    """

    paper: str
    ink: str
    muted: str
    rule: str
    series: tuple[str, ...]
    classes: tuple[str, ...]
    photographs: bool = False

    @property
    def gray(self) -> Colormap:
        """Color map from paper (nothing) to ink (everything)."""
        return LinearSegmentedColormap.from_list("gray", [self.paper, self.ink])

    @property
    def pixels(self) -> Colormap:
        """Color map of gray images."""
        return LinearSegmentedColormap.from_list("pixels", ["black", "white"]) if self.photographs else self.gray

    @property
    def heat(self) -> Colormap:
        """Color map from paper (no density) over the first series color to ink."""
        return LinearSegmentedColormap.from_list("heat", [self.paper, self.series[0], self.ink])

    @property
    def rc(self) -> Any:
        """The settings of matplotlib."""
        return {
            "figure.facecolor": self.paper,
            "savefig.facecolor": self.paper,
            "axes.facecolor": self.paper,
            "axes.edgecolor": self.muted,
            "axes.labelcolor": self.ink,
            "axes.prop_cycle": cycler(color=self.series),
            "text.color": self.ink,
            "xtick.color": self.muted,
            "ytick.color": self.muted,
            "xtick.labelcolor": self.ink,
            "ytick.labelcolor": self.ink,
            "grid.color": self.rule,
        } | TYPOGRAPHY


TYPOGRAPHY: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.labelsize": 9,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.linewidth": 0.8,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handlelength": 1.4,
    "figure.dpi": DPI,
    "savefig.dpi": DPI,
}

_PETROFF = (
    "#3f90da",
    "#ffa90e",
    "#bd1f01",
    "#94a4a2",
    "#832db6",
    "#a96b59",
    "#e76300",
    "#b9ac70",
    "#717581",
    "#92dadd",
)

THEMES = {
    "light": Theme(
        paper="#ffffff",
        ink="#1c2024",
        muted="#697177",
        rule="#e6e8eb",
        series=("#0072b2", "#d55e00", "#009e73", "#b0588c", "#b77f00", "#3a95cf"),
        classes=_PETROFF,
    ),
    "dark": Theme(
        paper="#17191c",
        ink="#e8eaed",
        muted="#9ba1a6",
        rule="#33373b",
        series=("#56b4e9", "#ff8a3d", "#2bbf93", "#e29ac2", "#e6b13c", "#8fcbf0"),
        classes=(
            "#5aa5ea",
            "#ffb636",
            "#ef5b45",
            "#a9b8b6",
            "#b673e6",
            "#c98b78",
            "#ff8433",
            "#cdc084",
            "#9297a5",
            "#92dadd",
        ),
    ),
}

_theme: ContextVar[Theme] = ContextVar("theme", default=THEMES["light"])


def write_picture(path: Path, figure: Figure) -> None:
    """Write a figure as a .png file, in one step; its folder is made if needed."""
    content = io.BytesIO()
    figure.savefig(content, format="png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, content.getvalue())


@contextlib.contextmanager
def _drawing_in(chosen: Theme) -> Iterator[Theme]:
    token = _theme.set(chosen)
    try:
        yield chosen
    finally:
        _theme.reset(token)


@contextlib.contextmanager
def theme(name: str) -> Iterator[Theme]:
    """Draw the figures made inside in the theme ``name``, "light" or "dark".

    Raises:
        ValueError: there is no such theme.
    """
    check_choice(name, THEMES, "theme")
    with _drawing_in(replace(THEMES[name], photographs=_theme.get().photographs)) as chosen:
        yield chosen


@contextlib.contextmanager
def photographs() -> Iterator[None]:
    """Draw the gray images in the figures made inside as photographs: 0 is black and the highest value white."""
    with _drawing_in(replace(_theme.get(), photographs=True)):
        yield


P = ParamSpec("P")


def _styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    @functools.wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.rc_context(_theme.get().rc):
            return draw(*args, **kwargs)

    return styled


LINE = 54
"""Number of characters of a title that fit the width."""


def _figure(height: float, title: str) -> Figure:
    """A figure with ``height`` below its title, which is wrapped into as many lines as needed."""
    lines = textwrap.wrap(title, LINE)
    figure = Figure(figsize=(WIDTH, height + 0.17 * len(lines)), layout="constrained")
    if lines:
        figure.suptitle("\n".join(lines), x=0.012, ha="left", size=9, weight="bold", linespacing=1.3)
    return figure


# -- samples -----------------------------------------------------------------------------------------------------------


def is_picture(x: Tensor) -> bool:
    """Whether x are images, ``(N, C, H, W)``, that can be drawn: gray or RGB."""
    return x.dim() == 4 and x.shape[1] in (1, 3)


def _pixel_values(x: Tensor, levels: int | None) -> np.ndarray:
    """Images in matplotlib's form: ``(N, H, W, C)`` between 0 and 1."""
    values = x.detach().cpu().double().numpy().transpose(0, 2, 3, 1)
    low, high = (0, levels - 1) if levels else (values.min(), values.max())
    shades: np.ndarray = ((values - low) / (high - low or 1)).clip(0, 1)
    return shades


@_styled
def images(
    x: Tensor,
    *,
    levels: int | None = None,
    num_columns: int | None = None,
    title: str = "",
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    covered: Tensor | None = None,
) -> Figure:
    """A grid of images.

    With one channel, 0 has the color of the paper, and the highest value that of ink. Within `photographs`, 0 is black
    and the highest value white.

    Args:
        x: ``(N, 1, H, W)``, or ``(N, 3, H, W)`` in red, green and blue; row by row.
        levels: x holds the integers 0 .. levels - 1; None for reals, which are scaled between their extremes.
        num_columns: images per row; default about the number of rows, or one per column label.
        title: title of the figure.
        row_labels, column_labels: labels on the left and on top.
        covered: bool, of the shape of x: covered pixels, which are drawn in a separate color.

    Raises:
        ValueError: x is not a batch of images with one or three channels.
    """
    check_finite(x, "x")
    check_network_options(levels=levels)
    if num_columns is not None:
        check_count(num_columns, "num_columns")
    if covered is not None:
        check_tensor(covered, x.shape[1:], "covered", "the shape of one x")
    if not is_picture(x) or len(x) == 0:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, but images are (N, 1, H, W) or (N, 3, H, W), with N at least 1"
        )
    num_columns = num_columns or len(column_labels) or math.ceil(math.sqrt(len(x)))
    rows = math.ceil(len(x) / num_columns)
    height, width = x.shape[2:]
    gap = max(1, round(min(height, width) / 8))
    values = _pixel_values(x, levels)
    paper = np.array([np.nan] if x.shape[1] == 1 else to_rgb(_theme.get().paper))
    mosaic = np.tile(paper, (rows * (height + gap) - gap, num_columns * (width + gap) - gap, 1))
    for i, picture in enumerate(values):
        top, left = (i // num_columns) * (height + gap), (i % num_columns) * (width + gap)
        mosaic[top : top + height, left : left + width] = picture

    margin = 0.075 * max((len(label) for label in row_labels), default=0)
    across = WIDTH - margin - 0.1
    down = across * mosaic.shape[0] / mosaic.shape[1]
    lines = textwrap.wrap(title, LINE)
    total = down + 0.17 * len(lines) + 0.12 * bool(lines) + 0.22 * bool(column_labels) + 0.1
    figure = Figure(figsize=(WIDTH, total))
    axes = figure.add_axes((margin / WIDTH + 0.01, 0.05 / total, across / WIDTH, down / total))
    colors = _theme.get().pixels.with_extremes(bad=_theme.get().paper)
    # A frame of paper and ink, so that the outline of a blank image is visible too.
    axes.imshow(mosaic, cmap=colors, vmin=0, vmax=1, interpolation="nearest")
    cover = ListedColormap([_theme.get().series[5]])
    for i in range(len(values)):
        top, left = (i // num_columns) * (height + gap), (i % num_columns) * (width + gap)
        if covered is not None and bool(covered[i].any()):
            shade = np.where(covered[i].any(0).cpu().numpy(), 1.0, np.nan)
            box = (left - 0.5, left + width - 0.5, top + height - 0.5, top - 0.5)
            axes.imshow(shade, cmap=cover, extent=box, interpolation="nearest")
        axes.add_patch(
            Rectangle((left - 0.5, top - 0.5), width, height, fill=False, edgecolor=_theme.get().rule, linewidth=0.6)
        )
    axes.set(xlim=(-0.5, mosaic.shape[1] - 0.5), ylim=(mosaic.shape[0] - 0.5, -0.5))
    axes.set_axis_off()
    for i, label in enumerate(row_labels):
        axes.text(-gap, i * (height + gap) + height / 2 - 0.5, label, ha="right", va="center", size=8.5)
    for i, label in enumerate(column_labels):
        axes.text(i * (width + gap) + width / 2 - 0.5, -gap, label, ha="center", va="bottom", size=8.5)
    figure.text(0.012, 1 - 0.06 / total, "\n".join(lines), ha="left", va="top", weight="bold", size=9, linespacing=1.3)
    return figure


@_styled
def plane(
    samples: Tensor | None = None,
    *,
    log_density: Callable[[Tensor], Tensor] | None = None,
    title: str = "",
    limits: tuple[float, float] | None = None,
    resolution: int = 150,
) -> Figure:
    """Points of the plane, over a density if one is passed.

    Args:
        samples: ``(N, 2)``.
        log_density: a function from points ``(M, 2)`` to log p in nats, ``(M,)``, such as a program's `log_prob`.
        title: title of the figure.
        limits: limits of both axes; default those of the samples, or (-4, 4).
        resolution: points per axis at which the density is evaluated.

    Raises:
        ValueError: there is nothing to draw, or the samples are not points of the plane.
    """
    if samples is None and log_density is None:
        raise ValueError("there is nothing to draw: pass samples, log_density, or both")
    if samples is not None:
        check_finite(samples, "samples")
    if log_density is not None and not callable(log_density):
        raise TypeError(f"log_density must be a function of points, got {type(log_density).__name__}")
    if limits is not None:
        check_type(limits, Sequence, "limits", "a pair of numbers")
        if len(limits) != 2 or not limits[0] < limits[1]:
            raise ValueError(f"limits must be two numbers, the lower first, got {limits!r}")
    check_count(resolution, "resolution")
    if samples is not None and (samples.dim() != 2 or samples.shape[1] != 2):
        raise ValueError(f"samples has shape {tuple(samples.shape)}, but points of the plane are (N, 2)")
    if limits is None:
        extreme = 4.0 if samples is None else 1.1 * float(samples.abs().max()) or 1.0
        limits = (-extreme, extreme)
    figure = _figure(WIDTH, title)
    axes = figure.add_subplot(xlabel="$x_1$", ylabel="$x_2$", xlim=limits, ylim=limits, aspect="equal")
    if log_density is not None:
        axis = torch.linspace(*limits, resolution)
        points = torch.cartesian_prod(axis, axis)
        with torch.no_grad():
            density = log_density(points).detach().cpu().double().exp().reshape(resolution, resolution).T.numpy()
        drawn = axes.imshow(density, cmap=_theme.get().heat, origin="lower", extent=(*limits, *limits), vmin=0)
        axes.grid(False)
        figure.colorbar(drawn, ax=axes, shrink=0.7, label="density p(x), per unit area").outline.set_visible(False)  # type: ignore[operator]
    if samples is not None:
        color = _theme.get().ink if log_density is not None else _theme.get().series[0]
        size, alpha = (3, 0.35) if log_density is not None else (5, 0.5)
        across, up = samples.detach().cpu().T.numpy()
        axes.scatter(across, up, s=size, color=color, alpha=alpha, linewidths=0)
    return figure


@_styled
def table_of_features(x: Tensor, *, levels: int | None = None, title: str = "") -> Figure:
    """A heat map of data, ``(N, D)``, with one row per datum."""
    check_finite(x, "x")
    check_network_options(levels=levels)
    values = x.detach().cpu().double().flatten(1).numpy()
    figure = _figure(3.2, title)
    axes = figure.add_subplot(xlabel="feature", ylabel="datum")
    bounds = (0, levels - 1) if levels else (values.min(), values.max())
    drawn = axes.imshow(
        values, cmap=_theme.get().gray, vmin=bounds[0], vmax=bounds[1], aspect="auto", interpolation="nearest"
    )
    axes.grid(False)
    figure.colorbar(drawn, ax=axes, label="value").outline.set_visible(False)  # type: ignore[operator]
    return figure


MOST_COLUMNS = 12
"""Largest number of columns of a table in a picture, from the first."""


@_styled
def by_column(
    x: Tensor,
    columns: Sequence[str],
    *,
    words: Mapping[str, Sequence[str]] | None = None,
    marked: Tensor | None = None,
    title: str = "",
    most: int = MOST_COLUMNS,
) -> Figure:
    """A histogram of each column of a table, in its own units.

    Args:
        x: ``(N, D)``.
        columns: names of the D columns.
        words: the list of words of each column of categories, by the column's name; a value is the index of its word.
        marked: bool, ``(N,)``: rows to mark by lines.
        most: largest number of columns drawn, from the first.
    """
    check_finite(x, "x")
    _check_columns(columns, x)
    _check_words(words)
    check_count(most, "most")
    if marked is not None:
        check_tensor(marked, (), "marked", "one truth value per row")
    values = x.detach().cpu().double().numpy()
    figure, grid = _panels(columns[:most], title, words)
    for i, axes in enumerate(grid):
        bins: int | list[float] = min(40, 2 * math.isqrt(len(values)))
        if (values[:, i] == np.round(values[:, i])).all():
            most_bins = max(40, len((words or {}).get(columns[i], ())))
            bins = _edges_between_integers(values[:, i].min(), values[:, i].max(), most_bins).tolist()
        axes.hist(values[:, i], bins, color=_theme.get().series[0])
        for value in () if marked is None else values[marked.cpu().numpy(), i].tolist():
            axes.axvline(value, ymax=0.15, color=_theme.get().series[1], linewidth=1)
    return figure


def _edges_between_integers(low: float, high: float, most: int) -> np.ndarray:
    """Edges of at most ``most`` bins of one width for the integers from ``low`` to ``high``."""
    width = np.ceil((high - low + 1) / most)  # a float, because counts of a wide prior exceed 64 bits
    edges: np.ndarray = low - 0.5 + width * np.arange(math.ceil((high - low + 1) / width) + 1)
    return edges


def _check_columns(columns: Any, x: Tensor) -> None:
    if isinstance(columns, str) or not isinstance(columns, Sequence):
        raise TypeError(f"columns must be names, got {columns!r}")
    if x.dim() != 2 or len(columns) != x.shape[1]:
        raise ValueError(
            f"columns has {len(columns)} names, but x has shape {tuple(x.shape)}: pass a name for each column"
        )


def _check_words(words: Any) -> None:
    check_type(words, (Mapping, type(None)), "words", "a dict from columns to their words")


MOST_LETTERS = 16
"""Letters of words that fit side by side below a panel."""
MOST_TICKS = 8
"""Words that fit below a panel, turned on their side."""


def _panels(columns: Sequence[str], title: str, words: Mapping[str, Sequence[str]] | None) -> tuple[Figure, list[Axes]]:
    """A panel for each column, named below it, with its words in the place of their numbers."""
    across = min(3, len(columns))
    down = math.ceil(len(columns) / across)
    figure = _figure(1.7 * down, title)
    grid = [*figure.subplots(down, across, squeeze=False).flat]
    for axes, name in zip(grid, columns, strict=False):
        axes.set_xlabel(name, parse_math=False)  # two dollar signs in a name are no formula
        axes.locator_params(nbins=3)
        if words and name in words:
            shown = [word if len(word) <= 12 else f"{word[:9]}..." for word in words[name]]
            turned = len("".join(shown)) > MOST_LETTERS
            each = math.ceil(len(shown) / MOST_TICKS)
            axes.set_xticks(range(0, len(shown), each), shown[::each], rotation=90 * turned, parse_math=False)
    for axes in grid[len(columns) :]:
        axes.set_visible(False)
    return figure, grid[: len(columns)]


def samples(
    x: Tensor,
    *,
    levels: int | None = None,
    title: str = "",
    columns: Sequence[str] | None = None,
    words: Mapping[str, Sequence[str]] | None = None,
) -> Figure:
    """Samples in the form that suits their shape: images, points of the plane, or a table of features.

    Args:
        columns: names of the columns of a table, which `by_column` draws; words: as it takes them.
    """
    check_finite(x, "x")
    _check_words(words)
    if columns is not None:
        return by_column(x, columns, words=words, title=title)
    if is_picture(x):
        return images(x, levels=levels, title=title)
    if x.dim() == 2 and x.shape[1] == 2 and levels is None:
        return plane(x, title=title)
    return table_of_features(x, levels=levels, title=title)


def imputations(
    x: Tensor,
    mask: Tensor,
    samples: Tensor,
    *,
    levels: int | None = None,
    title: str = "",
    columns: Sequence[str] | None = None,
    words: Mapping[str, Sequence[str]] | None = None,
    most: int = MOST_COLUMNS,
) -> Figure:
    """One row per datum: x itself, x with the hidden part covered, and draws of that part given the rest.

    For points of the plane, there is a panel per datum with the datum, the draws, and a line where they agree. For a
    table, there is a panel per column: for each datum the value if it was observed, else the draws.

    Args:
        x: ``(N, *event_shape)``; data without rows are drawn as one row of features.
        mask: bool, True where observed, ``event_shape`` or ``(N, *event_shape)``.
        samples: ``(S, N, *event_shape)``.
        columns: names of the columns of a table; words: as in `by_column`.
        most: largest number of columns drawn: those that miss the most values, in their order.
    """
    check_dense(x, "x")
    check_dense(mask, "mask")
    check_tensor(samples, x.shape, "samples", "the shape of x")
    check_count(most, "most")
    _check_words(words)
    if columns is not None:
        _check_columns(columns, x)
        seen = mask.cpu().expand_as(x)
        shown = (~seen).sum(0).argsort(descending=True, stable=True)[:most].sort().values
        names = [columns[i] for i in shown]
        return _imputed_columns(x.cpu()[:, shown], seen[:, shown], samples.cpu()[..., shown], names, title, words)
    if x.dim() == 2 and x.shape[1] == 2 and levels is None:
        return _imputed_points(x.cpu(), mask.cpu().expand_as(x), samples.cpu(), title)
    shape = tuple(x.shape[1:]) if is_picture(x) else (1, 1, x[0].numel())
    rows = torch.cat([x.unsqueeze(0), x.unsqueeze(0), samples.to(x.dtype)]).transpose(0, 1)
    hidden = torch.zeros(rows.shape, dtype=torch.bool)
    hidden[:, 1] = ~mask.cpu().expand_as(x)
    labels = ("data", "seen", *(f"draw {i}" for i in range(1, len(samples) + 1)))
    return images(
        rows.reshape(-1, *shape),
        levels=levels,
        title=title,
        column_labels=labels,
        covered=hidden.reshape(-1, *shape),
    )


@_styled
def _imputed_columns(
    x: Tensor,
    seen: Tensor,
    samples: Tensor,
    columns: Sequence[str],
    title: str,
    words: Mapping[str, Sequence[str]] | None,
) -> Figure:
    figure, grid = _panels(columns, title, words)
    rows = torch.arange(len(x))
    for i, axes in enumerate(grid):
        known = seen[:, i]
        axes.plot(x[known, i], rows[known], "s", color=_theme.get().series[1], markersize=4, label="observed")
        drawn = samples[:, ~known, i]
        axes.plot(drawn.flatten(), rows[~known].repeat(len(drawn)), "o", alpha=0.6, markersize=3, label="draws")
        axes.set(ylim=(len(x) - 0.5, -0.5), ylabel="row" if i % 3 == 0 else "")
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    figure.legend(handles=grid[0].get_legend_handles_labels()[0], loc="outside lower left", ncols=2)
    return figure


@_styled
def _imputed_points(x: Tensor, seen: Tensor, samples: Tensor, title: str) -> Figure:
    columns, colors = min(3, len(x)), _theme.get()
    rows = math.ceil(len(x) / columns)
    figure = _figure(rows * (WIDTH - 0.4) / columns + 0.7, title)
    extreme = 1.1 * float(torch.cat([x[None], samples]).abs().max()) or 1.0
    limits = (-extreme, extreme)
    grid = [*figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat]
    for i, (axes, datum, known, drawn) in enumerate(zip(grid, x, seen, samples.transpose(0, 1), strict=False)):
        axes.set(xlim=limits, ylim=limits, aspect="equal")
        axes.locator_params(nbins=4)
        if i % columns == 0:
            axes.set_ylabel("$x_2$")
        if i + columns >= len(x):  # the lowest panel of its column
            axes.set_xlabel("$x_1$")
            axes.tick_params(labelbottom=True)
        if known[0]:
            axes.axvline(float(datum[0]), color=colors.muted, linewidth=0.8, linestyle=":")
        if known[1]:
            axes.axhline(float(datum[1]), color=colors.muted, linewidth=0.8, linestyle=":")
        across, up = drawn.T.numpy()
        axes.plot(across, up, "o", markersize=4, alpha=0.7, markeredgewidth=0, label="draws")
        axes.plot(*datum[:, None].numpy(), "x", markersize=6, color=colors.series[1], label="data (dotted: seen)")
    for axes in grid[len(x) :]:
        axes.set_visible(False)
    figure.legend(handles=figure.axes[0].get_legend_handles_labels()[0], loc="outside lower left", ncols=2)
    return figure


# -- training ----------------------------------------------------------------------------------------------------------


@_styled
def learning_curves(history: History, *, title: str = "") -> Figure:
    """Loss and validation loss; with a KL, also its terms and the reconstruction in a panel below.

    The validation of an adversarial objective has other units than its loss, so it gets separate axes.

    Raises:
        ValueError: the history is empty.
    """
    check_type(history, History, "history", "a dgm.History")
    if not history.epochs:
        raise ValueError("history holds no epochs: train first")
    epochs = [each.epoch for each in history.epochs]
    together = history.validation_unit == history.unit
    terms = _loss_terms(history) if together and history.epochs[0].kl else {}
    validation = [(each.epoch, each.validation) for each in history.epochs if each.validation is not None]
    panels = 1 + (len(terms) > 1) + bool(validation and not together)  # a single term is the loss itself
    marker = "." if len(epochs) == 1 else ""
    figure = _figure(2.1 * panels + 0.3, title)
    top, *rest = figure.subplots(panels, sharex=True, squeeze=False)[:, 0]
    top.plot(epochs, history.losses, label="training", marker=marker)
    top.set_ylabel(textwrap.fill(f"loss ({history.unit})", 24))
    if validation:
        beside = top if together else rest.pop()
        beside.plot(*zip(*validation, strict=True), label="validation", color=_theme.get().series[1], marker=marker)
        beside.axvline(history.best_epoch, color=_theme.get().muted, linewidth=0.8, linestyle=":", label="best epoch")
        if together:
            top.legend()
        else:
            beside.set_ylabel(textwrap.fill(f"validation ({history.validation_unit})", 24))
            _from_start(beside, [loss for _, loss in validation])
    for axes in rest:
        for name, values in terms.items():
            axes.plot(epochs, values, label=name, marker=marker)
        axes.set(ylabel="nats per datum")
        axes.legend()
    _from_start(top, history.losses + ([loss for _, loss in validation] if together else []))
    figure.axes[-1].set_xlabel("epoch")
    figure.axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(epochs) == 1:
        top.set_xlim(epochs[0] - 1, epochs[0] + 1)
    return figure


MOST_TERMS = 8
"""Terms of a loss that are drawn as separate curves."""


def _loss_terms(history: History) -> dict[str, list[float]]:
    """The parts of the loss by name, without those of factors and plates that are always zero."""
    terms = {}
    for site in history.epochs[0].reconstruction:
        terms[f"reconstruction of {site}", "_likelihood"] = [-each.reconstruction[site] for each in history.epochs]
    for site in history.epochs[0].kl:
        terms[f"KL of {site}", "_kl"] = [each.kl[site] for each in history.epochs]
    told = {key: values for key, values in terms.items() if any(values)}
    short = [name.removesuffix(suffix) for name, suffix in told]  # equal for z and z_kl, the chain that is a prior of z
    shown = {
        own if short.count(own) == 1 else name: values
        for own, (name, _), values in zip(short, told, told.values(), strict=True)
    }
    if len(shown) <= MOST_TERMS:
        return shown
    largest = sorted(shown, key=lambda name: -max(map(abs, shown[name])))[: MOST_TERMS - 1]
    others = [values for name, values in shown.items() if name not in largest]  # of a chain with a site per step
    together = {f"sum of {len(others)} smaller terms": [sum(values) for values in zip(*others, strict=True)]}
    return {name: shown[name] for name in shown if name in largest} | together


def _from_start(axes: Axes, losses: Sequence[float]) -> None:
    """Crop values far above the rest, such as the first epochs, which would flatten the curves."""
    low, *rest = sorted(losses)
    high = rest[int(0.9 * len(rest)) - 1] if len(rest) >= 9 else math.inf
    if losses[0] > high + 1.5 * (high - low):
        axes.set_ylim(low - 0.1 * (high - low), high + 0.5 * (high - low))


# -- numbers -----------------------------------------------------------------------------------------------------------


@_styled
def bits_per_dim(
    evidences: Mapping[str, Evidence], *, reference: float | None = None, reference_label: str = "", title: str = ""
) -> Figure:
    """Bits per dimension with bars of two standard errors; full dots are exact, open dots are bounds.

    Args:
        evidences: evidences by name, drawn from the top.
        reference: a baseline, drawn as a line.
        reference_label: label of the baseline.
        title: title of the figure.

    Raises:
        ValueError: masses and densities are mixed, or there is nothing to draw.
    """
    check_type(evidences, Mapping, "evidences", "a mapping of names to evidences")
    if reference is not None:
        check_number(reference, "reference")
    if not evidences:
        raise ValueError("there is nothing to draw: evidences is empty")
    measures = {evidence.measure for evidence in evidences.values()}
    if len(measures) > 1:
        raise ValueError("evidences has both masses and densities, which are not comparable: draw them separately")
    figure, axes = _horizontal_rows(list(evidences), title)
    colors = _theme.get()
    for row, evidence in enumerate(evidences.values()):
        exact = evidence.kind == "exact"
        axes.errorbar(
            evidence.bits_per_dim,
            row,
            xerr=2 * evidence.stderr,
            fmt="o",
            color=colors.series[0],
            markerfacecolor=colors.series[0] if exact else colors.paper,
            markersize=6,
            elinewidth=1.4,
        )
        axes.annotate(
            f"{evidence.bits_per_dim:.2f}", (evidence.bits_per_dim + 2 * evidence.stderr, row), (5, 0),
            textcoords="offset points", va="center", size=8.5,
            bbox={"facecolor": colors.paper, "edgecolor": "none", "pad": 0.8},  # the line of the reference may cross it
        )  # fmt: skip
    axes.margins(x=0.14)
    if reference is not None:
        axes.axvline(reference, color=colors.series[1], linewidth=1.2, linestyle="--", zorder=1)
        left, right = axes.get_xlim()
        side = "right" if reference > (left + right) / 2 else "left"
        place = axes.get_xaxis_transform()
        axes.text(
            reference, 1.01, reference_label, transform=place, ha=side, va="bottom", size=8, color=colors.series[1]
        )
    bounds = any(evidence.kind != "exact" for evidence in evidences.values())
    axes.set_xlabel("bits per dimension" + (" (open: bounds)" if bounds else ""))
    return figure


@_styled
def aurocs(values: Mapping[str, Mapping[str, float]], *, title: str = "") -> Figure:
    """Areas under the ROC curve, with a row for each program and a mark for each kind of anomaly.

    Args:
        values: areas in [0, 1], by program and then by kind of anomaly.

    Raises:
        ValueError: there is nothing to draw.
    """
    check_type(values, Mapping, "values", "a mapping of names to mappings")
    if not values:
        raise ValueError("there is nothing to draw: values is empty")
    figure, axes = _horizontal_rows(list(values), title)
    kinds = list(dict.fromkeys(kind for each in values.values() for kind in each))
    for kind, marker in zip(kinds, "osD^v"[: len(kinds)], strict=True):
        rows = [row for row, each in enumerate(values.values()) if kind in each]
        axes.plot([each[kind] for each in values.values() if kind in each], rows, marker, markersize=6, label=kind)
    axes.axvline(0.5, color=_theme.get().muted, linewidth=1, linestyle=":")
    axes.axvline(1.0, color=_theme.get().muted, linewidth=1, linestyle=":")
    lowest = min(value for each in values.values() for value in each.values())
    axes.set_xlim(min(0.45, lowest - 0.05), 1.03)
    axes.set(xlabel="AUROC (0.5: chance, 1: perfect)")
    figure.legend(loc="outside lower left", ncols=2)
    return figure


def _horizontal_rows(names: list[str], title: str) -> tuple[Figure, Axes]:
    figure = _figure(0.31 * len(names) + 1.15, title)
    axes = figure.add_subplot()
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.spines["left"].set_visible(False)
    return figure, axes


@_styled
def score_histograms(scores: Mapping[str, Tensor], *, title: str = "", bins: int = 50) -> Figure:
    """Histograms of log p(x), one for each set of data, on common bins.

    The first bin also holds the lowest 1 % of all data, which may be far below; the axis label says so.

    Args:
        scores: log p(x) or its bound in nats, ``(N,)``, by data set; the first histogram is filled.

    Raises:
        ValueError: there is nothing to draw, or a score is not finite.
    """
    check_type(scores, Mapping, "scores", "a mapping of names to tensors")
    check_count(bins, "bins")
    arrays = {name: values.detach().cpu().double().numpy() for name, values in scores.items()}
    if not arrays or any(not len(values) for values in arrays.values()):
        raise ValueError("there is nothing to draw: a set of scores is empty")
    for name, values in arrays.items():
        if not np.isfinite(values).all():
            raise ValueError(f"scores of {name!r} hold NaN or infinite values: drop those data")
    every = np.concatenate(list(arrays.values()))
    # The far tail of anomalies would squeeze all other data into one bin.
    low, high = np.quantile(every, 0.01), every.max()
    edges = np.linspace(low, high + 1e-6 * (1 + abs(high)), bins + 1)
    figure = _figure(2.6, title)
    folded = f"; the first bin holds all below {_rounded(low)}, too" if every.min() < low else ""
    axes = figure.add_subplot(xlabel=f"log p(x) (nats){folded}", ylabel="share of the data")
    for i, (name, values) in enumerate(arrays.items()):
        weights = np.full(len(values), 1 / len(values))
        axes.hist(
            values.clip(low, high), edges.tolist(), weights=weights, label=name, color=_theme.get().series[i],
            histtype="stepfilled" if i == 0 else "step", alpha=0.75 if i == 0 else 1.0, linewidth=1.5,
            linestyle="-" if i < 2 else "--",
        )  # fmt: skip
    figure.legend(loc="outside lower left", ncols=3, columnspacing=1.2)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.xaxis.set_major_locator(MaxNLocator(6))  # five digits and a sign are wide
    return figure


def _rounded(number: float) -> str:
    """The number with at least four digits and without an exponent."""
    return f"{number:.0f}" if abs(number) >= 1000 else f"{number:.4g}"


# -- guides of a posterior ---------------------------------------------------------------------------------------------


@_styled
def marginals(found: GuideComparison, *, title: str = "", most: int = 8) -> Figure:
    """Histograms of each latent, filled for the reference and as lines for the draws of each guide.

    Args:
        found: the result of `dgm.infer.compare`.
        most: largest number of scalars drawn: those on which the guides differ most from the reference, or the first.
    """
    check_type(found, GuideComparison, "found", "the result of dgm.infer.compare")
    check_count(most, "most")
    if not found.rows:
        raise ValueError("there is nothing to draw: no guide was fitted")
    draws = _scalar_draws(found)
    names = _names_by_error(found, draws[0])[:most]
    columns = min(2, len(names))
    rows = math.ceil(len(names) / columns)
    figure = _figure(1.15 * rows + 0.5, _of_scalars(title, names, draws[0]))
    labels = (["reference"] if found.reference is not None else []) + [row.name for row in found.rows]
    for place, name in enumerate(names):
        axes = figure.add_subplot(rows, columns, place + 1)
        axes.set_title(name, size=8.5, loc="left")
        axes.set_yticks([])
        every = np.concatenate([each[name] for each in draws])
        edges = np.linspace(np.quantile(every, 0.005), np.quantile(every, 0.995), 41)
        for i, (label, each) in enumerate(zip(labels, draws, strict=True)):
            filled = i == 0 and found.reference is not None
            color = _theme.get().muted if filled else _theme.get().series[(i - 1) % len(_theme.get().series)]
            axes.hist(each[name], edges.tolist(), density=True, label=label if place == 0 else None, color=color,
                      histtype="stepfilled" if filled else "step", alpha=0.45 if filled else 1.0,
                      linestyle="-" if i < 4 else "--")  # fmt: skip
    figure.legend(loc="outside lower left", ncols=3, columnspacing=1.2)
    return figure


@_styled
def pairs(found: GuideComparison, guide: str, *, title: str = "", most: int = 3, num_points: int = 400) -> Figure:
    """Scatter plots of pairs of latents: the reference below the diagonal, the draws of one guide above it.

    Args:
        found: the result of `dgm.infer.compare`.
        guide: the name of a row.
        most: largest number of scalars: those on which this guide is worst.
        num_points: number of draws shown for each.
    """
    check_type(found, GuideComparison, "found", "the result of dgm.infer.compare")
    check_choice(guide, [row.name for row in found.rows], "guide")
    check_counts(most=most, num_points=num_points)
    alone = replace(found, rows=(found[guide],))
    draws = _scalar_draws(alone)
    names = _names_by_error(alone, draws[0])[:most]
    figure, colors = _figure(WIDTH * 0.9, _of_scalars(title, names, draws[0])), _theme.get()
    shades = {"reference": colors.muted, guide: colors.series[0]} if len(draws) == 2 else {guide: colors.series[0]}
    for row, below in enumerate(names):
        for column, left in enumerate(names[: row + 1]):
            axes = figure.add_subplot(len(names), len(names), row * len(names) + column + 1)
            axes.tick_params(labelsize=6)
            for each, (name, shade) in zip(draws, shades.items(), strict=True):
                if row == column:
                    axes.hist(each[below], bins=30, density=True, histtype="step", color=shade, label=name)
                else:
                    axes.scatter(each[left][:num_points], each[below][:num_points], s=3, alpha=0.5, color=shade)
            if row == len(names) - 1:
                axes.set_xlabel(left, size=8)
            if column == 0:
                axes.set_ylabel(below, size=8)
    figure.legend(handles=figure.axes[0].get_legend_handles_labels()[0], loc="outside lower left", ncols=2)
    return figure


@_styled
def k_hats(found: GuideComparison, *, title: str = "") -> Figure:
    """k-hat of each guide, and the threshold above which its weights are not reliable."""
    check_type(found, GuideComparison, "found", "the result of dgm.infer.compare")
    if not found.rows:
        raise ValueError("there is nothing to draw: no guide was fitted")
    figure, axes = _horizontal_rows([row.name for row in found.rows], title)
    values = [float(row.weighted.k_hat) for row in found.rows]
    colors = _theme.get()
    axes.barh(range(len(values)), [min(value, 2.0) for value in values], height=0.55, color=colors.series[0])
    axes.axvline(found.rows[0].weighted.threshold, color=colors.ink, linewidth=1.0, linestyle="--")
    for row, value in enumerate(values):
        axes.annotate(f"{value:.2f}", (max(0.0, min(value, 2.0)), row), (4, 0), textcoords="offset points", va="center")
    axes.margins(x=0.14)
    axes.set_xlabel("k-hat; beyond the dashed line, weights are not reliable")
    return figure


@_styled
def chains(found: Chains, *, title: str = "", most: int = 4) -> Figure:
    """Trace plots of each chain, with divergent trajectories marked below.

    Chains that mix look alike, and none of them drifts.

    Args:
        found: the result of `dgm.infer.nuts`.
        most: largest number of scalars drawn: those whose chains differ most, relative to their spread.
    """
    check_type(found, Chains, "found", "the result of dgm.infer.nuts")
    check_count(most, "most")
    draws = {
        name: values.reshape(found.diverging.shape)
        for name, values in _scalars({site: value.flatten(0, 1) for site, value in found.samples.items()}).items()
    }
    names = sorted(draws, key=lambda name: -float(draws[name].mean(1).std() / (draws[name].std() + 1e-300)))[:most]
    figure, colors = _figure(0.95 * len(names) + 0.55, title), _theme.get()
    for place, (name, axes) in enumerate(
        zip(names, figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0], strict=True)
    ):
        axes.set_title(name, size=8.5, loc="left")
        for i, chain in enumerate(draws[name]):
            axes.plot(chain, color=colors.series[i % len(colors.series)], linewidth=0.5, alpha=0.8)
        axes.plot(found.diverging.any(0).nonzero()[:, 0], np.full(int(found.diverging.any(0).sum()), draws[name].min()),
                  "|", color=colors.ink, markersize=6, label="divergent" if place == 0 else None)  # fmt: skip
    axes.set_xlabel("draw after the warm-up" + ("; ticks: a trajectory diverged" if found.diverging.any() else ""))
    return figure


@_styled
def predictions(found: PredictiveCheck, *, title: str = "", bins: int = 20) -> Figure:
    """Histograms of the data, and the band that contains those of 90 % of the replicates.

    Args:
        found: the result of `dgm.infer.predictive_check`.
        bins: number of bins; for integers the largest number of bins, whose common width is an integer.
    """
    check_type(found, PredictiveCheck, "found", "the result of dgm.infer.predictive_check")
    check_count(bins, "bins")
    figure, colors = _figure(1.9 * len(found.observed) + 0.5, title), _theme.get()
    for place, (site, data) in enumerate(found.observed.items()):
        y, drawn = data.double().flatten().cpu().numpy(), found.replicated[site].double().cpu().numpy()
        drawn = drawn.reshape(len(drawn), -1)
        axes = figure.add_subplot(len(found.observed), 1, place + 1, xlabel=site, ylabel="share of the data")
        low, high = np.quantile(drawn, [0.005, 0.995])
        low, high = min(low, y.min()), max(high, y.max())
        if all((each == np.round(each)).all() for each in (y, drawn)):
            low, high = np.floor(low), np.ceil(high)
            edges = _edges_between_integers(low, high, bins)
        else:
            edges = np.linspace(low, high + 1e-6 * (1 + abs(high)), bins + 1)
        counts = np.stack([np.histogram(row.clip(low, high), edges)[0] for row in drawn]) / drawn.shape[1]
        bottom, middle, top = np.quantile(counts, [0.05, 0.5, 0.95], axis=0)
        first = place == 0
        axes.stairs(
            top, edges, baseline=bottom, fill=True, color=colors.rule, label="90 % of replicates" if first else None
        )
        axes.stairs(middle, edges, color=colors.muted, label="their median" if first else None)
        axes.stairs(np.histogram(y, edges)[0] / len(y), edges, color=colors.series[0], linewidth=1.5,
                    label="data" if first else None)  # fmt: skip
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    figure.legend(loc="outside lower left", ncols=3, columnspacing=1.2)
    return figure


def _scalars(values: Mapping[str, Tensor]) -> dict[str, Any]:
    """Draws of each scalar by its name, such as ``theta[2]``, ``(N,)``."""
    return {
        element_name(name, place): value[(slice(None), *place)].cpu().numpy()
        for name, value in values.items()
        for place in np.ndindex(*value.shape[1:])
    }


def _scalar_draws(found: GuideComparison) -> list[dict[str, Any]]:
    """Draws of each scalar by its name, ``(N,)``: of the reference, if there is one, and of each guide."""
    vectors: list[Any] = [found.reference] if found.reference is not None else []
    vectors += [row.weighted.u for row in found.rows]
    with torch.no_grad():
        return [_scalars(found.posterior.constrain(u)) for u in vectors]


def _of_scalars(title: str, shown: Sequence[str], every: Collection[str]) -> str:
    """The title, which says if scalars are left out."""
    left_out = f"{len(shown)} of {len(every)} scalars" if len(shown) < len(every) else ""
    return ": ".join(filter(None, (title, left_out)))


def _names_by_error(found: GuideComparison, names: Iterable[str]) -> list[str]:
    """The names of scalars by the largest error of a guide, from the largest; unchanged without a reference.

    The error is that of the mean, in sds of the reference, or the log of the ratio of the sds.
    """
    errors = [
        _scalars({z: torch.maximum(row.mean_errors[z], row.sd_ratios[z].log().abs())[None] for z in row.mean_errors})
        for row in found.rows
        if row.mean_errors
    ]
    return sorted(names, key=lambda name: -max((float(each[name][0]) for each in errors), default=0.0))


# -- classifiers -------------------------------------------------------------------------------------------------------


@_styled
def curves(
    x: Sequence[float],
    panels: Mapping[str, Mapping[str, Sequence[float]]],
    *,
    xlabel: str,
    title: str = "",
    percent: Sequence[str] = (),
) -> Figure:
    """Panels stacked on one x axis, with a line for each name.

    Args:
        x: positions, in the units of ``xlabel``.
        panels: values at ``x``, by the label of the y axis and then by name; a name has one color in all panels.
        xlabel: label of the x axis.
        title: title of the figure.
        percent: panels whose values are shares, from 0 to 1.

    Raises:
        ValueError: a line has another length than ``x``.
    """
    check_type(x, Sequence, "x", "a sequence of numbers")
    check_type(panels, Mapping, "panels", "a mapping of titles to curves")
    for lines in panels.values():
        for name, values in lines.items():
            if len(values) != len(x):
                raise ValueError(f"{name!r} has {len(values)} values, but x has {len(x)}: pass one value per position")
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    figure = _figure(1.7 * len(panels) + 0.7, title)
    for axes, (label, lines) in zip(
        figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0], panels.items(), strict=True
    ):
        for name, values in lines.items():
            i = names.index(name)
            axes.plot(x, values, marker="osD^v"[i % 5], markersize=4.5, color=_theme.get().series[i], label=name)
        axes.set_ylabel(label)
        if label in percent:
            axes.set_ylim(-0.04, 1.04)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    figure.axes[-1].set_xlabel(xlabel)
    if len(names) > 1:
        handles = {handle.get_label(): handle for axes in figure.axes for handle in axes.get_lines()}
        figure.legend(handles=list(handles.values()), loc="outside lower left", ncols=2)
    return figure


@_styled
def reliability(probabilities: Mapping[str, Tensor], y: Tensor, *, title: str = "", bins: int = 10) -> Figure:
    """A reliability diagram: accuracy against confidence, which are equal on the diagonal.

    Args:
        probabilities: p(y | x), ``(N, classes)``, by classifier.
        y: true labels, ``(N,)``.

    Raises:
        ValueError: shapes do not fit.
    """
    check_type(probabilities, Mapping, "probabilities", "a mapping of names to tensors")
    check_dense(y, "y")
    check_count(bins, "bins")
    figure = _figure(3.6 + 0.17 * len(probabilities), title)
    axes = figure.add_subplot(xlabel="confidence: mean of the highest p(y | x)", ylabel="accuracy")
    axes.plot([0, 1], [0, 1], color=_theme.get().muted, linewidth=1, linestyle=":")
    for (name, each), marker in zip(probabilities.items(), "osD^v", strict=False):
        if each.dim() != 2 or len(each) != len(y):
            raise ValueError(f"{name!r} has shape {tuple(each.shape)}, but y has {len(y)} labels: pass (N, classes)")
        found = bins_of_answers(each, y, bins)
        filled = found.count > 0
        axes.plot(
            found.confidence[filled].numpy(),
            found.accuracy[filled].numpy(),
            marker=marker,
            markersize=5,
            label=f"{name}: off by {100 * found.ece:.1f} points on average",
        )
    percent = PercentFormatter(1.0)
    axes.xaxis.set_major_formatter(percent)
    axes.yaxis.set_major_formatter(percent)
    axes.set(xlim=(0, 1.03), ylim=(-0.03, 1.03))
    figure.legend(loc="outside lower left", ncols=1)  # within the axes it could cover a point
    return figure


@_styled
def answers(
    x: Tensor,
    probabilities: Tensor,
    rejected: Tensor,
    *,
    levels: int | None = None,
    num_columns: int = 6,
    title: str = "",
) -> Figure:
    """Images with their most probable class and its probability on top; rejected ones are struck through.

    Args:
        x: ``(N, 1, H, W)`` or ``(N, 3, H, W)``.
        probabilities: p(y | x), ``(N, classes)``.
        rejected: bools, ``(N,)``.

    Raises:
        ValueError: x is not a batch of images, or the numbers of rows differ.
    """
    for name, each in (("x", x), ("probabilities", probabilities), ("rejected", rejected)):
        check_finite(each, name)
    check_network_options(levels=levels)
    check_count(num_columns, "num_columns")
    if not is_picture(x) or not len(x) == len(probabilities) == len(rejected) > 0:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, probabilities {tuple(probabilities.shape)} and rejected "
            f"{tuple(rejected.shape)}: pass images (N, 1, H, W) or (N, 3, H, W), (N, classes) and "
            "(N,)"
        )
    colors, rows = _theme.get(), math.ceil(len(x) / num_columns)
    figure = _figure(0.95 * rows, title)
    values = _pixel_values(x, levels)
    for i, axes in enumerate(figure.subplots(rows, num_columns, squeeze=False).flat):
        axes.set_axis_off()
        if i >= len(x):
            continue
        (height, width), (share, guess) = x.shape[2:], probabilities[i].max(-1)
        axes.imshow(values[i], cmap=colors.pixels, vmin=0, vmax=1, interpolation="nearest")
        axes.add_patch(Rectangle((-0.5, -0.5), width, height, fill=False, edgecolor=colors.rule, linewidth=0.6))
        axes.set_title(f"{int(guess)}: {100 * float(share):.0f} %", size=8, pad=2)
        if rejected[i]:
            axes.plot([-0.5, width - 0.5], [height - 0.5, -0.5], color=colors.series[5], linewidth=1.5)
    return figure


@_styled
def latent_map(z: Tensor, y: Tensor | None = None, *, title: str = "") -> Figure:
    """Latents in the plane, colored by label; more than two dimensions are projected onto two principal components.

    Args:
        z: ``(N, ...)``, at least two data of at least two features.
        y: integer labels, ``(N,)``, if there are any.

    Raises:
        ValueError: shapes do not fit.
    """
    check_finite(z, "z")
    if z.dim() < 2 or min(len(z), z[0].numel()) < 2:
        raise ValueError(f"z has shape {tuple(z.shape)}: pass (N, D) with N and D at least 2")
    if y is not None:
        check_labels(y, "y", len(z))
    flat = z.detach().cpu().double().flatten(1)
    labels = ["$z_1$", "$z_2$"]
    if flat.shape[1] > 2:
        flat = flat - flat.mean(0)
        _, scale, axes_of = torch.linalg.svd(flat, full_matrices=False)
        share = scale.square() / scale.square().sum().clamp_min(1e-300)  # equal data have variance 0
        flat = flat @ axes_of[:2].T
        labels = [f"principal component {i + 1} ({100 * share[i]:.0f} % of the variance)" for i in range(2)]
    figure = _figure(4.3, title)
    axes = figure.add_subplot(xlabel=labels[0], ylabel=labels[1])
    colors = _theme.get()
    if y is None:
        across, up = flat.T.numpy()
        axes.scatter(across, up, s=9, color=colors.series[0], alpha=0.75, linewidths=0)
        return figure
    names, centers = y.unique().tolist(), []
    for label in names:
        points = flat[y.cpu() == label]
        centers.append(points.median(0).values.numpy())
        color = colors.classes[label % len(colors.classes)]
        across, up = points.T.numpy()
        axes.scatter(across, up, s=9, color=color, alpha=0.75, linewidths=0, label=str(label))
    places = _apart(axes.transLimits.transform(centers))
    for label, place in zip(names, places.tolist(), strict=True):
        color = colors.classes[label % len(colors.classes)]
        box = {"boxstyle": "circle,pad=0.25", "facecolor": colors.paper, "edgecolor": color, "linewidth": 1.4}
        axes.annotate(
            str(label), place, xycoords="axes fraction", ha="center", va="center", weight="bold", size=9, bbox=box
        )
    return figure


BADGE = 0.065
MARGIN = 0.035
"""Least distance between the centers of two badges, and from the edge, as a share of the axes."""


def _apart(places: np.ndarray) -> np.ndarray:
    """The places ``(N, 2)``, moved until no two badges cover each other."""
    turns = 2.4 * np.arange(len(places))  # in radians: equal places part in many directions
    for _ in range(500):
        places = places + 1e-6 * np.stack([np.cos(turns), np.sin(turns)], axis=1)
        between = places[:, None] - places
        distance = np.linalg.norm(between, axis=-1) + 2 * np.eye(len(places))
        overlap = (BADGE - distance).clip(0)
        if not overlap.any():
            break
        places = (places + ((0.55 * overlap / distance.clip(1e-6))[..., None] * between).sum(1)).clip(
            MARGIN, 1 - MARGIN
        )
    return places


def representation(
    found: Representation, program: Program, x: Tensor, *, curve: str = "spherical", title: str = ""
) -> dict[str, Figure]:
    """Pictures of codes by name: "map", "interpolation" between pairs of data, "traversals", and the "grid" of a plane.

    Pictures that the program, its code or the number of data do not allow are left out.

    Args:
        found: the result of `representations.represent`.
        program: the program of that result.
        x: the data, ``(N, *event_shape)``.
        curve: curve between two codes, a name in `representations.CURVES`.
        title: title of the map.
    """
    check_type(found, Representation, "found", "the result of dgm.representations.represent")
    check_program(program)
    check_finite(x, "x")
    check_choice(curve, CURVES, "curve")
    site, z, levels, pairs = found.site, found.z, program.levels, min(6, len(x) // 2)
    figures = {}
    if len(z) > 1 and z[0].numel() > 1:
        figures["map"] = latent_map(z, found.y, title=title)
    if len(program.event_shape) != 3 or is_discrete(program, site):
        return figures
    nearest = site == codes(program)[0]
    if nearest and pairs:
        a, b = x[:pairs], x[pairs : 2 * pairs]
        between = interpolate(program, a, b, 8, curve=curve)
        rows = torch.cat([a[None].to(between), between, b[None].to(between)]).transpose(0, 1)
        ends = ("x", *("",) * 8, "x'")
        figures["interpolation"] = images(
            rows.flatten(0, 1), levels=levels, column_labels=ends, title=f"Between two data: {curve} in {site}"
        )
    if site in found.units:
        units = found.units[site]
        by_use = (units.variance if units.kl is None else units.kl).argsort(descending=True)[:8].tolist()
        values = (-3, -2, -1, 0, 1, 2, 3)
        moved = traverse(program, z[:1], values, by_use, site=site)
        figures["traversals"] = images(
            moved.flatten(0, 1),
            levels=levels,
            row_labels=[f"{site}[{i}]" for i in by_use],
            column_labels=[str(value) for value in values],
            title="One feature changed at a time, the most active first",
        )
    if nearest and tuple(z.shape[1:]) == (2,):
        plane_of_z = grid(program)
        figures["grid"] = images(
            plane_of_z.flatten(0, 1),
            levels=levels,
            num_columns=plane_of_z.shape[1],
            title=f"Decoded grid of {site}",
        )
    return figures


# -- experiments -------------------------------------------------------------------------------------------------------


@_styled
def heat_map(
    panels: Mapping[str, Mapping[tuple[str, str], tuple[float, float]]], title: str = "", *, lowest_is_best: bool = True
) -> Figure:
    """A heat map with mean and standard error written in each cell; the best cell is framed.

    Args:
        panels: mean and standard error by title and then by (row, column); NaN for a missing cell.
        title: title of the figure.
        lowest_is_best: whether the lowest number is the best, and not the highest.

    Raises:
        ValueError: there is no number to draw.
    """
    check_type(panels, Mapping, "panels", "a mapping of titles to cells")
    means = [mean for cells in panels.values() for mean, _ in cells.values() if not math.isnan(mean)]
    if not means:
        raise ValueError("there is nothing to draw: no cell holds a number")
    low, high = min(means), max(means)
    best = low if lowest_is_best else high
    rows_of = [list(dict.fromkeys(row for row, _ in cells)) for cells in panels.values()]
    height = sum(0.36 * len(rows) + (0.75 if title_of else 0.5) for rows, title_of in zip(rows_of, panels, strict=True))
    figure = _figure(height + 0.15, title)
    ratios = [len(rows) + 1.2 for rows in rows_of]
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=ratios)[:, 0]
    for axes, (name, cells), rows in zip(grid, panels.items(), rows_of, strict=True):
        columns = list(dict.fromkeys(column for _, column in cells))
        values = np.array([[cells.get((row, column), (math.nan,))[0] for column in columns] for row in rows])
        # Half of the color map, so that text stays readable and the best cell has the strongest color.
        shade = (high - values) / (high - low or 1)
        shade = 0.05 + 0.45 * (shade if lowest_is_best else 1 - shade)
        axes.imshow(shade, cmap=_theme.get().heat.with_extremes(bad=_theme.get().paper), vmin=0, vmax=1, aspect="auto")
        for i, row in enumerate(rows):
            for j, column in enumerate(columns):
                mean, error = cells.get((row, column), (math.nan, math.nan))
                if math.isnan(mean):
                    axes.text(j, i, "failed" if (row, column) in cells else "", ha="center", va="center", size=7.5)
                    continue
                ink = _theme.get().paper if shade[i, j] > 0.33 else _theme.get().ink
                size = 8.5 if len(columns) < 6 else 7
                place = {"ha": "center", "color": ink}
                if math.isnan(error):
                    axes.text(j, i, f"{mean:.3f}", va="center", size=size, **place)
                else:
                    axes.text(j, i - 0.16, f"{mean:.3f}", va="center", size=size, **place)
                    axes.text(j, i + 0.22, f"± {error:.3f}", va="center", size=size - 2, **place)
                if mean == best:
                    frame = Rectangle(
                        (j - 0.47, i - 0.45), 0.94, 0.9, fill=False, edgecolor=_theme.get().series[1], linewidth=1.8
                    )
                    axes.add_patch(frame)
        axes.set_yticks(range(len(rows)), rows)
        rotated = sum(len(column) + 2 for column in columns) > 46
        axes.set_xticks(
            range(len(columns)), columns, rotation=40 if rotated else 0, ha="right" if rotated else "center"
        )
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        if name:
            axes.set_title(name, loc="left", size=8.5)
    return figure


@_styled
def gaps(found: Mapping[str, Gaps], *, title: str = "") -> Figure:
    """Bars from the ELBO to log p(x), one for each guide: approximation gap, then amortization gap.

    Args:
        found: gaps by the name of the guide; error bars are two standard errors of each gap.

    Raises:
        ValueError: there is nothing to draw.
    """
    check_type(found, Mapping, "found", "a mapping of names to gaps")
    if not found:
        raise ValueError("there is nothing to draw: found is empty")
    figure, axes = _horizontal_rows(list(found), title)
    figure.set_figheight(figure.get_figheight() + 0.25)
    colors = _theme.get()
    for row, each in enumerate(found.values()):
        start, spare = 0.0, 0.0
        named = {
            "approximation gap (the family)": each.approximation,
            "amortization gap (the encoder)": each.amortization,
        }
        for i, (name, values) in enumerate(named.items()):
            mean, error = (
                values.mean().item(),
                2 * (values.std() / len(values) ** 0.5).item() if len(values) > 1 else 0.0,
            )
            axes.barh(row, mean, left=start, height=0.55, color=colors.series[i], label=name if row == 0 else None)
            axes.errorbar(
                start + mean, row + 0.1 * (2 * i - 1), xerr=error, color=colors.ink, elinewidth=1.2, fmt="none"
            )
            start, spare = start + mean, max(spare, start + mean + error)
        axes.annotate(
            f"{each.total.mean().item():.2f}", (spare, row), (5, 0), textcoords="offset points", va="center", size=8.5
        )
    axes.margins(x=0.14)
    axes.axvline(0, color=colors.muted, linewidth=0.8)
    axes.set_xlabel("log p(x) - ELBO (nats per datum; lines: two standard errors)")
    figure.legend(loc="outside lower left", ncols=1)
    figure.set_figheight(figure.get_figheight() + 0.3)
    return figure


@_styled
def worst_explained(found: Gaps, *, levels: int | None = None, num_data: int = 8, title: str = "") -> Figure:
    """Images with the lowest log p(x), in nats, above those with the largest gap.

    Raises:
        ValueError: x is not a batch of images.
    """
    check_type(found, Gaps, "found", "the result of infer.gaps")
    check_count(num_data, "num_data")
    num_data = min(num_data, len(found.x))
    low, wide = found.worst(num_data), found.total.argsort(descending=True)[:num_data]
    rows = ("lowest log p(x)", "largest gap")
    return images(found.x[torch.cat([low, wide])], levels=levels, num_columns=num_data, title=title, row_labels=rows)


@_styled
def calibration(found: Checks, *, title: str = "", most: int = 6) -> Figure:
    """Rank histograms of the worst dimensions, and the KL of every dimension.

    Flat histograms within the band mean a calibrated guide, a U a guide that is too narrow, and a hump one that is too
    wide.

    Args:
        found: the result of `dgm_pyro.infer.check`.
        most: largest number of histograms, the least uniform first.
    """
    check_type(found, Checks, "found", "the result of infer.check")
    check_count(most, "most")
    ranks, colors = found.calibration, _theme.get()
    ordered = sorted(
        ((p, site, i) for site in ranks.ranks for i, p in enumerate(ranks.p_values(site).tolist())), key=lambda t: t[0]
    )
    worst = ordered[:most]
    titles = [f"{site}[{i}]: p = {p:.2g}" for p, site, i in worst]
    columns = min(3 if max(map(len, titles)) < 25 else 2, len(worst))
    rows = math.ceil(len(worst) / columns)
    measured = {site: each for site, each in found.units.items() if each.kl is not None}
    figure = _figure(1.25 * rows + 0.35 + 1.7 * len(found.units), title)
    top, *below = figure.subfigures(1 + len(found.units), 1, squeeze=False,
                                    height_ratios=[1.25 * rows + 0.2, *[1.7] * len(found.units)])[:, 0]  # fmt: skip
    grid = [*top.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat]
    total = len(next(iter(ranks.ranks.values())))
    share = 1 / ranks.bins
    band = 2.576 * (share * (1 - share) / total) ** 0.5
    for axes, heading, (_, site, i) in zip(grid, titles, worst, strict=False):
        counts = ranks.histogram(site)[i].double() / total
        axes.axhspan(max(0.0, share - band), share + band, color=colors.rule, zorder=0)
        axes.bar(np.arange(ranks.bins) + 0.5, counts.numpy(), width=0.9, color=colors.series[0])
        axes.axhline(share, color=colors.muted, linewidth=0.8)
        axes.set_title(heading, size=7.5, loc="left")
        axes.set(xticks=(0.1 * ranks.bins, 0.9 * ranks.bins), xticklabels=("low", "high"))
        axes.set_xmargin(0)
        axes.grid(visible=False, axis="x")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    for axes in grid[len(worst) :]:
        axes.set_visible(False)
    top.supxlabel("rank of the true z among draws of q (band: 99 % of uniform ranks)", size=8)
    for part, (site, each) in zip(below, found.units.items(), strict=True):
        kind, values = (
            ("KL (nats)", each.kl) if site in measured and each.kl is not None else ("Var E[z]", each.variance)
        )
        order = values.argsort(descending=True)
        axes = part.subplots()
        bars = axes.bar(
            range(len(values)),
            values[order].numpy(),
            color=[colors.series[0] if active else colors.series[1] for active in each.active[order].tolist()],
        )
        for bar, active in zip(bars, each.active[order].tolist(), strict=True):
            bar.set_hatch("" if active else "///")
        live = int(each.active.sum())
        inactive = ", hatched: inactive" * (live < len(values))
        axes.set(ylabel=kind, xlabel=f"dimensions of {site}: {live} of {len(values)} active{inactive}")
        axes.set_xticks([])
    return figure


@_styled
def coverage(found: Calibration, *, title: str = "", most: int = 4) -> Figure:
    """Coverage of central intervals of q against their mass; a calibrated q is on the diagonal.

    Below the diagonal q is too narrow, above it too wide. The band contains 99 % of calibrated curves at each mass.

    Args:
        found: the result of `dgm_pyro.infer.sbc`.
        most: largest number of dimensions, those farthest from the diagonal.
    """
    check_type(found, Calibration, "found", "the result of infer.sbc")
    check_count(most, "most")
    levels = np.linspace(0.01, 1.0, 100)
    each = {site: np.stack([found.coverage(site, float(level)).numpy() for level in levels]) for site in found.ranks}
    every = {f"{site}[{i}]": values[:, i] for site, values in each.items() for i in range(values.shape[1])}
    worst = sorted(every, key=lambda name: -float(np.abs(every[name] - levels).max()))[:most]
    figure, colors = _figure(3.0, title), _theme.get()
    axes = figure.add_subplot(xlabel="mass of the interval", ylabel="coverage: share of simulations in it")
    band = 2.576 * np.sqrt(levels * (1 - levels) / len(next(iter(found.ranks.values()))))
    axes.fill_between(levels, levels - band, levels + band, color=colors.rule, zorder=0)
    axes.plot(levels, levels, color=colors.muted, linewidth=1, linestyle=":")
    for i, name in enumerate(worst):
        axes.plot(levels, every[name], label=name, color=colors.series[i % len(colors.series)],
                  linestyle="-" if i < len(colors.series) else "--")  # fmt: skip
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    figure.legend(loc="outside lower left", ncols=4, columnspacing=1.2)
    return figure
