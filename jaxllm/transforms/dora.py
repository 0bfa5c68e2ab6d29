"""DoRA: LoRA of a kernel's directions, with a trained length for each output (Liu et al. 2024, arXiv:2402.09353, eq. 5).

    y = m / ||W + s A B|| (x W + s x A B)        the norm runs over the inputs, so there is one for each output

m begins as ||W||, so that the model is at first what it was. The norm counts as a constant in the backward pass (section 4.3). Dropout
acts on what the adapter reads, not on what W itself does, as in PEFT: y = x W + (m / norm - 1) drop(x) W + m / norm s drop(x) A B.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxllm.transforms import leaf, lora
from jaxllm.types import Transform


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("base", "a", "b", "magnitude"),
    meta_fields=("scale", "dropout_frac", "outputs_first", "kind"),
)
@dataclasses.dataclass(frozen=True)
class Dora(lora.Lora):
    """A leaf of the parameter tree. magnitude: [o...], or its axes."""

    magnitude: Any = None
    kind: str = "dora"

    def multiply(self, spec: str, x: jax.Array, rng: jax.Array | None = None) -> jax.Array:
        factor = self._factor().astype(x.dtype)
        if self.turned(spec):
            return super().multiply(spec, factor * x, rng)
        y = leaf.einsum(spec, x, self.base)
        if rng is None or not self.dropout_frac:
            return factor * (y + self.beside(spec, x))
        dropped = lora.drop(x, self.dropout_frac, rng)
        return y + (factor - 1) * leaf.einsum(spec, dropped, self.base) + factor * self.beside(spec, dropped)

    def take(self, ids: jax.Array) -> jax.Array:
        return self._factor() * super().take(ids)

    def dense(self) -> jax.Array:
        factor = self._factor()
        return (factor[:, None] if self.outputs_first else factor) * super().dense()

    def length(self) -> jax.Array:
        """||W + s A B||, [o...]."""
        return norm(super().dense(), -1 if self.outputs_first else self.a.ndim - 1)

    def _factor(self) -> jax.Array:
        length = jax.lax.stop_gradient(self.length())
        # An output to which nothing leads stays 0; so does its gradient.
        return self.magnitude / jnp.where(length > 0, length, 1)


def norm(kernel: jax.Array, inputs: int) -> jax.Array:
    """[o...]: the length of what leads to each output, in float32; `inputs` as in types.Transform."""
    axes = (-1,) if inputs < 0 else tuple(range(inputs or 1))
    return jnp.sqrt(jnp.sum(jnp.square(kernel.astype(jnp.float32)), axis=axes))


def make(config: ConfigDict) -> Transform:
    """DoRA as config.lora says."""
    plain = lora.adapter(config, Dora)

    def apply(kernel: Any, inputs: int, rng: jax.Array) -> Dora:
        begun: Any = plain.apply(kernel, inputs, rng)
        # Of the kernel as it was given. To ask W + s A B for its length also goes wrong where XLA's CPU backend sees that B is zero: a sum
        # over a product whose right side is one number, repeated, reads memory that nobody wrote (jax 0.10.2; fusions of YNNPACK).
        return dataclasses.replace(begun, magnitude=norm(leaf.dense(kernel), inputs))

    def axes(axes: Any, inputs: int) -> Dora:
        begun = plain.axes(axes, inputs)
        return dataclasses.replace(begun, magnitude=tuple(axis for axis in begun.b if axis != "rank"))

    return Transform(plain.targets, apply, axes, adapts=True)
