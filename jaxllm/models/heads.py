"""From the last hidden state to logits: the output projections and what stands before them.

Letters: B batch, T length, D width, V vocabulary (or classes).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxllm import types
from jaxllm.models.architecture import Architecture
from jaxllm.models.layers import Norm, Projection, normal, parameter
from jaxllm.ops import activations
from jaxllm.transforms import leaf

# Where the parameters of a value head are.
VALUE = "value"


class Head(nn.Module):
    """The output projection, as far as it has parameters of its own: none in a decoder whose head is its embedding.

    An encoder's has a bias, and for tokens dense, activation and norm before it (Devlin et al. 2018, arXiv:1810.04805, and its code).
    """

    arch: Architecture

    @property
    def _transforms(self) -> bool:
        return self.arch.family.kind == "encoder" and self.arch.head == "lm"

    def setup(self) -> None:
        if self._transforms:
            self.dense = square(self.arch)
            self.norm = Norm(self.arch)

    def transform(self, x_BTD: jax.Array) -> jax.Array:
        """[B, T, D], as it is multiplied with the kernel."""
        return self.norm(activations.FUNCTIONS[self.arch.activation](self.dense(x_BTD))) if self._transforms else x_BTD

    @nn.compact
    def projection(self) -> types.Head:
        """Kernel and bias; kernel None where it is the embedding."""
        arch = self.arch
        rows, axis = (arch.vocab_size, "vocab") if arch.head == "lm" else (arch.classes, "classes")
        tied = arch.tied_head and arch.head == "lm"
        kernel = None if tied else parameter(self, "kernel", (rows, arch.width), (axis, "embed_rest"), normal(arch.init_std))
        bias = parameter(self, "bias", (rows,), (axis,), nn.initializers.zeros) if arch.family.kind == "encoder" else None
        return types.Head(kernel, bias)


class ValueHead(nn.Module):
    """One output beside the others. It begins at 0, so that at first nothing is expected, and the layers are not moved by noise."""

    arch: Architecture

    @nn.compact
    def projection(self) -> types.Head:
        kernel = parameter(self, "kernel", (1, self.arch.width), ("classes", "embed_rest"), nn.initializers.zeros)
        return types.Head(kernel, parameter(self, "bias", (1,), ("classes",), nn.initializers.zeros))


def square(arch: Architecture) -> Projection:
    """A dense layer from D to D, as BERT has before its outputs."""
    return Projection("BTD,DE->BTE", (arch.width, arch.width), ("embed", "features"), arch.init_std, bias=True)


def logits(hidden: jax.Array, head: types.Head) -> jax.Array:
    """float32 [..., V] of hidden [..., D], whatever the compute dtype: differences between likely tokens are small beside the logits."""
    spec = "BTD,VD->BTV" if hidden.ndim == 3 else "BD,VD->BV"
    found: Any = leaf.einsum(spec, hidden.astype(jnp.float32), head.kernel)
    return found if head.bias is None else found + head.bias


def values(hidden_BTD: jax.Array, head: types.Head) -> jax.Array:
    """float32 [B, T]: what the value head of a head says of each token, hidden . kernel + bias."""
    assert head.value is not None, "the objective is one of those that give a model a value head"
    return logits(hidden_BTD, head.value)[..., 0]
