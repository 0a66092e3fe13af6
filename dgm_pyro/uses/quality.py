r"""Sample quality: distances between data and samples, and how much each covers the other, in a feature space.

The features of data, :math:`r_1 .. r_N`, and of samples, :math:`s_1 .. s_M`, are vectors: x itself, or the output of a
network, such as the last hidden layer of a classifier. With their means and covariances :math:`\mu, \Sigma`,

.. math::
    \mathrm{Frechet} = |\mu_r - \mu_s|^2 + \mathrm{tr}\big(\Sigma_r + \Sigma_s - 2 (\Sigma_r \Sigma_s)^{1/2}\big),

the squared Wasserstein distance of two Normals, which is biased upwards in small sets. The *kernel distance* is
unbiased. It is the squared maximum mean discrepancy with the kernel :math:`k(a, b) = (a^T b / D + 1)^3`,

.. math::
    \mathrm{mean}_{i \ne j}\, k(r_i, r_j) + \mathrm{mean}_{i \ne j}\, k(s_i, s_j)
    - 2\, \mathrm{mean}_{i, j}\, k(r_i, s_j),

whose expected value is 0 for equal distributions, so the estimate may be negative.

Each point of a set has a ball that reaches to its k-th nearest neighbor in that set. *Precision* is the share of
samples in any ball of the data, and *recall* the share of data in any ball of the samples. Balls around outliers are
large, which inflates both. *Density* is the number of balls of the data that contain a sample, averaged over samples
and divided by k. *Coverage* is the share of balls of the data that contain a sample. For equal distributions, density
is 1, and coverage is near :math:`1 - 2^{-k}` for as many samples as data.

These numbers also depend on the features, and all but the kernel distance depend on the number of samples. So compare
programs with the same features and the same numbers of data and samples. The values of other real data in place of the
samples are those of a perfect program.

Source: Heusel et al. 2017 (FID, arXiv 1706.08500); Binkowski et al. 2018 (KID, arXiv 1801.01401); Kynkaanniemi et al.
2019 (arXiv 1904.06991); Naeem et al. 2020 (density and coverage, arXiv 2002.09797).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dgm_pyro.checks import check_count, check_counts, check_dense, check_finite, check_tensor, check_type
from dgm_pyro.evaluation import PAIRED_ROWS, evaluating, program_device, squared_mmd, standard_error
from dgm_pyro.networks.mlp import eval_mode
from dgm_pyro.program import Program, alone, check_program, seeded
from dgm_pyro.results import Result, Table, with_error

__all__ = [
    "SampleQuality",
    "frechet_distance",
    "hidden_features",
    "kernel_distance",
    "program_quality",
    "sample_quality",
]

Extractor = Callable[[Tensor], Tensor] | nn.Module
MEASURES = ("frechet", "kernel", "precision", "recall", "density", "coverage")


@dataclass(frozen=True)
class SampleQuality(Result):
    """The result of `sample_quality`; errors are standard errors over data and samples.

    Attributes:
        values, errors: values and errors by the name of the measure.
        num_real, num_samples, num_features: sizes of the two sets, and number of features.
        neighbors: k.
    """

    values: dict[str, float]
    errors: dict[str, float]
    num_real: int
    num_samples: int
    num_features: int
    neighbors: int

    def as_dict(self) -> dict[str, Any]:
        """The numbers as plain Python, for JSON."""
        return dict(vars(self))

    def parts(self) -> list[str | Table]:
        better = {"frechet": "lower", "kernel": "lower"}
        rows = [
            [name, with_error(self.values[name], self.errors[name], 4), better.get(name, "higher")] for name in MEASURES
        ]
        sizes = f"{self.num_real} data and {self.num_samples} samples, {self.num_features} features"
        return [f"{sizes}, {self.neighbors} neighbors:", Table(["measure", "value", "better"], rows)]


@torch.no_grad()
def sample_quality(
    real: Tensor,
    samples: Tensor,
    extractor: Extractor | None = None,
    *,
    neighbors: int = 5,
    num_blocks: int = 10,
    batch_size: int = 256,
) -> SampleQuality:
    """Frechet and kernel distance, precision, recall, density and coverage of samples against data.

    Args:
        real: data, ``(N, *shape)``.
        samples: ``(M, *shape)``.
        extractor: maps a batch of x to vectors, ``(B, ...)``: a network, which is used in evaluation mode, or any
            function; None for x itself. Published numbers for photographs use Inception.
        neighbors: k.
        num_blocks: number of blocks of the jackknife, which gives the errors of the two distances.
        batch_size: data per batch of ``extractor``.

    Raises:
        ValueError: the shapes differ, or there are too few of either.

    >>> normals = torch.randn(2, 400, 3, generator=torch.Generator().manual_seed(0))
    >>> quality = sample_quality(*normals)
    >>> abs(quality.values["kernel"]) < 3 * quality.errors["kernel"]
    True
    """
    check_finite(real, "real")
    check_tensor(samples, real.shape[1:], "samples", "the shape of a datum")
    check_finite(samples, "samples")
    check_counts(neighbors=neighbors, batch_size=batch_size)
    check_count(num_blocks, "num_blocks", at_least=2)
    least = max(neighbors + 1, 2 * num_blocks)
    if min(len(real), len(samples)) < least:
        raise ValueError(
            f"there are {len(real)} real data and {len(samples)} samples, but {neighbors} neighbors and {num_blocks} "
            f"blocks need at least {least} of each: pass more of them, or fewer neighbors or num_blocks"
        )
    r, s = (_features_of(x, extractor, batch_size) for x in (real, samples))
    density, covered = _in_balls(s, r, neighbors)
    inside = {"precision": density > 0, "density": density / neighbors, "coverage": covered}
    inside["recall"] = _in_balls(r, s, neighbors)[0] > 0
    values = {name: each.double().mean().item() for name, each in inside.items()}
    errors = {name: standard_error(each.double()) for name, each in inside.items()}
    for name, distance in (("frechet", frechet_distance), ("kernel", kernel_distance)):
        values[name], errors[name] = distance(r, s), _jackknife(distance, r, s, num_blocks)
    return SampleQuality(values, errors, len(r), len(s), r.shape[1], neighbors)


@alone()
def program_quality(
    program: Program,
    real: Tensor,
    extractor: Extractor | None = None,
    *,
    given: Any = None,
    num_samples: int | None = None,
    seed: int = 0,
    neighbors: int = 5,
) -> SampleQuality:
    """`sample_quality` of a program's samples.

    Args:
        program: the program to sample from.
        real: data that it was not trained on, ``(N, *event_shape)``.
        extractor: as for `sample_quality`.
        given: for a conditional program, ``(num_samples, *given_shape)``.
        num_samples: number of samples; default that of the data.
        seed: seed of the samples; the global random state does not change.
        neighbors: k.

    Raises:
        ValueError, TypeError: an argument does not fit, or there are too few data or samples.
    """
    check_program(program)
    check_dense(real, "real")
    count = len(real) if num_samples is None else check_count(num_samples, "num_samples")
    device = program_device(program)
    with evaluating(program), seeded(seed, device), torch.no_grad():
        # In batches, because the activations for all samples at once may be large.
        sizes = [len(part) for part in torch.arange(count).split(PAIRED_ROWS)]
        parts = [None] * len(sizes) if given is None else given.split(PAIRED_ROWS)
        drawn = [program.sample(size, part) for size, part in zip(sizes, parts, strict=True)]
    return sample_quality(real.to(device), torch.cat(drawn), extractor, neighbors=neighbors)


def _features_of(x: Tensor, extractor: Extractor | None, batch_size: int) -> Tensor:
    """Vectors of x in double precision, ``(N, D)``."""
    if extractor is None:
        return x.flatten(1).double()
    if not callable(extractor):
        raise TypeError(f"extractor must be a network, a function of x or None, got {type(extractor).__name__}")
    with eval_mode(extractor) if isinstance(extractor, nn.Module) else contextlib.nullcontext():
        return torch.cat([extractor(part).flatten(1).double() for part in x.split(batch_size)])


def hidden_features(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """The input of a network's last linear layer; for a classifier, features that separate its classes.

    Raises:
        ValueError: the network has no linear layer.
    """
    check_type(network, nn.Module, "network", "a torch.nn.Module")
    layers = [module for module in network.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ValueError(f"this {type(network).__name__} has no linear layer: pass a function of x as extractor")

    def features(x: Tensor) -> Tensor:
        read: list[Tensor] = []
        handle = layers[-1].register_forward_pre_hook(lambda layer, inputs: read.append(inputs[0]))
        try:
            with eval_mode(network):
                network(x)
        finally:
            handle.remove()
        return read[-1]

    return features


def frechet_distance(real: Tensor, samples: Tensor) -> float:
    """The squared Wasserstein distance of the Normals with the means and covariances of two sets, ``(N, D)``."""
    _check_features(real, samples)
    means, covariances = zip(*((x.mean(0), x.T.cov().reshape(x.shape[1], -1)) for x in (real, samples)), strict=True)
    # tr (A B)^1/2 equals the trace of the symmetric (A^1/2 B A^1/2)^1/2.
    values, vectors = torch.linalg.eigh(covariances[0])
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    shared = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp_min(0).sqrt().sum()
    return ((means[0] - means[1]).square().sum() + sum(c.trace() for c in covariances) - 2 * shared).item()


def kernel_distance(real: Tensor, samples: Tensor) -> float:
    """The unbiased squared maximum mean discrepancy of two sets, ``(N, D)``, with the kernel of the module."""
    _check_features(real, samples)
    return squared_mmd(real, samples, lambda a, b: (a @ b.T / a.shape[1] + 1).pow(3)).item()


def _check_features(real: Tensor, samples: Tensor) -> None:
    check_finite(real, "real")
    check_finite(samples, "samples")
    if real.dim() != 2 or samples.dim() != 2 or real.shape[1] != samples.shape[1] or min(len(real), len(samples)) < 2:
        raise ValueError(
            f"real and samples must be at least two vectors of features each, (N, D) and (M, D), got "
            f"{tuple(real.shape)} and {tuple(samples.shape)}"
        )


def _jackknife(distance: Callable[[Tensor, Tensor], float], real: Tensor, samples: Tensor, num_blocks: int) -> float:
    """Jackknife standard error of a distance, from its values without each block of both sets."""
    blocks = [[torch.arange(len(x)) % num_blocks == i for i in range(num_blocks)] for x in (real, samples)]
    without = [distance(real[~a], samples[~b]) for a, b in zip(*blocks, strict=True)]
    return math.sqrt((num_blocks - 1) * torch.tensor(without).double().var(correction=0).item())


def _in_balls(points: Tensor, centers: Tensor, neighbors: int) -> tuple[Tensor, Tensor]:
    """Number of balls around ``centers`` that contain each point, and whether each of these balls contains a point."""
    # The nearest neighbor in the set is the center itself.
    radius = torch.cat(
        [torch.cdist(part, centers).kthvalue(neighbors + 1, 1).values for part in centers.split(PAIRED_ROWS)]
    )
    counts, covered = list[Tensor](), torch.zeros(len(centers), dtype=torch.bool, device=centers.device)
    for part in points.split(PAIRED_ROWS):
        inside = torch.cdist(part, centers) <= radius
        counts.append(inside.sum(1))
        covered |= inside.any(0)
    return torch.cat(counts), covered
