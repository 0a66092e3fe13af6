"""What every chapter needs besides its subject: checks of what the text says, sizes, and the look of the pictures."""

import os
import traceback

import matplotlib.pyplot as plt

from dgm_pyro import plots
from dgm_pyro.evaluation import standard_error

QUICK = bool(os.environ.get("DGM_QUICK"))  # the tests run the chapters for moments only
theme = plots.THEMES["light"]


def scaled(full, quick=1):
    """The size ``full``, or ``quick`` in a test run."""
    return quick if QUICK else full


def claim(true):
    """Stop if what the text says is not so, and quote it; models trained for moments only are not held to it."""
    if not (true or QUICK):
        (caller, _) = traceback.extract_stack(limit=2)
        raise AssertionError(f"line {caller.lineno} of its cell is not so: {caller.line}")


def mean_and_error(values):
    """The mean, and its standard error."""
    return values.mean().item(), standard_error(values)


def style(dpi=100):
    """Draw from here on with the package's fonts and colors."""
    plt.close(plt.figure())  # from here on a notebook knows how to show a figure that pyplot has not made
    plt.rcParams.update(theme.rc | {"figure.dpi": dpi, "savefig.dpi": dpi, "axes.titlesize": 9.5})


def subplots(rows=1, columns=1, width=11.0, height=2.6, **options):
    """A figure of that size in inches, and its panels."""
    return plt.subplots(rows, columns, figsize=(width, height), layout="constrained", **options)
