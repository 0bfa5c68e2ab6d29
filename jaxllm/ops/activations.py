"""Elementwise non-linearities by name. Gated forms (SwiGLU) are made of these in the model."""

from collections.abc import Callable
from functools import partial

import jax

# gelu is x * Phi(x) with the exact erf (Hendrycks & Gimpel 2016, arXiv:1606.08415), as in BERT;
# gelu_tanh is the approximation below it, as in GPT-2; silu is Elfwing et al. 2017, arXiv:1702.03118.
FUNCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}
