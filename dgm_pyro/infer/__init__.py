"""Inference on any program: evidence by annealing and sequential Monte Carlo, posterior samples, missing features."""

from dgm_pyro.infer.ais import HMC, Annealed, Sandwich, ais, bidirectional

__all__ = ["HMC", "Annealed", "Sandwich", "ais", "bidirectional"]
