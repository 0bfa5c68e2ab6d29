"""What a model is made of: the `model` section of the config with every "auto" and 0 filled in by the model family."""

from dataclasses import dataclass

import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxllm.models import remat
from jaxllm.models.remat import Remat
from jaxllm.ops.positions import RopeScaling
from jaxllm.transforms import adapt
from jaxllm.types import Transform

GATED = {"swiglu": "silu", "geglu": "gelu_tanh"}  # activation of the MLP -> the function of its gate


@dataclass(frozen=True)
class Family:
    """What "auto" and 0 mean for one registered model name, and what the name decides by itself.

    kind: decoder, encoder or encoder_decoder. mlp_factor, mlp_multiple: default inner width of the MLP.
    embed_scale: embeddings are multiplied by sqrt(width). attention_scale: scores are divided by sqrt(head width).
    tied_head_scale: the decoder's output is divided by sqrt(width) where the head is tied.
    """

    name: str
    kind: str
    norm: str
    norm_order: str
    norm_eps: float
    activation: str
    positions: str
    bias: str
    tied_head: bool
    mlp_factor: float = 4
    mlp_multiple: int = 1
    embed_scale: bool = False
    attention_scale: bool = True
    tied_head_scale: bool = False


@dataclass(frozen=True)
class Architecture:
    """A model in full: sizes, switches and how its layers are run. Fields as in `config.SCHEMA` and `Family`.

    layers: of the decoder, or of the encoder where there is one. biased: the projections with a bias, of qkv, o, mlp and norm.
    bidirectional_prompt: tokens of a prompt see each other in both directions, as they did in training (prefix_lm).
    value_head: beside the head there is one that says what is still to be earned (ppo).
    transforms: what becomes of kernels, in order.
    """

    family: Family
    vocab_size: int
    layers: int
    decoder_layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    context_tokens: int
    token_types: int
    head: str
    classes: int
    norm: str
    norm_order: str
    norm_eps: float
    activation: str
    positions: str
    rope_theta: float
    rope_scaling: RopeScaling | None
    relative_buckets: int
    relative_max_tokens: int
    window_tokens: int
    biased: frozenset[str]
    tied_head: bool
    dropout_frac: float
    init_std: float
    attention: str
    attention_block_tokens: int
    bidirectional_prompt: bool
    value_head: bool
    layers_as: str
    remat: Remat
    compute: str
    cache: str
    transforms: tuple[Transform, ...] = ()

    @property
    def dtype(self) -> jnp.dtype:
        """Of activations and of the weights as they enter a matrix product."""
        return jnp.dtype(self.compute)

    @property
    def keys_stay(self) -> bool:
        """Whether a token's keys and values are the same whatever stands behind it, of a decoder."""
        dynamic = self.rope_scaling is not None and self.rope_scaling.kind == "dynamic"
        return not self.bidirectional_prompt and not dynamic

    @property
    def residual_std(self) -> float:
        """Initial deviation of the projections of a layer that write to the residual stream: their terms add up in it, so each is
        divided by the root of their number, here 2 a layer (Radford et al. 2019, GPT-2, section 2.3)."""
        return self.init_std / (2 * self.layers) ** 0.5

    @property
    def query_std(self) -> float:
        """Initial deviation of the query projection: where scores are not divided by sqrt(K), the weights are (as in T5's own code)."""
        return self.init_std if self.family.attention_scale else self.init_std * self.head_dim**-0.5


def resolve(config: ConfigDict, family: Family) -> Architecture:
    """The architecture that the whole `config` asks for; ValueError where its sizes or switches do not fit together."""
    model = config.model
    _check(model, family)
    arch = Architecture(
        family=family,
        vocab_size=model.vocab_size,
        layers=model.layers,
        decoder_layers=model.decoder_layers or model.layers,
        width=model.width,
        heads=model.heads,
        kv_heads=model.kv_heads or model.heads,
        head_dim=model.head_dim or model.width // model.heads,
        mlp_width=model.mlp_width or _round_up(family.mlp_factor * model.width, family.mlp_multiple),
        context_tokens=model.context_tokens,
        token_types=model.token_types,
        head=model.head,
        classes=model.classes,
        norm=_pick(model.norm, family.norm),
        norm_order=_pick(model.norm_order, family.norm_order),
        norm_eps=model.norm_eps or family.norm_eps,
        activation=_pick(model.activation, family.activation),
        positions=_pick(model.positions, family.positions),
        rope_theta=model.rope_theta,
        rope_scaling=_rope_scaling(model),
        relative_buckets=model.relative_buckets,
        relative_max_tokens=model.relative_max_tokens,
        window_tokens=model.window_tokens,
        biased=_BIASED[_pick(model.bias, family.bias)],
        tied_head=family.tied_head if model.tied_head == "auto" else model.tied_head == "on",
        dropout_frac=model.dropout_frac,
        init_std=model.init_std or model.width**-0.5,
        attention=model.attention,
        attention_block_tokens=model.attention_block_tokens,
        bidirectional_prompt=config.train.objective == "prefix_lm",
        value_head=config.train.objective == "ppo",
        layers_as=model.layers_as,
        remat=remat.make(model),
        compute=config.precision.compute,
        cache=config.precision.cache,
        transforms=adapt.make(config),
    )
    _check_positions(arch)
    return arch


_BIASED = {
    "on": frozenset({"qkv", "o", "mlp", "norm"}),
    "off": frozenset[str](),
    "qkv": frozenset({"qkv"}),
    "attention": frozenset({"qkv", "o"}),
    "mlp": frozenset({"mlp"}),
}


def _check(model: ConfigDict, family: Family) -> None:
    if not model.vocab_size:
        raise ValueError(
            "model.vocab_size = 0 when the model is built.\n  Accepted: 1 or more."
            "\n  Set it to the vocab_size of the tokenizer; train does so by itself."
        )
    if not model.head_dim and model.width % model.heads:
        raise ValueError(
            f"model.heads = {model.heads} does not divide model.width = {model.width}.\n"
            f"  Accepted: {_divisors(model.width)}. Set model.heads to one of these or set model.head_dim."
        )
    if model.kv_heads and model.heads % model.kv_heads:
        raise ValueError(
            f"model.kv_heads = {model.kv_heads} does not divide model.heads = {model.heads}.\n"
            f"  Accepted: {_divisors(model.heads)}. Set model.kv_heads to one of these."
        )
    if model.head in ("classify", "tag") and not model.classes:
        raise ValueError(
            f"model.classes = 0 when a model with model.head = '{model.head}' is built.\n  Accepted: 1 or more."
            "\n  Set it to the number of classes; train does so by itself."
        )
    heads = {"decoder": ("lm", "classify", "tag"), "encoder": ("lm", "classify", "tag", "none"), "encoder_decoder": ("lm",)}
    if model.head not in heads[family.kind]:
        raise ValueError(
            f"model.head = '{model.head}' with model.name = '{family.name}'.\n  Accepted: {', '.join(heads[family.kind])}.\n"
            "  Change model.head, or take another model.name."
        )


def _check_positions(arch: Architecture) -> None:
    if arch.positions == "rope" and arch.head_dim % 2:
        raise ValueError(
            f"head width {arch.head_dim} is odd, and rotary positions turn pairs of features.\n  Accepted: an even width."
            "\n  Change model.head_dim (or model.width / model.heads), or set model.positions = 'learned'."
        )
    if arch.rope_scaling and arch.positions != "rope":
        raise ValueError(
            f"model.rope_scaling = '{arch.rope_scaling.kind}' with model.positions = '{arch.positions}', which do not turn.\n"
            "  Accepted: none, or model.positions = 'rope'.\n  Change one of them."
        )
    if arch.rope_scaling and arch.rope_scaling.kind == "llama3":
        low, high = arch.rope_scaling.low_freq_factor, arch.rope_scaling.high_freq_factor
        if low >= high:
            raise ValueError(
                f"model.rope_low_freq_factor = {low:g} with model.rope_high_freq_factor = {high:g}.\n"
                "  Accepted: less than the other, so that there are waves between.\n  Lower the first (Llama 3 has 1 and 4)."
            )
    if arch.positions == "relative" and arch.relative_max_tokens <= arch.relative_buckets // 2:
        raise ValueError(
            f"model.relative_max_tokens = {arch.relative_max_tokens} with model.relative_buckets = {arch.relative_buckets}.\n"
            f"  Accepted: more than {arch.relative_buckets // 2}, so that there are distances to share buckets.\n  Raise the first."
        )
    if arch.window_tokens and arch.family.kind != "decoder":
        raise ValueError(
            f"model.window_tokens = {arch.window_tokens} with model.name = '{arch.family.name}'.\n"
            "  Accepted: a sliding window is for decoders (gpt, llama).\n  Set it to 0."
        )
    if arch.window_tokens and arch.bidirectional_prompt:
        raise ValueError(
            f"model.window_tokens = {arch.window_tokens} with train.objective = 'prefix_lm', whose prefix is seen from everywhere.\n"
            "  Accepted: one of them.\n  Set model.window_tokens to 0, or take another train.objective."
        )


def _rope_scaling(model: ConfigDict) -> RopeScaling | None:
    if model.rope_scaling == "none":
        if model.rope_factor != 1:
            raise ValueError(
                f"model.rope_factor = {model.rope_factor:g} with model.rope_scaling = 'none', which has no use for it.\n"
                "  Accepted: linear, dynamic, llama3 or yarn, or a factor of 1.\n  Set model.rope_scaling, or leave out the factor."
            )
        return None
    return RopeScaling(
        kind=model.rope_scaling,
        factor=model.rope_factor,
        original_tokens=model.rope_original_tokens or model.context_tokens,
        low_freq_factor=model.rope_low_freq_factor,
        high_freq_factor=model.rope_high_freq_factor,
        beta_fast=model.rope_beta_fast,
        beta_slow=model.rope_beta_slow,
        attention_factor=model.rope_attention_factor,
    )


def _pick(value: str, default: str) -> str:
    return default if value == "auto" else value


def _round_up(width: float, multiple: int) -> int:
    return -(-int(width) // multiple) * multiple


def _divisors(whole: int) -> str:
    return ", ".join(str(part) for part in range(1, whole + 1) if whole % part == 0)
