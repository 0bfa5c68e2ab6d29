"""GPT-2 (`model.name = "gpt"`): names of its tensors and keys of its config.json in transformers."""

from typing import Any

from jaxllm.interop.family import ACTIVATIONS, Family, Settings, limit, name_of, prefixed
from jaxllm.interop.rules import Rule, bias, conv, same
from jaxllm.models.architecture import Architecture

LAYER = "transformer.h.{layer}"
LM, SEQUENCE = "GPT2LMHeadModel", "GPT2ForSequenceClassification"


def rules(architecture: str, arch: Architecture) -> list[Rule]:
    """The name table. A Conv1D holds [inputs, outputs], as our kernels do; c_attn holds q, k and v side by side."""
    del arch
    table = [
        same("embed/tokens", "transformer.wte.weight"),
        same("embed/positions", "transformer.wpe.weight"),
        same("layers/attention/norm/scale", f"{LAYER}.ln_1.weight"),
        same("layers/attention/norm/bias", f"{LAYER}.ln_1.bias"),
        *[conv(f"layers/attention/{x}/kernel", f"{LAYER}.attn.c_attn.weight", part=(i, 3)) for i, x in enumerate("qkv")],
        *[bias(f"layers/attention/{x}/bias", f"{LAYER}.attn.c_attn.bias", part=(i, 3)) for i, x in enumerate("qkv")],
        conv("layers/attention/o/kernel", f"{LAYER}.attn.c_proj.weight", inputs=2),
        bias("layers/attention/o/bias", f"{LAYER}.attn.c_proj.bias"),
        same("layers/mlp/norm/scale", f"{LAYER}.ln_2.weight"),
        same("layers/mlp/norm/bias", f"{LAYER}.ln_2.bias"),
        conv("layers/mlp/up/kernel", f"{LAYER}.mlp.c_fc.weight"),
        bias("layers/mlp/up/bias", f"{LAYER}.mlp.c_fc.bias"),
        conv("layers/mlp/down/kernel", f"{LAYER}.mlp.c_proj.weight"),
        bias("layers/mlp/down/bias", f"{LAYER}.mlp.c_proj.bias"),
        same("norm/scale", "transformer.ln_f.weight"),
        same("norm/bias", "transformer.ln_f.bias"),
    ]
    return [*table, same("head/kernel", "score.weight" if architecture == SEQUENCE else "lm_head.weight")]


def read(given: Settings, architecture: str) -> dict[str, Any]:
    """Fields of config.model."""
    del architecture
    given.only("scale_attn_weights", True)
    given.only("scale_attn_by_inverse_layer_idx", False)
    given.only("add_cross_attention", False)
    width = given.size("n_embd", 768)
    return {
        "name": "gpt",
        "layers": given.size("n_layer", 12),
        "width": width,
        "heads": given.size("n_head", 12),
        "mlp_width": given.size("n_inner", 4 * width),
        "context_tokens": given.size("n_positions", given.size("n_ctx", 1024)),
        "vocab_size": given.size("vocab_size", 50257),
        "norm_eps": given.number("layer_norm_epsilon", 1e-5),
        "activation": given.choice("activation_function", ACTIVATIONS, "gelu_new"),
        "tied_head": "on" if given.flag("tie_word_embeddings", True) else "off",
        "dropout_frac": given.dropout({"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}),
    }


def write(arch: Architecture, architecture: str) -> dict[str, Any]:
    """config.json without what all families share."""
    del architecture
    return {
        "model_type": "gpt2",
        "vocab_size": arch.vocab_size,
        "n_embd": arch.width,
        "n_layer": arch.layers,
        "n_head": arch.heads,
        "n_inner": arch.mlp_width,
        "n_positions": arch.context_tokens,
        "n_ctx": arch.context_tokens,
        "layer_norm_epsilon": arch.norm_eps,
        "activation_function": name_of(arch.activation),
        "resid_pdrop": arch.dropout_frac,
        "embd_pdrop": arch.dropout_frac,
        "attn_pdrop": arch.dropout_frac,
        "initializer_range": arch.init_std,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "tie_word_embeddings": arch.tied_head,
    }


def limits(arch: Architecture) -> list[tuple[str, Any, str]]:
    """What no class of this family can express."""
    return limit(
        arch,
        ("gpt", "llama"),
        head=("lm", "classify"),
        positions=("learned",),
        norm=("layernorm",),
        norm_order=("pre",),
        activation=("gelu_tanh", "gelu", "relu", "silu"),
        window_tokens=(0,),
        kv_heads=(arch.heads,),
        head_dim=(arch.width // arch.heads,),
        biased=(frozenset({"qkv", "o", "mlp", "norm"}),),
    )


FAMILY = Family(
    name="GPT-2",
    model_types={"gpt2": LM},
    classes={LM: "lm", SEQUENCE: "classify"},
    rules=rules,
    # The first published files have names without a prefix.
    canonical=prefixed("transformer", "lm_head|score"),
    unused=r".*\.attn\.(masked_)?bias",
    copies={"lm_head.weight": "transformer.wte.weight"},
    stand_ins={},
    sizes=("vocab_size", "n_embd", "n_layer", "n_head", "n_inner", "n_positions"),
    read=read,
    write=write,
    limits=limits,
    choose=lambda arch: SEQUENCE if arch.head == "classify" else LM,
)
