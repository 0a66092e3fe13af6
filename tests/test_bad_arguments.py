"""A bad value for each argument of each public function: an error of ours, at once, that names the argument.

`CALLS` has a call that works for each public function, class and method. Each of its arguments is replaced in turn by
the bad values of its kind, which follows from its name.
"""

import functools
import importlib.util
import inspect
import math
import re
import shutil
import tempfile
import time
import traceback
import types
from pathlib import Path

import numpy as np
import pandas
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import dgm_pyro as dgm
from dgm_pyro import networks
from dgm_pyro.experiments import runs, sweep
from dgm_pyro.networks import MADE, MLP, Affine
from dgm_pyro.objectives import VariationalBound

ROOT = str(Path(dgm.__file__).parent)
MODULES = [
    "", "adversarial", "anomaly", "checkpoint", "classification", "corruptions", "data", "dequantized", "flow",
    "guides", "hierarchy", "hub", "implicit", "infer", "multiscale", "networks", "objectives", "plots", "priors",
    "quality", "representations", "runs", "samplers", "sweep",
]  # fmt: skip

# -- kinds of arguments, and what is none of them ----------------------------------------------------------------------

NAN = math.nan
SEED = [1.5, None, "x", -1, torch.tensor(1)]
COUNT = [0, -1, 1.5, None, "x", [2]]
LEVELS = [1, 2.5, None, "x"]
NUMBER = [NAN, None, "x", torch.ones(2)]
PROBABILITY = [-0.1, 1.5, *NUMBER]
POSITIVE = [0, -1.0, *NUMBER]
REALS = [None, "x", [[0.0, 1.0]], 3, torch.full((4, 2), NAN), torch.zeros(4, 2).to_sparse()]
LABELS = [None, "x", [0, 1], torch.zeros(4)]
SHAPE = [0, -1, 1.5, None, "x", (2, 0), (1.5,)]
NAME = ["no such name", 3, None, ["x"]]
PROGRAM = [None, "x", 3, nn.Linear(2, 2)]
MODULE = [None, "x", 3]
PATH = [None, 3]
FOLDER = [*PATH, ""]
DEVICE = ["tpu9", "meta", "hpu", 3, None]
UNITS = [[1.0, 2.0, 3.0], NAN, "x"]
THING = [None, "x", 3]
FRACTION = [0.0, 1.0, NAN, None, "x"]

KINDS = {}


def kind(values, *names):
    KINDS.update(dict.fromkeys(names, values))


kind(SEED, "seed")
kind(
    COUNT, "num_samples", "num_particles", "num_chains", "num_temperatures", "num_leapfrog", "num_posterior_samples",
    "bins", "num_data", "num_points", "num_labels", "batch_size", "epochs", "num_steps", "gradient_steps", "warmup",
    "restarts", "max_tree_depth", "bins", "neighbors", "num_clusters", "layers", "components", "rank", "num_parameters",
    "out_features", "num_features", "num_columns", "width", "heads", "max_outcomes", "resolution", "seeds", "jobs",
    "blocks", "critic_steps", "k", "num_classes", "most", "early_stopping", "components",
)  # fmt: skip
kind(LEVELS, "levels", "given_levels")
kind(POSITIVE, "lr", "bound", "radius", "largest_shift", "max_frequency", "tolerance", "initial_scale", "critic_lr",
     "target_acceptance", "sigma_data", "gamma")  # fmt: skip
kind(NUMBER, "low", "high", "degrees", "reach", "highest", "lowest", "guidance")
kind([-1.0, *NUMBER], "scale", "sigma", "epsilon", "step_size", "weight_decay", "nats", "beta", "weight", "r1",
     "gradient_penalty", "eta", "threshold")  # fmt: skip
kind(PROBABILITY, "dropout", "rate", "label_dropout", "part", "sleep", "coverage", "false_alarm_rate")
kind(FRACTION, "fraction")
kind(REALS, "x", "z", "a", "b", "samples", "reference", "train", "test", "real", "fake", "p", "q", "normal",
     "anomalous", "data", "values", "centers")  # fmt: skip
kind([value for value in REALS if value is not None], "given", "parameters")
kind(LABELS, "y", "train_y", "test_y", "clusters")
kind(SHAPE, "event_shape", "in_shape", "out_shape", "given_shape", "hidden", "channels")
kind(
    NAME, "initial", "transition", "compressor", "activation", "predict", "sampler", "spacing", "game", "divergence",
    "kernel", "curve", "tails", "region", "split", "precision", "objective", "guide", "name", "text",
)  # fmt: skip
kind(PROGRAM, "program", "prior", "likelihood", "flow", "top", "bottom", "generative", "score", "nll",
     "background", "base", "encoder", "classifier")  # fmt: skip
kind(MODULE, "network", "denoiser", "generator", "critic", "univariate", "bijection")
kind(["x", 3], "embedding")
kind(PATH, "data_dir")
kind(FOLDER, "folder", "out")
kind(DEVICE, "device")


class Call:
    """A call that works: arguments by name, the kinds that their names do not say, and those that take anything.

    Of a method, ``of`` makes the object.
    """

    def __init__(self, arguments=None, kinds=None, free=(), of=None):
        self.arguments, self.kinds, self.free, self.of = arguments or {}, kinds or {}, free, of


# -- what to call with -------------------------------------------------------------------------------------------------

X = torch.tensor([[0.1, 0.4], [0.2, -0.1], [-1.0, 0.3], [0.5, 1.0]])
Y = torch.tensor([0, 1, 0, 1])
IMAGES = torch.arange(64).reshape(4, 1, 4, 4) % 4
PROBABILITIES = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.5, 0.5]])


def frame():
    return pandas.DataFrame({"a": [1.0, 3.0], "b": [4, 5]})


def linear():
    return nn.Linear(2, 4)


def encoder():
    return dgm.Normal(2, linear())


def vae():
    return dgm.VAE(dgm.Normal(2), dgm.Normal(2, linear()), encoder())


def classifier():
    return dgm.Discriminative(dgm.Categorical((), 2, nn.Linear(2, 2)))


def labeled():
    return dgm.Labeled(dgm.Categorical((), 2), dgm.Normal(2, nn.Embedding(2, 4)))


def made():
    return dgm.Autoregressive(dgm.Normal(2, MADE(2, 2, (4,))))


def denoiser():
    return networks.DenoisingMLP((2,), (4,))


def diffusion():
    return dgm.Diffusion(2, denoiser(), num_steps=3)


def implicit():
    return dgm.Implicit(2, dgm.Normal(2), nn.Linear(2, 2))


def data():
    return dgm.Data(X, Y)


def large():
    return dgm.data.open(torch.utils.data.TensorDataset(X), in_memory=False)


def bayesian():
    return dgm.classification.Bayesian(nn.Linear(2, 2), data())


def trained_bayesian():
    return bayesian().fit(1)


def fresh():
    """A folder that is not there yet."""
    return Path(tempfile.mkdtemp(dir=".")) / "new"


def stored():
    dgm.save(vae(), folder := fresh())
    return folder


def training():
    return dgm.Training(dgm.Normal(2, learned=True), X, options=dgm.TrainingOptions(validation=None))


def game():
    (objective := dgm.Adversarial()).prepare(implicit())
    return objective


def fast():
    return sweep.Options("vae", "moons", num_data=8, num_particles=2, training=dgm.TrainingOptions(epochs=1))


def run():
    options = dgm.TrainingOptions(epochs=1, validation=None)
    runs.train(folder := fresh(), "pixels", "moons", {}, options, num_data=8, progress=False)
    return folder


class Hub:
    """In the place of a hub: every repository is a run."""

    def create_repo(self, repo, **options):
        return repo

    def upload_folder(self, **options):
        pass

    def snapshot_download(self, repo, revision, local_dir, allow_patterns):
        shutil.copytree(run(), local_dir, dirs_exist_ok=True)


def history():
    return dgm.fit(dgm.Normal(2, learned=True), X, epochs=1, validation=None, progress=False)


def evidence():
    return dgm.evaluate(made(), X)


def density_ratio():
    return dgm.adversarial.density_ratio(X, X, gradient_steps=1)


def coin():
    p = pyro.sample("p", dist.Beta(torch.tensor(2.0), 2.0))
    pyro.sample("y", dist.Bernoulli(p), obs=torch.tensor(1.0))


def coin_posterior():
    return dgm.Posterior(coin)


@functools.cache
def coin_table():
    return dgm.infer.compare(
        coin_posterior(),
        guides=["meanfield"],
        reference=None,
        gradient_steps=1,
        num_particles=2,
        num_samples=100,
        num_temperatures=0,
    )


@functools.cache
def coin_draws():
    return dgm.infer.psis(coin_posterior(), guide=flat_coin(), num_particles=30)


def flat_coin():
    return dist.Normal(torch.zeros(1), 1.0).to_event(1)


def coin_predictions():
    return dgm.infer.predictive_check(coin_posterior(), num_samples=2)


def coin_chains():
    return dgm.infer.nuts(coin_posterior(), num_samples=2, warmup=2, num_chains=2)


def gaps(program, x):
    return dgm.infer.gaps(program, x, num_particles=2, num_temperatures=0, gradient_steps=1, num_samples=2)


def image_vae():
    shape = (1, 4, 4)
    return dgm.VAE(dgm.Normal(2), dgm.Normal(shape, MLP((2,), 32, (4,))), dgm.Normal(2, MLP(shape, 4, (4,))))


def deep_vae():
    h, shape = (2, 1, 1), (1, 2, 2)
    return dgm.hierarchy.vdvae(dgm.Bernoulli(shape, networks.ConvNet(h, shape, 1, 2)), (1,), latent_channels=1)


def level():
    return deep_vae().levels_down[0]


def report():
    return dgm.infer.check(vae(), X, num_samples=20, num_posterior_samples=3, bins=2)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


CONDITIONAL = dict(event_shape=2, network=linear)
STACK = dict(event_shape=2, layers=1, hidden=(4,))
MULTISCALE = dict(event_shape=(1, 2, 2), scales=1, layers=1, width=2, blocks=1)
OF_SCALES = {"scales": [0, 1.5, "x"]}
CODES = dict(train=X, train_y=Y, test=X, test_y=Y)

CALLS = {
    # programs
    "Normal": Call(CONDITIONAL | dict(scale_type="network"), {"scale_type": NAME, "network": MODULE[1:]}),
    "Bernoulli": Call(dict(event_shape=2, network=nn.Linear(2, 2)), {"network": MODULE[1:]}),
    "Categorical": Call(dict(event_shape=2, levels=2, network=linear), {"network": MODULE[1:]}),
    "MixtureOfNormals": Call(dict(event_shape=2, components=2), {"network": MODULE[1:]}),
    "StudentT": Call(dict(event_shape=2), {"network": MODULE[1:]}),
    "LogNormal": Call(dict(event_shape=2), {"network": MODULE[1:]}),
    "Beta": Call(dict(event_shape=2), {"network": MODULE[1:]}),
    "Poisson": Call(dict(event_shape=2), {"network": MODULE[1:]}),
    "NegativeBinomial": Call(dict(event_shape=2), {"network": MODULE[1:]}),
    "ZeroInflated": Call(dict(base=lambda: dgm.Poisson(2)), {"network": MODULE[1:]}),
    "Columns": Call(
        dict(columns={"a": "real", "b": "count"}, shift=[0.0, 0.0], scale=[1.0, 1.0]),
        {"network": MODULE[1:], "columns": [None, "x", 3, {}, {"a": "x"}, {"a": ("category", 0.5)}],
         "shift": [[1.0], "x", [NAN, 0.0]], "scale": [[1.0], "x", [0.0, 1.0]]},
    ),
    "PredictedLogistic": Call(
        dict(event_shape=(1, 4, 4), levels=9, components=5,
             network=lambda: networks.PixelCNN((1, 4, 4), 15, width=4, layers=1, levels=9)),
        {"network": MODULE},
    ),
    "DiscretizedLogistic": Call(dict(event_shape=2, levels=4, components=2), {"network": MODULE[1:]}),
    "Autoregressive": Call(dict(factors=lambda: dgm.Normal(2, MADE(2, 2, (4,)))), {"factors": PROGRAM}),
    "AnyOrder": Call(
        dict(factors=lambda: dgm.Normal(2, networks.ObservedInput(2, nn.Linear(4, 4)))), {"factors": PROGRAM}
    ),
    "Flow": Call(
        dict(event_shape=2, transforms=lambda: [networks.LULinear(2)], base=lambda: dgm.Normal(2)),
        {"transforms": [None, "x", 3, [3]], "base": PROGRAM[1:]},
    ),
    "Dequantized": Call(
        dict(flow=lambda: dgm.flow.realnvp(2, layers=1, unit_cube=True), levels=4, guide=lambda: dgm.Uniform(2)),
        {"guide": PROGRAM[1:]},
    ),
    "VAE": Call(
        dict(prior=lambda: dgm.Normal(2), likelihood=encoder, encoder=encoder, latent_name="z"),
        {"latent_name": ["", 3, None], "encoder": PROGRAM[1:]},
    ),
    "Diffusion": Call(
        dict(
            event_shape=2, denoiser=denoiser, noise_schedule="cosine", num_steps=3, predict="edm", subsample=1,
            sigma_data=0.5,
        ),
        {"noise_schedule": NAME, "subsample": COUNT},
    ),
    "ContinuousDiffusion": Call(
        dict(event_shape=2, denoiser=denoiser, noise_schedule="linear", num_steps=3, predict="edm", sigma_data=0.5),
        {"noise_schedule": NAME},
    ),
    "Schedule": Call(dict(alpha_bar=[0.9, 0.5]), {"alpha_bar": [None, "x", 3, [NAN], [[0.9]]]}),
    "LogSNR": Call(dict(highest=10.0, lowest=-6.0, num_units=0), {"num_units": COUNT[1:]}),
    "Implicit": Call(
        dict(prior=lambda: dgm.Normal(2), generator=lambda: nn.Linear(2, 2), event_shape=2, latent_name="z"),
        {"latent_name": ["", 3, None]},
    ),
    "Standardized": Call(
        dict(program=lambda: dgm.Normal(2, linear()), shift=1.0, scale=[2.0, 1.0], given_shift=0.0, given_scale=1.0),
        dict.fromkeys(("shift", "scale", "given_shift", "given_scale"), UNITS),
    ),
    "networks.Standardize": Call(
        dict(shift=1.0, scale=[2.0, 1.0]), {"shift": UNITS[1:], "scale": UNITS[1:], "network": ["x", 3]}
    ),
    "Labeled": Call(
        dict(prior=lambda: dgm.Categorical((), 2), program=lambda: dgm.Normal(2, nn.Embedding(2, 4)), label_name="y"),
        {"label_name": ["", 3, None], "classifier": PROGRAM[1:]},
    ),
    "Discriminative": Call(dict(classifier=lambda: dgm.Categorical((), 2, nn.Linear(2, 2)))),
    "OneHot": Call(dict(program=lambda: dgm.Categorical(2, 3))),
    "Embedded": Call(
        dict(program=lambda: dgm.Categorical(2, 3), codebook=lambda: dgm.networks.Codebook(3, 2)), {"codebook": MODULE}
    ),
    "VectorQuantizer": Call(
        dict(event_shape=(2, 1), network=lambda: nn.Linear(2, 2), codebook=lambda: dgm.networks.Codebook(3, 2),
             commitment=0.5),
        {"codebook": MODULE, "network": MODULE, "commitment": [-1, *NUMBER]},
    ),
    "priors.MixturePrior": Call(dict(event_shape=2, components=2)),
    "priors.VampPrior": Call(dict(encoder=encoder, pseudo_inputs=X), {"pseudo_inputs": REALS}),
    "Uniform": Call(dict(event_shape=2)),
    "flow.realnvp": Call(STACK),
    "flow.nsf": Call(STACK | dict(bins=4)),
    "flow.maf": Call(STACK | dict(dropout=0.1)),
    "flow.nsf_autoregressive": Call(STACK | dict(bins=4, dropout=0.1)),
    "flow.iaf": Call(STACK),
    "multiscale.convolutional_realnvp": Call(MULTISCALE, OF_SCALES),
    "multiscale.glow": Call(MULTISCALE, OF_SCALES),
    "multiscale.flow_plus_plus": Call(MULTISCALE | dict(components=2), OF_SCALES),
    "multiscale.convolutional_dequantizer": Call(
        dict(event_shape=(1, 2, 2), levels=4, width=2, blocks=1)
    ),
    "hierarchy.Level": Call(
        dict(prior=lambda: level().prior, posterior=lambda: level().posterior, path=lambda: level().path),
        {"posterior": PROGRAM, "path": MODULE},
    ),
    "DeepVAE": Call(
        dict(levels=lambda: list(deep_vae().levels_down), likelihood=lambda: deep_vae().likelihood,
             reader=lambda: deep_vae().reader),
        {"levels": [None, 3, [], [3]], "reader": MODULE},
    ),
    "hierarchy.vdvae": Call(
        dict(likelihood=lambda: deep_vae().likelihood, levels=(1,), latent_channels=1, blocks=1),
        {"levels": SHAPE, "latent_channels": COUNT},
    ),
    "dequantized.dequantizer": Call(dict(event_shape=2, levels=4, hidden=(4,))),
    "guides.FullRankNormal": Call(dict(event_shape=2, network=lambda: nn.Linear(2, 6)), {"network": MODULE[1:]}),
    "guides.LowRankNormal": Call(dict(event_shape=2, rank=1, network=lambda: nn.Linear(2, 6)), {"network": MODULE[1:]}),
    "guides.planar": Call(STACK | dict(given_shape=(2,))),
    "guides.sylvester": Call(STACK | dict(given_shape=(2,), reflections=1), {"reflections": COUNT[1:]}),
    "guides.TopDown": Call(
        dict(top=encoder, bottom=lambda: dgm.Normal(2, MLP((2,), 4, (4,), given_shape=(2,))), latent_name="z2"),
        {"latent_name": ["", 3, None]},
    ),
    "guides.PrecisionWeighted": Call(dict(encoder=encoder, generative=encoder)),
    "guides.SemiAmortized": Call(
        dict(encoder=encoder, prior=lambda: dgm.Normal(2), likelihood=encoder, gradient_steps=2, lr=0.1, num_samples=2)
    ),
    "guides.LinearGaussianPosterior": Call(
        dict(prior=lambda: dgm.Normal(2), likelihood=lambda: dgm.Normal(2, nn.Linear(2, 2), scale_type="shared"))
    ),
    "guides.EnumeratedPosterior": Call(dict(prior=lambda: dgm.Bernoulli(2), likelihood=encoder)),
    "guides.fit_guide": Call(
        dict(program=vae, x=X, make=lambda: dgm.guides.pyro.infer.autoguide.AutoNormal, gradient_steps=1, lr=0.1,
             num_samples=1, seed=0),
        {"make": [None, "x"]},
    ),
    # methods of programs
    "Program.sample": Call(dict(num_samples=2), of=vae),
    "Program.train": Call(dict(mode=True), {"mode": [None, 3, "x", X]}, of=vae),
    "Program.formula": Call(dict(given=None), {"given": [3, "x", X]}, of=vae),
    "formula": Call(dict(source=vae), {"source": [None, 3, "x"]}, free=("args", "kwargs")),
    "Program.encode": Call(dict(x=X, site="z", num_samples=2), {"site": ["no", 3]}, of=vae),
    "Program.decode": Call(dict(z=X, site="z"), {"site": ["no", 3]}, of=vae),
    "Program.log_prob": Call(dict(x=X), of=made),
    "AnyOrder.in_order": Call(
        dict(order=(1, 0)),
        {"order": ["x", None, 3, (0, 0)]},
        of=lambda: dgm.AnyOrder(dgm.Normal(2, networks.ObservedInput(2, nn.Linear(4, 4)))),
    ),
    "Program.log_weights": Call(dict(x=X, num_particles=2), of=vae),
    "Denoising.sample": Call(
        dict(num_samples=2, sampler="ddim", num_steps=2, spacing="uniform", guidance=0.0), of=diffusion
    ),
    "ContinuousDiffusion.ode_log_prob": Call(
        dict(x=X, tolerance=1e-1), {"probes": [0, 1.5, "x"]},
        of=lambda: dgm.ContinuousDiffusion(2, denoiser(), num_steps=3),
    ),
    "Flow.forward_map": Call(dict(z=X), of=lambda: dgm.flow.maf(2, layers=1)),
    "Flow.inverse_map": Call(dict(x=X), of=lambda: dgm.flow.maf(2, layers=1)),
    "Flow.log_abs_det_jacobian": Call(dict(z=X, x=X), of=lambda: dgm.flow.maf(2, layers=1)),
    "Flow.initialize": Call(dict(x=X), of=lambda: dgm.flow.maf(2, layers=1)),
    "Labeled.log_joint": Call(dict(x=X, num_particles=1), {"x": REALS[:4]}, of=labeled),
    "Labeled.class_probabilities": Call(dict(x=X, num_particles=1), of=labeled),
    "Labeled.classify": Call(dict(x=X, num_particles=1), of=labeled),
    "Labeled.sample": Call(dict(num_samples=2, given=Y[:2]), {"given": REALS[1:4]}, of=labeled),
    "Discriminative.class_probabilities": Call(dict(x=X), of=classifier),
    "Discriminative.classify": Call(dict(x=X), of=classifier),
    "Implicit.generate": Call(dict(z=X), {"z": REALS[:4]}, free=["given"], of=implicit),
    "ActNorm.initialize": Call(dict(x=X), of=lambda: networks.ActNorm(2)),
    # objectives
    "ELBO": Call(dict(num_samples=1, beta=1.0), {"beta": [-1.0, NAN, None, "x"]}),
    "IWAE": Call(dict(num_particles=2)),
    "RWS": Call(dict(num_particles=2, sleep=0.5)),
    "STL": Call(dict(num_samples=2)),
    "DReG": Call(dict(num_particles=2)),
    "Enumerate": Call(dict(max_outcomes=3)),
    "DenoisingLoss": Call(dict(weight=dgm.objectives.SimpleWeight), {"weight": ["x", 3]}),
    "objectives.MinSNRWeight": Call(dict(gamma=5.0)),
    "objectives.EDMWeight": Call(dict(sigma_data=0.5)),
    "EDMWeight.scaled_to": Call(dict(sigma_data=0.5), of=dgm.objectives.EDMWeight),
    "objectives.min_snr": Call(dict(gamma=5.0)),
    "objectives.edm": Call(dict(sigma_data=0.5)),
    "FreeBits": Call(dict(nats=1.0), free=["per_feature"]),
    "SemiSupervised": Call(dict(weight=1.0)),
    "WarmUp": Call(dict(fraction=0.5), {"fraction": PROBABILITY}),
    "Adversarial": Call(
        dict(game="gan", critic=lambda: nn.Linear(2, 1), r1=0.1, gradient_penalty=0.1, critic_steps=1, critic_lr=1.0),
        {"critic": MODULE[1:]},
    ),
    "KernelScore": Call(dict(kernel="energy", scales=(1.0,), num_samples=2), {"scales": [None, "x", 3, (), (0.0,)]}),
    "objectives.objective_named": Call(dict(text="iwae:5")),
    "objectives.beta": Call(dict(weight=1.0)),
    "objectives.annealed": Call(dict(fraction=0.5), {"fraction": PROBABILITY}),
    "objectives.rloo": Call(dict(num_samples=2)),
    "objectives.vimco": Call(dict(num_particles=2)),
    # running
    "build": Call(
        dict(model="vae", data=data, prior="flow", latent_size=2, hidden=(4,)),
        {"stages": COUNT, "attention": COUNT, "predictors": [1, "x"], "num_codes": COUNT, "grid": SHAPE,
         "decay": [0, 1, *NUMBER], "network": [3, "no"],
         "model": NAME, "data": [None, "x", X], "prior": [3, "no"], "encoder": [3, "no"], "likelihood": [3, "no"],
         "latent_size": [0, 1.5, "x"], "standardize": [1, None, "x"], "columns": ["x", 3],
         "max_parameters": [0, 1.5, "x"]},
    ),
    "compile": Call(dict(program=vae), free=["objective"]),
    "evaluate": Call(dict(program=vae, data=X, num_particles=2, num_samples=2, batch_size=2, seed=0, device="cpu")),
    "fit": Call(
        dict(program=lambda: dgm.Normal(2, learned=True), data=X, objective="elbo", epochs=1, batch_size=2, lr=0.1,
             weight_decay=0.0, lr_schedule="cosine", seed=0, device="cpu", validation=X, early_stopping=1, ema=0.5,
             compile=False, precision="float32"),
        {"lr_schedule": NAME, "validation": [1.5, "x", 3], "ema": [0, 1, "x"], "compile": ["x", 3, None],
         "augment": ["x", 3], "resume": [3], "trackers": [3, "x", [3]],
         "gradient_steps": [0, 1.5, "x"], "minutes": [0, -1.0, NAN, "x"], "accumulate": COUNT,
         "drop_last": [None, "x", 1],
         "clip_norm": [0, -1.0, NAN, "x"], "skip_norm": [0, -1.0, NAN, "x"],
         "validate_every": [0, 1.5, "x"], "checkpoint_minutes": POSITIVE, "optimizer": NAME,
         },
    ),
    "Training": Call(
        dict(program=lambda: dgm.Normal(2, learned=True), data=X, objective="elbo", validation=X),
        {"options": ["x", 3], "validation": ["x", 3, 0.5], "augment": ["x", 3], "optimizer": ["x", 3],
         "lr_schedule": ["x", 3]},
    ),
    "Training.advance": Call({}, free=["pause"], of=training),
    "Training.load_state_dict": Call(dict(state=lambda: training().state_dict()), {"state": THING}, of=training),
    "Adversarial.load_state_dict": Call(dict(state=lambda: game().state_dict()), {"state": THING}, of=game),
    "TrainingOptions": Call(
        dict(epochs=1, batch_size=2, lr=0.1, weight_decay=0.0, lr_schedule="cosine", seed=0, device="cpu",
             validation=0.5, early_stopping=1, ema=0.5, compile=False, precision="float32"),
        {"lr_schedule": [3, None], "validation": FRACTION, "ema": [0, 1, "x"], "compile": ["x", 3, None],
         "gradient_steps": [0, 1.5, "x"], "minutes": [0, -1.0, NAN, "x"],
         "accumulate": COUNT, "drop_last": [None, "x", 1], "clip_norm": [0, -1.0, NAN, "x"],
         "skip_norm": [0, -1.0, NAN, "x"],
         "validate_every": [0, 1.5, "x"], "checkpoint_minutes": POSITIVE, "optimizer": [3, None],
         "device": [3, None]},  # whether there is one is asked when it is used
    ),
    "Evidence.minus": Call(dict(other=evidence), {"other": THING}, of=evidence),
    "load": Call(dict(path=stored, device="cpu"), {"path": FOLDER}),
    "save": Call(dict(program=vae, path=stored), {"path": FOLDER}, free=["extra"]),
    "checkpoint.read_extra": Call(dict(path=stored), {"path": FOLDER}),
    # infer
    "infer.ais": Call(
        dict(program=vae, x=X, num_chains=2, num_temperatures=2, num_leapfrog=1, initial="prior",
             temperature_schedule="sigmoid", target_acceptance=0.65, seed=0),
        {"temperature_schedule": NAME, "transition": ["x", 3]},
    ),
    "infer.bidirectional": Call(
        dict(program=vae, num_data=2, num_chains=2, num_temperatures=2, num_leapfrog=1, initial="prior",
             temperature_schedule="sigmoid", target_acceptance=0.65, seed=0),
        {"temperature_schedule": NAME, "transition": ["x", 3]},
    ),
    "infer.check": Call(
        dict(program=vae, data=X, num_samples=20, num_posterior_samples=3, bins=2, gradient_steps=1, seed=0),
        {"method": ["meanfield", 3], "jobs": [2, *COUNT]},
    ),
    "infer.gaps": Call(
        dict(program=vae, x=X, num_particles=2, num_temperatures=2, num_chains=2, gradient_steps=1, num_samples=2,
             seed=0),
        {"num_temperatures": [-1, 1.5, None, "x"], "log_evidence": REALS[1:]},
    ),
    "infer.predictive_check": Call(
        dict(posterior=coin_posterior, samples="prior", num_samples=2, seed=0),
        {"posterior": THING, "samples": ["x", 3]},
    ),
    "Draws.to_arviz": Call(dict(num_prior=2, seed=0), {"num_prior": COUNT}, of=coin_draws),
    "Loo.minus": Call(dict(other=lambda: dgm.infer.Loo(X[:, 0], X[:, 1], 1.0)), {"other": THING},
                      of=lambda: dgm.infer.Loo(X[:, 0], X[:, 1], 1.0)),
    "PredictiveCheck.statistics": Call(dict(site="y"), {"site": NAME}, of=coin_predictions),
    "PredictiveCheck.p_values": Call(dict(site="y"), {"site": NAME}, of=coin_predictions),
    "infer.hide": Call(dict(region="random:0.5", event_shape=(2,), seed=0)),
    "infer.impute": Call(
        dict(program=made, x=X, mask=X > 0, num_samples=2, num_particles=2, num_temperatures=2, num_leapfrog=1, seed=0),
        {"mask": [None, "x", 3, torch.zeros(3)]},
    ),
    "infer.nuts": Call(
        dict(program=vae, x=X, num_samples=2, warmup=2, num_chains=1, max_tree_depth=1, target_acceptance=0.8, seed=0),
        free=["observed", "compile"],
    ),
    "infer.sbc": Call(
        dict(program=vae, num_samples=20, num_posterior_samples=3, bins=2, gradient_steps=1, seed=0),
        {"method": ["meanfield", 3], "jobs": [2, *COUNT]},
    ),
    "infer.smc": Call(
        dict(program=vae, x=X, num_particles=2, threshold=0.5, num_temperatures=2, num_leapfrog=1, initial="prior",
             seed=0),
        free=["observed"],
    ),
    "infer.psis": Call(
        dict(program=vae, x=X, num_particles=25, seed=0), {"num_particles": [24, *COUNT]}, free=["guide"]
    ),
    "infer.smooth": Call(dict(log_weights=torch.randn(30)), {"log_weights": [None, "x", 3]}),
    "infer.compare": Call(
        dict(model=coin_posterior, guides=["meanfield"], reference=None, gradient_steps=1, num_particles=2, lr=0.1,
             restarts=1, num_samples=100, num_temperatures=0, num_data=0, jobs=1, seed=0),
        {"guides": [None, "x", 3, []], "reference": ["x", 3], "num_temperatures": [-1, 1.5, None, "x"],
         "num_data": [-1, 1.5, None, "x"],
         "num_samples": [99, *COUNT], "model": [3, "x", (1, 2)], "objective": [3]},
        free=["args"],
    ),
    "infer.train_guide": Call(
        dict(posterior=coin_posterior, guide=lambda: dgm.guides.auto(coin, "meanfield"), gradient_steps=1,
             num_particles=2, lr=0.1, restarts=1, jobs=1, seed=0),
        {"posterior": THING, "guide": THING, "objective": [3]},
    ),
    "Posterior": Call(
        dict(model=lambda: coin), {"model": [None, *THING[1:], dgm.Normal(2)]}, free=["args", "kwargs"]
    ),
    "Posterior.initial": Call(dict(num_samples=2, radius=1.0, seed=0), of=coin_posterior, kinds={"radius": POSITIVE}),
    "Posterior.require_proper": Call(dict(what="it is not drawn"), free=["what"], of=coin_posterior),
    "Posterior.prior": Call(dict(num_samples=2, seed=0), of=coin_posterior),
    "Posterior.simulated": Call(dict(seed=0), of=coin_posterior),
    "Posterior.compiled": Call(dict(batch_size=2), of=coin_posterior, free=["fuse"]),
    **{
        f"Posterior.{name}": Call(dict(u=torch.zeros(2, 1)), {"u": [None, "x", 3, torch.zeros(2, 3)]},
                                  free=["deterministic", "seed"], of=coin_posterior)
        for name in ("log_joint", "log_prior", "log_likelihood", "densities", "log_abs_det_jacobian", "constrain",
                     "by_latent", "predict", "pointwise")
    },
    "Posterior.unconstrain": Call(
        dict(values={"p": torch.rand(3)}), {"values": [{}, 3, "x", None]}, of=coin_posterior
    ),
    "guides.auto": Call(
        dict(model=lambda: coin, q="fullrank"),
        {"model": THING, "q": [3, "x", None, dgm.VAE], "structure": ["x", 3], "covariates": [3, "x", {"a": X}]},
    ),
    "guides.MixtureOfVectors": Call(dict(event_shape=2, components=2)),
    "plots.marginals": Call(dict(found=lambda: coin_table(), most=2), {"found": THING}),
    "plots.pairs": Call(dict(found=lambda: coin_table(), guide="meanfield", most=1, num_points=3), {"found": THING}),
    "plots.chains": Call(dict(found=coin_chains, most=1), {"found": THING}),
    "plots.predictions": Call(
        dict(found=coin_predictions, bins=3), {"found": THING}
    ),
    "plots.coverage": Call(dict(found=lambda: report().calibration, most=1), {"found": THING}),
    "plots.k_hats": Call(dict(found=lambda: coin_table()), {"found": THING}),
    "infer.propagate": Call(
        dict(stepper=lambda: dgm.infer.Times(diffusion(), X, torch.ones(4, 2).bool()), num_particles=2, num_data=4,
             threshold=0.5),
        free=["stepper"],
    ),
    "infer.units": Call(dict(program=vae, data=X, num_samples=2, seed=0)),
    "Calibration.shares": Call(dict(site="z"), {"site": NAME}, of=lambda: report().calibration),
    "Calibration.symmetry_p_values": Call(dict(site="z"), {"site": NAME}, of=lambda: report().calibration),
    "Calibration.coverage": Call(dict(site="z", level=0.5), {"site": NAME, "level": [0.0, 1.5, "x"]},
                                 of=lambda: report().calibration),
    "Calibration.histogram": Call(dict(site="z"), {"site": NAME}, of=lambda: report().calibration),
    "Calibration.p_values": Call(dict(site="z"), {"site": NAME}, of=lambda: report().calibration),
    "Gaps.worst": Call(dict(num_data=2), of=lambda: gaps(vae(), X)),
    "infer.HMC": Call(dict(num_leapfrog=1)),
    # data
    "Data": Call(
        dict(x=X, y=Y, num_classes=2, levels=None, given=X, mask=X > 0),
        {
            "levels": LEVELS[:2],
            "y": LABELS[1:],
            "name": [],
            "mask": [[True], X, X[:, :1] > 0],
            "kinds": [3, {"a": ("real",)}],
            **{key: ["ab", ["a", "b"], ("a", "b", "c"), (1, 2)] for key in ("columns", "given_columns", "classes")},
        },
    ),
    "Data.split": Call(dict(fraction=0.5, seed=0), of=data),
    "Data.keep_labels": Call(dict(num_labels=2, seed=0), of=data),
    "Data.to": Call(dict(device="cpu"), of=data),
    "StoredData.split": Call(dict(fraction=0.5, seed=0), of=large),
    "StoredData.to": Call(dict(device="cpu"), of=large),
    "data.open": Call(
        dict(source=frame(), label="b", given=None, columns=None, levels=None, classes=("4", "5")),
        {
            "source": [3, "", {}, np.zeros((0, 2)), np.array(["a"])],
            "label": ["z"],
            "given": ["z", "b"],
            "columns": [["z"], [], ["a", "a"]],
            "levels": [1, 2.0],
            "size": [3, (2, 2)],
            "gray": [True],
            "crop": [3, 0],
            "kinds": ["x", 3, {"z": "real"}, {"a": "no"}, {"a": ("bounded", 0)}],
            "classes": [("c",)],
            "name": [],
            "in_memory": [False, "yes"],
            "num_workers": [-1, 1.5],
        },
    ),
    "data.load": Call(dict(name="moons", split="train", num_data=4, seed=0)),
    # anomaly
    "anomaly.log_p": Call(dict(program=vae, x=X, num_particles=1, batch_size=2, seed=0)),
    "anomaly.NegativeLogLikelihood": Call(dict(program=vae, num_particles=1)),
    "anomaly.Typicality": Call(dict(nll=vae, reference=X)),
    "anomaly.Ratio": Call(dict(nll=vae, background=vae)),
    "anomaly.Complexity": Call(dict(nll=lambda: dgm.Bernoulli((1, 4, 4)), compressor="png")),
    "anomaly.WAIC": Call(dict(ensemble=lambda: [vae(), vae()]), {"ensemble": [None, "x", 3, [3, 4]]}),
    "anomaly.PosteriorKL": Call(dict(program=vae, num_samples=2, seed=0)),
    "anomaly.code_bits": Call(dict(x=IMAGES.byte(), compressor="png")),
    "anomaly.Detector": Call(dict(score=vae), {"score": PROGRAM[:3]}),
    "anomaly.separation": Call(dict(normal=X[:, 0], anomalous=X[:, 1])),
    "anomaly.detect": Call(
        dict(program=vae, x=X, normal=X, scores=("kl",), background=vae, ensemble=lambda: [vae()],
             false_alarm_rate=0.5, num_particles=1, seed=0),
        {"scores": [None, 3, ("no",)], "ensemble": [[3], ["x"]], "background": PROGRAM[1:]},
    ),
    "Detector.calibrate": Call(dict(reference=X, false_alarm_rate=0.5), of=lambda: dgm.anomaly.Detector(made())),
    "Detector.flag": Call(dict(x=X), of=lambda: dgm.anomaly.Detector(made()).calibrate(X, 0.5)),
    "Detector.p_values": Call(dict(x=X), of=lambda: dgm.anomaly.Detector(made()).calibrate(X, 0.5)),
    # corruptions
    "corruptions.shuffle_pixels": Call(dict(x=IMAGES, seed=0), {"x": REALS[:4]}),
    "corruptions.add_noise": Call(dict(x=IMAGES, scale=1.0, levels=4, seed=0)),
    "corruptions.mutate": Call(dict(x=IMAGES, rate=0.5, levels=4), {"x": REALS[:4]}),
    "corruptions.shift": Call(dict(x=IMAGES, down=1, right=1), {"down": [4, 1.5, "x"], "right": [4, 1.5, "x"]}),
    "corruptions.rotate": Call(dict(x=IMAGES, degrees=90.0, levels=4)),
    "corruptions.blur": Call(dict(x=IMAGES, sigma=1.0, levels=4)),
    "corruptions.log_class_probabilities": Call(
        dict(classifier=classifier, x=X, num_particles=1), {"classifier": PROGRAM[:3]}
    ),
    "corruptions.fgsm": Call(
        dict(classifier=classifier, x=X, y=Y, epsilon=0.1, num_particles=1), {"classifier": PROGRAM[:3]}
    ),
    "corruptions.pgd": Call(
        dict(classifier=classifier, x=X, y=Y, epsilon=0.1, gradient_steps=1, step_size=0.1, num_particles=1, seed=0),
        {"classifier": PROGRAM[:3]},
    ),
    # classification
    "classification.accuracy": Call(dict(probabilities=PROBABILITIES, y=Y), {"probabilities": REALS}),
    "classification.nll": Call(dict(probabilities=PROBABILITIES, y=Y), {"probabilities": REALS}),
    "classification.reliability": Call(dict(probabilities=PROBABILITIES, y=Y, bins=2), {"probabilities": REALS}),
    "classification.risk_coverage": Call(
        dict(correct=Y > 0, uncertainty=X[:, 0]), {"correct": REALS[:4], "uncertainty": REALS}
    ),
    "classification.answer": Call(
        dict(program=labeled, x=X, reference=X, false_alarm_rate=0.5, num_particles=1, seed=0)
    ),
    "classification.Bayesian": Call(
        dict(network=lambda: nn.Linear(2, 2), data=data, guide="normal", scale=1.0), {"data": [None, "x", X]}
    ),
    "Bayesian.fit": Call(dict(epochs=1, batch_size=2, lr=0.1, seed=0), of=bayesian),
    "Bayesian.draws": Call(dict(x=X, num_samples=2, seed=0), of=trained_bayesian),
    "Bayesian.log_class_probabilities": Call(dict(x=X, num_samples=2, seed=0), of=trained_bayesian),
    "Bayesian.class_probabilities": Call(dict(x=X, num_samples=2, seed=0), of=trained_bayesian),
    "Bayesian.mutual_information": Call(dict(x=X, num_samples=2, seed=0), of=trained_bayesian),
    "RiskCoverage.accuracy_at": Call(
        dict(coverage=0.5), of=lambda: dgm.classification.risk_coverage(Y > 0, X[:, 0])
    ),
    # representations
    "representations.codes": Call(dict(program=vae)),
    "representations.encode": Call(
        dict(program=vae, x=X, site="z", draw=True, num_samples=2, batch_size=2, seed=0), {"site": ["no", 3]}
    ),
    "representations.decode": Call(
        dict(program=vae, z=X, site="z", batch_size=2, seed=0), {"site": ["no", 3]}
    ),
    "representations.line": Call(dict(a=X, b=X + 1, num_points=3)),
    "representations.arc": Call(dict(a=X, b=X + 1, num_points=3)),
    "representations.interpolate": Call(dict(program=vae, a=X, b=X + 1, num_points=3, curve="spherical")),
    "representations.traverse": Call(
        dict(program=vae, z=X[:1], values=(0.0, 1.0), indices=[0], site="z"),
        {"values": [None, "x", 3, [NAN]], "indices": ["x", 3, [7], [0.5]], "site": ["no", 3]},
    ),
    "representations.grid": Call(dict(program=vae, num_points=2, reach=1.0)),
    "representations.is_discrete": Call(dict(program=vae, site="z"), {"site": ["no", 3]}),
    "representations.probe": Call(CODES),
    "representations.knn": Call(CODES | dict(neighbors=1)),
    "representations.cluster": Call(dict(z=X, num_clusters=2, seed=0)),
    "representations.agreement": Call(dict(clusters=Y, y=Y)),
    "representations.represent": Call(
        dict(program=vae, data=X, site="z", seed=0), {"site": ["no", 3], "train": ["x", 3, X]}
    ),
    "representations.assess": Call(CODES | dict(neighbors=1, seed=0)),
    # samplers
    "samplers.DDIM": Call(dict(eta=0.5)),
    "samplers.sampler_named": Call(dict(sampler="ddim")),
    "samplers.spacing_named": Call(dict(spacing="uniform")),
    # adversarial and implicit
    "adversarial.critic_for": Call(dict(program=implicit, hidden=(4,))),
    "adversarial.gan": Call(dict(r1=0.1)),
    "adversarial.wgan_gp": Call(dict(gradient_penalty=0.1)),
    "adversarial.f_gan": Call(dict(divergence="js")),
    "adversarial.mmd": Call(dict(scale=1.0)),
    "adversarial.squared_distance": Call(dict(x=X, y=X + 1), {"y": REALS, "score": ["x", 3]}),
    "adversarial.divergence_bound": Call(dict(divergence="js", of_p=X, of_q=X), free=["of_p", "of_q"]),
    "adversarial.density_ratio": Call(
        dict(p=X, q=X, critic=lambda: nn.Linear(2, 1), divergence="js", gradient_steps=1, batch_size=2, lr=0.1, seed=0),
        {"critic": MODULE[1:]},
    ),
    "DensityRatio.kl": Call(dict(p=X), of=density_ratio),
    "DensityRatio.bound": Call(dict(p=X, q=X, divergence="js"), of=density_ratio),
    "implicit.Around": Call(dict(generator=lambda: nn.Linear(2, 2), event_shape=2, scale=0.1)),
    "implicit.noisy": Call(dict(program=implicit, scale=0.1)),
    "implicit.parzen": Call(dict(samples=X, x=X, scale=0.1)),
    "quality.sample_quality": Call(
        dict(real=X, samples=X, extractor=None, neighbors=1, num_blocks=2, batch_size=2),
        {"extractor": ["x", 3], "num_blocks": [0, 1, 1.5, "x"]},
    ),
    "quality.program_quality": Call(
        dict(program=lambda: dgm.Normal(2), real=X.repeat(20, 1), extractor=None, num_samples=20, seed=0, neighbors=1),
        {"extractor": ["x", 3], "real": [None, "x", 3]},
        free=["given"],
    ),
    "quality.frechet_distance": Call(dict(real=X, samples=X)),
    "quality.kernel_distance": Call(dict(real=X, samples=X)),
    "quality.hidden_features": Call(dict(network=lambda: nn.Linear(2, 2)), {"network": [None, "x", 3]}),
    "implicit.mode_coverage": Call(dict(x=X, centers=X, scale=0.1)),
    # networks
    "networks.MLP": Call(
        dict(in_shape=(2,), out_features=2, hidden=(4,), activation="silu", dropout=0.1), {"hidden": SHAPE[1:]}
    ),
    "networks.ColumnReader": Call(
        dict(categories=[None, 3], logarithms=[0], shift=[0.0, 0.0], scale=[1.0, 1.0]),
        {"categories": [None, 3, "x", [1], [1.5]], "logarithms": [None, 3, "x", [2]], "network": ["x", 3],
         "shift": [[1.0] * 3, "x", [NAN, 0.0]], "scale": [[1.0] * 3, "x", [0.0, 1.0]]},
    ),
    "networks.ColumnMADE": Call(
        dict(reader=lambda: networks.ColumnReader([None, 3]), num_parameters=2, hidden=(4,)),
        {"reader": [None, "x", 3, nn.Linear(2, 2)]},
    ),
    "networks.MADE": Call(
        dict(in_shape=(2,), num_parameters=2, hidden=(4,), order=(0, 1), dropout=0.1, activation="silu"),
        {"order": ["x", None, 3, (0, 0)]},
    ),
    "networks.CausalTransformer": Call(
        dict(in_shape=(2,), num_parameters=2, width=4, layers=1, heads=2, order=(0, 1), dropout=0.1),
        {"order": ["x", None, 3, (0, 0)]},
    ),
    "networks.PixelCNN": Call(
        dict(in_shape=(1, 4, 4), num_parameters=1, width=4, layers=2, kernel_size=3, stages=2, attention=1, heads=2,
             dropout=0.1),
        {"kernel_size": [2, 1.5, "x", None], "stages": COUNT, "attention": [-1, 2, 1.5, "x", None]},
    ),
    "networks.ConvEncoder": Call(
        dict(in_shape=(1, 4, 4), out_features=2, channels=(4,), blocks=1, width=4, dropout=0.1)
    ),
    "networks.ConvDecoder": Call(
        dict(in_shape=(2,), out_shape=(1, 4, 4), num_parameters=1, channels=(4,), blocks=1, dropout=0.1)
    ),
    "networks.Codebook": Call(
        dict(num_codes=3, num_features=2, decay=0.9, dead_below=0.1),
        {"num_codes": COUNT, "decay": [0, 1, *NUMBER], "dead_below": [1, *PROBABILITY]},
    ),
    "Codebook.nearest": Call(dict(h=X), {"h": [None, "x", 3, torch.ones(2, 3)]}, of=lambda: networks.Codebook(3, 2)),
    "Codebook.distances": Call(dict(h=X), {"h": [None, "x", 3, torch.ones(2, 3)]}, of=lambda: networks.Codebook(3, 2)),
    "networks.ConvNet": Call(
        dict(in_shape=(1, 4, 4), out_shape=(1, 2, 2), num_parameters=2, width=2, blocks=1, levels=2, dropout=0.1),
        {"num_parameters": [0, 1.5, "x"], "levels": LEVELS[:2], "num_classes": [0, 1.5]},
    ),
    "networks.BottomUp": Call(
        dict(in_shape=(1, 4, 4), out_shapes=[(2, 2, 2)], blocks=1, levels=2, dropout=0.1),
        {"out_shapes": [None, "x", 3, [(2, 2)]], "levels": LEVELS[:2]},
    ),
    "networks.TopDownStep": Call(
        dict(in_shape=(2, 1, 1), given_shape=(1, 1, 1), out_shape=(2, 2, 2), blocks=1, dropout=0.1)
    ),
    "networks.DenoisingMLP": Call(
        dict(event_shape=(2,), hidden=(4,), num_parameters=1, activation="silu", max_frequency=30.0)
    ),
    "networks.DenoisingUNet": Call(
        dict(event_shape=(1, 4, 4), channels=(8,), num_parameters=1, dropout=0.1, max_frequency=30.0,
             heads=2, fourier=(7, 8), patch_size=2),
        {"heads": COUNT[1:], "fourier": [None, 3, "x", (0.5,)], "patch_size": COUNT},
    ),
    "networks.DenoisingTransformer": Call(
        dict(event_shape=(1, 4, 4), patch_size=2, width=8, layers=1, heads=2, num_parameters=1, dropout=0.1,
             max_frequency=30.0),
        {"patch_size": COUNT},
    ),
    "networks.ObservedInput": Call(
        dict(in_shape=2, network=lambda: nn.Linear(4, 2), levels=3, reader=None), {"reader": MODULE[1:]}
    ),
    "networks.EmbeddedGiven": Call(
        dict(network=lambda: networks.PixelCNN((1, 4, 4), 1, width=4, layers=1, given_shape=(2, 4, 4)),
             embedding=lambda: networks.ConvDecoder((3,), (2, 4, 4), channels=(4,))),
        {"network": MODULE, "embedding": MODULE},
    ),
    "networks.InputEmbedding": Call(dict(shape=(2,), num_classes=None, out_features=2), {"shape": SHAPE}),
    "networks.Affine": Call(dict(bound=5.0)),
    "networks.Contraction": Call(dict(radius=4.0, largest_shift=2.5, bound=1.5)),
    "networks.RationalQuadraticSpline": Call(dict(bins=4, low=-1.0, high=1.0, tails="identity")),
    "networks.ActNorm": Call(dict(num_features=2)),
    "networks.LULinear": Call(dict(num_features=2)),
    "networks.Planar": Call(dict(num_features=2)),
    "networks.Sylvester": Call(dict(num_features=2, reflections=1), {"reflections": COUNT[1:]}),
    "networks.Permutation": Call(dict(order=(1, 0)), {"order": ["x", None, 3, (0, 0), (0.0, 1.0)]}),
    "networks.Inverse": Call(dict(bijection=lambda: networks.LULinear(2))),
    "networks.Squeeze": Call(dict(in_shape=(1, 2, 2))),
    "networks.PerPixel": Call(dict(in_shape=(2, 1, 1), bijection=lambda: networks.LULinear(2))),
    "networks.Partial": Call(dict(num_features=3, bijection=lambda: networks.LULinear(2))),
    "networks.LogisticMixture": Call(dict(components=2, bound=5.0)),
    "networks.Elementwise": Call(
        dict(num_features=2, univariate=Affine, network=lambda: MLP((2,), 4)), {"network": MODULE[1:]}
    ),
    "networks.Coupling": Call(
        dict(passes=(True, False), univariate=Affine, network=lambda: nn.Linear(1, 2)),
        {"passes": [None, "x", 3, (1, 0), (True, True)]},
    ),
    "networks.MaskedAutoregressive": Call(dict(univariate=Affine, network=lambda: MADE(2, 2, (4,)))),
    # plots
    "plots.images": Call(dict(x=IMAGES, levels=4, num_columns=2), {"covered": ["x", 3]}),
    "plots.plane": Call(dict(samples=X, resolution=4), {"log_density": ["x", 3], "limits": ["x", 3, (1.0, 0.0)]}),
    "plots.table_of_features": Call(dict(x=X)),
    "plots.by_column": Call(dict(x=X, columns=["a", "b"], words=None, marked=None, most=2),
                            {"columns": [3, None, ["a"], "ab"], "words": THING[1:], "marked": [3, "x"]}),
    "plots.samples": Call(dict(x=X), {"columns": [3, ["a"], "ab"], "words": THING[1:]}),
    "plots.imputations": Call(
        dict(x=IMAGES, mask=IMAGES > 0, samples=IMAGES.unsqueeze(0), levels=4, most=2),
        {"mask": ["x", 3], "samples": REALS[:4], "columns": [3, ["a"], "ab"], "words": THING[1:]},
    ),
    "plots.learning_curves": Call(dict(history=history), {"history": THING}),
    "plots.bits_per_dim": Call(
        dict(evidences=lambda: {"a": dgm.evaluate(made(), X)}, reference=1.0), {"evidences": THING, "reference": NUMBER}
    ),
    "plots.aurocs": Call(dict(values={"a": {"b": 0.5}}), {"values": THING}),
    "plots.score_histograms": Call(dict(scores={"a": X[:, 0]}, bins=3), {"scores": THING}),
    "plots.curves": Call(dict(x=[0, 1], panels={"a": {"b": [0, 1]}}, xlabel="x"), {"x": [None, 3], "panels": THING}),
    "plots.reliability": Call(dict(probabilities={"a": PROBABILITIES}, y=Y, bins=3), {"probabilities": THING}),
    "plots.answers": Call(
        dict(x=IMAGES, probabilities=PROBABILITIES, rejected=Y > 0, num_columns=2),
        {"probabilities": REALS[:4], "rejected": REALS[:4]},
    ),
    "plots.heat_map": Call(dict(panels={"a": {("b", "c"): (1.0, 0.1)}}), {"panels": THING}),
    "plots.gaps": Call(dict(found=lambda: {"a": gaps(vae(), X)}), {"found": THING}),
    "plots.worst_explained": Call(dict(found=lambda: gaps(image_vae(), IMAGES.float()), num_data=2), {"found": THING}),
    "plots.calibration": Call(dict(found=report, most=2), {"found": THING}),
    "plots.representation": Call(
        dict(found=lambda: dgm.representations.represent(vae(), X), program=vae, x=X, curve="linear"), {"found": THING}
    ),
    "plots.latent_map": Call(dict(z=X, y=Y), {"y": LABELS[1:3]}),
    # runs and sweeps
    "runs.read": Call(dict(folder=run, device="cpu")),
    "runs.inputs": Call(dict(data="moons", program=vae), {"data": NAME}, free=("reading",)),
    "runs.train": Call(
        dict(folder=fresh, model="pixels", data="moons", swaps={}, options=dgm.TrainingOptions(epochs=1),
             num_data=8, objective="elbo", progress=False),
        {"model": NAME, "data": NAME, "swaps": [3, "x"], "options": ["x", 3], "num_labels": [0, "x"],
         "mutate": [1.5, "x"], "trackers": [3, "x", [3]], "resume": [], "reading": [{"label": "a"}]},
    ),
    "hub.push": Call(
        dict(folder=run, repo="alice/pixels", num_particles=1, api=lambda: Hub()),
        {"repo": [None, 3]}, free=("api", "data_dir", "private"),
    ),
    "hub.pull": Call(
        dict(repo="alice/pixels", out=fresh, api=lambda: Hub()), {"repo": [None, 3]}, free=("api", "revision"),
    ),
    "runs.resume": Call(dict(folder=run), {"trackers": [], "device": []}),
    "sweep.compare": Call(
        dict(folders=lambda: [run(), run()], split="test", num_particles=1, device="cpu", seed=0),
        {"folders": [None, 3, [3, 4]], "data": ["x"]},
    ),
    "sweep.sweep": Call(
        dict(out=fresh, options=fast, prior=("normal",), objective=("elbo",), seeds=1, jobs=1, progress=False),
        {"options": ["x", 3], "prior": [3, ("no",)], "encoder": [3, ("no",)], "likelihood": [3, ("no",)],
         "objective": [3, ("no",)], "vary": [3, {"speed": [1]}, {"lr": 3}]},
    ),
}  # fmt: skip


EXCLUDED = {
    "base classes and protocols, to be subclassed": [
        "Program", "Conditional", "IndependentConditional", "data.Batches", "infer.Stepper",
        "networks.Bijection", "networks.Univariate", "objectives.HasFormula", "objectives.Objective",
        "objectives.VariationalBound", "priors.MixtureOfParts", "samplers.Sampler",
    ],
    "errors": ["CheckpointError", "CompilationError", "IntractableError", "NonFiniteLossError"],
    "results, which the package makes": [
        "Diagnosis", "Evidence", "Finding", "History", "adversarial.DensityRatio", "anomaly.Alarm", "anomaly.Anomalies",
        "anomaly.Separation", "classification.Answers", "data.StoredData", "quality.SampleQuality",
        "classification.Reliability", "classification.RiskCoverage", "guides.Fitted", "infer.Annealed",
        "infer.Calibration", "infer.Chains", "infer.Checks", "infer.Gaps", "infer.GuideComparison",
        "infer.GuideGaps", "infer.GuideRow", "infer.Draws", "infer.Loo", "infer.PredictiveCheck",
        "infer.Population", "infer.Sandwich",
        "infer.Units", "infer.Weighted",
        "objectives.Bound", "plots.Theme", "representations.Agreement",
        "representations.Quality",
        "representations.Representation", "runs.Record",
        "samplers.Time", "sweep.Cell", "sweep.Comparison", "sweep.Options", "sweep.Row", "sweep.Sweep",
    ],
    "no arguments": [
        "objectives.SimpleWeight", "objectives.simple",
        "adversarial.energy", "networks.NormalCDF", "networks.Sigmoid", "plots.photographs",
        "samplers.Ancestral", "samplers.DPMSolver",
        "samplers.Heun",
    ],
    "reports what is wrong with its arguments instead": ["doctor"],
    "a decorator": ["register"],
    "a context manager, which checks when it is entered": ["plots.theme"],
    "distributions and steps within programs, called under Pyro's handlers or compiled": [
        "dequantized.Floor", "guides.Finite", "infer.Features", "infer.Tempered",
        "infer.Times", "adversarial.draw", "adversarial.slopes",
        "objectives.elbo", "objectives.elbo_of_traces", "objectives.exact", "samplers.karras", "samplers.quadratic",
        "samplers.run_sampler", "samplers.uniform",
    ],
    "helpers of other modules": [
        "checkpoint.load_with_extra", "plots.write_picture",
        "classification.beliefs", "classification.share",
        "anomaly.auroc", "representations.latents", "runs.points", "runs.write_alike",
        "plots.is_picture", "runs.write", "runs.write_array",
    ],
}  # fmt: skip


def found(name):
    """The callable of that name, and the parameters that it takes."""
    call = CALLS[name]
    if call.of is not None:
        owner, method = name.split(".")
        return lambda **arguments: getattr(call.of(), method)(**arguments), method_of(owner, method)
    function = dgm
    for part in name.split("."):
        function = getattr(function, part, None) or module_named(part)
    return function, function


def module_named(name):
    """A module by the last part of its name."""
    rooms = ("", "families.", "training.", "uses.", "experiments.")
    path = next(f"dgm_pyro.{room}{name}" for room in rooms if importlib.util.find_spec(f"dgm_pyro.{room}{name}"))
    return importlib.import_module(path)


def method_of(owner, method):
    return getattr(next(kind for kind in PUBLIC_CLASSES if kind.__name__ == owner), method)


# What the message of an argument may call it instead.
CALLED = {
    "data": "x",
    "x": "data",
    "reference": "x",
    "normal": "x",
    "name": "model|data set",
    "text": "objective",
    "source": "data set",
}


def made_of(value):
    """A fresh value: parts of a program are made anew for each call."""
    return value() if isinstance(value, types.FunctionType) or value is Affine else value


def arguments_of(call):
    return {name: made_of(value) for name, value in call.arguments.items()}


def bad_values(name, parameter, call):
    """Bad values for the kind of the argument, without the None that its annotation or default allows."""
    if parameter.name in call.free:
        return []
    values = call.kinds.get(parameter.name, KINDS.get(parameter.name, []))
    optional = parameter.default is None or "None" in str(parameter.annotation)
    return [value for value in values if value is not None or not optional]


def complaint(name, argument, value, again=False):
    """What is wrong with the error that the bad value ends in; None if nothing is."""
    call, (function, _) = CALLS[name], found(name)
    arguments = {**arguments_of(call), argument: value}
    start = time.process_time()
    try:
        function(**arguments)
    except (ValueError, TypeError) as error:
        file = traceback.extract_tb(error.__traceback__)[-1].filename
        if not file.startswith(ROOT):
            return f"raised in {file}: {type(error).__name__}: {error}"
        if not re.search(rf"\b({argument}|{CALLED.get(argument, argument)})\b", str(error)):
            return f"not named: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    else:
        return "accepted"
    if time.process_time() - start < 1:
        return None
    # The first call of a process may import what the function needs.
    return "took a second" if again else complaint(name, argument, value, again=True)


@pytest.mark.parametrize("name", CALLS)
def test_the_call_works(name):
    found(name)[0](**arguments_of(CALLS[name]))


@pytest.mark.parametrize("name", CALLS)
def test_each_bad_argument_is_named(name):
    call, parameters = CALLS[name], inspect.signature(found(name)[1]).parameters.values()
    wrong = [
        f"{parameter.name}={value!r}: {told}"
        for parameter in parameters
        for value in bad_values(name, parameter, call)
        if (told := complaint(name, parameter.name, value))
    ]
    assert not wrong, "\n".join(wrong)


# Arguments without a bad value here: texts; what is only asked whether it is true; options that go on to a function of
# the table; and shapes and mappings that are checked where they are used.
ANYTHING = {
    *("title", "xlabel", "reference_label", "row_labels", "column_labels", "percent", "progress", "force", "draw"),
    *("learned", "unit_cube", "labeled", "leave_one_out", "analytic_kl", "residual", "ode", "lowest_is_best"),
    *("learned_ends", "per_feature", "given_shape", "observed", "options", "swaps", "self", "importance"),
}


# Methods that make up a program or one of its parts: they state, score or map what the functions above have checked,
# under Pyro's handlers or compiled.
WITHIN = {
    *("joint", "posterior", "latents", "arguments", "exact_log_prob", "check", "check_given", "check_draws", "forward"),
    *("code_named", "check_code", "completions", "filled", "feature_sites", "Standardized.ode_log_prob"),
    *("shuffled", "taken", "alike"),  # of data, called by trainings and evaluations
    *("Standardized.formula", "Standardized.sample"),
    *("standard", "standard_given", "in_units", "log_volume", "of_feature", "of_features", "follow"),
    *(
        "inverse",
        "cache",
        "tokens",
        "embed",
        "univariate",
        "adjusted",
        "distribution",
        "raw_parameters",
        "raw_at",
        "at",
    ),
    *(
        "blank",
        "chain",
        "place",
        "clean",
        "clock",
        "denoise",
        "denoised_variance",
        "noise_at",
        "preconditioning",
        "noised",
        "posterior_variance",
    ),
    *(
        "measure_given",
        "support_given",
        "prior_kl",
        "reverse",
        "run_chain",
        "step_back",
        "times",
        "zeros",
        "likelihood",
        "log_density",
        "spread",
    ),
    *(
        "critic_loss",
        "distance",
        "prepare",
        "update",
        "similarity",
        "to_the_others",
        "mean_of_pairs",
        "enumerated",
    ),
    *("onward", "Bijection.initialize", "PerPixel.initialize", "Partial.initialize"),
    *("start", "step", "finish", "tune", "expand", "replaced", "Record.points"),
    *(f"{kind.__name__}.bound" for kind in (VariationalBound, *VariationalBound.__subclasses__())),
    *("SemiAmortized.bound", "Finite.log_prob", "Floor.log_prob", "Finite.sample", "Floor.sample"),
    *("Implicit.log_prob", "Implicit.log_weights", "Quality.stderr", "Row.over_seeds"),
}


def test_every_public_method_is_in_the_table_or_within_a_program():
    methods = {
        f"{kind.__name__}.{name}"
        for kind in PUBLIC_CLASSES
        for name, value in vars(kind).items()
        if not name.startswith("_") and isinstance(value, types.FunctionType)
        if len(inspect.signature(value).parameters) > 1
    }
    assert {name for name in methods - WITHIN if name.split(".")[1] not in WITHIN} - set(CALLS) == set()


def public():
    """The names of all public functions and classes."""
    return set(everything().values())


def everything():
    """All public functions and classes, and their names."""
    names = {}
    for module in MODULES:
        home = module_named(module) if module else dgm
        listed = getattr(
            home, "__all__", [n for n, v in vars(home).items() if getattr(v, "__module__", 0) == home.__name__]
        )
        for name in listed:
            value = getattr(home, name)
            if not name.startswith("_") and isinstance(value, types.FunctionType | type):
                names.setdefault(value, f"{module}.{name}".lstrip("."))
    return names


PUBLIC_CLASSES = {
    base
    for value in everything()
    if isinstance(value, type)
    for base in value.__mro__
    if base.__module__.startswith("dgm_pyro")
}


@pytest.mark.parametrize("name", CALLS)
def test_every_argument_has_a_kind(name):
    known = {*KINDS, *ANYTHING, *CALLS[name].kinds, *CALLS[name].free}
    assert set(inspect.signature(found(name)[1]).parameters) - known == set()


def test_every_public_function_is_in_the_table_or_excluded_with_a_reason():
    excluded = {name for names in EXCLUDED.values() for name in names}
    assert public() - set(CALLS) - excluded == set()
    assert not excluded & set(CALLS)
    assert excluded <= public()
