r"""Guides beyond the mean field: programs given x for the q(z | x) of a `VAE`.

================================================  =====================================================================
`FullRankNormal`, `LowRankNormal`                 a Normal with covariances
`planar`, `sylvester`, `flow.iaf`, `flow.nsf`     a Normal bent by a flow
`TopDown`, `PrecisionWeighted`                    a hierarchy stated from the top: q(z2 | x) q(z | z2, x)
`SemiAmortized`                                   the encoder's q(z | x), refined by gradient steps for each datum
`LinearGaussianPosterior`, `EnumeratedPosterior`  p(z | x) itself, where it can be computed
`fit_guide`                                       any of Pyro's AutoGuides, fitted to one batch
`auto`                                            a guide of any Pyro model, q any of these on its latents
================================================  =====================================================================

Guides that need the prior and the likelihood are built from the same objects as the VAE, and share their parameters.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn
from torch.distributions import Independent, LowRankMultivariateNormal, MultivariateNormal, constraints, register_kl
from torch.distributions import Normal as TorchNormal

from dgm_pyro.checks import (
    Shape,
    as_shape,
    check_choice,
    check_count,
    check_counts,
    check_name,
    check_number,
    check_sizes,
)
from dgm_pyro.families.autoguide import AutoConditional, init_to_middle
from dgm_pyro.families.conditionals import IndependentConditional, Normal, check_levels, inverse_softplus, positive
from dgm_pyro.families.flow import Flow, iaf, maf, nsf, realnvp
from dgm_pyro.networks.bijections import Affine, Bijection, Elementwise
from dgm_pyro.networks.mlp import MLP
from dgm_pyro.networks.planar import Planar, Sylvester
from dgm_pyro.posterior import check_model
from dgm_pyro.program import Conditional, Program, check_program, declare_given, differentiating, is_pair, seeded
from dgm_pyro.registry import register

__all__ = [
    "FAMILIES",
    "EnumeratedPosterior",
    "Finite",
    "Fitted",
    "FullRankNormal",
    "LinearGaussianPosterior",
    "LowRankNormal",
    "MixtureOfVectors",
    "PrecisionWeighted",
    "SemiAmortized",
    "TopDown",
    "auto",
    "fit_guide",
    "planar",
    "sylvester",
]

# -- Normals with covariances ------------------------------------------------------------------------------------------


class CorrelatedNormal(IndependentConditional):
    """A Normal over whole vectors; subclasses give `distribution`."""

    def __init__(
        self, event_shape: int | Sequence[int], num_parameters: int, network: nn.Module | None, **options: Any
    ):
        if len(as_shape(event_shape)) != 1:
            raise ValueError(f"{type(self).__name__} is over vectors, but event_shape is {event_shape!r}")
        super().__init__(event_shape, num_parameters, network, **options)

    def univariate(self, raw: Tensor) -> TorchDistribution:
        raise ValueError(f"the features of a {type(self).__name__} depend on each other: use dgm.Normal here")


@register
class FullRankNormal(CorrelatedNormal):
    r"""N(mu, L L'). P = 1 + D: location, and the rows of L, whose entries right of the diagonal are not read.

    The diagonal of L is made positive by softplus. Standard: N(0, I).

    Args:
        event_shape: ``(D,)``.
        network: maps ``given`` to ``(B, 1 + D, D)`` or flat; column d of the D by D block is row d of L.
        learned, parameters, given_shape: as `Normal`.
    """

    def __init__(
        self,
        event_shape: int | Sequence[int],
        network: nn.Module | None = None,
        *,
        learned: bool = False,
        parameters: Tensor | None = None,
        given_shape: Shape | None = None,
    ):
        size = as_shape(event_shape).numel()
        options = {"learned": learned, "parameters": parameters, "given_shape": given_shape}
        super().__init__(event_shape, 1 + size, network, **options)

    def initial(self) -> Tensor:
        size = self.event_shape.numel()
        return torch.cat((torch.zeros(1, size), inverse_softplus(1.0) * torch.eye(size)))

    def distribution(self, raw: Tensor) -> TorchDistribution:
        rows = raw[..., 1:, :].mT
        scale_tril = rows.tril(-1) + torch.diag_embed(positive(rows.diagonal(dim1=-2, dim2=-1)))
        return dist.MultivariateNormal(raw[..., 0, :], scale_tril=scale_tril)


@register
class LowRankNormal(CorrelatedNormal):
    r"""N(mu, diag(s^2) + W W'), W of ``rank`` columns. P = 2 + rank: location, raw scale s, rows of W.

    Standard: N(0, I).

    Args:
        event_shape: ``(D,)``.
        rank: number of columns of W.
        network: maps ``given`` to ``(B, 2 + rank, D)`` or flat.
        learned, parameters, given_shape: as `Normal`.
    """

    def __init__(
        self,
        event_shape: int | Sequence[int],
        rank: int,
        network: nn.Module | None = None,
        *,
        learned: bool = False,
        parameters: Tensor | None = None,
        given_shape: Shape | None = None,
    ):
        options = {"learned": learned, "parameters": parameters, "given_shape": given_shape}
        super().__init__(event_shape, 2 + check_count(rank, "rank"), network, **options)

    def initial(self) -> Tensor:
        raw = torch.zeros(self.num_parameters, *self.event_shape)
        raw[1] = inverse_softplus(1.0)
        return raw

    def distribution(self, raw: Tensor) -> TorchDistribution:
        scale = positive(raw[..., 1, :])
        return dist.LowRankMultivariateNormal(raw[..., 0, :], raw[..., 2:, :].mT, scale.square())


@register_kl(MultivariateNormal, Independent)
@register_kl(LowRankMultivariateNormal, Independent)
def _kl_to_diagonal(q: MultivariateNormal | LowRankMultivariateNormal, p: Independent) -> Tensor:
    if not isinstance(p.base_dist, TorchNormal) or p.reinterpreted_batch_ndims != 1:
        raise NotImplementedError
    return 0.5 * (q.variance / p.base_dist.variance).sum(-1) - p.log_prob(q.mean) - q.entropy()


# -- flows -------------------------------------------------------------------------------------------------------------


def planar(
    event_shape: int | Sequence[int],
    *,
    layers: int = 8,
    hidden: Sequence[int] = (256, 256),
    given_shape: Sequence[int],
    given_levels: int | None = None,
    num_classes: int | None = None,
) -> Flow:
    """A mean-field Normal followed by planar maps, all with parameters from one network of x.

    Args:
        event_shape: shape of one z.
        layers: number of maps.
        hidden: widths of the hidden layers of the network.
        given_shape: shape of one x.
        given_levels: x takes the integers 0 .. given_levels - 1.
        num_classes: number of classes of the label y, for q(z | x, y).

    Source: Rezende and Mohamed 2015 (arXiv 1505.05770).

    >>> planar(2, layers=2, given_shape=(5,)).sample(3, given=torch.zeros(3, 5)).shape
    torch.Size([3, 2])
    """
    reads = (given_shape, given_levels, num_classes)
    return _normal_through_bijections(
        event_shape, lambda size, width: Planar(size, given_shape=(width,)), layers, hidden, reads
    )


def sylvester(
    event_shape: int | Sequence[int],
    *,
    layers: int = 4,
    reflections: int = 4,
    hidden: Sequence[int] = (256, 256),
    given_shape: Sequence[int],
    given_levels: int | None = None,
    num_classes: int | None = None,
) -> Flow:
    """A mean-field Normal followed by Sylvester maps, all with parameters from one network of x.

    Args: as `planar`, and ``reflections``, the number of Householder reflections in each map's orthogonal matrix.

    Source: van den Berg et al. 2018 (arXiv 1803.05649), Householder variant.
    """
    reads = (given_shape, given_levels, num_classes)
    make = lambda size, width: Sylvester(size, reflections, given_shape=(width,))  # noqa: E731
    return _normal_through_bijections(event_shape, make, layers, hidden, reads)


def _normal_through_bijections(
    event_shape: int | Sequence[int],
    bijection: Callable[[int, int], Bijection],
    layers: int,
    hidden: Sequence[int],
    reads: tuple[Sequence[int], int | None, int | None],
) -> Flow:
    check_sizes(hidden=hidden)
    shape, width = as_shape(event_shape), as_shape(hidden)[-1]
    size, (given_shape, levels, num_classes) = shape.numel(), reads
    if levels is not None:
        check_count(levels, "given_levels", at_least=2)
    given_shape = as_shape(given_shape, "given_shape")
    network = MLP(given_shape, width, hidden, levels=levels, num_classes=num_classes)
    normal = Elementwise(size, Affine(), MLP((width,), 2 * size, ()))
    return Flow(
        shape, [normal, *(bijection(size, width) for _ in range(check_count(layers, "layers")))], embedding=network
    )


# -- hierarchies from the top ------------------------------------------------------------------------------------------


@register
class TopDown(Program):
    """q(z2 | x) q(z | z2, x): the guide of a hierarchy in the model's own order. ``top`` may be a `TopDown` itself.

    The guide also states the latents of the prior, so the prior, a `VAE`, needs no encoder.

    Args:
        top: q(z2 | x), a program conditional on x.
        bottom: q(z | x, z2), a conditional whose ``given_shape`` is the pair of the shapes of x and z2.
        latent_name: the name of z2, as in the prior.

    Raises:
        TypeError, ValueError: a part is not such a program, or the shapes do not fit.

    >>> import dgm_pyro as dgm
    >>> from dgm_pyro.networks import MLP
    >>> prior = dgm.VAE(dgm.Normal(1), dgm.Normal(2, MLP((1,), 4)), latent_name="z2")
    >>> bottom = dgm.Normal(2, MLP((5,), 4, given_shape=(1,)))
    >>> encoder = TopDown(dgm.Normal(1, MLP((5,), 2)), bottom, latent_name="z2")
    >>> dgm.VAE(prior, dgm.Normal(5, MLP((2,), 10)), encoder).log_weights(torch.zeros(3, 5)).shape
    torch.Size([1, 3])
    """

    conditional = True

    def __init__(self, top: Program, bottom: Conditional, latent_name: str = "z2"):
        super().__init__()
        if not isinstance(top, Program) or not isinstance(bottom, Conditional):
            raise TypeError(
                f"top must be a Program and bottom a Conditional, got {type(top).__name__} and {type(bottom).__name__}"
            )
        shapes: Any = bottom.given_shape
        if not is_pair(shapes) or tuple(shapes[1]) != tuple(top.event_shape):
            raise ValueError(
                f"bottom must be given the pair (x, {latent_name}), the latter of shape {tuple(top.event_shape)}, but "
                f"its given_shape is {shapes}: use MLP(x_shape, ..., given_shape={tuple(top.event_shape)})"
            )
        x_shape: Any = shapes[0]
        declare_given(top, x_shape, "top", "x, of shape")
        check_name(latent_name, "latent_name")
        self.top, self.bottom, self.latent_name = top, bottom, latent_name
        self.event_shape, self.given_shape, self.levels = bottom.event_shape, x_shape, bottom.levels

    def joint(self, name: str, value: Tensor | None = None, given: Any = None) -> Tensor:
        above = self.top.joint(self.latent_name, given=given)
        return self.bottom.joint(name, value, given=(given, above))

    def posterior(self, name: str, value: Tensor, given: Any = None) -> None:
        raise NotImplementedError("TopDown is a guide: its own latents have no guide")

    def latents(self, name: str) -> tuple[str, ...] | None:
        above = self.top.latents(self.latent_name)
        return None if above is None else (self.latent_name, *above)


@register
class PrecisionWeighted(Conditional):
    r"""The product of two Normals, q(z | x) from the data and p(z | z2) from the model, renormalized.

    .. math::
        \frac{1}{\sigma^2} = \frac{1}{\sigma_q^2} + \frac{1}{\sigma_p^2}, \qquad
        \mu = \sigma^2 \left( \frac{\mu_q}{\sigma_q^2} + \frac{\mu_p}{\sigma_p^2} \right)

    Source: Sonderby et al. 2016 (ladder VAE, arXiv 1602.02282), equations 17 to 19.

    Args:
        encoder: a `Normal` given x.
        generative: a `Normal` given z2; the same object as the likelihood of the prior.
    """

    conditional = True

    def __init__(self, encoder: Normal, generative: Normal):
        super().__init__()
        for role, part in (("encoder", encoder), ("generative", generative)):
            if not isinstance(part, Normal) or not part.conditional:
                raise TypeError(f"{role} must be a dgm.Normal with a network, got {type(part).__name__}")
            if part.given_shape is None:
                raise ValueError(f"the given_shape of {role} is open: build it with given_shape=...")
        if encoder.event_shape != generative.event_shape:
            raise ValueError(
                f"encoder has event_shape {tuple(encoder.event_shape)}, but generative "
                f"{tuple(generative.event_shape)}: both must be that of z"
            )
        self.encoder, self.generative = encoder, generative
        self.event_shape, self.given_shape = encoder.event_shape, (encoder.given_shape, generative.given_shape)

    def forward(self, given: Any = None) -> TorchDistribution:
        x, above = given
        q, p = self.encoder(x).base_dist, self.generative(above).base_dist
        precision = q.scale**-2 + p.scale**-2
        loc = (q.loc * q.scale**-2 + p.loc * p.scale**-2) / precision
        return dist.Normal(loc, precision.rsqrt()).to_event(len(self.event_shape))


# -- refined, and exact ------------------------------------------------------------------------------------------------


def _check_parts(prior: Program, likelihood: Program, owner: str) -> None:
    for role, part in (("prior", prior), ("likelihood", likelihood)):
        if not isinstance(part, Program) or not part.tractable:
            raise ValueError(
                f"the {role} of {owner} must have a density of its own, but {type(part).__name__} has none"
            )
    if prior.conditional or is_pair(likelihood.given_shape):
        raise ValueError(f"{owner} takes a prior and a likelihood without labels")
    declare_given(likelihood, prior.event_shape, "likelihood", "the prior's event_shape")


@register
class SemiAmortized(Conditional):
    """A mean-field encoder, refined for each datum by gradient ascent on its own ELBO.

    The steps change the encoder's raw parameters for the datum, and training differentiates through them. Their ELBO
    averages over fixed draws (an orthogonal set and its mirror image), so q(z | x) is a deterministic function of x.
    With D draws or a multiple, expectations of quadratic functions are exact.

    Source: Kim et al. 2018 (arXiv 1802.02550), algorithm 1.

    Args:
        encoder: a `Normal` given x.
        prior, likelihood: the parts of the VAE, both with an exact density.
        gradient_steps: number of gradient steps.
        lr: step size.
        num_samples: number of draws, each with its mirror image.

    Raises:
        TypeError, ValueError: a part has no exact density or reads labels, or the shapes do not fit.

    >>> import dgm_pyro as dgm
    >>> prior, likelihood = dgm.Normal(2), dgm.Normal(5, nn.Linear(2, 10))
    >>> encoder = SemiAmortized(dgm.Normal(2, nn.Linear(5, 4)), prior, likelihood, gradient_steps=3, lr=0.1)
    >>> dgm.VAE(prior, likelihood, encoder).log_weights(torch.zeros(3, 5)).shape
    torch.Size([1, 3])
    """

    conditional = True
    noise: Tensor

    def __init__(
        self,
        encoder: Normal,
        prior: Program,
        likelihood: Program,
        gradient_steps: int = 3,
        lr: float = 0.01,
        num_samples: int = 4,
    ):
        super().__init__()
        if not isinstance(encoder, Normal) or not encoder.conditional:
            raise TypeError(f"encoder must be a dgm.Normal with a network to refine, got {type(encoder).__name__}")
        if encoder.scale_type != "network" or is_pair(encoder.given_shape):
            raise ValueError("SemiAmortized refines an encoder whose network gives location and scale from x alone")
        _check_parts(prior, likelihood, "SemiAmortized")
        if encoder.event_shape != prior.event_shape:
            raise ValueError(
                f"the encoder's event_shape is {tuple(encoder.event_shape)}, but the prior's {tuple(prior.event_shape)}"
            )
        check_number(lr, "lr", above=0)
        declare_given(encoder, likelihood.event_shape, "encoder", "the likelihood's event_shape")
        self.encoder, self.prior, self.likelihood = encoder, prior, likelihood
        self.gradient_steps, self.lr = check_count(gradient_steps, "gradient_steps"), lr
        self.event_shape, self.given_shape = encoder.event_shape, encoder.given_shape
        size = self.event_shape.numel()
        check_count(num_samples, "num_samples")
        bases = [torch.linalg.qr(torch.randn(size, size))[0] for _ in range(math.ceil(num_samples / size))]
        half = math.sqrt(size) * torch.cat(bases)[:num_samples].unflatten(-1, self.event_shape)
        self.register_buffer("noise", torch.cat((half, -half)))

    def forward(self, given: Any = None) -> TorchDistribution:
        raw = self.encoder.raw_parameters(given)
        climb = torch.func.grad(lambda raw: self.bound(raw, given).sum())
        for _ in range(self.gradient_steps):
            raw = raw + self.lr * climb(raw)
        return self.encoder.distribution(raw)

    def bound(self, raw: Tensor, x: Tensor) -> Tensor:
        """The ELBO of each x, ``(*batch,)``, at raw parameters ``(*batch, 2, *event_shape)``, in nats."""
        q = self.encoder.distribution(raw)
        noise = self.noise.reshape(len(self.noise), *(1,) * len(q.batch_shape), *self.event_shape)
        z = q.mean + q.stddev * noise
        x = x.expand(len(noise), *q.batch_shape, *self.likelihood.event_shape)
        log_joint = self.likelihood.exact_log_prob(x, z) + self.prior.exact_log_prob(z)
        return log_joint.mean(0) + q.entropy()


@register
class LinearGaussianPosterior(Conditional):
    r"""The exact p(z | x) of z ~ N(m, S) and x ~ N(W z + b, T), S and T diagonal.

    .. math::
        \Lambda = S^{-1} + W^\top T^{-1} W, \qquad
        p(z \mid x) = N\left( \Lambda^{-1} (S^{-1} m + W^\top T^{-1} (x - b)), \Lambda^{-1} \right)

    Source: Bishop 2006 (Pattern recognition and machine learning), equations 2.113 to 2.117.

    Args:
        prior: a `Normal` over vectors without a network.
        likelihood: a `Normal` with an `nn.Linear` network for its location and a learned scale,
            ``Normal(event_shape, nn.Linear(D, F), scale_type="feature")`` or ``"shared"``.
    """

    conditional = True

    def __init__(self, prior: Normal, likelihood: Normal):
        super().__init__()
        if not isinstance(prior, Normal) or prior.conditional or len(prior.event_shape) != 1:
            raise ValueError("the prior must be a dgm.Normal over vectors, without a network")
        linear = isinstance(likelihood, Normal) and isinstance(likelihood.network, nn.Linear)
        if not linear or likelihood.scale_type == "network":
            raise ValueError(
                "the likelihood must be linear with a scale that does not depend on z: "
                'dgm.Normal(event_shape, nn.Linear(D, F), scale_type="feature") or scale_type="shared"'
            )
        _check_parts(prior, likelihood, "LinearGaussianPosterior")
        self.prior, self.likelihood = prior, likelihood
        self.event_shape, self.given_shape = prior.event_shape, likelihood.event_shape

    def forward(self, given: Any = None) -> TorchDistribution:
        network: Any = self.likelihood.network
        p, size = self.prior().base_dist, self.likelihood.event_shape.numel()
        x = given.flatten(given.dim() - len(self.likelihood.event_shape))
        weight, center = network.weight, x if network.bias is None else x - network.bias
        t = positive(self.likelihood.raw_scale).expand(self.likelihood.event_shape).reshape(size) ** -2
        precision = torch.diag_embed(p.scale**-2) + weight.mT @ (t.unsqueeze(-1) * weight)
        pull = p.loc * p.scale**-2 + (center * t) @ weight
        mean = torch.cholesky_solve(pull.unsqueeze(-1), torch.linalg.cholesky(precision)).squeeze(-1)
        return dist.MultivariateNormal(mean, precision_matrix=precision)


@register
class EnumeratedPosterior(Conditional):
    r"""The exact p(z | x) of a z with few values, by enumeration: :math:`p(x, z) / \sum_{z'} p(x, z')`.

    It takes one evaluation of the likelihood per value and datum.

    Args:
        prior: p(z) on integers, such as `Bernoulli` or `Categorical`.
        likelihood: p(x | z).

    Raises:
        ValueError: z has more than 4096 values, or a part has no exact density.
    """

    MOST = 4096
    conditional = True
    outcomes: Tensor

    def __init__(self, prior: Program, likelihood: Program):
        super().__init__()
        _check_parts(prior, likelihood, "EnumeratedPosterior")
        if prior.levels is None or prior.levels ** prior.event_shape.numel() > self.MOST:
            raise ValueError(
                f"z must take at most {self.MOST} values, but the prior is {type(prior).__name__} with levels "
                f"{prior.levels} and event_shape {tuple(prior.event_shape)}"
            )
        self.prior, self.likelihood = prior, likelihood
        self.event_shape, self.given_shape, self.levels = prior.event_shape, likelihood.event_shape, prior.levels
        every = list(itertools.product(range(prior.levels), repeat=self.event_shape.numel()))
        with seeded(0, torch.device("cpu")):
            dtype = prior.sample(1).dtype  # Pyro's bits are floats
        outcomes = torch.tensor(every).reshape(-1, *self.event_shape).to(dtype)
        self.register_buffer("outcomes", outcomes, persistent=False)

    def forward(self, given: Any = None) -> Finite:
        batch = given.shape[: given.dim() - len(self.likelihood.event_shape)]
        count = len(self.outcomes)
        z = self.outcomes.reshape(count, *(1,) * len(batch), *self.event_shape).expand(count, *batch, *self.event_shape)
        log_joint = self.prior.exact_log_prob(z) + self.likelihood.exact_log_prob(given.expand(count, *given.shape), z)
        return Finite(log_joint.movedim(0, -1), self.outcomes, self.levels or 2)


class Finite(TorchDistribution):
    """A categorical distribution over all arrays of integers 0 .. levels - 1, in the order of counting.

    Args:
        logits: ``(*batch, M)``.
        outcomes: ``(M, *event_shape)``.
        levels: M = levels ** numel.
    """

    arg_constraints: ClassVar = {"logits": constraints.real_vector}
    has_rsample = False

    def __init__(self, logits: Tensor, outcomes: Tensor, levels: int, validate_args: bool | None = None):
        self.logits, self.outcomes, self.levels = logits.log_softmax(-1), outcomes, check_levels(levels)
        super().__init__(logits.shape[:-1], outcomes.shape[1:], validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True)
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.integer_interval(0, self.levels - 1), len(self.event_shape))

    def expand(self, batch_shape: Sequence[int], _instance: Finite | None = None) -> Finite:
        new = self._get_checked_instance(Finite, _instance)
        new.logits = self.logits.expand(*batch_shape, self.logits.shape[-1])
        new.outcomes, new.levels = self.outcomes, self.levels
        super(Finite, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Log mass in nats, of the broadcast batch shape of ``value`` and of the distribution."""
        if self._validate_args:
            self._validate_sample(value)
        digits = value.long().reshape(*value.shape[: value.dim() - len(self.event_shape)], -1)
        index = torch.zeros_like(digits[..., 0])
        for digit in digits.unbind(-1):
            index = index * self.levels + digit
        batch = torch.broadcast_shapes(index.shape, self.batch_shape)
        logits = self.logits.expand(*batch, self.logits.shape[-1])
        return logits.gather(-1, index.expand(batch).unsqueeze(-1)).squeeze(-1)

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """One outcome per element, ``(*sample_shape, *batch_shape, *event_shape)``."""
        index = dist.Categorical(logits=self.logits).sample(torch.Size(sample_shape))
        return self.outcomes[index]


# -- Pyro's AutoGuides -------------------------------------------------------------------------------------------------


class Fitted(nn.Module):
    """A guide of one batch, called like Pyro's guides. It holds its parameters itself, not in the param store."""

    def __init__(self, guide: nn.Module):
        super().__init__()
        self.guide = guide

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # Two guides of one name would collide in Pyro's param store: the second would get the parameters of the first.
        with pyro.settings.context(module_local_params=True):
            return self.guide(*args, **kwargs)


@differentiating("fit_guide")
def fit_guide(
    program: Program,
    x: Tensor,
    make: Callable[[nn.Module], nn.Module],
    given: Any = None,
    *,
    gradient_steps: int = 1000,
    lr: float = 0.02,
    num_samples: int = 16,
    seed: int = 0,
) -> tuple[Fitted, float]:
    """Fit one of Pyro's AutoGuides to the latents of one batch, with the model fixed.

    The guide is not amortized: it has parameters for each row of ``x``. Its bound minus the bound of the program's own
    guide is the part of the latter's gap that this family can close. Chains are unrolled.

    Args:
        program: a program with continuous latents; neither its parameters nor their gradients change.
        x: ``(B, *event_shape)``.
        make: a function from a model to a guide, such as ``pyro.infer.autoguide.AutoMultivariateNormal``.
        given: ``(B, *given_shape)`` for a conditional program.
        gradient_steps, lr: steps and learning rate of Adam; the rate falls to zero over the last half of the steps.
        num_samples: draws per step; 50 times as many are averaged at the end.
        seed: seed of all draws; the global random state does not change.

    Returns:
        The guide, to be called as ``guide(x)`` or ``guide(x, given)``, and the ELBO in nats per datum: a mean over
        ``x`` and the draws.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """
    check_program(program)
    program.check(x, given)
    check_counts(gradient_steps=gradient_steps, num_samples=num_samples)
    check_number(lr, "lr", above=0)
    if not callable(make):
        raise TypeError(f"make must be callable, such as pyro.infer.autoguide.AutoNormal, got {type(make).__name__}")
    arguments = (x,) if given is None else (x, given)
    model = program.unroll().model
    trainable = [parameter for parameter in program.parameters() if parameter.requires_grad]
    with seeded(seed, x.device), pyro.settings.context(module_local_params=True):
        for parameter in trainable:
            parameter.requires_grad_(False)
        try:
            guide = make(model)
            guide(*arguments)  # AutoGuides make their parameters when they are first called
            own = list(guide.parameters())
            held = {id(parameter) for parameter in program.parameters()}
            optimizer = torch.optim.Adam([parameter for parameter in own if id(parameter) not in held], lr=lr)
            decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 2 - 2 * step / gradient_steps))
            loss = Trace_ELBO(num_particles=num_samples, vectorize_particles=True, max_plate_nesting=1)
            for _ in range(gradient_steps):
                optimizer.zero_grad()
                loss.differentiable_loss(model, guide, *arguments).backward()
                optimizer.step()
                decay.step()
            with torch.no_grad():
                total = sum(loss.loss(model, guide, *arguments) for _ in range(50))
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)
    return Fitted(guide), -total / (50 * len(x))


# -- a guide of any Pyro model -----------------------------------------------------------------------------------------


@register
class MixtureOfVectors(Conditional):
    """A mixture of diagonal Normals over whole vectors, whose draws are differentiable in all parameters.

    The gradient of a draw follows a velocity field that transports mass as the parameters change. Source: Jankowiak and
    Karaletsos 2019 (Pathwise derivatives for multivariate distributions, arXiv 1806.01856).

    Args:
        event_shape: ``(D,)``, D at least 2.
        components: K. Their locations start as draws of N(0, I / 4), their scales at 1.
    """

    def __init__(self, event_shape: int | Sequence[int], components: int = 5):
        super().__init__()
        self.event_shape = as_shape(event_shape)
        if len(self.event_shape) != 1 or self.event_shape[0] < 2:
            raise ValueError(f"event_shape must be that of a vector of at least two features, got {event_shape!r}")
        size, number = self.event_shape[0], check_count(components, "components")
        self.logits = nn.Parameter(torch.zeros(number))
        self.loc = nn.Parameter(0.5 * torch.randn(number, size))
        self.raw_scale = nn.Parameter(torch.full((number, size), inverse_softplus(1.0)))

    def forward(self, given: Any = None) -> TorchDistribution:
        return dist.MixtureOfDiagNormals(self.loc, positive(self.raw_scale), self.logits)


def _flow_of(make: Callable[..., Flow], **sizes: Any) -> Callable[[int], Flow]:
    return lambda size: make(size, hidden=(max(32, 4 * size),) * 2, **sizes)


FAMILIES: dict[str, tuple[Callable[[int], Conditional], str]] = {
    "meanfield": (lambda size: Normal(size, learned=True), "independent Normals"),
    "lowrank": (
        lambda size: LowRankNormal(size, max(1, min(10, size // 2)), learned=True),
        "a Normal of diagonal plus low-rank covariance",
    ),
    "fullrank": (lambda size: FullRankNormal(size, learned=True), "a Normal with all covariances"),
    "planar": (lambda size: Flow(size, [Planar(size) for _ in range(8)]), "a Normal followed by 8 planar maps"),
    "sylvester": (
        lambda size: Flow(size, [Sylvester(size, min(4, size)) for _ in range(4)]),
        "a Normal followed by 4 Sylvester maps",
    ),
    "realnvp": (_flow_of(realnvp, layers=6), "affine couplings"),
    "maf": (_flow_of(maf, layers=3), "affine maps given the latents before: slow to draw"),
    "iaf": (_flow_of(iaf, layers=3), "affine maps given the noise before"),
    "nsf": (_flow_of(nsf, layers=4), "spline couplings"),
    "mixture": (MixtureOfVectors, "a mixture of 5 diagonal Normals"),
}
"""q of `auto` by name: a function from the number of latents to q, and a line that describes it."""

# Families without covariances, and families that find them without whitening.
_DIAGONAL = ("meanfield", "lowrank")


def auto(
    model: Callable[..., Any],
    q: Any = "fullrank",
    *,
    structure: str | None = None,
    covariates: Mapping[str, Tensor] | None = None,
    **options: Any,
) -> AutoGuide:
    """A guide of a Pyro model, one of Pyro's AutoGuides: for `SVI`, `Predictive`, `dgm.infer.psis` and so on.

    q is the distribution of all latents, mapped to the reals and concatenated. The first call of the guide sets q up,
    near the posterior, as `dgm_pyro.families.autoguide` describes. To fit the guide, use `pyro.infer.SVI`, or
    `dgm.infer.train_guide(posterior, guide)`.

    Args:
        model: a Pyro model; discrete latents must be observed or enumerable.
        q: a name in `FAMILIES`; a function from the number of latents D to a conditional on ``(D,)``; such a
            conditional itself; or one of Pyro's AutoGuides, by name or as its class.
        structure: "plates" for a guide that follows the plates of the model: q is that of the global latents, and
            latents in a plate are Normal given the latents above them (`dgm_pyro.families.hierarchical`).
        covariates: with that structure, data of the elements of each plate, by the plate's name, ``(J, F)``: one
            network reads them for all elements. Default: every element has parameters of its own.
        options: options of Pyro's AutoGuide, or ``init_loc_fn``.

    Raises:
        ValueError, TypeError: there is no q of that name, or an argument does not fit; the message names it.

    >>> import pyro
    >>> def model(y):
    ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    ...     pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
    >>> guide = auto(model, "fullrank")
    >>> sorted(guide(torch.tensor(1.0)))
    ['loc']
    """
    check_model(model)
    if structure is not None:
        check_choice(structure, ("plates",), "structure")
        make = FAMILIES[q][0] if isinstance(q, str) and q in FAMILIES else q
        if isinstance(make, str | type | nn.Module) or not callable(make):
            raise ValueError(
                f"with structure='plates', q must be one of {', '.join(FAMILIES)}, or a function of the number of "
                f"global latents, got {q!r}"
            )
        return AutoConditional(model, make, whiten=False, plates=True, covariates=covariates, **options)
    if covariates is not None:
        raise ValueError(
            "covariates are data of the elements of plates: pass structure='plates' too, or leave covariates out"
        )
    if isinstance(q, str) and q in FAMILIES:
        return AutoConditional(model, FAMILIES[q][0], whiten=q not in _DIAGONAL, **options)
    if isinstance(q, str) and q.startswith("Auto") and hasattr(pyro.infer.autoguide, q):
        q = getattr(pyro.infer.autoguide, q)
    if isinstance(q, type) and issubclass(q, AutoGuide):
        start = {"init_loc_fn": init_to_middle} if "init_loc_fn" in inspect.signature(q).parameters else {}
        return q(model, **(start | options))
    if isinstance(q, str):
        check_choice(q, (*FAMILIES, "AutoNormal", "or another AutoGuide of Pyro"), "q")
    if isinstance(q, Conditional):
        conditional = q
        return AutoConditional(model, lambda size: conditional, **options)
    if not callable(q) or isinstance(q, nn.Module | type):
        raise TypeError(
            f"q must be one of {', '.join(FAMILIES)}, a dgm.Conditional on reals, a function from the number of reals "
            f"to one, or an AutoGuide of Pyro, got {type(q).__name__}"
        )
    return AutoConditional(model, q, **options)
