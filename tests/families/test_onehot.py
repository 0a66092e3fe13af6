"""One-hot codes: masses against those of the integers, the bound against the sum over all codes, gradients by hand."""

import itertools
import math

import pytest
import torch
from programs import CASES, codes, transformer
from torch import nn

import dgm_pyro as dgm
from dgm_pyro import representations
from dgm_pyro.objectives import ELBO, elbo

pytestmark = pytest.mark.usefixtures("float64")


def every(places, values):
    """All codes as integers, ``(values ** places, places)``, and as one-hot rows."""
    k = torch.tensor(list(itertools.product(range(values), repeat=places)))
    return k, torch.eye(values)[k]


PRIORS = {
    "independent": lambda: dgm.Categorical(2, 3, learned=True),
    "autoregressive": lambda: transformer(dgm.Categorical, 2, levels=3, order=(1, 0)),
}


def program_of(prior, seed=0):
    torch.manual_seed(seed)
    program = codes(PRIORS[prior]())
    with torch.no_grad():
        for parameter in program.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return program.eval()


@pytest.mark.parametrize("prior", PRIORS)
def test_rows_have_the_masses_of_their_integers(prior):
    program = program_of(prior).prior
    k, z = every(2, 3)
    torch.testing.assert_close(program.log_prob(z), program.program.log_prob(k))
    assert program.log_prob(z).logsumexp(0).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("prior", PRIORS)
def test_draws_are_one_hot_and_as_frequent_as_they_should_be(prior):
    program = program_of(prior).prior
    _, z = every(2, 3)
    draws = program.sample(4000)
    assert draws.dtype == torch.float64
    assert ((draws == 0) | (draws == 1)).all()
    assert (draws.sum(-1) == 1).all()
    counts = (draws.unsqueeze(1) == z).flatten(2).all(-1).double().mean(0)
    p = program.log_prob(z).exp().detach()
    assert ((counts - p).abs() < 4.5 * (p * (1 - p) / 4000).sqrt()).all()


@pytest.mark.parametrize("prior", PRIORS)
def test_the_bound_is_below_the_sum_over_all_codes(prior):
    """log p(x) = log sum_z p(z) p(x | z), and the gap is KL(q(z | x) || p(z | x))."""
    program, x = program_of(prior), torch.randn(4, 3)
    _, z = every(2, 3)
    log_joint = torch.stack(
        [program.prior.log_prob(row[None]) + program.likelihood.log_prob(x, row.expand(4, 2, 3)) for row in z]
    )
    log_q = torch.stack([program.encoder.log_prob(row.expand(4, 2, 3), x) for row in z])
    log_p = log_joint.logsumexp(0)
    bound = (log_q.exp() * (log_joint - log_q)).sum(0).detach()
    assert (bound < log_p).all()
    found = dgm.evaluate(program, x, num_samples=2000)
    # 4.5 standard errors of the mean of 2000 draws: the variance is that of the terms under q.
    spread = ((log_q.exp() * (log_joint - log_q - bound) ** 2).sum(0) / 2000).sqrt().detach()
    assert ((found.values - bound).abs() < 4.5 * spread + 1e-9).all()
    iwae = dgm.evaluate(program, x, num_particles=4000).values
    w = (log_joint - log_q - log_p).exp()
    error = ((log_q.exp() * (w - 1) ** 2).sum(0) / 4000).sqrt().detach()
    assert ((iwae - log_p.detach()).abs() < 4.5 * error + 1e-9).all()


def test_between_independent_codes_the_kl_is_exact():
    program, x = program_of("independent"), torch.randn(5, 3)
    _, z = every(2, 3)
    log_q = torch.stack([program.encoder.log_prob(row.expand(5, 2, 3), x) for row in z])
    log_p = program.prior.log_prob(z).unsqueeze(-1)
    by_hand = (log_q.exp() * (log_q - log_p)).sum(0)
    torch.testing.assert_close(elbo(program, x).kl["z"], by_hand)
    gradients = [
        torch.autograd.grad(kl.sum(), [*program.encoder.parameters()]) for kl in (elbo(program, x).kl["z"], by_hand)
    ]
    torch.testing.assert_close(*gradients)


def test_the_gradient_goes_straight_through_by_its_definition():
    """At drawn z: sum over rows and values of df/dz_iv times that of the probabilities."""
    logits = nn.Parameter(torch.randn(2, 3))
    encoder = dgm.OneHot(dgm.Categorical(2, 3, parameters=torch.zeros(3, 2)))
    encoder.program.parameter = logits.T
    f = nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))
    torch.manual_seed(1)
    z = encoder().rsample((4,))
    (found,) = torch.autograd.grad(f(z).sum(), logits)
    torch.manual_seed(1)
    constant = encoder().sample((4,)).requires_grad_()
    assert torch.equal(constant, z)
    (slope,) = torch.autograd.grad(f(constant).sum(), constant)
    p = logits.softmax(-1)
    (by_hand,) = torch.autograd.grad((slope.detach().sum(0) * p).sum(), logits)
    torch.testing.assert_close(found, by_hand)


def test_where_the_loss_is_linear_in_each_row_the_gradient_is_exact():
    """f(z) = a z + z_1 B z_2: the mean gradient of 20,000 draws against that of the sum over all codes."""
    logits, a, b = nn.Parameter(torch.randn(2, 3)), torch.randn(2, 3), torch.randn(3, 3)
    f = lambda z: (a * z).sum((-1, -2)) + torch.einsum("...v,vw,...w->...", z[..., 0, :], b, z[..., 1, :])  # noqa: E731
    encoder = dgm.OneHot(dgm.Categorical(2, 3, parameters=torch.zeros(3, 2)))
    encoder.program.parameter = logits.T
    k, rows = every(2, 3)
    p = logits.log_softmax(-1)[torch.arange(2), k].sum(-1).exp()
    (exact,) = torch.autograd.grad((p * f(rows)).sum(), logits)
    z = encoder().rsample((20_000,))
    (slope,) = torch.autograd.grad(f(z).sum(), z)  # of each draw
    pi = logits.softmax(-1).detach()
    each = pi * (slope - (pi * slope).sum(-1, keepdim=True))
    error = each.std(0) / 20_000**0.5
    assert ((each.mean(0) - exact).abs() < 4.5 * error).all()


def test_what_a_code_costs_reaches_the_encoder():
    """For an autoregressive prior on one code, log p(z) is linear in it: the gradient of the bound's KL is exact."""
    torch.manual_seed(3)
    prior = transformer(dgm.Categorical, 1, levels=4)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    encoder = dgm.OneHot(dgm.Categorical(1, 4, nn.Linear(2, 4)))
    program = dgm.VAE(dgm.OneHot(prior), dgm.Normal(2, nn.Sequential(nn.Flatten(), nn.Linear(4, 4))), encoder).eval()
    x = torch.randn(1, 2)
    log_q = encoder(x).log_masses()[0, 0]
    log_p = prior.log_prob(torch.arange(4)[:, None]).detach()
    weights = encoder.program.network.weight
    (exact,) = torch.autograd.grad((log_q.exp() * (log_q - log_p)).sum(), weights)
    found = []
    for _ in range(600):
        (gradient,) = torch.autograd.grad(elbo(program, x).kl["z"].sum(), weights)
        found.append(gradient)
    found = torch.stack(found)
    assert ((found.mean(0) - exact).abs() < 4.5 * found.std(0) / 600**0.5).all()


def test_a_chain_of_codes_learns_what_independent_ones_cannot():
    """Two bits that agree, and x says both: a sure encoder has a KL of log 2 from a chain, 2 log 2 from a product."""
    torch.manual_seed(0)
    bits = torch.randint(2, (400, 1))
    x = 4.0 * bits.expand(400, 2) - 2 + 0.1 * torch.randn(400, 2)
    kl = {}
    for name, prior in {
        "product": dgm.Categorical(2, 2, learned=True),
        "chain": transformer(dgm.Categorical, 2, levels=2),
    }.items():
        # Row i of the code is bit i of x, known for certain.
        encoder = nn.Linear(2, 4)
        with torch.no_grad():
            encoder.weight.copy_(torch.tensor([[-9.0, 0], [0, -9], [9, 0], [0, 9]]))
            encoder.bias.zero_()
        decoder = nn.Sequential(nn.Flatten(), nn.Linear(4, 4))
        program = dgm.VAE(dgm.OneHot(prior), dgm.Normal(2, decoder), dgm.OneHot(dgm.Categorical(2, 2, encoder)))
        encoder.requires_grad_(False)
        dgm.fit(program, x, epochs=30, batch_size=100, lr=2e-2, validation=None, progress=False, compile=False)
        kl[name] = dgm.evaluate(program, x).kl["z"]
    assert kl["chain"] == pytest.approx(math.log(2), abs=0.01)
    assert kl["product"] == pytest.approx(2 * math.log(2), abs=0.01)


def test_codes_are_read_as_probabilities_and_there_is_nothing_in_between():
    program = CASES["vae-codes-autoregressive"].build(dtype=torch.float64)
    x, _ = CASES["vae-codes-autoregressive"].draw(program, 4, dtype=torch.float64)
    torch.testing.assert_close(representations.encode(program, x), program.encoder(x).mean.detach())
    assert (representations.encode(program, x, draw=True).sum(-1) == 1).all()
    assert representations.is_discrete(program)
    with pytest.raises(ValueError, match="is discrete"):
        representations.interpolate(program, x[:2], x[2:])


def test_training_lifts_the_bound_of_digits():
    """What the codes say of the digits is worth more than it costs: well above the bound of independent pixels."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    digits, test = (dgm.data.load("digits-binary", split) for split in ("train", "test"))
    pixels = dgm.build("pixels", digits)
    dgm.fit(pixels, digits, epochs=20, lr=0.1, validation=None, progress=False, compile=False)
    program = dgm.build("vae", digits, prior="codes-uniform", hidden=(128,))
    dgm.fit(program, digits, "annealed:0.6", epochs=30, validation=None, progress=False, compile=False)
    gain, error = dgm.evaluate(program, test).minus(dgm.evaluate(pixels, test))
    assert gain > 4.5 * error


def test_what_does_not_fit_is_named():
    with pytest.raises(TypeError, match=r"program must be a dgm\.Categorical.*got Normal"):
        dgm.OneHot(dgm.Normal(2))
    with pytest.raises(TypeError, match="got Autoregressive of Bernoulli"):
        dgm.OneHot(transformer(dgm.Bernoulli, 2))
    chain = dgm.OneHot(transformer(dgm.Categorical, 2, levels=3))()
    with pytest.raises(NotImplementedError, match="no gradient"):
        chain.rsample()
    assert not chain.has_rsample
    assert ELBO()(codes(dgm.Categorical(2, 3)), torch.randn(2, 3)).score is None
