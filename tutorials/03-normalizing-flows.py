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
# # Normalizing flows
#
# This chapter is the second answer to "how to represent $p(x)$?": take a simple random variable $z \sim p(z)$ and bend
# space. With an invertible $x = f_\theta(z)$ the density of $x$ is
#
# $$p_\theta(x) = p(z)\, \left| \det \frac{\partial z}{\partial x} \right|, \qquad z = f_\theta^{-1}(x).$$
#
# The determinant of the Jacobian says how much $f$ expands or contracts space around a point. This chapter draws it.
#
# | section | question |
# |---|---|
# | 1 | why a factor at all? one dimension |
# | 2 | what is the determinant, in a picture? grids bent by $f$, Jacobian heat maps |
# | 3 | how is a rich $f$ built? $f = f_K \circ \dots \circ f_1$ |
# | 4 | does the density stay normalized in training? |
# | 5 | what are the latents of data? |
# | 6 | what can a flow not do, and what does it cost? |
#
# You need PyTorch and chapter 00.

# %%
import math

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from torch import nn

import dgm_pyro as dgm
from chapter import claim, scaled, style, subplots, theme  # small helpers, in chapter.py beside this
from dgm_pyro.networks import MLP, Affine, Coupling
from dgm_pyro.networks.bijections import Bijection

pyro.set_rng_seed(0)
style()

# %% [markdown]
# ## 1. One dimension
#
# $f$ must be invertible. Here it is increasing everywhere. A draw in a short interval $[z, z + dz]$ is mapped into
# $[f(z), f(z) + f'(z)\,dz]$, so the two intervals have the same probability: $p(x)\, f'(z)\,dz = p(z)\,dz$. Where $f$
# is steep, space expands and the density falls.


# %%
def f(z):
    return z + 1.5 * torch.tanh(2 * z)


z = torch.linspace(-5, 5, 2001).double()
slope = torch.func.vmap(torch.func.grad(f))(z)  # dx/dz
p_z = dist.Normal(0.0, 1.0).log_prob(z).exp()
x, p_x = f(z), p_z / slope
print(f"integral of p(z) |dz/dx| over x: {torch.trapezoid(p_x, x):.6f}")
print(f"integral of p(z) alone over x:   {torch.trapezoid(p_z, x):.6f}")
assert abs(torch.trapezoid(p_x, x) - 1) < 1e-5

cuts = dist.Normal(0.0, 1.0).icdf(torch.tensor([0.025, 0.15, 0.3, 0.45, 0.55, 0.7, 0.85, 0.975])).double()
colors = [*theme.series, theme.muted]
figure, panels = subplots(1, 3, height=3.0)
panels[0].plot(z, p_z, color=theme.ink, lw=1.2)
panels[1].plot(z, x, color=theme.ink, lw=1.2)
panels[2].plot(x, p_x, color=theme.ink, lw=1.2)
for a, b, color in zip(cuts[:-1], cuts[1:], colors, strict=True):
    piece = (z >= a) & (z <= b)
    panels[0].fill_between(z[piece], 0, p_z[piece], color=color, alpha=0.6, lw=0)
    panels[1].fill_between(z[piece], -6, x[piece], color=color, alpha=0.15, lw=0)
    panels[1].fill_betweenx(x[piece], -3, z[piece], color=color, alpha=0.35, lw=0)
    panels[2].fill_between(x[piece], 0, p_x[piece], color=color, alpha=0.6, lw=0)
panels[0].set(title="p(z)", xlabel="z", ylabel="density", xlim=(-3, 3), ylim=(0, None))
panels[1].set(title="x = f(z)", xlabel="z", ylabel="x", xlim=(-3, 3), ylim=(-5, 5))
panels[2].set(title="p(x)", xlabel="x", xlim=(-5, 5), ylim=(0, None))
plt.show()

# %% [markdown]
# Equal colors have equal areas, left and right. The middle interval is spread over a long interval of $x$, so its
# density becomes low; the intervals next to it are compressed into the two bumps. Without the factor the total would
# not be one.
#
# ## 2. Two dimensions
#
# In the plane, areas take the place of lengths: $f$ maps a small square at $z$ to a small parallelogram, whose area is
# $\lvert \det \partial x / \partial z \rvert$ times as large. Here are four maps with their inverses:

# %%
A = torch.tensor([[1.1, 0.5], [-0.4, 0.8]])
maps = {  # f and its inverse
    "linear": (lambda z: z @ A.T, lambda x: x @ A.inverse().T),
    "bend": (
        lambda z: torch.stack([z[..., 0], z[..., 1] + 0.5 * z[..., 0] ** 2 - 0.5], -1),
        lambda x: torch.stack([x[..., 0], x[..., 1] - 0.5 * x[..., 0] ** 2 + 0.5], -1),
    ),
    "stretch": (
        lambda z: torch.stack([z[..., 0], z[..., 1] * (0.7 * z[..., 0]).exp()], -1),
        lambda x: torch.stack([x[..., 0], x[..., 1] * (-0.7 * x[..., 0]).exp()], -1),
    ),
    "squeeze": (lambda z: (2 * z).asinh(), lambda x: x.sinh() / 2),
}


def jacobians(f, z):
    """dx/dz at each z, (N, 2, 2), by automatic differentiation."""
    return torch.func.vmap(torch.func.jacrev(f))(z)


def area(corners):
    """Area of a polygon, by the shoelace formula: (4, 2)."""
    following = corners.roll(-1, 0)
    return 0.5 * (corners[:, 0] * following[:, 1] - following[:, 0] * corners[:, 1]).sum().abs()


at, side = torch.tensor([0.8, -0.5]).double(), 1e-3
square = at + side * torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]).double()
A = A.double()
for name, (f, _) in maps.items():
    measured = area(f(square)) / side**2
    det = jacobians(f, at.unsqueeze(0)).det().abs().item()
    print(f"{name:8s} a small square at z = (0.8, -0.5) grows {measured:.4f} times, |det dx/dz| = {det:.4f}")
    assert abs(measured - det) < 2e-3 * det
A = A.float()

# %% [markdown]
# The next picture has the whole plane. Above, $f$ bends a grid of $z$; in the middle is
# $\log \lvert \det \partial x / \partial z \rvert$ at each $z$, red where $f$ expands; below is the density of $x$.

# %%
fine = torch.linspace(-3, 3, 121)
lines = [torch.stack([torch.full_like(fine, float(s)), fine], -1) for s in torch.linspace(-3, 3, 13)]
lines += [line.flip(-1) for line in lines]
plane = torch.cartesian_prod(fine, fine)
wide = torch.linspace(-12, 12, scaled(1201, 301))
wide_plane, cell = torch.cartesian_prod(wide, wide), (wide[1] - wide[0]) ** 2
standard = dist.Normal(torch.zeros(2), 1.0).to_event(1)


def draw_grid(axes, f):
    for line in lines:
        axes.plot(*f(line).T.detach().numpy(), color=theme.series[0], lw=0.7)
    axes.set(xlim=(-4, 4), ylim=(-4, 4), aspect="equal", xlabel="$x_1$", ylabel="$x_2$")
    axes.grid(False)


figure, panels = subplots(3, 4, height=8.0)
for column, (name, (f, inverse)) in zip(panels.T, maps.items(), strict=True):
    draw_grid(column[0], f)
    column[0].set_title(name)
    log_det = jacobians(f, plane).det().abs().log()
    options = {"origin": "lower", "extent": (-3, 3, -3, 3)}
    shown = column[1].imshow(log_det.reshape(121, 121).T.numpy(), cmap="coolwarm", vmin=-2.5, vmax=2.5, **options)
    column[1].set(title="log |det ∂x/∂z|", xlabel="$z_1$", ylabel="$z_2$")
    z = inverse(wide_plane)
    log_p = standard.log_prob(z) + jacobians(inverse, wide_plane).det().abs().log()  # p(x) = p(z) |det dz/dx|
    total, without = (log_p.exp().sum() * cell).item(), (standard.log_prob(z).exp().sum() * cell).item()
    print(f"{name:8s} sum of p(x) over a grid: {total:.4f}; without the determinant: {without:.4f}")
    claim(abs(total - 1) < 2e-3)
    x = plane * (4 / 3)
    density = (standard.log_prob(inverse(x)) + jacobians(inverse, x).det().abs().log()).exp()
    picture = density.reshape(121, 121).T.numpy()
    column[2].imshow(picture, origin="lower", extent=(-4, 4, -4, 4), cmap=theme.heat, vmin=0)
    column[2].set(title=f"p(x), sums to {total:.3f}", xlabel="$x_1$", ylabel="$x_2$")
    for axes in column[1:]:
        axes.grid(False)
figure.colorbar(shown, ax=panels[1, :], shrink=0.8, label="expands (red), contracts (blue)")
plt.show()

# %% [markdown]
# - **linear**: one matrix, so space expands by the same factor everywhere.
# - **bend**: looks like the strongest of the four, but its determinant is one at every point. Bending moves density
#   without changing any area.
# - **stretch**: expands on the right and contracts on the left. The density is low where lines are far apart.
# - **squeeze**: pulls distant points in. It contracts space there, so the density is highest at some distance from the
#   middle.
#
# The sum over a grid is one in each case. This is the requirement $\int p(x)\,dx = 1$, and the meaning of
# *normalizing*. Without the determinant, the sum is one only for the map that preserves areas.
#
# ## 3. A composition
#
# Simple maps become rich by composition: $f = f_K \circ \dots \circ f_2 \circ f_1$. Each $f_k$ is invertible, so $f$ is
# invertible, and the determinants multiply:
#
# $$\log p_\theta(x) = \log p(z) - \sum_{k=1}^{K} \log \left| \det \frac{\partial f_k}{\partial z_{k-1}} \right|.$$
#
# A **coupling** leaves some coordinates unchanged. A network reads these, and says how to shift and stretch the others.
# This is "stretch" from above with a learned function as the exponent. In Pyro, the stack is a
# `TransformedDistribution`: a base distribution and a list of transforms. `dgm.Flow` builds it. `print` shows a program
# as a formula, which it reads off the statements; the base is called $u$ there.

# %%
pinwheel, unseen = dgm.data.load("pinwheel"), dgm.data.load("pinwheel", "test")
layers = [Coupling((k % 2 == 0, k % 2 == 1), Affine(), MLP((1,), 2, hidden=(64, 64))) for k in range(12)]
flow = dgm.Flow(2, layers)
print(flow)
dgm.fit(flow, pinwheel, epochs=scaled(40), batch_size=128, lr=3e-3, progress=False)
print(f"{len(flow().transforms)} transforms; {dgm.evaluate(flow, unseen).nats:.3f} nats per datum")


# %%
@torch.no_grad()
def first(k, z):
    """z_k = f_k(... f_1(z)), and the sum of the log-determinants so far."""
    log_det = torch.zeros(len(z))
    for part in layers[:k]:
        z, own = part(z)
        log_det = log_det + own
    return z, log_det


z = torch.randn(1500, 2)
angle = torch.atan2(z[:, 1], z[:, 0])
stages = (0, 1, 2, 4, 8, 12)
figure, panels = subplots(2, 6, height=4.4)
for column, k in zip(panels.T, stages, strict=True):
    for line in lines:
        column[0].plot(*first(k, line)[0].T.numpy(), color=theme.muted, lw=0.4)
    column[0].scatter(*first(k, z)[0].T.numpy(), c=angle.numpy(), cmap="hsv", s=2, linewidths=0)
    column[0].set(title=f"after {k}", xlim=(-5, 5), ylim=(-5, 5), aspect="equal", xticks=(-4, 0, 4), yticks=(-4, 0, 4))
    log_det = first(k, plane)[1].reshape(121, 121).T
    shown = column[1].imshow(log_det.numpy(), origin="lower", extent=(-3, 3, -3, 3), cmap="coolwarm", vmin=-4, vmax=4)
    column[1].set(xlabel="$z_1$", xticks=(-2, 0, 2), yticks=(-2, 0, 2))
    column[1].grid(False)
panels[0, 0].set_ylabel("$x_2$")
panels[1, 0].set_ylabel("$z_2$")
figure.colorbar(shown, ax=panels[1, :], label="log |det| so far", shrink=0.9)
plt.show()

# %% [markdown]
# Above: the grid and draws of $z$ after the first $k$ couplings; the color is the angle of $z$, and shows where each
# direction goes. Below: the sum of log-determinants so far, over $z$. A single coupling moves one coordinate; all
# couplings together make five arms. The red lines of the last panel are where space is stretched between two arms.
#
# The next cell computes the same number in three ways. It also computes the Jacobian of a single coupling, which is
# triangular, so its determinant is cheap.

# %%
with torch.no_grad():
    z = torch.randn(5, 2)
    x, summed = first(12, z)
    by_flow = flow.log_abs_det_jacobian(z, x)
per_datum = [torch.autograd.functional.jacobian(lambda one: flow.forward_map(one[None])[0], one) for one in z]
by_autograd = torch.stack(per_datum).det().abs().log()
for name, values in {"sum of the 12": summed, "log_abs_det_jacobian": by_flow, "autograd": by_autograd}.items():
    print(f"{name:21s}", [f"{value:.4f}" for value in values])
torch.testing.assert_close(summed, by_flow, atol=1e-4, rtol=1e-4)
torch.testing.assert_close(by_autograd, by_flow, atol=1e-3, rtol=1e-3)

one = torch.autograd.functional.jacobian(lambda z: layers[0](z.unsqueeze(0))[0][0], torch.tensor([0.5, 0.5]))
print("Jacobian of the first coupling:", [[f"{entry:.3f}" for entry in row] for row in one.tolist()])
assert one[0, 0] == 1
assert one[0, 1] == 0

# %% [markdown]
# ## 4. Normalized at every step of training
#
# The training objective, $\log p_\theta(x)$ of the data, does not make the density sum to one. The density does so by
# construction, for any weights: before training, halfway, and at the end.

# %%
torch.manual_seed(0)
growing = dgm.flow.nsf((2,), layers=6, hidden=(64, 64))
axis = torch.linspace(-7, 7, scaled(351, 71))
grid, cell = torch.cartesian_prod(axis, axis), (axis[1] - axis[0]) ** 2
moments, done = (0, 1, 3, 10, 25), 0
figure, panels = subplots(1, 5, height=2.7)
for axes, epoch in zip(panels, moments, strict=True):
    if epoch > done:
        dgm.fit(growing, pinwheel, epochs=scaled(epoch - done), batch_size=128, lr=2e-3, progress=False)
        done = epoch
    with torch.no_grad():
        density = growing.log_prob(grid).exp()
    total = (density.sum() * cell).item()
    nats = dgm.evaluate(growing, unseen).nats
    print(f"after {epoch:2d} epochs: sum over a grid {total:.4f}, log p of test data {nats:.3f} nats")
    claim(abs(total - 1) < 0.01)
    axes.imshow(
        density.reshape(len(axis), -1).T.numpy(), origin="lower", extent=(-7, 7, -7, 7), cmap=theme.heat, vmin=0
    )
    axes.set(title=f"epoch {epoch}: {nats:.2f} nats,\nsum {total:.3f}", xlim=(-4, 4), ylim=(-4, 4), xlabel="$x_1$")
    axes.grid(False)
panels[0].set_ylabel("$x_2$")
plt.show()

# %% [markdown]
# If the density rises in one place, it must fall in another. This is why maximum likelihood works. A network that
# simply outputs a number "log p(x)" could raise it everywhere.
#
# ## 5. The latents of data
#
# The map runs both ways. **Sampling** is $z \sim p(z)$, $x = f(z)$. **Inference** is $z = f^{-1}(x)$: there is no guide
# and no bound, but one exact $z$ for each $x$. If the flow is good, the $z$ of data are draws from $N(0, I)$: their
# mean is 0, their covariance $I$, and $\lVert z \rVert^2 / 2$ is exponential.

# %%
with torch.no_grad():
    z = growing.inverse_map(unseen.x)
    back = growing.forward_map(z)
claim((back - unseen.x).abs().max() < 1e-2)
print(
    "mean of z:",
    [f"{value:.3f}" for value in z.mean(0)],
    " covariance:",
    [[f"{v:.3f}" for v in row] for row in z.T.cov()],
)
half_square = (z.square().sum(1) / 2).sort().values
levels = (torch.arange(len(z)) + 0.5) / len(z)
distance = (1 - (-half_square).exp() - levels).abs().max()
print(f"largest distance between the distribution of |z|^2 / 2 and the exponential one: {distance:.4f}")
claim(distance < 0.05)
claim(z.mean(0).abs().max() < 0.1)
claim((z.T.cov() - torch.eye(2)).abs().max() < 0.15)

figure, panels = subplots(1, 3, height=3.1)
for y in range(5):
    panels[0].scatter(*unseen.x[unseen.y == y][:400].T.numpy(), s=3, linewidths=0, color=theme.classes[y])
    panels[1].scatter(*z[unseen.y == y][:400].T.numpy(), s=3, linewidths=0, color=theme.classes[y])
panels[0].set(title="data x, by arm", xlabel="$x_1$", ylabel="$x_2$", aspect="equal")
panels[1].set(title="their z = $f^{-1}$(x)", xlabel="$z_1$", ylabel="$z_2$", aspect="equal")
panels[2].plot(half_square, levels, label="z of test data")
panels[2].plot(half_square, 1 - (-half_square).exp(), ls="--", color=theme.ink, lw=1, label="exponential")
panels[2].set(title="distribution of |z|² / 2", xlabel="value", ylabel="share below", xlim=(0, 6))
panels[2].legend()
plt.show()

# %% [markdown]
# The five arms lie side by side like slices of a cake, with hardly a gap between them, because the flow has to use the
# whole plane of $z$.
#
# ## 6. What a flow cannot do, and what it costs
#
# $f$ is continuous and invertible. It cannot cut the plane or make a hole. Three rings require both. Here we know the
# truth: a radius of 1, 2 or 3 with noise of 0.1, and any angle.

# %%
rings, unseen_rings = dgm.data.load("rings"), dgm.data.load("rings", "test")


def log_p_of_rings(x):
    r = x.norm(dim=-1)
    radius = dist.Normal(torch.tensor([1.0, 2.0, 3.0]), 0.1).log_prob(r.unsqueeze(-1)).logsumexp(-1) - math.log(3)
    return radius - (2 * math.pi * r).log()  # a circle of radius r shares it out over its length


torch.manual_seed(0)
on_rings = dgm.flow.nsf((2,), layers=6, hidden=(64, 64))
dgm.fit(on_rings, rings, epochs=scaled(30), batch_size=128, lr=3e-3, progress=False)
with torch.no_grad():
    drawn = on_rings.sample(scaled(20_000, 2000))
    density = on_rings.log_prob(grid).exp()


def between(x):
    """Share of points more than 0.35 from every ring: 3.5 standard deviations."""
    return (
        ((x.norm(dim=1).unsqueeze(1) - torch.tensor([1.0, 2.0, 3.0])).abs().min(1).values > 0.35).double().mean().item()
    )


truth = log_p_of_rings(unseen_rings.x).mean()
print(
    f"truth {truth:.3f}, flow {dgm.evaluate(on_rings, unseen_rings).nats:.3f} nats per datum; sum over a grid {density.sum() * cell:.4f}"
)
print(
    f"more than 3.5 standard deviations from every ring: {100 * between(rings.x):.2f} % of the data, {100 * between(drawn):.2f} % of the draws"
)
claim(between(drawn) > 5 * between(rings.x) + 0.002)
claim(dgm.evaluate(on_rings, unseen_rings).nats < truth - 0.02)

figure, panels = subplots(1, 3, height=3.2)
pictures = {"truth": log_p_of_rings(grid), "flow": density.log()}
for axes, (name, log_p) in zip(panels, pictures.items(), strict=False):
    picture = log_p.clamp(-9).reshape(len(axis), -1).T.numpy()
    shown = axes.imshow(picture, origin="lower", extent=(-7, 7, -7, 7), cmap=theme.heat, vmin=-9, vmax=0)
    axes.set(title=f"{name}: log p(x)", xlim=(-4, 4), ylim=(-4, 4), xlabel="$x_1$", ylabel="$x_2$")
    axes.grid(False)
figure.colorbar(shown, ax=panels[1], label="nats (below -9: white)")
panels[2].scatter(*drawn[:4000].T.numpy(), s=1.5, linewidths=0)
panels[2].set(title="draws of the flow", xlim=(-4, 4), ylim=(-4, 4), aspect="equal", xlabel="$x_1$", ylabel="$x_2$")
plt.show()

# %% [markdown]
# The rings of the flow are cut open, and threads of low density hold them together. Training can make the threads thin,
# but not remove them: a plane that is bent and stretched has no holes afterwards.
#
# **Cost.** A coupling is as cheap forwards as backwards. In an *autoregressive* flow (`maf`) each feature depends on
# all features before it, so each layer is more expressive. Its inverse $x \to z$ takes one pass of the network, but $z
# \to x$ goes feature by feature, as in chapter 02. The next cell counts passes for 16 features and four layers, by a
# hook on the networks (under a hook there is no cache):


# %%
def calls(flow, call, *args):
    """How often the networks inside a flow run during call(*args)."""
    count = 0

    def add(*_):
        nonlocal count
        count += 1

    handles = [part.network.register_forward_hook(add) for part in flow.parts]
    with torch.no_grad():
        call(*args)
    for handle in handles:
        handle.remove()
    return count


x = torch.randn(10, 16)
for name, make in {"coupling": dgm.flow.realnvp, "autoregressive": dgm.flow.maf}.items():
    sixteen = make((16,), layers=4, hidden=(32,))
    scoring, sampling = calls(sixteen, sixteen.log_prob, x), calls(sixteen, sixteen.sample, 10)
    print(f"{name:15s} network calls to score ten data: {scoring}, to draw ten: {sampling}")
    assert (scoring, sampling) == (4, 4 if name == "coupling" else 4 * 16)

# %% [markdown]
# ## 7. Exercises
#
# 1. Write a bijection of your own: $x = \sinh(a\, \text{asinh}(z) + b)$ for each feature, with learned $a > 0$ and $b$.
#    Give its inverse and log-determinant, put it into a `dgm.Flow`, and check both, and that the density sums to one.
# 2. The notes write $p(x) = p(z)\, |J_f(x)|$. Is $J$ that of $z \to x$ or that of $x \to z$? Compute both with autograd
#    for "stretch", and show what goes wrong with the other one.
# 3. The entropy of $x$ is $H(x) = H(z) + E[\log |\det \partial x / \partial z|]$. Check it for `growing`, with
#    $H(z) = \log(2 \pi e)$ in two dimensions.
#
# ## What to change next
#
# - **The layers.** Use 2, 4, 24 couplings in section 3. How many layers separate the arms?
# - **The map.** Replace `Affine()` by `RationalQuadraticSpline(bins=8)`, with a network of `spline.num_parameters`
#   outputs. How many layers are enough then?
# - **The base.** Give `dgm.Flow(..., base=dgm.MixtureOfNormals(2, 3, learned=True))` for the rings. Does a base of
#   several pieces help with the threads?
# - **Integers.** `dgm.Dequantized(dgm.flow.nsf(shape, unit_cube=True), levels=17)` puts a flow on the digits. What happens
#   if you train a flow on integers that were merely converted to floats?
# - **Condition.** `dgm.flow.nsf((2,), num_classes=5)` is $p(x \mid y)$: draw single arms.
#
# ## Solutions
#
# **1.** With $u = a\,\text{asinh}(z) + b$, $dx/dz = \cosh(u)\, a / \sqrt{1 + z^2}$.


# %%
class SinhArcsinh(Bijection):
    def __init__(self, features):
        super().__init__()
        self.features = features
        self.log_a, self.b = nn.Parameter(torch.zeros(features)), nn.Parameter(torch.zeros(features))

    def forward(self, z, given=None):
        u = self.log_a.exp() * z.asinh() + self.b
        log_slope = u.cosh().log() + self.log_a - 0.5 * (1 + z**2).log()
        return u.sinh(), log_slope.sum(-1)

    def inverse(self, x, given=None):
        z = ((x.asinh() - self.b) / self.log_a.exp()).sinh()
        return z, -self(z)[1]


own = dgm.Flow(2, [SinhArcsinh(2)])
with torch.no_grad():
    layers_of_own = own.transforms[0]
    layers_of_own.log_a.copy_(torch.tensor([-0.3, -0.5]))
    layers_of_own.b.copy_(torch.tensor([0.8, -0.4]))
    z = torch.randn(6, 2)
    x = own.forward_map(z)
    torch.testing.assert_close(own.inverse_map(x.clone()), z, atol=1e-5, rtol=1e-4)
    dets = torch.stack(
        [torch.autograd.functional.jacobian(lambda one: own.forward_map(one[None])[0], one) for one in z]
    ).det()
    torch.testing.assert_close(own.log_abs_det_jacobian(z, x), dets.log(), atol=1e-4, rtol=1e-4)
    total = own.log_prob(wide_plane).exp().sum() * (wide[1] - wide[0]) ** 2
print(f"sum of p(x) over a grid: {total:.4f}")
claim(abs(total - 1) < 5e-3)

# %% [markdown]
# **2.** $J$ is the Jacobian of $x \to z$, which is $f^{-1}$ if $f$ is the map from $z$. The two Jacobians are inverse
# to each other. The wrong one gives a high density where it should be low, and the sum is not one.

# %%
f, inverse = maps["stretch"]
z = torch.randn(4, 2)
product = jacobians(f, z).det() * jacobians(inverse, f(z)).det()
torch.testing.assert_close(product, torch.ones(4))
cell = (wide[1] - wide[0]) ** 2
latent = inverse(wide_plane)
right = (standard.log_prob(latent).exp() * jacobians(inverse, wide_plane).det().abs()).sum() * cell
wrong = (standard.log_prob(latent).exp() * jacobians(f, latent).det().abs()).sum() * cell
print(f"sum over a grid with |det dz/dx|: {right:.4f}, with |det dx/dz|: {wrong:.4f}")
claim(abs(right - 1) < 2e-3)
claim(abs(wrong - 1) > 0.1)

# %% [markdown]
# **3.** Both sides are means over draws, so they agree within a few standard errors. $H(x) = -E[\log p(x)]$.

# %%
with torch.no_grad():
    z = torch.randn(scaled(20_000, 1000), 2)
    x = growing.forward_map(z)
    log_det = growing.log_abs_det_jacobian(z, x)
    other = -growing.log_prob(growing.sample(len(z)))
left, right = other.mean(), math.log(2 * math.pi * math.e) + log_det.mean()
error = math.sqrt((other.var() + log_det.var()) / len(z))
print(f"H(x) = {left:.3f} from draws of x, {right:.3f} from the determinants, +- {error:.3f} nats")
claim(abs(left - right) < 4 * error)
