"""Graphs whose repeated parts are joined compute what they computed before, and draw the same random numbers."""

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dgm_pyro as dgm
from dgm_pyro.networks import DenoisingMLP
from dgm_pyro.objectives import ELBO
from dgm_pyro.training import lanes
from dgm_pyro.training.compilation import PairLoss, Terms, _LossAlone, _pyro_elbo, export, optimized

pytestmark = pytest.mark.usefixtures("float64")


def calls(graph):
    """Number of operations of a graph and its parts that read a weight."""
    parts = [part for part in graph.modules() if isinstance(part, torch.fx.GraphModule)]
    return sum(node.target in lanes.WEIGHTED for part in parts for node in part.graph.nodes)


def graph_of(module, *arguments, dynamic=False, rtol=1e-12):
    """The graph of ``module``, after it has had the same value, gradient and next random number."""
    graph = export(module, arguments, dynamic=dynamic)
    assert_same(module, graph, *arguments, rtol=rtol)
    return graph


def assert_same(module, graph, *arguments, rtol=1e-12):
    found = []
    for run in (module, graph):
        torch.manual_seed(1)
        loss = run(*arguments)
        found.append((loss, *torch.autograd.grad(loss, [*module.parameters()], allow_unused=True), torch.rand(3)))
    torch.testing.assert_close(*found, rtol=rtol, atol=rtol)


class Calls(nn.Module):
    """A network of two layers, and what calls it: ``use(network, x)``, a scalar."""

    def __init__(self, use):
        super().__init__()
        torch.manual_seed(0)
        self.use, self.network = use, nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))

    def forward(self, x):
        return self.use(self.network, x)


GIVEN = {
    "nothing": ({}, lambda size: None),
    "a label": ({"num_classes": 3}, lambda size: torch.arange(size) % 3),
    "a vector": ({"given_shape": (2,)}, lambda size: torch.randn(size, 2)),
}


@pytest.mark.parametrize(("num_steps", "given"), [(8, "nothing"), (12, "nothing"), (8, "a label"), (8, "a vector")])
def test_an_unrolled_diffusion_has_its_network_twice_whatever_its_number_of_steps(num_steps, given):
    """Once for the steps with a KL, and once for the last one, which has a likelihood."""
    torch.manual_seed(0)
    options, given_of = GIVEN[given]
    program = dgm.Diffusion(2, DenoisingMLP((2,), (4, 4), **options), num_steps=num_steps).unroll()
    loss = _LossAlone(Terms(program, ELBO()))
    graph = graph_of(loss, torch.randn(5, 2), given_of(5), {}, {}, dynamic=True)
    assert calls(graph) == 2 * sum(isinstance(layer, nn.Linear) for layer in program.modules())
    assert_same(loss, graph, torch.randn(7, 2), given_of(7), {}, {})  # another number of data


def of_fresh_draws(network, x):
    return sum(network(torch.randn_like(x) * k).sin().sum() for k in range(6))


def of_scaled(network, x):
    return sum((network(x * scale) * scale).square().mean() for scale in torch.arange(6.0))


def of_pieces(network, x):
    return sum(piece.exp().sum() for k in range(6) for piece in network(x[k : k + 2]).chunk(3, -1))


def with_broadcasts(network, x):
    return sum(sum(torch.broadcast_tensors(network(x + k), x[0])).pow(2).sum() for k in range(6))


def at_times(network, x):
    """The usual way to write a time for each datum."""
    return sum(network(x * torch.full((x.shape[0],), k / 6)[:, None]).sum() for k in range(6))


def in_other_orders(network, x):
    """An operation of the lanes reads two others in one order or the other."""
    total = 0.0
    for k in range(6):
        a, b = x[k : k + 2].sin(), x[k : k + 2].cos()
        total = total + network((a + b if k % 2 else b + a) * a.exp()).sum()
    return total


def test_times_of_any_number_of_data():
    module = Calls(at_times)
    graph = graph_of(module, torch.randn(8, 3), dynamic=True)
    assert calls(graph) == 2
    assert_same(module, graph, torch.randn(5, 3))


@pytest.mark.parametrize("use", [of_fresh_draws, of_scaled, of_pieces, with_broadcasts, at_times, in_other_orders])
def test_calls_on_inputs_that_are_there_are_joined(use):
    assert calls(graph_of(Calls(use), torch.randn(8, 3))) == 2


def after_each_other(network, x):
    for _ in range(6):
        x = network(x)
    return x.sum()


def added_up(network, x):
    """The state x_t = x_{t-1} + f(k) is read by no call, but each is read by the next."""
    total = x
    for k in range(6):
        total = (total + network(x + k)).tanh()
    return total.sum()


def draws_that_depend_on_calls(network, x):
    """The noise of the next call is drawn after a number whose range is this call's result."""
    total = 0.0
    for _ in range(6):
        y = network(torch.randn_like(x))
        total = total + torch.poisson(y.detach().square()).sum() * y.sum()
    return total


def reads_between_writes(network, x):
    memory, total = torch.zeros_like(x), 0.0
    for k in range(6):
        memory.add_(1.0)
        total = total + network(x * memory).sum() * k
    return total


def between_detachments(network, x):
    """`detach_` changes no value, but what has a gradient."""
    w, total = network[0].bias, 0.0
    for k in range(6):
        v = w + k
        total = total + (network(x + k) + v).sin().sum()
        v.detach_()
        total = total + (v * 2).sum()
    return total


@pytest.mark.parametrize(
    "use", [after_each_other, draws_that_depend_on_calls, reads_between_writes, between_detachments]
)
def test_calls_that_depend_on_each_other_are_not_joined(use):
    assert calls(graph_of(Calls(use), torch.randn(5, 3))) == 6 * 2


@pytest.mark.parametrize(
    "use", [lambda y, s: torch.where(y > 0, y, s), lambda y, s: y.clamp(min=s), lambda y, s: y * s]
)
def test_types_are_promoted_as_before(use):
    """A number for each lane is a vector over the lanes, whose type would count."""

    def with_numbers(network, x):
        numbers = torch.linspace(0.1, 0.6, 6, dtype=torch.float64)
        return sum(use(network(x + k), numbers[k]).sum() for k in range(6))

    assert graph_of(Calls(with_numbers).float(), torch.randn(5, 3, dtype=torch.float32), rtol=1e-4) is not None


def test_what_reads_the_calls_one_after_the_other_is_left_alone():
    graph = graph_of(Calls(added_up), torch.randn(5, 3))
    assert calls(graph) == 2
    assert sum(node.target is torch.ops.aten.tanh.default for node in graph.graph.nodes) == 6


def draws_like_columns(network, x):
    """Random numbers fill a tensor in the order of its memory, and a stack of columns has another."""
    columns = x.T.reshape(3, 5, 1).expand(3, 5, 6).contiguous().permute(2, 1, 0)  # of strides (1, 6, 30)
    total = 0.0
    for k in range(6):
        h = columns[k].sin()
        total = total + (network(h) * torch.randn_like(h)).sum()
    return total


def views_of_columns(network, x):
    columns, total = x.T.reshape(3, 5, 1).expand(3, 5, 6).contiguous().permute(2, 1, 0), 0.0
    for k in range(6):
        total = total + (network(columns[k]) * columns[k]).T.as_strided((5,), (1,), k % 2).cumsum(0).sum()
    return total


@pytest.mark.parametrize("use", [draws_like_columns, views_of_columns])
def test_what_depends_on_the_order_in_memory_is_the_same(use):
    graph_of(Calls(use), torch.randn(5, 3))


WITHOUT_GRADIENT = {
    "detach": Tensor.detach,
    "comparison": lambda y: (y > 0).double(),
    "integers": lambda y: (5 * y).long().double(),
    "argmax": lambda y: y.argmax(-1).double(),
    "zeros": torch.zeros_like,
    "draw": lambda y: dist.Bernoulli(logits=y).sample(),
    "no_grad": torch.no_grad()(lambda y: 2 * y),
}


@pytest.mark.parametrize("without", WITHOUT_GRADIENT.values(), ids=WITHOUT_GRADIENT)
def test_calls_without_a_gradient_get_none(without):
    """A parameter of detached calls alone has no gradient; with zeros, AdamW would decay it."""
    module = Calls(lambda network, x: None)
    module.shifts = nn.ParameterList([nn.Parameter(torch.randn(3)) for _ in range(8)])

    def half_detached(network, x):
        y = [network(x + shift).abs().sqrt() for shift in module.shifts]
        return sum((without(each) if k >= 4 else each).sum() for k, each in enumerate(y))

    module.use = half_detached
    graph_of(module, torch.randn(5, 3))


def normalized_beside(network, x):
    """The running mean, which the lanes read, changes from one to the next."""
    mean, variance, total = torch.zeros(3), torch.ones(3), 0.0
    for k in range(6):
        y = network(x + k)
        F.batch_norm(x * (k + 1), mean, variance, training=True)
        total = total + (y * mean).sum()
    return total


def medians_of_equal_values(network, x):
    y = [network(x + k) for k in range(6)]
    return sum((each - each.detach() + torch.tensor([0.0, 1.0, 1.0])).median() * (k + 1) for k, each in enumerate(y))


@pytest.mark.parametrize("use", [lambda y: y, lambda y: F.layer_norm(y, (3,)), lambda y: torch.cat([y, y.cos()], -1)])
def test_one_graph_serves_all_numbers_of_data(use):
    compiled = []

    def backend(graph, example):
        compiled.append(graph)
        return graph.forward

    shifts = torch.randn(6, 3)
    module = Calls(lambda network, x: sum(use(network(x + shift)).sin().sum() for shift in shifts))
    loss = optimized(export(module, (torch.randn(5, 3),)), backend)
    for size in range(5, 12):
        loss(torch.randn(size, 3))
    assert len(compiled) <= 2  # for the first, and for all others


def fresh_draws_like_the_result(network, x):
    total = 0.0
    for k in range(6):
        y = network(x + k)
        total = total + (torch.empty_like(y).normal_() * y).sum()
    return total


def embeddings_with_padding(network, x):
    index, total = torch.tensor([0, 1, 2, 0, 1]), 0.0
    for k in range(6):
        rows = (index + k) % 5
        total = total + (F.embedding(rows, network(x + k), padding_idx=0).sin() * (k + 1)).sum()
    return total


def draws_in_branches(network, x):
    total = 0.0
    for k in range(6):
        noise, y = torch.rand_like(x), network(x + k)
        branch = torch.cond(y.sum() > 0, lambda x: torch.rand_like(x), lambda x: -torch.rand_like(x), (x,))
        total = total + (branch * noise * y).sum()
    return total


def detached_results(network, x):
    return sum((network(x + k).detach_() * network(x * k)).sum() for k in range(6))


@pytest.mark.parametrize(
    "use",
    [
        *(fresh_draws_like_the_result, embeddings_with_padding, draws_in_branches, detached_results),
        *(normalized_beside, medians_of_equal_values),
    ],
)
def test_operations_that_lanes_cannot_share_are_the_same(use):
    graph_of(Calls(use), torch.randn(5, 3))


def test_dropout_draws_what_it_drew():
    def dropped(network, x):
        first, middle, last = network
        return sum(last(F.dropout(middle(first(x + k)), 0.5)).sum() for k in range(6))

    assert calls(graph_of(Calls(dropped), torch.randn(5, 3))) == 2  # before the draws, and after


def test_dropout_that_draws_nothing_is_no_draw():
    def whole(network, x):
        first, middle, last = network
        return sum(last(F.dropout(F.dropout(middle(first(x + k)), 0.0), 0.5, training=False)).sum() for k in range(6))

    assert calls(graph_of(Calls(whole), torch.randn(5, 3))) == 2


@pytest.mark.parametrize("convolution", [nn.Conv1d(3, 3, 1, padding="same"), nn.ConvTranspose1d(3, 3, 1)])
def test_a_graph_with_convolutions_stays(convolution):
    """Joined, they are slower on a CPU."""

    def both(network, x):
        return sum(network(x + k).sum() for k in range(6)) + convolution(x.T).sum()

    convolution.double()
    assert calls(graph_of(Calls(both), torch.randn(5, 3))) == 6 * 2


def test_at_most_two_calls_are_left_out():
    def ends(network, x):
        y = [network(x + k) for k in range(7)]
        return y[0].sum() + y[6].tan().sum() + sum(each.sin().square().sum() for each in y[1:6])

    def halves(network, x):
        y = [network(x + k) for k in range(8)]
        return sum(each.sin().sum() for each in y[:4]) + sum(each.tan().sum() for each in y[4:])

    assert calls(graph_of(Calls(ends), torch.randn(5, 3))) == 2 + 2 * 2
    assert calls(graph_of(Calls(halves), torch.randn(5, 3))) == 2  # all of them, and their readers are left alone


def test_calls_of_different_shapes_are_joined_apart():
    def shapes(network, x):
        return sum(network(x[: 2 + k // 4] * k).sum() for k in range(8))

    assert calls(graph_of(Calls(shapes), torch.randn(5, 3))) == 2 * 2


def test_calls_in_a_part_without_gradients_are_joined():
    def of_constants(network, x):
        with torch.no_grad():
            weight = sum(network(x + k).sin().mean() for k in range(6))
        return weight * network(x).sum()

    assert calls(graph_of(Calls(of_constants), torch.randn(5, 3))) == 2 + 2


def test_what_cannot_be_mapped_stays():
    """`torch.vmap` would loop over the lanes with a warning."""

    def counts(network, x):
        return sum(y.sum() + torch.histc(y.detach(), 3).max() for y in (network(x + k) for k in range(6)))

    assert calls(graph_of(Calls(counts), torch.randn(5, 3))) == 6 * 2


PARTICLES = {
    "importance weights": (dgm.IWAE(6), pyro.infer.RenyiELBO(0.0, 6)),
    "the bound": (ELBO(num_samples=6, analytic_kl=False), pyro.infer.Trace_ELBO(6)),
    "closed forms": (ELBO(num_samples=6), pyro.infer.TraceMeanField_ELBO(6)),
}


@pytest.mark.parametrize("name", PARTICLES)
def test_particles_of_a_pyro_pair_are_lanes(name):
    """Pyro's losses run model and guide for each particle."""
    objective, theirs = PARTICLES[name]
    torch.manual_seed(0)
    decoder, encoder = nn.Linear(2, 5), nn.Linear(5, 2)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x), 0.5).to_event(1))

    x = torch.randn(4, 5)
    loss = PairLoss(model, guide, _pyro_elbo(objective), backend="eager")
    torch.manual_seed(1)
    expected = theirs.loss_and_grads(model, guide, x)
    torch.manual_seed(1)
    torch.testing.assert_close(loss(x).item(), expected)
    (compiled,) = loss._graphs.values()
    assert calls(compiled) == 2


@pytest.mark.parametrize("use", [of_fresh_draws, of_pieces])
def test_machine_code_of_joined_calls_is_the_same(use):
    module, x = Calls(use), torch.randn(8, 3)
    assert_same(module, optimized(export(module, (x,), dynamic=False)), x, rtol=1e-9)
