r"""Uses of posterior draws: ArviZ, predictions of data, and leave-one-out cross-validation.

A model predicts new data :math:`\tilde y`,

.. math::
    p(\tilde y) = \int p(\tilde y \mid z)\, p(z)\, dz, \qquad
    p(\tilde y \mid y) = \int p(\tilde y \mid z)\, p(z \mid y)\, dz,

by its prior and by its posterior. A *predictive check* compares statistics of the data with those of such replicates. A
statistic that few replicates reach shows a feature of the data that the model does not explain.

Leave-one-out cross-validation estimates how well a datum is predicted from all others,

.. math::
    \mathrm{elpd} = \sum_i \log p(y_i \mid y_{-i}),

from the draws of one posterior, by importance weights :math:`1 / p(y_i \mid z)` with smoothed tails. ArviZ computes
it. A k-hat above 0.7 means that datum i changes the posterior too much for this estimate.

Sources: Gelman, Meng and Stern 1996 (Posterior predictive assessment of model fitness); Vehtari, Gelman and Gabry 2017
(arXiv 1507.04544); Gabry et al. 2019 (arXiv 1709.01449), for the workflow.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dgm_pyro.checks import check_choice, check_count, check_seed, check_type
from dgm_pyro.posterior import Posterior, check_posterior
from dgm_pyro.program import seeded
from dgm_pyro.results import Result, Table

__all__ = ["STATISTICS", "Draws", "Loo", "PredictiveCheck", "find_arviz", "predictive_check", "resampled"]

STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda y: y.mean(-1),
    "sd": lambda y: y.std(-1),
    "min": lambda y: y.amin(-1),
    "max": lambda y: y.amax(-1),
}
"""Statistics that `predictive_check` computes from the values of a site, along the last dimension."""

MANY = 0.7


class Draws:
    """Draws of a posterior, in a result; subclasses have ``posterior``, and define `_vectors`.

    Attributes:
        posterior: the `Posterior` that was drawn from; None for a `Program`.
    """

    posterior: Posterior | None

    def _vectors(self, posterior: Posterior) -> Tensor:
        """Unweighted draws of u, ``(C, S, D)``."""
        raise NotImplementedError

    def _statistics(self) -> dict[str, Tensor]:
        """The sampler's statistics of each draw, ``(C, S)``."""
        return {}

    def vectors(self) -> Tensor:
        """Unweighted draws of u, ``(C, S, D)``, with C = 1 without chains.

        Raises:
            ValueError: the draws are those of a `Program`, whose latents have no such vector.
        """
        if self.posterior is None:
            raise ValueError(
                "these are draws of a Program's latents, datum by datum, but this method needs draws of a dgm.Posterior"
            )
        return self._vectors(self.posterior)

    def to_arviz(self, *, num_prior: int = 500, seed: int = 0) -> Any:
        """The draws in ArviZ's form: an InferenceData before its version 1, a DataTree since.

        The groups are posterior, sample_stats, posterior_predictive, log_likelihood, observed_data, and, for a proper
        prior, prior and prior_predictive. A model with discrete latents has no predictions and no pointwise
        likelihood, and a model without data has no observed_data.

        Args:
            num_prior: draws of the prior.
            seed: seed of the predictions and of the prior draws; the global random state does not change.

        Raises:
            ImportError: ArviZ is not installed.
        """
        check_count(num_prior, "num_prior")
        u, posterior = self.vectors(), self.posterior
        assert posterior is not None
        with torch.no_grad():
            groups: dict[str, Any] = {
                "posterior": posterior.constrain(u, deterministic=True),
                "sample_stats": self._statistics(),
                "observed_data": posterior.observed,
            }
            if posterior.observed and not posterior.enumerated:
                groups["posterior_predictive"] = posterior.predict(u, seed)
                groups["log_likelihood"] = posterior.pointwise(u)
            if not posterior.improper:
                start = posterior.prior(num_prior, seed).unsqueeze(0)
                groups["prior"] = posterior.constrain(start, deterministic=True)
                if "log_likelihood" in groups:
                    groups["prior_predictive"] = posterior.predict(start, seed)
        return as_arviz({name: values for name, values in groups.items() if values})

    def loo(self) -> Loo:
        """Leave-one-out cross-validation by smoothed importance weights.

        Raises:
            ValueError: the model has no data, or the data are not independent in a plate.
            ImportError: ArviZ is not installed.
        """
        u, posterior = self.vectors(), self.posterior
        assert posterior is not None
        with torch.no_grad():
            each = [terms.flatten(2) for terms in posterior.pointwise(u).values()]
            terms = torch.cat(each, -1) if each else torch.zeros(*u.shape[:2], 0)
        if terms.shape[-1] < 2:
            raise ValueError(
                "leave-one-out needs data that are independent given the latents: state them in a pyro.plate"
            )
        arviz = find_arviz()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # our table says which k-hats are large
            data = as_arviz({"posterior": {"u": u}, "log_likelihood": {"y": terms}})
            found = arviz.loo(data, pointwise=True)
        values = found.loo_i if hasattr(found, "loo_i") else found.elpd_i  # before version 1 of ArviZ, and since
        effective = found.p_loo if hasattr(found, "p_loo") else found.p
        return Loo(torch.as_tensor(np.array(values)), torch.as_tensor(np.array(found.pareto_k)), float(effective))


def resampled(log_weights: Tensor) -> Tensor:
    """Indices of K draws in proportion to the weights, ``(K,)``, by systematic resampling."""
    total = log_weights.double().softmax(0).cumsum(0)
    places = (torch.arange(len(total), device=total.device) + 0.5) / len(total)
    return torch.searchsorted(total, places).clamp_max(len(total) - 1)


def find_arviz() -> Any:
    """Import ArviZ.

    Raises:
        ImportError: ArviZ is not installed; the message says how to install it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # announces its next version
            import arviz
    except ImportError as error:
        raise ImportError("diagnostics of chains need ArviZ: pip install 'dgm_pyro[arviz]'") from error
    return arviz


def as_arviz(groups: dict[str, dict[str, Tensor]]) -> Any:
    """Groups of tensors ``(chain, draw, ...)`` in ArviZ's form, which its version 1 changed."""
    arviz = find_arviz()
    arrays = {group: {name: value.detach().cpu().numpy() for name, value in values.items()}
              for group, values in groups.items()}  # fmt: skip
    return arviz.from_dict(**arrays) if arviz.__version__.startswith("0.") else arviz.from_dict(arrays)


@dataclass(frozen=True)
class Loo(Result):
    """The result of `Draws.loo`.

    Attributes:
        values: ``log p(y_i | y_-i)`` of each datum, in nats, ``(N,)``.
        k_hats: k-hat of the importance weights of each datum, ``(N,)``.
        effective_parameters: log density of the data under the posterior minus `nats`, in nats.
    """

    values: Tensor
    k_hats: Tensor
    effective_parameters: float

    @property
    def nats(self) -> float:
        """The sum of `values`."""
        return float(self.values.sum())

    @property
    def stderr(self) -> float:
        """Standard error of `nats`."""
        return float((len(self.values) * self.values.var()).sqrt())

    def minus(self, other: Loo) -> tuple[float, float]:
        """The paired difference to another model of the same data, in nats, and its standard error.

        Raises:
            ValueError: ``other`` is of other data.
        """
        check_type(other, Loo, "other", "the result of loo()")
        if len(self.values) != len(other.values):
            raise ValueError(f"other has {len(other.values)} data, but this has {len(self.values)}: use the same data")
        difference = Loo(self.values - other.values, self.k_hats, math.nan)
        return difference.nats, difference.stderr

    def as_dict(self) -> dict[str, Any]:
        """Plain Python, for JSON."""
        return {"nats": self.nats, "stderr": self.stderr, "effective_parameters": self.effective_parameters,
                "num_data": len(self.values), "k_hats_above_0.7": int((self.k_hats > MANY).sum())}  # fmt: skip

    def parts(self) -> list[str | Table]:
        high = int((self.k_hats > MANY).sum())
        told = f"{high} of {len(self.values)} data have a k-hat above {MANY}"
        return [
            f"leave-one-out: {self.nats:.2f} +- {self.stderr:.2f} nats, {self.effective_parameters:.1f} effective "
            "parameters",
            f"{told}: for these, fit the model without the datum" if high else f"{told}: all estimates are reliable",
        ]


@dataclass(frozen=True)
class PredictiveCheck(Result):
    """The result of `predictive_check`.

    Attributes:
        source: "prior" or "posterior".
        observed: the data, by site.
        replicated: predictions of the data, by site, ``(N, *site_shape)``.
    """

    source: str
    observed: dict[str, Tensor]
    replicated: dict[str, Tensor]

    def statistics(self, site: str) -> dict[str, tuple[float, Tensor]]:
        """By name, the statistic of the data and those of the replicates, ``(N,)``."""
        check_choice(site, self.observed, "site")
        y, drawn = self.observed[site].double().flatten(), self.replicated[site].double()
        predicted = drawn.reshape(len(drawn), -1)
        one = {} if len(y) > 1 else {"value": lambda y: y.squeeze(-1)}
        return {name: (float(of(y)), of(predicted)) for name, of in (one or STATISTICS).items()}

    def p_values(self, site: str) -> dict[str, float]:
        """The share of replicates with a larger statistic than the data (half of ties); near 0 or 1 is a misfit."""
        return {name: float((drawn > value).double().mean() + (drawn == value).double().mean() / 2)
                for name, (value, drawn) in self.statistics(site).items()}  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        """Plain Python, for JSON."""
        return {"source": self.source, "p_values": {site: self.p_values(site) for site in self.observed}}

    def parts(self) -> list[str | Table]:
        rows = []
        for site in self.observed:
            p_values = self.p_values(site)
            for name, (value, drawn) in self.statistics(site).items():
                low, high = drawn.quantile(torch.tensor([0.05, 0.95]).to(drawn)).tolist()
                rows.append([f"{name} of {site}", f"{value:.4g}", f"{low:.4g}", f"{high:.4g}", f"{p_values[name]:.2f}"])
        return [Table(["statistic", "data", f"{self.source} 5 %", "95 %", "share above"], rows)]


def predictive_check(
    posterior: Posterior, samples: Any = "prior", *, num_samples: int = 500, seed: int = 0
) -> PredictiveCheck:
    """Compare the data with predictions of the prior or the posterior.

    Args:
        posterior: a model with data.
        samples: "prior"; or draws of the posterior: the result of `nuts`, `psis`, `ais` or `smc`.
        num_samples: number of replicates.
        seed: seed of all draws; the global random state does not change.

    Raises:
        TypeError, ValueError: the model has no data, its prior cannot be drawn, or ``samples`` is neither.

    >>> import torch, pyro, pyro.distributions as dist, dgm_pyro as dgm
    >>> def model(y):
    ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("data", len(y)):
    ...         pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
    >>> found = dgm.infer.predictive_check(dgm.Posterior(model, torch.tensor([0.1, 30.0, -0.3])))
    >>> found.p_values("y")["max"]
    0.0
    """
    check_posterior(posterior)
    check_count(num_samples, "num_samples")
    check_seed(seed)
    if not posterior.observed:
        raise ValueError(f"{posterior!r} observes no data: there is nothing to predict")
    if isinstance(samples, str) and samples == "prior":
        u = posterior.prior(num_samples, seed)
    elif isinstance(samples, Draws):
        u = samples.vectors().flatten(0, 1)
        with seeded(seed, u.device):
            u = u[torch.randint(len(u), (num_samples,), device=u.device)]
    else:
        raise TypeError(
            "samples must be 'prior', or draws of the posterior, the result of dgm.infer.nuts, psis, ais or smc, got "
            f"{samples!r}"
        )
    return PredictiveCheck("prior" if isinstance(samples, str) else "posterior", dict(posterior.observed),
                           posterior.predict(u, seed))  # fmt: skip
