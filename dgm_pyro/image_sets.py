"""Images that need no download: characters in the fonts of matplotlib, and patches of the photographs of scikit-learn.

Both are drawn at random, by seed, as arrays of bytes ``(N, C, size, size)``. `dgm.data.load` finds them by name.
"""

from __future__ import annotations

import functools
import string
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

__all__ = ["glyphs", "patches"]

Images = tuple[np.ndarray, np.ndarray | None]

FONTS = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
    *("cmr10", "cmb10", "cmss10", "cmtt10", "cmti10"),
)
CHARACTERS = string.digits + string.ascii_uppercase + string.ascii_lowercase
# Standard deviations of the angle in radians, the shear and the logarithm of the scale of a random distortion, and its
# largest shift as a share of the image.
ANGLE, SHEAR, LOG_SCALE, SHIFT = 0.1, 0.12, 0.1, 0.05
# Height of a capital as a share of the image's height.
CAPITAL = 0.62
# Factor by which glyphs are drawn larger and then averaged down, for smooth edges.
FINER = 2
# Width in columns of the photographs' vertical bands. Each split has its own, so no test patch overlaps a training one.
BAND = 64
BANDS = {"train": (0, 1, 3, 5, 6, 8), "valid": (4, 9), "test": (2, 7)}


def glyphs(random: np.random.Generator, num_data: int, *, num_classes: int, size: int, color: bool = False) -> Images:
    """Images of the first ``num_classes`` of `CHARACTERS`, in random fonts and with random affine distortions.

    Args:
        random: generator of all draws.
        num_data: number of images.
        num_classes: number of characters.
        size: height and width in pixels.
        color: whether glyph and background have random colors, with a vertical gradient in the background; else white
            on black.

    Returns:
        Images ``(num_data, 3 or 1, size, size)``, and the index of each character.
    """
    y = random.integers(num_classes, size=num_data)
    font = random.integers(len(FONTS), size=num_data)
    inverse = _distortions(random, num_data, FINER * size)
    ink = np.empty((num_data, 1, size, size), np.uint8)
    for i in range(num_data):
        image = _drawn_character(FONTS[font[i]], CHARACTERS[y[i]], FINER * size)
        image = image.transform(image.size, Image.Transform.AFFINE, inverse[i], Image.Resampling.BILINEAR)
        ink[i, 0] = np.asarray(image.reduce(FINER))
    return (_colored_glyphs(random, ink) if color else ink), y


def patches(random: np.random.Generator, num_data: int, *, size: int, split: str) -> Images:
    """Random squares of two color photographs, without labels; each split has its own bands of the photographs.

    Args:
        random: generator of all draws.
        num_data: number of patches.
        size: height and width in pixels.
        split: "train", "valid" or "test".

    Returns:
        Images ``(num_data, 3, size, size)``, and None.
    """
    # Imported here because it takes a second, and few commands need it.
    from sklearn.datasets import load_sample_images

    photographs = np.stack(load_sample_images().images)
    count, height, *_ = photographs.shape
    rows = random.integers(height - size + 1, size=num_data)
    columns = BAND * random.choice(BANDS[split], num_data) + random.integers(BAND - size + 1, size=num_data)
    windows = np.lib.stride_tricks.sliding_window_view(photographs, (size, size), axis=(1, 2))
    return np.ascontiguousarray(windows[random.integers(count, size=num_data), rows, columns]), None


@functools.cache
def _drawn_character(font: str, character: str, size: int) -> Image.Image:
    """The character in white on a black square, its capitals in the middle."""
    face = _font_of_capital_size(font, size)
    image = Image.new("L", (size, size))
    baseline = size * (1 + CAPITAL) / 2
    ImageDraw.Draw(image).text((size / 2, baseline), character, fill=255, font=face, anchor="ms")
    return image


@functools.cache
def _font_of_capital_size(font: str, size: int) -> ImageFont.FreeTypeFont:
    """The font at the size at which a capital's height is the share `CAPITAL` of the image."""
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"
    _, top, _, bottom = ImageFont.truetype(path, 1000).getbbox("H", anchor="ms")
    return ImageFont.truetype(path, round(1000 * CAPITAL * size / (bottom - top)))


def _distortions(random: np.random.Generator, num_data: int, size: int) -> np.ndarray:
    """Six numbers a .. f for each image: the value at (u, v) comes from (a u + b v + c, d u + e v + f)."""
    angle, shear = ANGLE * random.standard_normal(num_data), SHEAR * random.standard_normal(num_data)
    scale = np.exp(LOG_SCALE * random.standard_normal((num_data, 2)))
    cos, sin = np.cos(angle), np.sin(angle)
    rotation = np.stack([np.stack([cos, -sin], 1), np.stack([sin, cos], 1)], 1)
    slant = np.tile(np.eye(2), (num_data, 1, 1))
    slant[:, 0, 1] = shear
    inverse = np.linalg.inv(rotation @ slant * scale[:, None])
    shift = SHIFT * size * random.uniform(-1, 1, (num_data, 2)) + size / 2
    constant = size / 2 - np.einsum("nij,nj->ni", inverse, shift)
    return np.concatenate([inverse, constant[:, :, None]], axis=2).reshape(num_data, 6)


def _colored_glyphs(random: np.random.Generator, ink: np.ndarray) -> np.ndarray:
    num_data, _, size, _ = ink.shape
    top, bottom, front = random.uniform(0, 255, (3, num_data, 3, 1, 1))
    # A glyph as dark as its background could not be seen.
    middle = (top + bottom) / 2
    front = np.where(abs(front - middle).max(1, keepdims=True) < 96, (middle + 128) % 256, front)
    down = np.linspace(0, 1, size)[:, None]
    back = (1 - down) * top + down * bottom
    alpha = ink / 255
    return np.round((1 - alpha) * back + alpha * front).astype(np.uint8)
