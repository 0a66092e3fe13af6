r"""Noise that belongs to a datum: a random score of x is a function of x, the program and the seed alone.

A generator returns its numbers in the order of the requests, so the noise of a datum depends on its row and on the rest
of the batch. A score with such noise is not a function of the datum. Two data of the same distribution are then not
exchangeable, and a bound on the false alarm rate that assumes exchangeability does not hold.

Inside `per_datum` a draw is a hash of counters (Salmon et al. 2011) instead,

.. math::
    u = h(\text{seed}, \text{bytes of } x, \text{number of the draw}, \text{particle}, \text{element}),

which is the same in every batch, on every device, and for any chunks of the particles. Equal data get equal noise.
This applies to two kinds of draws: those of a program's sites, and those inside `drawing`. Draws without a data
dimension depend on the seed alone.

Source: Salmon et al. 2011 (Parallel random numbers: as easy as 1, 2, 3); the mixing function is that of Steele, Lea and
Flood 2014 (SplitMix).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["chunks", "drawing", "per_datum"]


def _signed_64_bits(value: int) -> int:
    """The signed 64-bit integer with the last 64 bits of ``value``."""
    return (value + 2**63) % 2**64 - 2**63


_GOLDEN, _FIRST, _SECOND = map(_signed_64_bits, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def mix(z: Tensor) -> Tensor:
    """A bijection of the 64-bit integers in which every bit of the result depends on every bit of ``z``."""
    z = (z ^ _shift_right(z, 30)) * _FIRST
    z = (z ^ _shift_right(z, 27)) * _SECOND
    return z ^ _shift_right(z, 31)


def _shift_right(z: Tensor, places: int) -> Tensor:
    return (z >> places) & ((1 << (64 - places)) - 1)  # torch's own shift repeats the sign


def row_keys(x: Tensor) -> Tensor:
    """A hash of each datum's values, ``(B,)`` 64-bit integers: one for reals of any dtype, another for integers."""
    values = x.detach().reshape(len(x), -1)
    bits = (values.double() + 0.0).view(torch.int64) if x.is_floating_point() else values.long()  # -0 + 0 is 0
    places = torch.arange(1, bits.shape[1] + 1, device=x.device)
    return mix(mix(bits + places * _GOLDEN).sum(1))


class _DatumNoise(TorchDispatchMode):
    """Replaces torch's generators, inside `drawing` or a site.

    Args:
        keys: keys of the data, ``(B,)``.
        seed: the key of draws that the data share.

    Attributes:
        batch: batch shape of the current draw; its last dimension is the data.
        count: number of draws so far.
        first: index of the first particle of the current chunk.
    """

    def __init__(self, keys: Tensor, seed: Tensor):
        super().__init__()
        self.keys, self.seed = keys, seed
        self.batch: torch.Size | None = None
        self.count = self.first = 0

    @contextlib.contextmanager
    def drawing(self, batch: Sequence[int]) -> Iterator[None]:
        before, self.batch = self.batch, torch.Size(batch)
        try:
            with self if before is None else contextlib.nullcontext():
                yield
        finally:
            self.batch = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags or kwargs.get("generator") is not None:
            return func(*args, **kwargs)
        self.count += 1
        name = func.overloadpacket.__name__
        like = func(*args, **kwargs)  # for its shape, type and device
        if name in _ROW_BY_ROW:
            return self._row_by_row(func, args, like)
        if name not in _INVERSES:
            raise NotImplementedError(
                f"torch.{name} has no per-datum noise: draw by torch.rand, torch.randn or a torch distribution"
            )
        given = {a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}
        given |= {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)} | kwargs
        return like.copy_(_INVERSES[name](self._uniform(like, flat=name == "multinomial"), given))

    def _keys_and_sizes(self, shape: torch.Size, flat: bool) -> tuple[Tensor, torch.Size]:
        """The keys, and the sizes of four groups of dimensions: left of the particles, particles, data, the rest.

        Args:
            flat: whether the dimensions have been folded, so that only their order is known.
        """
        batch, dims = self.batch or torch.Size(), len(self.batch or ())
        size, lead = len(self.keys), math.prod(batch[:-1])
        if batch[-1:] == (size,):
            if not flat and len(shape) >= dims and shape[dims - 1] == size:
                left = torch.Size((1, 1)) + shape[: dims - 1]
                return self.keys, torch.Size((math.prod(left[:-1]), left[-1], size)) + shape[dims:]
            if shape.numel() % (lead * size) == 0:
                particles = batch[-2] if dims > 1 else 1
                return self.keys, torch.Size((lead // particles, particles, size, shape.numel() // (lead * size)))
        return self.seed, torch.Size((1, 1, 1)) + shape

    def _streams(self, keys: Tensor, particles: int) -> Tensor:
        """A key for each particle of each datum, ``(particles, B)``."""
        numbers = torch.arange(self.first, self.first + particles, device=keys.device)
        return mix(mix(keys + _signed_64_bits(self.count * _SECOND)) + (numbers.unsqueeze(-1) + 1) * _FIRST)

    def _uniform(self, like: Tensor, flat: bool) -> Tensor:
        """Uniform on (0, 1) in double precision, in the shape of ``like``."""
        keys, (outer, particles, _, *right) = self._keys_and_sizes(like.shape, flat)
        places = torch.arange(1, outer * math.prod(right) + 1, device=like.device).reshape(outer, 1, 1, -1)
        bits = mix(self._streams(keys.to(like.device), particles).unsqueeze(-1) + places * _GOLDEN)
        return ((_shift_right(bits, 12).double() + 0.5) * 2.0**-52).reshape(like.shape)

    def _row_by_row(self, func: Any, args: Any, like: Tensor) -> Tensor:
        """Draws that are no function of uniform draws, by a generator for each particle of each datum."""
        keys, shape = self._keys_and_sizes(like.shape, flat=False)
        parameters = [arg.detach().cpu().reshape(shape) for arg in args]
        drawn, generator = torch.empty(shape, dtype=like.dtype), torch.Generator()
        for k, of_data in enumerate(self._streams(keys.cpu(), shape[1]).tolist()):
            for b, seed in enumerate(of_data):
                generator.manual_seed(seed)
                drawn[:, k, b] = func(*(each[:, k, b] for each in parameters), generator=generator)
        return like.copy_(drawn.reshape(like.shape))


def _categories(u: Tensor, given: dict[str, Any]) -> Tensor:
    if u.shape[-1] > 1 and not given["replacement"]:
        raise NotImplementedError("torch.multinomial without replacement has no per-datum noise: draw one")
    edges = given["self"].double().cumsum(-1)
    return torch.searchsorted(edges, u * edges[..., -1:], right=True).clamp(max=edges.shape[-1] - 1)


def _below_one(u: Tensor, given: dict[str, Any]) -> Tensor:
    """u in [0, 1) in the requested precision, in which u may round to 1."""
    like = given.get("self")
    dtype = given.get("dtype") or (torch.get_default_dtype() if like is None else like.dtype)
    return u if dtype == torch.float64 else (u / torch.finfo(dtype).eps * 2).floor() * (torch.finfo(dtype).eps / 2)


def _normal(u: Tensor, given: dict[str, Any]) -> Tensor:
    return given.get("mean", 0.0) + given.get("std", 1.0) * torch.special.ndtri(u)


# The function from u, uniform on (0, 1), to a draw, by the name of torch's function; it also gets the arguments.
_INVERSES: dict[str, Callable[[Tensor, dict[str, Any]], Tensor]] = {
    "rand": _below_one,
    "rand_like": _below_one,
    "uniform_": lambda u, given: given["from"] + (given["to"] - given["from"]) * _below_one(u, given),
    "randint": lambda u, given: given.get("low", 0) + (u * (given["high"] - given.get("low", 0))).floor(),
    "randn": _normal,
    "randn_like": _normal,
    "normal": _normal,
    "normal_": _normal,
    "exponential_": lambda u, given: -torch.log1p(-u) / given["lambd"],
    "cauchy_": lambda u, given: given["median"] + given["sigma"] * torch.tan(math.pi * (u - 0.5)),
    "bernoulli": lambda u, given: u < given.get("p", given["self"]),
    "bernoulli_": lambda u, given: u < given["p"],
    "multinomial": _categories,
}
_ROW_BY_ROW = ("_standard_gamma", "_sample_dirichlet", "poisson", "binomial")


class _DrawSites(Messenger):
    """Draws the sites of a program with per-datum noise, as the last handler that may give them a value."""

    def __init__(self, noise: _DatumNoise):
        super().__init__()
        self.noise = noise

    def _pyro_sample(self, msg: Any) -> None:
        if msg["value"] is None and not msg["done"]:
            with self.noise.drawing(getattr(msg["fn"], "batch_shape", ())):
                msg["value"] = msg["fn"](*msg["args"], **msg["kwargs"])


_current: ContextVar[_DatumNoise | None] = ContextVar("noise", default=None)


@contextlib.contextmanager
def per_datum(x: Tensor, seed: int) -> Iterator[None]:
    """Give each row of x, ``(B, *event_shape)``, its own noise, a function of its values and the seed.

    >>> import torch, dgm_pyro as dgm
    >>> x, both = torch.zeros(1, 2), torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    >>> with per_datum(x, seed=0), drawing((3, 1)):
    ...     alone = torch.randn(3, 1, 5)
    >>> with per_datum(both, seed=0), drawing((3, 2)):
    ...     second = torch.randn(3, 2, 5)[:, 1:]
    >>> torch.equal(alone, second)
    True
    """
    base = mix(torch.tensor([_signed_64_bits(seed)], device=x.device) + _GOLDEN)
    token = _current.set(_DatumNoise(mix(row_keys(x) + base), base))
    try:
        yield
    finally:
        _current.reset(token)


def is_per_datum() -> bool:
    """Whether draws are made inside `per_datum`."""
    return _current.get() is not None


def drawing(batch: Sequence[int]) -> contextlib.AbstractContextManager[Any]:
    """Give torch's draws per-datum noise inside `per_datum`; elsewhere do nothing.

    Args:
        batch: leading dimensions of the draws, the last of which is the data: ``(K, B)`` for K particles.
    """
    noise = _current.get()
    return contextlib.nullcontext() if noise is None else noise.drawing(batch)


def sites() -> contextlib.AbstractContextManager[Any]:
    """Give the draws of sites per-datum noise inside `per_datum`; enter this before the plates."""
    noise = _current.get()
    return contextlib.nullcontext() if noise is None else _DrawSites(noise)


def chunks(total: int, chunk_size: int) -> Iterator[tuple[int, int]]:
    """Start and size of each chunk of ``total`` particles, whose noise does not depend on the size of the chunks."""
    noise = _current.get()
    count = 0 if noise is None else noise.count
    for start in range(0, total, chunk_size):
        if noise is not None:
            noise.count, noise.first = count, start
        yield start, min(chunk_size, total - start)
    if noise is not None:
        noise.first = 0
