"""Which parameters take the scales of a kernel's inputs, so that a layer computes what it did (AWQ, SmoothQuant).

A kernel that reads x / s and whose inputs are multiplied by s does what it did. What makes x is divided by s where x goes nowhere else:

    attention/norm -> attention/q, k, v   where the norm comes before. After it (BERT, the Transformer of 2017), its result is also the
                                          residual stream, and nothing can take the scales
    cross/norm -> cross/q                 the same; k and v read the encoder's output, which all layers of the decoder read
    v -> o                                attention adds up values, so that o reads v's outputs, head by head. Query heads that share a
                                          value head (grouped-query attention) share its scales
    mlp/norm -> mlp/up, gate              where the norm comes before
    mlp/up -> mlp/down                    up is a factor of what a gated MLP has inside; ReLU(u / s) = ReLU(u) / s for s > 0. GELU has no
                                          such law

Lin et al. 2023, arXiv:2306.00978, section 3.2; Xiao et al. 2022, arXiv:2211.10438, section 4. Unlike there, v -> o is also folded under
grouped-query attention. Letters: I inputs of a kernel, S scales, D width, F mlp width, G value heads, K head width.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.models.architecture import GATED, Architecture
from jaxllm.transforms import tree
from jaxllm.types import Params


class Fold(NamedTuple):
    """Names are within a layer. kernels: they read the same, and their inputs are multiplied; sources: their outputs are divided.

    shape: the inputs I, in order, as [outer, tied, inner]. Tied ones share a scale, so that there are S = outer x inner of them.
    """

    kernels: tuple[str, ...]
    sources: tuple[str, ...]
    shape: tuple[int, int, int]

    def join(self, values_I: jax.Array, how: Callable[..., jax.Array]) -> jax.Array:
        """[S] of a number an input: how(numbers, axis=...) of those that are tied, such as jnp.max."""
        return how(values_I.reshape(self.shape), axis=1).reshape(-1)

    def spread(self, scales_S: jax.Array) -> jax.Array:
        """[I]: the scale of each input."""
        outer, _, inner = self.shape
        return jnp.broadcast_to(scales_S.reshape(outer, 1, inner), self.shape).reshape(-1)


def find(arch: Architecture, layer: Params) -> list[Fold]:
    """What can be folded in a layer with these parameters, in the order in which its kernels multiply."""
    found = []
    norms_first, width = arch.norm_order == "pre", (1, 1, arch.width)
    for part in ("attention", "cross"):
        if part not in layer:
            continue
        if norms_first:
            found.append(_of(layer, f"{part}/norm", [f"{part}/{name}" for name in ("q" if part == "cross" else "qkv")], width))
        heads = (arch.kv_heads, arch.heads // arch.kv_heads, arch.head_dim)
        found.append(_of(layer, f"{part}/v", [f"{part}/o"], heads))
    gated = arch.activation in GATED
    if norms_first:
        found.append(_of(layer, "mlp/norm", ["mlp/gate", "mlp/up"] if gated else ["mlp/up"], width))
    if gated or arch.activation == "relu":
        found.append(_of(layer, "mlp/up", ["mlp/down"], (1, 1, arch.mlp_width)))
    return found


def _of(layer: Params, source: str, readers: Sequence[str], shape: tuple[int, int, int]) -> Fold:
    """source: a norm, or a projection, with all parameters that it has."""
    own = tree.get(layer, source.split("/"))
    return Fold(tuple(f"{name}/kernel" for name in readers), tuple(f"{source}/{name}" for name in own), shape)


def fold(layer: Params, each: Fold, scales_S: jax.Array) -> Params:
    """The layer with dense kernels that does what it did, its `kernels` multiplied by the scales (above 0) and its `sources` divided."""

    def divided(array: Any) -> jax.Array:
        return (array.reshape(-1, scales_S.size) / scales_S).reshape(array.shape)

    def multiplied(kernel: Any) -> jax.Array:
        scales_I = each.spread(scales_S)
        return (kernel.reshape(scales_I.size, -1) * scales_I[:, None]).reshape(kernel.shape)

    changes = dict.fromkeys(each.sources, divided) | dict.fromkeys(each.kernels, multiplied)
    for name, change in changes.items():
        path = name.split("/")
        layer = tree.replaced(layer, path, change(tree.get(layer, path)))
    return layer
