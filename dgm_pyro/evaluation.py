r"""Evidence: how well a program explains data, together with the units and the kind of the number.

Nats per datum are the mean of log p(x); bits per dimension are :math:`-\text{nats} / (D \ln 2)`. An `Evidence` records
whether it is a *mass* on integers or a *density* on reals, and whether it is exact or a bound. It refuses a comparison
with a number of another measure.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

import dgm_pyro.noise as noise
from dgm_pyro.checks import READERS, check_counts, check_dense, check_type, find_device, suggesting
from dgm_pyro.data import Data, StoredData
from dgm_pyro.families.autoguide import weigh
from dgm_pyro.families.continuous import ContinuousDiffusion
from dgm_pyro.families.labeled import Labeled
from dgm_pyro.families.missing import observed_part
from dgm_pyro.families.standardized import core_of
from dgm_pyro.networks.mlp import eval_mode, products_in
from dgm_pyro.objectives import ELBO, Bound
from dgm_pyro.posterior import Posterior
from dgm_pyro.program import (
    Program,
    alone,
    check_program,
    log_mean_exp,
    parameter_of,
    parts_of,
    seeded,
    unchecked,
)
from dgm_pyro.results import Result, Table, with_error

__all__ = ["Difference", "Evidence", "as_data", "evaluate", "evaluating", "program_device", "standard_error"]


@dataclass(frozen=True)
class Evidence(Result):
    """log p(x) of a data set under a program.

    Attributes:
        values: log p(x), or a bound on it, per datum in nats, ``(N,)``.
        kind: "exact", "elbo", "iwae-K", or "ode" (the density of a probability flow, exact up to the solver's
            tolerance).
        measure: "mass" on integers or "density" on reals; for columns of both, which columns are which.
        num_dims: D, the number of features of one datum.
        program, data: names of the program and of the data.
        digest: a hash of the data in their order; evidences with different digests are of different data.
        reconstruction, kl: means over the data of an ELBO's terms per site, in nats; nats = reconstruction - kl.
    """

    values: Tensor
    kind: str
    measure: str
    num_dims: int
    program: str = ""
    data: str = ""
    digest: str = ""
    reconstruction: dict[str, float] = field(default_factory=dict)
    kl: dict[str, float] = field(default_factory=dict)

    @property
    def nats(self) -> float:
        """Mean log p(x) per datum, in nats."""
        return self.values.mean().item()

    @property
    def nats_stderr(self) -> float:
        """Standard error of `nats` over the data."""
        return standard_error(self.values)

    @property
    def bits_per_dim(self) -> float:
        """Negative log p(x) per feature, in bits; lower is better."""
        return -self.nats / (self.num_dims * math.log(2))

    @property
    def stderr(self) -> float:
        """Standard error of `bits_per_dim` over the data."""
        return self.nats_stderr / (self.num_dims * math.log(2))

    def minus(self, other: Evidence) -> Difference:
        """Mean paired difference to another evidence of the same data in the same order, in nats per datum.

        Raises:
            ValueError: the two are not comparable, because their measures or their data differ.
        """
        check_type(other, Evidence, "other", "an Evidence")
        if self.measure != other.measure:
            raise ValueError(
                f"a {self.measure} cannot be compared with a {other.measure}: wrap the density in "
                "dgm.Dequantized(flow, levels=...), so that both are masses on the integers"
            )
        if (self.digest, self.num_dims, len(self.values)) != (other.digest, other.num_dims, len(other.values)):
            raise ValueError(
                f"the evidences are of different data: {len(self.values)} of {self.data or 'unnamed data'} and "
                f"{len(other.values)} of {other.data or 'unnamed data'}, or the same in another order: evaluate both "
                "on the same split"
            )
        difference = self.values - other.values
        return Difference(difference.mean().item(), standard_error(difference), (self.kind, other.kind))

    def as_dict(self) -> dict[str, Any]:
        """The numbers as plain Python, for JSON."""
        return {
            "program": self.program,
            "data": self.data,
            "digest": self.digest,
            "kind": self.kind,
            "measure": self.measure,
            "nats": self.nats,
            "nats_stderr": self.nats_stderr,
            "bits_per_dim": self.bits_per_dim,
            "stderr": self.stderr,
            "num_data": len(self.values),
            "num_dims": self.num_dims,
            "reconstruction": self.reconstruction,
            "kl": self.kl,
        }

    def parts(self) -> list[str | Table]:
        text = (
            f"{with_error(self.bits_per_dim, self.stderr, 4)} bits/dim "
            f"({with_error(self.nats, self.nats_stderr, 3)} nats, {self.kind}, {self.measure})"
        )
        for label, terms in (("reconstruction", self.reconstruction), ("KL", self.kl)):
            told = [f"{site} {value:.3f}" for site, value in terms.items() if value]  # a time costs nothing
            if self.kl and told:
                text += f"; {label} " + ", ".join(told)
        return [text]


@dataclass(frozen=True)
class Difference:
    """The mean paired difference of two evidences, in nats per datum; it unpacks into ``nats`` and ``stderr``.

    Attributes:
        nats: the first minus the second, in nats per datum.
        stderr: standard error over the data.
        kinds: kinds of the first and of the second, such as "exact" and "elbo".
    """

    nats: float
    stderr: float
    kinds: tuple[str, str]

    @property
    def kind(self) -> str:
        """What is known about the difference of the two log p(x): a bound may lie any distance below log p(x)."""
        first, second = (kind in ("exact", "ode") for kind in self.kinds)
        if first and second:
            return "exact"
        if first or second:
            return "at most" if first else "at least"
        return f"of bounds, {self.kinds[0]} and {self.kinds[1]}"

    def __iter__(self) -> Iterator[float]:
        return iter((self.nats, self.stderr))

    def __str__(self) -> str:
        error = "" if math.isnan(self.stderr) else f" +- {self.stderr:.3f}"
        return f"{self.nats:+.3f}{error} nats ({self.kind})"


def standard_error(values: Tensor) -> float:
    """Standard error of the mean of ``values``; NaN for a single value."""
    return (values.std() / len(values) ** 0.5).item() if len(values) > 1 else math.nan


def log_mean_weight(log_weights: Tensor) -> tuple[float, float]:
    """The log of the mean weight, and its standard error, in nats."""
    mean = log_mean_exp(log_weights)
    return float(mean), standard_error((log_weights - mean).exp())


def squared_mmd(a: Tensor, b: Tensor, kernel: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The squared maximum mean discrepancy of two sets, ``(N, D)`` and ``(M, D)``, without bias: it may be negative.

    Args:
        kernel: kernel of all pairs, ``(N, D)`` and ``(M, D)`` to ``(N, M)``.

    Source: Gretton et al. 2012 (A kernel two-sample test), lemma 6.
    """

    def total(x: Tensor, y: Tensor) -> Tensor:
        return torch.stack([kernel(part, y).sum() for part in x.split(PAIRED_ROWS)]).sum()

    def within(x: Tensor) -> Tensor:
        itself = torch.stack([kernel(part, part).diagonal().sum() for part in x.split(PAIRED_ROWS)]).sum()
        return (total(x, x) - itself) / (len(x) * (len(x) - 1))

    return within(a) + within(b) - 2 * total(a, b) / (len(a) * len(b))


@suggesting
@alone()
def evaluate(
    program: Program | Posterior,
    data: Data | Tensor | None = None,
    *,
    guide: Any = None,
    num_particles: int = 1,
    num_samples: int = 8,
    ode: bool = False,
    batch_size: int = 256,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> Evidence:
    """The evidence of ``data``: exact where the program is tractable, else a bound.

    Args:
        program: a program, whose mode (train or eval) does not change, nor its device unless ``device`` is passed; or
            a `Posterior`, whose data count as a single datum.
        data: a `Data`, or a tensor ``(N, *event_shape)``; with ``given`` or labels for a conditional program. A
            `Posterior` has its own.
        guide: a fitted guide for a `Posterior`, as for `dgm.infer.psis`; a `Program` has its own.
        num_particles: 1 for the ELBO; K for the importance-weighted bound with K draws per datum, which is tighter.
        num_samples: draws of an ELBO to average per datum; more draws lower the Monte Carlo error, not the bound.
        ode: whether to compute the density of the probability-flow ODE instead of the bound, for a
            `ContinuousDiffusion` of reals: see `ContinuousDiffusion.ode_log_prob`.
        batch_size: maximum number of data per batch. On a CPU, batches are smaller where outputs of networks are large.
            Lower it if memory is short. The numbers do not depend on it.
        seed: seed of the guide's draws, which belong to each datum (`noise.per_datum`): the value of a datum is a
            function of the datum, the program and the seed. The global random state does not change.
        device: device to compute on; default that of the program.
        progress: whether to show a bar, which counts data, or data times particles.

    Where features are missing, the evidence is that of the observed part: exact if they are independent, the MIWAE
    bound for a VAE whose likelihood has independent features, and the bound over the orders of the observed features
    for an `AnyOrder`.

    The label of a `Labeled` program is summed out; only log p(x | y) is bounded, where it is not exact.

    Memory does not grow with ``num_particles``: they come in chunks, and only the sum of their weights is kept.

    Returns:
        An `Evidence`; ``kind`` is "exact", "elbo", "iwae-K" or "ode".

    Raises:
        ValueError, TypeError: shapes, values or measures do not fit; the message names the remedy.
    """
    check_counts(num_particles=num_particles, num_samples=num_samples, batch_size=batch_size)
    if isinstance(program, Posterior):
        return _posterior_evidence(program, guide, num_particles, num_samples, seed, data=data, ode=ode, device=device)
    check_program(program)
    if guide is not None:
        raise TypeError(f"guide was passed, but this {type(program).__name__} has a guide of its own: leave guide out")
    data = as_data(program, data, missing=True)
    part = observed_part(program, data)
    device = program_device(program) if device is None else find_device(device)
    part.to(device)
    kind = "exact" if program.tractable else "elbo" if num_particles == 1 else f"iwae-{num_particles}"
    flow: Any = program.ode_log_prob if ode and isinstance(core_of(program), ContinuousDiffusion) else None
    if ode:
        if flow is None:
            raise ValueError(
                f"ode=True is for a ContinuousDiffusion, got a {type(core_of(program)).__name__}: leave it out"
            )
        if num_particles > 1:
            raise ValueError(f"ode=True takes no particles, got num_particles={num_particles}: leave one of them out")
        kind = "ode"
    weighted = kind.startswith("iwae")
    within = core_of(program.program if isinstance(program, Labeled) else program)
    if weighted and isinstance(within, ContinuousDiffusion):
        raise ValueError(
            f"num_particles is {num_particles}, but particles need a chain, here of {within.num_steps} steps, whose "
            "bound is looser than the one in continuous time: use num_particles=1, or evaluate the chain, "
            "program.unroll()"
        )
    total, unit = (len(data) * num_particles, "particle") if weighted else (len(data), "datum")
    bounds, keys = list[Bound](), list[Tensor]()
    draws = num_samples if kind == "elbo" else 1

    def score(value: Tensor, *arguments: Any) -> Bound:
        # A datum without missing values has the noise that it has among whole data, whose integers are hashed.
        keyed = value if program.levels is None else value.nan_to_num(nan=-1).long()
        with noise.per_datum(keyed, seed):
            return _exact_or_bound(part, value, *arguments)

    with (
        evaluating(program),
        seeded(seed, device),
        torch.no_grad(),
        tqdm(total=total, desc=kind, unit=unit, unit_scale=True, disable=not progress, leave=False) as bar,
    ):
        size, most = batch_size, None
        if device.type == "cpu" and flow is None and len(data) > 1:
            first = data[:2].to(device)

            def score_first(count: int) -> Bound:
                value, given, _ = part.arguments(first[:count])
                return score(value, given, 1, 1, lambda done: None, None)

            most = rows_within_limit(output_size(part, score_first))
            size = min(batch_size, max(1, most // draws))
        for batch in data.taken(slice(start, start + size) for start in range(0, len(data), size)):
            batch = batch.to(device)
            value, given, _ = part.arguments(batch)
            keys.append(_datum_keys(value, batch).cpu())
            if flow is not None:
                density = flow(value, given)
                bounds.append(Bound(density, density))
                bar.update(len(value))
            else:
                bounds.append(score(value, given, num_particles, num_samples, bar.update, most))
    return Evidence(
        values=torch.cat([bound.value for bound in bounds]).double().cpu(),
        kind=kind,
        measure=program.measure_given(given),
        num_dims=max(1, program.event_shape.numel()),
        program=type(core_of(program)).__name__,
        data=data.name,
        digest=f"{int(noise.row_keys(torch.cat(keys).unsqueeze(0))) % 2**64:016x}",
        reconstruction=_site_means([bound.reconstruction for bound in bounds]),
        kl=_site_means([bound.kl for bound in bounds]),
    )


def _posterior_evidence(
    posterior: Posterior, guide: Any, num_particles: int, num_samples: int, seed: int, **others: Any
) -> Evidence:
    """A bound on the log p(y) of all data together, from draws of a guide."""
    for argument, value in others.items():
        if value is not None and value is not False:
            raise TypeError(f"{argument} was passed, but a Posterior has its own data and device: leave it out")
    posterior.require_proper("its evidence is known up to a constant factor only")
    total, weighted = (num_particles, True) if num_particles > 1 else (num_samples, False)
    with seeded(seed, posterior.device), unchecked(), torch.no_grad():
        parts = [weigh(posterior, guide, size)[1] for _, size in noise.chunks(total, POSTERIOR_ROWS)]
    log_weights = torch.cat(parts).double()
    observed = [value.double().flatten() for value in posterior.observed.values()]
    values = torch.cat(observed) if observed else torch.zeros(0, device=posterior.device)
    return Evidence(
        values=(log_mean_exp(log_weights) if weighted else log_weights.mean()).reshape(1).cpu(),
        kind=f"iwae-{num_particles}" if weighted else "elbo",
        measure=posterior.measure,
        num_dims=max(1, len(values)),
        program=getattr(posterior.model, "__name__", type(posterior.model).__name__),
        data=", ".join(posterior.observed),
        digest=f"{int(noise.row_keys(values.unsqueeze(0))) % 2**64:016x}",
    )


def _datum_keys(value: Tensor, data: Data) -> Tensor:
    """A hash of each datum: of the scored value, and of x, given and mask; not of labels, which p(x) sums over."""
    found = [value, *(part for name, part in data.parts.items() if name != "y" and part is not value)]
    return noise.row_keys(torch.stack([noise.row_keys(part) for part in found], 1))


def _exact_or_bound(
    program: Program,
    x: Tensor,
    given: Any,
    num_particles: int,
    num_samples: int,
    advance: Callable[[float], Any],
    most: int | None,
) -> Bound:
    """log p(x): exact, or a bound by the ELBO of ``num_samples`` draws or by ``num_particles`` importance weights."""
    if isinstance(program, Labeled) and not program.tractable:
        return _sum_over_labels(program, x, num_particles, num_samples, advance, most)
    if not program.tractable and num_particles > 1:
        iwae = importance_bound(program, x, given, num_particles, advance, most)
        return Bound(iwae, iwae)
    bound = ELBO(num_samples)(program, x, given)
    advance(len(x))
    return bound


def _sum_over_labels(
    program: Labeled, x: Tensor, num_particles: int, num_samples: int, advance: Callable[[float], Any], most: int | None
) -> Bound:
    """log sum_y p(x, y) with bounds on each p(x | y); the classifier q(y | x) is not used.

    If all labels of the training data were known, nothing has trained the classifier. With particles, the weights of
    every class are unbiased, and so is their sum. Without, q(y) is Bayes' rule on the ELBOs of the classes, and the
    bound sum_y q(y) ELBO_y - KL(q(y) || p(y)) needs new draws: with the draws of q(y), it would favor the class whose
    ELBO they overestimate, and be no bound.
    """
    labels = torch.arange(program.num_labels, device=x.device)
    log_prior = program.prior().log_prob(labels)

    passes = len(labels) * (1 if num_particles > 1 else 2)

    def of_classes() -> list[Bound]:
        return [
            _exact_or_bound(
                program.program,
                x,
                y.expand(len(x)),
                num_particles,
                num_samples,
                lambda done: advance(done / passes),
                most,
            )
            for y in labels
        ]

    each = of_classes()
    log_joint = torch.stack([bound.value for bound in each], -1) + log_prior
    if num_particles > 1:
        value = log_joint.logsumexp(-1)
        return Bound(value, value)
    log_q = log_joint.log_softmax(-1)
    each = of_classes()

    def mean(terms: Sequence[Tensor]) -> Tensor:
        return (log_q.exp() * torch.stack([*terms], -1)).sum(-1)

    reconstruction = {site: mean([bound.reconstruction[site] for bound in each]) for site in each[0].reconstruction}
    cost = (log_q.exp() * (log_q - log_prior)).nan_to_num().sum(-1)
    kl = {program.label_name: cost, **{site: mean([bound.kl[site] for bound in each]) for site in each[0].kl}}
    value = mean([bound.value for bound in each]) - cost
    return Bound(value, value, reconstruction, kl)


PAIRED_ROWS = 2**10
"""Most rows of one set that are compared with all of another at once."""

POSTERIOR_ROWS = 2**12
"""Most draws that go through the model of a `Posterior` at once."""

ROWS_AT_ONCE = 2**14
"""Most rows, particles times data, that go through the networks at once when evidence is computed."""

VALUES_AT_ONCE = 2**20
"""Most numbers that go through them at once, counted over all steps of a chain: 4 MiB of float32."""

LARGEST_OUTPUT = 2**24
"""Most bytes that a network returns at once on a CPU, unless a single datum needs more. From 32 MiB on, glibc's malloc
takes memory from the system anew for each operation. The system clears it, which can take longer than the operation."""

BYTES_PER_VALUE = 2**14
"""Bytes on a GPU for each number that goes through the networks of an image model, including all activations."""


@torch.no_grad()
def importance_bound(
    program: Program,
    x: Tensor,
    given: Any = None,
    num_particles: int = 1,
    advance: Callable[[float], Any] = lambda done: None,
    most: int | None = None,
) -> Tensor:
    """The log-mean-exp of ``program.log_weights(x, given, num_particles)`` (IWAE), in nats, ``(B,)``.

    The particles come in chunks, whose size depends on program, number of data and device, so memory does not grow
    with their number.

    Args:
        advance: called after each chunk with its number of weights.
        most: maximum number of rows, particles times data, per pass, where it is known.
    """
    total = torch.tensor(-math.inf, device=x.device)
    for _, size in noise.chunks(num_particles, particles_at_once(program, len(x), most)):
        weights = program.log_weights(x, given, size)
        total = torch.logaddexp(total, weights.logsumexp(0))
        advance(weights.numel())
    return total - math.log(num_particles)


def most_at_once(device: torch.device) -> tuple[int, int]:
    """`ROWS_AT_ONCE` and `VALUES_AT_ONCE`, which fit a processor's cache; more on a GPU, according to its memory."""
    if device.type != "cuda":
        return ROWS_AT_ONCE, VALUES_AT_ONCE
    # The total memory, not the free memory: the same program then gets the same chunks, and so the same rounding.
    times = max(1, torch.cuda.get_device_properties(device).total_memory // (BYTES_PER_VALUE * VALUES_AT_ONCE))
    return times * ROWS_AT_ONCE, times * VALUES_AT_ONCE


def particles_at_once(program: Program, num_data: int, most: int | None = None) -> int:
    """Number of particles of each of ``num_data`` data that is within `most_at_once`, and within ``most`` rows."""
    most_rows, most_values = most_at_once(parameter_of(program).device)
    chain = len(program.unroll().latents(program.variable) or ())
    rows = min(most_rows, most_values // (max(1, program.event_shape.numel()) * max(1, chain)))
    return max(1, (rows if most is None else min(rows, most)) // num_data)


def output_size(program: Program, score_first: Callable[[int], Any]) -> int:
    """Largest output of a network of ``program`` for one datum, in bytes.

    It is the growth from one datum to two: outputs such as weights and the codes of pseudo-inputs do not grow.

    Args:
        score_first: scores so many data.
    """
    sizes: list[list[int]] = []

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        tensors = [part for part in tree_leaves(output) if isinstance(part, Tensor)]
        sizes[-1].append(max((part.numel() * part.element_size() for part in tensors), default=0))

    handles = []
    try:
        for module in program.modules():
            if module is not program and not isinstance(module, torch.jit.ScriptModule):
                handles.append(module.register_forward_hook(note))
        for count in (1, 2):
            sizes.append([])
            score_first(count)
    finally:
        for handle in handles:
            handle.remove()
    return max([1, *(two - one for one, two in zip(*sizes, strict=False))])


def rows_within_limit(num_bytes: int) -> int:
    """Maximum number of rows per pass on a CPU, if the `output_size` of one is ``num_bytes``."""
    return max(1, LARGEST_OUTPUT // num_bytes)


def _site_means(terms: list[dict[str, Tensor]]) -> dict[str, float]:
    return {site: torch.cat([batch[site] for batch in terms]).double().mean().item() for site in terms[0]}


def as_data(program: Program, data: Any, argument: str = "data", *, missing: bool = False) -> Data:
    """``data`` as a `Data` that fits ``program``: shapes, values, levels and measure.

    Args:
        missing: whether the caller takes data that miss features, because it scores them by `observed_part`.

    Raises:
        ValueError, TypeError: ``data`` does not fit; the message names the remedy.
    """
    check_program(program)
    # On the program's device: callers move the data in batches themselves.
    place = program_device(program)
    if isinstance(data, Tensor):
        if program.variable != "x" or program.conditional:
            raise TypeError(f"{argument} must be a dgm.data.Data for this {type(program).__name__}: Data(x, y) with "
                            "labels, or Data(x, given=...)")  # fmt: skip
        check_dense(data, argument)
        program.check(data.to(place), support=True)
        x = data.long() if program.levels is not None and data.is_floating_point() else data
        return Data(x=_as_reals(program, x), levels=program.levels, name="tensor")
    if not isinstance(data, Data):
        raise TypeError(
            f"{argument} must be a dgm.data.Data or a torch.Tensor, got {type(data).__name__}: use {READERS}"
        )
    if isinstance(data, StoredData):  # their values are checked as they are read, their support by an even sample
        return data.alike(as_data(program, data.excerpt, argument, missing=missing))
    moved = data.to(place)
    part = observed_part(program, moved) if missing else program
    value, given, observed = part.arguments(moved)
    if data.given is not None and not any(part is moved.given for part in parts_of(given)):
        raise ValueError(
            f"{data.name} has given of shape {tuple(data.given.shape)}, which this {type(program).__name__} does not "
            "read: leave given out, or use a program that is conditional on reals, with a network of them"
        )
    if not missing:
        check_whole(data, f"this use of a {type(program).__name__}")
    program.check_given(given, len(value))
    counts = program.levels is None and program.measure_given(given) != "density"
    if program.variable == "x" and not counts:
        if data.measure != program.measure:
            raise ValueError(
                f"{data.name} is integer data (a mass), but {type(program).__name__} is a density on reals: wrap it in "
                "dgm.Dequantized(flow, levels=...), or use a discrete likelihood"
                if data.measure == "mass"
                else f"{data.name} is real data (a density), but {type(program).__name__} is a mass on the integers "
                f"0 .. {(program.levels or 1) - 1}: use a continuous likelihood such as Normal"
            )
        if data.levels != program.levels:
            raise ValueError(
                f"{data.name} has {data.levels} levels, but {type(program).__name__} has {program.levels}: "
                "use a Categorical or DiscretizedLogistic likelihood with levels=data.levels, "
                "or the binarized data for a Bernoulli"
            )
    part.check(value, given, support=True)
    known = getattr(program, "num_labels", None)
    if observed and known is not None and data.num_classes is not None and data.num_classes > known:
        raise ValueError(f"{data.name} has {data.num_classes} classes, but this {type(program).__name__} has {known}")
    return replace(data, x=_as_reals(program, data.x), levels=None) if counts else data


def check_whole(data: Data, owner: str) -> None:
    """Raise if features are missing, for a method that cannot leave them out.

    Args:
        owner: the method that takes only complete data, for the message.
    """
    if data.misses and data.mask is not None:
        rows = int((~data.mask).flatten(1).any(1).sum())
        raise ValueError(
            f"{rows} of {len(data)} data of {data.name} miss features, but {owner} takes only complete rows: keep "
            "these, data[data.mask.flatten(1).all(1)], fill the others in by dgm.infer.impute, or name data without "
            "gaps (--normal of dgm anomaly, DATA of dgm represent)"
        )


def _as_reals(program: Program, x: Tensor) -> Tensor:
    """Counts as reals, for networks that read them; integers with ``levels`` are scaled by the networks themselves."""
    return x if x.is_floating_point() or program.levels is not None else x.to(parameter_of(program).dtype)


def program_device(program: Program) -> torch.device:
    """The device of the program's parameters; the CPU if it has none."""
    tensor = next(iter([*program.parameters(), *program.buffers()]), None)
    return torch.device("cpu") if tensor is None else tensor.device


@contextlib.contextmanager
def evaluating(program: Program) -> Iterator[None]:
    """Evaluation mode in full precision, without Pyro's validation: the caller has checked the data."""
    with alone(), eval_mode(program), products_in("float32"), pyro.validation_enabled(False):
        yield
