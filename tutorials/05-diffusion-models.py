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
# # Diffusion models
#
# A diffusion model is the fourth answer to "how to represent $p(x)$": it destroys the structure of data in many small
# steps, and learns to undo each step. The noisy versions of $x$ are latent variables, so $p(x)$ is again an integral,
# this time over a whole chain:
#
# $$p_\theta(x_0) = \int p(x_T) \prod_{t=1}^{T} p_\theta(x_{t-1} \mid x_t)\; dx_{1:T}.$$
#
# | section | question |
# |---|---|
# | 1 | what does the forward process destroy? |
# | 2 | why *small* steps? |
# | 3 | what does the network learn, and how does the reverse chain run? |
# | 4 | what is the bound, term by term? |
# | 5 | why is $t$ an input? |
# | 6 | how do we sample from one class, and what does guidance do? |
# | 7 | how few steps are enough? |
#
# You need PyTorch and chapter 00. Chapter 04 explains the bound, which this chapter applies to a longer chain.

# %%

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import nn
from torch.distributions import kl_divergence

import dgm_pyro as dgm
from chapter import claim, mean_and_error, scaled, style, subplots, theme  # small helpers, in chapter.py beside this
from dgm_pyro import plots
from dgm_pyro.networks import MLP, DenoisingMLP, DenoisingUNet

pyro.set_rng_seed(0)
style()

# %% [markdown]
# ## 1. Forward: destruction
#
# The forward process adds a little Gaussian noise, again and again. It is a Markov chain without parameters, so nothing
# is learned here. $\beta_t$ is the variance of the noise that step $t$ adds:
#
# $$q(x_t \mid x_{t-1}) = N\big(\sqrt{1 - \beta_t}\, x_{t-1},\; \beta_t I\big).$$
#
# Many such steps equal one step with more noise, because sums of Normals are Normal:
#
# $$q(x_t \mid x_0) = N(\alpha_t x_0,\, \sigma_t^2 I), \qquad \alpha_t^2 = \prod_{s \le t} (1 - \beta_s), \qquad
# \alpha_t^2 + \sigma_t^2 = 1.$$
#
# So we can jump to any time directly. A `Schedule` holds $\alpha_t$ and $\sigma_t$. In this one, the logarithm of the
# signal-to-noise ratio $\alpha_t^2 / \sigma_t^2$ falls linearly from 4 to -5 in $T = 50$ steps.

# %%
moons, unseen = dgm.data.load("moons"), dgm.data.load("moons", "test")
schedule = dgm.diffusion.log_snr(50, highest=4.0, lowest=-5.0)
one_minus_beta = (schedule.alpha[1:] / schedule.alpha[:-1]) ** 2

start = torch.tensor([1.5, -0.5])
x = start.expand(scaled(100_000, 2000), 2)
for t in range(1, 51):  # walk, step by step
    x = one_minus_beta[t - 1].sqrt() * x + (1 - one_minus_beta[t - 1]).sqrt() * torch.randn_like(x)
    if t in (1, 10, 25, 50):
        print(
            f"t = {t:2d}: walked: mean {x[:, 0].mean():6.3f}, deviation {x[:, 0].std():.3f};"
            f"  at once: {schedule.alpha[t] * start[0]:6.3f}, {schedule.sigma[t]:.3f}"
        )
        claim(abs(x[:, 0].mean() - schedule.alpha[t] * start[0]) < 5 * schedule.sigma[t] / len(x) ** 0.5)
        claim(abs(x[:, 0].std() - schedule.sigma[t]) < 0.01)

# %%
times = (0, 5, 15, 25, 35, 50)
figure, panels = subplots(2, 6, height=3.9)
digit = dgm.data.load("digits").x[7, 0] / 8 - 1  # gray levels 0 .. 16 scaled to -1 .. 1
for column, t in zip(panels.T, times, strict=True):
    for y in (0, 1):
        x = unseen.x[unseen.y == y][:600]
        x = schedule.alpha[t] * x + schedule.sigma[t] * torch.randn_like(x)
        column[0].scatter(*x.T.numpy(), s=2, linewidths=0, color=theme.series[y])
    column[0].set(title=f"$x_{{{t}}}$: $\\alpha$ = {schedule.alpha[t]:.2f}", xlim=(-4, 4), ylim=(-4, 4), aspect="equal")
    noisy = schedule.alpha[t] * digit + schedule.sigma[t] * torch.randn(8, 8)
    column[1].imshow(noisy.numpy(), cmap=theme.gray, vmin=-1.5, vmax=1.5)
    column[1].set(xticks=[], yticks=[])
    column[1].grid(False)
panels[0, 0].set_ylabel("points")
panels[1, 0].set_ylabel("a digit")
plt.show()

# %% [markdown]
# At the end almost no information is left: $q(x_T \mid x_0)$ is nearly $N(0, I)$ for every $x_0$.
#
# ## 2. Why small steps?
#
# To undo a step we need $q(x_{t-1} \mid x_t)$. It depends on the distribution of the data and can have any shape. The
# key to diffusion models is that for a *small* step it is close to a Normal, so a network only has to find its mean and
# variance. For data with two values, $x_0 = \pm 1$, Bayes' rule gives it exactly:
#
# $$q(x_{t-1} \mid x_t) \propto q(x_t \mid x_{t-1})\, q(x_{t-1}).$$
#
# We fix $x_t = 0.1$ and its noise level, and vary the size of the step that leads there.

# %%
grid = torch.linspace(-5, 5, 4001, dtype=torch.float64)
step = grid[1] - grid[0]


def alpha_sigma(log_snr):
    log_snr = torch.tensor(log_snr, dtype=torch.float64)
    return log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()


def back_from(x_t, later, size):
    """q(x_{t-1} | x_t) on the grid, for a step of that size in the log signal-to-noise ratio, for data of +-1."""
    (a, s), (b, _) = alpha_sigma(later + size), alpha_sigma(later)
    prior = 0.5 * (dist.Normal(a, s).log_prob(grid).exp() + dist.Normal(-a, s).log_prob(grid).exp())
    ratio = b / a
    posterior = (
        prior * dist.Normal(ratio * grid, (1 - ratio**2).sqrt()).log_prob(torch.tensor(x_t, dtype=torch.float64)).exp()
    )
    return posterior / (posterior.sum() * step)


figure, panels = subplots(1, 4, height=2.6)
lengths, distances = (2, 3, 6, 12, 24, 48), []
for length in lengths:
    p = back_from(0.1, -1.0, 9 / length)  # the logarithm falls by 9 in all
    mean = (grid * p).sum() * step
    deviation = ((grid - mean) ** 2 * p).sum().mul(step).sqrt()
    normal = dist.Normal(mean, deviation).log_prob(grid).exp()
    modes = int(((p[1:-1] > p[:-2]) & (p[1:-1] > p[2:])).sum())
    distances.append((p * (p.clamp_min(1e-300).log() - normal.log())).sum().mul(step).item())
    print(f"{length:2d} steps: modes {modes}, KL from the best Normal {distances[-1]:.2e} nats")
    if length in (2, 6, 24):
        axes = panels[(2, 6, 24).index(length)]
        axes.plot(grid, p, label="$q(x_{t-1} | x_t)$")
        axes.plot(grid, normal, ls="--", color=theme.ink, lw=1, label="best Normal")
        axes.set(title=f"a chain of {length} steps", xlabel="$x_{t-1}$", ylabel="density", xlim=(-2.5, 2.5))
    assert modes == (2 if length <= 6 else 1)
panels[0].set_ylim(0, 1.9)
panels[0].legend(loc="upper right", fontsize=7)
panels[3].loglog(lengths, distances, marker="o", ms=4)
panels[3].set(title="KL from the best Normal", xlabel="steps", ylabel="nats")
panels[3].set_xticks(lengths, [str(length) for length in lengths])
panels[3].minorticks_off()
plt.show()
assert distances == sorted(distances, reverse=True)
assert distances[-1] < 1e-3 * distances[0]

# %% [markdown]
# After a large step there are two answers to "where did this come from?", and the best Normal covers both and the gap
# between them. After a small step there is one. This is why there are many steps, and why $p_\theta(x_{t-1} \mid x_t)$
# can be a Normal.
#
# ## 3. Reverse
#
# If $x_0$ were known, the reverse step would be known too: $q(x_{t-1} \mid x_t, x_0)$ is a Normal with a formula. Since
# $x_0$ is unknown, a network estimates it. The network takes $x_t$ and $t$ and returns $\hat x_\theta(x_t, t)$, which
# is trained to be the mean of $q(x_0 \mid x_t)$. Its input and its output have the size of the data. There is no second
# network, because the guide has no parameters. `print` shows the program as a formula. The guide it shows is the one
# used in training, which draws a few values of $t$ (section 4).

# %%
size = {"hidden": (128, 128, 128), "max_frequency": 30.0}  # the answer changes smoothly with t
diffusion = dgm.Diffusion(2, DenoisingMLP((2,), **size), schedule, subsample=5)
print(diffusion)
recipe = {"epochs": scaled(80), "batch_size": 128, "lr": 3e-3, "ema": 0.99, "progress": False}
dgm.fit(diffusion, moons, **recipe)

figure, panels = subplots(1, 4, height=2.9)
for axes, t in zip(panels[:3], (45, 30, 12), strict=True):
    x_t = schedule.alpha[t] * unseen.x[:120] + schedule.sigma[t] * torch.randn(120, 2)
    with torch.no_grad():
        guess = diffusion.denoise(x_t, torch.full((120,), t)).x0
    axes.scatter(*unseen.x[:1000].T.numpy(), s=1, linewidths=0, color=theme.muted, alpha=0.5)
    axes.quiver(
        *x_t.T.numpy(),
        *(guess - x_t).T.numpy(),
        angles="xy",
        scale_units="xy",
        scale=1,
        width=0.004,
        color=theme.series[0],
    )
    axes.scatter(*guess.T.numpy(), s=6, linewidths=0, color=theme.series[1], zorder=3)
    axes.set(title=f"$x_{{{t}}}$ → guess of $x_0$", xlim=(-4, 4), ylim=(-4, 4), aspect="equal", xlabel="feature 1")
with torch.no_grad():
    trace = poutine.trace(diffusion.unroll().model).get_trace(scaled(1000, 50))
path = torch.stack([trace.nodes[f"x_{t}" if t else "x"]["value"] for t in range(50, -1, -1)])
panels[3].plot(path[:, :12, 0].numpy(), path[:, :12, 1].numpy(), lw=0.6)
panels[3].scatter(*path[-1].T.numpy(), s=2, linewidths=0, color=theme.muted)
panels[3].set(title="twelve runs of the chain", xlim=(-4, 4), ylim=(-4, 4), aspect="equal", xlabel="feature 1")
panels[0].set_ylabel("feature 2")
plt.show()

# %% [markdown]
# Lines go from $x_t$ to the guess (orange). With much noise the guess is close to the mean of all data, because $x_t$
# says little about $x_0$. With little noise the guess is mostly on or near the nearest half circle. The chain calls the
# network at every step, with less noise each time, so no single call has to decide. The runs on the right are traces of
# the *unrolled* model, which has a sample site for each step, `x_50`, ..., `x_1`, `x`. Each site is $p_\theta(x_{t-1}
# \mid x_t)$, a Normal:

# %%
names = [name for name, site in trace.nodes.items() if site["type"] == "sample" and name.startswith("x")]
print(len(names), "sites:", ", ".join(names[:3]), "...", ", ".join(names[-2:]))
assert len(names) == 51

# %% [markdown]
# ## 4. The bound, a sum over t
#
# $\log p_\theta(x_0)$ needs an integral over all paths from noise to $x_0$. The bound is the ELBO of a VAE whose
# latents are $x_1, \dots, x_T$ and whose encoder is the forward process. It is a sum with one term per step:
#
# $$\log p_\theta(x_0) \ge E_q\Big[\underbrace{\log p_\theta(x_0 \mid x_1)}_{-L_0} -
# \sum_{t=2}^{T} \underbrace{D_{KL}(q(x_{t-1} \mid x_t, x_0) \,\|\, p_\theta(x_{t-1} \mid x_t))}_{L_{t-1}} -
# \underbrace{D_{KL}(q(x_T \mid x_0) \,\|\, p(x_T))}_{L_T}\Big].$$
#
# The function below computes these terms one by one.


# %%
@torch.no_grad()
def terms_of(program, x0, draws=10):
    """L_0, L_1, .. L_T in nats per datum."""
    x0 = x0.repeat(draws, 1)
    terms = []
    for t in range(1, program.num_steps + 1):
        at = torch.full((len(x0),), t)
        x_t = program.noised(x0, at).sample()  # q(x_t | x_0)
        denoised = program.denoise(x_t, at)
        if t == 1:
            terms.append(-program.likelihood(denoised).log_prob(x0))  # -log p(x_0 | x_1)
        else:
            terms.append(kl_divergence(program.reverse(x_t, at, x0), program.reverse(x_t, at, denoised)))
    terms.append(program.prior_kl(x0))
    return torch.stack([term.mean() for term in terms])


some = unseen.x[: scaled(1000, 50)]
terms = terms_of(diffusion, some)
whole = dgm.evaluate(diffusion, some, num_samples=scaled(100, 2))
print(f"L_0 {terms[0]:.3f}, L_1 + ... + L_{diffusion.num_steps - 1} {terms[1:-1].sum():.3f}, L_T {terms[-1]:.4f}")
print(f"minus their sum {-terms.sum():.3f}, the bound by dgm.evaluate {whole.nats:.3f} nats per datum")
claim(abs(-terms.sum() - whole.nats) < 0.05)
claim(terms[-1] < 0.05)

# %% [markdown]
# The last term has no parameters, and is small because $x_T$ is nearly pure noise. Training does not compute all $T$
# terms: it draws five values of $t$ per datum, and Pyro's plate scales their terms up (chapter 00). $L_0$ can be
# negative, because it is minus the logarithm of a *density*.
#
# How good is this bound? The moons are two half circles with a little noise (chapter 00), so the mean of $q(x_0 \mid
# x_t)$ and $\log p(x_0)$ have formulas. We replace the network by that exact mean. Only the variances, one number for
# each step and feature, are left to learn.


# %%
class Exact(nn.Module):
    """E[x_0 | x_t] for data near points of two half circles, with noise of deviation 0.2."""

    def __init__(self, num=100):
        super().__init__()
        angle = (torch.arange(num) + 0.5) * torch.pi / num
        upper = 2 * torch.stack([angle.cos() - 0.5, angle.sin() - 0.25], -1)
        self.points = torch.cat([upper, -upper])

    def forward(self, x, t):
        at = (t * schedule.num_steps).round().long()
        alpha, variance = schedule.alpha[at, None, None], 0.2**2
        noisy = alpha**2 * variance + schedule.sigma[at, None, None] ** 2
        away = x.unsqueeze(1) - alpha * self.points
        share = (-away.square().sum(-1, keepdim=True) / (2 * noisy)).softmax(1)  # of each point in q(point | x_t)
        return (share * (self.points + alpha * variance / noisy * away)).sum(1)


exact = dgm.Diffusion(2, Exact(), schedule, subsample=5, predict="x0")
dgm.fit(exact, moons, epochs=scaled(10), lr=0.03, progress=False)
best = dgm.evaluate(exact, some, num_samples=scaled(100, 2))
truth = dist.Normal(exact.denoiser.points, 0.2).to_event(1).log_prob(some.unsqueeze(1)).exp().mean(1).log()
print(f"log p by the formula {truth.mean():.3f}, the bound with the exact mean {best.nats:.3f} nats per datum")
steps_cost, network_cost = mean_and_error(truth - best.values), best.minus(whole)
print(f"the 50 steps cost {steps_cost[0]:.3f} +- {steps_cost[1]:.3f} nats,", end=" ")
print(f"the errors of the network {network_cost.nats:.3f} +- {network_cost.stderr:.3f}")
claim(steps_cost[0] > 0 and 0 < network_cost.nats < 0.15)

# %% [markdown]
# The first cost comes from modeling each step as a Normal, and falls with more steps. The second falls with more
# training and wider networks. The second is why the draws in the pictures below differ from the data.
#
# ## 5. t as an input
#
# The network receives $t$. Each noise level is a different task: at $t = 45$ the answer is close to the mean of all
# data, at $t = 5$ it is close to $x_t$ itself. A network without $t$ has to solve all these tasks with one function of
# $x_t$.


# %%
class Blind(nn.Module):
    """The same network, always told t = 0."""

    def __init__(self):
        super().__init__()
        self.network = DenoisingMLP((2,), **size)

    def forward(self, x, t):
        return self.network(x, torch.zeros_like(t))


torch.manual_seed(0)
blind = dgm.Diffusion(2, Blind(), schedule, subsample=5)
dgm.fit(blind, moons, **recipe)
without = terms_of(blind, some)
print(f"bound with t {-terms.sum():.3f}, without t {-without.sum():.3f} nats per datum")
claim(-terms.sum() > -without.sum() + 0.1)
print(f"steps with an extra cost without t: {int((without > terms)[:-1].sum())} of 50")
with torch.no_grad():
    drawn = {"with t": diffusion.sample(scaled(2000, 50)), "without t": blind.sample(scaled(2000, 50))}
figure, panels = subplots(1, 4, height=2.7)
panels[0].plot(range(2, 51), terms[1:-1])
panels[0].set(title="$L_{t-1}$ of section 4", xlabel="t", ylabel="nats", ylim=(0, None))
panels[1].plot(range(1, 51), (without - terms)[:-1], color=theme.series[1])
panels[1].set(title="extra cost without t", xlabel="t", ylabel="nats")
for axes, (name, points) in zip(panels[2:], drawn.items(), strict=True):
    axes.scatter(*points.T.numpy(), s=2, linewidths=0)
    axes.set(title=f"draws: {name}", xlim=(-4, 4), ylim=(-4, 4), aspect="equal", xlabel="feature 1", ylabel="feature 2")
plt.show()

# %% [markdown]
# The first panel shows the cost of each step. Steps at high noise cost almost nothing, because both sides of the KL are
# nearly the same Normal. Steps at low noise, where the details of the data appear, cost most. The second panel shows
# the cost of not knowing $t$, step by step. These costs add up to the difference of the two bounds.
#
# ## 6. Conditional on a class, and guidance
#
# To draw a digit of a given class $y$, feed $y$ to the network as one more input, in training as well as in sampling.
# The network learns to use the class as a hint about what to restore. This gives $p_\theta(x \mid y)$, a program with
# `given`.
#
# Pixels are integers here, 0 to 16. The network predicts the probability of each of the 17 levels, for each pixel.
# Training hides 15 % of the labels, so the same network also learns to work without a label.

# %%
digits, test = dgm.data.load("digits"), dgm.data.load("digits", "test")
shape, levels = digits.event_shape, digits.levels
torch.manual_seed(0)
given_label = dgm.Diffusion(
    shape,
    DenoisingUNet(shape, (32, 64), num_classes=10, num_parameters=levels),
    "log-snr",
    num_steps=50,
    predict="levels",
    levels=levels,
    label_dropout=0.15,
)
labeled = dgm.Labeled(dgm.Categorical((), 10), given_label)  # it passes the labels to given_label
print(labeled)
dgm.fit(labeled, digits, epochs=scaled(30), lr=3e-3, ema=0.99, progress=False)
judge = dgm.Discriminative(dgm.Categorical((), 10, MLP(shape, 10, hidden=(256, 256), levels=levels)))
dgm.fit(judge, digits, epochs=scaled(40), progress=False)
print(f"accuracy of the judging classifier on test digits: {(judge.classify(test.x) == test.y).double().mean():.3f}")


# %%
def bound(x, y, draws):
    """The bound on log p(x | y) per datum, in nats: the mean of log-weights over draws of the chain."""
    with torch.no_grad():
        return given_label.log_weights(x, y, num_particles=draws).mean(0)


x, y = test.x[: scaled(200, 10)], test.y[: scaled(200, 10)]
right, wrong = bound(x, y, scaled(2)), bound(x, (y + 1) % 10, scaled(2))
print(f"bound given the right label {right.mean():.1f}, given a wrong one {wrong.mean():.1f} nats per digit")
claim(right.mean() > wrong.mean() + 5)

# %% [markdown]
# The difference shows how much the label tells the network. When sampling, we can give the label more weight than the
# model does. **Classifier-free guidance** with strength $w$ takes both predictions of the network, with and without the
# label, and extrapolates from the second through the first:
#
# $$(1 + w)\, f(x_t, t, y) - w\, f(x_t, t).$$

# %%
num = scaled(30, 2)
labels = torch.arange(10).repeat_interleave(num)
measured, rows, spreads, ink = {}, {}, {}, {}


def spread_of(classes):
    """Mean distance within each class."""
    return torch.stack([torch.cdist(x, x).sum() / (len(x) * (len(x) - 1)) for x in classes])


for w in (0.0, 1.0, 3.0):
    torch.manual_seed(0)
    drawn = given_label.sample(len(labels), labels, guidance=w)
    rows[f"w = {w:g}"] = drawn[::num], drawn[1::num]
    spreads[w] = spread_of(drawn.flatten(1).float().split(num))
    measured[w] = mean_and_error((judge.classify(drawn.to(torch.uint8)) == labels).double())
    mean, error = measured[w]
    ink[w] = drawn[..., ::7, ::7].float().mean().item()
    print(
        f"w = {w:g}: the classifier recognizes the class in {100 * mean:.1f} +- {100 * error:.1f} %; "
        f"distance within a class {spreads[w].mean():.1f}; ink in the corners {ink[w]:.2f}"
    )
spreads["test"] = spread_of([test.x[test.y == c][:num].flatten(1).float() for c in range(10)])
ink["test"] = test.x[..., ::7, ::7].float().mean().item()
print(f"test digits: distance within a class {spreads['test'].mean():.1f}; ink in the corners {ink['test']:.2f}")
for a, b in ((0.0, "test"), (1.0, 0.0), (3.0, 1.0)):
    mean, error = mean_and_error(spreads[a] - spreads[b])
    print(f"distance within a class, {a} minus {b}: {mean:.1f} +- {error:.1f} over the classes")
claim(measured[1.0][0] > measured[0.0][0])
claim(ink[3.0] > 2 * ink["test"])
claim(spreads[0.0].mean() > spreads[1.0].mean())
picture = torch.cat([part for pair in rows.values() for part in pair])
plots.images(picture, levels=levels, num_columns=10, row_labels=[label for name in rows for label in (name, "")])

# %% [markdown]
# Each $w$ has two draws per class. The first draw of a class starts from the same noise for every $w$, and so does the
# second. With $w = 1$ the draws are more clearly of their class, and more alike: guidance no longer samples from
# $p_\theta(x \mid y)$. With $w = 3$ the classifier recognizes the class as often as with $w = 1$, but the images are no
# better: strokes extend into corners where digits have hardly any ink. Guidance has pushed the predictions outside the
# range of the training data. Without guidance the draws vary slightly less than test digits do.
#
# ## 7. Few steps
#
# A draw costs one network call per step, but a trained network can draw in fewer than $T$ steps. A *sampler* is a rule
# for going from $x_t$ to an earlier $x_s$: `ancestral` is the model itself, `ddim` adds no noise, and `dpm++` also uses
# the previous guess to step more accurately. We measure how far the draws are from test data by the energy distance
# (chapter 01), which is zero for equal distributions. Its estimate is unbiased, so it can fall below zero. For
# reference we also measure fresh data from the same process. All are compared with the same test data, in five parts.
#
# One number does not capture everything. So we also measure what the pictures show: the share of draws farther than 0.6
# from both half circles (three standard deviations of the noise in the data), and the mean distance of the other draws
# from the nearest half circle.


# %%
def energy_distance(x, g):
    n, m = len(x), len(g)
    within = torch.cdist(x, x).sum() / (n * (n - 1)) + torch.cdist(g, g).sum() / (m * (m - 1))
    return 2 * torch.cdist(x, g).mean() - within


def distance_of(points):
    """Energy distance of draws, or of other data, from test data: mean and standard error over five parts of both."""
    parts = zip(unseen.x[: len(points)].chunk(5), points.chunk(5), strict=True)
    return mean_and_error(torch.stack([energy_distance(x, g) for x, g in parts]))


def off_the_curve(points):
    """The share of points farther than 0.6 from both half circles, and the mean distance of the others from the nearest."""
    nearest = torch.cdist(points, exact.denoiser.points).min(1).values
    far = nearest > 0.6
    return far.double().mean().item(), nearest[~far].mean().item()


num = scaled(5000, 100)
counts, found = (3, 5, 10, 20, 50), {"ancestral": [], "ddim": [], "dpm++": []}
for sampler, values in found.items():
    for steps in counts:
        torch.manual_seed(0)
        values.append(distance_of(diffusion.sample(num, sampler=sampler, num_steps=steps)))
    print(
        f"{sampler:10s}",
        "  ".join(
            f"{steps} steps {mean:.4f} +- {error:.4f}" for steps, (mean, error) in zip(counts, values, strict=True)
        ),
    )
fresh = dgm.data.load("moons", num_data=num, seed=1).x
floor = distance_of(fresh)
print(f"fresh data: {floor[0]:.4f} +- {floor[1]:.4f}")

shown, off = {}, {"fresh data": off_the_curve(fresh)}
for sampler, steps in (("ancestral", 5), ("ancestral", 50), ("dpm++", 5), ("dpm++", 10)):
    torch.manual_seed(0)
    points = shown[f"{sampler}, {steps} steps"] = diffusion.sample(num, sampler=sampler, num_steps=steps)
    off[f"{sampler}, {steps} steps"] = off_the_curve(points)
for name, (share, distance) in off.items():
    print(f"{name:20s} farther than 0.6: {100 * share:.1f} %, distance of the others {distance:.3f}")
print(f"standard error of a share of 3 %: {100 * (0.03 * 0.97 / num) ** 0.5:.1f} %")
share, distance = off["fresh data"]
claim(found["dpm++"][2][0] < found["ancestral"][2][0] and found["dpm++"][2][0] < floor[0] + 2 * floor[1])
claim(found["ancestral"][0][0] < found["dpm++"][0][0] < found["ddim"][0][0])
claim(all(off[name][0] > share + 0.01 for name in ("dpm++, 10 steps", "ancestral, 50 steps")))
claim(off["dpm++, 10 steps"][1] < distance - 0.01 and off["ancestral, 50 steps"][1] > distance + 0.01)
figure, panels = subplots(1, 4, height=2.8, gridspec_kw={"width_ratios": (1.4, 1, 1, 1)})
for (sampler, values), marker in zip(found.items(), "os^", strict=True):
    means, errors = zip(*values, strict=True)
    panels[0].errorbar(counts, means, errors, marker=marker, ms=4, label=sampler)
panels[0].axhspan(floor[0] - floor[1], floor[0] + floor[1], color=theme.muted, alpha=0.4, label="fresh data")
panels[0].set(xscale="log", xlabel="steps = network calls", ylabel="energy distance", title="distance from test data")
panels[0].set_xticks(counts, [str(count) for count in counts])
panels[0].minorticks_off()
panels[0].legend()
for axes, name in zip(panels[1:], ("ancestral, 50 steps", "dpm++, 5 steps", "dpm++, 10 steps"), strict=True):
    axes.scatter(*shown[name][:2000].T.numpy(), s=2, linewidths=0)
    axes.set(title=name, xlim=(-4, 4), ylim=(-4, 4), aspect="equal", xlabel="feature 1", ylabel="feature 2")
plt.show()

# %% [markdown]
# By the energy distance, ten steps of `dpm++` are indistinguishable from fresh data. (The estimates are skewed: mostly
# a little below zero, occasionally far above. So their standard error over five parts is rough.) The pictures show
# more. Some draws lie between the half circles, where there are almost no fresh data. Even all fifty steps of the model
# itself do not remove these draws: they come from the errors of the network, the second cost of section 4. The half
# circles of `dpm++` are thinner than in the data, because `dpm++` ends with a guess of $x_0$, which is a mean, and adds
# no noise to it. The half circles of `ancestral` are wider than in the data. With three steps every sampler fails.
# `ancestral` fails least, because it adds noise with the variance of the guess.
#
# ## 8. Exercises
#
# 1. Train a diffusion of 5 steps on the moons, with the same first and last noise level. What happens to the bound, and
#    why?
# 2. The network may predict the clean $x_0$, the noise $\epsilon$ in $x_t = \alpha_t x_0 + \sigma_t \epsilon$, or $v =
#    \alpha_t \epsilon - \sigma_t x_0$. Show that each determines the others. Which one is useless at $t = T$?
# 3. Use the class-conditional diffusion as a classifier, by Bayes' rule: `labeled.classify(x)`. How accurate is it?
#
# ## What to change next
#
# - **The data.** Replace the moons by `"rings"` or `"checkerboard"`. Does a diffusion have the same trouble as a flow?
# - **The schedule.** Try `"cosine"` and `"linear"` in section 4. Which terms become large?
# - **The network.** Replace the U-Net of section 6 by a `DenoisingMLP(shape, num_classes=10, num_parameters=levels)`.
# - **Guidance.** Plot accuracy and variety against $w$, also for $w = 10$ and $w = -1$. What does $w = -1$ draw from?
# - **Continuous time.** `dgm.ContinuousDiffusion(2, network, "learned")` has no $T$ and learns its schedule.
#
# ## Solutions
#
# **1.** The bound is worse. With only five steps, each step is large, so $q(x_{t-1} \mid x_t)$ is no longer close to a
# Normal (section 2), and the KL terms are larger.

# %%
torch.manual_seed(0)
coarse = dgm.Diffusion(2, DenoisingMLP((2,), **size), dgm.diffusion.log_snr(5, highest=4.0, lowest=-5.0))
dgm.fit(coarse, moons, **recipe)
few = terms_of(coarse, some, draws=50)
print(f"bound with T = 5: {-few.sum():.3f}, with T = 50: {-terms.sum():.3f} nats per datum")
claim(-few.sum() < -terms.sum() - 0.02)

# %% [markdown]
# **2.** $x_t$ and $v$ are two linear equations in $x_0$ and $\epsilon$. From $\epsilon$ we get $x_0 = (x_t - \sigma_t
# \epsilon) / \alpha_t$, which divides by $\alpha_T \approx 0$ and so magnifies errors of the prediction. With $v$ there
# is no division.

# %%
x0, noise, t = torch.randn(1000, 2), torch.randn(1000, 2), torch.randint(1, 51, (1000, 1))
alpha, sigma = schedule.alpha[t], schedule.sigma[t]
x_t, v = alpha * x0 + sigma * noise, alpha * noise - sigma * x0
torch.testing.assert_close((x_t - sigma * noise) / alpha, x0, atol=1e-4, rtol=1e-4)
torch.testing.assert_close(alpha * x_t - sigma * v, x0, atol=1e-5, rtol=1e-5)
torch.testing.assert_close(sigma * x_t + alpha * v, noise, atol=1e-5, rtol=1e-5)
factor = schedule.sigma[50] / schedule.alpha[50]
print(
    f"an error of the noise is multiplied by sigma / alpha = {factor:.1f} at t = T, an error of v by sigma = {schedule.sigma[50]:.2f}"
)
assert factor > 10

# %% [markdown]
# **3.** There are ten bounds per digit, one for each label, and the largest wins. The bounds of one digit use the same
# draws of the chain, so much of their noise cancels.

# %%
x, y = test.x[: scaled(100, 5)], test.y[: scaled(100, 5)]
torch.manual_seed(0)
accuracy = (labeled.classify(x) == y).double().mean()
print(f"accuracy: {accuracy:.2f}; the classifier of section 6: {(judge.classify(x) == y).double().mean():.2f}")
claim(accuracy > 0.6)
