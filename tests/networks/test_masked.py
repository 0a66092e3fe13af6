"""MADE: who sees whom, by Jacobians; what it computes, unit by unit."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.functional import jacobian

from dgm_pyro.networks import MADE
from dgm_pyro.networks.masked import MaskedLinear

pytestmark = pytest.mark.usefixtures("float64")


def dependencies(network, *inputs, wrt=0):
    """Whether some parameter of each feature moves with each entry of an input, ``(features, entries)``."""
    rows = zip(*(part.split(1) for part in inputs), strict=True)
    seen = torch.zeros(())
    for row in rows:
        tail = row[wrt + 1 :]
        moved = jacobian(lambda part, row=row, tail=tail: network(*row[:wrt], part, *tail), row[wrt])
        seen = seen + moved.reshape(moved.shape[1], network.in_shape.numel(), -1).abs().sum(0)
    return seen != 0


def before(order):
    """Whether feature j comes before feature i in the order, ``(i, j)``."""
    place = torch.tensor([list(order).index(i) for i in range(len(order))])
    return place < place.unsqueeze(-1)


@st.composite
def mades(draw, min_size=1):
    size = draw(st.integers(min_size, 7))
    order = draw(st.sampled_from(["natural", tuple(range(size))[::-1]]) | st.permutations(range(size)))
    residual = draw(st.booleans())
    widths = st.lists(st.integers(1, 12), min_size=1, max_size=3)
    hidden = draw(st.integers(1, 12).flatmap(lambda w: st.just([w] * draw(st.integers(1, 3)))) if residual else widths)
    context = draw(st.sampled_from([{}, {"given_shape": (2,)}, {"num_classes": 3}]))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    options = {"order": order, "residual": residual, "activation": "tanh", **context}
    return MADE((size,), draw(st.integers(1, 3)), hidden, **options)


def context_for(network, size):
    if network.num_classes:
        return (torch.arange(size) % network.num_classes,)
    return () if network.given_shape is None else (torch.randn(size, *network.given_shape),)


@given(mades())
@settings(max_examples=60)
def test_each_feature_sees_exactly_the_features_before_it(made):
    x = torch.randn(3, *made.in_shape)
    assert torch.equal(dependencies(made, x, *context_for(made, 3)), before(made.order))


@given(mades(min_size=2))
@settings(max_examples=20)
def test_hidden_units_alone_suffice_where_there_are_enough(made):
    """Without the direct connections, and a width that has every degree."""
    made = MADE(made.in_shape, 2, (20, 20), order=made.order, residual=True, activation="tanh")
    torch.nn.init.zeros_(made.direct.weight)
    assert torch.equal(dependencies(made, torch.randn(3, *made.in_shape)), before(made.order))


@given(mades(), st.integers(0, 1))
@settings(max_examples=30)
def test_the_context_reaches_every_feature_through_hidden_units(made, kind):
    option = ({"given_shape": (2,)}, {"num_classes": 3})[kind]
    made = MADE(made.in_shape, 2, (9, 9), order=made.order, activation="tanh", **option)
    x = torch.randn(1, *made.in_shape)
    if kind:
        a, b = made(x, torch.tensor([0])), made(x, torch.tensor([1]))
        assert ((a - b).abs().amax(1) > 0).all()
        return
    contexts = torch.randn(2)
    f = [made(x, scale * contexts.unsqueeze(0)) for scale in (0.0, 1.0, 2.0)]
    assert ((f[2] - 2 * f[1] + f[0]).abs().amax(1) > 1e-12).all()  # no affine function of the context


def test_outputs_by_hand():
    """MADE unit by unit: hidden unit a of degree m reads the first m features, place i reads units of degree < i."""
    order = (2, 0, 3, 1)
    made = MADE((4,), 2, (5,), order=order, activation="tanh")
    x = torch.randn(4)
    degree = [1, 2, 2, 2, 3]  # 1, 1.5, 2, 2.5, 3, rounded half to even
    w, b = made.first.weight, made.first.bias
    hidden = [
        torch.tanh(sum((w[a, order[i]] * x[order[i]] for i in range(degree[a])), start=b[a]))
        for a in range(len(degree))
    ]
    for p in range(2):
        for i, feature in enumerate(order):
            row = 4 * p + feature
            total = made.last.bias[row]
            for a in range(len(degree)):
                if degree[a] <= i:
                    total = total + made.last.weight[row, a] * hidden[a]
            for j in order[:i]:
                total = total + made.direct.weight[row, j] * x[j]
            torch.testing.assert_close(made(x.unsqueeze(0))[0, p, feature], total)


def test_residual_blocks_by_hand():
    made = MADE((3,), 1, (6, 6), residual=True, given_shape=(2,), activation="silu")
    x, c = torch.randn(4, 3), torch.randn(4, 2)
    linear = lambda layer, h: h @ (layer.weight * layer.mask).T + (0 if layer.bias is None else layer.bias)  # noqa: E731
    act = torch.nn.functional.silu
    h = linear(made.first, x) + made.embeddings[0](c)
    block = made.blocks[0]
    h = h + linear(block.second, act(linear(block.layer, act(h)) + made.embeddings[1](c)))
    expected = linear(made.last, act(h)) + linear(made.direct, x)
    torch.testing.assert_close(made(x, c), expected.reshape(4, 1, 3))


@pytest.mark.parametrize("width", [1, 2, 3, 5, 6, 50])
def test_hidden_degrees_are_spread_evenly(width):
    """Few units still see far; many see every number of features, none twice as often as another, but for the ends."""
    made = MADE((7,), 1, (width,))
    degrees = made.first.mask.sum(-1)
    counts = torch.bincount(degrees, minlength=7)
    assert degrees.min() == 1
    assert degrees.max() == (1 if width == 1 else 6)
    if width >= 6:
        assert counts[0] == 0
        assert counts[1:].min() >= 1
        assert counts[2:6].max() - counts[2:6].min() <= 1


def test_without_a_context_no_unit_is_wasted_on_degree_zero():
    assert MADE((5,), 1, (30,)).first.mask.any(-1).all()
    assert not MADE((5,), 1, (30,), num_classes=2).first.mask.any(-1).all()


def test_integers_are_scaled_to_the_unit_interval():
    integers, reals = MADE((3,), 2, (8,), levels=17), MADE((3,), 2, (8,))
    reals.load_state_dict(integers.state_dict())
    x = torch.randint(17, (5, 3), dtype=torch.uint8)
    torch.testing.assert_close(integers(x), reals(x / 8.0 - 1))
    torch.testing.assert_close(integers(x), integers(x.double()))


def test_unscaled_integers_enter_as_they_are():
    made = MADE((3,), 1, (8,))
    x = torch.randint(2, (5, 3), dtype=torch.uint8)
    torch.testing.assert_close(made(x), made(x.double()))


def test_images_are_read_row_by_row():
    flat, image = MADE((6,), 2, (8,)), MADE((1, 2, 3), 2, (8,))
    image.load_state_dict(flat.state_dict())
    x = torch.randn(4, 6)
    torch.testing.assert_close(image(x.reshape(4, 1, 2, 3)), flat(x).reshape(4, 2, 1, 2, 3))


@pytest.mark.parametrize("residual", [False, True])
def test_a_gradient_reaches_every_parameter(residual):
    made = MADE((4,), 2, (16, 16), residual=residual, given_shape=(3,), activation="tanh")
    made(torch.randn(5, 4), torch.randn(5, 3)).square().sum().backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_masked_weights_get_no_gradient_and_masks_follow_from_the_arguments():
    layer = MaskedLinear(torch.tensor([1, 2, 3]), torch.tensor([0, 1, 2, 3]))
    layer(torch.randn(5, 3)).square().sum().backward()
    assert torch.equal(layer.weight.grad != 0, torch.ones(4, 3).tril(-1).bool())
    assert "mask" not in layer.state_dict()


def test_dropout_is_for_training_only():
    made = MADE((4,), 1, (32, 32), dropout=0.5)
    x = torch.randn(3, 4)
    assert not torch.equal(made(x), made(x))
    made.eval()
    assert torch.equal(made(x), made(x))
    assert torch.equal(copy.deepcopy(made)(x), made(x))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (((3,), 1), {"order": (0, 1)}, r"order must name each of the 3 features 0 \.\. 2 once"),
        (((3,), 1), {"order": (0, 1, 1)}, "once"),
        (((3,), 1), {"order": (1, 2, 3)}, "once"),
        (((3,), 1), {"order": "backwards"}, "'natural' or a sequence"),
        (((3,), 1, ()), {}, "hidden must be"),
        (((3,), 1, (4, 5)), {"residual": True}, r"one width, but hidden is \(4, 5\)"),
        (((3,), 1), {"activation": "sine"}, "activation must be one of"),
        (((3,), 1), {"given_shape": ()}, "pass num_classes"),
        (((3,), 1), {"given_shape": (2,), "num_classes": 3}, "num_classes is for labels"),
        (((3, 0), 1), {}, "in_shape"),
        (((3,), 0), {}, "num_parameters"),
        (((3,), 1, (4, 0)), {}, "hidden"),
    ],
)
def test_bad_arguments(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        MADE(*arguments, **options)


@pytest.mark.parametrize("order", [None, 3, ("first", "second", "third")])
def test_an_order_of_no_indices(order):
    with pytest.raises(TypeError, match="order must be 'natural' or a sequence of indices, got"):
        MADE((3,), 1, order=order)
