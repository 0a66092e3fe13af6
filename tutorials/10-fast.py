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
# # Fast
#
# The same model can be slow or fast. This chapter does not change the programs, and shows which work can be saved. For
# each saving it shows that the numbers stay the same, or measures by how much they change:
#
# | section | what is saved | what stays the same |
# |---|---|---|
# | 1 | nothing yet: how often each family asks its network | |
# | 2 | Python: a **compiled** program | loss and gradient, to rounding |
# | 3 | what was computed before: a **cache** | every draw, exactly |
# | 4 | **steps** of a diffusion | the distribution, up to an error with a known order |
# | 5 | bits: **precision** | the loss, to some digits |
# | 6 | time, not work: **many devices** | the gradient, to rounding |
#
# The chapter counts work where it can, because counts are the same on every machine. Times are ratios of two times that
# were measured in the same cell; yours will differ. You need PyTorch and chapter 00; chapters 02 to 05 explain the
# programs.

# %%
import logging
import math
import statistics
import sys
import time

import matplotlib.pyplot as plt
import pyro
import torch
from pyro.infer import TraceMeanField_ELBO
from torch import nn

import dgm_pyro as dgm
from chapter import QUICK, claim, scaled, style, subplots, theme  # small helpers, in chapter.py beside this
from dgm_pyro import plots
from dgm_pyro.families.diffusion import Denoised
from dgm_pyro.families.samplers import DDIM, SAMPLERS, Time
from dgm_pyro.families.samplers import run_sampler as walk
from dgm_pyro.networks import MADE, MLP, DenoisingMLP, PixelCNN
from dgm_pyro.training import compilation
from dgm_pyro.training.adversarial import squared_distance
from dgm_pyro.training.distributed import ProcessGroup

pyro.set_rng_seed(0)
style()
torch.set_num_threads(1)  # small networks are not faster with two: their threads wait for one another

# %% [markdown]
# ## 1. How often is the network asked?
#
# Each family is expensive in one direction. A hook on a network counts its calls. (In PyTorch, a *hook* is a function
# that is called along with a module.) All programs here have $D = 16$ features, and the diffusion $T = 20$ steps.


# %%
def calls(networks, run):
    """How often any of these modules is called while run() runs."""
    count = 0

    def add(*_):
        nonlocal count
        count += 1

    handles = [network.register_forward_hook(add) for network in networks]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return count


def networks_of(program):
    """The outermost networks: those that are called as a whole."""
    return [module for module in program.modules() if isinstance(module, (MADE, MLP, DenoisingMLP))]


vae = dgm.VAE(dgm.Normal(4), dgm.Normal(16, MLP((4,), 32)), dgm.Normal(4, MLP((16,), 8)))
families = {
    "autoregressive": dgm.Autoregressive(dgm.Normal(16, MADE(16, 2))),
    "masked flow (MAF), 1 layer": dgm.flow.maf((16,), layers=1),
    "inverse masked flow (IAF), 1 layer": dgm.flow.iaf((16,), layers=1),
    "coupling flow (RealNVP), 4 layers": dgm.flow.realnvp((16,), layers=4),
    "VAE": vae,
    "diffusion, one time of 20": dgm.Diffusion((16,), DenoisingMLP((16,)), num_steps=20),
    "diffusion unrolled, all 20": dgm.Diffusion((16,), DenoisingMLP((16,)), num_steps=20).unroll(),
}
x = torch.randn(8, 16)
print(f"{'':36s} {'score':>5s} {'draw':>5s}")
counted = {}
for name, program in families.items():
    score = (lambda p=program: p.log_prob(x)) if program.tractable else (lambda p=program: dgm.ELBO()(p, x))
    counted[name] = calls(networks_of(program), score), calls(networks_of(program), lambda p=program: p.sample(8))
    print(f"{name:36s} {counted[name][0]:5d} {counted[name][1]:5d}")
assert counted["autoregressive"] == (1, 16)
assert counted["VAE"] == (2, 1)
assert counted["diffusion unrolled, all 20"] == (20, 20)

# %% [markdown]
# The table sums up the course in numbers. A chain whose values are known is scored in one call. A chain whose values
# are not known is computed step by step: $D$ calls for a draw of the autoregressive model, and $D$ for the *score* of
# an inverse flow. A coupling layer computes one half from the other, with one call in either direction. A VAE has one
# step from $z$ to $x$. A diffusion takes one call for each step of its chain, except in training, where Pyro's
# subsampled plate evaluates random times (chapter 00).
#
# Sections 3 and 4 shorten the long chains. Section 2 first looks at the work *around* a network.
#
# ## 2. Python: compiled programs
#
# A training step consists of arithmetic on tensors and of Python code that arranges it: handlers run around every
# statement of model and guide, record it, look for plates, and sum terms. The arithmetic grows with the data; the
# Python code does not. The next cell computes the loss of a VAE of binary digits in three ways. `TraceMeanField_ELBO`
# is Pyro's ELBO with closed forms of the KL where there are any. Python's profiler hook counts the calls of Python
# functions for one loss with its gradient.

# %%
digits = dgm.data.load("digits-binary")
vae = dgm.build("vae", digits, latent_size=8)
print(vae)
x = digits.x[:64]


def by_hand(x):
    """What one would write without Pyro: no sites, no traces."""
    q = vae.encoder(x)
    z = q.rsample()
    kl = 0.5 * (q.mean**2 + q.variance - 1 - q.variance.log()).sum(-1)
    return (kl - vae.likelihood(z).log_prob(x)).mean()


def by_pyro(x):
    return TraceMeanField_ELBO().differentiable_loss(vae.model, vae.guide, x) / len(x)


def by_dgm(x):
    return -dgm.ELBO()(vae, x).surrogate.mean()


def python_calls(run):
    count = 0

    def add(frame, event, argument):
        nonlocal count
        count += event == "call"

    sys.setprofile(add)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


losses = {"by hand": by_hand, "plain Pyro": by_pyro, "dgm": by_dgm}
for loss in losses.values():
    loss(x).backward()  # once beforehand: what is set up at the first call does not count
functions = {name: python_calls(lambda loss=loss: loss(x).backward()) for name, loss in losses.items()}
for name, loss in losses.items():
    torch.manual_seed(0)
    print(f"{name:11s} {loss(x).item():.4f} nats per digit, {functions[name]:5d} calls of Python functions")
claim(functions["plain Pyro"] > 3 * functions["by hand"])

# %% [markdown]
# Pyro's handlers can run any Python code, including decisions that depend on numbers. Therefore `torch.compile`, which
# turns Python into machine code, has to stop at each of them. In most programs, however, the choice of statements does
# not depend on the numbers. `dgm.compile` therefore runs model and guide once, on symbolic tensors, through all
# handlers. The result is a graph of tensor operations on the program's own parameters, for any number of data, without
# statements and handlers. `torch.compile` compiles this graph.

# %%
start = time.process_time()
compiled = dgm.compile(vae)
compiled(x).backward()  # the first call compiles
seconds = time.process_time() - start
losses["compiled"] = compiled
compiled(x).backward()
functions["compiled"] = python_calls(lambda: compiled(x).backward())

values, gradients = {}, {}
for name in ("dgm", "compiled"):
    vae.zero_grad()
    torch.manual_seed(0)  # the same random numbers, in the same order
    values[name] = losses[name](x)
    values[name].backward()
    gradients[name] = torch.cat([parameter.grad.flatten() for parameter in vae.parameters()])
difference = (gradients["dgm"] - gradients["compiled"]).abs().max() / gradients["dgm"].abs().max()
print(
    f"loss {values['dgm'].item():.5f} and {values['compiled'].item():.5f}, largest difference of gradients {difference:.0e}"
)
torch.testing.assert_close(values["dgm"], values["compiled"])
assert difference < 1e-4
assert functions["compiled"] < functions["dgm"]


def clock(runs, rounds):
    """Median processor seconds of each, the runs taken in turn."""
    times = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.process_time()
            run()
            times[name].append(time.process_time() - start)
    return {name: statistics.median(each) for name, each in times.items()}


took = clock({name: lambda loss=loss: loss(x).backward() for name, loss in losses.items()}, scaled(40, 3))
figure, panels = subplots(1, 2, width=8.5, height=2.2, sharey=True)
for axes, found, title in (
    (panels[0], functions, "calls of Python functions"),
    (panels[1], {name: each / took["compiled"] for name, each in took.items()}, "time, compiled = 1"),
):
    axes.barh(list(found), list(found.values()), color=theme.series[0])
    axes.set(title=title)
panels[0].invert_yaxis()  # of both
plt.show()
for name, each in took.items():
    print(f"{name:11s} {each / took['compiled']:.2f} times the compiled step, {functions[name]} Python calls")
claim(took["plain Pyro"] > 1.2 * took["compiled"])

# %% [markdown]
# Compiling takes time, and pays off only after many steps:

# %%
for name in ("plain Pyro", "dgm"):
    saved = took[name] - took["compiled"]
    print(f"compiling took {seconds / took[name]:,.0f} steps of {name}", end="; ")
    print(f"it pays after {seconds / saved:,.0f} steps" if saved > 0 else "it did not pay in this run")

# %% [markdown]
# `dgm.fit` compiles trainings of 5000 steps or more by itself; with `compile=True` it compiles every training.
# (Compiling needs a C++ compiler on the machine. Without one, `dgm.fit` by default warns and trains uncompiled.)
#
# One run cannot capture Python code that depends on numbers. The error quotes the line:


# %%
class Sign(nn.Module):
    """Chooses by a number, in Python."""

    def forward(self, z):
        return torch.cat([z if z.sum() > 0 else -z, z], -1)


class Where(nn.Module):
    """The same choice, as a tensor operation."""

    def forward(self, z):
        return torch.cat([torch.where(z.sum() > 0, z, -z), z], -1)


logging.disable(logging.WARNING)  # torch would log a line of its own beside the message
z = torch.randn(5, 2)
assert torch.equal(Sign()(z), Where()(z))
for network in (Sign(), Where()):
    program = dgm.VAE(dgm.Normal(2), dgm.Normal(2, network), dgm.Normal(2, MLP((2,), 4)))
    try:
        compilation.Loss(program, dgm.ELBO(), backend="eager")(z)  # the graph as it is: no machine code
        print(f"{type(network).__name__}: a graph")
    except dgm.CompilationError as error:
        print(f"{type(network).__name__}: {str(error).split('cannot be compiled: ')[1].split('. A compiled')[0]}")
        assert isinstance(network, Sign)

# %% [markdown]
# ## 3. What was computed before: caches
#
# A naive draw from an autoregressive model calls the network $D$ times, and each time computes nearly everything anew.
# Chapter 02 counted what a cache saves: a factor $D$ in multiplications. How much *time* does this save? The networks
# below are not trained, because training changes neither counts nor times. A hook on the network turns the cache off,
# so sampling is naive.

# %%
found = {}
for side, batches in ((8, (1, 4, 16, 64)), (16, (1, 4, 16)))[: scaled(2)]:
    shape = (1, side, side)
    program = dgm.Autoregressive(dgm.Bernoulli(shape, PixelCNN(shape, 1, width=32, layers=3, levels=2)))
    program.eval()
    for batch in batches[: scaled(4)]:
        handle = program.factors.network.register_forward_hook(lambda *_: None)
        torch.manual_seed(0)
        start = time.process_time()
        naive = program.sample(batch)
        took_naive = time.process_time() - start
        handle.remove()
        torch.manual_seed(0)
        start = time.process_time()
        cached = program.sample(batch)
        found[side, batch] = took_naive / (time.process_time() - start)
        assert torch.equal(naive, cached)  # the same draw, pixel by pixel
        print(f"{side:2d}x{side:<2d} batch {batch:2d}: naive / cached = {found[side, batch]:6.1f}")
figure, axes = subplots(width=5.5, height=2.8)
for side in sorted({side for side, _ in found}):
    pairs = [(batch, ratio) for (each, batch), ratio in found.items() if each == side]
    axes.loglog(*zip(*pairs, strict=True), marker="o", ms=4, label=f"D = {side**2}")
axes.axhline(1, color=theme.muted, ls="--", lw=1)
axes.set(xlabel="images drawn at once", ylabel="naive time / cached time", title="PixelCNN: what the cache saves")
axes.set_xticks((1, 4, 16, 64), ["1", "4", "16", "64"])
axes.minorticks_off()
axes.legend()
plt.show()
if not QUICK:
    claim(min(found.values()) > 2)
    claim(found[16, 16] > found[8, 16] and found[8, 64] > found[8, 1])

# %% [markdown]
# The saving in time is smaller than the factor $D$ in multiplications: a cached step is so small that the call takes
# longer than its arithmetic. For larger batches and longer chains, the two factors come closer. Everything that runs
# the chain uses the same cache: the unrolled program with some sites conditioned, `dgm.infer.impute`, SMC, and the slow
# direction of masked flows.
#
# ## 4. Fewer steps
#
# A draw from a diffusion moves from noise to data. Without the random part, the path is a curve, the *probability
# flow*. It solves a differential equation, and a sampler solves this equation in steps. Numerical analysis predicts the
# error: for a rule of **order** $k$ it falls like $(\text{step})^k$, so twice the steps make it $2^k$ times smaller.
#
# For data from $N(0, s^2)$ everything is known. The best guess of $x_0$ is $E[x_0 \mid x_t] = \alpha_t s^2 x_t /
# (\alpha_t^2 s^2 + \sigma_t^2)$, and the flow keeps $x_t$ at the same number of standard deviations. We can therefore
# measure the error of each sampler exactly, without any network. (A sampler is a function of $x$, the current time $t$,
# the next, less noisy time, and the guess of $x_0$.)

# %%
spread = 0.5


def level(log_snr):
    """A time with that logarithm of alpha^2 / sigma^2, in double precision."""
    log_snr = torch.as_tensor(log_snr, dtype=torch.float64)
    return Time(None, log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt(), log_snr)


def best_guess(x, t):
    variance = t.alpha**2 * spread**2 + t.sigma**2
    return Denoised(t.alpha * spread**2 * x / variance, t.sigma**2 * spread**2 / variance * torch.ones_like(x))


def error_of(sampler, steps, first=-5.0, last=4.0):
    """Largest distance from the exact flow at the last time, over some starts."""
    times = [level(each) for each in torch.linspace(first, last, steps + 1, dtype=torch.float64)]
    width = [(t.alpha**2 * spread**2 + t.sigma**2).sqrt() for t in (times[0], times[-1])]
    start = width[0] * torch.linspace(-2, 2, 9, dtype=torch.float64)
    end = walk(sampler, start, times, best_guess)
    return (end - start * width[1] / width[0]).abs().max().item()


counts = torch.tensor([8, 16, 32, 64, 128])
cost = {"ddim": 1, "dpm++": 1, "heun": 2}  # guesses, so network calls, per step
figure, axes = subplots(width=5.5, height=3.0)
slopes = {}
for i, name in enumerate(cost):
    errors = torch.tensor([error_of(SAMPLERS[name], int(count)) for count in counts])
    slopes[name] = (errors[-1] / errors[-2]).log2().neg().item()
    axes.loglog(cost[name] * counts, errors, marker="os^"[i], ms=4, label=f"{name}: order {slopes[name]:.2f}")
axes.set(xlabel="network calls", ylabel="error at the end", title="distance from the exact flow, Gaussian data")
axes.legend()
plt.show()
print({name: f"{slope:.3f}" for name, slope in slopes.items()})
assert abs(slopes["ddim"] - 1) < 0.1
assert abs(slopes["dpm++"] - 2) < 0.15
assert abs(slopes["heun"] - 2) < 0.15

# %% [markdown]
# The slopes agree with the theory. `heun` calls the network twice per step; `dpm++` reuses the guess of the previous
# step. (Its small error with 8 steps is an accident: the error changes sign near there.) With a *learned* network, no
# sampler can fall below the error of the network. The question is how many steps reach this floor. The next cell trains
# a diffusion on the digits with $T = 50$, and compares draws with test digits by the energy distance (chapter 09),
# which is zero for equal distributions.

# %%
gray, unseen = dgm.data.load("digits"), dgm.data.load("digits", "test")
shape, levels = gray.event_shape, gray.levels
torch.manual_seed(0)
network = DenoisingMLP(shape, (256, 256, 256), num_parameters=levels)
diffusion = dgm.Diffusion(shape, network, "log-snr", num_steps=50, predict="levels", levels=levels)
dgm.fit(diffusion, gray, epochs=scaled(40), lr=2e-3, ema=0.99, progress=False)


def distance(x):
    return squared_distance(x.float(), unseen.x.float())


num = scaled(500, 20)
steps_of = {"ancestral": (5, 10, 20, 50), "dpm++": (5, 10, 20, 50)}
found, asked, drawn = {}, {}, {}
for sampler, choices in steps_of.items():
    for steps in choices:
        torch.manual_seed(0)
        asked[sampler, steps] = calls(
            [network], lambda s=sampler, n=steps: drawn.update({(s, n): diffusion.sample(num, sampler=s, num_steps=n)})
        )
        found[sampler, steps] = distance(drawn[sampler, steps])
        assert asked[sampler, steps] == steps
        print(f"{sampler:9s} {asked[sampler, steps]:2d} network calls: distance {found[sampler, steps]:.3f}")
floor = distance(gray.x)
print(f"training digits: {floor:.3f}")
claim(found["dpm++", 10] < found["ancestral", 10])
claim(found["dpm++", 10] < found["ancestral", 50] + 0.05)
rows = {
    f"{sampler}, {steps}": drawn[sampler, steps][:12]
    for sampler, steps in (("ancestral", 50), ("ancestral", 5), ("dpm++", 10), ("dpm++", 5))
}
plots.images(
    torch.cat(list(rows.values())), levels=levels, num_columns=12 if not QUICK else min(12, num), row_labels=list(rows)
)

# %% [markdown]
# With a fifth of the calls, the draws are as good or better by this measure, without new training.
#
# ## 5. Precision
#
# Numbers with fewer bits are faster to move and, on hardware made for them, to multiply. `bfloat16` has the range of
# `float32` and eight bits of precision. Inside a network this is often enough. For a log density it is not, because
# this is a *sum* over features in which differences of a nat matter.

# %%
with torch.no_grad():
    pixels = vae.likelihood(torch.zeros(64, 8)).base_dist.log_prob(digits.x[:64].float())
per_pixel = pixels.double().flatten(1)  # log p(x_i | z) of every pixel
exact = per_pixel.sum(1)
for kind in (torch.float32, torch.bfloat16):
    error = (per_pixel.to(kind).sum(1).double() - exact).abs().max()
    print(
        f"{kind!s:15s} next to {exact.mean():.0f} nats a step of {torch.finfo(kind).eps * 32:.1e}; error of the sum {error:.1e} nats"
    )
    assert error < 1e-3 if kind is torch.float32 else error > 0.01

losses_by = {}
for precision in ("float32", "bf16"):
    torch.manual_seed(0)
    program = dgm.build("vae", digits, latent_size=8)
    history = dgm.fit(program, digits, epochs=scaled(6), precision=precision, progress=False)
    losses_by[precision] = [each.loss for each in history.epochs]
    kinds = {parameter.dtype for parameter in program.parameters()}
    print(
        f"{precision:8s} parameters {kinds}, loss {losses_by[precision][0]:.3f} -> {losses_by[precision][-1]:.3f} nats per digit"
    )
claim(abs(losses_by["bf16"][-1] - losses_by["float32"][-1]) < 0.02 * losses_by["float32"][-1])

# %% [markdown]
# `dgm.fit(..., precision="bf16")` runs the networks in bfloat16 (PyTorch calls this *autocast*). Log-probabilities,
# their sums, the parameters and the optimizer keep their full precision. On a CPU like this one, bfloat16 is seldom
# faster; on a GPU it is.
#
# ## 6. Many devices
#
# The loss of a batch is a mean over its data. Several processes can therefore each take a share of the batch and
# average their gradients: two half batches are one batch,
#
# $$\nabla \frac1n \sum_{i=1}^n \ell_i = \sum_r \frac{n_r}{n}\, \nabla \Big[\frac1{n_r} \sum_{i \in \text{share } r}
# \ell_i\Big].$$
#
# Nothing else happens, whether there are two processes on a laptop or a cluster. PyTorch's `DistributedDataParallel`
# takes the plain mean over the $N$ processes, so each process weights its loss by $N n_r / n$, which matters when the
# shares differ. `ProcessGroup` computes these weights, for process `rank` of `size`. Here one process plays all of
# them:

# %%
torch.manual_seed(0)
program = dgm.Autoregressive(dgm.Normal(3, MADE(3, 2))).double()
data = torch.randn(100, 3, dtype=torch.float64)


def gradient(rows):
    program.zero_grad()
    (-program.log_prob(data[rows]).mean()).backward()
    return torch.cat([parameter.grad.flatten() for parameter in program.parameters()])


batch = torch.arange(100)[::3]  # 34 data
whole = gradient(batch)
for size in (1, 2, 3, 4):
    team = [ProcessGroup(rank, size) for rank in range(size)]
    together = sum(process.weight(batch) * gradient(process.share(batch)) for process in team) / size
    shares = [len(process.share(batch)) for process in team]
    print(f"{size} processes, shares {shares}: largest difference {(together - whole).abs().max():.0e}")
    torch.testing.assert_close(together, whole, rtol=1e-10, atol=1e-12)

# %% [markdown]
# PyTorch's `torchrun` starts real processes. Each process gets a number, and a GPU if there are any. The rest of the
# command is the same as for one process:
#
#     dgm train vae --data digits --batch-size 512 --out runs/one
#     torchrun --standalone --nproc-per-node=2 -m dgm_pyro train vae --data digits --batch-size 512 --out runs/two
#
# `--batch-size` is the total over all processes, so both commands run the same training: the same data in the same
# order, with the same learning rate. Only the noise differs. Each process draws its own $z$, so the two runs differ
# like runs with two seeds. Several processes are faster if each share has enough work: every step sends gradients, and
# here, with 64 pixels, sending takes longer than computing. The page on devices in `docs/` has GPUs, several machines
# and SLURM.
#
# ## 7. What to reach for
#
# | slow is | then | kept |
# |---|---|---|
# | a training of many small steps | `dgm.compile`, or `dgm.fit(..., compile=True)` | the numbers |
# | drawing from an autoregressive model | nothing: the cache is on. Draw many at once | the draws |
# | drawing from a diffusion | `sample(..., sampler="dpm++", num_steps=10)`, and look | the distribution, nearly |
# | drawing from a masked flow, scoring an inverse one | a coupling flow: one call in both directions | another model |
# | a large network on a GPU | `precision="bf16"` | the loss, nearly |
# | large batches, several devices | `torchrun` | the gradient |
#
# ## 8. Exercises
#
# 1. The time of the Python code does not depend on the batch size, so for large batches the handlers should not matter.
#    Compare the time of `by_pyro` with that of `by_hand` for batches of 8 to 1024.
# 2. Write a sampler of order two: make a plain `ddim` step to the middle of $[t, s]$, in the logarithm of the
#    signal-to-noise ratio, call the network there, and use that guess for the whole step. Measure its order.
# 3. Leave out the weights $N n_r / n$ of section 6. For which batch sizes is the result still right, and how wrong is
#    it for 34 data on three processes, and for 4?
#
# ## What to change next
#
# - **The program.** Count Python calls for the other families of section 1. Which has the most calls, and does it gain
#   the most?
# - **The chain.** Compile an unrolled diffusion of 20 steps. It gains the most, and takes the longest to compile.
# - **The network.** In section 3 use `MADE` or `dgm.networks.CausalTransformer`. Where is the cache worth most?
# - **Spacing.** `sample(..., spacing="karras")` puts the steps where there is little noise. With 5 steps, is it better?
# - **Threads.** Set `torch.set_num_threads(2)` and time section 2 again, with a batch of 64 and of 4096.
#
# ## Solutions
#
# **1.** The ratio falls towards one as arithmetic takes over.

# %%
ratios = {}
for size in (8, 64, 1024)[: scaled(3, 2)]:
    x = digits.x[:size]
    times = clock({"pyro": lambda x=x: by_pyro(x).backward(), "hand": lambda x=x: by_hand(x).backward()}, scaled(30, 2))
    ratios[size] = times["pyro"] / times["hand"]
    print(f"batch {size:4d}: plain Pyro {ratios[size]:.2f} times by hand")
claim(ratios[8] > ratios[max(ratios)] > 0.8 and ratios[8] > 1.3)

# %% [markdown]
# **2.** The sampler takes two guesses per step and has order two.


# %%
def midpoint(x, t, s, denoise, carried):
    middle = level((t.log_snr + s.log_snr) / 2)
    there, _ = DDIM()(x, t, middle, denoise, None)
    x0 = denoise(there, middle).x0
    # The ddim step from t to s, with this guess in place of the one at t.
    return s.alpha * x0 + s.sigma / t.sigma * (x - t.alpha * x0), None


errors = [error_of(midpoint, int(count)) for count in counts]
order = math.log2(errors[-2] / errors[-1])
print(f"order {order:.2f}; error with 64 calls {errors[2]:.1e}, of ddim {error_of(DDIM(), 64):.1e}")
assert abs(order - 2) < 0.15

# %% [markdown]
# **3.** The result is right if all shares are equal, that is, if $N$ divides $n$. Otherwise the data of small shares
# count too much. Four data for three processes raise an error, because one process would have a single datum.

# %%
team = [ProcessGroup(rank, 3) for rank in range(3)]
for rows in (batch[:33], batch):
    plain = sum(gradient(process.share(rows)) for process in team) / 3
    relative = ((plain - gradient(rows)).norm() / gradient(rows).norm()).item()
    print(f"{len(rows)} data: without weights the gradient is off by {100 * relative:.2g} %")
    assert (relative < 1e-10) == (len(rows) % 3 == 0)
try:
    team[0].batches(count=100, batch_size=4)
except ValueError as error:
    print(f"ValueError: {error}")
else:
    raise AssertionError
