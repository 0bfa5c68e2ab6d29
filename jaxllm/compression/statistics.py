"""What the kernels of a layer read: second moments and sizes of their inputs, without touching model code.

A `Tap` in a kernel's place notes what the kernel is multiplied with while the layer is traced, and the same trace goes on with that.
Statistics could also come back as the "gradients" of arrays of zeros, as factors do in transforms/deferred.py. It would cost a backward
pass, which keeps all inputs of the layer until then, and gradients of several uses are added, which is wrong for a maximum. In return a
kernel must not multiply inside a scan, a remat or a vmap within its layer: none here does, and JAX raises an error for one that would.

Letters: B batch, T length, N tokens, I inputs of a kernel.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.transforms import leaf, tree
from jaxllm.types import Params

EXACT = jax.lax.Precision.HIGHEST


class Statistics(NamedTuple):
    """Of what a kernel reads, x_NI, over the tokens that are no padding.

    second_II: sum of x^T x; absolute_I: sum of |x|; largest_I: largest |x|, all float32. tokens: N, int32.
    """

    second_II: jax.Array
    absolute_I: jax.Array
    largest_I: jax.Array
    tokens: jax.Array


class Read(NamedTuple):
    """An array [B, T, inputs...] that a kernel was multiplied with. inputs: how many of its last axes are summed over."""

    x: jax.Array
    inputs: int


class Notes:
    """What kernels read, by name, in the order in which they multiply. Hashed by identity, as a tree definition needs it."""

    def __init__(self) -> None:
        self.reads: dict[str, Read] = {}


@partial(jax.tree_util.register_dataclass, data_fields=("kernel",), meta_fields=("name", "notes"))
@dataclasses.dataclass(frozen=True)
class Tap:
    """A leaf that multiplies as its kernel does and notes what that reads."""

    kernel: Any
    name: str
    notes: Notes

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.kernel.shape)

    def multiply(self, spec: str, x: jax.Array) -> jax.Array:
        x_axes, kernel_axes = spec.partition("->")[0].split(",")
        self.notes.reads[self.name] = Read(x, sum(axis in kernel_axes for axis in x_axes))
        return leaf.einsum(spec, x, self.kernel)


def reads(run: Callable[[Params], Any], layer: Params, names: Collection[str]) -> dict[str, Read]:
    """What the kernels of these names (within the layer) read in run(layer), in the order in which they multiply.

    Kernels that read the same array have the same object as `x`. For jitted functions: the compiler leaves out all else that `run` does.
    """
    notes = Notes()

    def one(path: Any, kernel: Any) -> Any:
        name = tree.path_name(path)
        return Tap(kernel, name, notes) if name in names else kernel

    run(jax.tree.map_with_path(one, layer, is_leaf=leaf.is_type))
    return notes.reads


def groups(found: Mapping[str, Read]) -> tuple[tuple[str, ...], ...]:
    """The names, those together that read the same array, in the order in which they first multiply."""
    by_array: dict[int, list[str]] = {}
    for name, read in found.items():
        by_array.setdefault(id(read.x), []).append(name)
    return tuple(map(tuple, by_array.values()))


def of(read: Read, is_real_BT: jax.Array | None) -> Statistics:
    """The statistics of what was read where `is_real_BT` says so; None: everywhere."""
    lead = read.x.ndim - read.inputs
    is_real_BT = jnp.ones(read.x.shape[:lead], bool) if is_real_BT is None else is_real_BT
    is_real_N = is_real_BT.reshape(-1)
    # Chosen and not multiplied by 0: what stands at padding may be no number.
    x_NI = jnp.where(is_real_N[:, None], read.x.reshape(is_real_N.size, -1), 0)
    size_NI = jnp.abs(x_NI).astype(jnp.float32)
    return Statistics(
        jnp.einsum("ni,nj->ij", x_NI, x_NI, precision=EXACT, preferred_element_type=jnp.float32),
        size_NI.sum(0),
        size_NI.max(0),
        is_real_N.sum(dtype=jnp.int32),
    )


def add(a: Statistics, b: Statistics) -> Statistics:
    """Of the tokens of both."""
    return Statistics(
        a.second_II + b.second_II,
        a.absolute_I + b.absolute_I,
        jnp.maximum(a.largest_I, b.largest_I),
        a.tokens + b.tokens,
    )
