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
# # Images in color
#
# [Chapter 00](00-four-ways-to-represent-p-of-x.ipynb) used models of points and of small digits. This chapter asks four
# questions about a model of color images, which have 3 x 32 x 32 pixels, or 3072 dimensions instead of 64:
#
# | question | answered by |
# |---|---|
# | How probable is an unseen image? | $\log p(x)$, in bits per dimension |
# | What does the model draw? | samples of $p(x)$ |
# | What does it know about an image? | the code $z$ of $q(z \mid x)$ |
# | What can it not explain? | images with a low $p(x)$ |
#
# You need PyTorch and chapter 00. The model is a VAE. It trains here, in about a minute of one CPU core, so its answers
# are not the best possible. Section 6 has commands for longer trainings.

# %%
import math

import pyro
import torch

import dgm_pyro as dgm
from chapter import claim, mean_and_error, scaled, style  # small helpers, in chapter.py beside this
from dgm_pyro import anomaly, corruptions, plots, representations

pyro.set_rng_seed(0)
style()
torch.set_num_threads(1)

# %% [markdown]
# ## 1. Data and model
#
# `glyphs-color` needs no download. It draws the ten digits and 26 capitals in the fonts of matplotlib, turned and
# stretched at random, in a random color on a background that fades from one random color to another. We train on the
# digits and keep the capitals for section 5. Each color value has 256 levels. We keep 8 of them, because a network
# takes long to learn fine shades.

# %%
LEVELS = 8


def glyphs(split, num):
    """Digits as a data set, and the images of capitals."""
    data = dgm.data.load("glyphs-color", split, num_data=scaled(num, 100))
    x, is_digit = data.x // (256 // LEVELS), data.y < 10
    return dgm.Data(x[is_digit], data.y[is_digit], levels=LEVELS, num_classes=10, name="color digits"), x[~is_digit]


train, _ = glyphs("train", 12_000)
valid, _ = glyphs("valid", 800)
test, capitals = glyphs("test", 1200)
num_dims = train.event_shape.numel()
print(f"{len(train)} images of shape {tuple(train.event_shape)}: {num_dims} dimensions")
plots.images(train.x[:20], levels=LEVELS, num_columns=10)

# %% [markdown]
# A fully connected network has a weight for every pair of a pixel and a unit. A MADE of this size also has one for
# every pair of pixels. `dgm.build` counts the parameters before it allocates memory, and refuses a model that is too
# large:

# %%
try:
    dgm.build("made", train)
except ValueError as error:
    print(error)

# %% [markdown]
# For images of at least 16 pixels a side, `dgm.build("vae", data)` uses convolutions, which need more operations per
# image. With `hidden=` it uses fully connected layers, which train within the minute that we have:

# %%
vae = dgm.build("vae", train, hidden=(256, 256), latent_size=32)
history = dgm.fit(
    vae, train, validation=valid, gradient_steps=scaled(300, 2), batch_size=64, lr=2e-3, validate_every=scaled(75),
    compile=False, progress=False,
)  # fmt: skip
print(vae)
plots.learning_curves(history)

# %% [markdown]
# ## 2. How probable is an unseen image?
#
# A model of $p(x)$ is a compressor: $-\log_2 p(x)$ is the length of a code for $x$ in bits. The length per dimension
# can be compared between sizes of images. Three references need no network:
#
# - a uniform guess among the 8 levels, which costs 3 bits per dimension;
# - the frequencies of the levels at each place, as if all 3072 numbers were independent;
# - PNG, which predicts each pixel from its neighbors. Its length includes a header.


# %%
def counted(data):
    """Log-frequencies of the levels at each place, with half a count added to each level: (8, 3072)."""
    x = data.x.flatten(1).long()
    counts = torch.full((LEVELS, num_dims), 0.5).scatter_add_(0, x, torch.ones(x.shape))
    return (counts / counts.sum(0)).log()


def score(program, data):
    return dgm.evaluate(program, data, num_particles=scaled(10, 2))


evidence = score(vae, test)
nats_per_bit = math.log(2)
independent = -counted(train).gather(0, test.x.flatten(1).long()).sum(1).double() / nats_per_bit
lengths = {
    "independent pixels": independent,
    "PNG": anomaly.code_bits(test.x),
    f"VAE ({evidence.kind})": -evidence.values.double() / nats_per_bit,
}
print(f"guessing: {math.log2(LEVELS):.2f} bits per dimension")
for name, bits in lengths.items():
    print("{}: {:.3f} +- {:.3f} bits per dimension".format(name, *mean_and_error(bits / num_dims)))
gain, error = mean_and_error((independent + evidence.values / nats_per_bit) / num_dims)
claim(gain > 1.5)
claim(lengths["PNG"].mean() < -evidence.values.mean() / nats_per_bit)

# %% [markdown]
# The VAE saves more than 1.5 bits per dimension against independent pixels, because $z$ holds what the pixels of an
# image have in common, such as its colors. The number of the VAE is a bound, so its true cost may be lower. PNG still
# needs fewer bits, because it predicts a pixel from its neighbors. In this VAE the pixels are independent given $z$.
#
# ## 3. What does the model draw?
#
# The first row has test images. The second row has their reconstructions: the mean of $p(x \mid z)$ at the code of the
# image. The third row has this mean at draws of $z$ from the prior $p(z)$.

# %%
shown = test.x[:10]
reconstructed = representations.decode(vae, representations.encode(vae, shown))
with torch.no_grad():
    drawn = representations.decode(vae, vae.prior.sample(10))
plots.images(
    torch.cat([rows.round().to(torch.uint8) for rows in (shown, reconstructed, drawn)]),
    levels=LEVELS,
    num_columns=10,
    row_labels=["x", "from its code", "from p(z)"],
)

# %% [markdown]
# Reconstructions have the right backgrounds, with a gray patch in place of the digit. Draws from the prior are mostly
# gray noise. After such a short training the codes of images are not where the prior puts its mass, and the decoder has
# not learned what to do elsewhere. The prior is a part like any other, so we can replace only the prior. A flow,
# trained on codes drawn from $q(z \mid x)$, becomes the prior of a new VAE with the same encoder and likelihood:

# %%
codes = dgm.Data(representations.encode(vae, train.x, draw=True), name="codes")
prior = dgm.flow.realnvp(32)
dgm.fit(prior, codes, gradient_steps=scaled(600, 2), batch_size=128, lr=2e-3, compile=False, progress=False)
swapped = dgm.VAE(prior, vae.likelihood, vae.encoder)
better = score(swapped, test)
difference, error = (value / (num_dims * nats_per_bit) for value in better.minus(evidence))
print(f"with the flow as prior: {better.bits_per_dim:.3f} bits per dimension ({better.kind})")
print(f"lower than with the Normal prior by {difference:.3f} +- {error:.3f}")
claim(3 * error < difference < 0.1)

with torch.no_grad():
    drawn = representations.decode(swapped, prior.sample(20))
plots.images(drawn.round().to(torch.uint8), levels=LEVELS, num_columns=10)

# %% [markdown]
# Now the draws have backgrounds that fade, in the colors of the data, with a gray patch in place of the digit. The
# shape of the digit needs a longer training. The bits have fallen by less than 0.1 per dimension: this number hardly
# shows a difference that the eye sees at once.
#
# ## 4. What does it know about an image?
#
# The code has 32 numbers. A linear regression from them to the color of the upper left corner, and a linear probe for
# the digit, show what they hold:


# %%
def explained(features, target, test_features, test_target):
    """The share of the variance of the targets that a linear regression explains on test data."""
    inputs, test_inputs = (torch.nn.functional.pad(f.double(), (0, 1), value=1.0) for f in (features, test_features))
    weights = torch.linalg.lstsq(inputs, target, driver="gelsd").solution
    rest = (test_target - test_inputs @ weights).square().mean()
    return 1 - (rest / (test_target - target.mean(0)).square().mean()).item()


means = [representations.encode(vae, data.x) for data in (train, test)]
corners = [data.x[:, :, 0, 0].double() for data in (train, test)]
color = explained(means[0], corners[0], means[1], corners[1])
by_code = representations.probe(means[0], train.y, means[1], test.y)
print(f"share of the variance of the corner's color that the code explains: {color:.2f}")
print(f"accuracy of a linear probe of the code for the digit: {by_code:.2f}; chance is 0.10")
claim(color > 0.8)
claim(by_code < 0.3)

path = representations.interpolate(vae, test.x[:3], test.x[3:6], num_points=8, curve="linear")
plots.images(path.transpose(0, 1).flatten(0, 1).round().to(torch.uint8), levels=LEVELS, num_columns=8)

# %% [markdown]
# The code contains the colors of the background, and hardly which digit it is. The ELBO rewards what saves most bits,
# and most pixels are background. Along the line between two codes, the background changes evenly from one to the other.
# A representation for classes needs an objective that rewards them: [chapter
# 08](08-anomalies-doubt-representations.ipynb) compares several.
#
# ## 5. What can it not explain?
#
# We score four kinds of images that are not digits: digits with shuffled pixels, patches of photographs, capitals, and
# backgrounds without a character. The first score is $\log p(x)$. The second adds the length of a PNG, which corrects
# for the high probability of simple images (Serrà et al. 2020). The AUROC is the probability that the score is higher
# for a digit than for an anomaly: 0.5 is chance.

# %%
random = torch.Generator().manual_seed(0)
top, bottom = (256 * torch.rand(len(test), 3, 1, 1, generator=random) for _ in range(2))
down = torch.linspace(0, 1, 32)[:, None].expand(32, 32)
anomalies = {
    "shuffled pixels": corruptions.shuffle_pixels(test.x),
    "patches of photographs": dgm.data.load("patches-32", "test", num_data=len(test)).x // (256 // LEVELS),
    "capitals": capitals[: len(test)],
    "empty backgrounds": (((1 - down) * top + down * bottom) // (256 // LEVELS)).to(torch.uint8),
}
scores = {name: score(swapped, dgm.Data(x, levels=LEVELS, name=name)).values for name, x in anomalies.items()}


def without_complexity(values, x):
    return values / nats_per_bit + anomaly.code_bits(x)


plain = {name: anomaly.auroc(better.values, values) for name, values in scores.items()}
corrected = {
    name: anomaly.auroc(without_complexity(better.values, test.x), without_complexity(values, anomalies[name]))
    for name, values in scores.items()
}
for name in anomalies:
    print(f"{name:23s} AUROC {plain[name]:.3f} by log p(x), {corrected[name]:.3f} with the length of a PNG")
claim(plain["shuffled pixels"] > 0.95)
claim(plain["empty backgrounds"] < 0.1 and plain["patches of photographs"] < 0.7)
claim(min(corrected.values()) > 0.7)

plots.score_histograms({"digits": better.values, **scores})

# %% [markdown]
# The score $\log p(x)$ finds shuffled pixels without an error, and patches of photographs hardly better than chance.
# Empty backgrounds are *more* likely than nearly all digits, because they consist of what is easiest to predict in the
# training images. A high $p(x)$ does not mean that an image is typical. With the length of a PNG, all four kinds have
# an AUROC above 0.7, but shuffled pixels are found less well than before: PNG cannot compress them, so the correction
# makes them look more normal. No score is the best for all anomalies. [Chapter
# 08](08-anomalies-doubt-representations.ipynb) has alarms with a guaranteed rate of false alarms.
#
# ## 6. What to change next
#
# - **Time and network.** `dgm train vae --data glyphs-color --epochs 30` trains the VAE with convolutions, on all 256
#   levels, and `dgm evaluate runs/vae-glyphs-color` scores it.
# - **Family.** `dgm list --data glyphs-color` shows what else suits these images. A `pixelcnn` has an exact $p(x)$ and
#   predicts a pixel from its neighbors, which are independent given $z$ here; `glow` and `flow++` are multiscale flows;
#   `diffusion` has a U-Net.
# - **Comparison.** `dgm tour --images` trains all families on gray digits of 28 x 28 pixels and compares them.
# - **Data.** `dgm train vae --data FOLDER` takes a folder of your own images.
