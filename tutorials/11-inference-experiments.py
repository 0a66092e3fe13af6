# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Inference experiments
#
# A Pyro model with data has one posterior, and many ways to approximate it. Each method reports numbers. This chapter
# takes one small model that is known to be hard, and explains what each number says:
#
# | section | question | number |
# |---|---|---|
# | 1 | could the prior have made such data? | prior predictive check |
# | 2 | do the chains explore the posterior? | R-hat, ESS, divergences |
# | 3 | which guide is close? | ELBO, $\hat k$, errors of means and sds |
# | 4 | what is $\log p(y)$? | importance weights, annealing there and back |
# | 5 | why is the ELBO low? | approximation and optimization gap |
# | 6 | is the *method* calibrated? | SBC, VSBC, coverage |
# | 7 | does the model predict? | posterior predictive check, leave-one-out |
#
# The example is the eight-schools model (Rubin 1981; Gelman et al., Bayesian Data Analysis): a coaching program was
# tried in eight schools, and each gave an estimate $y_j$ of its effect with a known standard error $\sigma_j$.
#
# $$\mu \sim N(0, 5), \quad \tau \sim C^+(5), \quad \theta_j \sim N(\mu, \tau), \quad y_j \sim N(\theta_j, \sigma_j).$$
#
# You need PyTorch and chapter 00. Chapter 07 asks the same questions of an encoder $q(z \mid x)$, for many data.

# %%
import pyro
import pyro.distributions as dist
import torch
from IPython.display import display

import dgm_pyro as dgm
from chapter import claim, scaled, style  # small helpers, in chapter.py beside this
from dgm_pyro import plots

pyro.set_rng_seed(0)
style(dpi=110)
torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)

y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def centered(y, sigma):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def noncentered(y, sigma):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        raw = pyro.sample("raw", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * raw)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


hard = dgm.Posterior(centered, y, sigma)
posterior = dgm.Posterior(noncentered, y, sigma)
print(hard)
print(posterior)

# %% [markdown]
# The two models state the same distribution of $\mu, \tau, \theta, y$. They differ in the latents: $\theta_j$ in the
# first model, $(\theta_j - \mu) / \tau$ in the second. A `Posterior` maps the latents to the reals, with the Jacobian,
# and puts them side by side in a vector u. All of `dgm.infer` works on it.
#
# ## 1. Could the prior have made such data?
#
# A prior predictive check draws data from the prior and compares statistics. The last column is the share of replicates
# above the data. If it is near 0 or 1, the data are unusual under the model.

# %%
prior = dgm.infer.predictive_check(posterior, num_samples=scaled(1000, 50))
print(prior)
display(plots.predictions(prior, title="The prior and the data"))
claim(all(0.01 < p < 0.99 for p in prior.p_values("y").values()))

# %% [markdown]
# No statistic here is unusual. The half-Cauchy prior of $\tau$ has a heavy tail: some replicates have enormous effects.
#
# ## 2. Do the chains explore the posterior?
#
# In the limit of many draws, NUTS draws exactly from the posterior. *R-hat* compares the chains with each other and
# should be 1. The *effective sample size* (ESS) is the number of independent draws that would be worth as much as the
# dependent draws of the chain. A trajectory *diverges* where the density is too steep for the step size. The chain
# cannot enter such a region, so the draws miss it.

# %%
draws = {"num_samples": scaled(1000, 10), "warmup": scaled(300, 20)}
chains = dgm.infer.nuts(posterior, **draws)
of_hard = dgm.infer.nuts(hard, **draws)
print(chains)
for name, found in {"centered": of_hard, "noncentered": chains}.items():
    ess = float(found.diagnostics()["ess_bulk"]["tau"])
    print(f"{name:12s} {int(found.diverging.sum()):4d} divergences, ESS of tau {ess:.0f}")
display(plots.chains(of_hard, title="Chains of the centered model", most=2))
claim(of_hard.diverging.sum() > chains.diverging.sum())
claim(of_hard.diagnostics()["ess_bulk"]["tau"] < chains.diagnostics()["ess_bulk"]["tau"])

# %% [markdown]
# The centered posterior is a funnel: where $\tau$ is small, all $\theta_j$ are close to $\mu$. No step size fits both
# the neck and the mouth. The other parameterization has no funnel, because its latents are a priori independent. From
# here on, its chains are the reference.
#
# ## 3. Which guide is close?
#
# `dgm.infer.compare` fits guides and compares each with the reference. The fifth guide follows the plate: a Normal for
# $\mu, \tau$, and for each school a Normal given these, whose parameters a small network computes.

# %%
plates = dgm.guides.auto(noncentered, "fullrank", structure="plates")
reference = {name: chains[name] for name in posterior.names}
table = dgm.infer.compare(
    posterior, guides=["meanfield", "fullrank", "realnvp", "nsf", plates], reference=reference,
    gradient_steps=scaled(300, 5), num_samples=scaled(4000, 100), num_temperatures=scaled(60, 4), num_data=scaled(4, 0),
)  # fmt: skip
print(table)
display(plots.k_hats(table, title="k-hat of five guides"))
display(plots.marginals(table, title="Marginals over those of NUTS", most=4))
best = max(row.weighted.elbo for row in table.rows)
claim(table["meanfield"].weighted.elbo < best - 0.1)
claim(table["AutoConditional"].weighted.elbo > table["fullrank"].weighted.elbo)

# %% [markdown]
# The columns mean:
#
# - **ELBO** ranks guides of *one* model: higher is closer, in KL. By itself it does not say how close.
# - **log evidence** should be the same for all guides. If the values differ by more than their errors, some guide
#   misses a part of the posterior.
# - **k-hat** says whether importance weights can repair the guide. It is computed from the tail of the weights, and
#   needs no reference. A low k-hat does not mean that the draws are right *before* they are weighted.
# - **mean error** and **sd ratio** describe the unweighted draws. The mean field's sds are too small, because it cannot
#   represent that $\tau$ and the spread of the effects depend on each other.
# - **Wasserstein** and **MMD** compare the whole sets of draws. The line below the table has their floor, the distance
#   between two halves of the reference.
#
# ## 4. What is log p(y)?
#
# Annealing from the prior gives a lower bound on $\log p(y)$, on average. Annealing back to it gives an upper bound, on
# average, if it starts from exact posterior draws. The draws of NUTS are not exact, so the second number is an
# estimate. Each is the log of a mean of 16 weights, and the heavy tail of $\tau$ makes the reverse estimate noisy, so
# the two may cross by some tenths of a nat. The centered model is the same model, so it has the same evidence, whatever
# its guides report:

# %%
lower, upper = table.sandwich
print(f"noncentered: log p(y) {lower:.2f} by annealing from the prior, {upper:.2f} by annealing back")
for name in ("meanfield", "fullrank"):
    guide = dgm.guides.auto(centered, name)
    dgm.infer.train_guide(hard, guide, gradient_steps=scaled(200, 5))
    found = dgm.infer.psis(hard, guide=guide, num_particles=scaled(4000, 100))
    print(f"centered, {name}: ELBO {found.elbo:.2f}, log evidence {found.log_evidence:.2f}, k-hat {found.k_hat:.2f}")
    claim(found.elbo < lower - 1)
    claim(not found.reliable)

# %% [markdown]
# The ELBOs of the centered model are more than a nat too low, because the guides miss the neck of the funnel. k-hat
# shows this without any reference.
#
# ## 5. Why is the ELBO low?
#
# The distance to $\log p(y)$ has two parts: what the family cannot reach, and what the optimizer has not reached yet.
# `gaps` continues the fit to separate the two.

# %%
guide = dgm.guides.auto(noncentered, "fullrank")
dgm.infer.train_guide(posterior, guide, gradient_steps=scaled(30, 2))
gaps = dgm.infer.gaps(
    posterior, guide=guide, gradient_steps=scaled(150, 3), num_samples=scaled(4000, 100),
    num_temperatures=scaled(50, 4), num_particles=scaled(4000, 100),
)  # fmt: skip
print(gaps)
claim(gaps.optimization[0] > 0)
claim(gaps.approximation[0] > 0)

# %% [markdown]
# ## 6. Is the method calibrated?
#
# The sections above use one data set. *Simulation-based calibration* (SBC) checks the method: draw latents from the
# prior and data from the latents, fit, and rank the true latents among the draws of the fit. For an exact method the
# ranks are uniform. VSBC checks less: whether the ranks are symmetric, that is, whether the guide is centered correctly
# on average. Each simulation is a fit, so this chapter makes only a few; use hundreds for your own model.

# %%
calibration = dgm.infer.sbc(
    posterior, method="meanfield", num_samples=scaled(24, 2), num_posterior_samples=19, bins=4,
    gradient_steps=scaled(50, 2),
)  # fmt: skip
print(calibration)
display(plots.coverage(calibration, title="Coverage of the mean field"))

# %% [markdown]
# With 24 simulations, only large errors are visible: the band is wide, and a p-value that is not small says little. The
# share of intervals that contain the truth has a standard error of about 0.10 at 50 %.
#
# ## 7. Does the model predict?
#
# Posterior predictive checks compare the data with replicates from the posterior. Leave-one-out cross-validation asks
# how well each school is predicted from the seven others. ArviZ computes both; `chains.to_arviz()` has all its groups
# for further plots.

# %%
after = dgm.infer.predictive_check(posterior, chains, num_samples=scaled(1000, 50))
print(after)
loo = chains.loo()
print(loo)
display(plots.predictions(after, title="The posterior and the data"))
claim(all(0.01 < p < 0.99 for p in after.p_values("y").values()))
claim(loo.nats > -40)

# %% [markdown]
# ## What each number tells
#
# | number | needs | is fooled by |
# |---|---|---|
# | R-hat, ESS | several chains | chains that all miss the same part |
# | divergences | NUTS | a density that is flat where it should not be |
# | ELBO | a guide | nothing, but it has no zero: it compares |
# | k-hat | a guide with a density | a mode that no draw has found |
# | annealing there and back | a proper prior, posterior draws | reference draws that are not exact |
# | errors of means and sds | a reference | a reference that is wrong |
# | SBC | a proper prior, many fits | few simulations; data unlike those of the prior |
# | predictive checks, LOO | data that are independent given latents | a wrong guide that predicts well all the same |
#
# ## What to change next
#
# - **The prior.** Put `HalfNormal(5)` on tau. Which numbers change, and does the funnel disappear?
# - **The guide.** Add `covariates={"schools": torch.stack([y, sigma], -1)}` to the guide of section 3: one network for
#   all schools. What happens to the ELBO?
# - **The method.** Calibrate `method="nuts"` in section 6. How many simulations distinguish it from the mean field?
# - **The command line.** `dgm infer schools.py:noncentered --data data.json --guides meanfield,nsf` writes all of this
#   into a folder.
