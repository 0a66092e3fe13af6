r"""Corruptions: distorted images of adjustable strength, and adversarial attacks on classifiers.

`shift`, `rotate`, `blur`, `add_noise` and `mutate` need no model. `fgsm` and `pgd` are the worst case: they search,
within a distance from x, for the point at which a program's own p(y | x) is lowest for the true y. With an L-infinity
ball of radius :math:`\epsilon` around x the first step of the ascent of :math:`L = -\log p(y \mid x)` is

.. math::
    x' = x + \epsilon \, \mathrm{sign}(\nabla_x L(x, y))

All functions take images, ``(B, 1, H, W)``, integers 0 .. levels - 1 or reals, and return images of the same dtype.

Source: Hendrycks and Dietterich 2019 (arXiv 1903.12261), graded corruptions; Goodfellow et al. 2015 (arXiv 1412.6572),
FGSM; Madry et al. 2018 (arXiv 1706.06083), PGD; Ren et al. 2019 (arXiv 1906.02845), mutations.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dgm_pyro.checks import (
    check_count,
    check_dense,
    check_finite,
    check_labels,
    check_network_options,
    check_number,
    generator,
    is_integer,
)
from dgm_pyro.evaluation import evaluating
from dgm_pyro.families.labeled import Discriminative, Labeled
from dgm_pyro.program import Program, differentiating

__all__ = ["add_noise", "blur", "fgsm", "log_class_probabilities", "mutate", "pgd", "rotate", "shift", "shuffle_pixels"]


def shuffle_pixels(x: Tensor, seed: int = 0) -> Tensor:
    """Shuffle the pixels of each image in its own random order, which keeps the histogram of gray levels."""
    check_dense(x, "x")
    random = generator(seed)
    order = torch.rand(len(x), x[0].numel(), generator=random).argsort(1)
    return x.flatten(1).gather(1, order.to(x.device)).reshape(x.shape)


def add_noise(x: Tensor, scale: float, levels: int, seed: int = 0) -> Tensor:
    """x with Normal noise of standard deviation ``scale`` gray levels, rounded and clipped to 0 .. levels - 1."""
    check_finite(x, "x")
    check_number(scale, "scale", at_least=0)
    check_count(levels, "levels", at_least=2)
    random = generator(seed)
    noise = scale * torch.randn(x.shape, generator=random)
    return _as_before(x + noise.to(x.device), x, levels)


def mutate(x: Tensor, rate: float, levels: int) -> Tensor:
    """x with each feature replaced, with probability ``rate``, by a uniform draw from 0 .. levels - 1.

    This keeps statistics of single features and destroys structure, for the training of a background model
    (``dgm.fit(program, data, augment=lambda x: mutate(x, 0.3, 256))``). Draws use torch's global random state.
    """
    check_dense(x, "x")
    check_number(rate, "rate", at_least=0, at_most=1)
    check_count(levels, "levels", at_least=2)
    chosen = torch.rand(x.shape, device=x.device) < rate
    return torch.where(chosen, torch.randint(levels, x.shape, device=x.device).to(x.dtype), x)


# -- distortions of images ---------------------------------------------------------------------------------------------


def shift(x: Tensor, down: int = 0, right: int = 0) -> Tensor:
    """Shift images by whole pixels; pixels from outside are 0."""
    _check_images(x)
    height, width = x.shape[-2:]
    for pixels, argument in ((down, "down"), (right, "right")):
        if not is_integer(pixels):
            raise TypeError(f"{argument} must be a whole number of pixels, got {pixels!r}")
    if abs(down) >= height or abs(right) >= width:
        raise ValueError(f"down is {down} and right is {right}, but the images have only {height} x {width} pixels")
    moved = torch.zeros_like(x)
    to = moved[..., max(0, down) : height + min(0, down), max(0, right) : width + min(0, right)]
    to.copy_(x[..., max(0, -down) : height + min(0, -down), max(0, -right) : width + min(0, -right)])
    return moved


def rotate(x: Tensor, degrees: float, levels: int | None = None) -> Tensor:
    """Rotate images counterclockwise about their center, with bilinear interpolation; pixels from outside are 0."""
    _check_images(x)
    check_number(degrees, "degrees")
    check_network_options(levels=levels)
    (height, width), angle = x.shape[-2:], math.radians(degrees)
    down, right = torch.meshgrid(
        torch.arange(height, device=x.device) - (height - 1) / 2,
        torch.arange(width, device=x.device) - (width - 1) / 2,
        indexing="ij",
    )
    # Each pixel of the result is read at its origin; grid_sample counts from -1 to 1 between the outer edges.
    from_right = math.cos(angle) * right - math.sin(angle) * down
    from_down = math.sin(angle) * right + math.cos(angle) * down
    grid = torch.stack([from_right * (2 / width), from_down * (2 / height)], -1)
    values = _as_reals(x)
    turned = F.grid_sample(values, grid.to(values.dtype).expand(len(x), -1, -1, -1), align_corners=False)
    return _as_before(turned, x, levels)


def blur(x: Tensor, sigma: float, levels: int | None = None) -> Tensor:
    """Blur images by a Gaussian kernel of standard deviation ``sigma`` pixels, with replicated edges."""
    _check_images(x)
    check_number(sigma, "sigma", at_least=0)
    check_network_options(levels=levels)
    if sigma == 0:
        return x.clone()
    reach = math.ceil(4 * sigma)
    values = _as_reals(x)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=x.device) / sigma) ** 2).to(values.dtype)
    kernel = kernel / kernel.sum()
    padded = F.pad(values, (reach,) * 4, mode="replicate")
    return _as_before(F.conv2d(F.conv2d(padded, kernel.reshape(1, 1, 1, -1)), kernel.reshape(1, 1, -1, 1)), x, levels)


def _check_images(x: Tensor) -> None:
    check_finite(x, "x")
    if x.dim() != 4 or x.shape[1] != 1:
        raise ValueError(f"x has shape {tuple(x.shape)}, but images are (N, 1, H, W)")


def _as_reals(x: Tensor) -> Tensor:
    return x if x.is_floating_point() else x.to(torch.get_default_dtype())


def _as_before(values: Tensor, x: Tensor, levels: int | None) -> Tensor:
    """``values`` rounded and clipped if they are integers 0 .. levels - 1, in the dtype of x."""
    return (values if levels is None else values.round().clamp(0, levels - 1)).to(x.dtype)


# -- the worst case ----------------------------------------------------------------------------------------------------

Classifier = Program | Callable[[Tensor], Tensor]
# Number of data whose graph is in memory at once: the graph of a diffusion's bounds has every step of every class.
AT_ONCE = 32


def log_class_probabilities(classifier: Classifier, x: Tensor, num_particles: int = 1) -> Tensor:
    """log p(y | x) in nats, ``(B, classes)``, with its gradient in x.

    Args:
        classifier: a `Labeled` (Bayes' rule; from bounds where p(x | y) is not exact), a `Discriminative`, or any
            callable from x to log p(y | x).
        num_particles: particles of the bounds.

    Raises:
        TypeError: ``classifier`` has no p(y | x).
    """
    if not callable(classifier):
        raise TypeError(f"classifier must be a program or a function of x, got {type(classifier).__name__}")
    check_count(num_particles, "num_particles")
    check_finite(x, "x")
    if isinstance(classifier, Labeled):
        return classifier.log_joint(x, num_particles).log_softmax(0).movedim(0, -1)
    if isinstance(classifier, Discriminative):
        return classifier.classifier(x).logits
    if isinstance(classifier, Program):
        raise TypeError(
            f"classifier is a {type(classifier).__name__}, which has no p(y | x): pass a Labeled or a Discriminative"
        )
    return classifier(x)


def fgsm(
    classifier: Classifier, x: Tensor, y: Tensor, epsilon: float, levels: int | None = None, *, num_particles: int = 1
) -> Tensor:
    """The fast gradient sign method: one step of ``epsilon`` per pixel in the sign of the gradient of -log p(y | x).

    Args:
        classifier: the classifier to attack: see `log_class_probabilities`.
        x: ``(B, 1, H, W)``, or any shape that the classifier takes.
        y: the true labels, ``(B,)``.
        epsilon: size of the step in the units of x; a whole number of gray levels with ``levels``.
        levels: x takes the integers 0 .. levels - 1, and so does the result; None for reals, which are not clipped.
        num_particles: particles of the bounds.

    Raises:
        ValueError: the classifier's output does not depend smoothly on x, or ``epsilon`` does not fit.
    """
    _check_attack(x, y, epsilon, levels)
    return _signed_step(classifier, x, x, y, epsilon, epsilon, levels, num_particles)


def pgd(
    classifier: Classifier,
    x: Tensor,
    y: Tensor,
    epsilon: float,
    levels: int | None = None,
    *,
    gradient_steps: int = 10,
    step_size: float | None = None,
    num_particles: int = 1,
    seed: int = 0,
) -> Tensor:
    """Projected gradient descent: steps in the sign of the gradient from a random start, kept within ``epsilon`` of x.

    Args:
        classifier, x, y, epsilon, levels, num_particles: as for `fgsm`.
        gradient_steps: number of steps.
        step_size: size of a step in the units of x; default 2.5 epsilon / gradient_steps, with ``levels`` rounded to a
            whole number of at least 1.
        seed: seed of the start.

    Raises:
        ValueError: as for `fgsm`.
    """
    _check_attack(x, y, epsilon, levels)
    check_count(gradient_steps, "gradient_steps")
    size = 2.5 * epsilon / gradient_steps if step_size is None else step_size
    check_number(size, "step_size", at_least=0)
    if levels is not None:
        size = max(1, round(size))
    random = generator(seed)
    start = x + epsilon * (2 * torch.rand(x.shape, generator=random) - 1).to(x.device)
    moved = _as_before(start, x, levels)
    for _ in range(gradient_steps):
        moved = _signed_step(classifier, moved, x, y, size, epsilon, levels, num_particles)
    return moved


def _signed_step(
    classifier: Classifier,
    at: Tensor,
    x: Tensor,
    y: Tensor,
    step_size: float,
    epsilon: float,
    levels: int | None,
    num_particles: int,
) -> Tensor:
    """``at`` after one step, within ``epsilon`` of x."""
    parts = zip(_as_reals(at).split(AT_ONCE), y.to(x.device).split(AT_ONCE), strict=True)
    gradient = torch.cat([_slope(classifier, part, labels, num_particles) for part, labels in parts])
    center = _as_reals(x)
    return _as_before((at + step_size * gradient.sign()).clamp(center - epsilon, center + epsilon), x, levels)


def _slope(classifier: Classifier, at: Tensor, y: Tensor, num_particles: int) -> Tensor:
    """The gradient of -log p(y | x)."""
    here = at.clone().requires_grad_()
    guard = evaluating(classifier) if isinstance(classifier, Program) else contextlib.nullcontext()
    with guard, differentiating("an attack"):
        loss = -log_class_probabilities(classifier, here, num_particles).gather(-1, y.long()[:, None]).sum()
        gradient = torch.autograd.grad(loss, here, allow_unused=True)[0] if loss.requires_grad else None
    if gradient is None:
        raise ValueError(
            "log p(y | x) has no gradient in x, for example because pixels are looked up in a table: use add_noise"
        )
    return gradient


def _check_attack(x: Tensor, y: Tensor, epsilon: float, levels: int | None) -> None:
    check_finite(x, "x")
    check_labels(y, "y", len(x))
    check_network_options(levels=levels)
    check_number(epsilon, "epsilon", at_least=0)
    if levels is not None and epsilon != round(epsilon):
        raise ValueError(f"epsilon is {epsilon}, but x holds whole gray levels: pass an integer")
