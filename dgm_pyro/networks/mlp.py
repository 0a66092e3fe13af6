"""Multilayer perceptrons, and how networks take a context: a vector, an image, or a class label."""

from __future__ import annotations

import contextlib
import contextvars
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dgm_pyro.checks import as_shape, check_choice, check_count, check_options
from dgm_pyro.registry import register

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
    """Evaluation mode for a while, then each submodule's own mode again."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training


def to_unit(x: Tensor, levels: int | None, dtype: torch.dtype | None = None) -> Tensor:
    """Integers 0 .. levels - 1 to floats of ``dtype`` in [-1, 1]; reals (``levels=None``) as they are."""
    if levels is None:
        return x
    return x.to(dtype or torch.get_default_dtype()) * (2 / (levels - 1)) - 1


# What `networks_in` sets.
_precision: contextvars.ContextVar[torch.dtype | None] = contextvars.ContextVar("precision", default=None)


@contextlib.contextmanager
def networks_in(dtype: torch.dtype | None) -> Iterator[None]:
    """Networks run under autocast to ``dtype``, and nothing else does; with None they run as they are."""
    token = _precision.set(dtype)
    try:
        yield
    finally:
        _precision.reset(token)


def apply_network(network: Callable[..., Any], *inputs: Any) -> Any:
    """``network(*inputs)`` in the precision of `networks_in`; what autocast computed in a lower one leaves in float32.

    Sums of many log-probabilities need the full precision, and so do the products of matrices in a density; the network
    alone does not. The cache of an autoregressive network, which draws, keeps to the precision of its weights.
    """
    dtype, device = _precision.get(), inputs[0].device.type
    if dtype is None or not isinstance(network, nn.Module):
        out = network(*inputs)
    else:
        with torch.autocast(device, dtype):
            out = network(*inputs)
    if not isinstance(out, Tensor) or out.dtype not in (torch.bfloat16, torch.float16):
        return out
    return out.float() if dtype is not None or torch.is_autocast_enabled(device) else out


class Context(nn.Module):
    """A context, ``(B, *shape)`` reals or ``(B,)`` class labels, to ``(B, features)``.

    Args:
        shape: shape of one context; ``()`` for labels.
        num_classes: how many labels; needed for labels, and for them only.
        features: output features.
        levels: integers 0 .. levels - 1 in the context are scaled to [-1, 1].
    """

    def __init__(self, shape: Sequence[int], num_classes: int | None, features: int, levels: int | None = None):
        super().__init__()
        shape = as_shape(shape, "shape")
        check_count(features, "features")
        check_options(levels=levels, num_classes=num_classes)
        self.levels = levels
        if num_classes is not None:
            if shape != ():
                raise ValueError(f"num_classes is for labels of shape (), but the context has shape {tuple(shape)}")
            self.embed: nn.Module = nn.Embedding(num_classes, features)
        else:
            if shape == ():
                raise ValueError("a context of shape () is a class label: pass num_classes")
            self.embed = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), features))
        self.is_label = num_classes is not None

    def forward(self, context: Tensor) -> Tensor:
        if self.is_label:
            return self.embed(context.long())
        if self.levels is None and not context.is_floating_point():
            raise TypeError(f"the network was given integers ({context.dtype}): pass levels=... when you build it")
        # Asked of the weight itself: in a Bayesian network it is a sample, and there are no parameters.
        dtype = self.embed[1].weight.dtype  # type: ignore[index]
        return self.embed(to_unit(context, self.levels).to(dtype))


def given_shape_of(
    in_shape: int | Sequence[int], context_shape: Sequence[int] | None, num_classes: int | None
) -> tuple[torch.Size, torch.Size | None]:
    """The main input's shape, and the context's: ``()`` for labels, None without one."""
    if num_classes is not None and context_shape is None:
        context_shape = ()
    return as_shape(in_shape, "in_shape"), None if context_shape is None else as_shape(context_shape, "context_shape")


def check_context(network: nn.Module, context: Tensor | None) -> None:
    """Raise unless ``network`` is called as it was built: with a context, or without."""
    if (context is None) != (network.context_shape is None):
        need = "takes no context" if network.context_shape is None else "takes a context: call it with (x, context)"
        raise ValueError(f"this {type(network).__name__} {need}")


@register
class MLP(nn.Module):
    """``(B, *in_shape)`` to ``(B, out_features)``, with an optional context added to every hidden layer.

    Args:
        in_shape: shape of one input; ``()`` for a class label.
        out_features: P * numel for a conditional's network.
        hidden: widths of the hidden layers.
        context_shape: shape of one context, for ``network(input, context)``.
        num_classes: number of class labels; of the input if ``in_shape`` is ``()``, else of the context.
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
        context_shape: Sequence[int] | None = None,
        num_classes: int | None = None,
        levels: int | None = None,
        activation: str = "silu",
        dropout: float = 0.0,
    ):
        super().__init__()
        check_count(out_features, "out_features")
        check_options(levels=levels, num_classes=num_classes, dropout=dropout)
        self.num_classes = num_classes
        label_in = as_shape(in_shape, "in_shape") == ()
        self.in_shape, self.context_shape = given_shape_of(in_shape, context_shape, None if label_in else num_classes)
        self.given_shape = self.in_shape if self.context_shape is None else (self.in_shape, self.context_shape)
        widths = [*as_shape(hidden, "hidden"), out_features]
        self.first = Context(self.in_shape, num_classes if label_in else None, widths[0], levels)
        self.rest = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.contexts = nn.ModuleList()
        if self.context_shape is not None:
            if not hidden:
                raise ValueError("a context enters the hidden layers: hidden must name at least one width")
            labels = None if label_in else num_classes
            self.contexts.extend(Context(self.context_shape, labels, width) for width in widths[:-1])
        self.activation, self.dropout = activation_named(activation), nn.Dropout(dropout)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        check_context(self, context)
        h = self.first(x)
        for i, layer in enumerate(self.rest):
            if context is not None:
                h = h + self.contexts[i](context)
            h = layer(self.dropout(self.activation(h)))
        return h
