"""The logits of a vocabulary, chunk of tokens by chunk: what losses that never have all of them at once are made of.

Letters: N tokens, C tokens of one chunk, D width, V vocabulary.
"""

import jax
import jax.numpy as jnp


def logits(hidden_ND: jax.Array, kernel_VD: jax.Array, bias_V: jax.Array | None) -> jax.Array:
    """float32 [N, V], by a product in the dtype of hidden_ND."""
    logits_NV = jnp.einsum("nd,vd->nv", hidden_ND, kernel_VD.astype(hidden_ND.dtype), preferred_element_type=jnp.float32)
    return logits_NV if bias_V is None else logits_NV + bias_V.astype(jnp.float32)


def cut(chunk_tokens: int, x_N: jax.Array) -> jax.Array:
    """[chunks, C, ...] of [N, ...], the last tokens padded with 0."""
    tokens = x_N.shape[0]
    chunks = max(1, -(-tokens // chunk_tokens))
    rows = -(-tokens // chunks)
    # A chunk is every chunks-th token and not a run of tokens: where the compiler has spread them over devices each keeps its share.
    padded = jnp.pad(x_N, [(0, rows * chunks - tokens)] + [(0, 0)] * (x_N.ndim - 1))
    return padded.reshape(rows, chunks, *x_N.shape[1:]).swapaxes(0, 1)


def join(tokens: int, x_chunks: jax.Array) -> jax.Array:
    """The inverse of `cut`."""
    return x_chunks.swapaxes(0, 1).reshape(-1, *x_chunks.shape[2:])[:tokens]


def through(dlogits_CV: jax.Array, hidden_CD: jax.Array, kernel_VD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(dhidden_CD, what the chunk adds to dkernel_VD), float32, by products in the dtype of hidden_CD."""
    dlogits_CV = dlogits_CV.astype(hidden_CD.dtype)
    dhidden_CD = jnp.einsum("cv,vd->cd", dlogits_CV, kernel_VD.astype(dlogits_CV.dtype), preferred_element_type=jnp.float32)
    return dhidden_CD, jnp.einsum("cv,cd->vd", dlogits_CV, hidden_CD, preferred_element_type=jnp.float32)
