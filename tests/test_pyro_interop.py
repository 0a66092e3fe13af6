"""Programs are Pyro programs: plain Pyro works on every one of them, and none of its traps catches a user."""

import copy
import gc
import io
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import CASES, guide_latents, model_latents, once_per_part
from pyro import poutine
from pyro.contrib.autoname import scope
from pyro.infer import (
    MCMC,
    NUTS,
    SVI,
    Predictive,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide import AutoNormal
from torch import nn

import dgm_pyro as dgm
from dgm_pyro.program import latent_sites, store_name

BATCH = 12


@pytest.fixture(params=once_per_part(CASES), name="case")
def _case(request):
    return CASES[request.param]


def mean_loss(program, x, given, guide=None):
    """Negative ELBO in nats, under the same random numbers on every call."""
    elbo = Trace_ELBO(num_particles=20, vectorize_particles=True)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(7)
        return elbo.loss(program.model, program.guide if guide is None else guide, x, given)


def values(program):
    return [parameter.detach().clone() for parameter in program.parameters()]


def changed(program, before):
    return [not torch.equal(a, b) for a, b in zip(values(program), before, strict=True)]


def train_by_svi(program, x, given=None, steps=8, lr=0.02):
    svi = SVI(program.model, program.guide, pyro.optim.Adam({"lr": lr}), Trace_ELBO())
    for _ in range(steps):
        loss = svi.step(x, given)
        assert isinstance(loss, float)
    return svi


# -- inference ---------------------------------------------------------------------------------------------------------


def test_svi_learns(case):
    program = case.build()
    x, given = case.draw(program, BATCH)
    before, loss = values(program), mean_loss(program, x, given)
    train_by_svi(program, x, given)
    if before:
        assert all(
            c
            for c, (n, _) in zip(changed(program, before), program.named_parameters(), strict=True)
            if not n.startswith(case.inert or ("-",))
        )
        assert mean_loss(program, x, given) < loss


def test_an_elbo_module_finds_the_parameters_and_learns(case):
    program = case.build()
    x, given = case.draw(program, BATCH)
    elbo = Trace_ELBO()(program.model, program.guide)
    assert {id(p) for p in elbo.parameters()} == {id(p) for p in program.parameters()}
    if not list(program.parameters()):
        return
    before, loss = values(program), mean_loss(program, x, given)
    optimizer = torch.optim.Adam(elbo.parameters(), lr=0.02)
    for _ in range(8):
        optimizer.zero_grad()
        elbo(x, given).backward()
        optimizer.step()
    assert any(changed(program, before))
    assert mean_loss(program, x, given) < loss


def test_particles_estimate_what_log_weights_does(case):
    """Looped and vectorized particles, plated and unrolled chains: one expectation, to within 5 standard errors."""
    program = case.build().eval()
    x, given = case.draw(program, 4)
    with torch.no_grad():
        ours = program.log_weights(x, given, num_particles=512).sum(-1)
        elbo = Trace_ELBO(num_particles=64, vectorize_particles=True)
        pyros = torch.tensor([-elbo.loss(program.model, program.guide, x, given) for _ in range(6)])
        assert torch.isfinite(torch.tensor(Trace_ELBO(num_particles=2).loss(program.model, program.guide, x, given)))
    error = (ours.var() / len(ours) + pyros.var() / len(pyros)).sqrt()
    assert abs(ours.mean() - pyros.mean()) < 5 * error + 1e-5 * abs(ours.mean())


# -- prediction and conditioning ---------------------------------------------------------------------------------------


def assert_stacked(draws, program):
    """Shape (3, BATCH, *event_shape); Predictive keeps a dimension for every plate, of size one outside it."""
    shape = (BATCH, *program.event_shape)
    assert draws.shape[draws.dim() - len(shape) :] == shape
    assert draws.numel() == 3 * torch.Size(shape).numel()


def test_prior_predictive(case):
    """From a number of data or with the data forgotten, one by one or in parallel."""
    program = case.build()
    x, given = case.draw(program, BATCH)
    forgetful = poutine.uncondition(program.model)
    for model, argument, parallel in (
        (program.model, BATCH, True),
        (program.model, BATCH, False),
        (forgetful, x, True),
    ):
        drawn = Predictive(model, num_samples=3, parallel=parallel)(argument, given)
        assert_stacked(drawn[program.variable], program)
        assert not torch.equal(drawn[program.variable].reshape(3, *x.shape).double(), x.double().expand(3, *x.shape))


def test_posterior_predictive(case):
    program = case.build()
    x, given = case.draw(program, BATCH)
    drawn = Predictive(poutine.uncondition(program.model), guide=program.guide, num_samples=3)(x, given)
    assert_stacked(drawn[program.variable], program)
    assert set(guide_latents(program, x, given)) | {program.variable} <= set(drawn)


def test_conditioning_fixes_any_latent(case):
    program = case.build().unroll()
    x, given = case.draw(program, BATCH)
    for name, value in guide_latents(program, x, given).items():
        trace = poutine.trace(poutine.condition(program.model, data={name: value})).get_trace(x, given)
        trace.compute_log_prob()
        assert trace.nodes[name]["is_observed"]
        assert torch.equal(trace.nodes[name]["value"], value)
        assert torch.isfinite(trace.nodes[name]["log_prob_sum"])


def test_the_model_can_be_conditioned_instead_of_called_with_data(case):
    program = case.build().eval()
    x, given = case.draw(program, BATCH)
    latents = guide_latents(program, x, given)
    data = {program.variable: x, **latents}
    pyro.set_rng_seed(0)  # of the times that a diffusion looks at
    called = poutine.trace(poutine.condition(program.model, data=latents)).get_trace(x, given)
    pyro.set_rng_seed(0)
    conditioned = poutine.trace(poutine.condition(program.model, data=data)).get_trace(BATCH, given)
    torch.testing.assert_close(conditioned.log_prob_sum(), called.log_prob_sum())


def has_continuous_latents(program, x, given):
    sites = model_latents(program, x, given).values()
    return bool(sites) and all(not site["fn"].support.is_discrete for site in sites)


def test_autoguides_replace_the_guide(case):
    program = case.build().unroll()
    x, given = case.draw(program, BATCH)
    if not has_continuous_latents(program, x, given):
        return
    guide = AutoNormal(program.model)
    svi = SVI(program.model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    svi.step(x, given)
    assert set(guide(x, given)) == set(guide_latents(program, x, given))
    if case.certain:
        return
    loss = mean_loss(program, x, given, guide)
    for _ in range(8):
        svi.step(x, given)
    assert mean_loss(program, x, given, guide) < loss


def test_models_render(case):
    pytest.importorskip("graphviz")
    program = case.build()
    x, given = case.draw(program, 2)
    source = pyro.render_model(program.model, model_args=(x, given), render_distributions=True, render_params=True)
    for name in (program.variable, *model_latents(program, x, given)):
        assert f"{name} [label={name} " in source.source
    guide_source = pyro.render_model(program.guide, model_args=(x, given)).source
    assert all(name in guide_source for name in guide_latents(program, x, given))


# -- samplers, enumeration, other objectives ---------------------------------------------------------------------------


def linear_gaussian_vae(loading, loc, scale):
    """z ~ N(0, I), x | z ~ N(loading z + loc, diag(scale^2)), with any encoder."""
    features, size = loading.shape
    decoder = nn.Linear(size, 2 * features)
    with torch.no_grad():
        decoder.weight.copy_(torch.cat([loading, torch.zeros_like(loading)]))
        decoder.bias.copy_(torch.cat([loc, torch.log(torch.expm1(scale))]))
    return dgm.VAE(dgm.Normal(size), dgm.Normal(features, decoder), dgm.Normal(size, nn.Linear(features, 2 * size)))


def test_nuts_finds_the_posterior_of_a_linear_gaussian_vae(float64):
    """Conjugate: precision I + L' S^-1 L, mean = covariance L' S^-1 (x - loc)."""
    loading = torch.tensor([[1.0, 0.5], [-0.4, 0.8], [0.3, -0.6]])
    loc, scale = torch.tensor([0.2, -0.1, 0.4]), torch.tensor([0.5, 0.7, 0.6])
    program = linear_gaussian_vae(loading, loc, scale)
    x = torch.randn(2, 3)
    mcmc = MCMC(NUTS(program.model, max_tree_depth=5), num_samples=200, warmup_steps=50, disable_progbar=True)
    mcmc.run(x)
    z = mcmc.get_samples()["z"]
    assert z.shape == (200, 2, 2)
    projected = loading.T / scale**2
    covariance = torch.linalg.inv(torch.eye(2) + projected @ loading)
    mean = (x - loc) @ (covariance @ projected).T
    effective = pyro.ops.stats.effective_sample_size(z.unsqueeze(0), chain_dim=0, sample_dim=1)
    error = (covariance.diagonal() / effective).sqrt()
    assert ((z.mean(0) - mean).abs() < 4.5 * error).all()
    n = effective.min()
    for row in range(2):
        empirical = torch.cov(z[:, row].T)
        variance = covariance.diagonal()
        spread = ((covariance**2 + variance.outer(variance)) / n).sqrt()
        assert ((empirical - covariance).abs() < 4.5 * spread).all()


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("labeled")])
def test_enumeration_sums_labels_out(name):
    """TraceEnum_ELBO with the label enumerated in the guide equals the sum over labels of q(y) times the rest."""
    program = CASES[name].build().eval()
    x, given = CASES[name].draw(program, 4)
    guide = pyro.infer.config_enumerate(program.guide, "parallel")
    elbo = TraceEnum_ELBO(max_plate_nesting=2 if "diffusion" in name else 1, num_particles=1)
    with torch.no_grad():
        if program.tractable:
            enumerated = -elbo.loss(program.model, guide, x, given)
            assert enumerated == pytest.approx(program.log_prob(x).sum().item(), rel=1e-5)
            return
        draws = torch.tensor([-elbo.loss(program.model, guide, x, given) for _ in range(40)])
        ours = program.log_weights(x, given, num_particles=600).sum(-1)
    error = (draws.var() / len(draws) + ours.var() / len(ours)).sqrt()
    assert abs(draws.mean() - ours.mean()) < 4.5 * error


def test_a_discrete_latent_is_summed_out_exactly(float64):
    """Enumerated in the model, the ELBO is log p(x); in the guide, the sum of q(z) (log p(x, z) - log q(z))."""
    program = CASES["vae-categorical-latent"].build()
    x, _ = CASES["vae-categorical-latent"].draw(program, 5)
    z = torch.arange(3).unsqueeze(-1).expand(3, 5)
    log_joint = program.prior().log_prob(z) + program.likelihood(z).log_prob(x)
    log_q = program.encoder(x).log_prob(z)
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    in_model = -elbo.loss(pyro.infer.config_enumerate(program.model, "parallel"), lambda x: None, x)
    assert in_model == pytest.approx(log_joint.logsumexp(0).sum().item(), rel=1e-10)
    in_guide = -elbo.loss(program.model, pyro.infer.config_enumerate(program.guide, "parallel"), x)
    assert in_guide == pytest.approx((log_q.exp() * (log_joint - log_q)).sum().item(), rel=1e-10)


def test_infer_discrete_classifies():
    """Pyro's exact posterior over the label has its mode where Bayes' rule by hand has it."""
    program = CASES["labeled-made"].build()
    x, _ = CASES["labeled-made"].draw(program, 20)
    most_probable = pyro.infer.infer_discrete(
        pyro.infer.config_enumerate(program.model), first_available_dim=-2, temperature=0
    )
    assert torch.equal(poutine.trace(most_probable).get_trace(x).nodes["y"]["value"], program.classify(x))


@pytest.mark.parametrize(
    "elbo",
    [RenyiELBO(alpha=0.5, num_particles=4, vectorize_particles=True), ReweightedWakeSleep(4, vectorize_particles=True)],
    ids=["renyi", "wake-sleep"],
)
def test_importance_weighted_objectives(elbo):
    program = CASES["vae"].build()
    x, _ = CASES["vae"].draw(program, BATCH)
    before = values(program)
    svi = SVI(program.model, program.guide, pyro.optim.Adam({"lr": 0.02}), elbo)
    for _ in range(3):
        svi.step(x)
    assert all(changed(program, before))


# TraceMeanField_ELBO asks for reparameterized latents, stated in one order by model and guide: Pyro says so itself.
@pytest.mark.parametrize(
    ("elbo", "name"),
    [
        *(
            (TraceMeanField_ELBO, name)
            for name in ("normal-given-vector", "vae", "vae-bernoulli", "diffusion-all-times")
        ),
        *(
            (TraceGraph_ELBO, name)
            for name in ("normal-given-vector", "vae", "vae-two-levels", "vae-bit-latent", "diffusion")
        ),
    ],
)
def test_other_objectives_of_pyro(elbo, name):
    program = CASES[name].build()
    x, given = CASES[name].draw(program, BATCH)
    before, loss = values(program), mean_loss(program, x, given)
    svi = SVI(program.model, program.guide, pyro.optim.Adam({"lr": 0.02}), elbo())
    for _ in range(8):
        svi.step(x, given)
    assert all(changed(program, before))
    assert mean_loss(program, x, given) < loss


# -- the param store ---------------------------------------------------------------------------------------------------


def learns(program, x, given=None, **options):
    before = values(program)
    train_by_svi(program, x, given, steps=3, **options)
    return all(changed(program, before))


def test_two_instances_of_one_class_both_learn():
    first, second = CASES["vae"].build(seed=0), CASES["vae"].build(seed=1)
    x, _ = CASES["vae"].draw(first, BATCH)
    assert learns(first, x)
    kept = values(first)
    assert learns(second, x)
    assert store_name(first) != store_name(second)
    assert not any(changed(first, kept))


def test_a_copy_learns_apart_from_its_original():
    program = CASES["vae"].build()
    x, _ = CASES["vae"].draw(program, BATCH)
    assert learns(program, x)
    twin, kept = copy.deepcopy(program), values(program)
    assert learns(twin, x)
    assert not any(changed(program, kept))
    assert store_name(twin) != store_name(program)


def test_training_resumes_in_a_second_svi_and_after_the_store_is_cleared():
    program = CASES["vae"].build()
    x, _ = CASES["vae"].draw(program, BATCH)
    assert learns(program, x)
    assert learns(program, x)
    pyro.clear_param_store()
    assert learns(program, x)


def test_the_store_holds_the_parameters_themselves():
    program = CASES["vae"].build()
    x, _ = CASES["vae"].draw(program, BATCH)
    train_by_svi(program, x, steps=1)
    stored = {pyro.param(name).data_ptr() for name in pyro.get_param_store()}
    assert stored == {parameter.data_ptr() for parameter in program.parameters()}


@pytest.mark.parametrize("after_a_step", [False, True])
def test_a_transposed_parameter_learns(after_a_step):
    """The store keeps a contiguous copy of a parameter that is not contiguous; SVI would train the copy alone."""
    program = dgm.Normal(3, nn.Linear(2, 6))
    x, given = torch.randn(5, 3), torch.randn(5, 2)
    if after_a_step:
        train_by_svi(program, x, given, steps=1)
    program.network.weight = nn.Parameter(torch.randn(2, 6).T)
    value = program.network.weight.detach().clone()
    assert program.log_prob(x, given).shape == (5,)
    assert torch.equal(program.network.weight, value)
    assert learns(program, x, given)


def test_a_layout_of_channels_last_stays_and_learns():
    network = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Flatten())
    network.to(memory_format=torch.channels_last)
    program = dgm.Normal((2, 4, 4), network, given_shape=(2, 4, 4))
    x, given = torch.randn(5, 2, 4, 4), torch.randn(5, 2, 4, 4)
    assert learns(program, x, given)
    for layer in network[:2]:
        assert layer.weight.is_contiguous(memory_format=torch.channels_last)
        assert not layer.weight.is_contiguous()


def test_a_replaced_network_learns():
    program = dgm.Normal(3, nn.Linear(2, 6))
    x, given = torch.randn(5, 3), torch.randn(5, 2)
    assert learns(program, x, given)
    program.network = nn.Linear(2, 6)
    assert learns(program, x, given)


def test_frozen_parameters_stay_and_thaw():
    program = CASES["vae"].build()
    x, _ = CASES["vae"].draw(program, BATCH)
    program.likelihood.requires_grad_(False)
    before = values(program)
    train_by_svi(program, x, steps=3)
    frozen = [name.startswith("likelihood") for name, _ in program.named_parameters()]
    assert changed(program, before) == [not f for f in frozen]
    program.likelihood.requires_grad_(True)
    assert learns(program, x)


def test_parameters_moved_to_another_precision_still_learn():
    program = CASES["vae"].build()
    x, _ = CASES["vae"].draw(program, BATCH)
    assert learns(program, x)
    assert learns(program.double(), x.double())


def test_the_views_share_parameters_and_follow_the_mode():
    program = CASES["vae"].build()
    ids = [id(parameter) for parameter in program.parameters()]
    assert [id(parameter) for parameter in program.model.parameters()] == ids
    assert [id(parameter) for parameter in program.guide.parameters()] == ids
    program.eval()
    assert not program.model.program.training
    assert len({id(p) for p in program.model.parameters()}) == len(ids)


def test_a_program_inside_a_users_own_model():
    """p.joint is a statement like pyro.sample: here it states a prior inside a regression."""
    prior = dgm.Normal(2, learned=True)
    features, y = torch.randn(20, 2), torch.randn(20)

    def model():
        pyro.module("prior", prior)
        weights = prior.joint("weights")
        with pyro.plate("rows", 20):
            pyro.sample("y", dist.Normal(features @ weights, 1.0), obs=y)

    guide = AutoNormal(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    losses = [svi.step() for _ in range(60)]
    assert losses[-1] < losses[0]
    assert latent_sites(poutine.trace(model).get_trace()) == ["weights"]


def trained(program, x, steps=3):
    optimizer = pyro.optim.Adam({"lr": 0.1})
    svi = SVI(program.model, program.guide, optimizer, Trace_ELBO())
    return optimizer, svi, [svi.step(x) for _ in range(steps)]


def test_programs_and_their_parts_pickle_after_a_step():
    """Pyro leaves weak references on parameters, which no pickle holds; reading the store leaves them anew."""
    program, x = CASES["vae"].build(), torch.randn(5, 2)
    train_by_svi(program, x, steps=1)
    assert pickle.loads(pickle.dumps(program.likelihood.network)) is not None
    dict(pyro.get_param_store().items())
    for thing in (program, program.model, {"first": program}):
        torch.save(thing, io.BytesIO())
        again = pickle.loads(pickle.dumps(thing))
    again = again["first"]
    assert not any(changed(again, values(program)))
    assert learns(program, x)
    assert learns(again, x)


def test_a_copy_made_in_the_middle_of_a_step_does_not_end_it():
    class Copying(dgm.Normal):
        def joint(self, name, value=None, given=None):
            copy.copy(self), copy.deepcopy(self), pickle.dumps(self.network)
            return super().joint(name, value, given)

    assert learns(Copying(2, learned=True), torch.randn(5, 2))


def test_what_the_store_has_loaded_reaches_the_program(tmp_path):
    """In a fresh process and a used one; and what the user puts there under the program's names."""
    program, x = CASES["vae"].build(seed=0), torch.randn(5, 2)
    train_by_svi(program, x)
    kept, path = values(program), str(tmp_path / "store")
    pyro.get_param_store().save(path)
    train_by_svi(program, x)
    assert all(changed(program, kept))
    pyro.get_param_store().load(path)
    program.model(x)
    assert not any(changed(program, kept))
    pyro.clear_param_store()
    pyro.get_param_store().load(path)
    fresh = CASES["vae"].build(seed=1)
    assert all(changed(fresh, kept))
    fresh.guide(x)
    assert not any(changed(fresh, kept))
    assert learns(fresh, x)
    pyro.clear_param_store()
    pyro.get_param_store().load(path)
    frozen = CASES["vae"].build(seed=2)
    frozen.likelihood.requires_grad_(False)
    frozen.model(x)
    assert not any(changed(frozen, kept))
    with torch.no_grad():
        next(frozen.likelihood.parameters()).fill_(2.0)
    frozen.model(x)
    assert (next(frozen.likelihood.parameters()) == 2).all()  # taken over once, and the user's from then on
    fresh.model(x)
    name = next(name for name in pyro.get_param_store() if name.startswith(f"{store_name(fresh)}$$$"))
    pyro.get_param_store()[name] = torch.full_like(pyro.param(name), 3.0)
    fresh.model(x)
    assert torch.equal(next(fresh.parameters()), torch.full_like(next(fresh.parameters()), 3.0))
    assert learns(fresh, x)


def test_a_loaded_store_that_does_not_fit_is_refused(tmp_path):
    path = str(tmp_path / "store")
    dgm.Normal(3, nn.Linear(2, 6)).model(torch.zeros(4, 3), torch.zeros(4, 2))
    pyro.get_param_store().save(path)
    pyro.clear_param_store()
    pyro.get_param_store().load(path)
    wider = dgm.Normal(3, nn.Linear(4, 6))
    with pytest.raises(ValueError, match=r"values of another Normal: its network.weight has shape \(6, 2\).*\(6, 4\)"):
        wider.model(torch.zeros(4, 3), torch.zeros(4, 4))
    dgm.Bernoulli(3, learned=True).model(4)  # another class has nothing to do with it
    stored = dgm.Normal(3, nn.Linear(2, 6))
    stored.model(torch.zeros(4, 3), torch.zeros(4, 2))
    wider.model(torch.zeros(4, 3), torch.zeros(4, 4))  # what was brought has been used: this is another program
    name = next(name for name in pyro.get_param_store() if name.startswith(store_name(stored)))
    pyro.get_param_store()[name] = torch.zeros(5)
    with pytest.raises(ValueError, match=r"of shape \(5,\), but the program's has shape"):
        stored.model(torch.zeros(4, 3), torch.zeros(4, 2))


@pytest.mark.parametrize("cleared", [True, False])
def test_an_optimizer_resumes_on_a_program_built_anew(tmp_path, cleared):
    """Beside a baseline that was used first, and where the first program has gone without the store being cleared."""
    x, path = torch.ones(8, 1) * 3, str(tmp_path / "optimizer")
    program = dgm.Normal(1, learned=True)
    optimizer, svi, _ = trained(program, x, 20)
    optimizer.save(path)
    kept = {name: value.clone() for name, value in program.state_dict().items()}
    expected = [svi.step(x) for _ in range(4)]
    del program, optimizer, svi
    gc.collect()
    if cleared:
        pyro.clear_param_store()
    baseline = dgm.Normal(2, learned=True)
    baseline.model(4)
    program = dgm.Normal(1, learned=True)
    program.load_state_dict(kept)
    resumed = pyro.optim.Adam({"lr": 0.1})
    resumed.load(path)
    svi = SVI(program.model, program.guide, resumed, Trace_ELBO())
    assert [svi.step(x) for _ in range(4)] == expected


def test_the_weights_of_a_program_that_has_gone_are_not_those_of_the_next():
    program, x = CASES["vae"].build(seed=0), torch.randn(5, 2)
    train_by_svi(program, x)
    name = store_name(program)
    del program
    gc.collect()
    following = CASES["vae"].build(seed=1)
    kept = values(following)
    following.model(x)
    assert store_name(following) == name
    assert not any(changed(following, kept))
    assert learns(following, x)


def test_equal_programs_in_one_model_stay_apart():
    """Both alive and stated at once, a copy too; after the store is cleared, in another order."""
    first, second = CASES["vae"].build(seed=0), CASES["vae"].build(seed=1)
    third, x = copy.deepcopy(first), torch.randn(5, 2)

    def step(*programs):
        def both(view):
            def statements():
                for i, program in enumerate(programs):
                    scope(getattr(program, view), prefix=str(i))(x)

            return statements

        SVI(both("model"), both("guide"), pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()).step()

    for order in ((first, second, third), (third, first, second)):
        before = [values(program) for program in order]
        step(*order)
        assert all(all(changed(program, old)) for program, old in zip(order, before, strict=True))
        stem = store_name(order[0])
        assert [store_name(program) for program in order] == [stem, f"{stem}_2", f"{stem}_3"]
        assert len(pyro.get_param_store()) == 3 * len(before[0])
        pyro.clear_param_store()


def test_a_program_keeps_its_name_while_it_is_in_the_store():
    first, second = CASES["vae"].build(seed=0), CASES["vae"].build(seed=1)
    x = torch.randn(5, 2)
    for program in (first, second):
        program.model(x)
    name = store_name(second)
    del program, first
    gc.collect()
    second.model(x)
    assert store_name(second) == name
    assert store_name(second.unroll()) == name  # the same parameters, whichever form states them


def test_two_forms_of_a_program_built_anew_take_the_place_of_those_that_have_gone():
    """Each tensor has two names in the store, that of the plated form and that of the chain."""
    x = torch.randn(5, 2)
    for seed in range(3):
        program = CASES["diffusion"].build(seed)
        for form in (program, program.unroll()):
            assert learns(form, x)
        stored = {id(tensor) for _, tensor in pyro.get_param_store().named_parameters()}
        assert stored == {id(parameter) for parameter in program.parameters()}
        del program, form
        gc.collect()
