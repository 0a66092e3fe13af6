"""Sizes by resolution, channels and number of images, as docs/images.md states them."""

import re
from pathlib import Path

import pytest

from dgm_pyro.networks import ConvDecoder, ConvEncoder, DenoisingTransformer, DenoisingUNet, PixelCNN
from dgm_pyro.networks.sizes import image_sizes

PAGE = Path(__file__).parents[2] / "docs" / "images.md"
ROWS = re.findall(r"^\| (\d+)x(\d+)x(\d+) \| ([\d,]+) \| (.*) \|$", PAGE.read_text(), re.M)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "x".join(row[:3]))
def test_the_table_is_what_build_takes(row):
    *shape, num_data, told = row
    sizes = image_sizes(tuple(map(int, shape)), int(num_data.replace(",", "")))
    of = [
        sizes.widths,
        sizes.unet,
        f"{sizes.patch_size} x {sizes.patch_width}",
        sizes.latent_size,
        f"{sizes.layers} x {sizes.kernel_size}",
        sizes.reach,
        sizes.dropout,
    ]
    assert told == " | ".join(", ".join(map(str, each)) if isinstance(each, tuple) else str(each) for each in of)


def test_the_table_has_every_resolution_and_number_of_data():
    assert {row[2] for row in ROWS} >= {"16", "28", "32", "64"}
    assert len({row[3] for row in ROWS}) >= 3


@pytest.mark.parametrize("shape", [(1, 16, 16), (1, 28, 28), (3, 33, 47), (3, 64, 64), (4, 100, 20), (1, 256, 256)])
def test_every_network_takes_the_sizes_and_sees_the_image(shape):
    sizes = image_sizes(shape, 10_000)
    side = max(shape[1:])
    assert -(-side // 2 ** len(sizes.widths)) <= 8 < side / 2 ** (len(sizes.widths) - 1)
    assert sizes.reach >= side / 2
    ConvEncoder(shape, 2, sizes.widths, width=8)
    ConvDecoder((2,), shape, 1, sizes.widths)
    DenoisingUNet(shape, sizes.unet)
    DenoisingTransformer(shape, sizes.patch_size, sizes.patch_width, layers=1)
    PixelCNN(shape, 1, 4, sizes.layers, sizes.kernel_size)


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 64, 8), (256,)])
def test_small_images_and_vectors_have_none(shape):
    with pytest.raises(ValueError, match="at least 16 pixels a side"):
        image_sizes(shape, 100)
