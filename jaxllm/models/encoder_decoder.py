"""Encoder-decoders (T5, the Transformer of 2017): the linen parts put together into the pure functions of `types.Model`.

The encoder reads `inputs`, the decoder `tokens`; a decoder token sees the inputs of its own segment. Letters as in types.py, with
S inputs.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from jaxllm import types
from jaxllm.models import assembly, cache, heads, stack
from jaxllm.models.architecture import Architecture, Family, resolve
from jaxllm.models.layers import HIDDEN, Block, Embedding, Memory, Norm, Relative, Sight
from jaxllm.ops.attention import Mask
from jaxllm.types import Constrain, Model, Params, unconstrained

SIDES = ("encoder", "decoder")


class Side(nn.Module):
    """The encoder or the decoder: its layers, what they share, and its last norm where the norms come first."""

    arch: Architecture
    constrain: Constrain
    decodes: bool

    def setup(self) -> None:
        self.layers = Block(self.arch, self.constrain, crosses=self.decodes)
        if self.arch.positions == "relative":
            self.relative = Relative(self.arch, bidirectional=not self.decodes)
        if self.arch.norm_order == "pre":
            self.norm = Norm(self.arch)

    def bias(self, relative_BTS: jax.Array) -> jax.Array | None:
        """What distances add to the scores, [B, H, T, S]."""
        return self.relative(relative_BTS) if self.arch.positions == "relative" else None

    def end(self, x_BTD: jax.Array) -> jax.Array:
        return self.norm(x_BTD) if self.arch.norm_order == "pre" else x_BTD


class EncoderDecoder(nn.Module):
    """Names the parts of the parameter tree. Its methods run one part each; how the layers follow is stack.py's affair."""

    arch: Architecture
    constrain: Constrain

    def setup(self) -> None:
        self.embed = Embedding(self.arch, self.constrain)
        self.encoder = Side(self.arch, self.constrain, decodes=False)
        self.decoder = Side(self.arch, self.constrain, decodes=True)
        self.head = heads.Head(self.arch)

    def run_embedding(self, tokens_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        return self.embed(tokens_BT, positions_BT)

    def run_bias(self, side: str, relative_BTS: jax.Array) -> jax.Array | None:
        return getattr(self, side).bias(relative_BTS)

    def run_layer(
        self, side: str, x_BTD: jax.Array, sight: Sight, slot: cache.Slot | None, memory: Memory | None
    ) -> tuple[jax.Array, cache.Slot | None]:
        return getattr(self, side).layers(x_BTD, sight, slot, memory)

    def run_remember(self, hidden_BSD: jax.Array, slot: cache.Slot) -> cache.Slot:
        return self.decoder.layers.remember(hidden_BSD, slot)

    def run_end(self, side: str, x_BTD: jax.Array) -> jax.Array:
        return getattr(self, side).end(x_BTD)

    def run_head(self) -> types.Head:
        return self.head.projection()

    def declare_rest(self, tokens_BT: jax.Array) -> None:
        """Touches every parameter outside the layers, for init."""
        x_BTD = self.embed(tokens_BT, tokens_BT)
        for side in SIDES:
            self.run_bias(side, jnp.zeros((1, 1, 1), jnp.int32))
            self.run_end(side, x_BTD)
        self.head.projection()


def make(config: ConfigDict, family: Family, constrain: Constrain) -> Model:
    """The model that the whole `config` describes, with the defaults of `family`."""
    arch = resolve(config, family)
    init, axes = _make_init(arch)
    functions = _Functions(arch, constrain, axes)

    def apply(params: Params, tokens_BT: jax.Array, **options: Any) -> jax.Array:
        logits_BTV = heads.logits(functions.hidden(params, tokens_BT, **options), functions.head(params))
        return constrain(logits_BTV, ("batch", "length", "vocab"))

    return Model(
        name=family.name,
        config=arch,
        axes=axes,
        init=init,
        apply=apply,
        hidden=functions.hidden,
        stacks=functions.stacks,
        head=functions.head,
        init_cache=lambda batch_seqs, length_tokens: cache.empty(arch, arch.decoder_layers, batch_seqs, length_tokens, constrain),
        encode=functions.encode,
        decode=functions.decode,
    )


def _make_init(arch: Architecture) -> tuple[Callable[[jax.Array], Params], types.Axes]:
    network, one_BT = EncoderDecoder(arch, unconstrained), jnp.zeros((1, 1), jnp.int32)
    x_BTD = jnp.zeros((1, 1, arch.width), arch.dtype)

    def declare_rest(rng: jax.Array) -> Params:
        return network.init(rng, one_BT, method="declare_rest")["params"]

    def declare(side: str) -> Callable[[jax.Array], Params]:
        memory = Memory(x_BTD, Mask()) if side == "decoder" else None

        def declare_layer(rng: jax.Array) -> Params:
            found = network.init(rng, side, x_BTD, Sight(one_BT, Mask()), None, memory, method="run_layer")
            return found["params"][side]["layers"]

        return declare_layer

    counts = {"encoder": arch.layers, "decoder": arch.decoder_layers}
    stacks = [assembly.Layers((side, "layers"), counts[side], declare(side)) for side in SIDES]
    return assembly.make_init(arch, declare_rest, stacks)


class _Functions:
    """`hidden`, `stacks`, `head`, `encode` and `decode` of types.Model."""

    def __init__(self, arch: Architecture, constrain: Constrain, axes: types.Axes):
        self._arch, self._constrain = arch, constrain
        self._call = assembly.caller(EncoderDecoder(arch, constrain))
        self._run = {side: stack.make(arch.layers_as, count, arch.remat) for side, count in self._counts().items()}
        self.stacks = tuple(self._stack(side, count) for side, count in self._counts().items())
        self._hidden = assembly.run_stacks(arch, constrain, self.stacks, axes)

    def _counts(self) -> dict[str, int]:
        return {"encoder": self._arch.layers, "decoder": self._arch.decoder_layers}

    def hidden(
        self,
        params: Params,
        tokens_BT: jax.Array,
        *,
        inputs: jax.Array,
        input_segments: jax.Array | None = None,
        input_positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        positions: jax.Array | None = None,
        rng: jax.Array | None = None,
    ) -> jax.Array:
        most = self._arch.context_tokens
        beside = {"segments": segments, "positions": positions}
        beside_inputs = {"input_segments": input_segments, "input_positions": input_positions}
        assembly.check_tokens("tokens", tokens_BT, most, **beside)
        assembly.check_tokens("inputs", inputs, most, **beside_inputs)
        _check_segments(segments, input_segments)
        return self._hidden(params, assembly.present(tokens=tokens_BT, inputs=inputs, **beside, **beside_inputs), rng)

    def _stack(self, side: str, count: int) -> types.Stack:
        tokens, prefix = ("inputs", "input_") if side == "encoder" else ("tokens", "")

        def own(rng: jax.Array | None) -> jax.Array | None:
            return None if rng is None else jax.random.split(rng)[SIDES.index(side)]

        def positions(batch: types.Batch) -> jax.Array:
            return assembly.places(self._constrain, batch[tokens], batch.get(f"{prefix}positions"))

        def enter(params: Params, batch: types.Batch, rng: jax.Array | None) -> jax.Array:
            return self._embed(params, batch[tokens], positions(batch), own(rng))

        def block(params: Params, parts: types.Batch, batch: types.Batch, rng: jax.Array | None) -> stack.Block:
            mask = Mask(side == "decoder", segments_BT=batch.get(f"{prefix}segments"))
            sight = Sight(positions(batch), mask, self._bias(side, params, self._distances(batch[tokens])))
            memory = None
            if side == "decoder":
                seen = Mask(segments_BT=batch.get("segments"), key_segments_BS=batch.get("input_segments"))
                memory = Memory(parts["memory"], seen)
            return self._layers(side, sight, own(rng), memory)

        def leave(params: Params, x: jax.Array) -> jax.Array:
            return self._constrain(self._end(side, params, x), HIDDEN)

        return types.Stack("memory" if side == "encoder" else "x", (side, "layers"), count, enter, block, leave)

    def head(self, params: Params) -> types.Head:
        own = self._call("run_head", {"head": params.get("head", {})})
        return own if own.kernel is not None else own._replace(kernel=params["embed"]["tokens"])

    def encode(self, params: Params, inputs_BS: jax.Array, lengths_B: jax.Array, state: cache.Cache) -> cache.Cache:
        assembly.check_tokens("inputs", inputs_BS, self._arch.context_tokens)
        segments_BS = (jnp.arange(inputs_BS.shape[1]) < lengths_B[:, None]).astype(jnp.int32)
        memory_BSD = self._encode(params, inputs_BS, segments_BS)
        state = cache.with_memory(self._arch, self._arch.decoder_layers, state, inputs_BS.shape[1], self._constrain)

        def remember(layer: Params, index: Any, x: jax.Array, slot: cache.Slot | None) -> tuple[jax.Array, cache.Slot | None]:
            del index
            return x, self._call("run_remember", {"decoder": {"layers": layer}}, x, slot)

        _, layers = self._run["decoder"](remember, params["decoder"]["layers"], memory_BSD, state["layers"])
        return {**state, "layers": layers, "input_lengths": lengths_B}

    def decode(
        self, params: Params, tokens_BT: jax.Array, lengths_B: jax.Array, state: cache.Cache
    ) -> tuple[jax.Array, cache.Cache]:
        assembly.check_tokens("tokens", tokens_BT, self._arch.context_tokens)
        first: Any = state["layers"]
        arrays = first if isinstance(first, dict) else first[0]
        positions_BT = state["lengths"][:, None] + jnp.arange(tokens_BT.shape[1])
        slots_S = jnp.arange(arrays["k"].shape[-2])
        bias_BHTS = self._bias("decoder", params, slots_S - positions_BT[:, :, None])
        sight = Sight(positions_BT, Mask(), bias_BHTS, horizon_BT=positions_BT)
        segments_BS = (jnp.arange(arrays["cross_k"].shape[-2]) < state["input_lengths"][:, None]).astype(jnp.int32)
        memory = Memory(None, Mask(segments_BT=jnp.ones_like(tokens_BT), key_segments_BS=segments_BS))
        x_BTD = self._embed(params, tokens_BT, positions_BT, None)
        x_BTD, layers = self._run["decoder"](
            self._layers("decoder", sight, None, memory), params["decoder"]["layers"], x_BTD, first
        )
        x_BD = self._end("decoder", params, cache.last(x_BTD, lengths_B))
        return heads.logits(x_BD, self.head(params)), {**state, "layers": layers, "lengths": state["lengths"] + lengths_B}

    def _encode(self, params: Params, inputs_BS: jax.Array, segments_BS: jax.Array) -> jax.Array:
        """The encoder's output for decoding, [B, S, D]."""
        encoder, batch = self.stacks[0], {"inputs": inputs_BS, "input_segments": segments_BS}
        block, layers = encoder.block(params, {}, batch, None), params["encoder"]["layers"]
        return encoder.leave(params, self._run["encoder"](block, layers, encoder.enter(params, batch, None))[0])

    def _embed(self, params: Params, tokens_BT: jax.Array, positions_BT: jax.Array, rng: jax.Array | None) -> jax.Array:
        return self._call("run_embedding", {"embed": params["embed"]}, tokens_BT, positions_BT, rng=rng)

    def _bias(self, side: str, params: Params, relative_BTS: jax.Array) -> jax.Array | None:
        return self._call("run_bias", {side: {"relative": params[side].get("relative", {})}}, side, relative_BTS)

    def _distances(self, tokens_BT: jax.Array) -> jax.Array:
        """int32 [1, T, S], of all tokens of the row: key - query. Places in the row will do: attention stays inside segments, where
        positions count on."""
        tokens = tokens_BT.shape[1]
        cut = self._constrain.context
        whole_S = jnp.arange(tokens * (cut.parts if cut else 1))
        return (whole_S[None, :] - self._constrain.places(tokens)[:, None])[None]

    def _layers(self, side: str, sight: Sight, rng: jax.Array | None, memory: Memory | None) -> stack.Block:
        def block(layer: Params, index: Any, x: jax.Array, slot: cache.Slot | None) -> tuple[jax.Array, cache.Slot | None]:
            layer_rng = None if rng is None else jax.random.fold_in(rng, index)
            return self._call("run_layer", {side: {"layers": layer}}, side, x, sight, slot, memory, rng=layer_rng)

        return block

    def _end(self, side: str, params: Params, x: jax.Array) -> jax.Array:
        x = self._call("run_end", {side: {"norm": params[side].get("norm", {})}}, side, x)
        scaled = side == "decoder" and self._arch.family.tied_head_scale and self._arch.tied_head
        return x * self._arch.width**-0.5 if scaled else x


def _check_segments(segments: jax.Array | None, input_segments: jax.Array | None) -> None:
    if (segments is None) != (input_segments is None):
        raise ValueError(
            "only one of segments and input_segments is given.\n  Accepted: both, as decoder tokens see the inputs of their own"
            " segment, or none.\n  Pass both."
        )
