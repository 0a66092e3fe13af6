"""Guides along plates: exact for a hierarchical Normal, independent where the model is, amortized by covariates."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import dgm_pyro as dgm
from dgm_pyro.families.hierarchical import Group
from dgm_pyro.infer import psis, train_guide

pytestmark = pytest.mark.usefixtures("float64")

Y = torch.tensor([2.4, 0.3, -0.9, 1.6], dtype=torch.float64)
SD = 0.7


def means(y):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(()), 1.0))
    with pyro.plate("groups", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(theta, SD), obs=y)


EVIDENCE = dist.MultivariateNormal(
    torch.zeros(4, dtype=torch.float64), torch.ones(4, 4).double() + (1 + SD**2) * torch.eye(4).double()
).log_prob(Y)


@pytest.mark.parametrize("covariates", [None, {"groups": Y}], ids=["own", "amortized"])
def test_the_posterior_of_a_hierarchical_normal_is_found(covariates):
    guide = dgm.guides.auto(means, "meanfield", structure="plates", covariates=covariates)
    posterior = dgm.Posterior(means, Y)
    train_guide(posterior, guide, gradient_steps=200, lr=0.03)
    found = psis(posterior, guide=guide, num_particles=2000)
    # A mean field of all five loses half the log of the precisions' product over their determinant.
    precision = torch.diag(torch.tensor([5.0, *[1 + 1 / SD**2] * 4]))
    precision[0, 1:] = precision[1:, 0] = -1.0
    assert 0.5 * (precision.diagonal().log().sum() - precision.logdet()) > 0.15
    assert EVIDENCE - found.elbo < 0.03
    assert abs(found.log_evidence - EVIDENCE) < 4.5 * found.stderr + 1e-3
    assert found.stderr < 0.01


def nested(y):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("rows", 3, dim=-2):
        row = pyro.sample("row", dist.Normal(mu.sum(), 1.0))
        with pyro.plate("columns", 2, dim=-1):
            both = pyro.sample("both", dist.Normal(row, 1.0).expand([3, 2]))
            pyro.sample("scale", dist.Gamma(torch.ones(3, 2), 1.0))
            pyro.sample("y", dist.Normal(both, 1.0), obs=y)


def stirred(guide):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return guide


def test_elements_depend_on_what_is_above_them_alone():
    y = torch.zeros(3, 2)
    guide = dgm.guides.auto(nested, "fullrank", structure="plates")
    guide(y)
    q = stirred(guide).get_posterior(y)
    u = q.rsample()
    hessian = torch.autograd.functional.hessian(q.log_prob, u)
    # u holds mu (2), row (3), both (3 x 2), scale (3 x 2).
    owner = torch.tensor([-1, -1, 0, 1, 2, *[0, 0, 1, 1, 2, 2] * 2])
    cell = torch.tensor([-1] * 5 + [*range(6)] * 2)
    apart = (owner.unsqueeze(-1) != owner) & (owner.unsqueeze(-1) >= 0) & (owner >= 0)
    apart |= (cell.unsqueeze(-1) != cell) & (cell.unsqueeze(-1) >= 0) & (cell >= 0)
    assert (hessian[apart] == 0).all()
    assert (hessian[~apart] != 0).all()


def test_the_network_of_covariates_does_not_grow_with_the_plate():
    sizes = []
    for number in (4, 9):
        y = torch.linspace(-1, 1, number)
        guide = dgm.guides.auto(means, "meanfield", structure="plates", covariates={"groups": y})
        guide(y)
        sizes.append(sum(p.numel() for p in guide.parameters()))
    assert sizes[0] == sizes[1]


def test_elements_of_crossed_plates():
    both = Group(("a", "b"), (2, 3), torch.arange(6).reshape(6, 1))
    assert both.elements_of(Group(("a",), (2,), torch.zeros(2, 1))).tolist() == [0, 0, 0, 1, 1, 1]
    assert both.elements_of(Group(("b",), (3,), torch.zeros(3, 1))).tolist() == [0, 1, 2, 0, 1, 2]
    assert both.elements_of(Group((), (), torch.zeros(1, 1))).tolist() == [0] * 6


def test_what_does_not_fit():
    with pytest.raises(ValueError, match="structure must be one of plates"):
        dgm.guides.auto(means, structure="tree")
    with pytest.raises(ValueError, match="pass structure='plates' too"):
        dgm.guides.auto(means, covariates={"groups": Y})
    with pytest.raises(ValueError, match="with structure='plates', q must be one of"):
        dgm.guides.auto(means, "AutoNormal", structure="plates")
    for covariates in ({"groups": Y[:3]}, {"group": Y}):
        with pytest.raises(ValueError, match=r"rows, but the latents are in groups of 4"):
            dgm.guides.auto(means, structure="plates", covariates=covariates)(Y)


# -- restarts ----------------------------------------------------------------------------------------------------------


def two_modes():
    z = pyro.sample("z", dist.Normal(torch.zeros(()), 10.0))
    parts = torch.stack([dist.Normal(-1.5, 0.3).log_prob(z) + math.log(0.2), dist.Normal(1.5, 0.3).log_prob(z)])
    pyro.factor("modes", parts.logsumexp(0))


def test_the_best_of_several_fits_is_kept():
    posterior, single = dgm.Posterior(two_modes), []
    for start in range(2):
        guide = dgm.guides.auto(two_modes, "meanfield")
        guide.start = start
        single.append(train_guide(posterior, guide, gradient_steps=20, seed=start))
    assert max(run[-1] for run in single) - min(run[-1] for run in single) > 1  # not all find the large mode
    guide = dgm.guides.auto(two_modes, "meanfield")
    values = train_guide(posterior, guide, gradient_steps=20, restarts=2)
    assert values[-1] == pytest.approx(max(run[-1] for run in single), abs=0.1)
    assert guide.median()["z"] > 1
    with pytest.raises(ValueError, match="never been called"):
        train_guide(posterior, guide, restarts=2)


@pytest.mark.parametrize("name", ["elbo", "iwae:16", "stl", "dreg:16", "rws:16"])
def test_objectives_by_name(name):
    posterior, guide = dgm.Posterior(means, Y), dgm.guides.auto(means, "fullrank")
    assert train_guide(posterior, guide, objective=name, gradient_steps=3)[-1] < EVIDENCE + 1
