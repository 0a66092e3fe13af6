"""The networks of the site's interactive page: trained by the tour's recipes, and written as a script that holds them.

A script, since a page that is opened from a file may load no other kind of file. Weights are base64 of little-endian
float32; `networks.js` runs them.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dgm_pyro as dgm
from dgm_pyro.experiments.tour.stops import STOPS

# When one of these is newer than the script that was written, it is written again.
SOURCES = (Path(__file__), Path(dgm.networks.denoisers.__file__), Path(dgm.networks.mlp.__file__))
EPOCHS = 30
"""Epochs of the diffusion: fewer than in the tour, because it takes most of the time of a build."""


def export(path: Path) -> None:
    """Train a VAE with two latents and a diffusion on the digits, and write them to ``path``; a minute or two."""
    train, test = dgm.data.load("digits"), dgm.data.load("digits", "test")
    recipes = {stop.name: stop.recipe or {} for stop in STOPS}
    torch.manual_seed(0)
    vae = a_vae(train)
    dgm.fit(vae, train, progress=False, **recipes["vae"])
    diffusion = a_diffusion(train)
    dgm.fit(diffusion, train, progress=False, **recipes["diffusion"] | {"epochs": EPOCHS})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"const EXPORTED = {json.dumps(content(vae, diffusion, test))};\n")


def a_vae(data: dgm.Data) -> dgm.VAE:
    return dgm.build("vae", data, latent_size=2, hidden=(128, 128), likelihood="categorical")  # type: ignore[return-value]


def a_diffusion(data: dgm.Data) -> dgm.Diffusion:
    return dgm.build("diffusion", data)  # type: ignore[return-value]


def content(vae: dgm.VAE, diffusion: dgm.Diffusion, data: dgm.Data) -> dict[str, Any]:
    """The content of the page: p(x | z) and q(z | x) of ``data``, the denoiser and its schedule, and the data."""
    assert data.y is not None
    with torch.no_grad():
        q = vae.encoder(data.x).base_dist  # type: ignore[operator]
    constants = {name: getattr(diffusion.noise_schedule, name).tolist() for name in CONSTANTS}
    return {
        "levels": data.levels,
        "x": packed(data.x),
        "y": data.y.tolist(),
        "decoder": tensors(vae.likelihood),
        "posterior": {"mean": packed(q.loc), "scale": packed(q.scale)},
        "denoiser": tensors(diffusion.denoiser),
        "schedule": constants,
    }


CONSTANTS = ("alpha", "sigma", "from_clean", "from_noisy", "spread")


def tensors(module: torch.nn.Module) -> dict[str, Any]:
    """Parameters and buffers by name."""
    return {name: packed(value) for name, value in module.state_dict().items()}


def packed(value: Tensor) -> dict[str, Any]:
    values = value.detach().float().contiguous().numpy().astype("<f4").tobytes()
    return {"shape": list(value.shape), "values": base64.b64encode(values).decode()}
