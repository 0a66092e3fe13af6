"""NUTS of dgm_pyro beside that of Pyro: effective draws per second, on eight schools.

    python benchmarks/nuts.py [--num-samples 1000] [--compile]

The same model, warm-up, number of draws and target acceptance for both, one thread. Ours runs its four chains together;
Pyro's runs one, as its chains take as long each. A row says the processor time of all, warm-up and recording included
(the compiler is another process, which is not counted), and the smallest bulk effective sample size over the latents,
by ArviZ.
"""

from __future__ import annotations

import argparse
import time

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor

import dgm_pyro as dgm
from dgm_pyro.infer.mcmc import find_arviz
from dgm_pyro.results import Table

Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def eight_schools(y: Tensor, sigma: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        raw = pyro.sample("raw", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * raw, sigma), obs=y)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-samples", type=int, default=1000)
    parser.add_argument("--warmup", type=int, default=500)
    parser.add_argument("--compile", action="store_true", help="add a row with the density fused by torch.compile")
    options = parser.parse_args()
    torch.set_num_threads(1)
    arviz, rows = find_arviz(), []

    def add(name: str, draws: dict[str, Tensor], seconds: float) -> None:
        sizes = arviz.ess(arviz.convert_to_dataset({site: value.numpy() for site, value in draws.items()}))
        smallest = min(float(sizes[site].min()) for site in draws)
        chains = len(next(iter(draws.values())))
        each = [f"{seconds:.1f}", f"{smallest:.0f}", f"{smallest / seconds:.1f}"]
        rows.append([name, str(chains), *each])
        print(rows[-1], flush=True)

    for name, fused in [("dgm_pyro", False), ("dgm_pyro, compiled", True)][: 1 + options.compile]:
        began = time.process_time()
        posterior = dgm.Posterior(eight_schools, Y, SIGMA)
        found = dgm.infer.nuts(posterior, num_samples=options.num_samples, warmup=options.warmup, compile=fused)
        add(name, found.samples, time.process_time() - began)
    for name, jit in [("Pyro", False), ("Pyro, jit_compile", True)]:
        pyro.set_rng_seed(0)
        began = time.process_time()
        kernel = NUTS(
            eight_schools, target_accept_prob=0.8, max_tree_depth=8, jit_compile=jit, ignore_jit_warnings=True
        )
        mcmc = MCMC(kernel, options.num_samples, warmup_steps=options.warmup, disable_progbar=True)
        mcmc.run(Y, SIGMA)
        add(name, mcmc.get_samples(group_by_chain=True), time.process_time() - began)
    print(Table(["sampler", "chains", "processor s", "smallest ESS", "ESS per s"], rows).markdown())


if __name__ == "__main__":
    main()
