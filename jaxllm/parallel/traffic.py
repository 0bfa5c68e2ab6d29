"""What travels in a step, said beforehand: from the plan, the axes and the shapes alone.

ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054, section 7), in bytes of a whole copy of what fsdp cuts, for M micro-batches:

    stage 1    gradients are summed and cut up once a step: G; new parameters are gathered once: W                     G + W
    stage 2    as 1, but gradients each micro-batch, so that no device holds all of them                             M G + W
    stage 3    parameters of layers are gathered for the forward pass, and again for the backward pass;
               those outside the layers once, as the backward pass does not read them; gradients as in 2     M (G + 2 P), M (G + P)

With M = 1 and all of one type these are the paper's 2, 2 and 3 times the model. Gradients G and new parameters W travel in float32,
parameters P in the compute type, but vectors in float32. What fsdp does not cut (biases of q, k, v and up) is summed whole, once a step; so
are all gradients over `data` and `seq`. The stages of a pipeline share what is outside the layers
once a step. What activations move is in activations.py.

It holds for what acts on each number by itself: AdamW, Lion and SGD. Muon and Adafactor read whole matrices.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax

from jaxllm.parallel import collectives, layout
from jaxllm.parallel.collectives import Collective
from jaxllm.parallel.plan import Plan
from jaxllm.transforms import tree
from jaxllm.types import Axes, Model, Params

# (kind, mesh axes)
Way = tuple[str, tuple[str, ...]]


class Row(NamedTuple):
    """One reason to travel. arrays: so many a step; bytes: of the whole arrays on one device, as in
    collectives.py; group: devices of a group.
    """

    what: str
    kind: str
    axes: tuple[str, ...]
    group: int
    arrays: int
    bytes: int

    @property
    def sent(self) -> float:
        return collectives.sent(self.kind, self.group, self.bytes)


class Amount(NamedTuple):
    arrays: int
    bytes: int


class Difference(NamedTuple):
    """Of one way to travel, what was predicted and what the compiled program does."""

    way: Way
    predicted: Amount
    found: Amount


FORWARD = "parameters, for the forward pass"
BACKWARD = "parameters of layers again, for the backward pass"
SUMMED = "gradients, summed and cut up"
UPDATED = "new parameters, made whole"
TOTAL = "gradients, summed over the other copies"
WHOLE = "gradients that fsdp does not cut, summed whole"
STAGES = "parameters outside the layers, for all stages"
FROM_STAGES = "their gradients, summed over the stages"


class _Array(NamedTuple):
    """A parameter as a device uses it: whole over fsdp, and outside the layers over pipe. layers: of a stacked one; else 1."""

    name: str
    axes: Axes
    size: int
    layers: int
    in_layers: bool
    trained: bool
    # Over which mesh axes the table of parameters and that of state cut it.
    cut: tuple[str, ...]
    cut_state: tuple[str, ...]


def predict(plan: Plan, model: Model, params: Params, frozen: Params, microbatches: int) -> list[Row] | None:
    """The rows of one step; [] for a mesh of one device. params, frozen: as in a TrainState, of shapes.

    None where this is not known: in a pipeline whose stages also gather over fsdp, each in its own ticks.
    """
    if plan.mesh.shape["pipe"] > 1 and plan.mesh.shape["fsdp"] > 1:
        return None
    arrays = list(_arrays(plan, model, params, frozen))
    stage, arch = plan.parallel.zero_stage, model.config
    rows = []

    def add(what: str, kind: str, axes: Iterable[str], sizes: Iterable[Amount], times: int = 1) -> None:
        axes = tuple(axis for axis in axes if plan.mesh.shape[axis] > 1)
        amounts = list(sizes)
        if axes and amounts:
            number, size = (times * sum(part) for part in zip(*amounts, strict=True))
            rows.append(Row(what, kind, axes, math.prod(plan.mesh.shape[axis] for axis in axes), number, size))

    def gathered(array: _Array) -> Amount:
        vector = len(array.axes) - ("layers" in array.axes) == 1
        return Amount(array.layers, array.size * (4 if vector else plan.dtype.itemsize))

    shared = [array for array in arrays if "fsdp" in array.cut]
    again = [array for array in shared if array.in_layers and _read_again(array.name, arch.remat, arch.norm_order)]
    add(FORWARD, "all-gather", ["fsdp"], map(gathered, shared), microbatches)
    add(BACKWARD, "all-gather", ["fsdp"], map(gathered, again), microbatches)
    trained = [array for array in arrays if array.trained]
    cut = [array for array in trained if "fsdp" in array.cut_state]
    if stage == 1:  # once, when all are summed up: stacked layers are one array
        add(SUMMED, "reduce-scatter", ["fsdp"], [_whole(array) for array in cut])
    else:
        add(SUMMED, "reduce-scatter", ["fsdp"], [Amount(array.layers, 4 * array.size) for array in cut], microbatches)
    parts = plan.mesh.shape["fsdp"]
    add(TOTAL, "all-reduce", ["data", "seq"], [Amount(1, 4 * array.size // parts) for array in cut])
    add(WHOLE, "all-reduce", ["data", "fsdp", "seq"], [_whole(array) for array in trained if "fsdp" not in array.cut_state])
    add(UPDATED, "all-gather", ["fsdp"], [_whole(array) for array in cut if "fsdp" not in array.cut])
    outside = [array for array in arrays if not array.in_layers]
    add(STAGES, "all-gather", ["pipe"], [_whole(array) for array in outside if "pipe" in array.cut])
    outside = [array for array in outside if array.trained]
    add(FROM_STAGES, "reduce-scatter", ["pipe"], [_whole(array) for array in outside if "pipe" in array.cut])
    add(FROM_STAGES, "all-reduce", ["pipe"], [_whole(array) for array in outside if "pipe" not in array.cut])
    return rows


def amounts(rows: Iterable[Row]) -> dict[Way, Amount]:
    """Their sums by kind and axes."""
    found: dict[Way, Amount] = {}
    for row in rows:
        before = found.get((row.kind, row.axes), Amount(0, 0))
        found[row.kind, row.axes] = Amount(before.arrays + row.arrays, before.bytes + row.bytes)
    return found


def compare(rows: Iterable[Row], found: Iterable[Collective]) -> list[Difference]:
    """Predicted beside found, for each way that either has; single numbers, such as losses and norms, are left out."""
    predicted, nothing = amounts(rows), Amount(0, 0)
    done = {(line.kind, line.axes): Amount(line.arrays, line.bytes) for line in collectives.summary(found)}
    ways = sorted({*predicted, *done}, key=lambda way: (collectives.KINDS.index(way[0]), way[1]))
    return [Difference(way, predicted.get(way, nothing), done.get(way, nothing)) for way in ways]


def _whole(array: _Array) -> Amount:
    return Amount(1, 4 * array.size)


def _read_again(name: str, remat: Any, norm_order: str) -> bool:
    """Whether the backward pass of a layer reads a parameter: a bias only if what follows it is computed again."""
    if not name.endswith("bias"):
        return True
    if remat.policy in ("none", "attention"):
        return False
    kept = {*remat.save, *remat.offload}
    stored = name.endswith("mlp/down/bias" if norm_order == "pre" else "mlp/norm/bias")
    stored |= name.endswith("o/bias") and "attention_out" in kept
    stored |= name.endswith("down/bias") and "mlp_out" in kept
    return not stored


def _arrays(plan: Plan, model: Model, params: Params, frozen: Params) -> Iterable[_Array]:
    trained = {id(leaf) for leaf in jax.tree.leaves(params)}
    whole = tree.combine(params, frozen)
    stacks = tuple("/".join(stack.path) + "/" for stack in model.stacks)
    mesh = plan.mesh.shape

    def one(path: Any, axes: Axes, leaf: Any) -> _Array:
        name = tree.path_name(path)
        by_table = [layout.cut_by(plan.sharding(axes, leaf.shape, name, table).spec) for table in plan.tables]
        in_layers = name.startswith(stacks)
        held = math.prod(mesh[axis] for axis in by_table[0] if axis == "tensor" or (axis == "pipe" and in_layers))
        layers = leaf.shape[0] if axes[:1] == ("layers",) else 1
        return _Array(name, axes, leaf.size // held, layers, in_layers, id(leaf) in trained, *by_table)

    found: list[_Array] = jax.tree.leaves(
        jax.tree.map_with_path(one, model.axes, whole, is_leaf=lambda node: isinstance(node, tuple)),
        is_leaf=lambda node: isinstance(node, _Array),
    )
    return found
