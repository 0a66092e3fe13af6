"""Autoregressive models against the chain rule written out, enumeration, quadrature; the two forms against each other.

Statistical tests are seeded; p-values are held to 1e-4.
"""

import itertools
import math

import pyro
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal
from scipy import stats
from torch import nn

import dgm_pyro as dgm
from dgm_pyro.networks import MADE, MLP, CausalTransformer, PixelCNN
from dgm_pyro.networks.attention import AttentionLayer

pytestmark = pytest.mark.usefixtures("float64")


def lively(program, scale=2.5):
    """Larger weights, so that the conditionals are far from uniform and from each other."""
    with torch.no_grad():
        for parameter in program.parameters():
            parameter.mul_(scale)
    return program


def made(size, parameters, **options):
    return MADE((size,), parameters, options.pop("hidden", (10, 10)), activation="tanh", **options)


def pixelcnn(shape, parameters, **options):
    return PixelCNN(shape, parameters, width=4, layers=3, **options)


PROGRAMS = {
    "bits": lambda: dgm.Bernoulli(5, made(5, 1)),
    "bits-order": lambda: dgm.Bernoulli(5, made(5, 1, order=(3, 1, 4, 0, 2), residual=True)),
    "bits-one": lambda: dgm.Bernoulli(1, made(1, 1)),
    "bits-label": lambda: dgm.Bernoulli(4, made(4, 1, num_classes=3)),
    "bits-vector": lambda: dgm.Bernoulli(4, made(4, 1, given_shape=(2,))),
    "bits-image": lambda: dgm.Bernoulli((1, 2, 3), pixelcnn((1, 2, 3), 1, levels=2)),
    "levels": lambda: dgm.Categorical(4, 3, made(4, 3, levels=3)),
    "levels-image": lambda: dgm.Categorical((1, 2, 2), 4, pixelcnn((1, 2, 2), 4, levels=4)),
    "levels-image-label": lambda: dgm.Categorical((1, 2, 2), 3, pixelcnn((1, 2, 2), 3, levels=3, num_classes=2)),
    "levels-made-image": lambda: dgm.Categorical((1, 2, 2), 3, MADE((1, 2, 2), 3, (9,), order=(3, 1, 2, 0))),
    "logistic": lambda: dgm.DiscretizedLogistic(3, 6, 2, made(3, 6, levels=6)),
    "normal": lambda: dgm.Normal(3, made(3, 2, order=(1, 2, 0))),
    "normal-one": lambda: dgm.Normal(1, made(1, 2)),
    "normal-vector": lambda: dgm.Normal(3, made(3, 2, given_shape=(2,))),
    "mixture": lambda: dgm.MixtureOfNormals(2, 3, made(2, 9)),
    "mixture-label": lambda: dgm.MixtureOfNormals(2, 3, made(2, 9, order=(1, 0), num_classes=3)),
    "mixture-image": lambda: dgm.MixtureOfNormals((1, 2, 2), 2, pixelcnn((1, 2, 2), 6)),
}


@pytest.fixture(params=PROGRAMS, name="program")
def _program(request):
    return lively(dgm.Autoregressive(PROGRAMS[request.param]()))


def contexts(program, size):
    if not program.conditional:
        return None
    if program.num_classes:
        return torch.arange(size) % program.num_classes
    return torch.randn(size, *program.given_shape)


def outcomes(program, size):
    if program.levels is None:
        return torch.randn(size, *program.event_shape)
    return torch.randint(program.levels, (size, *program.event_shape))


def every_outcome(program):
    values = itertools.product(range(program.levels), repeat=program.event_shape.numel())
    return torch.tensor(list(values)).reshape(-1, *program.event_shape)


def one_given(program, size):
    """The same ``given`` in every row, and in every call."""
    if not program.conditional:
        return None
    if program.num_classes:
        return torch.ones(size, dtype=torch.long)
    return torch.linspace(-1, 2, program.given_shape.numel()).reshape(program.given_shape).expand(size, -1)


def chi_square(counts, expected):
    """p-value, what is rare pooled."""
    common = expected >= 5
    counts = torch.cat([counts[common], counts[~common].sum().reshape(1)]).numpy()
    expected = torch.cat([expected[common], expected[~common].sum().reshape(1)]).numpy()
    if expected[-1] < 5:  # a Poisson tail of its own, too small for a cell
        assert stats.poisson.sf(counts[-1] - 1, expected[-1]) > 1e-4
        counts, expected = counts[:-1], expected[:-1]
    return stats.chisquare(counts, expected * counts.sum() / expected.sum()).pvalue


# -- the chain rule, written out without the library's distributions ---------------------------------------------------


def log_univariate(features, raw, value):
    """log p(value) of one feature from its raw parameters, ``(B, P)``, by formula."""
    if isinstance(features, dgm.Bernoulli):
        return F.logsigmoid(torch.where(value == 1, raw[:, 0], -raw[:, 0]))
    if isinstance(features, dgm.Categorical):
        return raw.log_softmax(-1).gather(-1, value.long().unsqueeze(-1)).squeeze(-1)
    if isinstance(features, dgm.Normal):
        scale = F.softplus(raw[:, 1])
        return -((value - raw[:, 0]) ** 2) / (2 * scale**2) - scale.log() - math.log(2 * math.pi) / 2
    logits, loc, scale = raw.reshape(len(raw), 3, -1).unbind(1)
    weights, scale, value = logits.softmax(-1), F.softplus(scale), value.unsqueeze(-1)
    if isinstance(features, dgm.MixtureOfNormals):
        density = (-((value - loc) ** 2) / (2 * scale**2)).exp() / (scale * math.sqrt(2 * math.pi))
        return (weights * density).sum(-1).log()
    half, last = 1 / (features.levels - 1), features.levels - 1
    center = value * 2 * half - 1
    upper = torch.where(value == last, torch.tensor(1.0), ((center + half - loc) / scale).sigmoid())
    lower = torch.where(value == 0, torch.tensor(0.0), ((center - half - loc) / scale).sigmoid())
    return (weights * (upper - lower)).sum(-1).log()


def raw_at(program, i, x, given):
    """Raw parameters of place i = 0 .. D - 1, ``(B, P)``; features from there on are replaced by zeros first."""
    features, order = program.factors, list(program.order)
    known = torch.zeros(len(order), dtype=torch.bool)
    known[order[:i]] = True
    seen = torch.where(known.reshape(program.event_shape), x, torch.zeros_like(x))
    raw = features.network(*((seen,) if given is None else (seen, given)))
    raw = raw.reshape(len(x), features.num_parameters, *program.event_shape)
    return (raw if features.start is None else raw + features.initial()).flatten(2)[..., order[i]]


def chain_rule(program, x, given):
    terms = [
        log_univariate(program.factors, raw_at(program, i, x, given), x.flatten(1)[:, j])
        for i, j in enumerate(program.order)
    ]
    return torch.stack(terms, -1)


def test_log_prob_is_the_chain_rule(program):
    x, given = outcomes(program, 6), contexts(program, 6)
    torch.testing.assert_close(program.log_prob(x, given), chain_rule(program, x, given).sum(-1), rtol=1e-9, atol=1e-9)


# -- masses and densities ----------------------------------------------------------------------------------------------


def test_probabilities_sum_to_one_and_samples_follow_them(program):
    if program.levels is None:
        return
    every = every_outcome(program)
    mass = program.log_prob(every, one_given(program, len(every))).exp().detach()
    assert abs(mass.sum().item() - 1) < 1e-9
    n = 8000
    x = program.sample(n, one_given(program, n)).long().flatten(1)
    index = (x * program.levels ** torch.arange(x.shape[1]).flip(0)).sum(-1)
    counts, expected = torch.bincount(index, minlength=len(every)), n * mass
    assert chi_square(counts, expected) > 1e-4


@given(st.data())
@settings(max_examples=25)
def test_bits_sum_to_one_whatever_the_network(data):
    size = data.draw(st.integers(1, 8))
    order = data.draw(st.permutations(range(size)))
    width, depth = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 3))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    network = MADE(size, 1, [width] * depth, order=order, residual=data.draw(st.booleans()))
    program = lively(dgm.Autoregressive(dgm.Bernoulli(size, network)), 4.0)
    assert abs(program.log_prob(every_outcome(program)).exp().sum().item() - 1) < 1e-9


def test_a_2d_density_integrates_to_one():
    program = lively(dgm.Autoregressive(PROGRAMS["mixture"]()), 1.5)
    axis = torch.linspace(-20, 20, 801)
    with torch.no_grad():
        density = program.log_prob(torch.cartesian_prod(axis, axis)).exp()
    assert abs(density.sum().item() * 0.05**2 - 1) < 1e-9


def test_samples_of_reals_follow_their_conditionals(program):
    """Rosenblatt: the distribution functions of x_i given x_<i, at the samples, are independent and uniform."""
    if program.levels is not None:
        return
    n = 3000
    given = one_given(program, n)
    x = program.sample(n, given)
    uniform = []
    for i, j in enumerate(program.order):
        raw, value = raw_at(program, i, x, given).detach(), x.flatten(1)[:, j]
        if isinstance(program.factors, dgm.Normal):
            u = torch.special.ndtr((value - raw[:, 0]) / F.softplus(raw[:, 1]))
        else:
            logits, loc, scale = raw.reshape(n, 3, -1).unbind(1)
            u = (logits.softmax(-1) * torch.special.ndtr((value.unsqueeze(-1) - loc) / F.softplus(scale))).sum(-1)
        assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-4
        uniform.append(u)
    for a, b in itertools.combinations(uniform, 2):
        assert stats.spearmanr(a.numpy(), b.numpy()).pvalue > 1e-4


# -- two forms ---------------------------------------------------------------------------------------------------------


def test_unrolled_scores_as_plated(program):
    x, given = outcomes(program, 6), contexts(program, 6)
    unrolled = program.unroll()
    torch.testing.assert_close(unrolled.log_prob(x, given), program.log_prob(x, given), rtol=1e-12, atol=1e-12)
    with poutine.trace() as traced, dgm.program.batch_plates((6,)):
        assert unrolled.joint("w", x, given) is x
    traced.trace.compute_log_prob()
    terms = chain_rule(program, x, given)
    for i in range(len(program.order)):
        site = traced.trace.nodes[f"w_{i + 1}"]
        assert site["is_observed"]
        torch.testing.assert_close(site["log_prob"], terms[:, i], rtol=1e-9, atol=1e-9)


def test_unrolled_samples_as_plated_from_the_same_random_numbers(program):
    given = contexts(program, 7)
    pyro.set_rng_seed(3)
    plated = program.sample(7, given)
    pyro.set_rng_seed(3)
    unrolled = program.unroll().sample(7, given)
    assert plated.dtype == unrolled.dtype
    torch.testing.assert_close(plated, unrolled, rtol=1e-12, atol=1e-12)  # matrix products round by their batch size
    integers = not isinstance(program.factors, dgm.Bernoulli) and program.levels is not None
    assert plated.dtype == (torch.int64 if integers else torch.float64)


def test_the_chain_conditioned_everywhere_is_the_density(program):
    """The definition: every site fixed by poutine.condition, so that each step sees what was fixed before it."""
    x, given = outcomes(program, 4), contexts(program, 4)
    x = x.double() if isinstance(program.factors, dgm.Bernoulli) else x
    fixed = {f"x_{i}": x.flatten(1)[:, j] for i, j in enumerate(program.order, 1)}
    conditioned = poutine.condition(program.unroll().model, data=fixed)
    trace = poutine.trace(conditioned).get_trace(4, given)
    assert torch.equal(trace.nodes["_RETURN"]["value"], x)
    trace.compute_log_prob()
    total = sum(trace.nodes[name]["log_prob"] for name in fixed)
    torch.testing.assert_close(total, program.log_prob(x, given), rtol=1e-9, atol=1e-9)


def test_unrolling_shares_parameters_and_declarations(program):
    twin = program.unroll()
    assert {id(p) for p in twin.parameters()} == {id(p) for p in program.parameters()}
    for name in ("event_shape", "given_shape", "conditional", "levels", "num_classes", "measure", "variable"):
        assert getattr(twin, name) == getattr(program, name)
    assert twin.tractable
    assert twin.latents("x") == ()


@pytest.mark.parametrize("fixed", [{3: 1}, {1: 0}, {5: 1}, {4: 0, 2: 1}])
def test_some_features_fixed_out_of_order(fixed):
    """The others are drawn from the chain with these features put in."""
    program = lively(dgm.Autoregressive(PROGRAMS["bits-order"]()))
    n = 8000
    values = {f"x_{place}": torch.full((n,), float(v)) for place, v in fixed.items()}
    x = poutine.condition(program.unroll().model, data=values)(n).long()
    for place, v in fixed.items():
        assert (x[:, program.order[place - 1]] == v).all()
    every = every_outcome(program)
    terms = chain_rule(program, every, None).detach()
    for place, v in fixed.items():
        hit = every[:, program.order[place - 1]] == v
        terms[:, place - 1] = torch.where(hit, 0.0, -torch.inf)
    expected = n * terms.sum(-1).exp()
    assert abs(expected.sum().item() / n - 1) < 1e-9
    counts = torch.bincount((x * 2 ** torch.arange(5).flip(0)).sum(-1), minlength=32)
    assert counts[expected == 0].sum() == 0
    assert chi_square(counts, expected) > 1e-4


def test_the_chain_cannot_be_conditioned_as_a_whole():
    """It would leave the features drawn, and their scores those of another x."""
    program = dgm.Autoregressive(PROGRAMS["bits"]()).unroll()
    with pytest.raises(ValueError, match=r"'x' is conditioned as a whole.*'x_1' \.\. 'x_5'"):
        poutine.condition(program.model, data={"x": torch.zeros(3, 5)})(3)


def test_a_feature_of_a_given_x_has_its_value():
    """Its score would be that of another x than the features after it see."""
    program = dgm.Autoregressive(PROGRAMS["bits"]()).unroll()
    with pytest.raises(ValueError, match="'x_2' is conditioned on other values than it has in the 'x' passed"):
        poutine.condition(program.model, data={"x_2": torch.zeros(3)})(torch.ones(3, 5))
    poutine.condition(program.model, data={"x_2": torch.ones(3)})(torch.ones(3, 5))


def test_a_fixed_number_serves_the_whole_batch():
    program = dgm.Autoregressive(PROGRAMS["levels"]())
    x = poutine.condition(program.unroll().model, data={"x_2": torch.tensor(2)})(5)
    assert x.shape == (5, 4)
    assert x.dtype == torch.int64
    assert (x[:, 1] == 2).all()


def test_enumerating_the_missing_features_gives_the_marginal():
    """Inpainting's evidence: log p(x_2, x_4) by Pyro's own enumeration of the other sites, against the table."""
    program = lively(dgm.Autoregressive(dgm.Categorical(4, 3, made(4, 3, levels=3, order=(2, 0, 3, 1)))))
    seen = {"x_2": torch.tensor([0, 2, 1]), "x_4": torch.tensor([1, 1, 2])}
    conditioned = poutine.condition(program.unroll().model, data=seen)
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    evidence = -elbo.loss(config_enumerate(conditioned), lambda size: None, 3)
    every = every_outcome(program)
    mass = program.log_prob(every).exp()
    second, fourth = every[:, program.order[1]], every[:, program.order[3]]
    expected = [mass[(second == a) & (fourth == b)].sum().log() for a, b in zip(*seen.values(), strict=True)]
    assert evidence == pytest.approx(sum(expected).item(), abs=1e-9)


# -- shapes ------------------------------------------------------------------------------------------------------------


def test_batches_of_x_and_of_given_broadcast():
    """Enumerated labels, (C, 1), against data, (B,)."""
    program = lively(dgm.Autoregressive(PROGRAMS["bits-label"]()))
    x, y = outcomes(program, 5), torch.arange(3).unsqueeze(-1)
    expected = torch.stack([program.log_prob(x, torch.full((5,), c)) for c in range(3)])
    assert program(y).batch_shape == (3, 1)
    torch.testing.assert_close(program(y).log_prob(x), expected)
    torch.testing.assert_close(program(y).expand((3, 5)).log_prob(x), expected)
    with poutine.trace() as traced, dgm.program.batch_plates((3, 5)):
        program.unroll().joint("x", x, y)
    torch.testing.assert_close(dgm.program.log_prob_sum(traced.trace, (3, 5)), expected)
    draws = program(y).expand((3, 5)).sample((2,))
    assert draws.shape == (2, 3, 5, 4)


def test_plates_expand_the_distribution(program):
    given = contexts(program, 4)
    x = outcomes(program, 4)
    for statement in (program, program.unroll()):
        with poutine.trace() as traced, dgm.program.batch_plates((3, 4)):
            observed = statement.joint("x", x, given)
            drawn = statement.joint("w", None, given)
        assert observed is x
        assert drawn.shape == (3, 4, *program.event_shape)
        twice = x.expand(2, *x.shape)
        wide = None if given is None else given.expand(2, *given.shape)
        torch.testing.assert_close(program.exact_log_prob(twice, wide), program.log_prob(x, given).expand(2, 4))
        traced.trace.compute_log_prob()
        scores = [s["log_prob"] for n, s in traced.trace.nodes.items() if n.startswith("x") and s["type"] == "sample"]
        assert all(score.shape == (3, 4) for score in scores)
        torch.testing.assert_close(sum(scores), program.log_prob(x, given).expand(3, 4))


def test_particles_of_observed_data_cost_one_pass(program):
    """Expanding over particles must not repeat the data through the network."""
    rows = []
    program.factors.network.register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    with dgm.program.batch_plates((50, 4)):
        program.joint("x", outcomes(program, 4), contexts(program, 4))
    x = outcomes(program, 4)
    assert program(contexts(program, 4)).expand((50, 4)).log_prob(x).shape == (50, 4)
    assert rows == [4]


def test_integers_of_any_type_score_alike(program):
    if program.levels is None:
        return
    x, given = outcomes(program, 5), contexts(program, 5)
    for form in (program, program.unroll()):
        expected = form.log_prob(x, given)
        for dtype in (torch.uint8, torch.int32, torch.float64):
            torch.testing.assert_close(form.log_prob(x.to(dtype), given), expected)


def test_support_and_validation(program):
    distribution = program(contexts(program, 3))
    x = outcomes(program, 3)
    event_dim = len(program.event_shape)
    assert distribution.event_dim == distribution.support.event_dim == event_dim
    assert distribution.support.is_discrete == (program.levels is not None)
    assert distribution.support.check(x).all()
    bad = x.double()
    bad.view(-1)[0] = float("nan") if program.levels is None else program.levels
    assert not distribution.support.check(bad).all()
    with pytest.raises(ValueError, match="support"):
        distribution.log_prob(bad)
    with pytest.raises(ValueError, match="shape"):
        distribution.log_prob(torch.zeros(3, *program.event_shape[:-1], 9))


def test_sampling_reads_only_what_was_drawn():
    """One pass of the network per feature."""
    program = dgm.Autoregressive(PROGRAMS["bits"]())
    passes = []
    program.factors.network.register_forward_hook(lambda module, args, out: passes.append(args[0].clone()))
    x = program.sample(3)
    assert len(passes) == 5
    for i, seen in enumerate(passes):
        assert torch.equal(seen[:, :i].double(), x[:, :i])
        assert not seen[:, i:].any()


# -- gradients ---------------------------------------------------------------------------------------------------------


def test_a_gradient_reaches_every_parameter(program):
    if program.event_shape.numel() == 1:
        return  # a single feature reads no input, so that the input weights are all masked
    x, given = outcomes(program, 12), contexts(program, 12)
    program.log_prob(x, given).sum().backward()
    for name, parameter in program.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_rsample_is_the_reparametrized_chain():
    """x_i = loc(x_<i) + scale(x_<i) eps_i, values and gradients."""
    program = lively(dgm.Autoregressive(PROGRAMS["normal-vector"]()), 1.5)
    given = torch.randn(4, 2, requires_grad=True)
    assert program(given).has_rsample
    pyro.set_rng_seed(5)
    x = program(given).rsample((2,))
    pyro.set_rng_seed(5)
    features = [torch.zeros(2, 4)] * 3
    for i, j in enumerate(program.order):
        seen = torch.stack(features, -1).reshape(8, 3)
        raw = raw_at(program, i, seen, given.expand(2, 4, 2).reshape(8, 2)).reshape(2, 4, 2)
        features[j] = raw[..., 0] + F.softplus(raw[..., 1]) * torch.randn(2, 4)
    expected = torch.stack(features, -1)
    torch.testing.assert_close(x, expected)
    wrt = [given, *program.parameters()]
    for a, b in zip(
        torch.autograd.grad(x.sin().sum(), wrt), torch.autograd.grad(expected.sin().sum(), wrt), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_discrete_and_mixture_features_refuse_rsample():
    for name in ("bits", "levels", "mixture"):
        distribution = dgm.Autoregressive(PROGRAMS[name]())()
        assert not distribution.has_rsample
        with pytest.raises(NotImplementedError, match="use sample"):
            distribution.rsample()


def test_it_learns_what_independent_features_cannot():
    """Exclusive or: three bits, uniform but for x_3 = x_1 xor x_2. Two bits of information, one of which is joint."""
    x = torch.tensor([[a, b, a ^ b] for a, b in itertools.product((0, 1), repeat=2)])
    program = dgm.Autoregressive(dgm.Bernoulli(3, MADE(3, 1, (16,))))
    optimizer = torch.optim.Adam(program.parameters(), lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        (-program.log_prob(x).mean()).backward()
        optimizer.step()
    assert program.log_prob(x).mean().item() == pytest.approx(-2 * math.log(2), abs=0.01)


# -- as a part of other programs ---------------------------------------------------------------------------------------


def vae_with(prior=None, likelihood=None):
    return dgm.VAE(
        prior or dgm.Normal(2),
        likelihood or dgm.Bernoulli(3, nn.Linear(2, 3)),
        dgm.Normal(2, MLP((3,), 4, (8,), levels=2)),
    )


VAES = {
    "normal-prior": lambda: vae_with(prior=dgm.Autoregressive(dgm.Normal(2, made(2, 2)))),
    "mixture-prior": lambda: vae_with(prior=dgm.Autoregressive(dgm.MixtureOfNormals(2, 3, made(2, 9)))),
    "likelihood": lambda: vae_with(likelihood=dgm.Autoregressive(dgm.Bernoulli(3, made(3, 1, given_shape=(2,))))),
    "likelihood-pixelcnn": lambda: dgm.VAE(
        dgm.Normal(2),
        dgm.Autoregressive(dgm.Categorical((1, 2, 2), 3, pixelcnn((1, 2, 2), 3, levels=3, given_shape=(2,)))),
        dgm.Normal(2, MLP((1, 2, 2), 4, (8,), levels=3)),
    ),
    "encoder": lambda: dgm.VAE(
        dgm.Normal(2),
        dgm.Bernoulli(3, nn.Linear(2, 3)),
        dgm.Autoregressive(dgm.Normal(2, made(2, 2, given_shape=(3,)))),
    ),
}


@pytest.mark.parametrize("name", VAES)
def test_vae_with_an_autoregressive_part(name):
    """log p(z) + log p(x | z) - log q(z | x) with each term scored apart."""
    vae = VAES[name]()
    x = outcomes(vae, 5)
    x = x.double() if name == "encoder" else x
    pyro.set_rng_seed(1)
    weights = vae.log_weights(x, num_particles=3)
    pyro.set_rng_seed(1)
    with poutine.block(), poutine.trace() as traced, dgm.program.batch_plates((3, 5)):
        vae.posterior("x", x)
    z = traced.trace.nodes["z"]["value"]
    log_p_z = vae.prior.exact_log_prob(z)
    log_q_z = torch.stack([vae.encoder.log_prob(k.detach(), x) for k in z])
    if isinstance(vae.likelihood, dgm.Autoregressive):
        log_p_x = torch.stack([chain_rule(vae.likelihood, x, k).sum(-1) for k in z])
    else:
        log_p_x = torch.stack([vae.likelihood.log_prob(x, k.detach()) for k in z])
    torch.testing.assert_close(weights, log_p_z + log_p_x - log_q_z)
    assert vae.sample(4).shape == (4, *vae.event_shape)
    weights.mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in vae.parameters())


@pytest.mark.parametrize("name", ["normal-prior", "mixture-prior"])
def test_pyro_transforms_and_predicts_an_autoregressive_prior(name):
    vae = VAES[name]()
    x = outcomes(vae, 5)
    guide = AutoNormal(poutine.block(vae.model, hide_fn=lambda site: site["type"] == "param"))
    step = SVI(vae.model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO()).step
    assert math.isfinite(step(x))
    draws = Predictive(vae.model, num_samples=4, parallel=True)(5)
    assert draws["z"].shape == (4, 5, 2)
    assert draws["x"].shape == (4, 5, 3)


def test_classes_with_a_model_each():
    """p(x) = sum_y p(y) p(x | y), each class scored apart."""
    program = lively(dgm.Autoregressive(PROGRAMS["levels-image-label"]()))
    labeled = dgm.Labeled(dgm.Categorical((), 2, learned=True), program)
    x = outcomes(program, 5)
    each = torch.stack([program.log_prob(x, torch.full((5,), c)) for c in range(2)]) - math.log(2)
    torch.testing.assert_close(labeled.log_prob(x), each.logsumexp(0))
    torch.testing.assert_close(labeled.class_probabilities(x), each.softmax(0).T.detach())


def test_both_forms_export():
    program = dgm.Autoregressive(PROGRAMS["bits-label"]())
    x, y = outcomes(program, 5), contexts(program, 5)

    class Score(nn.Module):
        def __init__(self, form):
            super().__init__()
            self.form = form

        def forward(self, x, y):
            return self.form.exact_log_prob(x, y)

    batch = torch.export.Dim("batch", min=2)
    for form in (program, program.unroll()):
        with pyro.validation_enabled(False):
            exported = torch.export.export(Score(form), (x, y), strict=False, dynamic_shapes=({0: batch}, {0: batch}))
        wider = torch.cat([x, x]), torch.cat([y, y])
        torch.testing.assert_close(exported.module()(*wider), form.log_prob(*wider))


@pytest.mark.gpu
def test_scores_and_samples_on_a_gpu(program):
    x, given = outcomes(program, 5), contexts(program, 5)
    expected = program.log_prob(x, given)
    program.cuda()
    cuda_given = None if given is None else given.cuda()
    torch.testing.assert_close(program.log_prob(x.cuda(), cuda_given).cpu(), expected)
    for form in (program, program.unroll()):
        assert form.sample(5, cuda_given).is_cuda
    dgm.Autoregressive(program.factors)


# -- bad input ---------------------------------------------------------------------------------------------------------


class Ordered(nn.Module):
    """A network that claims an order."""

    in_shape = (3,)

    def __init__(self, weight, order=(0, 1, 2)):
        super().__init__()
        self.weight, self.order = nn.Parameter(weight), order

    def forward(self, x):
        return x.to(self.weight.dtype) @ self.weight.T


STRICT = torch.ones(3, 3).tril(-1)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: dgm.networks.MLP((3,), 3), TypeError, "factors must be a conditional"),
        (lambda: dgm.Bernoulli(3), ValueError, "no network.*MADE.*PixelCNN"),
        (lambda: dgm.Bernoulli(3, nn.Linear(3, 3)), ValueError, r"no \.order.*MADE.*PixelCNN"),
        (lambda: dgm.Bernoulli(4, made(3, 1)), ValueError, r"reads x of shape \(3,\).*event_shape.*\(4,\)"),
        (lambda: dgm.Bernoulli((1, 2, 2), made(4, 1)), ValueError, r"\(4,\).*\(1, 2, 2\)"),
        (lambda: dgm.Normal(3, made(3, 1)), ValueError, "2 parameters per feature"),
        (lambda: dgm.Categorical(3, 4, made(3, 3)), ValueError, "4 parameters per feature"),
        (lambda: dgm.Bernoulli(3, Ordered(STRICT, (0, 1))), ValueError, "order must name each of the 3 features"),
        (lambda: dgm.Bernoulli(3, Ordered(STRICT, (0, 0, 1))), ValueError, "once"),
        (lambda: dgm.Bernoulli(3, Ordered(torch.ones(3, 3))), ValueError, "feature 0, at place 1.*MADE.*PixelCNN"),
        (lambda: dgm.Bernoulli(3, Ordered(torch.ones(3, 3).tril())), ValueError, "not autoregressive in its order"),
        (lambda: dgm.Bernoulli(3, Ordered(STRICT, (0, 2, 1))), ValueError, "feature 2, at place 2"),
        (lambda: dgm.Normal(3, Ordered(torch.ones(6, 3))), ValueError, "not autoregressive"),
        (lambda: dgm.Categorical(3, 9, Ordered(1e-3 * torch.ones(27, 3))), ValueError, "not autoregressive"),
    ],
)
def test_bad_features(make, error, message):
    with pytest.raises(error, match=message):
        dgm.Autoregressive(make())


@pytest.mark.parametrize("feature", [0, 9])
def test_one_wrong_weight_among_many_features_is_found(feature):
    weight = torch.randn(200, 200).tril(-1)
    network = Ordered(weight, tuple(range(200)))
    network.in_shape = (200,)
    dgm.Autoregressive(dgm.Bernoulli(200, network))
    with torch.no_grad():
        network.weight[feature, 150] = 0.5
    with pytest.raises(ValueError, match=f"feature {feature}, at place {feature + 1}"):
        dgm.Autoregressive(dgm.Bernoulli(200, network))


def test_thousands_of_features_take_few_passes(monkeypatch):
    rows, forward = [], AttentionLayer.forward
    monkeypatch.setattr(AttentionLayer, "forward", lambda layer, h: rows.append(len(h)) or forward(layer, h))
    network = CausalTransformer((3, 32, 32), 15, width=4, layers=1, heads=1, levels=256)
    dgm.Autoregressive(dgm.DiscretizedLogistic((3, 32, 32), 256, 5, network))
    assert rows == [3]
    monkeypatch.setattr(AttentionLayer, "forward", lambda layer, h: h.flip(1))
    with pytest.raises(ValueError, match="not autoregressive"):
        dgm.Autoregressive(dgm.DiscretizedLogistic((3, 32, 32), 256, 5, network))


def test_a_masked_network_of_ones_own_serves_and_learns_its_shape():
    class Cumulative(nn.Module):
        order = (2, 1, 0)

        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x):
            later = x.flip(-1).cumsum(-1).flip(-1) - x
            return self.scale * later

    program = dgm.Autoregressive(dgm.Bernoulli(3, Cumulative()))
    assert abs(program.log_prob(every_outcome(program)).exp().sum().item() - 1) < 1e-9
    assert program.sample(4).shape == (4, 3)


def test_construction_leaves_modes_and_random_numbers_alone():
    network = made(3, 1, dropout=0.5)
    network.first.eval()
    before, modes = torch.get_rng_state(), [m.training for m in network.modules()]
    dgm.Autoregressive(dgm.Bernoulli(3, network))
    assert torch.equal(torch.get_rng_state(), before)
    assert [m.training for m in network.modules()] == modes


@pytest.mark.parametrize(
    ("name", "x", "given", "message"),
    [
        ("bits", torch.full((2, 5), 2), None, "2 levels"),
        ("bits", torch.zeros(2, 4), None, r"x has shape \(2, 4\)"),
        ("bits", torch.zeros(2, 5), torch.zeros(2), "not conditional"),
        ("bits-label", torch.zeros(2, 4), None, "is conditional: pass given"),
        ("bits-label", torch.zeros(2, 4), torch.tensor([0, 3]), "3 classes"),
        ("bits-vector", torch.zeros(2, 4), torch.zeros(2, 3), r"given has shape \(2, 3\)"),
        ("levels", torch.full((2, 4), -1), None, "3 levels"),
        ("normal", torch.full((2, 3), math.nan, dtype=torch.float64), None, "NaN"),
    ],
)
def test_bad_data(name, x, given, message):
    program = dgm.Autoregressive(PROGRAMS[name]())
    for form in (program, program.unroll()):
        with pytest.raises(ValueError, match=message):
            form.log_prob(x, given)
