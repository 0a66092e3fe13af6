r"""Representations: the code of x under a program, and its uses.

*Encoding and decoding.* A program with latents maps x to a code z, and back. `encode` and `decode` call the methods of
these names of its family, in batches and in evaluation mode, with noise that belongs to each datum:

====================  ===============================================  =================================================
program               `encode`                                         `decode`
====================  ===============================================  =================================================
`VAE`                 :math:`E_q[z \mid x]`, or a draw of it           :math:`E_p[x \mid z]`, or a draw of it
`Flow`                :math:`z = f^{-1}(x)`                            :math:`x = f(z)`
`Dequantized`         :math:`f^{-1}((x + 1/2) / L)`                    the cell of :math:`f(z)`
diffusions            the end of the probability-flow ODE from x       its beginning, from z
====================  ===============================================  =================================================

The z of a flow or a diffusion is as large as x and loses nothing: it is another form of the same data, not a summary.
If z is a class, its mean is that of the one-hot code: the probabilities q(z = k | x).

*Interpolation.* A line between two codes, :math:`(1 - t) a + t b`, passes closer to the origin than either end. In D
dimensions, draws of N(0, I) have a norm close to :math:`\sqrt D`, so the prior has almost no mass at the middle of the
line. The arc keeps the length,

.. math::
    z_t = \frac{\sin((1 - t)\, \omega)}{\sin \omega}\, a + \frac{\sin(t\, \omega)}{\sin \omega}\, b, \qquad
    \omega = \arccos \frac{a^\top b}{\|a\| \|b\|}.

*Evaluation* uses labels that the program never saw: `probe` (are the classes linear in z?), `knn` (do neighbors have
the same class?), `cluster` and `agreement` (are there groups, and are they the classes?). `dgm_pyro.infer.units`
reports the features of z that are in use, and the KL of each in nats.

Source: Shoemake 1985 and White 2016 (arXiv 1609.04468), the arc; Song et al. 2021 (arXiv 2010.02502, section 5.4),
codes of a diffusion; Strehl and Ghosh 2002, NMI; Hubert and Arabie 1985, ARI; Xie et al. 2016 (arXiv 1511.06335),
clustering accuracy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import dgm_pyro.noise as noise
from dgm_pyro.checks import (
    check_choice,
    check_count,
    check_dense,
    check_finite,
    check_labels,
    check_number,
    check_seed,
    check_type,
    is_integer,
)
from dgm_pyro.data import Data
from dgm_pyro.evaluation import as_data, evaluating, program_device
from dgm_pyro.families.dequantized import Dequantized
from dgm_pyro.families.standardized import core_of
from dgm_pyro.families.vae import VAE
from dgm_pyro.infer.checks import Units, units
from dgm_pyro.program import (
    Program,
    check_program,
    map_given,
    parameter_of,
    seeded,
)
from dgm_pyro.results import Result, Table, with_error
from dgm_pyro.uses.classification import share_stderr

__all__ = [
    "CURVES",
    "Agreement",
    "Quality",
    "Representation",
    "agreement",
    "arc",
    "assess",
    "cluster",
    "codes",
    "decode",
    "encode",
    "grid",
    "interpolate",
    "is_discrete",
    "knn",
    "latents",
    "line",
    "probe",
    "represent",
    "traverse",
]

# -- encoding and decoding ---------------------------------------------------------------------------------------------


def codes(program: Program) -> tuple[str, ...]:
    """Names of the codes that `encode` knows: the levels of a VAE, the nearest to x first; ``("z",)`` for others.

    Raises:
        ValueError: the program has no latent code.
    """
    check_program(program)
    program.code_named()
    return tuple(program.codes())


@torch.no_grad()
def encode(
    program: Program,
    x: Tensor,
    given: Any = None,
    *,
    site: str | None = None,
    draw: bool = False,
    num_samples: int = 16,
    batch_size: int = 256,
    seed: int = 0,
    progress: bool = False,
) -> Tensor:
    """The code of each x from ``program.encode``, in batches and in evaluation mode.

    Args:
        program: a VAE (a hierarchy of them), a flow, dequantized or not, a diffusion, or another with `Program.codes`.
        x: ``(N, *event_shape)``.
        given: ``(N, *given_shape)`` for a conditional program.
        site: a name in `codes`; default the nearest to x.
        draw: whether to draw z from q(z | x), or the position in the cell of a dequantized x, instead of the mean.
        num_samples: draws to average where E_q[z | x] has no closed form; in a hierarchy, draws of the levels above.
        batch_size: data per batch; the codes do not depend on it.
        seed: seed of the draws, which belong to each datum (`noise.per_datum`), so equal x have equal codes, even if
            drawn. The global random state does not change.
        progress: whether to show a bar.

    Returns:
        ``(N, *z_shape)``, on the CPU; for a code of K classes their probabilities, ``(N, *z_shape, K)``, unless
        ``draw``.

    Raises:
        ValueError: the program has no latent code or no such site, or x does not fit.
    """
    check_program(program)
    site = program.code_named(site)
    check_count(num_samples, "num_samples")
    check_count(batch_size, "batch_size")
    check_dense(x, "x")
    where = program_device(program)
    program.check(x.to(where), _given_rows(given, where))

    def of(x: Tensor, given: Any) -> Tensor:
        with noise.per_datum(x, seed):
            return program.encode(x, given, site=site, draw=draw, num_samples=num_samples)

    return _in_batches(program, of, x, given, batch_size, seed, progress)


@torch.no_grad()
def decode(
    program: Program,
    z: Tensor,
    given: Any = None,
    *,
    site: str | None = None,
    draw: bool = False,
    batch_size: int = 256,
    seed: int = 0,
    progress: bool = False,
) -> Tensor:
    """The x of each code from ``program.decode``, in batches and in evaluation mode.

    Args:
        program, given, site, batch_size, seed, progress: as for `encode`.
        z: ``(N, *z_shape)``; integers for a code of classes.
        draw: whether to draw x from p(x | z) instead of the mean. Levels between x and ``site`` are then drawn too;
            discrete ones always are.

    Returns:
        ``(N, *event_shape)``, on the CPU. Means are reals in the units of x, also for integers. If the mean has no
        closed form, as for an autoregressive x, x is drawn.

    Raises:
        ValueError: the program has no latent code or no such site, or z does not fit.
    """
    check_program(program)
    check_count(batch_size, "batch_size")
    check_dense(z, "z")
    where = program_device(program)
    site = program.check_code(z.to(where), _given_rows(given, where), site)

    def of(z: Tensor, given: Any) -> Tensor:
        return program.decode(z, given, site=site, draw=draw)

    return _in_batches(program, of, z, given, batch_size, seed, progress)


def _in_batches(
    program: Program,
    of: Callable[[Tensor, Any], Tensor],
    rows: Tensor,
    given: Any,
    batch_size: int,
    seed: int,
    progress: bool,
) -> Tensor:
    where, found = program_device(program), []
    with evaluating(program), seeded(seed, where):
        starts = range(0, len(rows), batch_size)
        for start in tqdm(starts, desc="codes", unit="batch", disable=not progress, leave=False):
            part = slice(start, start + batch_size)
            found.append(of(rows[part].to(where), _given_rows(given, where, part)).cpu())
    return torch.cat(found)


def _given_rows(given: Any, where: torch.device, rows: slice = slice(None)) -> Any:
    def moved(part: Any) -> Tensor:
        check_dense(part, "given")
        return part[rows].to(where)

    return map_given(moved, given)


# -- interpolation and traversal ---------------------------------------------------------------------------------------


def line(a: Tensor, b: Tensor, num_points: int = 8) -> Tensor:
    """Evenly spaced points on the line from each a to each b, ends included, ``(num_points, N, *shape)``."""
    t = _curve_positions(a, b, num_points)
    return torch.where(t == 1, b, a + t * (b - a))


def arc(a: Tensor, b: Tensor, num_points: int = 8) -> Tensor:
    """Points at even angles on the arc from each a to each b, ends included, ``(num_points, N, *shape)``.

    The length changes with the angle, from that of a to that of b. Codes in the same or in opposite directions have no
    unique arc, and get the line.
    """
    t = _curve_positions(a, b, num_points)
    flat_a, flat_b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    lengths = flat_a.norm(dim=1) * flat_b.norm(dim=1)
    cosine = ((flat_a * flat_b).sum(1) / torch.where(lengths > 0, lengths, 1.0)).clamp(-1, 1)
    angle = cosine.acos().reshape(-1, *(1,) * (a.dim() - 1))
    sine = angle.sin()
    bent = (lengths.reshape(angle.shape) > 0) & (sine > 1e-3)
    points = (((1 - t) * angle).sin() * a + (t * angle).sin() * b) / torch.where(bent, sine, 1.0)
    points = torch.where(bent, points, line(a, b, num_points))
    return torch.where(t == 0, a, torch.where(t == 1, b, points))


CURVES: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {"linear": line, "spherical": arc}
"""Curves from one code to another, by name."""


def _curve_positions(a: Tensor, b: Tensor, num_points: int) -> Tensor:
    check_count(num_points, "num_points", at_least=2)
    check_finite(a, "a")
    check_finite(b, "b")
    if a.shape != b.shape or not a.is_floating_point():
        raise ValueError(
            f"a has shape {tuple(a.shape)} ({a.dtype}), but b has {tuple(b.shape)}: pass two real codes of one shape"
        )
    return torch.linspace(0, 1, num_points, dtype=a.dtype, device=a.device).reshape(-1, *(1,) * a.dim())


def interpolate(
    program: Program, a: Tensor, b: Tensor, num_points: int = 8, *, curve: str = "spherical", given: Any = None
) -> Tensor:
    """Interpolate from each datum a to each b: encode both, and decode a curve between their codes.

    Args:
        program: a program with `codes`.
        a, b: data, ``(N, *event_shape)``.
        num_points: number of points, including both ends, which are reconstructions of a and b.
        curve: "linear" or "spherical".
        given: ``(N, *given_shape)`` for a conditional program, the same along the curve.

    Returns:
        ``(num_points, N, *event_shape)``.

    Raises:
        ValueError: there is no such curve, the codes are discrete, or as for `encode`.
    """
    check_choice(curve, CURVES, "curve")
    check_count(num_points, "num_points", at_least=2)
    check_finite(a, "a")
    check_finite(b, "b")
    _require_real(program, codes(program)[0])
    points = CURVES[curve](encode(program, a, given), encode(program, b, given), num_points)
    return _decoded(program, points, given, None)


def traverse(
    program: Program,
    z: Tensor,
    values: Sequence[float] | Tensor = (-3, -2, -1, 0, 1, 2, 3),
    indices: Sequence[int] | None = None,
    *,
    given: Any = None,
    site: str | None = None,
) -> Tensor:
    """x decoded after one feature of its code is set to each of ``values``, with the others unchanged.

    Args:
        program: a program with `codes`.
        z: one code, ``(1, *z_shape)``: that of a datum, from `encode`, or zeros, the mean of a standard prior.
        values: values in the units of z.
        indices: flat indices of the features to set, in order; default all. `units` reports which are in use.
        given: ``(1, *given_shape)`` for a conditional program.
        site: the name of the code; default the nearest to x.

    Returns:
        ``(indices, values, *event_shape)``.

    Raises:
        ValueError: z is not one real code, or there is no feature of such an index.
    """
    check_program(program)
    site = program.code_named(site)
    _require_real(program, site)
    shape = program.codes()[site].event_shape
    check_finite(z, "z")
    if tuple(z.shape) != (1, *shape):
        raise ValueError(f"z has shape {tuple(z.shape)}, but one code is (1, *{tuple(shape)})")
    chosen = range(shape.numel()) if indices is None else indices
    known = isinstance(chosen, Sequence) and all(is_integer(i) and 0 <= i < shape.numel() for i in chosen)
    if not known or not chosen:
        raise ValueError(f"indices must be among 0 .. {shape.numel() - 1}, got {indices!r}")
    if not isinstance(values, Tensor):
        check_type(values, Sequence, "values", "a tensor or a sequence of numbers")
        for value in values:
            check_number(value, "values")
    settings = torch.as_tensor(values, dtype=z.dtype, device=z.device)
    check_finite(settings, "values")
    points = z.reshape(1, 1, -1).repeat(len(chosen), len(settings), 1)
    for row, feature in enumerate(chosen):
        points[row, :, feature] = settings
    return _decoded(program, points.reshape(len(chosen), len(settings), *shape), given, site)


def grid(program: Program, num_points: int = 12, reach: float = 2.5, *, given: Any = None) -> Tensor:
    """Decode a square grid over [-reach, reach]^2, for a code of two features.

    Returns:
        ``(num_points, num_points, *event_shape)``, laid out like a plot of the plane: rows from the highest z_2 to the
        lowest, columns from the lowest z_1 to the highest.

    Raises:
        ValueError: the code does not have 2 features.
    """
    check_program(program)
    check_count(num_points, "num_points")
    check_number(reach, "reach", above=0)
    like = parameter_of(program)
    (site, *_), axis = codes(program), torch.linspace(-reach, reach, num_points, dtype=like.dtype)
    _require_real(program, site)
    shape = tuple(program.codes()[site].event_shape)
    if shape != (2,):
        raise ValueError(f"a grid is for codes of 2 features, but {site!r} has shape {shape}")
    z_1, z_2 = torch.meshgrid(axis, axis, indexing="xy")
    return _decoded(program, torch.stack([z_1, z_2.flip(0)], -1), given, None)


def is_discrete(program: Program, site: str | None = None) -> bool:
    """Whether a code takes discrete values, so that there is nothing between two of them.

    Raises:
        ValueError: the program has no code, or none of that name.
    """
    check_program(program)
    return program.codes()[program.code_named(site)].measure == "mass"


def _require_real(program: Program, site: str) -> None:
    if is_discrete(program, site):
        raise ValueError(f"the code {site!r} is discrete, so there is nothing between its values: use a real code")


def _decoded(program: Program, points: Tensor, given: Any, site: str | None) -> Tensor:
    """`decode` of ``(A, B, *z_shape)``; ``given`` has B rows, or one for all."""
    across = points.shape[:2]

    def repeated(part: Tensor) -> Tensor:
        check_dense(part, "given")
        if len(part) not in (1, across[1]):
            raise ValueError(f"given has {len(part)} rows, but there are {across[1]} data: pass one row, or one each")
        rows = part.expand(across[1], *part.shape[1:]) if len(part) == 1 else part
        return rows.unsqueeze(0).expand(*across, *part.shape[1:]).flatten(0, 1)

    x = decode(program, points.flatten(0, 1), map_given(repeated, given), site=site)
    return x.reshape(*across, *x.shape[1:])


# -- evaluation of codes -----------------------------------------------------------------------------------------------


def probe(train: Tensor, train_y: Tensor, test: Tensor, test_y: Tensor) -> float:
    """Test accuracy of logistic regression on standardized features, ``(N, ...)``: are the classes linear in z?"""
    _check_codes(train, train_y, test, test_y)
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    classifier.fit(_as_feature_rows(train), train_y.cpu().numpy())
    return float(classifier.score(_as_feature_rows(test), test_y.cpu().numpy()))


def knn(train: Tensor, train_y: Tensor, test: Tensor, test_y: Tensor, neighbors: int = 5) -> float:
    """Test accuracy of the majority among the nearest training data, by Euclidean distance."""
    _check_codes(train, train_y, test, test_y)
    from sklearn.neighbors import KNeighborsClassifier

    check_count(neighbors, "neighbors")
    if neighbors > len(train):
        raise ValueError(f"neighbors is {neighbors}, but there are {len(train)} training data: use fewer neighbors")
    classifier = KNeighborsClassifier(neighbors)
    classifier.fit(_as_feature_rows(train), train_y.cpu().numpy())
    return float(classifier.score(_as_feature_rows(test), test_y.cpu().numpy()))


def cluster(z: Tensor, num_clusters: int, *, seed: int = 0) -> Tensor:
    """The k-means cluster of each z, integers ``(N,)``: the best of 10 starts."""
    from sklearn.cluster import KMeans

    check_finite(z, "z")
    check_seed(seed)
    check_count(num_clusters, "num_clusters")
    if num_clusters > len(z):
        raise ValueError(f"num_clusters is {num_clusters}, but there are {len(z)} codes: use fewer")
    found = KMeans(num_clusters, n_init=10, random_state=seed % 2**32).fit_predict(_as_feature_rows(z))
    return torch.from_numpy(found).long()


@dataclass(frozen=True)
class Agreement:
    """Agreement of clusters with classes; each number is at most 1, and 1 if they are equal up to their names.

    Attributes:
        accuracy: share of the data whose cluster matches their class, under the best one-to-one matching.
        nmi: mutual information of cluster and class, divided by the mean of their entropies; 0 if independent.
        ari: share of pairs of data on which clusters and classes agree (together or apart), adjusted so that 0 is
            chance.
    """

    accuracy: float
    nmi: float
    ari: float


def agreement(clusters: Tensor, y: Tensor) -> Agreement:
    """Compare clusters with classes, integers ``(N,)`` each; names do not matter, and their numbers may differ."""
    from scipy.optimize import linear_sum_assignment
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
    from sklearn.metrics.cluster import contingency_matrix

    check_dense(clusters, "clusters")
    check_labels(y, "y", len(clusters))
    check_labels(clusters, "clusters", len(y))
    pairs = [each.cpu().numpy() for each in (y, clusters)]
    table = contingency_matrix(*pairs)
    right = table[linear_sum_assignment(table, maximize=True)].sum()
    return Agreement(
        float(right) / len(y), float(normalized_mutual_info_score(*pairs)), float(adjusted_rand_score(*pairs))
    )


@dataclass(frozen=True)
class Quality(Result):
    """The result of `assess`, on ``num_test`` data.

    Attributes:
        probe, knn: accuracies of `probe` and `knn`.
        clusters: `Agreement` of k-means, with as many clusters as classes.
    """

    probe: float
    knn: float
    clusters: Agreement
    num_test: int

    def stderr(self, accuracy: float) -> float:
        """Standard error of an accuracy on the test data."""
        return share_stderr(accuracy, self.num_test)

    def cells(self) -> list[str]:
        """The numbers as a row of a table."""
        right = (with_error(share, self.stderr(share), 3) for share in (self.probe, self.knn))
        return [*right, *(f"{value:.3f}" for value in vars(self.clusters).values())]

    def parts(self) -> list[str | Table]:
        return [Table(["linear probe", "neighbors", "clusters", "NMI", "ARI"], [self.cells()])]

    def as_dict(self) -> dict[str, Any]:
        """Plain Python, for JSON."""
        return {"probe": self.probe, "knn": self.knn, **{f"clusters_{k}": v for k, v in vars(self.clusters).items()}}


def assess(
    train: Tensor, train_y: Tensor, test: Tensor, test_y: Tensor, *, neighbors: int = 5, seed: int = 0
) -> Quality:
    """`probe`, `knn`, and k-means on the test data with as many clusters as they have classes.

    Args:
        train, test: codes, or other features per datum, ``(N, ...)`` and ``(M, ...)``. Pixels are the baseline.
        train_y, test_y: labels, ``(N,)`` and ``(M,)``.
        neighbors: number of neighbors of `knn`.
        seed: seed of the clusters.
    """
    _check_codes(train, train_y, test, test_y)
    found = cluster(test, len(test_y.unique()), seed=seed)
    return Quality(
        probe(train, train_y, test, test_y),
        knn(train, train_y, test, test_y, neighbors),
        agreement(found, test_y),
        len(test),
    )


def _check_codes(train: Tensor, train_y: Tensor, test: Tensor, test_y: Tensor) -> None:
    for name, z, y in (("train", train, train_y), ("test", test, test_y)):
        check_finite(z, name)
        check_labels(y, f"{name}_y", len(z))
        if int(y.min()) < 0:
            raise ValueError(f"{name}_y holds unknown labels (-1), which are no class: drop those rows")


def _as_feature_rows(z: Tensor) -> Any:
    return z.detach().cpu().double().reshape(len(z), -1).numpy()


# -- all of it ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Representation(Result):
    """The result of `represent`.

    Attributes:
        site: the name of the code.
        z: the code of each datum, ``(N, *z_shape)``; for classes, their probabilities.
        y: the labels of the data, ``(N,)``, if they have any.
        form: the form of the code, in words.
        quality: the `Quality` of z under ``site``, and that of x itself under "x"; empty without labels.
        units: the features in use, by site; empty if the program is not a VAE.
    """

    site: str
    z: Tensor
    y: Tensor | None
    form: str
    quality: dict[str, Quality]
    units: dict[str, Units]

    def parts(self) -> list[str | Table]:
        parts: list[str | Table] = [f"{self.site} of {len(self.z)} data, {self.form}"]
        parts += [f"{name}: {each}" for name, each in self.units.items()]
        if self.quality:
            header = ["of", "linear probe", "5 neighbors", "clusters", "NMI", "ARI"]
            parts.append(Table(header, [[name, *each.cells()] for name, each in self.quality.items()]))
        return parts

    def as_dict(self) -> dict[str, Any]:
        """Plain Python, for JSON."""
        return {
            "site": self.site,
            "num_data": len(self.z),
            "quality": {name: each.as_dict() for name, each in self.quality.items()},
            "active": {name: int(each.active.sum()) for name, each in self.units.items()},
            "kl": {name: None if each.kl is None else each.kl.tolist() for name, each in self.units.items()},
        }


def represent(
    program: Program,
    data: Data | Tensor,
    train: Data | None = None,
    *,
    site: str | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Representation:
    """Encode data, find the features of the code that are in use, and evaluate the code by the labels, if any.

    Args:
        program: a program with `codes`.
        data: the data to encode, and to evaluate on.
        train: labeled data for the probe and the neighbors, if ``data`` have labels.
        site: a name in `codes`; default the nearest to x.
        seed: seed of draws and clusters.
        progress: whether to show bars.

    Raises:
        ValueError, TypeError: the program has no code of that name, or the data do not fit.
    """
    check_program(program)
    check_type(train, Data | None, "train", "a dgm.Data or None")
    site, points = program.code_named(site), as_data(program, data)

    def coded(points: Data) -> Tensor:
        x, given, _ = program.arguments(points)
        return encode(program, x, given, site=site, seed=seed, progress=progress)

    z, quality = coded(points), dict[str, Quality]()
    if points.y is not None and train is not None:
        train = as_data(program, train, "train")
        if train.y is None:
            raise ValueError(f"train ({train.name}) has no labels, but data has: pass labeled training data")
        for name, (seen, unseen) in {site: (coded(train), z), "x": (train.x, points.x)}.items():
            quality[name] = assess(seen, train.y, unseen, points.y, seed=seed)
    used = units(program, points[:512], seed=seed) if isinstance(core_of(program), VAE) and len(z) > 1 else {}
    return Representation(site, z, points.y, _describe_code(program, site, z), quality, used)


def _describe_code(program: Program, site: str, z: Tensor) -> str:
    size, values, prior = z[0].numel(), z.shape[-1], program.codes()[site]
    if not is_discrete(program, site):
        return f"{size} features"
    if z.shape[1:] == prior.event_shape and prior.levels == 2:
        return f"{size} bits, as their probabilities"
    if size == values:
        return f"a class among {values}, as its probabilities"
    return f"{size // values} codes of {values} values, as their probabilities"


def latents(program: Program, x: Tensor) -> Tensor | None:
    """The latent representation of x: the mean of q(z | x), or a flow's z; None without latents.

    Args:
        x: ``(N, *event_shape)``.

    Returns:
        ``(N, D)``, on the CPU.
    """
    return encode(program, x).flatten(1) if isinstance(core_of(program), (VAE, Dequantized)) else None
