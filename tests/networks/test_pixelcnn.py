"""PixelCNN: which pixels each pixel sees, by Jacobians: all those before it, within reach, and no other."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.functional import jacobian

import dgm_pyro as dgm
from dgm_pyro.networks import PixelCNN

pytestmark = pytest.mark.usefixtures("float64")


def dependencies(network, *context):
    """Whether some parameter of each pixel moves with each pixel, ``(H, W, H, W)``."""
    height, width = network.in_shape[1:]
    seen = torch.zeros(())
    for _ in range(3):  # three images, because a rectifier may be closed on one
        moved = jacobian(lambda x: network(x, *context), torch.randn(1, 1, height, width))
        seen = seen + moved.reshape(-1, height, width, height, width).abs().sum(0)
    return seen != 0


def grid(height, width):
    """Rows and columns of a pixel and of another, ``(H, W, H, W)``."""
    return torch.meshgrid(*(torch.arange(n) for n in (height, width, height, width)), indexing="ij")


@given(st.integers(1, 5), st.integers(1, 5), st.sampled_from([3, 5]), st.integers(0, 2**31))
@settings(max_examples=15)
def test_each_pixel_sees_exactly_the_pixels_before_it(height, width, kernel_size, seed):
    """No blind spot: with layers enough to reach everywhere, every dependency that the order allows is there."""
    torch.manual_seed(seed)
    layers = -(-max(height, width) // (kernel_size // 2))
    network = PixelCNN((1, height, width), 2, width=6, layers=layers, kernel_size=kernel_size)
    row, column, other_row, other_column = grid(height, width)
    assert torch.equal(dependencies(network), other_row * width + other_column < row * width + column)


@pytest.mark.parametrize(("layers", "attention"), [(2, 1), (4, 3)])
def test_attention_reaches_every_pixel_before(layers, attention):
    """In an image that is larger than the receptive field of the convolutions."""
    height, width = 7, 6
    network = PixelCNN((1, height, width), 2, width=6, layers=layers, attention=attention, heads=2)
    row, column, other_row, other_column = grid(height, width)
    assert torch.equal(dependencies(network), other_row * width + other_column < row * width + column)


@pytest.mark.parametrize(("height", "width", "stages"), [(6, 8, 2), (8, 4, 3)])
@pytest.mark.parametrize("layers", [1, 4])
def test_stages_open_no_other_way(height, width, stages, layers):
    """With four layers a group, every pixel before is read; with one, some of them."""
    seen = dependencies(PixelCNN((1, height, width), 2, width=6, layers=layers, stages=stages))
    row, column, other_row, other_column = grid(height, width)
    before = other_row * width + other_column < row * width + column
    assert not (seen & ~before).any()
    assert layers == 1 or torch.equal(seen, before)


@pytest.mark.parametrize("stages", [2, 3])
def test_stages_read_further_than_as_many_layers_at_the_full_resolution(stages):
    lower, full = (
        dependencies(PixelCNN((1, 12, 12), 1, width=8, layers=layers, stages=each)).sum()
        for layers, each in ((1, stages), (2 * stages - 1, 1))
    )
    assert lower > 1.5 * full


@pytest.mark.parametrize("stages", [2, 3])
def test_the_reach_to_the_left_of_stages_is_as_documented(stages):
    size, layers = 32, 2
    network = PixelCNN((1, 4, size), 1, width=8, layers=layers, stages=stages)
    seen = dependencies(network)
    reach = [size - 1 - int(seen[row, -1, row].nonzero()[0]) for row in range(4)]
    assert reach[1] == reach[3] == 1 + 2 * layers
    assert min(reach[0], reach[2]) > 1 + 2 * layers


@pytest.mark.parametrize(
    "option", [{}, {"num_classes": 3}, {"attention": 2, "heads": 3}, {"stages": 2, "attention": 1, "heads": 3}]
)
def test_each_channel_sees_exactly_the_features_before_it(option):
    channels, height, width = 3, 4 if "stages" in option else 3, 2
    network = PixelCNN((channels, height, width), 2, width=6, layers=4, **option)
    given = (torch.tensor([1]),) if "num_classes" in option else ()
    seen = torch.zeros(())
    for _ in range(3):
        moved = jacobian(lambda x: network(x, *given), torch.randn(1, channels, height, width))
        seen = seen + moved.reshape(2, len(network.order), len(network.order)).abs().sum(0)
    place = torch.tensor(network.order).argsort()
    assert torch.equal(seen != 0, place < place[:, None])
    # Pixel by pixel, and in each pixel channel by channel.
    assert network.order[:4] == (0, height * width, 2 * height * width, 1)


@pytest.mark.parametrize("option", [{}, {"attention": 1}, {"stages": 2}])
def test_the_probabilities_of_all_color_images_sum_to_one(option):
    network = PixelCNN((2, 2, 2), 1, width=8, layers=3, levels=2, **option)
    program = dgm.Autoregressive(dgm.Bernoulli((2, 2, 2), network))
    every = torch.cartesian_prod(*[torch.arange(2)] * 8).reshape(-1, 2, 2, 2)
    torch.testing.assert_close(program.log_prob(every).logsumexp(0), torch.tensor(0.0), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("layers", "kernel_size"), [(1, 3), (2, 3), (1, 5), (3, 3)])
def test_the_field_of_view_is_as_documented(layers, kernel_size):
    size, reach = 9, layers * (kernel_size // 2)
    network = PixelCNN((1, size, size), 1, width=8, layers=layers, kernel_size=kernel_size)
    row, column, other_row, other_column = grid(size, size)
    up, left = row - other_row, column - other_column
    above = (up >= 1) & (up <= 1 + reach) & (left.abs() <= reach)
    beside = (up == 0) & (left >= 1) & (left <= 1 + reach)
    assert torch.equal(dependencies(network), above | beside)


@pytest.mark.parametrize("levels", [2, 17])
def test_later_pixels_may_hold_anything(levels):
    network = PixelCNN((1, 4, 4), 3, width=8, layers=4, levels=levels)
    x, other = torch.randint(levels, (2, 5, 1, 4, 4), dtype=torch.uint8)
    index = torch.arange(16).reshape(4, 4)
    for i in network.order:
        mixed = torch.where(index < i, x, other)
        torch.testing.assert_close(
            network(mixed).flatten(2)[..., i], network(x).flatten(2)[..., i], rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("option", [{"num_classes": 3}, {"given_shape": (2,)}, {"given_shape": (1, 4, 4)}])
def test_the_context_reaches_every_pixel_and_opens_no_other_way(option):
    network = PixelCNN((1, 4, 4), 2, width=6, layers=4, **option)
    c = torch.tensor([0, 1]) if "num_classes" in option else torch.randn(2, *option["given_shape"])
    x = torch.randn(1, 1, 4, 4).expand(2, 1, 4, 4)
    a, b = network(x, c)
    assert ((a - b).abs().amax(0) > 0).all()
    row, column, other_row, other_column = grid(4, 4)
    assert torch.equal(dependencies(network, c[:1]), other_row * 4 + other_column < row * 4 + column)


@pytest.mark.parametrize("stages", [1, 2])
def test_a_constant_map_is_read_as_its_vector(stages):
    maps, vector = (PixelCNN((1, 4, 6), 2, 6, 3, stages=stages, given_shape=shape) for shape in ((3, 4, 6), (3,)))
    state = vector.state_dict()
    for name, value in vector.named_parameters():
        if ".embedding." in name:
            kernel = maps.get_parameter(name.replace("embed.1", "embed")).shape[2:] if "weight" in name else None
            part = value if kernel is None else value[..., None, None].expand(*value.shape, *kernel) / kernel.numel()
            state[name.replace("embed.1", "embed")] = part
            del state[name]
    maps.load_state_dict(state)
    x, c = torch.randn(2, 1, 4, 6), torch.randn(2, 3)
    torch.testing.assert_close(maps(x, c[..., None, None].expand(-1, -1, 4, 6)), vector(x, c))


def test_a_pixel_reads_the_map_at_its_place():
    network = PixelCNN((1, 3, 3), 1, width=8, layers=1, given_shape=(1, 3, 3))
    x, c = torch.randn(1, 1, 3, 3), torch.randn(1, 1, 3, 3)
    moved = jacobian(lambda c: network(x, c), c).reshape(9, 9)
    assert torch.equal(moved != 0, torch.eye(9, dtype=torch.bool))


def test_a_lower_resolution_reads_the_map_of_its_block():
    network = PixelCNN((1, 4, 8), 1, width=8, layers=1, stages=2, given_shape=(1, 4, 8))
    for i in (0, 2):  # the layers at the full resolution; the middle one is at half of it
        torch.nn.init.zeros_(network.layers[i].embedding.embed.weight)
    x, c = torch.randn(1, 1, 4, 8), torch.randn(1, 1, 4, 8)
    moved = jacobian(lambda c: network(x, c), c).reshape(4, 8, 4, 8) != 0
    row, column, other_row, other_column = (index.reshape(4, 8, 4, 8) // 2 for index in grid(4, 8))
    same_block = (row == other_row) & (column == other_column)
    assert moved[same_block].all()
    beside = ((other_row == row) & ((other_column - column).abs() <= 1)) | (other_row < row)
    assert not moved[~beside].any()


def test_rows_of_a_batch_do_not_mix():
    network = PixelCNN((1, 2, 4), 4, width=6, layers=2, stages=2, attention=1, heads=2, num_classes=3)
    x, y = torch.randn(6, 1, 2, 4), torch.arange(6) % 3
    each = torch.cat([network(x[i : i + 1], y[i : i + 1]) for i in range(6)])
    assert each.shape == (6, 4, 1, 2, 4)
    torch.testing.assert_close(network(x, y), each)


def test_one_layer_by_hand():
    """Gates and stacks pixel by pixel, from the weights (van den Oord et al. 2016, figure 2 and eq. 4)."""
    network = PixelCNN((1, 3, 3), 1, width=2, layers=1, num_classes=2)
    layer = network.layers[0]
    x, y = torch.randn(1, 1, 3, 3), torch.tensor([1])

    def pixel(r, c):
        inside = 0 <= r < 3 and 0 <= c < 3
        return network.first.weight[:, 0, 0, 0] * x[0, 0, r, c] + network.first.bias if inside else torch.zeros(2)

    _, bias = layer.embedding(y)[0].chunk(2)  # the vertical gate feeds a second layer only
    for r in range(3):
        for c in range(3):
            a = layer.vertical.bias.clone()
            for up in (0, 1):  # the vertical stack starts one row up
                for side in (-1, 0, 1):
                    inside = 0 <= c + side < 3 and r - up >= 0
                    seen = pixel(r - up - 1, c + side) if inside else torch.zeros(2)
                    a = a + layer.vertical.weight[:, :, 1 - up, 1 + side] @ seen
            b = layer.horizontal.bias + layer.across.weight[..., 0, 0] @ a + layer.across.bias
            for left in (0, 1):  # the horizontal stack one column to the left
                seen = pixel(r, c - left - 1) if c - left >= 0 else torch.zeros(2)
                b = b + layer.horizontal.weight[:, :, 0, 1 - left] @ seen
            b = b + bias
            gated = b[:2].tanh() * b[2:].sigmoid()
            skip = (layer.out.weight[..., 0, 0] @ gated + layer.out.bias)[2:]
            expected = network.last(skip.reshape(1, 2, 1, 1)).reshape(())
            torch.testing.assert_close(network(x, y)[0, 0, 0, r, c], expected)


def test_a_gradient_reaches_every_parameter():
    network = PixelCNN((1, 8, 8), 3, width=6, layers=3, stages=3, attention=1, heads=2, num_classes=2)
    network(torch.randn(5, 1, 8, 8), torch.tensor([0, 1, 0, 1, 1])).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_integers_are_scaled_to_the_unit_interval():
    integers, reals = (PixelCNN((1, 3, 3), 2, width=4, layers=2, levels=levels) for levels in (17, None))
    reals.load_state_dict(integers.state_dict())
    x = torch.randint(17, (5, 1, 3, 3), dtype=torch.uint8)
    torch.testing.assert_close(integers(x), reals(x / 8.0 - 1))


def test_dropout_is_for_training_only():
    network = PixelCNN((1, 3, 3), 1, width=8, layers=2, dropout=0.5)
    x = torch.randn(3, 1, 3, 3)
    assert not torch.equal(network(x), network(x))
    network.eval()
    assert torch.equal(network(x), network(x))


@pytest.mark.parametrize(
    ("in_shape", "options", "message"),
    [
        ((8, 8), {}, r"\(C, H, W\)"),
        ((64,), {}, "use MADE"),
        ((1, 0, 8), {}, "in_shape must be"),
        ((1, 8, 8), {"kernel_size": 4}, "kernel_size must be odd"),
        ((1, 8, 8), {"kernel_size": 1}, "kernel_size must be odd"),
        ((1, 8, 8), {"width": 0}, "width must be"),
        ((1, 8, 8), {"layers": 0}, "layers must be"),
        ((1, 8, 8), {"num_parameters": 0}, "num_parameters must be"),
        ((1, 8, 8), {"stages": 0}, "stages must be"),
        ((1, 8, 6), {"stages": 3}, "with stages=3, the sides of the image must be multiples of 4, got 8 x 6 pixels"),
        ((1, 8, 8), {"attention": -1}, "attention must be an int of at least 0"),
        ((1, 8, 8), {"layers": 2, "attention": 2}, "attention must be less than layers, 2, got 2"),
        ((1, 8, 8), {"width": 6, "attention": 1}, "width must be a multiple of heads"),
        ((1, 8, 8), {"given_shape": ()}, "pass num_classes"),
    ],
)
def test_bad_arguments(in_shape, options, message):
    with pytest.raises(ValueError, match=message):
        PixelCNN(in_shape, **{"num_parameters": 2, **options})
