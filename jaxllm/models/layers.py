"""The parts of every model as Flax linen modules. No mesh, no loss, no config: an `Architecture` and a `Constrain`.

Letters: B batch, T query length, S key length, D width, H query heads, G key/value heads, K head width, F mlp width, V vocabulary.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from jaxllm.models import cache, remat
from jaxllm.models.architecture import GATED, Architecture
from jaxllm.ops import activations, attention, norms, positions
from jaxllm.transforms import leaf
from jaxllm.types import Axes, Constrain

Initializer = Callable[..., jax.Array]
# What passes between blocks, and what a block's products read of it.
STREAM, HIDDEN = ("batch", "stream", "embed_act"), ("batch", "length", "embed_act")


def parameter(module: nn.Module, name: str, shape: tuple[int, ...], axes: Axes, init: Initializer) -> Any:
    """The parameter `name` of `module`: the one line in which its shape, logical axes and initializer are declared.

    Given parameters are returned as they are, whatever leaf type they have: linen's own `param` compares the shapes of
    packed arrays. ValueError, naming the path, for a parameter that is absent or has another shape.
    """
    if module.is_initializing():
        # The box carries `axes` out of an abstract init; assembly.py opens it.
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
        rng = self.make_rng("dropout") if leaf.drops(kernel) and self.has_rng("dropout") else None
        y = leaf.einsum(self.spec, x, kernel, rng)
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
        bias = parameter(self, "bias", shape, axes, nn.initializers.zeros) if "norm" in self.arch.biased else None
        return norms.layernorm(x, scale, bias, self.arch.norm_eps)


def dropout(module: nn.Module, x: jax.Array, frac: float) -> jax.Array:
    """x with a share of its numbers dropped and the others scaled up (Srivastava et al. 2014), where a "dropout" rng was given."""
    if not frac or not module.has_rng("dropout"):
        return x
    kept = jax.random.bernoulli(module.make_rng("dropout"), 1 - frac, x.shape)
    return jnp.where(kept, x / (1 - frac), jnp.zeros_like(x))


class Embedding(nn.Module):
    """Rows of the token table, plus what the positions (and in BERT the token types) add: [B, T, D] in the compute dtype."""

    arch: Architecture
    constrain: Constrain

    @nn.compact
    def __call__(self, tokens_BT: jax.Array, positions_BT: jax.Array, types_BT: jax.Array | None = None) -> jax.Array:
        arch, init = self.arch, normal(self.arch.init_std)
        table_VD = parameter(self, "tokens", (arch.vocab_size, arch.width), ("vocab", "embed_rest"), init)
        # Each device looks up its part of the vocabulary. Asked for parts of rows at once, the compiler would bring the table together.
        x_BTD = self.constrain(self._rows(table_VD, "vocab", tokens_BT), HIDDEN)
        if arch.family.embed_scale:
            x_BTD = x_BTD * arch.width**0.5
        if arch.positions == "learned":
            places_TD = parameter(self, "positions", (arch.context_tokens, arch.width), ("places", "embed_rest"), init)
            x_BTD = x_BTD + self._rows(places_TD, "places", positions_BT)
        elif arch.positions == "sinusoid":
            x_BTD = x_BTD + positions.sinusoid(positions_BT, arch.width).astype(arch.dtype)
        if arch.family.kind == "encoder":
            kinds_YD = parameter(self, "token_types", (arch.token_types, arch.width), ("token_types", "embed_rest"), init)
            types_BT = jnp.zeros_like(tokens_BT) if types_BT is None else types_BT
            x_BTD = Norm(arch, name="norm")(x_BTD + self._rows(kinds_YD, "token_types", types_BT))
        return self.constrain(dropout(self, x_BTD, arch.dropout_frac), STREAM)

    def _rows(self, table: Any, axis: str, ids: jax.Array) -> jax.Array:
        """Those rows of a parameter with the logical axes (axis, embed), in the compute dtype."""
        # Whole rows before the look-up: the partitioner cannot move `embed` from the table's devices to the batch's behind it.
        whole = leaf.map_rows(lambda rows, axis: self.constrain(rows, (axis, "embed_act")), table, axis)
        return leaf.take(whole, ids, self.arch.dtype)


class Relative(nn.Module):
    """What each head adds to the scores of keys at a distance `relative_BTS` = key - query: [B, H, T, S] (B may be 1)."""

    arch: Architecture
    bidirectional: bool

    @nn.compact
    def __call__(self, relative_BTS: jax.Array) -> jax.Array:
        arch = self.arch
        shape, axes = (arch.relative_buckets, arch.heads), ("buckets", "heads")
        table_RH = parameter(self, "table", shape, axes, normal(arch.init_std))
        buckets_BTS = positions.relative_buckets(
            relative_BTS, bidirectional=self.bidirectional, buckets=arch.relative_buckets, max_tokens=arch.relative_max_tokens
        )
        return leaf.take(table_RH, buckets_BTS, jnp.float32).transpose(0, 3, 1, 2)


class Sight(NamedTuple):
    """Where the tokens of a call stand and what they see: the same for all layers.

    mask: among the tokens of the call; not read where there is a cache. bias_XHTS: added to the scores (Relative).
    horizon_BT: with a cache, the last of its slots that a token sees: its own position, or the end of a bidirectional prompt.
    """

    positions_BT: jax.Array
    mask: attention.Mask
    bias_XHTS: jax.Array | None = None
    horizon_BT: jax.Array | None = None


class Memory(NamedTuple):
    """What cross-attention reads: the encoder's output, None where a cache holds its keys and values; mask: who sees which of it."""

    hidden_BSD: jax.Array | None
    mask: attention.Mask


class Attention(nn.Module):
    """x + attention(norm(x)), or norm(x + attention(x)). Over x itself and what a slot of a cache holds, or over a `Memory`."""

    arch: Architecture
    constrain: Constrain

    def setup(self) -> None:
        arch = self.arch

        def heads(name: str, count: int, axis: str, std: float) -> Projection:
            shape, axes = (arch.width, count, arch.head_dim), ("embed", axis, "head_dim")
            return Projection("BTD,DHK->BTHK", shape, axes, std, "qkv" in arch.biased, name=name)

        self.norm = Norm(arch)
        self.q = heads("q", arch.heads, "heads", arch.query_std)
        self.k = heads("k", arch.kv_heads, "kv_heads", arch.init_std)
        self.v = heads("v", arch.kv_heads, "kv_heads", arch.init_std)
        shape, axes = (arch.heads, arch.head_dim, arch.width), ("heads", "head_dim", "embed")
        self.o = Projection("BTHK,HKD->BTD", shape, axes, arch.residual_std, "o" in arch.biased, inputs=2)

    def __call__(
        self, x_BTD: jax.Array, sight: Sight, slot: cache.Slot | None, memory: Memory | None = None
    ) -> tuple[jax.Array, cache.Slot | None]:
        pre = self.arch.norm_order == "pre"
        input_BTD = self.constrain(self.norm(x_BTD) if pre else x_BTD, HIDDEN)
        if memory is None:
            out_BTHK, slot = self._see_itself(input_BTD, sight, slot)
        else:
            out_BTHK = self._see(input_BTD, memory, slot)
        out_BTD = checkpoint_name(self.o(self.constrain(out_BTHK, ("batch", "length", "heads", "head_dim"))), "attention_out")
        out_BTD = self.constrain(out_BTD, STREAM)
        x_BTD = x_BTD + dropout(self, out_BTD, self.arch.dropout_frac)
        return x_BTD if pre else self.norm(x_BTD), slot

    def _see_itself(self, x_BTD: jax.Array, sight: Sight, slot: cache.Slot | None) -> tuple[jax.Array, cache.Slot | None]:
        arch = self.arch
        q_BTHK, (k_BTGK, v_BTGK) = self._queries(x_BTD), self.keys_values(x_BTD)
        if arch.positions == "rope":
            q_BTHK = positions.rope(q_BTHK, sight.positions_BT, arch.rope_theta, arch.rope_scaling)
            k_BTGK = positions.rope(k_BTGK, sight.positions_BT, arch.rope_theta, arch.rope_scaling)
        if slot is None or sight.horizon_BT is None:
            return self._attend(q_BTHK, k_BTGK, v_BTGK, sight.mask, sight.bias_XHTS), slot
        slot = cache.write(slot, k_BTGK, v_BTGK, sight.positions_BT)
        out_BTHK = attention.cached(
            q_BTHK,
            partial(cache.read_some, slot),
            cache.slots(slot),
            sight.horizon_BT,
            window_tokens=arch.window_tokens,
            bias_XHTS=sight.bias_XHTS,
            scale=self._scale,
        )
        return out_BTHK, slot

    def _see(self, x_BTD: jax.Array, memory: Memory, slot: cache.Slot | None) -> jax.Array:
        if memory.hidden_BSD is not None:
            return self._attend(self._queries(x_BTD), *self.keys_values(memory.hidden_BSD), memory.mask)
        if slot is None:
            raise ValueError("cross-attention without the encoder's output.\n  Accepted: it, or a cache.\n  Pass `inputs`.")
        return self._attend(self._queries(x_BTD), *cache.read(slot, "cross_"), memory.mask)

    def _spread(self, x_BSGK: jax.Array) -> jax.Array:
        """Keys or values as they are shared out: heads that are too few are repeated just enough."""
        heads, parts = x_BSGK.shape[2], self.constrain.parts("kv_heads_act")
        repeats = math.lcm(heads, parts) // heads
        x_BSGK = x_BSGK if repeats == 1 else jnp.repeat(x_BSGK, repeats, axis=2)
        return self.constrain(x_BSGK, ("batch", "length", "kv_heads_act", "head_dim"))

    def _queries(self, x_BTD: jax.Array) -> jax.Array:
        return self.constrain(self.q(x_BTD), ("batch", "length", "heads", "head_dim"))

    def keys_values(self, x_BSD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(k_BSGK, v_BSGK)."""
        axes = ("batch", "length", "kv_heads", "head_dim")
        return self.constrain(self.k(x_BSD), axes), self.constrain(self.v(x_BSD), axes)

    @property
    def _scale(self) -> float:
        return self.arch.head_dim**-0.5 if self.arch.family.attention_scale else 1.0

    def _attend(
        self, q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, mask: attention.Mask, bias_XHTS: jax.Array | None = None
    ) -> jax.Array:
        arch = self.arch
        drop = arch.dropout_frac > 0 and self.has_rng("dropout")
        attend = partial(
            attention.attend,
            mask=mask,
            implementation=arch.attention,
            bias_XHTS=bias_XHTS,
            scale=self._scale,
            rng=self.make_rng("dropout") if drop else None,
            dropout_frac=arch.dropout_frac,
            block_tokens=arch.attention_block_tokens,
            constrain=self.constrain,
        )
        k_BSGK, v_BSGK = self._spread(k_BSGK), self._spread(v_BSGK)
        q_BTHK, k_BSGK, v_BSGK = (checkpoint_name(x, name) for x, name in ((q_BTHK, "q"), (k_BSGK, "k"), (v_BSGK, "v")))
        out_BTHK = remat.over("attention", arch.remat, attend, arch.layers_as)(q_BTHK, k_BSGK, v_BSGK)
        return checkpoint_name(out_BTHK, "attended")


class Mlp(nn.Module):
    """x + mlp(norm(x)), or norm(x + mlp(x)); mlp is up, activation, down. Gated: act(gate) x up (Shazeer 2020, arXiv:2002.05202, eq. 6)."""

    arch: Architecture
    constrain: Constrain

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        arch, norm, pre = self.arch, Norm(self.arch, name="norm"), self.arch.norm_order == "pre"
        input_BTD = self.constrain(norm(x_BTD) if pre else x_BTD, HIDDEN)
        up_BTF = self._wide("up", input_BTD)
        if arch.activation in GATED:
            inner_BTF = activations.FUNCTIONS[GATED[arch.activation]](self._wide("gate", input_BTD)) * up_BTF
        else:
            inner_BTF = activations.FUNCTIONS[arch.activation](up_BTF)
        shape, axes = (arch.mlp_width, arch.width), ("mlp", "embed")
        out_BTD = Projection("BTF,FD->BTD", shape, axes, arch.residual_std, "mlp" in arch.biased, name="down")(inner_BTF)
        out_BTD = self.constrain(checkpoint_name(out_BTD, "mlp_out"), STREAM)
        x_BTD = x_BTD + dropout(self, out_BTD, arch.dropout_frac)
        return x_BTD if pre else norm(x_BTD)

    def _wide(self, name: str, x_BTD: jax.Array) -> jax.Array:
        arch, shape = self.arch, (self.arch.width, self.arch.mlp_width)
        project = Projection("BTD,DF->BTF", shape, ("embed", "mlp"), arch.init_std, "mlp" in arch.biased, name=name)
        return checkpoint_name(self.constrain(project(x_BTD), ("batch", "length", "mlp")), f"mlp_{name}")


class Block(nn.Module):
    """One layer: attention over x, with `crosses` also over the encoder's output, then the MLP."""

    arch: Architecture
    constrain: Constrain
    crosses: bool = False

    def setup(self) -> None:
        self.attention = Attention(self.arch, self.constrain)
        if self.crosses:
            self.cross = Attention(self.arch, self.constrain)
        self.mlp = Mlp(self.arch, self.constrain)

    def __call__(
        self, x_BTD: jax.Array, sight: Sight, slot: cache.Slot | None = None, memory: Memory | None = None
    ) -> tuple[jax.Array, cache.Slot | None]:
        x_BTD, slot = self.attention(checkpoint_name(x_BTD, "layer_in"), sight, slot)
        if memory is not None:
            x_BTD, _ = self.cross(x_BTD, sight, slot, memory)
        return self.mlp(x_BTD), slot

    def remember(self, hidden_BSD: jax.Array, slot: cache.Slot) -> cache.Slot:
        """The slot with the keys and values that cross-attention reads from the encoder's output."""
        return cache.fill(slot, *self.cross.keys_values(hidden_BSD), "cross_")
