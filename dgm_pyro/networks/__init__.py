"""Neural networks: tensors in, tensors out, no Pyro inside."""

from dgm_pyro.networks.mlp import MLP, Context

__all__ = ["MLP", "Context"]
