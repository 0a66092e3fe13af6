"""A training whose steps are replayed is the training whose steps are taken.

Here a traced graph of the step's operations stands in for a CUDA graph. Like it, it repeats the operations, on the
same memory, and no Python: what a step reads from Python is then that of the step that was recorded.
"""

import copy
import math
import random

import pytest
import torch
from programs import CASES, data_for
from pyro.infer import Trace_ELBO
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

import dgm_pyro as dgm
from dgm_pyro.training import cuda_graph
from dgm_pyro.training import fit as training
from dgm_pyro.training.cuda_graph import CudaGraph

OPTIONS = {"epochs": 3, "batch_size": 8, "validation": None, "compile": "auto", "progress": False}


class Traced(CudaGraph):
    """Records by running the function once, after which every tensor that it wrote to is what it was."""

    def warm_up(self, arguments):
        return self.function(*arguments)

    def record(self, arguments):
        owner = self.function.__self__
        program, optimizer, watch = owner.program, owner.optimizer, owner.watch
        state = [value for each in optimizer.state.values() for value in each.values()]
        written = [*program.parameters(), *program.buffers(), *state, watch.now, watch.step, watch.values]
        before, structures = [value.detach().clone() for value in written], []

        def flat(*tensors):
            leaves, structure = pytree.tree_flatten(self.function(*pytree.tree_unflatten(tensors, inputs)))
            structures.append(structure)
            return leaves

        held, inputs = pytree.tree_flatten(arguments)
        with torch.random.fork_rng():
            graph = make_fx(flat)(*held)
        with torch.no_grad():
            for value, old in zip(written, before, strict=True):
                value.copy_(old)
        (output,) = graph.graph.find_nodes(op="output")
        values = [node.meta["val"] for node in output.args[0]]
        results = [torch.zeros(value.shape, dtype=value.dtype) for value in values]

        def replay():
            with torch.no_grad():
                for result, value in zip(results, graph(*held), strict=True):
                    result.copy_(value)

        return replay, pytree.tree_unflatten(results, structures[0])


@pytest.fixture
def replayed(monkeypatch):
    monkeypatch.setattr(training, "DEVICES", {"cpu"})
    monkeypatch.setattr(training, "CudaGraph", Traced)


def trained(name, data, objective=None, **options):
    program = CASES[name].build()
    history = dgm.fit(program, data, objective, **OPTIONS | options)
    return history, program.state_dict()


NAMES = ("normal-learned", "made", "vae", "vae-flow-prior", "diffusion", "continuous-diffusion-learned", "labeled")


@pytest.mark.parametrize("name", NAMES)
def test_a_replayed_training_is_the_same(name, monkeypatch):
    data = data_for(CASES[name], CASES[name].build(), 43)  # the last batch of an epoch is smaller
    expected, ours = trained(name, data, compile=False)
    monkeypatch.setattr(training, "DEVICES", {"cpu"})
    monkeypatch.setattr(training, "CudaGraph", Traced)
    found, theirs = trained(name, data)
    assert (expected.cuda_graph, found.cuda_graph) == (False, True)
    assert found.losses == pytest.approx(expected.losses, rel=1e-6)
    for key, value in ours.items():
        torch.testing.assert_close(theirs[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("objective", "options"),
    [
        ("annealed", {}),
        ("iwae:3", {}),
        (None, {"ema": 0.9, "validation": 0.2, "clip_norm": 0.1}),
        (None, {"precision": "bf16"}),
        (None, {"optimizer": "Adam(fused=True)", "weight_decay": 0.1, "lr_schedule": "constant"}),
    ],
    ids=str,
)
def test_what_changes_from_step_to_step_reaches_the_replays(objective, options, monkeypatch):
    data = data_for(CASES["vae"], CASES["vae"].build(), 43)
    expected, ours = trained("vae", data, objective, compile=False, **options)
    monkeypatch.setattr(training, "DEVICES", {"cpu"})
    monkeypatch.setattr(training, "CudaGraph", Traced)
    found, theirs = trained("vae", data, objective, **options)
    assert found.cuda_graph
    assert found.losses == pytest.approx(expected.losses, rel=1e-6)
    for key, value in ours.items():
        torch.testing.assert_close(theirs[key], value, rtol=1e-5, atol=1e-6)


def test_a_loss_that_breaks_in_a_replay_is_found_at_its_step(replayed):
    """The learning rate is what every replay reads, and the batch: here one datum of the last batch is infinite."""
    program, data = dgm.Normal(2, learned=True), torch.randn(80, 2)

    def broken(x):
        calls.append(1)
        return x * math.inf if len(calls) == 9 else x

    calls = []
    with pytest.raises(dgm.NonFiniteLossError, match="the loss is not finite at site 'x', epoch 1, step 9"):
        dgm.fit(program, data, augment=broken, **OPTIONS)
    assert torch.equal(program.log_prob(data), dgm.Normal(2, learned=True).log_prob(data))


def test_a_resumed_training_is_recorded_anew(replayed):
    data = data_for(CASES["vae"], CASES["vae"].build(), 40)
    options = dgm.TrainingOptions(epochs=4, batch_size=8, validation=None)
    whole = dgm.Training(CASES["vae"].build(), data, options=options)
    with whole:
        while not whole.finished:
            whole.advance()
            if len(whole.history.epochs) == 2:
                state = copy.deepcopy(whole.state_dict())
    assert [type(group["lr"]) for group in state["optimizer"]["param_groups"]] == [float]
    assert not state["optimizer"]["param_groups"][0]["capturable"]
    again = dgm.Training(CASES["vae"].build(), data, options=options)
    for state_is_loaded_into in (again, whole):  # the other has a graph already
        state_is_loaded_into.load_state_dict(state)
        with state_is_loaded_into as training_:
            while not training_.finished:
                training_.advance()
    assert whole.history.losses == pytest.approx(again.history.losses, rel=1e-6)
    for key, value in whole.program.state_dict().items():
        torch.testing.assert_close(again.program.state_dict()[key], value, rtol=1e-5, atol=1e-6)


UNRECORDED = {
    "compile": False,
    "accumulate": 2,
    "skip_norm": 1e6,
    "optimizer": "SGD",
    "lr_schedule": "ExponentialLR(gamma=0.9)",
    "objective": Trace_ELBO(),
}


@pytest.mark.parametrize("option", UNRECORDED)
def test_what_no_graph_holds_is_not_recorded(option, replayed):
    data = data_for(CASES["vae"], CASES["vae"].build(), 40)
    assert not dgm.fit(CASES["vae"].build(), data, **OPTIONS | {option: UNRECORDED[option]}).cuda_graph


def test_random_numbers_of_python_are_not_recorded(replayed):
    class Jitter(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 4)

        def forward(self, x):
            return self.layer(x) + random.random()

    program = dgm.VAE(dgm.Normal(2), dgm.Normal(2, Jitter()), dgm.Normal(2, Jitter()))
    assert not dgm.fit(program, torch.randn(20, 2), **OPTIONS | {"epochs": 6}).cuda_graph
    graph = CudaGraph(lambda: random.random())
    graph.calls = cuda_graph.WARM_UP
    graph.record = lambda arguments: (None, graph.function(*arguments))
    assert 0 < graph() < 1
    assert (
        graph.refused == "CompilationError: a number is drawn from Python's random, which a graph would repeat: "
        "draw it with torch"
    )
