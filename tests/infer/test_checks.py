"""Calibration passes for exact posteriors and fails for wrong ones; units are active where the truth says so."""

import math

import pytest
import torch
from programs import CASES
from test_gaps import CORRELATED, ORTHOGONAL, linear, mean_field, vae
from torch import nn

import dgm_pyro as dgm
from dgm_pyro import evaluation, networks
from dgm_pyro.families.conditionals import inverse_softplus
from dgm_pyro.infer.checks import Calibration, collapse, miscalibration


def test_an_exact_posterior_is_calibrated():
    found = dgm.infer.sbc(vae(ORTHOGONAL, mean_field(ORTHOGONAL)), num_samples=1000)
    assert found.p_value > 0.01
    assert miscalibration(found) == []
    assert found.histogram("z").sum(-1).tolist() == [1000, 1000]
    assert int(found.ranks["z"].min()) >= 0
    assert int(found.ranks["z"].max()) <= 99


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"widen": 0.6}, "too narrow"),
        ({"widen": 1.6}, "too wide"),
        ({"shift": 0.3}, "shifted"),
    ],
)
def test_a_wrong_posterior_is_not_and_its_shape_is_named(change, word):
    found = dgm.infer.sbc(vae(ORTHOGONAL, mean_field(ORTHOGONAL, **change)), num_samples=1000)
    assert found.p_value < 1e-4
    assert word in miscalibration(found)[0].what


def test_mean_field_is_too_narrow_for_a_correlated_posterior():
    found = dgm.infer.sbc(vae(CORRELATED, mean_field(CORRELATED)), num_samples=1000)
    assert "too narrow" in miscalibration(found)[0].what


def test_p_values_of_uniform_ranks_are_uniform():
    ranks = torch.randint(100, (2000, 300), generator=torch.Generator().manual_seed(0))
    p = Calibration({"z": ranks}, 99, 20).p_values("z")
    assert abs(float(p.mean()) - 0.5) < 4 * (1 / 12 / 300) ** 0.5
    assert abs(float((p < 0.1).double().mean()) - 0.1) < 4 * (0.09 / 300) ** 0.5


def test_discrete_latents_are_ranked_with_ties_split():
    torch.manual_seed(0)
    # x says nothing, so the posterior is the prior.
    constant = linear(torch.zeros(4, 3), torch.tensor([0.0, 0.0, 0.5, 0.5]))
    prior = dgm.Bernoulli(3, parameters=torch.tensor([[0.3, -0.5, 1.0]]))
    encoder = dgm.Bernoulli(3, linear(torch.zeros(3, 2), torch.tensor([0.3, -0.5, 1.0])))
    found = dgm.infer.sbc(dgm.VAE(prior, dgm.Normal(2, constant), encoder), num_samples=1000)
    assert found.p_value > 0.01


def test_every_level_of_a_hierarchy_is_ranked():
    program = dgm.build("vae", dgm.data.load("moons", num_data=10), prior="vae")
    assert set(dgm.infer.sbc(program, num_samples=20).ranks) == {"z", "z2"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bins": 7}, "divide"),
        ({"num_samples": 0}, "num_samples"),
        ({"num_posterior_samples": 0}, "num_posterior_samples"),
    ],
)
def test_bad_counts(options, message):
    with pytest.raises(ValueError, match=message):
        dgm.infer.sbc(vae(ORTHOGONAL, mean_field(ORTHOGONAL)), **options)


def test_nothing_to_rank():
    with pytest.raises(ValueError, match="no latents"):
        dgm.infer.sbc(dgm.Normal(2))


# -- units -------------------------------------------------------------------------------------------------------------


def half_used(scale=0.1):
    """z_1 copies x_1, z_2 is the prior whatever x."""
    raw = torch.tensor([inverse_softplus(scale), inverse_softplus(1.0)])
    network = linear(torch.tensor([[1.0, 0.0], [0, 0], [0, 0], [0, 0]]), torch.cat([torch.zeros(2), raw]))
    return dgm.VAE(dgm.Normal(2), dgm.Normal(2, nn.Linear(2, 4)), dgm.Normal(2, network))


def test_active_units_and_kl_are_those_of_the_formulas():
    torch.manual_seed(0)
    x = torch.randn(200, 2)
    found = dgm.infer.units(half_used(), x, num_samples=64)["z"]
    assert found.active.tolist() == [True, False]
    assert found.collapsed.tolist() == [False, True]
    assert found.variance[0].item() == pytest.approx(x[:, 0].var().item(), abs=0.02)
    assert found.variance[1].item() < 4 / 64
    analytic = 0.5 * (x[:, 0].double() ** 2 + 0.01 - 1).mean() - math.log(0.1)
    assert found.kl[0].item() == pytest.approx(float(analytic), abs=1e-4)
    assert found.kl[1].item() == pytest.approx(0.0, abs=1e-5)


def test_the_variance_of_few_draws_is_no_variance_of_their_mean():
    """q(z | x) = N(A x, S): where a flow hides its mean, two draws of each datum estimate Var_x E_q[z] without bias."""
    torch.manual_seed(1)  # another one than that of the draws
    x, weight, scales = torch.randn(4000, 2), torch.tensor([[0.5, -0.3], [0.0, 0.0]]), torch.tensor([1.0, 2.0])
    raw = torch.tensor([inverse_softplus(float(scale)) for scale in scales])
    base = dgm.Normal(2, linear(torch.cat([weight, torch.zeros(2, 2)]), torch.cat([torch.zeros(2), raw])))
    guide = dgm.Flow(2, [networks.Permutation((0, 1))], base)
    program = dgm.VAE(dgm.Normal(2), dgm.Normal(2, nn.Linear(2, 4)), guide)
    found, true = dgm.infer.units(program, x, num_samples=2)["z"].variance, (x @ weight.T).double().var(0)
    error = (2 / len(x)) ** 0.5 * (true + scales.double() ** 2)  # of a variance of Normals, and of its correction
    assert (error < scales**2 / 2 / 8).all(), "the correction, half a variance, would not be seen"
    assert ((found - true).abs() < 4 * error).all()


def test_the_variance_of_the_level_below_is_not_that_of_the_level_above():
    """q(z | x) = N(x, 1), q(z2 | z) = N(z / 2, 1): E[z2 | x] = x / 2, though one draw of z says z / 2."""
    torch.manual_seed(1)
    one = inverse_softplus(1.0)

    def normal(slope):
        return dgm.Normal(1, linear(torch.tensor([[slope], [0.0]]), torch.tensor([0.0, one])))

    above = dgm.VAE(dgm.Normal(1), normal(1.0), normal(0.5), latent_name="z2")
    x = 0.5 * torch.randn(4000, 1)
    found = dgm.infer.units(dgm.VAE(above, normal(1.0), normal(1.0)), x, num_samples=2)
    true = float(x.double().var())
    assert float(found["z"].variance) == pytest.approx(true)
    error = (2 / len(x)) ** 0.5 * (true + 1) / 4
    assert error < 1 / 8 / 8, "the correction, half of the variance 1 / 4, would not be seen"
    assert abs(float(found["z2"].variance) - true / 4) < 4 * error


def test_data_go_through_in_parts_of_bounded_size(monkeypatch):
    """As many as the budget of evaluation has, and together they say what they say at once."""
    torch.manual_seed(0)
    x, seen = torch.randn(50, 2), []
    whole = dgm.infer.units(half_used(), x, num_samples=3)["z"]
    monkeypatch.setattr(evaluation, "ROWS_AT_ONCE", 16)
    program = half_used()
    for part in (program.encoder, program.likelihood):
        part.network.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    found = dgm.infer.units(program, x, num_samples=3)["z"]
    torch.testing.assert_close(found.variance, whole.variance)  # the mean and the KL have a closed form: no draws
    torch.testing.assert_close(found.kl, whole.kl)
    assert set(seen) == {16, 2, 1}  # x is stated for one row to find its support
    seen.clear()
    exact = vae(ORTHOGONAL, mean_field(ORTHOGONAL))
    exact.encoder.network.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    calibration = dgm.infer.sbc(exact, num_samples=1000)
    assert calibration.ranks["z"].shape == (1000, 2)
    assert calibration.p_value > 0.01
    assert set(seen) == {16, 8}


def test_the_kl_of_dimensions_adds_up_to_that_of_the_site():
    torch.manual_seed(0)
    program, x = (
        dgm.build("vae", dgm.data.load("digits-binary", num_data=50)),
        dgm.data.load("digits-binary", num_data=50),
    )
    found = dgm.infer.units(program, x)["z"]
    assert float(found.kl.sum()) == pytest.approx(dgm.evaluate(program, x).kl["z"], rel=1e-4)


def test_a_kl_without_closed_form_is_sampled():
    torch.manual_seed(0)
    program = half_used()
    program.prior = dgm.MixtureOfNormals(2, 1)  # one standard component: the same prior, without a closed form
    program.prior.parameter[1:] = torch.stack([torch.zeros(2), torch.full((2,), inverse_softplus(1.0))])
    x = torch.randn(400, 2)
    found = dgm.infer.units(program, x, num_samples=200)["z"]
    analytic = 0.5 * (x[:, 0].double() ** 2 + 0.01 - 1).mean() - math.log(0.1)
    assert found.kl[0].item() == pytest.approx(float(analytic), abs=0.02)


def test_a_kl_that_does_not_factorize_is_none():
    found = dgm.infer.units(dgm.build("vae", dgm.data.load("moons", num_data=20), prior="flow"), dgm.data.load("moons"))
    assert found["z"].kl is None


def test_collapse_is_named():
    x = torch.randn(100, 2)
    warning = collapse(dgm.infer.units(half_used(), x, num_samples=400))
    assert [(f.severity, f.where) for f in warning] == [("warning", "z")]
    assert "1 of 2" in warning[0].what
    dead = half_used(1.0)
    with torch.no_grad():
        dead.encoder.network.weight.zero_()
    assert [f.severity for f in collapse(dgm.infer.units(dead, x, num_samples=400))] == ["error"]


def test_a_report_holds_both():
    report = dgm.infer.check(half_used(), torch.randn(50, 2), num_samples=200)
    assert {f.check for f in report.findings} >= {"collapse"}
    numbers = report.as_dict()
    assert numbers["units"]["z"]["dimensions"] == 2
    assert 0 <= numbers["calibration"]["p_value"] <= 1
    assert "dimensions active" in str(report)


@pytest.mark.parametrize(
    ("case", "sizes"),
    [
        ("vae-categorical-latent", {"z": 1}),
        ("vae-diffusion-prior", {"z": 2}),
        ("vae-ladder", {"z2": 1, "z": 2}),
        ("vae-planar-encoder", {"z": 2}),
    ],
)
def test_units_are_those_of_the_codes(case, sizes):
    """The times of a diffusion prior are no code of x, and a class is one unit."""
    program = CASES[case].build()
    found = dgm.infer.units(program, program.sample(32), num_samples=2)
    assert {site: len(of.variance) for site, of in found.items()} == sizes
