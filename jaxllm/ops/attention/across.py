"""Attention in the region of a step where a row is cut: which parts of a row the arrays are is known to `Constrain`."""

from collections.abc import Callable
from typing import Any

import jax

from jaxllm.ops.attention import ring, ulysses
from jaxllm.ops.attention.mask import Mask
from jaxllm.types import Constrain

Attend = Callable[..., jax.Array]


def ring_round(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, mask: Mask, constrain: Constrain, attend: Attend, **options: Any
) -> jax.Array:
    """Keys and values go round (ring.py), and what each device does with them is the ring's own; `attend` is not used."""
    del attend
    places_T, places_S = constrain.places(q_BTHK.shape[1]), constrain.places(k_BSGK.shape[1])
    return ring.attend(q_BTHK, k_BSGK, v_BSGK, mask, places_T, key_places_S=places_S, share=constrain.share, **options)


def exchange(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, mask: Mask, constrain: Constrain, attend: Attend, **options: Any
) -> jax.Array:
    """Whole rows of some heads for parts of rows of all (ulysses.py); `attend` is what a device does with them."""
    return ulysses.attend(q_BTHK, k_BSGK, v_BSGK, mask, share=constrain.share, inner=attend, **options)
