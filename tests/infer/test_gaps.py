"""Gaps of linear-Gaussian VAEs, where the evidence, the posterior and the best q of a family are known."""

import math

import pyro.distributions as dist
import pytest
import torch
from torch import nn

import dgm_pyro as dgm
from dgm_pyro import flow
from dgm_pyro.families.conditionals import inverse_softplus

NOISE = 0.5
CORRELATED = torch.tensor([[1.0, 0.8], [0.9, 0.9], [-0.3, 0.2]])
ORTHOGONAL = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])


def linear(weight, bias):
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return layer


def posterior(weight):
    """Precision and, for a bias of zero, the map from x to the mean of p(z | x)."""
    precision = torch.eye(2) + weight.T @ weight / NOISE**2
    return precision, torch.linalg.solve(precision, weight.T / NOISE**2)


def likelihood(weight):
    scale = torch.full((3,), inverse_softplus(NOISE))
    return dgm.Normal(3, linear(torch.cat([weight, torch.zeros(3, 2)]), torch.cat([torch.zeros(3), scale])))


def mean_field(weight, shift=0.0, widen=1.0):
    """The best mean-field guide, or one moved by ``shift`` and widened."""
    precision, to_mean = posterior(weight)
    scales = widen * precision.diagonal().rsqrt()
    raw = torch.tensor([inverse_softplus(float(scale)) for scale in scales])
    network = linear(torch.cat([to_mean, torch.zeros(2, 3)]), torch.cat([torch.full((2,), shift), raw]))
    return dgm.Normal(2, network)


def vae(weight, encoder):
    return dgm.VAE(dgm.Normal(2), likelihood(weight), encoder).double()


def exact(weight, x):
    covariance = weight @ weight.T + NOISE**2 * torch.eye(3)
    return torch.distributions.MultivariateNormal(torch.zeros(3).double(), covariance.double()).log_prob(x)


def mean_field_gap(weight):
    """KL of the best mean-field Normal from the posterior: its scales are those of the precision's diagonal."""
    precision = posterior(weight)[0].double()
    return 0.5 * float(precision.diagonal().log().sum() - precision.logdet())


@pytest.fixture
def x():
    torch.manual_seed(3)
    return (torch.randn(12, 2) @ CORRELATED.T + NOISE * torch.randn(12, 3)).double()


OPTIONS = {"num_particles": 2000, "num_temperatures": 0, "num_samples": 512}


def test_a_family_with_the_posterior_in_it_has_no_gaps(x):
    found = dgm.infer.gaps(vae(ORTHOGONAL, mean_field(ORTHOGONAL)), x, **OPTIONS, gradient_steps=50)
    assert torch.allclose(found.log_evidence, exact(ORTHOGONAL, x), atol=1e-4)  # every weight is p(x)
    for gap in (found.approximation, found.amortization):
        error = float(gap.std()) / len(gap) ** 0.5
        assert abs(float(gap.mean())) < 4 * error + 1e-3


def test_mean_field_on_a_correlated_posterior_costs_the_analytic_kl(x):
    found = dgm.infer.gaps(vae(CORRELATED, mean_field(CORRELATED)), x, **OPTIONS, gradient_steps=50)
    assert mean_field_gap(CORRELATED) > 0.5
    mean, error = found.means()["approximation gap"]
    assert abs(mean - mean_field_gap(CORRELATED)) < 4 * error
    mean, error = found.means()["amortization gap"]
    assert abs(mean) < 4 * error + 1e-3


def test_an_encoder_that_is_off_has_the_analytic_amortization_gap(x):
    shift, widen = 0.6, 1.7
    found = dgm.infer.gaps(vae(CORRELATED, mean_field(CORRELATED, shift, widen)), x, **OPTIONS, gradient_steps=300)
    precision = posterior(CORRELATED)[0]
    moved = torch.full((2,), shift)
    # KL to the posterior beyond the best mean-field q's: a Mahalanobis distance, and the price of wrong scales.
    analytic = 0.5 * float(moved @ precision @ moved) + (widen**2 - 1) - 2 * math.log(widen)
    mean, error = found.means()["amortization gap"]
    assert abs(mean - analytic) < 4 * error + 0.01
    mean, error = found.means()["approximation gap"]
    assert abs(mean - mean_field_gap(CORRELATED)) < 4 * error + 0.01


def test_a_family_of_flows_is_searched_on_copies_of_the_encoder(x):
    torch.manual_seed(0)
    # One affine autoregressive layer is any Normal of two dimensions.
    encoder = flow.iaf(2, layers=1, hidden=(8,), given_shape=(3,))
    program = vae(CORRELATED, encoder)
    before = {name: value.clone() for name, value in program.state_dict().items()}
    found = dgm.infer.gaps(program, x[:2], **OPTIONS, gradient_steps=800)
    assert all(torch.equal(value, before[name]) for name, value in program.state_dict().items())
    total = exact(CORRELATED, x[:2]) - found.elbo
    assert float(total.mean()) > 1
    assert float((exact(CORRELATED, x[:2]) - found.best).max()) < 0.1  # far below mean field's gap, nearly zero
    assert float(found.amortization.mean()) > 0.9 * float(total.mean())


class Fixed(dgm.Conditional):
    """The best mean-field guide, moved by ``shift``; without a parameter to train."""

    conditional = True

    def __init__(self, weight, shift):
        super().__init__()
        self.event_shape = torch.Size((2,))
        self.network, self.shift = mean_field(weight).network.double().requires_grad_(False), shift
        for name, value in list(self.network.named_parameters()):
            delattr(self.network, name)
            self.network.register_buffer(name, value.detach())

    def forward(self, given=None):
        loc, raw = self.network(given).chunk(2, -1)
        return dist.Normal(loc + self.shift, nn.functional.softplus(raw)).to_event(1)


def test_an_encoder_without_parameters_is_the_best_of_its_family(x):
    program = vae(ORTHOGONAL, Fixed(ORTHOGONAL, 0.2))
    assert not list(program.encoder.parameters())
    found = dgm.infer.gaps(program, x, log_evidence=exact(ORTHOGONAL, x), gradient_steps=5, num_samples=512)
    assert torch.equal(found.best, found.elbo)
    moved = torch.full((2,), 0.2)
    analytic = 0.5 * float(moved @ posterior(ORTHOGONAL)[0] @ moved)
    mean, error = found.means()["approximation gap"]
    assert abs(mean - analytic) < 4 * error + 1e-3


@pytest.mark.parametrize("encoder", ["plain", "flow"])
def test_a_frozen_encoder_has_the_same_gaps(encoder, x):
    torch.manual_seed(0)
    plain = encoder == "plain"
    program = vae(CORRELATED, mean_field(CORRELATED, 0.3) if plain else flow.iaf(2, layers=1, given_shape=(3,)))
    options = {"log_evidence": exact(CORRELATED, x)[:2], "gradient_steps": 20, "num_samples": 64}
    free = dgm.infer.gaps(program, x[:2], **options)
    frozen = dgm.infer.gaps(program.requires_grad_(False), x[:2], **options)
    assert torch.equal(frozen.best, free.best)
    assert not any(parameter.requires_grad for parameter in program.parameters())


def test_annealing_and_weighting_agree_with_the_evidence(x):
    def apart(found):
        """Distance of the mean over the data from the evidence, minus four standard errors."""
        difference = found.log_evidence - exact(CORRELATED, x)
        return float(difference.mean().abs() - 4 * difference.std() / len(x) ** 0.5)

    program = vae(CORRELATED, mean_field(CORRELATED, 0.3, 1.2))
    found = dgm.infer.gaps(program, x, num_particles=5000, num_temperatures=60, gradient_steps=5, num_samples=32)
    assert apart(found) < 0.02  # a bound
    # A guide that misses the posterior by far: few particles say little, annealing still does.
    program = vae(CORRELATED, mean_field(CORRELATED, 4.0, 0.3))
    found = dgm.infer.gaps(program, x, num_particles=4, num_temperatures=100, gradient_steps=5, num_samples=32)
    assert found.kind == "ais-100"
    assert apart(found) < 0.05
    assert torch.equal(found.worst(3), found.log_evidence.argsort()[:3])


def test_a_known_evidence_is_used_as_it_is(x):
    program = vae(CORRELATED, mean_field(CORRELATED))
    gaps = dgm.infer.gaps(program, x, log_evidence=exact(CORRELATED, x), gradient_steps=1, num_samples=64)
    assert gaps.kind == "given"
    assert torch.equal(gaps.log_evidence, exact(CORRELATED, x))
    with pytest.raises(ValueError, match="one number per datum"):
        dgm.infer.gaps(program, x, log_evidence=torch.zeros(len(x), 1))


def test_parts_add_up_and_are_reproducible(x):
    program = vae(CORRELATED, mean_field(CORRELATED, 0.3))
    state = torch.get_rng_state()
    a, b = (
        dgm.infer.gaps(program, x, num_particles=8, num_temperatures=0, gradient_steps=3, num_samples=8)
        for _ in range(2)
    )
    assert torch.equal(a.best, b.best)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.allclose(a.approximation + a.amortization, a.total)
    numbers = a.as_dict()
    assert numbers["num_data"] == 12
    assert numbers["gap"]["mean"] == pytest.approx(a.total.mean().item())
    assert "amortization gap" in str(a)


@pytest.mark.parametrize("prior", ["ar", "vae"])
def test_other_priors_and_hierarchies(prior):
    data = dgm.data.load("moons", num_data=4)
    program = dgm.build("vae", data, prior=prior)
    found = dgm.infer.gaps(program, data.x, num_particles=16, num_temperatures=0, gradient_steps=150, num_samples=256)
    assert torch.isfinite(found.total).all()
    assert float(found.amortization.mean()) > 0


def test_labels_reach_the_guide():
    data = dgm.data.load("digits-binary", num_data=3)
    program = dgm.build("vae", data, labeled=True).program
    found = dgm.infer.gaps(
        program, data.x, data.y, num_particles=8, num_temperatures=0, gradient_steps=5, num_samples=8
    )
    assert torch.isfinite(found.total).all()


def test_discrete_latents_have_gaps_too():
    program = dgm.VAE(dgm.Bernoulli(3, learned=True), dgm.Normal(2, nn.Linear(3, 4)), dgm.Bernoulli(3, nn.Linear(2, 3)))
    x = torch.randn(5, 2)
    found = dgm.infer.gaps(program, x, num_particles=2000, num_temperatures=0, gradient_steps=200, num_samples=256)
    assert float(found.amortization.mean()) > 0
    with pytest.raises(ValueError, match="discrete"):
        dgm.infer.gaps(program, x)


def test_what_has_no_gaps():
    with pytest.raises(TypeError, match="program must be a VAE with an encoder"):
        dgm.infer.gaps(dgm.Normal(2), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="gradient_steps"):
        dgm.infer.gaps(vae(CORRELATED, mean_field(CORRELATED)), torch.zeros(3, 3).double(), gradient_steps=0)
