"""A mesh of devices and where each array lies on it: parameters, optimizer state, batch, activations.

Axes are Auto (the compiler places what nobody placed), and every placement that we do ask for comes from one table, rules.py.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from absl import logging
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from jaxllm.parallel import rules
from jaxllm.transforms import tree
from jaxllm.types import Constrain, PartAxes

SIZES = ("data", "fsdp", "tensor")


@dataclass(frozen=True)
class Plan:
    """A mesh and the table that maps logical axes onto it. An abstract mesh plans for devices that are not there."""

    mesh: Mesh | AbstractMesh
    rules: rules.Rules

    def sharding(self, axes: PartAxes, shape: tuple[int, ...], name: str) -> NamedSharding:
        """Where the array `name` lies; ValueError if its shape and axes do not fit the mesh."""
        return NamedSharding(self.mesh, rules.spec(self.rules, self.mesh.shape, axes, shape, name))

    def shardings(self, axes: Any, abstract: Any) -> Any:
        """A tree like `abstract` (of anything with a shape), given the tree of its logical axes.

        A leaf of `axes` may stand for several arrays: those of a quantized kernel keep the kernel's rank and axis order.
        """

        def one(path: Sequence[Any], leaf_axes: tuple[str, ...], leaf: Any) -> Any:
            name = tree.path_name(path)
            return jax.tree.map(lambda array: self.sharding(leaf_axes, array.shape, name), leaf)

        return jax.tree.map_with_path(one, axes, abstract, is_leaf=_is_axes)

    def state_shardings(self, abstract_state: Any, axes: Any, abstract_params: Any) -> Any:
        """A tree like `abstract_state`: whatever mirrors a parameter lies where the parameter lies, the rest is replicated.

        An array mirrors a parameter if its path ends in the parameter's whole path and their shapes are equal: moments, momentum,
        averages, a training state that holds the parameters themselves. So do the scales of 8-bit moments, whose last axis is shorter.
        Counts, factored moments (Adafactor) and holes are the rest.
        """
        placed: dict[str, list[tuple[tuple[int, ...], NamedSharding]]] = {}
        named = zip(tree.named_leaves(abstract_params), jax.tree.leaves(self.shardings(axes, abstract_params)), strict=True)
        for (name, leaf), sharding in named:
            placed.setdefault(name, []).append((leaf.shape, sharding))

        def one(path: Sequence[Any], leaf: Any) -> NamedSharding:
            parts = tree.path_name(path).split("/")
            # The longest ending that is a parameter: "layers/mlp/norm/scale" is not the parameter "norm/scale".
            endings = ("/".join(parts[start:]) for start in range(len(parts)))
            mirrored = next((placed[ending] for ending in endings if ending in placed), [])
            alike = (_alike(sharding, shape, leaf.shape) for shape, sharding in mirrored)
            return next((sharding for sharding in alike if sharding is not None), self.replicated)

        return jax.tree.map_with_path(one, abstract_state)

    @property
    def replicated(self) -> NamedSharding:
        """A whole copy on each device."""
        return NamedSharding(self.mesh, PartitionSpec())

    def batch_sharding(self) -> NamedSharding:
        """Of each [B, T] array of a batch."""
        return NamedSharding(self.mesh, PartitionSpec(self.rules["batch"], self.rules["length"]))

    @property
    def batch_parts(self) -> int:
        """In how many parts the mesh cuts a batch; its rows must be a multiple."""
        return self.parts("batch")

    def parts(self, axis: str) -> int:
        """In how many parts the mesh cuts a logical axis."""
        return math.prod(self.mesh.shape[mesh_axis] for mesh_axis in self.rules[axis])

    @property
    def constrain(self) -> Constrain:
        """What a model is built with, to lie on this mesh."""
        return _OnMesh(self)


@dataclass(frozen=True, eq=False)
class _OnMesh:
    """`types.Constrain` by the table of a plan."""

    plan: Plan

    def __call__(self, array: jax.Array, axes: PartAxes, /) -> jax.Array:
        if self.plan.mesh.size == 1:
            return array
        return jax.lax.with_sharding_constraint(array, self.plan.sharding(axes, array.shape, f"an activation {axes}"))

    def refuse(self) -> str | None:
        parts = self.plan.parts("length")
        return f"it needs whole rows, and the mesh cuts them into {parts} parts" if parts > 1 else None

    def per_device(self, function: Callable[..., jax.Array], /, *parts: tuple[Any, PartAxes]) -> jax.Array:
        arguments = tuple(arrays for arrays, _ in parts)
        if self.plan.mesh.size == 1:
            return function(*arguments)

        def specs(arrays: Any, axes: PartAxes) -> Any:
            return jax.tree.map(lambda array: self.plan.sharding(axes, array.shape, f"an activation {axes}").spec, arrays)

        in_specs = tuple(specs(*part) for part in parts)
        # Kernels do not say over which axes their results vary, so that cannot be checked.
        each = jax.shard_map(function, mesh=self.plan.mesh, in_specs=in_specs, out_specs=in_specs[0], check_vma=False)
        return each(*arguments)


def make(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Plan:
    """The plan of `config.parallel` over `devices` (default: all); ValueError if there are too few or the batch does not divide."""
    devices = jax.devices() if devices is None else devices
    sizes = _fill(config, len(devices))
    used = math.prod(sizes.values())
    if used > len(devices):
        raise ValueError(
            f"{_product(sizes)} = {' x '.join(map(str, sizes.values()))} = {used}, but there are {len(devices)} devices.\n"
            f"  Accepted: a product of up to {len(devices)}. Lower one of them, or set one to -1.\n"
            f"  On a CPU the environment variable JAX_NUM_CPU_DEVICES={used} gives as many pretend devices."
        )
    if used < len(devices):
        logging.warning("%s = %d of %d devices are used; the others stay idle.", _product(sizes), used, len(devices))
    shape = _mesh_shape(sizes)
    axis_types = (AxisType.Auto,) * len(shape)
    mesh = jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=axis_types, devices=devices[:used])
    return _checked(Plan(mesh, rules.RULES), config)


def make_abstract(config: ConfigDict) -> Plan:
    """The same without devices, for checks and memory plans; a size of -1 counts as 1."""
    sizes = {axis: max(config.parallel[axis], 1) for axis in SIZES}
    shape = _mesh_shape(sizes)
    mesh = AbstractMesh(tuple(shape.values()), tuple(shape), axis_types=(AxisType.Auto,) * len(shape))
    return _checked(Plan(mesh, rules.RULES), config)


def shard_bytes(shardings: Any, abstract: Any) -> int:
    """Bytes that the arrays of `abstract`, so sharded, take on one device."""

    def one(sharding: NamedSharding, leaf: Any) -> int:
        return math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(one, shardings, abstract)))


def _alike(sharding: NamedSharding, shape: tuple[int, ...], other: tuple[int, ...]) -> NamedSharding | None:
    """Where an array of shape `other` lies that belongs to one of `shape`: as that, or None if more than the last axis is shorter.

    A last axis of one number a block is cut as the blocks are, where each device has whole blocks.
    """
    if shape == other:
        return sharding
    if not shape or shape[:-1] != other[:-1] or shape[-1] % other[-1]:
        return None
    cut_by = (*sharding.spec, *[None] * len(shape))[len(shape) - 1]
    axes = (cut_by,) if isinstance(cut_by, str) else cut_by or ()
    if other[-1] % math.prod(sharding.mesh.shape[axis] for axis in axes) == 0:
        return sharding
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[: len(shape) - 1]))


def _is_axes(node: Any) -> bool:
    return isinstance(node, tuple) and all(isinstance(axis, str) for axis in node)


def _fill(config: ConfigDict, devices: int) -> dict[str, int]:
    """Sizes of the mesh axes, with -1 replaced by what the others leave over."""
    sizes = {axis: config.parallel[axis] for axis in SIZES}
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ValueError(
            f"{' and '.join(f'parallel.{axis}' for axis in free)} are -1.\n  Accepted: one of them.\n  Give the others a size."
        )
    if not free:
        return sizes
    others = {axis: size for axis, size in sizes.items() if size != -1}
    taken = math.prod(others.values())
    if devices % taken:
        accepted = ", ".join(str(part) for part in range(1, devices + 1) if devices % part == 0)
        raise ValueError(
            f"{_product(others)} = {taken} does not divide the {devices} devices that parallel.{free[0]} = -1 would share out.\n"
            f"  Accepted: {accepted}. Set the product to one of these, or parallel.{free[0]} to a size.\n"
            "  On a CPU the environment variable JAX_NUM_CPU_DEVICES sets the number of pretend devices."
        )
    return {axis: devices // taken if size == -1 else size for axis, size in sizes.items()}


def _mesh_shape(sizes: Mapping[str, int]) -> dict[str, int]:
    return {axis: sizes.get(axis, 1) for axis in rules.MESH_AXES}


def _product(sizes: Mapping[str, int]) -> str:
    return " x ".join(f"parallel.{axis}" for axis in sizes)


def _checked(plan: Plan, config: ConfigDict) -> Plan:
    """The plan; ValueError unless each part of a batch gets as many rows."""
    train, parts = config.train, plan.batch_parts
    rows = train.batch_seqs // train.microbatches
    if rows % parts:
        raise ValueError(
            f"train.batch_seqs / train.microbatches = {train.batch_seqs} / {train.microbatches} = {rows} rows cannot be shared out"
            f" over parallel.data x parallel.fsdp = {parts}.\n  Accepted: multiples of {parts} rows.\n"
            f"  Set train.batch_seqs to a multiple of {parts * train.microbatches}, such as"
            f" {-(-rows // parts) * parts * train.microbatches}."
        )
    return plan
