"""Scores against hand computations, the false-alarm rate against counting, the AUROC against all pairs."""

import io
import math
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import dgm_pyro as dgm
from dgm_pyro import anomaly, corruptions
from dgm_pyro.uses.anomaly import WAIC, Complexity, Detector, NegativeLogLikelihood, PosteriorKL, Ratio, Typicality

BITS = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
LOG_P = torch.tensor([0.8 * 0.3, 0.8 * 0.7, 0.2 * 0.3, 0.2 * 0.7]).double().log()  # of BITS under two_bits(0.2, 0.7)


def two_bits(*probabilities):
    return dgm.Bernoulli(2, parameters=torch.logit(torch.tensor([probabilities])))


def linear_vae():
    """z ~ N(0, 1), q(z | x) of mean x / 2 and a scale that does not depend on x."""
    encoder = torch.nn.Linear(1, 2)
    encoder.weight.data = torch.tensor([[0.5], [0.0]])
    encoder.bias.data = torch.tensor([0.0, 0.3])
    return dgm.VAE(dgm.Normal(1), dgm.Normal(1, torch.nn.Linear(1, 2)), dgm.Normal(1, encoder))


# -- each score by hand ------------------------------------------------------------------------------------------------


def test_surprise_is_minus_log_p():
    assert torch.allclose(NegativeLogLikelihood(two_bits(0.2, 0.7))(BITS), -LOG_P, atol=1e-6)


def test_surprise_of_latent_variables_is_minus_the_bound():
    vae, x = linear_vae(), torch.randn(5, 1)
    expected = dgm.evaluate(vae, x, num_particles=3).values
    assert torch.equal(NegativeLogLikelihood(vae, num_particles=3)(x), -expected)


def test_typicality_is_the_distance_to_the_mean_surprise():
    entropy = -(LOG_P[0] + LOG_P[3]) / 2
    score = Typicality(two_bits(0.2, 0.7), BITS[[0, 3]])
    assert torch.allclose(score(BITS), (-LOG_P - entropy).abs(), atol=1e-6)


def test_ratio_is_the_difference_of_log_densities():
    score = Ratio(two_bits(0.2, 0.7), two_bits(0.5, 0.5))
    assert torch.allclose(score(BITS), math.log(0.25) - LOG_P, atol=1e-6)


def test_complexity_takes_the_code_length_away():
    expected = -LOG_P - math.log(2) * torch.tensor([8.0 * len(zlib.compress(bytes(row.tolist()), 9)) for row in BITS])
    assert torch.allclose(Complexity(two_bits(0.2, 0.7), "zlib")(BITS), expected, atol=1e-6)


def test_png_is_lossless_and_longer_for_noise():
    x = torch.stack([torch.zeros(1, 28, 28), torch.arange(784).reshape(1, 28, 28) % 256, torch.rand(1, 28, 28) * 255])
    x = x.to(torch.uint8)
    bits = anomaly.code_bits(x)
    for image, length in zip(x, bits, strict=True):
        code = anomaly.COMPRESSORS["png"](image)
        assert 8 * len(code) == length
        with Image.open(io.BytesIO(code)) as picture:
            assert np.asarray(picture).tolist() == image[0].tolist()
    assert bits[0] < bits[1] < bits[2]
    assert bits[2] > 8 * 784  # noise of 256 levels cannot be compressed


def test_waic_of_three_normals():
    means, x = (-1.0, 0.0, 2.0), torch.tensor([[0.0], [3.0]])
    programs = [dgm.Normal(1, parameters=torch.stack([torch.tensor([m]), dgm.Normal(1).initial()[1]])) for m in means]
    log_p = torch.tensor([[-0.5 * (value - m) ** 2 - 0.5 * math.log(2 * math.pi) for m in means] for value in (0, 3)])
    expected = log_p.var(1, correction=0) - log_p.mean(1)
    assert torch.allclose(WAIC(programs)(x).float(), expected, atol=1e-5)


def test_posterior_kl_of_normals():
    vae, x = linear_vae(), torch.tensor([[-2.0], [0.0], [3.0]])
    scale = vae.encoder(x).base_dist.scale[0, 0].item()
    expected = 0.5 * (scale**2 + (x[:, 0] / 2) ** 2 - 1) - math.log(scale)
    assert torch.allclose(PosteriorKL(vae)(x).float(), expected, atol=1e-6)


def test_posterior_kl_is_that_of_the_evidence_at_all_levels():
    digits = dgm.data.load("digits-binary", num_data=20)
    vae = dgm.build("vae", digits, prior="vae", latent_size=4, hidden=(8,))
    evidence = dgm.evaluate(vae, digits.x, num_samples=8)
    assert PosteriorKL(vae)(digits.x).mean().item() == pytest.approx(sum(evidence.kl.values()), rel=1e-6)


# -- alarms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "rate"), [(19, 0.05), (99, 0.01), (100, 0.01), (57, 0.1), (200, 0.07), (30, 0.5)])
def test_of_exchangeable_data_the_promised_share_is_flagged(size, rate):
    """Let each of n + 1 data be the new one in turn: of the n + 1 alarms, floor((n + 1) alpha) ring, exactly."""
    x = torch.randn(size + 1, 1)
    flags, p_values = [], []
    for i in range(len(x)):
        rest = torch.cat([x[:i], x[i + 1 :]])
        detector = Detector(lambda x: x[:, 0]).calibrate(rest, rate)
        flags.append(detector.flag(x[i : i + 1]).item())
        p_values.append(detector.p_values(x[i : i + 1]).item())
    assert sum(flags) == math.floor((size + 1) * rate + 1e-9)
    assert sorted(p_values) == pytest.approx([(i + 1) / (size + 1) for i in range(size + 1)])
    assert flags == [p <= rate + 1e-9 for p in p_values]


def test_ties_only_lower_the_rate():
    x = torch.tensor([[0.0]] * 50 + [[1.0]] * 50)
    rung = sum(
        Detector(lambda x: x[:, 0]).calibrate(torch.cat([x[:i], x[i + 1 :]]), 0.3).flag(x[i : i + 1]).item()
        for i in range(len(x))
    )
    assert rung == 0  # the half that scores 1 cannot be told apart, and is more than 0.3


def test_the_rate_holds_for_fresh_data_whatever_the_program():
    """Flags of fresh data given many reference sets: their mean is alpha, within 4 standard errors."""
    program, rate, rounds, size = dgm.Normal(2), 0.1, 300, 99
    random = torch.Generator().manual_seed(0)
    shares = []
    for _ in range(rounds):
        x = 3 * torch.rand((2 * size, 2), generator=random)  # nothing like the program
        shares.append(Detector(program).calibrate(x[:size], rate).flag(x[size:]).double().mean())
    shares = torch.stack(shares)
    assert abs(shares.mean() - rate) < 4 * shares.std() / rounds**0.5


def test_auroc_and_its_error():
    random = torch.Generator().manual_seed(0)
    normal = torch.randint(6, (40,), generator=random).double()
    anomalous = torch.randint(2, 9, (30,), generator=random).double()
    pairs = (anomalous[:, None] > normal).double() + 0.5 * (anomalous[:, None] == normal).double()
    found = anomaly.separation(normal, anomalous)
    assert found.auroc == pytest.approx(pairs.mean().item())
    expected = (pairs.mean(1).var() / 30 + pairs.mean(0).var() / 40).sqrt().item()
    assert found.stderr == pytest.approx(expected)


def test_the_error_of_the_auroc_is_its_spread():
    random = torch.Generator().manual_seed(1)
    found = [
        anomaly.separation(torch.randn(60, generator=random), 1 + torch.randn(40, generator=random)) for _ in range(400)
    ]
    spread = torch.tensor([each.auroc for each in found]).std().item()
    error = torch.tensor([each.stderr for each in found]).mean().item()
    assert error == pytest.approx(spread, rel=4 / (2 * 400) ** 0.5)  # 4 standard errors of a standard deviation


def test_a_likelihood_fails_and_a_ratio_repairs_it():
    """Data whose background is dull are likely for any program: here, points from a narrower Normal."""
    normal, dull = 2 * torch.randn(500, 4), 0.5 * torch.randn(500, 4)
    wide = dgm.Normal(4, parameters=torch.stack([torch.zeros(4), torch.full((4,), 1.8546)]))
    assert anomaly.separation(NegativeLogLikelihood(wide)(normal), NegativeLogLikelihood(wide)(dull)).auroc < 0.1
    assert anomaly.separation(Ratio(wide, dgm.Normal(4))(normal), Ratio(wide, dgm.Normal(4))(dull)).auroc > 0.9


def test_mutations_change_the_share_they_say():
    x = torch.zeros(200, 1, 8, 8, dtype=torch.uint8)
    share = (corruptions.mutate(x, 0.3, 17) > 0).double().mean().item()
    expected = 0.3 * 16 / 17
    assert abs(share - expected) < 4 * (expected * (1 - expected) / x.numel()) ** 0.5
    assert torch.equal(corruptions.mutate(x, 0.0, 17), x)


# -- what does not fit -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (
            lambda: NegativeLogLikelihood(dgm.build("classifier", dgm.data.load("digits", num_data=10))),
            "has no p\\(x\\) to score x by",
        ),
        (lambda: NegativeLogLikelihood(dgm.Normal(2, torch.nn.Linear(1, 4))), "has no p\\(x\\) to score x by"),
        (lambda: Ratio(two_bits(0.5, 0.5), dgm.Normal(2)), "is a mass, but the background is a density"),
        (lambda: Complexity(dgm.Normal(2)), "a density on reals: use another score"),
        (lambda: Complexity(two_bits(0.5, 0.5), "gif"), "compressor must be one of png, zlib"),
        (lambda: Complexity(two_bits(0.5, 0.5))(BITS), "use compressor='zlib'"),
        (lambda: WAIC([two_bits(0.5, 0.5)]), "needs at least 2"),
        (lambda: PosteriorKL(two_bits(0.5, 0.5)), "has no latents"),
        (lambda: Detector(two_bits(0.5, 0.5)).flag(BITS), "call detector.calibrate"),
        (lambda: Detector(two_bits(0.5, 0.5)).calibrate(BITS, 0.01), "pass at least 99"),
        (lambda: Detector(two_bits(0.5, 0.5)).calibrate(BITS, 0.0), "false_alarm_rate must be a number above 0"),
        (lambda: Detector(lambda x: x).calibrate(BITS, 0.5), "return one per datum"),
        (lambda: Detector(lambda x: x[:, 0] * math.nan).calibrate(BITS, 0.5), "is NaN"),
        (lambda: corruptions.mutate(BITS, 1.5, 2), "rate must be a number"),
    ],
)
def test_bad_input(attempt, words):
    with pytest.raises(ValueError, match=words):
        attempt()


def test_what_is_no_program_and_what_no_integer():
    with pytest.raises(TypeError, match="got Linear"):
        NegativeLogLikelihood(torch.nn.Linear(2, 1))
    with pytest.raises(TypeError, match="a compressor codes integers"):
        anomaly.code_bits(torch.rand(2, 1, 4, 4))
    with pytest.raises(ValueError, match="one byte holds"):
        anomaly.code_bits(torch.tensor([[300]]), "zlib")
