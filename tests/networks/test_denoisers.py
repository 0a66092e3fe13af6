"""Denoisers: what they must see, and what they must not."""

import math

import pytest
import torch
from torch import nn

from dgm_pyro.networks import DenoisingMLP, DenoisingTransformer, DenoisingUNet
from dgm_pyro.networks.attention import SelfAttention
from dgm_pyro.networks.convolutional import patchify, unpatchify
from dgm_pyro.networks.denoisers import AttentionBlock, TimeEmbedding, TransformerBlock, places

pytestmark = pytest.mark.usefixtures("float64")

NETWORKS = {
    "mlp": lambda **options: DenoisingMLP((1, 4, 4), (8, 8), **options),
    "mlp, uneven": lambda **options: DenoisingMLP((1, 4, 4), (8, 6, 12), activation="tanh", **options),
    "unet": lambda **options: DenoisingUNet((1, 4, 4), (8, 16), **options),
    "unet, three resolutions": lambda **options: DenoisingUNet((1, 4, 4), (8, 16, 24), **options),
    "unet, one resolution": lambda **options: DenoisingUNet((1, 4, 4), (8,), **options),
    "unet, attention and Fourier features": lambda **options: DenoisingUNet(
        (1, 4, 4), (8, 16), heads=2, fourier=(0, 1), **options
    ),
    "unet, patches": lambda **options: DenoisingUNet((1, 4, 4), (16, 16), patch_size=2, **options),
    "dit": lambda **options: DenoisingTransformer((1, 4, 4), 2, width=8, layers=2, heads=2, **options),
}


@pytest.fixture(params=NETWORKS.values(), ids=NETWORKS, name="make")
def _make(request):
    torch.manual_seed(0)

    def build(**options):
        network = request.param(**options)
        with torch.no_grad():
            for parameter in network.parameters():  # some start at zero, where nothing is seen
                parameter.add_(0.1 * torch.randn_like(parameter))
        return network

    return build


def inputs(size=5):
    return torch.randn(size, 1, 4, 4), torch.linspace(0.1, 0.9, size)


@pytest.mark.parametrize("num_parameters", [1, 3])
def test_shapes(make, num_parameters):
    network = make(num_parameters=num_parameters)
    x, t = inputs()
    assert network(x, t).shape == ((5, 1, 4, 4) if num_parameters == 1 else (5, 3, 1, 4, 4))
    for number in (0, 1):
        assert network(x[:number], t[:number]).shape == network(x, t)[:number].shape


def test_each_datum_is_denoised_alone(make):
    network = make()
    x, t = inputs()
    together = network(x, t)
    for i in range(5):
        torch.testing.assert_close(network(x[i : i + 1], t[i : i + 1]), together[i : i + 1])


def test_every_output_sees_every_input_and_the_time(make):
    network = make()
    x, t = inputs(1)
    jacobian = torch.autograd.functional.jacobian(lambda x: network(x, t).flatten(), x).reshape(16, 16)
    assert (jacobian.abs() > 1e-8).all()
    by_time = torch.autograd.functional.jacobian(lambda t: network(x, t).flatten(), t)
    assert (by_time.abs() > 1e-6).all()


@pytest.mark.parametrize("labels", [{}, {"num_classes": 3}])
def test_one_time_of_all_data_is_embedded_once(make, labels):
    """The same output and gradients as from a time for each datum, from an embedding of one row."""
    network, x = make(**labels), torch.randn(5, 1, 4, 4)
    given = torch.tensor([0, 1, 2, 3, 1]) if labels else None
    rows, found = [], []
    network.time.register_forward_hook(lambda _, args, output: rows.append(len(output)))
    for t in (torch.full((1,), 0.3).expand(5), torch.full((5,), 0.3)):
        network.zero_grad()
        output = network(x, t, given)
        output.square().sum().backward()
        found.append([output.detach(), *(p.grad.clone() for p in network.parameters())])
    assert rows == [1, 5]
    torch.testing.assert_close(*found)


def test_a_label_is_seen_and_so_is_the_null_label(make):
    network = make(num_classes=3)
    x, t = inputs()
    told = [network(x, t, torch.full((5,), label)) for label in range(4)]
    for i in range(4):
        for j in range(i):
            assert (told[i] - told[j]).abs().min() > 1e-6
    with pytest.raises(IndexError):
        network(x, t, torch.full((5,), 4))
    assert (network.num_classes, network.given_shape) == (3, torch.Size(()))


def test_a_context_is_seen_whole(make):
    network = make(given_shape=(2, 3))
    x, t = inputs(1)
    context = torch.randn(1, 2, 3)
    jacobian = torch.autograd.functional.jacobian(lambda c: network(x, t, c).flatten(), context)
    assert (jacobian.reshape(16, 6).abs() > 1e-8).all()
    assert network.given_shape == torch.Size((2, 3))


def test_every_parameter_learns(make):
    network = make(num_classes=3)
    x, t = inputs(6)
    network(x, t, torch.tensor([0, 1, 2, 3, 0, 1])).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in network.parameters())


def test_it_has_no_randomness_but_dropout():
    x, t = inputs()
    for network in (NETWORKS["mlp"](), NETWORKS["unet"](), NETWORKS["dit"]()):
        assert torch.equal(network.train()(x, t), network(x, t))
    network = NETWORKS["unet"](dropout=0.5)
    nn.init.normal_(network.middle.conv2.weight)
    assert not torch.equal(network.train()(x, t), network(x, t))
    assert torch.equal(network.eval()(x, t), network(x, t))


@pytest.mark.parametrize(
    ("depth", "height", "across", "size"), [(1, 4, 4, 2), (3, 4, 6, 2), (2, 6, 3, 3), (1, 2, 3, 1)]
)
def test_patches_and_images_are_each_others_inverse(depth, height, across, size):
    x = torch.randn(5, depth, height, across)
    patches = patchify(x, size)
    rows, columns = height // size, across // size
    assert patches.shape == (5, depth * size**2, rows, columns)
    for row in range(rows):
        for column in range(columns):
            patch = x[:, :, row * size : (row + 1) * size, column * size : (column + 1) * size]
            assert torch.equal(patches[:, :, row, column], patch.flatten(1))
    assert torch.equal(unpatchify(patches, size), x)
    assert patchify(x[:0], size).shape == patches[:0].shape
    assert unpatchify(patches[:0], size).shape == x[:0].shape


def test_layers_that_start_at_zero_start_as_the_identity():
    h, embedded = torch.randn(3, 4, 8), torch.randn(3, 6)
    block = TransformerBlock(8, 2, 6, dropout=0.0)
    assert torch.equal(block(h, embedded), h)
    x = torch.randn(3, 8, 2, 3)
    assert torch.equal(AttentionBlock(8, 2)(x), x)
    assert (NETWORKS["dit"]()(*inputs()) == 0).all()


def test_a_layer_of_the_transformer_is_that_of_the_paper():
    """Peebles and Xie 2023, figure 3: scale and shift after the norm, and a gate before the sum."""
    torch.manual_seed(0)
    block = TransformerBlock(8, 2, 6, dropout=0.0)
    nn.init.normal_(block.modulation.weight)
    h, embedded = torch.randn(3, 4, 8), torch.randn(3, 6)

    def norm(h):
        return (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()

    shift1, scale1, gate1, shift2, scale2, gate2 = (embedded @ block.modulation.weight.T).unsqueeze(1).split(8, -1)
    middle = h + gate1 * block.attention((1 + scale1) * norm(h) + shift1)
    expected = middle + gate2 * block.mlp((1 + scale2) * norm(middle) + shift2)
    torch.testing.assert_close(block(h, embedded), expected)


def test_attention_is_a_mean_of_values_weighted_by_similarity():
    attention, h = SelfAttention(6, 2), torch.randn(2, 5, 6)
    q, k, v = attention.queries_keys_values(h).split(6, -1)
    heads = []
    for part in (slice(0, 3), slice(3, 6)):
        similarity = (q[..., part] @ k[..., part].mT / math.sqrt(3)).exp()
        heads.append(similarity / similarity.sum(-1, keepdim=True) @ v[..., part])
    torch.testing.assert_close(attention(h), attention.out(torch.cat(heads, -1)))


def test_every_place_of_a_grid_has_a_code_of_its_own():
    code = places(4, 6, 16)
    assert code.shape == (24, 16)
    distance = torch.cdist(code, code).fill_diagonal_(math.inf).reshape(4, 6, 4, 6)
    assert distance.min() > 0.3
    assert (distance[:, :-1, :, :].amin((2, 3)) <= distance[0, 0, 0, 1] + 1e-9).all()  # the nearest is a neighbor


def test_fourier_features_tell_levels_apart():
    """Kingma et al. 2021, appendix C: the network reads x, sin(2^n pi x) and cos(2^n pi x)."""
    network, seen = DenoisingUNet((2, 4, 4), (8,), fourier=(6, 7)), []
    network.first.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x = torch.rand(3, 2, 4, 4)
    network(x, torch.ones(3))
    expected = [x, *(f(2**n * math.pi * x) for f in (torch.sin, torch.cos) for n in (6, 7))]
    torch.testing.assert_close(seen[0], torch.cat(expected, 1))


def test_patches_are_the_pixels_of_a_u_net_of_lower_resolution():
    """The 2x2 patch at each place, as 4 channels for each of x, are the input and the output of the same network."""
    patched = DenoisingUNet((3, 8, 12), (8, 16), fourier=(1,), patch_size=2, num_parameters=2)
    plain = DenoisingUNet((12, 4, 6), (8, 16), fourier=(1,), num_parameters=2)
    plain.load_state_dict(patched.state_dict())
    x, t = torch.randn(5, 3, 8, 12), torch.rand(5)
    expected = plain(patchify(x, 2), t).flatten(0, 1)
    torch.testing.assert_close(patched(x, t).flatten(0, 1), unpatchify(expected, 2))


@pytest.mark.parametrize("event_shape", [(1, 8, 8), (3, 4, 8), (2, 12, 4)])
def test_unets_of_any_image_that_halves(event_shape):
    network = DenoisingUNet(event_shape, (8, 16, 16))
    x = torch.randn(2, *event_shape)
    assert network(x, torch.ones(2)).shape == x.shape


def test_each_resolution_is_passed_on():
    """The bottom has 32 numbers, the image 64: only what bypasses it gives the Jacobian its full rank."""
    torch.manual_seed(0)
    network = DenoisingUNet((1, 8, 8), (8, 8, 8))
    x, t = torch.randn(1, 1, 8, 8), torch.ones(1)
    jacobian = torch.autograd.functional.jacobian(lambda x: network(x, t).flatten(), x).reshape(64, 64)
    assert torch.linalg.matrix_rank(jacobian, rtol=1e-9) == 64


def test_neighboring_times_are_told_apart():
    """For 1000 steps: the embedding of each time is nearest to its own, and times far apart are no neighbors."""
    embedding = TimeEmbedding(16)
    t = torch.arange(1, 1001) / 1000
    angles = t.unsqueeze(-1) * embedding.frequencies
    code = torch.cat([angles.sin(), angles.cos()], -1)
    distance = torch.cdist(code, code)
    distance.fill_diagonal_(math.inf)
    assert distance.min() > 0.5
    assert (distance.argmin(1) - torch.arange(1000)).abs().max() <= 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DenoisingUNet((64,)), r"event_shape must be \(C, H, W\) for a U-Net, got \(64,\): use DenoisingMLP"),
        (lambda: DenoisingUNet((1, 7, 8)), r"event_shape \(1, 7, 8\) cannot be halved 1 times: give fewer channels"),
        (lambda: DenoisingUNet((1, 8, 10), (8, 8, 8)), r"\(1, 8, 10\) cannot be halved 2 times"),
        (lambda: DenoisingUNet((1, 8, 6), patch_size=4), r"patch_size must divide H and W of \(1, 8, 6\), got 4"),
        (lambda: DenoisingUNet((1, 8, 6), patch_size=2), r"\(1, 8, 6\) in patches of 2x2 cannot be halved 1 times"),
        (lambda: DenoisingUNet((1, 8, 8), patch_size=0), "patch_size must be a positive integer, got 0"),
        (lambda: DenoisingUNet((1, 8, 8), (12, 16)), r"channels must be positive multiples of 8, got \(12, 16\)"),
        (lambda: DenoisingUNet((1, 8, 8), (0, 8)), "channels must be a positive int or a tuple of them"),
        (lambda: DenoisingUNet((1, 8, 8), ()), r"channels must be a positive int or a tuple of them, got \(\)"),
        (lambda: DenoisingUNet((1, 8, 8), (8,), heads=3), "width must be a multiple of heads, got width=8 and heads=3"),
        (lambda: DenoisingUNet((1, 8, 8), (8,), fourier=(-1,)), "fourier must be an int of at least 0, got -1"),
        (
            lambda: DenoisingTransformer((64,)),
            r"event_shape must be \(C, H, W\) for a DiT, got \(64,\): use DenoisingMLP",
        ),
        (lambda: DenoisingTransformer((1, 8, 6), 4), r"patch_size must divide H and W of \(1, 8, 6\), got 4"),
        (lambda: DenoisingTransformer((1, 8, 8), width=6, heads=2), "width must be a multiple of 4, .*, got 6"),
        (lambda: DenoisingTransformer((1, 8, 8), width=8, heads=3), "width must be a multiple of heads, .* heads=3"),
        (lambda: DenoisingMLP((2,), ()), r"hidden must be a positive int or a tuple of them, got \(\)"),
        (lambda: DenoisingMLP((2,), (8,), activation="softsign"), "activation must be one of relu, .*'softsign'"),
        (lambda: DenoisingMLP((2,), (8,), given_shape=()), "class label: pass num_classes"),
        (lambda: DenoisingMLP((2,), (8,), num_parameters=0), "num_parameters must be a positive integer, got 0"),
    ],
)
def test_networks_that_cannot_be_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
