"""Multilayer perceptrons, and the embedding of what networks are given: a vector, an image, or a class label."""

from __future__ import annotations

import contextlib
import contextvars
import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dgm_pyro.checks import Shape, as_shape, check_choice, check_count, check_network_options
from dgm_pyro.registry import register

__all__ = ["MLP", "InputEmbedding"]

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "elu": nn.ELU,
}


def activation_named(name: str) -> nn.Module:
    check_choice(name, ACTIVATIONS, "activation")
    return ACTIVATIONS[name]()


@contextlib.contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Put ``module`` into evaluation mode, and restore each submodule's mode afterwards."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training


def to_unit(x: Tensor, levels: int | None, dtype: torch.dtype | None = None) -> Tensor:
    """Integers 0 .. levels - 1 as floats of ``dtype`` in [-1, 1]; reals (``levels=None``) unchanged."""
    if levels is None:
        return x
    return x.to(dtype or torch.get_default_dtype()) * (2 / (levels - 1)) - 1


# The dtype set by `networks_in`.
_precision: contextvars.ContextVar[torch.dtype | None] = contextvars.ContextVar("precision", default=None)


@contextlib.contextmanager
def networks_in(dtype: torch.dtype | None) -> Iterator[None]:
    """Run networks, and nothing else, under autocast to ``dtype``; None turns this off."""
    token = _precision.set(dtype)
    try:
        yield
    finally:
        _precision.reset(token)


@contextlib.contextmanager
def products_in(precision: str) -> Iterator[None]:
    """On a GPU, compute products of float32 matrices and convolutions in "float32" or in "tf32".

    By default torch uses TF32, with ten bits of fraction, for convolutions.
    """
    backends: Any = torch.backends
    flags = backends.cuda.matmul, backends.cudnn.conv
    before = [flag.fp32_precision for flag in flags]
    for flag in flags:
        flag.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    try:
        yield
    finally:
        for flag, kept in zip(flags, before, strict=True):
            flag.fp32_precision = kept


def apply_network(network: Callable[..., Any], *inputs: Any) -> Any:
    """``network(*inputs)`` in the precision of `networks_in`; outputs of autocast are converted to float32.

    Sums of many log-probabilities and products of matrices in a density need full precision, but the network does not.
    The cache of an autoregressive network, which draws, uses the precision of its weights.

    Raises:
        TypeError: the network does not take integers, or not those of this dtype.
    """
    dtype, device = _precision.get(), inputs[0].device.type
    lower = dtype is not None and isinstance(network, nn.Module)
    try:
        with torch.autocast(device, dtype) if lower else contextlib.nullcontext():
            out = network(*inputs)
    except RuntimeError as error:
        given = next((x.dtype for x in inputs if isinstance(x, Tensor) and not x.is_floating_point()), None)
        if given is None or not re.search(r"(?i)\b(long|byte|int|short|char)", str(error)):
            raise
        raise TypeError(
            f"the {type(network).__name__} was given integers ({given}), which it does not take ({error}): use "
            ".float() if the values are real, .long() for an nn.Embedding, or a network with levels, such as "
            "MLP(..., levels=...)"
        ) from error
    if not isinstance(out, Tensor) or out.dtype not in (torch.bfloat16, torch.float16):
        return out
    return out.float() if dtype is not None or torch.is_autocast_enabled(device) else out


class InputEmbedding(nn.Module):
    """An input, ``(B, *shape)`` reals or ``(B,)`` class labels, to ``(B, out_features)``.

    Args:
        shape: shape of one input; ``()`` for labels.
        num_classes: number of classes; required for labels, and only for these.
        out_features: number of outputs.
        levels: the input takes the integers 0 .. levels - 1, and is scaled to [-1, 1].
    """

    def __init__(self, shape: Sequence[int], num_classes: int | None, out_features: int, levels: int | None = None):
        super().__init__()
        shape = as_shape(shape, "shape")
        check_count(out_features, "out_features")
        check_network_options(levels=levels, num_classes=num_classes)
        self.levels = levels
        if num_classes is not None:
            if shape != ():
                raise ValueError(f"num_classes is for labels of shape (), but the input has shape {tuple(shape)}")
            self.embed: nn.Module = nn.Embedding(num_classes, out_features)
        else:
            if shape == ():
                raise ValueError("an input of shape () is a class label: pass num_classes")
            self.embed = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), out_features))
        self.is_label = num_classes is not None

    def forward(self, x: Tensor) -> Tensor:
        if self.is_label:
            return self.embed(x.long())
        if self.levels is None and not x.is_floating_point():
            raise TypeError(f"the network was given integers ({x.dtype}): pass levels=... when you build it")
        # From the weight itself, because in a Bayesian network it is a sample and there are no parameters.
        dtype = self.embed[1].weight.dtype  # type: ignore[index]
        return self.embed(to_unit(x, self.levels).to(dtype))


def input_shapes(
    in_shape: int | Sequence[int], given_shape: Sequence[int] | None, num_classes: int | None
) -> tuple[torch.Size, torch.Size | None]:
    """The shapes of the main input and of ``given``; ``()`` for labels, None without a given."""
    if num_classes is not None and given_shape is None:
        given_shape = ()
    return as_shape(in_shape, "in_shape"), None if given_shape is None else as_shape(given_shape, "given_shape")


def shape_read_by(network: nn.Module) -> Shape | None:
    """The input shape of ``network``, or a pair with the shape of its ``given``; None if it declares none."""
    if isinstance(network, nn.LazyLinear):  # it takes what comes first
        return None
    if isinstance(network, nn.Linear):
        return torch.Size((network.in_features,))
    if isinstance(network, nn.Embedding):
        return torch.Size()
    in_shape, given_shape = getattr(network, "in_shape", None), getattr(network, "given_shape", None)
    return in_shape if in_shape is None or given_shape is None else (in_shape, given_shape)


def num_classes_read_by(network: nn.Module) -> int | None:
    """Number of classes of the labels that ``network`` reads; None if it declares none."""
    num_classes: int | None = getattr(network, "num_classes", getattr(network, "num_embeddings", None))
    return num_classes


def check_given(network: nn.Module, given: Tensor | None) -> None:
    """Raise unless ``given`` is passed exactly if the network was built for it."""
    if (given is None) != (network.given_shape is None):
        need = "takes no given" if network.given_shape is None else "takes a given: call it with (x, given)"
        raise ValueError(f"this {type(network).__name__} {need}")


@register
class MLP(nn.Module):
    """``(B, *in_shape)`` to ``(B, out_features)``, with an optional ``given`` added to every hidden layer.

    Args:
        in_shape: shape of one input; ``()`` for a class label.
        out_features: P * numel for a conditional's network.
        hidden: widths of the hidden layers.
        given_shape: shape of one ``given``, for ``network(input, given)``.
        num_classes: number of class labels; of the input if ``in_shape`` is ``()``, else of ``given``.
        levels: the input takes integers 0 .. levels - 1, and is scaled to [-1, 1].
        activation: one of relu, silu, gelu, tanh, elu.
        dropout: probability, after each hidden layer.
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        out_features: int,
        hidden: Sequence[int] = (256, 256),
        *,
        given_shape: Sequence[int] | None = None,
        num_classes: int | None = None,
        levels: int | None = None,
        activation: str = "silu",
        dropout: float = 0.0,
    ):
        super().__init__()
        check_count(out_features, "out_features")
        check_network_options(levels=levels, num_classes=num_classes, dropout=dropout)
        self.num_classes = num_classes
        label_in = as_shape(in_shape, "in_shape") == ()
        self.in_shape, self.given_shape = input_shapes(in_shape, given_shape, None if label_in else num_classes)
        widths = [*as_shape(hidden, "hidden"), out_features]
        self.first = InputEmbedding(self.in_shape, num_classes if label_in else None, widths[0], levels)
        self.rest = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.embeddings = nn.ModuleList()
        if self.given_shape is not None:
            if not hidden:
                raise ValueError("hidden is empty, but given is added to the hidden layers: pass at least one width")
            labels = None if label_in else num_classes
            self.embeddings.extend(InputEmbedding(self.given_shape, labels, width) for width in widths[:-1])
        self.activation, self.dropout = activation_named(activation), nn.Dropout(dropout)

    def forward(self, x: Tensor, given: Tensor | None = None) -> Tensor:
        check_given(self, given)
        h = self.first(x)
        for i, layer in enumerate(self.rest):
            if given is not None:
                h = h + self.embeddings[i](given)
            h = layer(self.dropout(self.activation(h)))
        return h
