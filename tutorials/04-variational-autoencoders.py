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
# # Variational autoencoders
#
# This chapter is the third answer to "how to represent $p(x)$?": add a latent variable $z$ and integrate over it,
#
# $$p_\theta(x) = \int p_\theta(x \mid z)\, p(z)\, dz .$$
#
# The integral is intractable, so we maximize a lower bound on its logarithm:
#
# $$\log p_\theta(x) \;\ge\; \underbrace{E_{q(z \mid x)}[\log p_\theta(x \mid z)]}_{\text{1) reconstruction}} \;-\;
# \underbrace{D_{KL}(q(z \mid x) \,\|\, p(z))}_{\text{2) cost of encoding } z}.$$
#
# | section | question |
# |---|---|
# | 1 | what are the parts, and how far is the bound from $\log p(x)$? |
# | 2 | what do the two terms do? one weighted against the other |
# | 3 | what does $z$ look like? latent maps |
# | 4 | posterior collapse: shown, and cured |
# | 5 | how does a gradient pass through a draw? |
#
# You need PyTorch and chapter 00, which explains models, guides and the ELBO. Chapter 07 shows how to judge a guide.

# %%
import itertools
import math

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

import dgm_pyro as dgm
from chapter import claim, mean_and_error, scaled, style, subplots, theme  # small helpers, in chapter.py beside this
from dgm_pyro import plots
from dgm_pyro.networks import MADE, MLP

pyro.set_rng_seed(0)
style()

# %% [markdown]
# ## 1. The parts
#
# A VAE is a *prescribed* model: every distribution in it is written down beforehand, and networks fill in the
# parameters.
#
# - prior $p(z) = N(0, I)$;
# - **decoder** $p_\theta(x \mid z)$: a network maps $z$ to the probability that each pixel is black;
# - **encoder** $q(z \mid x)$: a network maps $x$ to the mean and scale of a Normal. It is the guide, and not part of
#   the model.
#
# With $z$ in the plane we can draw everything.

# %%
train, test = dgm.data.load("digits-binary"), dgm.data.load("digits-binary", "test")
shape = train.event_shape


def make(size, likelihood=None, prior=None):
    return dgm.VAE(
        prior=prior or dgm.Normal(size),  # p(z)
        likelihood=likelihood or dgm.Bernoulli(shape, MLP((size,), 64, hidden=(128, 128))),  # p(x | z)
        encoder=dgm.Normal(size, MLP(shape, 2 * size, hidden=(128, 128), levels=2)),  # q(z | x)
    )


def train_on_digits(vae, epochs=40, objective="elbo"):
    return dgm.fit(vae, train, objective, epochs=scaled(epochs), lr=2e-3, progress=False)


vae = make(2)
print(vae)
train_on_digits(vae, epochs=80)
evidence = dgm.evaluate(vae, test, num_samples=scaled(100, 4))
print(evidence)

# %% [markdown]
# `evaluate` prints the two terms separately. The distance of the bound from the truth is a divergence:
#
# $$\log p_\theta(x) - \text{ELBO} = D_{KL}\big(q(z \mid x) \,\|\, p_\theta(z \mid x)\big).$$
#
# For a $z$ of two features, a grid gives all of these terms. It gives $\log p(x)$ by summing over $z$, and the true
# posterior $p(z \mid x) = p(x \mid z)\,p(z) / p(x)$. The ELBO does not use the grid; it is estimated from draws.

# %%
line = torch.linspace(-5, 5, scaled(241, 81))
grid = torch.cartesian_prod(line, line)
log_cell = 2 * math.log(line[1] - line[0])
some = test.x[: scaled(60, 8)]
with torch.no_grad():
    logits = vae.likelihood(grid).base_dist.logits.flatten(1)  # (G, 64)
    log_p_x_given_z = some.flatten(1).float() @ logits.T - F.softplus(logits).sum(1)  # Bernoulli, (N, G)
    log_joint = log_p_x_given_z + vae.prior.log_prob(grid)
    log_p_x = (log_joint + log_cell).logsumexp(1)
    log_posterior = log_joint - log_p_x.unsqueeze(1)
    q = vae.encoder(some)
    log_q = q.log_prob(grid.unsqueeze(1)).T
    kl = (log_q.exp() * (log_q - log_posterior)).sum(1) * math.exp(log_cell)
elbo = dgm.evaluate(vae, some, num_samples=scaled(400, 4)).values
print(f"log p(x) by the grid      {log_p_x.mean():.3f}")
print(f"ELBO, from draws          {elbo.mean():.3f}")
print(f"KL(q || posterior)        {kl.mean():.3f}")
print(f"ELBO + KL                 {elbo.mean() + kl.mean():.3f}")
claim(abs(log_p_x.mean() - elbo.mean() - kl.mean()) < 0.05)
claim((kl > -0.01).all())

worst = int(kl.argmax())
chosen = [0, 1, 2, worst]
figure, panels = subplots(1, 4, height=2.9)
for axes, i in zip(panels, chosen, strict=True):
    i = min(i, len(some) - 1)
    picture = log_posterior[i].exp().reshape(len(line), -1).T.numpy()
    axes.imshow(picture, origin="lower", extent=(-5, 5, -5, 5), cmap=theme.heat, vmin=0)
    angle = torch.linspace(0, 2 * math.pi, 100)
    for radius in (1, 2):
        ring = q.mean[i] + radius * q.stddev[i] * torch.stack([angle.cos(), angle.sin()], -1)
        axes.plot(*ring.T.numpy(), color=theme.series[1], lw=1)
    center = q.mean[i]
    half = 2.2 if i == worst else 1.2
    axes.set(xlim=(center[0].item() - half, center[0].item() + half))
    axes.set(ylim=(center[1].item() - half, center[1].item() + half))
    axes.set(title=f"a {int(test.y[i])}: KL {kl[i]:.2f} nats", xlabel="$z_1$", ylabel="$z_2$", aspect="equal")
    axes.grid(False)
plt.show()

# %% [markdown]
# The true posterior is blue; one and two standard deviations of the encoder's Normal are orange. On the right is the
# datum where the two differ most: its posterior has two modes, and the encoder's Normal lies between them. The gap is
# the cost of this guide: a Normal with axes along the coordinates, which one network computes for all data.
#
# ## 2. The two terms
#
# The two terms oppose each other. The reconstruction is best if each $x$ has its own $z$, sharp and far from all
# others. The KL is best if $q(z \mid x)$ is the prior, whatever $x$ is. A weight $\beta$ on the KL shows the effect:

# %%
betas = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
weighted, terms = {}, {}
for beta in betas:
    torch.manual_seed(0)
    weighted[beta] = make(8)
    train_on_digits(weighted[beta], objective=f"beta:{beta}")
    evidence = dgm.evaluate(weighted[beta], test, num_samples=scaled(32, 2))  # the terms themselves, without the weight
    terms[beta] = evidence.reconstruction["x"], evidence.kl["z"], evidence.nats
    print("beta {:4.1f}: reconstruction {:7.2f}, KL {:5.2f}, ELBO {:7.2f} nats".format(beta, *terms[beta]))
kls = [terms[beta][1] for beta in betas]
claim(all(a > b for a, b in itertools.pairwise(kls)))
claim(terms[30.0][1] < 0.1)
claim(max(betas, key=lambda beta: terms[beta][2]) == 1)

# %%
rows, labels = {}, []
some = test.x[: scaled(8, 4)]
for beta in (0.1, 1.0, 30.0):
    with torch.no_grad():
        z = torch.cat([weighted[beta].encoder(some).mean, torch.randn(len(some), 8)])
        rows[beta] = weighted[beta].likelihood(z).base_dist.probs  # reconstructions, then draws of the prior, decoded
figure, axes = subplots(width=5.5, height=3.2)
axes.plot([terms[b][1] for b in betas], [terms[b][0] for b in betas], color=theme.muted, lw=1)
for beta in betas:
    axes.plot(terms[beta][1], terms[beta][0], "o", color=theme.series[1 if beta == 1 else 0])
    label, place = (
        (f"β = {beta:g}", (5, -10)) if beta < 3 else ("β = 3", (8, 4)) if beta == 3 else ("β = 10, 30", (8, -6))
    )
    if beta < 30:
        axes.annotate(label, terms[beta][:2][::-1], xytext=place, textcoords="offset points", size=8)
best = terms[1.0][2]
across = torch.tensor([0.0, max(kls)])
axes.plot(across, best + across, color=theme.series[1], ls="--", lw=1, label="same ELBO as β = 1")
axes.set(xlabel="KL(q || p), nats", ylabel="reconstruction, nats", title="the two terms on test data")
axes.legend(loc="lower right")
plt.show()
picture = [some.float().unsqueeze(0), *[part.unsqueeze(0) for row in rows.values() for part in row.chunk(2)]]
labels = ["digits"] + [f"{what}, β {beta:g}" for beta in rows for what in ("rec.", "draws")]
plots.images(torch.cat([part.flatten(0, 1) for part in picture]), num_columns=len(some), row_labels=labels)

# %% [markdown]
# - Small $\beta$: the best reconstructions, at too high a cost. Each $q(z \mid x)$ is small and far from the others,
#   draws from the prior seldom fall into any of them, and the bound on $\log p(x)$ is low.
# - Large $\beta$: $q(z \mid x)$ is the prior, $z$ says nothing, and every reconstruction is the mean of all digits.
# - $\beta = 1$ is not an arbitrary compromise: it is the bound on $\log p(x)$. Along the dashed line, each further nat
#   of KL improves the reconstruction by one nat.
#
# ## 3. Latent maps
#
# We return to $z$ in the plane. The left panel has the means of $q(z \mid x)$, colored by the label, which training did
# not use. The middle panel has a draw of $q(z \mid x)$ for each datum. Together, these draws are the **aggregate
# posterior**. It should look like the prior, whose circles of one and two standard deviations are dashed. The right
# panel has the decoded image at each place of the plane.

# %%
with torch.no_grad():
    q = vae.encoder(train.x)
    means, drawn = q.mean, q.sample()
    side = scaled(13, 5)
    # Even steps of probability under the prior, from the top left to the bottom right.
    places = dist.Normal(0.0, 1.0).icdf(torch.linspace(0.03, 0.97, side))
    lattice = torch.stack([places.repeat(side), places.flip(0).repeat_interleave(side)], -1)
    decoded = vae.likelihood(lattice).base_dist.probs
figure, panels = subplots(1, 3, height=3.7)
for y in range(10):
    panels[0].scatter(*means[train.y == y].T.numpy(), s=4, linewidths=0, color=theme.classes[y], label=str(y))
    panels[0].text(*means[train.y == y].median(0).values.tolist(), str(y), ha="center", va="center", weight="bold")
panels[0].set_title("means of q(z | x), by label")
panels[1].scatter(*drawn.T.numpy(), s=4, linewidths=0)
panels[1].set_title("aggregate posterior")
for axes in panels[:2]:
    for radius in (1, 2):
        axes.add_patch(plt.Circle((0, 0), radius, fill=False, ls="--", color=theme.ink, lw=1))
    axes.set(xlim=(-4, 4), ylim=(-4, 4), aspect="equal", xlabel="$z_1$", ylabel="$z_2$")
mosaic = decoded.reshape(side, side, 8, 8).permute(0, 2, 1, 3).reshape(8 * side, 8 * side)
panels[2].imshow(mosaic.numpy(), cmap=theme.gray, vmin=0, vmax=1)
panels[2].set(title="decoded: E[x | z]", xlabel="$z_1$ →", ylabel="$z_2$ →", xticks=[], yticks=[])
panels[2].grid(False)
plt.show()
distance = torch.cdist(means, means) + 1e9 * torch.eye(len(means))
same = (train.y[distance.argmin(1)] == train.y).double().mean()
print(
    f"the nearest other datum in z has the same label: {same:.3f} (by chance: {(torch.bincount(train.y) / len(train)).square().sum():.3f})"
)
print(f"variance of the aggregate posterior: {[f'{v:.2f}' for v in drawn.var(0)]}")
claim(same > 0.6)

# %% [markdown]
# Two numbers per image are enough to keep many classes apart. Neighbors in $z$ look alike, and images between two
# classes resemble both.
#
# ## 4. Posterior collapse
#
# Sometimes a VAE does not use $z$ at all. This happens when the decoder does not need $z$. Here is such a decoder: an
# autoregressive model of the pixels (chapter 02) given $z$.


# %%
def strong():
    return dgm.Autoregressive(dgm.Bernoulli(shape, MADE(shape, 1, (128,), given_shape=(8,), levels=2)))


def per_feature(vae, x=test.x):
    """KL(q(z_j | x) || p(z_j)) of every feature, the mean over x, from the highest down."""
    with torch.no_grad():
        q = vae.encoder(x)
        kl = 0.5 * (q.variance + q.mean**2 - 1 - q.variance.log())
    return kl.mean(0).sort(descending=True).values


def told_by_z(vae, x=test.x):
    """Pixels in which a draw from p(x | z) differs from x: with the z of x, and with that of another datum."""
    with torch.no_grad():
        z = vae.encoder(x).sample()
        drawn = vae.likelihood(torch.cat([z, z.roll(1, 0)])).sample()
    own, other = (drawn != torch.cat([x, x])).double().flatten(1).sum(1).chunk(2)
    return own.mean().item(), other.mean().item()


ways = {
    "weak decoder": (None, "elbo"),
    "strong decoder": (strong, "elbo"),
    "strong, KL warmed up": (strong, "annealed:0.5"),
    "strong, 8 nats free": (strong, "free-bits:8"),
}
collapse = {}
for name, (likelihood, objective) in ways.items():
    torch.manual_seed(1)
    collapse[name] = make(8, likelihood and likelihood())
    train_on_digits(collapse[name], objective=objective)
    elbo = dgm.evaluate(collapse[name], test, num_samples=scaled(16, 2))
    iwae = dgm.evaluate(collapse[name], test, num_particles=scaled(100, 4))
    own, other = told_by_z(collapse[name])
    print(
        f"{name:21s} KL {elbo.kl['z']:5.2f}  ELBO {elbo.nats:7.2f}  {iwae.kind} {iwae.nats:7.2f} nats   "
        f"features of z in use {int((per_feature(collapse[name]) > 0.1).sum())}   pixels wrong {own:.1f} with its z, {other:.1f} with another's"
    )
    ways[name] = elbo, iwae, own, other

# %%
figure, axes = subplots(width=7.5, height=2.6)
for i, (name, each) in enumerate(collapse.items()):
    axes.bar(torch.arange(8).numpy() + 0.2 * i - 0.3, per_feature(each).numpy(), width=0.2, label=name)
axes.set(
    xlabel="feature of z, from the highest KL",
    ylabel="KL, nats",
    xticks=range(8),
    title="how much each feature of z says",
)
axes.legend()
plt.show()
some = test.x[torch.tensor([0, 1, 2, 3])]
rows, labels = [], []
for i, x in enumerate(some):
    drawn = [x.unsqueeze(0)]
    for name in ("strong decoder", "strong, 8 nats free"):
        with torch.no_grad():
            z = collapse[name].encoder(x.unsqueeze(0)).mean.expand(4, -1)
            drawn.append(collapse[name].likelihood(z).sample())
    rows.append(torch.cat(drawn).float())
    labels.append(f"digit {i + 1}")
headings = ["x", "", "collapsed", "", "", "", "8 nats free", "", ""]
plots.images(torch.cat(rows), levels=2, num_columns=9, row_labels=labels, column_labels=headings)

# %% [markdown]
# Each row has a digit, then four draws from $p(x \mid z)$ with its own $z$ under the collapsed model, then four draws
# under the cured model. The collapsed model draws digits, but not *this* digit: $z$ carries almost no information, and
# the decoder does everything.

# %%
weak, lost, warmed, freed = ways.values()
claim(lost[0].kl["z"] < 0.3 * weak[0].kl["z"])
claim(freed[0].kl["z"] > 3 * lost[0].kl["z"])
claim(freed[3] - freed[2] > lost[3] - lost[2] + 2)
claim(warmed[0].kl["z"] > 2 * lost[0].kl["z"])
difference, error = lost[1].minus(weak[1])
print(
    f"collapsed minus weak decoder: {difference:.2f} +- {error:.2f} nats of log p(x), by the importance-weighted bounds"
)
claim(difference > 2 * error)
difference, error = freed[0].minus(lost[0])
print(f"ELBO, 8 nats free minus collapsed: {difference:.2f} +- {error:.2f} nats")

# %% [markdown]
# Collapse is not a failure of training: the collapsed model has a *better* bound on $\log p(x)$ than the weak decoder.
# The bound prefers collapse. A nat of information in $z$ costs a nat of KL plus the gap of the guide, while the decoder
# can learn the same at no cost. If you need $z$, change the training:
#
# - **a weaker decoder**, which cannot do without $z$;
# - **free bits**: the KL costs nothing up to a number of nats, so a smaller KL gains nothing;
# - **warm-up**: the weight of the KL rises from zero, so the model uses $z$ before it has a cost. Here much of $z$
#   stays in use. Longer training may still lose it, because the bound at the end is the same.
#
# ## 5. A gradient through a draw
#
# The bound is an expectation over $q$, and $q$ has parameters. The gradient passes through `sample` by the
# **reparameterization** $z = \mu + \sigma \epsilon$, $\epsilon \sim N(0, 1)$: the draw becomes a differentiable
# function of $\mu$ and $\sigma$. In Pyro, a distribution with this property has `has_rsample`, and `Trace_ELBO` uses
# it. Without it, `Trace_ELBO` uses the score function, $E[\nabla \log q(z)\, (\dots)]$, which is right on average but
# far noisier. (`pyro.param(name, start)` is a parameter that Pyro keeps for you, in its *param store*; a guide without
# a network needs nothing else. `clear_param_store` deletes all parameters. `differentiable_loss` is minus the ELBO as a
# tensor, for `backward`.)


# %%
def model(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def guide_with(rsample):
    def guide(x):
        mean = pyro.param("mean", torch.tensor(0.0))
        pyro.sample("z", dist.Normal(mean, 0.4).has_rsample_(rsample))

    return guide


gradients = {}
for name, rsample in {"reparameterized": True, "score function": False}.items():
    pyro.clear_param_store()
    found = []
    for _ in range(scaled(2000, 20)):
        pyro.param("mean", torch.tensor(0.0)).grad = None
        Trace_ELBO().differentiable_loss(model, guide_with(rsample), torch.tensor(1.0)).backward()
        found.append(pyro.param("mean").grad.item())
    gradients[name] = torch.tensor(found)
    print(
        "{:16s} gradient {:6.3f} +- {:.3f},".format(name, *mean_and_error(gradients[name])),
        f"standard deviation of one: {gradients[name].std():.2f}",
    )
exact = 0.0 - (1.0 - 0.0) / 0.25  # of -ELBO: mean / 1 - (x - mean) / 0.5^2
print(f"by hand          gradient {exact:6.3f}")
pyro.clear_param_store()
for values in gradients.values():
    mean, error = mean_and_error(values)
    claim(abs(mean - exact) < 4 * error + 1e-6)
claim(gradients["score function"].std() > 2 * gradients["reparameterized"].std())

# %% [markdown]
# ## 6. Exercises
#
# 1. The KL of two Normals has a closed form. Pyro's `TraceMeanField_ELBO` uses it, `Trace_ELBO` samples it. Do they
#    agree on the VAE of section 1? Which do you expect to have less noise, and which does have less?
# 2. How many features of $z$ are used if there are 1, 8 or 32 of them?
# 3. The aggregate posterior is not quite $N(0, I)$. Replace the prior of the two-dimensional VAE by a flow. What are
#    the KL and the importance-weighted bound then?
#
# ## What to change next
#
# - **The data.** Gray levels: `dgm.data.load("digits")`, with `dgm.DiscretizedLogistic(shape, 17, 5, network)` as the
#   likelihood and 15 parameters per pixel.
# - **The encoder.** `dgm.flow.nsf((2,), given_shape=shape, given_levels=2)` is a guide that is not a Normal. What
#   happens to the KL of section 1?
# - **The objective.** `dgm.fit(vae, train, "iwae:10")` maximizes a tighter bound. Does the encoder get better or worse?
# - **The price.** Try `"free-bits:2"` and `"free-bits:20"` in section 4. What does a nat of $z$ cost in log p(x)?
# - **Labels.** `dgm.Labeled(prior, vae)` with parts that take `num_classes` is the semi-supervised VAE.
#
# ## Solutions
#
# **1.** They agree on average. The closed form samples less, but it is the noisier one: here its KL is a constant, and
# all the noise of $\log p(x \mid z)$ remains. In the sampled form $\log p(x, z) - \log q(z \mid x)$ the two parts vary
# together. If $q$ were the exact posterior, that difference would be $\log p(x)$ for every draw, without any noise.

# %%
x = test.x[: scaled(100, 20)]
found = {}
for name, elbo in {"Trace_ELBO": Trace_ELBO(), "TraceMeanField_ELBO": TraceMeanField_ELBO()}.items():
    found[name] = torch.tensor([elbo.loss(vae.model, vae.guide, x) / len(x) for _ in range(scaled(200, 5))])
    print(
        "{:20s} -ELBO {:.3f} +- {:.3f}".format(name, *mean_and_error(found[name])),
        f"nats, standard deviation of one: {found[name].std():.3f}",
    )
sampled, closed = found.values()
claim(abs(sampled.mean() - closed.mean()) < 4 * (sampled.var() / 200 + closed.var() / 200).sqrt())
claim(closed.std() > sampled.std())

# %% [markdown]
# **2.** With one feature, it is used. With eight, more are used; with 32, only some of them. Each used feature has a
# cost, and the other features stay at the prior.

# %%
used = {}
for size in (1, 8, 32):
    torch.manual_seed(0)
    each = make(size)
    train_on_digits(each)
    used[size] = int((per_feature(each) > 0.1).sum())
    print(f"{size:2d} features: {used[size]} in use, ELBO {dgm.evaluate(each, test).nats:.2f} nats")
claim(used[1] == 1)
claim(used[8] <= 8)
claim(used[32] < 32)

# %% [markdown]
# **3.** They change little. A flow can take any shape of the aggregate posterior, but in section 3 this was nearly
# round already. Where it is not round, as on the moons of chapter 00, another prior helps.

# %%
torch.manual_seed(0)
with_flow = make(2, prior=dgm.flow.nsf((2,), layers=4, hidden=(32, 32)))
train_on_digits(with_flow, epochs=80)
bounds = {}
for name, each in {"Normal prior": vae, "flow prior": with_flow}.items():
    bounds[name] = dgm.evaluate(each, test, num_particles=scaled(200, 4))
    elbo = dgm.evaluate(each, test, num_samples=scaled(32, 2))
    print(f"{name:13s} KL {elbo.kl['z']:.2f}  ELBO {elbo.nats:.2f}  {bounds[name].kind} {bounds[name].nats:.2f} nats")
difference, error = bounds["flow prior"].minus(bounds["Normal prior"])
print(f"flow minus Normal: {difference:.2f} +- {error:.2f} nats")
claim(abs(difference) < 0.5)
