"""Deep generative models as probabilistic programs."""

from dgm_pyro import (
    adversarial,
    anomaly,
    checkpoint,
    classification,
    corruptions,
    data,
    guides,
    implicit,
    infer,
    networks,
    objectives,
    priors,
    registry,
    representations,
)
from dgm_pyro.adversarial import Adversarial, KernelScore
from dgm_pyro.autoregressive import Autoregressive
from dgm_pyro.build import build
from dgm_pyro.checkpoint import CheckpointError, load, save
from dgm_pyro.compilation import CompilationError, compile
from dgm_pyro.conditionals import Bernoulli, Categorical, DiscretizedLogistic, MixtureOfNormals, Normal, Parametric
from dgm_pyro.continuous import ContinuousDiffusion, LogSNR
from dgm_pyro.data import Data
from dgm_pyro.diffusion import Diffusion, Schedule
from dgm_pyro.doctor import Diagnosis, Finding, doctor
from dgm_pyro.evaluation import Evidence, evaluate
from dgm_pyro.flow import Dequantized, Flow
from dgm_pyro.implicit import Implicit
from dgm_pyro.labelled import Discriminative, Labelled
from dgm_pyro.objectives import ELBO, IWAE, RWS, STL, DReG, Enumerate, FreeBits, SemiSupervised, WarmUp
from dgm_pyro.onehot import OneHot
from dgm_pyro.program import Conditional, IntractableError, Program
from dgm_pyro.registry import register
from dgm_pyro.training import History, NonFiniteLossError, fit
from dgm_pyro.vae import VAE

__all__ = [
    "ELBO",
    "IWAE",
    "RWS",
    "STL",
    "VAE",
    "Adversarial",
    "Autoregressive",
    "Bernoulli",
    "Categorical",
    "CheckpointError",
    "CompilationError",
    "Conditional",
    "ContinuousDiffusion",
    "DReG",
    "Data",
    "Dequantized",
    "Diagnosis",
    "Diffusion",
    "DiscretizedLogistic",
    "Discriminative",
    "Enumerate",
    "Evidence",
    "Finding",
    "Flow",
    "FreeBits",
    "History",
    "Implicit",
    "IntractableError",
    "KernelScore",
    "Labelled",
    "LogSNR",
    "MixtureOfNormals",
    "NonFiniteLossError",
    "Normal",
    "OneHot",
    "Parametric",
    "Program",
    "Schedule",
    "SemiSupervised",
    "WarmUp",
    "adversarial",
    "anomaly",
    "build",
    "checkpoint",
    "classification",
    "compile",
    "corruptions",
    "data",
    "doctor",
    "evaluate",
    "fit",
    "guides",
    "implicit",
    "infer",
    "load",
    "networks",
    "objectives",
    "priors",
    "register",
    "registry",
    "representations",
    "save",
]
