"""NUTS: the posterior of a linear-Gaussian program, and what it refuses."""

import math

import pytest
import torch
from programs import CASES
from test_evaluation import linear_vae

import dgm_pyro as dgm
from dgm_pyro.infer import nuts

pytestmark = pytest.mark.usefixtures("float64")


def effective_size(draws):
    """Number of independent draws worth as much, per column of ``(S, B)``, by batch means of 25."""
    means = draws.reshape(-1, 25, draws.shape[1]).mean(1)
    return len(draws) * draws.var(0) / (25 * means.var(0))


def test_the_posterior_of_a_linear_vae():
    program, exact = linear_vae()
    x = exact.sample((3,))
    z = nuts(program, x, 400, 60, max_tree_depth=3, seed=1)["z"].squeeze(-1)
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
    draws = nuts(program, x, 4, 4)
    assert {name: tuple(value.shape) for name, value in draws.items()} == {"z": (4, 2, 2), "z2": (4, 2, 1)}
    assert program.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in program.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_what_it_refuses():
    case = CASES["vae-bit-latent"]
    program = case.build()
    with pytest.raises(ValueError, match="latents 'z' are discrete"):
        nuts(program, torch.zeros(2, 2), 3, 3)
    with pytest.raises(ValueError, match="no latents"):
        nuts(dgm.Normal(2), torch.zeros(2, 2), 3, 3)
