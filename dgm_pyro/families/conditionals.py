r"""The conditionals p(x | given): one Pyro distribution each, its parameters free, fixed, or computed by a network.

A network maps ``given`` to P raw parameters per feature, ``(B, P, *event_shape)`` or flat ``(B, P * numel)`` with P
first; each class states its P as `num_parameters`. The network is any `nn.Module` with this output size, or a function
that takes the output size and returns one:

>>> import torch, dgm_pyro as dgm
>>> normal = dgm.Normal(3, lambda size: torch.nn.Linear(2, size))
>>> normal.log_prob(torch.zeros(5, 3), given=torch.ones(5, 2)).shape, normal.network.out_features
(torch.Size([5]), 6)

Without a network the parameters are fixed (``learned=False``, the default) or free (``learned=True``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.distributions import constraints
from torch import Tensor, nn

from dgm_pyro.checks import (
    Shape,
    as_given_shape,
    as_shape,
    check_choice,
    check_count,
    check_finite,
    check_number,
    check_type,
)
from dgm_pyro.families import distributions
from dgm_pyro.networks.mlp import num_classes_read_by, shape_read_by
from dgm_pyro.networks.predictors import NeighborPredictors
from dgm_pyro.program import Conditional, call_network, check_no_distribution, inside, parameter_of
from dgm_pyro.registry import register, replace_argument

__all__ = [
    "Bernoulli",
    "Beta",
    "Categorical",
    "DiscretizedLogistic",
    "IndependentConditional",
    "LogNormal",
    "MixtureOfNormals",
    "NegativeBinomial",
    "Normal",
    "Poisson",
    "PredictedLogistic",
    "StudentT",
    "Uniform",
    "ZeroInflated",
]

Network = nn.Module | Callable[[int], nn.Module]
"""A network, or a function that takes its output size, P times the number of features, and returns one."""


class IndependentConditional(Conditional):
    """A `Conditional` whose features are independent given P raw parameters each; the base of those below.

    Subclasses set `num_parameters` and give `initial`, the raw parameters of the standard member, and `univariate`.
    """

    num_parameters: int
    start: Tensor | None

    def __init__(
        self,
        event_shape: int | Sequence[int],
        num_parameters: int,
        network: Network | None = None,
        *,
        learned: bool = False,
        parameters: Tensor | None = None,
        given_shape: Shape | None = None,
    ):
        super().__init__()
        self.event_shape = as_shape(event_shape)
        self.num_parameters = num_parameters
        if network is not None and not isinstance(network, nn.Module):
            network = self._made_network(network)
        self.network = network
        self.conditional = network is not None
        self.register_buffer("start", None)
        if network is not None:
            if learned or parameters is not None:
                raise ValueError("with a network, the parameters come from given: leave out learned and parameters")
            self.given_shape = shape_read_by(network) if given_shape is None else as_given_shape(given_shape)
            self.num_classes = num_classes_read_by(network)
        elif given_shape is not None:
            raise ValueError("given_shape is the shape of a network's input: without a network, leave it out")
        else:
            shape = (num_parameters, *self.event_shape)
            if parameters is None:
                parameters = self.initial()
            if not isinstance(parameters, Tensor) or not parameters.is_floating_point():
                kind = parameters.dtype if isinstance(parameters, Tensor) else type(parameters).__name__
                raise TypeError(f"parameters must be a tensor of floats, got {kind}")
            check_finite(parameters, "parameters")
            if tuple(parameters.shape) != shape:
                raise ValueError(
                    f"parameters has shape {tuple(parameters.shape)}, but {type(self).__name__} with event_shape "
                    f"{tuple(self.event_shape)} needs (P, *event_shape) = {shape}"
                )
            if learned:
                self.parameter = nn.Parameter(parameters.clone())
            else:
                self.register_buffer("parameter", parameters.detach().clone())

    def _made_network(self, make: Callable[[int], nn.Module]) -> nn.Module:
        size = self.num_parameters * self.event_shape.numel()
        must = "network must be a torch.nn.Module, or a function that makes one of a number of outputs"
        try:
            network = make(size)
        except TypeError as error:
            raise TypeError(f"{must}, but network({size}) fails: {error}") from error
        if not isinstance(network, nn.Module):
            raise TypeError(f"{must}, but network({size}) is of type {type(network).__name__}")
        replace_argument(self, make, network)
        return network

    def initial(self) -> Tensor:
        """Raw parameters, ``(P, *event_shape)``, of the standard member of the family."""
        return torch.zeros(self.num_parameters, *self.event_shape)

    takes_missing = True

    def placeholder(self) -> Tensor:
        """A value in the support of the standard member; all members have that support."""
        start = self.initial().to(parameter_of(self))
        return inside(self.distribution(start).support, start.new_zeros(self.event_shape))

    def univariate(self, raw: Tensor) -> dist.TorchDistribution:
        """The distribution of single features, of batch shape ``batch``, from raw parameters ``(*batch, P)``."""
        raise NotImplementedError

    def of_feature(self, raw: Tensor, feature: int) -> dist.TorchDistribution:
        """The distribution of the feature at a flat index, of batch shape ``batch``, from ``(*batch, P)``."""
        return self.univariate(raw)

    def raw_parameters(self, given: Any = None) -> Tensor:
        """The raw parameters given ``given``, ``(*batch, P, *event_shape)``.

        Raises:
            ValueError: the network's output does not fit the event shape.
        """
        if self.network is None:
            return self.parameter
        batch, raw = call_network(self.network, given, self.given_shape)
        shape = (self.num_parameters, *self.event_shape)
        count, size = math.prod(batch), math.prod(shape)
        if tuple(raw.shape) not in ((count, *shape), (count, size)):
            raise ValueError(
                f"the network of {type(self).__name__} returned shape {tuple(raw.shape)} for a batch of {count}, but "
                f"event_shape {tuple(self.event_shape)} with {self.num_parameters} parameters per feature needs "
                f"{(count, *shape)} or {(count, size)}"
            )
        return self.adjusted(raw.reshape(*batch, *shape))

    def adjusted(self, raw: Tensor, feature: int | None = None) -> Tensor:
        """The network's output plus the part that does not depend on ``given``.

        Args:
            raw: raw parameters of all features, ``(*batch, P, *event_shape)``, or of one feature, ``(*batch, P)``.
            feature: the flat index of that one feature.
        """
        if self.start is None:
            return raw
        return raw + (self.start if feature is None else self.start.flatten(1)[:, feature])

    def distribution(self, raw: Tensor) -> dist.TorchDistribution:
        """The distribution of x from its raw parameters, ``(*batch, P, *event_shape)``."""
        event_dim = len(self.event_shape)
        joint: dist.TorchDistribution = self.univariate(raw.movedim(-1 - event_dim, -1)).to_event(event_dim)
        return joint

    def forward(self, given: Any = None) -> dist.TorchDistribution:
        return self.distribution(self.raw_parameters(given))


@register
class Normal(IndependentConditional):
    r"""Diagonal Normal. P = 2: location, and a raw scale that softplus makes positive. Standard: N(0, I).

    The raw scale is rounded to the dtype in which it is built. A standard Normal that is built in float32 and then
    moved by ``.double()`` has scale 1 - 4.5e-10; built in float64, its scale is 1 to the last bit but one.

    Args:
        event_shape: shape of one x.
        network: maps ``given`` to ``(B, 2, *event_shape)`` or flat ``(B, 2 * numel)``; or a function that takes the
            output size ``2 * numel`` and returns such a network.
        learned: without a network, whether the parameters are free.
        parameters: without a network, raw parameters to start from, ``(2, *event_shape)``.
        given_shape: shape of one ``given``, for a network without a `given_shape`.
        scale_type: "network": the network gives the scale too. "feature" or "shared": the network gives the location
            alone (P = 1); the scale is learned, one per feature or one for all, and does not depend on ``given``.
        initial_scale: with a network, the scale at the start of training, where the network's raw output is 0.
            Default: softplus(0) = 0.69 for a scale from the network, 1 for a learned scale. An encoder with a small
            initial scale, such as 0.05, makes its latents informative before the KL switches them off.

    Raises:
        ValueError: a shape does not fit, or an option needs a network, or needs that there is none.

    >>> import dgm_pyro as dgm
    >>> round(dgm.Normal(1).log_prob(torch.zeros(1, 1)).item(), 4)
    -0.9189
    """

    def __init__(
        self,
        event_shape: int | Sequence[int],
        network: Network | None = None,
        *,
        learned: bool = False,
        parameters: Tensor | None = None,
        given_shape: Shape | None = None,
        scale_type: str = "network",
        initial_scale: float | None = None,
    ):
        check_choice(scale_type, ("network", "feature", "shared"), "scale_type")
        if scale_type != "network" and network is None:
            raise ValueError(f"scale_type={scale_type!r} is for a Normal with a network: use learned=True without one")
        number = 2 if scale_type == "network" else 1
        super().__init__(event_shape, number, network, learned=learned, parameters=parameters, given_shape=given_shape)
        self.scale_type = scale_type
        if initial_scale is not None:
            if network is None:
                raise ValueError("initial_scale is for a Normal with a network: without one, use parameters")
            check_number(initial_scale, "initial_scale", above=0)
        if scale_type != "network":
            shape = self.event_shape if scale_type == "feature" else ()
            self.raw_scale = nn.Parameter(torch.full(shape, inverse_softplus(initial_scale or 1.0)))
        elif initial_scale is not None:
            self.start = torch.zeros(2, *self.event_shape)
            self.start[1] = inverse_softplus(initial_scale)

    def initial(self) -> Tensor:
        raw = torch.zeros(2, *self.event_shape)
        raw[1] = inverse_softplus(1.0)
        return raw

    def adjusted(self, raw: Tensor, feature: int | None = None) -> Tensor:
        if self.scale_type == "network":
            return super().adjusted(raw, feature)
        if feature is None:
            return torch.cat((raw, self.raw_scale.expand_as(raw)), -1 - len(self.event_shape))
        return torch.cat((raw, self.raw_scale.expand(self.event_shape).flatten()[feature].expand_as(raw)), -1)

    def univariate(self, raw: Tensor) -> dist.Normal:
        loc, raw_scale = raw.unbind(-1)
        return dist.Normal(loc, positive(raw_scale))


class _CountedParameters(IndependentConditional):
    """Base of the conditionals whose number of parameters per feature is a constant of the class.

    Attributes:
        per_feature: P.
    """

    per_feature: ClassVar[int]

    def __init__(
        self,
        event_shape: int | Sequence[int],
        network: Network | None = None,
        *,
        learned: bool = False,
        parameters: Tensor | None = None,
        given_shape: Shape | None = None,
    ):
        options: Any = {"learned": learned, "parameters": parameters, "given_shape": given_shape}
        super().__init__(event_shape, self.per_feature, network, **options)
        if network is not None and bool(self.initial().any()):
            self.register_buffer("start", self.initial(), persistent=False)

    def _constant_parameters(self, *values: float) -> Tensor:
        """Raw parameters that are these numbers in every feature."""
        raw = torch.tensor(values, dtype=torch.get_default_dtype())
        return raw.reshape(-1, *(1,) * len(self.event_shape)).expand(-1, *self.event_shape).clone()


@register
class Bernoulli(_CountedParameters):
    """Independent bits. P = 1: logits. Standard: probability 1/2.

    Args: as `Normal`, with ``(B, 1, *event_shape)`` from the network.
    """

    levels = 2
    per_feature = 1

    def univariate(self, raw: Tensor) -> dist.Bernoulli:
        return distributions.Bernoulli(logits=raw.squeeze(-1))


@register
class StudentT(_CountedParameters):
    """Independent reals with heavy tails. P = 3: location, raw scale, raw degrees of freedom, which are above 1.

    Standard: location 0, scale 1, 5 degrees of freedom; the network's output is added to the raw parameters of these.

    Args: as `Normal`, with ``(B, 3, *event_shape)`` from the network.

    >>> import torch, dgm_pyro as dgm
    >>> dgm.StudentT(1).log_prob(torch.full((1, 1), 10.0)) > dgm.Normal(1).log_prob(torch.full((1, 1), 10.0))
    tensor([True])
    """

    per_feature = 3

    def initial(self) -> Tensor:
        return self._constant_parameters(0.0, inverse_softplus(1.0), inverse_softplus(4.0))

    def univariate(self, raw: Tensor) -> dist.StudentT:
        loc, raw_scale, raw_degrees = raw.unbind(-1)
        return dist.StudentT(1 + positive(raw_degrees), loc, positive(raw_scale))


@register
class LogNormal(_CountedParameters):
    """Independent positive reals. P = 2: location and raw scale of log x. Standard: log x is N(0, 1).

    The network's output is added to the standard member's parameters.

    Args: as `Normal`, with ``(B, 2, *event_shape)`` from the network.
    """

    per_feature = 2

    def initial(self) -> Tensor:
        return self._constant_parameters(0.0, inverse_softplus(1.0))

    def univariate(self, raw: Tensor) -> dist.LogNormal:
        loc, raw_scale = raw.unbind(-1)
        return dist.LogNormal(loc, positive(raw_scale))


@register
class Beta(_CountedParameters):
    """Independent reals strictly between 0 and 1. P = 2: logit of the mean, raw concentration a + b. Standard: uniform.

    The network's output is added to the standard member's parameters. For reals between other bounds use
    ``Standardized(beta, shift=lower, scale=upper - lower)``.

    Args: as `Normal`, with ``(B, 2, *event_shape)`` from the network.
    """

    per_feature = 2

    def initial(self) -> Tensor:
        return self._constant_parameters(0.0, inverse_softplus(2.0))

    def univariate(self, raw: Tensor) -> dist.Beta:
        logit, raw_concentration = raw.unbind(-1)
        concentration = positive(raw_concentration)
        # Not below what keeps a and b from rounding to 0.
        a, b = (concentration * side.sigmoid().clamp_min(1e-6) for side in (logit, -logit))
        return distributions.Beta(a, b)


@register
class Poisson(_CountedParameters):
    """Independent counts, of mean and variance r. P = 1: log r. Standard: r = 1.

    Args: as `Normal`, with ``(B, 1, *event_shape)`` from the network.
    """

    per_feature = 1

    def univariate(self, raw: Tensor) -> dist.Poisson:
        return dist.Poisson(bounded_log(raw.squeeze(-1)).exp())


@register
class NegativeBinomial(_CountedParameters):
    """Independent counts of mean r and variance r + r^2 / k. P = 2: log r, and a raw k. Standard: r = k = 1.

    The network's output is added to the standard member's parameters.

    Args: as `Normal`, with ``(B, 2, *event_shape)`` from the network.
    """

    per_feature = 2

    def initial(self) -> Tensor:
        return self._constant_parameters(0.0, inverse_softplus(1.0))

    def univariate(self, raw: Tensor) -> dist.NegativeBinomial:
        log_rate, raw_count = raw.unbind(-1)
        count = positive(raw_count)
        return dist.NegativeBinomial(count, logits=bounded_log(log_rate) - count.log())


@register
class ZeroInflated(IndependentConditional):
    """The features of a base conditional, each replaced by 0 with some probability.

    P is one more than that of the base: the first parameter is the logit of that probability. Standard: probability
    1/2, and the base's standard parameters.

    Args:
        base: a conditional of integers without a network, such as ``dgm.Poisson(3)``.
        network, learned, parameters, given_shape: as `Normal`, with ``(B, P, *event_shape)`` from the network.

    Raises:
        TypeError: ``base`` has a density, in which single values have no probability.

    >>> import torch, dgm_pyro as dgm
    >>> program = dgm.ZeroInflated(dgm.Poisson(1))
    >>> round(program.log_prob(torch.zeros(1, 1)).exp().item(), 4)  # 1 / 2 + exp(-1) / 2
    0.6839
    """

    def __init__(
        self,
        base: IndependentConditional,
        network: Network | None = None,
        *,
        learned: bool = False,
        parameters: Tensor | None = None,
        given_shape: Shape | None = None,
    ):
        check_type(base, IndependentConditional, "base", "a conditional of integers such as dgm.Poisson(3)")
        if base.conditional or any(True for _ in base.parameters()):
            raise ValueError(
                "base has a network or learned parameters of its own, but ZeroInflated learns its parameters: pass "
                "network= or learned=True to ZeroInflated, and leave them out of base"
            )
        if base.measure != "mass":
            raise TypeError(f"base must be a mass on integers, but {type(base).__name__} has a density")
        start = torch.cat((torch.zeros(1, *base.event_shape), base.initial()))
        options: Any = {"learned": learned, "parameters": parameters, "given_shape": given_shape}
        if network is None and parameters is None:
            options["parameters"] = start
        super().__init__(base.event_shape, 1 + base.num_parameters, network, **options)
        self.base, self.levels = base, base.levels
        if network is not None:
            self.register_buffer("start", start, persistent=False)

    def initial(self) -> Tensor:
        return torch.cat((torch.zeros(1, *self.event_shape), self.base.initial()))

    def univariate(self, raw: Tensor) -> dist.TorchDistribution:
        return dist.ZeroInflatedDistribution(self.base.univariate(raw[..., 1:]), gate_logits=raw[..., 0])


@register
class Categorical(IndependentConditional):
    """Independent integers 0 .. levels - 1. P = levels: logits. Standard: uniform.

    Args:
        event_shape: shape of one x; ``()`` for a single class label.
        levels: number of integers.
        network, learned, parameters, given_shape: as `Normal`, with ``(B, levels, *event_shape)`` from the network.
    """

    def __init__(
        self,
        event_shape: int | Sequence[int],
        levels: int,
        network: Network | None = None,
        *,
        learned: bool = False,
        parameters: Tensor | None = None,
        given_shape: Shape | None = None,
    ):
        self_levels = check_levels(levels)
        super().__init__(
            event_shape, self_levels, network, learned=learned, parameters=parameters, given_shape=given_shape
        )
        self.levels = self_levels

    def univariate(self, raw: Tensor) -> dist.Categorical:
        return dist.Categorical(logits=raw)


@register
class MixtureOfNormals(IndependentConditional):
    """Independent features, each a mixture of ``components`` Normals.

    P = 3 * components: logits, locations, raw scales. Standard: unit-scale components spread evenly over [-2, 2]. The
    network's output is added to these, because components that start alike would stay alike.

    Args:
        event_shape: shape of one x.
        components: number of Normals per feature.
        network, learned, parameters, given_shape: as `Normal`, with ``(B, 3 * components, *event_shape)``.
    """

    def __init__(
        self,
        event_shape: int | Sequence[int],
        components: int,
        network: Network | None = None,
        *,
        learned: bool = False,
        parameters: Tensor | None = None,
        given_shape: Shape | None = None,
    ):
        check_count(components, "components")
        super().__init__(
            event_shape,
            3 * components,
            network,
            learned=learned,
            parameters=parameters,
            given_shape=given_shape,
        )
        self.components = components
        if network is not None:
            self.register_buffer("start", self.initial(), persistent=False)

    def initial(self) -> Tensor:
        components = self.num_parameters // 3
        raw = torch.zeros(3, components, *self.event_shape)
        spread = torch.linspace(-2, 2, components) if components > 1 else torch.zeros(1)
        raw[1] = spread.reshape(-1, *(1,) * len(self.event_shape))
        raw[2] = inverse_softplus(1.0)
        return raw.flatten(0, 1)

    def univariate(self, raw: Tensor) -> distributions.Mixture:
        logits, loc, raw_scale = raw.unflatten(-1, (3, self.components)).unbind(-2)
        return distributions.Mixture(dist.Categorical(logits=logits), dist.Normal(loc, positive(raw_scale)))


@register
class DiscretizedLogistic(IndependentConditional):
    """Independent integers 0 .. levels - 1, each a mixture of discretized logistics with closed edge bins.

    P = 3 * components: logits, locations (on the scale where the levels span [-1, 1]), raw scales. Standard: components
    spread evenly over [-1, 1]; the network's output is added to these.
    Source: Salimans et al. 2017 (PixelCNN++), section 2.1.

    Args:
        event_shape: shape of one x.
        levels: number of integers, at least 2.
        components: number of logistics per feature.
        network, learned, parameters, given_shape: as `Normal`, with ``(B, 3 * components, *event_shape)``.
    """

    def __init__(
        self,
        event_shape: int | Sequence[int],
        levels: int,
        components: int = 5,
        network: Network | None = None,
        *,
        learned: bool = False,
        parameters: Tensor | None = None,
        given_shape: Shape | None = None,
    ):
        check_levels(levels)
        check_count(components, "components")
        super().__init__(
            event_shape,
            3 * components,
            network,
            learned=learned,
            parameters=parameters,
            given_shape=given_shape,
        )
        self.levels, self.components = levels, components
        if network is not None:
            self.register_buffer("start", self.initial(), persistent=False)

    def initial(self) -> Tensor:
        return self._spread(self.num_parameters // 3).flatten(0, 1)

    def _spread(self, components: int) -> Tensor:
        """Raw parameters of components that are spread evenly, ``(3, components, *event_shape)``."""
        raw = torch.zeros(3, components, *self.event_shape)
        spread = torch.linspace(-1, 1, components) if components > 1 else torch.zeros(components)
        raw[1] = spread.reshape(-1, *(1,) * len(self.event_shape))
        return raw

    def univariate(self, raw: Tensor) -> distributions.Mixture:
        assert self.levels is not None
        logits, loc, raw_scale = raw.unflatten(-1, (3, self.components)).unbind(-2)
        logistic = distributions.DiscretizedLogistic(loc, positive(raw_scale), self.levels)
        return distributions.Mixture(dist.Categorical(logits=logits), logistic)


@register
class PredictedLogistic(DiscretizedLogistic):
    """Integers of an image, each a mixture of discretized logistics, some of them near predictions from neighbors.

    It is for the factors of an `Autoregressive` program of images. The first components have a prediction: 3 for images
    of one channel, and 6 for several (see `networks.predictors`). P = 3 * components, as for `DiscretizedLogistic`.
    Standard: components with a prediction are there, with a scale of two levels; the others are spread evenly over
    [-1, 1].

    Args:
        event_shape: shape of one x, ``(C, H, W)``.
        levels: number of integers, at least 2.
        components: number of logistics per feature, at least the number of predictions.
        network: a masked network of x, ``(B, C, H, W)`` to ``(B, 3 * components, C, H, W)``, such as
            `networks.PixelCNN`. The features that predict a feature must come before it in the network's order.
        given_shape: as for `Normal`.

    Raises:
        TypeError, ValueError: ``network`` is no module, reads other shapes or levels, or its order does not fit; or
            there are fewer components than predictions.

    >>> import dgm_pyro as dgm
    >>> network = dgm.networks.PixelCNN((1, 4, 4), 3 * 5, width=8, layers=2, levels=256)
    >>> program = dgm.Autoregressive(PredictedLogistic((1, 4, 4), 256, 5, network))
    >>> program.model(2).shape
    torch.Size([2, 1, 4, 4])
    """

    def __init__(
        self,
        event_shape: int | Sequence[int],
        levels: int,
        components: int,
        network: nn.Module,
        *,
        given_shape: Shape | None = None,
    ):
        check_levels(levels)
        predicted = NeighborPredictors(network, components)
        if predicted.levels != levels:
            raise ValueError(
                f"levels is {levels}, but the network reads {predicted.levels} levels: build both for the same integers"
            )
        if predicted.in_shape != as_shape(event_shape):
            raise ValueError(
                f"event_shape is {tuple(as_shape(event_shape))}, but the network reads images of shape "
                f"{tuple(predicted.in_shape)}: build both for the same images"
            )
        super().__init__(event_shape, levels, components, predicted, given_shape=given_shape)

    def initial(self) -> Tensor:
        assert isinstance(self.network, NeighborPredictors)
        assert self.levels is not None
        near = torch.zeros(3, self.network.num_predictors, *self.event_shape)
        near[2] = min(inverse_softplus(4 / (self.levels - 1)), 0.0)  # no wider than the others
        others = self._spread(self.num_parameters // 3 - self.network.num_predictors)
        return torch.cat((near, others), 1).flatten(0, 1)


def positive(raw: Tensor) -> Tensor:
    """softplus, kept away from zero: no scale underflows, and its gradient is softplus's, so the scale can recover."""
    scale = F.softplus(raw)
    return scale.clamp_min(1e-6).detach() + (scale - scale.detach())


def bounded_log(raw: Tensor) -> Tensor:
    """``raw`` clamped to [-20, 20] with its gradient kept: the logarithm of a rate that can always recover."""
    return raw.clamp(-20, 20).detach() + (raw - raw.detach())


def inverse_softplus(value: float) -> float:
    return math.log(math.expm1(value))


def check_factors(factors: Any) -> None:
    """Raise a TypeError unless ``factors`` is a conditional of features that the chain rule can take one by one."""
    check_no_distribution(factors, "factors")
    if not isinstance(factors, IndependentConditional):
        raise TypeError(
            f"factors must be a conditional such as dgm.Bernoulli or dgm.Normal, got {type(factors).__name__}"
        )


def check_levels(levels: int) -> int:
    return check_count(levels, "levels", at_least=2)


@register
class Uniform(Conditional):
    """The uniform distribution on the closed unit cube: a base for flows there, and the default guide of `Dequantized`.

    Args:
        event_shape: shape of one x.

    >>> Uniform(3).log_prob(torch.rand(2, 3))
    tensor([0., 0.])
    """

    low: Tensor

    def __init__(self, event_shape: int | Sequence[int]):
        super().__init__()
        self.event_shape = as_shape(event_shape)
        self.register_buffer("low", torch.zeros(self.event_shape), persistent=False)

    def forward(self, given: Any = None) -> dist.TorchDistribution:
        cube: dist.TorchDistribution = _ClosedUniform(self.low, self.low + 1).to_event(len(self.event_shape))
        return cube


class _ClosedUniform(dist.Uniform):
    """The uniform on [0, 1] with its upper end, which torch's leaves out and rounding may reach."""

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> constraints.Constraint:
        return constraints.unit_interval

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        inside = (value >= 0) & (value <= 1)
        return (
            torch.where(inside, 0.0, -math.inf)
            .to(value.dtype)
            .expand(torch.broadcast_shapes(value.shape, self.batch_shape))
        )
