"""A solver of ordinary differential equations: Dormand and Prince's pair of orders 5 and 4, with adaptive steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["solve"]

# Row i: the weights of the earlier slopes in the point of the i-th. The last row is the step of order 5 itself.
STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
# The weights of the order-5 step minus those of the order-4 step.
ERROR = (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


LONGEST = 1 / 20
"""The longest step, as a share of the interval: a longer one could skip a region where the slope changes."""


def solve(
    slope: Callable[[Tensor, Tensor], Tensor],
    y: Tensor,
    start: float,
    end: float,
    *,
    tolerance: float = 1e-5,
    max_steps: int = 10_000,
) -> Tensor:
    """y at ``end``, for dy / dt = slope(t, y) and y at ``start``, ``(B, *shape)``.

    Every row has its own time and steps, so its solution does not depend on the batch.

    Args:
        slope: a function of t, ``(B,)``, and y, to the shape of y.
        y: ``(B, *shape)`` at ``start``.
        tolerance: the largest estimated error of a step, relative to 1 + abs(y), over all elements of a row.
        max_steps: the largest number of steps.

    Raises:
        RuntimeError: the solution needs more than ``max_steps`` steps.

    Source: Dormand and Prince 1980; step control as in Hairer, Norsett and Wanner 1993, section II.4.

    >>> import torch
    >>> y = solve(lambda t, y: -y, torch.ones(1, dtype=torch.float64), 0.0, 1.0, tolerance=1e-10)
    >>> torch.allclose(y, torch.tensor(-1.0).double().exp(), rtol=1e-8)
    True
    """
    span = end - start
    passed = torch.zeros(len(y), dtype=torch.float64, device=y.device)  # the share of the way behind each row
    step = torch.full_like(passed, 1 / 50)

    def wide(rows: Tensor) -> Tensor:
        return rows.reshape(-1, *(1,) * (y.dim() - 1))

    def slope_at(share: Tensor, y: Tensor) -> Tensor:
        return slope((start + span * share).to(y.dtype), y)

    first = slope_at(passed, y)
    for _ in range(max_steps):
        step = torch.minimum(
            step.clamp(max=LONGEST), 1 - passed
        )  # 0 where the end is reached: such a row stays as it is
        length = wide(step * span).to(y.dtype)
        slopes, ahead = [first], y
        for weights in STAGES:
            ahead = y + length * _weighted(weights, slopes)
            slopes.append(slope_at(passed + step * sum(weights), ahead))
        error = (length * _weighted(ERROR, slopes)).abs() / (1 + ahead.abs())
        error = error.reshape(len(y), -1).amax(1).double() / tolerance
        accepted = error <= 1
        y, first = (torch.where(wide(accepted), new, old) for new, old in ((ahead, y), (slopes[-1], first)))
        passed = torch.where(accepted, passed + step, passed)
        if bool((passed >= 1).all()):
            return y
        # NaN comes from a step into what the slope is not defined on: shorter, as for any error.
        factor = torch.where(error < 4**5, (0.9 * error.clamp(min=1e-9) ** -0.2).clamp(max=5), 0.2)
        # In half octaves: a change in the last digit of an error, by the batch, must not change the steps.
        step = step * ((2 * factor.log2()).floor() / 2).exp2()
    slowest = start + span * float(passed.min())
    raise RuntimeError(
        f"the solver took {max_steps} steps from {start:.4g} and reached {slowest:.4g}, not {end:.4g}: raise the "
        f"tolerance above {tolerance:.1g}"
    )


def _weighted(weights: Sequence[float], slopes: list[Tensor]) -> Tensor:
    terms = [weight * slope for weight, slope in zip(weights, slopes, strict=True) if weight]
    return sum(terms[1:], terms[0])
