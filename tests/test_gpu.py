"""Everything on a CUDA device: each program trains there, samples, is evaluated, and comes back from a checkpoint."""

import math

import pyro
import pytest
import torch
from programs import CASES, data_for
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO

import dgm_pyro as dgm
from dgm_pyro import SemiSupervised
from dgm_pyro.evaluation import program_device
from dgm_pyro.training import cuda_graph
from dgm_pyro.training.cuda_graph import CudaGraph

DEVICE = "cuda"
pytestmark = pytest.mark.gpu

# Whose steps wait for the device in a Cholesky decomposition of torch's, or follow their data outside of the gradient.
WITHOUT_GRAPH = {"lowrank", "vae-lowrank-encoder", "vae-exact-linear", "vae-quantized", "vae-quantized-given-label"}
TRAINABLE = [name for name, case in CASES.items() if case.trainable]
DIFFUSIONS = [name for name in CASES if name.startswith(("diffusion", "continuous"))]


def tensors(program):
    return [*program.parameters(), *program.buffers()]


@pytest.mark.parametrize("name", TRAINABLE)
def test_every_program_trains_and_is_evaluated_there(name):
    """The data stay where they are, on the CPU: whoever trains or evaluates moves them."""
    case = CASES[name]
    program = case.build(dtype=torch.float32)
    data = data_for(case, program, 32)
    history = dgm.fit(program, data, epochs=2, batch_size=8, validation=0.25, ema=0.9, device=DEVICE, progress=False)
    assert all(math.isfinite(loss) for loss in history.losses)
    assert all(tensor.device.type == DEVICE for tensor in tensors(program))
    evidence = dgm.evaluate(program, data, batch_size=20)
    assert evidence.values.device.type == "cpu"
    assert torch.isfinite(evidence.values).all()
    assert torch.equal(evidence.values, dgm.evaluate(program, data, batch_size=20).values)
    if not (program.tractable or "continuous" in name):
        assert torch.isfinite(dgm.evaluate(program, data, num_particles=3).values).all()
    on_cpu = dgm.evaluate(program, data, device="cpu")
    assert program_device(program).type == "cpu"
    if program.tractable:
        torch.testing.assert_close(evidence.values, on_cpu.values, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", TRAINABLE)
def test_steps_as_one_graph_are_the_steps(name):
    """A replay reads a learning rate that is rounded to float32."""
    data, found = data_for(CASES[name], CASES[name].build(dtype=torch.float32), 43), []
    for compile in (False, "auto"):
        torch.manual_seed(0)
        program = CASES[name].build(dtype=torch.float32)
        options = {"epochs": 3, "batch_size": 8, "validation": None, "device": DEVICE, "progress": False}
        history = dgm.fit(program, data, compile=compile, **options)
        found.append((history, program.state_dict()))
    (eager, ours), (graph, theirs) = found
    assert not eager.cuda_graph
    assert graph.cuda_graph == (name not in WITHOUT_GRAPH)
    assert graph.losses == pytest.approx(eager.losses, rel=1e-3, abs=1e-3)
    for key, value in ours.items():
        torch.testing.assert_close(theirs[key], value, rtol=1e-2, atol=1e-3)


def test_a_recording_that_fails_leaves_everything_as_it_was():
    def waits(x):
        return x + torch.randn_like(x) * float(x.sum())

    graph = CudaGraph(waits)
    graph.warm_ups, graph.stream = cuda_graph.WARM_UP, torch.cuda.Stream()  # as if none had waited
    x = torch.ones(3, device=DEVICE)
    assert graph(x).shape == (3,)
    assert not graph.recorded
    assert graph.refused is not None
    state = torch.cuda.get_rng_state()
    first = torch.randn(3, device=DEVICE)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.randn(3, device=DEVICE), first)
    other = CudaGraph(lambda x: x + torch.randn_like(x))
    assert len({tuple(other(x).tolist()) for _ in range(6)}) == 6
    assert other.recorded


@pytest.mark.parametrize("name", CASES)
def test_every_program_samples_and_scores_there(name):
    case = CASES[name]
    program = case.build(device=DEVICE, dtype=torch.float32)
    x, given = case.draw(program, 6, device=DEVICE, dtype=torch.float32)
    sample = program.sample(6, given)
    assert sample.device.type == DEVICE
    program.check(sample, given)
    weights = program.log_weights(x, given, num_particles=3)
    assert weights.device.type == DEVICE
    assert weights.shape == (3, 6)
    assert torch.isfinite(weights).all()


@pytest.mark.parametrize("name", CASES)
def test_every_program_comes_back_from_a_checkpoint_there(name, tmp_path):
    case = CASES[name]
    program = case.build(device=DEVICE, dtype=torch.float32).eval()
    x, given = case.draw(program, 6, device=DEVICE, dtype=torch.float32)
    dgm.save(program, tmp_path)
    loaded = dgm.load(tmp_path, device=DEVICE).eval()
    assert all(tensor.device.type == DEVICE for tensor in tensors(loaded))
    torch.manual_seed(0)
    before = program.log_weights(x, given)
    torch.manual_seed(0)
    assert torch.equal(loaded.log_weights(x, given), before)


@pytest.mark.parametrize("name", TRAINABLE)
def test_plain_pyro_trains_there(name):
    case = CASES[name]
    program = case.build(device=DEVICE, dtype=torch.float32)
    x, given = case.draw(program, 16, device=DEVICE, dtype=torch.float32)
    before = [p.detach().clone() for p in program.parameters()]
    svi = SVI(program.model, program.guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    assert math.isfinite(sum(svi.step(x, given) for _ in range(3)))
    assert any(not torch.equal(p, old) for p, old in zip(program.parameters(), before, strict=True))


@pytest.mark.parametrize("objective", ["elbo", "iwae", Trace_ELBO()], ids=["elbo", "iwae", "Trace_ELBO"])
def test_objectives_train_there(objective):
    program = CASES["vae"].build(dtype=torch.float32)
    x = 3 + 0.3 * torch.randn(64, 2)
    history = dgm.fit(
        program, x, objective, epochs=12, lr=3e-2, batch_size=8, validation=None, device=DEVICE, progress=False
    )
    assert history.losses[-1] < history.losses[0] - 1


def test_partly_labeled_data_train_there():
    case = CASES["labeled-classifier"]
    program = case.build(dtype=torch.float32)
    x, y = torch.randn(20, 2), torch.arange(20) % 4 - 1
    data = dgm.Data(x, y, num_classes=3)
    for objective in (SemiSupervised(), "semi-supervised"):
        dgm.fit(program, data, objective, epochs=2, batch_size=8, device=DEVICE, progress=False)
    unlabeled = dgm.Data(x)
    dgm.fit(program, unlabeled, TraceEnum_ELBO(), epochs=2, batch_size=8, device=DEVICE, progress=False)
    assert program.class_probabilities(x.to(DEVICE), 5).device.type == DEVICE
    assert program.classify(x.to(DEVICE)).shape == (20,)


@pytest.mark.parametrize("name", DIFFUSIONS)
def test_every_sampler_runs_there(name):
    case = CASES[name]
    program = case.build(device=DEVICE, dtype=torch.float32).eval()
    _, given = case.draw(program, 4, device=DEVICE, dtype=torch.float32)
    for options in ({}, {"sampler": "dpm++", "spacing": "karras"}, {"sampler": "heun"}, {"num_steps": 1}):
        x = program.sample(4, given, **options)
        assert x.device.type == DEVICE
        program.check(x, given)
    assert program.unroll().sample(4, given).device.type == DEVICE


def test_neither_random_state_is_touched():
    program = CASES["vae"].build(dtype=torch.float32)
    x = torch.randn(20, 2)
    states = torch.get_rng_state(), torch.cuda.get_rng_state()
    dgm.fit(program, x, epochs=1, device=DEVICE, progress=False)
    dgm.evaluate(program, x)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(torch.cuda.get_rng_state(), states[1])


def test_a_program_on_another_device_than_its_data_says_so():
    program = CASES["normal-learned"].build(device=DEVICE, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"x is on cpu, but the program is on cuda:0: use x.to\('cuda:0'\)"):
        program.log_prob(torch.zeros(3, 2))
