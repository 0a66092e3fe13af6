"""Neural networks: tensors in, tensors out, no Pyro inside."""

from dgm_pyro.networks.attention import CausalTransformer
from dgm_pyro.networks.bijections import (
    ActNorm,
    Affine,
    Bijection,
    Contraction,
    Coupling,
    Elementwise,
    Inverse,
    LULinear,
    MaskedAutoregressive,
    NormalCDF,
    Permutation,
    RationalQuadraticSpline,
    Sigmoid,
    Univariate,
)
from dgm_pyro.networks.codebook import Codebook
from dgm_pyro.networks.columns import ColumnMADE, ColumnReader
from dgm_pyro.networks.convolutional import ConvDecoder, ConvEncoder, ConvNet
from dgm_pyro.networks.denoisers import DenoisingMLP, DenoisingTransformer, DenoisingUNet
from dgm_pyro.networks.embedded import EmbeddedGiven
from dgm_pyro.networks.hierarchy import BottomUp, TopDownStep
from dgm_pyro.networks.masked import MADE
from dgm_pyro.networks.mlp import MLP, InputEmbedding
from dgm_pyro.networks.multiscale import LogisticMixture, Partial, PerPixel, Squeeze
from dgm_pyro.networks.observed import ObservedInput
from dgm_pyro.networks.pixelcnn import PixelCNN
from dgm_pyro.networks.planar import Planar, Sylvester
from dgm_pyro.networks.standardize import Standardize

__all__ = [
    "MADE",
    "MLP",
    "ActNorm",
    "Affine",
    "Bijection",
    "BottomUp",
    "CausalTransformer",
    "Codebook",
    "ColumnMADE",
    "ColumnReader",
    "Contraction",
    "ConvDecoder",
    "ConvEncoder",
    "ConvNet",
    "Coupling",
    "DenoisingMLP",
    "DenoisingTransformer",
    "DenoisingUNet",
    "Elementwise",
    "EmbeddedGiven",
    "InputEmbedding",
    "Inverse",
    "LULinear",
    "LogisticMixture",
    "MaskedAutoregressive",
    "NormalCDF",
    "ObservedInput",
    "Partial",
    "PerPixel",
    "Permutation",
    "PixelCNN",
    "Planar",
    "RationalQuadraticSpline",
    "Sigmoid",
    "Squeeze",
    "Standardize",
    "Sylvester",
    "TopDownStep",
    "Univariate",
]
