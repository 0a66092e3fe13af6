"""Names of earlier versions: files with them are read under today's names, and errors elsewhere give today's names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

CLASSES: dict[str, str] = {"Labelled": "Labeled"}
"""Classes in version 1 of the checkpoint format, by their old names."""

_GIVEN, _SIZE = {"context_shape": "given_shape"}, {"features": "num_features"}
_PARAMETERS = {"outputs": "num_parameters"}

ARGUMENTS: dict[str, dict[str, str]] = {
    **dict.fromkeys(("ConvDecoder", "DenoisingMLP", "DenoisingUNet"), _GIVEN | _PARAMETERS),
    **dict.fromkeys(("CausalTransformer", "MADE", "MLP"), _GIVEN),
    **dict.fromkeys(("ActNorm", "Elementwise", "LULinear"), _SIZE),
    **dict.fromkeys(("Planar", "Sylvester"), _GIVEN | _SIZE),
    "Autoregressive": {"features": "factors"},
    "ColumnReader": {"classes": "categories"},
    "ConvEncoder": {**_GIVEN, "hidden": "width"},
    "ConvNet": _PARAMETERS,
    "ContinuousDiffusion": {"schedule": "noise_schedule", "steps": "num_steps"},
    "Diffusion": {"schedule": "noise_schedule", "steps": "num_steps"},
    "Discriminative": {"labels": "classifier"},
    "Flow": {"context": "embedding"},
    "Implicit": {"latent": "latent_name"},
    "Labelled": {"label": "label_name"},
    "LogSNR": {"units": "num_units"},
    "Normal": {"scale": "scale_type"},
    "PixelCNN": {**_GIVEN, "channels": "width"},
    "SemiAmortized": {"draws": "num_samples", "steps": "gradient_steps"},
    "TopDown": {"latent": "latent_name"},
    "VAE": {"latent": "latent_name"},
}
"""Arguments of the constructors in versions 1 to 4, by class."""

_CLASSIFIER = {"labels": "Discriminative.classifier"}
_FACTORS = {"features": "factors"}

PARTS: dict[int, dict[str, str]] = {
    1: {
        "centres": "centers",
        "context": "embedding",
        "contexts": "embeddings",
        "schedule": "noise_schedule",
        **_FACTORS,
        **_CLASSIFIER,
    },
    2: _FACTORS | _CLASSIFIER,
    3: _FACTORS | _CLASSIFIER,
    4: _CLASSIFIER,
}
"""Modules and weights in each version, as parts of the paths of a state_dict; some belong to one class alone."""

OPTIONS: dict[str, str] = {"labelled": "labeled", "latent": "latent_size", "num": "num_data", "data_name": "data"}
"""Options of a run and of a sweep."""

FLAGS: dict[str, str] = {
    "--draws": "--num-samples",
    "--guide": "--guides",
    "--label": "--class",
    "--labelled": "--labeled",
    "--latent": "--latent-size",
    "--mask": "--region",
    "--num": "--num-data or --num-samples",
    "--path": "--curve",
    "--rows": "--num-data",
    "--score": "--scores",
    "--steps": "--num-steps or --gradient-steps",
}
"""Options of the command line; the error of a command with the new option names it."""


def upgraded(nodes: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The modules of a checkpoint's header in versions 1 to 4, under today's names of classes and arguments."""
    return [
        {
            **node,
            "class": CLASSES.get(node["class"], node["class"]),
            "arguments": renamed(node.get("arguments", {}), ARGUMENTS.get(node["class"], {})),
        }
        for node in nodes
    ]


def paths(now: Iterable[str], classes: Mapping[str, str], version: int) -> dict[str, str]:
    """Today's path of each module and weight, by its path in ``version``.

    Args:
        now: today's paths.
        classes: class name of each module, by its path today.
    """
    was = {new: old for old, new in PARTS[version].items()}

    def before(path: str) -> str:
        parts = path.split(".")
        owners = [classes.get(".".join(parts[:i])) for i in range(len(parts))]
        return ".".join(
            was.get(f"{owner}.{part}", was.get(part, part)) for owner, part in zip(owners, parts, strict=True)
        )

    return {before(path): path for path in now}


def renamed(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """``values`` with their names replaced as in ``names``; other names stay."""
    return {names.get(name, name): value for name, value in values.items()}
