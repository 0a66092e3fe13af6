"""Five models of published papers in plain Pyro, as a user has them in a file, and their data.

    python benchmarks/papers.py --out papers                    # papers/NAME.json, the data of each
    dgm infer benchmarks/papers.py:cox_process --data papers/cox_process.json --out inference

The first command simulates the data, with the seed 0; those of the sparse regression come with scikit-learn. The
second fits guides and draws by NUTS.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn


def cox_process(counts: Tensor) -> None:
    """A log-Gaussian Cox process on the unit square (Moller, Syversveen and Waagepetersen 1998, Scand. J. Stat. 25).

    The points of a cell are Poisson with rate area * exp(Y(s)). Y is a Gaussian process with mean mu and covariance
    sigma^2 exp(-|s - s'| / beta), at the middle of each cell.
    """
    side = len(counts)
    middle = (torch.arange(side) + 0.5) / side
    cells = torch.cartesian_prod(middle, middle)
    mu = pyro.sample("mu", dist.Normal(5.0, 1.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    beta = pyro.sample("beta", dist.LogNormal(-2.0, 0.5))
    distance = (cells.unsqueeze(1) - cells).square().sum(-1).sqrt()
    factor = torch.linalg.cholesky(torch.exp(-distance / beta) + 1e-5 * torch.eye(side**2))
    white = pyro.sample("white", dist.Normal(0.0, 1.0).expand([side**2]).to_event(1))
    intensity = pyro.deterministic("intensity", (mu + sigma * (factor @ white)).exp(), event_dim=1)
    with pyro.plate("cells", side**2):
        pyro.sample("counts", dist.Poisson(intensity / side**2), obs=counts.flatten())


def epidemic(cases: Tensor, population: Tensor) -> None:
    """An outbreak (Kermack and McKendrick 1927), after Grinsztajn et al. 2021 (arXiv 2006.02985).

    dS/dt = -beta S I / N, dI/dt = beta S I / N - gamma I, and daily cases are negative binomial with mean I(t) and
    variance I + I^2 / phi.
    """
    beta = pyro.sample("beta", dist.LogNormal(0.5, 0.5))
    gamma = pyro.sample("gamma", dist.LogNormal(-1.0, 0.5))
    inverse_phi = pyro.sample("inverse_phi", dist.Exponential(5.0))
    state = torch.stack([population - 1.0, torch.ones(())])

    def slope(state: Tensor) -> Tensor:
        infections, recoveries = beta * state[0] * state[1] / population, gamma * state[1]
        return torch.stack([-infections, infections - recoveries])

    infected = []
    for _ in range(len(cases)):
        for _ in range(2):  # half a day each, by the midpoint rule
            state = state + 0.5 * slope(state + 0.25 * slope(state))
        infected.append(state[1])
    pyro.deterministic("R0", beta / gamma)
    with pyro.plate("days", len(cases)):
        pyro.sample("cases", dist.GammaPoisson(1 / inverse_phi, 1 / (inverse_phi * torch.stack(infected))), obs=cases)


def dirichlet_process(y: Tensor) -> None:
    """A Dirichlet process mixture, truncated at six components (Ishwaran and James 2001, JASA 96).

    V_k ~ Beta(1, alpha), p_k = V_k (1 - V_1) ... (1 - V_{k-1}), with V_6 = 1.
    """
    alpha = pyro.sample("alpha", dist.Gamma(2.0, 2.0))
    with pyro.plate("sticks", 5):
        stick = pyro.sample("stick", dist.Beta(1.0, alpha))
    left = torch.cat([torch.ones(1), (1 - stick).cumprod(-1)], -1)
    weights = left * torch.cat([stick, torch.ones(1)], -1)
    with pyro.plate("components", 6):
        loc = pyro.sample("loc", dist.Normal(0.0, 5.0))
        scale = pyro.sample("scale", dist.InverseGamma(3.0, 2.0))
    with pyro.plate("data", len(y)):
        component = pyro.sample("component", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(loc[component], scale[component]), obs=y)


def horseshoe(x: Tensor, y: Tensor) -> None:
    """The regularized horseshoe (Piironen and Vehtari 2017, arXiv 1707.01694, equations 2.8 and 3.12).

    beta_j ~ N(0, tau^2 l_j^2), l_j^2 = c^2 lambda_j^2 / (c^2 + tau^2 lambda_j^2), with lambda_j and tau half-Cauchy.
    The scale of tau expects three of the coefficients to differ from zero.
    """
    size, expected = x.shape[1], 3.0
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    tau = pyro.sample("tau", dist.HalfCauchy(expected / (size - expected) * sigma / len(y) ** 0.5))
    slab = pyro.sample("slab", dist.InverseGamma(2.0, 2.0))
    with pyro.plate("features", size):
        local = pyro.sample("local", dist.HalfCauchy(1.0))
        raw = pyro.sample("raw", dist.Normal(0.0, 1.0))
    beta = pyro.deterministic("beta", raw * tau * local * (slab / (slab + (tau * local) ** 2)).sqrt(), event_dim=1)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)


class Network(PyroModule):
    """A network of one hidden layer of tanh units (Neal 1996, Bayesian Learning for Neural Networks, section 1.2).

    f(x) = b + s_v sum_j v_j tanh(s_u (a_j + u_j x)), with a_j, u_j and b ~ N(0, 1), v_j ~ N(0, 1 / H) for H units.
    """

    def __init__(self, units: int = 6):
        super().__init__()
        self.s_u = PyroSample(dist.HalfNormal(3.0))
        self.s_v = PyroSample(dist.HalfNormal(3.0))
        self.noise = PyroSample(dist.HalfNormal(1.0))
        self.hidden = PyroModule[nn.Linear](1, units)
        self.hidden.weight = PyroSample(dist.Normal(0.0, 1.0).expand([units, 1]).to_event(2))
        self.hidden.bias = PyroSample(dist.Normal(0.0, 1.0).expand([units]).to_event(1))
        self.out = PyroModule[nn.Linear](units, 1)
        self.out.weight = PyroSample(dist.Normal(0.0, units**-0.5).expand([1, units]).to_event(2))
        self.out.bias = PyroSample(dist.Normal(0.0, 1.0).expand([1]).to_event(1))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        noise = self.noise
        hidden = (self.s_u * self.hidden(x.unsqueeze(-1))).tanh()
        mean = (self.out.bias + self.s_v * F.linear(hidden, self.out.weight)).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, noise), obs=y)
        return mean


neural_network = Network()


def simulated() -> dict[str, dict[str, Any]]:
    """The data of each model, by its name, for a .json file."""
    from sklearn.datasets import load_diabetes

    torch.manual_seed(0)
    x = (torch.arange(8) + 0.5) / 8
    bumps = 0.8 * torch.sin(5 * x).unsqueeze(-1) + 0.8 * torch.cos(4 * x)
    counts = torch.poisson((5.0 + bumps + 0.3 * torch.randn(8, 8)).exp() / 64)

    susceptible, infected, cases = 762.0, 1.0, list[float]()
    for _ in range(14):
        for _ in range(20):
            new, gone = 0.05 * 1.7 * susceptible * infected / 763, 0.05 * 0.5 * infected
            susceptible, infected = susceptible - new, infected + new - gone
        cases.append(float(dist.GammaPoisson(10.0, 10.0 / infected).sample()))

    group = torch.multinomial(torch.tensor([0.3, 0.5, 0.2]), 80, replacement=True)
    y = torch.tensor([-4.0, 0.0, 5.0])[group] + torch.tensor([0.7, 1.0, 0.5])[group] * torch.randn(80)

    table = load_diabetes()
    place = 4 * torch.rand(40).sort().values - 2
    return {
        "cox_process": {"counts": counts.long().tolist()},
        "epidemic": {"cases": [int(n) for n in cases], "population": 763},
        "dirichlet_process": {"y": y.tolist()},
        "horseshoe": {
            "x": (table.data / table.data.std(0)).tolist(),
            "y": ((table.target - table.target.mean()) / table.target.std()).tolist(),
        },
        "neural_network": {
            "x": place.tolist(),
            "y": ((2 * place).sin() + 0.3 * place + 0.2 * torch.randn(40)).tolist(),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("papers"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name, data in simulated().items():
        (options.out / f"{name}.json").write_text(json.dumps(data))


if __name__ == "__main__":
    main()
