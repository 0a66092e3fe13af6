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
# # How good is my posterior?
#
# A model with a latent variable involves three distributions. We want two of them, but cannot compute them:
#
# $$p_\theta(x) = \int p_\theta(x \mid z)\, p(z)\, dz, \qquad
# p_\theta(z \mid x) = \frac{p_\theta(x \mid z)\, p(z)}{p_\theta(x)}.$$
#
# The third is the guide $q(z \mid x)$, which we choose to approximate the posterior $p_\theta(z \mid x)$. One identity
# relates them:
#
# $$\log p_\theta(x) \;=\; \underbrace{E_{q}\big[\log p_\theta(x, z) - \log q(z \mid x)\big]}_{\text{ELBO}}
# \;+\; D_{KL}\big(q(z \mid x) \,\|\, p_\theta(z \mid x)\big).$$
#
# Only the ELBO can be computed. A low ELBO can mean a poor model or a poor guide, and the number alone does not show
# which. This chapter shows how to tell them apart. We first try each method where the truth is known.
#
# | section | question | answered by |
# |---|---|---|
# | 1 | what is $\log p(x)$? | many draws (IWAE), annealing (AIS), a sandwich |
# | 1, 2 | what is $p(z \mid x)$? | a formula, a grid, NUTS, weighted draws |
# | 3 | why is the ELBO low? | the gap, split in two |
# | 4 | are the guide's error bars right? does $z$ carry information? | calibration, active units |
# | 5 | what is $x_\text{missing}$, given the rest of $x$? | imputation |
# | 6 | when can you trust which number? | a table |
#
# You need PyTorch and chapter 00, which explains `pyro.sample`, plates, traces, models, guides and the ELBO.

# %%
import math

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.ops.stats import effective_sample_size, gelman_rubin
from torch import nn

import dgm_pyro as dgm
from chapter import claim, mean_and_error, scaled, style, subplots, theme  # small helpers, in chapter.py beside this
from dgm_pyro import plots
from dgm_pyro.networks import MADE, MLP

pyro.set_rng_seed(0)
style(dpi=110)

# %% [markdown]
# ## 1. A model whose posterior is known
#
# Let everything be Normal and linear. $z$ has two features, $x$ has four:
#
# $$p(z) = N(0, I), \qquad p(x \mid z) = N(W z, \sigma^2 I).$$
#
# Then $p(x) = N(0, W W^\top + \sigma^2 I)$, and the posterior is Normal too, with a precision (the inverse of its
# covariance) that does not depend on $x$:
#
# $$p(z \mid x) = N\big(\Lambda^{-1} W^\top x / \sigma^2,\; \Lambda^{-1}\big), \qquad
# \Lambda = I + W^\top W / \sigma^2.$$
#
# The columns of this $W$ are nearly parallel, so $x$ says much about the sum of $z_1$ and $z_2$ and little about their
# difference. `LinearGaussianPosterior` is this formula as a guide.

# %%
W = torch.tensor([[1.0, 0.9], [0.8, 1.0], [1.2, 0.9], [0.7, 1.1]]).double()
sigma = 0.5
prior = dgm.Normal(2).double()
likelihood = dgm.Normal(4, nn.Linear(2, 4, bias=False), scale_type="shared").double()
with torch.no_grad():
    likelihood.network.weight.copy_(W)
    likelihood.raw_scale.fill_(math.log(math.expm1(sigma)))  # softplus makes it sigma
exact = dgm.VAE(prior, likelihood, dgm.guides.LinearGaussianPosterior(prior, likelihood))
print(exact)
exact.requires_grad_(False)

precision = torch.eye(2).double() + W.T @ W / sigma**2
covariance = precision.inverse()
print("posterior covariance:", covariance.numpy().round(3).tolist())
print(f"posterior correlation of z_1 and z_2: {covariance[0, 1] / covariance.diagonal().prod().sqrt():.2f}")


def log_p(x):
    """log p(x), by the formula."""
    return dist.MultivariateNormal(torch.zeros(4).double(), W @ W.T + sigma**2 * torch.eye(4)).log_prob(x)


# %% [markdown]
# The ELBO is the mean of log importance weights, $\log w = \log p(x, z) - \log q(z \mid x)$ at draws $z$ of the guide.
# In Pyro, `poutine.replay(model, trace)` runs a program with its sites fixed to the values they have in a trace. So one
# draw of the ELBO takes three steps: trace the guide, replay the model on that trace, subtract. `log_weights` does this
# for many draws at a time.

# %%
x = exact.sample(3)
guided = poutine.trace(exact.guide).get_trace(x)
replayed = poutine.trace(poutine.replay(exact.model, guided)).get_trace(x)
print(f"log w, by Pyro:        {replayed.log_prob_sum() - guided.log_prob_sum():.6f} (three data together)")
print(f"log p(x), by formula:  {log_p(x).sum():.6f}")

log_w = exact.log_weights(x, num_particles=1000)
print(f"standard deviation of log w over 1000 draws, each datum: {[f'{s:.0e}' for s in log_w.std(0)]}")
assert (log_w - log_p(x)).abs().max() < 1e-7

# %% [markdown]
# With the exact posterior as guide, $p(x, z) / p(z \mid x) = p(x)$ for every $z$: each single draw *is* the answer, and
# the variance is zero up to rounding. Every problem in this chapter comes from inexact guides.
#
# ### Inexact guides
#
# Let us build some inexact guides. All are mean-field Normals: their features are independent, with standard deviations
# that do not depend on $x$. One `nn.Linear` maps $x$ to means and raw scales.


# %%
def mean_field(scale, mean=1.0, shift=0.0):
    """The VAE with another guide: N(mean * E[z | x] + shift, scale^2)."""
    network = nn.Linear(4, 4)
    with torch.no_grad():
        network.weight.copy_(torch.cat([mean * covariance @ W.T / sigma**2, torch.zeros(2, 4)]))
        network.bias.copy_(torch.cat([torch.ones(2) * shift, torch.as_tensor(scale).expm1().log().expand(2)]))
    return dgm.VAE(prior, likelihood, dgm.Normal(2, network)).double().requires_grad_(False)


narrow, wide = precision.diagonal() ** -0.5, covariance.diagonal() ** 0.5
guides = {
    "best mean-field": mean_field(narrow),
    "true marginals": mean_field(wide),
    "the prior": mean_field(torch.ones(2).double(), mean=0.0),
}
print("standard deviations: best mean-field", narrow.numpy().round(3), "true marginals", wide.numpy().round(3))

# %% [markdown]
# The *best mean-field* guide is the one with the highest ELBO. It has the right mean and the variances $1 /
# \Lambda_{ii}$, which are smaller than the true ones, $(\Lambda^{-1})_{ii}$: $D_{KL}(q \| p)$ penalizes a guide heavily
# for mass where the posterior has none, and only lightly for missing mass of the posterior. The guide with the *true
# marginals* has the right mean and variance of each feature, and lacks only their correlation. The third guide is the
# prior, which ignores $x$.
#
# **IWAE.** The mean of $K$ weights is an unbiased estimate of $p(x)$. So the expectation of its log is a lower bound,
# which rises with $K$:
#
# $$E\Big[\log \frac1K \sum_{k=1}^K w_k\Big] \le \log p(x), \qquad w_k = \frac{p(x, z_k)}{q(z_k \mid x)}, \quad
# z_k \sim q(z \mid x).$$

# %%
x = exact.sample(scaled(400, 50))
truth = log_p(x)
counts = (1, 3, 10, 30, 100, 300, 1000, 3000)[: scaled(8, 4)]
below = {  # log p(x) - IWAE-K and its standard error over the data, for each guide and K
    name: [mean_and_error(truth - dgm.evaluate(vae, x, num_particles=k).values) for k in counts]
    for name, vae in guides.items()
}
print(f"{'log p(x) - IWAE-K':18s}" + "".join(f"{f'K = {k}':>10s}" for k in counts))
for name, row in below.items():
    print(f"{name:18s}" + "".join(f"{gap:10.3f}" for gap, _ in row))
kl = 0.5 * (precision.diagonal().log().sum() - precision.logdet()).item()
print(f"D_KL of the best mean-field guide to the posterior, by formula: {kl:.3f}")
assert abs(below["best mean-field"][0][0] - kl) < 4 * below["best mean-field"][0][1]
assert all(row[-1][0] < row[0][0] for row in below.values())
claim(below["true marginals"][0][0] > 2 and below["true marginals"][-1][0] < below["best mean-field"][-1][0] - 0.05)
claim(below["the prior"][-1][0] < below["best mean-field"][-1][0] - 0.05)

# %%
figure, axes = subplots(width=6.5, height=3.2)
for (name, row), marker in zip(below.items(), "osD", strict=True):
    gap, error = torch.tensor(row).T
    axes.errorbar(counts, -gap, 2 * error, marker=marker, markersize=4, capsize=2, lw=1.4, label=name)
axes.axhline(0, color=theme.ink, lw=1, ls="--", label="log p(x), by formula")
axes.set(xscale="log", ylim=(-4.5, 0.3), xlabel="K, draws of the guide per datum", ylabel="bound - log p(x), in nats")
axes.legend(loc="lower right")
plt.show()

# %% [markdown]
# Bars are two standard errors over the data. At $K = 1$ the bound is the ELBO, and its distance to $\log p(x)$ is
# $D_{KL}(q \| p)$, as the formula says. From there all three rise towards the same number, at very different speeds.
# (The first two points of the prior are below the picture.) The guide with the best ELBO is the *worst* at the end:
# even the prior overtakes it. The best mean-field guide is narrower than the posterior, so now and then a draw falls
# where $q$ is tiny and $p$ is not, and has a huge weight. Until such a draw occurs, the estimate is too low. The
# variance of the weights is finite only if $2 \Lambda - \Lambda_q$ is positive definite, where $\Lambda_q$ is the
# precision of $q$:

# %%
for name, scale in (("best mean-field", narrow), ("true marginals", wide), ("the prior", torch.ones(2).double())):
    smallest = torch.linalg.eigvalsh(2 * precision - (scale**-2).diag())[0]
    print(f"{name:16s} smallest eigenvalue {smallest:6.2f}: {'finite' if smallest > 0 else 'infinite'} variance")

# %% [markdown]
# So **a guide for an ELBO may be narrow; a guide for importance sampling should be wide.**
#
# ### A sandwich: annealing there and back
#
# Importance sampling jumps from $q$ to the posterior at once. *Annealed importance sampling* (AIS) goes in $T$ small
# steps, along densities that lead from the prior to the posterior as a temperature $\beta$ rises from 0 to 1:
#
# $$f_\beta(z) = p(z)\, p(x \mid z)^{\beta}.$$
#
# A chain starts at a draw of the prior. At each step its weight is multiplied by $f_{\beta_t}(z) / f_{\beta_{t-1}}(z)$,
# and then $z$ moves a little, by a transition that leaves $f_{\beta_t}$ invariant (here Hamiltonian Monte Carlo: $z$
# rolls over the landscape $-\log f$, and a Metropolis test corrects for the finite step size). The expected weight is
# $p(x)$ for every $T$, so the expectation of its log is again a *lower* bound.
#
# Run backwards from an exact posterior draw, the same chain gives an *upper* bound. Exact posterior draws are available
# for data that the model itself has generated: draw $z$, then $x$ given $z$; that $z$ is one draw from $p(z \mid x)$.
# The two bounds together are *bidirectional Monte Carlo*. They bound the error of AIS without the truth. Here we know
# the truth, and plot it for comparison.

# %%
temperatures = (2, 6, 20, 60, 200)[: scaled(5, 2)]
sandwich = {
    num: dgm.infer.bidirectional(exact, scaled(200, 20), num_chains=4, num_temperatures=num) for num in temperatures
}
lower, upper = (
    torch.tensor([mean_and_error(getattr(s, side) - log_p(s.x)) for s in sandwich.values()]).T
    for side in ("lower", "upper")
)
for i, num in enumerate(temperatures):
    print(
        f"{num:4d} temperatures: lower {lower[0, i]:7.3f} +- {lower[1, i]:.3f}   upper {upper[0, i]:7.3f} +- {upper[1, i]:.3f}"
        "   nats from log p(x)"
    )
assert (lower[0] < 4 * lower[1]).all()
assert (upper[0] > -4 * upper[1]).all()
claim(upper[0, -1] - lower[0, -1] < 0.4 and upper[0, 0] - lower[0, 0] > 2)

# %%
figure, axes = subplots(width=6.5, height=3.2)
axes.fill_between(temperatures, lower[0], upper[0], color=theme.muted, alpha=0.15, label="the truth is in here")
for (mean, error), name, marker, color in ((lower, "forward: AIS", "o", 0), (upper, "backward", "s", 1)):
    axes.errorbar(
        temperatures,
        mean,
        2 * error,
        marker=marker,
        markersize=4,
        capsize=2,
        lw=1.4,
        label=name,
        color=theme.series[color],
    )
axes.axhline(0, color=theme.ink, lw=1, ls="--", label="log p(x), by formula")
axes.set(xscale="log", xlabel="T, number of temperatures", ylabel="bound - log p(x), in nats")
axes.legend(loc="lower right")
plt.show()

# %% [markdown]
# The sandwich closes as $T$ grows, and the truth lies between the two bounds. On a model without a formula you would
# see the two lines but not the dashed one. Their distance would be your error bar, for data like those that the model
# generates. (For other data there is no upper bound. Use the $T$ at which the sandwich was narrow.)
#
# ### Draws from the posterior: NUTS
#
# *Markov chain Monte Carlo* (MCMC) gives draws from $p(z \mid x)$ and needs no guide. Each step of the chain proposes a
# new $z$ and accepts or rejects it. In the long run the chain visits every region in proportion to $p(z \mid x)$.
# Pyro's `MCMC(kernel, num_samples, warmup_steps)` runs such a chain on any model. The **kernel** makes the steps;
# `NUTS`, the No-U-Turn sampler, is Hamiltonian Monte Carlo that chooses the length of each trajectory by itself. During
# the **warm-up** it adapts its step size; the draws of the warm-up are discarded. `dgm.infer.nuts` has a NUTS of its
# own. It runs four chains from different starts, and evaluates the density for all of them in one call.

# %%
observed = x[:2]
chains = dgm.infer.nuts(exact, observed, num_samples=scaled(400, 10), warmup=scaled(150, 10))
draws = chains["z"]
print("draws of z for two data, from all chains:", tuple(draws.shape))

size = effective_sample_size(chains.samples["z"])  # (chains, draws, ...)
error = draws.std(0) / size.sqrt()
formula = exact.encoder(observed).mean
print("effective number of draws:  ", size.numpy().round(0).tolist())
print("mean of the draws:          ", draws.mean(0).numpy().round(3).tolist())
print("its standard error:         ", error.numpy().round(3).tolist())
print("posterior mean, by formula: ", formula.numpy().round(3).tolist())
claim(((draws.mean(0) - formula).abs() < 4 * error).all())

# %% [markdown]
# Successive draws of a chain are correlated, so 1600 of them usually carry less information than 1600 independent ones.
# The **effective sample size** (`pyro.ops.stats.effective_sample_size`) is the number of independent draws with the
# same standard error. The standard errors above use it.
#
# The pictures show the draws for the first datum, and for each guide the ellipse that contains 90 % of its own draws.

# %%
circle = torch.linspace(0, 2 * math.pi, 200).double()
circle = torch.stack([circle.cos(), circle.sin()], -1)
radius = math.sqrt(-2 * math.log(0.1))  # holds 90 % of a Normal in the plane
shown = {
    "exact posterior": covariance,
    "best mean-field": narrow.square().diag(),
    "true marginals": wide.square().diag(),
}
inside = {}
figure, panels = subplots(1, 3, width=9, height=3.1, sharex=True, sharey=True)
for axes, (name, spread) in zip(panels, shown.items(), strict=True):
    root = torch.linalg.cholesky(spread)
    ellipse = formula[0] + radius * circle @ root.T
    scores = torch.linalg.solve_triangular(root, (draws[:, 0] - formula[0]).T, upper=False)
    inside[name] = (scores.norm(dim=0) < radius).double().mean().item()
    axes.scatter(*draws[:, 0].T, s=5, linewidths=0, color=theme.muted, alpha=0.6)
    axes.plot(*ellipse.T, color=theme.series[1], lw=1.5)
    axes.set(title=f"{name}: {100 * inside[name]:.0f} % inside", xlabel="$z_1$", aspect="equal")
panels[0].set_ylabel("$z_2$")
plt.show()
claim(0.85 < inside["exact posterior"] < 0.95 and inside["best mean-field"] < 0.7)

# %% [markdown]
# The exact ellipse contains about 90 % of the NUTS draws, as it should: NUTS and the formula agree. The best mean-field
# guide is too narrow: its 90 % ellipse contains far fewer. The guide with the true marginals covers most draws, but
# also two corners where there are none.
#
# ## 2. A posterior that is not Normal
#
# Now we take a VAE with a network, on digits of 8x8 binary pixels. Its $z$ has two features, so $p(x)$ is an integral
# over the plane, and a fine grid gives the truth: on a grid, $p(z \mid x)$ is $p(x, z)$ divided by its sum. We train by
# the IWAE bound with 20 draws. It depends less on the guide than the ELBO does, so the model is freer to have
# posteriors that are not Normal.

# %%
pyro.set_rng_seed(1)
train, test = dgm.data.load("digits-binary"), dgm.data.load("digits-binary", "test")
shape = train.event_shape


def train_on(data, program, epochs, objective=None):
    history = dgm.fit(program, data, objective, epochs=scaled(epochs), lr=3e-3, progress=False)
    print(
        f"{len(history.epochs)} epochs, training loss {history.losses[0]:.2f} -> {history.losses[-1]:.2f} nats per datum"
    )


model = dgm.VAE(
    prior=dgm.Normal(2),
    likelihood=dgm.Bernoulli(shape, MLP((2,), 64, hidden=(64, 64))),
    encoder=dgm.Normal(2, MLP(shape, 4, hidden=(64, 64), levels=2)),
)
train_on(train, model, epochs=60, objective="iwae:20")
model = model.requires_grad_(False)  # from here on p is fixed

# %% [markdown]
# We test a mean-field Normal guide, trained by the ELBO for this fixed $p$. Programs can share parts: a new `VAE` of
# the old prior and likelihood and a new encoder *is* the same model with another guide.


# %%
def guided_by(encoder):
    """The same p(x, z), with the guide ``encoder``, trained by the ELBO."""
    vae = dgm.VAE(model.prior, model.likelihood, encoder)
    train_on(train, vae, epochs=60)
    return vae.requires_grad_(False)


vae = guided_by(dgm.Normal(2, MLP(shape, 4, hidden=(64, 64), levels=2)))

side = scaled(201, 101)
line = torch.linspace(-5, 5, side)
grid = torch.cartesian_prod(line, line)
log_area = 2 * math.log(line[1] - line[0])


def log_joint_on_grid(x):
    """log p(x, z) + log of the area of a cell, at every z of the grid: (N, side ** 2)."""
    log_prior, likelihood = vae.prior.log_prob(grid), vae.likelihood(grid)
    return torch.stack([log_prior + likelihood.log_prob(one) + log_area for one in x])


some = test[: scaled(100, 20)]
joint = log_joint_on_grid(some.x)
posterior, log_evidence = joint.softmax(1), joint.logsumexp(1).double()
gap = log_evidence - dgm.evaluate(vae, some, num_samples=scaled(256, 8)).values
print(f"log p(x) by the grid: {log_evidence.mean():.3f} nats per datum")
print(f"log p(x) minus the ELBO: mean {gap.mean():.3f}, median {gap.median():.3f}, largest {gap.max():.3f} nats")
claim(gap.max() > 5 * gap.median())

# %% [markdown]
# The gap is not spread evenly: for most data it is small, for a few it is huge. We compare four ways to draw from
# $p(z \mid x)$:
#
# - the **guide**;
# - the guide, **resampled**: draw $K$ times, and keep one draw with a probability proportional to its weight $w_k$. For
#   $K = 1$ this is the guide, for $K \to \infty$ the posterior (it is also the distribution that IWAE-K implies);
# - **NUTS**, with ten chains;
# - the **end points of AIS** chains, kept in proportion to their weights. The chains start from the prior, or from the
#   guide.
#
# We measure the error of the draws by their *total variation* distance from the truth: count them in squares of side
# 0.5, and take half the sum of the absolute differences from the true shares. It is 0 for equal distributions, and 1
# for two without overlap.
#
# Resampling has a limit that the grid shows. The draw that is kept is one of $K$ draws of the guide, so its density is
# at most $K q(z \mid x)$, whatever the weights are. The mass of the posterior above this density is **missed**:
#
# $$\text{total variation} \;\ge\; \int \max\big(p(z \mid x) - K q(z \mid x),\, 0\big)\, dz.$$
#
# We compute this bound from the shares of the squares. We look at three data: an ordinary one (with the median gap),
# the one with the largest missed mass at $K = 100$, and, among the others, the one whose posterior has the largest
# variance.


# %%
def cell(z):
    """The number of the square of side 0.5 that z lies in."""
    column, row = ((z + 5) / 0.5).floor().long().clamp(0, 19).unbind(-1)
    return 20 * row + column


def shares(mass):
    """The mass in each square, summed over the grid: (N, 400)."""
    return torch.zeros(len(mass), 400).index_add(1, cell(grid), mass)


true_shares = shares(posterior)
guide_shares = shares(torch.stack([vae.encoder(one).log_prob(grid) + log_area for one in some.x]).exp())
missed = {k: (true_shares - k * guide_shares).clamp(min=0).sum(1) for k in (1, 10, 100)}

means = posterior @ grid
spreads = (posterior @ grid.square() - means.square()).sum(1)
spreads[missed[100].argmax()] = 0
chosen = {
    "ordinary": gap.argsort()[len(gap) // 2],
    "missed most": missed[100].argmax(),
    "largest variance": spreads.argmax(),
}
rows = torch.stack(list(chosen.values()))
x, num = some.x[rows], scaled(500, 20)
q = vae.encoder(x)


def resampled(k):
    """One of k draws of the guide, chosen by weight, ``num`` times: (num, 3, 2)."""
    z = q.sample((num, k))
    log_w = vae.prior().log_prob(z) + vae.likelihood(z).log_prob(x) - q.log_prob(z)
    kept = dist.Categorical(logits=log_w.movedim(1, -1)).sample()
    return z.gather(1, kept[:, None, :, None].expand(-1, 1, -1, 2)).squeeze(1)


chains = dgm.infer.nuts(vae, x, num_chains=10, num_samples=scaled(100, 10), warmup=scaled(200, 10)).samples["z"]
annealed = {
    start: dgm.infer.ais(
        vae, x, num_chains=num, num_temperatures=scaled(200, 3), num_leapfrog=scaled(8, 1), initial=start
    )
    for start in ("prior", "guide")
}


def ends(found):
    """The last z of the chains, resampled by their weights: (num, 3, 2)."""
    kept = dist.Categorical(logits=found.log_weights.T).sample((num,))
    return found.latents["z"].gather(0, kept[..., None].expand(-1, -1, 2))


drawn = {
    "guide": q.sample((num,)),
    "K = 10": resampled(10),
    "K = 100": resampled(100),
    "NUTS": chains[:, ::2].flatten(0, 1),  # every second draw: 500 of 1000, as many as of the others
    **{f"AIS from {start}": ends(found) for start, found in annealed.items()},
}

# %%
figure, panels = subplots(3, 8, width=12, height=4.9)
for above, (name, i) in zip(panels, chosen.items(), strict=True):
    above[0].imshow(some.x[i, 0].numpy(), cmap=theme.gray)
    above[0].set(xticks=(), yticks=(), ylabel=f"{name}\n{gap[i]:.2f} nats")
    above[0].grid(False)
    picture = posterior[i].reshape(side, side).T.numpy()
    above[1].imshow(picture, cmap=theme.heat, origin="lower", extent=(-5, 5, -5, 5), interpolation="bilinear")
    for axes in above[1:]:
        axes.set(xlim=(-4, 4), ylim=(-4, 4), aspect="equal", xticks=(-2, 2), yticks=(-2, 2))
        axes.grid(False)
for column, (name, z) in enumerate(drawn.items(), start=2):
    panels[0, column].set_title(name)
    for row in range(3):
        panels[row, column].scatter(*z[:, row].T, s=4, linewidths=0, color=theme.series[0])
panels[0, 0].set_title("x")
panels[0, 1].set_title("p(z | x) on the grid")
for axes in panels[2, 1:]:
    axes.set_xlabel("$z_1$")
for axes in panels[:, 1]:
    axes.set_ylabel("$z_2$")
plt.show()

# %% [markdown]
# Row labels show the gap of each datum in nats. The table lists the total variations. A finite number of draws does not
# reach 0. The first row of the table is for the same number of exact draws from the grid.

# %%
independent = grid[dist.Categorical(probs=posterior[rows]).sample((num,))]
distance = {
    name: 0.5 * (nn.functional.one_hot(cell(z), 400).float().mean(0) - true_shares[rows]).abs().sum(1)
    for name, z in {"exact draws": independent, **drawn}.items()
}
print(f"{'':20s}" + "".join(f"{name:>18s}" for name in chosen))
for name, values in distance.items():
    print(f"{name:20s}" + "".join(f"{value:18.2f}" for value in values))
print("mass that K draws of the guide miss, a lower bound by the grid:")
for k, values in missed.items():
    print(f"{f'K = {k}':20s}" + "".join(f"{value:18.2f}" for value in values[rows]))
print("log p(x) by AIS minus log p(x) by the grid, in nats:")
errors = {start: found.log_evidence.double() - log_evidence[rows] for start, found in annealed.items()}
for start, values in errors.items():
    print(f"{'from ' + start:20s}" + "".join(f"{value:18.2f}" for value in values))
print(f"effective number of the {num} AIS chains, by their weights:")
for start, run in annealed.items():
    effective = 1 / run.log_weights.softmax(0).square().sum(0)
    print(f"{'from ' + start:20s}" + "".join(f"{value:18.0f}" for value in effective))
claim(all((distance["guide" if k == 1 else f"K = {k}"] > values[rows] - 0.05).all() for k, values in missed.items()))
claim(distance["K = 100"][0] < 0.15 and missed[100][rows[1]] > 0.4 and distance["NUTS"][1] > 0.3)
claim((distance["AIS from prior"] < 0.2).all() and errors["prior"].abs().max() < 0.1)
claim(distance["AIS from guide"].max() > 0.25 and errors["guide"].min() < -0.2)

# %% [markdown]
# For the ordinary datum the guide is about right. The posteriors of the other two have two modes each. The guide is one
# round blob beside one of them, and has hardly any mass at the other. **Resampling corrects a guide only where it has
# mass.** By the grid, at least 0.86 and 0.62 of the posterior are missed at $K = 100$. The total variation of the draws
# equals these bounds up to its own error.
#
# AIS started from the guide inherits this weakness. Its chains move, but few of them cross the empty region between the
# modes in 200 steps. For the third datum no chain reaches the left mode. $\log p(x)$ is too low by 0.41 nats, and
# nothing in the run shows this: the effective number of chains is 423 of 500. For the second datum a few chains do
# cross. They have nearly all of the weight, so the effective number of chains is only 11 of 500, and $\log p(x)$ is off
# by 0.29 nats. AIS started from the prior, which covers the plane, has chains in each mode, and their weights give each
# mode its share. Its $\log p(x)$ is within 0.02 nats of the grid for all three data.
#
# NUTS is often called the gold standard. On the ordinary datum it is as good as AIS. But it moves in small steps, so a
# chain hardly ever leaves the mode that it found first. The share of draws in a mode is then the share of chains that
# *started* near it, which does not depend on the mode's mass. For the third datum this share happens to be close to the
# mass. For the second datum it is not: most draws are in the smaller mode.
#
# The remedy is to compare chains from different starts. **R-hat** (`pyro.ops.stats.gelman_rubin`) compares the spread
# of all chains together with the spread within each chain. It is near 1 if the chains agree. Here are the ten chains
# for the second datum:

# %%
second = chains[:, :, 1]
each = second.mean(1)
print("mean of each chain:    ", [[round(v, 2) for v in z] for z in each.tolist()])
print("mean of all chains:    ", [round(v, 2) for v in each.mean(0).tolist()])
print("mean on the grid:      ", [round(v, 2) for v in means[rows[1]].tolist()])
r_hat = gelman_rubin(second)
print("R-hat:                 ", [round(v, 2) for v in r_hat.tolist()])
near = torch.cdist(each, each) < 0.5
agreeing = near[near.sum(1).argmax()]  # the largest group of chains with similar means
r_hat_of_group, mean_of_group = gelman_rubin(second[agreeing]), second[agreeing].mean((0, 1))
print(f"the {agreeing.sum()} chains that agree: mean", [round(v, 2) for v in mean_of_group.tolist()], end=", ")
print("R-hat", [round(v, 3) for v in r_hat_of_group.tolist()])
claim(r_hat.max() > 1.5 and r_hat_of_group.max() < 1.05 and (mean_of_group - means[rows[1]]).norm() > 0.5)

# %% [markdown]
# An R-hat above 1.01 is commonly taken as a warning. Here it is 4 for $z_2$, and the warning is right: eight chains are
# in one mode and two in the other. The last line shows what R-hat cannot detect. If the eight chains that agree were
# all we had, R-hat would be below 1.01, and yet the result would be *wrong*: their mean is in the smaller mode, and the
# mean on the grid is elsewhere. R-hat compares chains with each other. It cannot detect a mode that none of them has
# found.
#
# ## 3. Why is the ELBO low? The gap in two parts
#
# The gap between the ELBO and $\log p(x)$ has two causes. Let $\mathcal{Q}$ be the family of the guide (for example all
# mean-field Normals), and $q_\phi$ the member that the encoder returns for a datum. Then
#
# $$\log p(x) - \mathrm{ELBO}[q_\phi] = \underbrace{\log p(x) - \max_{q \in \mathcal{Q}} \mathrm{ELBO}[q]}_{\text{approximation gap: the family}}
# + \underbrace{\max_{q \in \mathcal{Q}} \mathrm{ELBO}[q] - \mathrm{ELBO}[q_\phi]}_{\text{amortization gap: the encoder}}.$$
#
# An encoder does **amortized** inference: one network for all data, instead of a search for each datum.
# `dgm.infer.gaps` does that search, by gradient ascent on the parameters of $q$ for each datum. We compare three guides
# for one fixed $p$.

# %%
pyro.set_rng_seed(2)
compared = {
    "linear, mean-field": guided_by(dgm.Normal(2, MLP(shape, 4, hidden=(), levels=2))),
    "MLP, mean-field": vae,
    "MLP, full covariance": guided_by(dgm.guides.FullRankNormal(2, MLP(shape, 6, hidden=(64, 64), levels=2))),
}
found, bounds = {}, {}
for name, each in compared.items():
    bounds[name] = dgm.evaluate(each, some, num_particles=scaled(1000, 10)).values
    below = mean_and_error(log_evidence - bounds[name])
    print("{:22s} IWAE-1000 is below log p(x) by {:.3f} +- {:.3f}".format(name, *below))
    found[name] = dgm.infer.gaps(
        each, some.x, log_evidence=log_evidence, gradient_steps=scaled(300, 5), num_samples=scaled(256, 8)
    )
difference, error = mean_and_error(bounds["MLP, mean-field"] - bounds["linear, mean-field"])
print(f"IWAE-1000 of the MLP minus that of the linear guide: {difference:.3f} +- {error:.3f}")
claim(difference > 2 * error)

# %%
for name, each in found.items():
    parts = (mean_and_error(part) for part in (each.total, each.approximation, each.amortization))
    text = [f"{mean:.3f} +- {error:.3f}" for mean, error in parts]
    print(f"{name:22s} gap {text[0]} = approximation {text[1]} + amortization {text[2]}")
linear, mlp, full = found.values()
claim((linear.amortization - mlp.amortization).mean() > 1)
smaller = (full.approximation < mlp.approximation).double().mean()
print(
    f"approximation gap, median: mean-field {mlp.approximation.median():.3f}, full covariance "
    f"{full.approximation.median():.3f}; smaller with full covariance for {100 * smaller:.0f} % of the data"
)
claim(smaller > 0.7)
claim(all(each.amortization.mean() > 2 * each.approximation.mean() for each in found.values()))
plots.gaps(found)

# %% [markdown]
# Black lines are two standard errors. The first two guides have the same family, so their approximation gaps agree up
# to the error of the search; the linear encoder just finds the good members less often. Full covariances make the
# family measurably better, but the family was never the problem: for all three guides, most of the gap comes from the
# encoder. So change the encoder (larger, trained longer or on more data), or improve its answer for each datum
# (`dgm.guides.SemiAmortized`), rather than the family. The ELBO alone could not have shown this.
#
# The first lines of output show a trap. $p$ is the same in all three, but IWAE with 1000 draws of the linear guide is
# lower than with 1000 draws of the others. An estimate of $\log p(x)$ is only as good as its guide, so *do not compare
# two models by bounds from guides of different quality*. (Here `dgm.infer.gaps` is given the $\log p(x)$ of the grid.
# Otherwise it takes the highest of several bounds.)
#
# Which data does the model explain worst, and for which is the guide worst?

# %%
plots.worst_explained(mlp, levels=2)

# %% [markdown]
# These are different questions: the guide can be good for an improbable digit, and bad for a probable one.
#
# ## 4. Are the error bars right, and does z carry information?
#
# ### Simulation-based calibration
#
# So far we judged a guide by the evidence. *Simulation-based calibration* (SBC) tests directly whether $q(z \mid x)$ is
# right. Draw $z$ from the prior and $x$ given $z$. If $q(z \mid x)$ is the posterior, then the true $z$ and draws of
# $q$ come from one distribution, and the **rank** of $z_i$ among $L$ draws of $q$ is uniform on $0, \dots, L$. Repeat
# this a few thousand times and look at the histogram. We try it on the model of section 1, with guides whose errors we
# know.

# %%
pyro.set_rng_seed(3)
suspects = {
    "exact posterior": exact,
    "best mean-field": guides["best mean-field"],
    "shifted by 0.3": mean_field(wide, shift=0.3),
    "twice too wide": mean_field(2 * wide),
    "true marginals": guides["true marginals"],
    "the prior": guides["the prior"],
}
calibrations = {name: dgm.infer.sbc(each, num_samples=2000) for name, each in suspects.items()}
data = exact.sample(scaled(400, 50))
print(f"{'':16s}{'log p(x) - ELBO':>18s}{'p-value of uniform ranks':>28s}")
for name, calibration in calibrations.items():
    missing = (log_p(data) - dgm.evaluate(suspects[name], data, num_samples=scaled(64, 8)).values).mean()
    print(f"{name:16s}{missing:18.3f}{calibration.p_value:28.2g}")
p_values = {name: calibration.p_value for name, calibration in calibrations.items()}
assert all(p_values[name] > 0.01 for name in ("exact posterior", "true marginals", "the prior"))
assert all(p_values[name] < 1e-6 for name in ("best mean-field", "shifted by 0.3", "twice too wide"))

# %%
looks = (
    "flat, and right",
    "a U",
    "a slope",
    "a hump",
    "flat, and wrong",
    "flat, and useless",
)
figure, panels = subplots(2, 3, width=10, height=4.2, sharex=True)
for axes, (name, calibration), look in zip(panels.flat, calibrations.items(), looks, strict=True):
    histogram = calibration.histogram("z")[0]
    expected = histogram.sum().item() / 20
    band = 2.576 * math.sqrt(expected)  # 99 % of the bars of a uniform histogram
    axes.axhspan(expected - band, expected + band, color=theme.rule)
    axes.bar([i + 0.5 for i in range(20)], histogram.numpy(), width=0.9, color=theme.series[0])
    axes.set(title=f"{name}: {look}", xticks=(0, 10, 20), xticklabels=("0", "L / 2", "L"), xlim=(0, 20))
    axes.grid(False)
for axes in panels[1]:
    axes.set_xlabel("rank of the true $z_1$")
panels[0, 0].set_ylabel("simulations")
panels[1, 0].set_ylabel("simulations")
plt.show()

# %% [markdown]
# The first four histograms show what SBC is for: right, too narrow, shifted and too wide each have their own shape. (If
# the guide is too narrow, the true $z$ is often outside all draws. The gray band contains 99 % of the bars of a uniform
# histogram.) The guide with the best mean-field ELBO is *overconfident*.
#
# The last two show what SBC cannot detect. It looks at one feature of $z$ at a time, so a guide with the right
# marginals and no correlation passes (exercise 2 catches it). The prior passes as well: its draws and the true $z$ come
# from one distribution, because neither depends on $x$. **SBC can show that a guide is wrong, but not that it is
# right.** The gap in nats, in the first column of the table, separates these two guides from the exact posterior.
#
# On the digits, `dgm.infer.check` runs SBC and the checks of the next section, and says in words what is wrong:

# %%
report = dgm.infer.check(vae, test)
print(report)
claim(report.calibration.p_value < 1e-4)
plots.calibration(report)

# %% [markdown]
# ### Posterior collapse
#
# A latent feature has **collapsed** if $q(z_i \mid x)$ is the prior for every $x$. It then carries no information about
# $x$. Two numbers show this: its $D_{KL}(q(z_i \mid x) \| p(z_i))$, averaged over the data, is zero; and the mean of
# $q$ does not change with $x$. A feature is called **active** if the variance over the data of $E_q[z_i]$ is above
# 0.01.
#
# We provoke collapse in two ways, with 8 latent features. First, multiplying the KL in the objective by $\beta$ makes
# information in $z$ expensive. Second, a likelihood that is itself autoregressive can explain $x$ without $z$.


# %%
def make(likelihood):
    return dgm.VAE(dgm.Normal(8), likelihood, dgm.Normal(8, MLP(shape, 16, hidden=(64, 64), levels=2)))


def bits():
    """p(x | z) with independent pixels."""
    return dgm.Bernoulli(shape, MLP((8,), 64, hidden=(64, 64)))


def chain():
    """p(x | z) with pixels that depend on z and on all pixels before them."""
    return dgm.Autoregressive(dgm.Bernoulli(shape, MADE(shape, 1, (128, 128), given_shape=(8,), levels=2)))


pyro.set_rng_seed(4)
trained = {"plain": make(bits()), "beta = 6": make(bits()), "strong likelihood": make(chain())}
for name, each in trained.items():
    train_on(train, each, epochs=40, objective="beta:6" if name == "beta = 6" else None)


def summary(name, each):
    """Print bounds on the test data and the use of the latents; return IWAE-64, the ELBO and the units."""
    elbo, iwae = dgm.evaluate(each, test, num_samples=16), dgm.evaluate(each, test, num_particles=64)
    units = dgm.infer.units(each, test)["z"]
    calibrated = dgm.infer.sbc(each, num_samples=1000).p_value
    print(
        f"{name:18s} ELBO {elbo.nats:7.2f}  IWAE-64 {iwae.nats:7.2f}  KL {units.kl.sum():5.2f}  "
        f"above 0.1 nats: {(units.kl > 0.1).sum()}  active: {units.active.sum()}  SBC p = {calibrated:.1g}"
    )
    return iwae.values, elbo.values, units


measured = {name: summary(name, each) for name, each in trained.items()}

# %%
figure, panels = subplots(1, 3, width=10, height=2.5, sharey=True)
for axes, (name, (_, _, units)) in zip(panels, measured.items(), strict=True):
    axes.bar(range(1, 9), units.kl.sort(descending=True).values.numpy(), color=theme.series[0])
    axes.set(title=f"{name}: {units.kl.sum():.2f} nats", xlabel="features of z, sorted", xticks=range(1, 9))
    axes.grid(axis="x", visible=False)
panels[0].set_ylabel("KL, nats")
plt.show()
print(*dgm.infer.check(trained["beta = 6"], test).findings)

claim(measured["beta = 6"][2].kl.sum() < 0.05 and not measured["beta = 6"][2].active.any())
claim(measured["strong likelihood"][2].kl.sum() < 0.6 * measured["plain"][2].kl.sum())
difference, error = mean_and_error(measured["strong likelihood"][0] - measured["plain"][0])
print(f"IWAE-64, strong likelihood minus plain: {difference:.2f} +- {error:.2f}")
claim(difference - 2 * error > 1)

# %% [markdown]
# With $\beta = 6$ all features have collapsed: none is active, and $p(x)$ is nearly a product of independent pixels.
# SBC finds no fault, and rightly so: the posterior of a model that ignores $z$ *is* the prior, and so is the guide.
#
# The strong likelihood is more instructive. Its evidence is *better* than that of the plain VAE, and its $z$ carries
# much less information. As a model of $x$ nothing is wrong with it; as a representation it is poor. **The evidence is
# about $x$; whether $z$ is useful is a separate question.** (The threshold of 0.01 is lenient: it calls features active
# that carry less than a tenth of a nat. Look at the KL of each.)
#
# ## 5. Missing features
#
# Missing features have a posterior too: by the product rule, $p(x_\text{mis} \mid x_\text{obs}) = p(x) /
# p(x_\text{obs})$. `dgm.infer.impute` draws from it, by the method that suits the program:
#
# - an **autoregressive** model whose observed features come first just continues from there, which is exact. Otherwise
#   it draws the missing features in order for many particles. Each observed feature reweights the particles, and
#   resampling drops the poor ones and continues the good ones: *sequential Monte Carlo*;
# - a **VAE** anneals $z$ to $p(z \mid x_\text{obs})$, as in section 1 but with the likelihood of the observed features
#   only, and draws the missing ones given $z$. It does not use the encoder, which was never trained on half an image.
#
# First we check the method. Six bits make 64 possible $x$, so any conditional probability is a finite sum. We observe
# the *last* three bits, which is the hard direction for a chain that starts at the first.

# %%
pyro.set_rng_seed(5)
tiny = dgm.Autoregressive(dgm.Bernoulli(6, MADE(6, 1, hidden=(32,))))
with torch.no_grad():
    for parameter in tiny.parameters():
        parameter.mul_(4)  # an untrained network has all probabilities near 1/2
last = torch.tensor([1.0, 0.0, 1.0])
mask = torch.tensor([False, False, False, True, True, True])
firsts = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
with torch.no_grad():
    by_sum = tiny.log_prob(torch.cat([firsts, last.expand(8, 3)], 1)).softmax(0)

number = 2000
completed = dgm.infer.impute(tiny, torch.cat([torch.zeros(3), last])[None], mask, number, num_particles=50 * number)
by_draws = nn.functional.one_hot((completed[:, 0, :3] @ torch.tensor([4.0, 2, 1])).long(), 8).float().mean(0)
error = (by_sum * (1 - by_sum) / number).sqrt()
print("completion:  ", "   ".join("".join(str(int(bit)) for bit in first) for first in firsts))
print("enumeration: ", " ".join(f"{value:.3f}" for value in by_sum))
print("impute:      ", " ".join(f"{value:.3f}" for value in by_draws))
assert ((by_draws - by_sum).abs() < 4 * error).all()

# %% [markdown]
# The second check uses the VAE of section 2 and the grid. The probability of each missing pixel, given the upper half
# of a digit, is the mean of the pixel's probability over $p(z \mid x_\text{obs})$, which is a sum over the grid.

# %%
upper = torch.zeros(shape, dtype=torch.bool)
upper[:, :4] = True
x = some.x[:20]
pixels = vae.likelihood(grid).base_dist  # one distribution per pixel, at each z of the grid
log_seen = torch.stack([(pixels.log_prob(one.float()) * upper).sum((1, 2, 3)) for one in x]) + vae.prior.log_prob(grid)
by_grid = (log_seen.softmax(1) @ pixels.probs.flatten(1))[:, ~upper.flatten()]
draws = dgm.infer.impute(vae, x, upper, scaled(32, 4), num_temperatures=scaled(100, 3))
by_draws = draws.float().mean(0)[:, ~upper]
difference, expected = (by_draws - by_grid).square().mean().sqrt(), (by_grid * (1 - by_grid) / len(draws)).mean().sqrt()
print(
    f"pixels by impute and by the grid differ by {difference:.3f} (root mean square); exact draws would differ by {expected:.3f}"
)
claim(difference < 1.5 * expected)

# %% [markdown]
# Now we complete the lower half of test digits, with an autoregressive model and with the VAE with 8 latents.

# %%
autoregressive = dgm.Autoregressive(dgm.Bernoulli(shape, MADE(shape, 1, (128, 128), levels=2)))
train_on(train, autoregressive, epochs=40)
completing = {"autoregressive": autoregressive, "VAE": trained["plain"]}
x = test.x[: scaled(100, 8)]
completed = {
    name: dgm.infer.impute(each, x, upper, scaled(16, 3), num_temperatures=scaled(60, 3))
    for name, each in completing.items()
}

# %%
shown = [x[:8].float(), torch.where(upper, x[:8].float(), 0.35)]
labels = ["original", "seen"]
for name, draws in completed.items():
    shown += [*draws[:3, :8].float()]
    labels += [name, "", ""]
plots.images(torch.cat(shown), levels=2, num_columns=8, row_labels=labels)

# %%
frequencies = train.x.float().mean(0)[~upper]
forecasts = {"frequencies": frequencies.expand(len(x), -1)}
forecasts |= {name: draws.float().mean(0)[:, ~upper] for name, draws in completed.items()}
hidden = x[:, ~upper].float()
errors = {name: (forecast - hidden).square().mean(1) for name, forecast in forecasts.items()}
for name, each in errors.items():
    print("{:16s} mean squared error of the missing pixels {:.3f} +- {:.3f}".format(name, *mean_and_error(each)))
for name in completing:
    better, error = mean_and_error(errors["frequencies"] - errors[name])
    print(f"{name}: better than the frequencies by {better:.3f} +- {error:.3f}")
    claim(better > 2 * error)
difference, error = mean_and_error(errors["VAE"] - errors["autoregressive"])
print(f"VAE minus autoregressive: {difference:.3f} +- {error:.3f}")

# %% [markdown]
# Each model has three rows of completions of the lower half. They differ where the upper half leaves a choice. For the
# errors, each model forecasts a missing pixel by its mean over 16 draws. The reference forecasts it by its frequency in
# the training data. Both models are better than the frequencies, and the autoregressive model is the better forecaster
# here. Its missing pixels depend on each other directly. The missing pixels of the VAE are independent given $z$, so
# only 8 features describe how they vary together.
#
# ## 6. When to trust which number
#
# | number | what it is | cost per datum | trust it | what it does not show |
# |---|---|---|---|---|
# | ELBO | lower bound; gap $D_{KL}(q \| p(z \mid x))$ | one draw, averaged | as a training objective; to compare guides of one $p$ | whether model or guide is to blame |
# | IWAE-K | lower bound, rises with $K$ | $K$ draws | if it hardly changes from $K$ to $10 K$, and $q$ is wide | modes that no draw found |
# | AIS-T | lower bound, rises with $T$ | $T$ short trajectories for each chain | if the sandwich at this $T$ is narrow | modes that no chain found |
# | bidirectional | lower *and* upper bound | twice that of AIS | on data that the model made | real data that differ from them |
# | grid | the truth, if the grid is fine and wide enough | exponential in the size of $z$ | for two or three features | |
# | NUTS | draws of $p(z \mid x)$ | about ten gradients per draw in section 1, 256 at most | several chains, R-hat near 1 | modes that no chain found; $\log p(x)$ |
# | gaps | the costs of family and encoder | a search for each datum | if the estimate of $\log p(x)$ is good | whether $p$ is any good |
# | SBC | are the marginals of $q$ right for data of the model? | cheap | when it fails | correlations; a guide that ignores $x$; real data |
# | active units, KL | does $z$ depend on $x$? | cheap | when they are zero | whether $z$ is useful |
#
# Two rules matter more than the table. Every bound errs on one side, so of two *lower* bounds for one $p$ the higher
# one is closer to the truth. Where the truth is out of reach, the best evidence is that two methods with different
# weaknesses agree.
#
# ## 7. Exercises
#
# 1. AIS can start from the guide (`initial="guide"`) instead of from the prior. On the model of section 1, with only 10
#    temperatures, compare three starts: the prior, the best mean-field guide, and the guide with the true marginals.
#    Which gives the highest bound?
# 2. SBC passed the guide with the true marginals. Find a scalar function of $z$ whose ranks reveal the error, and
#    compute them. With `poutine.trace` ten lines are enough.
# 3. Make the VAE with the strong likelihood use its latents again, by training with `"free-bits:6"`: the KL costs
#    nothing below 6 nats. How much does this cost in ELBO, and how much in IWAE-64?
#
# ## What to change next
#
# - **The model.** Train the model of section 2 by the ELBO instead of by IWAE, and compare its approximation gap: does
#   a model learn posteriors that suit its guide?
# - **The guide.** Put `dgm.flow.nsf((2,), given_shape=shape, given_levels=2)`, or `dgm.guides.SemiAmortized`, into
#   `guided_by`, and look at the gaps and the rank histograms again.
# - **The size of $z$.** With 16 latents there is no grid. Do IWAE-1000 and AIS agree? Use `bidirectional` to choose the
#   number of temperatures.
# - **The likelihood's scale.** Make `sigma` in section 1 ten times smaller. What happens to IWAE with the prior as the
#   guide, and to AIS?
# - **The mask.** Show the left half instead of the upper half. The autoregressive model then needs sequential Monte
#   Carlo: compare its draws with the VAE's.
#
# ## Solutions
#
# **1.** Both guides are better starts than the prior, because they are closer to the posterior. The best mean-field
# guide is too narrow, and was the worst for plain importance weights. This does little harm here, because the chains
# move away from where they started.

# %%
data = exact.sample(scaled(200, 20))
starts = {
    "the prior": ("the prior", "prior"),
    "best mean-field": ("best mean-field", "guide"),
    "true marginals": ("true marginals", "guide"),
}
bounds = {}
for name, (guide, initial) in starts.items():
    run = dgm.infer.ais(
        guides[guide], data, num_chains=4, num_temperatures=10, num_leapfrog=scaled(8, 1), initial=initial
    )
    bounds[name] = run.log_evidence - log_p(data)
    print("from {:16s} {:7.3f} +- {:.3f} nats from log p(x)".format(name, *mean_and_error(bounds[name])))
difference, error = mean_and_error(bounds["true marginals"] - bounds["the prior"])
claim(difference > 3 * error)

# %% [markdown]
# **2.** The guide ignores the correlation of $z_1$ and $z_2$, so rank their sum. $x$ determines the sum well. But the
# sum of two independent draws with the true marginals varies too much.


# %%
@torch.no_grad()
def ranks_of_sum(vae, simulations=2000, draws=99):
    """Ranks of z_1 + z_2 of the model among those of the guide: (simulations,)."""
    made = poutine.trace(vae.model).get_trace(simulations)  # z and x together
    x, true = made.nodes["x"]["value"], made.nodes["z"]["value"].sum(-1)
    guesses = [poutine.trace(vae.guide).get_trace(x).nodes["z"]["value"].sum(-1) for _ in range(draws)]
    return (torch.stack(guesses) < true).sum(0)


for name in ("exact posterior", "true marginals"):
    counted = torch.bincount(ranks_of_sum(suspects[name]) // 5, minlength=20)
    statistic = ((counted - 100) ** 2 / 100).sum()  # chi-square with 19 degrees of freedom: mean 19, deviation 6.2
    print(f"{name:16s} chi-square {statistic:7.1f}   histogram {counted.tolist()}")
    assert (statistic < 19 + 4 * 6.2) == (name == "exact posterior")

# %% [markdown]
# **3.** The KL is back at about 6 nats, and seven of the eight features carry more than 0.1 nats. The cost is high in
# ELBO and much lower in IWAE-64: the model of $x$ lost little, but the guide fits the posterior less well. SBC shows
# this too.

# %%
pyro.set_rng_seed(6)
freed = make(chain())
train_on(train, freed, epochs=40, objective="free-bits:6")
before, after = measured["strong likelihood"], summary("free bits", freed)
claim(after[2].kl.sum() > 4 and after[2].kl.sum() > 3 * before[2].kl.sum())
losses = [before[i] - after[i] for i in (1, 0)]  # of each datum
for name, loss in zip(("ELBO", "IWAE-64"), losses, strict=True):
    print("{:8s} lower with free bits by {:.2f} +- {:.2f}".format(name, *mean_and_error(loss)))
for smaller, larger in ((0, losses[0]), (losses[1], losses[0])):
    difference, error = mean_and_error(larger - smaller)
    claim(difference > 3 * error)
