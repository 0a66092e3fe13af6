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
# # Implicit models
#
# The four families of [chapter 00](00-four-ways-to-represent-p-of-x.ipynb) are *explicit*: each defines a density
# $p_\theta(x)$, exactly or as an integral. An **implicit** model defines none. It maps a simple random variable to
# samples,
#
# $$z \sim p(z), \qquad x = G_\theta(z),$$
#
# and nothing else is known about it. This chapter shows what such a map does to a distribution, why it has no density,
# and how to train it nevertheless, by comparing *samples* with data. It also introduces a tool that is useful
# elsewhere: a classifier that estimates the ratio of two unknown densities.
#
# Chapter 00 explains Pyro's terms *sample site*, *plate*, *trace* and *model*. One term is new here:
# `pyro.deterministic("x", value)` records a value under a name, without a probability.

# %%
import math
from functools import partial

import matplotlib.pyplot as plt
import pyro
import torch
from pyro import poutine

import dgm_pyro as dgm
from chapter import claim, scaled, style, subplots, theme  # small helpers, in chapter.py beside this
from dgm_pyro.families.implicit import mode_coverage
from dgm_pyro.networks import MLP
from dgm_pyro.training.adversarial import DIVERGENCES, density_ratio, squared_distance

style()
subplots = partial(subplots, height=2.9, squeeze=False)


def points(axes, x, reach, title="", **options):
    axes.set(title=title, xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    axes.grid(False)
    axes.scatter(*x.detach().T.numpy(), **({"s": 2, "linewidths": 0, "color": theme.series[0]} | options))


# %% [markdown]
# ## 1. The pushforward
#
# $G$ can be any function. Here is one that was not learned: it stretches the plane, folds it along a line, and bends
# it. We draw a grid of $z$ and its image under $G$.


# %%
class Fold(torch.nn.Module):
    """(z_1, z_2) to (|z_1| bent by z_2, z_2): left and right half of the plane land on each other."""

    def forward(self, z):
        first, second = z.unbind(-1)
        return torch.stack([2 * (first**2 + 0.05).sqrt() - 1.5 + 0.4 * second**2, 1.2 * second], -1)


folded = dgm.Implicit(2, dgm.Normal(2), Fold())
print(folded)
pyro.set_rng_seed(0)
trace = poutine.trace(folded.model).get_trace(scaled(3000, 50))
z, x = trace.nodes["z"]["value"], trace.nodes["x"]["value"]
for name in ("z", "x"):
    site = trace.nodes[name]
    print(f"{name}: {tuple(site['value'].shape)}, {type(site['fn']).__name__}, observed: {site['is_observed']}")

left, right = z[:, 0] < 0, z[:, 0] >= 0
lines = torch.linspace(-2.5, 2.5, 11)
fine = torch.linspace(-2.5, 2.5, 101)
figure, panels = subplots(1, 3, width=9.5, height=3.1)
for axes, move, title in ((panels[0, 0], lambda z: z, "z: a grid"), (panels[0, 1], folded.generator, "x = G(z)")):
    for at in lines.tolist():
        axes.plot(*move(torch.stack([fine, 0 * fine + at], -1)).T.numpy(), color=theme.muted, linewidth=0.5)
        style = {"color": theme.series[1], "linewidth": 2.2} if at < 0 else {"color": theme.series[0], "linewidth": 0.8}
        axes.plot(*move(torch.stack([0 * fine + at, fine], -1)).T.numpy(), **style)
    axes.set(title=title, xlim=(-4, 6), ylim=(-5, 5), aspect="equal")
    axes.grid(False)
for part, color in ((left, theme.series[1]), (right, theme.series[0])):
    panels[0, 2].scatter(*x[part].T.numpy(), s=2, linewidths=0, color=color)
panels[0, 2].set(title="samples, by the sign of $z_1$", xlim=(-4, 6), ylim=(-5, 5), aspect="equal")
panels[0, 2].grid(False)
plt.show()

# %% [markdown]
# $G$ maps the left and the right half of the plane onto each other. The probability of a region of $x$ is the
# probability of all $z$ that land there, $P(x \in A) = P(z \in G^{-1}(A))$: the **pushforward** of $p(z)$ by $G$. It is
# defined for every $G$, and sampling from it takes one call of the network.
#
# ## 2. Why there is no density
#
# A flow turns the pushforward into a density by the change of variables, $p(x) = p(z) |\det J_{f^{-1}}(x)|$. This needs
# a unique $z$ for each $x$. Here each $x$ has two, one on each side of the fold; for a network the number is unknown.
# If $z$ has fewer dimensions than $x$, the samples even lie on a curve or a surface. Its volume is zero, so no density
# exists. Here is an example with a $z$ of one dimension:

# %%
pyro.set_rng_seed(3)
curve = dgm.Implicit(2, dgm.Normal(1), MLP((1,), 2, hidden=(32, 32), activation="tanh"))
with torch.no_grad():
    for parameter in curve.parameters():
        parameter.mul_(2.5)
x = curve.sample(scaled(2000, 50))
figure, panels = subplots(1, 1, width=3.4, height=3.1)
points(panels[0, 0], x, float(1.1 * x.abs().max()), "a curve in the plane")
plt.show()

try:
    folded.log_prob(torch.zeros(1, 2))
except dgm.IntractableError as error:
    print(f"IntractableError: {error}")

# %% [markdown]
# A VAE has the same generator, but it has a density, because its likelihood adds noise around $G(z)$. With this noise,
# $p(x) = \int p(x \mid z) p(z) dz$ is an integral over densities. Without the noise, every $p(x \mid z)$ is a point
# mass.
#
# There is therefore no likelihood to maximize, and no ELBO. There are only samples of two distributions, data and
# model.
#
# ## 3. A classifier knows the ratio of densities
#
# Take samples of two distributions $p$ and $q$, label the first 1 and the others 0, mix them half and half, and train a
# classifier. By Bayes' rule, the best classifier is
#
# $$D(x) = p(1 \mid x) = \frac{p(x)}{p(x) + q(x)}, \qquad \operatorname{logit} D(x) = \log \frac{p(x)}{q(x)}.$$
#
# Its logit is the **log density ratio**, although training used neither density. We check this where the densities are
# known. $p$ is a Normal at $(1, 0)$ with standard deviation 1, and $q$ is a Normal at the origin with standard
# deviation 2. Then $D_{KL}(p \| q) = \log 4 + \frac{2 + 1}{8} - 1$.

# %%
pyro.set_rng_seed(0)
size = scaled(10_000, 100)
center = torch.tensor([1.0, 0.0])
p, q = center + torch.randn(size, 2), 2 * torch.randn(size, 2)
ratio = density_ratio(p, q, gradient_steps=scaled(1000, 3))
exact_kl = math.log(4) + 3 / 8 - 1


def true_log_ratio(x):
    return (-((x - center) ** 2) / 2 + x**2 / 8).sum(-1) + math.log(4)


fresh_p, fresh_q = center + torch.randn(size, 2), 2 * torch.randn(size, 2)
(plug_in, plug_in_error), (bound, bound_error) = ratio.kl(fresh_p), ratio.bound(fresh_p, fresh_q, "kl")
print(f"KL(p || q): exact {exact_kl:.3f} nats")
print(f"  mean log ratio at fresh samples {plug_in:.3f} +- {plug_in_error:.3f}")
print(f"  lower bound by the same ratio   {bound:.3f} +- {bound_error:.3f}")
claim(abs(plug_in - exact_kl) < 0.05)
claim(exact_kl - 0.05 < bound < exact_kl + 4 * bound_error)

line = torch.linspace(-4, 4, 81)
plane = torch.cartesian_prod(line, line)
figure, panels = subplots(1, 3, width=9.5, height=2.9)
for axes, values, title in (
    (panels[0, 0], true_log_ratio(plane), "log p(x) / q(x)"),
    (panels[0, 1], ratio(plane), "the classifier's logit"),
):
    image = values.reshape(81, 81).T.numpy()
    shown = axes.imshow(image, origin="lower", extent=(-4, 4, -4, 4), cmap="coolwarm", vmin=-4, vmax=4)
    axes.set(title=title)
    axes.grid(False)
figure.colorbar(shown, ax=panels[0, 1])
x = fresh_q[:1500]
panels[0, 2].scatter(true_log_ratio(x), ratio(x), s=3, linewidths=0, color=theme.series[0])
panels[0, 2].plot((-6, 2), (-6, 2), color=theme.muted, linewidth=1)
panels[0, 2].set(xlabel="exact", ylabel="learned", title="at samples of q", xlim=(-6, 2), ylim=(-6, 2))
plt.show()

# %% [markdown]
# The classifier is right where there are samples, and guesses where there are none (the corners).
#
# The second number is a *bound*. Every divergence of the form $D_f(p \| q) = E_q[f(p/q)]$ has one,
#
# $$D_f(p \,\|\, q) \ge E_p[T(x)] - E_q[f^*(T(x))],$$
#
# for any function $T$, with equality at $T = f'(p/q)$ (Nowozin et al. 2016; $f^*$ is the convex conjugate of $f$). A
# network that is trained to maximize the right side therefore measures how different two sets of samples are.
# `adversarial.DIVERGENCES` has the two terms as functions of $V = \log p/q$. For the Jensen-Shannon divergence,
# maximizing the bound is the same as training the classifier.

# %%
print("known: " + ", ".join(DIVERGENCES))
print("below its exact value?")
for name in ("js", "kl", "hellinger"):
    value, error = ratio.bound(fresh_p, fresh_q, name)
    t, conjugate = DIVERGENCES[name]
    exact = (t(true_log_ratio(fresh_p)).mean() - conjugate(true_log_ratio(fresh_q)).mean()).item()
    print(f"  {name:10s} with the learned ratio {value:.3f} +- {error:.3f}, with the exact one {exact:.3f}")

# %% [markdown]
# ## 4. A game
#
# Now let $p$ be the data and $q$ the model. The classifier, called **critic** or discriminator, learns to tell data
# from samples. The generator moves its samples to where the critic sees data. The critic learns again. If both succeed,
# $q = p$ in the end, and the critic can only guess. This is the generative adversarial network (Goodfellow et al.
# 2014). In code it is an objective like any other: `dgm.fit(program, data, "gan")`. The objective includes the critic,
# its optimizer, and its steps between those of the program.
#
# The data are eight Normals on a ring. For these data we can count what goes wrong: the share of the samples within
# three standard deviations of a mode, and the number of modes.

# %%
angles = torch.arange(8) * math.pi / 4
ring, width = 2 * torch.stack([angles.cos(), angles.sin()], 1), 0.1
pyro.set_rng_seed(0)
data = ring[torch.arange(8000) % 8] + width * torch.randn(8000, 2)
test = ring[torch.arange(4000) % 8] + width * torch.randn(4000, 2)


def generator(activation="tanh"):
    return MLP((2,), 2, hidden=(128, 128), activation=activation)


def critic():
    return MLP((2,), 1, hidden=(128, 128), activation="relu")


def trained(objective, epochs=30, seed=0, prior=None, x=data, **options):
    """An implicit model of ``x``, trained, with its 4000 samples."""
    pyro.set_rng_seed(seed)
    program = dgm.Implicit(2, prior or dgm.Normal(2), generator())
    options = {"batch_size": 256, "lr": 4e-3, "ema": 0.99, "validation": None, "seed": seed} | options
    dgm.fit(program, x[: scaled(len(x), 300)], objective, epochs=scaled(epochs), progress=False, **options)
    pyro.set_rng_seed(1)
    return program, program.sample(scaled(4000, 100))


def game():
    """The GAN with an R1 penalty, its critic half as fast as the generator."""
    pyro.set_rng_seed(5)  # the critic's weights, too, decide
    return dgm.Adversarial("gan", critic(), r1=0.003, critic_lr=0.5)


gan, drawn = trained(game(), epochs=50)
modes, share = mode_coverage(drawn, ring, width)
print(f"GAN: {modes} of 8 modes, {100 * share:.0f} % of the samples within three standard deviations")

# %% [markdown]
# How does one blob of noise become eight? The generator is continuous, so it cannot tear the plane apart. It can only
# be steep. The picture shows the $z$ plane, colored by the mode that each $z$ is mapped to. Points that are mapped
# between modes are gray.

# %%
figure, panels = subplots(1, 3, width=9.8, height=3.2)
points(panels[0, 0], test[:2000], 3, "data", color=theme.muted)
points(panels[0, 1], drawn[:2000], 3, f"samples: {modes} modes, {100 * share:.0f} % near one")
side = torch.linspace(-3, 3, scaled(201, 41))
with torch.no_grad():
    gone_to = gan.generator(torch.cartesian_prod(side, side))
distance, nearest = torch.cdist(gone_to, ring).min(1)
color = torch.tensor([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in theme.classes[:8]])[nearest]
color[distance > 3 * width] = 0.85
panels[0, 2].imshow(
    color.reshape(len(side), len(side), 3).transpose(0, 1).numpy(), origin="lower", extent=(-3, 3, -3, 3)
)
panels[0, 2].set(title="z, by the mode it goes to", xlabel="$z_1$", ylabel="$z_2$")
panels[0, 2].grid(False)
plt.show()

# %% [markdown]
# ## 5. Other referees
#
# The critic can measure other divergences. In the **Wasserstein** game its slope must be about one (the gradient
# penalty of Gulrajani et al. 2017), and it then measures how far mass must be moved. **Kernel scores** need no critic.
# With a kernel $k(x, y)$, a number that is large for similar points,
#
# $$E\,k(x, x') + E\,k(y, y') - 2\, E\,k(x, y) \ge 0$$
#
# compares data $x$ with samples $y$ by their pairs alone, and is zero only for equal distributions if the kernel is
# good. $k = -|x - y|$ gives the energy distance, Gaussians give MMD. The first term pulls samples together with data,
# the second pushes them apart from each other: no player can be fooled into forgetting a mode.

# %%
referees = {
    "gan": None,  # trained above
    "wasserstein": lambda: dgm.Adversarial("wasserstein", critic(), r1=0, gradient_penalty=1.0, critic_steps=3),
    "energy": dgm.adversarial.energy,
    "mmd": dgm.adversarial.mmd,
}
samples, coverage = {"gan": drawn}, {"gan": (modes, share)}
for name, make in referees.items():
    if make is not None:
        pyro.set_rng_seed(0)
        _, samples[name] = trained(make(), epochs=12, lr=8e-3)
        coverage[name] = mode_coverage(samples[name], ring, width)

figure, panels = subplots(1, len(samples), width=12, height=3.2)
for axes, (name, drawn_by) in zip(panels[0], samples.items(), strict=True):
    points(axes, drawn_by[:2000], 3, f"{name}: {coverage[name][0]} modes, {100 * coverage[name][1]:.0f} % near")
plt.show()
reference = squared_distance(data[:4000], test)
for name, drawn_by in samples.items():
    print(f"{name:12s} energy distance x 1000: {1000 * squared_distance(drawn_by, test):.2f}")
print(f"{'data':12s} energy distance x 1000: {1000 * reference:.2f}")
claim(coverage["gan"][0] == 8 and coverage["gan"][1] > 0.7)
claim(coverage["energy"][0] == coverage["mmd"][0] == 8)
claim(coverage["gan"][1] > max(share for name, (_, share) in coverage.items() if name != "gan"))

# %% [markdown]
# Three of the objectives find all eight modes, and differ in the samples between the modes. The energy distance is
# hardly sensitive to stray points, because it weights by distance, and the modes are narrow. The critic of the GAN
# estimates a density ratio, whose log is very negative where there are no data. But the modes of the GAN are points and
# lines, narrower than those of the data. The Wasserstein critic, whose slope is held to one, has found only the
# outline: after 12 epochs it shows where mass is missing, but not yet where the edges are. It needs more steps than
# this chapter has time for.
#
# ## 6. Losing modes
#
# Mode collapse is the failure that adversarial training is known for. Here the penalty on the critic's slope, R1,
# prevents it. Without this penalty, and with a critic that learns faster than the generator, the critic becomes a step
# function. It has no slope where the samples are, and the generator goes wherever its last gradients sent it.

# %%
collapsing = lambda: dgm.Adversarial("gan", critic(), r1=0.0, critic_lr=2.0, critic_steps=2)  # noqa: E731
pyro.set_rng_seed(0)
_, lost = trained(collapsing(), epochs=8, ema=None, lr=1e-2)
found, near = mode_coverage(lost, ring, width)
figure, panels = subplots(1, 1, width=3.4, height=3.2)
points(panels[0, 0], lost[:2000], 3, f"without R1: {found} modes, {100 * near:.0f} % near")
plt.show()
print(f"without R1, and a faster critic: {found} of 8 modes, {100 * near:.0f} % of the samples near one")
claim(near < share)

# %% [markdown]
# No loss curve shows this, because the generator's loss depends on the critic, and the critic's loss on the generator.
# For this reason `dgm.fit` validates a game by the energy distance to held-out data, and this chapter counts modes.
#
# ## 7. What did it cost?
#
# | | explicit | implicit |
# |---|---|---|
# | $\log p(x)$: anomalies, compression, comparison of models | yes, or a bound | no |
# | posterior $q(z \mid x)$ | VAE: learned | no |
# | restrictions on the network | invertible, masked, or noise on top | none |
# | sampling | flow, VAE: one pass; chains: many | one pass |
# | training | one loss that goes down | a game, or pairs of samples |
#
# ## 8. Exercises
#
# 1. The generator must tear a blob into eight because $p(z)$ has one mode. Give it a prior that has several:
#    `dgm.MixtureOfNormals(2, 3, ...)` has nine, in a square. Are there fewer samples between the modes?
# 2. `density_ratio` works on samples of anything. Apply it to the four models of section 5: which has the smallest
#    lower bound on the Jensen-Shannon divergence to the test data? Does the order agree with the energy distance?
# 3. With added noise, an implicit model has a density, for which `dgm.implicit.parzen` is an estimate from samples.
#    Evaluate that of the GAN at noise 0.02, 0.05, 0.1, 0.2 and 0.5. Which number would you publish?
#
# ## What to change next
#
# - **Data.** `dgm.data.load("pinwheel")` or `"checkerboard"` instead of the ring. Which objective finds the edges?
# - **Dimension of z.** `dgm.Normal(1)` with `MLP((1,), 2)`: can a curve cover eight modes?
# - **The game.** `dgm.Adversarial("kl", ...)` or `"reverse-kl"`: one covers the modes, the other seeks them.
# - **Images.** `dgm train implicit --data digits --objective gan:2 --epochs 100 --lr 2e-3 --ema 0.99 --out runs/gan`,
#   then `dgm sample runs/gan`. With R1 at 0.1 instead of 2 the game collapses.
#
# ## Solutions
#
# **1.** Any program is a prior.

# %%
places = torch.tensor([-2.0, 0.0, 2.0])
raw = torch.stack([0 * places, places, 0 * places + math.log(math.expm1(0.4))])  # logits, locations, raw scales
nine = dgm.MixtureOfNormals(2, 3, parameters=raw.reshape(9, 1).repeat(1, 2))
_, from_mixture = trained(game(), epochs=50, prior=nine)
more = mode_coverage(from_mixture, ring, width)
print(f"prior with one mode: {100 * share:.0f} % near a mode; with nine: {100 * more[1]:.0f} %, {more[0]} of 8 modes")
claim(more[0] == 8 and more[1] > share)

# %% [markdown]
# The generator can map the gaps of the prior to the gaps of the data, so less of $z$ lies between modes.
#
# **2.** We compare the test data with each model's samples. Half of each set trains the ratio, and the other half gives
# the bound.

# %%
half = scaled(2000, 50)
judged = {}
for name, drawn_by in samples.items():
    judge = density_ratio(test[:half], drawn_by[:half], MLP((2,), 1, hidden=(128, 128)), gradient_steps=scaled(400, 2))
    judged[name] = judge.bound(test[half:], drawn_by[half:])
    print(
        f"{name:12s} at least {judged[name][0] / 2:.3f} +- {judged[name][1] / 2:.3f} nats of Jensen-Shannon divergence"
    )
print(f"the most it can be: log 2 = {math.log(2):.3f}")
claim(all(value < 2 * math.log(2) for value, _ in judged.values()))

# %% [markdown]
# A bound from a critic with a few hundred steps of training can be far below the true divergence. The order of two
# models is meaningful only if the same critic, trained in the same way, finds a difference larger than the errors. Here
# it finds almost no difference for the samples of the energy distance, although half of them visibly lie between the
# modes: this critic is too smooth for such narrow modes. The energy distance orders the models differently. Judge an
# implicit model by at least two numbers and a picture.
#
# **3.** Here is Parzen's estimate at five scales:

# %%
worse = {}
for scale in (0.02, 0.05, 0.1, 0.2, 0.5):
    log_p = dgm.implicit.parzen(drawn, test, scale)
    of_data = dgm.implicit.parzen(data[:4000], test, scale)
    worse[scale] = (of_data.mean() - log_p.mean()).item()
    print(f"noise {scale:.2f}: GAN {log_p.mean():7.2f} nats, the training data themselves {of_data.mean():6.2f}")
exact = -math.log(8) - math.log(2 * math.pi * width**2) - 1
print(f"the density that the data came from: {exact:.2f} nats")
claim(worse[0.02] > 1 and max(abs(worse[scale]) for scale in (0.1, 0.2, 0.5)) < 0.1)

# %% [markdown]
# No single one of them: the number depends on the noise as much as on the model. At noise 0.1 and more, the GAN looks
# as good as the data themselves. At 0.02, the data that are far from every sample dominate the number, and it shows how
# narrow the modes of the GAN are. A "model" that merely stores the training data does as well as any model. In two
# dimensions these are small problems. In the 784 dimensions of an image, the estimate is so far from the truth that it
# ranks models wrongly (Theis et al. 2016).
