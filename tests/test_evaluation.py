"""Evidence: the units, the kinds, and the comparisons that are refused."""

import json
import math
from types import SimpleNamespace

import pyro.distributions as dist
import pytest
import torch
from programs import CASES, assert_same_number, replicas, vae
from torch import nn
from torch.distributions import MultivariateNormal

import dgm_pyro as dgm
from dgm_pyro import Evidence, evaluation, noise
from dgm_pyro.evaluation import find_device, program_device
from dgm_pyro.networks import MLP

pytestmark = pytest.mark.usefixtures("float64")


def linear_vae():
    """z ~ N(0, 1), x | z ~ N((0.9, -0.4) z, 0.5^2), an encoder that is not exact; and the exact evidence."""
    loading = torch.tensor([0.9, -0.4])
    decoder, encoder = nn.Linear(1, 4), nn.Linear(2, 2)
    with torch.no_grad():
        decoder.weight.copy_(torch.cat([loading, torch.zeros(2)]).unsqueeze(-1))
        decoder.bias.copy_(torch.tensor([0.0, 0.0, *[math.log(math.expm1(0.5))] * 2]))
        encoder.weight.copy_(torch.tensor([[0.5, 0.0], [0.0, 0.0]]))
        encoder.bias.copy_(torch.tensor([0.0, math.log(math.expm1(0.6))]))
    program = dgm.VAE(dgm.Normal(1), dgm.Normal(2, decoder), dgm.Normal(1, encoder))
    return program, MultivariateNormal(torch.zeros(2), torch.outer(loading, loading) + 0.25 * torch.eye(2))


def evidence(values=(-1.0, -2.0, -4.0), **options):
    settings = {"kind": "exact", "measure": "mass", "num_dims": 4, "data": "toy"}
    return Evidence(torch.tensor(values), **settings | options)


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_units():
    e = evidence()
    assert e.nats == pytest.approx(-7 / 3)
    assert e.bits_per_dim == pytest.approx(7 / 3 / (4 * math.log(2)))
    # The standard deviation of -1, -2, -4 is sqrt(7 / 3).
    assert e.nats_stderr == pytest.approx(math.sqrt(7 / 3) / math.sqrt(3))
    assert e.stderr == pytest.approx(e.nats_stderr / (4 * math.log(2)))
    assert math.isnan(evidence([-1.0]).stderr)


def test_a_fair_coin_is_one_bit_per_dimension():
    e = dgm.evaluate(dgm.Bernoulli(5), torch.randint(2, (30, 5)))
    assert e.bits_per_dim == pytest.approx(1)
    assert e.stderr == pytest.approx(0, abs=1e-12)
    assert dgm.evaluate(dgm.Categorical((1, 2, 2), 16), torch.randint(16, (9, 1, 2, 2))).bits_per_dim == pytest.approx(
        4
    )


def test_it_describes_itself():
    program, _ = linear_vae()
    e = dgm.evaluate(program, dgm.Data(torch.randn(20, 2), name="noise"))
    text = str(e)
    assert f"{e.bits_per_dim:.4f} +- {e.stderr:.4f} bits/dim" in text
    assert f"{e.nats:.3f} +- {e.nats_stderr:.3f} nats, elbo, density" in text
    assert "reconstruction x " in text
    assert "KL z " in text
    record = json.loads(json.dumps(e.as_dict()))
    assert (record["program"], record["data"], record["kind"], record["measure"]) == ("VAE", "noise", "elbo", "density")
    assert (record["num_data"], record["num_dims"]) == (20, 2)
    assert record["bits_per_dim"] == e.bits_per_dim
    assert set(record["kl"]) == {"z"}


def test_the_terms_it_tells_are_its_sum_and_none_of_them_is_zero():
    data = dgm.Data(torch.randn(20, 2), name="noise")
    e = dgm.evaluate(dgm.build("diffusion", data), data)
    reconstruction, kl = (
        dict(term.split() for term in part.split(" ", 1)[1].split(", ")) for part in str(e).split("; ")[1:]
    )
    assert set(reconstruction) == {"x_likelihood", "x"}  # x itself is the change of units
    assert {"x_kl", "x_T_kl"} >= set(kl) >= {"x_kl"}
    told = sum(map(float, reconstruction.values())) - sum(map(float, kl.values()))
    assert told == pytest.approx(e.nats, abs=0.002)


# -- kinds -------------------------------------------------------------------------------------------------------------


EXACT = [
    name for name, case in CASES.items() if (p := case.example).tractable and not p.conditional and p.event_shape != ()
]


@pytest.mark.parametrize("name", EXACT)
def test_exact_evidence_is_the_mean_log_prob(name):
    case = CASES[name]
    program = case.build().eval()
    x, _ = case.draw(program, 23)
    e = dgm.evaluate(program, x, batch_size=5)
    assert e.kind == "exact"
    assert e.measure == program.measure
    assert e.num_dims == math.prod(program.event_shape)
    torch.testing.assert_close(e.values, program.log_prob(x).detach(), rtol=1e-9, atol=1e-12)
    assert e.nats == pytest.approx(program.log_prob(x).mean().item())
    assert dgm.evaluate(program, x, num_particles=9).kind == "exact"


def test_of_given_labels_it_is_that_of_the_conditional():
    program = CASES["normal-given-label"].build()
    x, y = torch.randn(9, 2), torch.arange(9) % 3
    torch.testing.assert_close(dgm.evaluate(program, dgm.Data(x, y)).values, program.log_prob(x, y).detach())


def test_of_a_labeled_program_the_label_is_summed_out_though_the_data_have_it():
    program = CASES["labeled"].build()
    x, y = torch.randn(9, 2), torch.tensor([0, 1, 2, -1, 0, 1, 2, -1, 0])
    e = dgm.evaluate(program, dgm.Data(x, y))
    torch.testing.assert_close(e.values, program.log_prob(x).detach())


class Shifted(nn.Module):
    """Parameters of N(slope * value + m_y, scale^2), given a value and y."""

    def __init__(self, means, slope, scale):
        super().__init__()
        self.register_buffer("means", means)
        self.slope, self.raw_scale = slope, math.log(math.expm1(scale))

    def forward(self, value, y):
        loc = self.slope * value + self.means[y].unsqueeze(-1)
        return torch.stack([loc, torch.full_like(loc, self.raw_scale)], -2)


def test_labels_are_summed_over_where_only_p_of_x_given_y_is_bounded():
    """So a classifier that nothing has trained, as where all labels were known, costs nothing."""
    program = CASES["labeled-vae"].build().eval()
    x, _ = CASES["labeled-vae"].draw(program, 40)
    found = {k: dgm.evaluate(program, x, num_particles=k, num_samples=200) for k in (1, 500)}
    with torch.no_grad():
        weights = torch.cat([program.log_weights(x, num_particles=20_000) for _ in range(6)])
        best = weights.logsumexp(0) - math.log(120_000)
    program.classifier = dgm.Categorical((), program.num_labels, MLP(program.event_shape, program.num_labels))
    assert abs(found[500].nats - best.mean().item()) < 0.02
    assert found[1].nats < best.mean()
    assert sum(found[1].reconstruction.values()) - sum(found[1].kl.values()) == pytest.approx(found[1].nats, abs=1e-5)
    for k, evidence in found.items():
        assert torch.equal(dgm.evaluate(program, x, num_particles=k, num_samples=200).values, evidence.values)


@pytest.mark.parametrize("draws", [1, 8])
def test_a_sum_over_labels_is_a_bound_however_few_the_draws(draws):
    """By z ~ N(0, 1) and x ~ N(z + m_y, s^2), with the exact posterior: ELBOs that are right but for their noise."""
    means, s = torch.linspace(-0.5, 0.5, 10), 0.7
    shrunk = 1 / (1 + s**2)
    likelihood, encoder = Shifted(means, 1.0, s), Shifted(-shrunk * means, shrunk, s * shrunk**0.5)
    pair = ((1,), ())
    parts = (dgm.Normal(1, network, given_shape=pair) for network in (likelihood, encoder))
    vae = dgm.VAE(dgm.Normal(1), *parts)
    program = dgm.Labeled(dgm.Categorical((), 10, parameters=torch.zeros(10)), vae)
    x = torch.linspace(-2, 2, 9).repeat_interleave(400).unsqueeze(-1)
    exact = dist.Normal(means, math.sqrt(1 + s**2)).log_prob(x).logsumexp(-1) - math.log(10)
    gap = exact - dgm.evaluate(program, x, num_samples=draws).values
    assert gap.mean() > 2 * gap.std() / len(gap) ** 0.5


@pytest.mark.parametrize("name", ["continuous", "labeled-continuous-diffusion"])
def test_particles_are_refused_where_they_would_weigh_another_looser_model(name):
    program = next(case for case in CASES if case.startswith(name))
    program = CASES[program].build()
    with pytest.raises(ValueError, match=r"a chain, here of \d+ steps.*program.unroll"):
        dgm.evaluate(program, torch.zeros(3, *program.event_shape), num_particles=4)
    assert dgm.evaluate(program.unroll(), torch.zeros(3, *program.event_shape), num_particles=4).kind == "iwae-4"


def test_no_other_devices_random_state_is_seeded(monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("seeds the generators of every GPU"))
    monkeypatch.setattr(torch.cuda, "manual_seed", lambda seed: pytest.fail("seeds a GPU"))
    program, _ = linear_vae()
    dgm.evaluate(program, torch.zeros(3, 2))


def test_bounds_lie_below_the_exact_evidence_and_rise_with_particles():
    program, exact = linear_vae()
    x = exact.sample((400,))
    truth = exact.log_prob(x)
    kinds, gaps = [], []
    for k in (1, 2, 8, 64):
        e = dgm.evaluate(program, x, num_particles=k, num_samples=50)
        kinds.append(e.kind)
        gaps.append((truth - e.values).mean().item())
    assert kinds == ["elbo", "iwae-2", "iwae-8", "iwae-64"]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > 0.05
    assert 0 < gaps[-1] < 0.01


def test_draws_take_noise_away_and_nothing_else():
    program, exact = linear_vae()
    x = replicas(exact.sample((1,)), 2000)
    one, many = dgm.evaluate(program, x, num_samples=1), dgm.evaluate(program, x, num_samples=16)
    ratio = one.values.var() / many.values.var()
    assert 13 < ratio < 19.5  # 16, give or take 4.5 times sqrt(4 / 2000)
    error = math.hypot(one.nats_stderr, many.nats_stderr)
    assert abs(one.nats - many.nats) < 4.5 * error


@pytest.mark.parametrize("name", ["vae", "vae-two-levels", "diffusion-integers", "vae-diffusion-prior"])
def test_the_terms_add_up(name):
    case = CASES[name]
    program = case.build()
    x, _ = case.draw(program, 12)
    e = dgm.evaluate(program, x, batch_size=5)
    assert sum(e.reconstruction.values()) - sum(e.kl.values()) == pytest.approx(e.nats)
    assert dgm.evaluate(program, x, num_particles=3).kl == {}


def test_the_bound_of_a_linear_vae_is_reconstruction_less_divergence_by_hand():
    """q(z | x) = N(x_1 / 2, 0.6^2), so that both terms have closed forms."""
    program, _ = linear_vae()
    x = torch.tensor([[0.4, -1.0], [2.0, 0.3]])
    mean, variance = x[:, 0] / 2, 0.36
    kl = 0.5 * (variance + mean**2 - 1 - math.log(variance))
    loading = torch.tensor([0.9, -0.4])
    error = (x - mean.unsqueeze(-1) * loading) ** 2 + variance * loading**2
    reconstruction = (-0.5 * math.log(2 * math.pi * 0.25) - error / 0.5).sum(-1)
    many = replicas(x.unsqueeze(0), 5000).flatten(0, 1)
    e = dgm.evaluate(program, many)
    assert e.kl["z"] == pytest.approx(kl.mean().item())
    spread = (e.values.reshape(5000, 2).std(0) ** 2).sum().sqrt().item() / 2 / math.sqrt(5000)
    assert abs(e.reconstruction["x"] - reconstruction.mean().item()) < 4.5 * spread


# -- many particles ----------------------------------------------------------------------------------------------------


def test_particles_in_chunks_are_particles(monkeypatch):
    """The bound is the log-mean-exp of all weights, as if they had come at once, for a K that no chunk divides."""
    program, exact = linear_vae()
    x = exact.sample((7,))
    monkeypatch.setattr(evaluation, "ROWS_AT_ONCE", 3 * 7)
    with noise.per_datum(x, seed=5):
        weights = program.log_weights(x, num_particles=10)
    chunked = dgm.evaluate(program, x, num_particles=10, seed=5).values
    torch.testing.assert_close(chunked, (weights.logsumexp(0) - math.log(10)).detach())


def test_chunks_do_not_change_the_distribution_of_the_bound(monkeypatch):
    program, exact = linear_vae()
    x = replicas(exact.sample((1,)), 4000)
    whole = dgm.evaluate(program, x, num_particles=6)
    monkeypatch.setattr(evaluation, "ROWS_AT_ONCE", 1)
    chunked = dgm.evaluate(program, x, num_particles=6, seed=1)
    assert abs(whole.nats - chunked.nats) < 4.5 * math.hypot(whole.nats_stderr, chunked.nats_stderr)
    spread = math.log(whole.values.std() / chunked.values.std())
    assert abs(spread) < 0.15  # 4.5 standard errors of the log of a ratio of spreads, with room for heavy tails


@pytest.fixture
def outputs(monkeypatch):
    """A VAE with convolutions, data, the sizes of the networks' outputs in evaluation mode, and a limit for them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        data = dgm.Data(torch.randint(4, (30, 1, 16, 16), dtype=torch.uint8), levels=4)
        program = dgm.build("vae", data)
    sizes = []
    for module in (*program.likelihood.network.modules(), *program.encoder.network.modules()):
        module.register_forward_hook(lambda m, inputs, output: sizes.append(0 if m.training else output.nbytes))
    dgm.evaluate(program, data[:1], num_samples=1)
    limit = 10 * max(sizes)
    monkeypatch.setattr(evaluation, "LARGEST_OUTPUT", limit)
    return program, data, sizes, limit


@pytest.mark.parametrize("draws", [{"num_samples": 3}, {"num_particles": 7}, {"num_particles": 100}])
def test_no_output_of_a_network_is_larger_than_the_limit(monkeypatch, outputs, draws):
    program, data, sizes, limit = outputs
    sizes.clear()
    found = dgm.evaluate(program, data, **draws).values
    assert limit / 2 < max(sizes) <= limit
    monkeypatch.setattr(evaluation, "LARGEST_OUTPUT", 2**40)
    sizes.clear()
    torch.testing.assert_close(dgm.evaluate(program, data, **draws).values, found, rtol=1e-5, atol=1e-5)
    assert max(sizes) > limit


class Graph(nn.Module):
    """A submodule returns a sparse matrix, and another one is a script."""

    def __init__(self):
        super().__init__()
        self.matrix, self.last = Sparse(), torch.jit.script(nn.Linear(3, 4))

    def forward(self, x):
        return self.last(torch.sparse.mm(self.matrix(), x.T).T)


class Sparse(nn.Module):
    def forward(self):
        return torch.eye(3, dtype=torch.float32).to_sparse()


def test_the_size_of_an_output_is_what_a_datum_adds():
    weighted = torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 64))
    x, given = torch.zeros(2, 4, dtype=torch.float32), torch.zeros(2, 3, dtype=torch.float32)
    for layer in (nn.Linear(3, 64), weighted):
        program = dgm.Normal(4, nn.Sequential(layer, nn.ReLU(), nn.Linear(64, 8))).float()
        assert evaluation.output_size(program, lambda n, p=program: p.log_prob(x[:n], given[:n])) == 4 * 64
    double = program.double()
    assert evaluation.output_size(double, lambda n: double.log_prob(x[:n].double(), given[:n].double())) == 8 * 64


@pytest.mark.filterwarnings("ignore:.torch.jit.script")
@pytest.mark.parametrize("make", [Graph, lambda: nn.Sequential(nn.Linear(3, 8), torch.jit.script(nn.Linear(8, 4)))])
def test_networks_of_any_kind_are_evaluated_and_keep_no_hooks(make):
    network = make()
    program = dgm.VAE(dgm.Normal(2), dgm.Normal(3, nn.Linear(2, 6)), dgm.Normal(2, network)).float()
    assert math.isfinite(dgm.evaluate(program, torch.randn(9, 3, dtype=torch.float32)).nats)
    plain = [module for module in program.modules() if not isinstance(module, torch.jit.ScriptModule)]
    assert not any(module._forward_hooks for module in plain)


def test_pseudo_inputs_do_not_make_batches_small():
    data = dgm.Data(torch.randint(4, (30, 1, 16, 16), dtype=torch.uint8), levels=4)
    program, rows = dgm.build("vae", data, prior="vamp"), []
    program.encoder.network.register_forward_hook(lambda _, inputs, output: rows.append(len(output)))
    dgm.evaluate(program, data, num_samples=2)
    # The 30 pseudo-inputs once; then data and pseudo-inputs: of one datum and of two, to measure, and of all.
    assert rows == [30, 1, 30, 2, 30, 30, 30]


@pytest.mark.parametrize("name", ["vae-linear", "vae-two-levels", "diffusion-integers", "labeled-vae"])
def test_memory_is_flat_in_the_number_of_particles(monkeypatch, name):
    """No network sees more rows at once than the budget, and in all it sees every particle of every datum."""
    case = CASES[name]
    program = case.build()
    x, _ = case.draw(program, 9)
    seen: list[int] = []
    for module in program.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    monkeypatch.setattr(evaluation, "ROWS_AT_ONCE", 90)
    dgm.evaluate(program, x, num_particles=1000)
    assert max(seen) == 90
    assert sum(seen) >= 9000
    monkeypatch.setattr(evaluation, "VALUES_AT_ONCE", 1)
    seen.clear()
    dgm.evaluate(program, x, num_particles=3)
    assert max(seen) == 9  # never less than one particle of the batch


@pytest.mark.parametrize("flags", ["legacy", "new"])
def test_a_training_in_tf32_is_evaluated_in_float32(flags):
    """Whichever way torch's own flags are set, they are what they were."""
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before, seen = (matmul.fp32_precision, conv.fp32_precision), []

    class Spy(nn.Linear):
        def forward(self, x):
            if len(x) > 1:  # or it is only asked for its shapes
                seen.append((self.training, matmul.fp32_precision, conv.fp32_precision))
            return super().forward(x)

    program = dgm.VAE(dgm.Normal(2), dgm.Normal(3, Spy(2, 6)), dgm.Normal(2, Spy(3, 4)))
    try:
        if flags == "legacy":
            torch.set_float32_matmul_precision("medium")
        else:
            matmul.fp32_precision = "tf32"
        chosen = matmul.fp32_precision
        dgm.fit(program, torch.randn(20, 3), epochs=1, batch_size=10, precision="tf32", progress=False)
        assert {(True, "tf32", "tf32"), (False, "ieee", "ieee")} <= set(seen)  # steps, validation
        seen.clear()
        dgm.evaluate(program, torch.randn(20, 3))
        assert matmul.fp32_precision == chosen
        if flags == "legacy":
            assert torch.get_float32_matmul_precision() == "medium"
    finally:
        if flags == "legacy":
            torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision, conv.fp32_precision = before
    assert set(seen) == {(False, "ieee", "ieee")}


def test_a_gpu_takes_more_at_once_by_its_memory(monkeypatch):
    """24 GiB are 1.5 million values of 16 KiB; a small card takes what a processor takes."""
    for gibibytes, times in ((24, 1), (140, 8), (2, 1)):
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda device, g=gibibytes: SimpleNamespace(total_memory=g * 2**30)
        )
        rows, values = evaluation.most_at_once(torch.device("cuda"))
        assert (rows, values) == (times * evaluation.ROWS_AT_ONCE, times * evaluation.VALUES_AT_ONCE)
    assert evaluation.most_at_once(torch.device("cpu")) == (evaluation.ROWS_AT_ONCE, evaluation.VALUES_AT_ONCE)


def test_the_bar_counts_particles_of_data(monkeypatch):
    bars = []

    class Bar:
        def __init__(self, **options):
            self.options, self.done = options, 0
            bars.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self, number):
            self.done += number

    monkeypatch.setattr(evaluation, "tqdm", Bar)
    monkeypatch.setattr(evaluation, "ROWS_AT_ONCE", 10)
    program, x = vae(dgm.Normal(2)), torch.randn(11, 2)
    for particles, total, unit in ((7, 77, "particle"), (1, 11, "datum")):
        dgm.evaluate(program, x, num_particles=particles, batch_size=4, progress=True)
        assert (bars[-1].options["total"], bars[-1].options["unit"], bars[-1].done) == (total, unit, total)
        assert not bars[-1].options["disable"]


# -- reproducible, and without side effects ----------------------------------------------------------------------------


@pytest.mark.parametrize("particles", [1, 4])
def test_the_seed_decides(particles):
    program, x = vae(dgm.Normal(2)), torch.randn(9, 2)
    first, again, other = (dgm.evaluate(program, x, num_particles=particles, seed=s).values for s in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_nothing_else_is_touched():
    program, x = vae(dgm.Normal(2)), torch.randn(9, 2)
    program.train()
    program.encoder.eval()
    state, modes = torch.get_rng_state(), [module.training for module in program.modules()]
    before = {name: value.clone() for name, value in program.state_dict().items()}
    e = dgm.evaluate(program, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in program.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in program.state_dict().items())
    assert not e.values.requires_grad
    assert e.values.dtype == torch.float64


def test_it_evaluates_in_evaluation_mode():
    network = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 4))
    program = dgm.VAE(dgm.Normal(2), dgm.Normal(2, network), dgm.Normal(2, nn.Linear(2, 4))).train()
    x = torch.randn(9, 2)
    training = dgm.evaluate(program, x).values
    assert torch.equal(training, dgm.evaluate(program.eval(), x).values)


def test_the_last_batch_may_be_small():
    program, x = dgm.Normal(2), torch.randn(11, 2)
    whole = dgm.evaluate(program, x).values
    for size in (1, 5, 11, 100):
        parts = dgm.evaluate(program, x, batch_size=size).values
        assert_same_number(parts.float(), whole.float())  # doubles, reckoned in single precision


# -- comparing ---------------------------------------------------------------------------------------------------------


def test_differences_are_paired():
    """Two programs that differ by a constant differ without error, however much the data spread."""
    x = torch.randn(50, 2)
    wide, wider = (dgm.Normal(2, parameters=torch.tensor([[0.0, 0.0], [s, s]])) for s in (1.0, 2.0))
    a, b = dgm.evaluate(wide, x), dgm.evaluate(wider, x)
    mean, error = a.minus(b)
    difference = wide.log_prob(x) - wider.log_prob(x)
    assert mean == pytest.approx(difference.mean().item())
    assert error == pytest.approx((difference.std() / math.sqrt(50)).item())
    assert b.minus(a).nats == pytest.approx(-mean)
    assert error < a.nats_stderr
    assert tuple(evidence([-1.0, -9.0]).minus(evidence([-2.0, -10.0]))) == (pytest.approx(1), pytest.approx(0))


@pytest.mark.parametrize(
    ("kinds", "kind"),
    [
        (("exact", "exact"), "exact"),
        (("exact", "elbo"), "at most"),
        (("iwae-5", "ode"), "at least"),
        (("elbo", "iwae-5"), "of bounds, elbo and iwae-5"),
        (("elbo", "elbo"), "of bounds, elbo and elbo"),
    ],
)
def test_a_difference_says_what_it_is_of(kinds, kind):
    first, second = (evidence(kind=each) for each in kinds)
    assert first.minus(second).kind == kind
    assert str(first.minus(second)).endswith(f"({kind})")


def test_only_the_same_data_in_the_same_order_are_paired():
    program, x = dgm.Normal(2), torch.randn(8, 2)
    here = dgm.evaluate(program, x)
    assert here.minus(dgm.evaluate(program, dgm.Data(x, name="renamed"), batch_size=3)).nats == 0
    for other in (x.flip(0), torch.randn(8, 2), x + 1e-6):
        with pytest.raises(
            ValueError, match="different data: 8 of tensor and 8 of tensor, or the same in another order"
        ):
            here.minus(dgm.evaluate(program, other))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"measure": "density"}, "a mass cannot be compared with a density.*Dequantized"),
        ({"digest": "other", "data": "other"}, "different data: 3 of toy and 3 of other.*same split"),
        ({"values": (-1.0, -2.0)}, "different data: 3 of toy and 2 of toy"),
        ({"num_dims": 5}, "different data"),
    ],
)
def test_what_cannot_be_compared_is_not(other, message):
    with pytest.raises(ValueError, match=message):
        evidence().minus(evidence(**other))


# -- what it refuses ---------------------------------------------------------------------------------------------------


def bits(levels=2):
    return dgm.Data(torch.randint(levels, (6, 3)), levels=levels, name="gray")


@pytest.mark.parametrize(
    ("program", "data", "error", "message"),
    [
        (dgm.Normal(3), bits(), ValueError, r"gray is integer data \(a mass\), but Normal is a density.*Dequantized"),
        (dgm.Bernoulli(3), dgm.Data(torch.rand(6, 3), name="reals"), ValueError, "reals is real data.*0 .. 1.*Normal"),
        (dgm.Bernoulli(3), bits(17), ValueError, "gray has 17 levels, but Bernoulli has 2.*binarized"),
        (dgm.Categorical(3, 4), bits(17), ValueError, "gray has 17 levels, but Categorical has 4.*levels=data.levels"),
        (dgm.Bernoulli(3), torch.full((6, 3), 16), ValueError, "0 to|16 to 16.*2 levels.*gray levels.*binarize"),
        (dgm.Bernoulli(3), torch.full((6, 3), 0.5), ValueError, "x holds 0.5, but Bernoulli is a mass"),
        (dgm.Normal(3), torch.ones(6, 3).long(), TypeError, "x holds integers.*Dequantized"),
        (
            dgm.Normal(3),
            torch.zeros(6, 4),
            ValueError,
            r"x has shape \(6, 4\), but the program's event_shape is \(3,\)",
        ),
        (dgm.Normal(3), torch.full((6, 3), math.inf), ValueError, "NaN or infinite"),
        (dgm.Normal(3), [[0.0] * 3], TypeError, "data must be a dgm.data.Data or a torch.Tensor, got list"),
        (dgm.Normal(3), torch.zeros(0, 3), ValueError, "x is empty"),
        (dgm.Normal(3, learned=True), torch.zeros(6, 3).float(), TypeError, "dtype torch.float32.*float64"),
    ],
)
def test_data_that_do_not_fit_are_refused_with_a_remedy(program, data, error, message):
    program = program.double()
    with pytest.raises(error, match=message):
        dgm.evaluate(program, data)


@pytest.mark.parametrize("option", ["num_particles", "num_samples", "batch_size"])
@pytest.mark.parametrize("value", [0, -1, 2.5, True])
def test_counts_are_counts(option, value):
    with pytest.raises(ValueError, match=f"{option} must be a positive integer"):
        dgm.evaluate(dgm.Normal(2), torch.zeros(3, 2), **{option: value})


def test_a_conditional_program_needs_the_labels():
    program = CASES["normal-given-label"].build()
    with pytest.raises(TypeError, match=r"Data\(x, y\) with labels"):
        dgm.evaluate(program, torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"conditional: pass Data\(x, y\), one integer label"):
        dgm.evaluate(program, dgm.Data(torch.zeros(3, 2)))
    with pytest.raises(ValueError, match="labels from 0 to 7, but the program has 3 classes"):
        dgm.evaluate(program, dgm.Data(torch.zeros(2, 2), torch.tensor([0, 7])))


def test_whole_numbers_may_come_as_floats():
    program = dgm.Categorical(2, 5, learned=True)
    x = torch.randint(5, (7, 2))
    assert torch.equal(dgm.evaluate(program, x.double()).values, dgm.evaluate(program, x).values)
    assert torch.equal(dgm.evaluate(program, x.to(torch.uint8)).values, dgm.evaluate(program, x).values)


def test_devices_by_name():
    assert find_device("cpu") == torch.device("cpu")
    assert find_device("auto").type in ("cpu", "cuda")
    with pytest.raises(ValueError, match="device must be 'auto', 'cpu', 'cuda'"):
        find_device("gpu")
    with pytest.raises(ValueError, match="device must be"):
        dgm.evaluate(dgm.Normal(2), torch.zeros(3, 2), device="tpu!")
    assert program_device(dgm.Normal(2)) == torch.device("cpu")


def test_data_need_not_be_where_the_program_is():
    """The program stands on another device; meta stands in for a GPU, as far as the checks go."""
    program = dgm.Discriminative(dgm.Categorical((), 3, MLP((2,), 3, hidden=(4,)))).to("meta")
    data = dgm.Data(torch.randn(3, 2), torch.tensor([0, 1, 2]))
    # The data are moved, so that the checks pass until they read a value, which meta tensors do not have.
    with pytest.raises(RuntimeError, match="cannot be called on meta tensors"):
        dgm.evaluate(program, data)
