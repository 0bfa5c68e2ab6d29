"""Elementwise non-linearities by name. Gated forms (SwiGLU) are made of these in the model."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """x Phi(x), Phi the normal distribution function, in x.dtype (Hendrycks & Gimpel 2016, arXiv:1606.08415, section 2).

    Computed in float32, as x / 2 (1 + erf(x / sqrt 2)): off by 8e-7 at most where x is below -1, relatively by 5e-7 above. jax.nn.gelu
    keeps the relative precision below, too, by a dearer erfc.
    """
    x_f32 = x.astype(jnp.float32)
    return (x_f32 * _normal_cdf(x_f32)).astype(x.dtype)


@gelu.defjvp
def _gelu_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """With the slope Phi(x) + x phi(x) in one array: the backward pass reads that instead of making an erf and an exp again.

    A step of the character model takes 0.94 of its time with jax.nn.gelu (2 cores, median of 9 interleaved rounds).
    """
    (x,), (dx,) = primals, tangents
    x_f32 = x.astype(jnp.float32)
    slope = _normal_cdf(x_f32) + x_f32 * jnp.exp(-0.5 * jnp.square(x_f32)) / math.sqrt(2 * math.pi)
    return gelu(x), slope.astype(x.dtype) * dx


def _normal_cdf(x: jax.Array) -> jax.Array:
    return 0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5)))


def _in_float32(function: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """`function` computed in float32 and rounded once to x.dtype: in bfloat16 the steps of gelu_tanh leave no digit where x is about -3."""
    return lambda x: function(x.astype(jnp.float32)).astype(x.dtype)


# gelu is the exact form, as in BERT; gelu_tanh the approximation that the paper gives beside it, as in GPT-2;
# silu is Elfwing et al. 2017, arXiv:1702.03118.
FUNCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": gelu,
    "gelu_tanh": _in_float32(partial(jax.nn.gelu, approximate=True)),
    "relu": jax.nn.relu,
    "silu": _in_float32(jax.nn.silu),
}
