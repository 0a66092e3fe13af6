"""Time per step of the samplers beside diffusers' schedulers, with the same network.

    python benchmarks/diffusion_sampling.py [--quick] [--device cuda] [--json FILE]

Both loops start at the same x_T, stop at as many of 1000 times, and call the same denoiser once per step (Heun twice).
With a network of two small layers what is left is the cost of the sampler; with a U-Net, what it matters.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from timing import Benchmark, main
from torch import nn

import dgm_pyro as dgm
from dgm_pyro.networks import DenoisingMLP, DenoisingUNet

T, STEPS, BATCH = 1000, 50, 64
SCHEDULERS = {
    "ancestral": diffusers.DDPMScheduler,
    "ddim": diffusers.DDIMScheduler,
    "dpm++": diffusers.DPMSolverMultistepScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
}


def theirs(make: Any, network: nn.Module, shape: tuple[int, ...], device: str) -> Callable[[], object]:
    scheduler = make(num_train_timesteps=T, beta_schedule="linear", beta_start=1e-4, beta_end=0.02)

    @torch.no_grad()
    def sample() -> torch.Tensor:
        scheduler.set_timesteps(STEPS, device=device)
        x = torch.randn(BATCH, *shape, device=device) * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            seen = scheduler.scale_model_input(x, t)
            x = scheduler.step(network(seen, ((t + 1) / T).expand(BATCH)), t, x).prev_sample
        return x

    return sample


def run(bench: Benchmark) -> None:
    warnings.simplefilter("ignore")
    image = (1, 8, 8)
    networks = {
        "an MLP 64-64": DenoisingMLP(image, (64, 64)),
        "a U-Net 16-32": DenoisingUNet(image, (16, 32)),
    }
    for title, network in networks.items():
        program = dgm.Diffusion(image, network, "linear", num_steps=T, predict="noise").to(bench.device).eval()
        for sampler, make in SCHEDULERS.items():
            calls = 2 * STEPS - 1 if sampler == "heun" else STEPS
            cases = {
                "ours": functools.partial(program.sample, BATCH, sampler=sampler, num_steps=STEPS),
                "diffusers": theirs(make, network, image, bench.device),
            }
            repeats = 30 if "MLP" in title else 7
            bench.compare(
                f"{sampler}, {title}: {STEPS} steps of {BATCH} images ({calls} network calls)",
                cases, reference="ours", repeats=repeats, warm_up=1,
            )  # fmt: skip


if __name__ == "__main__":
    main(run, __doc__)
