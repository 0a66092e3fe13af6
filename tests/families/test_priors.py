"""Mixture priors against formulas by hand, and the VampPrior as the average of the encoder that it is."""

import math

import pytest
import torch
from programs import jittered
from torch import nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

import dgm_pyro as dgm
from dgm_pyro.families.conditionals import positive
from dgm_pyro.families.priors import MixturePrior, VampPrior
from dgm_pyro.networks import MLP

pytestmark = pytest.mark.usefixtures("float64")


def log_normal(z, loc, scale):
    return (-(((z - loc) / scale) ** 2) / 2 - scale.log() - math.log(2 * math.pi) / 2).sum(-1)


def vamp(components=4, levels=None, encoder=None):
    encoder = encoder or jittered(dgm.Normal(2, MLP((3,), 4, (6,), levels=levels)), 0.5)
    start = torch.randn(components, 3) if levels is None else torch.randint(levels, (components, 3))
    return jittered(VampPrior(encoder, start, levels), 0.5)


# -- densities ---------------------------------------------------------------------------------------------------------


def test_a_mixture_is_the_logsumexp_of_its_parts():
    prior, z = jittered(MixturePrior(3, 4), 0.5), torch.randn(5, 3)
    parts = [log_normal(z, prior.loc[k], positive(prior.raw_scale[k])) for k in range(4)]
    expected = torch.logsumexp(torch.stack(parts) + prior.logits.log_softmax(-1).unsqueeze(-1), 0)
    torch.testing.assert_close(prior.log_prob(z), expected)


def test_a_mixture_of_whole_vectors_is_none_per_feature():
    """Two far modes, at (-5, -5) and (5, 5): a product of mixtures would have one at (-5, 5) too."""
    prior = MixturePrior(2, 2)
    with torch.no_grad():
        prior.loc.copy_(torch.tensor([[-5.0, -5.0], [5.0, 5.0]]))
    assert prior.log_prob(torch.tensor([[-5.0, 5.0]])) < prior.log_prob(torch.tensor([[5.0, 5.0]])) - 40


@pytest.mark.parametrize("make", [lambda: jittered(MixturePrior(2, 3), 0.5), vamp, lambda: vamp(levels=5)])
def test_densities_integrate_to_one(make):
    prior, axis = make(), torch.linspace(-40, 40, 1201)
    with torch.no_grad():
        density = prior.log_prob(torch.cartesian_prod(axis, axis)).exp()
    assert abs(density.sum().item() * (80 / 1200) ** 2 - 1) < 1e-9


@pytest.mark.parametrize("levels", [None, 5])
def test_a_vamp_prior_is_the_encoder_at_its_pseudo_inputs(levels):
    prior, z = vamp(levels=levels), torch.randn(6, 2)
    u = prior.pseudo_inputs
    each = torch.stack([prior.encoder.exact_log_prob(z, u[k].expand(6, 3)) for k in range(4)])
    expected = torch.logsumexp(each + prior.logits.log_softmax(-1).unsqueeze(-1), 0)
    torch.testing.assert_close(prior.log_prob(z), expected)


def test_a_vamp_prior_at_the_data_is_the_aggregate_posterior():
    """Pseudo-inputs at all the data: the prior that makes E[KL] the mutual information, the least possible."""
    x = torch.randn(8, 3)
    encoder = jittered(dgm.Normal(2, MLP((3,), 4, (6,))), 0.5)
    prior = VampPrior(encoder, x)
    q = encoder(x)
    aggregate = MixtureSameFamily(
        Categorical(torch.ones(8)), Independent(Normal(q.base_dist.loc, q.base_dist.scale), 1)
    )
    z = torch.randn(5, 2)
    torch.testing.assert_close(prior.log_prob(z), aggregate.log_prob(z))
    samples = q.sample((400,))
    kl = {
        name: (q.log_prob(samples) - p.exact_log_prob(samples)).mean()
        for name, p in {"aggregate": prior, "normal": dgm.Normal(2), "mixture": MixturePrior(2, 5)}.items()
    }
    assert kl["aggregate"] < min(kl["normal"], kl["mixture"])
    assert 0 < kl["aggregate"] < math.log(8)


def test_samples_follow_the_density():
    prior = jittered(MixturePrior(2, 3), 0.5)
    z, n = prior.sample(20000), 20000
    weights, scale = prior.logits.softmax(-1), positive(prior.raw_scale)
    mean = (weights.unsqueeze(-1) * prior.loc).sum(0)
    second = (weights.unsqueeze(-1) * (prior.loc**2 + scale**2)).sum(0)
    error = (second - mean**2).sqrt() / n**0.5
    assert ((z.mean(0) - mean).abs() < 4.5 * error).all()
    assert ((z**2).mean(0) - second).abs().max() < 4.5 * (z**2).std(0).max() / n**0.5


# -- pseudo-inputs -----------------------------------------------------------------------------------------------------


def test_pseudo_inputs_start_at_the_rows_given_and_stay_in_the_range_of_the_data():
    rows = torch.randint(5, (50, 3))
    encoder = dgm.Normal(2, MLP((3,), 4, levels=5))
    prior = VampPrior(encoder, rows, levels=5)
    # Rows map linearly onto [0.2, 3.8], the ends being out of a sigmoid's reach.
    torch.testing.assert_close(prior.pseudo_inputs, 0.2 + 0.9 * rows)
    with torch.no_grad():
        prior.raw_inputs.mul_(1e3)
    assert prior.pseudo_inputs.min() >= 0
    assert prior.pseudo_inputs.max() <= 4
    reals = torch.randn(4, 3)
    assert torch.equal(VampPrior(dgm.Normal(2, MLP((3,), 4)), reals).pseudo_inputs, reals)


def test_training_moves_pseudo_inputs_and_the_one_encoder(tmp_path):
    torch.manual_seed(0)
    data = dgm.Data(torch.randint(2, (64, 1, 4, 4), dtype=torch.uint8), levels=2)
    vae = dgm.build("vae", data, prior="vamp", latent_size=2, hidden=(8,)).double()
    assert vae.prior.encoder is vae.encoder
    before = {name: parameter.detach().clone() for name, parameter in vae.named_parameters()}
    assert not [name for name in before if name.startswith("encoder.")], "one object, listed once"
    dgm.fit(vae, data, epochs=1, progress=False, validation=None)
    for name, parameter in vae.named_parameters():
        assert not torch.equal(parameter, before[name]), name
    dgm.save(vae, tmp_path)
    loaded = dgm.load(tmp_path)
    assert loaded.prior.encoder is loaded.encoder
    torch.manual_seed(1)
    expected = vae.log_weights(data.x, num_particles=2)
    torch.manual_seed(1)
    assert torch.equal(loaded.log_weights(data.x, num_particles=2), expected)


def test_a_flow_may_be_the_encoder_of_a_vamp_prior():
    encoder = dgm.flow.iaf(2, layers=2, hidden=(6,), given_shape=(3,))
    prior = vamp(encoder=encoder)
    vae = dgm.VAE(prior, dgm.Normal(3, nn.Linear(2, 6)), encoder)
    assert torch.isfinite(vae.log_weights(torch.randn(5, 3), num_particles=3)).all()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: VampPrior(nn.Linear(2, 2), torch.zeros(2, 3)), TypeError, "encoder must be a Conditional.*got Linear"),
        (lambda: VampPrior(dgm.Normal(2, MLP((3,), 4)), 500), TypeError, "pseudo_inputs must be a tensor"),
        (lambda: VampPrior(dgm.Normal(2), torch.zeros(2, 3)), ValueError, "encoder .*is not conditional"),
        (lambda: VampPrior(dgm.Normal(2, MLP((4,), 4)), torch.zeros(2, 3)), ValueError, r"expects given_shape \(4,\)"),
        (
            lambda: VampPrior(dgm.Normal(2, MLP((3,), 4, num_classes=2)), torch.zeros(2, 3)),
            ValueError,
            "reads a label or given too",
        ),
        (lambda: MixturePrior(2, 0), ValueError, "components must be a positive integer, got 0"),
    ],
)
def test_parts_that_do_not_fit(make, error, message):
    with pytest.raises(error, match=message):
        make()
