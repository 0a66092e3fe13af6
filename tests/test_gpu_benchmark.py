"""benchmarks/gpu.py, which is for a GPU, runs on a CPU; what it compares is the same loss."""

import pytest
import torch
from scripts import load_script

import dgm_pyro as dgm


@pytest.fixture(scope="module")
def gpu():
    return load_script("benchmarks/gpu.py")


@pytest.mark.parametrize("title", ["VAE 784-400-50, 128", "PixelCNN 28x28, 64", "U-Net 3x32x32, 64"])
def test_the_loss_by_hand_is_that_of_the_program(title, gpu):
    make, hand, x = gpu.programs(gpu.Benchmark(quick=True))[title]
    torch.manual_seed(0)
    program = make().train()
    torch.manual_seed(0)
    loss = hand()
    if hasattr(loss, "raw_scale"):
        loss.raw_scale.data = program.raw_scale.data
    torch.manual_seed(1)
    expected = -dgm.ELBO()(program, x).surrogate.mean()
    torch.manual_seed(1)
    torch.testing.assert_close(loss(x), expected)


def test_every_part_runs_on_a_cpu(gpu, monkeypatch):
    bench = gpu.Benchmark(quick=True)
    cases = gpu.programs(bench)
    monkeypatch.setattr(gpu, "programs", lambda bench: dict([*cases.items()][:1]))
    monkeypatch.setattr(gpu, "tests", lambda bench: None)
    gpu.run(bench)
    assert [table["title"] for table in bench.tables] == [
        "Waits of the host for the device",
        "A step of VAE 784-400-50, 128",
        "A PixelCNN of glyphs of bits",
    ]
    assert all(way["ms"] > 0 for way in bench.tables[1]["ways"].values())
    assert bench.tables[2]["test"]["kind"] == "exact"


def test_a_way_that_fails_is_named_and_the_others_run(gpu, monkeypatch):
    bench = gpu.Benchmark(quick=True)
    cases = gpu.programs(bench)
    monkeypatch.setattr(gpu, "programs", lambda bench: dict([*cases.items()][:1]))
    monkeypatch.setattr(gpu.Ways, "plain", lambda ways: 1 / 0)
    gpu.steps(bench, lambda: 1000.0)
    ways = bench.tables[0]["ways"]
    assert ways["plain Pyro"] == {"error": "ZeroDivisionError: division by zero"}
    assert ways["by hand"]["ms"] > 0
