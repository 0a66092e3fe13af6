"""NUTS of dgm_pyro beside those of Pyro and NumPyro: effective draws per second of processor time.

    python benchmarks/nuts.py [--models schools,gp,ar] [--num-samples 1000] [--compile] [--json FILE]

- schools: eight schools, not centered (Rubin 1981).
- gp: the three hyperparameters of a Gaussian process with a squared-exponential kernel, 11 simulated points.
- ar: an autoregression of order 5, 200 simulated steps.

The same model, warm-up, number of draws and target acceptance for all, one thread, double precision. Ours and NumPyro's
run four chains together; Pyro's runs one, as its chains take as long each. A row says the processor time of all:
warm-up, recording, and compilation inside the process (`torch.compile` has processes of its own, which are not
counted). It says the smallest bulk effective sample size over the latents, by ArviZ. NumPyro has a row where it is
installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
ORDER = 5


def schools(y: Tensor, sigma: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        raw = pyro.sample("raw", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * raw, sigma), obs=y)


def gp(x: Tensor, y: Tensor) -> None:
    rho = pyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = pyro.sample("alpha", dist.HalfNormal(2.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    squared = (x.unsqueeze(-1) - x).square()
    kernel = alpha**2 * (-squared / (2 * rho**2)).exp() + sigma * torch.eye(len(x))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), kernel), obs=y)


def ar(y: Tensor) -> None:
    alpha = pyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0).expand([ORDER]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    before = torch.stack([y[ORDER - k : len(y) - k] for k in range(1, ORDER + 1)], -1)
    with pyro.plate("steps", len(y) - ORDER):
        pyro.sample("y", dist.Normal(alpha + before @ beta, sigma), obs=y[ORDER:])


def of_gp() -> tuple[Tensor, Tensor]:
    """x, and one draw of the process at rho = 6, alpha = 2, with noise of variance 0.5."""
    generator = torch.Generator().manual_seed(0)
    x = torch.linspace(-10, 10, 11)
    kernel = 4 * (-(x.unsqueeze(-1) - x).square() / 72).exp() + 0.5 * torch.eye(11)
    return x, torch.linalg.cholesky(kernel) @ torch.randn(11, generator=generator)


def of_ar() -> tuple[Tensor]:
    """A stationary path."""
    generator = torch.Generator().manual_seed(0)
    beta = torch.tensor([0.6, -0.3, 0.2, -0.1, 0.1])
    path = [0.0] * ORDER
    for noise in torch.randn(300, generator=generator).tolist():
        path.append(0.5 + sum(b * path[-k] for k, b in enumerate(beta.tolist(), 1)) + noise)
    return (torch.tensor(path[-200:]),)


MODELS: dict[str, tuple[Callable[..., None], Callable[[], tuple[Tensor, ...]]]] = {
    "schools": (schools, lambda: (Y.double(), SIGMA.double())),
    "gp": (gp, of_gp),
    "ar": (ar, of_ar),
}


def in_numpyro(name: str, data: tuple[Tensor, ...], num_samples: int, warmup: int) -> dict[str, Any]:
    """Draws ``(4, num_samples, ...)`` of the same model."""
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as nd
    from numpyro.infer import MCMC as Chains
    from numpyro.infer import NUTS as Sampler

    numpyro.enable_x64()

    def schools(y: Any, sigma: Any) -> None:
        mu, tau = numpyro.sample("mu", nd.Normal(0, 5)), numpyro.sample("tau", nd.HalfCauchy(5))
        with numpyro.plate("schools", len(y)):
            numpyro.sample("y", nd.Normal(mu + tau * numpyro.sample("raw", nd.Normal(0, 1)), sigma), obs=y)

    def gp(x: Any, y: Any) -> None:
        rho, alpha = numpyro.sample("rho", nd.Gamma(25, 4)), numpyro.sample("alpha", nd.HalfNormal(2))
        sigma = numpyro.sample("sigma", nd.HalfNormal(1))
        kernel = alpha**2 * jnp.exp(-((x[:, None] - x) ** 2) / (2 * rho**2)) + sigma * jnp.eye(len(x))
        numpyro.sample("y", nd.MultivariateNormal(jnp.zeros(len(x)), kernel), obs=y)

    def ar(y: Any) -> None:
        alpha = numpyro.sample("alpha", nd.Normal(0, 10))
        beta = numpyro.sample("beta", nd.Normal(0, 10).expand([ORDER]).to_event(1))
        sigma = numpyro.sample("sigma", nd.HalfCauchy(2.5))
        before = jnp.stack([y[ORDER - k : len(y) - k] for k in range(1, ORDER + 1)], -1)
        numpyro.sample("y", nd.Normal(alpha + before @ beta, sigma).to_event(1), obs=y[ORDER:])

    model = {"schools": schools, "gp": gp, "ar": ar}[name]
    chains = Chains(
        Sampler(model, target_accept_prob=0.8, max_tree_depth=8),
        num_warmup=warmup,
        num_samples=num_samples,
        num_chains=4,
        chain_method="vectorized",
        progress_bar=False,
    )
    chains.run(jax.random.PRNGKey(0), *(jnp.asarray(part.numpy()) for part in data))
    return chains.get_samples(group_by_chain=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--num-samples", type=int, default=1000)
    parser.add_argument("--warmup", type=int, default=500)
    parser.add_argument("--compile", action="store_true", help="add a row with the density fused by torch.compile")
    parser.add_argument("--json", type=Path, help="write the rows there, too")
    options = parser.parse_args()
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    arviz, rows = find_arviz(), []

    def measured(name: str, sampler: str, draw: Callable[[], dict[str, Any]]) -> None:
        began = time.process_time()
        draws = draw()
        seconds = time.process_time() - began
        sizes = arviz.ess(arviz.convert_to_dataset({site: value.__array__() for site, value in draws.items()}))
        smallest = min(float(sizes[site].min()) for site in draws)
        chains = len(next(iter(draws.values())))
        rows.append([name, sampler, str(chains), f"{seconds:.1f}", f"{smallest:.0f}", f"{smallest / seconds:.1f}"])
        print(rows[-1], flush=True)

    def ours(name: str, fused: bool) -> dict[str, Tensor]:
        model, data = MODELS[name]
        found = dgm.infer.nuts(
            dgm.Posterior(model, *data()), num_samples=options.num_samples, warmup=options.warmup, compile=fused
        )
        return found.samples

    def pyros(name: str, jit: bool) -> dict[str, Tensor]:
        model, data = MODELS[name]
        pyro.set_rng_seed(0)
        kernel = NUTS(model, target_accept_prob=0.8, max_tree_depth=8, jit_compile=jit, ignore_jit_warnings=True)
        mcmc = MCMC(kernel, options.num_samples, warmup_steps=options.warmup, disable_progbar=True)
        mcmc.run(*data())
        return mcmc.get_samples(group_by_chain=True)

    for name in options.models.split(","):
        for sampler, fused in [("dgm_pyro", False), ("dgm_pyro, compiled", True)][: 1 + options.compile]:
            measured(name, sampler, lambda name=name, fused=fused: ours(name, fused))
        for sampler, jit in [("Pyro", False), ("Pyro, jit_compile", True)]:
            measured(name, sampler, lambda name=name, jit=jit: pyros(name, jit))
        if importlib.util.find_spec("numpyro"):
            data = MODELS[name][1]()
            measured(
                name,
                "NumPyro",
                lambda name=name, data=data: in_numpyro(name, data, options.num_samples, options.warmup),
            )
    heads = ["model", "sampler", "chains", "processor s", "smallest ESS", "ESS per s"]
    print(Table(heads, rows).markdown())
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps([dict(zip(heads, row, strict=True)) for row in rows], indent=2) + "\n")


if __name__ == "__main__":
    main()
