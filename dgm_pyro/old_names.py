"""Names in files that an earlier version wrote: each is read as the name that the thing has now."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

ARGUMENTS: dict[str, dict[str, str]] = {
    "ContinuousDiffusion": {"schedule": "noise_schedule"},
    "Diffusion": {"schedule": "noise_schedule"},
    "Implicit": {"latent": "latent_name"},
    "TopDown": {"latent": "latent_name"},
    "VAE": {"latent": "latent_name"},
}
"""Of the constructors in version 1 of the checkpoint format, by class."""

PARTS: dict[str, str] = {"schedule": "noise_schedule"}
"""Of modules and their weights in version 1, as they stand in the paths of a state_dict."""

OPTIONS: dict[str, str] = {"latent": "latent_size"}
"""Of a run and of a sweep."""


def upgraded(nodes: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The modules of a checkpoint's header in version 1, with the arguments that their constructors have now."""
    return [
        {**node, "arguments": renamed(node["arguments"], ARGUMENTS.get(node["class"], {}))}
        if "arguments" in node
        else dict(node)
        for node in nodes
    ]


def paths(now: Iterable[str]) -> dict[str, str]:
    """The paths of modules and weights in version 1, each with the one that it has ``now``."""
    was = {new: old for old, new in PARTS.items()}
    return {".".join(was.get(part, part) for part in path.split(".")): path for path in now}


def renamed(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """``values`` under the names that ``names`` gives, or under their own."""
    return {names.get(name, name): value for name, value in values.items()}
