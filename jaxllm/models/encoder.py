"""Encoders (BERT): every token sees its whole document. The linen parts put together into the pure functions of `types.Model`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from jaxllm import types
from jaxllm.models import assembly, cache, heads, stack
from jaxllm.models.architecture import Architecture, Family, resolve
from jaxllm.models.layers import HIDDEN, Block, Embedding, Norm, Sight
from jaxllm.ops.attention import Mask
from jaxllm.types import Constrain, Model, Params, unconstrained


class Encoder(nn.Module):
    """Names the parts of the parameter tree. Its methods run one part each; how the layers follow is stack.py's affair."""

    arch: Architecture
    constrain: Constrain

    def setup(self) -> None:
        self.embed = Embedding(self.arch, self.constrain)
        self.layers = Block(self.arch, self.constrain)
        if self.arch.norm_order == "pre":
            self.norm = Norm(self.arch)
        # tanh(x W + b) of a row's first token is what is classified. Without a head it is carried along, for who wants hidden states.
        if self.arch.head in ("classify", "none"):
            self.pooler = heads.square(self.arch)
        self.head = heads.Head(self.arch)

    def run_embedding(self, tokens_BT: jax.Array, positions_BT: jax.Array, types_BT: jax.Array | None) -> jax.Array:
        return self.embed(tokens_BT, positions_BT, types_BT)

    def run_layer(self, x_BTD: jax.Array, sight: Sight) -> jax.Array:
        return self.layers(x_BTD, sight)[0]

    def run_end(self, x_BTD: jax.Array) -> jax.Array:
        """From the last layer to what enters the output projection."""
        if self.arch.norm_order == "pre":
            x_BTD = self.norm(x_BTD)
        return jnp.tanh(self.pooler(x_BTD)) if self.arch.head == "classify" else self.head.transform(x_BTD)

    def run_head(self) -> types.Head:
        return self.head.projection()

    def declare_rest(self, tokens_BT: jax.Array) -> None:
        """Touches every parameter outside the layers, for init."""
        x_BTD = self.embed(tokens_BT, tokens_BT)
        self.run_end(x_BTD)
        if self.arch.head == "none":
            self.pooler(x_BTD)
        else:
            self.head.projection()


def make(config: ConfigDict, family: Family, constrain: Constrain) -> Model:
    """The model that the whole `config` describes, with the defaults of `family`.

    With model.head "none" `apply` gives the hidden states, and `head` is a ValueError.
    """
    arch = resolve(config, family)
    init, axes = _make_init(arch)
    one, hidden, head = _make_functions(arch, constrain, axes)

    def apply(params: Params, tokens_BT: jax.Array, **options: jax.Array | None) -> jax.Array:
        hidden_BTD = hidden(params, tokens_BT, **options)
        if arch.head == "none":
            return hidden_BTD.astype(jnp.float32)
        axis = "vocab" if arch.head == "lm" else None
        return constrain(heads.logits(hidden_BTD, head(params)), ("batch", "length", axis))

    return Model(family.name, arch, axes, init, apply, hidden, (one,), head, init_cache=None, encode=None, decode=None)


def _make_init(arch: Architecture) -> tuple[Callable[[jax.Array], Params], types.Axes]:
    encoder, one_BT = Encoder(arch, unconstrained), jnp.zeros((1, 1), jnp.int32)

    def declare_rest(rng: jax.Array) -> Params:
        return encoder.init(rng, one_BT, method="declare_rest")["params"]

    def declare_layer(rng: jax.Array) -> Params:
        x_BTD = jnp.zeros((1, 1, arch.width), arch.dtype)
        return encoder.init(rng, x_BTD, Sight(one_BT, Mask()), method="run_layer")["params"]["layers"]

    return assembly.make_init(arch, declare_rest, [assembly.Layers(("layers",), arch.layers, declare_layer)])


def _make_functions(arch: Architecture, constrain: Constrain, axes: types.Axes) -> tuple[types.Stack, Callable, Callable]:
    """The stack, `hidden` and `head` of types.Model."""
    call = assembly.caller(Encoder(arch, constrain))

    def enter(params: Params, batch: types.Batch, rng: jax.Array | None) -> jax.Array:
        positions_BT = assembly.places(constrain, batch["tokens"], batch.get("positions"))
        return call("run_embedding", {"embed": params["embed"]}, batch["tokens"], positions_BT, batch.get("token_types"), rng=rng)

    def make_block(params: Params, parts: types.Batch, batch: types.Batch, rng: jax.Array | None) -> stack.Block:
        del params, parts
        positions_BT = assembly.places(constrain, batch["tokens"], batch.get("positions"))
        sight = Sight(positions_BT, Mask(segments_BT=batch.get("segments")))

        def block(layer: Params, index: jax.Array, x: jax.Array, slot: cache.Slot | None) -> tuple[jax.Array, cache.Slot | None]:
            layer_rng = None if rng is None else jax.random.fold_in(rng, index)
            return call("run_layer", {"layers": layer}, x, sight, rng=layer_rng), slot

        return block

    def leave(params: Params, x_BTD: jax.Array) -> jax.Array:
        rest = {name: part for name, part in params.items() if name not in ("embed", "layers")}
        return call("run_end", rest, constrain(x_BTD, HIDDEN))

    one = types.Stack("x", ("layers",), arch.layers, enter, make_block, leave)
    run = assembly.run_stacks(arch, constrain, [one], axes)

    def hidden(
        params: Params,
        tokens_BT: jax.Array,
        *,
        segments: jax.Array | None = None,
        positions: jax.Array | None = None,
        token_types: jax.Array | None = None,
        rng: jax.Array | None = None,
    ) -> jax.Array:
        beside = {"segments": segments, "positions": positions, "token_types": token_types}
        assembly.check_tokens("tokens", tokens_BT, arch.context_tokens, **beside)
        return run(params, assembly.present(tokens=tokens_BT, **beside), rng)

    def head(params: Params) -> types.Head:
        if arch.head == "none":
            raise ValueError(
                "this model has no head: it gives hidden states.\n  Accepted: model.head = 'lm', 'classify' or 'tag'.\n  Set model.head."
            )
        own = call("run_head", {"head": params.get("head", {})})
        return own if own.kernel is not None else own._replace(kernel=params["embed"]["tokens"])

    return one, hidden, head
