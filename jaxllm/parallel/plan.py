"""A mesh of devices and where each array lies on it: parameters, optimizer state, batch, activations.

Axes are Auto (the compiler places what nobody placed), and every placement that we do ask for comes from one table, rules.py.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from jaxllm.data import places
from jaxllm.parallel import fits, rules
from jaxllm.parallel.constrain import OnMesh
from jaxllm.transforms import tree
from jaxllm.types import Constrain, PartAxes


@dataclass(frozen=True)
class Plan:
    """A mesh and the tables that map logical axes onto it. An abstract mesh plans for devices that are not there.

    parallel: config.parallel. zigzag: rows that `seq` cuts lie in the order of data/places.py. dtype: of gathered matrices.
    """

    mesh: Mesh | AbstractMesh
    tables: rules.Tables
    parallel: ConfigDict
    zigzag: bool = False
    dtype: Any = jnp.float32

    def sharding(self, axes: PartAxes, shape: tuple[int, ...], name: str, table: rules.Rules | None = None) -> NamedSharding:
        """Where the array `name` lies by a table (that of parameters); ValueError if its shape and axes do not fit the mesh."""
        table = self.tables.parameters if table is None else table
        return NamedSharding(self.mesh, rules.spec(table, self.mesh.shape, axes, shape, name))

    def shardings(self, axes: Any, abstract: Any, table: rules.Rules | None = None) -> Any:
        """A tree like `abstract` (of anything with a shape), given the tree of its logical axes.

        A leaf of `axes` may stand for several arrays: those of a quantized kernel keep the kernel's rank and axis order.
        """

        def one(path: Sequence[Any], leaf_axes: tuple[str, ...], leaf: Any) -> Any:
            name = tree.path_name(path)
            return jax.tree.map(lambda array: self.sharding(leaf_axes, array.shape, name, table), leaf)

        return jax.tree.map_with_path(one, axes, abstract, is_leaf=_is_axes)

    def state_shardings(self, abstract_state: Any, axes: Any, abstract_params: Any) -> Any:
        """A tree like `abstract_state`: whatever mirrors a parameter lies as the table of state says, the rest is replicated.

        An array mirrors a parameter if its path ends in the parameter's whole path and their shapes are equal: moments, momentum,
        averages, a training state that holds the parameters themselves. So do the scales of 8-bit moments, whose last axis is shorter.
        Counts, factored moments (Adafactor) and holes are the rest.
        """
        shardings = self.shardings(axes, abstract_params, self.tables.state)
        placed: dict[str, list[tuple[tuple[int, ...], NamedSharding]]] = {}
        named = zip(tree.named_leaves(abstract_params), jax.tree.leaves(shardings), strict=True)
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
        return NamedSharding(self.mesh, PartitionSpec(self.tables.parameters["batch"], self.tables.parameters["length"]))

    @property
    def batch_parts(self) -> int:
        """In how many parts the mesh cuts a batch; its rows must be a multiple."""
        return self.parts("batch")

    def parts(self, axis: str) -> int:
        """In how many parts the mesh cuts a logical axis."""
        return math.prod(self.mesh.shape[mesh_axis] for mesh_axis in self.tables.parameters[axis])

    def arrange(self, make_batch: Callable[..., dict[str, np.ndarray]]) -> Callable[..., dict[str, np.ndarray]]:
        """What makes batches (data/examples/contract.py), with the tokens of each row in the order in which the devices share it."""
        if not self.zigzag:
            return make_batch

        def arranged(*given: Any, **named: Any) -> dict[str, np.ndarray]:
            return {name: self.in_order(array) for name, array in make_batch(*given, **named).items()}

        return arranged

    def in_order(self, array: np.ndarray) -> np.ndarray:
        """An array [B, T] of a batch in that order."""
        return array[:, places.zigzag(array.shape[1], self.mesh.shape["seq"])] if self.zigzag else array

    @property
    def constrain(self) -> Constrain:
        """What a model is built with, to lie on this mesh."""
        return OnMesh(self.mesh, self.tables, self.parallel.context, self.zigzag, self.dtype)


def make(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Plan:
    """The plan of `config.parallel` over `devices` (default: all); ValueError if there are too few or the batch does not divide."""
    devices = jax.devices() if devices is None else devices
    sizes = _fill(config, len(devices))
    used = math.prod(sizes.values())
    several = {axis: size for axis, size in sizes.items() if size > 1}
    if used > len(devices):
        raise ValueError(
            f"{_product(several)} = {' x '.join(map(str, several.values()))}{f' = {used}' if len(several) > 1 else ''}, but there"
            f" {'is 1 device' if len(devices) == 1 else f'are {len(devices)} devices'}.\n"
            f"  Accepted: a product of up to {len(devices)}. Lower one of them, or set one to -1.\n"
            f"  On a CPU the environment variable JAX_NUM_CPU_DEVICES={used} gives as many pretend devices."
        )
    if used < len(devices):
        logging.warning("%s = %d of %d devices are used; the others stay idle.", _product(several or sizes), used, len(devices))
    axis_types = (AxisType.Auto,) * len(sizes)
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=axis_types, devices=devices[:used])
    return _plan(mesh, config)


def make_abstract(config: ConfigDict) -> Plan:
    """The same without devices, for checks and memory plans; a size of -1 counts as 1."""
    sizes = {axis: max(config.parallel[axis], 1) for axis in rules.MESH_AXES}
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    return _plan(mesh, config)


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
    sizes = {axis: config.parallel[axis] for axis in rules.MESH_AXES}
    free = [axis for axis, size in sizes.items() if size == -1]
    if not free:
        return sizes
    taken = math.prod(size for size in sizes.values() if size != -1)
    others = {axis: size for axis, size in sizes.items() if size > 1}
    if devices % taken:
        accepted = ", ".join(str(part) for part in range(1, devices + 1) if devices % part == 0)
        raise ValueError(
            f"{_product(others)} = {taken} does not divide the {devices} devices that parallel.{free[0]} = -1 would share out.\n"
            f"  Accepted: {accepted}. Set {_product(others)} to one of these, or parallel.{free[0]} to a size.\n"
            "  On a CPU the environment variable JAX_NUM_CPU_DEVICES sets the number of pretend devices."
        )
    return {axis: devices // taken if size == -1 else size for axis, size in sizes.items()}


def _product(sizes: Mapping[str, int]) -> str:
    return " x ".join(f"parallel.{axis}" for axis in sizes)


def _plan(mesh: Mesh | AbstractMesh, config: ConfigDict) -> Plan:
    fits.check(config, mesh.shape)
    return Plan(
        mesh,
        rules.tables(config, mesh.shape["tensor"]),
        config.parallel,
        zigzag=fits.zigzag(config, mesh.shape["seq"]),
        dtype=jnp.dtype(config.precision.compute),
    )
