"""The doctor: one pair broken on purpose for each finding, and no alarm for pairs that are right."""

import copy
import json
import math
import random

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import CASES
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoDelta, AutoIAFNormal, AutoLowRankMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from scripts import load_script
from torch import nn

import dgm_pyro as dgm
from dgm_pyro import cli
from dgm_pyro.diagnosis import CHECKS, doctor

X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
BITS = (X > 0).float()


@pytest.fixture(autouse=True)
def own_store():
    with pyro.get_param_store().scope():
        yield


def loc(name="loc", value=0.0):
    return pyro.param(name, torch.tensor(value))


def global_model(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0).expand([len(x), x.shape[-1]]).to_event(1), obs=x)


def global_guide(x):
    pyro.sample("z", dist.Normal(loc(), 1.0))


class Net(nn.Module):
    """A textbook VAE in plain Pyro."""

    def __init__(self, register=("encoder", "decoder")):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(3, 4), nn.Linear(2, 3)
        self.names = dict(zip(("encoder", "decoder"), register, strict=True))

    def model(self, x):
        if self.names["decoder"]:
            pyro.module(self.names["decoder"], self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        if self.names["encoder"]:
            pyro.module(self.names["encoder"], self.encoder)
        with pyro.plate("data", len(x)):
            mean, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(mean, log_scale.exp()).to_event(1))


# -- pairs that are right ----------------------------------------------------------------------------------------------


def plated(x):
    with pyro.plate("features", 3, dim=-1), pyro.plate("data", len(x), dim=-2):
        pyro.sample("x", dist.Normal(loc(), 1.0), obs=x)


def subsampled(x):
    with pyro.plate("data", 6, subsample_size=2) as rows:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0))
        pyro.sample("x", dist.Normal(z.unsqueeze(-1), torch.ones(3)).to_event(1), obs=x[rows])


def subsampled_guide(x):
    mean = pyro.param("mean", torch.zeros(6))
    with pyro.plate("data", 6, subsample_size=2) as rows:
        pyro.sample("z", dist.Normal(mean[rows], 1.0))


def enumerated(x):
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
        centers = pyro.param("centers", torch.tensor([-1.0, 1.0]))
        pyro.sample("x", dist.Normal(centers[k].unsqueeze(-1), torch.ones(3)).to_event(1), obs=x)


def positive(x):
    rate = pyro.sample("rate", dist.Gamma(2.0, 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Exponential(rate).expand([len(x), 3]).to_event(1), obs=x.abs())


def positive_guide(x):
    scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
    pyro.sample("rate", dist.LogNormal(loc(), scale))


class Regression(PyroModule):
    def __init__(self):
        super().__init__()
        self.weight = PyroSample(dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        self.scale = PyroParam(torch.tensor(1.0), constraint=dist.constraints.positive)

    def forward(self, x):
        mean = x @ self.weight
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, self.scale), obs=x.sum(-1))


def zero_start():
    """The usual start of a residual network: the last layer at zero, so that the first has no gradient yet."""
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))
    nn.init.zeros_(net[-1].weight)

    def model(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(net(x), 1.0).to_event(1), obs=x)

    return model, lambda x: None


def flow_pair():
    flow = dist.transforms.affine_autoregressive(3)

    def model(x):
        pyro.module("flow", flow)
        with pyro.plate("data", len(x)):
            base = dist.Normal(torch.zeros(3), 1.0).to_event(1)
            pyro.sample("x", dist.TransformedDistribution(base, [flow]), obs=x)

    return model, lambda x: None


def planar_guide():
    """Fine: a guide scores only what it has drawn."""
    transform = dist.transforms.Planar(2)

    def model(x):
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    def guide(x):
        pyro.module("planar", transform)
        pyro.sample("z", dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0).to_event(1), [transform]))

    return model, guide


def auto(kind, model=global_model):
    guide = kind(model)
    guide(X)
    return model, guide


RIGHT = {
    "global latent": lambda: (global_model, global_guide),
    "model alone": lambda: (global_model, None),
    "vae": lambda: (lambda net: (net.model, net.guide))(Net()),
    "two plates": lambda: (plated, lambda x: None),
    "subsample": lambda: (subsampled, subsampled_guide),
    "enumerated": lambda: (enumerated, lambda x: None),
    "positive": lambda: (positive, positive_guide),
    "zero start": zero_start,
    "flow": flow_pair,
    "planar guide": planar_guide,
    "AutoNormal": lambda: auto(AutoNormal),
    "AutoDelta": lambda: auto(AutoDelta),
    "AutoDelta of a positive latent": lambda: auto(AutoDelta, positive),
    "AutoLowRank": lambda: auto(AutoLowRankMultivariateNormal),
    "AutoIAF": lambda: auto(AutoIAFNormal, Regression()),
    "PyroModule": lambda: auto(AutoNormal, Regression()),
    "masked": lambda: (poutine.mask(global_model, torch.tensor(True)), global_guide),
    "scaled": lambda: (poutine.scale(global_model, 0.1), poutine.scale(global_guide, 0.1)),
}


@pytest.mark.parametrize("name", RIGHT)
def test_pairs_that_are_right_raise_no_alarm(name):
    torch.manual_seed(0)
    diagnosis = doctor(*RIGHT[name](), X)
    assert diagnosis.findings == ()
    assert diagnosis.ok
    assert diagnosis.sites


SAMPLE = [
    "normal-given-label", "bernoulli-learned", "vae", "vae-three-levels", "vae-in-likelihood", "vae-bit-latent",
    "made-categorical", "pixelcnn", "realnvp", "nsf-given-image", "dequantized-variational", "vae-flow-encoder",
    "diffusion", "vae-diffusion-prior", "continuous-diffusion-learned", "labeled-vae", "labeled-classifier",
    "discriminative",
]  # fmt: skip


@pytest.mark.parametrize("name", SAMPLE)
def test_our_programs_raise_no_alarm(name):
    case = CASES[name]
    program = case.build()
    x, given = case.draw(program, 5)
    before = {key: value.clone() for key, value in program.state_dict().items()}
    for diagnosis in (doctor(program.model, program.guide, x, given), doctor(program)):
        assert diagnosis.errors == ()
        inert = [f for f in diagnosis.findings if not any(part in f.where for part in case.inert)]
        assert inert == []
    assert all(torch.equal(before[key], value) for key, value in program.state_dict().items())


# -- pairs that are broken ---------------------------------------------------------------------------------------------


def unused_param(x):
    loc("lost")
    global_guide(x)


def detached(x):
    pyro.sample("z", dist.Normal(loc("cut").detach() + loc(), 1.0))


def zeroed(x):
    pyro.sample("z", dist.Normal(loc("nil") * 0 + loc(), 1.0))


def loose_tensor():
    weight = torch.zeros((), requires_grad=True)
    return global_model, lambda x: pyro.sample("z", dist.Normal(weight, 1.0))


def misnamed(x):
    pyro.sample("zz", dist.Normal(loc(), 1.0))


def silent(x):
    pass


def guided_data(x):
    global_guide(x)
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))


def guide_on_reals(x):
    pyro.sample("rate", dist.Normal(loc(value=0.1), 1.0))


def guide_on_positives(x):
    pyro.sample("z", dist.LogNormal(loc(), 1.0))


def guide_of_bits(x):
    pyro.sample("z", dist.Bernoulli(logits=loc()))


def guide_with_another_event(x):
    pyro.sample("z", dist.Normal(loc(), 1.0).expand([1]).to_event(1))


def bernoulli(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Bernoulli(logits=loc()).expand([len(x), 3]).to_event(1), obs=x)


def categorical(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Categorical(logits=torch.zeros(3) + loc()).expand([len(x), 3]).to_event(1), obs=x)


def no_to_event(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc(), torch.ones(len(x), 3)), obs=x)


def square_no_to_event(x):
    no_to_event(x[:3])


def no_plate(x):
    pyro.sample("x", dist.Normal(loc(), torch.ones(3)).to_event(1), obs=x)


def outside_its_plate(x):
    with pyro.plate("data", 6, subsample_size=2) as rows:
        pass
    pyro.sample("x", dist.Normal(loc(), torch.ones(3)).to_event(1), obs=x[rows])


def whole_data_in_a_subsample(x):
    with pyro.plate("data", 6, subsample_size=2):
        pyro.sample("x", dist.Normal(loc(), torch.ones(3)).to_event(1), obs=x)


def local_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.unsqueeze(-1), torch.ones(3)).to_event(1), obs=x)


def guide_without_its_plate(x):
    pyro.sample("z", dist.Normal(torch.zeros(len(x)) + loc(), 1.0))


def odd_features(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc(), torch.ones(3)).to_event(1), obs=x[:, :2])


def planar_model():
    transform = dist.transforms.Planar(3)

    def model(x):
        pyro.module("planar", transform)
        with pyro.plate("data", len(x)):
            base = dist.Normal(torch.zeros(3), 1.0).to_event(1)
            pyro.sample("x", dist.TransformedDistribution(base, [transform]), obs=x)

    return model, silent


class Lopsided(dist.transforms.AffineTransform):
    """Forward doubles, the inverse does not halve."""

    def _inverse(self, y):
        return y


class Miscounted(dist.transforms.AffineTransform):
    def log_abs_det_jacobian(self, x, y):
        return torch.zeros_like(x)


def flow_of(transform):
    def model(x):
        with pyro.plate("data", len(x)):
            base = dist.Normal(torch.zeros(3) + loc(), 1.0)
            pyro.sample("x", dist.TransformedDistribution(base, [transform]).to_event(1), obs=x)

    return model, silent


def infinite(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc(), torch.zeros(3)).to_event(1), obs=x)


def nan_gradient(x):
    root = loc("root").sqrt()  # its derivative at 0 is infinite, and 0 * inf is NaN
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(root * 0.0 + loc(), torch.ones(3)).to_event(1), obs=x)


def nan_parameter(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc("bad", math.nan), torch.ones(3)).to_event(1), obs=x)


def meta():
    net = nn.Linear(3, 3, device="meta")

    def model(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(net(x), 1.0).to_event(1), obs=x)

    return model, silent


def doubles():
    net = nn.Linear(3, 3).double()

    def model(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(net(x), 1.0).to_event(1), obs=x)

    return model, silent


def mixed(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(pyro.param("loc", torch.zeros(3).double()), 1.0).to_event(1), obs=x)


def stale():
    Net().guide(X)
    net = Net()
    Net().model(X)
    return net.model, net.guide


def stale_shape():
    pyro.param("loc", torch.zeros(7))
    return global_model, lambda x: pyro.sample("z", dist.Normal(loc().sum(), 1.0))


def colliding():
    net = Net(register=("net", "net"))
    net.encoder, net.decoder = nn.Linear(3, 4), nn.Linear(2, 3)
    return net.model, net.guide


def crash(x):
    raise KeyError("mean")


def unregistered():
    net = Net(register=("encoder", None))
    return net.model, net.guide


def module_model():
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(self.linear(x), 1.0).to_event(1), obs=x)

    return Whole(), silent


# name: (pair, data, severity, check, where, a word of the fix)
BROKEN = {
    "a param nobody uses": (lambda: (global_model, unused_param), X, "warning", "parameters", "lost", "remove it"),
    "a detached param": (lambda: (global_model, detached), X, "warning", "parameters", "cut", "use it"),
    "a gradient of zero": (lambda: (global_model, zeroed), X, "warning", "parameters", "nil", "freeze"),
    "a tensor that is no param": (loose_tensor, X, "error", "parameters", "weight", "pyro.param"),
    "a module not registered": (unregistered, X, "error", "parameters", "decoder", "pyro.module"),
    "a module that is the model": (module_model, X, "note", "parameters", "linear", "pyro.module"),
    "a misnamed guide site": (lambda: (global_model, misnamed), X, "error", "partners", "zz", "'z'"),
    "a missing guide site": (lambda: (global_model, silent), X, "error", "partners", "z", "pyro.sample('z'"),
    "a guide for data": (lambda: (global_model, guided_data), X, "error", "partners", "x", "leave it out"),
    "a guide outside": (lambda: (positive, guide_on_reals), X, "error", "supports", "rate", "LogNormal"),
    "a guide too narrow": (lambda: (global_model, guide_on_positives), X, "warning", "supports", "z", "loose"),
    "a mass for a density": (lambda: (global_model, guide_of_bits), X, "error", "supports", "z", "family"),
    "other event": (lambda: (global_model, guide_with_another_event), X, "error", "supports", "z", "to_event"),
    "gray for Bernoulli": (lambda: (bernoulli, silent), X.abs(), "error", "data", "x", "binarize"),
    "too many levels": (lambda: (categorical, silent), 4 * BITS, "error", "data", "x", "at least 5"),
    "NaN data": (lambda: (no_plate, silent), X / 0 * 0, "error", "data", "x", "clean"),
    "no to_event": (lambda: (no_to_event, silent), X, "error", "plates", "x", "to_event(1)"),
    "no to_event, square": (lambda: (square_no_to_event, silent), X, "error", "plates", "x", "to_event(1)"),
    "no plate": (lambda: (no_plate, silent), X, "error", "plates", "x", "pyro.plate('data', 6)"),
    "outside its plate": (lambda: (outside_its_plate, silent), X, "error", "plates", "x", "move the statement into"),
    "all data in a subsample": (lambda: (whole_data_in_a_subsample, silent), X, "error", "plates", "x", "long"),
    "guide without plate": (lambda: (local_model, guide_without_its_plate), X, "error", "plates", "z", "plate"),
    "odd features": (lambda: (odd_features, silent), X, "error", "shapes", "x", "event shape"),
    "a scaled guide": (
        lambda: (global_model, poutine.scale(global_guide, 2.0)), X, "warning", "plates", "z", "scale both"
    ),
    "Planar for data": (planar_model, X, "error", "transforms", "x", "Spline"),
    "a false inverse": (lambda: flow_of(Lopsided(0.0, 2.0)), X, "error", "inverses", "x", "inverse"),
    "a false log-det": (lambda: flow_of(Miscounted(0.0, 2.0)), X, "error", "inverses", "x", "log_abs_det_jacobian"),
    "scale zero": (lambda: (infinite, silent), X, "error", "finite", "x", "scale of zero"),
    "a NaN gradient": (lambda: (nan_gradient, silent), X, "error", "finite", "x", "sqrt(0)"),
    "a NaN parameter": (lambda: (nan_parameter, silent), X, "error", "finite", "bad", "start from new values"),
    "two devices": (meta, X, "error", "device", "arguments and parameters", "move all"),
    "two dtypes that fail": (doubles, X, "error", "dtype", "model", "one dtype"),
    "two dtypes": (lambda: (mixed, silent), X, "warning", "dtype", "argument 0", "one dtype"),
    "a stale store": (stale, X, "error", "store", "encoder", "clear_param_store"),
    "a stale shape": (stale_shape, X, "error", "store", "loc", "clear_param_store"),
    "one name for two": (colliding, X, "error", "store", "net", "its own name"),
    "a crash": (lambda: (crash, silent), X, "error", "run", "model", "traceback"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_named_with_a_remedy(name):
    torch.manual_seed(0)
    make, x, severity, check, where, remedy = BROKEN[name]
    diagnosis = doctor(*make(), x)
    found = [f for f in diagnosis.findings if (f.severity, f.check, f.where) == (severity, check, where)]
    assert found, str(diagnosis)
    assert remedy in found[0].fix
    assert diagnosis.ok == (severity != "error")
    assert all("\n" not in f.fix and "\n" not in f.what for f in diagnosis.findings)


def test_every_check_has_a_broken_pair():
    found = {check for *_, check, _, _ in BROKEN.values()}
    assert {"partners", "supports", "data", "shapes", "plates", "inverses", "finite", "parameters", "store"} <= found
    assert len(CHECKS) == 14


# Pairs of the benchmark that an earlier doctor took for right or for wrong.
TELLING = {
    "correct": [
        "parameter_of_another_batch", "score_function_with_a_baseline", "semi_supervised_with_labels",
        "kernel_distance", "decoder_hidden_from_the_optimizer", "model_of_an_improper_prior", "plate_without_a_size",
        "vae_with_dropout", "scale_by_other_means", "weights_that_are_normalized", "missing_values",
        "hidden_markov_model",
    ],
    "refused": [
        "nothing_to_enumerate", "enumeration_by_another_loss", "endless_enumeration", "rank_that_particles_break",
        "sequential_enumeration_of_the_model", "enumerated_value_outside_its_plate", "closed_kl_in_another_order",
        "factor_of_the_guide_without_a_word", "auxiliary_site_of_the_model", "transposed_guide",
    ],
    "broken": [
        "scale_without_a_constraint", "network_that_gives_a_raw_scale", "weights_without_a_constraint",
        "noise_outside_sample", "draw_outside_sample", "draw_without_a_gradient", "latent_that_no_datum_sees",
        "latent_that_is_detached", "frozen_parameter_of_a_pyro_module", "auto_guide_of_other_rows",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def benchmark():
    return load_script("benchmarks/doctor.py")


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in TELLING.items() for name in names])
def test_pairs_of_the_benchmark_are_told_apart(benchmark, kind, name):
    where, make = benchmark.BROKEN[name] if kind == "broken" else (None, getattr(benchmark, name))
    torch.manual_seed(0)
    pair = make()
    found = doctor(pair.model, pair.guide, *pair.args, loss=pair.loss, **pair.kwargs)
    grave = [f for f in found.findings if f.severity in ("error", "warning") and where in (None, f.where)]
    assert found.ok if kind == "correct" else grave, str(found)
    if kind == "refused":
        with pyro.get_param_store().scope():
            assert benchmark.words_of_pyro(make())


def test_pyros_words_come_with_a_fix_of_their_own():
    fixes = {}
    for loss in (TraceEnum_ELBO(), Trace_ELBO()):
        (said,) = doctor(global_model, global_guide, X, loss=loss).findings or [None]
        fixes[type(loss).__name__] = said and (said.check, said.where, said.fix)
    assert fixes == {
        "TraceEnum_ELBO": (
            "pyro", "TraceEnum_ELBO", "use Trace_ELBO, or mark a site with infer={'enumerate': 'parallel'}"
        ),
        "Trace_ELBO": None,
    }  # fmt: skip


def test_a_pair_that_runs_under_its_loss_alone_is_no_error():
    """Its statements count on the dimension of the particles."""
    loss = Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=0)

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        assert z.shape == (2,)

    def guide():
        pyro.sample("z", dist.Normal(loc(), 1.0))

    (finding,) = doctor(model, guide, loss=loss).findings
    assert finding.severity == "note"
    assert "runs only under the loss" in finding.what
    assert doctor(model, guide).errors[0].check == "run"


def test_an_elbo_that_remembers_another_nesting():
    loss = TraceEnum_ELBO(strict_enumeration_warning=False)
    loss.loss(global_model, global_guide, X)
    assert doctor(global_model, global_guide, X, loss=loss).ok
    errors = doctor(plated, silent, X, loss=loss).errors
    assert [error.check for error in errors] == ["nesting"]
    assert doctor(plated, silent, X, loss=Trace_ELBO()).ok


def test_the_store_the_parameters_and_the_random_state_stay_as_they_were():
    net = Net()
    pyro.param("mine", torch.ones(2))
    before = [parameter.detach().clone() for parameter in net.parameters()]
    state = torch.get_rng_state()
    doctor(net.model, net.guide, X)
    assert list(pyro.get_param_store().keys()) == ["mine"]
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in net.parameters())
    assert torch.equal(state, torch.get_rng_state())


class Stateful(PyroModule):
    """Counts its calls, evaluates from the first one on, and has a buffer that follows the data."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.weight = PyroParam(torch.tensor(0.5))
        self.calls, self.seen = 0, {}

    def forward(self, x):
        self.calls += 1
        self.seen[self.calls] = random.random() + np.random.rand()
        mean = self.norm(x).sum(-1) * self.weight * pyro.sample("z", dist.Normal(0.0, 1.0))
        self.eval()
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x[:, 0])


def test_a_module_and_an_autoguide_stay_as_they_were():
    model = Stateful()
    guide, loss = AutoNormal(model), Trace_ELBO()
    for parameter in model.norm.parameters():
        parameter.grad = torch.ones_like(parameter)
    states = [module.state_dict() for module in (model, guide)]
    before = copy.deepcopy(states), random.getstate(), np.random.get_state()[1].tolist(), vars(loss).copy()
    assert doctor(model, guide, X, loss=loss).sites
    assert [module.state_dict().keys() for module in (model, guide)] == [state.keys() for state in before[0]]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[0][0][name]), name
    assert (random.getstate(), np.random.get_state()[1].tolist(), vars(loss)) == before[1:]
    assert (model.calls, model.seen, model.training, guide.prototype_trace) == (0, {}, True, None)
    assert all(torch.equal(parameter.grad, torch.ones_like(parameter)) for parameter in model.norm.parameters())


def test_a_pair_that_has_been_trained_is_healthy():
    svi = pyro.infer.SVI(global_model, global_guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(5):
        svi.step(X)
    before = pyro.param("loc").item()
    assert doctor(global_model, global_guide, X).findings == ()
    assert pyro.param("loc").item() == before


def test_data_that_do_not_fit_a_program():
    program = dgm.Bernoulli((1, 8, 8), learned=True)
    diagnosis = doctor(program, dgm.data.load("digits", num_data=10))
    assert [finding.check for finding in diagnosis.errors] == ["data"]
    assert "binarized" in diagnosis.errors[0].fix
    assert doctor(program, dgm.data.load("digits-binary", num_data=10)).ok


def test_what_is_no_pair():
    with pytest.raises(TypeError, match="callable"):
        doctor(3, None)
    with pytest.raises(ValueError, match=r"doctor\(program, data\)"):
        doctor(dgm.Normal(2), torch.zeros(3, 2), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="pass data"):
        doctor(dgm.Normal(3, nn.Sequential(nn.Linear(2, 6))))


# -- on the command line -----------------------------------------------------------------------------------------------

SCRIPT = """
import pyro, pyro.distributions as dist, torch

def model(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

def guide(x):
    pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(())), 1.0))

def misnamed(x):
    pyro.sample("y", dist.Normal(pyro.param("loc", torch.zeros(())), 1.0))

def data():
    return torch.zeros(5)

named = {"x": torch.zeros(3)}
matrix = (torch.zeros(3, 2),)
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(SCRIPT)
    return path


def test_a_pair_in_a_file(script, capsys):
    assert cli.main(["doctor", f"{script}:model,guide"]) == 0
    assert "nothing found" in capsys.readouterr().out
    assert cli.main(["doctor", f"{script}:model,guide", "--args", "named"]) == 0
    assert cli.main(["doctor", f"{script}:model,misnamed", "--json"]) == 1
    found = json.loads(capsys.readouterr().out.split("\n", 1)[1])
    assert not found["ok"]
    assert {(f["check"], f["where"]) for f in found["findings"]} >= {("partners", "y"), ("partners", "z")}
    assert cli.main(["doctor", f"{script}:model,guide", "--args", "matrix"]) == 1
    assert "plate 'data' has 3" in capsys.readouterr().out


def test_a_model_by_name(capsys):
    assert cli.main(["doctor", "vae", "--prior", "flow", "--data", "digits-binary"]) == 0
    assert "nothing found" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise RuntimeError('no\\nserver')", "data() of {} raises RuntimeError when it is called without argum"),
        ("assert False, 'odd'", "raises AssertionError when it is called without arguments: odd"),
        ("raise SystemExit(3)", "raises SystemExit when it is called without arguments: 3"),
    ],
)
def test_data_of_a_file_that_fails_ends_in_one_line(script, capsys, body, message):
    script.write_text(f"{SCRIPT}\ndef data():\n    {body}\n")
    assert cli.main(["doctor", f"{script}:model,guide"]) == 1
    error = capsys.readouterr().err
    assert message.format(script) in error
    assert error.count("\n") == 1


def test_a_file_may_have_data_classes_that_name_their_types_in_text(script, capsys):
    """Their module is looked up among those that are loaded."""
    classes = "import dataclasses\n\n@dataclasses.dataclass\nclass Sizes:\n    z: int = 2\n"
    script.write_text(f"from __future__ import annotations\n{SCRIPT}\n{classes}")
    assert cli.main(["doctor", f"{script}:model,guide"]) == 0, capsys.readouterr().err


def test_a_pair_without_its_arguments_is_asked_for_them(script, capsys):
    script.write_text("def model(x):\n    pass\n")
    assert cli.main(["doctor", f"{script}:model"]) == 1
    assert "return them from data() in its file (--args)" in capsys.readouterr().out


def test_a_file_that_exits_ends_in_one_line(script, capsys):
    script.write_text("import sys\nsys.exit(2)")
    assert cli.main(["doctor", f"{script}:model"]) == 1
    assert f"{script} raises SystemExit when it is loaded: 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nowhere.py:model", "no file"),
        ("no.such.module:model", "cannot import"),
        ("{}:modle,guide", "did you mean 'model'"),
        ("{}:", "must be FILE.py:MODEL or MODULE:MODEL, and ,GUIDE where there is one"),
        ("{}", "name the model in it"),
        ("nothing-here", "holds no run"),
    ],
)
def test_what_is_not_there_ends_in_one_line(script, capsys, target, message):
    assert cli.main(["doctor", target.format(script)]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


# -- pairs that it once misread ----------------------------------------------------------------------------------------


def test_a_scale_without_a_constraint_is_no_crash():
    """Weights are disturbed to see whether a zero gradient stays zero; a scale may become negative by that."""

    def model():
        pyro.sample("z", dist.Normal(torch.zeros(10), 1.0).to_event(1))

    def guide():
        pyro.sample("z", dist.Normal(torch.zeros(10), pyro.param("s", torch.full((10,), 0.1))).to_event(1))

    doctor(model, guide)


def test_a_plate_without_a_size_takes_any():
    def model(x):
        with pyro.plate("data"):
            pyro.sample("x", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0), obs=x)

    assert not doctor(model, lambda x: None, torch.randn(5)).findings


def test_one_value_has_one_shape():
    def model():
        pyro.sample("z", dist.Normal(torch.zeros(2, 1), 1.0).to_event(2))

    def guide():
        pyro.sample("z", dist.Normal(pyro.param("q", torch.zeros(1, 2)), 1.0).to_event(2))

    (finding,) = doctor(model, guide).findings
    assert "shape (2, 1) in the model, but (1, 2) in the guide" in str(finding)


def test_a_frozen_parameter_that_pyro_trains_is_found_and_left_frozen():
    class Frozen(PyroModule):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(()), requires_grad=False)

        def forward(self, x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(self.w + z, 1.0).expand([len(x)]).to_event(1), obs=x)

    model = Frozen()
    found = doctor(model, AutoNormal(model), torch.ones(5))
    assert any(finding.where == "w" and "has requires_grad=False" in str(finding) for finding in found.findings)
    assert not model.w.requires_grad


def test_an_autoguide_that_draws_rows_of_its_own_is_found():
    rows, x = torch.arange(0, 200, 2), torch.randn(200)

    def of(**plate):
        def model(x):
            with pyro.plate("data", 200, **plate) as chosen:
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x[chosen])

        return doctor(model, AutoNormal(model), x).findings

    (finding,) = of(subsample=rows)
    assert "the guide draws 100 of 200 data itself, but the model is given indices" in str(finding)
    assert not of(subsample_size=100)
