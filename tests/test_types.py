"""A script as a user writes it, which `make check` reads with mypy as strictly as it can, and pytest runs."""

from pathlib import Path

import torch
from torch import Tensor

import dgm_pyro as dgm
from dgm_pyro.networks import MLP


def test_a_users_script_is_typed(tmp_path: Path) -> None:
    prior: dgm.Flow = dgm.flow.realnvp(2)
    vae = dgm.VAE(prior, dgm.Normal(3, MLP((2,), 6)), dgm.Normal(2, MLP((3,), 4)))
    x: Tensor = torch.randn(8, 3)
    history: dgm.History = dgm.fit(vae, dgm.Data(x), epochs=1, device="cpu")
    z: Tensor = vae.encoder(x).sample()
    nats: float = dgm.evaluate(vae, dgm.Data(x)).nats
    named: dgm.Program = dgm.build("vae", dgm.Data(x), prior="flow")
    dgm.save(vae, tmp_path / "vae")
    loaded: dgm.Program = dgm.load(tmp_path / "vae")
    draws: Tensor = loaded.sample(4)
    figure = dgm.plots.samples(draws)
    figure.savefig(tmp_path / "draws.png")
    weights: Tensor = named.log_weights(x, num_particles=2)
    assert isinstance(history, dgm.History)
    assert isinstance(nats, float)
    assert z.shape == (8, 2)
    assert draws.shape == (4, 3)
    assert weights.shape == (2, 8)


def test_what_is_given_to_a_classifier_is_typed() -> None:
    labels, pixels = dgm.Categorical((), 2), dgm.Normal(3, MLP((), 6, num_classes=2))
    labeled = dgm.Labeled(labels, pixels, dgm.Categorical((), 2, MLP((3,), 2)))
    logits: Tensor = labeled.classifier(torch.zeros(4, 3)).logits
    assert logits.shape == (4, 2)
