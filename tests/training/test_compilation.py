"""Compiled losses are the eager ones: same numbers, same gradients, same random draws; and say what they cannot do."""

import copy
import dataclasses
import itertools
import math
import platform
import random
import warnings
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import CASES, assert_same_number, data_for, once_per_part, vae
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO, config_enumerate
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoStructured,
)
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn
from torch._inductor import cpu_vec_isa
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import dgm_pyro as dgm
from dgm_pyro.networks.mlp import networks_in
from dgm_pyro.objectives import ELBO, WarmUp, objective_named
from dgm_pyro.program import sample_sites, traces
from dgm_pyro.training import compilation, step
from dgm_pyro.training import fit as training
from dgm_pyro.training.compilation import CompilationError, Loss

# Whose guide differentiates inside its statements; and what is another program after every look at a batch.
NOT = {"vae-semi-amortized"}
# Whose densities are matrix products of parameters, and whose loss no network enters.
WITHOUT_NETWORKS = {"fullrank", "lowrank", "flow-linear", "flow-planar"}
TRAINED = ["normal-learned", "made", "vae", "vae-ladder", "vae-flow-prior", "diffusion", "diffusion-importance"]
TRAINED += ["labeled", "dequantized"]
# Between them they have every kind of network: enough for every day where the network decides.
NETWORKS = (
    "made-order", "pixelcnn", "transformer", "columns-made", "columns-vae", "vae-foreign-network", "deep-vae",
    "discriminative", "nsf-given-image", "vae-planar-encoder", "flow++", "standardized-vae", "diffusion-given-label",
    "diffusion-unet", "diffusion-dit", "continuous-diffusion",
)  # fmt: skip


def loss_and_gradients(loss, program, x, given=None, observed=None, seed=0, **options):
    torch.manual_seed(seed)
    program.zero_grad()
    with pyro.validation_enabled(False):
        value = loss(x, given, observed or {}, **options)
    if value.requires_grad:
        value.backward()
    return value.detach(), {name: p.grad.clone() for name, p in program.named_parameters() if p.grad is not None}


def eager(program, objective, elapsed=1.0):
    def loss(x, given, observed):
        bound = dgm.objectives.at_progress(objective, elapsed)(program, x, given, observed)
        return -bound.surrogate.mean()

    return loss


def assert_equal(a, b):
    torch.testing.assert_close(a[0], b[0], rtol=1e-9, atol=1e-9)
    assert a[1].keys() == b[1].keys()
    for name in a[1]:
        torch.testing.assert_close(a[1][name], b[1][name], rtol=1e-9, atol=1e-9)


# -- the same numbers --------------------------------------------------------------------------------------------------


# The graphs of these unroll a root search, and take seconds to record; encoders of these flows have the same layers.
ROOTS = ("flow-planar", "planar-given-image", "sylvester-given-vector")


@pytest.mark.parametrize("name", once_per_part([name for name in CASES if name not in NOT], *ROOTS))
def test_the_graph_of_every_program_is_its_loss(float64, name):
    """Exported at one number of data, run at another, from the same random numbers."""
    program = CASES[name].build().train()
    loss_and_gradients(eager(program, ELBO()), program, *CASES[name].draw(program, 4))  # layers set themselves up by it
    loss = Loss(program, ELBO(), backend="eager")
    loss_and_gradients(loss, program, *CASES[name].draw(program, 4))
    x, given = CASES[name].draw(program, 7, seed=2)
    twin = copy.deepcopy(program)  # a look may change buffers
    assert_equal(loss_and_gradients(loss, program, x, given), loss_and_gradients(eager(twin, ELBO()), twin, x, given))
    for buffer, other in zip(program.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(buffer, other)
    assert len(loss._graphs) == 1


def test_so_is_its_machine_code(float64):
    program = CASES["vae-two-levels"].build().train()
    loss = dgm.compile(program)
    x, _ = CASES["vae-two-levels"].draw(program, 7)
    for seed in range(2):
        assert_equal(
            loss_and_gradients(loss, program, x, seed=seed),
            loss_and_gradients(eager(program, ELBO()), program, x, seed=seed),
        )


@pytest.mark.parametrize(
    ("name", "objective"),
    [
        *itertools.product(("vae-two-levels", "vae-flow-prior", "vae-diffusion-prior"), ("iwae:3", "stl:2", "rws:3")),
        # A KL in closed form, and one that is sampled; then factors, of whatever terms there are.
        *itertools.product(("vae-two-levels", "vae-flow-prior"), ("free-bits:0.3",)),
        *itertools.product(("vae-two-levels",), ("beta:0.5", "annealed")),
        # Weighted errors, which a diffusion states beside its bound.
        *itertools.product(("diffusion-edm", "continuous-diffusion-learned"), ("simple", "edm")),
    ],
)
def test_the_graph_of_every_objective_is_its_loss(float64, name, objective):
    program, objective = CASES[name].build().train(), objective_named(objective)
    loss = Loss(program, objective, backend="eager")
    x, given = CASES[name].draw(program, 5)
    for elapsed in (0.1, 1.0):
        assert_equal(
            loss_and_gradients(loss, program, x, given, elapsed=elapsed),
            loss_and_gradients(eager(program, objective, elapsed), program, x, given),
        )
    (graph,) = loss._graphs.values()
    # One graph without others inside, which `torch.compile` refuses for a second number of data.
    assert not any(isinstance(node.target, torch._ops.HigherOrderOperator) for node in graph.graph.graph.nodes)


@pytest.mark.parametrize("objective", ["enumerate", "rloo:3", "vimco:3"])
def test_the_graph_of_discrete_latents_is_their_loss(float64, objective):
    program, objective = CASES["vae-bit-latent"].build().train(), objective_named(objective)
    x, given = CASES["vae-bit-latent"].draw(program, 5)
    loss = Loss(program, objective, backend="eager")
    assert_equal(
        loss_and_gradients(loss, program, x, given), loss_and_gradients(eager(program, objective), program, x, given)
    )


def test_labels_may_be_observed(float64):
    program = CASES["labeled"].build().train()
    x, _ = CASES["labeled"].draw(program, 5)
    observed = {"y": torch.tensor([0, 1, 1, 0, 1])}
    loss = Loss(program, ELBO(), backend="eager")
    assert_equal(
        loss_and_gradients(loss, program, x, None, observed),
        loss_and_gradients(eager(program, ELBO()), program, x, None, observed),
    )


def test_every_call_draws_anew_and_a_seed_draws_the_same():
    program = CASES["vae"].build()
    loss = Loss(program, ELBO(), backend="eager")
    x, _ = CASES["vae"].draw(program, 5)
    torch.manual_seed(0)
    first, second = loss(x), loss(x)
    torch.manual_seed(0)
    assert first == loss(x) != second


def test_one_datum_runs_too():
    program = CASES["vae"].build()
    loss = Loss(program, ELBO(), backend="eager")
    x, _ = CASES["vae"].draw(program, 1)
    torch.manual_seed(0)
    value = loss(x)
    torch.manual_seed(0)
    assert_same_number(value, -ELBO()(program, x).value.mean())


def test_it_has_the_parameters_of_the_program_and_follows_its_mode(float64):
    program = dgm.Autoregressive(dgm.Normal(3, dgm.networks.MADE(3, 2, hidden=(16,), dropout=0.5)))
    loss = Loss(program, ELBO(), backend="eager")
    assert {id(p) for p in loss.parameters()} == {id(p) for p in program.parameters()}
    x = torch.randn(6, 3)
    program.eval()
    assert loss(x) == loss(x)
    assert_same_number(loss(x), -program.log_prob(x).mean())
    program.train()
    assert loss(x) != loss(x)
    program.eval()
    with torch.no_grad():
        for parameter in program.parameters():
            parameter.mul_(0.5)
    assert_same_number(loss(x), -program.log_prob(x).mean())


def test_parameters_may_be_frozen_and_set_free_again(float64):
    """Frozen first: a graph made then has no gradient to give later. That is settled before machine code is made."""
    program = CASES["vae"].build()
    loss = Loss(program, ELBO(), backend="aot_eager")
    x, _ = CASES["vae"].draw(program, 5)
    for free in (False, True, False):
        program.likelihood.requires_grad_(free)
        value, gradients = loss_and_gradients(loss, program, x)
        expected = loss_and_gradients(eager(program, ELBO()), program, x)
        assert_equal((value, gradients), expected)
        assert any(name.startswith("likelihood") for name in gradients) is free


# -- any Pyro pair -----------------------------------------------------------------------------------------------------


class Regression(PyroModule):
    def __init__(self):
        super().__init__()
        self.linear = PyroModule[nn.Linear](2, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))
        self.scale = PyroParam(torch.tensor(0.7), constraint=dist.constraints.positive)

    def forward(self, x, y):
        mean = self.linear(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, self.scale), obs=y)


def functions():
    """A model and a guide as plain functions, with a network and parameters in the param store."""
    network = nn.Linear(2, 2)

    def model(x):
        scale = pyro.param("scale", torch.tensor(0.5), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, scale).to_event(1), obs=x)

    def guide(x):
        pyro.module("network", network)
        scale = pyro.param("guide_scale", lambda: torch.full((2,), 0.3), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(network(x), scale).to_event(1))

    return model, guide


PAIRS = {
    "functions": lambda: (*functions(), (torch.randn(6, 2),)),
    "modules": lambda: (lambda m: (m, AutoNormal(m), (torch.randn(6, 2), torch.randn(6))))(Regression()),
    "full": lambda: (lambda m: (m, AutoMultivariateNormal(m), (torch.randn(6, 2), torch.randn(6))))(Regression()),
    "program": lambda: (lambda p: (p.model, p.guide, (torch.randn(6, *p.event_shape),)))(CASES["vae"].build()),
}


@pytest.mark.parametrize("analytic_kl", [False, True])
@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_of_pyro_callables_has_pyros_loss(float64, name, analytic_kl):
    pyro.clear_param_store()
    torch.manual_seed(0)
    model, guide, args = PAIRS[name]()
    theirs = (TraceMeanField_ELBO if analytic_kl else Trace_ELBO)()
    theirs.loss(model, guide, *args)  # sets up guide and store
    loss = compilation.PairLoss(model, guide, theirs, backend="eager")
    stored = dict(pyro.get_param_store().named_parameters())
    for seed in (1, 2):
        torch.manual_seed(seed)
        ours = loss(*args)
        assert all(parameter is stored[name] for name, parameter in pyro.get_param_store().named_parameters())
        leaves = dict(loss.named_parameters())
        gradients = dict(zip(leaves, torch.autograd.grad(ours, [*leaves.values()], allow_unused=True), strict=True))
        torch.manual_seed(seed)
        expected = theirs.differentiable_loss(model, guide, *args)
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
        theirs_by_name = torch.autograd.grad(expected, [*leaves.values()], allow_unused=True)
        for leaf, gradient in zip(leaves, theirs_by_name, strict=True):
            assert gradient is not None, f"{leaf} is not in Pyro's loss"
            torch.testing.assert_close(gradients[leaf], gradient, rtol=1e-9, atol=1e-9)


def latent_mean(x, plate=None, likelihood=lambda z: dist.Normal(z, 1.0)):
    """z ~ N(0, 1), and the data in a plate."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with plate or pyro.plate("data", len(x)) as rows:
        pyro.sample("x", likelihood(z), obs=x if rows is None else x[rows])


def shifted(x, scale=1.0):
    return pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(0.3)), scale))


def of_data(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 0.5), obs=x)


def of_data_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(pyro.param("slope", torch.tensor(0.4)) * x, 0.7))


def partly_common(x):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(m + pyro.sample("z", dist.Normal(0.0, 1.0)), 0.5), obs=x)


def partly_common_guide(x):
    pyro.sample("m", dist.Normal(pyro.param("center", torch.tensor(0.2)), 0.6))
    of_data_guide(x)


def local(x):
    with pyro.plate("data", len(x), subsample_size=2) as rows:
        pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x[rows])


def local_guide(x):
    means = pyro.param("means", torch.zeros(len(x)))
    with pyro.plate("data", len(x), subsample_size=2) as rows:
        pyro.sample("z", dist.Normal(means[rows], 0.5))


def masked(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)), poutine.mask(mask=x > 0):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def chain(x):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(a, 1.0))
    pyro.sample("x", dist.Normal(b, 1.0).expand([len(x)]).to_event(1), obs=x)


def chain_guide(x):
    a = pyro.sample("a", dist.Normal(pyro.param("mean_of_a", torch.tensor(0.1)), 1.0))
    pyro.sample("b", dist.Normal(a * pyro.param("slope", torch.tensor(0.3)), 0.5))


def reversed_guide(x):
    b = pyro.sample("b", dist.Normal(pyro.param("mean_of_b", torch.tensor(0.1)), 1.0))
    pyro.sample("a", dist.Normal(b * pyro.param("slope", torch.tensor(0.3)), 0.5))


def auxiliary(x):
    u = pyro.sample(
        "u", dist.Normal(pyro.param("m", torch.tensor(0.3)), 1.0).expand([2]).to_event(1), infer={"is_auxiliary": True}
    )
    pyro.sample("z", dist.Normal(u.sum(), 0.5))


def squeezed(x):
    """A transformation of an auxiliary draw, with its density."""
    u = pyro.sample("u", dist.Normal(pyro.param("m", torch.tensor(0.3)), 1.0), infer={"is_auxiliary": True})
    pyro.sample("z", dist.Delta(2 * u, log_density=-torch.tensor(2.0).log()))


def positive(x):
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    pyro.sample("x", dist.Normal(0.0, rate).expand([len(x)]).to_event(1), obs=x)


def positive_guide(x):
    pyro.sample("rate", dist.Gamma(pyro.param("shape", torch.tensor(1.5), dist.constraints.positive), 1.0))


def noted(x):
    pyro.deterministic("twice", 2 * shifted(x))


def written_out(x):
    m = pyro.param("m", torch.tensor(0.3))
    for i in pyro.plate("data", len(x)):
        pyro.sample(f"x_{i}", dist.Normal(m, 1.0), obs=x[i])


def with_factor(x):
    latent_mean(x)
    pyro.factor("penalty", -(pyro.param("k", torch.tensor(0.7)) ** 2))


def mixed(x):
    """One latent of two, and data that take part or do not, each under a weight."""
    with poutine.scale(scale=torch.tensor(0.5)):
        latent_mean(x, likelihood=lambda z: dist.Normal(z, 1.0).mask(x < 1))


# A model and a guide of three data.
SMALL_PAIRS = {
    "plate": (latent_mean, shifted),
    "point": (latent_mean, lambda x: pyro.sample("z", dist.Delta(pyro.param("m", torch.tensor(0.3))))),
    "no latents": (written_out, lambda x: None),
    "conditioned": (poutine.condition(latent_mean, {"z": torch.tensor(0.3)}), lambda x: None),
    "scale": (poutine.scale(latent_mean, 2.5), poutine.scale(shifted, 2.5)),
    "scale of a tensor": (poutine.scale(latent_mean, torch.tensor(2.0)), poutine.scale(shifted, torch.tensor(2.0))),
    "scale of integers": (poutine.scale(latent_mean, torch.tensor(2)), poutine.scale(shifted, torch.tensor(2))),
    "mask": (masked, shifted),
    "mask of all": (poutine.mask(latent_mean, False), shifted),
    "scale and mask": (mixed, poutine.scale(shifted, 0.5)),
    "subsample in the model": (lambda x: latent_mean(x, pyro.plate("data", len(x), subsample_size=2)), shifted),
    "subsample in both": (local, local_guide),
    "chain": (chain, chain_guide),
    "reversed": (chain, reversed_guide),
    "factor": (with_factor, shifted),
    "auxiliary": (latent_mean, auxiliary),
    "transformed": (latent_mean, squeezed),
    "deterministic in the model": (lambda x: pyro.deterministic("y", latent_mean(x) or x), shifted),
    "deterministic in the guide": (latent_mean, noted),
    "gamma": (positive, positive_guide),
    "AutoDelta": (chain, AutoDelta),
    "AutoDiagonalNormal": (chain, AutoDiagonalNormal),
    "AutoLowRank": (chain, AutoLowRankMultivariateNormal),
    "AutoStructured": (chain, AutoStructured),
}


@pytest.mark.parametrize("analytic_kl", [False, True])
@pytest.mark.parametrize("name", SMALL_PAIRS)
def test_small_pairs_have_pyros_loss_and_gradient(name, analytic_kl):
    model, guide = SMALL_PAIRS[name]
    if isinstance(guide, type):
        guide = guide(model)
    x = torch.tensor([0.5, -0.2, 1.0])
    theirs = (TraceMeanField_ELBO if analytic_kl else Trace_ELBO)()
    loss = compilation.PairLoss(model, guide, theirs, backend="eager")
    if name == "reversed" and analytic_kl:
        with pytest.raises(
            CompilationError, match=r"mean field restriction.* or compile it with dgm.ELBO\(analytic_kl"
        ):
            loss(x)
        return
    loss(x)
    torch.manual_seed(3)
    ours = loss(x)
    if name == "deterministic in the guide":  # which Pyro takes for a latent
        guide = shifted
    torch.manual_seed(3)
    expected = torch.as_tensor(theirs.differentiable_loss(model, guide, x))
    torch.testing.assert_close(ours, expected)
    leaves = [*loss.parameters()]
    if leaves and expected.requires_grad:
        found = [torch.autograd.grad(value, leaves, allow_unused=True) for value in (ours, expected)]
        torch.testing.assert_close(*found)


def switched(x):
    """A data point's component, and their probability."""
    k = pyro.sample("k", dist.Bernoulli(0.4))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(2 * k - 1, 1.0), obs=x)


def switch(x):
    pyro.sample("k", dist.Bernoulli(logits=pyro.param("logit", torch.tensor(0.3))))


def clusters(x):
    weights = pyro.param("weights", torch.tensor([0.3, 0.7]), constraint=dist.constraints.simplex)
    centers = pyro.sample("centers", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(centers[..., k], 1.0), obs=x)


def centers(x):
    loc = pyro.param("centers_loc", torch.tensor([-1.0, 1.0]))
    pyro.sample("centers", dist.Normal(loc, 0.5).to_event(1))


def penalized(has_rsample):
    def guide(x):
        z = shifted(x)
        pyro.factor("cost", -(z**2) - pyro.param("m", torch.tensor(0.3)) ** 2, has_rsample=has_rsample)

    return guide


def one_by_one(x):
    for i in pyro.plate("data", len(x)):
        pyro.sample(f"x_{i}", dist.Normal(pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0)), 1.0), obs=x[i])


def one_by_one_guide(x):
    for i in pyro.plate("data", len(x)):
        pyro.sample(f"z_{i}", dist.Normal(pyro.param(f"m_{i}", torch.tensor(0.3)), 1.0))


# A model, a guide and the loss of Pyro that they are for.
LOSSES = {
    "score function": (switched, switch, Trace_ELBO(2)),
    "score function in a plate": (local, lambda x: local_guide(x), Trace_ELBO()),
    "enumerated model": (clusters, centers, TraceEnum_ELBO(max_plate_nesting=1)),
    "enumerated guide": (switched, config_enumerate(switch), TraceEnum_ELBO(max_plate_nesting=1)),
    "enumerated one by one": (
        switched, config_enumerate(switch, default="sequential"), TraceEnum_ELBO(max_plate_nesting=1)
    ),
    "particles": (latent_mean, shifted, Trace_ELBO(3)),
    "particles at once": (latent_mean, shifted, Trace_ELBO(3, max_plate_nesting=1, vectorize_particles=True)),
    "particles of closed forms": (chain, chain_guide, TraceMeanField_ELBO(2)),
    "importance weights": (latent_mean, shifted, RenyiELBO(0.0, 3)),
    "importance weights of data": (of_data, of_data_guide, RenyiELBO(0.0, 3)),
    "importance weights of data and a common latent": (partly_common, partly_common_guide, RenyiELBO(0.0, 3)),
    "a factor of the guide": (latent_mean, penalized(True), Trace_ELBO()),
    "a factor without a path": (latent_mean, penalized(False), Trace_ELBO()),
    "a sequential plate": (one_by_one, one_by_one_guide, Trace_ELBO()),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_a_compiled_pair_has_the_loss_and_gradient_of_its_elbo(float64, name):
    pyro.clear_param_store()
    model, guide, theirs = LOSSES[name]
    x = torch.tensor([0.5, -0.2, 1.0])
    objective = dgm.IWAE(theirs.num_particles) if isinstance(theirs, RenyiELBO) else theirs
    loss = compilation.PairLoss(model, guide, compilation._pyro_elbo(objective), backend="eager")
    loss(x)
    torch.manual_seed(3)
    ours = loss(x)
    gradients = torch.autograd.grad(ours, [*loss.parameters()])
    torch.manual_seed(3)
    expected = theirs.loss_and_grads(model, guide, x)
    assert ours.item() == pytest.approx(expected, rel=1e-9)
    for leaf, gradient in zip(loss.parameters(), gradients, strict=True):
        torch.testing.assert_close(gradient, leaf.grad, rtol=1e-9, atol=1e-9)


def test_what_importance_weights_do_not_take_is_refused_by_the_site():
    x = torch.tensor([0.5, -0.2, 1.0])
    for model, guide, message in (
        (switched, switch, "need 'k' to be reparameterized"),
        (poutine.scale(latent_mean, 2.0), poutine.scale(shifted, 2.0), "'z' is scaled"),
    ):
        with pytest.raises(CompilationError, match=message):
            dgm.compile((model, guide), dgm.IWAE(2))(x)


def straight_through(x):
    """What the graph would differentiate is the rounding, not what Pyro takes for its gradient."""
    temperature = torch.tensor(0.5)
    pyro.sample("z", dist.RelaxedBernoulliStraightThrough(temperature, logits=pyro.param("logit", torch.tensor(0.3))))


def named_by_draws(x):
    for i in pyro.plate("rows", len(x), subsample_size=2):
        pyro.sample(f"x_{i}", dist.Normal(0.0, 1.0), obs=x[i])


def anew(number):
    return lambda x: latent_mean(x, likelihood=lambda z: dist.Normal(z + number(), 1.0))


@pytest.mark.parametrize(
    ("model", "guide", "message"),
    [
        (
            lambda x: pyro.sample("z", dist.Normal(torch.zeros(2, 1), 1.0).to_event(2)),
            lambda x: pyro.sample("z", dist.Normal(pyro.param("q", torch.zeros(1, 2)), 1.0).to_event(2)),
            "shapes disagree at site 'z'",
        ),
        (
            lambda x: pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1)),
            lambda x: pyro.sample("z", dist.Normal(pyro.param("q", torch.zeros(3)), 1.0)),
            "event_dims disagree at site 'z'",
        ),
        (lambda x: pyro.sample("x", dist.Normal(shifted(x), 1.0).expand([3]), obs=x), shifted, 'site "x", invalid'),
        (
            latent_mean,
            lambda x: pyro.sample(
                "z", dist.Normal(pyro.param("m", torch.tensor(0.3)), 1.0), infer={"enumerate": "parallel"}
            ),
            "z If you want to enumerate sites, you need to use TraceEnum_ELBO",
        ),
        (lambda x: latent_mean(x, likelihood=lambda z: dist.LogNormal(z, 1.0)), shifted, "log_prob at site 'x'"),
        (latent_mean, lambda x: (shifted(x), pyro.sample("w", dist.Normal(0.0, 1.0))), "'w'"),
        (latent_mean, straight_through, "QuantizeBernoulli is a torch.autograd.Function, whose backward pass"),
        (
            lambda x: latent_mean(x) or named_by_draws(x),
            shifted,
            "'x_.*' is stated in this run alone",
        ),
        (anew(random.random), shifted, "drawn from Python's random"),
        (anew(np.random.rand), shifted, "drawn from numpy.random"),
    ],
)
def test_a_pair_that_pyro_refuses_is_refused_by_the_site(model, guide, message):
    loss = compilation.PairLoss(model, guide, Trace_ELBO(), backend="eager")
    with pytest.raises(CompilationError, match=message):
        loss(torch.tensor([0.5, -0.2, 1.0]))


def test_a_pair_reads_the_param_store_as_it_is():
    """Cleared, filled anew, and with parameters that only some arguments ask for."""

    def guide(x, wide):
        shifted(x, pyro.param("scale", torch.tensor(2.0)) if wide is True else 1.0)

    def model(x, wide):
        latent_mean(x)

    x = torch.tensor([0.5, -0.2, 1.0])
    loss = compilation.PairLoss(model, guide, Trace_ELBO(), backend="eager")

    def check(wide):
        torch.manual_seed(1)
        ours = loss(x, wide)
        torch.manual_seed(1)
        torch.testing.assert_close(ours, Trace_ELBO().differentiable_loss(model, guide, x, wide))

    for wide in (True, 1, False, True):  # True and 1 are equal, but not to this guide
        check(wide)
    assert dict(loss.named_parameters()).keys() == {"m", "scale"}
    pyro.clear_param_store()
    check(True)
    pyro.clear_param_store()
    pyro.param("m", torch.tensor(3.0))
    check(False)


def test_a_pair_is_trained_in_the_param_store(float64):
    pyro.clear_param_store()
    torch.manual_seed(0)
    model, guide = functions()
    x = 2 + torch.randn(64, 2)
    loss = compilation.PairLoss(model, guide, TraceMeanField_ELBO(), backend="eager")
    with pytest.raises(RuntimeError, match="call the loss first"):
        list(loss.parameters())
    first = loss(x)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        loss(x).backward()
        optimizer.step()
    assert loss(x) < 0.7 * first
    assert pyro.param("scale") != 0.5
    assert Trace_ELBO(64).loss(model, guide, x) < 0.7 * first


def normal_pair(more_of_the_model=lambda: None, more_of_the_guide=lambda: None, latent=None):
    """z ~ N(0, 1), x | z ~ N(z, 1), and further statements."""

    def model(x):
        z = pyro.sample("z", latent or dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0).expand([len(x)]).to_event(1), obs=x)
        more_of_the_model()

    def guide(x):
        shape = pyro.param("m", torch.tensor(0.5))
        pyro.sample("z", dist.Normal(shape, 1.0) if latent is None else dist.Bernoulli(shape))
        more_of_the_guide()

    return model, guide


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (
            normal_pair(latent=dist.Bernoulli(0.5)),
            r"fully repar.* or compile it with dgm.ELBO\(analytic_kl=False",
        ),
        (
            normal_pair(more_of_the_guide=lambda: pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0))),
            "in guide but not model.*'y'",
        ),
        (normal_pair(more_of_the_model=lambda: pyro.sample("u", dist.Normal(0.0, 1.0))), "not guide: {'u'}"),
        (normal_pair(more_of_the_model=lambda: pyro.sample("k", dist.Categorical(torch.ones(3)))), "not guide: {'k'}"),
    ],
)
def test_a_pair_that_its_loss_does_not_take_is_refused_by_the_site(pair, message):
    pyro.clear_param_store()
    with pytest.raises(CompilationError, match=message):
        compilation.PairLoss(*pair, TraceMeanField_ELBO(), backend="eager")(torch.tensor([0.3, -0.1]))


def test_a_pair_takes_keywords_and_structures_and_compiles_anew_for_other_numbers():
    def model(x, scales, *, shift=0.0):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z + shift, scales["x"][0]).expand([len(x)]).to_event(1), obs=x)

    def guide(x, scales, *, shift=0.0):
        pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(0.5)), 1.0))

    loss, x = compilation.PairLoss(model, guide, Trace_ELBO(), backend="eager"), torch.tensor([0.3, -0.1])
    for scale, shift in ((2.0, 0.0), (2.0, 1.5), (3.0, 1.5)):
        torch.manual_seed(0)
        ours = loss(x, {"x": [scale]}, shift=shift)
        torch.manual_seed(0)
        theirs = Trace_ELBO().differentiable_loss(model, guide, x, {"x": [scale]}, shift=shift)
        torch.testing.assert_close(ours, theirs)
    with pytest.raises(TypeError, match="holds a SimpleNamespace, whose changes a graph would miss"):
        loss(x, SimpleNamespace(x=[1.0]))


# -- what cannot be compiled -------------------------------------------------------------------------------------------


class Looking(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 4)

    def forward(self, z):
        if z.sum() > 0:
            return self.linear(z)
        return -self.linear(z)


def test_the_statement_that_prevents_it_is_quoted(capfd):
    program = vae(dgm.Normal(2))
    program.likelihood.network = Looking()
    with pytest.raises(CompilationError, match=r"test_compilation.py:\d+, in forward.*`if z.sum\(\) > 0:`"):
        Loss(program, ELBO())(torch.randn(5, 2))
    assert "def forward" not in capfd.readouterr().err  # what torch prints of the graph that it had


def test_a_guide_that_differentiates_is_quoted():
    program = CASES["vae-semi-amortized"].build()
    with pytest.raises(CompilationError, match=r"guides.py:\d+, in forward.*`raw = raw \+ self.lr \* climb\(raw\)`"):
        Loss(program, ELBO())(CASES["vae-semi-amortized"].draw(program, 4)[0])


@dataclasses.dataclass(frozen=True)
class Stranger:
    """Follows the progress of training in its own way."""

    progress: float = 0.0

    def at(self, progress):
        return Stranger(progress)

    def __call__(self, program, x, given=None, observed=None):
        return ELBO(beta=self.progress)(program, x, given, observed)


@pytest.mark.parametrize("objective", [dgm.DReG(2), dgm.SemiSupervised(), Stranger()], ids=lambda o: type(o).__name__)
def test_objectives_that_no_graph_holds_are_refused(objective):
    with pytest.raises(ValueError, match=f"{type(objective).__name__} cannot be compiled, because it"):
        dgm.compile(vae(dgm.Normal(2)), objective)


def test_other_things_are_refused():
    with pytest.raises(TypeError, match=r"a dgm.Program or a pair \(model, guide\), got Linear"):
        dgm.compile(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"objective is the class IWAE: pass an instance, IWAE\(\)"):
        dgm.compile(vae(dgm.Normal(2)), dgm.IWAE)
    for objective in ("dreg:2", "beta:2"):
        with pytest.raises(ValueError, match=r"compiled with dgm\.ELBO"):
            dgm.compile(functions(), objective)
    with pytest.raises(
        ValueError, match=r"got TraceGraph_ELBO: train it with pyro\.infer\.SVI, or compile it with dgm"
    ):
        dgm.compile(functions(), TraceGraph_ELBO())
    with pytest.raises(ValueError, match=r"x has shape \(5, 3\)"):
        dgm.compile(vae(dgm.Normal(2)))(torch.randn(5, 3))


# -- in training -------------------------------------------------------------------------------------------------------


def histories(case, data, objective=None, **options):
    found = []
    for compile in (False, True):
        program = CASES[case].build()
        settings = {"epochs": 3, "batch_size": 8, "lr": 1e-2, "validation": None, "progress": False}
        history = dgm.fit(program, data, objective, compile=compile, **settings | options)
        assert history.compiled is compile
        found.append((history, program.state_dict()))
    return found


def test_a_compiled_training_is_the_eager_one(float64):
    """By machine code, from the same random numbers, with a last batch of another size."""
    data = CASES["diffusion"].draw(CASES["diffusion"].build(), 27)[0]
    (ours, one), (theirs, other) = histories("diffusion", data, "annealed", ema=0.9)
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-9)
    assert [e.kl for e in ours.epochs] == [pytest.approx(e.kl, rel=1e-9) for e in theirs.epochs]
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-7, atol=1e-9)


@pytest.fixture
def graphs_only(monkeypatch):
    """Compile to the exported graph, without machine code."""
    monkeypatch.setattr(step, "optimized", lambda graph, **options: compilation.optimized(graph, "eager"))


@pytest.mark.parametrize("name", TRAINED)
def test_programs_train_as_they_do_eagerly(float64, graphs_only, name):
    data = data_for(CASES[name], CASES[name].build(), 19)
    (ours, one), (theirs, other) = histories(name, data)
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-7, abs=1e-9)
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=1e-6, atol=1e-8)


def test_a_last_batch_of_one_datum_is_not_what_the_graph_is_made_from(float64, graphs_only):
    data = CASES["vae"].draw(CASES["vae"].build(), 9)[0]
    (ours, one), (theirs, other) = histories("vae", data)
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-9)
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=1e-7, atol=1e-9)


def test_layers_that_set_themselves_up_by_the_first_batch_do(float64, graphs_only):
    def make():
        torch.manual_seed(0)
        return dgm.Flow(3, [dgm.networks.ActNorm(3), dgm.networks.LULinear(3)], dgm.Normal(3))

    data, found = 5 + 3 * torch.randn(20, 3), []
    for compile in (False, True):
        program = make()
        dgm.fit(program, data, epochs=2, batch_size=8, validation=None, progress=False, compile=compile)
        assert program.transforms[0].initialized
        found.append(program.state_dict())
    for key in found[0]:
        torch.testing.assert_close(found[0][key], found[1][key])


def test_a_graph_on_a_cpu_compiles_as_one_file_of_kernels_and_one_that_calls_them(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda graph, options, **_: asked.append(options) or graph)
    dgm.compile(vae(dgm.Normal(2)))(torch.randn(4, 2))
    assert asked[0]["cpp_wrapper"]
    assert asked[0]["cpp_wrapper_build_separate"]
    elsewhere = compilation.export(torch.nn.Linear(2, 2, device="meta"), (torch.ones(4, 2, device="meta"),))
    compilation.optimized(elsewhere)
    assert not asked[1]["cpp_wrapper"]


def test_long_trainings_are_compiled_by_themselves_and_short_ones_not(monkeypatch, graphs_only):
    program = vae(dgm.Normal(2))
    options = {"epochs": 2, "batch_size": 5, "progress": False, "validation": None}
    assert not dgm.fit(program, torch.randn(20, 2), **options).compiled
    monkeypatch.setattr(training, "COMPILE_FROM", 8)
    assert dgm.fit(program, torch.randn(20, 2), **options).compiled
    assert not dgm.fit(program, torch.randn(20, 2), compile=False, **options).compiled
    assert not dgm.fit(program, torch.randn(15, 2), **options).compiled


def test_what_cannot_be_compiled_goes_on_without_unless_it_was_asked_for(monkeypatch, graphs_only):
    monkeypatch.setattr(training, "COMPILE_FROM", 1)
    program = vae(dgm.Normal(2))
    program.likelihood.network = Looking()
    options = {"epochs": 2, "batch_size": 5, "progress": False, "validation": None}
    with pytest.warns(UserWarning, match=r"continues uncompiled: .*`if z.sum") as warned:
        history = dgm.fit(program, torch.randn(20, 2), **options)
    assert {each.filename for each in warned} == {__file__}, "it names the caller's line"
    assert not history.compiled
    assert all(map(math.isfinite, history.losses))
    with pytest.raises(CompilationError, match=r"`if z\.sum"):
        dgm.fit(program, torch.randn(20, 2), compile=True, **options)
    with pytest.raises(ValueError, match="Trace_ELBO has its own backward pass"):
        dgm.fit(program, torch.randn(20, 2), Trace_ELBO(), compile=True, **options)
    assert not dgm.fit(program, torch.randn(20, 2), Trace_ELBO(), **options).compiled


def test_a_schedule_of_your_own_is_followed(float64, graphs_only):
    seen = []

    def schedule(progress):
        seen.append(progress)
        return WarmUp(1.0)(progress)

    data = CASES["vae"].draw(CASES["vae"].build(), 24)[0]
    (ours, _), (theirs, _) = histories("vae", data, ELBO(beta=schedule))
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-9)
    assert {0.0, 1.0} <= set(seen)


# -- devices -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*TRAINED, "continuous-diffusion", "columns-vae", "vae-quantized"])
def test_no_graph_has_a_tensor_on_another_device(name):
    """Tensors of the device "meta" have no numbers, and no graph needs them. The compiler of a GPU refuses others."""
    program = CASES[name].build().train()
    x, given = CASES[name].draw(program, 4)
    loss_and_gradients(eager(program, ELBO()), program, x, given)
    terms = compilation.Terms(program.to("meta"), ELBO())
    arguments = pytree.tree_map_only(torch.Tensor, lambda leaf: leaf.to("meta"), (x, given, {}, terms.weights(1.0)))
    for node in compilation.export(terms, arguments).graph.nodes:
        value = node.meta.get("val")
        assert not isinstance(value, torch.Tensor) or value.device.type == "meta" or not node.users, node


def test_numbers_written_on_the_cpu_move_to_the_device_of_the_arguments():
    class Numbers(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.constant = nn.Parameter(torch.ones(3)), torch.tensor(0.5)

        def forward(self, x):
            return (self.weight * x + self.constant * torch.tensor(2.0) + torch.zeros(()) + torch.full((), 3.0)).sum()

    graph = compilation.export(Numbers(), (torch.ones(4, 3),))
    assert graph(torch.ones(2, 3)) == 2 * 3 * 5
    graph = compilation.export(Numbers().to("meta"), (torch.ones(4, 3, device="meta"),))
    made = [node.kwargs["device"] for node in graph.graph.nodes if "device" in node.kwargs]
    kept = [getattr(graph, node.target).device for node in graph.graph.find_nodes(op="get_attr")]
    assert {device.type for device in (*made, *kept)} == {"meta"}
    assert (len(made), len(kept)) == (2, 3)


# -- precision ---------------------------------------------------------------------------------------------------------

BF16 = {"rtol": 3e-2, "atol": 3e-2}  # a few roundings to 8 bits


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in NETWORKS else pytest.mark.nightly) for name in CASES if name not in NOT],
)
def test_the_graph_in_bf16_is_the_loss_in_bf16(name):
    """The same operations in the same precision, so to the rounding of float32, a thousandth of that of bf16."""
    program = CASES[name].build().train()
    loss_and_gradients(eager(program, ELBO()), program, *CASES[name].draw(program, 4))
    loss = Loss(program, ELBO(), backend="eager")
    with networks_in(torch.bfloat16):
        loss_and_gradients(loss, program, *CASES[name].draw(program, 4))
    twin = copy.deepcopy(program)
    x, given = CASES[name].draw(program, 7, seed=2)
    ours = loss_and_gradients(loss, program, x, given)  # the precision is part of the graph
    with networks_in(torch.bfloat16):
        theirs = loss_and_gradients(eager(twin, ELBO()), twin, x, given)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_networks_run_in_bf16_and_densities_in_float32(name):
    """What no network computed is what it is without: a matrix product in a density is not rounded to 8 bits."""
    program = CASES[name].build().train()
    x, given = CASES[name].draw(program, 4)
    loss_and_gradients(eager(program, ELBO()), program, x, given)
    twin, seen = copy.deepcopy(program), set()
    for layer in program.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            layer.register_forward_hook(lambda layer, inputs, out: seen.add(out.dtype))
    with networks_in(torch.bfloat16), pyro.validation_enabled(False):
        lowered = loss_and_gradients(eager(program, ELBO()), program, x, given)
        for trace in traces(program, x, given):
            for site in sample_sites(trace):
                node = trace.nodes[site]
                assert node["fn"].log_prob(node["value"]).dtype == torch.float32, site
    assert seen <= {torch.bfloat16}
    full = loss_and_gradients(eager(twin, ELBO()), twin, x, given)
    if name in WITHOUT_NETWORKS:
        assert_equal(lowered, full)
    else:
        torch.testing.assert_close(lowered[0], full[0], **BF16)


@pytest.mark.parametrize("name", ["vae-categorical-latent", "realnvp", "dequantized"])
def test_a_training_in_bf16_is_the_same_compiled(graphs_only, name):
    data = data_for(CASES[name], CASES[name].build(), 19)
    (ours, one), (theirs, other) = histories(name, data, precision="bf16")
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-5)
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=1e-3, atol=1e-4)


# Not diffusion-unet: in bf16 its gradients through GroupNorm are rounded by more than the tolerance, eager ones too.
NIGHTLY_IN_BF16 = ("realnvp", "pixelcnn", "pixelvae", "deep-vae", "vae-quantized")


@pytest.mark.parametrize("name", ["made", *(pytest.param(name, marks=pytest.mark.nightly) for name in NIGHTLY_IN_BF16)])
def test_so_is_the_machine_code_in_bf16(name):
    program = CASES[name].build().train()
    loss = dgm.compile(program)
    for size in (4, 7):  # the second time for every number of data
        x, given = CASES[name].draw(program, size)
        with networks_in(torch.bfloat16):
            ours = loss_and_gradients(loss, program, x, given)
            theirs = loss_and_gradients(eager(program, ELBO()), program, x, given)
        torch.testing.assert_close(ours, theirs, **BF16)


@pytest.mark.parametrize("context", [torch.autocast("cpu", torch.bfloat16), torch.no_grad()])
def test_constants_and_draws_of_a_region_are_those_of_a_graph(context):
    class Noisy(nn.Module):
        def forward(self, x):
            with context:
                return x * torch.full((), 0.5) + torch.zeros(()) + torch.empty(3, 4, device=x.device).normal_()

    graph = compilation.export(Noisy(), (torch.randn(3, 4, device="meta"),), dynamic=False)
    nodes = [node for part in compilation._graphs_in(graph) for node in part.graph.nodes]
    made = [node for node in nodes if node.target in (torch.ops.aten.full.default, torch.ops.aten.zeros.default)]
    assert [node.kwargs["device"].type for node in made] == ["meta", "meta"]
    assert {str(node.target) for node in nodes} >= {"aten.randn.default"}
    assert "aten.normal_.default" not in {str(node.target) for node in nodes}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other processors have one instruction set")
def test_the_compiler_tries_no_instruction_set_after_the_first_valid_one(monkeypatch):
    tried = []

    class Vectors:
        def __init__(self, name, valid):
            self.name, self.valid = name, valid

        def __str__(self):
            return ""  # needs nothing of the processor

        def __bool__(self):
            tried.append(self.name)
            return self.valid

    sets = [Vectors("wide", False), Vectors("middle", True), Vectors("narrow", True)]
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    monkeypatch.setattr(cpu_vec_isa, "supported_vec_isa_list", sets)
    monkeypatch.setattr(cpu_vec_isa, "valid_vec_isa_list", cpu_vec_isa.valid_vec_isa_list)
    compilation._try_one_instruction_set.__wrapped__()
    assert cpu_vec_isa.pick_vec_isa() is sets[1]
    assert tried == ["wide", "middle"]


DRAWS = {
    "randn_like": torch.randn_like,
    "rand_like": torch.rand_like,
    "randint_like": lambda x: torch.randint_like(x, 9),
    "exponential_": lambda x: torch.zeros_like(x).exponential_(),
    "uniform_": lambda x: torch.zeros_like(x).uniform_(),
    "normal_": lambda x: torch.zeros_like(x).normal_(),
    "log_normal_": lambda x: torch.zeros_like(x).log_normal_(),
    "bernoulli": lambda x: torch.bernoulli(x.sigmoid()),
    "bernoulli by columns": lambda x: torch.bernoulli(x.sigmoid().T.contiguous().T),
    "bernoulli_": lambda x: torch.zeros_like(x).bernoulli_(0.5),
    "dropout": lambda x: F.dropout(torch.ones_like(x)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_calls_are_two_draws_in_machine_code(dtype):
    """The compiler joins equal operations of a graph with gradients; two draws are not equal."""

    def model(x):
        scale = pyro.param("scale", torch.tensor(2.0, dtype=dtype))
        pairs = [(draw(x), draw(x)) for draw in DRAWS.values()]
        pyro.factor("differences", torch.stack([scale * (one - other) for one, other in pairs]).abs().sum((1, 2)) @ w)

    x, w = torch.randn(64, 3, dtype=dtype), torch.linspace(1, 2, len(DRAWS), dtype=dtype)
    loss = dgm.compile((model, lambda x: None))
    torch.manual_seed(1)
    expected = pyro.infer.Trace_ELBO().differentiable_loss(model, lambda x: None, x)
    torch.manual_seed(1)
    torch.testing.assert_close(loss(x), expected)


READS = {  # whose gradients add up at the places that are read
    "interpolate": lambda h: F.interpolate(h, scale_factor=2, mode="nearest"),
    "index_select": lambda h: h.index_select(2, torch.tensor([0, 0, 1, 3])),
    "max": lambda h: h.max(2, keepdim=True)[0].expand_as(h),
    "sort": lambda h: h.sort(2)[0],
}


class Reading(nn.Module):
    """A residual block, a read of its result at some places, and a block that takes this in float32 and in bf16."""

    in_shape = torch.Size((4, 4, 4))

    def __init__(self, read):
        super().__init__()
        self.read, self.out_shape = read, torch.Size((1, *read(torch.zeros(1, 1, 4, 4))[0].shape))
        self.low, self.high, self.last = (nn.Conv2d(4, out, 3, padding=1) for out in (4, 4, 1))

    def forward(self, h):
        h = self.read(h + self.low(h))
        return self.last(h + self.high(F.silu(h))).unsqueeze(1)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.nightly if name in ("max", "sort") else ()) for name in READS]
)
def test_machine_code_in_bf16_has_the_gradient_of_what_is_read_at_some_places(name):
    """It is written in several turns, and torch 2.13 by itself lets another kernel read it before the last one."""
    torch.manual_seed(0)
    network = Reading(READS[name])
    program = dgm.Bernoulli(network.out_shape[1:], network)
    loss, data = dgm.compile(program), (torch.randint(2, (5, *network.out_shape[1:])), torch.randn(5, 4, 4, 4))
    with networks_in(torch.bfloat16):
        ours = loss_and_gradients(loss, program, *data)
        theirs = loss_and_gradients(eager(program, ELBO()), program, *data)
    torch.testing.assert_close(ours, theirs, **BF16)


def test_an_operation_that_fixes_the_number_of_data_is_told():
    class Rows(nn.Module):
        in_shape, out_shape = torch.Size((2,)), torch.Size((1, 1))

        def forward(self, h):
            return h.take_along_dim(torch.tensor([[0]]), 1)[:, None]

    with pytest.raises(CompilationError, match="fixes the number of data: write it for any number"):
        dgm.compile(dgm.Bernoulli(1, Rows()))(torch.ones(4, 1), torch.randn(4, 2))


class Frozen(nn.Module):
    """A network whose features have no gradient."""

    in_shape, out_shape = torch.Size((2,)), torch.Size((1,))

    def __init__(self):
        super().__init__()
        self.features, self.last = nn.Linear(2, 3), nn.Linear(3, 1)

    def forward(self, h):
        with torch.no_grad():
            features = self.features(h).tanh() * h.shape[0]
        return self.last(features)


def test_machine_code_has_parts_without_gradients(float64):
    program = dgm.Bernoulli(1, Frozen())
    loss = dgm.compile(program)
    for size in (4, 7):
        x, given = torch.randint(2, (size, 1)), torch.randn(size, 2)
        assert_equal(
            loss_and_gradients(loss, program, x, given), loss_and_gradients(eager(program, ELBO()), program, x, given)
        )


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_convolutions_in_bf16_on_a_cpu_take_channels_last(precision):
    network = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.Unflatten(1, (2, 2)), nn.Conv3d(2, 2, 3, padding=1), nn.Flatten()
    )
    program = dgm.Normal((2, 4, 4), network, given_shape=(2, 4, 4))
    data = dgm.Data(torch.randn(8, 2, 4, 4), given=torch.randn(8, 2, 4, 4))
    dgm.fit(program, data, gradient_steps=1, precision=precision, validation=None, progress=False, device="cpu")
    assert network[0].weight.is_contiguous(memory_format=torch.channels_last) == (precision == "bf16")
    assert network[2].weight.is_contiguous()


@pytest.mark.parametrize(
    ("found", "slow"),
    [
        ({"architecture": "x86_64", "amx_bf16": False, "avx512_bf16": False}, True),
        ({"architecture": "x86_64", "amx_bf16": False, "avx512_bf16": True}, False),
        ({"architecture": "aarch64"}, False),
    ],
)
def test_a_processor_without_bf16_is_said_to_be_slow(monkeypatch, found, slow):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    options = {"gradient_steps": 1, "validation": None, "progress": False, "device": "cpu"}
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        dgm.fit(dgm.Normal(2, learned=True), torch.ones(4, 2), precision="bf16", **options)
        dgm.fit(dgm.Normal(2, learned=True), torch.ones(4, 2), **options)
    assert [str(each.message).split(":")[-1] for each in raised] == [" use precision='float32'"] * slow
    assert all(each.filename == __file__ for each in raised)


@pytest.mark.parametrize(
    ("model", "shape", "options"), [("vae", (64,), {"latent_size": 4, "hidden": (32,)}), ("pixelcnn", (1, 8, 8), {})]
)
def test_bf16_trains_to_about_the_same_loss_with_full_precision_weights(model, shape, options):
    torch.manual_seed(0)
    data = (torch.rand(256, 64) < torch.linspace(0.05, 0.95, 64)).to(torch.uint8).reshape(-1, *shape)
    losses = {}
    for kind in ("float32", "bf16"):
        torch.manual_seed(1)
        program = dgm.build(model, dgm.Data(data, levels=2), **options)
        history = dgm.fit(program, data, epochs=8, precision=kind, validation=None, progress=False, device="cpu")
        losses[kind] = history.losses[-1]
        assert all(p.dtype == torch.float32 for p in program.parameters())
    assert losses["bf16"] != losses["float32"]
    assert losses["bf16"] == pytest.approx(losses["float32"], rel=5e-3)


@pytest.mark.parametrize("options", [{"compile": "yes"}, {"precision": "float16"}, {"compile": None}])
def test_options_are_checked(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} must be"):
        dgm.fit(vae(dgm.Normal(2)), torch.randn(20, 2), **options)
