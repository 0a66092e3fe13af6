r"""Autoregressive models: p(x) by the chain rule over the features, in some order.

.. math::
    p(x) = \prod_{i=1}^{D} p(x_i \mid x_{<i}), \qquad
    \log p(x) = \sum_{i=1}^{D} \log p(x_i \mid x_{<i})

Each conditional is a univariate distribution, and one network computes the parameters of all D of them from x itself.
The network is masked: the parameters of x_i depend on the features before x_i only. So one pass scores every feature.
Sampling goes from feature to feature, because x_i must be drawn before x_{i+1}. A network with a `cache` computes only
what is new at each feature, one pass in total; any other network takes a full pass per feature.

Two forms on the same parameters: *plated*, `Autoregressive`, all features at once in a single site; *unrolled*,
`Autoregressive.unroll`, the chain itself with one site per feature, ``x_1 .. x_D``, any of which can be conditioned.

Source: Frey 1998, Larochelle and Murray 2011 (NADE), Germain et al. 2015 (MADE), van den Oord et al. 2016 (PixelCNN).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from dgm_pyro.factors import ChainRule
from dgm_pyro.families.conditionals import IndependentConditional, check_factors
from dgm_pyro.networks.caches import Cache, cache_maker
from dgm_pyro.networks.masked import check_order
from dgm_pyro.networks.mlp import eval_mode
from dgm_pyro.program import (
    Conditional,
    Program,
    call_network,
    example_given,
    is_pair,
    parameter_of,
)
from dgm_pyro.registry import register

__all__ = ["Autoregressive", "AutoregressiveDistribution", "FeatureChain", "UnrolledAutoregressive", "check_masked"]

# `check_masked` takes about so many features through the network.
FEATURES_CHECKED = 2**13


@register
class Autoregressive(Conditional):
    """The chain rule over the features of a conditional whose network reads x itself, masked.

    Args:
        factors: p(x_i | x_<i): a `Bernoulli`, `Categorical`, `MixtureOfNormals`, ... whose network is masked in
            some ``network.order`` of the features, such as `networks.MADE` or `networks.PixelCNN`. A network with a
            ``given_shape`` makes the program conditional.

    Raises:
        TypeError: ``factors`` is no conditional with parameters.
        ValueError: its network is missing or not masked, or reads x of another shape.

    >>> import torch, dgm_pyro as dgm
    >>> program = dgm.Autoregressive(dgm.Bernoulli(3, dgm.networks.MADE(3, 1, hidden=(8,))))
    >>> every = torch.cartesian_prod(*[torch.arange(2)] * 3)
    >>> round(program.log_prob(every).exp().sum().item(), 4)
    1.0
    """

    def __init__(self, factors: IndependentConditional):
        super().__init__()
        check_factors(factors)
        self.factors = factors
        self.event_shape, self.levels, self.num_classes = factors.event_shape, factors.levels, factors.num_classes
        if factors.given_shape is None:
            factors.given_shape = factors.event_shape
        shapes: Any = factors.given_shape
        self.conditional = is_pair(shapes)
        inputs, self.given_shape = shapes if self.conditional else (shapes, None)
        if tuple(inputs) != tuple(self.event_shape):
            raise ValueError(
                f"the network of factors reads x of shape {tuple(inputs)}, but the event_shape of this "
                f"{type(factors).__name__} is {tuple(self.event_shape)}: build both for the same shape"
            )
        self.order = order_of(factors)
        factors.of_feature(factors.initial().flatten(1)[:, 0], 0)  # raises where features depend on each other
        standard = factors.distribution(factors.initial())
        self.support: Any = standard.support
        self.has_rsample = standard.has_rsample
        if not any(parameter.is_meta for parameter in self.parameters()):  # which have no numbers to look at
            check_masked(self)

    def forward(self, given: Any = None) -> AutoregressiveDistribution:
        """The distribution of x given ``given``."""
        return AutoregressiveDistribution(self, given)

    def raw_parameters(self, x: Tensor, given: Any = None) -> Tensor:
        """The raw parameters of every p(x_i | x_<i, given) in one pass, ``(*batch, *event_shape, P)``.

        Args:
            x: ``(*batch, *event_shape)``.
            given: ``(*batch, *given_shape)``; the two batch shapes broadcast.
        """
        raw = self.factors.raw_parameters((x, given) if self.conditional else x)
        return raw.movedim(-1 - len(self.event_shape), -1)

    def at(self, i: int, raw: Tensor) -> TorchDistribution:
        """p(x_i | x_<i, given) at place i = 1 .. D of the order, from `raw_parameters`; univariate, ``batch``."""
        return self.factors.of_feature(self.raw_at(i, raw), self.order[i - 1])

    def raw_at(self, i: int, raw: Tensor) -> Tensor:
        """Raw parameters of the feature at place i = 1 .. D of the order, ``(*batch, P)``."""
        return raw.flatten(-1 - len(self.event_shape), -2)[..., self.order[i - 1], :]

    def chain(
        self, draw: Callable[[int, TorchDistribution], Tensor], batch: Sequence[int] = (), given: Any = None
    ) -> Tensor:
        """Build x feature by feature in the order: x_i is ``draw(i, p(x_i | x_<i, given))``.

        Returns:
            x, ``(*batch, *event_shape)``, where ``batch`` broadcasts with the batch shape of the draws.
        """
        chain, values = FeatureChain(self, batch, given), []
        for i in range(1, len(self.order) + 1):
            values.append(draw(i, chain.next()))
            chain.put(values[-1])
        by_feature = [value for _, value in sorted(zip(self.order, values, strict=True), key=lambda pair: pair[0])]
        shape = torch.Size(batch)
        for value in values:
            shape = shape if value.shape == shape else torch.broadcast_shapes(shape, value.shape)
        x = torch.stack([value.expand(shape) for value in by_feature], -1).reshape(*shape, *self.event_shape)
        return x.to(torch.promote_types(x.dtype, self.blank().dtype))

    def place(self, x: Tensor, i: int, value: Tensor) -> Tensor:
        """x with ``value`` as its feature at place i; batch shapes broadcast and types promote."""
        here = torch.arange(len(self.order), device=x.device).reshape(self.event_shape) == self.order[i - 1]
        return torch.where(here, value.reshape(*value.shape, *(1,) * len(self.event_shape)), x)

    def blank(self, batch: Sequence[int] = ()) -> Tensor:
        """Zeros to start a chain from. Integers have the smallest dtype, which is promoted to that of the draws."""
        like = parameter_of(self)
        dtype = like.dtype if self.levels is None else torch.uint8
        return torch.zeros(*batch, *self.event_shape, dtype=dtype, device=like.device)

    def unroll(self) -> UnrolledAutoregressive:
        """The chain written out on the same parameters: one site per feature, ``x_1 .. x_D`` in the order."""
        return UnrolledAutoregressive(self)

    def placeholder(self) -> Tensor:
        return self.factors.placeholder()

    def completions(self, by: Any, x: Tensor, mask: Tensor, given: Any = None) -> tuple[Tensor, Tensor]:
        return by.over_features(self, x, mask, given)


class UnrolledAutoregressive(Program):
    """The definition: p(x_1) p(x_2 | x_1) .. p(x_D | x_<D), one site per feature, ``x_1 .. x_D`` in the order.

    Fix any of the sites with `poutine.condition` and the rest is drawn given those before it. x as a whole is also a
    `pyro.deterministic` site: it can be read but not conditioned.

    Args:
        program: the plated form, whose parameters it shares.

    Raises:
        ValueError: x as a whole is conditioned, or a feature is conditioned on another value than it has in x.

    >>> import pyro, torch, dgm_pyro as dgm
    >>> program = dgm.Autoregressive(dgm.Bernoulli(3, dgm.networks.MADE(3, 1, hidden=(8,)))).unroll()
    >>> second_is_one = pyro.poutine.condition(program.model, {"x_2": torch.ones(4)})
    >>> second_is_one(4)[:, 1]
    tensor([1., 1., 1., 1.])
    """

    tractable = True

    def __init__(self, program: Autoregressive):
        super().__init__()
        self.program = program
        self.event_shape, self.levels, self.variable = program.event_shape, program.levels, program.variable
        self.conditional, self.given_shape = program.conditional, program.given_shape
        self.num_classes = program.num_classes

    def support_given(self, given: Any = None, batch_size: int = 1) -> constraints.Constraint | None:
        return self.program.support_given(given, batch_size)

    def completions(self, by: Any, x: Tensor, mask: Tensor, given: Any = None) -> tuple[Tensor, Tensor]:
        return self.program.completions(by, x, mask, given)

    def feature_sites(self, name: str) -> dict[str, int]:
        return {f"{name}_{i}": feature for i, feature in enumerate(self.program.order, 1)}

    def joint(self, name: str, value: Tensor | None = None, given: Any = None) -> Tensor:
        p, event_dim = self.program, len(self.event_shape)
        if value is None:
            x = p.chain(lambda i, p_i: pyro.sample(f"{name}_{i}", p_i), given=given)
        else:  # x_<i is known at every i, so that one pass serves them all
            x, raw = value, p.raw_parameters(value, given)
            for i, feature in enumerate(p.order, 1):
                x_i = x.flatten(-event_dim)[..., feature]
                stated = pyro.sample(f"{name}_{i}", p.at(i, raw), obs=x_i)
                if stated is not x_i and bool((stated != x_i).any()):
                    raise ValueError(
                        f"'{name}_{i}' is conditioned on other values than it has in the {name!r} passed: leave out "
                        "one of the two"
                    )
        if pyro.deterministic(name, x, event_dim=event_dim) is not x:
            raise ValueError(
                f"{name!r} is conditioned as a whole, but an unrolled chain states its features one by one: condition "
                f"'{name}_1' .. '{name}_{len(p.order)}', or pass the value itself"
            )
        return x


class FeatureChain:
    """p(x_1 | given), p(x_2 | x_1, given), .. in turn, each by `next` once the value before it is `put`.

    It uses the network's cache if there is one (see `networks.caches`), else a pass of the network per feature.

    Args:
        program: the program with the conditionals.
        batch: batch shape of x; it grows with that of the values.
        given: ``(*batch, *given_shape)``.
    """

    def __init__(self, program: Autoregressive, batch: Sequence[int] = (), given: Any = None):
        self.program, self.given, self.place = program, given, 0
        factors, self.x = program.factors, program.blank(batch)
        make = cache_maker(factors.network)
        if (
            type(factors).raw_parameters is not IndependentConditional.raw_parameters
        ):  # another class may use x in any way
            make = None
        self.cache: Cache | None = None
        self.last: Tensor | None = None
        given_batch = given.shape[: given.dim() - len(program.given_shape or ())] if program.conditional else ()
        self.batch = torch.broadcast_shapes(tuple(batch), given_batch)
        if make is not None:
            start: Any = lambda x, *given: make(x.shape[0], *given)  # noqa: E731
            inputs = (self.x, given) if program.conditional else self.x
            self.batch, self.cache = call_network(start, inputs, factors.given_shape)  # type: ignore[assignment]

    def next(self) -> TorchDistribution:
        """p(x_i | x_<i, given) at the next place; univariate."""
        raw = self.raw_parameters()
        return self.program.factors.of_feature(raw, self.program.order[self.place - 1])

    def raw_parameters(self) -> Tensor:
        """Raw parameters of `next`, ``(*batch, P)``."""
        p, self.place = self.program, self.place + 1
        if self.cache is None:
            return p.raw_at(self.place, p.raw_parameters(self.x, self.given))
        raw = self.cache.step(self.last)
        return p.factors.adjusted(raw.reshape(*self.batch, raw.shape[-1]), p.order[self.place - 1])

    def put(self, value: Tensor) -> None:
        """Set the feature at this place to ``value``, and move to the next place."""
        batch = self.batch if value.shape == self.batch else torch.broadcast_shapes(self.batch, value.shape)
        if self.cache is None:
            self.x, self.batch = self.program.place(self.x, self.place, value), batch
            return
        if batch != self.batch:
            self.take(torch.arange(self.batch.numel(), device=value.device).reshape(self.batch).expand(batch))
        self.last = value.expand(batch).reshape(-1)

    def skip(self, value: Tensor) -> None:
        """`next` and `put`, without computing p(x_i | x_<i)."""
        self.place += 1
        if self.cache is not None:
            self.cache.step(self.last)
        self.put(value)

    def take(self, rows: Tensor) -> None:
        """Keep only the chains at ``rows``, indices into the flattened batch, in the shape of the new batch."""
        p = self.program
        if self.cache is not None:
            self.cache.take(rows.reshape(-1))
            self.last = None if self.last is None else self.last[rows.reshape(-1)]
        else:
            self.x = self._gather_rows(self.x, p.event_shape, rows)
            if p.conditional:
                self.given = self._gather_rows(self.given, p.given_shape or (), rows)
        self.batch = rows.shape

    def _gather_rows(self, part: Tensor, shape: Sequence[int], rows: Tensor) -> Tensor:
        flat = part.expand(*self.batch, *shape).reshape(-1, *shape)
        return flat[rows.reshape(-1)].reshape(*rows.shape, *shape)


class AutoregressiveDistribution(TorchDistribution):
    """The distribution that `Autoregressive` returns for ``given``.

    Args:
        program: the program whose parameters it shares.
        given: ``(*batch, *given_shape)``; its batch shape is the distribution's.
    """

    arg_constraints: ClassVar = {}

    def __init__(self, program: Autoregressive, given: Any = None, validate_args: bool | None = None):
        self.program, self.given, self.has_rsample = program, given, program.has_rsample
        batch = given.shape[: given.dim() - len(program.given_shape or ())] if program.conditional else ()
        super().__init__(torch.Size(batch), program.event_shape, validate_args=validate_args)

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:
        return self.program.support

    def expand(
        self, batch_shape: Sequence[int], _instance: AutoregressiveDistribution | None = None
    ) -> AutoregressiveDistribution:
        new = self._get_checked_instance(AutoregressiveDistribution, _instance)
        new.program, new.has_rsample = self.program, self.has_rsample
        new.given = self.given  # left small: it broadcasts
        super(AutoregressiveDistribution, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def factors(self, name: str, given: tuple[str, ...]) -> ChainRule:
        """p(x_i | x_<i, given): each variable, and the names of the variables that it is conditioned on."""
        return ChainRule(tuple(f"{name}_{i}" for i in range(1, len(self.program.order) + 1)), given)

    def blank(self) -> Tensor:
        return self.program.blank(self.batch_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(x | given) in nats, of the broadcast batch shape of ``value`` and of the distribution."""
        if self._validate_args:
            self._validate_sample(value)
        raw = self.program.raw_parameters(value, self.given)
        log_prob = self.program.factors.univariate(raw).to_event(len(self.event_shape)).log_prob(value)
        return log_prob.expand(torch.broadcast_shapes(log_prob.shape, self.batch_shape))

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw x_1 .. x_D in turn, ``(*sample_shape, *batch_shape, *event_shape)``, differentiably."""
        if not self.has_rsample:
            raise NotImplementedError(f"{type(self.program.factors).__name__} features have no rsample: use sample")
        return self._run_chain(lambda i, p_i: p_i.rsample(), sample_shape)

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw x_1 .. x_D in turn, ``(*sample_shape, *batch_shape, *event_shape)``."""
        if self.has_rsample:
            return self.rsample(sample_shape)
        return self._run_chain(lambda i, p_i: p_i.sample(), sample_shape)

    def _run_chain(self, draw: Callable[[int, TorchDistribution], Tensor], sample_shape: Sequence[int]) -> Tensor:
        return self.program.chain(draw, (*sample_shape, *self.batch_shape), self.given)


def order_of(factors: IndependentConditional) -> tuple[int, ...]:
    """The order in which the network of ``factors`` is masked, as flat indices."""
    order = getattr(factors.network, "order", None)
    if order is None:
        what = "factors has no network" if factors.network is None else "the network of factors has no .order"
        raise ValueError(
            f"{what}: an autoregressive model needs one that is masked in some order of the features, such as "
            "dgm.networks.MADE or dgm.networks.PixelCNN"
        )
    return check_order(order, math.prod(factors.event_shape))


@torch.no_grad()
def check_masked(program: Autoregressive, places: int = 16) -> None:
    """Raise if the parameters of a feature change when features at its place or later change.

    Args:
        places: number of evenly spread places in the order; from each of them on, all features are changed. Fewer are
            used for thousands of features, because each place takes a pass of the network.
    """
    size, order, like = len(program.order), torch.tensor(program.order), parameter_of(program)
    count = min(size, places, max(1, FEATURES_CHECKED // size))
    changed_from = ((torch.arange(count) + 0.5) * size / count).long().unsqueeze(-1)
    place = order.argsort()
    bits = torch.arange(size) % 2
    x = torch.cat([bits.unsqueeze(0), torch.where(place >= changed_from, 1 - bits, bits)]) * ((program.levels or 2) - 1)
    x = x.reshape(-1, *program.event_shape).to(like.device, like.dtype if program.levels is None else torch.uint8)
    given = example_given(program)
    with eval_mode(program):
        raw = program.raw_parameters(x, given).flatten(1, -2)
    change = (raw[1:] - raw[:1]).abs().amax(-1).cpu()
    broken = (change > 1e-4 * (1 + raw.abs().max().cpu())) & (place <= changed_from)  # far above rounding
    if broken.any():
        row, feature = broken.nonzero()[0].tolist()
        raise ValueError(
            f"the network of factors is not autoregressive in its order: the parameters of feature {feature}, at "
            f"place {int(place[feature]) + 1}, change with features at place {int(changed_from[row]) + 1} or later. "
            "Use dgm.networks.MADE or dgm.networks.PixelCNN, or mask your network in the same way"
        )
    check_cache(program, x[:1], given, raw[0, order[:places].to(raw.device)])


@torch.no_grad()
def check_cache(program: Autoregressive, x: Tensor, given: Any, raw: Tensor) -> None:
    """Raise if the network's cache gives other parameters than the network, ``raw``, at the first places."""
    with eval_mode(program):
        chain = FeatureChain(program, (1,), given)
        for i, expected in enumerate(raw):
            found = chain.raw_parameters()[0]
            # Convolutions on a GPU may round to three digits where matrix products do not.
            if found.shape != expected.shape or bool((found - expected).abs().max() > 1e-2 * (1 + raw.abs().max())):
                raise ValueError(
                    f"the cache of {type(program.factors.network).__name__} gives other parameters than the network "
                    f"itself for the feature at place {i + 1}: correct its step, or leave out the cache method"
                )
            chain.put(x.flatten(1)[:, program.order[i]])
