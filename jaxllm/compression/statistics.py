"""What kernels read: sums over the tokens of calibration data, gathered without touching the model.

A `Recorder` stands in the place of a kernel and multiplies as it does. Its backward pass, whatever comes back, gives as the "gradient" of
the zeros that it holds the moments of what it multiplied, and lets nothing go on. So the gradient of anything that hangs on a layer's
output is the moments, through scans, checkpoints and whatever else a layer is made of.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.transforms import leaf


class Moments(NamedTuple):
    """Of what a kernel with I inputs reads. float32.

    second_II: the sum of x x^T: half the Hessian of the squared error of an output (Frantar et al. 2022, arXiv:2210.17323, eq. 1).
    absolute_I: the sum of |x|. largest_I: the largest |x|. tokens: how many x there were.
    """

    second_II: jax.Array
    absolute_I: jax.Array
    largest_I: jax.Array
    tokens: jax.Array

    def merge(self, other: "Moments") -> "Moments":
        """Of both."""
        largest = jnp.maximum(self.largest_I, other.largest_I)
        return Moments(self.second_II + other.second_II, self.absolute_I + other.absolute_I, largest, self.tokens + other.tokens)


def zeros(inputs: int) -> Moments:
    """Of no tokens."""
    one = jnp.zeros(inputs, jnp.float32)
    return Moments(jnp.zeros((inputs, inputs), jnp.float32), one, one, jnp.zeros((), jnp.float32))


@partial(jax.tree_util.register_dataclass, data_fields=("kernel", "weights_BT", "moments"), meta_fields=("kind",))
@dataclasses.dataclass(frozen=True)
class Recorder:
    """A leaf of the parameter tree. weights_BT: 1 for the tokens that count, 0 for padding. moments: zeros, whose gradient is what is read.

    It must be used once: gradients are added up, and the largest of both is not a sum.
    """

    kernel: Any
    weights_BT: jax.Array
    moments: Moments
    kind: str = "recorder"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.kernel.shape

    def multiply(self, spec: str, x: jax.Array) -> jax.Array:
        return _multiply(x, self.kernel, self.weights_BT, self.moments, spec)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _multiply(x: jax.Array, kernel: Any, weights_BT: jax.Array, moments: Moments, spec: str) -> jax.Array:
    del weights_BT, moments
    return leaf.einsum(spec, x, kernel)


def _forward(x: jax.Array, kernel: Any, weights_BT: jax.Array, moments: Moments, spec: str) -> tuple[jax.Array, Any]:
    return _multiply(x, kernel, weights_BT, moments, spec), (x, weights_BT)


def _backward(spec: str, residuals: Any, dy: jax.Array) -> tuple[Any, ...]:
    del dy
    x, weights_BT = residuals
    inputs, _, result = spec.partition("->")
    x_axes, kernel_axes = inputs.split(",")
    kept = [axis for axis in x_axes if axis in result]
    summed = [axis for axis in kernel_axes if axis not in result]
    wide = jnp.einsum(f"{x_axes}->{''.join(kept + summed)}", x.astype(jnp.float32))
    x_NI = wide.reshape(weights_BT.size, -1) * weights_BT.reshape(-1, 1)
    second_II = jnp.einsum("ni,nj->ij", x_NI, x_NI, precision="highest")
    size_NI = jnp.abs(x_NI)
    return jnp.zeros_like(x), None, None, Moments(second_II, size_NI.sum(0), size_NI.max(0), weights_BT.sum())


_multiply.defvjp(_forward, _backward)
