"""The algebra itself: statements, views, traces, shapes and checks, on programs written for the purpose."""

import contextlib
import copy
import gc
import math
import sys
from concurrent.futures import ThreadPoolExecutor

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
from pyro.infer.autoguide import AutoNormal
from torch import nn

import dgm_pyro as dgm
from dgm_pyro import flow
from dgm_pyro.checks import as_shape
from dgm_pyro.objectives import ELBO, elbo
from dgm_pyro.program import (
    _names,
    alone,
    batch_plates,
    call_network,
    check_within,
    latent_sites,
    log_prob_sum,
    map_given,
    require_distinct,
    rows_of,
    site_sum,
    store_name,
    traces,
    unwrapped,
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
    for program in (first, second):
        program.model(torch.zeros(3, 2))
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

    with poutine.trace() as traced, batch_plates((4,)):
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
    with poutine.trace() as traced, batch_plates((7, 5, 3)):
        value = pyro.sample("v", dist.Normal(0.0, 1.0))
    assert value.shape == (7, 5, 3)
    frames = {frame.name: frame.dim for frame in traced.trace.nodes["v"]["cond_indep_stack"]}
    assert frames == {"data": -1, "particles": -2, "batch_2": -3}


class Offset(dgm.Program):
    """Features with a random offset of four parts, in a plate of its own, left of those of a batch."""

    event_shape = torch.Size((3,))

    def __init__(self, plate):
        super().__init__()
        self.plate, self.scale = plate, nn.Parameter(torch.ones(()))

    def _parts(self):
        with pyro.plate(self.plate, 4, dim=-3):
            return pyro.sample("parts", dist.Normal(0.0, 1.0))

    def joint(self, name, value=None, given=None):
        loc = self._parts().sum(0).squeeze(0).unsqueeze(-1)
        return pyro.sample(name, dist.Normal(loc, self.scale.expand(3)).to_event(1), obs=value)

    def posterior(self, name, value, given=None):
        self._parts()

    def latents(self, name):
        return ("parts",)


ASKED = {
    "log_weights": lambda program, x: program.log_weights(x),
    "elbo": lambda program, x: dgm.ELBO()(program, x),
    "sample": lambda program, x: program.sample(5),
    "measure": lambda program, x: program.measure,
    "model": lambda program, x: program.model(x),
    "guide": lambda program, x: program.guide(x),
}


@pytest.mark.parametrize("asked", ASKED)
def test_the_names_of_the_plates_around_statements_are_taken(asked):
    x = torch.randn(5, 3)
    ASKED[asked](Offset("parts_of_offset"), x)
    for name in ("data", "particles"):
        with pytest.raises(
            ValueError, match=f"statements have a plate '{name}', but 'data', 'particles' are the plates"
        ):
            ASKED[asked](Offset(name), x)
        vae = dgm.VAE(dgm.Normal(2), dgm.Normal(3, nn.Linear(2, 6)), dgm.Normal(2, nn.Linear(3, 4)), latent_name=name)
        with pytest.raises(ValueError, match=f"statements have a site '{name}'.*: give the site another name"):
            ASKED[asked](vae, x)


@pytest.mark.parametrize("plate", ["data", "particles", "rows"])
def test_what_is_computed_inside_a_plate_is_what_it_is_outside(plate):
    """Plates of any name and at any dimension around a call are no part of it."""
    flow, vae = dgm.flow.realnvp(3), CASES["vae"].build()
    x, _ = CASES["vae"].draw(vae, 4)

    def numbers():
        torch.manual_seed(0)
        return [
            flow.log_prob(torch.randn(2, 3)),
            vae.log_weights(x, num_particles=2),
            vae.sample(5),
            dgm.ELBO()(vae, x).value,
        ]

    with poutine.trace() as traced, pyro.plate(plate, 7, dim=-1), pyro.plate("more", 2, dim=-2):
        inside = numbers()
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    assert z.shape == (2, 7)
    assert set(traced.trace.nodes) == {plate, "more", "z"}
    for within, outside in zip(inside, numbers(), strict=True):
        assert torch.equal(within, outside)


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
    *("diffusion-integers", "labeled-made", "dequantized"),
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


# -- the support of the data -------------------------------------------------------------------------------------------


class Own(dgm.Conditional):
    """Any univariate family of one positive parameter per feature, or of one that a network computes."""

    def __init__(self, make, features=1, network=None):
        super().__init__()
        self.event_shape, self.make, self.network = torch.Size((features,)), make, network
        self.raw = nn.Parameter(torch.zeros(features))
        self.conditional = network is not None

    def forward(self, given=None):
        return self.make((self.raw if given is None else self.network(given)).exp()).to_event(1)


COUNTS = {
    "poisson": dist.Poisson,
    "negative binomial": lambda a: dist.NegativeBinomial(a, torch.full_like(a, 0.4)),
    "zero-inflated": lambda a: dist.ZeroInflatedPoisson(a, gate=torch.full_like(a, 0.3)),
    "geometric": lambda a: dist.Geometric(a / (1 + a)),
    "binomial": lambda a: dist.Binomial(9, a / (1 + a)),
}


def outside(support):
    """A value that a univariate support, or its last, does not have; NaN where it has every number."""
    support = getattr(support, "cseq", [support])[-1]
    if hasattr(support, "upper_bound"):
        return float(torch.as_tensor(support.upper_bound).max()) + 0.5 * (1 + support.is_discrete)
    if hasattr(support, "lower_bound"):
        return float(support.lower_bound) - 1
    return 2.0 if support.is_discrete else math.nan


@pytest.mark.parametrize("name", CASES)
def test_measure_and_refusal_are_those_of_the_support(name):
    """Every form of a program is a mass where its x is discrete, and refuses what it cannot draw."""
    case = CASES[name]
    program = case.build()
    x, given = case.draw(program, 6)
    before = torch.get_rng_state()
    for form in (program, program.unroll()):
        support = form.support_given(rows_of(given, slice(1)))
        if support is None:
            # Unrolled below a latent, the features of x are stated after it, and x never as a whole.
            assert name in ("pixelvae", "pixelvae-maps", "labeled-made")
            continue
        mixed = "mass of features 2, 4, density of the others"
        expected = mixed if name.startswith("columns") else "mass" if support.is_discrete else "density"
        assert form.measure == form.measure_given(given) == expected
        check_within(x, support, name)
        bad = x.double() if x.is_floating_point() else x.long()
        bad.view(-1)[-1] = outside(unwrapped(support))
        bad = bad.to(x.dtype) if x.is_floating_point() else bad
        with pytest.raises(ValueError, match=r"x holds"):
            form.check(bad, given, support=True)
        if given is not None or form.variable != "x":
            continue
        with pytest.raises(ValueError, match=r"x holds"):
            dgm.evaluate(form, bad)
        with pytest.raises(ValueError, match=r"x holds"):
            dgm.fit(form, bad, epochs=1, validation=None, progress=False)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("make", "good", "bad"),
    [
        *((make, 2.0, 0.5) for make in COUNTS.values()),
        (lambda a: dist.Beta(a, a), 0.5, 1.5),
        (lambda a: dist.Uniform(-a, a), 0.9, 1.1),
        (lambda a: dist.LogNormal(a, 1.0), 2.0, -1.0),
        (lambda a: dist.Pareto(a, 1.0), 1.5, 0.5),
    ],
)
def test_data_outside_the_support_are_refused_by_row_and_value(make, good, bad):
    program, x = Own(make), torch.full((600, 1), good)
    dgm.evaluate(program, x)
    x[523, 0] = bad
    for call in (
        lambda: dgm.evaluate(program, x),
        lambda: dgm.fit(program, x, epochs=1, progress=False),
        lambda: dgm.fit(program, x[:9], validation=x, epochs=1, progress=False),
        lambda: program.log_prob(x),
        lambda: program.log_weights(x),
    ):
        with pytest.raises(
            ValueError, match=rf"x holds {bad:.4g} in row 523, outside of the support of this Own, .*bound="
        ):
            call()
    with pytest.raises(ValueError, match="support"):
        Trace_ELBO().loss(program.model, program.guide, x)


def test_bounds_that_depend_on_given_are_those_of_each_row():
    program = Own(lambda a: dist.Uniform(-a, a), network=nn.Identity())
    given = torch.linspace(0, 3, 600).unsqueeze(-1)
    x = 0.99 * given.exp()
    program.check(x, given, support=True)
    x[412] *= -1.02
    with pytest.raises(ValueError, match="in row 412"):
        program.check(x, given, support=True)


def test_bounds_that_latents_move_are_not_taken_for_those_of_x():
    """x in [-e^z, e^z] may be anything, whatever z is at one draw."""
    likelihood = Own(lambda a: dist.Uniform(-a, a), network=nn.Identity())
    program = dgm.VAE(dgm.Normal(1), likelihood, dgm.Normal(1, nn.Linear(1, 2)))
    assert program.support_given() is None
    dgm.evaluate(program, torch.full((3, 1), 5.0))


def test_the_support_is_found_without_running_a_chain_of_latents():
    vae = CASES["vae-diffusion-prior"].build()
    calls = []
    vae.prior.denoiser.register_forward_hook(lambda *_: calls.append(1))
    assert not vae.support_given().is_discrete
    assert len(calls) <= 1 < vae.prior.num_steps


@pytest.mark.parametrize("make", [flow.nsf, flow.realnvp, flow.maf, flow.nsf_autoregressive])
def test_a_flow_on_the_unit_cube_refuses_what_lies_outside(make):
    program, x = make(2, unit_cube=True, hidden=(6,)), torch.full((20, 2), 1.5)
    for call in (dgm.evaluate, dgm.Program.log_prob, lambda *data: dgm.fit(*data, epochs=1, progress=False)):
        with pytest.raises(ValueError, match=r"x holds 1.5 in row 0, .*Interval"):
            call(program, x)
    assert dgm.evaluate(program, x - 1).nats < math.inf


def test_the_uniform_base_of_a_flow_has_no_mass_outside():
    shifted = dgm.Flow(1, [dist.transforms.AffineTransform(2.0, 1.0)], base=dgm.Uniform(1))
    assert shifted.exact_log_prob(torch.tensor([[2.5], [1.0], [3.5]])).tolist() == [0, -math.inf, -math.inf]


@pytest.mark.parametrize("make", COUNTS.values(), ids=COUNTS)
def test_counts_are_a_mass_and_taken_as_integers(make):
    program, x = Own(make, 2), torch.randint(5, (30, 2))
    reals = x.float()
    expected = program.log_prob(reals).detach()
    torch.testing.assert_close(program.log_prob(x).detach(), expected)
    for data in (x, reals, dgm.Data(x, levels=17), dgm.Data(reals)):
        evidence = dgm.evaluate(program, data)
        assert evidence.measure == program.measure == "mass"
        torch.testing.assert_close(evidence.values, expected.double())
    assert all(math.isfinite(loss) for loss in dgm.fit(program, x, epochs=2, progress=False).losses)
    other = dgm.evaluate(dgm.Categorical(2, 5), x)
    assert math.isfinite(evidence.minus(dgm.evaluate(program, dgm.Data(x, levels=17))).nats)
    assert other.measure == evidence.measure
    with pytest.raises(ValueError, match="base must be a Conditional with a density on reals"):
        dgm.Flow(2, [], base=program)


def test_counts_reach_an_encoder_and_the_measure_needs_no_given_shape():
    """A conditional that leaves its given_shape open, as the likelihood of a VAE and alone."""
    likelihood = Own(dist.Poisson, 2, nn.Linear(1, 2))
    assert likelihood.measure_given(torch.zeros(3, 1)) == "mass"
    vae = dgm.VAE(dgm.Normal(1), likelihood, dgm.Normal(1, nn.Linear(2, 2)))
    assert dgm.evaluate(vae, torch.randint(5, (9, 2))).measure == "mass"


# -- torch.func --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.example.tractable])
@pytest.mark.parametrize("validating", [True, False])
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of attention, mapped by a loop
def test_exact_densities_are_mapped(name, validating):
    """Over data, and over ensembles of parameters: what one at a time gives."""
    program = CASES[name].build().eval()
    x, given = CASES[name].draw(program, 4)
    rows = (x.unsqueeze(1), map_given(lambda part: part.unsqueeze(1), given))
    with pyro.validation_enabled(validating), torch.no_grad():
        in_dims = (0, None if given is None else 0)
        mapped = torch.func.vmap(program.exact_log_prob, in_dims=in_dims)(*rows)
        torch.testing.assert_close(mapped.squeeze(1), program.exact_log_prob(x, given))


def test_what_looks_at_numbers_cannot_be_mapped_and_says_what_can():
    vae = CASES["vae"].build()
    x = torch.randn(4, 1, 2)
    for program, method in ((vae, "log_weights"), (dgm.Normal(2), "log_prob")):
        with pytest.raises(RuntimeError, match=r"mapped by torch.func.vmap.*exact_log_prob.*num_particles"):
            torch.func.vmap(getattr(program, method), randomness="different")(x)


# -- gradients where the caller has switched them off ------------------------------------------------------------------


def vae_of_points():
    torch.manual_seed(0)
    return dgm.VAE(dgm.Normal(1), dgm.Normal(2, nn.Linear(1, 4)), dgm.Normal(1, nn.Linear(2, 2)))


def classes():
    return dgm.Discriminative(dgm.Categorical((), 3, nn.Linear(2, 3)))


POINTS = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
# Made outside of inference mode: what is made inside is refused by torch wherever it meets a gradient.
VAE, FLOW, CLASSES = vae_of_points(), flow.realnvp(2, layers=2, hidden=(4,)), classes()
CONTINUOUS, LINEAR = CASES["continuous-diffusion"].build(), nn.Linear(2, 3)
GRADIENTS = {
    "fit": lambda: torch.tensor(
        dgm.fit(copy.deepcopy(VAE), POINTS, epochs=2, validation=None, progress=False, device="cpu").losses
    ),
    "ais": lambda: dgm.infer.ais(VAE, POINTS, num_temperatures=5).log_evidence,
    "bidirectional": lambda: dgm.infer.bidirectional(VAE, 3, num_temperatures=5).lower,
    "nuts": lambda: dgm.infer.nuts(VAE, POINTS[:2], 3, 3)["z"],
    "gaps": lambda: (
        dgm.infer.gaps(VAE, POINTS, num_particles=5, num_temperatures=0, gradient_steps=3, num_samples=4).best
    ),
    "impute": lambda: dgm.infer.impute(FLOW, POINTS, POINTS > 0, num_temperatures=5),
    "fgsm": lambda: dgm.corruptions.fgsm(CLASSES, POINTS, LABELS, 0.1),
    "pgd": lambda: dgm.corruptions.pgd(CLASSES, POINTS, LABELS, 0.1, gradient_steps=2),
    "bayesian": lambda: torch.tensor(
        dgm.classification.Bayesian(LINEAR, dgm.Data(POINTS, LABELS)).fit(epochs=1, batch_size=3).losses
    ),
    "ode": lambda: CONTINUOUS.ode_log_prob(POINTS),
    "fit_guide": lambda: torch.tensor(dgm.guides.fit_guide(VAE, POINTS, AutoNormal, gradient_steps=3)[1]),
    "density_ratio": lambda: dgm.adversarial.density_ratio(POINTS, POINTS + 1, gradient_steps=3)(POINTS),
    "doctor": lambda: torch.tensor(len(dgm.doctor(VAE, POINTS).findings)),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_what_takes_gradients_switches_them_on(name):
    """Under no_grad the same numbers; under inference_mode, where nothing could, one sentence."""
    found = []
    for mode in (contextlib.nullcontext, torch.no_grad):
        pyro.set_rng_seed(0)
        with mode():
            found.append(GRADIENTS[name]())
            assert torch.is_grad_enabled() == (mode is contextlib.nullcontext)
    torch.testing.assert_close(*found)
    refused = pytest.raises(RuntimeError, match=r"takes gradients, .*under torch.inference_mode\(\) can have")
    with refused, torch.inference_mode():
        GRADIENTS[name]()


# -- threads -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hasty():
    """Threads that take turns at nearly every instruction."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def test_threads_get_what_one_thread_gets(hasty):
    """Training, evidence and sampling at once, of programs of their own and of a common one."""
    common, x = vae_of_points(), torch.randn(30, 2)

    def trained(seed):
        program = copy.deepcopy(common)
        dgm.fit(program, x, epochs=2, batch_size=10, seed=seed, progress=False, device="cpu")
        return torch.cat([p.detach().flatten() for p in program.parameters()])

    def drawn(seed):
        assert common.sample(3).shape == (3, 2)
        return FLOW.log_prob(x).detach()

    tasks = [
        (task, seed)
        for seed in range(4)
        for task in (
            trained,
            drawn,
            lambda seed: dgm.evaluate(common, x, seed=seed, num_particles=3).values,
            lambda seed: dgm.infer.ais(common, x[:3], num_chains=2, num_temperatures=3, seed=seed).log_evidence,
        )
    ]
    random = torch.get_rng_state()
    expected = [task(seed) for task, seed in tasks]
    torch.set_rng_state(random)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda pair: pair[0](pair[1]), tasks))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    assert pyro.settings.get("validate_distributions_pyro")
    assert not pyro.get_param_store()


def test_sampling_in_threads(hasty):
    program = dgm.Normal(2)
    with ThreadPoolExecutor(4) as pool:
        assert {x.shape for x in pool.map(lambda _: program.sample(3), range(200))} == {(3, 2)}


def test_a_view_in_a_second_thread_is_refused_while_the_first_is_under_way():
    """Both where a thread is inside our statements, and where it is inside handlers around a view that has run."""
    program, x = dgm.Normal(2, learned=True), torch.zeros(3, 2)

    def elsewhere(call):
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(call).result()

    with alone(), pytest.raises(RuntimeError, match=r"another thread is running Pyro statements.*in one thread"):
        elsewhere(lambda: program.model(x))
    with poutine.trace():
        program.model(x)
        for call in (lambda: program.model(x), lambda: program.sample(3)):
            with pytest.raises(RuntimeError, match="another thread is running Pyro statements"):
                elsewhere(call)
    elsewhere(lambda: program.model(x))


def test_training_within_training_does_not_wait_for_itself():
    inner = []

    def objective(program, x, given=None, observed=None):
        if not inner:
            inner.append(dgm.fit(dgm.Normal(2, learned=True), x.detach(), epochs=1, progress=False))
        return ELBO()(program, x, given, observed)

    dgm.fit(dgm.Normal(2, learned=True), torch.randn(20, 2), objective, epochs=1, validation=None, progress=False)
    assert inner


def test_a_replaced_part_is_of_the_twin_alone(tmp_path):
    vae = dgm.VAE(dgm.Normal(2), dgm.Normal(3, nn.Linear(2, 6)), dgm.Normal(2, nn.Linear(3, 4)))
    other = dgm.Normal(vae.prior.event_shape, learned=True)
    twin = vae.replaced(prior=other)
    assert vae.prior is not other
    assert twin.prior is other
    assert twin.encoder is vae.encoder
    x = vae.sample(4)
    assert torch.equal(dgm.evaluate(twin.replaced(prior=vae.prior), x).values, dgm.evaluate(vae, x).values)
    dgm.save(twin, tmp_path / "twin")
    assert torch.equal(dgm.evaluate(dgm.load(tmp_path / "twin"), x).values, dgm.evaluate(twin, x).values)
    with pytest.raises(ValueError, match="VAE has no part 'guide': it has prior, likelihood, encoder"):
        vae.replaced(guide=other)


@pytest.mark.parametrize("part", ["prior", "likelihood", "encoder"])
def test_a_part_that_does_not_fit_is_refused(part):
    """A twin would sample x of another shape than it says, or fail far from here."""
    vae = CASES["vae"].build()
    with pytest.raises(ValueError, match=rf"{part} has event_shape \(5,\), but the part it replaces has \(2,\)"):
        vae.replaced(**{part: dgm.Normal(5)})
    with pytest.raises(TypeError, match=f"{part} must be a dgm.Program, got int"):
        vae.replaced(**{part: 3})
