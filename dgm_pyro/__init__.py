"""Deep generative models as probabilistic programs."""

from dgm_pyro import networks, registry
from dgm_pyro.conditionals import Bernoulli, Categorical, DiscretizedLogistic, MixtureOfNormals, Normal, Parametric
from dgm_pyro.program import Conditional, IntractableError, Program
from dgm_pyro.registry import register
from dgm_pyro.vae import VAE
