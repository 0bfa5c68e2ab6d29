"""What a kernel can do: multiply and be looked up. The only place that looks inside a kernel."""

import jax
import jax.numpy as jnp


def einsum(spec: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`jnp.einsum(spec, x, kernel)` in x.dtype: master weights are float32, compute may be narrower."""
    return jnp.einsum(spec, x, kernel.astype(x.dtype))


def take(embedding_VD: jax.Array, ids: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Rows `ids` of the embedding, [*ids.shape, D] in `dtype`. An id beyond the vocabulary gives NaN instead of a wrong row."""
    # Cast after the look-up: the table is larger than its rows, and its gradient is summed in its own dtype.
    return jnp.take(embedding_VD, ids, axis=0, mode="fill").astype(dtype)
