"""The table that says which mesh axes share which dimension, and how a row of logical axes becomes a PartitionSpec.

Mesh axes, outermost (slowest link) first:
    pipe    stages of layers (Huang et al. 2019, arXiv:1811.06965)
    data    copies of the model, each with its part of the batch
    fsdp    as data, but the copies share the training state (ZeRO: Rajbhandari et al. 2020, arXiv:1910.02054, section 5)
    seq     parts of each row (context parallelism: Liu et al. 2023, arXiv:2310.01889)
    tensor  parts of each matrix product (Shoeybi et al. 2019, arXiv:1909.08053, section 3)
"""

import difflib
import math
from collections.abc import Mapping
from typing import NamedTuple

from jax.sharding import PartitionSpec
from ml_collections import ConfigDict

MESH_AXES = ("pipe", "data", "fsdp", "seq", "tensor")

Rules = Mapping[str, tuple[str, ...]]

# logical axis -> the mesh axes that share it, together; () is not shared. A new logical axis is one line here.
RULES: Rules = {
    # of activations
    "batch": ("data", "fsdp"),
    "length": ("seq",),
    "stream": (),  # the length of what passes between blocks; see SEQUENCE_PARALLEL
    "embed_act": (),
    "kv_heads_act": ("tensor",),  # repeated until they divide (models/layers.py)
    # of parameters and activations
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "features": ("tensor",),  # of the square matrices in BERT's heads
    # of parameters
    "layers": ("pipe",),
    "chunks": (),  # runs of layers, in a pipeline
    "embed": ("fsdp",),
    "embed_rest": ("fsdp", "pipe"),  # in tables outside the layers, which no stage has to itself
    "new_tokens": (),
    "rank": (),  # of an adapter
    "places": (),
    "classes": (),
    "token_types": (),
    "buckets": (),
    "groups": (),  # of inputs that share a scale, in quantized kernels
}
# Sequence parallelism: between blocks, where no product needs whole rows, the devices of `tensor` share the row, too (Korthikanti et al.
# 2022, arXiv:2205.05198, section 4.2).
SEQUENCE_PARALLEL: Rules = {"stream": ("tensor",)}
# Key and value heads that are fewer than `tensor` are held by each of its devices.
WHOLE_KV_HEADS: Rules = {"kv_heads": ()}
# The lines that ZeRO is about, for what the devices of fsdp do not share.
WHOLE_OVER_FSDP: Rules = {"embed": (), "embed_rest": ("pipe",)}


class Tables(NamedTuple):
    """parameters: how parameters and activations lie. state: optimizer state, averages, and the gradients that the optimizer is given."""

    parameters: Rules
    state: Rules


def tables(config: ConfigDict, tensor: int) -> Tables:
    """The tables of a config on a mesh whose axis `tensor` has this size.

    ZeRO's stages differ in what takes `fsdp`: 1 the optimizer state, 2 also the gradients while they are summed up (see gather.py),
    3 also the parameters.
    """
    kv_heads = config.model.kv_heads or config.model.heads
    state = {**RULES, **(WHOLE_KV_HEADS if kv_heads % tensor else {}), **(SEQUENCE_PARALLEL if config.parallel.sequence else {})}
    return Tables(state if config.parallel.zero_stage == 3 else {**state, **WHOLE_OVER_FSDP}, state)


def spec(
    rules: Rules, mesh_shape: Mapping[str, int], axes: tuple[str | None, ...], shape: tuple[int, ...], name: str
) -> PartitionSpec:
    """How the array `name` with these logical axes lies on the mesh; None is an axis that is not shared.

    ValueError for a logical axis without a rule, two that land on one mesh axis, or a dimension that does not divide.
    """
    if len(axes) != len(shape):
        raise ValueError(
            f"'{name}' has shape {shape} but logical axes {axes}.\n  Accepted: one logical axis a dimension.\n  Change its declaration."
        )
    entries, owner = [], dict[str, str]()
    for dimension, (axis, size) in enumerate(zip(axes, shape, strict=True)):
        shared_by = () if axis is None else _look_up(rules, axis, name)
        for mesh_axis in shared_by:
            if mesh_axis in owner:
                raise ValueError(
                    f"'{name}' {axes}: the logical axes '{owner[mesh_axis]}' and '{axis}' both land on the mesh axis '{mesh_axis}'.\n"
                    "  Accepted: each mesh axis once an array.\n  Change one of the two lines in parallel/rules.py."
                )
            owner[mesh_axis] = str(axis)
        _check_divides(mesh_shape, shared_by, size, f"dimension {dimension} ('{axis}') of '{name}'")
        entries.append(entry(shared_by))
    return PartitionSpec(*entries)


def entry(shared_by: tuple[str, ...]) -> str | tuple[str, ...] | None:
    """These mesh axes as an entry of a PartitionSpec."""
    return shared_by if len(shared_by) > 1 else shared_by[0] if shared_by else None


def _look_up(rules: Rules, axis: str, name: str) -> tuple[str, ...]:
    if axis in rules:
        return rules[axis]
    near = difflib.get_close_matches(axis, rules, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    raise ValueError(
        f"no rule for the logical axis '{axis}' of '{name}'.{hint}\n  Accepted: {', '.join(rules)}.\n  Add a line to parallel/rules.py."
    )


def _check_divides(mesh_shape: Mapping[str, int], shared_by: tuple[str, ...], size: int, what: str) -> None:
    parts = math.prod(mesh_shape[axis] for axis in shared_by)
    if size % parts == 0:
        return
    product = " x ".join(f"parallel.{axis}" for axis in shared_by)
    # A mesh of more devices than this has not been built; listing more divisors would help nobody.
    accepted = [part for part in range(1, min(size, 4096) + 1) if size % part == 0]
    change = ", or change that size"
    if "('vocab')" in what and what.endswith("/base'"):  # what a vocabulary was before it grew (transforms/grown.py)
        change = ": these rows are those of train.start. parallel.fsdp cuts the other dimension"
    elif "('vocab')" in what:
        # Rows of the embedding that no token needs do no harm; other sizes are the architecture.
        change += f": model.vocab_size = {-(-size // parts) * parts} has rows to spare"
    raise ValueError(
        f"{product} = {parts} does not divide {what}, which is {size}.\n"
        f"  Accepted: {', '.join(map(str, accepted))}.\n  Set {product} to one of these{change}."
    )
