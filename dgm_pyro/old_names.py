"""Names in files that an earlier version wrote: each is read as the name that the thing has now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ARGUMENTS: dict[str, dict[str, str]] = {
    "Implicit": {"latent": "latent_name"},
    "TopDown": {"latent": "latent_name"},
    "VAE": {"latent": "latent_name"},
}
"""Of the constructors in version 1 of the checkpoint format, by class."""

OPTIONS: dict[str, str] = {"latent": "latent_size"}
"""Of a run and of a sweep."""


def upgraded(header: Mapping[str, Any]) -> dict[str, Any]:
    """The header of a checkpoint in the names of the current format."""
    if header["format_version"] > 1:
        return dict(header)
    modules = [
        node | {"arguments": renamed(node["arguments"], ARGUMENTS.get(node["class"], {}))}
        if "arguments" in node
        else node
        for node in header["modules"]
    ]
    return {**header, "modules": modules}


def renamed(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """``values`` under the names that ``names`` gives, or under their own."""
    return {names.get(name, name): value for name, value in values.items()}
