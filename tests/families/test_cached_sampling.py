"""Cached chains against naive ones: the same draws from the same random numbers, for a fraction of the operations.

The naive chain is the one that `FeatureChain` walks when the network has no cache: a whole pass for every feature.
"""

import math

import pyro
import pytest
import torch
from programs import CASES, jittered, transformer
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dgm_pyro as dgm
from dgm_pyro import flow
from dgm_pyro.families import autoregressive
from dgm_pyro.infer import Features
from dgm_pyro.infer.smc import propagate
from dgm_pyro.networks import (
    MADE,
    MLP,
    CausalTransformer,
    EmbeddedGiven,
    PixelCNN,
    bijections,
)
from dgm_pyro.networks.caches import Growing, cache_maker

pytestmark = pytest.mark.usefixtures("float64")


def ar(family, network):
    return lambda: jittered(dgm.Autoregressive(family(network())), 0.4)


def bits(shape):
    return lambda network: dgm.Bernoulli(shape, network)


def reals(shape, components=2):
    return lambda network: dgm.MixtureOfNormals(shape, components, network)


ORDER = (4, 1, 5, 0, 3, 2)
PROGRAMS = {
    name: (lambda case=case: case.build())
    for name, case in CASES.items()
    if name.startswith(("made", "pixelcnn", "transformer"))
}
PROGRAMS |= {
    "made-residual-context": ar(
        bits(6), lambda: MADE(6, 1, (9, 9, 9), residual=True, order=ORDER, given_shape=(2, 2), levels=2)
    ),
    "made-widths": ar(
        bits((1, 2, 3)), lambda: MADE((1, 2, 3), 1, (3, 11, 2), order=ORDER, levels=2, activation="gelu")
    ),
    "made-few-units": ar(reals(7), lambda: MADE(7, 6, (2,), num_classes=2)),
    "made-two-features": ar(reals(2), lambda: MADE(2, 6, (4, 4), given_shape=(3,))),
    "made-one-feature-context": ar(reals(1), lambda: MADE(1, 6, (4, 4), given_shape=(3,))),
    "made-levels-unscaled": ar(lambda n: dgm.Categorical(4, 5, n), lambda: MADE(4, 5, (8,), order=(3, 0, 2, 1))),
    "made-logistic": ar(lambda n: dgm.DiscretizedLogistic(5, 256, 3, n), lambda: MADE(5, 9, (16, 16), levels=256)),
    "made-scale-per-feature": ar(
        lambda n: dgm.Normal(4, n, scale_type="feature"), lambda: MADE(4, 1, (8,), order=(3, 0, 2, 1))
    ),
    "made-scale-shared": ar(lambda n: dgm.Normal((1, 2, 2), n, scale_type="shared"), lambda: MADE((1, 2, 2), 1, (8,))),
    "made-dropout": ar(bits(5), lambda: MADE(5, 1, (8, 8), dropout=0.5)),
    "pixelcnn-wide-kernel": ar(bits((1, 4, 5)), lambda: PixelCNN((1, 4, 5), 1, 4, 3, 5, levels=2)),
    "pixelcnn-wider-kernel": ar(reals((1, 3, 4)), lambda: PixelCNN((1, 3, 4), 6, 4, 2, 7, given_shape=(3,))),
    "pixelcnn-one-layer": ar(bits((1, 5, 4)), lambda: PixelCNN((1, 5, 4), 1, 4, 1)),
    "pixelcnn-row": ar(bits((1, 1, 6)), lambda: PixelCNN((1, 1, 6), 1, 4, 2, num_classes=3)),
    "pixelcnn-column": ar(bits((1, 6, 1)), lambda: PixelCNN((1, 6, 1), 1, 4, 2)),
    "pixelcnn-one-pixel": ar(reals((1, 1, 1)), lambda: PixelCNN((1, 1, 1), 6, 4, 2)),
    "pixelcnn-levels": ar(
        lambda n: dgm.DiscretizedLogistic((1, 3, 3), 256, 2, n),
        lambda: PixelCNN((1, 3, 3), 6, 4, 3, levels=256, dropout=0.3),
    ),
    "pixelcnn-color": ar(reals((3, 3, 2)), lambda: PixelCNN((3, 3, 2), 6, 4, 3, 5, given_shape=(3,))),
    "pixelcnn-two-channels": ar(
        lambda n: dgm.DiscretizedLogistic((2, 2, 3), 256, 2, n),
        lambda: PixelCNN((2, 2, 3), 6, 4, 2, levels=256, num_classes=3),
    ),
    "pixelcnn-attention": ar(
        bits((1, 3, 4)), lambda: PixelCNN((1, 3, 4), 1, 4, 5, 5, attention=2, heads=2, num_classes=3)
    ),
    "pixelcnn-color-attention": ar(
        reals((3, 2, 3)), lambda: PixelCNN((3, 2, 3), 6, 4, 2, attention=1, heads=1, dropout=0.3)
    ),
    "pixelcnn-stages": ar(bits((1, 4, 6)), lambda: PixelCNN((1, 4, 6), 1, 4, 2, 5, stages=2, num_classes=3)),
    "pixelcnn-color-stages": ar(
        reals((3, 4, 8)), lambda: PixelCNN((3, 4, 8), 6, 4, 2, stages=3, attention=1, heads=2, given_shape=(2,))
    ),
    "pixelcnn-maps": ar(bits((1, 3, 4)), lambda: PixelCNN((1, 3, 4), 1, 4, 2, given_shape=(2, 3, 4))),
    "pixelcnn-maps-stages": ar(
        reals((3, 4, 8)), lambda: PixelCNN((3, 4, 8), 6, 4, 1, stages=3, attention=0, given_shape=(2, 4, 8))
    ),
    "pixelcnn-maps-one-row": ar(bits((1, 1, 6)), lambda: PixelCNN((1, 1, 6), 1, 4, 2, given_shape=(2, 1, 6))),
    "embedded-given": ar(
        bits((1, 3, 4)),
        lambda: EmbeddedGiven(PixelCNN((1, 3, 4), 1, 4, 2, given_shape=(2, 3, 4)), MLP((5,), 24, (8,))),
    ),
    "predictors-embedded-label": ar(
        lambda n: dgm.PredictedLogistic((1, 2, 4), 17, 4, n),
        lambda: EmbeddedGiven(
            PixelCNN((1, 2, 4), 12, 4, 2, stages=2, levels=17, given_shape=(2, 2, 4)), MLP((), 16, num_classes=3)
        ),
    ),
    "predictors": ar(
        lambda n: dgm.PredictedLogistic((1, 3, 4), 256, 5, n),
        lambda: PixelCNN((1, 3, 4), 15, 4, 2, levels=256, num_classes=3),
    ),
    "predictors-color-stages": ar(
        lambda n: dgm.PredictedLogistic((3, 4, 2), 17, 8, n),
        lambda: PixelCNN((3, 4, 2), 24, 4, 2, stages=2, levels=17, given_shape=(3,)),
    ),
    "predictors-transformer": ar(
        lambda n: dgm.PredictedLogistic((3, 2, 2), 17, 6, n),
        lambda: CausalTransformer((3, 2, 2), 18, 8, 1, 2, levels=17),
    ),
    "transformer-one-feature": ar(reals(1), lambda: CausalTransformer(1, 6, 8, 2, 2)),
    "transformer-one-head": ar(
        bits((1, 2, 3)), lambda: CausalTransformer((1, 2, 3), 1, 6, 1, 1, order=ORDER, levels=2)
    ),
    "transformer-dropout": ar(reals(4), lambda: CausalTransformer(4, 6, 8, 3, 4, dropout=0.2, given_shape=(2, 2))),
}


@pytest.fixture(params=PROGRAMS, name="program")
def _program(request):
    return PROGRAMS[request.param]().eval()


@pytest.fixture
def naive(monkeypatch):
    """A switch: from here on no network has a cache."""

    def switch():
        monkeypatch.setattr(autoregressive, "cache_maker", lambda network: None)
        monkeypatch.setattr(bijections, "cache_maker", lambda network: None)

    return switch


def contexts(program, *batch):
    if not program.conditional:
        return None
    if program.num_classes:
        return torch.randint(program.num_classes, batch)
    return torch.randn(*batch, *program.given_shape)


def passes(network):
    """A list that grows with every pass of the network; counted without a hook, which would switch the cache off."""
    calls, forward = [], network.forward

    def counted(*args):
        calls.append(args)
        return forward(*args)

    network.forward = counted
    return calls


def seeded(draw):
    pyro.set_rng_seed(7)
    return draw()


def same(draw, naive, network=None):
    """`draw` with a cache gives what it gives without."""
    calls = [] if network is None else passes(network)
    found = seeded(draw)
    assert not calls
    naive()
    expected = seeded(draw)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    return found


# -- the same draws ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 5])
def test_samples(program, naive, size):
    given = contexts(program, size)
    x = same(lambda: program.sample(size, given), naive, program.factors.network)
    assert x.shape == (size, *program.event_shape)


def test_samples_without_a_batch_and_with_two(program, naive):
    given = contexts(program)
    alone = program(given).sample()
    assert alone.shape == program.event_shape
    wide = contexts(program, 3, 1)
    assert same(lambda: program(wide).expand((3, 2)).sample((4,)), naive).shape == (4, 3, 2, *program.event_shape)


def test_samples_of_one_chain(program, naive):
    given = contexts(program)
    same(lambda: program(given).sample(), naive, program.factors.network)


def test_unrolled_with_sites_fixed(program, naive):
    """The value that a site takes is what the next ones see."""
    given, size = contexts(program, 3), len(program.order)
    like = program.sample(3, given)
    fixed = {f"x_{i}": like.flatten(1)[:, program.order[i - 1]] for i in range(2, size + 1, 3)}
    if program.levels is not None and size > 1:
        fixed["x_1"] = torch.tensor(program.levels - 1).to(like.dtype)  # one number for the whole batch
    conditioned = poutine.condition(program.unroll().model, data=fixed)
    x = same(lambda: conditioned(3, given), naive, program.factors.network)
    for name, value in fixed.items():
        assert torch.equal(x.flatten(1)[:, program.order[int(name[2:]) - 1]], value.expand(3))


def test_particles_grow_the_batch_of_what_is_fixed(program, naive):
    """x_1 has the shape of the data, what follows that of the particles."""
    given = contexts(program, 3)
    like = program.sample(3, given).flatten(1)[:, program.order[0]]
    unrolled = poutine.condition(program.unroll().joint, data={"w_1": like})

    def draw():
        with poutine.block(), dgm.program.batch_plates((4, 3)):
            return unrolled("w", None, given)

    same(draw, naive)


@pytest.mark.parametrize("name", ["made-order", "pixelcnn", "transformer"])
def test_enumeration_grows_the_batch_at_every_step(name):
    """Pyro's enumeration of two of the four features, against the table."""
    program = PROGRAMS[name]().eval()
    calls = passes(program.factors.network)
    seen = {"x_2": torch.tensor([0, 1, 1]), "x_4": torch.tensor([1, 1, 0])}
    seen = {site: value.double() for site, value in seen.items()} if name != "pixelcnn" else seen
    conditioned = poutine.condition(program.unroll().model, data=seen)
    with torch.no_grad():
        evidence = -TraceEnum_ELBO(max_plate_nesting=1).loss(config_enumerate(conditioned), lambda size: None, 3)
    assert not calls
    every = torch.cartesian_prod(*[torch.arange(2)] * 4)
    mass = program.log_prob(every.reshape(-1, *program.event_shape)).exp()
    second, fourth = every[:, program.order[1]], every[:, program.order[3]]
    expected = [mass[(second == a) & (fourth == b)].sum().log() for a, b in zip(*seen.values(), strict=True)]
    assert evidence == pytest.approx(sum(expected).item(), abs=1e-9)


# -- gradients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["made-normal", "made-residual", "made-scale-shared", "pixelcnn", "pixelcnn-stages", "transformer"]
)
def test_gradients_through_the_draws(name, naive):
    networks = {
        "made-normal": lambda: dgm.Normal(5, MADE(5, 2, (8, 8), order=(3, 1, 4, 0, 2), given_shape=(2,))),
        "made-residual": lambda: dgm.Normal(5, MADE(5, 2, (8, 8, 8), residual=True, given_shape=(2,))),
        "made-scale-shared": lambda: dgm.Normal(4, MADE(4, 1, (8,), given_shape=(2,)), scale_type="shared"),
        "pixelcnn": lambda: dgm.Normal((1, 3, 4), PixelCNN((1, 3, 4), 2, 4, 3, 5, given_shape=(2,))),
        "pixelcnn-stages": lambda: dgm.Normal(
            (1, 2, 4), PixelCNN((1, 2, 4), 2, 4, 2, stages=2, attention=1, heads=2, given_shape=(2,))
        ),
        "transformer": lambda: dgm.Normal(4, CausalTransformer(4, 2, 8, 2, 2, given_shape=(2,))),
    }
    program = jittered(dgm.Autoregressive(networks[name]()), 0.2).eval()
    given = torch.randn(3, 2, requires_grad=True)
    inputs = [given, *program.parameters()]
    calls = passes(program.factors.network)
    assert program(given).has_rsample

    def gradients(form):
        pyro.set_rng_seed(7)
        if form == "plated":
            x = program(given).rsample((2,))
        else:
            with poutine.block(), dgm.program.batch_plates((2, 3)):
                x = program.unroll().joint("x", None, given)
        weights = torch.linspace(-1, 1, x.numel()).reshape(x.shape)
        grads = torch.autograd.grad((weights * x.sin()).sum(), inputs, allow_unused=True, materialize_grads=True)
        return x, *grads

    found = [gradients(form) for form in ("plated", "unrolled")]
    assert not calls
    naive()
    for form, each in zip(("plated", "unrolled"), found, strict=True):
        for a, b in zip(each, gradients(form), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


# -- when there is no cache --------------------------------------------------------------------------------------------


def test_dropout_draws_anew_in_each_pass():
    network = MADE(4, 1, (6,), dropout=0.5)
    program = dgm.Autoregressive(dgm.Bernoulli(4, network))
    calls = passes(network)
    program.sample(3)
    assert len(calls) == 4
    program.eval().sample(3)
    assert len(calls) == 4
    assert cache_maker(MADE(4, 1, (6,), dropout=0.0)) is not None


def test_a_hook_may_change_what_passes(naive):
    """So it is called at every feature."""
    program = jittered(dgm.Autoregressive(dgm.Normal(4, MADE(4, 2, (6,)))), 0.4)
    program.factors.network.last.register_forward_hook(lambda module, args, out: 2 * out)
    same(lambda: program.sample(3), naive)


def test_parameters_of_ones_own_making_are_left_to_their_maker(naive):
    class Doubled(dgm.Normal):
        def raw_parameters(self, given=None):
            return 2 * super().raw_parameters(given)

    program = jittered(dgm.Autoregressive(Doubled(4, MADE(4, 2, (6,)))), 0.4)
    same(lambda: program.sample(3), naive)


@pytest.mark.parametrize("wrong", ["value", "shape"])
def test_a_cache_that_gives_something_else_is_refused(wrong):
    class Other(MADE):
        def forward(self, x):
            return 1.1 * super().forward(x)

    class Short(MADE):
        def cache(self, batch_size, given=None):
            made = super().cache(batch_size, given)
            step = made.step
            made.step = lambda value: step(value)[:, :1]
            return made

    network = {"value": Other, "shape": Short}[wrong](4, 2, (6,))
    with torch.no_grad():
        network.last.bias.add_(1.0)
    with pytest.raises(ValueError, match=rf"the cache of {type(network).__name__} .* place 1"):
        dgm.Autoregressive(dgm.Normal(4, network))


def test_growing_with_and_without_gradients():
    pieces = [torch.randn(3, k, 2) for k in (1, 0, 2, 4)]
    rows = torch.tensor([2, 0, 2, 1])
    for start in (0, 2):  # where the gradients begin to be recorded
        growing = Growing(torch.empty(3, 0, 2), 7)
        for i, piece in enumerate(pieces):
            with torch.set_grad_enabled(i >= start > 0):
                value = growing.append(piece)
            assert torch.equal(value, torch.cat(pieces[: i + 1], 1))
        growing.take(rows)
        assert torch.equal(growing.value, torch.cat(pieces, 1)[rows])


# -- particles ---------------------------------------------------------------------------------------------------------


def test_resampling_takes_its_rows_along(program, naive):
    """Some features observed, particles resampled at every step: states and weights with a cache and without."""
    if len(program.order) < 3:
        return
    given = contexts(program, 2)
    x = program.sample(2, given)
    mask = torch.zeros_like(x, dtype=torch.bool).flatten(1)
    mask[:, list(program.order[:1])] = True
    mask[1, program.order[-2]] = True
    mask = mask.reshape(x.shape)

    def draw():
        with torch.no_grad():
            chain = Features(program, x, mask, given)
            population = propagate(chain, 6, 2, threshold=1.1)
            return torch.cat(
                [chain.finish(population.state).double().flatten(2), population.log_weights[..., None]], -1
            )

    same(draw, naive)


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("name", ["made", "pixelcnn", "pixelcnn-stages", "transformer"])
def test_draws_export_with_any_batch(name, recorded):
    """With and without gradients: what is written in place, and what is not."""
    networks = {
        "made": lambda: dgm.Normal(3, MADE(3, 2, (6, 6), given_shape=(2,))),
        "pixelcnn": lambda: dgm.Normal((1, 2, 2), PixelCNN((1, 2, 2), 2, 4, 2, given_shape=(2,))),
        "pixelcnn-stages": lambda: dgm.Normal(
            (1, 2, 2), PixelCNN((1, 2, 2), 2, 4, 2, stages=2, attention=1, given_shape=(2,))
        ),
        "transformer": lambda: dgm.Normal(3, CausalTransformer(3, 2, 8, 1, 2, given_shape=(2,))),
    }

    class Draw(nn.Module):
        def __init__(self, program):
            super().__init__()
            self.program = program

        def forward(self, given):
            return self.program(given).rsample()

    draw = Draw(dgm.Autoregressive(networks[name]())).eval()
    with torch.set_grad_enabled(recorded), pyro.validation_enabled(False):
        batch = torch.export.Dim("batch", min=2)
        exported = torch.export.export(draw, (torch.randn(5, 2),), strict=False, dynamic_shapes=({0: batch},)).module()
        given = torch.randn(7, 2)
        torch.testing.assert_close(seeded(lambda: exported(given)), seeded(lambda: draw(given)))


# -- bijections --------------------------------------------------------------------------------------------------------

FLOWS = {
    "maf": lambda: flow.maf(5, layers=3, hidden=(9, 9)),
    "maf-context": lambda: flow.maf((1, 2, 3), layers=2, hidden=(7,), given_shape=(2,)),
    "maf-one-feature": lambda: flow.maf(1, layers=2, hidden=(7,)),
    "nsf": lambda: flow.nsf_autoregressive(4, layers=2, hidden=(8,), bins=4),
    "iaf-label": lambda: flow.iaf(5, layers=2, hidden=(8, 8), num_classes=3),
    "maf-transformer": lambda: dgm.Flow(
        4, [bijections.MaskedAutoregressive(bijections.Affine(), CausalTransformer(4, 2, 8, 2, 2, order=(2, 0, 1, 3)))]
    ),
}


@pytest.mark.parametrize("name", FLOWS)
def test_flows_go_round(name, naive):
    """z to x to z, values and log-determinants; and x as without a cache, with the gradients."""
    program = jittered(FLOWS[name](), 0.3)
    given = contexts(program, 6)
    z = torch.randn(6, *program.event_shape, requires_grad=True)
    slow = program.inverse_map if name.startswith("iaf") else program.forward_map
    fast = program.forward_map if name.startswith("iaf") else program.inverse_map
    x = slow(z, given)
    torch.testing.assert_close(fast(x, given), z, rtol=1e-8, atol=1e-8)
    outside = program.log_prob(x.detach(), given)
    inputs = [z, *program.parameters()]
    grads = torch.autograd.grad(x.sin().sum(), inputs, allow_unused=True, materialize_grads=True)
    with torch.no_grad():
        torch.testing.assert_close(slow(z, given), x, rtol=1e-12, atol=1e-12)
    naive()
    y = slow(z, given)
    torch.testing.assert_close(y, x, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(program.log_prob(x.detach(), given), outside, rtol=1e-10, atol=1e-10)
    again = torch.autograd.grad(y.sin().sum(), inputs, allow_unused=True, materialize_grads=True)
    for a, b in zip(grads, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_a_conditioner_of_the_wrong_size_says_so():
    wrong = bijections.MaskedAutoregressive(bijections.Affine(), MADE(3, 3, (4,)))
    with pytest.raises(ValueError, match=r"the network of a bijection returned shape \(2, 3, 3\)"):
        wrong(torch.zeros(2, 3))


# -- cost --------------------------------------------------------------------------------------------------------------

COSTS = {
    "made": lambda: dgm.Bernoulli(40, MADE(40, 1, (64, 64), order=tuple(range(39, -1, -1)))),
    "made-residual": lambda: dgm.DiscretizedLogistic(40, 8, 2, MADE(40, 6, (64, 64, 64), residual=True, levels=8)),
    "pixelcnn": lambda: dgm.Bernoulli((1, 7, 7), PixelCNN((1, 7, 7), 1, 8, 4, levels=2)),
    "pixelcnn-wide-kernel": lambda: dgm.Categorical((1, 7, 7), 4, PixelCNN((1, 7, 7), 4, 8, 4, 5, levels=4)),
    "pixelcnn-stages": lambda: dgm.Bernoulli((1, 8, 8), PixelCNN((1, 8, 8), 1, 8, 2, stages=3, attention=1, levels=2)),
    "transformer": lambda: dgm.Bernoulli(40, CausalTransformer(40, 1, 32, 2, 2, levels=2)),
}


def operations(run):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", COSTS)
def test_a_draw_costs_no_more_than_one_pass(name, naive):
    """In multiplications and additions of matrices: the masked half is left out, or nothing is; naive, D passes."""
    program = dgm.Autoregressive(COSTS[name]()).eval()
    size = len(program.order)
    x = program.sample(4)
    one = operations(lambda: program.log_prob(x))
    cached = operations(lambda: program.sample(4))
    assert one > 0
    assert 0.3 * one < cached < 1.05 * one
    naive()
    assert operations(lambda: program.sample(4)) == size * one


def test_maf_draws_for_the_cost_of_scoring():
    program = flow.maf(40, layers=2, hidden=(64, 64))
    x = program.sample(4)
    assert operations(lambda: program.sample(4)) < 1.05 * operations(lambda: program.log_prob(x))


# -- the transformer ---------------------------------------------------------------------------------------------------


def test_the_transformer_is_attention_written_out():
    """One layer by the formula, with a mask and without `scaled_dot_product_attention`."""
    network = jittered(CausalTransformer(5, 2, 8, 1, 2, order=(3, 1, 4, 0, 2), given_shape=(3,)), 0.4)
    x, context = torch.randn(4, 5), torch.randn(4, 3)
    layer = network.layers[0]
    before = torch.cat((network.start.expand(4, 1, 8), network.embed(x[:, list(network.order[:-1]), None])), 1)
    h = before + network.positions + network.embedding(context)[:, None]
    read = layer.queries_keys_values(layer.norm(h))
    attended = []
    for head in range(2):
        q, k, v = (read[..., 8 * part + 4 * head : 8 * part + 4 * head + 4] for part in range(3))
        scores = q @ k.mT / math.sqrt(4)
        later = torch.ones(5, 5).triu(1).bool()
        attended.append(scores.masked_fill(later, -torch.inf).softmax(-1) @ v)
    h = h + layer.out(torch.cat(attended, -1))
    h = h + layer.mlp(layer.norm_mlp(h))
    expected = torch.empty(4, 2, 5)
    expected[..., list(network.order)] = network.last(h).mT
    torch.testing.assert_close(network(x, context), expected, rtol=1e-10, atol=1e-10)


def test_the_transformer_depends_on_every_feature_before_and_on_none_after():
    network = jittered(CausalTransformer((1, 2, 3), 1, 8, 2, 2, order=ORDER), 0.4)
    x = torch.randn(1, 1, 2, 3)
    jacobian = torch.autograd.functional.jacobian(lambda x: network(x).flatten(), x).reshape(6, 6)
    ordered = jacobian[list(ORDER)][:, list(ORDER)]
    before = torch.ones(6, 6).tril(-1).bool()
    assert (ordered[before] != 0).all()
    assert (ordered[~before] == 0).all()


def test_transformer_arguments():
    with pytest.raises(ValueError, match="width must be a multiple of heads, got width=10 and heads=4"):
        CausalTransformer(3, 1, 10, 1, 4)
    with pytest.raises(ValueError, match="heads must be a positive integer"):
        CausalTransformer(3, 1, 8, 1, 0)
    with pytest.raises(ValueError, match="order must name each of the 3 features"):
        CausalTransformer(3, 1, 8, 1, 2, order=(0, 1))


def test_a_transformer_learns_a_parity():
    """x_3 is x_1 xor x_2: two bits of entropy in three features."""
    program = transformer(dgm.Bernoulli, 3)
    x = torch.cartesian_prod(*[torch.arange(2)] * 2)
    x = torch.cat((x, x.sum(-1, keepdim=True) % 2), -1)
    optimizer = torch.optim.Adam(program.parameters(), lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        loss = -program.log_prob(x).mean()
        loss.backward()
        optimizer.step()
    assert loss.item() < 2 * math.log(2) + 0.05


@pytest.mark.gpu
def test_cached_samples_on_a_gpu(program, naive):
    program.cuda()
    given = contexts(program, 4)
    given = None if given is None else given.cuda()
    same(lambda: program.sample(4, given), naive, program.factors.network)


def test_a_cache_of_ones_own():
    """The running sum of the protocol's page, against the network."""

    class Running(nn.Module):
        order = (0, 1, 2, 3)

        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.randn(4))

        def forward(self, x):
            return self.scale * (x.cumsum(-1) - x)

        def cache(self, batch_size, given=None):
            return Sum(self, batch_size)

    class Sum:
        def __init__(self, network, batch_size):
            self.network, self.sum, self.place = network, torch.zeros(batch_size), -1

        def step(self, value):
            self.place += 1
            if value is not None:
                self.sum = self.sum + value
            return (self.network.scale[self.place] * self.sum).unsqueeze(-1)

        def take(self, rows):
            self.sum = self.sum[rows]

    network = Running()
    program = dgm.Autoregressive(dgm.Bernoulli(4, network))
    calls = passes(network)
    x = seeded(lambda: program.sample(5))
    assert not calls
    torch.testing.assert_close(seeded(lambda: program.unroll().sample(5)), x)
