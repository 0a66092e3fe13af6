"""Guides on reference posteriors: how far means and sds of each are from draws that can be trusted, and its k-hat.

    python benchmarks/posteriors.py --data-dir DIR [--posteriors arK,nes1980] [--guides meanfield,nsf] [--seeds 3]
        [--gradient-steps 1000] [--json FILE]

DIR holds a folder for each posterior of posteriordb (Magnusson et al.): ``data.json``, and ``draws.npz`` with the
reference draws, ten chains by the name of each scalar, such as ``beta[2]``. The models below are those that posteriordb
describes, in double precision. Every fit is one row: the largest error of a mean, in sds of the reference; the sd that
is farthest from the reference's, as its ratio; ELBO and log evidence in nats; k-hat. ``--json`` keeps what is done, and
the same command goes on from there.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

import dgm_pyro as dgm
from dgm_pyro.results import Table

GUIDES = "meanfield,fullrank,sylvester,realnvp,iaf,nsf,mixture"
Data = dict[str, Tensor]


def flat(name: str, size: int) -> Tensor:
    return pyro.sample(name, dist.ImproperUniform(constraints.real_vector, (), (size,)))


def flat_scale(name: str) -> Tensor:
    return pyro.sample(name, dist.ImproperUniform(constraints.positive, (), ()))


def normal(size: int, scale: float) -> Any:
    return dist.Normal(0.0, scale).expand([size]).to_event(1)


def observe(y: Tensor, distribution: Any, name: str = "y") -> None:
    with pyro.plate("data", len(y)):
        pyro.sample(name, distribution, obs=y)


def eight_schools(d: Data) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(d["y"])):
        theta = mu + tau * pyro.sample("raw", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(theta, d["sigma"]), obs=d["y"])


def kidiq(d: Data) -> None:
    beta = flat("beta", 2)
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    observe(d["kid_score"], dist.Normal(beta[0] + beta[1] * d["mom_iq"], sigma))


def ar(d: Data) -> None:
    y, size = d["y"], int(d["K"])
    alpha = pyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = pyro.sample("beta", normal(size, 10.0))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    before = torch.stack([y[size - k : len(y) - k] for k in range(1, size + 1)], -1)
    observe(y[size:], dist.Normal(alpha + before @ beta, sigma))


def logearn(d: Data) -> None:
    beta, sigma = flat("beta", 4), flat_scale("sigma")
    x = torch.stack([torch.ones_like(d["height"]), d["height"], d["male"], d["height"] * d["male"]], -1)
    observe(d["earn"].log(), dist.Normal(x @ beta, sigma))


def gaussian_process(d: Data) -> None:
    rho = pyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = pyro.sample("alpha", dist.HalfNormal(2.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    squared = (d["x"].unsqueeze(-1) - d["x"]).square()
    kernel = alpha**2 * (-squared / (2 * rho**2)).exp() + sigma * torch.eye(len(d["x"]))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(d["x"])), kernel), obs=d["y"])


def lotka_volterra(d: Data) -> None:
    theta = pyro.sample("theta", dist.ImproperUniform(constraints.positive, (4,), ()).to_event(1))
    center, scale = torch.tensor([1.0, 0.05, 1.0, 0.05]), torch.tensor([0.5, 0.05, 0.5, 0.05])
    pyro.factor("theta_prior", dist.Normal(center, scale).log_prob(theta).sum(-1))
    z = start = pyro.sample("z_init", dist.LogNormal(torch.tensor(10.0).log(), 1.0).expand([2]).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(-1.0, 1.0).expand([2]).to_event(1))
    a, b, c, e = theta.unbind(-1)

    def slope(z: Tensor) -> Tensor:
        u, v = z.unbind(-1)
        return torch.stack([(a - b * v) * u, (e * u - c) * v], -1)

    steps, states = 4, []
    times = torch.cat([torch.zeros(1), d["ts"]]).tolist()
    for before, after in itertools.pairwise(times):
        h = (after - before) / steps
        for _ in range(steps):  # Runge and Kutta, of fourth order
            k1 = slope(z)
            k2 = slope(z + h / 2 * k1)
            k3 = slope(z + h / 2 * k2)
            k4 = slope(z + h * k3)
            z = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        states.append(z)
    pyro.sample("y_init", dist.LogNormal(start.log(), sigma).to_event(1), obs=d["y_init"])
    with pyro.plate("times", len(states)):
        pyro.sample("y", dist.LogNormal(torch.stack(states).log(), sigma).to_event(1), obs=d["y"])


def gaussian_mixture(d: Data) -> None:
    mu = pyro.sample("mu", dist.ImproperUniform(constraints.ordered_vector, (), (2,)))
    pyro.factor("mu_prior", dist.Normal(0.0, 2.0).log_prob(mu).sum(-1))
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0).expand([2]).to_event(1))
    theta = pyro.sample("theta", dist.Beta(5.0, 5.0))
    weights = dist.Categorical(torch.stack([theta, 1 - theta], -1))
    observe(d["y"], dist.MixtureSameFamily(weights, dist.Normal(mu, sigma)))


def mesquite(d: Data) -> None:
    beta, sigma = flat("beta", 6), flat_scale("sigma")
    area = d["diam1"] * d["diam2"]
    x = [torch.ones_like(area), (area * d["canopy_height"]).log(), area.log(), (d["diam1"] / d["diam2"]).log(),
         d["total_height"].log(), d["group"]]  # fmt: skip
    observe(d["weight"].log(), dist.Normal(torch.stack(x, -1) @ beta, sigma))


def nes(d: Data) -> None:
    beta, sigma = flat("beta", 9), flat_scale("sigma")
    age = d["age_discrete"]
    x = [torch.ones_like(age), d["real_ideo"], d["race_adj"], *((age == i).to(age) for i in (2, 3, 4)), d["educ1"],
         d["gender"], d["income"]]  # fmt: skip
    observe(d["partyid7"], dist.Normal(torch.stack(x, -1) @ beta, sigma))


def blr(d: Data) -> None:
    beta = pyro.sample("beta", normal(d["X"].shape[1], 10.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(10.0))
    observe(d["y"], dist.Normal(d["X"] @ beta, sigma))


def kilpisjarvi(d: Data) -> None:
    alpha = pyro.sample("alpha", dist.Normal(d["pmualpha"], d["psalpha"]))
    beta = pyro.sample("beta", dist.Normal(d["pmubeta"], d["psbeta"]))
    observe(d["y"], dist.Normal(alpha + beta * d["x"], flat_scale("sigma")))


MODELS: dict[str, Callable[[Data], None]] = {
    "eight_schools-eight_schools_noncentered": eight_schools,
    "kidiq-kidscore_momiq": kidiq,
    "arK-arK": ar,
    "earnings-logearn_interaction": logearn,
    "gp_pois_regr-gp_regr": gaussian_process,
    "low_dim_gauss_mix-low_dim_gauss_mix": gaussian_mixture,
    "mesquite-logmesquite_logvash": mesquite,
    "nes1980-nes": nes,
    "sblrc-blr": blr,
    "kilpisjarvi_mod-kilpisjarvi": kilpisjarvi,
    "hudson_lynx_hare-lotka_volterra": lotka_volterra,
}


def reference(folder: Path, posterior: dgm.Posterior) -> dict[str, Tensor]:
    """The reference draws by latent, ``(N, *site_shape)``."""
    with np.load(folder / "draws.npz") as file:
        scalars = {name: torch.as_tensor(file[name]).double().flatten() for name in file.files}
    vectors: dict[str, list[Tensor]] = {}
    for name, draws in scalars.items():
        vectors.setdefault(name.partition("[")[0], []).append(draws)
    found = {
        name: parts[0] if f"{name}[1]" not in scalars else torch.stack(parts, -1) for name, parts in vectors.items()
    }
    if "raw" in posterior.names:
        found["raw"] = (found["theta"] - found["mu"].unsqueeze(-1)) / found["tau"].unsqueeze(-1)
    return {name: found[name] for name in posterior.names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--posteriors", default=",".join(MODELS))
    parser.add_argument("--guides", default=GUIDES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--gradient-steps", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    done = json.loads(options.json.read_text()) if options.json and options.json.exists() else []
    known = {(row["posterior"], row["guide"], row["seed"]) for row in done}
    wanted = options.posteriors.split(",")
    for seed in range(options.seeds):
        for folder, model in MODELS.items():
            if not any(folder.startswith(name) for name in wanted):
                continue
            content = json.loads((options.data_dir / folder / "data.json").read_text())
            data = {name: torch.as_tensor(value).double() for name, value in content.items()}
            posterior = dgm.Posterior(model, data)
            draws = reference(options.data_dir / folder, posterior)
            for guide in options.guides.split(","):
                if (folder, guide, seed) in known:
                    continue
                found = dgm.infer.compare(posterior, guides=[guide], reference=draws, seed=seed, num_temperatures=0,
                                          gradient_steps=options.gradient_steps)  # fmt: skip
                row = {"posterior": folder, "seed": seed, "D": posterior.D}
                row |= found[guide].as_dict() if found.rows else {"guide": guide, "failure": found.failures[guide]}
                done.append(row)
                if options.json:
                    options.json.write_text(json.dumps(done, indent=1))
                print(row, flush=True)
    print(table(done).markdown())


def table(rows: list[dict[str, Any]]) -> Table:
    """A line for each posterior and guide: the middle one of its seeds by the error of means."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if "failure" not in row:
            groups.setdefault((row["posterior"].partition("-")[0], row["guide"]), []).append(row)
    lines = []
    for (posterior, guide), group in groups.items():
        row = sorted(group, key=lambda row: row["mean_error"])[(len(group) - 1) // 2]
        numbers = [f"{row['elbo']:.2f}", f"{row['log_evidence']:.2f}", f"{row['k_hat']:.2f}",
                   f"{row['effective_size']:.0f}", f"{row['mean_error']:.2f}", f"{row['sd_ratio']:.2f}",
                   f"{row['seconds']:.0f}"]  # fmt: skip
        lines.append([posterior, guide, *numbers])
    header = ["posterior", "guide", "ELBO", "log evidence", "k-hat", "ESS of 4000", "mean error", "sd ratio", "seconds"]
    return Table(header, lines)


if __name__ == "__main__":
    main()
