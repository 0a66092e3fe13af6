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
# # Joint, marginal, conditional
#
# A *generative model* is a process that makes data. In formulas, it is a joint distribution over random variables. This
# chapter explains the terms of that sentence, each with a picture and a number:
#
# | section | words |
# |---|---|
# | 1 | joint, marginal and conditional; product rule and sum rule; two programs for one joint |
# | 2 | density of a continuous random vector; probability is an area, a density may exceed 1 |
# | 3 | generative and discriminative; why $p(x)$ is worth estimating |
# | 4 | explicit and implicit |
# | 5 | the question of all later chapters: how to represent $p(x)$ |
#
# You need PyTorch and chapter 00, which explains sample sites, plates, traces and conditioning.

# %%
import math

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate

import dgm_pyro as dgm
from chapter import claim, scaled, style, subplots, theme  # small helpers, in chapter.py beside this
from dgm_pyro import plots
from dgm_pyro.networks import MADE, MLP

pyro.set_rng_seed(0)
style()

# %% [markdown]
# ## 1. Two variables, one table
#
# The digits of scikit-learn have 8x8 pixels of 17 gray levels, and a label. We use only two variables: the label $y$,
# and the gray level $x$ of one pixel in the middle. Counting gives a table with a probability in every cell. That table
# *is* the joint distribution $p(x, y)$.

# %%
digits = dgm.data.load("digits")
x, y = digits.x[:, 0, 3, 4].long(), digits.y
p_xy = torch.zeros(10, 17).double()
p_xy.index_put_((y, x), torch.tensor(1 / len(y)).double(), accumulate=True)

p_y, p_x = p_xy.sum(1), p_xy.sum(0)  # the sum rule, over x and over y
p_x_given_y = p_xy / p_y.unsqueeze(1)
p_y_given_x = p_xy / p_x
torch.testing.assert_close(p_xy, p_x_given_y * p_y.unsqueeze(1))  # the product rule
torch.testing.assert_close(p_xy, p_y_given_x * p_x)
print(f"cells: {p_xy.numel()}, their sum: {p_xy.sum():.6f}")
print(
    f"p(y = 0) = {p_y[0]:.3f}, p(y = 0 | x = 0) = {p_y_given_x[0, 0]:.3f}, p(x = 0 | y = 0) = {p_x_given_y[0, 0]:.3f}"
)

# %%
figure, panels = subplots(1, 4, height=3.2, gridspec_kw={"width_ratios": (1, 0.35, 1, 1)})
tables = {0: ("joint p(x, y)", p_xy), 2: ("p(x | y): every row sums to 1", p_x_given_y)}
tables[3] = ("p(y | x): every column sums to 1", p_y_given_x)
for i, (title, table) in tables.items():
    shown = panels[i].imshow(table.numpy(), cmap=theme.heat, vmin=0, aspect="auto", origin="lower")
    panels[i].set(title=title, xlabel="gray level x", ylabel="label y", yticks=range(10), xticks=(0, 4, 8, 12, 16))
    panels[i].grid(False)
    figure.colorbar(shown, ax=panels[i], shrink=0.8)
panels[1].barh(range(10), p_y.tolist())
panels[1].set(title="marginal p(y)", xlabel="probability", yticks=range(10), ylim=(-0.5, 9.5))
plt.show()

# %% [markdown]
# - **Sum rule**, $p(x) = \sum_y p(x, y)$: a marginal is a sum over rows or columns of the table.
# - **Product rule**, $p(x, y) = p(x \mid y)\, p(y) = p(y \mid x)\, p(x)$: a joint can be factorized in two ways.
#
# Most zeros have no ink in this pixel, so $p(x = 0 \mid y = 0)$ is high. $p(y = 0 \mid x = 0)$ is a different number,
# because the two conditionals are different distributions.
#
# The two factorizations are two *programs*: one draws the label first, the other the pixel. They are different
# processes with the same joint.


# %%
def label_first(num, x=None):
    with pyro.plate("data", num):
        y = pyro.sample("y", dist.Categorical(p_y))  # p(y)
        return pyro.sample("x", dist.Categorical(p_x_given_y[y]), obs=x)  # p(x | y)


def pixel_first(num):
    with pyro.plate("data", num):
        x = pyro.sample("x", dist.Categorical(p_x))  # p(x)
        pyro.sample("y", dist.Categorical(p_y_given_x.T[x]))  # p(y | x)


for program in (label_first, pixel_first):
    at_data = poutine.condition(program, {"x": x, "y": y})
    log_joint = poutine.trace(at_data).get_trace(len(y)).log_prob_sum()
    drawn = poutine.trace(program).get_trace(scaled(200_000, 20_000)).nodes
    both = (drawn["y"]["value"] == 0) & (drawn["x"]["value"] == 0)
    print(
        f"{program.__name__}: log p of all data {log_joint:.6f} nats, share of draws with x = y = 0 {both.double().mean():.4f}"
    )
    torch.testing.assert_close(log_joint, p_xy[y, x].log().sum())
    claim(abs(both.double().mean() - p_xy[0, 0]) < 4 * (p_xy[0, 0] / len(both)).sqrt())
print(f"by the table: {p_xy[y, x].log().sum():.6f} and {p_xy[0, 0]:.4f}")

# %% [markdown]
# A program gives only one conditional directly. `label_first` draws $x$ given $y$; for $p(x)$ or $p(y \mid x)$ we must
# sum over $y$. Pyro can compute that sum for discrete sites. This is called **enumeration**: `config_enumerate` marks
# the discrete sites of a program, which then return *all* their values at once instead of a draw, in a new dimension on
# the left. `TraceEnum_ELBO` sums over that dimension: its loss is $-\log p(x)$, and `compute_marginals` gives $p(y \mid
# x)$ of every unobserved site.

# %%
summed = TraceEnum_ELBO(max_plate_nesting=1)  # one plate, so that Pyro knows which dimensions are taken
all_levels = torch.arange(17)
enumerated = config_enumerate(label_first)
no_guide = lambda num, x: None  # noqa: E731  # nothing is left to guess: all is summed
log_p_x = -summed.loss(enumerated, no_guide, 17, all_levels)
posterior = summed.compute_marginals(enumerated, no_guide, 17, all_levels)["y"].probs
print(f"sum of log p(x) over the 17 levels: by enumeration {log_p_x:.6f}, by the table {p_x.log().sum():.6f}")
torch.testing.assert_close(posterior, p_y_given_x.T, atol=1e-6, rtol=1e-6)
assert abs(log_p_x - p_x.log().sum()) < 1e-6

# %% [markdown]
# With 64 pixels of 17 levels the table would have $10 \cdot 17^{64}$ cells, too many to count. A *deep* generative
# model computes the probabilities with a network instead. Only the source of the numbers changes; the two rules remain.
#
# ## 2. Continuous variables
#
# A continuous $x$ has a **density** instead of a probability at each point: the probability of a region is the integral
# of $p(x)$ over it. For a random *vector* this is the joint density of its features. Here is one in the plane, from
# three Normals. It has a narrow peak.


# %%
weights = torch.tensor([0.5, 0.3, 0.2])
locations = torch.tensor([[-1.2, -0.3], [1.0, 1.0], [1.0, -1.0]])
factors = torch.tensor([[[0.6, 0.0], [0.5, 0.4]], [[0.5, 0.0], [-0.3, 0.3]], [[0.14, 0.0], [0.0, 0.14]]])


def three_normals(num):
    with pyro.plate("data", num):
        y = pyro.sample("y", dist.Categorical(weights))
        return pyro.sample("x", dist.MultivariateNormal(locations[y], scale_tril=factors[y]))


def density(x):
    """p(x) = sum_y p(y) p(x | y), for points (N, 2)."""
    components = dist.MultivariateNormal(locations, scale_tril=factors)
    return (components.log_prob(x.unsqueeze(1)) + weights.log()).logsumexp(1).exp()


line = torch.linspace(-4, 4, scaled(401, 201))
step = line[1] - line[0]
p = density(torch.cartesian_prod(line, line)).reshape(len(line), len(line))  # p[i, j] = p(x_1 = line[i], x_2 = line[j])
draws = three_normals(scaled(200_000, 20_000))
print(f"integral of p over the plane {p.sum() * step**2:.5f}; highest density {p.max():.2f}, more than 1")
assert abs(p.sum() * step**2 - 1) < 1e-3
assert p.max() > 1

inside = (line - 1).abs() < 0.3
region = p[inside][:, (line + 1).abs() < 0.3].sum() * step**2
share = ((draws - torch.tensor([1.0, -1.0])).abs() < 0.3).all(1).double().mean()
print(f"probability of a square of side 0.6 around the peak: {region:.4f} by the density, {share:.4f} of the draws")
claim(abs(region - share) < 0.005)

# %% [markdown]
# A density of 1.6 is not a mistake. Its unit is *per area*, and the area with that density is small. Integrals replace
# sums, and the rules are the same:
#
# $$p(x_1) = \int p(x_1, x_2)\, dx_2, \qquad p(x_2 \mid x_1) = \frac{p(x_1, x_2)}{p(x_1)}.$$
#
# A conditional is a slice through the joint, divided by the area under the slice.

# %%
p_1 = p.sum(1) * step  # the sum rule
p_2_given_1 = p / p_1.unsqueeze(1)  # the product rule
claim(((p_2_given_1.sum(1) * step)[p_1 > 1e-3] - 1).abs().max() < 1e-3)
cuts = {-1.0: theme.series[1], 1.0: theme.series[2]}
figure, panels = subplots(1, 3, height=3.0)
shown = panels[0].imshow(p.T.numpy(), origin="lower", extent=(-4, 4, -4, 4), cmap=theme.heat, vmin=0)
panels[0].set(title="joint density", xlabel="$x_1$", ylabel="$x_2$", xlim=(-3.5, 3.5), ylim=(-3, 3))
panels[0].grid(False)
figure.colorbar(shown, ax=panels[0], label="per area")
panels[1].hist(draws[:, 0].numpy(), bins=80, range=(-4, 4), density=True, color=theme.muted, alpha=0.3, label="draws")
panels[1].plot(line, p_1, label="sum rule")
panels[1].set(title="marginal $p(x_1)$", xlabel="$x_1$", ylabel="density")
panels[1].legend()
for c, color in cuts.items():
    panels[0].axvline(c, color=color, lw=1)
    near = draws[(draws[:, 0] - c).abs() < 0.05, 1]
    panels[2].hist(near.numpy(), bins=60, range=(-3, 3), density=True, color=color, alpha=0.25)
    panels[2].plot(line, p_2_given_1[(line - c).abs().argmin()], color=color, label=f"$x_1 = {c:g}$")
panels[2].set(title="conditional $p(x_2 \\mid x_1)$", xlabel="$x_2$", ylabel="density", xlim=(-3, 3))
panels[2].legend()
plt.show()

# %% [markdown]
# The bars are draws. The right panel has the draws whose $x_1$ is within 0.05 of the cut. The lines come from the
# density of the program, and the bars from its samples: two independent ways to use one program.
#
# ## 3. Generative and discriminative
#
# Now $x$ is the whole digit, of 64 pixels that are black or white, and the distributions have networks in them:
#
# - a **discriminative** model is $p_\theta(y \mid x)$ alone. It tells labels apart and says nothing about $x$;
# - a **generative** model is $p_\theta(x \mid y)\, p_\theta(y)$. By the sum rule it has $p(x)$, by Bayes' rule
#   $p(y \mid x)$.
#
# `MLP` is a plain network. `MADE` is a network for $p(x \mid y)$, which chapter 02 explains. `Labeled` is the product
# rule. `print` shows a program as a formula, which it reads off the statements.

# %%
train, test = dgm.data.load("digits-binary"), dgm.data.load("digits-binary", "test")
held_out, unseen = test.split(0.5)  # one half to set a threshold, the other to judge
shape = train.event_shape
discriminative = dgm.Discriminative(dgm.Categorical((), 10, MLP(shape, 10, hidden=(256, 256), levels=2)))
p_x_of_y = dgm.Autoregressive(dgm.Bernoulli(shape, MADE(shape, 1, (256,), num_classes=10, levels=2, dropout=0.3)))
generative = dgm.Labeled(dgm.Categorical((), 10, learned=True), p_x_of_y)
dgm.fit(discriminative, train, epochs=scaled(80), lr=3e-3, validation=None, progress=False)
dgm.fit(generative, train, epochs=scaled(60), lr=3e-3, progress=False)
both = {"discriminative": discriminative, "generative": generative}
for name, program in both.items():
    print(
        f"{name:15s} accuracy on {len(unseen)} unseen digits {(program.classify(unseen.x) == unseen.y).double().mean():.3f}"
    )
    claim((program.classify(unseen.x) == unseen.y).double().mean() > 0.9)

# %%
print(discriminative, generative, sep="\n")

# %% [markdown]
# Both are good classifiers. Only one of them can also be run from the label to the image:

# %%
with torch.no_grad():
    made = generative.sample(scaled(40, 10), torch.arange(10).repeat(scaled(4)))
plots.images(made, levels=2, num_columns=10, column_labels=[str(i) for i in range(10)], title="draws from p(x | y)")

# %% [markdown]
# **The problem with $p(y \mid x)$.** Flip each pixel with some probability. At one half the image is pure noise, and
# the right answer would be "I do not know". A classifier's confidence is the largest of its ten probabilities. The
# last panel has the model's own alarm: it goes off if $\log p(x)$ is lower than for 95 % of held-out digits.

# %%
flips = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5)
with torch.no_grad():
    alarm = generative.log_prob(held_out.x).quantile(0.05)
measured = {name: {"accuracy": [], "confidence": [], "sure and wrong": []} for name in both}
rejected, caught, pictures = [], {name: [] for name in both}, []
for flip in flips:
    noisy = (unseen.x ^ (torch.rand(unseen.x.shape) < flip)).to(torch.uint8)
    pictures.append(noisy[0])
    with torch.no_grad():
        strange = generative.log_prob(noisy) < alarm
    rejected.append(strange.double().mean().item())
    for name, program in both.items():
        confidence, guess = program.class_probabilities(noisy).max(1)
        wrong = (confidence > 0.9) & (guess != unseen.y)
        measured[name]["accuracy"].append((guess == unseen.y).double().mean().item())
        measured[name]["confidence"].append(confidence.mean().item())
        measured[name]["sure and wrong"].append(wrong.double().mean().item())
        caught[name].append(strange[wrong].double().mean().item())

plots.images(torch.stack(pictures), levels=2, num_columns=8, column_labels=[f"{100 * f:g} %" for f in flips])

# %%
figure, panels = subplots(1, 4, height=2.7, sharey=True)
for i, (name, lines) in enumerate(measured.items()):
    for axes, (what, values) in zip(panels, lines.items(), strict=False):
        axes.plot(flips, values, marker="os"[i], ms=4, label=name)
        axes.set(title=what, xlabel="share of pixels flipped", ylim=(0, 1.03))
panels[2].set_title("more than 90 % sure, and wrong")
panels[3].plot(flips, rejected, marker="s", ms=4, color=theme.series[2])
panels[3].set(title="log p(x) raises the alarm", xlabel="share of pixels flipped")
panels[0].legend(loc="lower left")
panels[0].set_ylabel("share of the digits")
plt.show()

# %%
for flip, alarms in zip(flips, rejected, strict=True):
    print(f"{100 * flip:4g} % flipped: alarm at {100 * alarms:5.1f} % of the digits")
for name, lines in measured.items():
    print(
        f"{name:15s} on pure noise: confidence {lines['confidence'][-1]:.2f}, accuracy {lines['accuracy'][-1]:.2f}, "
        f"sure and wrong {lines['sure and wrong'][-1]:.2f}, of which the alarm catches {caught[name][-1]:.3f}"
    )
    claim(lines["confidence"][-1] > 0.6 and lines["accuracy"][-1] < 0.25 and caught[name][-1] > 0.95)
    print(f"{'':15s} at 5 % flipped: accuracy {lines['accuracy'][2]:.2f}")
    claim(lines["accuracy"][2] > 0.7)
claim(rejected[0] < 0.15 and rejected[2] > 0.5 and rejected[-1] > 0.95)

# %% [markdown]
# The pictures show three things, and the first one is a disappointment.
#
# 1. On noise *both* are still sure of a label, and wrong. A generative model does not have a less confident $p(y \mid
#    x)$: Bayes' rule divides by $p(x)$, which removes it.
# 2. The generative model still has $p(x)$ itself. If an image is noise, the alarm catches the confident errors of
#    either classifier. This is why it is worth estimating $p(x)$.
# 3. The alarm does not answer "is the label right?". It answers whether $x$ is like the training data. At 5 % of
#    flipped pixels it goes off for most digits, although most are still classified correctly. Its false-alarm rate is
#    chosen beforehand: it rejects about 5 % of good digits.
#
# ## 4. Explicit and implicit
#
# An **explicit** model defines a density. An **implicit** model is a map: draw $z$ from a simple distribution and
# return $x = f(z)$. The process below is implicit. `pyro.deterministic(name, value)` is a site that is a function of
# others: the trace records it, but it has no distribution.


# %%
def implicit(num):
    with pyro.plate("data", num):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        return pyro.deterministic("x", z.square().sum(-1))


trace = poutine.trace(implicit).get_trace(scaled(100_000, 10_000))
trace.compute_log_prob()
x = trace.nodes["x"]["value"]
for name in ("z", "x"):
    print(f"site {name}: adds {trace.nodes[name]['log_prob'].sum():.1f} nats to the log density of the trace")
assert trace.nodes["x"]["log_prob"].sum() == 0

# %% [markdown]
# The trace has the density of $z$, and nothing for $x$. Many $z$ lead to one $x$ (a whole circle), so $p(x)$ is an
# integral. Here it has a closed form: the sum of two squared standard Normals is exponential, $p(x) = \frac12
# e^{-x/2}$. That is the same distribution, made explicit.

# %%
explicit = dist.Exponential(0.5)
figure, axes = subplots(width=5.5, height=2.5)
axes.hist(
    x.numpy(), bins=60, range=(0, 12), density=True, color=theme.muted, alpha=0.4, label="draws of the implicit program"
)
at = torch.linspace(0.01, 12, 200)
axes.plot(at, explicit.log_prob(at).exp(), label="the explicit density")
axes.set(xlabel="x", ylabel="density")
axes.legend()
plt.show()
for level in (1.0, 3.0, 6.0):
    share, probability = (x < level).double().mean(), explicit.cdf(torch.tensor(level))
    print(f"p(x < {level:g}): {share:.4f} of the draws, {probability:.4f} by the density")
    claim(abs(share - probability) < 0.01)

# %% [markdown]
# If $f$ is a network, that integral is unknown. Without a likelihood to maximize, we train $f$ by comparing draws with
# data. The **energy distance** of two sets of points is
#
# $$2\,E\lVert x - g \rVert - E\lVert x - x' \rVert - E\lVert g - g' \rVert, \qquad x, x' \sim \text{data}, \;
# g, g' \sim \text{model}.$$
#
# It is zero only if both sets have the same distribution, and it needs only samples. (Chapter 09 has better ways.)


# %%
def energy_distance(x, g):
    """Without bias: pairs of a point with itself are left out."""
    n, m = len(x), len(g)
    within = torch.cdist(x, x).sum() / (n * (n - 1)) + torch.cdist(g, g).sum() / (m * (m - 1))
    return 2 * torch.cdist(x, g).mean() - within


moons, fresh = dgm.data.load("moons"), dgm.data.load("moons", "test")
generator = MLP((2,), 2, hidden=(128, 128), activation="relu")
untrained = energy_distance(fresh.x, generator(torch.randn(5000, 2))).item()
optimizer = torch.optim.Adam(generator.parameters(), lr=5e-3)
slower = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, scaled(2500, 2))
for _ in range(scaled(2500, 2)):
    x = moons.x[torch.randint(len(moons), (256,))]
    loss = energy_distance(x, generator(torch.randn(256, 2)))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    slower.step()

explicit = dgm.flow.nsf((2,), layers=4, hidden=(64, 64))
dgm.fit(explicit, moons, epochs=scaled(10), batch_size=128, lr=3e-3, progress=False)
with torch.no_grad():
    drawn = {
        "data": moons.x,
        "implicit: f(z)": generator(torch.randn(5000, 2)),
        "explicit: draws": explicit.sample(5000),
    }
for name, points in drawn.items():
    print(f"{name:16s} energy distance to test data {energy_distance(fresh.x, points):.5f} (untrained {untrained:.3f})")
claim(energy_distance(fresh.x, drawn["implicit: f(z)"]) < 0.01 * untrained)

# %%
figure, panels = subplots(1, 4, height=2.7, sharex=True, sharey=True)
for axes, (name, points) in zip(panels, drawn.items(), strict=False):
    axes.scatter(*points[:2000].T.numpy(), s=2, linewidths=0)
    axes.set(title=name, aspect="equal", xlabel="$x_1$")
across, up = torch.linspace(-4, 4, 121), torch.linspace(-3, 3, 91)
with torch.no_grad():
    picture = explicit.log_prob(torch.cartesian_prod(across, up)).exp().reshape(121, 91).T
panels[3].imshow(picture.numpy(), origin="lower", extent=(-4, 4, -3, 3), cmap=theme.heat, vmin=0)
panels[3].set(title="explicit: p(x)", xlabel="$x_1$", xlim=(-4, 4), ylim=(-3, 3))
panels[0].set_ylabel("$x_2$")
panels[3].grid(False)
plt.show()

# %% [markdown]
# The implicit model has found both half circles, but the space between them is not quite empty. The energy distance is
# hardly sensitive to this. A likelihood is: probability that the model puts where there are no data is missing
# elsewhere.
#
# Both models can be sampled. Only the explicit model gives the density of a point, so only the explicit model can raise
# the alarm of section 3, choose between labels by Bayes' rule, or be compared with another model in nats:

# %%
print(f"explicit: {dgm.evaluate(explicit, fresh).nats:.3f} nats per datum; implicit: no such number")

# %% [markdown]
# ## 5. How to represent p(x)?
#
# A distribution over 64 pixels must be flexible, must sum to one, and must be computable. The next chapters give
# answers:
#
# | chapter | $p(x)$ | explicit? |
# |---|---|---|
# | 02 autoregressive | a product of conditionals | yes, exact |
# | 03 flow | a change of variables | yes, exact |
# | 04 VAE | an integral over $z$ | yes, a bound is computed |
# | 05 diffusion | an integral over a chain | yes, a bound is computed |
# | 09 implicit | a map of $z$ | no |
#
# ## 6. Exercises
#
# 1. How much does the pixel of section 1 say about the label? Compute the mutual information in three ways:
#    $D_{KL}(p(x, y) \,\|\, p(x)\,p(y))$, $H(y) - H(y \mid x)$ and $H(x) - H(x \mid y)$. Must they agree?
# 2. Suppose that only the digits 0 to 4 occur from now on. Change $p(y)$ in the generative model, without any training,
#    and compare accuracies. Do the same to the discriminative model: by what must you multiply its output?
# 3. With an implicit model, one could count draws near $x$. How many of 100,000 draws of a standard Normal in $D$
#    dimensions lie within 0.5 of the origin, for $D = 1, 2, 4, 8$?
#
# ## What to change next
#
# - **The pixel.** Take a corner in section 1, `[:, 0, 0, 0]`. What do its conditionals look like, and why does
#   `p_y_given_x` hold NaN?
# - **The noise.** Shift the digits by one pixel instead of flipping pixels. Does the alarm still go off where the
#   classifiers fail?
# - **The threshold.** Trade false alarms for misses: plot the share of rejected good digits against the share of caught
#   errors.
# - **The family.** Give `Labeled` another $p(x \mid y)$: a flow on the moons, `dgm.flow.nsf((2,), num_classes=2)`.
# - **The map.** Let the generator have a $z$ of one dimension. Which shapes are then impossible for its draws?
#
# ## Solutions
#
# **1.** They agree: all three are sums of the same table, by the product rule.


# %%
def entropy(p):
    return -torch.special.xlogy(p, p).sum()


independent = p_y.unsqueeze(1) * p_x
kl = (torch.special.xlogy(p_xy, p_xy) - torch.special.xlogy(p_xy, independent)).sum()
y_given_x = sum(p_x[i] * entropy(p_y_given_x[:, i]) for i in range(17))
x_given_y = sum(p_y[i] * entropy(p_x_given_y[i]) for i in range(10))
print(f"mutual information {kl:.4f} nats, of the {entropy(p_y):.4f} that the label has")
torch.testing.assert_close(kl, entropy(p_y) - y_given_x)
torch.testing.assert_close(kl, entropy(p_x) - x_given_y)

# %% [markdown]
# **2.** By Bayes' rule $p'(y \mid x) \propto p(x \mid y)\, p'(y)$. In the generative model, replace the prior; nothing
# else changes. A discriminative model does not have $p(x \mid y)$, but $p(y \mid x) / p(y)$ is proportional to it:
# multiply by $p'(y) / p(y)$ and normalize. This requires the $p(y)$ of the training data.

# %%
low = test[test.y < 5]
halved = torch.where(torch.arange(10) < 5, 0.2, 1e-9)  # p'(y)
swapped = dgm.Labeled(dgm.Categorical((), 10, parameters=halved.log()), p_x_of_y)
corrected = discriminative.class_probabilities(low.x) * halved / (torch.bincount(train.y) / len(train))
noisy = (low.x ^ (torch.rand(low.x.shape) < 0.15)).to(torch.uint8)
corrected_noisy = discriminative.class_probabilities(noisy) * halved / (torch.bincount(train.y) / len(train))
guesses = {
    "generative": (generative.classify(noisy), swapped.classify(noisy)),
    "discriminative": (discriminative.classify(noisy), corrected_noisy.argmax(1)),
}
for name, (before, after) in guesses.items():
    accuracies = [(guess == low.y).double().mean().item() for guess in (before, after)]
    print(f"{name:15s} accuracy on noisy digits 0 to 4: {accuracies[0]:.3f}, with the new p(y) {accuracies[1]:.3f}")
    claim(accuracies[1] > accuracies[0])

# %% [markdown]
# **3.** Hardly any for $D = 8$, although a ball around the origin is the *most* likely ball of that size. In 64
# dimensions, one would never see a single draw there. Counting cannot replace a density.

# %%
for size in (1, 2, 4, 8):
    near = (torch.randn(100_000, size).norm(dim=1) < 0.5).sum().item()
    probability = torch.special.gammainc(torch.tensor(size / 2), torch.tensor(0.125)).item()  # chi-square
    print(f"D = {size}: {near} draws, expected {100_000 * probability:.1f}")
    assert abs(near - 100_000 * probability) < 5 * math.sqrt(100_000 * probability) + 5
