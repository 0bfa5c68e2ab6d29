"""Decoder-only language models (GPT, LLaMA): the linen parts put together into the pure functions of `types.Model`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from jaxllm.models import cache, stack
from jaxllm.models.architecture import Architecture, Family, resolve
from jaxllm.models.layers import Block, Embedding, Head, Norm
from jaxllm.transforms import leaf
from jaxllm.types import Constrain, Model, Params, unconstrained


class Decoder(nn.Module):
    """Names the parts of the parameter tree. Its methods run one part each; how the layers follow is stack.py's affair."""

    arch: Architecture
    constrain: Constrain

    def setup(self) -> None:
        self.embed = Embedding(self.arch, self.constrain)
        self.layers = Block(self.arch, self.constrain)
        self.norm = Norm(self.arch)
        if not self.arch.tied_head:
            self.head = Head(self.arch)

    def run_embedding(self, tokens_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        return self.embed(tokens_BT, positions_BT)

    def run_layer(
        self, x_BTD: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array | None, slot: cache.Slot | None
    ) -> tuple[jax.Array, cache.Slot | None]:
        return self.layers(x_BTD, positions_BT, segments_BT, slot)

    def run_norm(self, x_BTD: jax.Array) -> jax.Array:
        return self.norm(x_BTD)

    def head_kernel(self) -> Any:
        return self.head()

    def declare_rest(self, tokens_BT: jax.Array, positions_BT: jax.Array) -> None:
        """Touches every parameter outside the layers, for init."""
        self.norm(self.embed(tokens_BT, positions_BT))
        if not self.arch.tied_head:
            self.head()


def make(config: ConfigDict, family: Family, constrain: Constrain) -> Model:
    """The model that the whole `config` describes, with the defaults of `family`."""
    arch = resolve(config, family)
    hidden, head, decode = _make_functions(arch, constrain)

    def apply(
        params: Params,
        tokens_BT: jax.Array,
        *,
        segments: jax.Array | None = None,
        positions: jax.Array | None = None,
        rng: jax.Array | None = None,
    ) -> jax.Array:
        hidden_BTD = hidden(params, tokens_BT, segments=segments, positions=positions, rng=rng)
        return constrain(_logits("BTD,VD->BTV", hidden_BTD, head(params)), ("batch", "length", "vocab"))

    init, axes = _make_init(arch)
    return Model(
        name=arch.name,
        config=arch,
        axes=axes,
        init=init,
        apply=apply,
        hidden=hidden,
        head=head,
        init_cache=lambda batch_seqs, length_tokens: cache.empty(arch, batch_seqs, length_tokens, constrain),
        decode=decode,
    )


def _make_init(arch: Architecture) -> tuple[Callable[[jax.Array], Params], Any]:
    """(init, axes): parameters from an rng, and their logical axes from tracing it, without allocating anything."""
    decoder = Decoder(arch, unconstrained)
    one_BT = jnp.zeros((1, 1), jnp.int32)

    def declare_rest(rng: jax.Array) -> Params:
        return decoder.init(rng, one_BT, one_BT, method="declare_rest")["params"]

    def declare_layer(rng: jax.Array) -> Params:
        x_BTD = jnp.zeros((1, 1, arch.width), arch.dtype)
        return decoder.init(rng, x_BTD, one_BT, None, None, method="run_layer")["params"]["layers"]

    def open_boxes(boxed: Params, what: Callable[[nn.Partitioned], Any]) -> Params:
        return jax.tree.map(what, boxed, is_leaf=lambda node: isinstance(node, nn.Partitioned))

    def init(rng: jax.Array) -> Params:
        layers = stack.init(arch.layers_as, arch.layers, lambda key: open_boxes(declare_layer(key), lambda box: box.value), rng)
        return {**open_boxes(declare_rest(rng), lambda box: box.value), "layers": layers}

    rng = jax.random.key(0)
    layer_axes = open_boxes(jax.eval_shape(declare_layer, rng), lambda box: box.names)
    axes = {
        **open_boxes(jax.eval_shape(declare_rest, rng), lambda box: box.names),
        "layers": stack.axes(arch.layers_as, arch.layers, layer_axes),
    }
    # Compiled as a whole: linen makes parameters by running the layers, and only the compiler leaves that out.
    return jax.jit(init), axes


def _make_functions(arch: Architecture, constrain: Constrain) -> tuple[Callable, Callable, Callable]:
    """`hidden`, `head` and `decode` of types.Model."""
    decoder = Decoder(arch, constrain)
    run = stack.make(arch.layers_as, arch.layers, arch.remat)

    def call(method: str, params: Params, *inputs: Any, rng: jax.Array | None = None) -> Any:
        return decoder.apply({"params": params}, *inputs, method=method, rngs={} if rng is None else {"dropout": rng})

    def layers_of(positions_BT: jax.Array, segments_BT: jax.Array | None, rng: jax.Array | None) -> stack.Block:
        def block(layer: Any, index: Any, x: jax.Array, slot: cache.Slot | None) -> tuple[jax.Array, cache.Slot | None]:
            layer_rng = None if rng is None else jax.random.fold_in(rng, index)
            return call("run_layer", {"layers": layer}, x, positions_BT, segments_BT, slot, rng=layer_rng)

        return block

    def hidden(
        params: Params,
        tokens_BT: jax.Array,
        *,
        segments: jax.Array | None = None,
        positions: jax.Array | None = None,
        rng: jax.Array | None = None,
    ) -> jax.Array:
        _check_tokens(tokens_BT, arch.context_tokens, segments=segments, positions=positions)
        positions_BT = jnp.arange(tokens_BT.shape[1])[None] if positions is None else positions
        x_BTD = call("run_embedding", {"embed": params["embed"]}, tokens_BT, positions_BT, rng=rng)
        x_BTD, _ = run(layers_of(positions_BT, segments, rng), params["layers"], x_BTD)
        return call("run_norm", {"norm": params["norm"]}, x_BTD)

    def head(params: Params) -> Any:
        return params["embed"]["tokens"] if arch.tied_head else call("head_kernel", {"head": params.get("head", {})})

    def decode(params: Params, tokens_BT: jax.Array, lengths_B: jax.Array, state: cache.Cache) -> tuple[jax.Array, cache.Cache]:
        _check_tokens(tokens_BT, arch.context_tokens)
        positions_BT = state["lengths"][:, None] + jnp.arange(tokens_BT.shape[1])
        x_BTD = call("run_embedding", {"embed": params["embed"]}, tokens_BT, positions_BT)
        x_BTD, layers = run(layers_of(positions_BT, None, None), params["layers"], x_BTD, state["layers"])
        last_B = jnp.maximum(lengths_B - 1, 0)
        x_BD = jnp.take_along_axis(x_BTD, last_B[:, None, None], axis=1)[:, 0]
        logits_BV = _logits("BD,VD->BV", call("run_norm", {"norm": params["norm"]}, x_BD), head(params))
        return logits_BV, {"layers": layers, "lengths": state["lengths"] + lengths_B}

    return hidden, head, decode


def _logits(spec: str, hidden: jax.Array, kernel_VD: Any) -> jax.Array:
    """In float32, whatever the compute dtype: differences between likely tokens are small beside the logits themselves."""
    return leaf.einsum(spec, hidden.astype(jnp.float32), kernel_VD)


def _check_tokens(tokens_BT: jax.Array, context_tokens: int, **beside: jax.Array | None) -> None:
    """ValueError unless the tokens are integers [B, T] that fit the context, and what goes beside them has their shape."""
    if tokens_BT.ndim != 2 or not jnp.issubdtype(tokens_BT.dtype, jnp.integer):
        raise ValueError(
            f"tokens are {tokens_BT.dtype} of shape {tokens_BT.shape}.\n  Accepted: integers of shape [batch, length]."
            "\n  Pass a batch of token ids; a single sequence is tokens[None]."
        )
    if tokens_BT.shape[1] > context_tokens:
        raise ValueError(
            f"{tokens_BT.shape[1]} tokens in a row.\n  Accepted: up to model.context_tokens = {context_tokens}."
            "\n  Shorten the rows, or train a model with a longer context."
        )
    for name, array in beside.items():
        if array is not None and array.shape != tokens_BT.shape:
            raise ValueError(
                f"{name} has shape {array.shape}.\n  Accepted: that of the tokens, {tokens_BT.shape}.\n  Pass one number a token."
            )
