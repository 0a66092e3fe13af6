"""Noise of a diffusion's loss and gradient for different choices of the times.

    python benchmarks/diffusion_variance.py [--quick] [--json FILE]

Diffusions of digits in discrete and in continuous time are trained a little; then every way to choose the times looks
at the same batch of 64 data many times. The variance is that of the batch's mean loss, in square nats, and of its
gradient: the trace of its covariance over all parameters of the denoiser. Both over the noise too, which no choice of
times removes. The rows of one schedule estimate one bound.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from timing import Benchmark, main
from torch import Tensor

import dgm_pyro as dgm
from dgm_pyro.networks import DenoisingMLP
from dgm_pyro.objectives import elbo

HIDDEN = (128, 128)


def measured(program: dgm.Program, x: Tensor, draws: int, batch: Callable[[], Tensor] | None = None) -> list[float]:
    """Mean loss, its standard error, its variance, and the gradient's; of ``batch()`` in place of elbo if given."""
    parameters = [parameter for name, parameter in program.named_parameters() if name.startswith("denoiser")]
    losses, mean, square = [], 0.0, 0.0
    for _ in range(draws):
        loss = -(elbo(program, x).value if batch is None else batch()).mean()
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
        losses.append(loss.item())
        mean, square = mean + gradient / draws, square + gradient.square() / draws
    each = torch.tensor(losses)
    variance = (square - mean**2).sum().item() * draws / (draws - 1)
    return [each.mean().item(), each.std().item() / math.sqrt(draws), each.var().item(), variance]


def independent(program: dgm.Program, x: Tensor, site: str, draw: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The bound with the site that chooses the times drawn independently for each datum, and no longer counted."""

    def batch() -> Tensor:
        bound = elbo(program, x, observed={site: draw()})
        return bound.value - bound.reconstruction[site]

    return batch


def run(bench: Benchmark) -> None:
    torch.manual_seed(0)
    data = dgm.data.load("digits")
    epochs, draws = (2, 20) if bench.quick else (10, 400)
    x = data.x[:64].to(bench.device)

    def train(program: dgm.Program) -> dgm.Program:
        dgm.fit(program, data, epochs=epochs, lr=2e-3, validation=None, device=bench.device, progress=False)
        return program

    rows = [["times", "loss, nats", "variance of the loss", "of the gradient"]]

    def add(name: str, program: dgm.Program, batch: Callable[[], Tensor] | None = None) -> None:
        loss, error, variance, gradient = measured(program, x, draws, batch)
        rows.append([name, f"{loss:.1f} +- {error:.1f}", f"{variance:.3g}", f"{gradient:.3g}"])

    def discrete(schedule: str, importance: bool) -> dgm.Diffusion:
        torch.manual_seed(0)
        network = DenoisingMLP(data.event_shape, HIDDEN)
        return dgm.Diffusion(data.event_shape, network, schedule, levels=data.levels, importance=importance)

    for schedule in ("cosine", "log-snr"):
        plain, weighted = train(discrete(schedule, False)), train(discrete(schedule, True))
        # The same network for all: what is compared is the choice of times.
        weighted.load_state_dict({**weighted.state_dict(), **plain.state_dict()})
        draw = functools.partial(torch.randint, plain.num_steps, (len(x),), device=x.device)
        add(f"T = 100, {schedule}: independent", plain.eval(), independent(plain, x, "x_shift", draw))
        add(f"T = 100, {schedule}: even", plain)
        add(f"T = 100, {schedule}: even and importance-sampled", weighted.eval())

    torch.manual_seed(0)
    schedule = dgm.LogSNR(6.0, -6.0, num_units=16)
    learned = train(
        dgm.ContinuousDiffusion(data.event_shape, DenoisingMLP(data.event_shape, HIDDEN), schedule, levels=data.levels)
    ).eval()
    units = schedule.num_units
    schedule.num_units = 0
    add(
        "continuous: independent",
        learned,
        independent(learned, x, "x_time", lambda: torch.rand(len(x), device=x.device)),
    )
    add("continuous: even", learned)
    schedule.num_units = units
    add("continuous: even, learned schedule", learned)
    bench.add(f"the loss of a batch of {len(x)} digits, {draws} draws", rows)


if __name__ == "__main__":
    main(run, __doc__)
