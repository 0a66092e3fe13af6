"""Deep hierarchies: the bound term by term, the exact evidence of a linear-Gaussian one, floors of each level."""

import pytest
import torch
from programs import jittered
from torch import nn
from torch.distributions import MultivariateNormal, kl_divergence

import dgm_pyro as dgm
from dgm_pyro.families.hierarchy import DeepVAE, Level, vdvae
from dgm_pyro.networks import ConvNet
from dgm_pyro.program import guide_trace


class Linear(nn.Module):
    """A linear map of one or two vectors, as images of one pixel."""

    def __init__(self, inputs, outputs, given=None):
        super().__init__()
        self.in_shape, self.out_shape = torch.Size((inputs, 1, 1)), torch.Size((outputs, 1, 1))
        self.given_shape = None if given is None else torch.Size((given, 1, 1))
        self.linear = nn.Linear(inputs + (given or 0), outputs)

    def forward(self, *inputs):
        return self.linear(torch.cat([each.flatten(1) for each in inputs], 1))


class Path(Linear):
    def forward(self, *inputs):
        return super().forward(*inputs)[..., None, None]


class Copy(nn.Module):
    """x as its own features."""

    out_shapes = (torch.Size((3, 1, 1)),)

    def forward(self, x):
        return (x,)


def linear_gaussian(sizes):
    """x of 3 numbers, h of 2, and a z of each size from the top; scales are numbers."""
    levels = [
        Level(
            dgm.Normal((z, 1, 1), Linear(2, z), scale_type="feature"),
            dgm.Normal((z, 1, 1), Linear(2, z, 3), scale_type="feature", initial_scale=1.5),
            Path(2, 2, z),
        )
        for z in sizes
    ]
    return DeepVAE(levels, dgm.Normal((3, 1, 1), Linear(2, 3), scale_type="shared", initial_scale=0.8), Copy())


def evidence(program, x):
    """log p(x), its mean and covariance carried down the path: x = A (all noise) + b."""
    sizes = [level.prior.event_shape[0] for level in program.levels_down]
    noise = torch.eye(sum(sizes) + 3).split([*sizes, 3])  # rows of the identity: coordinates of each noise
    h, h_of_noise = program.start.flatten(), torch.zeros(2, sum(sizes) + 3)
    scale = lambda part: nn.functional.softplus(part.raw_scale).reshape(-1, 1)  # noqa: E731
    for level, own in zip(program.levels_down, noise, strict=False):
        prior, path = level.prior.network.linear, level.path.linear
        z, z_of_noise = prior(h), prior.weight @ h_of_noise + scale(level.prior) * own
        h, h_of_noise = path(torch.cat((h, z))), path.weight @ torch.cat((h_of_noise, z_of_noise))
    last = program.likelihood.network.linear
    x_of_noise = last.weight @ h_of_noise + scale(program.likelihood) * noise[-1]
    return MultivariateNormal(last(h), x_of_noise @ x_of_noise.T).log_prob(x.flatten(1))


@pytest.mark.usefixtures("float64")
def test_bounds_of_a_linear_gaussian_hierarchy_tend_to_its_exact_evidence():
    torch.manual_seed(0)
    program, x = linear_gaussian((1, 2, 1)), torch.randn(4, 3, 1, 1)
    with torch.no_grad():
        exact = evidence(program, x)
        weights = program.log_weights(x, num_particles=20_000)
        elbo, error = weights.mean(0), weights.std(0) / 20_000**0.5
        assert (elbo + 4 * error < exact).all()
        w = (weights - exact).exp()
        spread = w.std(0) / 20_000**0.5
        assert (spread < 0.03).all()
        assert ((w.mean(0) - 1).abs() < 4 * spread).all()


def tiny(levels=(1, 2), **options):
    likelihood = dgm.Categorical((2, 4, 4), 3, ConvNet((3, 2, 2), (2, 4, 4), 3, 3))
    return vdvae(likelihood, levels, latent_channels=1, **options)


@pytest.mark.usefixtures("float64")
def test_the_bound_is_the_sum_of_its_terms():
    """log p(x | z) and each level's KL, by a pass through the networks alone, at the guide's own draws."""
    program, x = jittered(tiny(), 0.2).eval(), torch.randint(3, (5, 2, 4, 4))
    torch.manual_seed(1)
    bound = dgm.ELBO()(program, x)
    torch.manual_seed(1)
    z = {name: site["value"] for name, site in guide_trace(program, x).nodes.items() if name.startswith("z")}
    assert [*z] == ["z_3", "z_2", "z_1"]
    assert [value.shape[1:] for value in z.values()] == [(1, 1, 1), (1, 2, 2), (1, 2, 2)]
    fine, coarse = program.reader(x)
    h, kl = program.start.expand(5, -1, -1, -1), {}
    for (name, value), level, seen in zip(z.items(), program.levels_down, (coarse, fine, fine), strict=True):
        p, q = (normal_of(raw) for raw in (level.prior.network(h), level.posterior.network(h, seen)))
        kl[name] = kl_divergence(q, p).flatten(1).sum(1)
        h = level.path(h, value)
    log_masses = program.likelihood.network(h).log_softmax(1)
    log_likelihood = log_masses.gather(1, x.unsqueeze(1)).flatten(1).sum(1)
    for name, term in kl.items():
        torch.testing.assert_close(bound.kl[name], term, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(bound.value, log_likelihood - sum(kl.values()), rtol=1e-10, atol=1e-10)
    floor = 1.0
    floored = dgm.FreeBits(floor)
    torch.manual_seed(1)
    expected = log_likelihood - sum(term if term.mean() > floor else torch.tensor(floor) for term in kl.values())
    torch.testing.assert_close(floored(program, x).value, expected, rtol=1e-10, atol=1e-10)
    assert any(term.mean() < floor for term in kl.values())


def normal_of(raw):
    loc, raw_scale = raw.unbind(1)
    start = torch.log(torch.expm1(torch.tensor(1.0)))
    return torch.distributions.Normal(loc, nn.functional.softplus(raw_scale + start))


def test_forty_levels_train_and_start_without_a_divergence():
    """Every q is near its p at first, so a deep stack adds nothing to the bound; gradients reach the top."""
    program, x = tiny((20, 20)), torch.randint(3, (4, 2, 4, 4))
    bound = dgm.ELBO()(program, x)
    assert len(bound.kl) == 40
    assert sum(bound.kl.values()).max() < 1
    bound.value.sum().backward()
    top = program.levels_down[0]
    assert all(part.grad.abs().sum() > 0 for part in top.posterior.network.last.parameters())
    assert str(program).splitlines()[1].split("joint")[1].strip() == (
        "p(z_40) p(z_39 | z_40) ... p(z_1 | z_>1) p(x | z_1, ..., z_40)"
    )


def test_the_top_is_the_code():
    program, x = jittered(tiny(), 0.2), torch.randint(3, (5, 2, 4, 4))
    z = program.encode(x)
    q = program.levels_down[0].posterior.network(program.start.expand(5, -1, -1, -1), program.reader(x)[1])
    torch.testing.assert_close(z, q[:, 0])
    assert program.decode(z).shape == x.shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda level: Level(dgm.Normal((1, 2, 2)), level.posterior, level.path), "prior is given h"),
        (lambda level: Level(level.prior, level.prior, level.path), "posterior must be given the pair"),
        (lambda level: Level(level.prior, level.posterior, tiny().levels_down[0].path), "prior expects given_shape"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        change(tiny().levels_down[1])


def test_a_resolution_that_cannot_be_halved_is_refused():
    with pytest.raises(ValueError, match="halve the resolution 2 times, but that of the likelihood is 2x2"):
        tiny((1, 1, 1))
    with pytest.raises(ValueError, match="levels must be the number of levels at each resolution, got none"):
        tiny(())
