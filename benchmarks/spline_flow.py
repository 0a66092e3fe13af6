"""A spline coupling flow beside those of Pyro, zuko, normflows and nflows: a step of training, and sampling.

    python benchmarks/spline_flow.py [--quick] [--device cuda] [--json FILE]

D = 64, 4 couplings of rational-quadratic splines with 8 bins on (-5, 5) and a 128-128 conditioner, batches of 256: the
same model by everyone, with SiLU and the same fused Adam. A step is the loss, its gradient, and the update. Rows named
"compiled" go through torch.compile: ours by way of `dgm.compile`, the others as they are, if they compile as one graph.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import nflows.distributions
import nflows.flows
import nflows.transforms
import normflows
import pyro
import pyro.distributions as dist
import torch
import zuko
from normflows.flows.neural_spline.coupling import PiecewiseRationalQuadraticCoupling
from pyro.distributions import transforms
from pyro.nn import DenseNN
from timing import Benchmark, main
from torch import Tensor, nn

import dgm_pyro as dgm
from dgm_pyro.families.flow import nsf

D, LAYERS, BINS, HIDDEN, BATCH, BOX = 64, 4, 8, 128, 256, 5.0
HALF = D // 2


@dataclass
class Model:
    """A flow: its parameters, log p(x), and samples."""

    module: nn.Module
    log_prob: Callable[[Tensor], Tensor]
    sample: Callable[[], Tensor]


def ours() -> Model:
    flow = nsf(D, layers=LAYERS, hidden=(HIDDEN, HIDDEN), bins=BINS)
    return Model(flow, flow.log_prob, lambda: flow.sample(BATCH))


class PyroFlow(nn.Module):
    """Halves of the features exchange their roles between couplings."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [HALF * BINS, HALF * BINS, HALF * (BINS - 1)]
        self.couplings = nn.ModuleList(
            transforms.SplineCoupling(
                D, HALF, DenseNN(HALF, [HIDDEN, HIDDEN], sizes, nn.SiLU()), BINS, BOX, order="quadratic", identity=True
            )
            for _ in range(LAYERS)
        )
        self.register_buffer("zeros", torch.zeros(D))
        self.register_buffer("swap", torch.arange(D).roll(HALF))

    def forward(self) -> dist.TransformedDistribution:
        parts = [part for coupling in self.couplings for part in (coupling, transforms.Permute(self.swap))]
        return dist.TransformedDistribution(dist.Normal(self.zeros, 1.0).to_event(1), parts[:-1])

    def log_prob(self, x: Tensor) -> Tensor:
        flow = self()
        log_prob = flow.log_prob(x)
        flow.clear_cache()  # which would hand out the graph of the last step again
        return log_prob


def of_pyro() -> Model:
    flow = PyroFlow()
    return Model(flow, flow.log_prob, lambda: flow().sample((BATCH,)))


def of_zuko() -> Model:
    couplings = [
        zuko.flows.coupling.GeneralCouplingTransform(
            D,
            mask=torch.arange(D) % 2 == i % 2,
            univariate=zuko.transforms.MonotonicRQSTransform,
            shapes=[(BINS,), (BINS,), (BINS - 1,)],
            hidden_features=(HIDDEN, HIDDEN),
            activation=nn.SiLU,
        )
        for i in range(LAYERS)
    ]
    base = zuko.lazy.UnconditionalDistribution(
        zuko.distributions.DiagNormal, torch.zeros(D), torch.ones(D), buffer=True
    )
    flow = zuko.lazy.Flow(couplings, base)
    return Model(flow, lambda x: flow().log_prob(x), lambda: flow().sample((BATCH,)))


class Conditioner(nn.Sequential):
    """A network as normflows and nflows expect it: a second input, and ``hidden_features`` to scale the bins by."""

    hidden_features = HIDDEN

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            nn.Linear(inputs, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, outputs)
        )

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return super().forward(x)


def of_normflows() -> Model:
    couplings = [
        PiecewiseRationalQuadraticCoupling(torch.arange(D) % 2 == i % 2, Conditioner, BINS, "linear", BOX)
        for i in range(LAYERS)
    ]
    flow = normflows.NormalizingFlow(normflows.distributions.DiagGaussian(D, trainable=False), couplings)
    return Model(flow, flow.log_prob, lambda: flow.sample(BATCH)[0])


def of_nflows() -> Model:
    couplings = [
        nflows.transforms.PiecewiseRationalQuadraticCouplingTransform(
            torch.arange(D) % 2 == i % 2, Conditioner, BINS, "linear", BOX
        )
        for i in range(LAYERS)
    ]
    base = nflows.distributions.StandardNormal([D])
    flow = nflows.flows.Flow(nflows.transforms.CompositeTransform(couplings), base)
    return Model(flow, flow.log_prob, lambda: flow.sample(BATCH))


PEERS = {"Pyro": of_pyro, "zuko": of_zuko, "normflows": of_normflows, "nflows": of_nflows}


def step_of(module: nn.Module, loss: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-4, fused=True)

    def step() -> Tensor:
        optimizer.zero_grad()
        value = loss(x)
        value.backward()
        optimizer.step()
        return value.detach()

    return step


def mean_of(log_prob: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: -log_prob(x).mean()


class Drawn(nn.Module):
    """x from z, for `torch.export`."""

    def __init__(self, flow: nn.Module) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, z: Tensor) -> Tensor:
        for transform in self.flow().transforms:
            z = transform(z)
        return z


def compiled_sampling(flow: nn.Module, device: str) -> Callable[[], Tensor]:
    noise = lambda: torch.randn(BATCH, D, device=device)  # noqa: E731
    with torch.no_grad(), pyro.validation_enabled(False):
        draw = torch.compile(torch.export.export(Drawn(flow), (noise(),), strict=False).module())
    return lambda: draw(noise())


def run(bench: Benchmark) -> None:
    torch.manual_seed(0)
    x = torch.randn(BATCH, D, device=bench.device)
    models = {"ours": ours(), **{name: make() for name, make in PEERS.items()}}
    for model in models.values():
        model.module.to(bench.device)
    sizes = {name: sum(p.numel() for p in m.module.parameters() if p.requires_grad) for name, m in models.items()}
    bench.add("Parameters", [["", "number"], *([name, f"{size:,}"] for name, size in sizes.items())])

    steps = {name: step_of(model.module, mean_of(model.log_prob), x) for name, model in models.items()}
    fast = ours().module.to(bench.device)
    steps = {"ours, compiled": step_of(fast, dgm.compile(fast), x)} | steps
    for name, make in {} if bench.quick else PEERS.items():
        model = make()
        model.module.to(bench.device)
        step = step_of(model.module, mean_of(torch.compile(model.log_prob, fullgraph=True)), x)
        try:
            step()
        except Exception as error:  # whatever the compiler did not manage
            print(f"{name} does not compile as one graph: {str(error).strip().splitlines()[0]}", flush=True)
        else:
            steps[f"{name}, compiled"] = step
    for name, step in steps.items():
        loss = float(step())
        if not math.isfinite(loss):
            raise RuntimeError(f"the loss of {name} is {loss}")
    bench.compare(f"A step of training, batch {BATCH}", steps, reference="ours, compiled")

    draws = {name: torch.no_grad()(model.sample) for name, model in models.items()}
    draws = {"ours, compiled": torch.no_grad()(compiled_sampling(fast, bench.device))} | draws
    bench.compare(f"Sampling {BATCH}", draws, reference="ours, compiled")


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # those of the peers
    main(run, __doc__)
