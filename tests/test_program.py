"""The algebra itself: statements, views, traces, shapes and checks, on programs written for the purpose."""

import gc
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given as hypothesis_given
from hypothesis import strategies as st
from programs import CASES
from pyro import poutine
from pyro.contrib.autoname import scope
from pyro.infer import Trace_ELBO
from torch import nn

import dgm_pyro as dgm
from dgm_pyro.checks import as_shape
from dgm_pyro.objectives import elbo
from dgm_pyro.program import (
    _names,
    call_network,
    latent_sites,
    log_prob_sum,
    plates,
    require_distinct,
    site_sum,
    store_name,
    traces,
)


class Chain(dgm.Program):
    """a -> b -> x, each N(parent, 1); the guide is a mean-field Normal with free locations."""

    event_shape = torch.Size((2,))

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.tensor([0.3, -0.2]))

    def joint(self, name, value=None, given=None):
        a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        b = pyro.sample("b", dist.Normal(a, 1.0).to_event(1))
        return pyro.sample(name, dist.Normal(b, 1.0).to_event(1), obs=value)

    def posterior(self, name, value, given=None):
        b = pyro.sample("b", dist.Normal(value / 2 + self.shift, 1.0).to_event(1))
        pyro.sample("a", dist.Normal(b / 2, 1.0).to_event(1))

    def latents(self, name):
        return ("a", "b")


# -- statements and views ----------------------------------------------------------------------------------------------


def test_a_program_must_state_its_joint():
    class Empty(dgm.Program):
        event_shape = torch.Size((2,))

    with pytest.raises(NotImplementedError, match=r"Empty must define joint\(name, value=None, given=None\)"):
        Empty().sample(2)

    class NoForward(dgm.Conditional):
        event_shape = torch.Size((2,))

    with pytest.raises(NotImplementedError, match=r"NoForward must define forward\(given=None\)"):
        NoForward().sample(2)


def test_the_model_observes_data_or_draws_as_many_as_asked_for():
    program, x = Chain(), torch.randn(4, 2)
    observed = poutine.trace(program.model).get_trace(x)
    assert observed.nodes["x"]["is_observed"]
    assert observed.nodes["_RETURN"]["value"] is x
    drawn = poutine.trace(program.model).get_trace(4)
    assert not drawn.nodes["x"]["is_observed"]
    assert drawn.nodes["_RETURN"]["value"].shape == (4, 2)
    for trace in (observed, drawn):
        frames = trace.nodes["x"]["cond_indep_stack"]
        assert [(frame.name, frame.dim, frame.size) for frame in frames] == [("data", -1, 4)]


def test_views_are_modules_that_register_the_parameters_once():
    program = Chain()
    for view in (program.model, program.guide):
        assert isinstance(view, nn.Module)
        assert [id(p) for p in view.parameters()] == [id(program.shift)]
        trace = poutine.trace(view).get_trace(torch.zeros(3, 2))
        assert [node["name"] for node in trace.nodes.values() if node["type"] == "param"] == [
            f"{store_name(program)}$$$shift"
        ]


def test_names_in_the_store_are_one_per_instance_and_do_not_keep_it_alive():
    first, second = Chain(), Chain()
    names = {store_name(first), store_name(second), store_name(first)}
    assert len(names) == 2
    count = len(_names)
    del first
    gc.collect()
    assert len(_names) == count - 1


def test_a_view_of_the_same_program_is_as_good_as_another():
    program, x = Chain(), torch.randn(3, 2)
    model, guide = program.model, program.guide
    pyro.set_rng_seed(0)
    first = Trace_ELBO().loss(model, guide, x)
    pyro.set_rng_seed(0)
    assert Trace_ELBO().loss(program.model, program.guide, x) == first


def test_the_variable_may_have_another_name():
    class Labels(dgm.Categorical):
        variable = "y"

    program = Labels((), 3)
    assert "y" in poutine.trace(program.model).get_trace(5).nodes
    assert program.sample(4).shape == (4,)


def test_validation_can_be_switched_off_for_speed_but_shapes_are_always_checked():
    program = dgm.Normal(2, learned=True)
    bad = torch.full((3, 2), math.nan)
    with pytest.raises(ValueError, match="NaN"):
        program.model(bad)
    with pyro.validation_enabled(False):
        program.model(bad)
        with pytest.raises(ValueError, match="event_shape"):
            program.model(torch.zeros(3, 3))


# -- traces and weights ------------------------------------------------------------------------------------------------


def test_log_weights_by_hand(float64):
    """log p(a) + log p(b | a) + log p(x | b) - log q(b | x) - log q(a | b) at the guide's own draws."""
    program, x = Chain(), torch.randn(3, 2)
    model, guide = traces(program, x, batch=(5, 3))
    a, b = (guide.nodes[name]["value"] for name in "ab")
    assert a.shape == b.shape == (5, 3, 2)
    normal = lambda value, loc: dist.Normal(loc, 1.0).log_prob(value).sum(-1)  # noqa: E731
    log_p = normal(a, torch.zeros(2)) + normal(b, a) + normal(x, b)
    log_q = normal(b, x / 2 + program.shift) + normal(a, b / 2)
    torch.testing.assert_close(log_prob_sum(model, (5, 3)), log_p)
    torch.testing.assert_close(log_prob_sum(guide, (5, 3)), log_q)
    pyro.set_rng_seed(1)
    weights = program.log_weights(x, num_particles=5)
    pyro.set_rng_seed(1)
    model, guide = traces(program, x, batch=(5, 3))
    torch.testing.assert_close(weights, log_prob_sum(model, (5, 3)) - log_prob_sum(guide, (5, 3)))


def test_observed_latents_leave_the_guide(float64):
    """With a observed, the bound is on log p(x, a): a is scored by the model only."""
    program, x = Chain(), torch.randn(3, 2)
    a = torch.randn(3, 2)
    model, guide = traces(program, x, observed={"a": a})
    assert latent_sites(guide) == ["b"]
    assert torch.equal(model.nodes["a"]["value"], a)
    assert model.nodes["a"]["is_observed"]
    b = guide.nodes["b"]["value"]
    expected = sum(
        dist.Normal(loc, 1.0).log_prob(value).sum(-1) for value, loc in ((a, torch.zeros(2)), (b, a), (x, b))
    )
    torch.testing.assert_close(log_prob_sum(model, (3,)), expected)


def test_scales_masks_and_inner_plates_are_part_of_the_score(float64):
    """A site in a plate left of the data is summed over it; poutine.scale and mask weigh as in Pyro."""
    x = torch.randn(4)
    times = torch.randn(6, 1)

    def joint():
        with pyro.plate("time", 6, dim=-2):
            pyro.sample("steps", dist.Normal(times, 1.0), obs=x.expand(6, 4))
        with poutine.scale(scale=3.0):
            pyro.sample("scaled", dist.Normal(0.0, 1.0), obs=x)
        with poutine.mask(mask=torch.tensor([True, False, True, True])):
            pyro.sample("masked", dist.Normal(0.0, 1.0), obs=x)
        pyro.factor("cost", -x.abs())

    with poutine.trace() as traced, plates((4,)):
        joint()
    normal = dist.Normal(0.0, 1.0).log_prob(x)
    expected = dist.Normal(times, 1.0).log_prob(x).sum(0) + 3 * normal - x.abs()
    expected = expected + normal * torch.tensor([1.0, 0.0, 1.0, 1.0])
    torch.testing.assert_close(log_prob_sum(traced.trace, (4,)), expected)


def test_a_constant_site_counts_once_per_datum():
    torch.testing.assert_close(site_sum(torch.tensor(2.0), (3,)), torch.full((3,), 2.0))
    torch.testing.assert_close(site_sum(torch.ones(1), (3,)), torch.ones(3))
    torch.testing.assert_close(site_sum(torch.ones(5, 1, 3), (2, 3)), torch.full((2, 3), 5.0))
    assert log_prob_sum(poutine.Trace(), (2, 3)).shape == (2, 3)


def test_plates_are_named_and_placed():
    with poutine.trace() as traced, plates((7, 5, 3)):
        value = pyro.sample("v", dist.Normal(0.0, 1.0))
    assert value.shape == (7, 5, 3)
    frames = {frame.name: frame.dim for frame in traced.trace.nodes["v"]["cond_indep_stack"]}
    assert frames == {"data": -1, "particles": -2, "batch_2": -3}


def test_an_exact_density_inside_a_guide():
    """A guide may ask for log_prob inside the plates of its own program."""

    class Classifier(dgm.Program):
        event_shape = torch.Size((2,))

        def __init__(self):
            super().__init__()
            self.inner = dgm.Normal(2, nn.Embedding(3, 4))

        def joint(self, name, value=None, given=None):
            y = pyro.sample("y", dist.Categorical(torch.ones(3)))
            return self.inner.joint(name, value, y)

        def posterior(self, name, value, given=None):
            labels = torch.arange(3).reshape(3, *(1,) * (value.dim() - 1)).expand(3, *value.shape[:-1])
            logits = self.inner.exact_log_prob(value.expand(3, *value.shape), labels)
            pyro.sample("y", dist.Categorical(logits=logits.movedim(0, -1)))

    program, x = Classifier(), torch.randn(4, 2)
    exact = torch.stack([program.inner.log_prob(x, torch.full((4,), y)) for y in range(3)]).logsumexp(0) - math.log(3)
    for particles in (1, 6):
        torch.testing.assert_close(program.log_weights(x, num_particles=particles), exact.expand(particles, -1))


def test_unguided_latents_are_named():
    class Unguided(Chain):
        def posterior(self, name, value, given=None):
            pyro.sample("b", dist.Normal(value, 1.0).to_event(1))

    with pytest.raises(ValueError, match=r"the model samples 'a', which the guide lacks.*which has 'b'"):
        Unguided().log_weights(torch.zeros(3, 2))


def test_declared_names_guard_the_guide():
    class Misnamed(Chain):
        def posterior(self, name, value, given=None):
            super().posterior(name, value, given)
            pyro.sample("c", dist.Normal(value, 1.0).to_event(1))

    with pytest.raises(ValueError, match=r"guide samples 'c', which the model lacks; the model's latents are 'a', 'b'"):
        Misnamed().guide(torch.zeros(3, 2))


@pytest.mark.parametrize("declares", [True, False])
def test_the_names_of_the_guide_are_checked_as_they_are_stated(declares):
    """Handlers around it may rename the sites, of the model and the guide alike."""

    class Maybe(Chain):
        def latents(self, name):
            return super().latents(name) if declares else None

    program, x = Maybe(), torch.zeros(3, 2)
    with scope(prefix="inner"):
        program.guide(x)
    model, guide = (scope(view, prefix="outer") for view in (program.model, program.guide))
    traced = poutine.trace(guide).get_trace(x)
    assert latent_sites(traced) == ["outer/b", "outer/a"]
    torch.manual_seed(0)
    renamed = Trace_ELBO().loss(model, guide, x)
    torch.manual_seed(0)
    assert Trace_ELBO().loss(program.model, program.guide, x) == pytest.approx(renamed)

    class Misnamed(Maybe):
        def posterior(self, name, value, given=None):
            super().posterior(name, value, given)
            pyro.sample("c", dist.Normal(value, 1.0).to_event(1))

    with pytest.raises(ValueError, match="guide samples 'c', which the model lacks"), scope(prefix="outer"):
        Misnamed().guide(x)


def test_distinct_names():
    require_distinct(("a", "b"), "this program")
    with pytest.raises(ValueError, match="two latents of this program are named 'a', 'b'"):
        require_distinct(("a", "b", "c", "b", "a"), "this program")


# -- networks and shapes -----------------------------------------------------------------------------------------------


@hypothesis_given(
    batch=st.lists(st.integers(1, 3), max_size=3),
    shape=st.lists(st.integers(1, 3), max_size=3),
    singles=st.lists(st.booleans(), min_size=3, max_size=3),
)
def test_networks_see_one_batch_dimension(batch, shape, singles):
    """Any batch shape is folded row by row, a pair broadcasts, and the batch shape comes back."""

    class Sum(nn.Module):
        def forward(self, a, b):
            assert a.shape[1:] == torch.Size(shape)
            assert b.shape[1:] == (2,)
            assert len(a) == len(b)
            return a.reshape(len(a), -1).sum(-1) + b.sum(-1)

    other = [1 if single else size for single, size in zip(singles, batch, strict=False)]
    a, b = torch.randn((*batch, *shape)), torch.randn((*other, 2))
    found, out = call_network(Sum(), (a, b), (torch.Size(shape), torch.Size((2,))))
    assert found == torch.Size(batch)
    expected = a.reshape(*batch, -1).sum(-1) + b.sum(-1)
    torch.testing.assert_close(out.reshape(found), expected.expand(found))


@pytest.mark.parametrize(("shape", "expected"), [(3, (3,)), ((), ()), ([1, 2], (1, 2)), (torch.Size((4,)), (4,))])
def test_shapes(shape, expected):
    assert as_shape(shape) == torch.Size(expected)


@pytest.mark.parametrize("shape", [0, -1, True, 2.0, "3", None, (1, 0), (1, 2.5), ("a",)])
def test_no_shapes(shape):
    with pytest.raises(ValueError, match="event_shape must be a positive int or a tuple of them"):
        as_shape(shape)


def test_scalar_events():
    """event_shape () is no special case: data, samples and labels are (B,)."""
    program = dgm.Normal((), nn.Embedding(3, 2))
    x, y = torch.randn(4), torch.tensor([0, 1, 2, 0])
    assert program.log_prob(x, y).shape == (4,)
    assert program.sample(4, y).shape == (4,)


# -- export ------------------------------------------------------------------------------------------------------------

EXPORTED = (
    *("normal-given-label", "made-given-label", "pixelvae", "realnvp", "nsf", "vae-two-levels"),
    *("diffusion-integers", "labelled-made", "dequantized"),
)


class Loss(nn.Module):
    def __init__(self, program):
        super().__init__()
        self.program = program

    def forward(self, x, given=None):
        if self.program.tractable:
            return self.program.exact_log_prob(x, given)
        return elbo(self.program, x, given).value


@pytest.mark.parametrize("name", EXPORTED)
@pytest.mark.filterwarnings("ignore")  # of torch's exporter about itself
def test_statements_export_for_any_batch_size(name):
    """Pyro's handlers run once, at trace time; what is left is a graph on the same parameters."""
    program = CASES[name].build().eval()
    x, given = CASES[name].draw(program, 6)
    example = (x,) if given is None else (x, given)
    batch = torch.export.Dim("batch", min=2)
    with pyro.validation_enabled(False):
        exported = torch.export.export(
            Loss(program), example, strict=False, dynamic_shapes=tuple({0: batch} for _ in example)
        ).module()
    for size in (6, 3):
        x, given = CASES[name].draw(program, size, seed=size)
        arguments = (x,) if given is None else (x, given)
        pyro.set_rng_seed(0)
        expected = Loss(program)(*arguments)
        pyro.set_rng_seed(0)
        torch.testing.assert_close(exported(*arguments), expected, rtol=1e-4, atol=1e-4)
    assert {id(p) for p in exported.parameters()} <= {id(p) for p in program.parameters()}
