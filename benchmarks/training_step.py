"""A step of training: ours eager and compiled, hand-written PyTorch eager and compiled, and plain Pyro.

    python benchmarks/training_step.py [--quick] [--device cuda] [--json FILE]
    TORCH_COMPILE_FORCE_DISABLE_CACHES=1 python benchmarks/training_step.py    # compiles as if for the first time

A step is the loss, its gradient and the update by the same fused Adam, on a batch that is there already. Hand-written
is what one would write without us: the loss in closed form, no handlers, no plates. Plain Pyro is `SVI` with
`TraceMeanField_ELBO` (with `Trace_ELBO` where the guide's order needs it) and Pyro's own `Adam`, on the same programs.
Each way takes ten steps in a row before the next has its turn, as a training takes them.
The last table has whole trainings: what `dgm.fit` takes per step from its second epoch on, with shuffling, clipping,
the watch for NaN, the learning rate's schedule and the history, beside a hand-written loop that shuffles and steps.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import pyro
import torch
import torch.nn.functional as F
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from timing import Benchmark, Times, main
from torch import Tensor, nn

import dgm_pyro as dgm
from dgm_pyro.networks import MLP, DenoisingMLP

LR, BATCH = 1e-3, 128
OURS = "ours, dgm.compile"


class HandWritten(nn.Module):
    """The 784-400-50 VAE, Bernoulli likelihood, as in a PyTorch tutorial."""

    def __init__(self, features: int = 784, hidden: int = 400, latent: int = 50):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(features, hidden), nn.SiLU(), nn.Linear(hidden, 2 * latent))
        self.decoder = nn.Sequential(nn.Linear(latent, hidden), nn.SiLU(), nn.Linear(hidden, features))

    def forward(self, x: Tensor) -> Tensor:
        mean, raw = self.encoder(2 * x - 1).chunk(2, -1)
        scale = F.softplus(raw)
        z = mean + scale * torch.randn_like(mean)
        fit = F.binary_cross_entropy_with_logits(self.decoder(z), x, reduction="none").sum(-1)
        kl = 0.5 * (mean**2 + scale**2 - 1 - 2 * scale.log()).sum(-1)
        return (fit + kl).mean()


class HandWrittenDiffusion(nn.Module):
    """A chain of T steps, every one of them visited: the sum of the KLs, as `Diffusion.unroll` states it."""

    def __init__(self, program: dgm.Diffusion):
        super().__init__()
        self.network, self.raw_scale, schedule = program.denoiser, program.raw_scale, program.noise_schedule
        self.steps = program.num_steps
        for name in ("alpha", "sigma", "from_clean", "from_noisy", "spread"):
            self.register_buffer(name, getattr(schedule, name))

    def forward(self, x: Tensor) -> Tensor:
        loss = 0.5 * (self.sigma[-1] ** 2 + (self.alpha[-1] * x) ** 2 - 1 - 2 * self.sigma[-1].log()).sum(-1)
        x_t = self.alpha[-1] * x + self.sigma[-1] * torch.randn_like(x)
        for t in range(self.steps, 0, -1):
            time = torch.full((1,), t / self.steps, device=x.device).expand(len(x))
            x0 = self.alpha[t] * x_t - self.sigma[t] * self.network(x_t, time)
            variance = F.softplus(self.raw_scale[t - 1]) ** 2
            if t == 1:
                loss = loss + 0.5 * ((x - x0) ** 2 / variance + variance.log() + math.log(2 * math.pi)).sum(-1)
                break
            q = self.spread[t] ** 2
            p = q + self.from_clean[t] ** 2 * variance
            gap = self.from_clean[t] * (x - x0)
            loss = loss + 0.5 * ((q + gap**2) / p - 1 + (p / q).log()).sum(-1)
            x_t = self.from_clean[t] * x + self.from_noisy[t] * x_t + self.spread[t] * torch.randn_like(x)
        return loss.mean()


class HandWrittenHierarchy(nn.Module):
    """Two levels of latents: q(z | x) q(z2 | z), and back."""

    def __init__(self, features: int, hidden: int, z: int, z2: int):
        super().__init__()
        net = lambda a, b: nn.Sequential(nn.Linear(a, hidden), nn.SiLU(), nn.Linear(hidden, b))  # noqa: E731
        self.to_z, self.to_z2 = net(features, 2 * z), net(z, 2 * z2)
        self.from_z2, self.from_z = net(z2, 2 * z), net(z, features)

    def forward(self, x: Tensor) -> Tensor:
        mean, raw = self.to_z(2 * x - 1).chunk(2, -1)
        scale = F.softplus(raw)
        noise = torch.randn_like(mean)
        z = mean + scale * noise
        mean2, raw2 = self.to_z2(z).chunk(2, -1)
        scale2 = F.softplus(raw2)
        z2 = mean2 + scale2 * torch.randn_like(mean2)
        kl2 = 0.5 * (mean2**2 + scale2**2 - 1 - 2 * scale2.log()).sum(-1)
        prior_mean, prior_raw = self.from_z2(z2).chunk(2, -1)
        prior_scale = F.softplus(prior_raw)
        log_q = (-0.5 * noise**2 - scale.log()).sum(-1)
        log_p = (-0.5 * ((z - prior_mean) / prior_scale) ** 2 - prior_scale.log()).sum(-1)
        fit = F.binary_cross_entropy_with_logits(self.from_z(z), x, reduction="none").sum(-1)
        return (fit + kl2 + log_q - log_p).mean()


def vae(hidden: int = 400, latent: int = 50) -> dgm.VAE:
    likelihood = dgm.Bernoulli(784, MLP((latent,), 784, (hidden,)))
    return dgm.VAE(dgm.Normal(latent), likelihood, dgm.Normal(latent, MLP((784,), 2 * latent, (hidden,), levels=2)))


def hierarchy(features: int = 64, hidden: int = 64, z: int = 8, z2: int = 4) -> dgm.VAE:
    prior = dgm.VAE(
        dgm.Normal(z2),
        dgm.Normal(z, MLP((z2,), 2 * z, (hidden,))),
        dgm.Normal(z2, MLP((z,), 2 * z2, (hidden,))),
        latent_name="z2",
    )
    likelihood = dgm.Bernoulli(features, MLP((z,), features, (hidden,)))
    return dgm.VAE(prior, likelihood, dgm.Normal(z, MLP((features,), 2 * z, (hidden,), levels=2)))


def diffusion() -> dgm.Program:
    return dgm.Diffusion(2, DenoisingMLP((2,), (64, 64)), num_steps=20).unroll()


def steps_of(loss: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> Callable[..., None]:
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=LR, fused=True)

    def step(batch: Tensor = x) -> None:
        optimizer.zero_grad()
        loss(batch).backward()
        optimizer.step()

    return step


def svi(program: dgm.Program, x: Tensor, elbo: pyro.infer.ELBO) -> Callable[[], object]:
    inference = SVI(program.model, program.guide, pyro.optim.Adam({"lr": LR}), elbo)
    return lambda: inference.step(x)


@dataclass
class Ways:
    """The five ways to take a step, each with parameters of its own, and what it took to compile ours."""

    steps: dict[str, Callable[[], object]]
    seconds: float


def ways(
    make: Callable[[], dgm.Program],
    hand: Callable[[dgm.Program], nn.Module],
    x: Tensor,
    elbo: pyro.infer.ELBO,
) -> Ways:
    torch._dynamo.reset()
    eager, compiled, plain, *others = (make().to(x.device) for _ in range(5))
    by_hand, by_hand_compiled = (hand(program).to(x.device) for program in others)
    bound, floats = dgm.ELBO(), x.float()
    first = steps_of(dgm.compile(compiled), compiled, x)
    start = time.perf_counter()
    first()
    seconds = time.perf_counter() - start
    steps = {
        OURS: first,
        "ours, eager": steps_of(lambda x: -bound(eager, x).surrogate.mean(), eager, x),
        "hand-written, torch.compile": steps_of(torch.compile(by_hand_compiled), by_hand_compiled, floats),
        "hand-written, eager": steps_of(by_hand, by_hand, floats),
        "plain Pyro, SVI": svi(plain, x, elbo),
    }
    return Ways(steps, seconds)


def fits(data: Tensor, epochs: int, rounds: int) -> dict[str, list[float]]:
    """Seconds per step of whole trainings, in turns; the first epoch, in which compilation happens, is left out."""
    steps, taken = len(data) // BATCH, dict[str, list[float]]()
    for _ in range(rounds):
        for name, compile in (("dgm.fit, compiled", True), ("dgm.fit, eager", False)):
            history = dgm.fit(
                vae(), data, epochs=epochs, batch_size=BATCH, validation=None, compile=compile, progress=False,
                device=data.device,
            )  # fmt: skip
            ends = [epoch.seconds for epoch in history.epochs]
            taken.setdefault(name, []).extend((b - a) / steps for a, b in itertools.pairwise(ends))
        for name in ("hand-written loop, torch.compile", "hand-written loop, eager"):
            module = HandWritten().to(data.device)
            step = steps_of(torch.compile(module) if "compile" in name else module, module, data)
            ends = []
            for _ in range(epochs):
                for rows in torch.randperm(len(data), device=data.device).split(BATCH):
                    step(data[rows].float())
                ends.append(time.perf_counter())
            taken.setdefault(name, []).extend((b - a) / steps for a, b in itertools.pairwise(ends))
    return taken


def run(bench: Benchmark) -> None:
    pyro.enable_validation(False)
    pays = [["", "seconds to compile", "saves ms a step", "pays after steps"]]

    def table(title: str, found: Ways) -> None:
        times = bench.compare(title, found.steps, reference=OURS, repeats=60, warm_up=10, in_a_row=10)
        saved = times.median("ours, eager") - times.median(OURS)
        after = f"{found.seconds / saved:,.0f}" if saved > 0 else "never"
        pays.append([title, f"{found.seconds:.0f}", f"{1e3 * saved:.1f}", after])

    for batch in (32, 128, 512):
        x = torch.randint(2, (batch, 784), dtype=torch.uint8, device=bench.device)
        found = ways(vae, lambda _: HandWritten(), x, TraceMeanField_ELBO())
        table(f"VAE 784-400-50, batch {batch}", found)
    x = torch.randint(2, (128, 64), dtype=torch.uint8, device=bench.device)
    found = ways(hierarchy, lambda _: HandWrittenHierarchy(64, 64, 8, 4), x, Trace_ELBO())
    table("VAE of two levels, 64-64-8-4, batch 128", found)
    x = torch.randn(128, 2, device=bench.device)
    found = ways(diffusion, lambda program: HandWrittenDiffusion(program.diffusion), x, TraceMeanField_ELBO())
    table("diffusion unrolled, T = 20, in the plane, batch 128", found)
    bench.add("when compiling pays", pays)

    data = torch.randint(2, ((4 if bench.quick else 100) * BATCH, 784), dtype=torch.uint8, device=bench.device)
    times = Times(fits(data, 2 if bench.quick else 4, 1 if bench.quick else 3))
    reference = "dgm.fit, compiled"
    title = f"VAE 784-400-50, batch {BATCH}: whole trainings, per step"
    bench.add(title, times.rows(reference), reference=reference, cases=times.as_dict(reference))


if __name__ == "__main__":
    main(run, __doc__)
