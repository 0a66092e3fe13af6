"""Everything to run first on a CUDA device, in at most ten minutes: tests, waits, steps, a training.

    python benchmarks/gpu.py --device cuda --json gpu.json
    python benchmarks/gpu.py --quick            # a CPU, small networks, nothing compiled: to see that it runs

- **Tests**: those of tests/test_gpu.py, and what failed.
- **Waits**: how often a training, an evaluation and samples make the host wait for the device, and in which lines.
- **Steps**: plain Pyro, eager, and by `fit`, compiled or not, in bf16 and TF32; beside the same loss by hand.
- **Training**: a PixelCNN on glyphs of two levels for the time that is left; exact -log p(x) of test images.

A part that fails is named in the tables and in the file, and the others run.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import math
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyro
import torch
import torch.nn.functional as F
from timing import Benchmark, compare, main
from torch import Tensor, nn

import dgm_pyro as dgm
from dgm_pyro.networks import MLP, ConvDecoder, ConvEncoder, DenoisingUNet, PixelCNN
from dgm_pyro.networks.mlp import networks_in
from dgm_pyro.training.cuda_graph import WAITS

ROOT = Path(__file__).parent.parent
SECONDS = {"all": 570, "tests": 150, "waits": 60, "compiling": 45}
Step = Callable[[], object]


class HandVAE(nn.Module):
    """The negative ELBO of a VAE of bits, written in torch on the same networks."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, x: Tensor) -> Tensor:
        mean, raw = self.encoder(x).chunk(2, -1)
        scale = F.softplus(raw)
        logits = self.decoder(mean + scale * torch.randn_like(mean)).flatten(1)
        fit = F.binary_cross_entropy_with_logits(logits, x.flatten(1).to(logits.dtype), reduction="none").sum(-1)
        return (fit + 0.5 * (mean**2 + scale**2 - 1 - 2 * scale.log()).sum(-1)).mean()


class HandChain(nn.Module):
    """-log p(x) of bits under an autoregressive network."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        logits = self.network(x).squeeze(1)
        return (
            F.binary_cross_entropy_with_logits(logits, x.to(logits.dtype), reduction="none").flatten(1).sum(-1).mean()
        )


class HandDiffusion(nn.Module):
    """The negative bound of a diffusion in continuous time on the same network, at one time per datum."""

    def __init__(self, network: nn.Module, shape: tuple[int, ...]):
        super().__init__()
        self.network = network
        self.register_buffer("highest", torch.tensor(10.0))
        self.register_buffer("lowest", torch.tensor(-6.0))
        self.raw_scale = nn.Parameter(torch.full(shape, -5.0))

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn_like(x)
        t = (torch.arange(len(x), device=x.device) / len(x) + torch.rand((), device=x.device)) % 1
        t, noise = torch.cat((torch.zeros_like(t), t)), torch.cat((noise, torch.randn_like(x)))
        width = self.highest - self.lowest
        log_snr = (self.highest - width * t)[:, None, None, None]
        alpha, sigma = log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()
        both = torch.cat((x, x))
        x_t = alpha * both + sigma * noise
        first, later = (alpha * x_t - sigma * self.network(x_t, t)).chunk(2)
        fit = torch.distributions.Normal(first, F.softplus(self.raw_scale), validate_args=False).log_prob(x)
        loss = 0.5 * width * log_snr[len(x) :].exp() * (x - later).square()
        end_alpha, end_sigma = self.lowest.sigmoid().sqrt(), (-self.lowest).sigmoid().sqrt()
        last = 0.5 * (end_sigma**2 + (end_alpha * x) ** 2 - 1) - end_sigma.log()
        return (loss + last - fit).flatten(1).sum(-1).mean()


class HandSquaredError(nn.Module):
    """The usual loss of a diffusion, which is no bound: the squared error of v, one call of the network per datum."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        t = torch.rand(x.shape[0], device=x.device)
        alpha, sigma = (f(t * math.pi / 2)[:, None, None, None] for f in (torch.cos, torch.sin))
        noise = torch.randn_like(x)
        error = self.network(alpha * x + sigma * noise, t) - (alpha * noise - sigma * x)
        return error.square().flatten(1).sum(-1).mean()


def programs(bench: Benchmark) -> dict[str, tuple[Callable[[], Any], Callable[[], nn.Module], Tensor]]:
    """Each case by name: our program, the hand-written loss and a batch."""
    quick, image = bench.quick, (1, 28, 28)
    widths = (8, 16) if quick else (32, 64)

    def bits(size: int, *shape: int) -> Tensor:
        return torch.randint(2, (4 if quick else size, *shape), dtype=torch.uint8, device=bench.device)

    def mlps() -> tuple[nn.Module, nn.Module]:
        return MLP((784,), 100, (400,), levels=2), MLP((50,), 784, (400,))

    def convolutions() -> tuple[nn.Module, nn.Module]:
        return ConvEncoder(image, 100, widths, levels=2), ConvDecoder((50,), image, 1, widths)

    def vae(shape: Any, networks: Callable[[], tuple[nn.Module, nn.Module]]) -> dgm.VAE:
        encoder, decoder = networks()
        return dgm.VAE(dgm.Normal(50), dgm.Bernoulli(shape, decoder), dgm.Normal(50, encoder))

    def pixelcnn() -> nn.Module:
        return PixelCNN(image, 1, *((8, 3) if quick else (64, 12)), levels=2)

    def unet() -> nn.Module:
        return DenoisingUNet((3, 32, 32), (8, 16) if quick else (128, 256, 256), max_frequency=30.0)

    return {
        "VAE 784-400-50, 128": (lambda: vae(784, mlps), lambda: HandVAE(*mlps()), bits(128, 784)),
        "convolutional VAE 28x28, 128": (
            lambda: vae(image, convolutions),
            lambda: HandVAE(*convolutions()),
            bits(128, *image),
        ),
        "PixelCNN 28x28, 64": (
            lambda: dgm.Autoregressive(dgm.Bernoulli(image, pixelcnn())),
            lambda: HandChain(pixelcnn()),
            bits(64, *image),
        ),
        "U-Net 3x32x32, 64": (
            lambda: dgm.ContinuousDiffusion((3, 32, 32), unet(), predict="v"),
            lambda: HandDiffusion(unet(), (3, 32, 32)),
            torch.randn(4 if quick else 64, 3, 32, 32, device=bench.device),
        ),
    }


def step_of(loss: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor, bf16: bool = False) -> Step:
    """A step whose networks, or all of it where they are torch's alone, are in bf16."""
    ours = any(isinstance(part, dgm.Program) for part in module.modules())
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=torch.tensor(1e-3, device=x.device), fused=True, capturable=True
    )

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        everything = torch.autocast(x.device.type, torch.bfloat16, enabled=bf16 and not ours)
        with everything, networks_in(torch.bfloat16 if bf16 and ours else None):
            value = loss(x)
        value.backward()
        optimizer.step()

    return step


def graphed(step: Step) -> Step:
    """Forward, backward and update as one CUDA graph: the least time of a step that its launches bound."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=aside):
        step()
    return graph.replay


class Ways:
    """The ways to take a step of one case: each makes a program of its own, and returns the step."""

    def __init__(self, bench: Benchmark, make: Callable[[], Any], hand: Callable[[], nn.Module], x: Tensor):
        self.bench, self.make, self.hand, self.x = bench, make, hand, x

    def by_hand(self, *, graph: bool = False, compiled: bool = False, bf16: bool = False, last: bool = False) -> Step:
        module = self.module(self.hand(), last)
        loss = torch.compile(module, fullgraph=True) if compiled else module
        step = step_of(loss, module, self.x, bf16)
        return graphed(step) if graph else step

    def eager(self, *, bf16: bool = False) -> Step:
        program, bound = self.module(self.make()), dgm.ELBO()
        return step_of(lambda x: -bound(program, x).surrogate.mean(), program, self.x, bf16)

    def plain(self) -> Step:
        program, optimizer = self.module(self.make()), pyro.optim.Adam({"lr": 1e-3})
        svi = pyro.infer.SVI(program.model, program.guide, optimizer, pyro.infer.Trace_ELBO())
        return functools.partial(svi.step, self.x)

    def fit(self, *, last: bool = False, **options: Any) -> Step:
        """A step of a training, with all that it does around the loss: batches, clipping, checks, totals."""
        program, number = self.module(self.make(), last), 1 if self.bench.quick else 20
        data = dgm.Data(self.x.repeat(number, *(1,) * (self.x.dim() - 1)), levels=program.levels)
        chosen = dgm.TrainingOptions(
            batch_size=len(self.x), epochs=200, validation=None, device=self.bench.device, **options
        )
        training = dgm.Training(program, data, options=chosen)
        rows = itertools.count()

        def step() -> None:
            if next(rows) % number == 0:
                training.advance()

        while training.taken < max(8, 2 * number):  # compiled, recorded
            training.advance()
        if torch.device(self.bench.device).type == "cuda" and not training.history.cuda_graph:
            raise RuntimeError("the step has not become a CUDA graph")
        return step

    def module(self, module: nn.Module, last: bool = False) -> Any:
        module = module.to(self.bench.device).train()
        return module.to(memory_format=torch.channels_last) if last else module

    def all(self) -> dict[str, Callable[[], Step]]:
        cuda, images = torch.device(self.bench.device).type == "cuda", self.x.dim() == 4
        found: dict[str, Callable[[], Step]] = {
            "plain Pyro": self.plain,
            "eager": self.eager,
            "by hand": self.by_hand,
            "fit": functools.partial(self.fit, compile="auto"),
            "fit, TF32": functools.partial(self.fit, compile="auto", precision="tf32"),
            "fit, bf16": functools.partial(self.fit, compile="auto", precision="bf16"),
        }
        if cuda:
            found["by hand, one graph"] = functools.partial(self.by_hand, graph=True)
            found["by hand, one graph, bf16"] = functools.partial(self.by_hand, graph=True, bf16=True)
            if images:
                more = {"graph": True, "bf16": True, "last": True}
                found["by hand, one graph, bf16, channels last"] = functools.partial(self.by_hand, **more)
        if images:
            found["fit, bf16, channels last"] = functools.partial(self.fit, precision="bf16", last=True)
        if not self.bench.quick:
            found["fit, compiled"] = functools.partial(self.fit, compile=True)
            found["fit, compiled, bf16"] = functools.partial(self.fit, compile=True, precision="bf16")
        if cuda and not self.bench.quick:
            compiled = {"graph": True, "compiled": True}
            found["by hand, compiled, one graph"] = functools.partial(self.by_hand, **compiled)
            found["by hand, compiled, one graph, bf16"] = functools.partial(self.by_hand, **compiled, bf16=True)
        if isinstance(self.hand(), HandDiffusion):
            usual = Ways(self.bench, self.make, lambda: HandSquaredError(self.hand().network), self.x)
            found["squared error by hand"] = functools.partial(usual.by_hand, graph=cuda)
        return found


def steps(bench: Benchmark, left: Callable[[], float]) -> None:
    for title, (make, hand, x) in programs(bench).items():
        rows, numbers = [["", "ms", "first call s", "peak MiB"]], {}
        for name, way in Ways(bench, make, hand, x).all().items():
            if left() < (SECONDS["compiling"] if "compiled" in name else 8):
                rows.append([name, "no time left", "", ""])
                continue
            pyro.clear_param_store()
            torch.manual_seed(0)
            try:
                with pyro.validation_enabled(False):
                    numbers[name] = timed(bench, way)
                shown = numbers[name]
                rows.append([name, f"{shown['ms']:.2f}", f"{shown['first']:.1f}", f"{shown['mebibytes']:.0f}"])
            except Exception as error:  # on a new device each way may fail; the others tell what works
                traceback.print_exc(file=sys.stderr)
                numbers[name] = {"error": f"{type(error).__name__}: {error}"}
                rows.append([name, type(error).__name__, "", ""])
        bench.add(f"A step of {title}", rows, case=title, ways=numbers)


def timed(bench: Benchmark, way: Callable[[], Step]) -> dict[str, float]:
    cuda = torch.device(bench.device).type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    step = way()
    step()
    if cuda:
        torch.cuda.synchronize()
    first = time.perf_counter() - start
    repeats = {"warm_up": 0, "repeats": 1} if bench.quick else {"warm_up": 20, "repeats": 20, "in_a_row": 20}
    times = compare({"": step}, **repeats, seconds=1.5)
    peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else math.nan
    return {"ms": 1e3 * times.median(""), "first": first, "mebibytes": peak}


def waits(bench: Benchmark, left: Callable[[], float]) -> None:
    """Where the host waits. Only CUDA tells; elsewhere the same calls are made."""
    size, names = (8, ("vae",)) if bench.quick else (28, ("vae", "pixelcnn", "diffusion", "vq-vae", "implicit"))
    data = dgm.Data(torch.randint(2, (32, 1, size, size), dtype=torch.uint8), levels=2, name="bits")
    cuda, rows = torch.device(bench.device).type == "cuda", [["model", "what", "waits", "most in"]]
    for name in names:
        program = dgm.build(name, data)
        objective = "gan" if name == "implicit" else None
        options: dict[str, Any] = {
            "epochs": 2,
            "batch_size": 8,
            "validation": None,
            "progress": False,
            "compile": False,
        }
        calls: dict[str, Callable[[], object]] = {
            "fit, 8 steps": functools.partial(dgm.fit, program, data, objective, device=bench.device, **options),
            "evaluate, 32 data": functools.partial(dgm.evaluate, program, data),
            "sample, 4": functools.partial(program.sample, 4),
        }
        if name == "implicit":
            del calls["evaluate, 32 data"]
        for what, call in calls.items():
            if left() < 5:
                break
            seen: collections.Counter[str] = collections.Counter()
            with listening(seen) if cuda else contextlib.nullcontext():
                call()
            most = "; ".join(f"{count}x {line}" for line, count in seen.most_common(3))
            rows.append([name, what, str(seen.total()) if cuda else "not on CUDA", most])
    bench.add("Waits of the host for the device", rows)


@contextlib.contextmanager
def listening(seen: collections.Counter[str]) -> Iterator[None]:
    """Count the lines of the package in which torch warns of a synchronization."""

    def hear(message: Any, *where: Any, **more: Any) -> None:
        if WAITS in str(message):
            frames = [frame for frame in traceback.extract_stack() if "/dgm_pyro/" in frame.filename]
            seen[f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "torch"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = hear
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def tests(bench: Benchmark) -> None:
    command = [sys.executable, "-m", "pytest", "tests/test_gpu.py", "-q", "--tb=line", "--maxfail=60",
               "-p", "no:cacheprovider", *(["--collect-only"] if bench.quick else [])]  # fmt: skip
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS["tests"])
        lines = done.stdout.splitlines()
    except subprocess.TimeoutExpired as error:
        lines = [*(error.stdout or b"").decode().splitlines(), f"stopped after {SECONDS['tests']} s"]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    bench.add("Tests", [["tests/test_gpu.py"], *([line] for line in [*failed, *lines[-1:]])])


def training(bench: Benchmark, left: Callable[[], float]) -> None:
    def glyphs(split: str, num_data: int) -> dgm.Data:
        data = dgm.data.load("glyphs", split, num_data=num_data)
        return dgm.Data((data.x >= 128).to(torch.uint8), levels=2, name="glyphs of bits")

    data, test = (glyphs(split, size) for split, size in (("train", 20_000), ("test", 1000)))
    if bench.quick:
        data, test = data[:32], test[:8]
    torch.manual_seed(0)
    program, options = dgm.build("pixelcnn", data), {"batch_size": 256, "lr": 2e-3, "ema": 0.999}
    if bench.quick:
        shape, options = data.event_shape, {"batch_size": 16, "epochs": 1}
        program = dgm.Autoregressive(dgm.Bernoulli(shape, PixelCNN(shape, 1, 8, 3, levels=2)))
    else:
        options |= {"epochs": 1000, "minutes": max(0.5, (left() - 30) / 60), "compile": True, "precision": "bf16"}
    history = dgm.fit(program, data, device=bench.device, **options)
    evidence, start = dgm.evaluate(program, test, batch_size=1000), time.perf_counter()
    program.sample(4)
    rows = [
        ["parameters", f"{sum(p.numel() for p in program.parameters()):,}"],
        ["epochs, seconds", f"{len(history.epochs)}, {history.seconds:.0f}"],
        ["test evidence", str(evidence)],
        ["4 samples", f"{time.perf_counter() - start:.1f} s"],
    ]
    numbers = {"history": history.as_dict(), "test": evidence.as_dict()}
    bench.add("A PixelCNN of glyphs of bits", [["", ""], *rows], **numbers)


def run(bench: Benchmark) -> None:
    began = time.perf_counter()

    def left(until: float = SECONDS["all"]) -> float:
        return until - (time.perf_counter() - began)

    parts: dict[str, Step] = {
        "tests": functools.partial(tests, bench),
        "waits": functools.partial(waits, bench, functools.partial(left, SECONDS["tests"] + SECONDS["waits"])),
        "steps": functools.partial(steps, bench, lambda: left() - 150),
        "training": functools.partial(training, bench, left),
    }
    for name, part in parts.items():
        try:
            part()
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            bench.add(f"{name} failed", [["error"], [f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"]])


if __name__ == "__main__":
    main(run, __doc__)
