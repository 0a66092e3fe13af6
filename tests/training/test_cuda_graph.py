"""A training whose steps are replayed is the training whose steps are taken.

Here a traced graph of the step's operations stands in for a CUDA graph. Like it, it repeats the operations, on the
same memory, and no Python: what a step reads from Python is then that of the step that was recorded.
"""

import contextlib
import copy
import math
import random
import warnings
from types import SimpleNamespace

import pytest
import torch
from programs import CASES, data_for
from pyro.infer import Trace_ELBO
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

import dgm_pyro as dgm
from dgm_pyro.objectives import ELBO
from dgm_pyro.training import compilation, cuda_graph, step
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
    monkeypatch.setattr(training, "RECORDING_DEVICES", {"cpu"})
    monkeypatch.setattr(training, "CudaGraph", Traced)


CHANGING = {  # what changes from step to step
    "annealed": ("annealed", {}),
    "iwae": ("iwae:3", {}),
    "average": (None, {"ema": 0.9, "validation": 0.2, "clip_norm": 0.1}),
    "bf16": (None, {"precision": "bf16"}),
    "Adam": (None, {"optimizer": "Adam(fused=True)", "weight_decay": 0.1, "lr_schedule": "constant"}),
}
NAMES = ("normal-learned", "made", "vae", "vae-flow-prior", "diffusion", "continuous-diffusion-learned", "labeled")
RECORDED = {name: (name, None, {}) for name in NAMES} | {key: ("vae", *each) for key, each in CHANGING.items()}


@pytest.mark.parametrize("case", RECORDED)
def test_a_replayed_training_is_the_same(case, replayed):
    name, objective, options = RECORDED[case]
    data = data_for(CASES[name], CASES[name].build(), 43)  # the last batch of an epoch is smaller
    found = []
    for compile in (False, "auto"):
        program = CASES[name].build()
        history = dgm.fit(program, data, objective, **OPTIONS | options | {"compile": compile})
        found.append((history, program.state_dict()))
    (expected, ours), (replays, theirs) = found
    assert (expected.cuda_graph, replays.cuda_graph) == (False, True)
    assert replays.losses == pytest.approx(expected.losses, rel=1e-6)
    for key, value in ours.items():
        torch.testing.assert_close(theirs[key], value, rtol=1e-5, atol=1e-6)


def test_a_loss_that_breaks_in_a_replay_is_found_at_its_step(replayed):
    """The ninth of ten batches is infinite."""
    program, data = dgm.Normal(2, learned=True), torch.randn(80, 2)

    def broken(x):
        calls.append(1)
        return x * math.inf if len(calls) == 9 else x

    calls = []
    with pytest.raises(dgm.NonFiniteLossError, match="the loss is not finite at site 'x', epoch 1, step 9"):
        dgm.fit(program, data, augment=broken, **OPTIONS)
    assert torch.equal(program.log_prob(data), dgm.Normal(2, learned=True).log_prob(data))


def test_a_resumed_training_is_recorded_anew(replayed):
    data = data_for(CASES["vae"], CASES["vae"].build(), 64)
    options = dgm.TrainingOptions(epochs=4, batch_size=8, validation=None)
    with dgm.Training(CASES["vae"].build(), data, options=options) as whole:
        whole.advance()
        whole.advance()
        state = copy.deepcopy(whole.state_dict())
        while not whole.finished:
            whole.advance()
        assert whole.graph.recorded
        losses = whole.history.losses
        whole.load_state_dict(state)  # into one that has a graph already
        assert not whole.graph.recorded
        with dgm.Training(CASES["vae"].build(), data, options=options) as again:
            again.load_state_dict(state)
            for each in (again, whole):
                while not each.finished:
                    each.advance()
                assert each.graph.recorded
                assert each.history.losses == pytest.approx(losses, rel=1e-6)
    assert [type(group["lr"]) for group in state["optimizer"]["param_groups"]] == [float]
    assert not state["optimizer"]["param_groups"][0]["capturable"]
    for key, value in whole.program.state_dict().items():
        torch.testing.assert_close(again.program.state_dict()[key], value, rtol=1e-5, atol=1e-6)


def test_the_callers_optimizer_is_one_for_eager_steps_again(replayed):
    data, made = data_for(CASES["vae"], CASES["vae"].build(), 64), []

    def optimizer(parameters):
        made.append(torch.optim.Adam(parameters, lr=0.01, fused=True))
        return made[-1]

    options = dgm.TrainingOptions(epochs=2, batch_size=8, validation=None)
    with dgm.Training(CASES["vae"].build(), data, options=options, optimizer=optimizer) as run:
        run.advance()
        assert run.graph.recorded
        assert made[0].param_groups[0]["capturable"]
    group = made[0].param_groups[0]
    assert (type(group["lr"]), group["lr"], group["capturable"]) == (float, 0.01, False)
    made[0].step()


class Foreign:
    def __call__(self, program, x, given=None, observed=None):
        return ELBO()(program, x, given, observed)


UNRECORDED = {
    "accumulate is more than 1": {"accumulate": 2},
    "skip_norm looks at the gradient": {"skip_norm": 1e6},
    "the optimizer is no fused Adam or AdamW": {"optimizer": "SGD"},
    "the scheduler is torch's": {"lr_schedule": "ExponentialLR(gamma=0.9)"},
}


@pytest.mark.parametrize("reason", UNRECORDED)
def test_what_no_graph_holds_is_not_recorded(reason, replayed, monkeypatch):
    monkeypatch.setattr(step, "optimized", lambda graph, **options: compilation.optimized(graph, "eager"))
    data = data_for(CASES["vae"], CASES["vae"].build(), 24)
    with pytest.warns(UserWarning, match=f"the step is no CUDA graph: {reason}") as said:
        history = dgm.fit(CASES["vae"].build(), data, **OPTIONS | UNRECORDED[reason] | {"compile": True})
    assert not history.cuda_graph
    assert [each.filename for each in said] == [__file__]


@pytest.mark.parametrize(
    ("name", "objective", "compile"),
    [
        ("vae", None, False),
        ("vae", Trace_ELBO(), "auto"),
        ("vae", Foreign(), "auto"),  # it may count its calls
        ("vae", "dreg:4", "auto"),
        ("vae-quantized", None, "auto"),
    ],
    ids=["eager", "pyro", "foreign", "hook", "codebook"],
)
def test_nor_are_steps_that_python_takes_part_in(name, objective, compile, replayed):
    data = data_for(CASES[name], CASES[name].build(), 40)
    history = dgm.fit(CASES[name].build(), data, objective, **OPTIONS | {"compile": compile})
    assert not history.cuda_graph


def test_a_step_that_waits_is_not_recorded(monkeypatch):
    """Torch warns of the waits, once of its way to warn; other warnings are those of the function."""
    said = []
    for name, value in {
        "Stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
        "current_stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
        "stream": lambda stream: contextlib.nullcontext(),
        "get_sync_debug_mode": lambda: 0,
        "set_sync_debug_mode": lambda mode: said.append(mode) or (mode and warnings.warn(cuda_graph.LOOKS)),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    still = CudaGraph(lambda x: x + 1)
    assert still(torch.zeros(2)).sum() == 2
    assert still.refused is None

    def waits(x):
        warnings.warn("of its own")
        warnings.warn(cuda_graph.WAITS)
        return 2 * x

    graph = CudaGraph(waits)
    with pytest.warns(UserWarning, match="^of its own$") as heard:
        assert graph(torch.ones(2)).sum() == 4
    assert len(heard) == 1
    assert f"{__file__}:" in graph.refused
    graph.function = lambda x: 3 * x
    assert graph(torch.ones(2)).sum() == 6
    assert not graph.recorded
    assert said == ["warn", 0, "warn", 0]


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
    graph.warm_ups = cuda_graph.WARM_UP
    graph.record = lambda arguments: (None, graph.function(*arguments))
    assert 0 < graph() < 1
    assert (
        graph.refused == "CompilationError: a number is drawn from Python's random, which a graph would repeat: "
        "draw it with torch"
    )


def test_nor_are_numbers_that_the_cpu_draws():
    """They make nothing wait for the device."""
    graph = CudaGraph(lambda: torch.rand(()).item())
    graph.warm_ups = cuda_graph.WARM_UP
    graph.record = lambda arguments: (None, graph.function(*arguments))
    torch.manual_seed(0)
    numbers = [graph(), graph()]
    assert "a number is drawn on the CPU" in graph.refused
    torch.manual_seed(0)
    assert numbers == [torch.rand(()).item(), torch.rand(()).item()]
