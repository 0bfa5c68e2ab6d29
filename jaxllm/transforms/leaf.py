"""What a kernel can do: multiply and be looked up. The only place that looks inside a kernel.

A leaf type is a registered dataclass that stands in the place of an array [...] of the parameter tree. It has the array's `shape`,
`multiply(spec, x)`, and `dense()`, the float32 array that does the same; with a `dropout_frac`, `multiply` also takes a key. A static field
`kind` tells it from others in a tree's definition, which does not know classes. In the place of a table it also has
`take(ids)` and `map_rows(function, axis)`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.transforms.product import product


def einsum(spec: str, x: jax.Array, kernel: Any, rng: jax.Array | None = None) -> jax.Array:
    """`jnp.einsum(spec, x, kernel)` in x.dtype, of an array or a leaf type, which says itself how it multiplies. rng: of its dropout."""
    if drops(kernel):
        return kernel.multiply(spec, x, rng)
    return kernel.multiply(spec, x) if is_type(kernel) else product(spec, x, kernel)


def is_type(node: Any) -> bool:
    """Whether a node of a parameter tree is a leaf type, not an array."""
    return hasattr(node, "multiply")


def drops(kernel: Any) -> bool:
    """Whether the kernel drops a share of what it reads, in training."""
    return getattr(kernel, "dropout_frac", 0.0) > 0


def dense(kernel: Any) -> jax.Array:
    """The kernel as one array: itself, or in float32 what a leaf type stands for."""
    return kernel.dense() if hasattr(kernel, "dense") else kernel


def map_rows(function: Callable[[jax.Array, str], jax.Array], table: Any, axis: str) -> Any:
    """function(rows, their logical axis) of a table [V, D], or of each of the matrices that a leaf type holds in its place."""
    return table.map_rows(function, axis) if is_type(table) else function(table, axis)


def take(table: Any, ids: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Rows `ids` of a table [V, D], an array or a leaf type: [*ids.shape, D] in `dtype`.

    An id beyond the vocabulary gives NaN instead of a wrong row.
    """
    # Cast after the look-up: the table is larger than its rows, and its gradient is summed in its own dtype.
    rows = table.take(ids) if is_type(table) else jnp.take(table, ids, axis=0, mode="fill")
    return rows.astype(dtype)
