"""LLaMA, Mistral and Qwen2 (`model.name = "llama"`): names of their tensors and keys of their config.json in transformers."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxllm.interop.family import Family, Settings, limit, prefixed
from jaxllm.interop.rules import Rule, bias, linear, same
from jaxllm.models.architecture import GATED, Architecture

LAYER = "model.layers.{layer}"
TYPES = {"Llama": "llama", "Mistral": "mistral", "Qwen2": "qwen2"}
LM, SEQUENCE = "ForCausalLM", "ForSequenceClassification"
# hidden_act is the activation of the gate.
ACTS = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu"}
WRITTEN_ACTS = {"swiglu": "silu", "geglu": "gelu_pytorch_tanh"}
SCALINGS = {"default": "none", "linear": "linear", "dynamic": "dynamic", "llama3": "llama3", "yarn": "yarn"}


def rules(architecture: str, arch: Architecture) -> list[Rule]:
    """The name table."""
    del arch
    table = [
        same("embed/tokens", "model.embed_tokens.weight"),
        same("layers/attention/norm/scale", f"{LAYER}.input_layernorm.weight"),
        *[linear(f"layers/attention/{x}/kernel", f"{LAYER}.self_attn.{x}_proj.weight") for x in "qkv"],
        linear("layers/attention/o/kernel", f"{LAYER}.self_attn.o_proj.weight", inputs=2),
        *[bias(f"layers/attention/{x}/bias", f"{LAYER}.self_attn.{x}_proj.bias") for x in "qkvo"],
        same("layers/mlp/norm/scale", f"{LAYER}.post_attention_layernorm.weight"),
        *[linear(f"layers/mlp/{x}/kernel", f"{LAYER}.mlp.{x}_proj.weight") for x in ("gate", "up", "down")],
        *[bias(f"layers/mlp/{x}/bias", f"{LAYER}.mlp.{x}_proj.bias") for x in ("gate", "up", "down")],
        same("norm/scale", "model.norm.weight"),
    ]
    return [*table, same("head/kernel", "score.weight" if architecture.endswith(SEQUENCE) else "lm_head.weight")]


def read(given: Settings, architecture: str) -> dict[str, Any]:
    """Fields of config.model. Where a key is absent, the three classes differ in a few defaults."""
    kind = architecture.removesuffix(LM).removesuffix(SEQUENCE)
    heads, width = given.size("num_attention_heads", 32), given.size("hidden_size", 4096)
    kv_heads = given.size("num_key_value_heads", {"Llama": heads, "Mistral": 8, "Qwen2": 32}[kind])
    if "num_key_value_heads" in given.values and given.values["num_key_value_heads"] is None:
        kv_heads = heads
    mlp_width = {"Llama": 11008, "Mistral": 14336, "Qwen2": 22016}[kind]
    context = given.size("max_position_embeddings", {"Llama": 2048, "Mistral": 131072, "Qwen2": 32768}[kind])
    return {
        "name": "llama",
        "layers": given.size("num_hidden_layers", 32),
        "width": width,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": given.size("head_dim", width // heads),
        "mlp_width": given.size("intermediate_size", mlp_width),
        "vocab_size": given.size("vocab_size", 151936 if kind == "Qwen2" else 32000),
        "norm_eps": given.number("rms_norm_eps", 1e-6),
        "activation": given.choice("hidden_act", ACTS, "silu"),
        "bias": _bias(given, kind),
        "window_tokens": _window(given, kind),
        "tied_head": "on" if given.flag("tie_word_embeddings", False) else "off",
        "dropout_frac": given.dropout({"attention_dropout": 0.0}),
        **_rope(given, context),
    }


def _bias(given: Settings, kind: str) -> str:
    if kind != "Llama":
        return "qkv" if kind == "Qwen2" else "off"
    switches = (given.flag("attention_bias", False), given.flag("mlp_bias", False))
    return {(True, True): "on", (True, False): "attention", (False, True): "mlp", (False, False): "off"}[switches]


def _window(given: Settings, kind: str) -> int:
    """model.window_tokens; ValueError where only some layers have a window."""
    if kind == "Llama":
        return 0
    layers = given.size("num_hidden_layers", 32)
    window = given.values.get("sliding_window", 4096)
    types = given.get("layer_types", None)
    if kind == "Qwen2" and not given.flag("use_sliding_window", False):
        window = None
    if types is None:
        windowed = [] if window is None else range(int(given.number("max_window_layers", 28)) if kind == "Qwen2" else 0, layers)
    else:
        windowed = [index for index, name in enumerate(types) if name == "sliding_attention"]
    if windowed and len(windowed) != layers:
        key = "max_window_layers" if types is None else "layer_types"
        raise given.refuse(key, given.get(key, 28), "a sliding window in all layers or in none")
    return given.size("sliding_window", 4096) if windowed else 0


def _rope(given: Settings, context: int) -> dict[str, Any]:
    """Both spellings: rope_theta and rope_scaling {rope_type or type, ...}, or rope_parameters with everything."""
    scaling = given.section("rope_parameters" if given.get("rope_parameters", None) else "rope_scaling")
    if any(isinstance(value, dict) for value in scaling.values.values()):
        raise given.refuse("rope_parameters", dict(scaling.values), "one set of values for all layers")
    for settings in (given, scaling):
        settings.only("partial_rotary_factor", 1.0)
    scaling.only("truncate", True)
    kind = scaling.choice("rope_type", SCALINGS, scaling.get("type", "default"))
    theta = scaling.number("rope_theta", given.number("rope_theta", 10000.0))
    fields: dict[str, Any] = {"rope_theta": theta, "rope_scaling": kind, "context_tokens": context}
    if kind == "none":
        return fields
    original = scaling.size("original_max_position_embeddings", given.size("original_max_position_embeddings", context))
    fields["rope_factor"] = scaling.number("factor", context / original)
    if kind in ("dynamic", "yarn"):
        # These say how far the original context is stretched, and max_position_embeddings may still be the original one.
        original = context if kind == "dynamic" else original
        fields["context_tokens"] = max(context, int(original * fields["rope_factor"]))
    fields["rope_original_tokens"] = original
    if kind == "llama3":
        fields["rope_low_freq_factor"] = scaling.number("low_freq_factor", 1.0)
        fields["rope_high_freq_factor"] = scaling.number("high_freq_factor", 4.0)
    if kind == "yarn":
        for key in ("mscale", "mscale_all_dim"):
            scaling.only(key, None)
        fields["rope_beta_fast"] = scaling.number("beta_fast", 32.0)
        fields["rope_beta_slow"] = scaling.number("beta_slow", 1.0)
        fields["rope_attention_factor"] = scaling.number("attention_factor", 0.0)
    return fields


def write(arch: Architecture, architecture: str) -> dict[str, Any]:
    """config.json without what all families share; rotary positions in the older spelling, which all versions read."""
    kind = architecture.removesuffix(LM).removesuffix(SEQUENCE)
    scaling = arch.rope_scaling
    keys = {
        "model_type": TYPES[kind],
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.width,
        "intermediate_size": arch.mlp_width,
        "num_hidden_layers": arch.layers,
        "num_attention_heads": arch.heads,
        "num_key_value_heads": arch.kv_heads,
        "head_dim": arch.head_dim,
        "hidden_act": WRITTEN_ACTS[arch.activation],
        "max_position_embeddings": scaling.original_tokens if scaling and scaling.kind == "dynamic" else arch.context_tokens,
        "rms_norm_eps": arch.norm_eps,
        "rope_theta": arch.rope_theta,
        "rope_scaling": _scaling(arch),
        "attention_dropout": arch.dropout_frac,
        "initializer_range": arch.init_std,
        "tie_word_embeddings": arch.tied_head,
    }
    if kind == "Llama":
        keys |= {"attention_bias": "qkv" in arch.biased, "mlp_bias": "mlp" in arch.biased}
    if kind == "Mistral":
        keys |= {"sliding_window": arch.window_tokens or None}
    if kind == "Qwen2":
        windowed = bool(arch.window_tokens)
        keys |= {"use_sliding_window": windowed, "sliding_window": arch.window_tokens or None}
        keys |= {"max_window_layers": 0 if windowed else arch.layers}
    return keys


def _scaling(arch: Architecture) -> Mapping[str, Any] | None:
    scaling = arch.rope_scaling
    if scaling is None:
        return None
    keys: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind in ("llama3", "yarn"):
        keys["original_max_position_embeddings"] = scaling.original_tokens
    if scaling.kind == "llama3":
        keys |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.kind == "yarn":
        keys |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        keys |= {"attention_factor": scaling.attention_factor} if scaling.attention_factor else {}
    return keys


def limits(arch: Architecture) -> list[tuple[str, Any, str]]:
    """What none of the three classes can express."""
    accepted = [frozenset[str](), frozenset({"qkv"})]
    if not arch.window_tokens:
        accepted += [frozenset({"qkv", "o"}), frozenset({"mlp"}), frozenset({"qkv", "o", "mlp"})]
    return limit(
        # RMSNorm has no bias to switch on.
        dataclasses.replace(arch, biased=arch.biased - {"norm"}),
        ("gpt", "llama"),
        head=("lm", "classify"),
        positions=("rope",),
        norm=("rmsnorm",),
        norm_order=("pre",),
        activation=tuple(GATED),
        biased=tuple(accepted),
    )


def choose(arch: Architecture) -> str:
    """The class for a model within `limits`."""
    kind = "Qwen2" if arch.biased - {"norm"} == {"qkv"} else "Mistral" if arch.window_tokens else "Llama"
    return kind + (SEQUENCE if arch.head == "classify" else LM)


FAMILY = Family(
    name="LLaMA, Mistral or Qwen2",
    model_types={name: f"{kind}{LM}" for kind, name in TYPES.items()},
    classes={f"{kind}{what}": head for kind in TYPES for what, head in ((LM, "lm"), (SEQUENCE, "classify"))},
    rules=rules,
    canonical=prefixed("model", "lm_head|score"),
    unused=r".*\.rotary_emb\.inv_freq",
    copies={"lm_head.weight": "model.embed_tokens.weight"},
    stand_ins={},
    sizes=(
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    ),
    read=read,
    write=write,
    limits=limits,
    choose=choose,
)
