"""Preflight checks of a model and a guide, before training."""

from dgm_pyro.diagnosis.findings import Diagnosis, Finding
from dgm_pyro.diagnosis.preflight import CHECKS, doctor
from dgm_pyro.diagnosis.visit import Site, Visit

__all__ = ["CHECKS", "Diagnosis", "Finding", "Site", "Visit", "doctor"]
