"""Missing features: the evidence of what was observed, against marginals in closed form."""

import math

import pytest
import torch
from programs import CASES, rows, table
from torch import nn
from torch.distributions import MultivariateNormal

import dgm_pyro as dgm
from dgm_pyro.catalog import units_of

HIDDEN = torch.tensor([[True, True, True], [True, False, True], [False, False, True], [False, True, False]])


def linear_gaussian():
    """A VAE of 3 features over z of 2, and p(x) = N(mean, cov)."""
    torch.manual_seed(1)
    likelihood = dgm.Normal(3, nn.Linear(2, 3), scale_type="shared")
    # A guide that is wider than any posterior: the weights are bounded.
    vae = dgm.VAE(dgm.Normal(2), likelihood, dgm.Normal(2, nn.Linear(3, 4), initial_scale=1.2))
    with torch.no_grad():
        vae.encoder.network.weight.mul_(0.1)
        vae.encoder.network.bias.zero_()
    weight, bias = likelihood.network.weight.detach().double(), likelihood.network.bias.detach().double()
    return vae, bias, weight @ weight.T + torch.eye(3)


def marginals(mean, cov, x, mask):
    """log p of the observed features of each row."""
    found = []
    for row, seen in zip(x.double(), mask, strict=True):
        normal = MultivariateNormal(mean[seen], cov[seen][:, seen])
        found.append(normal.log_prob(row[seen]))
    return torch.stack(found)


@pytest.mark.parametrize("units", [False, True])
def test_the_miwae_bound_tends_to_the_evidence_of_the_observed_part(units):
    program, mean, cov = linear_gaussian()
    shift, scale = torch.tensor([10.0, -20.0, 0.0]), torch.tensor([1.0, 5.0, 0.2])
    u = torch.randn(4, 3)
    x, exact = u, marginals(mean, cov, u, HIDDEN)
    if units:
        program, x = dgm.Standardized(program, shift, scale), shift + scale * u
        exact = exact - torch.where(HIDDEN, scale.log(), 0.0).sum(1)
    x = x.masked_fill(~HIDDEN, torch.nan)
    data = dgm.Data(x, mask=HIDDEN)
    many = dgm.evaluate(program, data, num_particles=10_000)
    torch.testing.assert_close(many.values, exact, atol=0.03, rtol=0)
    assert dgm.evaluate(program, data, num_samples=2000).nats < exact.mean()


def test_independent_features_are_left_out_exactly():
    program = dgm.Normal(3, learned=True)
    x = torch.randn(4, 3)
    evidence = dgm.evaluate(program, dgm.Data(x, mask=HIDDEN))
    each = torch.distributions.Normal(0, 1).log_prob(x)
    torch.testing.assert_close(evidence.values, torch.where(HIDDEN, each, 0.0).sum(1).double())
    assert evidence.kind == "exact"


def test_what_is_missing_is_never_read():
    torch.manual_seed(0)
    x, other = torch.randn(2, 4, 3)
    other = torch.where(HIDDEN, x, other)
    found = []
    for values in (x, other):
        program = CASES["vae-exact-linear"].build()
        dgm.fit(program, dgm.Data(values, mask=HIDDEN), "iwae", epochs=2, validation=None, progress=False)
        found.append(torch.cat([p.detach().flatten() for p in program.parameters()]))
    assert torch.equal(*found)


def test_a_mask_that_hides_nothing_changes_nothing():
    program, x = CASES["vae"].build(), torch.randn(6, 2)
    whole = dgm.evaluate(program, dgm.Data(x)).values
    assert torch.equal(dgm.evaluate(program, dgm.Data(x, mask=torch.ones(6, 2).bool())).values, whole)


@pytest.mark.parametrize("name", ["vae", "vae-logistic", "vae-counts", "any-order"])
def test_a_whole_datum_has_the_same_noise_among_data_that_miss_features(name):
    program = CASES[name].build()
    x, _ = CASES[name].draw(program, 4)
    mask = torch.ones_like(x, dtype=torch.bool)
    mask[2:].flatten(1)[:, 0] = False
    found = dgm.evaluate(program, dgm.Data(x, levels=program.levels, mask=mask)).values
    alone = dgm.evaluate(program, dgm.Data(x[:2], levels=program.levels)).values
    torch.testing.assert_close(found[:2], alone, rtol=1e-5, atol=1e-5)


def test_maximum_likelihood_of_the_observed_part():
    """The mean and variance of the observed values of each feature, as of independent Normals."""
    torch.manual_seed(0)
    x = torch.randn(400, 2) * torch.tensor([1.0, 2.0]) + torch.tensor([0.5, -1.0])
    mask = torch.rand(400, 2) > 0.4
    program = dgm.Normal(2, learned=True)
    dgm.fit(program, dgm.Data(x, mask=mask), epochs=300, batch_size=400, lr=0.1, validation=None, progress=False)
    seen = [x[mask[:, i], i] for i in range(2)]
    fitted = program()
    torch.testing.assert_close(fitted.mean, torch.stack([each.mean() for each in seen]), atol=0.02, rtol=0)
    torch.testing.assert_close(fitted.stddev, torch.stack([each.std() for each in seen]), atol=0.02, rtol=0)


def test_columns_and_levels_miss_values_too():
    torch.manual_seed(0)
    x = rows(40)
    mask = torch.rand(40, 5) > 0.3
    program = table(learned=True)
    evidence = dgm.evaluate(program, dgm.Data(x, mask=mask))
    parts = torch.stack([part.log_prob(x[:, i]) for i, part in enumerate(program().base_dist.parts)], 1)
    torch.testing.assert_close(evidence.values, torch.where(mask, parts, 0.0).sum(1).double())
    bits = (torch.rand(30, 4) > 0.5).to(torch.uint8)
    found = dgm.evaluate(dgm.Bernoulli(4), dgm.Data(bits, levels=2, mask=mask[:30, :4]))
    torch.testing.assert_close(found.values, -math.log(2) * mask[:30, :4].double().sum(1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("columns", [None, {"a": "real", "b": "positive", "c": "count", "d": ("bounded", -1, 3),
                                            "e": ("category", 3)}])  # fmt: skip
def test_a_vae_by_name_trains_on_what_was_observed_in_its_units(columns):
    torch.manual_seed(0)
    x, mask = rows(300), torch.rand(300, 5) > 0.3
    data = dgm.Data(x.masked_fill(~mask, torch.nan), mask=mask)
    program = dgm.build("vae", data, columns=columns, hidden=(16,))
    if columns is None:  # units of what was observed
        torch.testing.assert_close(program.units.shift[:1], units_of(x[mask[:, 0], :1])[0])
    before = dgm.evaluate(program, data).nats
    dgm.fit(program, data, "iwae:5", epochs=5, lr=0.01, progress=False)
    assert dgm.evaluate(program, data).nats > before
    completed = dgm.infer.impute(
        program, data.x[:8], mask[:8], num_samples=3, num_particles=12, num_temperatures=3, num_leapfrog=1
    )
    assert torch.isfinite(completed).all()


@pytest.mark.parametrize("name", ["maf", "made", "diffusion"])
def test_programs_that_cannot_leave_features_out_say_what_to_do(name):
    x, mask = torch.randn(40, 3), torch.rand(40, 3) > 0.3
    data = dgm.Data(x, mask=mask)
    program = dgm.build(name, data)
    for use in (lambda: dgm.evaluate(program, data), lambda: dgm.fit(program, data, progress=False)):
        with pytest.raises(ValueError, match=r"misses features, but this .*use a VAE with.*or a chain in any order"):
            use()


def test_data_of_which_nothing_was_observed_teach_nothing():
    data = dgm.Data(torch.randn(40, 3), mask=torch.zeros(40, 3, dtype=torch.bool), name="blank")
    with pytest.raises(ValueError, match="every value of blank is missing: there is nothing to learn from"):
        dgm.fit(dgm.Normal(3, learned=True), data, progress=False)


def test_a_comparison_of_samples_needs_whole_data():
    x = torch.randn(40, 3)
    with pytest.raises(ValueError, match=r"misses features, but .* needs complete rows"):
        dgm.fit(dgm.Normal(3, learned=True), dgm.Data(x, mask=x > 0), "energy", progress=False)
