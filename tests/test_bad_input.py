"""Bad input over the whole public surface: one table, each entry an error of the right type that says what to do.

The keywords are regular expressions, all of which the message must match.
"""

import json
import math
import re

import numpy as np
import pyro
import pytest
import torch
from torch import nn

import dgm_pyro as dgm
from dgm_pyro import cli, flow, guides, networks, plots, priors
from dgm_pyro.catalog import build
from dgm_pyro.networks import MADE, MLP

NAN, INF = math.nan, math.inf
X = torch.randn(4, 2)
BITS = torch.randint(2, (4, 2))
GRAY = torch.tensor([[0, 3], [2, 1]])


def themed(name):
    with plots.theme(name):
        pass


def conditional():
    return dgm.Normal(2, nn.Linear(3, 4))


def labeled_normal():
    return dgm.Normal(2, nn.Embedding(3, 4))


def vae():
    return dgm.VAE(dgm.Normal(2), dgm.Normal(2, nn.Linear(2, 4)), dgm.Normal(2, nn.Linear(2, 4)))


def vae_parts():
    return dgm.Normal(2, nn.Linear(2, 4)), dgm.Normal(2, nn.Linear(2, 4))


def bits_vae():
    return dgm.VAE(dgm.Bernoulli(4), dgm.Normal(2, nn.Linear(4, 4)), dgm.Bernoulli(4, nn.Linear(2, 4)))


def dropout_vae():
    network = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5))
    return dgm.VAE(dgm.Normal(2), dgm.Normal(2, nn.Linear(2, 4)), dgm.Normal(2, network))


def diffusion(**options):
    return dgm.Diffusion(2, networks.DenoisingMLP((2,), (4,)), **{"num_steps": 3, **options})


def classifier():
    return dgm.Labeled(dgm.Categorical((), 3), labeled_normal())


def fit(program=None, data=X, **options):
    return dgm.fit(program or dgm.Normal(2, learned=True), data, **{"epochs": 1, "progress": False, **options})


# what -> (call, error, keywords)
CASES = {
    # x
    "x too wide": (
        lambda: dgm.Normal(2).log_prob(torch.zeros(4, 3)),
        ValueError,
        [r"x has shape \(4, 3\)", r"event_shape is \(2,\)"],
    ),
    "x without a batch": (
        lambda: dgm.Normal(2).log_prob(torch.zeros(2)),
        ValueError,
        [r"x has shape \(2,\)", r"pass \(B, \*\(2,\)\)"],
    ),
    "x with two batch dimensions": (lambda: dgm.Normal(2).log_prob(torch.zeros(3, 4, 2)), ValueError, ["x has shape"]),
    "x empty": (lambda: dgm.Normal(2).log_prob(torch.zeros(0, 2)), ValueError, ["x is empty", r"\(0, 2\)"]),
    "x NaN": (lambda: dgm.Normal(2).log_prob(torch.full((4, 2), NAN)), ValueError, ["NaN", "drop those rows"]),
    "x infinite": (lambda: dgm.Normal(2).log_prob(torch.full((4, 2), -INF)), ValueError, ["infinite"]),
    "x a list": (
        lambda: dgm.Normal(2).log_prob([[0.0, 1.0]]),
        TypeError,
        ["x must be a torch.Tensor, got list", "as_tensor"],
    ),
    "x a numpy array": (lambda: dgm.Normal(2).log_prob(X.numpy()), TypeError, ["got ndarray", "as_tensor"]),
    "x None": (lambda: dgm.Normal(2).log_prob(None), TypeError, ["x must be a torch.Tensor, got NoneType"]),
    "x complex": (lambda: dgm.Normal(2).log_prob(X + 1j), TypeError, ["complex", "x.real"]),
    "x boolean": (lambda: dgm.Bernoulli(2).log_prob(BITS.bool()), TypeError, ["torch.bool", r"x.to\(torch.uint8\)"]),
    "x integers for a density": (
        lambda: dgm.Normal(2).log_prob(GRAY),
        TypeError,
        ["integers", "density on reals", "Dequantized"],
    ),
    "x reals for a mass": (
        lambda: dgm.Bernoulli(2).log_prob(torch.full((4, 2), 0.5)),
        ValueError,
        ["x holds 0.5", r"integers 0 \.\. 1"],
    ),
    "x gray for bits": (
        lambda: dgm.Bernoulli(2).log_prob(GRAY),
        ValueError,
        ["values from 0 to 3", "2 levels", "binarize"],
    ),
    "x above the levels": (
        lambda: dgm.Categorical(2, 3).log_prob(GRAY),
        ValueError,
        ["values from 0 to 3", r"0 \.\. 2"],
    ),
    "x negative": (
        lambda: dgm.DiscretizedLogistic(2, 4).log_prob(-GRAY),
        ValueError,
        ["values from -3 to 0", "4 levels"],
    ),
    "x of another precision": (
        lambda: conditional().log_prob(X.double(), torch.zeros(4, 3)),
        TypeError,
        ["x has dtype torch.float64", r"x.to\(torch.float32\)"],
    ),
    "x on another device": (
        lambda: dgm.Normal(2, learned=True).log_prob(X.to("meta")),
        ValueError,
        ["x is on meta", "program is on cpu"],
    ),
    "x for the model": (lambda: vae().model(torch.zeros(4, 3)), ValueError, ["x has shape"]),
    "x for the guide": (lambda: vae().guide(torch.full((4, 2), NAN)), ValueError, ["NaN"]),
    "x of log_weights": (lambda: vae().log_weights(torch.zeros(4, 3)), ValueError, ["x has shape"]),
    "the guide without data": (lambda: vae().guide(3), ValueError, ["the guide needs data"]),
    "the model of no data": (lambda: vae().model(0), ValueError, ["number of data must be a positive integer, got 0"]),
    "the model of a string": (lambda: vae().model("x"), TypeError, ["x must be a torch.Tensor, got str"]),
    # given
    "given missing": (lambda: conditional().log_prob(X), ValueError, ["conditional: pass given", r"\(B, \*\(3,\)\)"]),
    "given to an unconditional": (
        lambda: dgm.Normal(2).log_prob(X, torch.zeros(4, 3)),
        ValueError,
        ["not conditional: leave it out"],
    ),
    "given too wide": (
        lambda: conditional().log_prob(X, torch.zeros(4, 5)),
        ValueError,
        [r"given has shape \(4, 5\)", r"given_shape is \(3,\)"],
    ),
    "given too few": (
        lambda: conditional().log_prob(X, torch.zeros(3, 3)),
        ValueError,
        ["given has 3 rows, but x has 4"],
    ),
    "given NaN": (lambda: conditional().log_prob(X, torch.full((4, 3), NAN)), ValueError, ["given holds NaN"]),
    "given a list": (
        lambda: conditional().log_prob(X, [1, 2, 3, 4]),
        TypeError,
        ["given must be a torch.Tensor, got list"],
    ),
    "given of another precision": (
        lambda: conditional().log_prob(X, torch.zeros(4, 3).double()),
        TypeError,
        ["given has dtype torch.float64"],
    ),
    "given a scalar": (
        lambda: labeled_normal().log_prob(X[:1], torch.tensor(1)),
        ValueError,
        [r"given has shape \(\)"],
    ),
    "given as a pair": (
        lambda: conditional().log_prob(X, (torch.zeros(4, 3), torch.zeros(4, 3))),
        ValueError,
        [r"given has 2 part\(s\), but 1"],
    ),
    "half a pair": (
        lambda: dgm.Normal(2, MLP((3,), 4, (4,), num_classes=3)).log_prob(X, torch.zeros(4, 3)),
        ValueError,
        [r"given has 1 part\(s\), but 2"],
    ),
    "no pair": (
        lambda: dgm.Normal(2, MLP((3,), 4, (4,), given_shape=(2,))).sample(2),
        ValueError,
        ["a tuple of tensors of shapes"],
    ),
    "a label out of range": (
        lambda: labeled_normal().log_prob(X, torch.tensor([0, 1, 2, 3])),
        ValueError,
        ["labels from 0 to 3", "3 classes"],
    ),
    "a negative label": (lambda: labeled_normal().sample(1, torch.tensor([-1])), ValueError, ["labels from -1 to -1"]),
    "a label that is no integer": (
        lambda: labeled_normal().log_prob(X, torch.ones(4)),
        TypeError,
        ["class labels of dtype torch.float32", r"given.long\(\)"],
    ),
    "labels one-hot": (
        lambda: labeled_normal().log_prob(X, torch.eye(4, 3).long()),
        ValueError,
        [r"given has shape \(4, 3\)"],
    ),
    # counts
    "no samples": (lambda: dgm.Normal(2).sample(0), ValueError, ["num_samples must be a positive integer, got 0"]),
    "half a sample": (lambda: dgm.Normal(2).sample(2.5), ValueError, ["num_samples", "2.5"]),
    "samples by a flag": (lambda: dgm.Normal(2).sample(True), ValueError, ["num_samples", "True"]),
    "samples and givens differ": (lambda: conditional().sample(3, torch.zeros(2, 3)), ValueError, ["given has 2 rows"]),
    "no particles": (
        lambda: vae().log_weights(X, num_particles=0),
        ValueError,
        ["num_particles must be a positive integer, got 0"],
    ),
    "particles in words": (lambda: vae().log_weights(X, num_particles="many"), ValueError, ["num_particles", "'many'"]),
    "an intractable density": (lambda: vae().log_prob(X), dgm.IntractableError, ["log_weights", r"dgm\.evaluate"]),
    # conditionals
    "event_shape zero": (lambda: dgm.Normal(0), ValueError, ["event_shape must be a positive int"]),
    "event_shape a float": (lambda: dgm.Bernoulli(2.0), ValueError, ["event_shape", "2.0"]),
    "event_shape a string": (lambda: dgm.Normal("3"), ValueError, ["event_shape", "'3'"]),
    "event_shape of numpy": (lambda: dgm.Normal(np.int64(3)), ValueError, ["event_shape", "int64", r"use int\(...\)"]),
    "event_shape None": (lambda: dgm.Normal(None), ValueError, ["event_shape", "None"]),
    "one level": (lambda: dgm.Categorical(2, 1), ValueError, ["levels must be an int of at least 2, got 1"]),
    "levels a float": (lambda: dgm.DiscretizedLogistic(2, 16.0), ValueError, ["levels", "16.0"]),
    "no components": (lambda: dgm.MixtureOfNormals(2, 0), ValueError, ["components must be a positive integer, got 0"]),
    "parameters of the wrong shape": (
        lambda: dgm.Normal(3, parameters=torch.zeros(3, 2)),
        ValueError,
        [r"parameters has shape \(3, 2\)", r"\(2, 3\)"],
    ),
    "parameters NaN": (lambda: dgm.Normal(2, parameters=torch.full((2, 2), NAN)), ValueError, ["parameters holds NaN"]),
    "parameters integers": (
        lambda: dgm.Normal(2, parameters=torch.ones(2, 2).long()),
        TypeError,
        ["tensor of floats, got torch.int64"],
    ),
    "parameters a list": (
        lambda: dgm.Normal(2, parameters=[[0, 0], [1, 1]]),
        TypeError,
        ["tensor of floats, got list"],
    ),
    "network and parameters": (
        lambda: dgm.Normal(2, nn.Linear(2, 4), parameters=torch.zeros(2, 2)),
        ValueError,
        ["leave out learned and parameters"],
    ),
    "network and learned": (lambda: dgm.Bernoulli(2, nn.Linear(2, 2), learned=True), ValueError, ["leave out learned"]),
    "network a function": (lambda: dgm.Normal(2, torch.tanh), TypeError, ["network must be a torch.nn.Module"]),
    "network too narrow": (
        lambda: dgm.Normal(2, nn.Linear(3, 3)).log_prob(X, torch.zeros(4, 3)),
        ValueError,
        [r"returned shape \(1, 3\)", r"\(1, 2, 2\) or \(1, 4\)"],
    ),
    # networks
    "an unknown activation": (
        lambda: MLP((2,), 4, activation="sine"),
        ValueError,
        ["activation must be one of relu", "'sine'"],
    ),
    "a label input of no classes": (lambda: MLP((), 4), ValueError, ["class label: pass num_classes"]),
    "gray levels for a network of reals": (
        lambda: dgm.Normal(2, MLP((3,), 4)).log_prob(X, torch.zeros(4, 3).byte()),
        TypeError,
        ["given integers", "levels="],
    ),
    "an MLP without its given": (lambda: MLP((2,), 4, given_shape=(3,))(X), ValueError, ["takes a given"]),
    "an MLP with a given too many": (lambda: MLP((2,), 4)(X, X), ValueError, ["takes no given"]),
    "a given for no hidden layer": (
        lambda: MLP((2,), 4, (), num_classes=3),
        ValueError,
        ["pass at least one width"],
    ),
    "an order with a gap": (lambda: MADE((3,), 1, (4,), order=(0, 1, 3)), ValueError, ["order", r"0 \.\. 2"]),
    "an order by another name": (
        lambda: MADE((3,), 1, (4,), order="random"),
        ValueError,
        ["order must be 'natural'", "'random'"],
    ),
    "pixels without a channel": (lambda: networks.PixelCNN((4, 4), 2), ValueError, ["(C, H, W)"]),
    "an even kernel": (lambda: networks.PixelCNN((1, 4, 4), 2, kernel_size=4), ValueError, ["kernel_size must be odd"]),
    # autoregressive models
    "features without a network": (lambda: dgm.Autoregressive(dgm.Bernoulli(3)), ValueError, ["no network", "MADE"]),
    "features without masks": (
        lambda: dgm.Autoregressive(dgm.Bernoulli(3, nn.Linear(3, 3))),
        ValueError,
        ["order", "MADE"],
    ),
    "features of another shape": (
        lambda: dgm.Autoregressive(dgm.Bernoulli((1, 3), MADE((3,), 1, (4,)))),
        ValueError,
        [r"\(3,\)", r"\(1, 3\)"],
    ),
    "features that are no conditional": (
        lambda: dgm.Autoregressive(vae()),
        TypeError,
        ["factors must be a conditional", "VAE"],
    ),
    # flows
    "a flow of one feature by couplings": (lambda: flow.realnvp(1), ValueError, ["at least two features", "maf"]),
    "a flow of no layers": (lambda: flow.maf(2, layers=0), ValueError, ["layers must be a positive integer"]),
    "a flow on integers": (lambda: flow.realnvp(2).log_prob(GRAY), TypeError, ["density on reals", "Dequantized"]),
    "a flow that cannot score data": (
        lambda: dgm.Flow(2, [pyro.distributions.transforms.Planar(2)]),
        ValueError,
        ["Planar"],
    ),
    "a coupling of nothing": (
        lambda: networks.Coupling((True, True), networks.Affine(), nn.Linear(2, 2)),
        ValueError,
        ["passes", "some False"],
    ),
    "a permutation that is none": (lambda: networks.Permutation((0, 0)), ValueError, ["each index"]),
    "a part that is no transform": (lambda: dgm.Flow(2, [nn.Linear(2, 2)]), TypeError, [r"transforms\[0\]", "Linear"]),
    "dequantizing off the cube": (
        lambda: dgm.Dequantized(flow.realnvp(2), levels=4),
        ValueError,
        ["unit cube", "unit_cube=True"],
    ),
    "dequantizing to one level": (
        lambda: dgm.Dequantized(flow.realnvp(2, unit_cube=True), levels=1),
        ValueError,
        ["levels must be an int of at least 2"],
    ),
    "dequantizing a mass": (
        lambda: dgm.Dequantized(dgm.Bernoulli(2), levels=4),
        TypeError,
        ["flow must be a Program with a density"],
    ),
    # VAEs
    "two latents of one name": (
        lambda: dgm.VAE(vae(), dgm.Normal(2, nn.Linear(2, 4)), dgm.Normal(2, nn.Linear(2, 4))),
        ValueError,
        ["two latents", "'z'"],
    ),
    "a prior by name": (
        lambda: dgm.VAE("normal", dgm.Normal(2), dgm.Normal(2)),
        TypeError,
        ["prior must be a dgm.Program"],
    ),
    # diffusions
    "no steps": (lambda: diffusion(num_steps=0), ValueError, ["num_steps must be a positive int"]),
    "an unknown schedule": (
        lambda: diffusion(noise_schedule="sine"),
        ValueError,
        ["noise_schedule must be", "cosine", "'sine'"],
    ),
    "a schedule that rises": (lambda: dgm.Schedule([0.5, 0.7]), ValueError, ["fall at every step", "t=2"]),
    "a schedule out of range": (lambda: dgm.Schedule([1.0, 0.5]), ValueError, ["between 0 and 1"]),
    "an unknown prediction": (
        lambda: diffusion(predict="score"),
        ValueError,
        ["predict must be one of noise", "'score'"],
    ),
    "too large a subsample": (lambda: diffusion(subsample=4), ValueError, ["subsample", "3 steps"]),
    "label dropout without labels": (
        lambda: diffusion(label_dropout=0.1),
        ValueError,
        ["label_dropout needs", "num_classes"],
    ),
    "a denoiser that is no module": (
        lambda: dgm.Diffusion(2, torch.tanh),
        TypeError,
        ["denoiser must be a torch.nn.Module"],
    ),
    "an unknown sampler": (
        lambda: diffusion().sample(2, sampler="euler"),
        ValueError,
        ["sampler must be one of", "'euler'"],
    ),
    "guidance without labels": (lambda: diffusion().sample(2, guidance=1.0), ValueError, ["guidance", "num_classes"]),
    "a U-Net of odd images": (lambda: networks.DenoisingUNet((1, 7, 7), (8, 16)), ValueError, ["cannot be halved"]),
    "a U-Net of vectors": (lambda: networks.DenoisingUNet((7,)), ValueError, [r"\(C, H, W\)", "DenoisingMLP"]),
    # classifiers
    "a prior over vectors": (
        lambda: dgm.Labeled(dgm.Categorical(2, 3), labeled_normal()),
        TypeError,
        [r"prior must be a Categorical of event_shape \(\)"],
    ),
    "classes that differ": (
        lambda: dgm.Labeled(dgm.Categorical((), 4), labeled_normal()),
        ValueError,
        ["3 classes", "4"],
    ),
    "classes without a conditional": (
        lambda: dgm.Labeled(dgm.Categorical((), 3), dgm.Normal(2)),
        ValueError,
        ["program is given", "not conditional"],
    ),
    "classifying another shape": (lambda: classifier().classify(torch.zeros(2, 3)), ValueError, ["x has shape"]),
    "a classifier without levels given integers": (
        lambda: dgm.Discriminative(dgm.Categorical((), 3, nn.Linear(2, 3))).classify(BITS),
        TypeError,
        [r"the Linear was given integers \(torch.int64\)", r"use \.float\(\)", r"MLP\(\.\.\., levels=\.\.\.\)"],
    ),
    "an encoder without levels given integers": (
        lambda: dgm.ELBO()(vae(), BITS.byte()),
        TypeError,
        [r"the Linear was given integers \(torch.uint8\)"],
    ),
    "bytes for an embedding": (
        lambda: dgm.Normal(2, nn.Sequential(nn.Embedding(2, 2), nn.Flatten())).log_prob(X, BITS.byte()),
        TypeError,
        ["given integers", r"\.long\(\) for an nn.Embedding"],
    ),
    "missing values for evaluate": (
        lambda: dgm.evaluate(vae(), X * NAN),
        ValueError,
        [r"dgm\.fit and dgm\.evaluate take dgm\.Data\(x, mask=~x\.isnan\(\)\)"],
    ),
    "missing values for log_weights": (lambda: vae().log_weights(X * NAN), ValueError, [r"mask=~x\.isnan\(\)"]),
    "infinite values, none of them missing": (lambda: dgm.Data(X + INF), ValueError, ["drop those rows$"]),
    "a classifier of nothing": (lambda: dgm.Discriminative(dgm.Categorical((), 3)), TypeError, ["network of x"]),
    # objectives
    "an objective of no samples": (lambda: dgm.ELBO(num_samples=0), ValueError, ["num_samples"]),
    "an IWAE of half a particle": (lambda: dgm.IWAE(0.5), ValueError, ["num_particles", "0.5"]),
    "a baseline of no other draw": (
        lambda: dgm.ELBO(leave_one_out=True),
        ValueError,
        ["num_samples must be at least 2 with leave_one_out", "got 1"],
    ),
    "a VIMCO of one draw": (lambda: dgm.IWAE(1, leave_one_out=True), ValueError, ["num_particles must be at least 2"]),
    "a negative beta": (lambda: dgm.ELBO(beta=-1.0), ValueError, ["beta must be a number of at least 0", "-1.0"]),
    "a beta of no number": (lambda: dgm.ELBO(beta="warm"), ValueError, ["beta must be a number", "'warm'"]),
    "a warm-up that never ends": (
        lambda: dgm.WarmUp(0),
        ValueError,
        ["fraction must be a number above 0 and at most 1"],
    ),
    "a warm-up beyond training": (lambda: dgm.WarmUp(1.5), ValueError, ["fraction must be", "1.5"]),
    "negative free bits": (lambda: dgm.FreeBits(-1), ValueError, ["nats must be a number of at least 0, got -1"]),
    "infinite free bits": (lambda: dgm.FreeBits(INF), ValueError, ["nats must be a number", "inf"]),
    "free bits of features that depend on one another": (
        lambda: fit(
            dgm.VAE(flow.realnvp(2, layers=2), *vae_parts()),
            objective=dgm.FreeBits(1, per_feature=True),
            validation=None,
        ),
        ValueError,
        ["per_feature needs a divergence per feature", "'z'", "per_feature=False"],
    ),
    "an STL of no draws": (lambda: dgm.STL(0), ValueError, ["num_samples must be a positive integer"]),
    "a DReG of no draws": (lambda: dgm.DReG(0), ValueError, ["num_particles must be a positive integer"]),
    "an RWS of no draws": (lambda: dgm.RWS(0), ValueError, ["num_particles must be a positive integer"]),
    "more sleep than there is": (lambda: dgm.RWS(4, sleep=2.0), ValueError, ["sleep must be", "at most 1", "2.0"]),
    "enumerating nothing": (lambda: dgm.Enumerate(0), ValueError, ["max_outcomes must be a positive integer"]),
    "enumerating too much": (
        lambda: fit(bits_vae(), objective="enumerate:15", validation=None),
        ValueError,
        ["enumerate 'z', 4 feature", "takes 16 outcomes", "max_outcomes is 15: raise it"],
    ),
    "a path through bits": (
        lambda: fit(bits_vae(), objective="stl", validation=None),
        ValueError,
        ["STL", r"'z' \(Bernoulli\) is not reparameterized", "'enumerate'"],
    ),
    "two paths through bits": (
        lambda: fit(bits_vae(), objective="dreg:4", validation=None),
        ValueError,
        ["DReG", r"'z' \(Bernoulli\) is not reparameterized", "'rws'"],
    ),
    "dropout in a guide that is stated twice": (
        lambda: fit(dropout_vae(), objective="dreg", validation=None),
        ValueError,
        ["the two runs differ", "remove dropout"],
    ),
    # fit
    "fit for no epochs": (lambda: fit(epochs=0), ValueError, ["epochs must be a positive integer"]),
    "fit in batches of nothing": (lambda: fit(batch_size=0), ValueError, ["batch_size"]),
    "fit with a negative rate": (lambda: fit(lr=-1.0), ValueError, ["lr must be a number above 0"]),
    "fit with a NaN rate": (lambda: fit(lr=NAN), ValueError, ["lr"]),
    "fit with negative decay": (lambda: fit(weight_decay=-0.1), ValueError, ["weight_decay"]),
    "fit by an unknown schedule": (
        lambda: fit(lr_schedule="step", validation=None),
        ValueError,
        ["lr_schedule", "cosine, constant", "step"],
    ),
    "fit with an ema of one": (lambda: fit(ema=1.0), ValueError, ["ema must be a decay"]),
    "fit that stops early on nothing": (
        lambda: fit(early_stopping=2, validation=None),
        ValueError,
        ["early_stopping needs validation"],
    ),
    "fit that validates on all": (lambda: fit(validation=1.0), ValueError, ["validation must be a fraction"]),
    "fit for an unknown objective": (lambda: fit(objective="adam"), ValueError, ["objective must be one of", "'adam'"]),
    "fit for half a draw": (
        lambda: fit(objective="iwae:0.5"),
        ValueError,
        ["'iwae:0.5'", "num_particles must be an integer"],
    ),
    "fit for a draw too many words": (lambda: fit(objective="iwae:50:2"), ValueError, ["an integer, got '50:2'"]),
    "fit for a beta without a number": (
        lambda: fit(objective="beta:"),
        ValueError,
        ["weight must be a number", "beta:4.0"],
    ),
    "fit for a number": (lambda: fit(objective=3), TypeError, ["objective must be callable", "int"]),
    "fit on an unknown device": (
        lambda: fit(device="tpu9", validation=None),
        ValueError,
        ["device must be 'auto'", "'tpu9'"],
    ),
    "fit of nothing to learn": (lambda: fit(dgm.Normal(2), validation=None), ValueError, ["no parameters"]),
    "fit to other data": (lambda: fit(data=torch.zeros(4, 3)), ValueError, ["x has shape"]),
    "fit to a list": (lambda: fit(data=[1, 2]), TypeError, ["dgm.data.Data or a torch.Tensor, got list"]),
    "fit a conditional to x alone": (lambda: fit(labeled_normal()), TypeError, [r"Data\(x, y\)"]),
    "fit one datum with a split": (
        lambda: fit(data=X[:1]),
        ValueError,
        ["validation=0.1 of 1 data", "validation=None"],
    ),
    "fit a few with the default split": (lambda: fit(data=X), ValueError, ["validation=0.1 of 4 data", "=None"]),
    "fit a density to integers": (
        lambda: fit(data=dgm.Data(GRAY, levels=4)),
        ValueError,
        ["integer data", "Dequantized"],
    ),
    "fit bits to gray": (
        lambda: fit(dgm.Bernoulli(2, learned=True), dgm.Data(GRAY, levels=4)),
        ValueError,
        ["4 levels", "2"],
    ),
    "fit more classes than there are": (
        lambda: fit(classifier(), dgm.Data(X, torch.tensor([0, 1, 2, 3]))),
        ValueError,
        ["classes"],
    ),
    # evaluate
    "evaluate with no particles": (lambda: dgm.evaluate(vae(), X, num_particles=0), ValueError, ["num_particles"]),
    "evaluate in no draws": (lambda: dgm.evaluate(vae(), X, num_samples=0), ValueError, ["num_samples"]),
    "evaluate a mass on reals": (
        lambda: dgm.evaluate(dgm.Bernoulli(2), dgm.Data(X)),
        ValueError,
        ["real data", "mass"],
    ),
    "evaluate a discriminative without labels": (
        lambda: dgm.evaluate(dgm.Discriminative(dgm.Categorical((), 3, nn.Linear(2, 3))), dgm.Data(X)),
        ValueError,
        ["the data have none", r"Data\(x, y\)"],
    ),
    "compare a mass with a density": (
        lambda: dgm.evaluate(dgm.Bernoulli(2), BITS).minus(dgm.evaluate(dgm.Normal(2), X)),
        ValueError,
        ["mass cannot be compared with a density", "Dequantized"],
    ),
    "compare different data": (
        lambda: dgm.evaluate(dgm.Normal(2), X).minus(dgm.evaluate(dgm.Normal(2), X[:3])),
        ValueError,
        ["different data", "same split"],
    ),
    # data
    "an unknown data set": (lambda: dgm.data.load("cifar"), ValueError, ["no data set 'cifar'", "digits"]),
    "an unknown split": (lambda: dgm.data.load("digits", "half"), ValueError, ["no split 'half'", "train, test"]),
    "data in no numbers": (lambda: dgm.data.load("moons", num_data=0), ValueError, ["num_data must be a positive int"]),
    "more data than there are": (
        lambda: dgm.data.load("digits", num_data=10_000),
        ValueError,
        ["num_data is 10000", "1437"],
    ),
    "data without a folder": (
        lambda: dgm.data.load("mnist", data_dir="/nowhere"),
        FileNotFoundError,
        ["mnist was not found", "/nowhere"],
    ),
    "data of one dimension": (lambda: dgm.Data(torch.zeros(3)), ValueError, [r"x\[:, None\]"]),
    "data that are integers": (lambda: dgm.Data(GRAY), TypeError, ["levels="]),
    "data with NaN": (lambda: dgm.Data(X * NAN), ValueError, ["NaN"]),
    "data above their levels": (lambda: dgm.Data(GRAY, levels=3), ValueError, ["values from 0 to 3", "levels=3"]),
    "fewer labels than data": (
        lambda: dgm.Data(X, torch.zeros(3).long()),
        ValueError,
        [r"y has shape \(3,\)", "4 rows"],
    ),
    "labels that are floats": (lambda: dgm.Data(X, torch.zeros(4)), TypeError, ["y has dtype torch.float32"]),
    # priors and guides
    "a mixture without parts": (lambda: priors.MixturePrior(2, 0), ValueError, ["components must be a positive int"]),
    "pseudo-inputs that are a number": (
        lambda: priors.VampPrior(conditional(), 50),
        TypeError,
        ["pseudo_inputs must be a tensor", "training data"],
    ),
    "pseudo-inputs of another shape": (
        lambda: priors.VampPrior(conditional(), torch.zeros(5, 2)),
        ValueError,
        [r"given_shape \(3,\)", r"pseudo_inputs \(2,\)"],
    ),
    "a full-rank image": (lambda: guides.FullRankNormal((1, 2, 2)), ValueError, ["over vectors", r"\(1, 2, 2\)"]),
    "no rank": (lambda: guides.LowRankNormal(2, 0), ValueError, ["rank must be a positive integer, got 0"]),
    "no planar maps": (
        lambda: guides.planar(2, layers=0, given_shape=(3,)),
        ValueError,
        ["layers must be a positive integer, got 0"],
    ),
    "a negative number of reflections": (
        lambda: networks.Sylvester(2, -1),
        ValueError,
        ["reflections must be an int of at least 0, got -1"],
    ),
    "a flow that is refined": (
        lambda: guides.SemiAmortized(flow.iaf(2, given_shape=(3,)), dgm.Normal(2), conditional()),
        TypeError,
        ["must be a dgm.Normal", "got Flow"],
    ),
    "a step of no size": (
        lambda: guides.SemiAmortized(conditional(), dgm.Normal(2), dgm.Normal(3, nn.Linear(2, 6)), lr=0.0),
        ValueError,
        ["lr must be a number above 0, got 0.0"],
    ),
    "too many values to enumerate": (
        lambda: guides.EnumeratedPosterior(dgm.Bernoulli(20), dgm.Normal(2, nn.Linear(20, 4))),
        ValueError,
        ["at most 4096 values", r"event_shape \(20,\)"],
    ),
    "a posterior of a nonlinear likelihood": (
        lambda: guides.LinearGaussianPosterior(dgm.Normal(2), dgm.Normal(3, MLP((2,), 3), scale_type="shared")),
        ValueError,
        ["must be linear", 'scale_type="feature"'],
    ),
    "a guide without its program's data": (
        lambda: guides.fit_guide(vae(), torch.zeros(4, 3), pyro.infer.autoguide.AutoNormal),
        ValueError,
        [r"x has shape \(4, 3\)"],
    ),
    "a scale of no kind": (
        lambda: dgm.Normal(2, nn.Linear(3, 2), scale_type="fixed"),
        ValueError,
        ["scale_type must be one of network, feature, shared, got 'fixed'"],
    ),
    # build
    "a ladder without a hierarchy": (
        lambda: build("vae", dgm.Data(X), encoder="ladder"),
        ValueError,
        ["for a hierarchy", "prior='vae'"],
    ),
    "an unknown model": (lambda: build("gan", dgm.Data(X)), ValueError, ["model must be one of", "'gan'"]),
    "an unknown prior": (
        lambda: build("vae", dgm.Data(X), prior="laplace"),
        ValueError,
        ["prior must be", "normal", "'laplace'"],
    ),
    "a swap that is not taken": (
        lambda: build("made", dgm.Data(X), prior="flow"),
        ValueError,
        ["'made' takes no prior"],
    ),
    "an unknown swap": (
        lambda: build("vae", dgm.Data(X), posterior="flow"),
        TypeError,
        ["takes no posterior", "'encoder'"],
    ),
    "pixels of points": (lambda: build("pixelcnn", dgm.Data(X)), ValueError, ["pixelcnn needs images"]),
    "a classifier without labels": (lambda: build("classifier", dgm.Data(X)), ValueError, ["no labels"]),
    "a model of a tensor": (lambda: build("vae", X), TypeError, ["dgm.data.Data, got Tensor"]),
    # the registry
    "a name taken twice": (
        lambda: dgm.register(type("Normal", (nn.Module,), {})),
        ValueError,
        ["'Normal' is registered"],
    ),
    "a number to register": (lambda: dgm.register(3), TypeError, ["cls must be a class, got int"]),
    "a theme of no color": (lambda: themed("blue"), ValueError, ["theme must be one of light, dark, got 'blue'"]),
    "a stranger to the registry": (
        lambda: dgm.registry.arguments_of(nn.Linear(2, 2)),
        TypeError,
        ["not registered", "@dgm.register"],
    ),
}


@pytest.mark.parametrize("what", CASES)
def test_bad_input(what):
    call, error, keywords = CASES[what]
    with pytest.raises(error) as raised:
        call()
    assert_says(str(raised.value), keywords)


def assert_says(message, keywords):
    assert len(message) < 600, "a message, not an essay"
    for keyword in keywords:
        assert re.search(keyword, message), f"{keyword!r} is not in: {message}"


# -- files -------------------------------------------------------------------------------------------------------------


def edit_header(folder, **changes):
    path = folder / "program.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def weights(folder):
    return next(folder.glob("*.safetensors"))


class Unregistered(dgm.Conditional):
    event_shape = torch.Size((2,))

    def forward(self, given=None):
        return pyro.distributions.Normal(torch.zeros(2), 1.0).to_event(1)


# what -> (what to do to a good checkpoint, error, keywords)
FILES = {
    "no folder": (lambda folder: dgm.load(folder / "none"), dgm.CheckpointError, ["no checkpoint", "no such folder"]),
    "no header": (
        lambda folder: (folder / "program.json").unlink(),
        dgm.CheckpointError,
        ["not a checkpoint", "program.json"],
    ),
    "no weights": (lambda folder: weights(folder).unlink(), dgm.CheckpointError, ["lacks its weights"]),
    "no JSON": (
        lambda folder: (folder / "program.json").write_text("{"),
        dgm.CheckpointError,
        ["damaged|corrupted|not readable"],
    ),
    "another program's JSON": (
        lambda folder: edit_header(folder, format="torch"),
        dgm.CheckpointError,
        ["another program"],
    ),
    "a newer version": (
        lambda folder: edit_header(folder, format_version=99),
        dgm.CheckpointError,
        ["version 99", "upgrade"],
    ),
    "truncated weights": (
        lambda folder: weights(folder).write_bytes(weights(folder).read_bytes()[:-3]),
        dgm.CheckpointError,
        ["truncated", "copy it again"],
    ),
    "other weights": (
        lambda folder: weights(folder).write_bytes(b"x" * weights(folder).stat().st_size),
        dgm.CheckpointError,
        ["damaged", "sha256"],
    ),
    "a file for a folder": (lambda folder: dgm.load(folder / "program.json"), dgm.CheckpointError, ["program.json"]),
    "saving to a file": (lambda folder: dgm.save(vae(), folder / "program.json"), dgm.CheckpointError, ["is a file"]),
    "saving a tensor": (
        lambda folder: dgm.save(X, folder),
        TypeError,
        ["program must be a dgm.Program, got Tensor"],
    ),
    "saving the unregistered": (
        lambda folder: dgm.save(Unregistered(), folder),
        TypeError,
        ["not registered", "@dgm.register"],
    ),
    "no images": (
        lambda folder: dgm.data.load("mnist", data_dir=folder),
        FileNotFoundError,
        ["mnist was not found", "DGM_DATA"],
    ),
}


@pytest.mark.parametrize("what", FILES)
def test_bad_files(what, tmp_path):
    spoil, error, keywords = FILES[what]
    dgm.save(vae(), tmp_path)

    def use():
        spoil(tmp_path)
        dgm.load(tmp_path)

    with pytest.raises(error) as raised:
        use()
    assert_says(str(raised.value), keywords)


# -- the command line --------------------------------------------------------------------------------------------------

COMMANDS = {
    "nonsense": ["nonsense"],
    "train": ["MODEL|model"],
    "train gan": ["model must be one of", "'gan'"],
    "train vae --data cifar": ["no data set 'cifar'"],
    "train vae --prior laplace": ["prior must be", "'laplace'"],
    "train made --prior flow": ["'made' takes no prior"],
    "train vae --objective adam": ["objective must be one of", "'adam'"],
    "train vae --objective iwae:many": ["'iwae:many'", "num_particles must be an integer"],
    "train vae --objective beta:-1": ["'beta:-1'", "weight must be a number of at least 0"],
    "train vae --epochs 0": ["epochs must be a positive integer"],
    "train vae --epochs many": ["epochs", "integer"],
    "train vae --lr -1": ["lr must be a number above 0"],
    "train vae --device tpu9": ["device must be", "'tpu9'"],
    "train vae --device meta": ["device 'meta'", "use device='cpu'"],
    "train vae --device hpu": ["device 'hpu'", "use device='cpu'"],
    "sample nowhere --device hpu": ["device 'hpu'"],
    "train vae --color red": ["--color"],
    "train vae --data mnist --data-dir /nowhere": ["mnist was not found", "/nowhere"],
    "sample nowhere": ["nowhere holds no run", "dgm train"],
    "evaluate nowhere": ["nowhere holds no run"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_bad_commands(command, tmp_path, monkeypatch, capsys):
    """One line on stderr, a non-zero status, and neither a file nor a run's folder left behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DGM_DEBUG", raising=False)
    assert cli.main(command.split()) != 0
    captured = capsys.readouterr()
    assert captured.err.startswith("dgm: ")
    assert len(captured.err.strip().splitlines()) == 1
    assert "Traceback" not in captured.err + captured.out
    assert_says(captured.err, COMMANDS[command])
    assert {path.name for path in tmp_path.rglob("*")} <= {"runs"}
