"""What a kernel can do: multiply and be looked up. The only place that looks inside a kernel."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.transforms.product import product


def einsum(spec: str, x: jax.Array, kernel: Any) -> jax.Array:
    """`jnp.einsum(spec, x, kernel)` in x.dtype, of an array or a leaf type, which says itself how it multiplies."""
    return kernel.multiply(spec, x) if hasattr(kernel, "multiply") else product(spec, x, kernel)


def take(embedding_VD: jax.Array, ids: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Rows `ids` of the embedding, [*ids.shape, D] in `dtype`. An id beyond the vocabulary gives NaN instead of a wrong row."""
    # Cast after the look-up: the table is larger than its rows, and its gradient is summed in its own dtype.
    return jnp.take(embedding_VD, ids, axis=0, mode="fill").astype(dtype)
