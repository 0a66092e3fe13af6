"""Neural networks: tensors in, tensors out, no Pyro inside."""

from dgm_pyro.networks.attention import CausalTransformer
from dgm_pyro.networks.bijections import (
    ActNorm,
    Affine,
    Bijection,
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
from dgm_pyro.networks.columns import ColumnMADE, ColumnReader
from dgm_pyro.networks.convolutional import ConvDecoder, ConvEncoder
from dgm_pyro.networks.denoisers import DenoisingMLP, DenoisingUNet
from dgm_pyro.networks.masked import MADE
from dgm_pyro.networks.mlp import MLP, InputEmbedding
from dgm_pyro.networks.pixelcnn import PixelCNN
from dgm_pyro.networks.planar import Planar, Sylvester
from dgm_pyro.networks.standardize import Standardize

__all__ = [
    "MADE",
    "MLP",
    "ActNorm",
    "Affine",
    "Bijection",
    "CausalTransformer",
    "ColumnMADE",
    "ColumnReader",
    "ConvDecoder",
    "ConvEncoder",
    "Coupling",
    "DenoisingMLP",
    "DenoisingUNet",
    "Elementwise",
    "InputEmbedding",
    "Inverse",
    "LULinear",
    "MaskedAutoregressive",
    "NormalCDF",
    "Permutation",
    "PixelCNN",
    "Planar",
    "RationalQuadraticSpline",
    "Sigmoid",
    "Standardize",
    "Sylvester",
    "Univariate",
]
