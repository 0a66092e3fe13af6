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
# # Four ways to represent p(x)
#
# A *generative model* is a joint distribution over random variables, written as the process that generates them. Deep
# generative models parameterize the distributions in it with neural networks. One question remains, and the field is
# organized by its answers: **how do we represent $p(x)$**, so that we can draw from it, evaluate it, and fit it to
# data?
#
# This chapter gives four answers, on the same data, as programs in [Pyro](https://pyro.ai):
#
# | family | $p(x)$ is | density |
# |---|---|---|
# | autoregressive model | a product of conditionals, $\prod_i p(x_i \mid x_{<i})$ | exact |
# | normalizing flow | a change of variables, $p(z)\,\lvert\det \partial z / \partial x\rvert$ | exact |
# | variational autoencoder | an integral over a latent variable, $\int p(x \mid z)\,p(z)\,dz$ | a bound |
# | diffusion model | an integral over a chain, $\int p(x_{0:T})\,dx_{1:T}$ | a bound |
#
# You need PyTorch and a little probability. The chapter explains Pyro's terms where they first appear. Everything runs
# on a laptop CPU in a few minutes.

# %%
import math

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.poutine.util import site_is_subsample
from torch import nn

import dgm_pyro as dgm
from chapter import scaled, style, subplots, theme  # small helpers, in chapter.py beside this
from dgm_pyro import plots
from dgm_pyro.networks import MADE, MLP, Coupling, DenoisingMLP, DenoisingUNet, RationalQuadraticSpline

pyro.set_rng_seed(0)  # of torch, numpy and Python: the same draws in every run
style(dpi=110)

# %% [markdown]
# ## 1. Joint, marginal, conditional
#
# We start from a process that we know completely, so that we can compare every later number with the truth. The process
# makes a point of the plane in three steps: choose one of two half circles, $y \in \{0, 1\}$; choose an angle $a$ on
# it; add Gaussian noise. Here it is as a Pyro program:


# %%
def half_circle(y, a):
    sign = 1 - 2 * y
    return 2 * torch.stack([sign * a.cos() + y - 0.5, sign * a.sin() + y / 2 - 0.25], -1)


def moons(num):
    with pyro.plate("data", num):
        y = pyro.sample("y", dist.Categorical(torch.tensor([0.5, 0.5])))
        a = pyro.sample("a", dist.Uniform(0.0, math.pi))
        return pyro.sample("x", dist.Normal(half_circle(y, a), 0.2).to_event(1))


print(moons(3))

# %% [markdown]
# `pyro.sample(name, distribution)` is a **sample site**, the one statement that all of Pyro is built on. It draws from
# the distribution and returns the value, so the function above is an ordinary sampler. Through the name, other code can
# find the site, and record, fix or replace it. The same function is therefore also the joint distribution
#
# $$p(x, y, a) = p(y)\, p(a)\, p(x \mid y, a).$$
#
# `pyro.plate("data", num)` says that the statements inside it hold for `num` independent data. `.to_event(1)` says that
# the two coordinates of a point are one event with one probability, not two independent data.
#
# `poutine.trace` runs a program and records its sites; the record is called a **trace**. `trace.nodes` has an entry for
# each site, with its `value` and its distribution, `fn`; `compute_log_prob` adds the `log_prob` of the value under the
# distribution, and `log_prob_sum` sums these. In the output below, the independent data are to the left of each bar,
# and the shape of one event is to the right:

# %%
trace = poutine.trace(moons).get_trace(3)
trace.compute_log_prob()
print(trace.format_shapes())
print("log p(x, y, a) of the three data together:", f"{trace.log_prob_sum():.3f} nats")

# %% [markdown]
# `poutine.condition` fixes a site to a value: a draw becomes an **observation**, and the rest of the program runs given
# it. Inside a program, `pyro.sample(name, distribution, obs=value)` does the same. Fixing $y = 1$ gives draws from the
# *conditional* $p(x \mid y = 1)$; ignoring $y$ gives draws from the *marginal* $p(x)$.
#
# For densities, two rules connect the three:
#
# - **product rule**: $p(x, y) = p(x \mid y)\,p(y) = p(y \mid x)\,p(x)$,
# - **sum rule**: $p(x) = \sum_y p(x, y)$, an integral where the variable is continuous.
#
# Here we can remove both variables that are not $x$: $y$ by a sum, and $a$ by an integral over one dimension, which a
# midpoint rule computes to many digits.


# %%
def log_joint(x, num=1000):
    """log p(x, y) for y = 0, 1, with the angle integrated out: (2, N)."""
    a = (torch.arange(num) + 0.5) * math.pi / num
    return torch.stack(
        [
            dist.Normal(half_circle(torch.tensor(y), a), 0.2).to_event(1).log_prob(x.unsqueeze(1)).logsumexp(1)
            - math.log(num)  # the mean over a, because p(a) is uniform
            + math.log(0.5)  # p(y)
            for y in (0, 1)
        ]
    )


def log_p(x):
    """The sum rule: log p(x)."""
    return log_joint(x).logsumexp(0)


here = torch.tensor([[1.0, -1.0]])  # a place that both half circles reach
p_xy, p_x = log_joint(here).exp().squeeze(1), log_p(here).exp().item()
print(f"p(x, y = 0) = {p_xy[0]:.4f}, p(x, y = 1) = {p_xy[1]:.4f}, and their sum p(x) = {p_x:.4f}")
print(f"p(y = 1 | x) = p(x, y = 1) / p(x) = {p_xy[1] / p_x:.3f}")

# %% [markdown]
# We get the same by counting draws, because a trace of many data has $x$ and $y$ together:

# %%
drawn = poutine.trace(moons).get_trace(2_000_000)
x, y = drawn.nodes["x"]["value"], drawn.nodes["y"]["value"]
near = (x - here).norm(dim=-1) < 0.1
print(f"p(x) = {near.float().mean() / (math.pi * 0.1**2):.4f}: draws within 0.1 of x, per area")
print(f"p(y = 1 | x) = {y[near].float().mean():.3f}: share of y = 1 among these {near.sum()}")

# %%
train, test = dgm.data.load("moons"), dgm.data.load("moons", "test")  # the same process: 5000 points each
print(train)

across, up = torch.linspace(-4, 4, scaled(81, 33)), torch.linspace(-3, 3, scaled(61, 25))
grid = torch.cartesian_prod(across, up)
cell = (across[1] - across[0]) * (up[1] - up[0])


def on_plane(axes, title):
    axes.set(title=title, xlim=(-4, 4), ylim=(-3, 3), aspect="equal", xticks=(-3, 0, 3), yticks=(-2, 0, 2))
    axes.grid(False)


def heat(axes, values, title, **options):
    picture = values.detach().reshape(len(across), len(up)).T.numpy()
    options = {"cmap": theme.heat, "origin": "lower", "extent": (-4, 4, -3, 3), "interpolation": "bilinear"} | options
    on_plane(axes, title)
    return axes.imshow(picture, **options)


def points(axes, x, title, **options):
    on_plane(axes, title)
    axes.scatter(*x.detach().T.numpy(), **({"s": 2, "linewidths": 0, "color": theme.series[0]} | options))


figure, panels = subplots(1, 4, height=2.5)
for y in (0, 1):
    points(panels[0], test.x[test.y == y][:1000], "joint: draws of (x, y)", color=theme.series[y], label=f"y = {y}")
panels[0].legend(markerscale=4, loc="lower left", handletextpad=0.1)
joint = log_joint(grid)
heat(panels[1], joint.logsumexp(0).exp(), "marginal p(x)", vmin=0)
heat(panels[2], (joint[1] - math.log(0.5)).exp(), "conditional p(x | y = 1)", vmin=0)
shown = heat(panels[3], joint.softmax(0)[1], "conditional p(y = 1 | x)", cmap="coolwarm", vmin=0, vmax=1)
figure.colorbar(shown, ax=panels[3], shrink=0.8)
plt.show()

# %% [markdown]
# The last panel has a value everywhere, even where there are no data: $p(y \mid x)$ alone cannot say how unusual an $x$
# is. We come back to this in section 9.
#
# We compare models of $x$ by the mean of $\log p(x)$ over test data, in nats per datum; higher is better. On average no
# model can exceed the true process.

# %%
truth = log_p(test.x).double()
print(f"truth: {truth.mean():.3f} +- {truth.std() / len(truth) ** 0.5:.3f} nats per datum")

# %% [markdown]
# ## 2. Models and guides
#
# From now on $p_\theta$ has learned parameters $\theta$, and we use the true process only for comparison. In `dgm_pyro`
# each way to represent $p(x)$ is a `Program`, and every program has two parts, both ordinary Pyro programs:
#
# - `program.model(x)` states $p_\theta(x, \text{latents})$, with $x$ observed;
# - `program.guide(x)` states $q(\text{latents} \mid x)$, a distribution that we *choose* to approximate the posterior
#   of the latents. A program without latents has an empty guide.
#
# Pyro's training is called **SVI**, stochastic variational inference: draw the latents from the guide, run the model on
# the same values, and climb the **ELBO**, the evidence lower bound
#
# $$\log p_\theta(x) \;\ge\; E_{q}\big[\log p_\theta(x, \text{latents}) - \log q(\text{latents} \mid x)\big].$$
#
# Without latents the bound is $\log p_\theta(x)$ itself, and SVI is maximum likelihood. `dgm.fit` is this loop with
# minibatches, validation, and a learning rate that falls.


# %%
def statements(program, x=test.x[:5]):
    """Print the sample sites that model and guide state for the data x."""
    for role in ("model", "guide"):
        trace = poutine.trace(getattr(program, role)).get_trace(x)
        # A plate is on record too, as a site that chose the data: we leave it out.
        sites = [site for site in trace.nodes.values() if site["type"] == "sample" and not site_is_subsample(site)]
        print(f"{role}:", "" if sites else "no sites")
        for site in sites:
            kind = "observed" if site["is_observed"] else "latent"
            if site["infer"].get("_deterministic"):
                kind = "a function of the sites above"
            print(f"  {site['name']:13s} {describe(site['fn']):28s} {tuple(site['value'].shape)!s:11s} {kind}")


def describe(distribution):
    while hasattr(distribution, "base_dist") and not isinstance(distribution, dist.TransformedDistribution):
        distribution = distribution.base_dist
    return type(distribution).__name__.strip("_")


def train_on(data, program, epochs, **options):
    history = dgm.fit(program, data, epochs=scaled(epochs), progress=False, **options)
    parameters = sum(p.numel() for p in program.parameters())
    print(
        f"{parameters} parameters, {len(history.epochs)} epochs, "
        f"training loss {history.losses[0]:.3f} -> {history.losses[-1]:.3f} nats per datum"
    )
    return history


# %% [markdown]
# ## 3. Autoregressive: a product of conditionals
#
# The product rule, applied once per feature, makes no assumption:
#
# $$p_\theta(x) = \prod_{i=1}^{D} p_\theta(x_i \mid x_{<i}), \qquad x_{<i} = (x_1, \dots, x_{i-1}).$$
#
# Each factor is one univariate distribution. Here each is a mixture of ten Normals. One network computes the $3 \times
# 10$ parameters of every feature. It is *masked*, so that the parameters of $x_i$ depend on $x_{<i}$ only.


# %%
def mixtures(**options):
    """p(x_i | x_<i) for i = 1, 2: ten Normals each, from a masked network."""
    network = MADE((2,), 30, hidden=(64, 64), **options)
    with torch.no_grad():  # ten components that start in one place would learn alike: spread their locations
        network.last.bias.view(3, 10, 2)[1] += torch.linspace(-2, 2, 10).unsqueeze(-1)
    return dgm.MixtureOfNormals((2,), 10, network)


autoregressive = dgm.Autoregressive(mixtures())
statements(autoregressive)

# %% [markdown]
# This is the form for training: all features in one site, scored by one pass of the network. `unroll()` gives the chain
# itself, one site per feature, on the same parameters. Both have the same log-probability.

# %%
chain = autoregressive.unroll()
statements(chain)
with torch.no_grad():
    torch.testing.assert_close(autoregressive.log_prob(test.x), chain.log_prob(test.x))

# %% [markdown]
# `print` shows a program as a formula. It reads the factors off the statements; here they are the chain rule.

# %%
print(autoregressive)

# %%
history = train_on(train, autoregressive, epochs=50, batch_size=128, lr=1e-2)

# %% [markdown]
# Because the sites have names, we can look at each trained conditional. Conditioning the chain on $x_1 = c$ and tracing
# it leaves the distribution $p(x_2 \mid x_1 = c)$ at the site `x_2`.


# %%
@torch.no_grad()
def conditional_of_x2(c, x2):
    """p(x_2 | x_1 = c) of the chain at the values x2."""
    fixed = poutine.condition(chain.model, {"x_1": torch.full((len(x2),), c)})
    return poutine.trace(fixed).get_trace(len(x2)).nodes["x_2"]["fn"].log_prob(x2).exp()


@torch.no_grad()
def marginal_of_x1(x1):
    fixed = poutine.condition(chain.model, {"x_1": x1})
    return poutine.trace(fixed).get_trace(len(x1)).nodes["x_1"]["fn"].log_prob(x1).exp()


figure, panels = subplots(1, 4, height=2.6)
both = torch.cat([train.x, test.x])
truth_on_grid = log_p(grid).exp().reshape(len(across), len(up))
bars = {"bins": 40, "density": True, "color": theme.muted, "alpha": 0.3, "label": "data"}
panels[0].hist(both[:, 0], **bars)
panels[0].plot(across, truth_on_grid.sum(1) * (up[1] - up[0]), color=theme.ink, lw=1, ls="--", label="truth")
panels[0].plot(across, marginal_of_x1(across), lw=1.4, label="model")
panels[0].set(title="$p(x_1)$", xlabel="$x_1$", ylabel="density")
panels[0].legend(loc="lower center", fontsize=8)
x2 = torch.linspace(-3, 3, 301)
for axes, c in zip(panels[1:], (-2.0, 0.0, 0.9), strict=True):
    near = both[(both[:, 0] - c).abs() < 0.1, 1]
    slice_of_truth = log_p(torch.stack([torch.full_like(x2, c), x2], -1)).exp()
    axes.hist(near, **bars, range=(-3, 3))
    axes.plot(x2, slice_of_truth / (slice_of_truth.sum() * (x2[1] - x2[0])), color=theme.ink, lw=1, ls="--")
    axes.plot(x2, conditional_of_x2(c, x2), lw=1.4)
    axes.set(title=f"$p(x_2 \\mid x_1 = {c:g})$", xlabel="$x_2$")
plt.show()

# %% [markdown]
# The bars are the data with $x_1$ within 0.1 of $c$. A conditional has one mode or two, as the data require; the
# mixture allows both.
#
# **Sampling is sequential.** $x_2$ cannot be drawn before $x_1$, so a draw takes $D$ passes of the network, while a
# score takes one. At $D = 2$ this hardly matters; for the 64 pixels of section 8 it does. (Chapter 02 has a cache that
# computes only a small part of each pass. The passes stay sequential. Here we count whole passes, because a network
# that is watched runs as a whole.)


# %%
def passes(program, call):
    """How often the network of an autoregressive program runs during call()."""
    count = 0

    def add(*_):
        nonlocal count
        count += 1

    with torch.no_grad():
        handle = program.factors.network.register_forward_hook(add)
        call()
        handle.remove()
    return count


print("passes to score 1000 data:", passes(autoregressive, lambda: autoregressive.log_prob(test.x[:1000])))
print("passes to draw 1000 data: ", passes(autoregressive, lambda: autoregressive.sample(1000)))

# %% [markdown]
# ## 4. Flow: a change of variables
#
# Draw $z$ from a simple distribution, $p(z) = N(0, I)$, and map it by an invertible function $x = f_\theta(z)$. The map
# moves and bends a small region without changing its probability, so the density changes with the area:
#
# $$p_\theta(x) = p(z)\, \left| \det \frac{\partial z}{\partial x} \right|, \qquad z = f_\theta^{-1}(x).$$
#
# $f = f_4 \circ \dots \circ f_1$ must be easy to invert, with a determinant that is easy to compute. In a *coupling*
# one coordinate stays unchanged, and a network reads it and chooses a monotone map for the other one. The Jacobian is
# then triangular, and its determinant is the product of its diagonal. The monotone maps here are rational-quadratic
# splines.

# %%
spline = RationalQuadraticSpline(bins=8)
flow = dgm.Flow(
    (2,),
    [Coupling((i % 2 == 0, i % 2 == 1), spline, MLP((1,), spline.num_parameters, hidden=(64, 64))) for i in range(4)],
)
statements(flow)
history = train_on(train, flow, epochs=30, batch_size=128, lr=3e-3)

# %% [markdown]
# `TransformedDistribution` is Pyro's name for a distribution that is pushed through invertible functions. There are no
# latent sites: $z$ is not a further random variable. It is a function of $x$, the *latent representation*
# `inverse_map(x)`. In the formula, $u$ is the base variable, which is called $z$ above:

# %%
print(flow)

# %% [markdown]
# Next we check the formula above, term by term. We also check the condition that gives *normalizing* flows their name:
# the density integrates to one.

# %%
with torch.no_grad():
    x = test.x[:5]
    z = flow.inverse_map(x)
    by_hand = dist.Normal(0.0, 1.0).log_prob(z).sum(-1) - flow.log_abs_det_jacobian(z, x)
    print("log p(z) - log|det dx/dz|:", [f"{value:.4f}" for value in by_hand])
    print("flow.log_prob(x):         ", [f"{value:.4f}" for value in flow.log_prob(x)])
    torch.testing.assert_close(by_hand, flow.log_prob(x), atol=1e-4, rtol=1e-4)
    print(f"integral of p(x) over the plane, by quadrature: {flow.log_prob(grid).exp().sum() * cell:.4f}")

# %%
steps, fine = torch.linspace(-2.5, 2.5, 21), torch.linspace(-2.5, 2.5, 201)
lines = [torch.stack([torch.full_like(fine, s), fine], -1) for s in steps]  # vertical lines of a grid in z
lines += [line.flip(-1) for line in lines]
z = torch.randn(1500, 2)
quadrant = 2 * (z[:, 0] > 0).int() + (z[:, 1] > 0).int()
figure, panels = subplots(1, 3, height=3.1)
with torch.no_grad():
    for line in lines:
        panels[0].plot(*line.T, color=theme.muted, lw=0.5)
        panels[1].plot(*flow.forward_map(line).T, color=theme.muted, lw=0.5)
    for i in range(4):
        some = z[quadrant == i]
        points(panels[0], some, "z ~ N(0, I)", color=theme.series[i], s=4)
        points(panels[1], flow.forward_map(some), "x = f(z)", color=theme.series[i], s=4)
    fine = torch.linspace(-3, 3, scaled(201, 21))
    z = torch.cartesian_prod(fine, fine)
    log_det = flow.log_abs_det_jacobian(z, flow.forward_map(z)).reshape(len(fine), len(fine)).T
extent, limits = (-3, 3, -3, 3), {"cmap": "coolwarm", "vmin": -3, "vmax": 3}
shown = panels[2].imshow(log_det.numpy(), origin="lower", extent=extent, interpolation="bilinear", **limits)
figure.colorbar(shown, ax=panels[2], label="expands (red), contracts (blue)")
for axes in (panels[0], panels[2]):
    axes.set(xlim=(-3, 3), xticks=(-2, 0, 2), xlabel="$z_1$", ylabel="$z_2$")
panels[1].set(xlabel="$x_1$", ylabel="$x_2$")
panels[2].set(title="log |det ∂x/∂z| at z", yticks=(-2, 0, 2))
panels[2].grid(False)
plt.show()

# %% [markdown]
# The middle panel is the left one after $f$; the colors show where each quadrant of $z$ goes. $f$ is continuous, so it
# cannot tear the plane. Instead it stretches a thin strip of $z$ over the whole space between the two half circles: the
# red line on the right. The density there is low, but not zero.
#
# ## 5. VAE: an integral over a latent variable
#
# Now $z$ is a separate random variable, which we do not observe:
#
# $$p_\theta(x) = \int p_\theta(x \mid z)\, p(z)\, dz.$$
#
# The *decoder* $p_\theta(x \mid z)$ can be any network, because nothing needs to be inverted. In return, the integral
# has no closed form. The ELBO of section 2, with a learned *encoder* $q(z \mid x)$ as the guide, splits in two:
#
# $$\log p_\theta(x) \;\ge\; \underbrace{E_{q(z \mid x)}[\log p_\theta(x \mid z)]}_{\text{reconstruction}} \;-\;
# \underbrace{D_{KL}(q(z \mid x) \,\|\, p(z))}_{\text{stay near the prior}}.$$
#
# The decoder below is a Normal. A network computes its mean, and each coordinate has one free scale. The network can be
# any `nn.Module` that returns two numbers per feature: the location, and a raw scale that is made positive.


# %%
class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.mean = MLP((2,), 2, hidden=(64, 64))
        self.raw_scale = nn.Parameter(torch.full((2,), -1.0))

    def forward(self, z):
        mean = self.mean(z)
        return torch.cat([mean, self.raw_scale.expand_as(mean)], -1)


def make_vae(prior=None, encoder=None):
    return dgm.VAE(
        prior=prior or dgm.Normal(2),  # p(z) = N(0, I)
        likelihood=dgm.Normal(2, Decoder()),  # p(x | z)
        encoder=encoder or dgm.Normal(2, MLP((2,), 4, hidden=(64, 64))),  # q(z | x)
    )


vae = make_vae()
statements(vae)

# %% [markdown]
# This is the first guide with a site. `z` is latent in both: the model draws it from the prior, the guide from the
# encoder. Their common name ties the two sites together.

# %%
print(vae)

# %% [markdown]
# Here are two steps of SVI, with nothing but Pyro. `SVI` takes model, guide, an optimizer (`pyro.optim` wraps those of
# PyTorch, with their options in a dict) and a loss: `Trace_ELBO` is minus the ELBO, estimated by one draw from the
# guide. `step` is one step of all this, and returns the loss of the whole batch:

# %%
svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
for _ in range(2):
    print(f"-ELBO: {svi.step(train.x[:128]) / 128:.3f} nats per datum")

# %%
history = train_on(train, vae, epochs=60, batch_size=128, lr=1e-2)

# %%
with torch.no_grad():
    q = vae.encoder(test.x)  # a Pyro distribution: q(z | x) for every test datum
    z, mean = q.sample(), q.mean
epochs = [each.epoch for each in history.epochs]
figure, panels = subplots(1, 3, height=3.2)
panels[0].plot(epochs, [each.reconstruction["x"] for each in history.epochs], label="reconstruction")
panels[0].plot(epochs, [-each.kl["z"] for each in history.epochs], label="-KL")
panels[0].plot(epochs, [-each.loss for each in history.epochs], color=theme.ink, ls="--", label="their sum, the ELBO")
panels[0].set(title="the two terms of the bound", xlabel="epoch", ylabel="nats per datum", ylim=(-5, 1))
panels[0].legend()
for y in (0, 1):
    points(panels[1], mean[test.y == y], "latent map: means of q(z | x)", color=theme.series[y], label=f"y = {y}")
panels[1].legend(markerscale=4, loc="upper right", handletextpad=0.1)
points(panels[2], z, "aggregate posterior: z ~ q(z | x), all x")
for axes in panels[1:]:
    for radius in (1, 2):
        axes.add_patch(plt.Circle((0, 0), radius, fill=False, ls="--", color=theme.ink, lw=1))
    axes.set(xlim=(-3.5, 3.5), ylim=(-3.5, 3.5), xticks=(-2, 0, 2), xlabel="$z_1$", ylabel="$z_2$")
plt.show()

# %% [markdown]
# The dashed circles are one and two standard deviations of the prior. Training did not use the labels $y$, yet the
# latent map keeps the half circles apart. The encoder gives each datum a small Normal. The mean of these Normals over
# all data, the *aggregate posterior* $\frac1N \sum_n q(z \mid x_n)$, should be the prior. It nearly is, except for a
# gap in the middle. Some draws from the prior fall into this gap, and decode to points between the half circles, where
# there are no data.
#
# **How far is the bound from $\log p(x)$?** We can weight the draws from the guide instead of averaging their logs:
# $\hat p(x) = \frac1K \sum_k p(x, z_k) / q(z_k \mid x)$ is unbiased for $p(x)$, and the mean of $\log \hat p(x)$ is a
# bound that rises with $K$ (IWAE, importance-weighted; $K = 1$ is the ELBO). Our $z$ has so few features that
# quadrature can compute the integral, too. For a VAE of practical size this is impossible.


# %%
@torch.no_grad()
def log_p_by_quadrature(vae, x, side=200):
    """log of the integral of p(x | z) p(z) over a fine grid of z: (N,)."""
    line = torch.linspace(-5, 5, side)
    z = torch.cartesian_prod(line, line)
    log_area = 2 * math.log(line[1] - line[0])
    log_prior, likelihood = vae.prior.log_prob(z), vae.likelihood(z)
    return torch.stack([(log_prior + likelihood.log_prob(one)).logsumexp(0) + log_area for one in x])


some = test[: scaled(1000, 50)]
for particles in (1, 10, 100, scaled(1000, 200)):
    evidence = dgm.evaluate(vae, some, num_particles=particles)
    print(f"{evidence.kind:10s} {evidence.nats:.3f} nats per datum")
print(f"quadrature {log_p_by_quadrature(vae, some.x).mean():.3f}")

# %% [markdown]
# The gap between ELBO and $\log p(x)$ is the mean of $D_{KL}(q(z \mid x) \,\|\, p(z \mid x))$: the cost of a diagonal
# Normal guide for a posterior that is not a diagonal Normal. Exercise 3 swaps parts of this VAE and shows how much each
# of them costs.
#
# ## 6. Diffusion: an integral over a chain
#
# A diffusion model has many latents, $x_1, \dots, x_T$, each of the size of the datum $x_0$, and a guide without
# parameters: $q$ adds a little noise at each step until nothing is left,
#
# $$q(x_t \mid x_0) = N(\alpha_t x_0, \sigma_t^2 I), \qquad \alpha_t^2 + \sigma_t^2 = 1.$$
#
# The model runs backwards and reverses one step at a time,
#
# $$p_\theta(x_{0:T}) = p(x_T)\, \prod_{t=1}^{T} p_\theta(x_{t-1} \mid x_t).$$
#
# If the steps are small, each $q(x_{t-1} \mid x_t)$ is close to a Normal, so Normals are enough. One network serves all
# steps. It sees $x_t$ and $t$, since different times have different noise, and restores an estimate of $x_0$.

# %%
schedule = dgm.diffusion.log_snr(50, highest=4.0, lowest=-5.0)  # T = 50: log(alpha_t^2 / sigma_t^2) falls from 4 to -5
diffusion = dgm.Diffusion((2,), DenoisingMLP((2,), hidden=(64, 64, 64)), schedule, subsample=5)
statements(diffusion)

# %% [markdown]
# The definition is again a chain, `diffusion.unroll()`, with sites `x_50`, ..., `x_1`, `x`:

# %%
print(diffusion.unroll())

# %% [markdown]
# Since $q(x_t \mid x_0)$ is known for each $t$ alone, training does not need to run through it. The ELBO is a sum over
# time,
#
# $$E_q\Big[\log p(x_0 \mid x_1) - D_{KL}(q(x_T \mid x_0) \| p(x_T)) -
# \sum_{t=2}^{T} D_{KL}(q(x_{t-1} \mid x_t, x_0) \| p(x_{t-1} \mid x_t))\Big],$$
#
# and the form above states it with a *plate over time*. It evaluates a random subsample of 5 of the 50 steps (`x_shift`
# makes the choice). Pyro scales the terms in a subsampled plate, here by 50 / 5, so that their expectation is the whole
# sum. The terms enter as **factors**: `pyro.factor(name, value)` adds a number to the log density of a program. The
# site `x` itself can only be drawn, by running the chain.

# %%
history = train_on(train, diffusion, epochs=80, batch_size=128, lr=3e-3, ema=0.99)

# %% [markdown]
# The forward process destroys the data; the reverse chain restores them from noise. The lower row comes from one run of
# the unrolled model: its trace holds the value of every site, so it *is* the chain.

# %%
times = (0, 5, 15, 25, 35, 50)
with torch.no_grad():
    reverse = poutine.trace(diffusion.unroll().model).get_trace(1000)
figure, panels = subplots(2, len(times), height=3.4, sharex=True, sharey=True)
for above, below, t in zip(*panels, times, strict=True):
    for y in (0, 1):
        x = test.x[test.y == y][:500]
        if t > 0:
            x = diffusion.noised(x, torch.full((len(x),), t)).sample()
        points(above, x, f"$x_{{{t}}}$", color=theme.series[y])
    points(below, reverse.nodes[f"x_{t}" if t > 0 else "x"]["value"], "", color=theme.series[2])
panels[0, 0].set_ylabel("q, forward →")
panels[1, 0].set_ylabel("p, ← reverse")
plt.show()

# %% [markdown]
# Both forms state the same bound. They use different draws, so they agree within a few standard errors, not exactly.
# (The plated form evaluates 5 times per draw and the unrolled form all 50, so the plated form needs more draws.)

# %%
plated = dgm.evaluate(diffusion, some, num_samples=scaled(200, 10))
unrolled = dgm.evaluate(diffusion.unroll(), some, num_samples=scaled(8, 2))
difference, error = plated.minus(unrolled)
print(f"plated     {plated.nats:.3f} nats per datum")
print(f"unrolled   {unrolled.nats:.3f} nats per datum")
print(f"difference {difference:.3f} +- {error:.3f}")

# %% [markdown]
# ## 7. The four, side by side
#
# `dgm.evaluate` gives $\log p(x)$ per datum for any program: exact, or the importance-weighted bound with the chosen
# number of draws. Its exponential is unbiased for $p(x)$ in each case, so all four must integrate to about one.

# %%
programs = {"autoregressive": autoregressive, "flow": flow, "VAE": vae, "diffusion": diffusion}
particles = {"VAE": scaled(100, 2), "diffusion": scaled(16, 2)}
figure, panels = subplots(2, 5, height=3.6, sharex=True, sharey=True)
highest = log_p(grid).exp().max()
heat(panels[0, 0], log_p(grid).exp(), "truth", vmin=0, vmax=highest)
points(panels[1, 0], moons(2000), "")
for (name, program), above, below in zip(programs.items(), panels[0, 1:], panels[1, 1:], strict=True):
    density = dgm.evaluate(program, grid, num_particles=particles.get(name, 1)).values.exp()
    heat(above, density, name, vmin=0, vmax=highest)
    points(below, program.sample(2000), "")
    print(f"{name:15s} integral of p(x) over the plane: {density.sum() * cell:.3f}")
panels[0, 0].set_ylabel("p(x)")
panels[1, 0].set_ylabel("draws")
plt.show()

# %%
truth = log_p(some.x).double()
print("data: the same", len(some), "test points for all rows")
print(f"{'':15s} {'kind':9s} {'nats per datum':>17s} {'below the truth':>18s}")
print(f"{'truth':15s} {'exact':9s} {truth.mean():8.3f} +- {truth.std() / len(truth) ** 0.5:.3f}")
for name, program in programs.items():
    rows = [dgm.evaluate(program.unroll(), some)]
    if name in particles:
        rows.append(dgm.evaluate(program, some, num_particles=particles[name]))
    for row in rows:
        below = truth - row.values
        print(
            f"{name:15s} {row.kind:9s} {row.nats:8.3f} +- {row.nats_stderr:.3f}"
            f" {below.mean():9.3f} +- {below.std() / len(below) ** 0.5:.3f}"
        )

# %% [markdown]
# The standard error of the nats is over the test points. The last column is a difference on the same points, so its
# error is much smaller. An *exact* row says how good the model is. A bound says how good it is *at least*: the guide
# may cause a part of the distance. The two rows of the VAE are one model with two bounds, and so are the two rows of
# the diffusion. For the diffusion, most of the ELBO's distance to the truth comes from the bound. For the VAE, most of
# it comes from the model, as its picture shows: it fills the space between the half circles.
#
# These numbers do not rank the families. The networks and epochs were chosen to keep the chapter quick, and exercise 3
# improves the VAE in one line.
#
# ## 8. The same four on digits
#
# The digits have 8x8 pixels with integer values 0 to 16. Only the parts change. Pixels are integers, so $p(x)$ is now a
# *mass*: a pixel's distribution is a mixture of five discretized logistics, which are bell curves cut into bins. A flow
# has a density and no mass, so it is *dequantized*: the mass of an integer is the integral of the flow's density over
# its bin. A guide bounds this integral, as in the other families, so on integers the flow has a bound too.

# %%
digits, unseen = dgm.data.load("digits"), dgm.data.load("digits", "test")[: scaled(360, 60)]
print(digits, "\n", unseen, sep="")
shape, levels = digits.event_shape, digits.levels
recipe = {"lr": 2e-3, "weight_decay": 0.01, "batch_size": 64}


def pixels(network):
    return dgm.DiscretizedLogistic(shape, levels, 5, network)


on_digits = {
    "autoregressive": dgm.Autoregressive(
        pixels(MADE(shape, 15, (256, 256), residual=True, dropout=0.2, levels=levels)),
    ),
    "flow": dgm.Dequantized(dgm.flow.nsf(shape, layers=4, hidden=(128, 128), unit_cube=True), levels),
    "VAE": dgm.VAE(
        prior=dgm.Normal(16),
        likelihood=pixels(MLP((16,), 15 * 64)),
        encoder=dgm.Normal(16, MLP(shape, 32, levels=levels)),
    ),
    "diffusion": dgm.Diffusion(
        shape,
        DenoisingUNet(shape, (32, 64), num_parameters=levels),
        "log-snr",
        num_steps=50,
        predict="levels",
        levels=levels,
    ),
}
epochs = {"autoregressive": 35, "flow": 30, "VAE": 50, "diffusion": 30}
for name, program in on_digits.items():
    print(f"{name:15s}", end=" ")
    train_on(digits, program, epochs=epochs[name], ema=0.99 if name == "diffusion" else None, **recipe)

# %% [markdown]
# **Sampling** is the first use of a generative model.

# %%
columns = scaled(14, 3)
rows = {"data": unseen.x[:columns]} | {name: program.sample(columns) for name, program in on_digits.items()}
plots.images(torch.cat(list(rows.values())), levels=levels, num_columns=columns, row_labels=list(rows))

# %%
model = on_digits["autoregressive"]
print("passes to draw autoregressively:", passes(model, lambda: model.sample(14)), "- one per pixel")

# %% [markdown]
# **Density estimation** is the second. For integers we use bits per dimension, $-\log_2 p(x) / 64$; lower is better.
# Storing the integers as they are takes $\log_2 17 = 4.09$ bits each.

# %%
particles = {"flow": scaled(16, 2), "VAE": scaled(64, 2)}
evidences = {}
for name, program in on_digits.items():
    evidences[name] = dgm.evaluate(program, unseen, num_particles=particles.get(name, 1), num_samples=scaled(32, 2))
    evidence = evidences[name]
    print(f"{name:15s} {evidence.kind:8s} {evidence.bits_per_dim:.3f} +- {evidence.stderr:.3f} bits per dimension")

# %% [markdown]
# A density can also say whether a datum is like the training data: **anomaly detection**. We try two kinds of
# anomalies: digits with their pixels shuffled, and digits with faint noise of half a gray level, rounded. The AUROC is
# the probability that a test digit has a higher $p(x)$ than an anomaly; 0.5 is guessing. (The score of one datum must
# have less noise than a mean over many data. `unroll()` makes the diffusion evaluate all its times.)


# %%
def scores(name, x):
    """log p(x) or its bound, per datum."""
    return dgm.evaluate(on_digits[name].unroll(), x, num_particles=particles.get(name, 1), num_samples=1).values


order = torch.rand(len(unseen), 64).argsort(1)
shuffled = unseen.x.flatten(1).gather(1, order).reshape(unseen.x.shape)
noisy = (unseen.x + 0.5 * torch.randn(unseen.x.shape)).round().clamp(0, levels - 1).to(torch.uint8)
for name in on_digits:
    normal = scores(name, unseen.x).unsqueeze(1)
    aurocs = [(normal > scores(name, anomalies)).double().mean() for anomalies in (shuffled, noisy)]
    print(f"{name:15s} shuffled {aurocs[0]:.3f}   faint noise {aurocs[1]:.3f}")

# %% [markdown]
# **Representation** is the third. Along a straight line from one image to another, pixels only fade from the first to
# the second. Along a line between their latent variables, the images on the way should look like data. Each image is
# the mean of $p(x \mid z)$.

# %%
vae_of_digits = on_digits["VAE"]
steps = torch.linspace(0, 1, 9).unsqueeze(-1)
rows = {}
for pair in ((0, 1), (6, 7)):
    ends = torch.stack([unseen.x[unseen.y == y][0] for y in pair])
    with torch.no_grad():
        z = vae_of_digits.encoder(ends).mean
        line = (1 - steps) * z[0] + steps * z[1]
        decoded = vae_of_digits.likelihood(line).sample((scaled(500, 5),)).float().mean(0)
    faded = (1 - steps) * ends[0].flatten() + steps * ends[1].flatten()
    rows |= {f"{pair}, pixels": faded.reshape(-1, *shape), f"{pair}, latents": decoded}
plots.images(torch.cat(list(rows.values())), levels=levels, num_columns=9, row_labels=list(rows))

# %% [markdown]
# The path from 0 to 1 passes images that resemble a 6 and a 5. The path from 6 to 7 is less clean: the model was
# trained on only 1437 digits.
#
# Is $z$ also a better input for a classifier, when labels are few? Here a linear classifier gets five labeled digits of
# each class. We repeat this ten times with other digits.

# %%
from sklearn.linear_model import LogisticRegression  # noqa: E402


def accuracy_of(features, test_features, seed):
    """Test accuracy of a linear classifier trained on five labeled data of each class."""
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(seed))
    few = torch.cat([order[digits.y[order] == y][:5] for y in range(10)])
    return LogisticRegression(max_iter=2000).fit(features[few], digits.y[few]).score(test_features, unseen.y)


with torch.no_grad():
    of_digits, of_unseen = vae_of_digits.encoder(digits.x), vae_of_digits.encoder(unseen.x)
inputs = {
    "pixels": [x.flatten(1) / 16 - 0.5 for x in (digits.x, unseen.x)],
    "means of q(z | x)": [of_digits.mean, of_unseen.mean],
}
for name, features in inputs.items():
    accuracy = torch.tensor([accuracy_of(*features, seed) for seed in range(scaled(10, 2))])
    error = accuracy.std() / len(accuracy) ** 0.5
    print(f"{name:18s} {features[0].shape[1]} features: accuracy {accuracy.mean():.3f} +- {error:.3f}")
used = (of_digits.mean.std(0) > 0.3).sum()
print(f"features of z whose mean depends on x (standard deviation over the data above 0.3): {used} of 16")

# %% [markdown]
# Here it is not: on images this small the pixels are the better input. The ELBO rewards a short description of $x$,
# not one that separates classes, and each feature of $z$ in use has a cost. The VAE therefore leaves features that
# are not worth their cost at the prior, where they carry no information about $x$.
#
# ## 9. Generative and discriminative
#
# The product rule splits $p(x, y)$ in two ways. A *discriminative* model is $p(y \mid x)$ alone. A *generative* one is
# $p(x \mid y)\,p(y)$: any of the four families given a label, and a prior on labels. It yields the rest by the sum
# rule, $p(x) = \sum_y p(x \mid y)\,p(y)$, and by Bayes' rule, $p(y \mid x) = p(x \mid y)\,p(y) / p(x)$.

# %%
discriminative = dgm.Discriminative(dgm.Categorical((), 2, MLP((2,), 2, hidden=(64, 64))))
given_label = dgm.Autoregressive(mixtures(num_classes=2))  # p(x | y)
generative = dgm.Labeled(dgm.Categorical((), 2, learned=True), given_label)
history = train_on(train, discriminative, epochs=20, batch_size=128, lr=3e-3)
history = train_on(train, generative, epochs=40, batch_size=128, lr=1e-2)

# %% [markdown]
# The program states the product rule; its guide for $y$ is Bayes' rule:

# %%
print(generative)

# %%
line = torch.linspace(-10, 10, scaled(101, 13))
square = torch.cartesian_prod(line, line)
with torch.no_grad():
    alarm = generative.log_prob(test.x).quantile(0.01)  # 1 % of the test data lie below
    log_p_of_square = generative.log_prob(square)
beliefs = {"discriminative": discriminative, "generative": generative}
beliefs = {name: program.class_probabilities(square) for name, program in beliefs.items()}


def show_square(axes, values, title, **options):
    picture = values.reshape(len(line), len(line)).T.numpy()
    shown = axes.imshow(picture, origin="lower", extent=(-10, 10, -10, 10), interpolation="bilinear", **options)
    figure.colorbar(shown, ax=axes)
    axes.scatter(*test.x[:300].T.numpy(), s=1, color="black")
    axes.set(title=title, xticks=(-5, 0, 5), yticks=(-5, 0, 5))
    axes.grid(False)
    return picture


figure, panels = subplots(1, 3, height=3.1)
for axes, (name, probabilities) in zip(panels, beliefs.items(), strict=False):
    show_square(axes, probabilities[:, 1], f"{name}: p(y = 1 | x)", cmap="coolwarm", vmin=0, vmax=1)
picture = show_square(panels[2], log_p_of_square.clamp_min(-60), "generative: log p(x)", cmap=theme.heat)
panels[2].contour(
    line.numpy(), line.numpy(), picture, levels=[alarm.item()], colors=[theme.series[1]], linestyles="solid"
)
plt.show()

# %%
for name, program in (("discriminative", discriminative), ("generative", generative)):
    print(f"{name:15s} accuracy on test data {(program.classify(test.x) == test.y).double().mean():.4f}")
distance = torch.cdist(square, test.x).min(1).values
away = distance > 2
print(f"of the {away.sum()} points of this square that are further than 2 from any test datum:")
for name, probabilities in beliefs.items():
    confident = (probabilities.max(1).values > 0.99)[away].double().mean()
    print(f"  {name:15s} is more than 99 % sure of y at {100 * confident:.1f} %")
alarms = (log_p_of_square < alarm)[away].double().mean()
print(f"  log p(x) is below that of 99 % of the test data at {100 * alarms:.1f} %")

# %% [markdown]
# Both classify the test data equally well. Far from all data, *both* are sure of a label nearly everywhere: Bayes' rule
# divides by $p(x)$ and so compares two numbers that are both tiny. The label there is an accident of training: the two
# panels do not agree. But the generative model also has $p(x)$ itself, so it can tell that its training data had
# nothing like this. The line in the last panel is a threshold with 1 % false alarms. $p(y \mid x)$ alone has no such
# number. Its confidence cannot replace $p(x)$, because it is high there.
#
# All models of this chapter are *explicit*: they define $p(x)$, exactly or through a bound. An *implicit* model, such
# as a GAN, is only a map from noise to data. It can be sampled, but has no $p(x)$ to evaluate.
#
# ## 10. Exercises
#
# 1. The chain rule holds in any order. Train the autoregressive model on the moons with $x_2$ first,
#    `MADE(..., order=(1, 0))`. Must the nats be the same? Are they?
# 2. `poutine.condition(chain.model, {"x_2": 0.5})` fixes $x_2$. Do the draws of $x_1$ have the distribution $p(x_1 \mid
#    x_2 = 0.5)$? If not, how do you get such draws from the same chain?
# 3. Swap one part of the VAE on the moons for a flow: once the prior, once the encoder. Which helps, and what happens
#    to the gap between ELBO and IWAE?
#
# ## What to change next
#
# - **Data.** Replace `"moons"` by `"pinwheel"`, `"rings"` or `"checkerboard"` (and skip the rows of the true process).
#   Rings are hard for a flow: it must tear holes into a plane that has none.
# - **Inductive bias.** On digits, replace the MADE by `dgm.networks.PixelCNN`, whose convolutions know that pixels have
#   neighbors. Train it longer and compare the bits.
# - **Steps.** Give the diffusion 10 or 200 steps. What happens to the distance between its ELBO and its IWAE bound?
# - **Composition.** Every part of a VAE is a program. `dgm.VAE(prior=diffusion, ...)` is latent diffusion, a likelihood
#   that is an `Autoregressive` given $z$ is PixelVAE.
# - **Pyro.** `model` and `guide` are ordinary Pyro programs. Try `pyro.infer.Predictive`, `pyro.infer.NUTS`, or
#   `pyro.render_model(vae.model, (test.x[:3],))` to draw the graph of one (this needs Graphviz).
#
# ## Solutions
#
# **1.** The true $p(x)$ is one, whatever the order, so two *perfect* models must agree. Two trained models need not
# agree. Their conditionals have other shapes, with up to two modes in $p(x_2 \mid x_1)$ and up to four in $p(x_1 \mid
# x_2)$, and their networks have other initial weights. The difference is larger than its standard error, and larger
# than the difference between the autoregressive model and the flow above. This is one more reason not to read that
# table as a ranking.

# %%
other_order = dgm.Autoregressive(mixtures(order=(1, 0)))
history = train_on(train, other_order, epochs=50, batch_size=128, lr=1e-2)
for name, program in (("x_1 first", autoregressive), ("x_2 first", other_order)):
    print(f"{name}: {dgm.evaluate(program, test).nats:.3f} nats per datum")
difference, error = dgm.evaluate(other_order, test).minus(dgm.evaluate(autoregressive, test))
print(f"difference {difference:.3f} +- {error:.3f}")
# The sites follow the order: the first one of the chain, x_1, is now the second coordinate.
fixed = poutine.condition(other_order.unroll().model, {"x_1": torch.full((4,), 0.5)})
assert torch.equal(fixed(4)[:, 1], torch.full((4,), 0.5))

# %% [markdown]
# **2.** No. The chain draws $x_1$ before it reaches $x_2$, so $x_1$ comes from $p(x_1)$, whatever the value of $x_2$.
# Conditioning changes only the density of the trace: the observed site contributes $p(x_2 = 0.5 \mid x_1)$. By Bayes'
# rule $p(x_1 \mid x_2) \propto p(x_1)\,p(x_2 \mid x_1)$, so this number is the weight of each draw of $x_1$. This is
# importance sampling, with the prior as the guide.

# %%
num = scaled(50_000, 2000)
conditioned = poutine.condition(chain.model, {"x_2": torch.full((num,), 0.5)})
with torch.no_grad():
    trace = poutine.trace(conditioned).get_trace(num)
    trace.compute_log_prob()
    x1 = trace.nodes["x_1"]["value"]
    weights = trace.nodes["x_2"]["log_prob"].softmax(0)
    # The answer to compare with: p(x_1, x_2 = 0.5), normalized over a line of x_1.
    line = torch.linspace(-4, 4, 401)
    exact = autoregressive.log_prob(torch.stack([line, torch.full_like(line, 0.5)], -1)).exp()
    exact = exact / (exact.sum() * (line[1] - line[0]))
figure, axes = subplots(width=6, height=2.8)
bars = {"bins": 80, "range": (-4, 4), "density": True}
axes.hist(x1.numpy(), **bars, histtype="step", color=theme.muted, label="draws, unweighted")
axes.hist(x1.numpy(), **bars, weights=weights.numpy(), color=theme.muted, alpha=0.3, label="draws, weighted")
axes.plot(line, exact, lw=1.2, label="$p(x_1 \\mid x_2 = 0.5)$")
axes.set(xlabel="$x_1$", ylabel="density")
axes.legend(fontsize=7)
plt.show()

by_weights, by_bayes = (weights * x1.abs()).sum(), (exact * line.abs()).sum() * (line[1] - line[0])
effective = 1 / weights.square().sum()
spread = ((weights * (x1.abs() - by_weights).square()).sum() / effective).sqrt()
print(f"mean |x_1| given x_2 = 0.5: {by_weights:.3f} +- {spread:.3f} by weights, {by_bayes:.3f} by Bayes' rule")
assert abs(by_weights - by_bayes) < 4 * spread

# %% [markdown]
# **3.** Programs nest, so a swap is one argument. A flow that serves as encoder is conditional on $x$.

# %%
swaps = {
    "flow as prior": make_vae(prior=dgm.flow.nsf((2,), layers=3, hidden=(32, 32))),
    "flow as encoder": make_vae(encoder=dgm.flow.nsf((2,), layers=3, hidden=(32, 32), given_shape=(2,))),
}
for program in swaps.values():
    train_on(train, program, epochs=30, batch_size=128, lr=1e-2)
for name, program in {"as above": vae, **swaps}.items():
    elbo, iwae = (dgm.evaluate(program, some, num_particles=k) for k in (1, scaled(100, 4)))
    gap, error = iwae.minus(elbo)
    print(f"{name:16s} ELBO {elbo.nats:.3f}   {iwae.kind} {iwae.nats:.3f}   gap {gap:.3f} +- {error:.3f}")
    assert gap > -4 * error  # in expectation the gap is never negative

# %% [markdown]
# In this run the flow as prior gives the better model: this prior need not be round, so the aggregate posterior need
# not be round either. The flow as encoder closes most of the gap between the bounds, but its IWAE bound is not above
# that of the plain VAE. A better guide brings the ELBO closer to $\log p_\theta(x)$; it does not by itself make
# $p_\theta$ better.
