"""What takes long shows what is left of it when asked, and is silent when not."""

import pytest
import torch
from torch import nn
from tqdm import tqdm

import dgm_pyro as dgm
from dgm_pyro import evaluation

X = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))


def vae():
    return dgm.VAE(dgm.Normal(2), dgm.Normal(2, nn.Linear(2, 4)), dgm.Normal(2, nn.Linear(2, 4)))


def diffusion():
    return dgm.Diffusion(2, dgm.networks.DenoisingMLP((2,), (4,)), num_steps=3)


def labeled():
    return dgm.Labeled(dgm.Categorical((), 2), dgm.Normal(2, nn.Embedding(2, 4)))


def classes_of_vaes():
    return dgm.build("vae", dgm.Data(X, torch.tensor([0, 1, 0, 1])), labeled=True)


FAST = {"num_particles": 4, "num_temperatures": 2, "num_chains": 2, "gradient_steps": 2, "num_samples": 2}
CALLS = {
    "ais": (lambda **shown: dgm.infer.ais(vae(), X, num_temperatures=2, **shown), ("adapt", "anneal")),
    "bidirectional": (lambda **shown: dgm.infer.bidirectional(vae(), 2, num_temperatures=2, **shown), ("adapt",)),
    "gaps": (
        lambda **shown: dgm.infer.gaps(vae(), X, **FAST, **shown),
        ("ELBO", "best q", "iwae-4", "adapt", "anneal"),
    ),
    "smc": (lambda **shown: dgm.infer.smc(diffusion(), X, num_particles=2, **shown), ("tune", "propagate")),
    "nuts": (lambda **shown: dgm.infer.nuts(vae(), X, 2, 2, max_tree_depth=1, **shown), ("nuts",)),
    "sbc": (
        lambda **shown: dgm.infer.sbc(vae(), num_samples=9, num_posterior_samples=3, bins=2, **shown),
        ("rank",),
    ),
    "units": (lambda **shown: dgm.infer.units(vae(), X, num_samples=2, **shown), ("units",)),
    "check": (
        lambda **shown: dgm.infer.check(vae(), X, num_samples=9, num_posterior_samples=3, bins=2, **shown),
        ("rank", "units"),
    ),
    "impute": (
        lambda **shown: dgm.infer.impute(vae(), X, X > 0, num_temperatures=2, **shown),
        ("adapt", "anneal"),
    ),
    "evaluate": (lambda **shown: dgm.evaluate(vae(), X, num_particles=3, **shown), ("iwae-3",)),
    "encode": (lambda **shown: dgm.representations.encode(vae(), X, **shown), ("codes",)),
    "decode": (lambda **shown: dgm.representations.decode(vae(), X, **shown), ("codes",)),
    "beliefs": (lambda **shown: dgm.classification.beliefs(labeled(), X, **shown), ("classify",)),
    "detect": (lambda **shown: dgm.anomaly.detect(vae(), X, X, false_alarm_rate=0.5, **shown), ("elbo",)),
}


@pytest.mark.parametrize("num_particles", [1, 3])
def test_a_bar_over_classes_ends_at_its_total(num_particles, monkeypatch):
    bars = []

    class Kept(tqdm):
        def close(self):
            bars.append((self.n, self.total))
            super().close()

    monkeypatch.setattr(evaluation, "tqdm", Kept)
    dgm.evaluate(classes_of_vaes(), dgm.Data(X), num_particles=num_particles, progress=True)
    ((done, total),) = set(bars)
    assert done == pytest.approx(total) == pytest.approx(4 * num_particles)


@pytest.mark.parametrize("name", CALLS)
def test_bars_are_shown_on_demand(name, capfd, monkeypatch):
    for variable in ("CI", "PYTEST_XDIST_WORKER"):  # under which Pyro shows none
        monkeypatch.delenv(variable, raising=False)
    call, words = CALLS[name]
    call()
    assert capfd.readouterr().err == ""
    call(progress=True)
    shown = capfd.readouterr().err
    assert all(word in shown for word in words), shown
    assert "%|" in shown
