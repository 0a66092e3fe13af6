"""What `dgm.doctor` says of Pyro pairs that are right, refused by Pyro, or silently wrong: a confusion table.

    python benchmarks/doctor.py [--verbose] [NAME ...]

- *Correct*: over what Pyro offers. An error is a false alarm.
- *Refused*: Pyro's own loss raises an error or warns under validation. Any error or warning finds it.
- *Broken*: each pair has one mistake. Most of them train without a message. An error or a warning finds the mistake if
  it names the site, the parameter or the plate at fault.

The table also says what Pyro itself reports when the loss runs once under validation.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.contrib.gp as gp
import pyro.distributions as dist
import pyro.infer.autoguide as auto
import torch
from pyro import poutine
from pyro.contrib.easyguide import easy_guide
from pyro.infer import (
    ELBO,
    EnergyDistance,
    JitTrace_ELBO,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    config_enumerate,
)
from pyro.infer.reparam import LocScaleReparam
from pyro.nn import PyroModule, PyroParam, PyroSample
from pyro.ops.indexing import Vindex
from torch import Tensor, nn
from torch.distributions import constraints

import dgm_pyro as dgm
from dgm_pyro.results import Table


@dataclass
class Pair:
    model: Any
    guide: Any
    args: tuple[Any, ...]
    loss: Any = None
    kwargs: dict[str, Any] = field(default_factory=dict)


def pair(model: Any, guide: Any, *args: Any, loss: Any = None, **kwargs: Any) -> Pair:
    return Pair(model, guide, args, loss, kwargs)


Make = Callable[[], Pair]
CORRECT: dict[str, Make] = {}
REFUSED: dict[str, Make] = {}
BROKEN: dict[str, tuple[str, Make]] = {}


def correct(make: Make) -> Make:
    return CORRECT.setdefault(make.__name__, make)


def refused(make: Make) -> Make:
    return REFUSED.setdefault(make.__name__, make)


def broken(where: str) -> Callable[[Make], Make]:
    """A pair whose mistake is at the site, parameter or plate ``where``."""

    def add(make: Make) -> Make:
        BROKEN[make.__name__] = where, make
        return make

    return add


# -- parts that several pairs share ------------------------------------------------------------------------------------

X = torch.randn(8, generator=torch.Generator().manual_seed(0))
XS = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
POSITIVE = constraints.positive


def real(name: str = "loc", value: float = 0.0) -> Tensor:
    return pyro.param(name, torch.tensor(value))


def positive(name: str = "scale", value: float = 1.0) -> Tensor:
    return pyro.param(name, torch.tensor(value), constraint=POSITIVE)


def nothing(*args: Any, **kwargs: Any) -> None:
    """The guide of a model without latents."""


def mean_model(x: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def mean_guide(x: Tensor) -> None:
    pyro.sample("z", dist.Normal(real(), positive()))


def gamma_model(x: Tensor) -> None:
    rate = pyro.sample("rate", dist.Gamma(2.0, 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Exponential(rate), obs=x.abs())


def local_model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def local_guide(x: Tensor) -> None:
    loc = pyro.param("locs", torch.zeros(len(x)))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc, positive()))


class VAE(nn.Module):
    def __init__(self, hidden: Callable[[], nn.Module] = nn.Tanh):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 6), hidden(), nn.Linear(6, 4))
        self.decoder = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 3))

    def prior(self, x: Tensor) -> Any:
        return dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1)

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior(x))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.5).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            loc, raw = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))


class Regression(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.linear = PyroModule[nn.Linear](3, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
        self.scale = PyroParam(torch.tensor(1.0), constraint=POSITIVE)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        mean = self.linear(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(mean, self.scale), obs=y)


def hierarchy(x: Tensor) -> None:
    """Eight schools, with a simplex, a correlation and a count among the latents."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("groups", len(x)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        components = dist.Normal(theta.unsqueeze(-1) + torch.tensor([0.0, 2.0]), 1.0)
        pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(weights), components), obs=x)


def mixture(x: Tensor) -> None:
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("components", 2):
        centers = pyro.sample("centers", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(centers[k], 1.0), obs=x)


def continuous(model: Any) -> Any:
    return poutine.block(model, hide=["k"])


# -- pairs that are right ----------------------------------------------------------------------------------------------


@correct
def global_latent() -> Pair:
    return pair(mean_model, mean_guide, X)


@correct
def local_latents() -> Pair:
    return pair(local_model, local_guide, X)


@correct
def vae_of_bound_methods() -> Pair:
    vae = VAE()
    return pair(vae.model, vae.guide, XS)


@correct
def vae_with_dropout() -> Pair:
    vae = VAE(lambda: nn.Dropout(0.5))
    return pair(vae.model, vae.guide, XS)


@correct
def vae_with_batch_norm() -> Pair:
    vae = VAE(lambda: nn.BatchNorm1d(6))
    return pair(vae.model, vae.guide, XS)


@correct
def vae_with_closed_kl() -> Pair:
    vae = VAE()
    return pair(vae.model, vae.guide, XS, loss=TraceMeanField_ELBO())


@correct
def vae_of_particles() -> Pair:
    vae = VAE()
    return pair(vae.model, vae.guide, XS, loss=Trace_ELBO(3, max_plate_nesting=1, vectorize_particles=True))


@correct
def importance_weighted_vae() -> Pair:
    vae = VAE()
    return pair(vae.model, vae.guide, XS, loss=RenyiELBO(0.0, 4, 1, vectorize_particles=True))


@correct
def vae_traced_by_torch() -> Pair:
    vae = VAE()
    return pair(vae.model, vae.guide, XS, loss=JitTrace_ELBO(ignore_jit_warnings=True))


@correct
def wake_sleep() -> Pair:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(logits=real("prior_logit", 0.3)))
            pyro.sample("x", dist.Normal(z * real("shift", 1.0), 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=real("slope", 0.5) * x))

    return pair(model, guide, X, loss=ReweightedWakeSleep(3, max_plate_nesting=1))


@correct
def scaled_loss() -> Pair:
    vae = VAE()
    return pair(poutine.scale(vae.model, 0.1), poutine.scale(vae.guide, 0.1), XS)


@correct
def annealed_latents() -> Pair:
    """The KL alone is weighted, as in beta-VAEs."""
    vae = VAE()

    def model(x: Tensor) -> None:
        pyro.module("decoder", vae.decoder)
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=0.25):
                z = pyro.sample("z", vae.prior(x))
            pyro.sample("x", dist.Normal(vae.decoder(z), 0.5).to_event(1), obs=x)

    return pair(model, poutine.scale(vae.guide, 0.25), XS)


@correct
def nested_plates() -> Pair:
    def model(x: Tensor) -> None:
        with pyro.plate("columns", 3, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("rows", len(x), dim=-2):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("columns", 3, dim=-1):
            pyro.sample("z", dist.Normal(pyro.param("locs", torch.zeros(3)), 1.0))

    return pair(model, guide, XS)


@correct
def crossed_plates() -> Pair:
    def statements(x: Tensor, locate: Callable[[str, tuple[int, ...]], Any]) -> None:
        users, items = pyro.plate("users", len(x), dim=-2), pyro.plate("items", 3, dim=-1)
        with users:
            u = pyro.sample("u", dist.Normal(locate("u", (len(x), 1)), 1.0))
        with items:
            v = pyro.sample("v", dist.Normal(locate("v", (3,)), 1.0))
        if locate is prior:
            with users, items:
                pyro.sample("x", dist.Normal(u * v, 1.0), obs=x)

    def prior(name: str, shape: tuple[int, ...]) -> Any:
        return torch.zeros(shape)

    def learned(name: str, shape: tuple[int, ...]) -> Any:
        return pyro.param(f"{name}_loc", torch.full(shape, 0.1))

    return pair(lambda x: statements(x, prior), lambda x: statements(x, learned), XS)


@correct
def plate_without_a_size() -> Pair:
    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data"):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return pair(model, mean_guide, X)


@correct
def sequential_plate() -> Pair:
    def model(x: Tensor) -> None:
        for i in pyro.plate("data", len(x)):
            z = pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))
            pyro.sample(f"x_{i}", dist.Normal(z, 1.0), obs=x[i])

    def guide(x: Tensor) -> None:
        for i in pyro.plate("data", len(x)):
            pyro.sample(f"z_{i}", dist.Normal(real(f"loc_{i}"), 1.0))

    return pair(model, guide, X[:3])


@correct
def subsample_that_pyro_draws() -> Pair:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=3) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    def guide(x: Tensor) -> None:
        locs = pyro.param("locs", torch.zeros(len(x)))
        with pyro.plate("data", len(x), subsample_size=3) as rows:
            pyro.sample("z", dist.Normal(locs[rows], 1.0))

    return pair(model, guide, X)


@correct
def subsample_in_the_model() -> Pair:
    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), subsample=x) as batch:
            pyro.sample("x", dist.Normal(z, 1.0), obs=batch)

    return pair(model, mean_guide, X)


@correct
def batches_of_a_loader() -> Pair:
    """Every batch brings its rows along."""

    def model(rows: Tensor, x: Tensor) -> None:
        with pyro.plate("data", 100, subsample=rows):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(rows: Tensor, x: Tensor) -> None:
        locs = pyro.param("locs", torch.zeros(100))
        with pyro.plate("data", 100, subsample=rows):
            pyro.sample("z", dist.Normal(locs[rows], 1.0))

    return pair(model, guide, torch.arange(8) * 5, X)


@correct
def parameter_of_another_batch() -> Pair:
    """The table of embeddings has rows, and a branch has a bias, that this batch does not read."""
    table, bias = nn.Embedding(5, 1), nn.Linear(1, 1)

    def model(x: Tensor, k: Tensor, tall: bool = False) -> None:
        pyro.module("table", table)
        pyro.module("bias", bias)
        mean = table(k).squeeze(-1)
        if tall:
            mean = bias(mean.unsqueeze(-1)).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    return pair(model, nothing, X, torch.arange(8) % 2)


@correct
def masked_data() -> Pair:
    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)), poutine.mask(mask=x > 0):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return pair(model, mean_guide, X)


@correct
def missing_values() -> Pair:
    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x, obs_mask=x > 0)

    return pair(model, auto.AutoNormal(model), X)


@correct
def factor_in_the_model() -> Pair:
    def model(x: Tensor) -> None:
        mean_model(x)
        pyro.factor("penalty", -(real("shift", 0.5) ** 2))

    return pair(model, mean_guide, X)


@correct
def factors_in_a_plate() -> Pair:
    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.factor("potential", -0.5 * (x - z) ** 2)

    return pair(model, mean_guide, X)


@correct
def posterior_regularization() -> Pair:
    def guide(x: Tensor) -> None:
        mean_guide(x)
        pyro.factor("penalty", -(real() ** 2), has_rsample=True)

    return pair(mean_model, guide, X)


@correct
def enumerated_mixture() -> Pair:
    guide = auto.AutoNormal(continuous(mixture))
    return pair(mixture, guide, X, loss=TraceEnum_ELBO(max_plate_nesting=1))


@correct
def mixture_at_a_point() -> Pair:
    guide = auto.AutoDelta(continuous(mixture))
    return pair(mixture, guide, X, loss=TraceEnum_ELBO(max_plate_nesting=1))


@correct
def mixture_density() -> Pair:
    def model(x: Tensor) -> None:
        weights = pyro.param("weights", torch.ones(2) / 2, constraint=constraints.simplex)
        centers = pyro.param("centers", torch.tensor([-1.0, 1.0]))
        with pyro.plate("data", len(x)):
            components = dist.Normal(centers, positive())
            pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(weights), components), obs=x)

    return pair(model, nothing, X)


@correct
def enumerated_guide() -> Pair:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.4))
            pyro.sample("x", dist.Normal(2 * k - 1, 1.0), obs=x)

    @config_enumerate
    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Bernoulli(logits=real("slope", 0.5) * x))

    return pair(model, guide, X, loss=TraceEnum_ELBO(max_plate_nesting=1))


@correct
def sequentially_enumerated_guide() -> Pair:
    def model(x: Tensor) -> None:
        k = pyro.sample("k", dist.Bernoulli(0.4))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    @config_enumerate(default="sequential")
    def guide(x: Tensor) -> None:
        pyro.sample("k", dist.Bernoulli(pyro.param("p", torch.tensor(0.5), constraint=constraints.unit_interval)))

    return pair(model, guide, X, loss=TraceEnum_ELBO(max_plate_nesting=1))


@correct
def score_function() -> Pair:
    def model(x: Tensor) -> None:
        k = pyro.sample("k", dist.Bernoulli(0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    return pair(model, lambda x: pyro.sample("k", dist.Bernoulli(logits=real())), X)


@correct
def score_function_with_a_baseline() -> Pair:
    baseline = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0))

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(k.unsqueeze(-1), torch.ones(3)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("baseline", baseline)
        with pyro.plate("data", len(x)):
            logits = x.mean(-1) * real("slope", 0.5)
            infer = {"baseline": {"nn_baseline": baseline, "nn_baseline_input": x.detach()}}
            pyro.sample("k", dist.Bernoulli(logits=logits), infer=infer)

    return pair(model, guide, XS, loss=TraceGraph_ELBO())


@correct
def hidden_markov_model() -> Pair:
    @config_enumerate
    def model(x: Tensor) -> None:
        with pyro.plate("states", 3):
            rows = pyro.sample("rows", dist.Dirichlet(torch.ones(3)))
            centers = pyro.sample("centers", dist.Normal(0.0, 1.0))
        state: Any = 0
        for t in pyro.markov(range(len(x))):
            state = pyro.sample(f"state_{t}", dist.Categorical(rows[state]))
            pyro.sample(f"x_{t}", dist.Normal(centers[state], 1.0), obs=x[t])

    guide = auto.AutoDelta(poutine.block(model, expose=["rows", "centers"]))
    return pair(model, guide, X[:4], loss=TraceEnum_ELBO(max_plate_nesting=1))


@correct
def markov_chains_in_a_plate() -> Pair:
    @config_enumerate
    def model(x: Tensor) -> None:
        rows = pyro.param("rows", torch.full((2, 2), 0.5), constraint=constraints.simplex)
        centers = pyro.param("centers", torch.tensor([-1.0, 1.0]))
        with pyro.plate("sequences", len(x), dim=-1):
            state: Any = torch.tensor(0)
            for t in pyro.markov(range(x.shape[-1])):
                state = pyro.sample(f"state_{t}", dist.Categorical(Vindex(rows)[state, :]))
                pyro.sample(f"x_{t}", dist.Normal(Vindex(centers)[state], 1.0), obs=x[:, t])

    return pair(model, nothing, XS, loss=TraceEnum_ELBO(max_plate_nesting=1))


@correct
def markov_density() -> Pair:
    def model(x: Tensor) -> None:
        logits = pyro.param("logits", torch.zeros(2, 2))
        centers = pyro.param("centers", torch.tensor([-1.0, 1.0]))
        hmm = dist.DiscreteHMM(torch.zeros(2), logits, dist.Normal(centers, 1.0))
        with pyro.plate("sequences", len(x)):
            pyro.sample("x", hmm, obs=x)

    return pair(model, nothing, XS)


@correct
def deep_markov_model() -> Pair:
    move, read, encode = nn.Linear(2, 2), nn.Linear(2, 1), nn.GRU(1, 4, batch_first=True)
    combine = nn.Linear(4, 4)
    mask = torch.arange(3) < torch.tensor([3, 3, 2, 2, 1, 3, 2, 1]).unsqueeze(-1)

    def model(x: Tensor) -> None:
        pyro.module("move", move)
        pyro.module("read", read)
        z = torch.zeros(len(x), 2)
        with pyro.plate("sequences", len(x)):
            for t in pyro.markov(range(x.shape[1])):
                with poutine.mask(mask=mask[:, t]):
                    z = pyro.sample(f"z_{t}", dist.Normal(move(z), 1.0).to_event(1))
                    pyro.sample(f"x_{t}", dist.Normal(read(z), 1.0).to_event(1), obs=x[:, t, None])

    def guide(x: Tensor) -> None:
        pyro.module("encode", encode)
        pyro.module("combine", combine)
        hidden, _ = encode(x.unsqueeze(-1))
        with pyro.plate("sequences", len(x)):
            for t in pyro.markov(range(x.shape[1])):
                loc, raw = combine(hidden[:, t]).chunk(2, -1)
                with poutine.mask(mask=mask[:, t]):
                    pyro.sample(f"z_{t}", dist.Normal(loc, nn.functional.softplus(raw)).to_event(1))

    return pair(model, guide, XS)


@correct
def auto_normal() -> Pair:
    return pair(hierarchy, auto.AutoNormal(hierarchy), X)


@correct
def auto_delta() -> Pair:
    return pair(hierarchy, auto.AutoDelta(hierarchy), X)


@correct
def auto_diagonal_normal() -> Pair:
    return pair(hierarchy, auto.AutoDiagonalNormal(hierarchy), X)


@correct
def auto_multivariate_normal() -> Pair:
    return pair(hierarchy, auto.AutoMultivariateNormal(hierarchy), X)


@correct
def auto_low_rank() -> Pair:
    return pair(hierarchy, auto.AutoLowRankMultivariateNormal(hierarchy), X)


@correct
def auto_laplace() -> Pair:
    return pair(hierarchy, auto.AutoLaplaceApproximation(hierarchy), X)


@correct
def auto_iaf() -> Pair:
    return pair(hierarchy, auto.AutoIAFNormal(hierarchy, hidden_dim=[16]), X)


@correct
def auto_flow() -> Pair:
    from functools import partial

    flow = partial(dist.transforms.iterated, 2, dist.transforms.affine_coupling)
    return pair(hierarchy, auto.AutoNormalizingFlow(hierarchy, flow), X)


@correct
def auto_structured() -> Pair:
    guide = auto.AutoStructured(
        hierarchy,
        conditionals={"mu": "normal", "tau": "normal", "weights": "delta", "theta": "normal"},
        dependencies={"theta": {"mu": "linear"}},
    )
    return pair(hierarchy, guide, X)


@correct
def auto_gaussian() -> Pair:
    return pair(hierarchy, auto.AutoGaussian(hierarchy), X)


@correct
def auto_list() -> Pair:
    guide = auto.AutoGuideList(hierarchy)
    guide.append(auto.AutoDelta(poutine.block(hierarchy, expose=["weights", "tau"])))
    guide.append(auto.AutoDiagonalNormal(poutine.block(hierarchy, expose=["mu", "theta"])))
    return pair(hierarchy, guide, X)


@correct
def auto_discrete() -> Pair:
    guide = auto.AutoGuideList(mixture)
    guide.append(auto.AutoNormal(continuous(mixture)))
    guide.append(auto.AutoDiscreteParallel(poutine.block(mixture, expose=["k"])))
    return pair(mixture, guide, X, loss=TraceEnum_ELBO(max_plate_nesting=1))


@correct
def auto_subsampled() -> Pair:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=3) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    return pair(model, auto.AutoNormal(model), X)


@correct
def easy() -> Pair:
    @easy_guide(hierarchy)
    def guide(self: Any, x: Tensor) -> None:
        group = self.group(match="mu|theta")
        loc = pyro.param("loc", torch.zeros(group.event_shape))
        group.sample("both", dist.Normal(loc, 1.0).to_event(1))
        self.map_estimate("tau")
        self.map_estimate("weights")

    return pair(hierarchy, guide, X)


@correct
def bayesian_regression() -> Pair:
    model = Regression()
    return pair(model, auto.AutoNormal(model), XS, XS.sum(-1))


@correct
def lifted_parameter() -> Pair:
    def regression(x: Tensor, y: Tensor) -> None:
        slope = pyro.param("slope", torch.zeros(3))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ slope, 1.0), obs=y)

    model = poutine.lift(regression, prior={"slope": dist.Normal(0.0, 1.0).expand([3]).to_event(1)})
    return pair(model, auto.AutoNormal(model), XS, XS.sum(-1))


@correct
def reparameterized() -> Pair:
    model = poutine.reparam(hierarchy, {"theta": LocScaleReparam()})
    return pair(model, auto.AutoNormal(model), X)


@correct
def conditioned() -> Pair:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(X)):
            pyro.sample("x", dist.Normal(z, 1.0))

    return pair(poutine.condition(model, {"x": X}), lambda: mean_guide(X))


@correct
def gaussian_process() -> Pair:
    process = gp.models.GPRegression(XS, X, gp.kernels.RBF(3, variance=torch.tensor(1.0)), noise=torch.tensor(0.5))
    return pair(process.model, process.guide)


@correct
def variational_gaussian_process() -> Pair:
    kernel = gp.kernels.RBF(3)
    process = gp.models.VariationalSparseGP(XS, (X > 0).float(), kernel, XS[:3].clone(), gp.likelihoods.Binary())
    return pair(process.model, process.guide)


@correct
def maximum_likelihood() -> Pair:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.StudentT(positive("df", 3.0), real(), positive()), obs=x)

    return pair(model, nothing, X)


class SemiSupervised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.classifier, self.encoder, self.decoder = nn.Linear(3, 2), nn.Linear(5, 4), nn.Linear(4, 3)

    def model(self, x: Tensor, y: Tensor | None = None) -> None:
        pyro.module("semi", self)
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.OneHotCategorical(torch.ones(2)), obs=y)
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).expand([len(x), 2]).to_event(1))
            y = y.expand(*torch.broadcast_shapes(y.shape[:-1], z.shape[:-1]), 2)
            mean = self.decoder(torch.cat([y, z.expand(*y.shape[:-1], 2)], -1))
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor, y: Tensor | None = None) -> None:
        with pyro.plate("data", len(x)):
            if y is None:
                y = pyro.sample("y", dist.OneHotCategorical(logits=self.classifier(x)), infer={"enumerate": "parallel"})
            y = y.expand(*torch.broadcast_shapes(y.shape[:-1], x.shape[:-1]), 2)
            loc, raw = self.encoder(torch.cat([x.expand(*y.shape[:-1], 3), y], -1)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))


@correct
def semi_supervised_with_labels() -> Pair:
    both = SemiSupervised()
    return pair(both.model, both.guide, XS, torch.eye(2)[(X > 0).long()])


@correct
def semi_supervised_without() -> Pair:
    both = SemiSupervised()
    return pair(both.model, both.guide, XS, loss=TraceEnum_ELBO(max_plate_nesting=1))


@correct
def topics() -> Pair:
    """Documents of words, subsampled, each with its mixture of topics."""
    words = torch.randint(6, (4, 5), generator=torch.Generator().manual_seed(0))

    def model(words: Tensor) -> None:
        with pyro.plate("topics", 2):
            topic = pyro.sample("topic", dist.Dirichlet(torch.ones(6)))
        with pyro.plate("documents", 4, subsample_size=2) as rows:
            share = pyro.sample("share", dist.Dirichlet(torch.ones(2)))
            with pyro.plate("words", 5):
                k = pyro.sample("k", dist.Categorical(share), infer={"enumerate": "parallel"})
                pyro.sample("word", dist.Categorical(topic[k]), obs=words.T[:, rows])

    def guide(words: Tensor) -> None:
        with pyro.plate("topics", 2):
            pyro.sample("topic", dist.Delta(pyro.param("best", torch.ones(2, 6) / 6, constraints.simplex), event_dim=1))
        counts = pyro.param("counts", torch.full((4, 2), 2.0), constraint=POSITIVE)
        with pyro.plate("documents", 4, subsample_size=2) as rows:
            pyro.sample("share", dist.Dirichlet(counts[rows]))

    return pair(model, guide, words, loss=TraceEnum_ELBO(max_plate_nesting=2))


@correct
def frozen_decoder() -> Pair:
    vae = VAE()
    vae.decoder.requires_grad_(False).eval()
    return pair(vae.model, vae.guide, XS)


@correct
def decoder_hidden_from_the_optimizer() -> Pair:
    vae = VAE()
    return pair(poutine.block(vae.model, hide_types=["param"]), vae.guide, XS)


@correct
def model_of_an_improper_prior() -> Pair:
    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.ImproperUniform(constraints.real, (), ()))
        scale = pyro.sample("scale", dist.ImproperUniform(POSITIVE, (), ()))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, scale), obs=x)

    return pair(model, None, X)


@correct
def model_alone() -> Pair:
    return pair(hierarchy, None, X)


@correct
def model_alone_of_discrete_latents() -> Pair:
    return pair(mixture, None, X)


@correct
def auxiliary_site() -> Pair:
    def guide(x: Tensor) -> None:
        u = pyro.sample("u", dist.Normal(real(), 1.0), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Delta(2 * u, log_density=torch.tensor(-math.log(2.0))))

    return pair(mean_model, guide, X)


@correct
def deterministic_sites() -> Pair:
    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        twice = pyro.deterministic("twice", 2 * z)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(twice, 1.0), obs=x)

    return pair(model, mean_guide, X)


@correct
def planar_guide() -> Pair:
    transform = dist.transforms.Planar(2)

    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.factor("energy", -(((z**2).sum() - 1) ** 2))

    def guide() -> None:
        pyro.module("planar", transform)
        pyro.sample("z", dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0).to_event(1), [transform]))

    return pair(model, guide)


@correct
def spline_flow() -> Pair:
    transform = dist.transforms.spline_coupling(3)

    def model(x: Tensor) -> None:
        pyro.module("spline", transform)
        with pyro.plate("data", len(x)):
            base = dist.Normal(torch.zeros(3), 1.0).to_event(1)
            pyro.sample("x", dist.TransformedDistribution(base, [transform]), obs=x)

    return pair(model, nothing, XS)


@correct
def conditional_flow() -> Pair:
    transform = dist.transforms.conditional_affine_autoregressive(3, 1, hidden_dims=[8])

    def model(x: Tensor, given: Tensor) -> None:
        pyro.module("flow", transform)
        with pyro.plate("data", len(x)):
            base = dist.Normal(torch.zeros(3), 1.0).to_event(1)
            flow = dist.ConditionalTransformedDistribution(base, [transform])
            pyro.sample("x", flow.condition(given.unsqueeze(-1)), obs=x)

    return pair(model, nothing, XS, X)


@correct
def correlations() -> Pair:
    def model(x: Tensor) -> None:
        with pyro.plate("features", 3):
            scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        factor = pyro.sample("factor", dist.LKJCholesky(3, 2.0))
        with pyro.plate("data", len(x)):
            covariance = dist.MultivariateNormal(torch.zeros(3), scale_tril=scale.unsqueeze(-1) * factor)
            pyro.sample("x", covariance, obs=x)

    return pair(model, auto.AutoNormal(model), XS)


@correct
def counts_with_zeros() -> Pair:
    def model(x: Tensor) -> None:
        gate = pyro.param("gate", torch.tensor(0.2), constraint=constraints.unit_interval)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.ZeroInflatedPoisson(positive("rate", 2.0), gate=gate), obs=x)

    return pair(model, nothing, (4 * X.abs()).round())


@correct
def double_precision() -> Pair:
    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.double), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros((), dtype=torch.double)), 1.0))

    return pair(model, guide, X.double())


@correct
def residual_network_that_starts_at_zero() -> Pair:
    network = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))
    nn.init.zeros_(network[-1].weight)

    def model(x: Tensor) -> None:
        pyro.module("network", network)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(network(x), 1.0).to_event(1), obs=x)

    return pair(model, nothing, XS)


@correct
def scale_by_other_means() -> Pair:
    """Squares, absolute values and rectifiers keep a scale positive as well as a constraint does."""

    def model(x: Tensor) -> None:
        a, b, c, d = (real(name, 0.7) for name in "abcd")
        scale = a**2 + b.abs() + c * c + d.clamp(min=0.1) + real("e").exp()
        share = torch.softmax(pyro.param("logits", torch.zeros(2)), -1)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, scale * share[0] + share[1]), obs=x)

    return pair(model, nothing, X)


@correct
def weights_that_are_normalized() -> Pair:
    def model(x: Tensor) -> None:
        counts = pyro.param("counts", torch.ones(3), constraint=POSITIVE)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Categorical(counts / counts.sum()), obs=x)

    return pair(model, nothing, (X > 0).long())


@correct
def covariance_by_a_factor() -> Pair:
    def model(x: Tensor) -> None:
        factor = pyro.param("factor", torch.eye(3))
        with pyro.plate("data", len(x)):
            covariance = factor @ factor.T + 0.1 * torch.eye(3)
            pyro.sample("x", dist.MultivariateNormal(torch.zeros(3), covariance), obs=x)

    return pair(model, nothing, XS)


@correct
def horseshoe() -> Pair:
    def model(x: Tensor, y: Tensor) -> None:
        tau = pyro.sample("tau", dist.HalfCauchy(1.0))
        with pyro.plate("features", 3):
            local = pyro.sample("local", dist.HalfCauchy(1.0))
            weight = pyro.sample("weight", dist.Normal(0.0, tau * local))
        noise = pyro.sample("noise", dist.InverseGamma(2.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal((x * weight).sum(-1), noise.sqrt()), obs=y)

    return pair(model, auto.AutoNormal(model), XS, XS.sum(-1))


@correct
def local_parameters_of_a_subsample() -> Pair:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=pyro.subsample(x, event_dim=0))

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=3):
            loc = pyro.param("locs", torch.zeros(len(x)), event_dim=0)
            pyro.sample("z", dist.Normal(loc, 1.0))

    return pair(model, guide, X)


@correct
def relaxed_bits() -> Pair:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.RelaxedBernoulliStraightThrough(torch.tensor(0.5), probs=torch.tensor(0.5)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            logits = real("slope", 0.5) * x
            pyro.sample("z", dist.RelaxedBernoulliStraightThrough(torch.tensor(0.5), logits=logits))

    return pair(model, guide, X)


@correct
def linear_dynamics() -> Pair:
    def model(x: Tensor) -> None:
        one, zero = torch.eye(1), torch.zeros(1)
        noise = dist.MultivariateNormal(zero, positive() * one)
        pyro.sample("x", dist.GaussianHMM(noise, real("decay", 0.9) * one, noise, one, noise, duration=len(x)),
                    obs=x.unsqueeze(-1))  # fmt: skip

    return pair(model, nothing, X)


@correct
def ordered_answers() -> Pair:
    def model(x: Tensor, y: Tensor) -> None:
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        base = dist.Normal(0.0, 1.0).expand([2]).to_event(1)
        cuts = pyro.sample("cuts", dist.TransformedDistribution(base, dist.transforms.OrderedTransform()))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.OrderedLogistic(slope * x, cuts), obs=y)

    return pair(model, auto.AutoNormal(model), X, torch.arange(8) % 3)


@correct
def tables_of_counts() -> Pair:
    def model(counts: Tensor) -> None:
        shares = pyro.sample("shares", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("data", len(counts)):
            pyro.sample("counts", dist.Multinomial(10, shares), obs=counts)

    return pair(model, auto.AutoNormal(model), torch.tensor([[5.0, 3.0, 2.0], [1.0, 8.0, 1.0]]))


@correct
def messenger_guide() -> Pair:
    return pair(hierarchy, auto.AutoNormalMessenger(hierarchy), X)


@correct
def hierarchical_messenger() -> Pair:
    return pair(hierarchy, auto.AutoHierarchicalNormalMessenger(hierarchy), X)


@correct
def model_without_its_data() -> Pair:
    """As `Predictive` runs it."""
    model = Regression()
    return pair(model, None, XS)


@correct
def intervention() -> Pair:
    def model(x: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(a, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(real("loc_a"), 1.0))
        pyro.sample("b", dist.Normal(a + real("loc_b"), 1.0))

    return pair(poutine.do(model, {"b": torch.tensor(1.0)}), poutine.do(guide, {"b": torch.tensor(1.0)}), X)


@correct
def discrete_without_enumeration() -> Pair:
    """Words of a document, each with a topic that the guide draws."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.ones(3)))
            pyro.sample("x", dist.Normal(pyro.param("centers", torch.arange(3.0))[k], 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Categorical(logits=pyro.param("logits", torch.zeros(len(x), 3))))

    return pair(model, guide, X, loss=TraceGraph_ELBO())


@correct
def kernel_distance() -> Pair:
    """A loss that takes no density of the guide."""
    loss = EnergyDistance(num_particles=4, max_plate_nesting=1)
    return pair(mean_model, mean_guide, X, loss=loss)


# -- pairs that Pyro refuses or warns about ----------------------------------------------------------------------------


@refused
def latent_without_a_guide() -> Pair:
    return pair(mean_model, nothing, X)


@refused
def latent_of_another_name() -> Pair:
    return pair(mean_model, lambda x: pyro.sample("zz", dist.Normal(real(), 1.0)), X)


@refused
def data_without_a_plate() -> Pair:
    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0).expand([len(x)]), obs=x)

    return pair(model, mean_guide, X)


@refused
def guide_without_the_plate() -> Pair:
    return pair(local_model, lambda x: pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(8)), 1.0)), X)


@refused
def events_of_other_dimensions() -> Pair:
    model = lambda: pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))  # noqa: E731
    return pair(model, lambda: pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(3)), 1.0)))


@refused
def transposed_guide() -> Pair:
    model = lambda: pyro.sample("z", dist.Normal(torch.zeros(2, 1), 1.0).to_event(2))  # noqa: E731
    return pair(model, lambda: pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(1, 2)), 1.0).to_event(2)))


@refused
def guide_of_another_length() -> Pair:
    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x) - 1):
            pyro.sample("z", dist.Normal(real(), 1.0))

    return pair(local_model, guide, X)


@refused
def data_longer_than_the_plate() -> Pair:
    def model(x: Tensor) -> None:
        with pyro.plate("data", 5):
            pyro.sample("x", dist.Normal(real(), 1.0), obs=x)

    return pair(model, nothing, X)


@refused
def parameters_longer_than_the_plate() -> Pair:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.param("loc", torch.zeros(5)), 1.0), obs=x[:5])

    return pair(model, nothing, X)


@refused
def two_plates_at_one_dimension() -> Pair:
    def model(x: Tensor) -> None:
        with pyro.plate("rows", len(x), dim=-1), pyro.plate("columns", 3, dim=-1):
            pyro.sample("x", dist.Normal(real(), 1.0), obs=x)

    return pair(model, nothing, XS)


@refused
def plate_inside_itself() -> Pair:
    def model(x: Tensor) -> None:
        plate = pyro.plate("data", len(x), dim=-1)
        with plate, plate:
            pyro.sample("x", dist.Normal(real(), 1.0), obs=x)

    return pair(model, nothing, X)


@refused
def one_plate_in_two_ways() -> Pair:
    def model(x: Tensor) -> None:
        plate = pyro.plate("data", len(x))
        for i in plate:
            pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))
        with plate:
            pyro.sample("x", dist.Normal(real(), 1.0), obs=x)

    def guide(x: Tensor) -> None:
        for i in pyro.plate("data", len(x)):
            pyro.sample(f"z_{i}", dist.Normal(real("mean"), 1.0))

    return pair(model, guide, X[:2])


@refused
def two_sites_of_one_name() -> Pair:
    def model(x: Tensor) -> None:
        mean_model(x)
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x[0])

    return pair(model, mean_guide, X)


@refused
def names_that_a_loop_repeats() -> Pair:
    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        for i in pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])

    return pair(model, mean_guide, X)


@refused
def subsample_of_the_guide_alone() -> Pair:
    def guide(x: Tensor) -> None:
        with pyro.plate("rows", len(x), subsample_size=3):
            real("other")
        mean_guide(x)

    return pair(mean_model, guide, X)


@refused
def rows_that_the_subsample_lacks() -> Pair:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=3):
            pyro.sample("x", dist.Normal(real(), 1.0), obs=x)

    return pair(model, nothing, X)


@refused
def nothing_to_enumerate() -> Pair:
    return pair(mean_model, mean_guide, X, loss=TraceEnum_ELBO(max_plate_nesting=1))


@refused
def enumeration_by_another_loss() -> Pair:
    return pair(mixture, auto.AutoNormal(continuous(mixture)), X, loss=Trace_ELBO())


@refused
def enumerated_guide_by_another_loss() -> Pair:
    return pair(enumerated_guide().model, enumerated_guide().guide, X, loss=Trace_ELBO())


@refused
def endless_enumeration() -> Pair:
    def model(x: Tensor) -> None:
        k = pyro.sample("k", dist.Poisson(3.0), infer={"enumerate": "parallel"})
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(k, real("s").exp()), obs=x)

    return pair(model, nothing, X, loss=TraceEnum_ELBO(max_plate_nesting=1))


@refused
def sequential_enumeration_of_the_model() -> Pair:
    def model(x: Tensor) -> None:
        k = pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "sequential"})
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(k, real("s").exp()), obs=x)

    return pair(model, nothing, X, loss=TraceEnum_ELBO(max_plate_nesting=1))


@refused
def enumerated_value_outside_its_plate() -> Pair:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(k.sum(-1), real("s").exp()), obs=torch.tensor(1.0))

    return pair(model, nothing, X[:2], loss=TraceEnum_ELBO(max_plate_nesting=1))


@refused
def too_little_nesting() -> Pair:
    return pair(mixture, auto.AutoNormal(continuous(mixture)), X, loss=TraceEnum_ELBO(max_plate_nesting=0))


@refused
def closed_kl_in_another_order() -> Pair:
    def model(x: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(a, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(b, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        b = pyro.sample("b", dist.Normal(real(), 1.0))
        pyro.sample("a", dist.Normal(b, 1.0))

    return pair(model, guide, X, loss=TraceMeanField_ELBO())


@refused
def closed_kl_of_another_pair() -> Pair:
    def model(x: Tensor) -> None:
        k = pyro.sample("k", dist.Categorical(torch.ones(3)))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    return pair(model, lambda x: pyro.sample("k", dist.Poisson(positive())), X, loss=TraceMeanField_ELBO())


@refused
def data_outside_the_support() -> Pair:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.LogNormal(real(), 1.0), obs=x)

    return pair(model, nothing, X)


@refused
def negative_scale() -> Pair:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, real("width", -1.0)), obs=x)

    return pair(model, nothing, X)


@refused
def missing_data_as_nan() -> Pair:
    return pair(mean_model, mean_guide, torch.where(X > 0, X, math.nan))


@refused
def factor_of_the_guide_without_a_word() -> Pair:
    def guide(x: Tensor) -> None:
        mean_guide(x)
        pyro.factor("penalty", -(real() ** 2))

    return pair(mean_model, guide, X)


@refused
def auxiliary_site_of_the_model() -> Pair:
    def guide(x: Tensor) -> None:
        pyro.sample("z", dist.Normal(real(), 1.0), infer={"is_auxiliary": True})

    return pair(mean_model, guide, X)


@refused
def key_that_is_missing() -> Pair:
    return pair(lambda x: mean_model({}["x"]), mean_guide, X)


@refused
def layer_of_another_size() -> Pair:
    network = nn.Linear(2, 1)
    return pair(lambda x: network(x), nothing, XS)


@refused
def layer_of_another_precision() -> Pair:
    network = nn.Linear(3, 1)
    return pair(lambda x: network(x), nothing, XS.double())


@refused
def mask_of_another_length() -> Pair:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)), poutine.mask(mask=torch.ones(5, dtype=torch.bool)):
            pyro.sample("x", dist.Normal(real(), 1.0), obs=x)

    return pair(model, nothing, X)


@refused
def auto_guide_of_a_discrete_latent() -> Pair:
    return pair(mixture, auto.AutoNormal(mixture), X, loss=TraceEnum_ELBO(max_plate_nesting=1))


@refused
def rank_that_particles_break() -> Pair:
    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(x @ z, 1.0), obs=x.sum(-1))

    def guide(x: Tensor) -> None:
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(3)), 1.0).to_event(1))

    return pair(model, guide, XS, loss=Trace_ELBO(2, max_plate_nesting=1, vectorize_particles=True))


@refused
def initial_value_outside_the_constraint() -> Pair:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, positive("width", -1.0)), obs=x)

    return pair(model, nothing, X)


# -- pairs with one mistake --------------------------------------------------------------------------------------------


@broken("z")
def forgotten_guide_site() -> Pair:
    return pair(local_model, nothing, X)


@broken("zz")
def misspelled_guide_site() -> Pair:
    return pair(mean_model, lambda x: pyro.sample("zz", dist.Normal(real(), 1.0)), X)


@broken("x")
def guide_that_draws_the_data() -> Pair:
    def guide(x: Tensor) -> None:
        mean_guide(x)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(torch.zeros(len(x)), 1.0))

    return pair(mean_model, guide, X)


@broken("x")
def forgotten_to_event() -> Pair:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(real(), torch.ones(3)), obs=x)

    return pair(model, nothing, XS)


@broken("x")
def forgotten_to_event_of_a_square() -> Pair:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(real(), torch.ones(3)), obs=x)

    return pair(model, nothing, XS[:3])


@broken("x")
def forgotten_plate() -> Pair:
    def model(x: Tensor) -> None:
        pyro.sample("x", dist.Normal(real(), torch.ones(3)).to_event(1), obs=x)

    return pair(model, nothing, XS)


@broken("x")
def plates_swapped() -> Pair:
    def model(x: Tensor) -> None:
        with pyro.plate("rows", len(x), dim=-1), pyro.plate("columns", 3, dim=-2):
            pyro.sample("x", dist.Normal(real(), 1.0), obs=x)

    return pair(model, nothing, XS)


@broken("z")
def another_plate_in_the_guide() -> Pair:
    def guide(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(real(), 1.0))

    return pair(local_model, guide, X)


@broken("x")
def batch_outside_its_plate() -> Pair:
    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), subsample_size=3) as rows:
            pass
        pyro.sample("x", dist.Normal(z, torch.ones(3)), obs=x[rows])

    return pair(model, mean_guide, X)


@broken("z")
def guide_that_is_not_scaled() -> Pair:
    return pair(poutine.scale(mean_model, 100.0), mean_guide, X)


@broken("z")
def subsample_of_the_model_alone() -> Pair:
    """The model weighs its local latents by the size of the data, the guide does not."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", 100, subsample=x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(real() * x, 1.0))

    return pair(model, guide, X)


@broken("width")
def scale_without_a_constraint() -> Pair:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(real(), real("width", 1.0)), obs=x)

    return pair(model, nothing, X)


@broken("z")
def network_that_gives_a_raw_scale() -> Pair:
    vae = VAE()
    nn.init.constant_(vae.encoder[-1].bias, 3.0)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", vae.encoder)
        with pyro.plate("data", len(x)):
            loc, raw = vae.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw).to_event(1))

    return pair(vae.model, guide, XS)


@broken("chance")
def probability_without_a_constraint() -> Pair:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Bernoulli(real("chance", 0.4)), obs=x)

    return pair(model, nothing, (X > 0).float())


@broken("weights")
def weights_without_a_constraint() -> Pair:
    def model(x: Tensor) -> None:
        weights = pyro.param("weights", torch.ones(3) / 3)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Categorical(weights), obs=x)

    return pair(model, nothing, (X > 0).long())


@broken("lost")
def parameter_that_nothing_uses() -> Pair:
    def guide(x: Tensor) -> None:
        real("lost")
        mean_guide(x)

    return pair(mean_model, guide, X)


@broken("cut")
def detached_parameter() -> Pair:
    def guide(x: Tensor) -> None:
        pyro.sample("z", dist.Normal(real() + real("cut").detach(), 1.0))

    return pair(mean_model, guide, X)


@broken("decoder")
def module_that_is_not_registered() -> Pair:
    vae = VAE()

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", vae.prior(x))
            pyro.sample("x", dist.Normal(vae.decoder(z), 0.5).to_event(1), obs=x)

    return pair(model, vae.guide, XS)


@broken("network")
def two_modules_of_one_name() -> Pair:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)

    def model(x: Tensor) -> None:
        pyro.module("network", first)
        pyro.module("network", second)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(second(first(x)), 1.0).to_event(1), obs=x)

    return pair(model, nothing, XS)


@broken("encoder")
def parameters_of_another_run() -> Pair:
    VAE().guide(XS)
    return vae_of_bound_methods()


@broken("loc")
def shape_of_another_run() -> Pair:
    pyro.param("loc", torch.zeros(3))

    def guide(x: Tensor) -> None:
        pyro.sample("z", dist.Normal(real().sum(), 1.0))

    return pair(mean_model, guide, X)


@broken("shift")
def tensor_that_is_no_parameter() -> Pair:
    shift = torch.zeros((), requires_grad=True)
    return pair(mean_model, lambda x: pyro.sample("z", dist.Normal(shift, positive())), X)


@broken("x")
def noise_outside_sample() -> Pair:
    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        noise = torch.randn(len(x))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z + noise, 0.1), obs=x)

    return pair(model, mean_guide, X)


@broken("z")
def draw_outside_sample() -> Pair:
    """The guide's density misses: a Delta at a draw has none."""

    def guide(x: Tensor) -> None:
        pyro.sample("z", dist.Delta(dist.Normal(real(), positive()).rsample()))

    return pair(mean_model, guide, X)


class Cut(dist.Normal):
    """Draws without a gradient, but says that they have one."""

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return super().rsample(sample_shape).detach()


@broken("z")
def draw_without_a_gradient() -> Pair:
    return pair(mean_model, lambda x: pyro.sample("z", Cut(real(), positive())), X)


@broken("z")
def latent_that_no_datum_sees() -> Pair:
    def model(x: Tensor) -> None:
        loc = torch.zeros(())
        pyro.sample("z", dist.Normal(loc, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, positive("width")), obs=x)

    return pair(model, mean_guide, X)


@broken("z")
def latent_that_is_detached() -> Pair:
    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z.detach(), 1.0), obs=x)

    return pair(model, mean_guide, X)


@broken("x")
def gray_values_for_bits() -> Pair:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.ContinuousBernoulli(logits=real()), obs=255 * x)

    return pair(model, nothing, X.abs().clamp(max=1))


@broken("y")
def labels_from_one() -> Pair:
    def model(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Categorical(logits=pyro.param("logits", torch.zeros(2))), obs=y)

    return pair(model, nothing, (X > 0).long() + 1)


@broken("rate")
def guide_on_reals_of_a_rate() -> Pair:
    return pair(gamma_model, lambda x: pyro.sample("rate", dist.Normal(real("loc", 1.0), 1.0)), X)


@broken("z")
def guide_on_half_of_the_reals() -> Pair:
    return pair(mean_model, lambda x: pyro.sample("z", dist.LogNormal(real(), positive())), X)


@broken("bias")
def frozen_parameter_of_a_pyro_module() -> Pair:
    class Frozen(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(()), requires_grad=False)

        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            return super().forward(x + self.bias, y)

    model = Frozen()
    return pair(model, auto.AutoNormal(model), XS, XS.sum(-1))


@broken("data")
def auto_guide_of_other_rows() -> Pair:
    rows = torch.arange(0, 8, 2)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample=rows):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    return pair(model, auto.AutoNormal(model), X)


class Doubled(dist.transforms.AffineTransform):
    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.zeros_like(x)


@broken("x")
def wrong_log_determinant() -> Pair:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            flow = dist.TransformedDistribution(dist.Normal(real(), 1.0).expand([8]), [Doubled(0.0, 2.0)])
            pyro.sample("x", flow, obs=x)

    return pair(model, nothing, X)


@broken("x")
def root_at_zero() -> Pair:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(real("root").sqrt(), 1.0), obs=x)

    return pair(model, nothing, X)


@broken("x")
def infinite_loss() -> Pair:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(real(), 1e-30), obs=x)

    return pair(model, nothing, X)


# -- the table ---------------------------------------------------------------------------------------------------------


def words_of_pyro(each: Pair) -> str:
    """What Pyro raises or warns about when the loss runs once under validation; empty if nothing."""
    folder = pyro.__path__[0]
    with pyro.validation_enabled(True), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            if each.guide is not None:
                loss = each.loss or Trace_ELBO()
                run = loss.loss_and_grads if isinstance(loss, ELBO) else loss
                run(each.model, each.guide, *each.args, **each.kwargs)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return next((str(warning.message) for warning in caught if warning.filename.startswith(folder)), "")


def examine(make: Make) -> tuple[dgm.diagnosis.Diagnosis, str]:
    """What the doctor finds, and what Pyro says, each of a pair made anew in a param store of its own."""
    pyro.set_rng_seed(0)
    with pyro.get_param_store().scope():
        each = make()
        found = dgm.doctor(each.model, each.guide, *each.args, loss=each.loss, **each.kwargs)
    pyro.set_rng_seed(0)
    with pyro.get_param_store().scope():
        return found, words_of_pyro(make())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="pairs to look at; default all")
    parser.add_argument("--verbose", action="store_true", help="print every finding, and Pyro's words")
    options = parser.parse_args()
    torch.set_num_threads(1)
    began, rows = time.process_time(), []
    kinds = {"correct": CORRECT, "refused": REFUSED, "broken": {name: make for name, (_, make) in BROKEN.items()}}
    for kind, pairs in kinds.items():
        said, errors, alone, missed = 0, 0, 0, []
        chosen = {name: make for name, make in pairs.items() if not options.names or name in options.names}
        for name, make in chosen.items():
            found, words = examine(make)
            where = BROKEN[name][0] if kind == "broken" else None
            grave = {f.severity for f in found.findings if where is None or f.where == where}
            said += bool(words)
            errors += "error" in grave
            alone += "error" not in grave and "warning" in grave
            if ("error" in grave) if kind == "correct" else not grave & {"error", "warning"}:
                missed.append(name)
            if options.verbose:
                print(f"\n{kind}: {name}\n{found}\nPyro: {words[:200] or 'nothing'}")
        rows.append([kind, *map(str, (len(chosen), said, errors, alone, len(chosen) - errors - alone))])
        if missed:
            print(f"{'false alarms' if kind == 'correct' else 'missed'}: {', '.join(missed)}")
    print(Table(["pairs", "number", "Pyro speaks", "an error", "a warning alone", "neither"], rows).markdown())
    print(f"{time.process_time() - began:.0f} seconds of processor time")


if __name__ == "__main__":
    main()
