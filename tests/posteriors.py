"""Small Pyro models with data, of the kinds that people bring: `MODELS`, by name a model and its arguments."""

import functools
import math

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.reparam import LocScaleReparam, StableReparam, TransformReparam
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn

MODELS = {}

# Outside of the models, so that the same model has the same data whatever runs before it.
torch_state = torch.get_rng_state()
torch.manual_seed(7)
X = torch.randn(12, 2, dtype=torch.float64)
Y = X @ torch.tensor([0.8, -0.5], dtype=torch.float64) + 0.3 * torch.randn(12, dtype=torch.float64)
WALK = torch.randn(6, dtype=torch.float64).cumsum(0)
COUNTS = torch.tensor([0, 3, 1, 0, 7, 2, 0, 4, 1, 0, 2, 5])
GROUP = torch.tensor([0, 0, 1, 1, 2, 2, 0, 1, 2, 0, 1, 2])
SHARES = torch.softmax(torch.randn(5, 3, dtype=torch.float64), -1)
torch.set_rng_state(torch_state)

BITS = (Y > 0).double()
EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], dtype=torch.float64)
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], dtype=torch.float64)


def model(*args, name=None, **kwargs):
    def add(function):
        MODELS[name or function.__name__.replace("_", "-")] = (function, args, kwargs)
        return function

    return add


def zeros(*shape):
    return torch.zeros(shape, dtype=torch.float64)


def ones(*shape):
    return torch.ones(shape, dtype=torch.float64)


def flat(name, size):
    return pyro.sample(name, dist.ImproperUniform(constraints.real_vector, (), (size,)))


# -- regressions -------------------------------------------------------------------------------------------------------


@model(EFFECTS, ERRORS)
def eight_schools_centered(y, sigma):
    mu = pyro.sample("mu", dist.Normal(zeros(), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0 * ones()))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


@model(EFFECTS, ERRORS)
def eight_schools(y, sigma):
    mu = pyro.sample("mu", dist.Normal(zeros(), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0 * ones()))
    with pyro.plate("schools", len(y)):
        raw = pyro.sample("raw", dist.Normal(zeros(), 1.0))
        theta = pyro.deterministic("theta", mu + tau * raw)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


MODELS["reparameterized-centered"] = (
    poutine.reparam(eight_schools_centered, {"theta": LocScaleReparam(0.0)}), (EFFECTS, ERRORS), {})  # fmt: skip
MODELS["reparameterized-half"] = (
    poutine.reparam(eight_schools_centered, {"theta": LocScaleReparam(0.5)}), (EFFECTS, ERRORS), {})  # fmt: skip
MODELS["conditioned"] = (poutine.condition(eight_schools_centered, {"tau": ones()}), (EFFECTS,), {"sigma": ERRORS})
MODELS["scaled"] = (poutine.scale(eight_schools, 0.3), (EFFECTS, ERRORS), {})
MODELS["do"] = (poutine.do(eight_schools, {"mu": ones()}), (EFFECTS, ERRORS), {})


@model(X, Y)
def flat_regression(x, y):
    beta = flat("beta", 2)
    sigma = pyro.sample("sigma", dist.ImproperUniform(constraints.positive, (), ()))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)


@model(X, BITS)
def logistic_regression(x, y):
    beta = pyro.sample("beta", dist.Normal(zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=x @ beta), obs=y)


@model(X, COUNTS)
def poisson_regression(x, y):
    beta = pyro.sample("beta", dist.MultivariateNormal(zeros(2), torch.eye(2, dtype=torch.float64)))
    pyro.sample("y", dist.Poisson((x @ beta).exp()).to_event(1), obs=y)


@model(X, COUNTS)
def negative_binomial(x, y):
    beta = pyro.sample("beta", dist.Normal(zeros(2), 1.0).to_event(1))
    size = pyro.sample("size", dist.Gamma(2.0 * ones(), 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.NegativeBinomial(size, logits=x @ beta), obs=y)


@model(COUNTS)
def zero_inflated_poisson(y):
    gate = pyro.sample("gate", dist.Beta(ones(), 1.0))
    rate = pyro.sample("rate", dist.Exponential(ones()))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.ZeroInflatedPoisson(rate, gate=gate), obs=y)


@model(X, Y)
def robust_regression(x, y):
    beta = pyro.sample("beta", dist.Cauchy(zeros(2), 2.5).to_event(1))
    df = pyro.sample("df", dist.Gamma(2.0 * ones(), 0.1))
    scale = pyro.sample("scale", dist.InverseGamma(3.0 * ones(), 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.StudentT(df, x @ beta, scale), obs=y)


@model(X, Y)
def horseshoe(x, y):
    tau = pyro.sample("tau", dist.HalfCauchy(ones()))
    local = pyro.sample("local", dist.HalfCauchy(ones(2)).to_event(1))
    beta = pyro.sample("beta", dist.Normal(zeros(2), tau * local).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(zeros(), 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)


@model(X[:, 0], Y, GROUP)
def radon(x, y, group):
    mu = pyro.sample("mu", dist.Normal(zeros(), 10.0))
    tau = pyro.sample("tau", dist.HalfNormal(ones()))
    slope = pyro.sample("slope", dist.Normal(zeros(), 10.0))
    with pyro.plate("county", 3):
        intercept = pyro.sample("intercept", dist.Normal(mu, tau))
    sigma = pyro.sample("sigma", dist.HalfNormal(ones()))
    with pyro.plate("houses", len(y)):
        pyro.sample("y", dist.Normal(intercept[group] + slope * x, sigma), obs=y)


@model(X[:, 0], Y, GROUP)
def correlated_effects(x, y, group):
    correlation = pyro.sample("correlation", dist.LKJCholesky(2, 2.0 * ones()))
    scales = pyro.sample("scales", dist.HalfNormal(ones(2)).to_event(1))
    factor = scales.diag_embed() @ correlation
    with pyro.plate("group", 3):
        effects = pyro.sample("effects", dist.MultivariateNormal(zeros(2), scale_tril=factor))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(effects[group, 0] + effects[group, 1] * x, 1.0), obs=y)


@model(X, GROUP)
def ordinal_regression(x, y):
    beta = pyro.sample("beta", dist.Normal(zeros(2), 1.0).to_event(1))
    cuts = pyro.sample("cuts", dist.ImproperUniform(constraints.ordered_vector, (), (2,)))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.OrderedLogistic(x @ beta, cuts), obs=y)


@model(X, Y)
def gaussian_process(x, y):
    length = pyro.sample("length", dist.Gamma(25.0 * ones(), 4.0))
    alpha = pyro.sample("alpha", dist.HalfNormal(2.0 * ones()))
    sigma = pyro.sample("sigma", dist.HalfNormal(ones()))
    distance = torch.cdist(x, x).square()
    kernel = alpha**2 * (-distance / (2 * length**2)).exp() + sigma * torch.eye(len(y), dtype=y.dtype)
    pyro.sample("y", dist.MultivariateNormal(zeros(len(y)), kernel), obs=y)


@model(X, Y)
def latent_gaussian_process(x, y):
    length = pyro.sample("length", dist.Uniform(0.1 * ones(), 3.0))
    kernel = (-torch.cdist(x, x).square() / length).exp() + 0.1 * torch.eye(len(y), dtype=y.dtype)
    f = pyro.sample("f", dist.MultivariateNormal(zeros(len(y)), kernel))
    pyro.sample("y", dist.Poisson(f.exp()).to_event(1), obs=COUNTS)


# -- hierarchies, tables, covariances ----------------------------------------------------------------------------------


@model(COUNTS[:4].double(), torch.tensor([9.0, 9.0, 9.0, 9.0], dtype=torch.float64))
def baseball(hits, at_bats):
    m = pyro.sample("m", dist.Uniform(zeros(), 1.0))
    kappa = pyro.sample("kappa", dist.Pareto(ones(), 1.5))
    with pyro.plate("players", 4):
        chance = pyro.sample("chance", dist.Beta(m * kappa, (1 - m) * kappa))
        pyro.sample("hits", dist.Binomial(at_bats, chance), obs=hits)


@model(BITS[:6].reshape(2, 3))
def item_response(answers):
    scale = pyro.sample("scale", dist.LogNormal(zeros(), 1.0))
    with pyro.plate("person", 3, dim=-1):
        ability = pyro.sample("ability", dist.Normal(zeros(), 1.0))
    with pyro.plate("item", 2, dim=-2):
        difficulty = pyro.sample("difficulty", dist.Normal(zeros(), scale))
        with pyro.plate("person again", 3, dim=-1):
            pyro.sample("answer", dist.Bernoulli(logits=ability - difficulty), obs=answers)


@model(torch.tensor([4.0, 1.0, 2.0], dtype=torch.float64))
def dirichlet_multinomial(counts):
    share = pyro.sample("share", dist.Dirichlet(ones(3)))
    pyro.sample("counts", dist.Multinomial(7, share), obs=counts)


@model(SHARES)
def dirichlet_likelihood(shares):
    with pyro.plate("parts", 3):
        concentration = pyro.sample("concentration", dist.Gamma(ones(), 1.0))
    with pyro.plate("data", len(shares)):
        pyro.sample("shares", dist.Dirichlet(concentration), obs=shares)


@model(X)
def covariance_by_lkj(x):
    correlation = pyro.sample("correlation", dist.LKJ(2, ones()))
    scales = pyro.sample("scales", dist.LogNormal(zeros(2), 1.0).to_event(1))
    covariance = scales.unsqueeze(-1) * correlation * scales
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.MultivariateNormal(zeros(2), covariance), obs=x)


@model(X)
def precision_by_wishart(x):
    precision = pyro.sample("precision", dist.Wishart(4.0 * ones(), torch.eye(2, dtype=torch.float64)))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.MultivariateNormal(zeros(2), precision_matrix=precision), obs=x)


@model(X)
def improper_cholesky_factor(x):
    factor = pyro.sample("factor", dist.ImproperUniform(constraints.lower_cholesky, (), (2, 2)))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.MultivariateNormal(zeros(2), scale_tril=factor), obs=x)


@model(Y)
def bounded_by_a_latent(y):
    high = pyro.sample("high", dist.Pareto(2.0 * ones(), 1.0))
    with pyro.plate("two", 2):
        low = pyro.sample("low", dist.Uniform(-high, high))
    pyro.sample("y", dist.Normal(low.sum(), 1.0).expand([len(y)]).to_event(1), obs=y)


@model(Y)
def directions(y):
    angle = pyro.sample("angle", dist.VonMises(zeros(), 2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(angle.cos(), 1.0), obs=y)


# -- time --------------------------------------------------------------------------------------------------------------


@model(WALK)
def autoregression(y):
    alpha = pyro.sample("alpha", dist.Normal(zeros(), 10.0))
    beta = pyro.sample("beta", dist.Normal(zeros(2), 10.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5 * ones()))
    with pyro.plate("times", len(y) - 2):
        pyro.sample("y", dist.Normal(alpha + beta[0] * y[1:-1] + beta[1] * y[:-2], sigma), obs=y[2:])


@model(WALK)
def stochastic_volatility(y):
    step = pyro.sample("step", dist.HalfNormal(ones()))
    h = zeros()
    for t in pyro.markov(range(len(y))):
        h = pyro.sample(f"h_{t}", dist.Normal(h, step))
        pyro.sample(f"y_{t}", dist.Normal(0.0, (h / 2).exp()), obs=y[t])


@model(WALK)
def sequential_plate(y):
    mu = pyro.sample("mu", dist.Normal(zeros(), 1.0))
    for t in pyro.plate("t", len(y)):
        pyro.sample(f"y_{t}", dist.Normal(mu, 1.0), obs=y[t])


@model(WALK)
def random_walk(y):
    scale = pyro.sample("scale", dist.LogNormal(zeros(), 1.0))
    walk = pyro.sample("walk", dist.GaussianRandomWalk(scale, len(y)) if hasattr(dist, "GaussianRandomWalk")
                       else dist.Normal(zeros(len(y)), scale).to_event(1))  # fmt: skip
    pyro.sample("y", dist.Normal(walk, 1.0).to_event(1), obs=y)


@model(torch.tensor([[3.0, 0.4], [3.5, 0.5], [3.6, 0.8]], dtype=torch.float64))
def lotka_volterra(y):
    rates = pyro.sample("rates", dist.LogNormal(torch.tensor([-0.5, -3.0, -0.5, -3.0]).double(), 0.5).to_event(1))
    state = pyro.sample("start", dist.LogNormal(zeros(2), 1.0).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(-ones(2), 1.0).to_event(1))
    for t in range(len(y)):
        pyro.sample(f"y_{t}", dist.LogNormal(state.log(), sigma).to_event(1), obs=y[t])
        for _ in range(5):
            u, v = state.unbind(-1)
            change = torch.stack([(rates[0] - rates[1] * v) * u, (rates[3] * u - rates[2]) * v], -1)
            state = state + 0.05 * change


# -- factors, masks, subsamples, missing values ------------------------------------------------------------------------


@model(X[:, 0].exp(), BITS)
def censored_survival(times, died):
    shape = pyro.sample("shape", dist.LogNormal(zeros(), 1.0))
    scale = pyro.sample("scale", dist.LogNormal(zeros(), 1.0))
    log_hazard = shape.log() - scale.log() + (shape - 1) * (times.log() - scale.log())
    with pyro.plate("patients", len(times)):
        pyro.factor("survival", died * log_hazard - (times / scale) ** shape)


@model(Y)
def masked_likelihood(y):
    mu = pyro.sample("mu", dist.Normal(zeros(), 1.0))
    with pyro.plate("data", len(y)), poutine.mask(mask=y > 0):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


@model(Y)
def partly_observed(y):
    mu = pyro.sample("mu", dist.Normal(zeros(), 1.0))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(mu, 1.0), obs=y, obs_mask=y > 0)
        pyro.sample("next", dist.Normal(z, 1.0), obs=y + 1)


@model(Y)
def partly_observed_positive(y):
    rate = pyro.sample("rate", dist.Exponential(ones()))
    with pyro.plate("data", len(y)):
        pyro.sample("z", dist.Exponential(rate), obs=y.abs(), obs_mask=y > 0)


@model(Y)
def masked_prior(y):
    with poutine.mask(mask=False):
        mu = pyro.sample("mu", dist.Normal(zeros(), 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


@model(Y)
def subsampled(y):
    mu = pyro.sample("mu", dist.Normal(zeros(), 1.0))
    with pyro.plate("data", len(y), subsample_size=4) as rows:
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y[rows])


@model(Y)
def subsampled_by_the_user(y):
    mu = pyro.sample("mu", dist.Normal(zeros(), 1.0))
    with pyro.plate("data", len(y), subsample=torch.tensor([1, 5])) as rows:
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y[rows])


@model(Y)
def funnel(y):
    v = pyro.sample("v", dist.Normal(zeros(), 3.0))
    with pyro.plate("nine", 3):
        pyro.sample("z", dist.Normal(zeros(), (v / 2).exp()))


@model(Y)
def banana(y):
    a = pyro.sample("a", dist.Normal(zeros(), 1.0))
    pyro.sample("b", dist.Normal(a**2, 0.3))


# -- discrete latents, summed out --------------------------------------------------------------------------------------


@model(Y)
def mixture(y):
    weights = pyro.sample("weights", dist.Dirichlet(ones(2)))
    with pyro.plate("components", 2):
        loc = pyro.sample("loc", dist.Normal(zeros(), 2.0))
    with pyro.plate("data", len(y)):
        k = pyro.sample("k", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(loc[k], 0.5), obs=y)


@model(Y)
def ordered_mixture(y):
    loc = pyro.sample("loc", dist.TransformedDistribution(
        dist.Normal(zeros(2), 1.0).to_event(1), dist.transforms.OrderedTransform()))  # fmt: skip
    scale = pyro.sample("scale", dist.HalfNormal(2.0 * ones(2)).to_event(1))
    theta = pyro.sample("theta", dist.Beta(5.0 * ones(), 5.0))
    parts = dist.Normal(loc, scale)
    mixed = dist.MixtureSameFamily(dist.Categorical(torch.stack([theta, 1 - theta], -1)), parts)
    with pyro.plate("data", len(y)):
        pyro.sample("y", mixed, obs=y)


@model(WALK)
def hidden_markov(y):
    with pyro.plate("states", 2):
        rows = pyro.sample("rows", dist.Dirichlet(ones(2)))
        loc = pyro.sample("loc", dist.Normal(zeros(), 1.0))
    k = 0
    for t in pyro.markov(range(len(y))):
        k = pyro.sample(f"k_{t}", dist.Categorical(rows[k]))
        pyro.sample(f"y_{t}", dist.Normal(loc[k], 1.0), obs=y[t])


@model(X, BITS)
def spike_and_slab(x, y):
    with pyro.plate("features", 2):
        used = pyro.sample("used", dist.Bernoulli(0.3 * ones()))
        beta = pyro.sample("beta", dist.Normal(zeros(), 0.1 + used))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=x @ beta.new_ones(2)), obs=y)


@model(Y)
def one_switch(y):
    chance = pyro.sample("chance", dist.Beta(ones(), 1.0))
    side = pyro.sample("side", dist.Bernoulli(chance))
    mu = pyro.sample("mu", dist.Normal(2 * side - 1, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


# -- modules, parameters, reparameterizations --------------------------------------------------------------------------


class BayesianNetwork(PyroModule):
    def __init__(self):
        super().__init__()
        self.hidden = PyroModule[nn.Linear](2, 3)
        self.hidden.weight = PyroSample(dist.Normal(zeros(), 1.0).expand([3, 2]).to_event(2))
        self.hidden.bias = PyroSample(dist.Normal(zeros(), 1.0).expand([3]).to_event(1))
        self.out = nn.Linear(3, 1).double()
        self.noise = PyroParam(ones(), constraint=constraints.positive)

    def forward(self, x, y):
        mean = self.out(self.hidden(x).tanh()).squeeze(-1)
        with pyro.plate("data", len(y)):
            return pyro.sample("y", dist.Normal(mean, self.noise), obs=y)


with torch.random.fork_rng():
    MODELS["bayesian-network"] = (BayesianNetwork(), (X, Y), {})


@model(Y)
def with_parameters(y):
    prior = pyro.param("posterior_test_scale", 2.0 * ones(), constraint=constraints.positive)
    mu = pyro.sample("mu", dist.Normal(zeros(), prior))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Laplace(mu, 1.0), obs=y)


@model(Y, name="transformed")
@poutine.reparam(config={"scale": TransformReparam()})
def transformed(y):
    scale = pyro.sample("scale", dist.TransformedDistribution(
        dist.Normal(zeros(), 1.0), dist.transforms.ExpTransform()))  # fmt: skip
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(0.0, scale), obs=y)


@model(Y, name="heavy-tails")
@poutine.reparam(config={"z": StableReparam()})
def heavy_tails(y):
    z = pyro.sample("z", dist.Stable(1.5 * ones(), 0.3, 1.0, 0.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def lifted(y):
    loc = pyro.param("posterior_test_loc", zeros())
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


MODELS["lifted"] = (poutine.lift(lifted, prior={"posterior_test_loc": dist.Normal(zeros(), 1.0)}), (Y,), {})


def keyword_only(*, y, scale=1.0):
    mu = pyro.sample("mu", dist.Normal(zeros(), scale))
    pyro.sample("y", dist.Normal(mu, 1.0).expand([len(y)]).to_event(1), obs=y)


MODELS["partial"] = (functools.partial(keyword_only, scale=2.0), (), {"y": Y})


# -- what torch.func.vmap refuses --------------------------------------------------------------------------------------


@model(Y)
def branches_on_a_value(y):
    mu = pyro.sample("mu", dist.Normal(zeros(), 1.0))
    scale = 1.0 if mu > 0 else 2.0
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, scale), obs=y)


@model(Y)
def reads_a_number(y):
    mu = pyro.sample("mu", dist.Normal(zeros(), 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, math.exp(0.1 * float(mu.detach()))), obs=y)
