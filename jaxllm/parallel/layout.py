"""How a training state lies on a mesh, in numbers: parts and bytes of each parameter, what no axis cuts, the textbook's figure."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec

from jaxllm.parallel.plan import Plan
from jaxllm.transforms import tree
from jaxllm.types import Axes, Params


class Entry(NamedTuple):
    """A parameter, or `layers` equal ones of an unrolled stack: the shape of one, its parts, and the bytes of all of them.

    bytes: on one device; whole: of the whole arrays.
    """

    name: str
    layers: int
    shape: tuple[int, ...]
    axes: Axes
    spec: PartitionSpec
    parts: int
    bytes: int
    whole: int


def entries(plan: Plan, axes: Any, params: Params) -> list[Entry]:
    """One a parameter's name, in tree order, as the table of parameters has them; holes are left out."""

    def one(path: Any, leaf_axes: Axes, leaf: Any) -> Entry | None:
        if leaf is None:
            return None
        name = tree.path_name(path)
        sharding = plan.sharding(leaf_axes, leaf.shape, name)
        whole = leaf.size * leaf.dtype.itemsize
        parts = math.prod(plan.mesh.shape[axis] for axis in cut_by(sharding.spec))
        return Entry(name, 1, leaf.shape, leaf_axes, sharding.spec, parts, whole // parts, whole)

    found: dict[str, Entry] = {}
    every = jax.tree.map_with_path(one, axes, params, is_leaf=lambda node: isinstance(node, tuple))
    for entry in jax.tree.leaves(every, is_leaf=lambda node: isinstance(node, Entry)):
        before = found.get(entry.name)
        found[entry.name] = (
            entry
            if before is None
            else before._replace(layers=before.layers + 1, bytes=before.bytes + entry.bytes, whole=before.whole + entry.whole)
        )
    return list(found.values())


def gradient_bytes(plan: Plan, axes: Any, params: Params) -> int:
    """Bytes on one device of the gradients while they are summed up over micro-batches, in float32.

    ZeRO-1 sums them whole over fsdp, 2 and 3 sum what a device will keep. The stages of a pipeline sum those outside the layers whole.
    """
    table = plan.tables.parameters if plan.parallel.zero_stage == 1 else plan.tables.state

    def one(path: Any, leaf_axes: Axes, leaf: Any) -> int:
        if leaf is None:
            return 0
        spec = plan.sharding(leaf_axes, leaf.shape, tree.path_name(path), table).spec
        cut = [axis for axis in cut_by(spec) if axis != "pipe" or "layers" in leaf_axes]
        return 4 * leaf.size // math.prod(plan.mesh.shape[axis] for axis in cut)

    return sum(jax.tree.leaves(jax.tree.map_with_path(one, axes, params, is_leaf=lambda node: isinstance(node, tuple))))


def uncut(plan: Plan, abstract: Any) -> Mapping[str, float]:
    """mesh axis -> the share of the bytes of these arrays (shapes with shardings) that each of its devices has a copy of, counters aside.

    Only of axes that are there to share a state, and have more than one device.
    """
    leaves = [leaf for leaf in jax.tree.leaves(abstract) if leaf.ndim]
    whole = sum(_size(leaf) for leaf in leaves)
    found = {}
    for axis in ("pipe", "fsdp", "tensor"):
        if plan.mesh.shape[axis] > 1:
            held = sum(_size(leaf) for leaf in leaves if axis not in cut_by(leaf.sharding.spec))
            found[axis] = held / max(whole, 1)
    return found


def textbook(plan: Plan, numbers: int, state_bytes: int) -> dict[str, float]:
    """Bytes on one device if every array were cut: ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054, figure 1), in our types.

    The paper has (2 + 2 + K) bytes a number, of parameters, gradients and optimizer state. Here parameters and gradients are float32, so it
    is 4 + 4 + K, with K = state_bytes / numbers, which is 8 for Adam's two moments. fsdp shares the optimizer state from stage 1 on,
    gradients from 2, parameters from 3; tensor and pipe share everything.
    """
    stage, fsdp = plan.parallel.zero_stage, plan.mesh.shape["fsdp"]
    held = numbers / (plan.mesh.shape["tensor"] * plan.mesh.shape["pipe"])
    return {
        "parameters": 4 * held / (fsdp if stage == 3 else 1),
        "gradients": 4 * held / (fsdp if stage >= 2 else 1),
        "optimizer": state_bytes / numbers * held / fsdp,
    }


def cut_by(spec: PartitionSpec) -> tuple[str, ...]:
    """The mesh axes in a PartitionSpec."""
    entries: Iterable[Any] = (entry if isinstance(entry, tuple) else (entry,) for entry in spec if entry is not None)
    return tuple(axis for entry in entries for axis in entry)


def _size(leaf: Any) -> int:
    return int(leaf.size * leaf.dtype.itemsize)
