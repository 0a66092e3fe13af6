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
# # Autoregressive models
#
# This chapter is the first answer to "how to represent $p(x)$?": write it as a product of conditionals, one for each
# feature given the features before it,
#
# $$p_\theta(x) = \prod_{i=1}^{D} p_\theta(x_i \mid x_{<i}), \qquad x_{<i} = (x_1, \dots, x_{i-1}).$$
#
# | section | question |
# |---|---|
# | 1 | why is nothing lost by this, and why is a network needed? |
# | 2 | how does one network compute all conditionals without cheating? masks, drawn |
# | 3 | which earlier pixels does a pixel see? inductive bias |
# | 4 | the chain unrolled, and conditioned anywhere |
# | 5 | why is sampling slow, and what does a cache save? operations, counted |
#
# You need PyTorch and chapter 00, which explains sample sites, traces and conditioning.

# %%
import copy

import matplotlib.pyplot as plt
import pyro
import torch
import torch.nn.functional as F
from matplotlib.colors import ListedColormap
from matplotlib.ticker import MaxNLocator
from pyro import poutine
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dgm_pyro as dgm
from chapter import claim, scaled, style, subplots, theme  # small helpers, in chapter.py beside this
from dgm_pyro import plots
from dgm_pyro.networks import MADE, MLP, PixelCNN

pyro.set_rng_seed(0)
style()

# %% [markdown]
# ## 1. The chain rule
#
# The chain rule is the product rule, used again and again. It holds for *every* distribution. Take the nine pixels in
# the middle of black-and-white digits. They have $2^9 = 512$ states, few enough to count.

# %%
digits, unseen = dgm.data.load("digits-binary"), dgm.data.load("digits-binary", "test")
nine = digits.x[:, 0, 3:6, 3:6].flatten(1)
states = torch.cartesian_prod(*[torch.arange(2)] * 9).to(torch.uint8)  # all 512, in the order of binary numbers
powers = 2 ** torch.arange(8, -1, -1)
counts = torch.bincount((nine * powers).sum(1), minlength=512).double()
p = counts / counts.sum()


def conditional(i):
    """p(x_i = 1 | x_<i) by counting, for each of the 2^(i-1) values of x_<i."""
    folded = p.reshape(2 ** (i - 1), 2, -1).sum(2)  # the sum rule over x_>i: rows x_<i, columns x_i
    return folded[:, 1] / folded.sum(1)


product, free = torch.ones(512).double(), 0
for i in range(1, 10):
    table = conditional(i)
    free += len(table)
    before = torch.arange(512) >> (10 - i)  # which row of the table each state reads
    product *= torch.where(states[:, i - 1] == 1, table[before], 1 - table[before])
product = product.nan_to_num()  # 0 / 0 where x_<i never occurs
print(f"largest difference between p(x) and the product of its conditionals: {(product - p).abs().max():.1e}")
print(f"numbers in the nine tables of conditionals: {free}, in the table of p(x) less one for the sum: {512 - 1}")
assert (product - p).abs().max() < 1e-12
assert free == 511

# %% [markdown]
# Nothing is lost and nothing is gained: the nine tables hold as many numbers as the one table. The last table has 256
# rows. For 64 pixels it would have $2^{63}$. A network therefore replaces the tables: it *computes* $p(x_i = 1 \mid
# x_{<i})$ from $x_{<i}$. `MADE` is one network for all nine:

# %%
small = dgm.Autoregressive(dgm.Bernoulli(9, MADE(9, 1, hidden=(32, 32), levels=2)))
dgm.fit(small, dgm.Data(nine, levels=2), epochs=scaled(20), lr=3e-3, progress=False)
with torch.no_grad():
    q = small.log_prob(states).double().exp()
print(f"sum of p(x) over the 512 states: {q.sum():.7f}")
assert abs(q.sum() - 1) < 1e-5

# %% [markdown]
# `print` shows the program as a formula, which it reads off the statements: the chain rule, and the number of
# parameters.

# %%
print(small)

# %%
order = q.argsort(descending=True)[:16]
figure, panels = subplots(1, 2, width=8.5, height=3.0)
panels[0].loglog(p[p > 0], q[p > 0], "o", ms=3, alpha=0.6)
panels[0].plot([5e-4, 0.1], [5e-4, 0.1], color=theme.ink, lw=1, ls="--")
panels[0].set(xlabel="frequency in the data", ylabel="p(x) of the model", title="each dot a state of nine pixels")
mosaic = torch.full((15, 15), float("nan"))
for k, state in enumerate(order):
    row, column = 4 * (k // 4), 4 * (k % 4)
    mosaic[row : row + 3, column : column + 3] = states[state].reshape(3, 3)
panels[1].imshow(mosaic.numpy(), cmap=theme.gray.with_extremes(bad=theme.rule))
panels[1].set(title="the 16 most probable states, row by row")
panels[1].set_axis_off()
plt.show()

# %% [markdown]
# The probabilities of rare states scatter, because a single count is an uncertain estimate. The network does not copy
# the table. It gives some probability to states that never occurred, $1 - \sum_{x \text{ seen}} p(x)$:

# %%
print(
    f"states that occur: {int((counts > 0).sum())} of 512; probability that the model gives to all others: {q[counts == 0].sum():.3f}"
)
claim(0 < q[counts == 0].sum() < 0.3)

# %% [markdown]
# ## 2. Masks
#
# Training needs all conditionals at once: the network reads $x$ and returns $D$ probabilities, in one pass. Output $i$
# must then not depend on $x_i$ or on anything after it. What happens if it does? Here is a plain network, which reads
# all of $x$ to "predict" all of $x$.

# %%
cheat = MLP((9,), 9, hidden=(32, 32), levels=2)
optimizer = torch.optim.Adam(cheat.parameters(), lr=1e-2)
for _ in range(scaled(500, 2)):
    loss = F.binary_cross_entropy_with_logits(cheat(nine), nine.float(), reduction="none").sum(1).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
with torch.no_grad():
    every = -F.binary_cross_entropy_with_logits(cheat(states), states.float(), reduction="none").sum(1)
    masked = small.log_prob(nine).mean()
print(f"'log-likelihood' of the data: unmasked {-loss.item():.4f}, masked {masked:.4f} nats")
print(f"sum of 'p(x)' over all states: unmasked {every.exp().sum():.1f}, masked {q.sum():.4f}")
claim(-loss.item() > masked + 1)
claim(every.exp().sum() > 10)

# %% [markdown]
# It looks perfect, because it copies its input. But it is not a distribution: its "probabilities" sum to far more than
# one. A likelihood that is too good is the usual sign of a broken mask. `dgm_pyro` tests the mask of every
# autoregressive network:

# %%
cheat.order = tuple(range(9))  # it claims to be masked in this order
try:
    dgm.Autoregressive(dgm.Bernoulli(9, cheat))
except ValueError as error:
    print(error)
else:
    raise AssertionError

# %% [markdown]
# **MADE** gives each unit a *degree* $m$: the unit may depend on the first $m$ features and on no others. Input $i$ has
# degree $i$; the output for $x_i$ has degree $i - 1$; hidden units have degrees in between. A weight is kept only if it
# does not lead to a lower degree,
#
# $$W_{ab} = 0 \quad \text{unless} \quad m_b \le m_a .$$
#
# Here are all weights of a small one, for $D = 5$. Gray cells are masked. `direct` connects inputs to outputs. The last
# panel is the Jacobian $\partial\, \text{output}_i / \partial x_j$. Autograd computes it without knowledge of the
# masks.


# %%
def weights_of(network):
    layers = {"first": network.first, "hidden": network.blocks[0].layer, "last": network.last, "direct": network.direct}
    return {name: torch.where(layer.mask, layer.weight, torch.nan).detach() for name, layer in layers.items()}


def draw_matrices(network, title):
    matrices = weights_of(network)
    x = torch.randn(network.in_shape)
    jacobian = torch.autograd.functional.jacobian(lambda x: network(x.unsqueeze(0))[0, 0], x)
    matrices["Jacobian"] = torch.where(jacobian == 0, torch.nan, jacobian)
    figure, panels = subplots(1, 5, height=2.8)
    for axes, (name, matrix) in zip(panels, matrices.items(), strict=True):
        high = matrix.nan_to_num().abs().max()
        colors = plt.get_cmap("RdBu_r").with_extremes(bad="#c8ccd0")
        rows, columns = matrix.shape
        extent = (0.5, columns + 0.5, rows + 0.5, 0.5)
        axes.imshow(matrix.numpy(), cmap=colors, vmin=-high, vmax=high, aspect="auto", extent=extent)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(title=f"{name}: {matrix.shape[0]} x {matrix.shape[1]}", xlabel="from", ylabel="to")
        axes.grid(False)
    figure.suptitle(title, size=10)
    plt.show()
    return jacobian


torch.manual_seed(0)
natural = MADE(5, 1, hidden=(12, 12))
jacobian = draw_matrices(natural, "order 1, 2, 3, 4, 5")
assert torch.equal(jacobian.triu(), torch.zeros(5, 5))  # strictly lower triangular
permuted = MADE(5, 1, hidden=(12, 12), order=(4, 2, 0, 3, 1))
jacobian = draw_matrices(permuted, "order 5, 3, 1, 4, 2")
in_order = jacobian[list(permuted.order)][:, list(permuted.order)]
assert torch.equal(in_order.triu(), torch.zeros(5, 5))  # triangular once rows and columns are put in that order
masks = [natural.first.mask, natural.blocks[0].layer.mask, natural.last.mask]
paths = masks[2].int() @ masks[1].int() @ masks[0].int()
print("paths from input j (column) to output i (row), through the hidden layers:")
print(paths.numpy())
assert not paths.triu().any()
assert (paths + torch.ones(5, 5).triu() > 0).all()  # and no allowed path is missing

# %% [markdown]
# The masks are staircases. Their product counts the paths from an input to an output: none on or above the diagonal,
# many below. With another order of the features the staircase is shuffled. It is triangular again when rows and columns
# are sorted by that order.
#
# ## 3. Which pixels does a pixel see?
#
# The masks say which features a network *may* read. Its architecture says which features it does read. A **PixelCNN**
# uses masked convolutions: a pixel sees its neighbors above and to the left, and every layer extends this region.
# Below, the pixel of interest is red, and the pixels that its conditional depends on are blue (found by autograd
# again).

# %%
shape = digits.event_shape
place = (4, 4)
networks = {
    "MADE": MADE(shape, 1, hidden=(128,), levels=2),
    "PixelCNN, 1 layer": PixelCNN(shape, 1, width=8, layers=1, kernel_size=3, levels=2),
    "2 layers": PixelCNN(shape, 1, width=8, layers=2, kernel_size=3, levels=2),
    "4 layers": PixelCNN(shape, 1, width=8, layers=4, kernel_size=3, levels=2),
}
figure, panels = subplots(1, 4, height=2.6)
sees = {}
for axes, (name, network) in zip(panels, networks.items(), strict=True):
    x = torch.rand(32, *shape, requires_grad=True)
    network.eval()(x)[:, 0, 0, place[0], place[1]].sum().backward()
    sees[name] = x.grad.abs().sum((0, 1)) > 0
    kinds = sees[name].int()
    kinds[place] = 2
    axes.imshow(kinds.numpy(), cmap=ListedColormap([theme.rule, theme.series[0], "#c0392b"]), vmin=0, vmax=2)
    axes.set(title=f"{name}: sees {int(sees[name].sum())} pixels", xticks=[], yticks=[])
    axes.grid(False)
plt.show()
before = torch.zeros(8, 8, dtype=torch.bool)
before.view(-1)[: 8 * place[0] + place[1]] = True
assert torch.equal(sees["MADE"], before)  # everything before, and only that
assert all(not (seen & ~before).any() for seen in sees.values())
sizes = [int(seen.sum()) for seen in list(sees.values())[1:]]
assert sizes == sorted(sizes)

# %% [markdown]
# Reading neighbors with the same weights everywhere is an **inductive bias**: an assumption about the data that is
# built into the network. It helps where the assumption holds. To test this, we shuffle the pixels of all digits in one
# fixed way. The information is the same, but neighbors are no longer next to each other.

# %%
shuffle = torch.randperm(64, generator=torch.Generator().manual_seed(0))


def shuffled(data):
    return dgm.Data(data.x.flatten(1)[:, shuffle].reshape(data.x.shape), data.y, levels=2, name="shuffled digits")


def masked_network(name):
    if name == "MADE":
        return MADE(shape, 1, hidden=(256,), levels=2, dropout=0.3)
    return PixelCNN(shape, 1, width=16, layers=4, levels=2)


programs, evidences = {}, {}
for name, epochs in (("MADE", 50), ("PixelCNN", 25)):
    for kind, change in (("as they are", lambda data: data), ("shuffled", shuffled)):
        torch.manual_seed(0)
        program = dgm.Autoregressive(dgm.Bernoulli(shape, masked_network(name)))
        dgm.fit(program, change(digits), epochs=scaled(epochs), lr=3e-3, progress=False)
        programs[name, kind] = program
        evidences[name, kind] = dgm.evaluate(program, change(unseen))
        print(
            f"{name:9s} pixels {kind:12s} {evidences[name, kind].bits_per_dim:.4f} +- {evidences[name, kind].stderr:.4f} bits per pixel"
        )
lost = {
    name: evidences[name, "as they are"].values.mean() - evidences[name, "shuffled"].values.mean()
    for name in ("MADE", "PixelCNN")
}
print("lost by shuffling:", ", ".join(f"{name} {nats:.2f} nats per image" for name, nats in lost.items()))
claim(1 < lost["PixelCNN"] < 3)
claim(abs(lost["MADE"]) < 0.6)
claim(evidences["MADE", "as they are"].minus(evidences["PixelCNN", "as they are"]).nats > 0)

# %% [markdown]
# Shuffling costs the PixelCNN nearly two nats per image. MADE assumes nothing about neighbors, and hardly changes. (Its
# small difference comes from the order of the chain, which has changed too.) MADE is nevertheless the better model on
# images this small, because one layer can read the whole image.
#
# ## 4. The chain, unrolled
#
# `unroll()` states the product with one sample site for each feature, so we can look at each factor alone. Pixel $i$
# costs $-\log_2 p(x_i \mid x_{<i})$ bits.

# %%
model = programs["PixelCNN", "as they are"]
chain = model.unroll()
with torch.no_grad():
    trace = poutine.trace(chain.model).get_trace(unseen.x)
    trace.compute_log_prob()
bits = torch.stack([-trace.nodes[f"x_{i}"]["log_prob"] for i in range(1, 65)], 1) / torch.log(torch.tensor(2.0))
total = evidences["PixelCNN", "as they are"].bits_per_dim * 64
print(f"bits per image: {bits.sum(1).mean():.4f} by adding up the sites, {total:.4f} by dgm.evaluate")
assert abs(bits.sum(1).mean() - total) < 1e-3

example = unseen.x[3]
with torch.no_grad():
    given_before = model.factors(example.unsqueeze(0)).base_dist.probs[
        0, 0
    ]  # p(x_i = 1 | x_<i) for every i, in one pass
figure, panels = subplots(1, 4, height=2.7)
pictures = {
    "mean bits per pixel, all test digits": (bits.mean(0).reshape(8, 8), theme.heat),
    "one digit": (example[0].float(), theme.gray),
    "p($x_i$ = 1 | $x_{<i}$) on it": (given_before, theme.gray),
    "bits per pixel on it": (bits[3].reshape(8, 8), theme.heat),
}
for axes, (title, (picture, colors)) in zip(panels, pictures.items(), strict=True):
    shown = axes.imshow(picture.numpy(), cmap=colors, vmin=0)
    axes.set(title=title, xticks=[], yticks=[])
    axes.grid(False)
    figure.colorbar(shown, ax=axes, shrink=0.75)
plt.show()
claim(bits.mean(0)[0] < 0.1 * bits.mean())

# %% [markdown]
# The corner costs almost nothing, because it is always empty. On the single digit, the expensive pixels are those that
# the model predicted wrongly: it expected white and the pixel is black, or the reverse.
#
# **Conditioning.** `poutine.condition` can fix any site of the chain, and the sites after it are drawn given its value.
# Fix the first 32 sites, the upper half of a digit:

# %%
some = unseen.x[: scaled(8, 2)]


def fixed_at(x, places):
    return {f"x_{i}": x.flatten(1)[:, i - 1].float() for i in places}


with torch.no_grad():
    rows = [
        poutine.condition(chain.model, fixed_at(some, range(1, 33)))(len(some)) for _ in range(3)
    ]  # the lower half, given the upper
assert all(torch.equal(row[:, :, :4], some[:, :, :4].to(row.dtype)) for row in rows)
half = torch.zeros(1, 8, 8, dtype=torch.bool)
half[:, 4:] = True
hidden = torch.cat([torch.zeros_like(some).bool(), half.expand(some.shape), *[torch.zeros_like(some).bool()] * 3])
plots.images(
    torch.cat([some, some, *rows]),
    levels=2,
    num_columns=len(some),
    covered=hidden,
    row_labels=["digit", "seen", "draw 1", "draw 2", "draw 3"],
)

# %% [markdown]
# These are exact draws from $p(x_{33}, \dots, x_{64} \mid x_{\le 32})$. Now fix the *lower* half instead. The chain
# draws the upper half first, before it reaches the fixed sites, so the fixed sites have no influence on the draw. They
# change only the density of the trace: each adds $\log p(x_i \mid x_{<i})$. We must weight the draws by this density,
# and resample them along the chain if all weights are tiny. This is **sequential Monte Carlo**, and `dgm.infer.impute`
# does it.

# %%
lower = fixed_at(some, range(33, 65))
with torch.no_grad():
    naive = poutine.condition(chain.model, lower)(len(some))
weighted = dgm.infer.impute(model, some, half, num_samples=3, num_particles=scaled(256, 12))
plots.images(
    torch.cat([some, some, naive.to(torch.uint8), *weighted]),
    levels=2,
    num_columns=len(some),
    covered=torch.cat([torch.zeros_like(some).bool(), ~half.expand(some.shape), *[torch.zeros_like(some).bool()] * 4]),
    row_labels=["digit", "seen", "naive", "SMC 1", "SMC 2", "SMC 3"],
)

# %%
many = unseen.x[: scaled(100, 4)]
with torch.no_grad():
    naive = poutine.condition(chain.model, fixed_at(many, range(33, 65)))(len(many)).to(torch.uint8)
    weighted = dgm.infer.impute(model, many, half, num_samples=1, num_particles=scaled(128, 8))[0]
    scores = {"real digits": many, "naive": naive, "SMC": weighted}
    scores = {name: model.log_prob(x) for name, x in scores.items()}
for name, values in scores.items():
    print(f"{name:12s} log p(x) {values.mean():7.2f} +- {values.std() / len(values) ** 0.5:.2f} nats")
gained = scores["SMC"] - scores["naive"]
print(f"SMC above naive: {gained.mean():.2f} +- {gained.std() / len(gained) ** 0.5:.2f} nats")
claim(gained.mean() > 4 * gained.std() / len(gained) ** 0.5)

# %% [markdown]
# The naive halves fit together less well, and the model's own $\log p(x)$ is lower. The digits from SMC score like real
# digits.
#
# ## 5. Why sampling is slow, and the cache
#
# One pass computes all conditionals of a *known* $x$. A draw is not known beforehand: $x_2$ needs $x_1$, and $x_3$
# needs both. A draw therefore takes $D$ passes, one after the other. The picture shows one draw as it grows. Pixels
# that are not yet drawn show $p(x_i = 1 \mid \cdot)$ as the network computes it from the pixels so far, with 0 for the
# others.

# %%
torch.manual_seed(1)
drawn = model.sample(1)
moments = (0, 9, 18, 27, 36, 45, 54, 64)
frames = []
for known in moments:
    x = drawn.clone()
    x.view(-1)[known:] = 0
    with torch.no_grad():
        frame = model.factors(x).base_dist.probs.clone()
    frame.view(-1)[:known] = drawn.view(-1)[:known].float()
    frames.append(frame[0])
plots.images(
    torch.stack(frames), num_columns=8, column_labels=[str(known) for known in moments], title="pixels drawn so far"
)

# %% [markdown]
# Each of the $D$ passes repeats nearly everything that the previous pass has computed. The masks say what can be
# reused: a hidden unit of degree $m$ reads the first $m$ features only, so it is final as soon as $x_m$ is drawn. A
# **cache** computes each unit once, at that moment. (In a PixelCNN, the cached unit is a row of the vertical stack or a
# pixel of the horizontal stack.)

# %%
network = MADE(16, 1, hidden=(48, 48), levels=2)
figure, panels = subplots(1, 3, height=2.7)
steps = torch.arange(16)
naive = torch.full((16, 96), 1.0)
cached = torch.zeros(16, 96)
for step in steps:
    for layer, counts_of_layer in enumerate(network.counts):
        ends = torch.tensor([0, *counts_of_layer]).cumsum(0)
        cached[step, 48 * layer + ends[step] : 48 * layer + ends[step + 1]] = 1
for axes, (name, computed) in zip(panels, {"naive": naive, "cache": cached}.items(), strict=False):
    axes.imshow(computed.numpy(), cmap=ListedColormap([theme.paper, theme.series[0]]), aspect="auto", vmin=0, vmax=1)
    axes.set(
        title=f"{name}: {int(computed.sum())} hidden units computed", xlabel="hidden unit", ylabel="step of the draw"
    )
    axes.grid(False)
assert cached.sum() == 96  # every unit once
assert (cached.sum(0) == 1).all()


def multiplications(call):
    """How many multiplications the matrix products and convolutions of call() take."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() // 2  # it counts an addition for each


def costs(program):
    """One pass, a naive draw and a cached one, for a single x."""
    x = torch.zeros(1, *program.event_shape, dtype=torch.uint8)
    one_pass, cached = multiplications(lambda: program.log_prob(x)), multiplications(lambda: program.sample(1))
    hook = program.factors.network.register_forward_hook(lambda *_: None)  # under a hook there is no cache
    naive = multiplications(lambda: program.sample(1))
    hook.remove()
    return one_pass, naive, cached


sizes = (16, 64, 256, 784)
found = [
    costs(dgm.Autoregressive(dgm.Bernoulli(size, MADE(size, 1, (256, 256), levels=2))))
    for size in sizes[: scaled(4, 2)]
]
for values, name in zip(zip(*found, strict=True), ("one pass", "naive draw", "cached draw"), strict=True):
    panels[2].loglog(sizes[: len(values)], values, marker="o", ms=4, label=name)
panels[2].set(title="MADE, two layers of 256", xlabel="D", ylabel="multiplications")
panels[2].set_xticks(sizes, [str(size) for size in sizes])
panels[2].minorticks_off()
panels[2].legend()
plt.show()
for size, (one_pass, naive, cached) in zip(sizes, found, strict=False):
    print(
        f"MADE, D = {size:3d}: one pass {one_pass:9,d}   naive draw {naive:13,d} = {naive / one_pass:.0f} passes   cached {cached:9,d} = {cached / one_pass:.2f}"
    )
    assert naive == size * one_pass
    assert cached <= one_pass

one_pass, naive, cached = costs(model)
print(
    f"PixelCNN, 8x8:  one pass {one_pass:9,d}   naive draw {naive:13,d} = {naive / one_pass:.0f} passes   cached {cached:9,d} = {cached / one_pass:.2f}"
)
assert naive == 64 * one_pass
assert cached < 1.01 * one_pass

# %% [markdown]
# A naive draw costs exactly $D$ passes. A cached draw costs as much as a single pass, and less for MADE, because masked
# weights are not multiplied. It is the same draw, not an approximation:

# %%
torch.manual_seed(2)
with_cache = model.sample(4)
hook = model.factors.network.register_forward_hook(lambda *_: None)
torch.manual_seed(2)
without = model.sample(4)
hook.remove()
assert torch.equal(with_cache, without)
print("pixels that differ between the two:", int((with_cache != without).sum()))

# %% [markdown]
# A cache does not remove the sequence: $D$ small steps run one after the other, and hardware that is fast at large
# products is mostly idle. This is the drawback of autoregressive models: they score in parallel but draw in sequence.
#
# Finally, we compare draws of the two networks with the data:

# %%
columns = scaled(14, 3)
rows = {"data": unseen.x[:columns]}
rows |= {name: programs[name, "as they are"].sample(columns) for name in ("MADE", "PixelCNN")}
plots.images(torch.cat(list(rows.values())), levels=2, num_columns=columns, row_labels=list(rows))

# %% [markdown]
# ## 6. Exercises
#
# 1. Break the mask of `small` at a single weight: let the output for $x_1$ read $x_3$ directly, with weight 2. What do
#    the 512 probabilities sum to?
# 2. *Greedy* decoding takes the more probable value at every step. Does it find the most probable state of the nine
#    pixels? Greedy decoding makes the best choice at each step; construct a distribution of two bits for which it
#    fails.
# 3. Divide every logit by a *temperature* $\tau$ while drawing: `model.chain(draw)` calls `draw(i, p_i)` for each
#    conditional. How do $\log p(x)$ and the variety of the draws change for $\tau = 0.5, 1, 1.5$?
#
# ## What to change next
#
# - **The order.** Train `MADE` in the reverse order, or in a random one. How many nats does the order matter?
# - **The gray levels.** Use `dgm.data.load("digits")` with `DiscretizedLogistic(shape, 17, 5, network)` as the features
#   and `PixelCNN(shape, 15, levels=17)`: five logistics have 15 parameters.
# - **The network.** `dgm.networks.CausalTransformer` sees all earlier pixels, as MADE does, and shares its weights, as
#   a PixelCNN does. How well does it do?
# - **The observed pixels.** Condition on every other pixel. When does SMC run out of particles?
# - **Your own cache.** The page on autoregressive models in `docs/` shows one in ten lines.
#
# ## Solutions
#
# **1.** They do not sum to one. $x_1$ now depends on $x_3$ and $x_3$ on $x_1$, so no order of drawing is left, and the
# product of the three factors is not the chain rule of any distribution.

# %%
broken = copy.deepcopy(small)
broken.factors.network.direct.mask[0, 2] = True
with torch.no_grad():
    broken.factors.network.direct.weight[0, 2] = 2.0
    print(f"sum over the states: {broken.log_prob(states).double().exp().sum():.4f}, before {q.sum():.4f}")
    claim(abs(broken.log_prob(states).double().exp().sum() - 1) > 0.01)

# %% [markdown]
# **2.** On the nine pixels it does, in this run. In general it need not. Let $p(x_1 = 1) = 0.6$, let $x_2$ be a fair
# coin after $x_1 = 1$, and let $x_2 = 0$ after $x_1 = 0$. Greedy decoding then finds a state of probability 0.3 and
# misses the state of probability 0.4.

# %%
with torch.no_grad():
    greedy = small.chain(lambda i, p_i: (p_i.probs > 0.5).float(), (1,))
    p_greedy = small.log_prob(greedy).exp().item()
print(
    f"nine pixels: greedy {greedy[0].int().tolist()} with p = {p_greedy:.4f}; most probable {states[q.argmax()].tolist()} with {q.max():.4f}"
)
assert p_greedy <= q.max() + 1e-6


class TwoBits(nn.Module):
    """p(x_1 = 1) = 0.6; p(x_2 = 1 | x_1) is 0.5 after 1, and 0 (nearly) after 0."""

    order = (0, 1)

    def forward(self, x):
        first = torch.full((len(x),), 0.6).logit()
        return torch.stack([first, torch.where(x[:, 0] == 1, 0.0, -20.0)], -1)


two = dgm.Autoregressive(dgm.Bernoulli(2, TwoBits()))
greedy = two.chain(lambda i, p_i: (p_i.probs > 0.5).float(), (1,))
best = torch.tensor([[0, 0]])
print(
    f"two bits: greedy {greedy[0].int().tolist()} with p = {two.log_prob(greedy).exp().item():.2f}; best {best[0].tolist()} with {two.log_prob(best).exp().item():.2f}"
)
assert two.log_prob(greedy) < two.log_prob(best)

# %% [markdown]
# **3.** Low temperatures give likely and similar images, high ones varied and unlikely. Neither are draws from $p(x)$,
# which needs $\tau = 1$. We measure variety by the number of pixels in which two draws differ.


# %%
@torch.no_grad()
def at_temperature(tau, num):
    def draw(i, p_i):
        return torch.bernoulli((p_i.logits / tau).sigmoid())

    return model.chain(draw, (num,))


table = {}
for tau in (0.5, 1.0, 1.5):
    x = at_temperature(tau, scaled(200, 8))
    flat = x.flatten(1)
    differ = torch.cdist(flat, flat, p=1).sum() / (len(flat) * (len(flat) - 1))
    with torch.no_grad():
        table[tau] = model.log_prob(x).mean().item(), differ.item()
    print(f"temperature {tau}: log p(x) {table[tau][0]:7.2f} nats, two draws differ in {table[tau][1]:.1f} pixels")
claim(table[0.5][0] > table[1.0][0] > table[1.5][0])
claim(table[0.5][1] < table[1.0][1] < table[1.5][1])
