"""One solver of ordinary differential equations: Dormand and Prince's pair of orders 5 and 4, with adaptive steps."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

# Row i: the weights of the slopes so far that lead to the i-th. The last row is the step of order 5 itself.
STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
# The order 5 less the order 4.
ERROR = (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


def solve(
    slope: Callable[[float, Tensor], Tensor],
    y: Tensor,
    start: float,
    end: float,
    *,
    tolerance: float = 1e-5,
    max_steps: int = 10_000,
) -> Tensor:
    """y at ``end``, for dy / dt = slope(t, y) and y at ``start``.

    Args:
        tolerance: the largest estimated error of a step, relative to 1 + abs(y), over all elements of y.

    Raises:
        RuntimeError: more than ``max_steps`` would be needed.

    Source: Dormand and Prince 1980; step control as in Hairer, Norsett and Wanner 1993, section II.4.

    >>> import torch
    >>> y = solve(lambda t, y: -y, torch.ones(1, dtype=torch.float64), 0.0, 1.0, tolerance=1e-10)
    >>> torch.allclose(y, torch.tensor(-1.0).double().exp(), rtol=1e-8)
    True
    """
    t, step, first = start, (end - start) / 50, slope(start, y)
    for _ in range(max_steps):
        last = abs(end - t) <= abs(step)
        step = end - t if last else step
        slopes, ahead = [first], y
        for weights in STAGES:
            ahead = y + step * _weighted(weights, slopes)
            slopes.append(slope(t + step * sum(weights), ahead))
        error = float(((step * _weighted(ERROR, slopes)).abs() / (1 + ahead.abs())).max()) / tolerance
        if error <= 1:
            if last:
                return ahead
            t, y, first = t + step, ahead, slopes[-1]
        # NaN comes from a step into what the slope is not defined on: shorter, as for any error.
        step *= min(5.0, 0.9 * max(error, 1e-9) ** -0.2) if error < 4**5 else 0.2
    raise RuntimeError(
        f"the solver took {max_steps} steps and came from {start:.4g} to {t:.4g} of {end:.4g}: raise the tolerance "
        f"above {tolerance:.1g}"
    )


def _weighted(weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    terms = [weight * slope for weight, slope in zip(weights, slopes, strict=True) if weight]
    return sum(terms[1:], terms[0])
