"""Codes against closed forms, paths against geometry, scores against tables done by hand."""

import math

import pyro.distributions as dist
import pytest
import torch
from programs import CASES, assert_same_number
from test_diffusion import gaussian
from test_gaps import CORRELATED, NOISE, linear, mean_field, posterior, vae
from torch import nn

import dgm_pyro as dgm
import dgm_pyro.noise as noise
from dgm_pyro import guides, representations
from dgm_pyro.families.conditionals import inverse_softplus
from dgm_pyro.program import seeded
from dgm_pyro.uses.representations import (
    CURVES,
    agreement,
    arc,
    assess,
    cluster,
    codes,
    decode,
    encode,
    grid,
    interpolate,
    knn,
    line,
    probe,
    traverse,
)

FAMILIES = (
    "vae",
    "flow",
    "realnvp",
    "maf",
    "nsf",
    "iaf",
    "dequantized",
    "diffusion",
    "continuous",
    "planar",
    "pixelvae",
)
ENCODABLE = [name for name in CASES if name.startswith((*FAMILIES, "sylvester"))]


# -- to the code, and back ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENCODABLE)
def test_every_code_is_found_and_leads_back_to_x(name):
    program = CASES[name].build()
    x, given = CASES[name].draw(program, 5)
    sites = codes(program)
    assert len(sites) == {
        "vae-two-levels": 2,
        "vae-three-levels": 3,
        "vae-ladder": 2,
        "vae-ladder-three-levels": 3,
    }.get(name, 1)
    for site in sites:
        mean, drawn = (encode(program, x, given, site=site, draw=draw) for draw in (False, True))
        assert torch.isfinite(mean).all()
        assert mean.shape[: drawn.dim()] == drawn.shape  # of a class, its probabilities
        for draw in (False, True):
            made = decode(program, drawn, given, site=site, draw=draw)
            assert made.shape == x.shape
            assert torch.isfinite(made).all()


@pytest.mark.parametrize("name", ENCODABLE)
def test_the_methods_are_what_the_functions_do_in_batches(name):
    program = CASES[name].build().eval()
    x, given = CASES[name].draw(program, 5)
    for site, prior in program.codes().items():
        found = []
        for _ in range(2):
            with seeded(3, torch.device("cpu")), noise.per_datum(x, 3), torch.no_grad():
                found.append(program.encode(x, given, site=site, num_samples=4))
        assert_same_number(*found)
        z = encode(program, x, given, site=site, num_samples=4, seed=3)
        torch.testing.assert_close(found[0], z, rtol=1e-5, atol=1e-5)
        code = encode(program, x, given, site=site, draw=True, seed=3)
        assert code.shape[1:] == prior.event_shape
        with seeded(0, torch.device("cpu")), torch.no_grad():
            made = program.decode(code, given, site=site)
        torch.testing.assert_close(made, decode(program, code, given, site=site), rtol=1e-5, atol=1e-5)


def test_codes_are_differentiable():
    """The mean of q(z | x) = N(A x, .) has the Jacobian A, and E[x | z] = C z has C."""
    a, c = torch.randn(2, 3), torch.randn(3, 2)
    program = dgm.VAE(dgm.Normal(2), scaled(c, 0.3), scaled(a, 0.5))
    x, z = torch.randn(1, 3), torch.randn(1, 2)
    torch.testing.assert_close(torch.autograd.functional.jacobian(program.encode, x)[0, :, 0], a)
    torch.testing.assert_close(torch.autograd.functional.jacobian(program.decode, z)[0, :, 0], c)


class Halved(dgm.Conditional):
    """x = 2 z, with codes of its own: a family is encoded by its methods, not by its class."""

    def __init__(self):
        super().__init__()
        self.event_shape, self.base = torch.Size((2,)), dgm.Normal(2)

    def forward(self, given=None):
        return dist.Normal(torch.zeros(2), 2.0).to_event(1)

    def codes(self):
        return {"half": self.base}

    def _encode(self, x, given, site, draw, num_samples):
        return x / 2

    def _decode(self, z, given, site, draw):
        return 2 * z


def test_a_family_of_your_own_has_codes_by_its_methods():
    program, x = Halved(), torch.randn(300, 2)
    assert codes(program) == ("half",)
    assert torch.equal(encode(program, x, batch_size=7), x / 2)
    assert torch.equal(decode(program, x / 2), x)
    torch.testing.assert_close(
        interpolate(program, x[:3], x[3:6], num_points=3, curve="linear")[1], (x[:3] + x[3:6]) / 2
    )
    integers = dgm.Dequantized(dgm.flow.realnvp(2, layers=1, unit_cube=True), levels=4)
    assert list(integers.codes()) == ["z"]


def test_the_code_of_a_linear_gaussian_vae_is_the_mean_of_its_posterior():
    x = torch.randn(300, 3).double()
    precision, to_mean = (part.double() for part in posterior(CORRELATED))
    likelihood = dgm.Normal(3, linear(CORRELATED, torch.zeros(3)), scale_type="shared", initial_scale=NOISE)
    prior = dgm.Normal(2)
    exact = dgm.VAE(prior, likelihood, guides.LinearGaussianPosterior(prior, likelihood)).double()
    torch.testing.assert_close(encode(exact, x), x @ to_mean.T, rtol=0, atol=1e-6)
    torch.testing.assert_close(encode(vae(CORRELATED, mean_field(CORRELATED)), x), x @ to_mean.T, rtol=0, atol=1e-6)
    # Draws, whitened: 300 of two features.
    residual = (encode(exact, x, draw=True) - x @ to_mean.T) @ torch.linalg.cholesky(precision)
    assert (residual.mean(0).abs() < 4.5 / 300**0.5).all()
    assert ((residual.T @ residual / 300 - torch.eye(2)).abs() < 4.5 * (2 / 300) ** 0.5).all()


def scaled(weight, scale):
    """A linear Normal of that scale."""
    size = len(weight)
    raw = torch.full((size,), inverse_softplus(scale))
    return dgm.Normal(size, linear(torch.cat([weight, torch.zeros_like(weight)]), torch.cat([torch.zeros(size), raw])))


def test_a_hierarchy_has_a_code_at_each_level():
    """q(z | x) = N(A x, 0.5^2), q(z2 | z) = N(B z, 0.1^2): E[z2 | x] = B A x, and back E[x | z2] = D C z2."""
    a, b, c, d = torch.randn(2, 3), torch.randn(1, 2), torch.randn(2, 1), torch.randn(3, 2)
    above = dgm.VAE(dgm.Normal(1), scaled(c, 0.3), scaled(b, 0.1), latent_name="z2")
    program, x = dgm.VAE(above, scaled(d, 0.3), scaled(a, 0.5)), torch.randn(20, 3)
    assert codes(program) == ("z", "z2")
    torch.testing.assert_close(encode(program, x), x @ a.T, rtol=1e-5, atol=1e-5)
    found = encode(program, x, site="z2", num_samples=400) - x @ a.T @ b.T
    error = 0.5 * float(b.norm()) / 20  # the mean of z2 is averaged over 400 draws of z: its own scale adds nothing
    assert float(found.abs().max()) < 4.5 * error
    assert float(found.std()) == pytest.approx(error, rel=4.5 / 40**0.5)
    z2 = torch.randn(4, 1)
    torch.testing.assert_close(decode(program, z2, site="z2"), z2 @ c.T @ d.T, rtol=1e-5, atol=1e-5)


def test_the_code_of_a_class_is_its_probabilities():
    program = CASES["vae-discrete-autoregressive-prior"].build()
    x, _ = CASES["vae-discrete-autoregressive-prior"].draw(program, 4)
    z = encode(program, x)
    torch.testing.assert_close(z, program.encoder(x).base_dist.probs.detach())
    torch.testing.assert_close(z.sum(-1), torch.ones(4, 2))
    assert not encode(program, x, draw=True).is_floating_point()
    # Without a closed form, the frequencies of draws.
    exact = CASES["vae-exact-class"].build()
    x, _ = CASES["vae-exact-class"].draw(exact, 3)
    log_joint = exact.prior().log_prob(torch.arange(3)) + torch.stack(
        [exact.likelihood.log_prob(x, torch.full((3,), k)) for k in range(3)], -1
    )
    p = log_joint.softmax(-1).detach()
    assert ((encode(exact, x, num_samples=900) - p).abs() < 4.5 * (p * (1 - p) / 900).sqrt() + 1e-6).all()


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(("realnvp", "maf", "nsf", "iaf", "flow-"))])
def test_a_flows_code_is_the_inverse_of_its_generator(name, float64):
    program = CASES[name].build().eval()
    x, given = CASES[name].draw(program, 7)
    z = encode(program, x, given)
    torch.testing.assert_close(decode(program, z, given), x, rtol=1e-6, atol=1e-6)
    log_p = program.base.log_prob(z, given if program.base.conditional else None)
    torch.testing.assert_close(log_p - program.log_abs_det_jacobian(z, x, given), program.log_prob(x, given))


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("dequantized")])
def test_every_code_of_a_cell_leads_back_to_its_integer(name, float64):
    program = CASES[name].build()
    x, given = CASES[name].draw(program, 50)
    for draw in (False, True):
        assert torch.equal(decode(program, encode(program, x, given, draw=draw), given), x.long())


def test_the_code_of_a_diffusion_is_the_end_of_its_ode(float64):
    """For N(m, S), y = x / alpha moves away from m as the root of S + (sigma / alpha)^2; Heun's error is of order 2."""
    mean, cov = torch.tensor([1.0, -0.5]), torch.diag(torch.tensor([2.0, 0.3]))
    x, errors = mean + torch.randn(6, 2) @ cov.sqrt(), []
    for steps in (40, 80):
        program = gaussian(("log-snr", steps), mean, cov)
        first, last = program.noise_schedule.times[0], program.noise_schedule.times[-1]
        spread = [(cov.diagonal() + (time.sigma / time.alpha) ** 2).sqrt() for time in (first, last)]
        z = last.alpha * (mean + (x - mean) * spread[1] / spread[0])
        errors.append(float((encode(program, x) - z).abs().max()))
        # The denoiser's last answer, E[x | x_1], is this far from where the ODE began.
        shrunk = mean + (x - mean) * cov.diagonal() ** 0.5 / spread[0] * cov.diagonal() ** 0.5 / spread[0]
        torch.testing.assert_close(decode(program, z), shrunk, rtol=0, atol=30 / steps**2)
    assert errors[1] < 0.01
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.15)


def test_a_diffusion_leads_back_to_where_x_was():
    program = CASES["continuous-diffusion"].build()
    fine = dgm.ContinuousDiffusion(2, program.denoiser, program.noise_schedule, num_steps=200)
    fine.load_state_dict(program.state_dict())
    x = torch.randn(5, 2)
    start = fine.noise_schedule(torch.zeros(())).sigmoid().sqrt() * x
    expected = fine.denoise(start, torch.zeros(5)).x0  # the ODE there and back again, and the last answer
    torch.testing.assert_close(decode(fine, encode(fine, x)), expected.detach(), rtol=0, atol=1e-4)


def test_the_mean_of_integers_is_that_of_their_masses():
    program = CASES["vae-logistic"].build()
    z = torch.randn(3, 2)
    x = torch.arange(5).reshape(5, 1, 1, 1, 1).expand(5, 3, 1, 2, 1)
    masses = program.likelihood(z).base_dist.log_prob(x).exp()
    torch.testing.assert_close(decode(program, z), (x * masses).sum(0).detach())
    draws = torch.stack([decode(program, z, draw=True, seed=seed) for seed in range(400)]).double()
    assert ((draws.mean(0) - decode(program, z)).abs() < 4.5 * draws.std(0) / 20).all()


def test_batches_and_seeds():
    program = CASES["vae-flow-encoder"].build()
    x = torch.randn(7, 3)
    plain = CASES["vae"].build()
    torch.testing.assert_close(encode(plain, x[:, :2], batch_size=3), encode(plain, x[:, :2]))
    before = torch.get_rng_state()
    assert torch.equal(encode(program, x), encode(program, x))
    assert not torch.equal(encode(program, x, draw=True), encode(program, x, draw=True, seed=1))
    assert torch.equal(torch.get_rng_state(), before)
    program.train()
    encode(program, x)
    assert program.training


# -- around a code, and between two ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CURVES)
def test_paths_start_and_end_at_the_ends(path, float64):
    a, b = torch.randn(4, 3, 2), torch.randn(4, 3, 2)
    a[0], b[1], b[2], b[3] = 0, 2 * a[1], -a[2], a[3]
    points = CURVES[path](a, b, 5)
    assert torch.equal(points[0], a)
    assert torch.equal(points[-1], b)
    # No arc from the origin, nor along one direction: these are lines.
    torch.testing.assert_close(points[:, :3], line(a, b, 5)[:, :3])
    assert torch.isfinite(points).all()


def test_the_line_is_even_and_the_arc_keeps_length_and_angle(float64):
    a, b = torch.randn(2, 6, 10)
    b = b * a.norm(dim=1, keepdim=True) / b.norm(dim=1, keepdim=True)
    torch.testing.assert_close(line(a, b, 5)[1], 0.75 * a + 0.25 * b)
    points = arc(a, b, 9)
    torch.testing.assert_close(points.norm(dim=-1), a.norm(dim=-1).expand(9, 6))
    steps = torch.nn.functional.cosine_similarity(points[1:], points[:-1], dim=-1).acos()
    whole = torch.nn.functional.cosine_similarity(a, b, dim=-1).acos()
    torch.testing.assert_close(steps, (whole / 8).expand(8, 6), rtol=1e-6, atol=1e-6)
    assert (line(a, b, 9)[4].norm(dim=-1) < 0.95 * a.norm(dim=-1)).all()


@pytest.mark.parametrize("name", ["vae", "vae-given-label", "realnvp", "dequantized", "diffusion-given-vector"])
def test_interpolations_end_in_reconstructions(name, float64):
    program = CASES[name].build()
    x, given = CASES[name].draw(program, 6)
    a, b = x[:3], x[3:]
    given = None if given is None else given[:3]
    for path in CURVES:
        points = interpolate(program, a, b, 4, curve=path, given=given)
        assert points.shape == (4, 3, *program.event_shape)
        for end, data in ((points[0], a), (points[-1], b)):
            torch.testing.assert_close(end, decode(program, encode(program, data, given), given))
    if "nvp" in name:
        torch.testing.assert_close(points[0], a)
    if name == "dequantized":
        assert torch.equal(points[-1], b.long())


def test_a_traversal_sets_one_feature_and_leaves_the_others():
    weight, values = torch.randn(4, 3), (-1.0, 0.5, 2.0)
    program = dgm.VAE(dgm.Normal(3), scaled(weight, 0.1), scaled(torch.randn(3, 4), 0.1))
    z = torch.randn(1, 3)
    found = traverse(program, z, values, indices=[2, 0])
    assert found.shape == (2, 3, 4)
    for row, feature in enumerate((2, 0)):
        for column, value in enumerate(values):
            moved = z.clone()
            moved[0, feature] = value
            torch.testing.assert_close(found[row, column], (moved @ weight.T)[0], rtol=1e-5, atol=1e-5)
    assert traverse(program, z).shape == (3, 7, 4)


def test_traversals_of_a_conditional_program_keep_what_is_given():
    program = CASES["vae-given-label"].build()
    z, given = torch.randn(1, 2), torch.tensor([2])
    found = traverse(program, z, (0.0, 1.0), given=given)
    assert_same_number(found[1, 1], decode(program, torch.stack([z[0, 0], torch.tensor(1.0)])[None], given)[0])


def test_the_grid_lies_as_the_plane_does():
    program = dgm.VAE(dgm.Normal(2), scaled(torch.eye(2), 0.1), scaled(torch.eye(2), 0.1))
    found = grid(program, num_points=3, reach=2)
    torch.testing.assert_close(found[0], torch.tensor([[-2.0, 2.0], [0, 2], [2, 2]]))
    torch.testing.assert_close(found[2, 0], torch.tensor([-2.0, -2.0]))


# -- what a code is good for -------------------------------------------------------------------------------------------


def test_a_function_of_z_is_found_and_shuffled_labels_are_not():
    """Labels the sign of a feature, with a margin; 1000 test data, so that chance is within 4.5 standard errors."""
    z = torch.randn(2000, 4)
    z[:, 1] += z[:, 1].sign()
    y = (z[:, 1] > 0).long()
    assert probe(z[:1000], y[:1000], z[1000:], y[1000:]) == 1
    apart = torch.cat([z[:, 1:2], 0.1 * z], 1)
    assert knn(apart[:1000], y[:1000], apart[1000:], y[1000:]) == 1
    shuffled = y[torch.randperm(2000)]
    for score in (probe, knn):
        by_chance = score(z[:1000], shuffled[:1000], z[1000:], shuffled[1000:])
        assert abs(by_chance - 0.5) < 4.5 * 0.5 / 1000**0.5


def test_a_ring_is_not_linear_but_its_neighbors_are_alike():
    rings = dgm.data.load("rings", num_data=900)
    parts = rings.x[:600], rings.y[:600], rings.x[600:], rings.y[600:]
    assert knn(*parts) == 1
    assert probe(*parts) < 0.6


def test_nearest_neighbors_by_hand():
    train, y = torch.tensor([[0.0], [1.0], [10.0], [11.0], [12.0]]), torch.tensor([0, 0, 1, 1, 1])
    test = torch.tensor([[2.0], [6.4]])  # the three nearest of 6.4: 10, 11 and 1, two of class 1
    assert knn(train, y, test, torch.tensor([0, 1]), neighbors=3) == 1
    assert knn(train, y, test, torch.tensor([0, 0]), neighbors=3) == 0.5
    assert knn(train, y, test, torch.tensor([1, 1]), neighbors=5) == 1


def test_groups_that_are_apart_are_found():
    y = torch.arange(300) % 3
    z = torch.randn(300, 2) + 20 * torch.tensor([[0.0, 0], [1, 0], [0, 1]])[y]
    found = cluster(z, 3)
    same = agreement(found, y)
    assert (same.accuracy, same.nmi, same.ari) == pytest.approx((1, 1, 1))
    assert torch.equal(found, cluster(z, 3))


def test_agreement_of_a_small_table_by_hand():
    """Clusters against classes [[2, 1, 0], [0, 2, 1]]: six data, 2 + 2 of them right under the best naming."""
    clusters, y = torch.tensor([0, 0, 1, 1, 1, 2]), torch.tensor([0, 0, 0, 1, 1, 1])
    found = agreement(clusters, y)
    assert found.accuracy == pytest.approx(4 / 6)
    log = math.log
    information = 2 / 6 * log((2 / 6) / (1 / 2 * 2 / 6)) + 1 / 6 * log((1 / 6) / (1 / 2 * 3 / 6))
    information += 2 / 6 * log((2 / 6) / (1 / 2 * 3 / 6)) + 1 / 6 * log((1 / 6) / (1 / 2 * 1 / 6))
    entropies = log(2), -(2 / 6 * log(2 / 6) + 3 / 6 * log(3 / 6) + 1 / 6 * log(1 / 6))
    assert found.nmi == pytest.approx(information / (sum(entropies) / 2))
    # Pairs: together in both 2, in classes 6, in clusters 4, of 15.
    expected = 6 * 4 / 15
    assert found.ari == pytest.approx((2 - expected) / ((6 + 4) / 2 - expected))
    renamed = agreement(torch.tensor([7, 4, 9])[clusters], 1 - y)
    assert vars(renamed) == pytest.approx(vars(found))


def test_clusters_that_know_nothing_score_as_chance_does():
    y, random = torch.arange(3000) % 10, torch.randint(10, (3000,))
    found = agreement(random, y)
    assert abs(found.ari) < 0.01
    assert found.nmi < 0.02
    assert 0.1 <= found.accuracy < 0.1 + 4.5 * (0.09 / 3000) ** 0.5 + 0.01  # the best of many namings
    assert agreement(torch.zeros(3000).long(), y).accuracy == pytest.approx(0.1)
    assert agreement(torch.zeros(3000).long(), y).nmi == 0


def test_assess_is_its_parts():
    z, y = torch.randn(300, 2), torch.arange(300) % 3
    z[y == 1] += 5
    found = assess(z[:200], y[:200], z[200:], y[200:], neighbors=3)
    assert found.probe == probe(z[:200], y[:200], z[200:], y[200:])
    assert found.knn == knn(z[:200], y[:200], z[200:], y[200:], 3)
    assert found.clusters == agreement(cluster(z[200:], 3), y[200:])
    assert found.stderr(0.9) == pytest.approx(0.03)
    assert set(found.as_dict()) == {"probe", "knn", "clusters_accuracy", "clusters_nmi", "clusters_ari"}


def test_a_short_training_makes_the_classes_linear_in_z_and_noise_does_not():
    digits, test = (dgm.data.load("digits-binary", split) for split in ("train", "test"))
    program = dgm.build("vae", digits, latent_size=8, hidden=(128,))
    dgm.fit(program, digits, "annealed", epochs=15, validation=None, progress=False, compile=False)
    z = [encode(program, part.x) for part in (digits, test)]
    assert probe(z[0], digits.y, z[1], test.y) > 0.8
    noise = [torch.randn_like(each) for each in z]
    assert probe(noise[0], digits.y, noise[1], test.y) < 0.1 + 4.5 * (0.09 / 360) ** 0.5


# -- what does not fit -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("made", "Autoregressive has no latent code"),
        ("normal", "Normal has no latent code"),
        ("labeled-vae", "use the program within and the labels"),
    ],
)
def test_programs_without_a_code_say_what_has_one(name, match):
    program = CASES[name].build()
    x, _ = CASES[name].draw(program, 2)
    with pytest.raises(ValueError, match=match):
        encode(program, x)


def test_an_implicit_model_cannot_be_inverted():
    program = dgm.build("implicit", dgm.data.load("moons", num_data=10))
    with pytest.raises(ValueError, match="Implicit has no latent code"):
        encode(program, torch.zeros(2, 2))


def test_a_labeled_vae_is_encoded_given_its_classes():
    program = CASES["labeled-classifier"].build()
    x, y = torch.randn(4, 2), torch.tensor([0, 2, 1, 1])
    within = program.program
    torch.testing.assert_close(encode(within, x, given=y), within.encoder((x, y)).mean.detach())


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda p: encode(p, torch.zeros(3, 5)), r"x has shape \(3, 5\)"),
        (lambda p: encode(p, torch.zeros(3, 2), site="y"), "site must be one of 'z', got 'y'"),
        (lambda p: encode(p, torch.zeros(3, 2), num_samples=0), "num_samples must be a positive integer"),
        (lambda p: decode(p, torch.zeros(3, 5)), r"z has shape \(3, 5\), but the shape of the code 'z' is \(2,\)"),
        (lambda p: line(torch.zeros(1, 2), torch.zeros(1, 2), 1), "num_points must be an int of at least 2, got 1"),
        (lambda p: arc(torch.zeros(1, 2), torch.zeros(1, 3)), "of one shape"),
        (lambda p: line(torch.zeros(1, 2).long(), torch.zeros(1, 2).long()), "real codes of one shape"),
        (
            lambda p: interpolate(p, torch.zeros(1, 2), torch.zeros(1, 2), curve="straight"),
            "curve must be one of linear",
        ),
        (lambda p: traverse(p, torch.zeros(2, 2)), r"one code is \(1, \*\(2,\)\)"),
        (lambda p: traverse(p, torch.zeros(1, 2), indices=[2]), r"indices must be among 0 .. 1, got \[2\]"),
        (lambda p: grid(p, num_points=0), "num_points must be a positive integer"),
        (lambda p: grid(CASES["maf"].build()), "a grid is for codes of 2 features"),
        (lambda p: grid(CASES["vae-discrete-autoregressive-prior"].build()), "the code 'z' is discrete"),
        (
            lambda p: knn(torch.zeros(3, 1), torch.zeros(3).long(), torch.zeros(1, 1), torch.zeros(1).long(), 4),
            "neighbors is 4",
        ),
        (
            lambda p: knn(torch.zeros(3, 1), torch.zeros(2), torch.zeros(1, 1), torch.zeros(1), 1),
            "train_y has shape.*one label per datum",
        ),
        (lambda p: agreement(torch.zeros(3).long(), torch.zeros(2).long()), r"y has shape \(2,\)"),
        (
            lambda p: knn(torch.zeros(3, 1), torch.arange(-1, 2), torch.zeros(1, 1), torch.zeros(1).long(), 1),
            r"train_y holds unknown labels \(-1\)",
        ),
    ],
)
def test_what_does_not_fit_is_named(call, match):
    with pytest.raises(ValueError, match=match):
        call(CASES["vae"].build())


def test_a_real_code_is_no_integer():
    with pytest.raises(TypeError, match=r"z has dtype torch.int64, but the code 'z' is real: use z.float\(\)"):
        CASES["vae"].build().decode(torch.zeros(3, 2).long())


def test_a_vae_without_an_encoder_says_so():
    program = dgm.VAE(dgm.Normal(2), dgm.Normal(3, nn.Linear(2, 6)))
    with pytest.raises(ValueError, match="no encoder"):
        representations.encode(program, torch.zeros(2, 3))
