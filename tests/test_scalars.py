"""Programs of scalars, of event_shape (): the numbers of those of vectors with one feature, to rounding."""

import pytest
import torch
from programs import assert_same_number
from torch import nn

import dgm_pyro as dgm
from dgm_pyro import representations
from dgm_pyro.families.samplers import SAMPLERS
from dgm_pyro.networks import DenoisingMLP

SIZE = 5


def diffusion(shape, kind=dgm.Diffusion, num_parameters=1, **options):
    torch.manual_seed(0)
    denoiser = DenoisingMLP(shape, (8, 8), num_parameters=num_parameters, max_frequency=10.0)
    return kind(shape, denoiser, num_steps=4, **options)


def both(make):
    """The program of scalars and that of vectors, on the same numbers."""
    scalar, vector = make(()), make((1,))
    for one, other in zip(scalar.parameters(), vector.parameters(), strict=True):
        assert torch.equal(one, other.reshape(one.shape))
    return scalar, vector


def assert_same(use, scalar, vector, x):
    """``use(program, x)`` of both, from one seed."""
    found = []
    for program, data in ((scalar, x), (vector, x.unsqueeze(-1))):
        torch.manual_seed(1)
        found.append(use(program, data))
    one, other = found
    assert one.dtype == other.dtype
    assert_same_number(one, other.reshape(one.shape), 1000)
    assert one.shape in (other.shape, other.shape[:-1])
    return one


DIFFUSIONS = {
    "reals": {},
    "noise": {"predict": "noise"},
    "integers": {"levels": 5},
    "levels": {"levels": 5, "predict": "levels", "num_parameters": 5},
}


@pytest.mark.parametrize("kind", [dgm.Diffusion, dgm.ContinuousDiffusion])
@pytest.mark.parametrize("name", DIFFUSIONS)
def test_a_diffusion_of_scalars(kind, name):
    options = DIFFUSIONS[name]
    scalar, vector = both(lambda shape: diffusion(shape, kind, **options))
    x = torch.randint(5, (SIZE,)) if "levels" in options else torch.randn(SIZE)
    for sampler in SAMPLERS:
        drawn = assert_same(lambda p, x, s=sampler: p.sample(SIZE, sampler=s), scalar, vector, x)
        assert drawn.shape == (SIZE,)
    observed = torch.tensor([True, False, True, False, True])

    def imputed(program, data):
        return dgm.infer.impute(program, data, observed.reshape(data.shape), 3, num_particles=8)

    for use in (
        lambda p, x: p.log_weights(x, num_particles=2),
        lambda p, x: dgm.objectives.elbo(p, x).value,
        lambda p, x: p.unroll().sample(SIZE),
        lambda p, x: dgm.infer.smc(p, x, num_particles=8).log_evidence,
        imputed,
        representations.encode,
        lambda p, x: representations.decode(p, x.to(next(p.parameters()).dtype)),
        lambda p, x: representations.interpolate(p, x, x.flip(0), 3),
    ):
        assert_same(use, scalar, vector, x)
    if kind is dgm.ContinuousDiffusion and "levels" not in options:
        assert_same(lambda p, x: p.ode_log_prob(x), scalar, vector, x)
        assert_same(lambda p, x: p.ode_log_prob(x, probes=3), scalar, vector, x)


CONDITIONALS = {
    "normal": lambda shape: dgm.Normal(shape),
    "mixture": lambda shape: dgm.MixtureOfNormals(shape, 2),
    "bernoulli": lambda shape: dgm.Bernoulli(shape),
    "categorical": lambda shape: dgm.Categorical(shape, 3),
}


@pytest.mark.parametrize("name", CONDITIONALS)
@pytest.mark.parametrize("mask", [[True, False] * 2 + [False], [False] * SIZE, [True] * SIZE])
def test_a_missing_scalar_is_drawn(name, mask):
    scalar, vector = CONDITIONALS[name](()), CONDITIONALS[name]((1,))
    observed = torch.tensor(mask)
    x = scalar.sample(SIZE)
    drawn = assert_same(lambda p, x: dgm.infer.impute(p, x, observed.reshape(x.shape), 4), scalar, vector, x)
    assert torch.equal(drawn[:, observed], x[observed].expand(4, -1))


def scalar_code(shape):
    """A VAE whose z is a number, or a vector of one."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(1, 4)) if shape == () else nn.Linear(1, 4)
    likelihood = dgm.Normal(2, network, given_shape=shape)
    return dgm.VAE(dgm.Normal(shape), likelihood, dgm.Normal(shape, nn.Linear(2, 2)))


@pytest.mark.parametrize("path", representations.CURVES)
def test_between_codes_that_are_numbers(path):
    scalar, vector = both(scalar_code)
    x = torch.randn(SIZE, 2)
    points = [representations.interpolate(p, x, x.flip(0), 4, curve=path) for p in (scalar, vector)]
    assert_same_number(*points)


def test_codes_that_are_numbers_are_features_too():
    z, y = torch.randn(40), torch.arange(40) % 2
    for use in (representations.knn, representations.probe):
        assert use(z, y, z, y) == use(z[:, None], y, z[:, None], y)
    assert torch.equal(representations.cluster(z, 3), representations.cluster(z[:, None], 3))
