r"""Repeated parts of a graph as one: what a chain computes in each of its steps is computed once, for all of them.

An unrolled diffusion states T steps, and each calls the network. Their inputs come from the guide, so no call depends
on another. The graph then has T copies, *lanes*, of the network and of the KL, and a compiler translates every copy.
`join_lanes` makes one part of them, which `torch.vmap` maps over the stacked inputs of all lanes.

The search is that of vectorizing compilers. It starts at operations that read the same weight, and goes on to what they
read, and to what reads them, as long as the lanes have equal operations. A *pack* is one operation of every lane.

Source: Larsen and Amarasinghe 2000, "Exploiting superword level parallelism with multimedia instruction sets".
"""

from __future__ import annotations

import heapq
import itertools
import operator
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

__all__ = ["join_lanes"]

MIN_LANES = 4
ENDS = 2  # lanes that may be left out, because a chain has two ends, whose terms differ
aten = torch.ops.aten
WEIGHTED = {aten.linear.default, aten.matmul.default}
# Mapped over lanes they compile to slower code on a CPU: a U-Net's step takes 1.24 times as long.
CONVOLUTIONS = {aten.conv1d.default, aten.conv2d.default, aten.conv3d.default}
FRESH = {aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default}

Pack = tuple[Node, ...]


def join_lanes(graph: GraphModule) -> None:
    """Join the lanes of ``graph``, in place. It computes the same, and draws the same random numbers.

    A graph that writes to tensors, where order matters, or with convolutions stays as it is.
    """
    parts = [part for part in graph.modules() if isinstance(part, GraphModule)]
    if any(_writes(node) or node.target in CONVOLUTIONS for part in parts for node in part.graph.nodes):
        return
    tried: set[Node] = set()
    while seeds := _seeds(graph, tried):
        tried.update(seeds)
        lanes = _Lanes(graph, seeds)
        lanes.grow()
        lanes.join()


def _seeds(graph: GraphModule, tried: set[Node]) -> Pack:
    """The operations that read one weight, of the weight that is read most often; empty if there are too few."""
    readers: dict[Hashable, list[Node]] = defaultdict(list)
    for node in graph.graph.nodes:
        if node.target in WEIGHTED and node not in tried:
            readers[node.args[1], _kind(node)].append(node)
    most = max(readers.values(), key=len, default=[])
    return tuple(most) if len(most) >= MIN_LANES else ()


class _Lanes:
    """The packs found so far; the operation ``packs[k][i]`` belongs to lane i."""

    def __init__(self, graph: GraphModule, seeds: Pack):
        self.graph, self.packs, self.fewest = graph, [seeds], max(MIN_LANES, len(seeds) - ENDS)
        self.place = {node: number for number, node in enumerate(graph.graph.nodes)}
        draws = [node for node in self.place if _draws(node)]
        self.next_draw = dict(itertools.pairwise(draws))  # each follows the one before

    @property
    def lane_of(self) -> dict[Node, tuple[int, int]]:
        return _lane_of(self.packs)

    # -- the search ----------------------------------------------------------------------------------------------------

    def grow(self) -> None:
        """Add packs until there are no more."""
        if not self._fits(self.packs[0], []):
            self.packs = []
        waiting = [*range(len(self.packs))]
        while waiting:
            number = waiting.pop()
            for lanes, pack in [*self._read_by(self.packs[number]), *self._readers_of(self.packs[number])]:
                packs = [tuple(known[i] for i in lanes) for known in self.packs]
                if len(lanes) >= self.fewest and self._fits(pack, packs):
                    left_out = len(lanes) < len(self.packs[0])  # what did not fit with them may fit without
                    self.packs = [*packs, pack]
                    waiting = [*range(len(self.packs))] if left_out else [*waiting, number, len(packs)]
                    break

    def _read_by(self, pack: Pack) -> Iterator[tuple[Sequence[int], Pack]]:
        for read in _columns(pack):
            if len(set(read)) == len(read):
                yield range(len(pack)), read

    def _readers_of(self, pack: Pack) -> Iterator[tuple[Sequence[int], Pack]]:
        """Readers of the same kind, in the order of the graph, with the lanes that have one."""
        known, alike = self.lane_of, defaultdict[Hashable, dict[int, Node]](dict)
        for lane, node in enumerate(pack):
            counts: Counter[Hashable] = Counter()
            for reader in sorted((user for user in node.users if user not in known), key=self.place.__getitem__):
                kind = (_kind(reader), tuple(read is node for read in _reads(reader)))
                alike[kind, counts[kind]][lane] = reader
                counts[kind] += 1
        for readers in alike.values():
            yield [*readers], tuple(readers.values())

    def _fits(self, pack: Pack, packs: list[Pack]) -> bool:
        """Whether ``pack`` is one operation on equal or on stacked inputs, and no lane reads another."""
        lane_of = _lane_of([*packs, pack])
        return (
            len(lane_of) == len(pack) * (len(packs) + 1)  # no operation twice
            and len({_kind(node) for node in pack}) == 1
            and all(_is_pure(node) for node in pack)
            and all(lane_of.get(user, (0, i))[1] == i for i, node in enumerate(pack) for user in node.users)
            and all(_is_aligned(read, lane_of) or _is_input(read, lane_of) for read in _columns(pack))
            and self._is_independent([*packs, pack])
        )

    def _is_independent(self, packs: list[Pack]) -> bool:
        """Whether no way leads from a lane over other operations to a lane."""
        inside = {node for pack in packs for node in pack}
        end = max(self.place[node] for node in inside)
        reached = {user for node in inside for user in node.users} - inside
        waiting = [*reached]
        while waiting:
            node = waiting.pop()
            readers = [*node.users, *([self.next_draw[node]] if node in self.next_draw else [])]
            for user in readers:
                if user in inside:
                    return False
                if user not in reached and self.place[user] < end:
                    reached.add(user)
                    waiting.append(user)
        return True

    # -- the result ----------------------------------------------------------------------------------------------------

    def join(self) -> None:
        """Replace the lanes by one part that is mapped over them, unless an operation cannot be mapped."""
        known = self.lane_of
        outputs = [pack for pack in self.packs if any(user not in known for node in pack for user in node.users)]
        packs = sorted(self.packs, key=lambda pack: self.place[pack[0]])
        inputs = [*dict.fromkeys(read for pack in packs for read in _columns(pack) if read[0] not in known)]
        stacked = [len(set(read)) > 1 for read in inputs]

        part = torch.fx.Graph()
        made: dict[Pack, Node] = {read: part.placeholder(f"input_{i}") for i, read in enumerate(inputs)}
        for pack in packs:
            made[pack] = _copy(pack[0], part, [made[read] for read in _columns(pack)])
        part.output(tuple(made[pack] for pack in outputs))
        mapped = _Mapped(GraphModule(nn.Module(), part), stacked)
        tensors = all(isinstance(pack[0].meta["val"], Tensor) for pack in outputs)
        if not outputs or not tensors or not mapped.runs_on([[node.meta["val"] for node in read] for read in inputs]):
            return

        graph, name = self.graph.graph, f"lanes_{len([*self.graph.children()])}"
        self.graph.add_submodule(name, mapped)
        with graph.inserting_before(graph.output_node()):
            arguments = [self._stack(read) if many else read[0] for read, many in zip(inputs, stacked, strict=True)]
            results = graph.call_module(name, tuple(arguments))
            for number, pack in enumerate(outputs):
                stack = graph.call_function(operator.getitem, (results, number))
                lanes = graph.call_function(aten.unbind.int, (stack,))
                for lane, node in enumerate(pack):
                    result = graph.call_function(operator.getitem, (lanes, lane))
                    result.meta = node.meta
                    node.replace_all_uses_with(result, lambda user: user not in known)
        for pack in reversed(packs):
            for node in pack:
                graph.erase_node(node)
        _sort(self.graph, self.place, self.next_draw)
        graph.lint()

    def _stack(self, read: Pack) -> Node:
        """The nodes stacked; numbers become one constant."""
        graph, value = self.graph.graph, read[0].meta["val"]
        if any(node.target is not aten.full.default or isinstance(node.args[1], Node) for node in read):
            return graph.call_function(aten.stack.default, ([*read],))
        numbers = torch.tensor([node.args[1] for node in read], dtype=value.dtype, device=value.device)
        shape = (len(read), *value.shape)
        name = f"numbers_{len([*self.graph.buffers(recurse=False)])}"
        self.graph.register_buffer(
            name, numbers.reshape(-1, *[1] * value.dim()).expand(shape).clone(), persistent=False
        )
        return graph.get_attr(name)


class _Mapped(nn.Module):
    """A part of a graph, mapped over the first dimension of the arguments that are stacked."""

    def __init__(self, part: GraphModule, stacked: Sequence[bool]):
        super().__init__()
        self.part, self.stacked = part, tuple(stacked)

    def forward(self, *args: Any) -> Any:
        return torch.vmap(self.part, in_dims=tuple(0 if many else None for many in self.stacked))(*args)

    def runs_on(self, inputs: Sequence[Sequence[Any]]) -> bool:
        """Whether every operation can be mapped, tried on tensors without values, one or one for each lane."""
        functorch: Any = torch._C._functorch
        enabled = functorch._is_vmap_fallback_enabled()
        functorch._set_vmap_fallback_enabled(False)
        try:
            with detect_fake_mode(inputs) or nullcontext():
                self(
                    *(
                        torch.stack([*each]) if many else each[0]
                        for each, many in zip(inputs, self.stacked, strict=True)
                    )
                )
            return True
        except Exception:
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


# -- single nodes ------------------------------------------------------------------------------------------------------


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
    """What equal operations have in common: the function, all arguments but nodes, and the result's kind."""
    leaves, structure = pytree.tree_flatten((node.args, node.kwargs))
    constants = [Node if isinstance(leaf, Node) else (type(leaf), repr(leaf)) for leaf in leaves]
    return node.op, node.target, str(structure), tuple(constants), _kind_of_value(node)


def _kind_of_value(node: Node) -> str:
    def kind(value: Any) -> Any:
        return (value.dtype, value.shape, value.device) if isinstance(value, Tensor) else value

    return str(pytree.tree_map(kind, node.meta.get("val")))


def _columns(pack: Pack) -> list[Pack]:
    """What the operations of a pack read, by the place among their arguments."""
    return [*zip(*map(_reads, pack), strict=True)]


def _lane_of(packs: Sequence[Pack]) -> dict[Node, tuple[int, int]]:
    """The pack and the lane of each operation."""
    return {node: (k, i) for k, pack in enumerate(packs) for i, node in enumerate(pack)}


def _is_aligned(read: Pack, lane_of: dict[Node, tuple[int, int]]) -> bool:
    """Whether each lane reads its own operation of one pack."""
    found = [lane_of.get(node) for node in read]
    return found[0] is not None and found == [(found[0][0], i) for i in range(len(read))]


def _is_input(read: Pack, lane_of: dict[Node, tuple[int, int]]) -> bool:
    """Whether all lanes read the same, or tensors that can be stacked."""
    if any(node in lane_of for node in read):
        return False
    tensors = all(isinstance(node.meta.get("val"), Tensor) for node in read)
    return len(set(read)) == 1 or (tensors and len({_kind_of_value(node) for node in read}) == 1)


def _is_pure(node: Node) -> bool:
    """Whether the operation is a function of its inputs alone, with a result that lanes can have."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.target is operator.getitem
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
    """Whether random numbers may be drawn. A part of its own, such as one under autocast, may draw some."""
    if node.target is aten.dropout.default and not (node.args[1] and node.args[2]):
        return False
    random = torch.Tag.nondeterministic_seeded
    return node.op == "call_module" or (isinstance(node.target, torch._ops.OpOverload) and random in node.target.tags)


def _writes(node: Node) -> bool:
    """Whether the operation changes values that another can read."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
        return False
    if node.target is aten.detach_.default:
        return False
    memory: Any = node.args[0]
    return not (_draws(node) and memory.target in FRESH and len(memory.users) == 1)
