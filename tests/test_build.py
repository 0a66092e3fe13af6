"""Every name that `dgm.build` knows for a VAE builds, trains a step, and comes back from a checkpoint."""

import math
import resource

import pytest
import torch

import dgm_pyro as dgm
from dgm_pyro import catalog
from dgm_pyro.catalog import ENCODERS, LIKELIHOODS, MODELS, PRIORS, TooLargeError, build, units_of
from dgm_pyro.networks import MLP, DenoisingMLP, DenoisingTransformer, DenoisingUNet

# Likelihoods of reals or counts, and how to make such data of Normal ones.
COUNTED = {
    "student-t": lambda x: 100 + 30 * x,
    "log-normal": lambda x: (3 + x).exp(),
    "beta": torch.sigmoid,
    "poisson": lambda x: torch.poisson((2 + x).exp()),
    "negative-binomial": lambda x: torch.poisson((4 + x).exp()),
    "zero-inflated-poisson": lambda x: torch.poisson((2 + x).exp()) * (x > 0),
    "zero-inflated-negative-binomial": lambda x: torch.poisson((2 + x).exp()) * (x > 0),
}
# Encoders, and the prior that each is for.
SUITED = {"ladder": "vae", "bernoulli": "bernoulli", "categorical": "categorical", "codes": "codes"}
SWAPS = [
    *({"prior": name} for name in PRIORS),
    *({"encoder": name, "prior": SUITED.get(name, "normal")} for name in ENCODERS),
    *({"likelihood": name} for name in LIKELIHOODS if name not in COUNTED),
    {"prior": "vae3", "encoder": "ladder"},
    {"prior": "vamp", "encoder": "semiamortized"},
    {"prior": "vamp", "encoder": "sylvester"},
    {"prior": "categorical", "likelihood": "pixelcnn"},
    {"prior": "bernoulli", "likelihood": "ar"},
    *({"grid": (2, 2), "prior": name} for name in PRIORS if name not in catalog.PRIORS_WITHOUT_GRID),
    *({"grid": (2, 2), "likelihood": name} for name in ("categorical", "normal", "ar", "pixelcnn")),
    *({"grid": (2, 2), "encoder": name} for name in ("planar", "iaf", "nsf", "semiamortized")),
    {"grid": (1, 1), "prior": "diffusion"},
]


def digits_like(levels, classes=None):
    x = torch.rand(24, 1, 4, 4) if levels is None else torch.randint(levels, (24, 1, 4, 4), dtype=torch.uint8)
    return dgm.Data(x, None if classes is None else torch.arange(24) % classes, levels=levels, name="random")


def weights(program, x, particles=2):
    torch.manual_seed(3)
    return program.log_weights(x, num_particles=particles)


@pytest.mark.parametrize("levels", [None, 3])
@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("implicit", "classifier")])
def test_every_model_builds_for_reals_and_integers_trains_and_is_stored(name, levels, tmp_path):
    torch.manual_seed(0)
    data = digits_like(levels)
    program = build(name, data)
    assert program.measure == data.measure
    before = dgm.evaluate(program, data, num_samples=20).nats
    # The masses start as the uniform that the data come from, and deep stacks take longer to know these 24.
    epochs, lr = (20, 0.001) if name in ("glow", "flow++") else (6, 0.003)
    dgm.fit(program, data, epochs=epochs, batch_size=12, lr=lr, progress=False, validation=None)
    dgm.save(program, tmp_path)
    after = dgm.evaluate(program, data, num_samples=20)
    assert torch.equal(dgm.evaluate(dgm.load(tmp_path), data, num_samples=20).values, after.values)
    assert after.nats > before


@pytest.mark.parametrize("swaps", SWAPS, ids=lambda swaps: "-".join(f"{k}={v}" for k, v in swaps.items()))
def test_every_name_builds_trains_and_is_stored(swaps, tmp_path):
    torch.manual_seed(0)
    reals = swaps.get("likelihood", "").startswith("normal")
    data = digits_like(None if reals else 3)
    hidden = {} if "grid" in swaps else {"hidden": (8, 8)}
    program = build("vae", data, latent_size=4, **hidden, **swaps)
    within = getattr(program, "program", program)  # of reals, in units
    assert "grid" not in swaps or within.encoder.event_shape == (4, *swaps["grid"])
    before = {name: parameter.detach().clone() for name, parameter in program.named_parameters()}
    dgm.fit(program, data, epochs=2, batch_size=12, lr=0.01, progress=False, validation=None)
    still = [name for name, parameter in program.named_parameters() if torch.equal(parameter, before[name])]
    assert not still, f"training does not move {still}"
    dgm.save(program, tmp_path)
    loaded = dgm.load(tmp_path)
    assert torch.equal(weights(loaded, data.x), weights(program, data.x))


def test_discrete_latents_bring_their_encoder():
    data = digits_like(2)
    assert isinstance(build("vae", data, prior="bernoulli").encoder, dgm.Bernoulli)
    assert isinstance(build("vae", data, prior="categorical", latent_size=7).encoder, dgm.Categorical)
    assert build("vae", data, prior=dgm.Categorical((), 5)).encoder.levels == 5
    assert build("vae", data, prior="codes", latent_size=5).encoder.event_shape == (5, 8)
    assert build("vae", data, prior=dgm.OneHot(dgm.Categorical(4, 3))).encoder.event_shape == (4, 3)
    codes_in_a_plane = build("vae", large(), prior=dgm.OneHot(dgm.Categorical((4, 8), 8)))
    assert codes_in_a_plane.encoder.event_shape == (4, 8, 8)
    with pytest.raises(ValueError, match="needs a one-hot encoder"):
        build("vae", data, prior="codes", encoder="meanfield")
    with pytest.raises(ValueError, match="encoder 'codes' is for discrete codes"):
        build("vae", data, encoder="codes")
    assert build("vae", data, prior=dgm.Bernoulli(6, learned=True)).encoder.event_shape == (6,)
    assert build("vae", data, prior=dgm.Normal(6)).encoder.event_shape == (6,), "sized by the prior that is given"


def test_depth_and_names_of_a_hierarchy():
    data = digits_like(2)
    assert build("vae", data, prior="vae3").latents("x") == ("z", "z2", "z3")
    ladder = build("vae", data, prior="vae3", encoder="ladder")
    assert ladder.encoder.latents("z") == ("z2", "z3")
    assert ladder.prior.encoder is ladder.prior.prior.encoder is None
    assert ladder.encoder.bottom.generative is ladder.prior.likelihood
    assert ladder.encoder.top.bottom.generative is ladder.prior.prior.likelihood


def test_labels_reach_every_encoder_that_can_read_them():
    data = digits_like(2, classes=3)
    for name in ("meanfield", "fullrank", "planar", "sylvester", "iaf", "nsf"):
        program = build("vae", data, labeled=True, encoder=name, latent_size=4, hidden=(8,)).program
        y = torch.zeros(24, dtype=torch.long)
        torch.manual_seed(0)
        first = program.encoder((data.x, y)).sample()
        torch.manual_seed(0)
        assert not torch.equal(program.encoder((data.x, y + 1)).sample(), first), name


@pytest.mark.parametrize(
    ("swaps", "message"),
    [
        ({"encoder": "ladder"}, "'ladder' is for a hierarchy, but the prior is Normal: use prior='vae'"),
        ({"likelihood": "normal"}, "for reals or counts, but random has 2 levels"),
        ({"encoder": "gaussian"}, "encoder must be a Program or one of meanfield, .*ladder.*, got 'gaussian'"),
        ({"likelihood": "made"}, "likelihood must be a Program or one of independent, .*, got 'made'"),
    ],
)
def test_what_does_not_go_together(swaps, message):
    with pytest.raises(ValueError, match=message):
        build("vae", digits_like(2), **swaps)


def test_a_diffusion_of_images_of_odd_size_is_built_at_one_resolution():
    images = dgm.Data(torch.randn(8, 3, 5, 7))
    for name in ("diffusion", "diffusion-continuous"):
        assert dgm.build(name, images).sample(2).shape == (2, 3, 5, 7)


@pytest.mark.parametrize(("name", "labeled"), [("classifier", False), ("made", True)])
def test_one_class_is_nothing_to_classify(name, labeled):
    data = dgm.Data(torch.zeros(6, 2), torch.zeros(6).long())
    with pytest.raises(ValueError, match="labels of one class, so there is nothing"):
        dgm.build(name, data, labeled=labeled)


def test_images_without_a_channel_are_told_what_they_lack():
    with pytest.warns(UserWarning, match=r"event_shape \(8, 8\).*\(N, 1, H, W\), x.unsqueeze\(1\)"):
        dgm.build("vae", dgm.Data(torch.zeros(4, 8, 8).long(), levels=2))


def test_a_mass_for_reals():
    with pytest.raises(ValueError, match="mass on integers, but random holds reals"):
        build("vae", digits_like(None), likelihood="categorical")
    with pytest.raises(ValueError, match="pixelcnn needs images"):
        build("vae", dgm.Data(torch.randn(5, 2)), likelihood="pixelcnn")


@pytest.mark.parametrize("name", ["iaf", "nsf"])
def test_flow_encoders_start_as_the_mean_field_they_contain(name):
    encoder = build("vae", dgm.data.load("digits-binary", num_data=8), encoder=name).encoder
    x = torch.randint(2, (16, 1, 8, 8))
    base = encoder.base(x)
    z = base.sample()
    torch.testing.assert_close(encoder.forward_map(z, x), z, atol=0.05, rtol=0.05)
    assert base.mean.std(0).min() > 0.01  # of x's own, not N(0, I)


@pytest.mark.parametrize("likelihood", COUNTED)
def test_likelihoods_of_other_reals_build_for_their_data_train_and_are_stored(likelihood, tmp_path):
    torch.manual_seed(0)
    data = dgm.Data(COUNTED[likelihood](torch.randn(200, 3)))
    program = build("vae", data, likelihood=likelihood, hidden=(16,))
    assert program.measure == ("mass" if "poisson" in likelihood or "binomial" in likelihood else "density")
    before = dgm.evaluate(program, data).nats
    dgm.fit(program, data, epochs=4, lr=0.01, progress=False, validation=None)
    assert dgm.evaluate(program, data).nats > before
    dgm.save(program, tmp_path)
    assert torch.equal(weights(dgm.load(tmp_path), data.x), weights(program, data.x))


def test_a_likelihood_with_bounds_keeps_its_units_as_an_object_too():
    x = torch.poisson(torch.full((60, 2), 50.0))
    own = dgm.Poisson(2, torch.nn.Linear(2, 2))
    program = build("vae", dgm.Data(x), likelihood=own)
    assert isinstance(program, dgm.VAE)
    shift = program.encoder.network.shift  # which reads x standardized all the same
    torch.testing.assert_close(shift, units_of(x)[0])


# -- what is given by name ---------------------------------------------------------------------------------------------


def waves(size, seed):
    """Pairs of t and y = sin t + noise, both in units of their own, and the mean log density of y given t."""
    random = torch.Generator().manual_seed(seed)
    t = 6 * torch.rand(size, 1, generator=random) - 3
    y = torch.sin(t) + 0.3 * torch.randn(size, 1, generator=random)
    exact = torch.distributions.Normal(torch.sin(t), 0.3).log_prob(y).mean().item()
    return dgm.Data(1024 * y + 5000, given=50 * t + 300), exact - math.log(1024)


@pytest.mark.parametrize(("name", "epochs"), [("pixels", 8), ("nsf", 7)])
def test_densities_given_reals_reach_the_analytic_one(name, epochs):
    (data, _), (unseen, exact) = waves(2000, 0), waves(2000, 1)
    torch.manual_seed(0)
    program = build(name, data)
    dgm.fit(program, data, epochs=epochs, lr=5e-3, batch_size=128, progress=False, validation=None)
    assert dgm.evaluate(program, unseen).nats == pytest.approx(exact, abs=0.05)


GIVEN = [name for name in MODELS if name not in ("classifier", "implicit", "vdvae")]


@pytest.mark.parametrize("levels", [None, 3])
@pytest.mark.parametrize("name", GIVEN)
def test_every_model_is_conditional_on_reals_by_name(name, levels, tmp_path):
    torch.manual_seed(0)
    given = 100 + 10 * torch.randn(24, 2)
    data = dgm.Data(digits_like(levels).x, levels=levels, given=given)
    program = build(name, data)
    assert isinstance(program, dgm.Standardized)
    assert program.given_shape == (2,)
    dgm.fit(program, data, epochs=2, batch_size=12, lr=0.003, progress=False, validation=None)
    evidence = dgm.evaluate(program, data)
    other = dgm.evaluate(program, dgm.Data(data.x, levels=levels, given=given.flip(0)))
    assert not torch.equal(evidence.values, other.values)
    assert program.sample(3, given[:3]).shape == (3, 1, 4, 4)
    dgm.save(program, tmp_path)
    assert torch.equal(dgm.evaluate(dgm.load(tmp_path), data).values, evidence.values)


@pytest.mark.parametrize("encoder", ["meanfield", "fullrank", "lowrank"])
def test_encoders_read_x_and_what_is_given(encoder):
    data = dgm.Data(torch.randn(20, 3), given=torch.randn(20, 2))
    program = build("vae", data, encoder=encoder, hidden=(8,)).program
    x, c = torch.zeros(1, 3), torch.ones(1, 2)
    assert not torch.equal(program.encoder((x, c)).mean, program.encoder((x, -c)).mean)


def test_what_is_given_does_not_go_with_everything():
    x, c, y = torch.randn(20, 3), torch.randn(20, 2), torch.arange(20) % 2
    with pytest.raises(ValueError, match="a flow as the encoder can read only a standardized x and a label"):
        build("vae", dgm.Data(x, given=c), encoder="iaf")
    with pytest.raises(ValueError, match="neither the prior nor the likelihood reads the given"):
        build("vae", dgm.Data(x, given=c), likelihood="ar")
    with pytest.raises(ValueError, match="has both labels and a given"):
        build("maf", dgm.Data(x, y, given=c), labeled=True)


# -- large images, and what is too large -------------------------------------------------------------------------------


def large(levels=4, channels=1, size=16, classes=None):
    torch.manual_seed(0)
    x = torch.randint(levels, (8, channels, size, size), dtype=torch.uint8)
    return dgm.Data(x, None if classes is None else torch.arange(8) % classes, levels=levels, name="large")


@pytest.mark.parametrize(
    ("name", "swaps"),
    [
        ("vae", {}),
        ("vae", {"prior": "categorical"}),
        ("vae", {"labeled": True}),
        ("vae", {"likelihood": "pixelcnn"}),
        ("vae", {"prior": "categorical", "likelihood": "pixelcnn"}),
        ("vq-vae", {}),
        ("diffusion", {}),
        ("diffusion-continuous", {"labeled": True}),
        ("pixelcnn", {}),
        ("classifier", {}),
    ],
    ids=str,
)
def test_large_images_get_convolutions_that_train_and_are_stored(name, swaps, tmp_path):
    data = large(classes=2)
    program = build(name, data, **swaps)
    assert any(isinstance(module, torch.nn.Conv2d) for module in program.modules())
    wide = [m for m in program.modules() if isinstance(m, torch.nn.Linear) and m.in_features == 256]
    assert all(m.out_features < 256 for m in wide), "no layer reads pixels one by one"
    dgm.fit(program, data, epochs=1, batch_size=8, progress=False, validation=None)
    dgm.save(program, tmp_path)
    few = {"num_samples": 1}
    values = dgm.evaluate(program, data, **few).values
    assert torch.equal(dgm.evaluate(dgm.load(tmp_path), data, **few).values, values)


def test_images_have_a_grid_of_codes():
    program = build("vq-vae", large(size=28))
    assert program.encoder.codebook is program.prior.codebook
    assert program.event_shape == (1, 28, 28)
    assert program.encoder.event_shape == (32, 7, 7)
    assert program.encoder.codebook.num_codes == 256
    assert build("vq-vae", large(size=72)).encoder.event_shape == (32, 9, 9), "at most 16 places a side"
    asked = build("vq-vae", digits_like(3), num_codes=5, grid=(2, 2), decay=0.9).encoder
    assert (asked.event_shape, asked.codebook.num_codes, asked.codebook.decay) == ((32, 2, 2), 5, 0.9)
    for size, places in ((18, (9, 9)), (8, (2, 2)), (40, (10, 10))):
        assert build("vq-vae", large(size=size)).encoder.event_shape[1:] == places


def test_a_grid_of_latents_keeps_the_places():
    """Networks between grids are convolutions, so their weights do not grow with the image."""
    small, wide = (build("vae", large(size=size), grid=(size // 4, size // 4)) for size in (16, 64))
    assert (small.prior.event_shape, wide.prior.event_shape) == ((8, 4, 4), (8, 16, 16))
    sizes = [sum(p.numel() for p in program.parameters()) for program in (small, wide)]
    assert sizes[0] == sizes[1]
    by_object = build("vae", large(), prior=dgm.Normal((8, 4, 4)))
    assert [*by_object.state_dict()] == [*small.state_dict()], "a prior of this shape has the same networks"
    assert not isinstance(build("vae", large(), prior=dgm.Normal((8, 3, 3))).encoder.network, dgm.networks.ConvNet)
    asked = build("vae", large(), prior=dgm.Normal((8, 4, 4)), hidden=(8,))
    assert isinstance(asked.encoder.network, MLP), "hidden are the widths of MLPs"
    for name in ("diffusion", "diffusion-continuous"):
        assert isinstance(build("vae", large(), grid=(4, 4), prior=name).prior.denoiser, DenoisingUNet)
    flow = build("vae", large(), grid=(4, 4), prior="flow").prior
    assert {type(transform).__name__ for transform in flow.transforms} == {"Partial"}, "multiscale"


def test_the_second_stage_of_a_latent_diffusion_is_a_fit_of_the_prior_to_draws_of_z(float64):
    """Encoder and likelihood stay, so the ELBO rises by E_q log p_2(z) - E_q log p_1(z)."""
    torch.manual_seed(0)
    data = digits_like(3)
    vae = build("vae", data, latent_size=2, grid=(2, 2))
    with torch.no_grad():
        vae.eval().encoder.network.last.bias += 1.5  # far from the first prior, N(0, I)

    def draws(n):
        return vae.encoder.sample(n * len(data), given=data.x.repeat(n, 1, 1, 1))

    prior = dgm.Normal((2, 2, 2), learned=True)
    dgm.fit(prior, dgm.Data(draws(50)), epochs=8, lr=0.05, progress=False, validation=None)
    whole = dgm.VAE(prior, vae.likelihood, vae.encoder)
    first, second = (dgm.evaluate(each, data, num_particles=1, num_samples=50).nats for each in (vae, whole))
    many = draws(50)
    gains = (prior.log_prob(many) - vae.prior.log_prob(many)).detach()
    error = gains.std() / len(gains) ** 0.5
    assert second - first > 4
    assert second - first == pytest.approx(float(gains.mean()), abs=6 * float(error))


def test_a_pixelcnn_has_as_many_stages_and_attention_blocks_as_asked():
    plain, asked = (build("pixelcnn", large(), **option) for option in ({}, {"stages": 2, "attention": 3}))
    found = [(network.stages, len(network.attention)) for network in (plain.factors.network, asked.factors.network)]
    assert found == [(1, 0), (2, 3)]
    assert math.isfinite(dgm.fit(asked, large(), gradient_steps=1, progress=False, validation=None).losses[-1])


def test_a_pixelcnn_of_gray_levels_has_predictions():
    gray, color, bits, few = large(levels=256), large(levels=256, channels=3), large(levels=2), large(levels=17)
    for data, options, components in (
        (gray, {}, 8), (color, {}, 11), (color, {"predictors": False}, 5), (few, {}, 5), (few, {"predictors": True}, 8),
    ):  # fmt: skip
        factors = build("pixelcnn", data, **options).factors
        assert isinstance(factors, dgm.PredictedLogistic) == (components > 5)
        assert factors.components == components
    assert isinstance(build("pixelcnn", bits).factors, dgm.Bernoulli)


@pytest.mark.parametrize("size", [8, 16])
def test_every_pixel_reads_a_given_image_at_every_place(size):
    data = dgm.Data(torch.randint(4, (9, 1, size, size)), levels=4, given=torch.randn(9, 2, size, size))
    network = build("pixelcnn", data, standardize=False).double().eval().factors.network
    x, given = torch.randint(4, (1, 1, size, size)), torch.randn(1, 2, size, size, dtype=torch.float64)
    moved = torch.autograd.functional.jacobian(lambda given: network(x, given)[:, :, :, 0, 0].sum(), given)
    reach = moved.abs().sum((0, 1)).nonzero()
    assert reach.amax() >= 3, "the first pixel reads beyond its own place"


def test_the_pixelcnn_of_a_likelihood_reads_maps_of_z_in_large_images():
    network = build("vae", large(), likelihood="pixelcnn").likelihood.factors.network
    assert isinstance(network, dgm.networks.EmbeddedGiven)
    assert tuple(network.embedded_shape) == (16, 16, 16)
    assert not isinstance(build("vae", digits_like(4), likelihood="pixelcnn").likelihood.factors.network, type(network))


@pytest.mark.parametrize(
    ("model", "data", "options", "message"),
    [
        ("vae", large(), {"attention": 1}, "'vae' takes no attention: it is a part of 'pixelcnn'$"),
        ("pixelcnn", large(), {"stages": 0}, "stages must be a positive integer"),
        ("pixelcnn", large(size=20), {"stages": 4}, "with stages=4, the sides of the image must be multiples of 8"),
        ("pixelcnn", large(), {"attention": -1}, "attention must be an int of at least 0"),
        ("pixelcnn", large(), {"attention": 8}, "attention must be less than layers, 8, got 8"),
        ("pixelcnn", large(levels=2), {"predictors": True}, "predict gray levels, but .* has bits: leave out"),
        ("pixelcnn", dgm.Data(torch.rand(8, 1, 16, 16)), {"predictors": True}, "but .* has reals: leave out"),
        ("vae", large(), {"num_codes": 4}, "'vae' takes no num_codes: it is a part of 'vq-vae'$"),
        ("made", large(), {"grid": (4, 4)}, "'made' takes no grid: it is a part of 'vae' and 'vq-vae'$"),
        ("vae", large(), {"grid": (5, 5)}, r"\(8, 8\), \(4, 4\), .*got \(5, 5\) for 16x16 pixels"),
        ("vae", dgm.Data(torch.randn(9, 3)), {"grid": (1, 1)}, "grid needs images"),
        ("vae", large(), {"grid": (4, 4), "hidden": (8,)}, "leave out hidden or grid"),
        ("vae", large(), {"grid": (4, 4), "prior": "vae"}, "'vae' is for no z of .* or use one of normal, .*diffusion"),
        (
            "vae",
            large(),
            {"grid": (4, 4), "prior": dgm.Normal((2, 4, 4))},
            r"has event_shape \(2, 4, 4\): leave grid out",
        ),
        ("vae", large(), {"encoder": "categorical"}, "is for one class: use prior='categorical'"),
        ("vae", large(), {"encoder": dgm.Normal(2), "prior": "categorical"}, r"one class, but .* \(2,\): use encoder="),
        ("vq-vae", large(), {"prior": "codes"}, "'vq-vae' takes no prior: it is a part of 'vae'$"),
        ("vq-vae", large(), {"grid": (5, 5)}, r"\(8, 8\), \(4, 4\), .*got \(5, 5\) for 16x16 pixels"),
        ("vq-vae", large(size=17), {}, "so they must be even.* for 17x17 pixels"),
        ("vq-vae", dgm.Data(torch.randn(9, 3)), {}, ".vq-vae. needs images .*: use 'vae' with prior='codes'"),
        ("vq-vae", large(), {"num_codes": 0}, "num_codes must be"),
        ("vq-vae", large(), {"decay": 2}, "decay must be"),
    ],
)
def test_options_that_do_not_fit_are_refused(model, data, options, message):
    with pytest.raises(ValueError, match=message):
        build(model, data, **options)


def test_weights_are_shared_among_places():
    for name in ("vae", "pixelcnn", "diffusion"):
        small, wide = (
            sum(p.numel() for p in build(name, large(256, 3, size), labeled=False).parameters()) for size in (32, 64)
        )
        assert wide < 4 * small, name  # four times the pixels


def test_hidden_widths_that_are_asked_for_are_those_of_an_mlp():
    program = build("vae", large(), hidden=(8,))
    assert not any(isinstance(module, torch.nn.Conv2d) for module in program.modules())


def test_samples_of_the_data_are_counted_as_all_of_them(monkeypatch):
    monkeypatch.setattr(catalog, "NUMBERS_FOR_UNITS", 10_000)
    images = torch.randn(6000, 1, 16, 16)
    few, many = (build("diffusion", dgm.Data(images[:n])) for n in (4000, 6000))
    assert [next(m.p for m in p.modules() if isinstance(m, torch.nn.Dropout)) for p in (few, many)] == [0.2, 0.1]


@pytest.mark.parametrize("data", [large(), digits_like(None), dgm.Data(torch.randn(9, 3))], ids=str)
@pytest.mark.parametrize("name", [name for name in MODELS if name != "classifier"])
def test_what_is_counted_without_memory_is_what_is_made(name, data):
    if MODELS[name][1].endswith("(images)") and len(data.event_shape) == 1:
        return
    torch.manual_seed(0)
    program = build(name, data)
    drawn = torch.rand(())
    torch.manual_seed(0)
    with pytest.raises(TooLargeError, match=r"max_parameters is 1\. These fit: none") as caught:
        build(name, data, max_parameters=1)
    assert caught.value.num_parameters == sum(p.numel() for p in program.parameters())
    build(name, data, max_parameters=caught.value.num_parameters)
    assert torch.rand(()) == drawn, "no random number is drawn to count"


def test_a_made_of_large_images_is_refused_before_it_takes_memory():
    images = dgm.Data(torch.zeros(2, 3, 64, 64, dtype=torch.uint8), levels=256, name="photos")
    size, before = 3 * 64 * 64, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(TooLargeError, match=r"'made' would have 2,365,\d+,\d+ .*photos.* fit: .*pixelcnn \(") as caught:
        build("made", images)
    weights = size * 512 + 512 * 15 * size + 15 * size**2
    assert caught.value.num_parameters == weights + 512 + 15 * size
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**17  # 128 MiB
    assert "made" not in str(caught.value).split("fit:")[1]


@pytest.mark.parametrize("model", ["diffusion", "diffusion-continuous"])
def test_a_diffusion_takes_a_network_and_a_prediction(model):
    images = dgm.data.load("glyphs", num_data=50)
    program = dgm.build(model, images, network="dit", predict="edm", labeled=True).program
    assert isinstance(program.denoiser, DenoisingTransformer)
    assert program.denoiser.num_classes == images.num_classes
    assert program.predict == "edm"
    unit = images.x.double() * 2 / 255 - 1
    assert program.sigma_data == pytest.approx(unit.std().item())
    points = dgm.build(model, dgm.data.load("moons", num_data=50), predict="noise").program
    assert (points.predict, type(points.denoiser)) == ("noise", DenoisingMLP)


@pytest.mark.parametrize(
    ("model", "swaps", "message"),
    [
        ("diffusion", {"network": "dit"}, "network 'dit' needs images"),
        ("diffusion", {"network": "resnet"}, "network must be one of mlp, unet, dit, got 'resnet'"),
        ("diffusion", {"predict": "score"}, "predict must be one of noise, x0, v, edm, levels, got 'score'"),
        ("diffusion", {"predict": "levels"}, "predict='levels' needs integer data"),
        ("diffusion", {"prior": "flow"}, "'diffusion' takes no prior: it is a part of 'vae'$"),
        ("vae", {"network": "dit"}, "'vae' takes no network"),
        ("made", {"predict": "v"}, "'made' takes no predict"),
    ],
)
def test_a_part_that_the_model_does_not_have_is_refused(model, swaps, message):
    with pytest.raises(ValueError, match=message):
        dgm.build(model, dgm.data.load("moons", num_data=50), **swaps)
