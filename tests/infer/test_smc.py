"""Sequential Monte Carlo: normalizers without bias, and bounds no looser than those of importance sampling."""

import math

import pyro
import pytest
import torch
from programs import CASES, continuous, diffusion, made, replicas
from test_continuous import small
from test_impute import jittered
from torch.distributions import MultivariateNormal, Normal
from torch.utils._python_dispatch import TorchDispatchMode

import dgm_pyro as dgm
from dgm_pyro.infer import Features, Times, propagate, smc
from dgm_pyro.infer.smc import effective_number, systematic, take

pytestmark = pytest.mark.usefixtures("float64")


class Walk:
    """s_1 ~ N(0, 1), s_i ~ N(0.8 s_{i-1}, 0.5^2), seen as y_i ~ N(s_i, 0.4^2): the bootstrap filter."""

    def __init__(self, y):
        self.y = y

    def __len__(self):
        return self.y.shape[1] - 1

    def start(self, batch):
        s = torch.randn(*batch)
        return {"s": s}, Normal(s, 0.4).log_prob(self.y[:, 0])

    def step(self, i, state):
        s = 0.8 * state["s"] + 0.5 * torch.randn_like(state["s"])
        return {"s": s}, Normal(s, 0.4).log_prob(self.y[:, i + 1])


def walk_covariance(size):
    transition, noise = torch.eye(size), torch.eye(size)
    for i in range(1, size):
        transition[i, :i] = 0.8 * transition[i - 1, :i]
        noise[i, i] = 0.25
    return transition @ noise @ transition.T + 0.16 * torch.eye(size)


def unbiased(log_estimates, log_truth):
    """Whether the mean of exp(log estimate) over the last dimension is that of the truth: 4.5 standard errors."""
    ratio = (log_estimates - log_truth).exp()
    return abs(ratio.mean() - 1) < 4.5 * ratio.std() / math.sqrt(ratio.numel())


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.1])
def test_the_normalizer_of_a_gaussian_chain_has_no_bias(threshold):
    """Never, sometimes and always resampled."""
    y = torch.tensor([[0.3, -0.9, 0.2, 1.1, 1.0]])
    truth = MultivariateNormal(torch.zeros(5), walk_covariance(5)).log_prob(y)
    population = propagate(Walk(y.expand(4000, -1)), 16, 4000, threshold=threshold)
    assert unbiased(population.log_evidence, truth)
    assert population.log_evidence.mean() < truth
    resampled = population.resampled.double().mean()
    assert {0.0: resampled == 0, 0.5: 0 < resampled < 4, 1.1: resampled == 4}[threshold]


def test_weighted_particles_have_the_mean_of_the_kalman_filter():
    y = torch.tensor([[0.3, -0.9, 0.2, 1.1, 1.0]])
    covariance = walk_covariance(5)
    cross = covariance[-1] - 0.16 * torch.eye(5)[-1]
    mean = cross @ torch.linalg.solve(covariance, y[0])
    population = propagate(Walk(y.expand(200, -1)), 1000, 200)
    means = (population.log_weights.softmax(0) * population.state["s"]).sum(0)
    assert abs(means.mean() - mean) < 4.5 * means.std() / math.sqrt(200)


def test_observed_features_by_enumeration():
    program = jittered(made(dgm.Categorical, 4, levels=3, order=(2, 0, 3, 1)))
    x, mask = torch.tensor([[0, 2, 1, 2]]), torch.tensor([[False, True, False, True]])
    free = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    every = x.expand(9, 4).clone()
    every[:, [0, 2]] = free
    truth = program.log_prob(every).logsumexp(0).detach()
    with torch.no_grad():
        chain = Features(program, x.expand(3000, -1), mask.expand(3000, -1))
        population = propagate(chain, 8, 3000)
    assert unbiased(population.log_evidence, truth)
    assert torch.equal(chain.finish(population.state)[..., [1, 3]], x[:, [1, 3]].expand(8, 3000, -1))


DIFFUSIONS = {
    "discrete": lambda: diffusion(2, num_steps=5),
    "continuous": lambda: continuous(2),
    "continuous integers": lambda: continuous(2, levels=4),
}


@pytest.mark.parametrize("make", DIFFUSIONS.values(), ids=DIFFUSIONS)
def test_the_evidence_of_a_diffusion_has_no_bias(make):
    """Against the importance-weighted mean of very many particles."""
    program = jittered(make(), 0.3)
    x = torch.tensor([[0.4, -0.8]]) if program.levels is None else torch.tensor([[1, 2]])
    with torch.no_grad():
        weights = torch.cat([program.log_weights(x, num_particles=50_000) for _ in range(4)])
    truth = weights.logsumexp(0) - math.log(len(weights))
    noise = (weights - truth).exp().std() / math.sqrt(len(weights))
    many = x.expand(2000, -1)
    chain = Times(program.eval(), many, torch.ones_like(many, dtype=torch.bool))
    with torch.no_grad():
        chain.tune(2)
        estimates = propagate(chain, 16, 2000, threshold=1.1).log_evidence
    ratio = (estimates - truth).exp()
    assert abs(ratio.mean() - 1) < 4.5 * math.hypot(ratio.std() / math.sqrt(2000), noise)


def test_an_observed_part_of_a_diffusion_has_no_bias():
    """The marginal density of a coordinate, against how many of the program's own draws come near it."""
    program = jittered(diffusion(2, num_steps=5), 0.3)
    mask = torch.tensor([[True, False]])
    with torch.no_grad():
        chain = Times(program, torch.tensor([[0.5, 0.0]]).expand(300, -1), mask.expand(300, -1))
        chain.tune(16)
        estimates = propagate(chain, 64, 300).log_evidence.exp()
    many = program.sample(200_000)[:, 0]
    share = ((many - 0.5).abs() < 0.05).double().mean()
    error = math.hypot(estimates.std() / math.sqrt(300), (share * (1 - share) / 200_000).sqrt() / 0.1)
    assert abs(estimates.mean() - share / 0.1) < 4.5 * error + 0.002  # the curvature over the window


LONG = {
    "reals": lambda: diffusion(3, num_steps=20),
    "integers": lambda: diffusion(3, levels=4, num_steps=20),
    "continuous": lambda: small(3, num_steps=20, noise_schedule=dgm.LogSNR(3.0, -3.0)),
    "continuous integers": lambda: small(3, num_steps=20, levels=4, noise_schedule=dgm.LogSNR(3.0, -3.0)),
}


@pytest.mark.parametrize("make", LONG.values(), ids=LONG)
def test_no_looser_than_importance_sampling(make):
    """A long chain that fits badly, so that few weights dominate: resampling keeps the particles that have a chance."""
    program = jittered(make(), 0.5)
    x = torch.randint(program.levels, (100, 3)) if program.levels else torch.randn(100, 3)
    tilted = torch.stack([smc(program, x, num_particles=32, seed=s).log_evidence for s in range(4)])
    plain = torch.stack([smc(program, x, num_particles=32, seed=s, threshold=0).log_evidence for s in range(4)])
    difference = (tilted - plain).flatten()
    assert difference.mean() > -2 * difference.std() / math.sqrt(len(difference))


def test_without_resampling_it_is_importance_sampling():
    """The look-ahead cancels: the bound is that of `log_weights`."""
    program = jittered(diffusion(2, num_steps=4), 0.3)
    x = replicas(torch.randn(1, 2), 1500)
    bound = smc(program, x, num_particles=4, threshold=0).log_evidence
    with torch.no_grad():
        iwae = program.log_weights(x, num_particles=4).logsumexp(0) - math.log(4)
    assert abs(bound.mean() - iwae.mean()) < 4.5 * math.hypot(bound.std(), iwae.std()) / math.sqrt(1500)


def test_systematic_resampling_copies_in_proportion():
    log_weights = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.7, 0.1, 0.1, 0.1]]).log().T
    counts = torch.stack(
        [torch.nn.functional.one_hot(systematic(log_weights, 10), 4).sum(0) for _ in range(2000)]
    ).double()
    expected = 10 * log_weights.exp().T
    assert ((counts.mean(0) - expected).abs() < 4.5 * 0.5 / math.sqrt(2000) + 1e-9).all()
    assert ((counts - expected).abs() < 1).all()  # never off by a whole copy
    assert effective_number(log_weights)[1] == pytest.approx(1 / (0.49 + 3 * 0.01))


def test_taking_keeps_data_apart():
    state = {"s": torch.arange(6).reshape(3, 2), "m": torch.arange(12).reshape(3, 2, 2)}
    taken = take(state, torch.tensor([[2, 0], [2, 1]]))
    assert taken["s"].tolist() == [[4, 1], [4, 3]]
    assert taken["m"].tolist() == [[[8, 9], [2, 3]], [[8, 9], [6, 7]]]


def test_programs_without_latents_are_refused():
    with pytest.raises(ValueError, match=r"log p\(x\) of this Normal is exact"):
        smc(dgm.Normal(2), torch.zeros(3, 2))


class _Waits(TorchDispatchMode):
    """Counts what makes the program wait for the device: values that are asked for."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
        return func(*args, **(kwargs or {}))


def test_a_step_of_features_does_not_wait_for_the_device():
    program = CASES["made"].build().eval()
    x, _ = CASES["made"].draw(program, 3)
    mask = torch.ones_like(x, dtype=torch.bool)
    mask[:, 0] = False
    chain = Features(program, x, mask)
    with torch.no_grad(), pyro.validation_enabled(False), _Waits() as waits:
        state, _ = chain.start((4, 3))
        before = waits.count
        for i in range(len(chain)):
            state, _ = chain.step(i, state)
        assert waits.count == before
