"""Joins the repeated parts of a graph: what all steps of a chain compute is computed once, for all of them.

An unrolled diffusion states T steps, and each calls the network. Their inputs come from the guide, so no call depends
on another. The graph then has T copies, *lanes*, of the network and of the KL, and a compiler translates every copy.
`join_lanes` makes one part of them, which `torch.vmap` maps over the stacked inputs of all lanes.

The search is that of vectorizing compilers. It starts at operations that read the same weight, and goes on to what they
read, and to what reads them, as long as the operations of the lanes are isomorphic. A *pack* is one operation of every
lane.

Source: Larsen and Amarasinghe 2000, "Exploiting superword level parallelism with multimedia instruction sets".
"""

from __future__ import annotations

import heapq
import itertools
import logging
import operator
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
import torch.fx
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

MIN_LANES = 4  # fewer copies cost the compiler little
ENDS = 2  # lanes that may be left out, because a chain has two ends, whose terms differ
aten = torch.ops.aten
WEIGHTED = {aten.linear.default, aten.matmul.default}
# Mapped over lanes they compile to slower code on a CPU: a U-Net's step takes 1.24 times as long.
CONVOLUTIONS = {
    *(aten.conv1d, aten.conv2d, aten.conv3d),
    *(aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d),
}
FRESH = {aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default}
# Lanes of fresh memory would be views of one tensor, which draws write to. The gradients of the others differ where
# mapped: an embedding ignores the padding index of all lanes but one, and a median takes one of equal values.
APART = {*FRESH, aten.embedding.default, aten.median.default, aten.nanmedian.default, aten.addr.default}
NORMS = {aten.batch_norm.default, aten.instance_norm.default}  # which write to their running statistics in training

Pack = tuple[Node, ...]


def join_lanes(graph: GraphModule) -> None:
    """Join the lanes of ``graph``, in place. It computes the same, and draws the same random numbers.

    A graph with convolutions stays as it is. So does one that writes to tensors, or reads memory by strides.
    """
    _add_instead_of_accumulating(graph)
    if any(
        _writes(node) or _is_convolution(node) or node.target is aten.as_strided.default for node in _nodes_in(graph)
    ):
        return
    tried, differentiated = set[Node](), None
    while seeds := _seeds(graph, tried):
        tried.update(seeds)
        try:
            differentiated = _differentiated(graph) if differentiated is None else differentiated
        except Exception:  # of whatever kind, the graph without lanes is right
            return
        lanes = _Lanes(graph, seeds, differentiated)
        if lanes.grow() and lanes.join():
            differentiated = None


def _add_instead_of_accumulating(graph: GraphModule) -> None:
    """Replace ``total += x`` by ``total + x`` where nothing else reads the sum so far."""
    for node in graph.graph.find_nodes(op="call_function", target=aten.add_.Tensor):
        total, x = (each.meta["val"] if isinstance(each, Node) else None for each in node.args)
        same = isinstance(x, Tensor) and isinstance(total, Tensor) and x.dtype == total.dtype
        if same and node.args[0].target is aten.add.Tensor and len(node.args[0].users) == 1:
            node.target = aten.add.Tensor


def _seeds(graph: GraphModule, tried: set[Node]) -> Pack:
    """The operations that read the most used weight; empty if they are fewer than `MIN_LANES`."""
    readers: dict[Hashable, list[Node]] = defaultdict(list)
    for node in graph.graph.nodes:
        if node.target in WEIGHTED and node not in tried:
            readers[node.args[1], _kind(node)].append(node)
    most = max(readers.values(), key=len, default=[])
    return tuple(most) if len(most) >= MIN_LANES else ()


class _Lanes:
    """The packs found so far; the operation ``packs[k][i]`` belongs to lane i."""

    def __init__(self, graph: GraphModule, seeds: Pack, differentiated: set[Node]):
        self.graph, self.seeds, self.fewest = graph, seeds, max(MIN_LANES, len(seeds) - ENDS)
        self.place = {node: number for number, node in enumerate(graph.graph.nodes)}
        self.next_draw = dict(itertools.pairwise(node for node in self.place if _draws(node)))
        self.differentiated = differentiated
        self._set([])

    def _set(self, packs: list[Pack]) -> None:
        self.packs = packs
        self.lane_of = {node: (k, i) for k, pack in enumerate(packs) for i, node in enumerate(pack)}
        self.after = set[Node]()  # what depends on the lanes
        self.after |= self._after(self.lane_of)

    # -- the search ----------------------------------------------------------------------------------------------------

    def grow(self) -> bool:
        """Add packs until there are no more; False if the operations to start from are no pack."""
        if not self._is_pack(self.seeds) or not self._add(self.seeds):
            return False
        waiting = [0]
        while waiting:
            number = waiting.pop()
            for lanes, pack in [*self._read_by(self.packs[number]), *self._readers_of(self.packs[number])]:
                if len(lanes) < self.fewest or not self._is_pack(pack):
                    continue
                before = self.packs
                left_out = len(lanes) < len(before[0])
                if left_out:
                    self._set([tuple(known[i] for i in lanes) for known in before])
                if self._add(pack):  # what did not fit with the lanes left out may fit without
                    waiting = [*range(len(self.packs))] if left_out else [*waiting, number, len(self.packs) - 1]
                    break
                if left_out:
                    self._set(before)
        return True

    def _read_by(self, pack: Pack) -> Iterator[tuple[Sequence[int], Pack]]:
        for read in _columns(pack):
            yield range(len(pack)), read

    def _readers_of(self, pack: Pack) -> Iterator[tuple[Sequence[int], Pack]]:
        """Readers of the same kind, in the order of the graph, with the lanes that have one."""
        alike = defaultdict[Hashable, dict[int, Node]](dict)
        for lane, node in enumerate(pack):
            counts: Counter[Hashable] = Counter()
            for reader in sorted((user for user in node.users if user not in self.lane_of), key=self.place.__getitem__):
                kind = (_kind(reader), tuple(read is node for read in _reads(reader)))
                alike[kind, counts[kind]][lane] = reader
                counts[kind] += 1
        for readers in alike.values():
            yield [*readers], tuple(readers.values())

    def _is_pack(self, nodes: Pack) -> bool:
        """Whether the nodes are one operation, and none is in a lane."""
        return (
            len(set(nodes)) == len(nodes)
            and self.lane_of.keys().isdisjoint(nodes)
            and len({(_kind(node), node in self.differentiated) for node in nodes}) == 1
            and all(map(_is_pure, nodes))
        )

    def _add(self, pack: Pack) -> bool:
        """Add a pack, if all packs then read equal or stacked inputs, and no path leaves the lanes and returns."""
        packs = [*self.packs, pack]
        self.lane_of.update((node, (len(self.packs), i)) for i, node in enumerate(pack))
        changed = {self.lane_of[user][0] for node in pack for user in node.users if user in self.lane_of}
        reads = [read for number in (len(self.packs), *changed) for read in _columns(packs[number])]
        after = self._after(pack)
        fits = (
            all(_is_aligned(read, self.lane_of) or _is_input(read, self.lane_of) for read in reads)
            and self.after.isdisjoint(node for read in _columns(pack) for node in read)
            and self.lane_of.keys().isdisjoint(after)
        )
        if fits:
            self.packs = packs
            self.after |= after
            self.after.difference_update(pack)
        else:
            for node in pack:
                del self.lane_of[node]
        return fits

    def _after(self, nodes: Iterable[Node]) -> set[Node]:
        """What depends on ``nodes`` through no lane, and was not known to. A lane in it reads what left the lanes."""
        waiting = [user for node in nodes for user in node.users if user not in self.lane_of]
        found = set[Node]()
        while waiting:
            node = waiting.pop()
            if node not in found and node not in self.after:
                found.add(node)
                if node not in self.lane_of:
                    waiting += [*node.users, *([self.next_draw[node]] if node in self.next_draw else [])]
        return found

    # -- the result ----------------------------------------------------------------------------------------------------

    def join(self) -> bool:
        """Replace the lanes by one part that is mapped over them; False if an operation cannot be mapped."""
        lane_of = self.lane_of
        packs = sorted(self.packs, key=lambda pack: self.place[pack[0]])
        read_outside = [any(user not in lane_of for node in pack for user in node.users) for pack in packs]
        outputs = {number: pack for number, pack in enumerate(packs) if read_outside[number]}
        inputs = [*dict.fromkeys(read for pack in packs for read in _columns(pack) if read[0] not in lane_of)]
        mapped = _Mapped(packs, inputs)
        tensors = all(isinstance(pack[0].meta["val"], Tensor) for pack in outputs.values())
        if not outputs or not tensors or not mapped.gives(packs, inputs):
            return False

        graph, name = self.graph.graph, self._unused("lanes")
        self.graph.add_submodule(name, mapped)
        with graph.inserting_before(graph.output_node()):
            arguments = [self._stack(read) if len(set(read)) > 1 else read[0] for read in inputs]
            results = graph.call_module(name, tuple(arguments))
            for number, pack in outputs.items():
                stack = graph.call_function(operator.getitem, (results, number))
                lanes = graph.call_function(aten.unbind.int, (stack,))
                for lane, node in enumerate(pack):
                    result = graph.call_function(operator.getitem, (lanes, lane))
                    result.meta = node.meta
                    node.replace_all_uses_with(result, lambda user: user not in lane_of)
        for pack in reversed(packs):
            for node in pack:
                graph.erase_node(node)
        _sort(self.graph, self.place, self.next_draw)
        graph.lint()
        return True

    def _stack(self, read: Pack) -> Node:
        """The nodes stacked; numbers become one constant."""
        graph, value = self.graph.graph, read[0].meta["val"]
        numbers = all(node.target is aten.full.default and not isinstance(node.args[1], Node) for node in read)
        if not numbers or any(not isinstance(size, int) or size != 1 for size in value.shape):
            return graph.call_function(aten.stack.default, ([*read],))
        name = self._unused("numbers")
        constant = torch.tensor([node.args[1] for node in read], dtype=value.dtype, device=value.device)
        self.graph.register_buffer(name, constant.reshape(-1, *value.shape), persistent=False)
        return graph.get_attr(name)

    def _unused(self, name: str) -> str:
        return next(each for each in (f"{name}_{i}" for i in itertools.count()) if not hasattr(self.graph, each))


class _Mapped(nn.Module):
    """The operations of the first lane, mapped over the inputs of all lanes; it returns the results of every pack."""

    def __init__(self, packs: Sequence[Pack], inputs: Sequence[Pack]):
        super().__init__()
        part = torch.fx.Graph()
        made: dict[Pack, Node] = {read: part.placeholder(f"input_{i}") for i, read in enumerate(inputs)}
        for pack in packs:
            made[pack] = _copy(pack[0], part, [made[read] for read in _columns(pack)])
        part.output(tuple(made[pack] for pack in packs))
        self.part = GraphModule(nn.Module(), part)
        self.in_dims = tuple(0 if len(set(read)) > 1 else None for read in inputs)

    def forward(self, *args: Any) -> Any:
        return torch.vmap(self.part, in_dims=self.in_dims)(*args)

    def gives(self, packs: Sequence[Pack], inputs: Sequence[Pack]) -> bool:
        """Whether every operation can be mapped to results of the same kinds, tried on tensors without values."""
        values = [[node.meta["val"] for node in read] for read in inputs]
        mode: Any = detect_fake_mode(values)
        sizes = None if mode is None else mode.shape_env
        functorch: Any = torch._C._functorch
        enabled = functorch._is_vmap_fallback_enabled()
        functorch._set_vmap_fallback_enabled(False)  # it would loop over the lanes, with a warning
        failures = logging.getLogger("torch._subclasses.fake_tensor")  # prints what an operation cannot do
        try:
            # A new guard on sizes would compile the graph anew for each number of data.
            with (
                mode or nullcontext(),
                nullcontext() if sizes is None else sizes.error_on_new_guards(),
                mock.patch.object(failures, "disabled", True),
            ):
                stacked = zip(values, self.in_dims, strict=True)
                results = self(*(each[0] if dim is None else torch.stack(each) for each, dim in stacked))
                lanes = [pytree.tree_map_only(Tensor, lambda all: all[0], result) for result in results]
                return all(_is_like(lane, pack[0].meta["val"]) for lane, pack in zip(lanes, packs, strict=True))
        except Exception:  # of whatever kind, the graph without lanes is right
            return False
        finally:
            functorch._set_vmap_fallback_enabled(enabled)


def _sort(graph: GraphModule, place: dict[Node, int], next_draw: dict[Node, Node]) -> None:
    """Put every node after its inputs, and otherwise in the order of before."""
    nodes = [*graph.graph.nodes]
    keys: dict[Node, tuple[int, int]] = {}
    for number, node in enumerate(nodes):  # a new one comes as soon as its inputs are there
        latest = max((keys[read][0] for read in node.all_input_nodes if read in keys), default=0)
        keys[node] = (place.get(node, latest), number)
    readers = {node: [*node.users, *([next_draw[node]] if node in next_draw else [])] for node in nodes}
    missing = Counter(reader for node in nodes for reader in readers[node])
    ready = [(keys[node], node) for node in nodes if missing[node] == 0]
    heapq.heapify(ready)
    output = graph.graph.output_node()
    while ready:
        _, node = heapq.heappop(ready)
        if node is not output:
            output.prepend(node)
        for reader in readers[node]:
            missing[reader] -= 1
            if missing[reader] == 0:
                heapq.heappush(ready, (keys[reader], reader))


def _differentiated(graph: GraphModule) -> set[Node]:
    """The nodes that have a gradient if all numbers that the graph reads have."""
    run = _Gradients(graph)
    run.run_alone()
    waiting: list[Node] = [graph.graph.output_node()]
    found = set(waiting)
    while waiting:
        new = set(waiting.pop().all_input_nodes) - found
        found |= new
        waiting += new & run.with_gradient
    return found


class _Gradients(torch.fx.Interpreter):
    """Runs a graph on tensors without values, and collects the nodes through whose results gradients pass."""

    def __init__(self, graph: GraphModule):
        super().__init__(graph)
        self.placeholders = [node.meta.get("val") for node in graph.graph.find_nodes(op="placeholder")]
        self.mode: Any = detect_fake_mode(self.placeholders) or FakeTensorMode()
        self.with_gradient: set[Node] = set()

    def run_alone(self) -> None:
        with self.mode, mock.patch.object(self.mode, "allow_non_fake_inputs", True), torch.enable_grad():
            self.run(*map(self._read, self.placeholders))

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in pytree.tree_leaves(result)):
            self.with_gradient.add(n)
        return result

    def fetch_attr(self, target: str) -> Any:
        value = super().fetch_attr(target)
        return self._read(self.mode.from_tensor(value, static_shapes=True)) if isinstance(value, Tensor) else value

    def _read(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.detach().requires_grad_(value.is_floating_point() or value.is_complex())


# -- single nodes, and packs -------------------------------------------------------------------------------------------


def _reads(node: Node) -> list[Node]:
    """The nodes among the arguments, in order."""
    return [leaf for leaf in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(leaf, Node)]


def _copy(node: Node, graph: torch.fx.Graph, reads: Sequence[Node]) -> Node:
    """``node`` in another graph, reading ``reads``."""
    each, target = iter(reads), node.target
    assert callable(target)
    leaves, structure = pytree.tree_flatten((node.args, node.kwargs))
    args, kwargs = pytree.tree_unflatten([next(each) if isinstance(leaf, Node) else leaf for leaf in leaves], structure)
    return graph.call_function(target, args, kwargs)


def _kind(node: Node) -> Hashable:
    """What isomorphic operations have in common: the function, all arguments but nodes, and the kind of the result."""
    leaves, structure = pytree.tree_flatten((node.args, node.kwargs))
    constants = [Node if isinstance(leaf, Node) else (type(leaf), repr(leaf)) for leaf in leaves]
    return node.op, node.target, str(structure), tuple(constants), _kind_of(node.meta.get("val"))


def _kind_of(value: Any) -> str:
    def kind(leaf: Any) -> Any:
        # Draws like a tensor, and views of it, depend on its strides.
        return (leaf.dtype, leaf.shape, leaf.stride(), leaf.device) if isinstance(leaf, Tensor) else leaf

    return str(pytree.tree_leaves(pytree.tree_map(kind, value)))


def _is_like(lane: Any, value: Any) -> bool:
    """Whether a lane has the kind of the value it replaces, or is contiguous where that is a broadcast."""
    broadcast = isinstance(value, Tensor) and 0 in value.stride() and torch.empty_like(value).is_contiguous()
    return _kind_of(lane) in (_kind_of(value), _kind_of(value.contiguous() if broadcast else value))


def _columns(pack: Pack) -> list[Pack]:
    """What the operations of a pack read, by the place among their arguments."""
    return [*zip(*map(_reads, pack), strict=True)]


def _is_aligned(read: Pack, lane_of: dict[Node, tuple[int, int]]) -> bool:
    """Whether each lane reads its own operation of one pack."""
    found = [lane_of.get(node) for node in read]
    return found[0] is not None and found == [(found[0][0], i) for i in range(len(read))]


def _is_input(read: Pack, lane_of: dict[Node, tuple[int, int]]) -> bool:
    """Whether all lanes read the same, or tensors that can be stacked."""
    if any(node in lane_of for node in read):
        return False
    values = [node.meta.get("val") for node in read]
    tensors = all(isinstance(value, Tensor) for value in values)
    return len(set(read)) == 1 or (tensors and len({_kind_of(value) for value in values}) == 1)


def _is_pure(node: Node) -> bool:
    """Whether the operation is a function of its inputs alone, with a result that lanes can have."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.target is operator.getitem
    if node.target in APART:
        return False
    schema = node.target._schema
    # A size in the place of a tensor, x * len(x), cannot be mapped.
    numbers = any(
        isinstance(of.type, torch.TensorType)
        and isinstance(read, Node)
        and not isinstance(read.meta.get("val"), Tensor)
        for read, of in zip(node.args, schema.arguments, strict=False)
    )
    return bool(schema.returns) and not schema.is_mutable and not numbers and not _draws(node)


def _draws(node: Node) -> bool:
    """Whether random numbers may be drawn; the branches of an operator such as `torch.cond` may draw some."""
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return True
    if node.op == "call_module":
        owner: Any = node.graph.owning_module
        return any(map(_draws, _nodes_in(owner.get_submodule(node.target))))
    if node.target is aten.dropout.default and not (node.args[1] and node.args[2]):
        return False
    random = torch.Tag.nondeterministic_seeded
    return isinstance(node.target, torch._ops.OpOverload) and random in node.target.tags


def _writes(node: Node) -> bool:
    """Whether the operation changes a tensor that another can read."""
    if node.target in NORMS:
        running, training = node.args[3], node.args[5]
        return running is not None and bool(training)
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
        return False
    memory: Any = node.args[0]
    constant = node.target is aten.detach_.default and memory.target is aten.lift_fresh_copy.default
    return not ((constant or (_draws(node) and memory.target in FRESH)) and len(memory.users) == 1)


def _is_convolution(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.overloadpacket in CONVOLUTIONS


def _nodes_in(module: nn.Module) -> list[Node]:
    """The nodes of all graphs in a module."""
    return [node for part in module.modules() if isinstance(part, GraphModule) for node in part.graph.nodes]
