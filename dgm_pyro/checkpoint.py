"""Checkpoints that cannot run code: names and numbers, from which constructors rebuild the program.

A checkpoint is one folder with two files:

- ``program.json``: the format and its version, the versions of dgm_pyro, torch and pyro, every module as the name of
  its class in the registry with its constructor arguments, and the size and sha256 of the weights;
- ``weights-<start of that sha256>.safetensors``: parameters, buffers, and tensors among the constructor arguments.

Loading looks names up in the registry and in a list of torch.nn layers, and calls constructors; it never unpickles
and never imports. The weights are written first, under a name that depends on their content. Then ``program.json`` is
replaced in one step. So a save that is interrupted at any point leaves the old checkpoint intact, and a concurrent
reader gets the old one or the new one. A program that would need far more memory than its weights is not built.

>>> import tempfile, torch, dgm_pyro as dgm
>>> program = dgm.Normal(2, torch.nn.Linear(3, 4))
>>> with tempfile.TemporaryDirectory() as folder:
...     dgm.save(program, folder)
...     loaded = dgm.load(folder)
>>> x, given = torch.randn(5, 2), torch.randn(5, 3)
>>> torch.equal(loaded.log_prob(x, given), program.log_prob(x, given))
True
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import inspect
import json
import math
import pkgutil
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import dgm_pyro.families as families
import dgm_pyro.old_names as old_names
from dgm_pyro.checks import check_path, find_device, suggesting
from dgm_pyro.files import only_writer, parsed_json, write_file
from dgm_pyro.program import Program, check_program
from dgm_pyro.registry import REGISTRY, arguments_of

__all__ = ["CheckpointError", "load", "load_with_extra", "read_extra", "save"]

FORMAT = "dgm_pyro program"
FORMAT_VERSION = 5
HEADER = "program.json"
STATE = "state.json"
_PART = re.compile(r"(?:weights|state)-([0-9a-f]{12})\.safetensors")

CONTAINERS: dict[str, type[nn.Module]] = {
    f"torch.nn.{cls.__name__}": cls for cls in (nn.Sequential, nn.ModuleList, nn.ModuleDict)
}

# Layers that their constructor arguments, which are also their attributes, describe completely.
LAYERS: dict[str, type[nn.Module]] = {
    f"torch.nn.{cls.__name__}": cls
    for cls in (
        *(nn.Linear, nn.Bilinear, nn.Embedding, nn.Identity, nn.Flatten, nn.Unflatten),
        *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
        *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.SiLU, nn.GELU, nn.Mish, nn.GLU),
        *(nn.Tanh, nn.Sigmoid, nn.LogSigmoid, nn.Softplus, nn.Softsign, nn.Softmax, nn.LogSoftmax, nn.Hardswish),
        *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
        *(nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
        *(nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d),
        *(nn.Upsample, nn.PixelShuffle, nn.PixelUnshuffle, nn.ZeroPad1d, nn.ZeroPad2d),
    )
}

# Most uses of modules in a program. A shared module counts each time, because torch visits it each time.
MOST_MODULES = 100_000

REALS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

DTYPES = {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or a program that cannot be stored in one."""


@suggesting
def save(program: Program, path: str | PathLike[str], extra: Any = None) -> None:
    """Store ``program`` in the folder ``path``, replacing an earlier checkpoint there.

    Args:
        program: a program of registered classes (``@dgm.register``) and common torch.nn layers.
        path: a folder, which is made if needed; other files in it do not change.
        extra: numbers, strings, lists, tuples and dicts to store with the program; `read_extra` returns them.

    Raises:
        TypeError: a class is not registered, or a checkpoint cannot store an argument.
        CheckpointError: the program was changed after it was built, so its arguments no longer describe it; a weight
            is NaN; or ``path`` is a file.
    """
    header, weights = pack(program, extra)
    check_path(path, "path")
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file, but a checkpoint is a folder: choose another path")
    with only_writer(folder):
        write_packed(folder, header, weights)


def pack(program: Program, extra: Any = None) -> tuple[dict[str, Any], bytes]:
    """The contents of the two files of a checkpoint, the header and the weights. Raises the errors of `save`."""
    check_program(program)
    graph = _Graph()
    graph.add(program, "program")
    state = _all_tensors(program)
    first: dict[int, str] = {}
    tied = {name: first[id(tensor)] for name, tensor in state.items() if first.setdefault(id(tensor), name) != name}
    weights = {name: tensor for name, tensor in state.items() if name not in tied} | graph.tensors
    header = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "versions": {
            "dgm_pyro": importlib.metadata.version("dgm_pyro"),
            "torch": torch.__version__,
            "pyro": pyro.__version__,
        },
        "modules": graph.nodes,
        "tied": tied,
        "frozen": [name for name, parameter in program.named_parameters() if not parameter.requires_grad],
        "evaluating": [name for name, module in program.named_modules() if not module.training],
        "extra": _encode(extra, "extra", None),
    }
    # Checked now, while the program is in memory, and not when it is loaded.
    difference = _first_difference(program, _rebuild(graph.nodes, graph.tensors))
    if difference:
        raise CheckpointError(
            f"this {type(program).__name__} was changed after it was built: {difference}. Its constructor arguments no "
            "longer describe it: build it with the parts it has now, then copy the weights with load_state_dict"
        )
    spoilt = next((name for name, tensor in state.items() if _holds_nan(tensor)), None)
    if spoilt is not None:
        raise CheckpointError(
            f"{spoilt} of this {type(program).__name__} holds NaN: train it again with a lower learning rate"
        )
    content = safetensors.torch.save({name: _storable(tensor) for name, tensor in weights.items()})
    header["weights"] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    return header, content


def write_packed(folder: Path, header: dict[str, Any], weights: bytes) -> None:
    """Write what `pack` returned, for the `only_writer` of the folder."""
    write_named(folder, HEADER, header, {_weights_name(header["weights"]["sha256"]): weights})


@suggesting
def load(path: str | PathLike[str], device: str | torch.device = "cpu") -> Program:
    """The program that `save` stored in the folder ``path``, on ``device``, with bit-equal weights.

    Import your own classes first: ``@dgm.register`` must have run.

    Raises:
        CheckpointError: the path is missing or no checkpoint, a file is truncated or damaged, a weight is NaN or has
            another dtype, the format is newer, or a class is unknown or has changed. The message says which.
    """
    return load_with_extra(path, device)[0]


def load_with_extra(path: str | PathLike[str], device: str | torch.device = "cpu") -> tuple[Program, dict[str, Any]]:
    """The program, and a dict of what was stored with it: ``extra``, and the sha256 of the ``weights``.

    Raises:
        CheckpointError: as `load`.
    """
    where = find_device(device)
    check_path(path, "path")
    folder = Path(path)
    for module in pkgutil.iter_modules(families.__path__):  # importing it registers its classes
        importlib.import_module(f"{families.__name__}.{module.name}")
    header, weights = _read_folder(folder)
    with _parsing(folder):
        version = header["format_version"]
        nodes = header["modules"] if version == FORMAT_VERSION else old_names.upgraded(header["modules"])
        tied, extra = dict(header["tied"]), _decode(header["extra"], [], {})
        _check_uses(nodes)
        # Reals may be stored in a quarter of the bytes of their computation, and initial values take some more.
        with _Budget(16 * header["weights"]["bytes"] + 2**26):
            program = _rebuild(nodes, weights)
        frozen, evaluating = set(header["frozen"]), set(header["evaluating"])
        if version in old_names.PARTS:
            classes = {name: type(module).__name__ for name, module in program.named_modules(remove_duplicate=False)}
            moved = old_names.paths([*_all_tensors(program), *classes], classes, version)
            weights, tied = (old_names.renamed(names, moved) for names in (weights, tied))
            tied = {name: moved.get(first, first) for name, first in tied.items()}
            frozen, evaluating = ({moved.get(name, name) for name in names} for names in (frozen, evaluating))
    if not isinstance(program, Program):
        raise _corrupted(folder, f"it describes a {type(program).__name__}, which is not a Program")
    state, learned = _all_tensors(program), program.state_dict().keys()
    # The constructor computes what a state_dict leaves out; an earlier version of the class may not have had it.
    state = {name: tensor for name, tensor in state.items() if name in learned or tied.get(name, name) in weights}
    stored = {name: weights[tied.get(name, name)] for name in state if tied.get(name, name) in weights}
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if {name: tuple(tensor.shape) for name, tensor in stored.items()} != shapes:
        name = next(name for name in shapes if name not in stored or tuple(stored[name].shape) != shapes[name])
        there = f"has shape {tuple(stored[name].shape)}" if name in stored else "is missing"
        raise CheckpointError(
            f"{folder}: the classes or their arguments no longer fit the weights: {name} has shape {shapes[name]} in "
            f"this {type(program).__name__}, but {there} in the checkpoint, written by dgm_pyro {_written_by(header)}"
        )
    file = folder / _weights_name(header["weights"]["sha256"])
    for name, tensor in state.items():
        if not _is_kind(stored[name].dtype, tensor.dtype):
            raise CheckpointError(
                f"{file}: {name} is stored as {stored[name].dtype}, but this {type(program).__name__} computes with "
                f"{tensor.dtype}: save the program itself again, not a reduced copy of its weights"
            )
        if _holds_nan(stored[name]):
            raise CheckpointError(f"{file}: {name} holds NaN: train the program again with a lower learning rate")
    for name, tensor in state.items():
        # The constructor's memory layout is kept, because the order of a sum is part of its last bits.
        tensor.data = torch.empty_like(tensor, dtype=stored[name].dtype).copy_(stored[name])
    for name, parameter in program.named_parameters():
        parameter.requires_grad_(name not in frozen)
    for name, module in program.named_modules():
        module.training = name not in evaluating
    return program.to(where), {"extra": extra, "weights": header["weights"]["sha256"]}


def read_extra(path: str | PathLike[str]) -> Any:
    """The values that were passed to `save` as ``extra``.

    Raises:
        CheckpointError: as `load`.
    """
    check_path(path, "path")
    header = _read_header(Path(path))
    with _parsing(Path(path)):
        return _decode(header["extra"], [], {})


# -- a program as a graph of names and numbers -------------------------------------------------------------------------


class _Graph:
    """The modules in the order in which they can be rebuilt, each once even if it is shared, and their tensors."""

    def __init__(self) -> None:
        self.nodes: list[dict[str, Any]] = []
        self.tensors: dict[str, Tensor] = {}
        self.index: dict[int, int] = {}

    def add(self, module: nn.Module, where: str) -> int:
        if id(module) not in self.index:
            node = self.describe(module, where)
            self.index[id(module)] = len(self.nodes)
            self.nodes.append(node)
        return self.index[id(module)]

    def describe(self, module: nn.Module, where: str) -> dict[str, Any]:
        name, cls = type(module).__name__, type(module)
        if CONTAINERS.get(f"torch.nn.{name}") is cls:
            # Not named_children, which leaves out the second use of one layer.
            parts = {key: part for key, part in module._modules.items() if part is not None}
            children = {key: self.add(part, f"{where}.{key}") for key, part in parts.items()}
            return {"class": f"torch.nn.{name}", "children": children}
        if LAYERS.get(f"torch.nn.{name}") is cls:
            name, arguments = f"torch.nn.{name}", _layer_arguments(module)
        else:
            try:
                arguments = arguments_of(module)
            except TypeError as error:
                raise TypeError(f"{where}: {error}") from None
        return {
            "class": name,
            "arguments": {key: _encode(value, f"{key} of {name}", self) for key, value in arguments.items()},
        }


def _layer_arguments(module: nn.Module) -> dict[str, Any]:
    arguments = {}
    for name, parameter in inspect.signature(type(module)).parameters.items():
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) and hasattr(module, name):
            value = getattr(module, name)
            value = value is not None if name == "bias" else value
            # Defaults are left out: a version of torch without the argument can still read the rest.
            if value != parameter.default:
                arguments[name] = value
    return arguments


def _encode(value: Any, where: str, graph: _Graph | None) -> Any:
    """JSON for a constructor argument; an object whose only key starts with $ encodes a value that JSON lacks."""
    if isinstance(value, np.generic):
        value = value.item()
    kind = type(value)
    if value is None or kind in (bool, int, str) or (kind is float and math.isfinite(value)):
        return value
    if kind is float:
        return {"$float": repr(value)}
    if kind in (list, tuple, torch.Size):
        items = [_encode(item, where, graph) for item in value]
        return items if kind is list else {f"${kind.__name__.lower()}": items}
    if kind is dict and all(type(key) is str for key in value):
        return {"$dict": {key: _encode(item, where, graph) for key, item in value.items()}}
    if kind is dict and all(type(key) is int for key in value):
        return {"$items": [[key, _encode(item, where, graph)] for key, item in value.items()]}
    if kind is torch.dtype:
        return {"$dtype": str(value)}
    if graph is not None and isinstance(value, Tensor):
        name = f"argument/{len(graph.tensors)}"
        graph.tensors[name] = value
        return {"$parameter" if isinstance(value, nn.Parameter) else "$tensor": name}
    if graph is not None and isinstance(value, nn.Module):
        return {"$module": graph.add(value, where)}
    objects = "" if graph is None else ", tensors, modules"
    raise TypeError(
        f"{where} is or holds a {kind.__module__}.{kind.__qualname__}, which a checkpoint cannot store: use numbers, "
        f"strings, tuples, lists, dicts with str or int keys{objects}"
    )


def encoded(value: Any) -> tuple[Any, dict[str, Tensor]]:
    """A tree of plain Python and tensors, as JSON and tensors by name that share no memory."""
    graph = _Graph()
    tree = _encode(value, "it", graph)
    return tree, {name: _storable(tensor) for name, tensor in graph.tensors.items()}


def decoded(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """The tree that `encoded` was given."""
    return _decode(tree, [], tensors)


def _decode(node: Any, modules: list[nn.Module], tensors: dict[str, Tensor]) -> Any:
    if isinstance(node, list):
        return [_decode(item, modules, tensors) for item in node]
    if not isinstance(node, dict):
        return node
    if len(node) != 1:
        raise TypeError(f"an object with the keys {sorted(node)} is not a value")
    [(tag, content)] = node.items()
    if tag == "$float":
        return float(content)
    if tag in ("$tuple", "$size"):
        items = (_decode(item, modules, tensors) for item in content)
        return tuple(items) if tag == "$tuple" else torch.Size(items)
    if tag == "$dict":
        return {key: _decode(item, modules, tensors) for key, item in content.items()}
    if tag == "$items":
        return {key: _decode(item, modules, tensors) for key, item in content}
    if tag == "$dtype":
        return DTYPES[content]
    if tag == "$tensor":
        return tensors[content].clone()
    if tag == "$parameter":
        return nn.Parameter(tensors[content].clone())
    if tag == "$module":
        return modules[content]
    raise TypeError(f"{tag!r} is not a kind of value")


def _rebuild(nodes: list[dict[str, Any]], tensors: dict[str, Tensor]) -> nn.Module:
    """The module of the last of ``nodes``, with the initial weights of its constructors."""
    modules: list[nn.Module] = []
    # Constructors draw initial weights, but neither saving nor loading may change the caller's random state.
    with torch.random.fork_rng(devices=[]):
        for node in nodes:
            name = node["class"]
            if name in CONTAINERS:
                children = OrderedDict((key, modules[index]) for key, index in node["children"].items())
                modules.append(CONTAINERS[name](children.values() if name == "torch.nn.ModuleList" else children))
                continue
            cls = LAYERS.get(name) or REGISTRY.get(name)
            if cls is None:
                raise CheckpointError(
                    f"the checkpoint names the class {name!r}, which is not registered: import the module that defines "
                    "it with @dgm.register before you call dgm.load"
                )
            arguments = {key: _decode(value, modules, tensors) for key, value in node["arguments"].items()}
            try:
                modules.append(_construct(cls, arguments))
            except Exception as error:  # any error of a constructor means the same here
                raise CheckpointError(
                    f"{name} can no longer be built with the checkpoint's arguments {', '.join(arguments)}: "
                    f"{_first_line(error)}"
                ) from error
    return modules[-1]


def _check_uses(nodes: list[dict[str, Any]]) -> None:
    """Raise if modules share each other so often that a walk through the program would never end."""

    def references(value: Any) -> Iterator[int]:
        if isinstance(value, list):
            for item in value:
                yield from references(item)
        elif isinstance(value, dict):
            for key, item in value.items():
                yield from (item,) if key == "$module" else references(item)

    uses: list[int] = []
    for node in nodes:
        parts = [*node["children"].values()] if "children" in node else references(node["arguments"])
        uses.append(1 + sum(uses[index] for index in parts))
        if uses[-1] > MOST_MODULES:
            raise ValueError(f"a {node['class']} uses more than {MOST_MODULES:,} modules")


class _Budget(TorchDispatchMode):
    """Limits the tensors made in this context to ``num_bytes`` in total; one that exceeds it is not made."""

    def __init__(self, num_bytes: int):
        super().__init__()
        self.left = num_bytes

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if "device" in kwargs:  # it makes a tensor from sizes
            with contextlib.suppress(NotImplementedError, RuntimeError):  # its size is unknown; others count
                self.left -= operation(*args, **kwargs | {"device": torch.device("meta")}).nbytes
        elif operation is torch.ops.aten.clone.default:
            self.left -= args[0].nbytes
        if self.left < 0:
            raise MemoryError("it is far larger than the weights")
        return operation(*args, **kwargs)


def _construct(cls: type, arguments: dict[str, Any]) -> Any:
    signature = inspect.signature(cls)
    declared = [name for name, parameter in signature.parameters.items() if parameter.kind is not parameter.VAR_KEYWORD]
    named = OrderedDict((name, arguments[name]) for name in declared if name in arguments)
    bound = inspect.BoundArguments(signature, named)
    return cls(*bound.args, **bound.kwargs, **{key: value for key, value in arguments.items() if key not in named})


def _all_tensors(program: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer under each of its names; also the buffers that a state_dict leaves out."""
    foreign = [name for name, value in program.state_dict().items() if not isinstance(value, Tensor)]
    if foreign:
        raise TypeError(
            f"{foreign[0]} is extra state, which a checkpoint cannot store: make it a buffer or a constructor argument"
        )
    return {
        **dict(program.named_parameters(remove_duplicate=False)),
        **dict(program.named_buffers(remove_duplicate=False)),
    }


def _is_kind(stored: torch.dtype, built: torch.dtype) -> bool:
    """Whether weights of one dtype fit the other: the same dtype, or reals of any precision for reals."""
    return stored == built or (stored in REALS and built in REALS)


def _holds_nan(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and bool(tensor.isnan().any())


def _first_difference(program: nn.Module, rebuilt: nn.Module) -> str | None:
    """The first difference of two module trees in classes, shapes or shared memory; None if there is none."""

    def layout(module: nn.Module) -> dict[str, str]:
        state, first = _all_tensors(module), dict[int, str]()
        kinds = {name: type(part).__name__ for name, part in module.named_modules(remove_duplicate=False)}
        for name, tensor in state.items():
            shared = first.setdefault(id(tensor), name)
            kinds[name] = f"{tuple(tensor.shape)}" + (f" shared with {shared}" if shared != name else "")
        return kinds

    is_now, was_built = layout(program), layout(rebuilt)
    for name in {**was_built, **is_now}:
        here, there = is_now.get(name, "missing"), was_built.get(name, "missing")
        if here != there:
            return f"{name or 'it'} is {here}, but was built as {there}"
    return None


# -- files -------------------------------------------------------------------------------------------------------------


def _storable(tensor: Tensor) -> Tensor:
    # A clone, because safetensors refuses tensors that share memory.
    return tensor.detach().cpu().contiguous().clone()


def _weights_name(digest: str) -> str:
    return f"weights-{digest[:12]}.safetensors"


def write_named(folder: Path, name: str, header: dict[str, Any], parts: Mapping[str, bytes]) -> None:
    """Write the ``parts``, named by their digests, then the header that names them, and then remove older parts.

    A kill at any point leaves either the old header and its parts, or the new ones.
    """
    for part, content in parts.items():
        write_file(folder / part, content)
    write_file(folder / name, json.dumps(header, indent=1, allow_nan=False).encode())
    remove_unnamed(folder)


def remove_unnamed(folder: Path) -> None:
    """Remove weights and states that no header names; files not named by their own digest are kept."""
    named = set()
    for header in (HEADER, STATE):
        with contextlib.suppress(FileNotFoundError):
            named |= {*re.findall(r'"sha256"\s*:\s*"([0-9a-f]{12})', (folder / header).read_text("utf-8", "replace"))}
    for path in folder.iterdir():
        found = _PART.fullmatch(path.name)
        if found and found[1] not in named and hashlib.sha256(path.read_bytes()).hexdigest().startswith(found[1]):
            path.unlink()


def _read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the weights that belong to it."""
    while True:
        header = _read_header(folder)
        try:
            with _parsing(folder):
                return header, _read_weights(folder, header["weights"])
        except CheckpointError:
            if _read_header(folder) == header:  # else a writer has replaced them in the meantime
                raise


def _read_header(folder: Path) -> dict[str, Any]:
    if not folder.exists():
        raise CheckpointError(f"there is no checkpoint at {folder}: no such folder")
    path = folder / HEADER
    if not path.is_file():
        raise CheckpointError(f"{folder} is not a checkpoint of dgm_pyro: it has no {HEADER}")
    try:
        header = parsed_json(path)
    except ValueError as error:
        raise _corrupted(folder, error) from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise CheckpointError(f"{folder} is not a checkpoint of dgm_pyro: its {HEADER} was written by another program")
    version = header.get("format_version")
    if not isinstance(version, int):
        raise _corrupted(folder, f"its format version is {version!r}")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has format version {version}, written by dgm_pyro {_written_by(header)}, but dgm_pyro "
            f"{importlib.metadata.version('dgm_pyro')} reads versions up to {FORMAT_VERSION}: upgrade dgm_pyro"
        )
    return header


def _read_weights(folder: Path, expected: dict[str, Any]) -> dict[str, Tensor]:
    digest, size = expected["sha256"], expected["bytes"]
    if not re.fullmatch("[0-9a-f]{64}", digest):
        raise _corrupted(folder, f"{digest!r} is not a sha256")
    path = folder / _weights_name(digest)
    if not path.is_file():
        raise CheckpointError(f"{folder} lacks its weights, {path.name}: copy the whole folder")
    return safetensors_of(path, _checked_content(path, digest, size, HEADER))


def _checked_content(path: Path, digest: str, size: int, header: str) -> bytes:
    """The content of a file if it has the size and digest of the header; a file of another size is not read."""
    found = path.stat().st_size
    if found < size:
        raise CheckpointError(f"{path} is truncated: it has {found} of {size} bytes, copy it again")
    content = path.read_bytes() if found == size else b""
    if hashlib.sha256(content).hexdigest() != digest:
        raise CheckpointError(f"{path} is damaged: its sha256 is not the one in {header}, copy it again")
    return content


def safetensors_of(path: Path, content: bytes) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(content)
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from error


@contextlib.contextmanager
def _parsing(folder: Path) -> Iterator[None]:
    """Turn all errors from a header of another structure into one: the header is corrupted."""
    try:
        yield
    except CheckpointError:
        raise
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        raise _corrupted(folder, f"{type(error).__name__}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    """The message without the stack that torch appends."""
    return str(error).partition("\n")[0]


def _corrupted(folder: Path, reason: object) -> CheckpointError:
    return CheckpointError(f"{folder / HEADER} is corrupted ({reason}): copy it again")


def _written_by(header: dict[str, Any]) -> str:
    versions = header.get("versions")
    return str(versions.get("dgm_pyro", "unknown")) if isinstance(versions, dict) else "unknown"
