"""Decoder-only language models (GPT, LLaMA): the linen parts put together into the pure functions of `types.Model`."""

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


class Decoder(nn.Module):
    """Names the parts of the parameter tree. Its methods run one part each; how the layers follow is stack.py's affair."""

    arch: Architecture
    constrain: Constrain

    def setup(self) -> None:
        self.embed = Embedding(self.arch, self.constrain)
        self.layers = Block(self.arch, self.constrain)
        if self.arch.norm_order == "pre":
            self.norm = Norm(self.arch)
        self.head = heads.Head(self.arch)
        if self.arch.value_head:
            self.value = heads.ValueHead(self.arch)

    def run_embedding(self, tokens_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        return self.embed(tokens_BT, positions_BT)

    def run_layer(self, x_BTD: jax.Array, sight: Sight, slot: cache.Slot | None) -> tuple[jax.Array, cache.Slot | None]:
        return self.layers(x_BTD, sight, slot)

    def run_norm(self, x_BTD: jax.Array) -> jax.Array:
        return self.norm(x_BTD) if self.arch.norm_order == "pre" else x_BTD

    def run_head(self) -> types.Head:
        value = self.value.projection() if self.arch.value_head else None
        return self.head.projection()._replace(value=value)

    def declare_rest(self, tokens_BT: jax.Array) -> None:
        """Touches every parameter outside the layers, for init."""
        self.run_norm(self.embed(tokens_BT, tokens_BT))
        self.run_head()


def make(config: ConfigDict, family: Family, constrain: Constrain) -> Model:
    """The model that the whole `config` describes, with the defaults of `family`."""
    arch = resolve(config, family)
    init, axes = _make_init(arch)
    functions = _Functions(arch, constrain, axes)

    def apply(params: Params, tokens_BT: jax.Array, **options: jax.Array | None) -> jax.Array:
        logits_BTV = heads.logits(functions.hidden(params, tokens_BT, **options), functions.head(params))
        return constrain(logits_BTV, ("batch", "length", "vocab"))

    return Model(
        name=family.name,
        config=arch,
        axes=axes,
        init=init,
        apply=apply,
        hidden=functions.hidden,
        stacks=(functions.stack,),
        head=functions.head,
        init_cache=lambda batch_seqs, length_tokens: cache.empty(arch, arch.layers, batch_seqs, length_tokens, constrain),
        encode=None,
        decode=functions.decode,
    )


def _make_init(arch: Architecture) -> tuple[Callable[[jax.Array], Params], types.Axes]:
    decoder, one_BT = Decoder(arch, unconstrained), jnp.zeros((1, 1), jnp.int32)

    def declare_rest(rng: jax.Array) -> Params:
        return decoder.init(rng, one_BT, method="declare_rest")["params"]

    def declare_layer(rng: jax.Array) -> Params:
        x_BTD = jnp.zeros((1, 1, arch.width), arch.dtype)
        return decoder.init(rng, x_BTD, Sight(one_BT, Mask()), None, method="run_layer")["params"]["layers"]

    return assembly.make_init(arch, declare_rest, [assembly.Layers(("layers",), arch.layers, declare_layer)])


class _Functions:
    """`hidden`, `stacks`, `head` and `decode` of types.Model."""

    def __init__(self, arch: Architecture, constrain: Constrain, axes: types.Axes):
        self._arch, self._constrain = arch, constrain
        self._call = assembly.caller(Decoder(arch, constrain))
        self._run = stack.make(arch.layers_as, arch.layers, arch.remat)
        self.stack = types.Stack("x", ("layers",), arch.layers, self._enter, self._block, self._leave)
        self._hidden = assembly.run_stacks(arch, constrain, [self.stack], axes)

    def hidden(
        self,
        params: Params,
        tokens_BT: jax.Array,
        *,
        segments: jax.Array | None = None,
        positions: jax.Array | None = None,
        prefix: jax.Array | None = None,
        branches: jax.Array | None = None,
        rng: jax.Array | None = None,
    ) -> jax.Array:
        beside = {"segments": segments, "positions": positions, "prefix": prefix, "branches": branches}
        assembly.check_tokens("tokens", tokens_BT, self._arch.context_tokens, **beside)
        return self._hidden(params, assembly.present(tokens=tokens_BT, **beside), rng)

    def _enter(self, params: Params, batch: types.Batch, rng: jax.Array | None) -> jax.Array:
        positions_BT = assembly.places(self._constrain, batch["tokens"], batch.get("positions"))
        return self._call("run_embedding", {"embed": params["embed"]}, batch["tokens"], positions_BT, rng=rng)

    def _block(self, params: Params, parts: types.Batch, batch: types.Batch, rng: jax.Array | None) -> stack.Block:
        del params, parts
        arrays = {"segments_BT": batch.get("segments"), "prefix_BS": batch.get("prefix"), "branches_BT": batch.get("branches")}
        mask = Mask(True, self._arch.window_tokens, **arrays)
        return self._layers(Sight(assembly.places(self._constrain, batch["tokens"], batch.get("positions")), mask), rng)

    def _leave(self, params: Params, x_BTD: jax.Array) -> jax.Array:
        return self._constrain(self._call("run_norm", _only(params, "norm"), x_BTD), HIDDEN)

    def _layers(self, sight: Sight, rng: jax.Array | None) -> stack.Block:
        def block(layer: Params, index: jax.Array, x: jax.Array, slot: cache.Slot | None) -> tuple[jax.Array, cache.Slot | None]:
            layer_rng = None if rng is None else jax.random.fold_in(rng, index)
            return self._call("run_layer", {"layers": layer}, x, sight, slot, rng=layer_rng)

        return block

    def head(self, params: Params) -> types.Head:
        own = self._call("run_head", _only(params, "head") | _only(params, heads.VALUE))
        return own if own.kernel is not None else own._replace(kernel=params["embed"]["tokens"])

    def decode(
        self, params: Params, tokens_BT: jax.Array, lengths_B: jax.Array, state: cache.Cache
    ) -> tuple[jax.Array, cache.Cache]:
        assembly.check_tokens("tokens", tokens_BT, self._arch.context_tokens)
        positions_BT = state["lengths"][:, None] + jnp.arange(tokens_BT.shape[1])
        horizon_BT = positions_BT
        if self._arch.bidirectional_prompt and tokens_BT.shape[1] > 1:
            horizon_BT = jnp.broadcast_to((state["lengths"] + lengths_B - 1)[:, None], positions_BT.shape)
        x_BTD = self._call("run_embedding", {"embed": params["embed"]}, tokens_BT, positions_BT)
        sight = Sight(positions_BT, Mask(), horizon_BT=horizon_BT)
        x_BTD, layers = self._run(self._layers(sight, None), params["layers"], x_BTD, state["layers"])
        x_BD = self._call("run_norm", _only(params, "norm"), cache.last(x_BTD, lengths_B))
        return heads.logits(x_BD, self.head(params)), {"layers": layers, "lengths": state["lengths"] + lengths_B}


def _only(params: Params, name: str) -> Params:
    """The part `name` of the parameters, if there is one: linen says which parameter is missing."""
    return {name: params.get(name, {})}
