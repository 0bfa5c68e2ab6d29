"""What a decoder is made of: the `model` section of the config with every "auto" and 0 filled in by the model family."""

from dataclasses import dataclass

import jax.numpy as jnp
from ml_collections import ConfigDict


@dataclass(frozen=True)
class Family:
    """What "auto" means for one registered model name, and the default inner width of its MLP."""

    name: str
    norm: str
    activation: str
    positions: str
    bias: bool
    tied_head: bool
    mlp_factor: float
    mlp_multiple: int


@dataclass(frozen=True)
class Architecture:
    """A decoder in full: sizes, switches and how its layers are run. Fields as in `config.SCHEMA`."""

    name: str
    vocab_size: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    context_tokens: int
    norm: str
    norm_eps: float
    activation: str
    positions: str
    rope_theta: float
    bias: bool
    tied_head: bool
    dropout_frac: float
    init_std: float
    attention: str
    attention_block_tokens: int
    layers_as: str
    remat: str
    compute: str

    @property
    def dtype(self) -> jnp.dtype:
        """Of activations and of the weights as they enter a matrix product."""
        return jnp.dtype(self.compute)

    @property
    def residual_std(self) -> float:
        """Initial deviation of the two projections of a layer that write to the residual stream: 2 x layers terms add up
        in it, so each is divided by the root of their number (Radford et al. 2019, GPT-2, section 2.3)."""
        return self.init_std / (2 * self.layers) ** 0.5


def resolve(config: ConfigDict, family: Family) -> Architecture:
    """The architecture that the whole `config` asks for; ValueError where its sizes do not fit together."""
    model = config.model
    if not model.vocab_size:
        raise ValueError(
            "model.vocab_size = 0 when the model is built.\n  Accepted: 1 or more."
            "\n  Set it to the vocab_size of the tokenizer; train does so by itself."
        )
    positions = _pick(model.positions, family.positions)
    if not model.head_dim and model.width % model.heads:
        raise ValueError(
            f"model.heads = {model.heads} does not divide model.width = {model.width}.\n"
            f"  Accepted: {_divisors(model.width)}. Set model.heads to one of these or set model.head_dim."
        )
    kv_heads, head_dim = model.kv_heads or model.heads, model.head_dim or model.width // model.heads
    if model.heads % kv_heads:
        raise ValueError(
            f"model.kv_heads = {kv_heads} does not divide model.heads = {model.heads}.\n"
            f"  Accepted: {_divisors(model.heads)}. Set model.kv_heads to one of these."
        )
    if positions == "rope" and head_dim % 2:
        raise ValueError(
            f"head width {head_dim} is odd, and rotary positions turn pairs of features.\n  Accepted: an even width."
            "\n  Change model.head_dim (or model.width / model.heads), or set model.positions = 'learned'."
        )
    return Architecture(
        name=family.name,
        vocab_size=model.vocab_size,
        layers=model.layers,
        width=model.width,
        heads=model.heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_width=model.mlp_width or _round_up(model.width * family.mlp_factor, family.mlp_multiple),
        context_tokens=model.context_tokens,
        norm=_pick(model.norm, family.norm),
        norm_eps=model.norm_eps,
        activation=_pick(model.activation, family.activation),
        positions=positions,
        rope_theta=model.rope_theta,
        bias=_switch(model.bias, family.bias),
        tied_head=_switch(model.tied_head, family.tied_head),
        dropout_frac=model.dropout_frac,
        init_std=model.init_std or model.width**-0.5,
        attention=model.attention,
        attention_block_tokens=model.attention_block_tokens,
        layers_as=model.layers_as,
        remat=model.remat,
        compute=config.precision.compute,
    )


def _pick(value: str, default: str) -> str:
    return default if value == "auto" else value


def _switch(value: str, default: bool) -> bool:
    return default if value == "auto" else value == "on"


def _round_up(width: float, multiple: int) -> int:
    return -(-int(width) // multiple) * multiple


def _divisors(whole: int) -> str:
    return ", ".join(str(part) for part in range(1, whole + 1) if whole % part == 0)
