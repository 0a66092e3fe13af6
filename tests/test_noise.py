"""What is said of a datum is a function of the datum, the program and the seed: not of its batch, nor of its row."""

import math

import pyro.distributions as dist
import pytest
import torch
from programs import CASES
from scipy import stats

import dgm_pyro as dgm
from dgm_pyro import noise
from dgm_pyro.infer.gaps import best_elbo
from dgm_pyro.uses.anomaly import Complexity, Detector, NegativeLogLikelihood, PosteriorKL, Ratio, Typicality
from dgm_pyro.uses.classification import beliefs

pytestmark = pytest.mark.usefixtures("float64")

# -- the noise itself --------------------------------------------------------------------------------------------------

FAMILIES = {
    "normal": (dist.Normal, (0.3, 2.0), stats.norm(0.3, 2.0)),
    "uniform": (dist.Uniform, (-1.0, 3.0), stats.uniform(-1.0, 4.0)),
    "exponential": (dist.Exponential, (2.0,), stats.expon(scale=0.5)),
    "cauchy": (dist.Cauchy, (0.5, 2.0), stats.cauchy(0.5, 2.0)),
    "laplace": (dist.Laplace, (0.5, 2.0), stats.laplace(0.5, 2.0)),
    "logistic": (dist.Logistic, (0.5, 2.0), stats.logistic(0.5, 2.0)),
    "gamma": (dist.Gamma, (0.7, 2.0), stats.gamma(0.7, scale=0.5)),
    "beta": (dist.Beta, (0.7, 2.0), stats.beta(0.7, 2.0)),
    "student": (dist.StudentT, (4.0,), stats.t(4.0)),
    "poisson": (dist.Poisson, (3.0,), stats.poisson(3.0)),
    "binomial": (dist.Binomial, (7, 0.3), stats.binom(7, 0.3)),
    "bernoulli": (dist.Bernoulli, (0.3,), stats.bernoulli(0.3)),
    "geometric": (dist.Geometric, (0.3,), stats.geom(0.3, loc=-1)),
}


def drawn(family, parameters, batch=(5, 40), x=None, seed=0):
    x = torch.randn(batch[-1], 3) if x is None else x
    with noise.per_datum(x, seed), noise.drawing(batch):
        return family(*(torch.tensor(float(p)) for p in parameters)).expand(batch).sample()


def fits(values, reference):
    """By a test that the distribution is the reference's; discrete ones by their frequencies."""
    if isinstance(reference.dist, stats.rv_continuous):
        return stats.kstest(values.numpy(), reference.cdf).pvalue > 1e-4
    edges = range(int(values.max()) + 1)
    expected = torch.tensor([reference.pmf(k) for k in edges]) * len(values)
    counts = torch.stack([(values == k).sum() for k in edges]).double()
    common = expected >= 5
    statistic = ((counts - expected) ** 2 / expected)[common].sum()
    return stats.chi2(int(common.sum()) - 1).sf(float(statistic)) > 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_draws_have_the_distribution(name):
    """Over data, over the particles of one datum, and over the elements of one particle."""
    family, parameters, reference = FAMILIES[name]
    for batch in ((4000,), (4000, 1), (2, 2000), (4000, 1, 1)):
        assert fits(drawn(family, parameters, batch).flatten(), reference), batch
    with noise.per_datum(torch.randn(1, 3), 0), noise.drawing((1,)):
        elements = family(*(torch.tensor(float(p)) for p in parameters)).expand((1, 4000)).sample()
    assert fits(elements[0], reference)


@pytest.mark.parametrize("size", [3, 5])
def test_classes_have_their_probabilities(size):
    p = torch.rand(size)
    with noise.per_datum(torch.randn(6000, 2), 0), noise.drawing((6000,)):
        values = dist.Categorical(p).expand((6000,)).sample()
    frequencies = torch.bincount(values, minlength=size) / 6000
    p = p / p.sum()
    assert ((frequencies - p).abs() < 4.5 * (p * (1 - p) / 6000).sqrt()).all()


def test_a_simplex_has_its_mean_and_covariance():
    alpha = torch.tensor([0.5, 1.0, 2.5])
    with noise.per_datum(torch.randn(5000, 2), 0), noise.drawing((5000,)):
        values = dist.Dirichlet(alpha).expand((5000,)).sample()
    mean = alpha / 4
    assert ((values.mean(0) - mean).abs() < 4.5 * (mean * (1 - mean) / 5 / 5000).sqrt()).all()
    assert values.var(0) == pytest.approx((mean * (1 - mean) / 5).numpy(), rel=0.15)


def test_draws_are_independent():
    """Neighbors among data, particles, elements, draws and seeds, and data that are nearly the same."""
    x = torch.randn(300, 2)
    with noise.per_datum(x, 0), noise.drawing((30, 300)):
        first, second = torch.randn(30, 300, 40), torch.randn(30, 300, 40)
    others = []
    for rows, seed in ((x, 1), (x + 1e-15, 0), (-x, 0), (x.flip(1), 0)):
        with noise.per_datum(rows, seed), noise.drawing((30, 300)):
            others.append(torch.randn(30, 300, 40))
    pairs = [(first[1:], first[:-1]), (first[:, 1:], first[:, :-1]), (first[..., 1:], first[..., :-1])]
    for a, b in [*pairs, (first, second), *((first, other) for other in others)]:
        for moment in (lambda z: z, lambda z: z**2 - 1):
            product = moment(a) * moment(b)
            assert abs(product.mean()) < 4.5 * product.std() / product.numel() ** 0.5


def test_uniform_numbers_lie_below_one_in_every_precision():
    x = torch.randn(1, 2)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        with noise.per_datum(x, 0), noise.drawing((1,)):
            u = torch.rand(1, 200_000, dtype=dtype)
        assert u.dtype == dtype
        assert u.min() >= 0
        assert u.max() < 1
        assert abs(float(u.double().mean()) - 0.5) < 4.5 / math.sqrt(12 * 200_000) + float(torch.finfo(dtype).eps)


def test_noise_follows_values_not_types_rows_or_chunks():
    x = torch.tensor([[0.5, -1.0], [2.0, 0.0], [3.0, 1.0]])
    with noise.per_datum(x, 7), noise.drawing((6, 3)):
        whole = torch.randn(6, 3, 2)
    for rows in ([0], [2, 1], [1, 0, 2, 1]):
        for part in (x[rows], x[rows].float(), x[rows] * torch.where(x[rows] == 0, -1, 1)):
            with noise.per_datum(part, 7), noise.drawing((6, len(rows))):
                torch.testing.assert_close(torch.randn(6, len(rows), 2), whole[:, rows], rtol=0, atol=0)
    for size in (1, 4, 6):
        parts = []
        with noise.per_datum(x, 7):
            for _, count in noise.chunks(6, size):
                with noise.drawing((count, 3)):
                    parts.append(torch.randn(count, 3, 2))
            with noise.drawing((3,)):
                after = torch.randn(3)
        assert torch.equal(torch.cat(parts), whole)
        assert not torch.equal(after, whole[0, :, 0])
    counts = torch.tensor([[1, 2], [3, 4]])
    assert torch.equal(noise.row_keys(counts), noise.row_keys(counts.to(torch.uint8)))


def test_what_has_no_data_dimension_is_the_same_in_every_batch():
    seen = []
    for size in (1, 4):
        with noise.per_datum(torch.randn(size, 2), 3), noise.drawing((7, size)):
            seen.append(torch.randn(5))
    assert torch.equal(*seen)


def test_noise_that_cannot_be_a_datums_own_is_refused():
    with noise.per_datum(torch.randn(3, 2), 0), noise.drawing((3,)):  # noqa: SIM117
        with pytest.raises(NotImplementedError, match="randperm"):
            torch.randperm(3)


def test_torchs_generators_are_left_alone_outside_and_those_given_inside():
    x = torch.randn(3, 2)
    with noise.per_datum(x, 0):
        torch.manual_seed(0)
        plain = torch.randn(3)
        with noise.drawing((3,)):
            given = torch.randn(3, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    assert torch.equal(torch.randn(3), plain)
    assert torch.equal(given, plain)


# -- every program -----------------------------------------------------------------------------------------------------


def same_in_every_batch(of, num, tolerance=1e-7):
    """``of(rows)``, numbers along the first dimension, of data alone, in threes and shuffled is that of the whole."""
    whole = of(torch.arange(num))
    for parts in (torch.arange(num).split(1), torch.arange(num).split(3), torch.randperm(num).split(5)):
        found = torch.cat([of(rows) for rows in parts])
        torch.testing.assert_close(found, whole[torch.cat(parts)], rtol=tolerance, atol=tolerance)


UNCONDITIONAL = {name: case for name, case in CASES.items() if not case.example.conditional}
BOUNDED = {name: case for name, case in UNCONDITIONAL.items() if not case.example.tractable}
CONTINUOUS = [name for name, case in BOUNDED.items() if "continuous-diffusion" in name and "prior" not in name]


@pytest.mark.parametrize("name", BOUNDED)
@pytest.mark.parametrize("num_particles", [1, 6])
def test_the_bound_of_a_datum_is_its_own(monkeypatch, name, num_particles):
    """With particles in chunks of other sizes for other batches, too."""
    if num_particles > 1 and name in CONTINUOUS:
        pytest.skip("particles are refused for a bound in continuous time")
    monkeypatch.setattr(dgm.evaluation, "ROWS_AT_ONCE", 8)
    program = BOUNDED[name].build()
    x, _ = BOUNDED[name].draw(program, 8)
    same_in_every_batch(
        lambda rows: dgm.evaluate(program, x[rows], num_particles=num_particles, num_samples=3).values, 8
    )
    at = [dgm.evaluate(program, x, num_particles=num_particles, num_samples=3, seed=seed).values for seed in (0, 1)]
    assert name in (*EXACT_POSTERIORS, *DETERMINISTIC) or not torch.equal(*at)


# Where the weights of all draws are equal, as they are p(x).
EXACT_POSTERIORS = ("vae-exact-linear", "vae-exact-bits", "vae-exact-class")
DETERMINISTIC = ("vae-quantized",)


def test_the_density_of_a_flow_of_a_diffusion_is_a_datums_own():
    program = CASES["continuous-diffusion"].build()
    x, _ = CASES["continuous-diffusion"].draw(program, 5)
    same_in_every_batch(lambda rows: dgm.evaluate(program, x[rows], ode=True).values, 5)


SCORED = [
    "vae-linear",
    "vae-two-levels",
    "dequantized",
    "diffusion-integers",
    "continuous-diffusion-integers",
    "labeled-vae",
]


@pytest.mark.parametrize("name", SCORED)
def test_scores_are_a_datums_own(name):
    program = CASES[name].build()
    x, _ = CASES[name].draw(program, 8)
    background = NegativeLogLikelihood(CASES[name].build(seed=5))
    scores = [NegativeLogLikelihood(program), Typicality(program, x), Ratio(program, background), PosteriorKL(program)]
    scores += [dgm.anomaly.WAIC([program, background])]
    scores += [Complexity(program, "zlib")] if program.levels else []
    scores += [] if name in CONTINUOUS else [NegativeLogLikelihood(program, num_particles=4)]
    for score in scores:
        same_in_every_batch(lambda rows, score=score: score(x[rows]), 8)


@pytest.mark.parametrize("name", [name for name in BOUNDED if name.startswith("labeled")])
def test_answers_are_a_datums_own(name):
    program = CASES[name].build().eval()
    x, _ = CASES[name].draw(program, 5)
    for particles in (1, 3):
        same_in_every_batch(lambda rows, k=particles: program.class_probabilities(x[rows], k), 5)
        for part in (0, 1):
            same_in_every_batch(lambda rows, k=particles, part=part: beliefs(program, x[rows], 2, k)[part], 5)


@pytest.mark.parametrize("draw", [False, True])
@pytest.mark.parametrize(
    "name", ["vae", "vae-two-levels", "vae-ladder", "vae-flow-encoder", "vae-codes", "dequantized", "nsf", "diffusion"]
)
def test_codes_are_a_datums_own(name, draw):
    program = CASES[name].build()
    x, _ = CASES[name].draw(program, 8)
    for site in dgm.representations.codes(program):
        same_in_every_batch(
            lambda rows, site=site: dgm.representations.encode(program, x[rows], site=site, draw=draw, num_samples=3), 8
        )


def test_annealed_evidence_is_a_datums_own():
    program = CASES["vae-linear"].build()
    x, _ = CASES["vae-linear"].draw(program, 4)
    options = {"num_chains": 3, "num_temperatures": 5, "num_leapfrog": 2}
    same_in_every_batch(lambda rows: dgm.infer.ais(program, x[rows], **options).log_evidence, 4)


@pytest.mark.parametrize("name", ["diffusion", "diffusion-integers"])
def test_resampled_evidence_is_a_datums_own(name):
    program = CASES[name].build()
    x, _ = CASES[name].draw(program, 8)
    same_in_every_batch(lambda rows: dgm.infer.smc(program, x[rows], num_particles=6).log_evidence, 8, 1e-5)


@pytest.mark.parametrize("name", ["vae-linear", "vae-flow-encoder"])
def test_gaps_are_a_datums_own(name):
    """But for which bound is log p(x), which is the one with the highest mean."""
    program = CASES[name].build()
    x, _ = CASES[name].draw(program, 6)
    options = {"gradient_steps": 5, "num_samples": 8, "num_particles": 4, "num_temperatures": 0}

    def of(rows):
        found = dgm.infer.gaps(program, x[rows], **options, log_evidence=torch.zeros(len(rows)))
        return torch.stack([best_elbo(program, x[rows], gradient_steps=5, num_samples=8), found.elbo], 1)

    same_in_every_batch(of, 6, 1e-5)


# -- alarms ------------------------------------------------------------------------------------------------------------

ALARMS = ["vae-linear", "dequantized-bytes", "diffusion", "diffusion-bytes", "continuous-diffusion",
          "vae-diffusion-prior", "labeled-diffusion", "vae-bit-latent"]  # fmt: skip


@pytest.mark.parametrize("name", ALARMS)
def test_false_alarms_are_as_frequent_as_said_in_batches_of_any_size(name):
    """One in ten of data like the reference, give or take the threshold's own error; and not none."""
    case = CASES[name]
    program = case.build().float()
    x, _ = case.draw(program, 1150, dtype=torch.float32)
    x = program.sample(1150) if program.levels is None else x
    detector = Detector(program).calibrate(x[:150], false_alarm_rate=0.1)
    whole = detector.flag(x[150:])
    # The share of alarms at a threshold of 150 reference data is a Beta variable, and 1000 data a sample of it.
    error = math.sqrt(0.1 * 0.9 * (1 / 152 + 1 / 1000))
    assert 0.1 - 4 * error < whole.double().mean() <= 0.1 + 4 * error
    assert whole.any()
    for size in (1, 2, 3, 5, 10, 50):
        part = x[150:210] if size < 10 else x[150:350]
        flags = torch.cat([detector.flag(batch) for batch in part.split(size)])
        assert torch.equal(flags, whole[: len(part)]), size


def test_a_datum_that_ties_with_the_threshold_is_no_alarm_whatever_the_rounding():
    """Many binary data are equal, and rounding makes their scores differ between batches."""
    detector = Detector(lambda x: x[:, 0]).calibrate(torch.tensor([[1.0]] * 8 + [[2.0]] * 2), false_alarm_rate=0.1)
    x = torch.tensor([[2.0], [2.0 + 1e-7], [2.0 - 1e-7], [2.1]])
    assert detector.flag(x).tolist() == [False, False, False, True]
    assert torch.equal(detector.p_values(x) <= 0.1, detector.flag(x))
