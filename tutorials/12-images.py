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
# [Chapter 00](00-four-ways-to-represent-p-of-x.ipynb) put four questions to models of points and of small digits: what
# does a model draw, how probable is an unseen datum, what does it know about a datum, and what can it not explain? This
# chapter puts them to a model of color images of 3 x 32 x 32 pixels, with 3072 dimensions instead of 64. The programs
# are the same; only their networks are convolutional.
#
# You need PyTorch and chapter 00. The models train here, in minutes on a CPU. They are not at their best then: section
# 8 has the commands for longer trainings.

# %%
import math

import matplotlib.pyplot as plt
import pyro
import torch

import dgm_pyro as dgm
from chapter import claim, mean_and_error, scaled, style, subplots  # small helpers, in chapter.py beside this
from dgm_pyro import anomaly, corruptions, plots, representations

pyro.set_rng_seed(0)
style()
torch.set_num_threads(1)

# %% [markdown]
# ## 1. The data
#
# `glyphs-color` needs no download. It draws the ten digits and 26 capitals in the fonts of matplotlib, turned and
# stretched at random, in a random color on a background that fades from one random color to another. Each of the 3072
# numbers of an image has 256 levels.

# %%
train, valid, test = (
    dgm.data.load("glyphs-color", split, num_data=scaled(size, 40))
    for split, size in (("train", 4000), ("valid", 200), ("test", 400))
)
num_dims = train.event_shape.numel()
print(f"{len(train)} images of shape {tuple(train.event_shape)}, {num_dims} dimensions, {train.num_classes} classes")
plots.images(train.x[:20], levels=256, num_columns=10)

# %% [markdown]
# ## 2. Programs that suit images
#
# A fully connected network has a weight for every pair of a pixel and a unit. `dgm.build` counts before it takes
# memory, and refuses what is absurd:

# %%
try:
    dgm.build("made", train)
except ValueError as error:
    print(error)

# %% [markdown]
# A VAE gets convolutions: its encoder halves the resolution until 8 pixels a side are left, and its decoder reverses
# this. Their weights are shared by all places of the image. Each of the 3072 numbers is a mixture of discretized
# logistics given $z$.

# %%
vae = dgm.build("vae", train)
print(vae)

# %% [markdown]
# Now train it, and a convolutional classifier $p(y \mid x)$ for later. The loss is the ELBO in nats.

# %%
history = dgm.fit(
    vae, train, validation=valid, gradient_steps=scaled(300, 2), batch_size=32, lr=2e-3, validate_every=scaled(50),
    compile=False, progress=False,
)  # fmt: skip
classifier = dgm.build("classifier", train)
dgm.fit(
    classifier, train, validation=valid, gradient_steps=scaled(300, 2), batch_size=32, lr=1e-3,
    validate_every=scaled(50), compile=False, progress=False,
)  # fmt: skip
plots.learning_curves(history)

# %% [markdown]
# ## 3. Density: how probable is an unseen image?
#
# A model with a density is a compressor: $-\log_2 p(x)$ is the length of a code for $x$, in bits. Divided by the 3072
# dimensions it can be compared between sizes of images. Three references need no model of the image:
#
# - guessing among 256 levels costs 8 bits;
# - counting the levels at each place, as if pixels were independent;
# - PNG, which predicts each pixel from its neighbors.


# %%
def counted(data):
    """Log-frequencies of the levels at each place, each level half a time more than seen: (256, 3072)."""
    x = data.x.flatten(1).long()
    counts = torch.full((256, num_dims), 0.5).scatter_add_(0, x, torch.ones(x.shape))
    return (counts / counts.sum(0)).log()


independent = counted(train).gather(0, test.x.flatten(1).long()).sum(1)
evidence = dgm.evaluate(vae, test, num_particles=scaled(10, 2))
bits = {
    "independent pixels": -independent / (num_dims * math.log(2)),
    "png": anomaly.code_bits(test.x) / num_dims,
    f"VAE ({evidence.kind})": -evidence.values / (num_dims * math.log(2)),
}
print(f"guessing: {math.log2(256):.2f} bits per dimension")
for name, values in bits.items():
    print("{}: {:.2f} +- {:.2f} bits per dimension".format(name, *mean_and_error(values.double())))
difference, error = mean_and_error((list(bits.values())[0] - list(bits.values())[2]).double())
claim(difference > 4 * error)

# %% [markdown]
# DENSITY_TEXT
#
# ## 4. Samples: what does it draw?
#
# The first row is real. The second has reconstructions, which are the mean of $p(x \mid z)$ at the mean of
# $q(z \mid x)$. The third has the same mean at $z$ drawn from the prior. The last has draws from $p(x \mid z)$ at
# these $z$: the samples of the model.

# %%
shown = test.x[:10]
with torch.no_grad():
    z = vae.prior.sample(10)
rows = [
    shown,
    representations.decode(vae, representations.encode(vae, shown)),
    representations.decode(vae, z),
    representations.decode(vae, z, draw=True),
]
plots.images(
    torch.cat([row.round().clamp(0, 255).to(torch.uint8) for row in rows]),
    levels=256,
    num_columns=10,
    row_labels=["x", "from its z", "from a new z", "a sample"],
)

# %% [markdown]
# SAMPLES_TEXT
#
# ## 5. Representation: what does it know about an image?
#
# The mean of $q(z \mid x)$ has 64 numbers. A linear probe, a logistic regression from them to a property of the image,
# shows what they hold. We ask for two: the color of the upper left corner, as how much of its variance is explained,
# and the character.


# %%
def explained(features, target, features_test, target_test):
    """Share of the variance of each target that a linear regression explains on test data, averaged."""
    one = [torch.cat([f.double(), torch.ones(len(f), 1).double()], 1) for f in (features, features_test)]
    weights = torch.linalg.lstsq(one[0], target.double(), driver="gelsd").solution
    rest = (target_test - one[1] @ weights).square().mean(0)
    return (1 - rest / target_test.double().var(0, correction=0)).mean().item()


codes = [representations.encode(vae, data.x) for data in (train, test)]
corner = [data.x[:, :, 0, 0].double() for data in (train, test)]
color = explained(codes[0], corner[0], codes[1], corner[1])
by_z = representations.probe(codes[0], train.y, codes[1], test.y)
print(f"variance of the corner's color that z explains linearly: {color:.2f}")
print(f"accuracy of a linear probe of z for the character: {by_z:.3f}; chance is {1 / train.num_classes:.3f}")
claim(color > 0.8)
claim(by_z > 3 / train.num_classes)

# %%
path = representations.interpolate(vae, test.x[:3], test.x[3:6], num_points=8)
plots.images(path.transpose(0, 1).flatten(0, 1).round().clamp(0, 255).to(torch.uint8), levels=256, num_columns=8)

# %% [markdown]
# REPRESENTATION_TEXT
#
# ## 6. Anomalies: what can it not explain?
#
# Three kinds of images that are no glyphs: patches of photographs, glyphs with shuffled pixels, and backgrounds without
# a glyph. The score is $\log p(x)$, here its bound; the AUROC is the probability that it is higher for a glyph than for
# an anomaly.

# %%
random = torch.Generator().manual_seed(0)
top, bottom = (255 * torch.rand(len(test), 3, 1, 1, generator=random) for _ in range(2))
down = torch.linspace(0, 1, 32)[:, None].expand(32, 32)
anomalies = {
    "patches of photographs": dgm.data.load("patches-32", "test", num_data=len(test)).x,
    "shuffled pixels": corruptions.shuffle_pixels(test.x),
    "empty backgrounds": ((1 - down) * top + down * bottom).round().to(torch.uint8),
}
scores = {
    name: dgm.evaluate(vae, dgm.Data(x, levels=256, name=name), num_particles=scaled(10, 2)).values
    for name, x in anomalies.items()
}
areas = {name: anomaly.auroc(evidence.values, values) for name, values in scores.items()}
for name, area in areas.items():
    print(f"{name}: AUROC {area:.3f}")
claim(min(areas["patches of photographs"], areas["shuffled pixels"]) > 0.9)
claim(areas["empty backgrounds"] < 0.5)
plots.score_histograms({"glyphs": evidence.values, **scores})

# %% [markdown]
# ANOMALY_TEXT
#
# ## 7. Classification: who says "none of these"?
#
# The classifier is $p(y \mid x)$ alone. Its 36 probabilities sum to one for any image, so it must name a character for
# a patch of a photograph, too. The alarm on $\log p(x)$ has a threshold that 5 % of validation glyphs fall below.

# %%
probabilities = classifier.class_probabilities(test.x)
accuracy = (probabilities.argmax(1) == test.y).double()
on_patches = classifier.class_probabilities(anomalies["patches of photographs"]).max(1).values
of_valid = dgm.evaluate(vae, valid, num_particles=scaled(10, 2)).values
threshold = of_valid.quantile(0.05)
flagged = {name: (values < threshold).double() for name, values in {"glyphs": evidence.values, **scores}.items()}
print("accuracy on glyphs: {:.3f} +- {:.3f}".format(*mean_and_error(accuracy)))
print(f"mean confidence on glyphs {probabilities.max(1).values.mean():.2f}, on patches {on_patches.mean():.2f}")
for name, values in flagged.items():
    print(f"flagged by the alarm on p(x): {values.mean():.3f} of {name}")
claim(accuracy.mean() > 0.5)
claim(flagged["patches of photographs"].mean() > 0.5 + flagged["glyphs"].mean())

figure, axes = subplots(width=5, height=2.4)
axes.hist(probabilities.max(1).values.numpy(), bins=20, range=(0, 1), density=True, alpha=0.6, label="glyphs")
axes.hist(on_patches.numpy(), bins=20, range=(0, 1), density=True, alpha=0.6, label="patches")
axes.set(xlabel="highest $p(y \\mid x)$ of the classifier", ylabel="density")
axes.legend(fontsize=7)
plt.show()

# %% [markdown]
# CLASSIFICATION_TEXT
#
# ## 8. What to change next
#
# - **Time.** These models trained for minutes. `dgm train vae --data glyphs-color --epochs 30` trains the same VAE for
#   longer, and `dgm evaluate runs/vae-glyphs-color` scores it.
# - **Family.** `dgm list --data glyphs-color` shows what else suits these images: `pixelcnn` has an exact density, and
#   sees the neighbors that the likelihood of this VAE does not; `glow` and `flow++` are multiscale flows; `diffusion`
#   has a U-Net.
# - **Comparison.** `dgm tour --images` trains all families on gray images of 28 x 28 pixels, and compares them.
# - **Data.** `dgm train vae --data FOLDER` takes a folder of your own images.
