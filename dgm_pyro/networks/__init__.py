"""Neural networks: tensors in, tensors out, no Pyro inside."""

from dgm_pyro.networks.denoisers import DenoisingMLP, DenoisingUNet
from dgm_pyro.networks.masked import MADE
from dgm_pyro.networks.mlp import MLP, Context
from dgm_pyro.networks.pixelcnn import PixelCNN

__all__ = ["MADE", "MLP", "Context", "DenoisingMLP", "DenoisingUNet", "PixelCNN"]
