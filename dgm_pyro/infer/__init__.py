"""Inference on any program: evidence by annealing and sequential Monte Carlo, posterior samples, missing features."""

from typing import TYPE_CHECKING, Any

from dgm_pyro.guesses import MODULES, absent
from dgm_pyro.infer.ais import HMC, Annealed, Sandwich, ais, bidirectional
from dgm_pyro.infer.checks import Calibration, Checks, Units, check, sbc, units
from dgm_pyro.infer.compare import GuideComparison, GuideRow, compare, train_guide
from dgm_pyro.infer.draws import Draws, Loo, PredictiveCheck, predictive_check
from dgm_pyro.infer.gaps import Gaps, GuideGaps, gaps
from dgm_pyro.infer.impute import hide, impute
from dgm_pyro.infer.mcmc import Chains, nuts
from dgm_pyro.infer.psis import Weighted, psis, smooth
from dgm_pyro.infer.smc import Features, Population, Stepper, Tempered, Times, propagate, smc

__all__ = [
    "HMC",
    "Annealed",
    "Calibration",
    "Chains",
    "Checks",
    "Draws",
    "Features",
    "Gaps",
    "GuideComparison",
    "GuideGaps",
    "GuideRow",
    "Loo",
    "Population",
    "PredictiveCheck",
    "Sandwich",
    "Stepper",
    "Tempered",
    "Times",
    "Units",
    "Weighted",
    "ais",
    "bidirectional",
    "check",
    "compare",
    "gaps",
    "hide",
    "impute",
    "nuts",
    "predictive_check",
    "propagate",
    "psis",
    "sbc",
    "smc",
    "smooth",
    "train_guide",
    "units",
]

if not TYPE_CHECKING:  # a checker of types would take any name for one of ours

    def __getattr__(name: str) -> Any:
        raise absent("dgm_pyro.infer", name, MODULES["infer"].get(name))
