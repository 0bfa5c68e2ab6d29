"""The parts of a decoder layer as Flax linen modules. No mesh, no loss, no config: an `Architecture` and a `Constrain`.

Letters: B batch, T query length, S key length, D width, H query heads, G key/value heads, K head width, F mlp width, V vocabulary.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxllm import registry
from jaxllm.models import cache
from jaxllm.models.architecture import Architecture
from jaxllm.ops import activations, attention, norms, positions
from jaxllm.transforms import leaf
from jaxllm.types import Axes, Constrain

Initializer = Callable[..., jax.Array]
HIDDEN = ("batch", "length", "embed_act")


def parameter(module: nn.Module, name: str, shape: tuple[int, ...], axes: Axes, init: Initializer) -> Any:
    """The parameter `name` of `module`: the one line in which its shape, logical axes and initializer are declared.

    Given parameters are returned as they are, whatever leaf type they have: linen's own `param` compares the shapes of
    packed arrays. ValueError, naming the path, for a parameter that is absent or has another shape.
    """
    if module.is_initializing():
        # The box carries `axes` out of an abstract init; decoder.py opens it.
        return module.param(name, nn.with_partitioning(init, axes), shape, jnp.float32, unbox=False).value
    path = "/".join((*module.path, name))
    if not module.has_variable("params", name):
        raise ValueError(
            f"parameter '{path}' is missing.\n  Accepted: an array of shape {shape}."
            "\n  Use parameters made with this config, or change model.bias, model.norm, model.positions, model.tied_head."
        )
    value: Any = module.get_variable("params", name)
    if value.shape != shape:
        raise ValueError(
            f"parameter '{path}' has shape {value.shape}.\n  Accepted: {shape}, which is {axes} in this config."
            "\n  Use parameters made with this config, or change the sizes in config.model."
        )
    return value


def normal(std: float, inputs: int = 1) -> Initializer:
    """Draws normal numbers of deviation `std`. The first `inputs` axes of the shape are rows of a matrix, the others its columns.

    Drawn as a matrix because XLA compiles a generator for each shape, 0.6 s for a matrix and 1.4 s for a 3-D array on a CPU;
    so q, o and the others share a few. The numbers are the same: they are counted along the flat array.
    """

    def init(key: jax.Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.Array:
        matrix = (math.prod(shape[:inputs]), math.prod(shape[inputs:]))
        return std * jax.random.normal(key, matrix, dtype).reshape(shape)

    return init


class Projection(nn.Module):
    """x times a kernel, plus a bias. The first `inputs` axes of the kernel are summed over, the others are new."""

    spec: str
    shape: tuple[int, ...]
    axes: Axes
    std: float
    bias: bool
    inputs: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = parameter(self, "kernel", self.shape, self.axes, normal(self.std, self.inputs))
        y = leaf.einsum(self.spec, x, kernel)
        if not self.bias:
            return y
        bias = parameter(self, "bias", self.shape[self.inputs :], self.axes[self.inputs :], nn.initializers.zeros)
        return y + bias.astype(y.dtype)


class Norm(nn.Module):
    """RMSNorm or LayerNorm, with statistics in float32."""

    arch: Architecture

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape, axes = (self.arch.width,), ("embed",)
        scale = parameter(self, "scale", shape, axes, nn.initializers.ones)
        if self.arch.norm == "rmsnorm":
            return norms.rmsnorm(x, scale, self.arch.norm_eps)
        bias = parameter(self, "bias", shape, axes, nn.initializers.zeros) if self.arch.bias else None
        return norms.layernorm(x, scale, bias, self.arch.norm_eps)


def dropout(module: nn.Module, x: jax.Array, frac: float) -> jax.Array:
    """x with a share of its numbers dropped and the others scaled up, where a "dropout" rng was given."""
    return nn.Dropout(frac, parent=module)(x, deterministic=not module.has_rng("dropout"))


class Embedding(nn.Module):
    """Rows of the token table, plus rows of the position table where positions are learned: [B, T, D] in the compute dtype."""

    arch: Architecture
    constrain: Constrain

    @nn.compact
    def __call__(self, tokens_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        arch, init = self.arch, normal(self.arch.init_std)
        table_VD = parameter(self, "tokens", (arch.vocab_size, arch.width), ("vocab", "embed"), init)
        # Whole rows before the look-up: the partitioner cannot move `embed` from the table's devices to the batch's behind it.
        table_VD = jax.tree.map(lambda array: self.constrain(array, ("vocab", "embed_act")), table_VD)
        x_BTD = leaf.take(table_VD, tokens_BT, arch.dtype)
        if arch.positions == "learned":
            places_TD = parameter(self, "positions", (arch.context_tokens, arch.width), ("length", "embed"), init)
            x_BTD = x_BTD + leaf.take(places_TD, positions_BT, arch.dtype)
        return self.constrain(dropout(self, x_BTD, arch.dropout_frac), HIDDEN)


class Attention(nn.Module):
    """Norm, causal grouped-query attention, output projection. With a slot of a cache: attends to what it holds, too."""

    arch: Architecture
    constrain: Constrain

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array | None, slot: cache.Slot | None
    ) -> tuple[jax.Array, cache.Slot | None]:
        arch = self.arch
        x_BTD = Norm(arch, name="norm")(x_BTD)
        q_BTHK = self._heads("q", arch.heads, "heads", x_BTD)
        k_BTGK = self._heads("k", arch.kv_heads, "kv_heads", x_BTD)
        v_BTGK = self._heads("v", arch.kv_heads, "kv_heads", x_BTD)
        if arch.positions == "rope":
            q_BTHK = positions.rope(q_BTHK, positions_BT, arch.rope_theta)
            k_BTGK = positions.rope(k_BTGK, positions_BT, arch.rope_theta)
        if slot is None:
            drop = arch.dropout_frac > 0 and self.has_rng("dropout")
            out_BTHK = registry.resolve("attention", arch.attention)(
                q_BTHK,
                k_BTGK,
                v_BTGK,
                segments_BT=segments_BT,
                rng=self.make_rng("dropout") if drop else None,
                dropout_frac=arch.dropout_frac,
                block_tokens=arch.attention_block_tokens,
            )
        else:
            slot = cache.write(slot, k_BTGK, v_BTGK, positions_BT)
            out_BTHK = attention.cached(q_BTHK, *cache.read(slot), positions_BT)
        out_BTHK = self.constrain(out_BTHK, ("batch", "length", "heads", "head_dim"))
        shape, axes = (arch.heads, arch.head_dim, arch.width), ("heads", "head_dim", "embed")
        out = Projection("BTHK,HKD->BTD", shape, axes, arch.residual_std, arch.bias, inputs=2, name="o")
        return out(out_BTHK), slot

    def _heads(self, name: str, heads: int, axis: str, x_BTD: jax.Array) -> jax.Array:
        arch = self.arch
        shape, axes = (arch.width, heads, arch.head_dim), ("embed", axis, "head_dim")
        project = Projection("BTD,DHK->BTHK", shape, axes, arch.init_std, arch.bias, name=name)
        return self.constrain(project(x_BTD), ("batch", "length", axis, "head_dim"))


class Mlp(nn.Module):
    """Norm, up, activation, down. SwiGLU is silu(gate) x up (Shazeer 2020, arXiv:2002.05202, eq. 6)."""

    arch: Architecture
    constrain: Constrain

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        arch = self.arch
        x_BTD = Norm(arch, name="norm")(x_BTD)
        up_BTF = self._wide("up", x_BTD)
        if arch.activation == "swiglu":
            inner_BTF = activations.FUNCTIONS["silu"](self._wide("gate", x_BTD)) * up_BTF
        else:
            inner_BTF = activations.FUNCTIONS[arch.activation](up_BTF)
        shape, axes = (arch.mlp_width, arch.width), ("mlp", "embed")
        return Projection("BTF,FD->BTD", shape, axes, arch.residual_std, arch.bias, name="down")(inner_BTF)

    def _wide(self, name: str, x_BTD: jax.Array) -> jax.Array:
        arch = self.arch
        project = Projection("BTD,DF->BTF", (arch.width, arch.mlp_width), ("embed", "mlp"), arch.init_std, arch.bias, name=name)
        return self.constrain(project(x_BTD), ("batch", "length", "mlp"))


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    arch: Architecture
    constrain: Constrain

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array | None, slot: cache.Slot | None
    ) -> tuple[jax.Array, cache.Slot | None]:
        frac = self.arch.dropout_frac
        out_BTD, slot = Attention(self.arch, self.constrain, name="attention")(x_BTD, positions_BT, segments_BT, slot)
        x_BTD = x_BTD + dropout(self, out_BTD, frac)
        x_BTD = x_BTD + dropout(self, Mlp(self.arch, self.constrain, name="mlp")(x_BTD), frac)
        return self.constrain(x_BTD, HIDDEN), slot


class Head(nn.Module):
    """The output projection of a model whose head is not its embedding."""

    arch: Architecture

    @nn.compact
    def __call__(self) -> Any:
        shape = (self.arch.vocab_size, self.arch.width)
        return parameter(self, "kernel", shape, ("vocab", "embed"), normal(self.arch.init_std))
