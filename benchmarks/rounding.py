"""What rounding does to a second moment: how far its root is from that of a float32 one, for nearest and for stochastic rounding.

    python benchmarks/rounding.py

10,240 gradients with deviations from 0.01 to 1, in blocks of 256, for 12 / (1 - b2) steps of v <- b2 v + (1 - b2) g^2. Half-way through,
the deviations of the first half of each block fall to 0.3 of what they were. Printed are the median and the percentiles of those.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.optim import codes

SHAPE, BLOCK = (40, 256), 256
Rounding = Callable[[jax.Array, jax.Array], jax.Array]


def grid() -> jax.Array:
    """The numbers that the codes without a sign stand for."""
    return codes.from_codes(jnp.arange(256, dtype=jnp.uint8)[None], jnp.ones((1, 1)))[0]


def nearest_8bit(v: jax.Array, noise: jax.Array) -> jax.Array:
    del noise
    values = grid()
    scales = v.max(-1, keepdims=True) / values[-1]
    found = jnp.searchsorted((values[1:] + values[:-1]) / 2, v / jnp.where(scales > 0, scales, 1))
    return jnp.where(v > 0, values[jnp.maximum(found, 1)] * scales, 0)


ROUNDINGS: dict[str, Rounding] = {
    "float32": lambda v, noise: v,
    "bfloat16 nearest": lambda v, noise: v.astype(jnp.bfloat16).astype(jnp.float32),
    "bfloat16 stochastic": lambda v, noise: codes.to_bfloat16(v, noise).astype(jnp.float32),
    "8 bits nearest": nearest_8bit,
    "8 bits stochastic": lambda v, noise: codes.from_codes(*codes.to_codes(v, noise, BLOCK, True)),
}


def second_moment(rounding: Rounding, b2: float) -> np.ndarray:
    """v after all steps, [blocks, 256]."""
    steps = round(12 / (1 - b2))
    first_half = jnp.arange(BLOCK) < BLOCK // 2
    deviations = 10 ** jax.random.uniform(jax.random.key(0), SHAPE, minval=-2, maxval=0)

    def body(step: jax.Array, v: jax.Array) -> jax.Array:
        now = deviations * jnp.where(first_half & (step >= steps // 2), 0.3, 1.0)
        g = now * jax.random.normal(jax.random.fold_in(jax.random.key(1), step), SHAPE)
        return rounding(b2 * v + (1 - b2) * g**2, codes.noise(SHAPE, 2, step))

    return np.asarray(jax.jit(lambda v: jax.lax.fori_loop(0, steps, body, v))(jnp.zeros(SHAPE)))


def main() -> None:
    print(f"{'b2':>6} {'stored as':20} {'median':>7} {'5 %':>7} {'95 %':>7}   root of v, as a multiple of that in float32")
    for b2 in (0.95, 0.99, 0.999):
        exact = second_moment(ROUNDINGS["float32"], b2)[:, : BLOCK // 2]
        for name, rounding in ROUNDINGS.items():
            ratio = np.sqrt(second_moment(rounding, b2)[:, : BLOCK // 2] / exact)
            figures = " ".join(f"{np.percentile(ratio, share):7.2f}" for share in (50, 5, 95))
            print(f"{b2:6} {name:20} {figures}", flush=True)


if __name__ == "__main__":
    main()
