"""NUTS: the posterior of a linear-Gaussian program, and what it refuses."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import CASES
from test_evaluation import linear_vae

import dgm_pyro as dgm
from dgm_pyro.infer import Chains, nuts

pytestmark = pytest.mark.usefixtures("float64")


def effective_size(draws):
    """Number of independent draws worth as much, per column of ``(S, B)``, by batch means of 25."""
    means = draws.reshape(-1, 25, draws.shape[1]).mean(1)
    return len(draws) * draws.var(0) / (25 * means.var(0))


def test_the_posterior_of_a_linear_vae():
    program, exact = linear_vae()
    x = exact.sample((3,))
    z = nuts(program, x, 400, 60, num_chains=1, max_tree_depth=3, seed=1)["z"].squeeze(-1)
    precision = 1 + (0.9**2 + 0.4**2) / 0.25
    mean, variance = x @ torch.tensor([0.9, -0.4]) / 0.25 / precision, 1 / precision
    size = effective_size(z)
    assert size.min() > 100
    assert ((z.mean(0) - mean).abs() < 4.5 * (variance / size).sqrt()).all()
    assert ((z.var(0) / variance - 1).abs() < 4.5 * (2 / size).sqrt()).all()
    covariance = torch.cov(z.T) - torch.diag(z.var(0))
    assert covariance.abs().max() < 4.5 * variance / math.sqrt(size.min())  # data are independent


def test_every_site_of_a_hierarchy_and_parameters_untouched():
    case = CASES["vae-two-levels"]
    program = case.build().train()
    x, _ = case.draw(program, 2)
    state = torch.get_rng_state()
    draws = nuts(program, x, 4, 4, num_chains=2).samples
    assert {name: tuple(value.shape) for name, value in draws.items()} == {"z": (2, 4, 2, 2), "z2": (2, 4, 2, 1)}
    assert program.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in program.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def rotated(size=3):
    """A Normal with covariances and unequal scales, and its posterior as a Pyro model."""
    torch.manual_seed(2)
    factor = torch.randn(size, size).tril(-1) + torch.diag(torch.tensor([0.1, 1.0, 5.0]))
    exact = dist.MultivariateNormal(torch.tensor([1.0, -2.0, 3.0]), scale_tril=factor)
    return exact, dgm.Posterior(lambda: pyro.sample("z", exact))


def test_a_normal_with_covariances():
    exact, posterior = rotated()
    chains = nuts(posterior, num_samples=250, warmup=200, seed=3)
    found = chains.diagnostics()
    size = found["ess_bulk"]["z"]
    assert (found["r_hat"]["z"] < 1.02).all()
    assert size.min() > 300
    assert not chains.diverging.any()
    white = torch.linalg.solve_triangular(exact.scale_tril, (chains["z"] - exact.mean).mT, upper=False).mT
    products = white.unsqueeze(-1) * white.unsqueeze(-2)
    for values, mean in ((white, torch.zeros(3)), (products.flatten(1), torch.eye(3).flatten())):
        error = (values.var(0) / effective_size(values)).sqrt()
        assert ((values.mean(0) - mean).abs() < 4.5 * error).all()


def test_effective_sizes_are_those_of_arviz():
    import arviz

    _, posterior = rotated()
    chains = nuts(posterior, num_samples=60, warmup=60, seed=3)
    theirs = arviz.summary(chains.to_arviz(), round_to="none")
    ours = chains.diagnostics()
    for measure in ("ess_bulk", "ess_tail", "r_hat", "mean"):
        assert torch.allclose(ours[measure]["z"], torch.tensor(theirs[measure].to_numpy()), rtol=1e-6)
    assert torch.allclose(chains.bfmi, torch.as_tensor(arviz.bfmi(chains.to_arviz())), rtol=1e-6)


def test_a_funnel_diverges_and_says_so():
    def funnel():
        v = pyro.sample("v", dist.Normal(torch.zeros(()), 3.0))
        pyro.sample("z", dist.Normal(torch.zeros(5), (v / 2).exp()).to_event(1))

    chains = nuts(dgm.Posterior(funnel), num_samples=60, warmup=60, seed=1)
    assert chains.diverging.any() or chains.bfmi.min() < 0.5
    assert f"{int(chains.diverging.sum())} divergences" in str(chains)


def chains_of(z, diverging=0):
    """Chains ``(C, S)`` of one latent, of which ``diverging`` trajectories were given up."""
    given_up = (torch.arange(z.numel()) < diverging).reshape(z.shape)
    energy = torch.randn(z.shape, generator=torch.Generator().manual_seed(2))
    return Chains({"z": z}, z.unsqueeze(-1), given_up, torch.ones_like(z), energy, torch.ones(len(z)), 1, 1.0)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # ArviZ divides by the variance of a constant
def test_what_makes_chains_doubtful():
    z = torch.randn(4, 500, generator=torch.Generator().manual_seed(1))
    assert chains_of(z).faults() == []
    assert chains_of(z, 3).faults() == ["divergent trajectories: 3"]
    assert chains_of(torch.ones(4, 500)).faults()[0].startswith("R-hat is nan")
    apart = chains_of(z + 3 * torch.arange(4.0).unsqueeze(-1))
    r_hat, size = apart.faults()
    assert r_hat.startswith("R-hat is ")
    assert size.startswith("the bulk ESS is ")
    assert size.endswith("below 400")
    assert apart.worst()["r_hat"] == float(apart.diagnostics()["r_hat"]["z"]) > 1.5
    assert f"R-hat at most {apart.worst()['r_hat']:.3f}" in str(apart)


def test_chains_are_those_of_a_seed():
    _, posterior = rotated()
    one, same, other = (nuts(posterior, num_samples=5, warmup=5, seed=seed).u for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert not torch.equal(one[0], one[1])


def test_what_it_refuses():
    case = CASES["vae-bit-latent"]
    program = case.build()
    with pytest.raises(ValueError, match="latents 'z' are discrete"):
        nuts(program, torch.zeros(2, 2), 3, 3)
    with pytest.raises(ValueError, match="no latents"):
        nuts(dgm.Normal(2), torch.zeros(2, 2), 3, 3)
    _, posterior = rotated()
    with pytest.raises(TypeError, match="a Posterior has its own data"):
        nuts(posterior, torch.zeros(2, 2))
    with pytest.raises(TypeError, match="needs data: pass x"):
        nuts(program)
