"""Neural networks: tensors in, tensors out, no Pyro inside."""

from dgm_pyro.networks.denoisers import DenoisingMLP, DenoisingUNet
from dgm_pyro.networks.mlp import MLP, Context

__all__ = ["DenoisingMLP", "DenoisingUNet", "MLP", "Context"]
