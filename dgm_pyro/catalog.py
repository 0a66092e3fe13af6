"""Names to programs, sized for the data: ``dgm.build("vae", data, prior="flow")``.

Every name is a composition that can be written out in a few lines; `build` chooses sizes that suit small images
and points in the plane. A swap may be a name or an object.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, Literal, overload

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from dgm_pyro.checks import READERS, as_shape, check_choice, check_count, check_type, close_to, suggesting, warn
from dgm_pyro.data import Data
from dgm_pyro.families import multiscale
from dgm_pyro.families.anyorder import AnyOrder
from dgm_pyro.families.autoregressive import Autoregressive
from dgm_pyro.families.columns import Columns
from dgm_pyro.families.conditionals import (
    Bernoulli,
    Beta,
    Categorical,
    DiscretizedLogistic,
    IndependentConditional,
    LogNormal,
    MixtureOfNormals,
    NegativeBinomial,
    Normal,
    Poisson,
    PredictedLogistic,
    StudentT,
    ZeroInflated,
)
from dgm_pyro.families.continuous import ContinuousDiffusion
from dgm_pyro.families.dequantized import Dequantized, dequantizer, resolves
from dgm_pyro.families.diffusion import PREDICTIONS, Diffusion
from dgm_pyro.families.flow import Flow, iaf, maf, nsf, nsf_autoregressive, realnvp
from dgm_pyro.families.guides import (
    FullRankNormal,
    LowRankNormal,
    PrecisionWeighted,
    SemiAmortized,
    TopDown,
    planar,
    sylvester,
)
from dgm_pyro.families.hierarchy import vdvae
from dgm_pyro.families.implicit import Implicit
from dgm_pyro.families.labeled import Discriminative, Labeled
from dgm_pyro.families.onehot import OneHot
from dgm_pyro.families.priors import MixturePrior, VampPrior
from dgm_pyro.families.quantized import Embedded, VectorQuantizer
from dgm_pyro.families.standardized import Standardized
from dgm_pyro.families.transforms import line_of
from dgm_pyro.families.vae import VAE
from dgm_pyro.guesses import MODELS as GUESSES
from dgm_pyro.networks import (
    MADE,
    MLP,
    CausalTransformer,
    Codebook,
    ColumnMADE,
    ColumnReader,
    ConvDecoder,
    ConvEncoder,
    ConvNet,
    DenoisingMLP,
    DenoisingTransformer,
    DenoisingUNet,
    EmbeddedGiven,
    ObservedInput,
    PixelCNN,
    Standardize,
)
from dgm_pyro.networks.mlp import to_unit
from dgm_pyro.networks.predictors import num_predictors
from dgm_pyro.networks.sizes import ImageSizes, image_sizes, is_large
from dgm_pyro.program import Program, check_program, example_given, is_pair, unwrapped
from dgm_pyro.sources import WITH_WORDS

__all__ = ["ENCODERS", "LIKELIHOODS", "MODELS", "PRIORS", "TooLargeError", "build", "conditional_for", "units_of"]

# The number of values from which units are computed, the reach within which these put the bulk of the data, and the
# factor by which the range of heavy tails exceeds that of a Normal.
NUMBERS_FOR_UNITS, REACH, HEAVY = 4_000_000, 4.0, 3.0
# A feature is too coarse for a density if neighboring numbers of its dtype are this far apart, in units of its scale.
COARSE = 0.01
LATENT_SIZE, HIDDEN = 16, (256, 256)
GRID_LATENT_SIZE = 8
"""Number of features at each place of a grid of latents."""
GRID_UNET = (96, 192)
"""Channels of the U-Net of a diffusion over a grid of latents: at its resolution, and at half of it."""
COMPONENTS = 5
"""Components of a mixture of discretized logistics without predictions from neighbors."""
PREDICTORS_FROM = 256
"""Number of levels from which a PixelCNN of large images has predictions from neighbors; with 17 they do not pay."""
MAPS = 16
"""Channels of the images that a PixelCNN reads in place of what is given."""
MAX_PARAMETERS = 50_000_000
CODE_VALUES = 8
# Number and size of the vectors of a codebook, and the largest side of its grid.
NUM_CODES, CODE_SIZE, WIDEST_GRID = 256, 32, 16
Catalog = dict[str, tuple[Callable[..., Program], str]]
Units = tuple[torch.Tensor, torch.Tensor]
Reading = Callable[[Callable[[Sequence[int]], nn.Module]], nn.Module]
Reads = dict[str, Any]
"""Arguments of the networks for what they are given: a ``given_shape``, ``num_classes``, or none."""


def is_image(data: Data) -> bool:
    return len(data.event_shape) == 3


def _sizes_of(data: Data) -> ImageSizes:
    return image_sizes(data.event_shape, _num_all_data(data))


def _dropout_of(data: Data) -> float:
    return _sizes_of(data).dropout if is_large(data.event_shape) else 0.1


def conditional_for(data: Data, network: Callable[[int], nn.Module | None], **options: Any) -> IndependentConditional:
    """The conditional that suits the data: Bernoulli for bits, discretized logistics for levels, else Normals.

    Args:
        network: a function from the number of parameters per feature to the network.
    """
    shape, levels = data.event_shape, data.levels
    if levels is None:
        return MixtureOfNormals(shape, 10, network(30), **options)
    if levels == 2:
        return Bernoulli(shape, network(1), **options)
    return DiscretizedLogistic(shape, levels, COMPONENTS, network(3 * COMPONENTS), **options)


# -- models ---------------------------------------------------------------------------------------------------------


def _network_of_given(reads: Reads, out_features: int) -> nn.Module:
    """A network of ``given`` alone."""
    if "num_classes" in reads:
        return nn.Embedding(reads["num_classes"], out_features)
    return MLP(reads["given_shape"], out_features, (128, 128))


def pixels(data: Data, reads: Reads) -> Program:
    def network(per_feature: int) -> nn.Module:
        return _network_of_given(reads, per_feature * data.event_shape.numel())

    if data.levels is not None:
        values = data.levels
        return Categorical(data.event_shape, values, **{"network": network(values)} if reads else {"learned": True})
    return conditional_for(data, network) if reads else conditional_for(data, lambda p: None, learned=True)


def made(data: Data, reads: Reads) -> Program:
    # A deep network memorizes a few thousand images; a wide layer with dropout 0.5 does so later.
    size: dict[str, Any] = (
        {"hidden": (512,), "dropout": 0.5} if is_image(data) else {"hidden": (256, 256, 256), "residual": True}
    )
    return Autoregressive(
        conditional_for(data, lambda p: MADE(data.event_shape, p, levels=data.levels, **reads, **size))
    )


def any_order(data: Data, reads: Reads) -> Program:
    size = data.event_shape.numel()
    network = lambda p: MLP((2 * size,), p * size, (256, 256, 256), **reads)  # noqa: E731
    return AnyOrder(conditional_for(data, lambda p: ObservedInput(data.event_shape, network(p), levels=data.levels)))


def _require_image(data: Data, name: str) -> None:
    if not is_image(data):
        raise ValueError(f"{name} needs images (C, H, W), but {data.name} has event_shape {tuple(data.event_shape)}")


def pixelcnn(data: Data, reads: Reads, *, predictors: bool | None = None, **swaps: Any) -> Program:
    _require_image(data, "pixelcnn")
    shape, levels = data.event_shape, data.levels
    size: dict[str, Any] = {"dropout": _dropout_of(data)}
    if is_large(shape):
        sizes = _sizes_of(data)
        size |= {"layers": sizes.layers, "kernel_size": sizes.kernel_size}

    def network(per_feature: int) -> nn.Module:
        options: dict[str, Any] = {"levels": levels, **size, **swaps}
        given = reads.get("given_shape", ())
        if tuple(given[1:]) != tuple(shape[1:]):
            return PixelCNN(shape, per_feature, **options, **reads)
        # Every pixel reads the given image at every place.
        return _pixelcnn_of_maps(shape, per_feature, lambda maps: ConvNet(given, maps), **options)

    check_type(predictors, bool | None, "predictors", "True, False or None")
    if predictors is None:
        predictors = is_large(shape) and levels is not None and levels >= PREDICTORS_FROM
    if not predictors:
        return Autoregressive(conditional_for(data, network))
    if levels is None or levels == 2:
        raise ValueError(
            f"predictors predict gray levels, but {data.name} has {'reals' if levels is None else 'bits'}: leave out "
            "predictors, or pass integers of more than two levels"
        )
    components = COMPONENTS + num_predictors(shape[0])
    return Autoregressive(PredictedLogistic(shape, levels, components, network(3 * components)))


def _pixelcnn_of_maps(
    shape: Sequence[int], per_feature: int, embedding: Callable[[Sequence[int]], nn.Module], **options: Any
) -> EmbeddedGiven:
    """A PixelCNN that reads maps of what is given; ``embedding`` makes their network from the shape of the maps."""
    maps = (MAPS, *shape[1:])
    return EmbeddedGiven(PixelCNN(shape, per_feature, given_shape=maps, **options), embedding(maps))


def transformer(data: Data, reads: Reads) -> Program:
    dropout = 0.1 if is_image(data) else 0.0
    return Autoregressive(
        conditional_for(
            data, lambda p: CausalTransformer(data.event_shape, p, levels=data.levels, dropout=dropout, **reads)
        )
    )


def _flow(stack: Callable[..., Flow], of_one: Callable[..., Flow]) -> Callable[[Data, Reads], Program]:
    """The flow ``stack``; for a single feature, which couplings cannot split, ``of_one``."""

    def build_flow(data: Data, reads: Reads) -> Program:
        make = of_one if data.event_shape.numel() == 1 else stack
        return _flow_for_data(data, reads, make, dequantizer)

    return build_flow


def _image_flow(name: str, stack: Callable[..., Flow]) -> Callable[[Data, Reads], Program]:
    """The multiscale flow ``stack``, called ``name`` in messages."""

    def build_flow(data: Data, reads: Reads) -> Program:
        _require_image(data, name)
        return _flow_for_data(data, reads, stack, multiscale.convolutional_dequantizer)

    return build_flow


def _flow_for_data(data: Data, reads: Reads, make: Callable[..., Flow], guide: Callable[..., Flow]) -> Program:
    """The flow for reals; for integers, the flow dequantized by the guide, or uniformly if the levels are too many."""
    if data.levels is None:
        return make(data.event_shape, **reads)
    flow = make(data.event_shape, unit_cube=True, **reads)
    return Dequantized(flow, data.levels, guide(data.event_shape, data.levels) if resolves(data.levels) else None)


def realnvp_of(data: Data, reads: Reads) -> Program:
    """The multiscale stack for large images, else one of vectors."""
    squeezes = is_large(data.event_shape) and _can_halve(data.event_shape)
    build_flow = _image_flow("realnvp", multiscale.convolutional_realnvp) if squeezes else _flow(realnvp, maf)
    return build_flow(data, reads)


def deep_vae(data: Data, reads: Reads) -> Program:
    """Latents from half of the resolution down to about 4 pixels, three levels at each but two at the coarsest."""
    _require_image(data, "vdvae")
    if reads:
        raise ValueError("'vdvae' reads neither labels nor a given: leave them out, or use 'vae'")
    height, width = data.event_shape[1:]
    if not _can_halve(data.event_shape):
        raise ValueError(
            f"'vdvae' halves images, but {data.name} has {height}x{width} pixels: use 'vae', or crop the images"
        )
    size, counts = [height // 2, width // 2], [3]
    while min(size) >= 8 and all(side % 2 == 0 for side in size):
        size, counts = [side // 2 for side in size], [*counts, 3]
    h = (64, height // 2, width // 2)
    likelihood = conditional_for(data, lambda p: ConvNet(h, data.event_shape, p, 64))
    return vdvae(likelihood, [2, *counts[1:]])


def diffusion(data: Data, reads: Reads, **swaps: Any) -> Program:
    denoiser, options = _denoising(data, reads, **swaps)
    schedule = "cosine" if data.levels is None else "log-snr"
    return Diffusion(data.event_shape, denoiser, schedule, num_steps=50, subsample=2, **options)


def diffusion_continuous(data: Data, reads: Reads, **swaps: Any) -> Program:
    # Smooth in time: its ODE can be solved in few steps.
    denoiser, options = _denoising(data, reads, max_frequency=30.0, **swaps)
    return ContinuousDiffusion(data.event_shape, denoiser, "learned", **options)


def _denoising(
    data: Data,
    reads: Reads,
    max_frequency: float = 1000.0,
    *,
    network: str | None = None,
    predict: str | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a diffusion of the data, and its prediction target."""
    few = data.levels is not None and data.levels <= 32
    predict = predict or ("levels" if few else "v")
    check_choice(predict, PREDICTIONS, "predict")
    network = network or ("unet" if is_image(data) else "mlp")
    check_choice(network, DENOISERS, "network")
    if network != "mlp":
        _require_image(data, f"network {network!r}")
    num_parameters = data.levels if predict == "levels" and data.levels is not None else 1
    make = DENOISERS[network](data)
    options: dict[str, Any] = {"label_dropout": 0.1 if "num_classes" in reads else 0.0}
    if predict == "edm":
        x = to_unit(data.x, data.levels).double()
        options["sigma_data"] = float(x[~x.isnan()].std().clamp_min(1e-3))
    denoiser = make(data.event_shape, num_parameters=num_parameters, max_frequency=max_frequency, **reads)
    return denoiser, {"predict": predict, "levels": data.levels, **options}


def _unet(data: Data) -> Callable[..., nn.Module]:
    if is_large(data.event_shape):
        sizes = _sizes_of(data)
        return partial(DenoisingUNet, channels=sizes.unet, dropout=sizes.dropout)
    return partial(DenoisingUNet, channels=(32, 64) if _can_halve(data.event_shape) else (64,))


def _dit(data: Data) -> Callable[..., nn.Module]:
    if is_large(data.event_shape):
        sizes = _sizes_of(data)
        return partial(
            DenoisingTransformer, patch_size=sizes.patch_size, width=sizes.patch_width, dropout=sizes.dropout
        )
    return partial(DenoisingTransformer, patch_size=2 if _can_halve(data.event_shape) else 1, width=64)


def _can_halve(shape: Sequence[int]) -> bool:
    return all(size % 2 == 0 for size in shape[1:])


DENOISERS: dict[str, Callable[[Data], Callable[..., nn.Module]]] = {
    "mlp": lambda data: DenoisingMLP,
    "unet": _unet,
    "dit": _dit,
}


def implicit(data: Data, reads: Reads) -> Program:
    if "num_classes" in reads:
        raise ValueError(
            "'implicit' has no density, so Bayes' rule gives no p(y | x): leave labeled out, or, for samples of a "
            "class, use dgm.Implicit with a generator that reads the label"
        )
    generator: nn.Module
    if is_large(data.event_shape):
        sizes = _sizes_of(data)
        size = sizes.latent_size
        generator = ConvDecoder((size,), data.event_shape, 1, sizes.widths, **reads)
    else:
        size, hidden = (LATENT_SIZE, (256, 256)) if is_image(data) else (2, (128, 128, 128))
        generator = MLP((size,), data.event_shape.numel(), hidden, **reads)
    return Implicit(data.event_shape, Normal(size), generator, levels=data.levels)


def classifier(data: Data, units: Units | None) -> Program:
    return Discriminative(_labels_of(data, units, dropout=0.5 if is_image(data) else 0.0))


def _labels_of(data: Data, units: Units | None, dropout: float = 0.0) -> Categorical:
    """p(y | x) of an x in its own units."""
    assert data.num_classes is not None  # `build` has asked
    make: Callable[..., nn.Module] = MLP
    if is_large(data.event_shape):
        make = partial(ConvEncoder, channels=_sizes_of(data).widths)
    network = make(data.event_shape, data.num_classes, levels=data.levels, dropout=dropout)
    return Categorical((), data.num_classes, network if units is None else Standardize(*units, network))


@dataclass(frozen=True)
class Parts:
    """The sizes of a VAE's parts: the data, z, and what all parts are given.

    Attributes:
        shape: shape of one z; ``()`` for one of ``clusters`` classes, ``(C, H, W)`` for a grid of latents.
        clusters: number of values of a z of shape ``()``.
        reads: what all parts are given in addition.
        hidden: widths of the encoder's and the likelihood's hidden layers; None for widths that suit the data, and for
            convolutions for large images.
        reading: where x has its own units, wraps a function from the input shape to a network into the encoder's
            network.
        is_grid: whether z is an image at a resolution of x, halved, and so has convolutions from and to x.
    """

    data: Data
    shape: tuple[int, ...]
    clusters: int | None
    reads: Reads
    hidden: Sequence[int] | None
    reading: Reading | None = None
    is_grid: bool = False

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def convolutions(self) -> dict[str, Any]:
        """Options of the convolutional networks that suit x; empty for MLPs."""
        if self.hidden is not None or not is_large(self.data.event_shape):
            return {}
        sizes = _sizes_of(self.data)
        return {"channels": sizes.widths, "dropout": sizes.dropout}

    @property
    def widths(self) -> Sequence[int]:
        """Widths of the hidden layers of an MLP."""
        return HIDDEN if self.hidden is None else self.hidden

    def of_x(self, out_features: int) -> nn.Module:
        """A network for the encoder."""

        def network(shape: Sequence[int]) -> nn.Module:
            options = {"levels": self.data.levels, **self.reads}
            if self.is_grid:
                return _between_images(self.data, shape, self.shape, out_features // self.size, **options)
            if self.convolutions:
                return ConvEncoder(shape, out_features, **self.convolutions, **options)
            return MLP(shape, out_features, self.widths, **options)

        return network(self.data.event_shape) if self.reading is None else self.reading(network)

    def of_z(self, per_feature: int) -> nn.Module:
        """A network for the likelihood; it reads no label if z is a class."""
        if self.is_grid or self.convolutions:
            return self.image_of_z(self.data.event_shape, per_feature, **self.reads)
        return MLP(self.shape, per_feature * self.data.event_shape.numel(), self.widths, **self.reads | self.classes)

    def image_of_z(self, shape: Sequence[int], num_parameters: int = 1, **reads: Any) -> nn.Module:
        """A convolutional network from z to an image of a shape."""
        if self.is_grid:
            return _between_images(self.data, self.shape, shape, num_parameters, **reads)
        return ConvDecoder(self.shape, shape, num_parameters, **self.convolutions, **reads | self.classes)

    @property
    def classes(self) -> dict[str, Any]:
        """The option of a network whose input is a z of one class."""
        return {"num_classes": self.clusters} if self.clusters else {}

    def z_as_given(self) -> dict[str, Any]:
        return self.classes or {"given_shape": self.shape}

    def x_as_given(self) -> dict[str, Any]:
        if "given_shape" in self.reads or self.reading is not None:
            raise ValueError(
                "a flow as the encoder can read only a standardized x and a label: use encoder='meanfield', 'fullrank' "
                "or 'lowrank'"
            )
        return {"given_shape": self.data.event_shape, "given_levels": self.data.levels, **self.reads}


def vae(
    data: Data,
    reads: Reads,
    *,
    prior: Program | str = "normal",
    encoder: Program | str | None = None,
    likelihood: Program | str = "independent",
    latent_size: int | None = None,
    grid: Sequence[int] | None = None,
    hidden: Sequence[int] | None = None,
    reading: Reading | None = None,
    columns: Callable[[Callable[[int], nn.Module]], Program] | None = None,
) -> Program:
    if latent_size is not None:
        size = check_count(latent_size, "latent_size")
    elif grid is not None:
        size = GRID_LATENT_SIZE
    elif is_large(data.event_shape) and prior not in ("categorical", "codes", "codes-uniform"):
        size = _sizes_of(data).latent_size
    else:
        size = LATENT_SIZE if is_image(data) else 2
    hidden = None if hidden is None else as_shape(hidden, "hidden")
    made = prior if isinstance(prior, Program) else encoder if isinstance(encoder, Program) else None
    places: tuple[int, ...] = ()
    if grid is not None:
        _require_image(data, "grid")
        places = _require_grid(data, grid)
        if made is not None:
            raise ValueError(
                f"grid is {places}, but the {'prior' if made is prior else 'encoder'} that was passed has event_shape "
                f"{tuple(made.event_shape)}: leave grid out"
            )
        if prior in PRIORS_WITHOUT_GRID:
            with_grid = ", ".join(name for name in PRIORS if name not in PRIORS_WITHOUT_GRID)
            raise ValueError(
                f"grid is {places}, but prior {prior!r} is for no z of the shape (latent_size, height, width): leave "
                f"grid out, or use one of {with_grid}"
            )
        if hidden is not None:
            raise ValueError(
                f"hidden is {tuple(hidden)}, the widths of MLPs, but a grid has convolutions: leave out hidden or grid"
            )
    if latent_size is not None and made is not None and tuple(made.event_shape) != (latent_size,):
        raise ValueError(
            f"latent_size is {latent_size}, but the {'prior' if made is prior else 'encoder'} that was passed has "
            f"event_shape {tuple(made.event_shape)}: leave latent_size out"
        )
    one_class = prior == "categorical" if made is None else made.event_shape == ()
    if prior == "categorical" and made is not None and not one_class:
        raise ValueError(
            "prior 'categorical' is one class, but the encoder that was passed has event_shape "
            f"{tuple(made.event_shape)}: use encoder='categorical', or leave encoder out"
        )
    clusters = (size if made is None else made.levels) if one_class else None
    coded = prior in ("codes", "codes-uniform") if made is None else isinstance(made, OneHot)
    named = () if one_class else (size, CODE_VALUES) if coded else (size, *places)
    shape = named if made is None else tuple(made.event_shape)
    is_grid = len(shape) == 3 and not coded and hidden is None and is_image(data) and shape[1:] in _grids_of(data)
    parts = Parts(data, shape, clusters, reads, hidden, reading, is_grid)
    if encoder is None:
        discrete = prior == "bernoulli" if made is None else made.levels == 2
        encoder = "categorical" if one_class else "codes" if coded else "bernoulli" if discrete else "meanfield"
    if coded and encoder != "codes" and not isinstance(encoder, OneHot):
        raise ValueError("a one-hot prior needs a one-hot encoder: use encoder='codes', or leave encoder out")
    # The encoder comes first, because VampPrior needs it, except for encoders that need the other parts.
    late = isinstance(encoder, str) and encoder in LATE_ENCODERS
    q = _part_of_name("meanfield" if late else encoder, {**EARLY_ENCODERS, **LATE_ENCODERS}, "encoder", parts)
    p_z = _part_of_name(prior, PRIORS, "prior", parts, q)
    p_x = _part_of_name(likelihood, LIKELIHOODS, "likelihood", parts) if columns is None else columns(parts.of_z)
    return LATE_ENCODERS[encoder][0](parts, q, p_z, p_x) if late else VAE(p_z, p_x, q)  # type: ignore[index]


def vq_vae(
    data: Data,
    reads: Reads,
    *,
    num_codes: int | None = None,
    grid: Sequence[int] | None = None,
    decay: float | None = None,
) -> Program:
    """A grid of code vectors, for images whose sides can be halved."""
    if not is_image(data):
        raise ValueError(
            f"'vq-vae' needs images (C, H, W), but {data.name} has event_shape {tuple(data.event_shape)}: use 'vae' "
            "with prior='codes', a VAE of one-hot codes"
        )
    places = _grid_of_codes(data, grid)
    means = {} if decay is None else {"decay": decay}
    codebook = Codebook(NUM_CODES if num_codes is None else num_codes, CODE_SIZE, **means)
    shape = (CODE_SIZE, *places)
    network: Callable[..., nn.Module] = partial(_between_images, data, **reads)
    codes = CausalTransformer(places, codebook.num_codes, levels=codebook.num_codes, dropout=_dropout_of(data), **reads)
    return VAE(
        prior=Embedded(Autoregressive(Categorical(places, codebook.num_codes, codes)), codebook),
        likelihood=_given_z(data, lambda p: network(shape, data.event_shape, p)),
        encoder=VectorQuantizer(shape, network(data.event_shape, shape, 1, levels=data.levels), codebook),
    )


def _grid_of_codes(data: Data, grid: Sequence[int] | None) -> tuple[int, ...]:
    """Height and width of the grid of codes: ``grid``, or the image's halved twice, and further until at most 16."""
    found = _grids_of(data)
    if grid is not None or not found:
        return _require_grid(data, grid)
    small = [place for place, factor in found.items() if factor >= 4 and max(place) <= WIDEST_GRID]
    return small[0] if small else [*found][-1]


def _grids_of(data: Data) -> dict[tuple[int, ...], int]:
    """The heights and widths of an image, both halved equally often, and the factor of each."""
    height, width = data.event_shape[1:]
    every = [2**i for i in range(1, 16) if height % 2**i == 0 and width % 2**i == 0]
    return {(height // factor, width // factor): factor for factor in every}


def _require_grid(data: Data, grid: Sequence[int] | None) -> tuple[int, ...]:
    """``grid``, if it is one of `_grids_of`."""
    found = _grids_of(data)
    place: Any = None if grid is None else tuple(as_shape(grid, "grid"))
    if place not in found:
        height, width = data.event_shape[1:]
        raise ValueError(
            f"grid must be the image's height and width, both halved equally often, "
            f"{', '.join(map(str, found)) or 'so they must be even'}, got {grid} for {height}x{width} pixels: "
            f"{'choose one of these' if found else 'crop the images'}"
        )
    return place


def _between_images(
    data: Data, in_shape: Sequence[int], out_shape: Sequence[int], num_parameters: int, **options: Any
) -> ConvNet:
    """A network between images of the resolutions of x and of its grid, either way."""
    return ConvNet(in_shape, out_shape, num_parameters, blocks=2, dropout=_dropout_of(data), **options)


def _part_of_name(choice: Program | str, table: Catalog, role: str, *args: Any) -> Program:
    if isinstance(choice, Program):
        return choice
    if not isinstance(choice, str):
        check_program(choice, role)
    if choice not in table:
        raise ValueError(
            f"{role} must be a Program or one of {', '.join(table)}, got {choice!r}{close_to(choice, table)}"
        )
    return table[choice][0](*args)


def hierarchy(latent_size: int, depth: int, number: int = 2) -> Program:
    """p(z) of ``latent_size`` features as a VAE of ``depth`` levels, each of half the size of the one below."""
    if depth == 1:
        return Normal(latent_size)
    top = max(1, latent_size // 2)
    return VAE(
        prior=hierarchy(top, depth - 1, number + 1),
        likelihood=Normal(latent_size, MLP((top,), 2 * latent_size, (64, 64))),
        encoder=Normal(top, MLP((latent_size,), 2 * top, (64, 64))),
        latent_name=f"z{number}",
    )


def ladder(parts: Parts, q: Program, p_z: Program, p_x: Program) -> VAE:
    """A top-down guide: every level reads x, and uses the model's p(level | level above)."""
    if not isinstance(p_z, VAE):
        raise ValueError(
            f"encoder 'ladder' is for a hierarchy, but the prior is {type(p_z).__name__}: use prior='vae' or 'vae3'"
        )
    return VAE(_without_encoders(p_z), p_x, _ladder(parts, q, p_z))


def _ladder(parts: Parts, q: Program, p_z: VAE) -> Program:
    size = p_z.prior.event_shape.numel()
    above: Program = Normal(size, parts.of_x(2 * size))
    if isinstance(p_z.prior, VAE):
        above = _ladder(parts, above, p_z.prior)
    return TopDown(above, PrecisionWeighted(q, p_z.likelihood), p_z.latent_name)  # type: ignore[arg-type]


def _without_encoders(p_z: Program) -> Program:
    if not isinstance(p_z, VAE):
        return p_z
    return VAE(_without_encoders(p_z.prior), p_z.likelihood, latent_name=p_z.latent_name)


def _vamp_prior(parts: Parts, q: Program) -> Program:
    rows = torch.randperm(len(parts.data))[:100]
    return VampPrior(q, parts.data.x[rows], parts.data.levels)  # type: ignore[arg-type]


def _after_normal(parts: Parts, flow: Flow) -> Flow:
    """The mean-field Normal followed by the flow, which starts near the identity."""
    return Flow(
        parts.shape, flow.transforms, base=Normal(parts.shape, parts.of_x(2 * parts.size)), embedding=flow.embedding
    )


def _codes_shape(parts: Parts) -> tuple[tuple[int, ...], int]:
    """Number of codes, and of their values, in a z of one-hot rows."""
    if len(parts.shape) < 2 or parts.is_grid:
        raise ValueError("encoder 'codes' is for discrete codes: use prior='codes' or 'codes-uniform'")
    return parts.shape[:-1], parts.shape[-1]


def _num_clusters(parts: Parts) -> int:
    if parts.clusters is None:
        raise ValueError("encoder 'categorical' is for one class: use prior='categorical'")
    return parts.clusters


def _chain_of_codes(parts: Parts) -> Autoregressive:
    shape, values = _codes_shape(parts)
    network = CausalTransformer(shape, values, width=32, layers=2, heads=2, levels=values)
    return Autoregressive(Categorical(shape, values, network))


def _real_event_shape(parts: Parts, likelihood: str) -> tuple[int, ...]:
    if parts.data.levels is not None:
        raise ValueError(
            f"likelihood {likelihood!r} is for reals or counts, but {parts.data.name} has {parts.data.levels} levels: "
            "use 'independent' or 'categorical'"
        )
    return parts.data.event_shape


def _required_levels(parts: Parts, likelihood: str) -> int:
    if parts.data.levels is None:
        raise ValueError(
            f"likelihood {likelihood!r} is a mass on integers, but {parts.data.name} holds reals: use 'independent'"
        )
    return parts.data.levels


def _likelihood_of(kind: Callable[..., IndependentConditional]) -> Callable[[Parts], Program]:
    """A conditional of class ``kind``, given z."""

    def likelihood(parts: Parts) -> Program:
        shape = _real_event_shape(parts, kind.__name__)
        kind(shape)  # refuses the shape before a network is made
        return kind(shape, lambda size: parts.of_z(size // math.prod(shape)))

    return likelihood


def _zero_inflated(kind: Callable[..., IndependentConditional]) -> Callable[[Parts], Program]:
    def likelihood(parts: Parts) -> Program:
        shape = _real_event_shape(parts, f"zero-inflated {kind.__name__}")
        return ZeroInflated(kind(shape), lambda size: parts.of_z(size // math.prod(shape)))

    return likelihood


def _independent(parts: Parts) -> Program:
    return _given_z(parts.data, parts.of_z)


def _given_z(data: Data, network: Callable[[int], nn.Module]) -> Program:
    """Independent features given z, with a distribution that suits the data."""
    return Normal(data.event_shape, network(2)) if data.levels is None else conditional_for(data, network)


def _pixelcnn(parts: Parts) -> Program:
    data = parts.data
    _require_image(data, "pixelcnn")
    shape = data.event_shape

    def network(per_feature: int) -> nn.Module:
        if not parts.convolutions:
            return PixelCNN(shape, per_feature, levels=data.levels, **parts.z_as_given())
        return _pixelcnn_of_maps(shape, per_feature, parts.image_of_z, levels=data.levels)

    return Autoregressive(conditional_for(data, network))


def _flow_of_z(parts: Parts, q: Program) -> Flow:
    if parts.is_grid and _can_halve(parts.shape):
        return multiscale.convolutional_realnvp(parts.shape)
    return realnvp(parts.shape, layers=6, hidden=(64, 64))


def _denoiser_of_z(parts: Parts, **options: Any) -> nn.Module:
    if parts.is_grid:
        return DenoisingUNet(parts.shape, GRID_UNET[: 1 + _can_halve(parts.shape)], **options)
    return DenoisingMLP(parts.shape, (64, 64, 64), **options)


PRIORS_WITHOUT_GRID = ("vae", "vae3", "categorical", "codes", "codes-uniform")
"""Priors of a z that is no image."""
PRIORS: Catalog = {
    "normal": (lambda parts, q: Normal(parts.shape), "N(0, I)"),
    "learned": (lambda parts, q: Normal(parts.shape, learned=True), "a Normal with learned mean and scale"),
    "mog": (lambda parts, q: MixturePrior(parts.shape, 10), "a mixture of 10 Normals"),
    "vamp": (_vamp_prior, "VampPrior: the encoder at 100 learned pseudo-inputs"),
    "flow": (_flow_of_z, "a RealNVP flow; of a grid, a multiscale one"),
    "maf": (lambda parts, q: maf(parts.shape, layers=3, hidden=(64, 64)), "a masked autoregressive flow"),
    "nsf": (lambda parts, q: nsf(parts.shape, layers=3, hidden=(64, 64)), "a neural spline flow"),
    "ar": (
        lambda parts, q: Autoregressive(MixtureOfNormals(parts.shape, 5, MADE(parts.shape, 15, (64, 64)))),
        "autoregressive mixtures of Normals",
    ),
    "diffusion": (
        lambda parts, q: Diffusion(parts.shape, _denoiser_of_z(parts), num_steps=20),
        "a latent diffusion of 20 steps",
    ),
    "diffusion-continuous": (
        lambda parts, q: ContinuousDiffusion(parts.shape, _denoiser_of_z(parts, max_frequency=30.0), "learned"),
        "a latent diffusion in continuous time",
    ),
    "vae": (lambda parts, q: hierarchy(parts.size, 2), "a VAE: a hierarchy of two levels"),
    "vae3": (lambda parts, q: hierarchy(parts.size, 3), "a VAE over a VAE: a hierarchy of three levels"),
    "bernoulli": (lambda parts, q: Bernoulli(parts.shape, learned=True), "independent bits with learned probabilities"),
    "categorical": (lambda parts, q: Categorical((), parts.clusters, learned=True), "one class: clusters"),
    "codes": (lambda parts, q: OneHot(_chain_of_codes(parts)), "one-hot codes of 8 values, autoregressive"),
    "codes-uniform": (
        lambda parts, q: OneHot(Categorical(*_codes_shape(parts))),
        "one-hot codes of 8 values, independent and uniform",
    ),
}

EARLY_ENCODERS: Catalog = {
    "meanfield": (lambda parts: Normal(parts.shape, parts.of_x(2 * parts.size)), "a diagonal Normal"),
    "fullrank": (
        lambda parts: FullRankNormal(parts.shape, parts.of_x((1 + parts.size) * parts.size)),
        "a Normal with all covariances",
    ),
    "lowrank": (
        lambda parts: LowRankNormal(parts.shape, 2, parts.of_x(4 * parts.size)),
        "a Normal with covariances of rank 2",
    ),
    "planar": (
        lambda parts: planar(parts.shape, hidden=parts.widths, **parts.x_as_given()),
        "a Normal and 8 planar maps",
    ),
    "sylvester": (
        lambda parts: sylvester(parts.shape, hidden=parts.widths, **parts.x_as_given()),
        "a Normal and 4 Sylvester maps",
    ),
    "iaf": (
        lambda parts: _after_normal(parts, iaf(parts.shape, layers=2, hidden=(64, 64), **parts.x_as_given())),
        "a Normal and an inverse autoregressive flow",
    ),
    "nsf": (
        lambda parts: _after_normal(parts, nsf(parts.shape, layers=3, hidden=(64, 64), **parts.x_as_given())),
        "a Normal and a neural spline flow",
    ),
    "bernoulli": (lambda parts: Bernoulli(parts.shape, parts.of_x(parts.size)), "bits, for prior bernoulli"),
    "categorical": (
        lambda parts: Categorical((), _num_clusters(parts), parts.of_x(_num_clusters(parts))),
        "a classifier, for prior categorical",
    ),
    "codes": (
        lambda parts: OneHot(Categorical(*_codes_shape(parts), parts.of_x(parts.size))),
        "one-hot codes with straight-through gradients, for the priors codes and codes-uniform",
    ),
}

LATE_ENCODERS: dict[str, tuple[Callable[..., VAE], str]] = {
    "ladder": (ladder, "top-down, for prior vae or vae3"),
    "semiamortized": (
        lambda parts, q, p_z, p_x: VAE(p_z, p_x, SemiAmortized(q, p_z, p_x)),
        "a diagonal Normal, refined by 3 gradient steps per datum",
    ),
}

ENCODERS: Catalog = {**EARLY_ENCODERS, **LATE_ENCODERS}

LIKELIHOODS: Catalog = {
    "independent": (_independent, "independent features given z, with a distribution that suits the data"),
    "categorical": (
        lambda parts: Categorical(
            parts.data.event_shape, _required_levels(parts, "categorical"), parts.of_z(parts.data.levels or 0)
        ),
        "a categorical distribution over the levels",
    ),
    "normal": (
        lambda parts: Normal(_real_event_shape(parts, "normal"), parts.of_z(1), scale_type="feature"),
        "Normals with one learned scale per feature",
    ),
    "normal-shared": (
        lambda parts: Normal(_real_event_shape(parts, "normal-shared"), parts.of_z(1), scale_type="shared"),
        "Normals with one learned scale",
    ),
    "student-t": (_likelihood_of(StudentT), "Student t: reals with heavy tails"),
    "log-normal": (_likelihood_of(LogNormal), "log-normal: positive reals"),
    "beta": (_likelihood_of(Beta), "Beta: reals between 0 and 1"),
    "poisson": (_likelihood_of(Poisson), "Poisson: counts, as whole reals"),
    "negative-binomial": (_likelihood_of(NegativeBinomial), "negative binomial: counts of any variance above the mean"),
    "zero-inflated-poisson": (_zero_inflated(Poisson), "Poisson, or zero"),
    "zero-inflated-negative-binomial": (_zero_inflated(NegativeBinomial), "negative binomial, or zero"),
    "ar": (
        lambda parts: Autoregressive(
            conditional_for(
                parts.data,
                lambda p: MADE(parts.data.event_shape, p, (256, 256), levels=parts.data.levels, **parts.z_as_given()),
            )
        ),
        "autoregressive features given z, by a masked MLP",
    ),
    "pixelcnn": (_pixelcnn, "autoregressive pixels given z, by masked convolutions: a PixelVAE (images)"),
}

COLUMN_MODELS = ("pixels", "made", "any-order", "vae")
SWAPS = {
    "vae": ("prior", "encoder", "likelihood", "latent_size", "hidden", "grid"),
    "pixelcnn": ("stages", "attention", "predictors"),
    "vq-vae": ("num_codes", "grid", "decay"),
    **dict.fromkeys(("diffusion", "diffusion-continuous"), ("network", "predict")),
}
"""The parts of each model that has parts."""
OWN_UNITS = (
    "log-normal", "beta", "poisson", "negative-binomial", "zero-inflated-poisson", "zero-inflated-negative-binomial",
)  # fmt: skip
"""Likelihoods of x in its own units: only the input of networks is standardized."""

MODELS: Catalog = {
    "pixels": (pixels, "independent features: a baseline"),
    "made": (made, "autoregressive, by a masked MLP"),
    "any-order": (any_order, "autoregressive in any order, by an MLP of x and a mask; missing values"),
    "pixelcnn": (
        pixelcnn,
        "autoregressive, by gated masked convolutions; swaps: stages, attention, predictors (images)",
    ),
    "transformer": (transformer, "autoregressive, by causal attention"),
    "realnvp": (realnvp_of, "flow of affine couplings, multiscale for images; dequantized for integers"),
    "glow": (_image_flow("glow", multiscale.glow), "multiscale flow with invertible 1x1 convolutions (images)"),
    "flow++": (
        _image_flow("flow++", multiscale.flow_plus_plus),
        "multiscale flow of couplings by mixtures of logistics (images)",
    ),
    "maf": (_flow(maf, maf), "masked autoregressive flow; dequantized for integers"),
    "nsf": (_flow(nsf, nsf_autoregressive), "neural spline flow of couplings; dequantized for integers"),
    "nsf-autoregressive": (
        _flow(nsf_autoregressive, nsf_autoregressive),
        "autoregressive neural spline flow; dequantized for integers",
    ),
    "vae": (vae, "variational autoencoder; swaps: prior, encoder, likelihood, latent_size, hidden, grid"),
    "vq-vae": (
        vq_vae,
        "VAE of a grid of code vectors with an autoregressive prior; swaps: num_codes, grid, decay (images)",
    ),
    "vdvae": (deep_vae, "deep hierarchy of latents on a residual top-down path (images)"),
    "diffusion": (diffusion, "diffusion model with a closed-form bound; swaps: network, predict"),
    "diffusion-continuous": (
        diffusion_continuous,
        "diffusion in continuous time with a learned noise schedule; swaps: network, predict",
    ),
    "implicit": (implicit, "noise through a network: samples only; objectives gan, wgan-gp, f-gan, energy, mmd"),
    "classifier": (classifier, "discriminative p(y | x)"),
}


# For type checkers: the models that have parts, and those whose class does not depend on the data.


@overload
def build(
    model: Literal["vae"],
    data: Data,
    *,
    labeled: Literal[False] = False,
    prior: Program | str | None = None,
    encoder: Program | str | None = None,
    likelihood: Program | str | None = None,
    latent_size: int | None = None,
    hidden: Sequence[int] | None = None,
    grid: Sequence[int] | None = None,
    standardize: Literal[False],
    max_parameters: int | None = MAX_PARAMETERS,
) -> VAE: ...


@overload
def build(
    model: Literal["vae"],
    data: Data,
    *,
    labeled: Literal[True],
    prior: Program | str | None = None,
    encoder: Program | str | None = None,
    likelihood: Program | str | None = None,
    latent_size: int | None = None,
    hidden: Sequence[int] | None = None,
    grid: Sequence[int] | None = None,
    standardize: bool = True,
    columns: Mapping[str, Any] | None = None,
    max_parameters: int | None = MAX_PARAMETERS,
) -> Labeled: ...


@overload
def build(
    model: Literal["vae"],
    data: Data,
    *,
    labeled: bool = False,
    prior: Program | str | None = None,
    encoder: Program | str | None = None,
    likelihood: Program | str | None = None,
    latent_size: int | None = None,
    hidden: Sequence[int] | None = None,
    grid: Sequence[int] | None = None,
    standardize: bool = True,
    columns: Mapping[str, Any] | None = None,
    max_parameters: int | None = MAX_PARAMETERS,
) -> Any: ...


@overload
def build(
    model: Literal["classifier"],
    data: Data,
    *,
    standardize: bool = True,
    max_parameters: int | None = MAX_PARAMETERS,
) -> Discriminative: ...


@overload
def build(
    model: str,
    data: Data,
    *,
    labeled: Literal[True],
    stages: int | None = None,
    attention: int | None = None,
    predictors: bool | None = None,
    num_codes: int | None = None,
    grid: Sequence[int] | None = None,
    decay: float | None = None,
    network: str | None = None,
    predict: str | None = None,
    standardize: bool = True,
    columns: Mapping[str, Any] | None = None,
    max_parameters: int | None = MAX_PARAMETERS,
) -> Labeled: ...


@overload
def build(
    model: str,
    data: Data,
    *,
    labeled: bool = False,
    stages: int | None = None,
    attention: int | None = None,
    predictors: bool | None = None,
    num_codes: int | None = None,
    grid: Sequence[int] | None = None,
    decay: float | None = None,
    network: str | None = None,
    predict: str | None = None,
    standardize: bool = True,
    columns: Mapping[str, Any] | None = None,
    max_parameters: int | None = MAX_PARAMETERS,
) -> Any: ...


@suggesting
def build(
    model: str,
    data: Data,
    *,
    labeled: bool = False,
    prior: Program | str | None = None,
    encoder: Program | str | None = None,
    likelihood: Program | str | None = None,
    latent_size: int | None = None,
    hidden: Sequence[int] | None = None,
    stages: int | None = None,
    attention: int | None = None,
    predictors: bool | None = None,
    num_codes: int | None = None,
    grid: Sequence[int] | None = None,
    decay: float | None = None,
    network: str | None = None,
    predict: str | None = None,
    standardize: bool = True,
    columns: Mapping[str, Any] | None = None,
    max_parameters: int | None = MAX_PARAMETERS,
) -> Program:
    """Build a program by name, sized for ``data``.

    The parts from prior to hidden are for "vae"; stages, attention and predictors for "pixelcnn"; num_codes and decay
    for "vq-vae", and grid for both kinds of VAE; network and predict for diffusions. None keeps the model's default.
    Images of at least 16 pixels a side get convolutions, with the sizes of `networks.sizes.image_sizes`.

    For reals, the program is a `Standardized` with the shift and scale of each feature (of each channel of an image),
    so evidence and samples are in the units of x. See `units_of`. For data with a ``given``, the program is
    p(x | given).

    Args:
        model: a key of `MODELS`.
        data: the training data, which determine shape, levels, units, number of classes and ``given``.
        labeled: whether to build the generative classifier p(y) p(x | y) over the named family.
        prior: p(z), a program or a key of `PRIORS`.
        encoder: q(z | x), a program or a key of `ENCODERS`.
        likelihood: p(x | z), a program or a key of `LIKELIHOODS`.
        latent_size: number of features of z, at each place where z is a grid (8 by default); for a one-hot z, number of
            codes or classes.
        hidden: widths of the hidden layers of encoder and likelihood, which are then MLPs, also for images.
        stages: for "pixelcnn", number of resolutions, 1 by default. Each further one halves the sides, which must be
            even.
        attention: for "pixelcnn", number of attention blocks, none by default; fewer than the layers of
            `networks.sizes.image_sizes`, or than 8 for images of less than 16 pixels a side.
        predictors: for "pixelcnn", whether components of the mixture are near predictions from neighbors, as in
            `PredictedLogistic`: by default for images of at least 16 pixels a side and 256 levels.
        num_codes: for "vq-vae", number of code vectors, 256 by default.
        grid: height and width of a grid of latents: those of the image, halved equally often and at least once. For
            "vae", z is then an image ``(latent_size, height, width)``, and the networks of the default encoder and
            likelihood are convolutions; by default z is a vector. For "vq-vae", by default halved twice, and further
            until at most 16 a side.
        decay: for "vq-vae", decay of the running means of the code vectors, 0.99 by default.
        network: for a diffusion, "mlp", "unet" or "dit" (a diffusion transformer); the last two are for images.
        predict: for a diffusion, the prediction of its network, as for `Diffusion`; "edm" has the scale of the data.
        standardize: whether to standardize the reals of x and of given. Parts of your own then read standardized x. If
            the likelihood is a mass or has bounds, such as "poisson" or "beta", x keeps its own units.
        columns: kind of each column of a mixed table, as for `Columns`: "made" is then a chain over the columns,
            "any-order" a chain in any order, "vae" has independent columns given z, and "pixels" has independent
            columns. Default `Data.kinds`.
        max_parameters: largest number of parameters; None for any number.

    Returns:
        The program, untrained, on the CPU.

    Warns:
        UserWarning: a real feature is constant, or float32 is too coarse for it.

    Raises:
        ValueError, TypeError: the model is unknown, or does not have a part that was passed.
        TooLargeError: the program would have more parameters than ``max_parameters``. It was not allocated, and the
            message names the models that fit.

    >>> import dgm_pyro as dgm
    >>> dgm.build("vae", dgm.data.load("digits"), prior="vae").latents("x")
    ('z', 'z2')
    >>> type(dgm.build("maf", dgm.data.load("moons")))
    <class 'dgm_pyro.families.standardized.Standardized'>
    """
    check_choice(model, MODELS, "model", GUESSES)
    if not isinstance(data, Data):
        raise TypeError(
            f"data must be a dgm.data.Data, got {type(data).__name__}: use dgm.Data(x, y) for tensors, {READERS}"
        )
    parts = {
        "prior": prior,
        "encoder": encoder,
        "likelihood": likelihood,
        "latent_size": latent_size,
        "hidden": hidden,
        "stages": stages,
        "attention": attention,
        "predictors": predictors,
        "num_codes": num_codes,
        "grid": grid,
        "decay": decay,
        "network": network,
        "predict": predict,
    }
    swaps = {part: choice for part, choice in parts.items() if choice is not None}
    data = _sample_rows(data.excerpt, len(data))
    for part in swaps:
        if part not in SWAPS.get(model, ()):
            owners = " and ".join(repr(each) for each in SWAPS if part in SWAPS[each])
            raise ValueError(f"{model!r} takes no {part}: it is a part of {owners}")
    check_type(columns, Mapping | None, "columns", "a mapping of names to kinds or None")
    if columns is None and data.kinds is not None:
        columns = {name: _with_number(kind) for name, kind in data.kinds.items()}
    check_type(standardize, bool, "standardize", "True or False")
    if max_parameters is not None:
        check_count(max_parameters, "max_parameters")
    classes = data.num_classes
    if classes is None and (labeled or model == "classifier"):
        raise ValueError(f"{data.name} has no labels, so no classifier can be built for it")
    if classes == 1 and (labeled or model == "classifier"):
        raise ValueError(
            f"{data.name} has labels of one class, so there is nothing to classify: pass labels of at least two "
            "classes, or build a model of x without labeled=True"
        )
    if len(data.event_shape) == 2:
        warn(
            f"{data.name} has event_shape {tuple(data.event_shape)}, which is treated as a vector of features: if it "
            "holds images, pass them as (N, 1, H, W), x.unsqueeze(1)"
        )
    given = data.given
    if given is not None and (labeled or model == "classifier"):
        raise ValueError(
            f"{data.name} has both labels and a given, but a classifier conditions on the label alone: leave one out"
        )
    units = units_of(_with_nan(data), "x") if standardize and data.levels is None else None
    given_units = units_of(given, "given") if standardize and given is not None else None
    if model == "classifier" and labeled:
        raise ValueError("'classifier' is discriminative: labeled=True needs a generative model")
    reads = {"num_classes": classes} if labeled else {} if given is None else {"given_shape": given.shape[1:]}

    def made(model: str = model, swaps: dict[str, Any] = swaps, columns: Any = columns) -> _MadeProgram:
        return _make_program(model, data, reads, swaps, columns, units)

    if max_parameters is not None and (size := _num_parameters(made)) > max_parameters:
        others = {other: partial(made, other, {}, None) for other in MODELS if other not in (model, "classifier")}
        raise TooLargeError(model, data, size, max_parameters, _sizes_that_fit(others, max_parameters))
    program, units, labels = made()
    if units is not None or given_units is not None:
        (shift, scale), (given_shift, given_scale) = units or (None, None), given_units or (None, None)
        program = Standardized(program, shift, scale, given_shift=given_shift, given_scale=given_scale)
    return Labeled(Categorical((), classes, learned=True), program, labels) if labeled and classes else program


class TooLargeError(ValueError):
    """A model would have more parameters than the ``max_parameters`` of `build`.

    Attributes:
        num_parameters: its number of parameters.
    """

    def __init__(self, name: str, data: Data, num_parameters: int, largest: int, fitting: Mapping[str, int]):
        self.num_parameters = num_parameters
        fit = ", ".join(f"{other} ({size:,})" for other, size in fitting.items())
        super().__init__(
            f"{name!r} would have {num_parameters:,} parameters for {data.name}, x of shape {tuple(data.event_shape)}, "
            f"but max_parameters is {largest:,}. These fit: {fit or 'none'}. Or pass max_parameters=None"
        )


class _WithoutMemory(TorchFunctionMode):
    """Makes the weights of layers, which torch allocates by `torch.empty`, on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("dtype") is None:  # not for indices
            kwargs = {**kwargs, "device": "meta"}
        # An operation in a constructor may mix weights with other tensors: its result has no numbers either.
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if len({tensor.is_meta for tensor in tensors}) == 2:
            args, kwargs = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
        return func(*args, **kwargs)


# A program in its own units, these units, and q(y | x) where a label has to be inferred.
_MadeProgram = tuple[Program, Units | None, Categorical | None]


def option_names() -> list[str]:
    """Names of the options of `build`."""
    return [name for name in inspect.signature(build).parameters if name not in ("model", "data")]


def _num_parameters(make: Callable[[], _MadeProgram]) -> int:
    """Number of parameters of what ``make`` makes, without allocating them or drawing random numbers."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), _WithoutMemory():
        warnings.simplefilter("ignore")
        program, _, labels = make()
    return sum(p.numel() for part in (program, labels) if part is not None for p in part.parameters())


def _sizes_that_fit(makes: Mapping[str, Callable[[], _MadeProgram]], largest: int) -> dict[str, int]:
    """Number of parameters of each of ``makes`` that can be made and has at most ``largest``."""
    sizes = {}
    for name, make in makes.items():
        with contextlib.suppress(ValueError):
            sizes[name] = _num_parameters(make)
    return {name: size for name, size in sizes.items() if size <= largest}


def _make_program(
    name: str,
    data: Data,
    reads: Reads,
    swaps: dict[str, Any],
    columns: Mapping[str, Any] | None,
    units: Units | None,
) -> _MadeProgram:
    """The program of `build`, from arguments that fit each other."""
    if name == "classifier":
        return classifier(data, units), None, None
    labels = "num_classes" in reads
    if columns is not None:
        program, left = _columns_model(name, data, reads, columns, swaps), None
    elif units is not None and _in_own_units(swaps.get("likelihood")):
        reading = lambda make: Standardize(*units, make(data.event_shape))  # noqa: E731
        program, left = MODELS[name][0](data, reads, reading=reading, **swaps), None
    else:
        program, left = MODELS[name][0](data if units is None else _standardized(data, units), reads, **swaps), units
    if reads and (not program.conditional or (isinstance(program, VAE) and not _generates_from_given(program))):
        raise ValueError(
            f"neither the prior nor the likelihood reads the {'label' if labels else 'given'}: use "
            "likelihood='independent', or pass parts of your own"
        )
    return program, left, _labels_of(data, left) if labels and not program.tractable else None


def _generates_from_given(vae: VAE) -> bool:
    """Whether p(x | given) of a VAE depends on ``given``; reading it in the encoder alone does not count."""
    return vae.prior.conditional or is_pair(vae.likelihood.given_shape)


def _columns_model(model: str, data: Data, reads: Reads, columns: Mapping[str, Any], swaps: dict[str, Any]) -> Program:
    """The model of the name ``model``, for columns of mixed kinds."""
    if model not in COLUMN_MODELS:
        raise ValueError(
            f"columns are for the models {', '.join(COLUMN_MODELS)}, not for {model!r}: choose one of these, or leave "
            "out columns (--kinds) and use numeric columns alone"
        )
    if "likelihood" in swaps:
        raise ValueError("columns is a likelihood too: leave out columns or likelihood")
    if data.levels is not None or tuple(data.event_shape) != (len(columns),):
        raise ValueError(f"columns has {len(columns)} kinds, but data is {data!r}: pass reals, (N, {len(columns)})")
    x = _with_nan(data)
    shift, scale = units_of(x)
    table = Columns(columns, shift=shift, scale=scale)
    amount = torch.tensor([i in table.amounts for i in range(len(columns))])
    reader = partial(ColumnReader, table.categories, table.amounts, *units_of(torch.where(amount, x.log1p(), x)))

    def likelihood(network: Callable[[int], nn.Module]) -> Columns:
        """The columns given z, with a network from its number of parameters per column."""
        return Columns(columns, lambda size: network(size // len(columns)), shift=shift, scale=scale)

    if model == "made":
        return Autoregressive(likelihood(lambda p: ColumnMADE(reader(), p, (256, 256, 256), residual=True, **reads)))
    if model == "any-order":
        inputs = reader().out_features + len(columns)
        network = lambda p: MLP((inputs,), p * len(columns), (256, 256, 256), **reads)  # noqa: E731
        return AnyOrder(likelihood(lambda p: ObservedInput(len(columns), network(p), reader=reader())))
    if model == "vae":
        reading = lambda make: reader(make((reader().out_features,)))  # noqa: E731
        return vae(data, reads, columns=likelihood, reading=reading, **swaps)
    if reads:
        return likelihood(lambda p: _network_of_given(reads, p * len(columns)))
    return Columns(columns, shift=shift, scale=scale, learned=True)


def _with_number(kind: tuple[Any, ...]) -> Any:
    """A kind of `Data` in the form of `Columns`: with the number of its words instead of the words."""
    label, *values = kind
    if label in WITH_WORDS:
        return label, len(values)
    return kind if values else label


def _in_own_units(likelihood: Program | str | None) -> bool:
    """Whether a shift would move x out of the likelihood's support."""
    if not isinstance(likelihood, Program):
        return likelihood in OWN_UNITS
    given = example_given(likelihood)
    support = None if likelihood.conditional and given is None else likelihood.support_given(given)
    return support is not None and line_of(unwrapped(support)) != "real"


# -- units ----------------------------------------------------------------------------------------------------------


def units_of(x: torch.Tensor, argument: str = "x") -> Units:
    """Shift and scale by which `build` standardizes each real feature, or each channel of images.

    They map 99 % of the values to -4 .. 4, because splines act within -5 .. 5. If tails are so heavy that this range is
    more than three times that of a Normal with the same quartiles, the range of the Normal is used. A feature that is
    nearly always the same gets its mean and standard deviation, and a constant feature the scale 1. Large data are
    sampled at even spacing.

    Args:
        x: ``(N, *event_shape)``; NaN for missing values.
        argument: name of x in messages.

    Returns:
        Shift and scale, each of a shape that broadcasts to ``event_shape``.

    Warns:
        UserWarning: a feature is constant, or float32 is too coarse for its offset.
    """
    image = x.dim() == 4
    features = x.shape[1] if image else x[0].numel()
    columns = x.movedim(1, -1) if image else x
    every = max(1, columns.numel() // NUMBERS_FOR_UNITS)
    columns = columns.reshape(-1, features)[::every].double()
    levels = torch.tensor([0.005, 0.25, 0.5, 0.75, 0.995], dtype=columns.dtype)
    low, first, median, third, high = columns.nanquantile(levels, 0)
    center, scale = (low + high) / 2, (high - low) / (2 * REACH)
    normal = (third - first) / 1.349 * 2.576 / REACH  # the scale of a Normal with these quartiles
    heavy = (scale > HEAVY * normal) & (normal > 0)
    shift, scale = torch.where(heavy, median, center), torch.where(heavy, normal, scale)
    mean, rare = columns.nanmean(0), scale <= 0
    shift = torch.where(rare, mean, shift)
    scale = torch.where(rare, (columns - mean).square().nanmean(0).sqrt(), scale)
    constant = ~(scale > 1e-12 * center.abs().clamp_min(1e-12))  # also true if never observed
    shift = shift.nan_to_num()
    coarse = torch.finfo(x.dtype).eps * columns.abs().nan_to_num().amax(0) > COARSE * scale
    for trouble, message in (
        (constant, "is constant, so its density is unbounded: drop it"),
        (
            coarse & ~constant,
            f"is too coarse in {x.dtype} for its distance from 0: pass float64, or subtract an offset",
        ),
    ):
        if trouble.any():
            warn(f"feature {int(trouble.int().argmax())} of {argument} {message}")
    shape = (features, *(1,) * (x.dim() - 2)) if image else x.shape[1:]
    scale = torch.where(constant, 1.0, scale)
    return shift.to(x.dtype).reshape(shape), scale.to(torch.get_default_dtype()).reshape(shape)


def _with_nan(data: Data) -> torch.Tensor:
    """x with NaN where it is missing."""
    return data.x if data.mask is None else data.x.masked_fill(~data.mask, torch.nan)


@dataclass(frozen=True, eq=False, repr=False)
class _SampledData(Data):
    """A sample of the data; ``whole`` is the number of all data."""

    whole: int = field(default=0, kw_only=True)


def _sample_rows(rows: Data, whole: int) -> Data:
    """``rows``, as a sample of ``whole`` data."""
    if len(rows) == whole:
        return rows
    return _SampledData(**{each.name: getattr(rows, each.name) for each in fields(Data)}, whole=whole)


def _num_all_data(data: Data) -> int:
    return data.whole if isinstance(data, _SampledData) else len(data)


def _standardized(data: Data, units: Units) -> Data:
    """A sample of the data in the units of the program within."""
    rows = data[:: max(1, data.x.numel() // NUMBERS_FOR_UNITS)]
    return _sample_rows(rows.replaced(x=Standardize(*units)(rows.x)), _num_all_data(data))
