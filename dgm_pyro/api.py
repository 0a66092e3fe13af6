"""The public names, `dgm.*`. `import dgm_pyro` fetches them when the first of them is used."""

from importlib.metadata import version

from dgm_pyro import checkpoint, data, guesses, infer, networks, objectives, registry
from dgm_pyro.catalog import build
from dgm_pyro.checkpoint import CheckpointError, load, save
from dgm_pyro.checks import nearest_name
from dgm_pyro.data import Data
from dgm_pyro.diagnosis import Diagnosis, Finding, doctor
from dgm_pyro.evaluation import Evidence, evaluate
from dgm_pyro.experiments import plots
from dgm_pyro.factors import formula
from dgm_pyro.families import autoregressive, diffusion, flow, guides, hierarchy, implicit, multiscale, priors
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
    Uniform,
    ZeroInflated,
)
from dgm_pyro.families.continuous import ContinuousDiffusion, LogSNR
from dgm_pyro.families.dequantized import Dequantized
from dgm_pyro.families.diffusion import Diffusion, Schedule
from dgm_pyro.families.flow import Flow
from dgm_pyro.families.hierarchy import DeepVAE
from dgm_pyro.families.implicit import Implicit
from dgm_pyro.families.labeled import Discriminative, Labeled
from dgm_pyro.families.onehot import OneHot
from dgm_pyro.families.quantized import Embedded, VectorQuantizer
from dgm_pyro.families.standardized import Standardized
from dgm_pyro.families.vae import VAE
from dgm_pyro.objectives import ELBO, IWAE, RWS, STL, DenoisingLoss, DReG, Enumerate, FreeBits, SemiSupervised, WarmUp
from dgm_pyro.posterior import Posterior
from dgm_pyro.program import Conditional, IntractableError, Program
from dgm_pyro.registry import register
from dgm_pyro.training import adversarial
from dgm_pyro.training.adversarial import Adversarial, KernelScore
from dgm_pyro.training.compilation import CompilationError, compile
from dgm_pyro.training.fit import History, NonFiniteLossError, Training, fit
from dgm_pyro.training.options import TrainingOptions
from dgm_pyro.uses import anomaly, classification, corruptions, quality, representations

__version__ = version("dgm_pyro")

__all__ = [
    "ELBO",
    "IWAE",
    "RWS",
    "STL",
    "VAE",
    "Adversarial",
    "AnyOrder",
    "Autoregressive",
    "Bernoulli",
    "Beta",
    "Categorical",
    "CheckpointError",
    "Columns",
    "CompilationError",
    "Conditional",
    "ContinuousDiffusion",
    "DReG",
    "Data",
    "DeepVAE",
    "DenoisingLoss",
    "Dequantized",
    "Diagnosis",
    "Diffusion",
    "DiscretizedLogistic",
    "Discriminative",
    "Embedded",
    "Enumerate",
    "Evidence",
    "Finding",
    "Flow",
    "FreeBits",
    "History",
    "Implicit",
    "IndependentConditional",
    "IntractableError",
    "KernelScore",
    "Labeled",
    "LogNormal",
    "LogSNR",
    "MixtureOfNormals",
    "NegativeBinomial",
    "NonFiniteLossError",
    "Normal",
    "OneHot",
    "Poisson",
    "Posterior",
    "PredictedLogistic",
    "Program",
    "Schedule",
    "SemiSupervised",
    "Standardized",
    "StudentT",
    "Training",
    "TrainingOptions",
    "Uniform",
    "VectorQuantizer",
    "WarmUp",
    "ZeroInflated",
    "__version__",
    "adversarial",
    "anomaly",
    "autoregressive",
    "build",
    "checkpoint",
    "classification",
    "compile",
    "corruptions",
    "data",
    "diffusion",
    "doctor",
    "evaluate",
    "fit",
    "flow",
    "formula",
    "guides",
    "hierarchy",
    "implicit",
    "infer",
    "load",
    "multiscale",
    "networks",
    "objectives",
    "plots",
    "priors",
    "quality",
    "register",
    "registry",
    "representations",
    "save",
]


def place_of(name: str) -> str:
    """The end of a message about an unknown name: what to use for it, or the public name that is spelled most alike."""
    if name in guesses.PUBLIC:
        return f": use {guesses.PUBLIC[name]}"
    places = {each: f"dgm.{each}" for each in __all__}
    for module in __all__:
        for each in getattr(globals()[module], "__all__", ()):
            places.setdefault(each, f"dgm.{module}.{each}")
    close = nearest_name(name, places, 0.75)
    return "" if close is None else f": did you mean {places[close]}?"
