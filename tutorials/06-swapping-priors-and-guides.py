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
# # Swapping priors and guides
#
# A variational autoencoder has three parts, and we choose each of them:
#
# | part | what it says | textbook choice |
# |---|---|---|
# | prior $p(z)$ | how latents are distributed before any datum is seen | $N(0, I)$ |
# | likelihood $p_\theta(x \mid z)$ | how a latent becomes a datum | a Normal with its mean from a network |
# | encoder, the guide $q(z \mid x)$ | which latents may have produced a datum | a diagonal Normal |
#
# The fourth choice is the training *objective*. Prior and likelihood together are the model: they alone define
# $p_\theta(x)$. Guide and objective determine how well we can estimate $p_\theta(x)$, and which parameters training
# finds.
#
# This chapter swaps them one at a time and looks at what changes. Everything is two-dimensional, so every prior, every
# guide and even the true posterior can be plotted. It continues from the VAE of [chapter
# 00](00-four-ways-to-represent-p-of-x.ipynb), which also explains Pyro's terms *sample site*, *plate*, *trace*, *model*
# and *guide*.

# %%
import math
from dataclasses import replace
from functools import partial

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample

import dgm_pyro as dgm
from chapter import claim, scaled, style, subplots, theme  # small helpers, in chapter.py beside this
from dgm_pyro import guides
from dgm_pyro.networks import MLP

style()
subplots = partial(subplots, squeeze=False)

# %% [markdown]
# ## 1. Data, and a VAE to start from
#
# The data are a pinwheel of five arms. `dgm.build("vae", ...)` makes a VAE from names or objects. The likelihood here
# is an object: a Normal whose mean is a network of $z$, with one learned scale (the noise) that starts at 0.2.

# %%
train, test = dgm.data.load("pinwheel"), dgm.data.load("pinwheel", "test")
some = test[: scaled(1000, 50)]
print(train)


def noisy_mean(start=0.2):
    """p(x | z): a Normal with its mean from a network of z, and one learned scale for both features."""
    likelihood = dgm.Normal(2, MLP((2,), 2, hidden=(64, 64)), scale_type="shared")
    torch.nn.init.constant_(likelihood.raw_scale, math.log(math.expm1(start)))  # softplus makes it the start again
    return likelihood


def statements(program, x=test.x[:5]):
    """Print the sample sites that model and guide state for the data x, with the shape of their values."""
    for role in ("model", "guide"):
        nodes = poutine.trace(getattr(program, role)).get_trace(x).nodes
        sites = [site for site in nodes.values() if site["type"] == "sample" and not site_is_subsample(site)]
        print(f"  {role}: " + ", ".join(f"{site['name']} {tuple(site['value'].shape)}" for site in sites))


def trained(
    objective="elbo", seed=0, likelihood=noisy_mean, epochs=25, data=train, lr=5e-3, quiet=False, start=None, **swaps
):
    """A trained VAE with ``swaps``. The seed is the same for each, so the order of the cells does not matter."""
    pyro.set_rng_seed(seed)
    likelihood = likelihood() if callable(likelihood) and not isinstance(likelihood, dgm.Program) else likelihood
    program = dgm.build("vae", data, likelihood=likelihood, hidden=(64, 64), standardize=False, **swaps)
    if start is not None:  # where the means of the guide begin
        with torch.no_grad():
            program.encoder.network.rest[-1].bias[: len(start)] = start
    options = {"batch_size": 128, "lr": lr, "seed": seed, "progress": False}
    history = dgm.fit(program, data[: scaled(len(data), 256)], objective, epochs=scaled(epochs), **options)
    if not quiet:
        print(f"{len(history.epochs)} epochs, loss {history.losses[0]:.3f} -> {history.losses[-1]:.3f} nats per datum")
    return program


base = trained(prior="normal", encoder="meanfield")
statements(base)

# %% [markdown]
# The central picture of this chapter compares two distributions of $z$:
#
# - the **prior** $p(z)$, from which new data are generated;
# - the **aggregate posterior** $q(z) = \frac1N \sum_n q(z \mid x_n)$: where the encoder puts the data.
#
# The likelihood is trained on draws from $q(z)$ only. Where the prior has mass and $q(z)$ has almost none there is a
# **hole**: the likelihood was hardly trained there, yet new data are generated from there.

# %%
colors = theme.classes


@torch.no_grad()
def log_aggregate(vae, z, x=test.x):
    """log q(z): the mean of q(z | x_n) over the test data, at points z, (M,)."""
    q = vae.encoder(x)
    rows = [q.log_prob(part.unsqueeze(1)).logsumexp(1) for part in z.split(250)]
    return torch.cat(rows) - math.log(len(x))


def square(reach, side):
    """Points of a square grid, and the area of a cell."""
    line = torch.linspace(-reach, reach, side)
    return torch.cartesian_prod(line, line), float(line[1] - line[0]) ** 2


def heat(axes, values, reach, title="", **options):
    side = math.isqrt(len(values))
    options = {"cmap": theme.heat, "origin": "lower", "interpolation": "bilinear", "vmin": 0} | options
    shown = axes.imshow(values.detach().reshape(side, side).T.numpy(), extent=2 * (-reach, reach), **options)
    on_square(axes, reach, title)
    return shown


def on_square(axes, reach, title=""):
    axes.set(
        title=title, xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xticks=(-2, 0, 2), yticks=(-2, 0, 2)
    )
    axes.grid(False)


def points(axes, x, y=None, reach=4, title="", **options):
    on_square(axes, reach, title)
    color = theme.ink if y is None else [colors[label] for label in y.tolist()]
    axes.scatter(*x.detach().T.numpy(), **({"s": 3, "linewidths": 0, "c": color} | options))


z, area = square(4, scaled(101, 21))
with torch.no_grad():
    log_p_z, log_q_z = base.prior.log_prob(z), log_aggregate(base, z)
    drawn = base.prior.sample(scaled(10_000, 500))
    in_hole = log_aggregate(base, drawn) < base.prior.log_prob(drawn) - math.log(2)
    made = base.likelihood(drawn).mean
    means = base.encoder(some.x).mean

figure, panels = subplots(1, 4, width=12, height=2.8)
heat(panels[0, 0], log_p_z.exp(), 4, "prior p(z)")
heat(panels[0, 1], log_q_z.exp(), 4, "aggregate posterior q(z)")
shown = heat(panels[0, 2], (log_q_z - log_p_z).clamp(-3, 3), 4, cmap="coolwarm", vmin=-3, vmax=3)
points(panels[0, 2], means, reach=4, title="log [q(z) / p(z)], means of q(z | x)", s=1)
figure.colorbar(shown, ax=panels[0, 2], label="nats")
points(panels[0, 3], test.x, reach=4, s=3, c=theme.muted, alpha=0.3)
points(panels[0, 3], made[~in_hole][:1000], reach=4, s=2, c=theme.series[0])
points(panels[0, 3], made[in_hole][:1000], reach=4, title="draws of p(z), decoded", s=2, c=theme.series[1])
for axes, name in zip(panels[0], "zzzx", strict=True):
    axes.set(xlabel=f"${name}_1$", ylabel=f"${name}_2$")
plt.show()
share = in_hole.double().mean().item()
print(f"{100 * share:.0f} % of the prior's draws fall where q(z) is less than half of p(z)")
claim(share > 0.25)

# %% [markdown]
# The aggregate posterior is itself a wheel with five arms. In the third picture, $q(z)$ is above the prior in red
# regions and below it in blue regions, the holes. In the last picture, orange draws come from holes, where $q(z)$ is
# less than half of $p(z)$. Many of them decode to points between the arms of the data (gray), where there are hardly
# any data.
#
# The bound shows this too. Its KL, averaged over the data, splits into two parts that are never negative (Hoffman and
# Johnson 2016):
#
# $$\frac1N \sum_n D_{KL}(q(z \mid x_n) \,\|\, p(z)) = \underbrace{I_q(x; z)}_{\text{information about x}} +
# \underbrace{D_{KL}(q(z) \,\|\, p(z))}_{\text{mismatch}}.$$
#
# The first part is the cost of encoding which datum it was, and allows a better reconstruction. The second is wasted:
# it would be zero if the prior were $q(z)$. So for a given encoder and likelihood, **the mismatch is the most that any
# other prior can gain**.


# %%
@torch.no_grad()
def mismatch(vae):
    """D_KL(q(z) || p(z)) and its standard error, by draws from q(z); an upper bound where log p(z) is a lower one."""
    pyro.set_rng_seed(0)
    z = vae.encoder(test.x[: scaled(2000, 50)]).sample()
    ratio = log_aggregate(vae, z).double() - dgm.evaluate(vae.prior, z, num_particles=scaled(32, 2)).values
    return ratio.mean().item(), (ratio.std() / len(ratio) ** 0.5).item()


iwae, kl = dgm.evaluate(base, some, num_particles=100), dgm.evaluate(base, some, num_samples=16).kl["z"]
wasted, error = mismatch(base)
print(f"{iwae.nats:.3f} nats per datum; KL {kl:.3f}, of which mismatch {wasted:.3f} +- {error:.3f}")
claim(0.3 < wasted < kl / 2)

# %% [markdown]
# ## 2. Swapping the prior
#
# A prior is any program over $z$. These are the names that `dgm.build` knows for real $z$, from simple to elaborate.
# Each could be passed as an object instead; the comments show most of these objects.

# %%
PRIORS = {
    "normal": "N(0, I)",
    "mog": "a mixture of 10 Normals",  # dgm.priors.MixturePrior(2, 10)
    "vamp": "the encoder's q(z | u), averaged over 100 learned u",  # dgm.priors.VampPrior(encoder, u)
    "nsf": "a spline flow",  # dgm.flow.nsf((2,), layers=3, hidden=(64, 64))
    "ar": "p(z_1) p(z_2 | z_1), mixtures of Normals",  # dgm.Autoregressive(...)
    "diffusion": "a diffusion of 20 steps: latent diffusion",  # dgm.Diffusion((2,), ...)
    "vae": "another VAE: a hierarchy",  # dgm.VAE(..., latent_name="z2")
}
by_prior = {"normal": base} | {name: trained(prior=name) for name in PRIORS if name != "normal"}

# %% [markdown]
# Nothing else changed: the likelihood, the diagonal Normal as encoder and the 25 epochs are the same. The factors of
# the model show what did change. Most priors are one factor, $p(z)$; the formula of a flow, an autoregressive model or
# a diffusion follows after the comma. The hierarchy adds a factor: `z2` above `z`.

# %%
for name in PRIORS:
    print(f"{name:10s} {by_prior[name].formula().p}")

# %% [markdown]
# The upper row shows each prior, with the aggregate posterior of its trained encoder as dots. The lower row shows draws
# of $x$ from the model. The densities of `diffusion` and `vae` are integrals themselves; the picture shows their
# importance-weighted estimates (chapter 00).

# %%
figure, panels = subplots(2, len(by_prior), width=13.5, height=4.4)
made_by = {}
for (name, vae), (above, below) in zip(by_prior.items(), panels.T, strict=True):
    pyro.set_rng_seed(0)
    with torch.no_grad():
        coded = vae.encoder(some.x).sample()
    reach = max(3, math.ceil(1.1 * coded.abs().quantile(0.998)))
    z, area = square(reach, scaled(61, 9))
    density = dgm.evaluate(vae.prior, z, num_particles=scaled(16, 2)).values.exp()
    heat(above, density, reach, name, vmax=density.quantile(0.998))
    points(above, coded, some.y, reach, name, s=1)
    made_by[name] = vae.sample(scaled(5000, 100))
    points(below, made_by[name][:2000], reach=4, s=1, c=theme.series[0])
panels[0, 0].set_ylabel("prior (shade)\nand q(z) (dots)")
panels[1, 0].set_ylabel("draws of x")
plt.show()

# %% [markdown]
# How good is each prior? The table lists:
#
# - the ELBO, and the importance-weighted bound with 100 particles (IWAE), which is close to $\log p_\theta(x)$;
# - by how much the IWAE bound exceeds that of $N(0, I)$ on the same data;
# - the KL and its wasted part, the mismatch;
# - the share of draws of $x$ that stray: they are farther from all test data than 99 % of the training data are.


# %%
near = torch.cdist(train.x, test.x).min(1).values.quantile(0.99)


def strays(x):
    """The percentage of x farther from all test data than 99 % of the training data are."""
    return 100 * (torch.cdist(x, test.x).min(1).values > near).double().mean().item()


def row(name, vae, than=None, wasted=None, x=None):
    """Print the bounds and the KL of a VAE; return its IWAE evidence."""
    bound = dgm.evaluate(vae, some, num_samples=scaled(16, 2))
    iwae = dgm.evaluate(vae, some, num_particles=scaled(100, 4))
    kl = bound.reconstruction["x"] - bound.nats  # of all latents: a prior may have some of its own
    better, error = iwae.minus(than or iwae)
    print(
        f"{name:20s} ELBO {bound.nats:.3f}   IWAE {iwae.nats:.3f} +- {iwae.nats_stderr:.3f}"
        f"   better by {better:+.3f} +- {error:.3f}   KL {kl:.3f}"
        + (f"   mismatch {wasted[0]:.3f} +- {wasted[1]:.3f}" if wasted else "")
        + (f"   stray {strays(x):4.1f} %" if x is not None else "")
    )
    return iwae


iwaes, mismatches, noises = {}, {}, {}
for name, vae in by_prior.items():
    noises[name] = vae.likelihood(torch.zeros(1, 2)).stddev[0, 0].item()
    mismatches[name] = mismatch(vae)
    iwaes[name] = row(name, vae, iwaes.get("normal"), mismatches[name], made_by[name])

print("noise of the likelihood: " + ", ".join(f"{name} {noise:.2f}" for name, noise in noises.items()))
gains = {name: iwaes[name].minus(iwaes["normal"]) for name in iwaes if name != "normal"}
claim(all(gain > 5 * error for gain, error in gains.values()))
for name in ("mog", "vamp", "nsf", "ar"):
    claim(gains[name].nats > 0.4)
    claim(mismatches[name][0] < mismatches["normal"][0] / 2)
    claim(noises[name] < noises["normal"])
    claim(strays(made_by[name]) < 0.75 * strays(made_by["normal"]))

# %% [markdown]
# The mixture, the VampPrior, the spline flow and the autoregressive prior gain most. They need not be round, the
# mismatch falls by about two thirds or more, and fewer draws stray. The mixture gains about as much as the 0.5 nats of
# mismatch of the first VAE. The others gain *more*, because the encoder and likelihood of the first VAE were
# compromises too: with a prior that can have gaps, the encoder moves the arms apart, and the likelihood needs less
# noise. The diffusion and the hierarchy gain least with these settings. The hierarchy's top latent is a single number,
# so its $p(z)$ is one line, which is so thick here that it has no gaps. The diffusion has not fully learned the gaps in
# 25 epochs.
#
# The standard errors account only for the choice of test data. The training seed changes the result too, and a
# difference between priors matters only if it is large compared with that change. Here are three seeds with the prior
# $N(0, I)$:

# %%
of_seeds = {0: iwaes["normal"].nats}
for seed in (1, 2):
    of_seeds[seed] = row(f"normal, seed {seed}", trained(seed=seed, quiet=True), iwaes["normal"]).nats
spread = max(of_seeds.values()) - min(of_seeds.values())
print(f"from worst to best: {spread:.3f} nats")
claim(min(gain for gain, _ in gains.values()) > 3 * spread)

# %% [markdown]
# Every swapped prior is better by several times that spread. One seed each is not enough to rank the swapped priors
# among themselves.
#
# ## 3. Swapping the guide
#
# The guide is not part of the model. To see what the guide alone does, we now take a model in which nothing is learned
# and whose posterior has awkward shapes: a ship at $z \sim N(0, I)$ hears two beacons and measures its distance to
# each, with an error of standard deviation 0.2. Where can the ship be, given the two distances $x$?
#
# This likelihood has no network. Any function of $z$ that returns a Pyro distribution can be a likelihood: a
# `dgm.Conditional` needs only `event_shape` and `forward`.


# %%
class Distances(dgm.Conditional):
    """p(x | z): the distances of z to some beacons, with Normal errors."""

    conditional = True

    def __init__(self, beacons, error=0.2):
        super().__init__()
        self.register_buffer("beacons", beacons)
        self.error, self.event_shape, self.given_shape = error, beacons.shape[:1], beacons.shape[1:]

    def forward(self, given=None):
        distances = (given.unsqueeze(-2) - self.beacons).norm(dim=-1)
        return dist.Normal(distances, self.error).to_event(1)


beacons = torch.tensor([[-1.2, -0.8], [1.2, 0.2]])
p_z, p_x = dgm.Normal(2), Distances(beacons)
pyro.set_rng_seed(0)
heard = dgm.Data(p_x(p_z.sample(4000)).sample(), name="distances")
unheard = dgm.Data(p_x(p_z.sample(scaled(1000, 50))).sample(), name="distances, test")
z_grid, area = square(4, scaled(121, 41))


@torch.no_grad()
def log_joint(x):
    """log p(x, z) at every z of the grid, for every x: (N, grid)."""
    return torch.cat([p_z.log_prob(z_grid) + p_x(z_grid).log_prob(part.unsqueeze(1)) for part in x.split(100)])


truth = log_joint(unheard.x).logsumexp(1).double() + math.log(area)
print(f"log p(x) by quadrature: {truth.mean():.3f} +- {truth.std() / len(truth) ** 0.5:.3f} nats per datum")

# %% [markdown]
# In two dimensions we get the exact posterior $p(z \mid x) = p(x, z) / p(x)$ by dividing by a sum over a grid. The
# pictures show three ships, each marked by a cross, and where they can be, given their distances:

# %%
ships = {"correlated": [0.3, -0.2], "banana": [2.0, 0.8], "bimodal": [-0.7, 1.3]}
told = p_x(torch.tensor(list(ships.values()))).mean.detach()  # the exact distances
posteriors = log_joint(told).softmax(1) / area


def contours(axes, density, **options):
    """Lines at 3, 20 and 60 % of the highest density."""
    side = math.isqrt(len(density))
    line = torch.linspace(-4, 4, side)
    levels = [share * float(density.max()) for share in (0.03, 0.2, 0.6)]
    options = {"levels": levels, "colors": [theme.ink], "linewidths": 0.8} | options
    axes.contour(line.numpy(), line.numpy(), density.reshape(side, side).T.numpy(), **options)


figure, panels = subplots(1, 3, width=8.4, height=2.8)
for axes, (name, ship), density in zip(panels[0], ships.items(), posteriors, strict=True):
    heat(axes, density, 4, f"p(z | x): {name}")
    axes.scatter(*beacons.T, marker="^", color=theme.series[1], s=25, label="beacons")
    axes.scatter(*ship, marker="x", color=theme.classes[2], s=30, label="ship")
    axes.set(xlim=(-3, 3), ylim=(-3, 3), xlabel="$z_1$")
panels[0, 0].set_ylabel("$z_2$")
figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
plt.show()

# %% [markdown]
# The two circles around the beacons meet in two points, which are mirror images in the line through the beacons. For a
# ship on that line between the beacons the two points coincide. For a ship beyond a beacon the circles nearly coincide,
# so a whole arc is possible. The prior only says that the point nearer the origin is somewhat likelier.
#
# We train five guides by name, and one of them again with its initial means on the far side of the line. Only the
# guides have parameters to train; the prior and the likelihood have none.

# %%
GUIDES = {
    "meanfield": "a Normal, features independent",
    "fullrank": "a Normal with a covariance",
    "planar": "a Normal, bent by 8 planar maps",
    "iaf": "an inverse autoregressive flow",
    "nsf": "a spline flow",
}
navigate = {"data": heard, "likelihood": p_x, "epochs": 20, "quiet": True}
by_guide = {name: trained(encoder=name, **navigate) for name in GUIDES}
along = (beacons[1] - beacons[0]) / (beacons[1] - beacons[0]).norm()
across = torch.stack([-along[1], along[0]])  # the origin lies on this side of the line through the beacons
by_guide["fullrank, far"] = trained(encoder="fullrank", start=-1.5 * across, **navigate)


def gap_row(name, vae):
    """How far the bounds are below log p(x), which is exact here: ELBO and IWAE-50."""
    gaps = []
    for particles in (1, 50):
        bound = dgm.evaluate(vae, unheard, num_particles=particles, num_samples=32)
        below = truth - bound.values
        gaps.append((below.mean().item(), (below.std() / len(below) ** 0.5).item()))
    print(
        f"{name:18s}"
        + "".join(f"   {k} {g:.3f} +- {e:.3f}" for k, (g, e) in zip(("ELBO", "IWAE-50"), gaps, strict=True))
    )
    return [gap for gap, _ in gaps]


print("log p(x) minus the bound, in nats:")
gap_of = {name: gap_row(name, vae) for name, vae in by_guide.items()}
claim(all(0 < tight < loose for loose, tight in gap_of.values()))
claim(all(gap_of[name][0] < 0.9 * gap_of["meanfield"][0] for name in GUIDES if name != "meanfield"))
claim(gap_of["fullrank, far"][0] == max(gap for gap, _ in gap_of.values()))


# %%
def draws_of(guides, given=told, num=1000):
    """Draws from each guide (dots) over the exact posteriors (lines), a row for each x."""
    _, panels = subplots(len(ships), len(guides), width=2.1 * len(guides) + 0.5, height=6.3)
    for (name, vae), column in zip(guides.items(), panels.T, strict=True):
        pyro.set_rng_seed(0)
        with torch.no_grad():
            z = vae.encoder(given.repeat_interleave(num, 0)).sample().reshape(len(given), num, 2)
        for axes, of_x, density in zip(column, z, posteriors, strict=True):
            points(axes, of_x, reach=3, title=name if axes is column[0] else "", s=2, c=theme.series[0])
            contours(axes, density)
        column[-1].set_xlabel("$z_1$")
    for axes, name in zip(panels[:, 0], ships, strict=True):
        axes.set_ylabel(f"{name}: $z_2$")
    plt.show()


draws_of(by_guide)
# %% [markdown]
# First row: a diagonal Normal cannot tilt, and is too narrow instead; all the others can tilt. Second row: a Normal
# cannot bend. The flows can, but only the spline flow follows the arc around its bend. Third row: each guide has one
# mode, and only the spline flow puts a few draws near the other.
#
# The gap of the ELBO *is* a divergence, the mean of $D_{KL}(q(z \mid x) \,\|\, p(z \mid x))$. This direction penalizes
# $q$ heavily for draws where the posterior has no mass, and only lightly for mass that it misses. A guide that covers
# one of two modes of equal weight pays $\log 2 = 0.69$ nats, and a guide that spreads over the empty region between
# them pays more. So most guides trained by the ELBO choose one mode. A guide that could cover both may never find the
# second, because its draws give no gradient towards it. Which of the two modes a guide chooses depends on where it
# starts. How often does the guide put most of its mass on the less likely side of the line through the beacons?


# %%
@torch.no_grad()
def wrong_side(vae, x):
    """The share of data whose guide is mostly on the less likely side of the line through the beacons, in percent."""
    beyond = lambda z: ((z - beacons[0]) @ across > 0).float()  # noqa: E731
    pyro.set_rng_seed(0)
    likelier = log_joint(x).softmax(1) @ beyond(z_grid) > 0.5
    chosen = beyond(vae.encoder(x).sample((100,))).mean(0) > 0.5
    return 100 * (likelier != chosen).double().mean().item()


wrong = {name: wrong_side(vae, unheard.x) for name, vae in by_guide.items()}
for name, share in wrong.items():
    print(f"{name:18s} on the wrong side for {share:4.1f} % of the data")
claim(wrong["fullrank"] < 10 and wrong["meanfield"] < 10 and wrong["fullrank, far"] > 90)

# %% [markdown]
# The same family, after the same training, has either the best bound of the Normals or the worst bound of the table.
# Started at the middle of the prior, the guide finds the mode nearer the origin, which is the likelier one. Started on
# the far side, it stays there, because there is no mass between the modes. The best member of a larger family is at
# least as good, but training need not find it.
#
# ### Two gaps
#
# The gap of a guide has two causes. The family of $q$ may have no good member: the **approximation gap**. Or the
# encoder, one network for all data, does not find the best member for each datum: the **amortization gap**.
# `dgm.infer.gaps` separates the two by searching for the best member, datum by datum. It needs $\log p(x)$, which
# usually has to be estimated. Here we can substitute the exact value, and see how good the estimate was.

# %%
few = unheard.x[: scaled(300, 4)]
split = {}
for name in ("meanfield", "fullrank"):
    found = dgm.infer.gaps(
        by_guide[name],
        few,
        num_temperatures=0,
        num_particles=scaled(1000, 20),
        gradient_steps=scaled(200, 3),
        num_samples=256,
    )
    exact = replace(found, log_evidence=truth[: len(few)], kind="quadrature")
    split[name] = exact.means()
    for label in ("approximation gap", "amortization gap"):
        mean, error = split[name][label]
        print(f"{name:10s} {label:18s} {mean:.3f} +- {error:.3f}   (with {found.kind}: {found.means()[label][0]:.3f})")
for means in split.values():
    (family, of_family), (encoder, of_encoder) = means["approximation gap"], means["amortization gap"]
    claim(family - encoder > 2 * (of_family + of_encoder))

# %% [markdown]
# The family costs more than the encoder, so here we should swap the family of the guide, not enlarge its network. (For
# a flow as guide, the search trains a copy of the flow for each datum. That takes minutes, so we leave it out. The
# search starts at the encoder's answer and climbs. It cannot leave a wrong mode, so a family may look poorer than it
# is.)
#
# There is a trap: the importance-weighted estimate of $\log p(x)$ takes its draws from the same guide. It misses the
# modes that the guide misses, and so underestimates the gap that it should measure. Even with 1000 particles, the
# estimated approximation gap is only a fraction of the true one. By default, `gaps` therefore also runs annealed
# importance sampling, and uses that estimate if it is higher.
#
# ### A guide for a hierarchy
#
# With the prior `vae` there are two latents, and the guide can draw them in either order. *Bottom-up*, $q(z \mid x)\,
# q(z_2 \mid z)$, is what we trained above. The *ladder* follows the order of the model, $q(z_2 \mid x)\, q(z \mid z_2,
# x)$. At each level it multiplies a Normal computed from $x$ by the Normal of the model.

# %%
ladder = trained(prior="vae", encoder="ladder")
statements(ladder)
row("bottom-up", by_prior["vae"])
iwae_of_ladder = row("ladder", ladder, iwaes["vae"])

# %% [markdown]
# The ladder is a better guide, but the gain is about as large as the difference between two seeds in section 2. With
# levels of only two numbers and one there is little to gain; the ladder was designed for deep hierarchies.
#
# ## 4. Swapping the objective
#
# ### The two directions of the divergence
#
# The importance-weighted bound with $K$ draws, $E[\log \frac1K \sum_k p(x, z_k) / q(z_k \mid x)]$, is an objective too.
# It does not need every draw to be good; some good ones among $K$ are enough. Reweighted wake-sleep (`rws`) trains the
# guide on draws with the same weights. It thereby minimizes the opposite divergence, $D_{KL}(p(z \mid x) \,\|\, q(z
# \mid x))$, which penalizes $q$ for mass that it misses.

# %%
by_objective = {
    "meanfield, elbo": by_guide["meanfield"],
    "meanfield, iwae:50": trained("iwae:50", encoder="meanfield", **navigate),
    "meanfield, rws": trained("rws", encoder="meanfield", **navigate),
    "nsf, elbo": by_guide["nsf"],
    "nsf, rws": trained("rws", encoder="nsf", **navigate),
}
gap_by = {name: gap_row(name, vae) for name, vae in by_objective.items()}
draws_of(by_objective)
# %%
loose, tight = (torch.tensor([gap_by[f"meanfield, {name}"][i] for name in ("elbo", "iwae:50")]) for i in (0, 1))
claim(loose[1] > 3 * loose[0] and tight[1] < tight[0] / 3)  # a far worse ELBO, a far better IWAE
claim(gap_by["nsf, rws"][0] < gap_by["nsf, elbo"][0] / 2)

# %% [markdown]
# Under `iwae:50` the diagonal Normal spreads over both modes and everything between. As an approximation of the
# posterior it is useless, and its ELBO shows this. But some of fifty draws are good, and its IWAE bound is the tightest
# of the mean-field guides here. Judge a guide by the bound it was trained for, with the same number of particles.
#
# Under `rws` the mean-field guide stays in one mode, although the divergence now favors covering both. Weights can only
# reward draws that the guide has made, and from one mode it never draws the other. The spline flow does reach both. Its
# ELBO gap after training by `rws` is less than half of its gap after training by the ELBO itself: we had to swap the
# guide *and* the objective.
#
# ### Noise of the gradient
#
# The gradients of `STL` and `DReG` have the same expectation as those of the ELBO and of IWAE, but different noise. We
# measure the signal-to-noise ratio of the gradient for the mean-field guide at the end of its training. The ratio is
# the norm of the mean gradient divided by the square root of the gradient's total variance, for batches of 32 data.


# %%
def signal_to_noise(objective, vae):
    """Signal-to-noise ratio of the gradient of the guide's parameters, over draws from the guide."""
    pyro.set_rng_seed(0)
    parameters, gradients, repeats = list(vae.encoder.parameters()), [], scaled(150, 3)
    for _ in range(repeats):
        loss = -objective(vae, unheard.x[:32]).surrogate.mean()
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    gradients = torch.stack(gradients).double()
    noise = gradients.var(0).sum()
    signal = gradients.mean(0).square().sum() - noise / repeats  # the mean itself is noisy
    return (signal.clamp_min(0) / noise).sqrt().item()


counts = (1, 4, 16, 64)
ratios = {"IWAE": [], "DReG": []}
for k in counts:
    ratios["IWAE"].append(signal_to_noise(dgm.IWAE(k), by_guide["meanfield"]))
    ratios["DReG"].append(signal_to_noise(dgm.DReG(k), by_guide["meanfield"]))
for name, values in ratios.items():
    print(f"{name}: " + ", ".join(f"K = {k}: {value:.2f}" for k, value in zip(counts, values, strict=True)))
plain, stuck = (
    signal_to_noise(dgm.ELBO(analytic_kl=False), by_guide["meanfield"]),
    signal_to_noise(dgm.STL(), by_guide["meanfield"]),
)
print(f"ELBO: {plain:.2f}   STL: {stuck:.2f}")
claim(stuck > 1.5 * plain and all(b > 1.1 * a for a, b in zip(*ratios.values(), strict=True)))
claim(ratios["IWAE"] == sorted(ratios["IWAE"]) and ratios["DReG"][1:] == sorted(ratios["DReG"][1:], reverse=True))

# %% [markdown]
# `STL` and `DReG` are less noisy with the same number of draws, `DReG` at every $K$. In return, the guide runs twice
# and must be able to score its own draws.
#
# One result differs from the theory. In theory, where the weights $p/q$ have a small variance, the ratio of IWAE falls
# like $1/\sqrt K$ and the ratio of `DReG` rises (Rainforth et al. 2018, Tucker et al. 2019). Here the ratio of IWAE
# rises, and the ratio of `DReG` falls from $K = 4$ on. The theory does not apply because this guide stays in one of two
# modes, so its weights are very uneven, and the bound is far from tight even at a large $K$.
#
# ### The weight of the KL
#
# We return to the pinwheel. `beta:4` multiplies the KL by four, `beta:0.2` by a fifth. With $\beta < 1$ the objective
# is not a bound on $\log p(x)$, and with $\beta > 1$ it is a looser one; we print the ELBO of each trained model.
# Ellipses show one standard deviation of $q(z \mid x)$ for a few data, dashed circles one and two of the prior.

# %%
by_beta = {0.2: trained("beta:0.2"), 1.0: base, 4.0: trained("beta:4")}
figure, panels = subplots(2, 3, width=8.5, height=5.4)
info = {}
for (beta, vae), (above, below) in zip(by_beta.items(), panels.T, strict=True):
    pyro.set_rng_seed(0)
    with torch.no_grad():
        q = vae.encoder(some.x)
    points(above, q.sample(), some.y, 4, f"beta = {beta:g}: q(z)", s=2)
    for loc, scale in zip(q.mean[:40], q.stddev[:40], strict=True):
        above.add_patch(plt.matplotlib.patches.Ellipse(loc, *(2 * scale), fill=False, lw=0.6, color=theme.ink))
    for radius in (1, 2):
        above.add_patch(plt.Circle((0, 0), radius, fill=False, ls="--", lw=0.8, color=theme.muted))
    made = vae.sample(5000)
    points(below, made[:2000], reach=4, title="draws of x", s=2, c=theme.series[0])
    wasted = mismatch(vae)
    bound = dgm.evaluate(vae, some, num_samples=scaled(16, 2))
    info[beta] = (bound.kl["z"], wasted[0], bound.nats, strays(made))
    print(
        f"beta {beta:3g}: ELBO {bound.nats:.3f} = {bound.reconstruction['x']:.3f} - {bound.kl['z']:.3f}, "
        f"mismatch {wasted[0]:.3f} +- {wasted[1]:.3f}, noise {vae.likelihood(torch.zeros(1, 2)).stddev[0, 0]:.2f}, "
        f"stray {strays(made):.1f} %"
    )
plt.show()
claim(info[0.2][0] > info[1.0][0] > info[4.0][0])
claim(info[0.2][1] > info[1.0][1] > info[4.0][1])

# %% [markdown]
# A small weight gives sharp reconstructions with a narrow $q(z \mid x)$: the KL doubles, the noise falls, and $q(z)$
# moves even farther from the prior. The reconstructions are better but the draws are not, because the mismatch has
# grown too. A large weight removes the mismatch, but also the information: $q(z \mid x)$ is nearly the prior for all
# data. This is *posterior collapse*: $z$ says almost nothing about $x$. Neither weight gives a better bound than the
# weight 1.
#
# ## 5. Swapping the likelihood
#
# We try two other likelihoods: the noise may depend on $z$ (`independent`), or the features may depend on each other
# (`ar`, an autoregressive model given $z$).

# %%
by_likelihood = {"shared noise": base} | {
    name: trained(likelihood=lambda name=name: name, quiet=True) for name in ("independent", "ar")
}
kls = {}
for name, vae in by_likelihood.items():
    row(name, vae, iwaes["normal"])
    kls[name] = dgm.evaluate(vae, some, num_samples=scaled(16, 2)).kl["z"]
claim(kls["ar"] < 0.05)

# %% [markdown]
# The autoregressive likelihood has the best bound of the chapter, about one nat above the VAE that we started from, and
# its KL is zero: it models $x$ by itself and leaves $z$ unused. As a model of $x$ that is fine. As a way to *learn a
# representation* it fails, and the bound does not show this. Always look at the KL too. (Noise that depends on $z$
# includes shared noise as a special case, yet its bound is lower. The family is larger, but training starts worse, with
# more noise.)
#
# ## 6. A discrete latent
#
# Nothing requires $z$ to be a vector of reals. Let it be one of ten classes: the prior is a table of ten probabilities,
# the likelihood a Normal for each class, the guide a classifier, and the VAE a mixture of ten Normals. A class cannot
# be reparameterized, so its gradient would need the score-function estimator, which is noisy. But with ten values the
# expectation over $q$ is a sum of ten terms. Pyro calls this **enumeration**; here it is an objective.


# %%
def ten_normals():
    """A row of four numbers for each class: two means, which start at data, and two raw scales."""
    table = torch.nn.Embedding(10, 4)
    with torch.no_grad():
        table.weight.copy_(torch.cat([train.x[:10], torch.zeros(10, 2)], -1))
    return dgm.Normal(2, table)


classes = trained("enumerate", prior="categorical", latent_size=10, likelihood=ten_normals, epochs=20, lr=1e-2)
statements(classes)

# %% [markdown]
# The true posterior follows from Bayes' rule, whose denominator is a sum of ten terms too. It is a guide like any
# other, and because it is exact it has no gap. *Every draw* gives the same number, $\log p(x)$.

# %%
bayes = dgm.VAE(classes.prior, classes.likelihood, guides.EnumeratedPosterior(classes.prior, classes.likelihood))
with torch.no_grad():
    torch.testing.assert_close(bayes.log_weights(some.x)[0], bayes.log_weights(some.x)[0], atol=1e-4, rtol=0)
by_classifier, exact = (dgm.evaluate(vae, some, num_samples=32) for vae in (classes, bayes))
gap, error = exact.minus(by_classifier)
print(f"Bayes' rule {exact.nats:.3f}, classifier {by_classifier.nats:.3f}: gap {gap:.3f} +- {error:.3f} nats")
claim(gap > 0)
square_of_x, _ = square(4, scaled(101, 11))
with torch.no_grad():
    log_p = bayes.log_weights(square_of_x)[0]
    of_class = classes.encoder(square_of_x).probs.max(1).values
    of_data = classes.encoder(some.x).probs.argmax(1)
figure, panels = subplots(1, 3, width=8.5, height=2.8)
heat(panels[0, 0], log_p.exp(), 4, "p(x)")
points(panels[0, 1], some.x, of_data, 4, "data, by the likeliest class")
shown = heat(panels[0, 2], of_class, 4, "largest q(z | x)", vmax=1)
figure.colorbar(shown, ax=panels[0, 2])
plt.show()

# %% [markdown]
# Each class is one Normal, and the classes divide the plane among themselves. The gap between the classifier and Bayes'
# rule is all that a better guide can gain here. The rest of the distance to the VAEs of section 2 with good priors
# comes from the model: ten Normals, which cannot bend and may overlap, for five bent arms.
#
# ## 7. What does not help
#
# The first picture of this chapter showed a prior that does not fit. Would a better *guide* help there? We train a full
# covariance instead of a diagonal one, with the same prior $N(0, I)$ and the same likelihood:

# %%
better_guide = trained(encoder="fullrank")
iwae = row("normal, fullrank", better_guide, iwaes["normal"], mismatch(better_guide))
won, error = iwae.minus(iwaes["normal"])
print(
    f"gained by the guide {won:.3f}, by the best prior {max(gain for gain, _ in gains.values()):.3f}; seeds: {spread:.3f}"
)
claim(won < 0.1 and won < 0.4 * min(gain for gain, _ in gains.values()))

# %% [markdown]
# Hardly: the gain is significant on these data, but no larger than the difference between seeds. No guide can repair a
# prior, because the guide is not part of $p_\theta(x)$: a better guide makes the bound tighter, and gives training a
# gradient closer to that of $\log p_\theta(x)$. The converse holds too: for the ships, whose prior is right and whose
# posterior has two modes, no prior would help.
#
# So before you swap anything, look at which number is large:
#
# | what is large | what to swap |
# |---|---|
# | the mismatch $D_{KL}(q(z) \,\|\, p(z))$ | the prior |
# | the approximation gap | the guide's family, perhaps with the objective |
# | the amortization gap | the encoder's network, or refine it for each datum (exercise 2) |
# | none of them, and $\log p_\theta(x)$ is poor | the likelihood |
# | the likelihood is strong and the KL is near zero | nothing, unless $z$ is what you want: then a weaker likelihood |
#
# ## 8. Exercises
#
# 1. Section 1 said that the mismatch is the most that another prior can gain *for a given encoder and likelihood*.
#    Freeze both, train only a flow as prior, and compare its gain with the mismatch, and with its gain in section 2,
#    where all three parts were trained.
# 2. `guides.SemiAmortized` improves the encoder's answer for each datum by a few steps of gradient ascent. Which of the
#    two gaps of section 3 can it close? Wrap the trained mean-field encoder in it and measure.
# 3. In section 3 the planar flow found one mode. Train it by `iwae:8` instead. Which of its two bounds is better than
#    with `elbo`, and which is worse? Which guide would you draw from?
#
# ## What to change next
#
# - **Data.** Replace `"pinwheel"` by `"rings"` or `"checkerboard"`. Which prior can fit a ring?
# - **Likelihood.** Let `noisy_mean` start at 1 instead of 0.2. Where does training end, and what does $z$ learn?
# - **Both.** `trained(prior="nsf", encoder="iaf")`. Does the guide matter more once the prior fits?
# - **Size.** On images there are sixteen latents, so the densities cannot be plotted, but the comparison works the same
#   way: try `dgm sweep vae --data digits-binary --prior normal,vamp,flow --encoder meanfield,iaf`.
#
# ## Solutions
#
# **1.** Draws of $z$ from the aggregate posterior are data for a flow. `dgm.fit` on them maximizes $E_{q(z)}[\log
# p(z)]$, the only term of the ELBO that contains the prior.

# %%
pyro.set_rng_seed(0)
with torch.no_grad():
    coded = base.encoder(train.x).sample()
prior = dgm.flow.nsf((2,), layers=3, hidden=(64, 64))
dgm.fit(prior, coded, epochs=scaled(20), batch_size=128, lr=3e-3, progress=False)
refitted = dgm.VAE(prior, base.likelihood, base.encoder)
elbos = {name: dgm.evaluate(vae, some, num_samples=32) for name, vae in (("before", base), ("after", refitted))}
won, error = elbos["after"].minus(elbos["before"])
bound = mismatches["normal"]
together, _ = dgm.evaluate(by_prior["nsf"], some, num_samples=32).minus(elbos["before"])
print(f"ELBO gained by the prior alone {won:.3f} +- {error:.3f}, mismatch {bound[0]:.3f} +- {bound[1]:.3f}")
print(f"ELBO gained when all parts were trained with it {together:.3f}")
claim(0.7 * bound[0] < won < bound[0] + 4 * math.hypot(error, bound[1]))

# %% [markdown]
# The flow gains most of the mismatch and no more: the bound holds. Training all three parts together gained more than
# the mismatch, because then encoder and likelihood change as well.
#
# **2.** It can close only the amortization gap. Its steps stay within the family of mean-field Normals, so it can reach
# at most the best member of this family.

# %%
refined = guides.SemiAmortized(
    by_guide["meanfield"].encoder, p_z, p_x, gradient_steps=scaled(20, 2), lr=0.02, num_samples=8
)
semi = dgm.VAE(p_z, p_x, refined)
before, after = (dgm.evaluate(vae, few, num_samples=256) for vae in (by_guide["meanfield"], semi))
won, error = after.minus(before)
amortization, its_error = split["meanfield"]["amortization gap"]
print(f"gained {won:.3f} +- {error:.3f} of an amortization gap of {amortization:.3f} +- {its_error:.3f}")
claim(0.3 * amortization < won < amortization + 4 * error)

# %% [markdown]
# It closes about three quarters of the amortization gap. It leaves the approximation gap, which is about three times as
# large. Another family would be needed to close that gap.
#
# **3.** Eight draws need not all be good, so the guide can spread out.

# %%
by_iwae = trained("iwae:8", encoder="planar", **navigate)
gap_by_iwae = gap_row("planar, iwae:8", by_iwae)
claim(gap_by_iwae[1] < gap_of["planar"][1] / 4 and gap_by_iwae[0] > 2 * gap_of["planar"][0])
draws_of({"planar, elbo": by_guide["planar"], "planar, iwae:8": by_iwae})

# %% [markdown]
# The IWAE-50 bound is much better than with `elbo`, because the guide covers both modes. Its ELBO is worse, because it
# also covers the region between them. A single draw of this guide is often far from both modes. For samples, draw
# several and choose one by its weight, or use the spline flow trained by `rws`.
