r"""Representations: what a program says of x in place of x, and what that is good for.

*Where x goes.* A program with latents maps x to a code z, and back:

====================  ===============================================  =================================================
program               `encode`                                         `decode`
====================  ===============================================  =================================================
`VAE`                 :math:`E_q[z \mid x]`, or a draw of it           :math:`E_p[x \mid z]`, or a draw of it
`Flow`                :math:`z = f^{-1}(x)`                            :math:`x = f(z)`
`Dequantized`         :math:`f^{-1}((x + 1/2) / L)`                    the cell of :math:`f(z)`
diffusions            the end of the probability-flow ODE from x       its beginning, from z
====================  ===============================================  =================================================

A flow's z, and that of a diffusion, is as large as x and loses nothing: it is another picture of the same data, not a
summary. The mean of a class that z may be is that of its one-hot code: the probabilities q(z = k | x).

*Between and around.* A line between two codes, :math:`(1 - t) a + t b`, passes closer to the origin than either end;
N(0, I) in D dimensions hardly ever is closer to it than :math:`\sqrt D`, so that the middle of the line is where the
prior has next to nothing. The arc keeps the length,

.. math::
    z_t = \frac{\sin((1 - t)\, \omega)}{\sin \omega}\, a + \frac{\sin(t\, \omega)}{\sin \omega}\, b, \qquad
    \omega = \arccos \frac{a^\top b}{\|a\| \|b\|}.

*What it is good for* depends on the question; here it is the label that the program never saw: `probe` (is it linear
in z?), `knn` (are neighbours alike?), `cluster` and `agreement` (are there groups, and are they the classes?). Which
features of z are in use at all, and at how many nats each, is what `dgm_pyro.infer.units` says.

Source: Shoemake 1985 and White 2016 (arXiv 1609.04468), the arc; Song et al. 2021 (arXiv 2010.02502, section 5.4),
codes of a diffusion; Strehl and Ghosh 2002, NMI; Hubert and Arabie 1985, ARI; Xie et al. 2016 (arXiv 1511.06335),
clustering accuracy.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor

import dgm_pyro.noise as noise
from dgm_pyro.checks import (
    check_choice,
    check_count,
    check_dense,
    check_finite,
    check_labels,
    check_number,
    check_seed,
    check_tensor,
    check_type,
    is_integer,
)
from dgm_pyro.evaluation import evaluating, program_device
from dgm_pyro.families.dequantized import Dequantized
from dgm_pyro.families.diffusion import Denoised, Denoising
from dgm_pyro.families.flow import Flow
from dgm_pyro.families.labelled import Labelled
from dgm_pyro.families.onehot import OneHot
from dgm_pyro.families.samplers import Heun, Time, run, spacing_named
from dgm_pyro.families.vae import VAE
from dgm_pyro.infer.target import features_of, finite_mean, guide_trace
from dgm_pyro.program import (
    Conditional,
    Program,
    check_program,
    is_pair,
    latent_sites,
    map_given,
    parameter_of,
    seeded,
)

# -- to the code, and back ---------------------------------------------------------------------------------------------


def codes(program: Program) -> tuple[str, ...]:
    """Names of the codes that `encode` can give: the levels of a VAE, the nearest to x first; ``("z",)`` of others.

    Raises:
        ValueError: the program has none.
    """
    check_program(program)
    if isinstance(program, VAE):
        return program.latent, *(codes(program.prior) if isinstance(program.prior, VAE) else ())
    if isinstance(program, (Flow, Denoising)) or (isinstance(program, Dequantized) and isinstance(program.flow, Flow)):
        return ("z",)
    if isinstance(program, Labelled):
        raise ValueError(
            "a Labelled program has a code for each class: pass the program within and the labels, "
            "encode(labelled.program, x, given=labelled.classify(x))"
        )
    raise ValueError(f"this {type(program).__name__} has no latent code: use a VAE, a flow or a diffusion")


@torch.no_grad()
def encode(
    program: Program,
    x: Tensor,
    given: Any = None,
    *,
    site: str | None = None,
    draw: bool = False,
    num_draws: int = 16,
    batch_size: int = 256,
    seed: int = 0,
) -> Tensor:
    """The code of each x.

    Args:
        program: a VAE (a hierarchy of them), a flow, dequantized or not, or a diffusion.
        x: ``(N, *event_shape)``.
        given: ``(N, *given_shape)`` for a conditional program.
        site: which of `codes`; default the nearest to x.
        draw: a draw of z from q(z | x), or of the place in the cell of a dequantized x, in place of the mean.
        num_draws: where E_q[z | x] has no closed form, how many draws to average; of the levels above, in a hierarchy.
        batch_size: data at once; the codes do not depend on it.
        seed: of the draws, which are each datum's own (`noise.per_datum`): equal x have equal codes, drawn ones too.
            The global random state is left as it was.

    Returns:
        ``(N, *z_shape)``, on the CPU; of a class, its probabilities, ``(N, *z_shape, K)``, unless ``draw``.

    Raises:
        ValueError: the program has no latent code, no such site, or x does not fit.
    """
    site = _site(program, site)
    check_count(num_draws, "num_draws")
    check_count(batch_size, "batch_size")
    check_dense(x, "x")
    where = program_device(program)
    program.check(x.to(where), _to(given, where))

    def of(x: Tensor, given: Any) -> Tensor:
        if isinstance(program, Flow):
            return program.inverse_map(x, given)
        if isinstance(program, Dequantized):
            return _place(program, x, given, draw)
        if isinstance(program, Denoising):
            x0, noise = program.clean(x), _ascending(program)
            return run(Heun(), noise[0].alpha * x0, noise, _denoiser(program, given))
        return _posterior(program, x, given, site, 1 if draw else num_draws, draw)

    def with_own_noise(x: Tensor, given: Any) -> Tensor:
        with noise.per_datum(x, seed):
            return of(x, given)

    return _in_batches(program, with_own_noise, x, given, batch_size, seed)


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
) -> Tensor:
    """The x of each code.

    Args:
        program, given, site, batch_size, seed: as for `encode`.
        z: ``(N, *z_shape)``; integers for a code of classes.
        draw: a draw of x from p(x | z) in place of the mean. Levels between x and a ``site`` above are drawn with it,
            and so they are where they are discrete.

    Returns:
        ``(N, *event_shape)``, on the CPU. Means are reals in the units of x, of integers too; what has no mean in
        closed form, such as an autoregressive x, is drawn.

    Raises:
        ValueError: the program has no latent code, no such site, or z does not fit.
    """
    site = _site(program, site)
    check_count(batch_size, "batch_size")
    check_tensor(z, _code_shape(program, site), "z", f"the shape of the code {site!r}")
    check_finite(z, "z")
    where = program_device(program)
    program.check_given(_to(given, where), len(z))

    def of(z: Tensor, given: Any) -> Tensor:
        if isinstance(program, Flow):
            return program.forward_map(z, given)
        if isinstance(program, Dequantized):
            v = _flow_of(program).forward_map(z, given)
            return (v * program.levels).floor().clamp(0, program.levels - 1).long()
        if isinstance(program, Denoising):
            noise, denoise = _ascending(program)[::-1], _denoiser(program, given)
            found = program.likelihood(denoise(run(Heun(), z, noise, denoise), noise[-1]))
            return found.sample() if draw else _mean_of_x(found, program.levels, z.device)
        return _generated(program, z, given, site, draw)

    return _in_batches(program, of, z, given, batch_size, seed)


def _site(program: Program, site: str | None) -> str:
    names = codes(program)
    if site is not None and site not in names:
        raise ValueError(f"site must be one of {', '.join(map(repr, names))}, got {site!r}")
    return site or names[0]


def _code_shape(program: Any, site: str) -> torch.Size:
    if isinstance(program, VAE):
        return prior_of(program, site).event_shape
    if isinstance(program, Denoising):
        return program.event_shape
    return _flow_of(program).base.event_shape


def _flow_of(program: Any) -> Flow:
    return program if isinstance(program, Flow) else program.flow


def _in_batches(
    program: Program, of: Callable[[Tensor, Any], Tensor], rows: Tensor, given: Any, batch_size: int, seed: int
) -> Tensor:
    where, found = program_device(program), []
    with evaluating(program), seeded(seed, where):
        for start in range(0, len(rows), batch_size):
            part = slice(start, start + batch_size)
            found.append(of(rows[part].to(where), _to(given, where, part)).cpu())
    return torch.cat(found)


def _to(given: Any, where: torch.device, rows: slice = slice(None)) -> Any:
    def moved(part: Any) -> Tensor:
        check_dense(part, "given")
        return part[rows].to(where)

    return map_given(moved, given)


# -- VAEs


def _posterior(program: Any, x: Tensor, given: Any, site: str, num_draws: int, draw: bool) -> Tensor:
    """E_q[site | x], averaged over draws of the latents that q states before it; or one draw."""
    levels, total = prior_of(program, site).levels, torch.zeros(())
    for _ in range(num_draws):
        trace: Any = guide_trace(program, x, given=given, batch=(len(x),))
        if site not in trace.nodes:
            raise ValueError(
                f"the guide of this {type(program).__name__} does not state {site!r}: encode needs q(z | x)"
            )
        fn, value = trace.nodes[site]["fn"], trace.nodes[site]["value"]
        if draw:
            return value
        mean = _mean(fn)
        if mean is not None and latent_sites(trace)[0] == site:
            return mean
        if mean is None:
            mean = value if levels in (None, 2) else F.one_hot(value.long(), levels).to(parameter_of(program).dtype)
        total = total + mean / num_draws
    return total


def prior_of(program: Any, site: str) -> Any:
    """p(z) of one of the `codes` of a `VAE`, at any level of a hierarchy."""
    return program.prior if site == program.latent else prior_of(program.prior, site)


def _mean(fn: Any) -> Tensor | None:
    """The mean in closed form, of classes that of their one-hot code; None if there is none."""
    base = fn
    while isinstance(base, dist.Independent):
        base = base.base_dist
    if isinstance(base, dist.Categorical):
        return base.probs
    return finite_mean(fn)


def _generated(vae: Any, z: Tensor, given: Any, site: str, draw: bool) -> Tensor:
    if site != vae.latent:
        above = given if vae.prior.conditional else None
        z = _generated(vae.prior, z, above, site, draw or vae.prior.levels is not None)
    likelihood = vae.likelihood
    seen = (z, given) if is_pair(likelihood.given_shape) else z
    if isinstance(likelihood, Conditional) and not draw:
        with contextlib.suppress(NotImplementedError, ValueError):  # no mean, or features that depend on one another
            return _mean_of_x(likelihood(seen), likelihood.levels, z.device)
    return likelihood.sample(len(z), seen)


def _mean_of_x(distribution: Any, levels: int | None, device: torch.device) -> Tensor:
    """E[x] in the units of x; of integers the sum over their values.

    Raises:
        ValueError: x are integers that depend on one another.
        NotImplementedError: there is no mean in closed form.
    """
    if levels is None:
        mean: Tensor = distribution.mean
        return mean
    feature = features_of(distribution)
    return sum(
        (v * feature.log_prob(torch.full(feature.batch_shape, v, device=device)).exp() for v in range(1, levels)),
        torch.zeros(()),
    )


# -- flows and diffusions


def _place(program: Dequantized, x: Tensor, given: Any, draw: bool) -> Tensor:
    if draw:
        trace: Any = guide_trace(program, x, given=given, batch=(len(x),))
        v = trace.nodes[f"{program.variable}_continuous"]["value"]
    else:
        v = (x.to(parameter_of(program).dtype) + 0.5) / program.levels
    return _flow_of(program).inverse_map(v, given)


def _ascending(program: Denoising) -> list[Time]:
    """All times of the chain, the least noisy first."""
    return program.times(program.steps, spacing_named("uniform"))[::-1]


def _denoiser(program: Denoising, given: Any) -> Callable[[Tensor, Time], Denoised]:
    def denoise(x: Tensor, time: Time) -> Denoised:
        return program.denoise(x, torch.as_tensor(time.t, device=x.device).expand(len(x)), given)

    return denoise


# -- around a code, and between two ------------------------------------------------------------------------------------


def line(a: Tensor, b: Tensor, num: int = 8) -> Tensor:
    """``num`` evenly spaced points on the line from each a to each b, ends included, ``(num, N, *shape)``."""
    t = _shares(a, b, num)
    return torch.where(t == 1, b, a + t * (b - a))


def arc(a: Tensor, b: Tensor, num: int = 8) -> Tensor:
    """``num`` points on the arc from each a to each b at even angles, ends included, ``(num, N, *shape)``.

    The length goes with the angle from that of a to that of b. Codes in one direction, or in opposite ones, have no
    arc of their own and get the line.
    """
    t = _shares(a, b, num)
    flat_a, flat_b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    lengths = flat_a.norm(dim=1) * flat_b.norm(dim=1)
    cosine = ((flat_a * flat_b).sum(1) / torch.where(lengths > 0, lengths, 1.0)).clamp(-1, 1)
    angle = cosine.acos().reshape(-1, *(1,) * (a.dim() - 1))
    sine = angle.sin()
    bent = (lengths.reshape(angle.shape) > 0) & (sine > 1e-3)
    points = (((1 - t) * angle).sin() * a + (t * angle).sin() * b) / torch.where(bent, sine, 1.0)
    points = torch.where(bent, points, line(a, b, num))
    return torch.where(t == 0, a, torch.where(t == 1, b, points))


PATHS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {"linear": line, "spherical": arc}
"""Ways from one code to another, by name."""


def _shares(a: Tensor, b: Tensor, num: int) -> Tensor:
    check_count(num, "num", at_least=2)
    check_finite(a, "a")
    check_finite(b, "b")
    if a.shape != b.shape or not a.is_floating_point():
        raise ValueError(
            f"a has shape {tuple(a.shape)} ({a.dtype}), b {tuple(b.shape)}: pass two codes of reals, of one shape"
        )
    return torch.linspace(0, 1, num, dtype=a.dtype, device=a.device).reshape(-1, *(1,) * a.dim())


def interpolate(
    program: Program, a: Tensor, b: Tensor, num: int = 8, *, path: str = "spherical", given: Any = None
) -> Tensor:
    """From each datum a to each b: their codes, a `PATHS` between these, and what the program makes of it.

    Args:
        a, b: data, ``(N, *event_shape)``.
        num: points, the ends included. Those are decoded too: the reconstructions of a and b.
        path: "linear" or "spherical".
        given: ``(N, *given_shape)`` for a conditional program, the same along the path.

    Returns:
        ``(num, N, *event_shape)``.

    Raises:
        ValueError: no such path, codes that are discrete, or as `encode`.
    """
    check_choice(path, PATHS, "path")
    check_count(num, "num", at_least=2)
    check_finite(a, "a")
    check_finite(b, "b")
    _require_real(program, codes(program)[0])
    points = PATHS[path](encode(program, a, given), encode(program, b, given), num)
    return _decoded(program, points, given, None)


def traverse(
    program: Program,
    z: Tensor,
    values: Sequence[float] | Tensor = (-3, -2, -1, 0, 1, 2, 3),
    features: Sequence[int] | None = None,
    *,
    given: Any = None,
    site: str | None = None,
) -> Tensor:
    """x decoded after one feature of its code is set to each of ``values``, with the others unchanged.

    Args:
        z: one code, ``(1, *z_shape)``: of a datum, by `encode`, or zeros, the mean of a standard prior.
        values: in the units of z.
        features: flat indices of the features to set, in the order wanted; default all. `units` says which matter.
        given: ``(1, *given_shape)`` for a conditional program.
        site: which code z is.

    Returns:
        ``(features, values, *event_shape)``.

    Raises:
        ValueError: z is not one code of reals, or a feature is not there.
    """
    _require_real(program, _site(program, site))
    shape = _code_shape(program, _site(program, site))
    check_finite(z, "z")
    if tuple(z.shape) != (1, *shape):
        raise ValueError(f"z has shape {tuple(z.shape)}, but one code is (1, *{tuple(shape)})")
    chosen = range(shape.numel()) if features is None else features
    indices = isinstance(chosen, Sequence) and all(is_integer(i) and 0 <= i < shape.numel() for i in chosen)
    if not indices or not chosen:
        raise ValueError(f"features must be among 0 .. {shape.numel() - 1}, got {features!r}")
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


def grid(program: Program, num: int = 12, reach: float = 2.5, *, given: Any = None) -> Tensor:
    """What each place of a plane of codes stands for: a square grid over [-reach, reach]^2.

    Returns:
        ``(num, num, *event_shape)``, laid out as a picture of that plane: rows from the highest z_2 to the lowest,
        columns from the lowest z_1 to the highest.

    Raises:
        ValueError: the code has not 2 features.
    """
    check_program(program)
    check_count(num, "num")
    check_number(reach, "reach", above=0)
    like = parameter_of(program)
    (site, *_), axis = codes(program), torch.linspace(-reach, reach, num, dtype=like.dtype)
    _require_real(program, site)
    if tuple(_code_shape(program, site)) != (2,):
        raise ValueError(
            f"a grid is for codes of 2 features, but {site!r} has shape {tuple(_code_shape(program, site))}"
        )
    z_1, z_2 = torch.meshgrid(axis, axis, indexing="xy")
    return _decoded(program, torch.stack([z_1, z_2.flip(0)], -1), given, None)


def is_discrete(program: Program, site: str | None = None) -> bool:
    """Whether a code takes integers only, so that there is nothing between two of them."""
    check_program(program)
    if not isinstance(program, VAE):
        return False
    prior = prior_of(program, _site(program, site))
    return prior.levels is not None or isinstance(prior, OneHot)


def _require_real(program: Program, site: str) -> None:
    if is_discrete(program, site):
        raise ValueError(f"the code {site!r} is discrete: there is nothing between its values")


def _decoded(program: Program, points: Tensor, given: Any, site: str | None) -> Tensor:
    """`decode` of ``(A, B, *z_shape)``; ``given`` has B rows, or one for all."""
    across = points.shape[:2]

    def repeated(part: Tensor) -> Tensor:
        check_dense(part, "given")
        if len(part) not in (1, across[1]):
            raise ValueError(f"given has {len(part)} rows: pass one, or one for each of {across[1]}")
        rows = part.expand(across[1], *part.shape[1:]) if len(part) == 1 else part
        return rows.unsqueeze(0).expand(*across, *part.shape[1:]).flatten(0, 1)

    x = decode(program, points.flatten(0, 1), map_given(repeated, given), site=site)
    return x.reshape(*across, *x.shape[1:])


# -- what a code is good for -------------------------------------------------------------------------------------------


def probe(train: Tensor, train_y: Tensor, test: Tensor, test_y: Tensor) -> float:
    """Test accuracy of a logistic regression on standardised features, ``(N, ...)``: are the classes linear in z?"""
    _check_codes(train, train_y, test, test_y)
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    classifier.fit(_features(train), train_y.cpu().numpy())
    return float(classifier.score(_features(test), test_y.cpu().numpy()))


def knn(train: Tensor, train_y: Tensor, test: Tensor, test_y: Tensor, neighbours: int = 5) -> float:
    """Test accuracy of the majority among the nearest training data, by Euclidean distance: are neighbours alike?"""
    _check_codes(train, train_y, test, test_y)
    from sklearn.neighbors import KNeighborsClassifier

    check_count(neighbours, "neighbours")
    if neighbours > len(train):
        raise ValueError(f"neighbours is {neighbours}, but there are {len(train)} training data")
    classifier = KNeighborsClassifier(neighbours)
    classifier.fit(_features(train), train_y.cpu().numpy())
    return float(classifier.score(_features(test), test_y.cpu().numpy()))


def cluster(z: Tensor, num_clusters: int, *, seed: int = 0) -> Tensor:
    """The k-means cluster of each z, integers ``(N,)``: the best of 10 starts."""
    from sklearn.cluster import KMeans

    check_finite(z, "z")
    check_seed(seed)
    check_count(num_clusters, "num_clusters")
    if num_clusters > len(z):
        raise ValueError(f"num_clusters is {num_clusters}, but there are {len(z)} codes: use fewer")
    found = KMeans(num_clusters, n_init=10, random_state=seed % 2**32).fit_predict(_features(z))
    return torch.from_numpy(found).long()


@dataclass(frozen=True)
class Agreement:
    """Agreement of clusters with classes; each number is at most 1, and 1 if they are the same up to their names.

    Attributes:
        accuracy: share of the data whose cluster is that of their class, under the best one-to-one naming.
        nmi: mutual information of cluster and class, over the mean of their entropies; 0 if they are independent.
        ari: share of pairs of data that both keep together or both apart, less what chance gives, and rescaled: 0 is
            chance.
    """

    accuracy: float
    nmi: float
    ari: float


def agreement(clusters: Tensor, y: Tensor) -> Agreement:
    """Compare clusters with classes, integers ``(N,)`` each; names mean nothing, and numbers of both may differ."""
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
class Quality:
    """The result of `assess`, on ``num_test`` data.

    Attributes:
        probe, knn: accuracies.
        clusters: of k-means with as many clusters as classes.
    """

    probe: float
    knn: float
    clusters: Agreement
    num_test: int

    def stderr(self, accuracy: float) -> float:
        """Standard error of an accuracy on the test data."""
        return math.sqrt(accuracy * (1 - accuracy) / self.num_test)

    def as_dict(self) -> dict[str, float]:
        """Plain Python, for JSON."""
        return {"probe": self.probe, "knn": self.knn, **{f"clusters_{k}": v for k, v in vars(self.clusters).items()}}


def assess(
    train: Tensor, train_y: Tensor, test: Tensor, test_y: Tensor, *, neighbours: int = 5, seed: int = 0
) -> Quality:
    """`probe`, `knn`, and k-means on the test data with as many clusters as they have classes.

    Args:
        train, test: codes, or anything else per datum, ``(N, ...)`` and ``(M, ...)``. Pixels are the reference to beat.
        train_y, test_y: labels, ``(N,)`` and ``(M,)``.
    """
    _check_codes(train, train_y, test, test_y)
    found = cluster(test, len(test_y.unique()), seed=seed)
    return Quality(
        probe(train, train_y, test, test_y),
        knn(train, train_y, test, test_y, neighbours),
        agreement(found, test_y),
        len(test),
    )


def _check_codes(train: Tensor, train_y: Tensor, test: Tensor, test_y: Tensor) -> None:
    for name, z, y in (("train", train, train_y), ("test", test, test_y)):
        check_finite(z, name)
        check_labels(y, f"{name}_y", len(z))


def _features(z: Tensor) -> Any:
    return z.detach().cpu().double().reshape(len(z), -1).numpy()


def latents(program: Program, x: Tensor) -> Tensor | None:
    """The latent representation of x: the mean of q(z | x), or a flow's z; None without latents.

    Args:
        x: ``(N, *event_shape)``.

    Returns:
        ``(N, D)``, on the CPU.
    """
    return encode(program, x).flatten(1) if isinstance(program, (VAE, Dequantized)) else None
