r"""Deep hierarchies of latents: many levels that share one deterministic top-down path.

.. math::
    p(x, z_{1:L}) = p(z_L)\, p(z_{L-1} \mid z_L) \cdots p(z_1 \mid z_{2:L})\, p(x \mid z_{1:L}), \qquad
    q(z_{1:L} \mid x) = \prod_{l=L}^{1} q(z_l \mid z_{l+1:L}, x)

Level l depends on the levels above it through one feature map, :math:`h_l`, which starts as a parameter and is updated
by each z:

.. math::
    p(z_l \mid h_l), \qquad q(z_l \mid h_l, a_l(x)), \qquad h_{l-1} = \mathrm{path}_l(h_l, z_l), \qquad p(x \mid h_0)

with :math:`a_l` the features of x at that resolution, from one network that reads x once. Model and guide run the same
path. The guide draws the levels in the model's order, so every level's KL has a closed form given the levels above, and
`objectives.FreeBits` applies its floor to each level. ``dgm.fit(skip_norm=...)`` skips steps whose gradient explodes.

A `VAE` whose prior is a `VAE` is a hierarchy too, but its p(x | z_1) reads the last level alone.

Sources: Sonderby et al. 2016 (arXiv 1602.02282); Kingma et al. 2016 (arXiv 1606.04934, appendix C); Child 2021 (VDVAE,
arXiv 2011.10650).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dgm_pyro.checks import as_shape, check_count, check_type
from dgm_pyro.families.conditionals import Normal
from dgm_pyro.families.distributions import mean_of
from dgm_pyro.families.flow import start_near_zero
from dgm_pyro.networks.convolutional import ConvNet, image_shape
from dgm_pyro.networks.hierarchy import BottomUp, TopDownStep
from dgm_pyro.networks.mlp import apply_network
from dgm_pyro.program import Conditional, Program, call_network, check_program, declare_given
from dgm_pyro.registry import register

__all__ = ["DeepVAE", "Level", "vdvae"]


@register
class Level(nn.Module):
    """One latent z of a `DeepVAE`, and the path to the next level.

    Args:
        prior: p(z | h).
        posterior: q(z | h, a), given the pair of h and the features a of x.
        path: a network ``path(h, z)`` to the h of the next level, with `in_shape`, `given_shape` and `out_shape`.

    Raises:
        TypeError, ValueError: a part is not a conditional, or the shapes do not fit.
    """

    prior: Conditional
    posterior: Conditional
    path: Any

    def __init__(self, prior: Conditional, posterior: Conditional, path: Any):
        super().__init__()
        for role, part in (("prior", prior), ("posterior", posterior)):
            check_type(part, Conditional, role, "a dgm.Conditional")
        _check_shapes(path, "path", "in_shape", "given_shape", "out_shape")
        h_shape, z_shape = path.in_shape, path.given_shape
        declare_given(prior, h_shape, "prior", "h, of shape")
        seen: Any = posterior.given_shape
        if not (isinstance(seen, tuple) and len(seen) == 2 and seen[0] == h_shape):
            raise ValueError(
                f"posterior must be given the pair (h, a), h of shape {tuple(h_shape)}, but its given_shape is {seen}"
            )
        if not prior.event_shape == posterior.event_shape == z_shape:
            raise ValueError(
                f"path takes z of shape {tuple(z_shape)}, but the event_shape of prior is {tuple(prior.event_shape)} "
                f"and that of posterior {tuple(posterior.event_shape)}"
            )
        self.prior, self.posterior, self.path = prior, posterior, path

    def onward(self, h: Tensor, z: Tensor) -> Tensor:
        """The h of the next level, ``(*batch, *out_shape)``."""
        batch, out = call_network(self.path, (h, z), (self.path.in_shape, self.path.given_shape))
        return out.reshape(*batch, *out.shape[1:])


@register
class DeepVAE(Program):
    """``p(z_L) ... p(z_1 | z_>1) p(x | z)`` and ``q(z_L | x) ... q(z_1 | z_>1, x)`` on one top-down path.

    The sites are ``z_1``, nearest to x, to ``z_L``, at the top.

    Args:
        levels: the `Level` objects from the top down; the out_shape of a path is the in_shape of the next one.
        likelihood: p(x | h), a program without latents, given the last h.
        reader: a network from x to a tuple of features, whose shapes it declares as `out_shapes`.

    Raises:
        TypeError, ValueError: a part has another type, or shapes do not fit.

    >>> import torch, dgm_pyro as dgm
    >>> likelihood = dgm.Bernoulli((1, 4, 4), dgm.networks.ConvNet((3, 2, 2), (1, 4, 4), 1))
    >>> vae = dgm.hierarchy.vdvae(likelihood, (1, 2), latent_channels=2)
    >>> print(vae.formula().p)
    p(z_3) p(z_2 | z_3) p(z_1 | z_>1) p(x | z_1, ..., z_3)
    """

    reader: Any
    levels_down: Any

    def __init__(self, levels: Sequence[Level], likelihood: Program, reader: Any):
        super().__init__()
        check_type(levels, Sequence, "levels", "a sequence of Level")
        for i, level in enumerate(levels):
            check_type(level, Level, f"levels[{i}]", "a dgm.hierarchy.Level")
        if not levels:
            raise ValueError("levels is empty: a DeepVAE has at least one level")
        check_program(likelihood, "likelihood")
        _check_shapes(reader, "reader", "out_shapes")
        if likelihood.latents("x") != ():
            raise ValueError(
                "likelihood has latents of its own, which a DeepVAE does not state: use a likelihood without latents"
            )
        for above, below in itertools.pairwise(levels):
            if above.path.out_shape != below.path.in_shape:
                raise ValueError(
                    f"a path ends in h of shape {tuple(above.path.out_shape)}, but the next one takes "
                    f"{tuple(below.path.in_shape)}"
                )
        declare_given(likelihood, levels[-1].path.out_shape, "likelihood", "the last h, of shape")
        unread = [shape for shape in map(_features_shape_of, levels) if shape not in reader.out_shapes]
        if unread:
            raise ValueError(
                f"a posterior is given features of shape {tuple(unread[0])}, but reader has out_shapes "
                f"{[tuple(shape) for shape in reader.out_shapes]}"
            )
        self.levels_down = nn.ModuleList(levels)
        self.likelihood, self.reader = likelihood, reader
        self.start = nn.Parameter(torch.zeros(levels[0].path.in_shape))
        self.event_shape, self.levels = likelihood.event_shape, likelihood.levels

    @property
    def _named_levels(self) -> list[tuple[str, Any]]:
        """The levels from the top down, with the names of their sites."""
        size = len(self.levels_down)
        return [(f"z_{size - i}", level) for i, level in enumerate(self.levels_down)]

    def joint(self, name: str, value: Tensor | None = None, given: Any = None) -> Tensor:
        h: Tensor = self.start
        for site, level in self._named_levels:
            h = level.onward(h, level.prior.joint(site, given=h))
        return self.likelihood.joint(name, value, given=h)

    def posterior(self, name: str, value: Tensor, given: Any = None) -> None:
        h, seen = self.start, self._read_features(value)
        for site, level in self._named_levels:
            h = level.onward(h, level.posterior.joint(site, given=(h, seen[_features_shape_of(level)])))

    def _read_features(self, x: Tensor) -> dict[torch.Size, Tensor]:
        """The features of x by their shapes."""
        batch = x.shape[: x.dim() - len(self.event_shape)]
        features = apply_network(self.reader, x.reshape(math.prod(batch), *self.event_shape))
        return {
            shape: part.reshape(*batch, *shape) for shape, part in zip(self.reader.out_shapes, features, strict=True)
        }

    def latents(self, name: str) -> tuple[str, ...]:
        return tuple(site for site, _ in self._named_levels)

    def unroll(self) -> DeepVAE:
        """The same program with the chain in the likelihood unrolled."""
        unrolled = self.likelihood.unroll()
        return self if unrolled is self.likelihood else self.replaced(likelihood=unrolled)

    def unroll_latents(self) -> DeepVAE:
        return self

    @property
    def takes_missing(self) -> bool:
        return self.likelihood.takes_missing

    def placeholder(self) -> Tensor:
        return self.likelihood.placeholder()

    def codes(self) -> dict[str, Program]:
        """The top level alone: the levels below are random given the top."""
        site, level = self._named_levels[0]
        return {site: level.prior}

    def _encode(self, x: Tensor, given: Any, site: str, draw: bool, num_samples: int) -> Tensor:
        """The mean of q(z_L | x), or a draw."""
        q = self.levels_down[0].posterior((self.start, self._read_features(x)[_features_shape_of(self.levels_down[0])]))
        return q.rsample() if draw else q.mean

    def _decode(self, z: Tensor, given: Any, site: str, draw: bool) -> Tensor:
        """The mean of p(x | z) with the levels below at their means; or a draw of x and of these levels."""
        h = self.levels_down[0].onward(self.start, z)
        for level in self.levels_down[1:]:
            p = level.prior(h)
            h = level.onward(h, p.sample() if draw else p.mean)
        if draw:
            return self.likelihood.sample(len(z), h)
        return mean_of(self.likelihood(h), self.levels, z.device)


def _check_shapes(network: Any, role: str, *names: str) -> None:
    """Raise unless ``network`` is a module that declares its shapes by the attributes ``names``."""
    check_type(network, nn.Module, role, "a torch.nn.Module")
    lacking = [name for name in names if not hasattr(network, name)]
    if lacking:
        raise ValueError(
            f"{role} is {type(network).__name__}, which has no {lacking[0]}: give the module that attribute"
        )


def _features_shape_of(level: Any) -> torch.Size:
    """The shape of the features of x that a level's posterior is given."""
    shape: torch.Size = level.posterior.given_shape[1]
    return shape


def vdvae(
    likelihood: Program, levels: Sequence[int] = (2, 3, 3), *, latent_channels: int = 8, blocks: int = 1
) -> DeepVAE:
    """VDVAE: Normal latents of several resolutions on a residual top-down path (Child 2021, arXiv 2011.10650).

    Args:
        likelihood: p(x | h) of images, given features h of shape ``(C, H, W)``: the finest resolution of the latents.
        levels: number of levels at each resolution, from the coarsest to the finest; each resolution is half of the
            next.
        latent_channels: number of channels of each z.
        blocks: residual blocks of each network.

    Raises:
        ValueError: the resolution cannot be halved that often, or an argument does not fit.

    >>> import dgm_pyro as dgm
    >>> likelihood = dgm.Bernoulli((1, 8, 8), dgm.networks.ConvNet((4, 4, 4), (1, 8, 8), 1))
    >>> [level.prior.event_shape for level in vdvae(likelihood, (1, 2), latent_channels=2).levels_down]
    [torch.Size([2, 2, 2]), torch.Size([2, 4, 4]), torch.Size([2, 4, 4])]
    """
    check_program(likelihood, "likelihood")
    check_count(latent_channels, "latent_channels")
    counts = as_shape(levels, "levels")
    if not counts:
        raise ValueError("levels must be the number of levels at each resolution, got none: give at least one")
    channels, height, width = image_shape(likelihood.given_shape or (), "the given_shape of likelihood")
    factor = 2 ** (len(counts) - 1)
    if height % factor or width % factor:
        raise ValueError(
            f"levels {tuple(counts)} halve the resolution {len(counts) - 1} times, but that of the likelihood is "
            f"{height}x{width}: give fewer resolutions"
        )
    sizes = [(height // 2**i, width // 2**i) for i in reversed(range(len(counts)))]
    here = [size for size, count in zip(sizes, counts, strict=True) for _ in range(count)]
    made = []
    for size, below in itertools.pairwise([*here, sizes[-1]]):
        h, z = (channels, *size), (latent_channels, *size)
        p_z = ConvNet(h, z, 2, channels, blocks=blocks)
        q_z = ConvNet(h, z, 2, channels, blocks=blocks, given_shape=h)
        start_near_zero(p_z.last, q_z.last)  # q(z | h, x) is near p(z | h) at first
        path = TopDownStep(h, z, (channels, *below), blocks=blocks)
        made.append(Level(Normal(z, p_z, initial_scale=1.0), Normal(z, q_z, initial_scale=1.0), path))
    shapes = [(channels, *size) for size in reversed(sizes)]
    return DeepVAE(made, likelihood, BottomUp(likelihood.event_shape, shapes, blocks=blocks, levels=likelihood.levels))
