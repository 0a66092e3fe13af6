"""A step of `SVI` beside one of `dgm.compile`, on Pyro pairs of every kind of latent.

    TORCH_COMPILE_FORCE_DISABLE_CACHES=1 python benchmarks/compiled_pairs.py [--steps 400]

Both take the same loss of Pyro and Adam, and take turns of ten steps; the table has medians. All numbers are processor
time of one thread. That of the first call includes the compiler's own processes; the first pair pays for what the
compiler does once on a machine.
"""

from __future__ import annotations

import argparse
import resource
import time
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoNormal
from timing import compare
from torch import Tensor, nn

import dgm_pyro as dgm
from dgm_pyro.results import Table

IN_A_ROW = 10
Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def eight_schools(y: Tensor, sigma: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


class VAE(nn.Module):
    def __init__(self, discrete: bool):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 16))
        self.decoder = nn.Sequential(nn.Linear(16 if discrete else 8, 128), nn.ReLU(), nn.Linear(128, 64))
        self.discrete = discrete

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            if self.discrete:
                z = pyro.sample("z", dist.Bernoulli(torch.full((16,), 0.5)).to_event(1))
            else:
                z = pyro.sample("z", dist.Normal(torch.zeros(8), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.5).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            raw = self.encoder(x)
            if self.discrete:
                pyro.sample("z", dist.Bernoulli(logits=raw).to_event(1))
            else:
                pyro.sample("z", dist.Normal(raw[:, :8], raw[:, 8:].exp()).to_event(1))


def mixture(x: Tensor) -> None:
    centers = pyro.sample("centers", dist.Normal(torch.zeros(3), 3.0).to_event(1))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.ones(3)), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(centers[k], 1.0), obs=x)


def pairs() -> dict[str, tuple[Any, Any, tuple[Tensor, ...], Any]]:
    images, vae, bits = torch.randn(128, 64), VAE(discrete=False), VAE(discrete=True)
    hidden = AutoNormal(pyro.poutine.block(mixture, hide=["k"]))
    return {
        "eight schools, `AutoNormal`": (eight_schools, AutoNormal(eight_schools), (Y, SIGMA), Trace_ELBO()),
        "the same, 10 particles at once": (
            eight_schools, AutoNormal(eight_schools), (Y, SIGMA),
            Trace_ELBO(10, max_plate_nesting=1, vectorize_particles=True),
        ),
        "VAE 64-128-8, batch 128": (vae.model, vae.guide, (images,), Trace_ELBO()),
        "VAE of 16 bits, score function": (bits.model, bits.guide, (images,), Trace_ELBO()),
        "mixture of 100 data, enumerated": (
            mixture, hidden, (3 * torch.randn(100),), TraceEnum_ELBO(max_plate_nesting=1)
        ),
    }  # fmt: skip


def processor_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="of either way (default: 400)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name, (model, guide, args, elbo) in pairs().items():
        with pyro.get_param_store().scope():
            svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), elbo)
            began = processor_seconds()
            loss = dgm.compile((model, guide), elbo)
            loss(*args).backward()
            first = processor_seconds() - began
            optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)

            def step(loss: Any = loss, args: Any = args, optimizer: Any = optimizer) -> None:
                optimizer.zero_grad()
                loss(*args).backward()
                optimizer.step()

            cases = {"theirs": lambda svi=svi, args=args: svi.step(*args), "ours": step}
            times = compare(cases, repeats=options.steps // IN_A_ROW, in_a_row=IN_A_ROW, clock=time.process_time)
        both = (f"{1e3 * times.median(each):.2f}" for each in cases)
        rows.append([name, *both, f"{times.ratio('theirs', 'ours'):.1f}", f"{first:.0f}"])
        print(rows[-1], flush=True)
    head = ["pair", "`SVI.step`, ms", "compiled, ms", "ratio", "first call, s"]
    print(Table(head, rows).markdown())


if __name__ == "__main__":
    main()
