"""Markov chain Monte Carlo: draws from the posterior of a program, by Pyro's own No-U-Turn sampler.

NUTS adapts step size, mass matrix and length of its trajectories, and is the gold standard for a posterior over the
latents of *few data at once*: it walks in the joint space of all their latents, one Python step at a time. For the
evidence, or for many data, use `dgm_pyro.infer.ais`, whose chains run in parallel.

Source: Hoffman and Gelman 2014 (arXiv 1111.4246).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS
from torch import Tensor

from dgm_pyro.checks import check_counts
from dgm_pyro.evaluation import evaluating
from dgm_pyro.infer.posterior import Coordinates, joint_trace, with_latent_chains
from dgm_pyro.program import Program, check_program, differentiating, seeded


def nuts(
    program: Program,
    x: Tensor,
    num_samples: int = 500,
    warmup: int = 300,
    given: Any = None,
    *,
    observed: Mapping[str, Tensor] | None = None,
    max_tree_depth: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Tensor]:
    """Draw from p(latents | x, given) with Pyro's NUTS.

    Costs up to ``2 ** max_tree_depth`` gradients per draw; meant for tens of data with tens of latents.

    Args:
        program: latents continuous; diffusions among them are unrolled.
        x: ``(B, *event_shape)``.
        num_samples: S, draws after the warm-up.
        warmup: draws thrown away while step size and mass matrix are adapted.
        given: ``(B, *given_shape)`` for a conditional program.
        observed: further observed sites, such as labels.
        max_tree_depth: longest trajectory, as a power of two.
        seed: the global random state is left as it was.
        progress: whether to show a bar.

    Returns:
        For each latent site, ``(S, B, *site_shape)``.

    Raises:
        ValueError: a latent is discrete, there is none, or an argument does not fit.
    """
    check_program(program)
    check_counts(num_samples=num_samples, warmup=warmup, max_tree_depth=max_tree_depth)
    program.check(x, given)
    chain = with_latent_chains(program)
    with evaluating(program), seeded(seed, x.device), differentiating("nuts"):
        with torch.no_grad():
            latents = Coordinates(joint_trace(chain, x, given=given, batch=(len(x),), observed=observed), (len(x),))
        # Parameters that require gradients would be differentiated, and registered with Pyro, at every step.
        required = [parameter for parameter in program.parameters() if parameter.requires_grad]
        for parameter in required:
            parameter.requires_grad_(False)
        try:
            kernel = NUTS(poutine.condition(chain.model, data=dict(observed or {})), max_tree_depth=max_tree_depth)
            mcmc = MCMC(kernel, num_samples, warmup_steps=warmup, disable_progbar=not progress)
            mcmc.run(x, given)
        except ValueError as error:
            if "initial params" not in str(error):
                raise
            raise ValueError(
                f"NUTS found no latents of this {type(program).__name__} at which x is possible: "
                "use dgm.infer.ais(..., initial='guide')"
            ) from error
        finally:
            for parameter in required:
                parameter.requires_grad_(True)
    draws = mcmc.get_samples()
    return {name: draws[name] for name in latents.names}
