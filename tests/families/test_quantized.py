"""A VQ-VAE against all of its grids enumerated, its gradients against what its module says, and its training."""

import copy
import itertools
import math

import pyro
import pytest
import torch
from programs import CASES, quantized, transformer
from torch import nn

import dgm_pyro as dgm
from dgm_pyro.networks import MLP, Codebook
from dgm_pyro.objectives import elbo
from dgm_pyro.uses.representations import encode


@pytest.fixture
def program(float64):
    return CASES["vae-quantized"].build().eval()


def images(program, size=5):
    return CASES["vae-quantized"].draw(program, size)[0]


def grids(program):
    """Every grid of codes, ``(81, 2, 2)``, and its vectors, ``(81, 2, 2, 2)``."""
    k = torch.tensor([*itertools.product(range(3), repeat=4)]).reshape(-1, 2, 2)
    return k, program.encoder.codebook.vectors[k].movedim(-1, 1)


def test_the_bound_is_the_code_length_and_below_the_evidence_summed_over_all_grids(program):
    x, (k, z) = images(program), grids(program)
    log_p_z = program.prior.program.log_prob(k)
    assert log_p_z.exp().sum().item() == pytest.approx(1)
    torch.testing.assert_close(program.prior.log_prob(z), log_p_z)
    log_joint = torch.stack([program.likelihood.log_prob(each.expand(len(z), -1, -1, -1), z) for each in x]) + log_p_z
    evidence = log_joint.logsumexp(-1)
    h = program.encoder.network(x)[:, 0].movedim(1, -1)
    nearest = torch.cdist(h.reshape(-1, 2), program.encoder.codebook.vectors).argmin(-1).reshape(-1, 2, 2)
    chosen = (k.unsqueeze(0) == nearest.unsqueeze(1)).flatten(2).all(-1)
    for found in (dgm.evaluate(program, x).values, program.log_weights(x, num_particles=3)[2], elbo(program, x).value):
        torch.testing.assert_close(found.detach(), log_joint[chosen].detach())
        assert (found < evidence).all()


def test_other_vectors_than_the_codebooks_have_mass_zero(program):
    z = grids(program)[1][:2] + torch.tensor([0.0, 1e-12]).reshape(2, 1, 1, 1)
    with pyro.validation_enabled(False):
        assert torch.isfinite(program.prior.log_prob(z, None)).tolist() == [True, False]
    with pytest.raises(ValueError, match="outside of the support"), pyro.validation_enabled(True):
        program.prior.log_prob(z)
    assert program.prior.measure == "mass"
    _, every = grids(program)
    drawn = program.prior.sample(50)
    assert all((each == every).flatten(1).all(1).any() for each in drawn)


@pytest.mark.parametrize("analytic_kl", [True, False])
def test_gradients_pass_straight_through_with_the_commitment_loss_beside_them(program, analytic_kl):
    x = images(program)
    z = encode(program, x, draw=True).requires_grad_()
    program.likelihood.log_prob(x, z).sum().backward()
    encodings = []
    program.encoder.network.register_forward_hook(lambda network, inputs, h: encodings.append(h) or h.retain_grad())
    elbo(program, x, analytic_kl=analytic_kl).surrogate.sum().backward()
    h = encodings[0].detach()[:, 0]
    torch.testing.assert_close(encodings[0].grad[:, 0], z.grad - 2 * 0.25 * (h - z.detach()))


def test_the_prior_is_fitted_by_maximum_likelihood_at_the_codes(program):
    x = images(program)
    parameters = [*program.prior.parameters()]
    found = torch.autograd.grad(elbo(program, x).surrogate.sum(), parameters)
    k = program.encoder.codebook.nearest(encode(program, x, draw=True).movedim(1, -1))
    expected = torch.autograd.grad(program.prior.program.log_prob(k).sum(), parameters)
    torch.testing.assert_close(found, expected)


def trained(seed=0, epochs=4, **options):
    program = CASES["vae-quantized"].build(seed)
    data = dgm.Data(images(program, 40), levels=3)
    dgm.fit(program, data, epochs=epochs, batch_size=8, lr=1e-2, validation=None, progress=False, **options)
    return program


def test_a_codebook_is_shared_and_follows_the_training():
    program = trained()
    assert program.prior.codebook is program.encoder.codebook
    before = CASES["vae-quantized"].build().encoder.codebook
    assert not torch.allclose(program.encoder.codebook.vectors, before.vectors)
    assert not program.encoder.codebook.seen.any()


def test_a_batch_in_parts_moves_the_codebook_alike(float64, monkeypatch):
    monkeypatch.setattr(Codebook, "_note_use", no_resets(Codebook._note_use))
    whole, parts = (trained(accumulate=count).encoder.codebook.running for count in (1, 2))
    torch.testing.assert_close(whole, parts)


def no_resets(note):
    def noted(codebook, h, k):
        codebook.dead_below = 0.0
        note(codebook, h, k)

    return noted


def test_a_training_that_resets_codes_is_resumed_to_the_last_bit(monkeypatch):
    resets, follow = [], Codebook.follow

    def counted(codebook):
        codebook.dead_below, codebook.decay = 0.7, 0.5
        before = codebook.running.clone()
        seen = codebook.seen.clone()
        follow(codebook)
        resets.append(not torch.allclose(codebook.running, before.lerp(seen, 0.5)))

    monkeypatch.setattr(Codebook, "follow", counted)
    options = dgm.TrainingOptions(epochs=4, batch_size=8, validation=None, device="cpu")

    def training(seed):
        program = CASES["vae-quantized"].build(seed)
        return dgm.Training(program, dgm.Data(images(program, 40), levels=3), options=options)

    with training(0) as whole:
        whole.advance()
        for _ in range(3):
            whole.advance(lambda: True)
        state = copy.deepcopy(whole.state_dict())
        while not whole.finished:
            whole.advance()
    with training(1) as resumed:
        resumed.load_state_dict(state)
        count = len(resets)
        while not resumed.finished:
            resumed.advance()
    assert any(resets[:8])
    assert any(resets[count:])
    for one, other in zip(whole.best.items(), resumed.best.items(), strict=True):
        assert torch.equal(one[1], other[1]), one[0]


def test_a_second_stage_trains_the_prior_alone():
    program = trained()
    program.encoder.requires_grad_(False)
    program.likelihood.requires_grad_(False)
    before, x = copy.deepcopy(program.state_dict()), images(program, 40)
    first = dgm.evaluate(program, x)
    dgm.fit(program, dgm.Data(x, levels=3), epochs=10, lr=1e-2, validation=None, progress=False)
    second = dgm.evaluate(program, x)
    assert second.kl["z"] < first.kl["z"]
    assert second.reconstruction == first.reconstruction
    moved = {name.split(".")[0] for name, value in program.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"prior"}


def test_the_codebook_of_a_loop_of_svi_is_moved_by_its_own_call():
    program = CASES["vae-quantized"].build()
    x = images(program, 16)
    svi = pyro.infer.SVI(program.model, program.guide, pyro.optim.Adam({"lr": 1e-3}), pyro.infer.Trace_ELBO())
    before = program.encoder.codebook.vectors
    svi.step(x)
    assert torch.equal(program.encoder.codebook.vectors, before)
    program.encoder.codebook.follow()
    assert not torch.equal(program.encoder.codebook.vectors, before)


def test_four_images_take_two_bits():
    """One place and four codes: the shortest code of four equally frequent images has log 4 nats."""
    torch.manual_seed(0)
    patterns = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1], [1, 1, 0, 0], [1, 1, 1, 1]], dtype=torch.uint8)
    data = dgm.Data(patterns.reshape(4, 1, 2, 2).repeat(16, 1, 1, 1), levels=2)
    codebook, shape = Codebook(4, 2, decay=0.8), (2, 1, 1)
    program = dgm.VAE(
        dgm.Embedded(dgm.Categorical((1, 1), 4, learned=True), codebook),
        dgm.Bernoulli((1, 2, 2), MLP(shape, 4, (16,))),
        dgm.VectorQuantizer(shape, MLP((1, 2, 2), 2, (16,), levels=2), codebook),
    )
    dgm.fit(program, data, epochs=60, batch_size=32, lr=0.03, validation=None, progress=False)
    assert math.log(4) < -dgm.evaluate(program, data).nats < math.log(4) + 0.15


def test_other_parts_are_refused():
    codebook, network = Codebook(3, 2), nn.Linear(4, 8)
    with pytest.raises(TypeError, match=r"program must be a dgm\.Categorical, .* got Normal"):
        dgm.Embedded(dgm.Normal(2), codebook)
    with pytest.raises(TypeError, match="got Autoregressive of Bernoulli"):
        dgm.Embedded(transformer(dgm.Bernoulli, 2), codebook)
    with pytest.raises(ValueError, match="program has 4 levels, but codebook has 3 codes"):
        dgm.Embedded(dgm.Categorical(2, 4), codebook)
    with pytest.raises(TypeError, match=r"codebook must be a dgm\.networks\.Codebook"):
        dgm.VectorQuantizer((2, 4), network, network)
    with pytest.raises(TypeError, match="network is None"):
        dgm.VectorQuantizer((2, 4), None, codebook)
    with pytest.raises(ValueError, match=r"event_shape is \(4, 2\), but .* must be \(2, \*places\)"):
        dgm.VectorQuantizer((4, 2), network, codebook)
    with pytest.raises(ValueError, match="commitment must be"):
        dgm.VectorQuantizer((2, 4), network, codebook, commitment=-1)


def test_a_label_changes_every_part():
    program = quantized(given_label=True).eval()
    assert program.num_classes == 3
    x = torch.randint(3, (1, 1, 4, 4), dtype=torch.uint8)
    assert len(program.log_weights(x.expand(3, -1, -1, -1), torch.arange(3)).unique()) == 3


def trained_on(program, data, **options):
    return dgm.fit(program, data, batch_size=8, compile=False, progress=False, validation=None, **options)


def test_a_training_that_fails_leaves_nothing_to_the_next():
    data, steps = dgm.Data(torch.rand(24, 1, 16, 16)), []

    def infinite_at_the_second(x):
        steps.append(len(x))
        return x * math.inf if len(steps) == 2 else x

    program = dgm.build("vq-vae", data, num_codes=4)
    with pytest.raises(dgm.NonFiniteLossError):
        trained_on(program, data, epochs=2, augment=infinite_at_the_second)
    assert all(math.isfinite(loss) for loss in trained_on(program, data, epochs=1).losses)


def test_a_step_that_is_left_out_moves_no_code():
    data = dgm.Data(torch.rand(24, 1, 16, 16))
    program = dgm.build("vq-vae", data, num_codes=4)
    (codebook,) = (module for module in program.modules() if isinstance(module, Codebook))
    before = codebook.running.clone()
    assert trained_on(program, data, epochs=1, skip_norm=1e-9).skipped == 3
    assert torch.equal(codebook.running, before)
