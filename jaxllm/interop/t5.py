"""T5 1.0, 1.1 and mT5 (`model.name = "t5"`): names of their tensors and keys of their config.json in transformers."""

from typing import Any

from jaxllm.interop.family import Family, Settings, limit
from jaxllm.interop.rules import Rule, linear, same
from jaxllm.models.architecture import GATED, Architecture

LM, OLD_LM, MULTILINGUAL = "T5ForConditionalGeneration", "T5WithLMHeadModel", "MT5ForConditionalGeneration"
# feed_forward_proj; the first name of each of ours is the one that is written.
FEED_FORWARD = {
    "relu": "relu",
    "gated-gelu": "geglu",
    "gated-gelu_new": "geglu",
    "gated-silu": "swiglu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "silu": "silu",
}
TOKENS = "shared.weight"


def rules(architecture: str, arch: Architecture) -> list[Rule]:
    """The name table. The buckets of relative positions are in the first layer of each side and serve all of its layers."""
    del architecture
    table = [same("embed/tokens", TOKENS), same("head/kernel", "lm_head.weight")]
    for side, subs in (("encoder", ("attention", "mlp")), ("decoder", ("attention", "cross", "mlp"))):
        relative = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        table += [same(f"{side}/relative/table", relative), same(f"{side}/norm/scale", f"{side}.final_layer_norm.weight")]
        for index, sub in enumerate(subs):
            path, name = f"{side}/layers/{sub}", f"{side}.block.{{layer}}.layer.{index}"
            table += [same(f"{path}/norm/scale", f"{name}.layer_norm.weight")]
            table += _mlp(path, name, arch.activation in GATED) if sub == "mlp" else _attention(path, name, sub)
    return table


def _attention(path: str, name: str, sub: str) -> list[Rule]:
    name = f"{name}.{'EncDecAttention' if sub == 'cross' else 'SelfAttention'}"
    return [linear(f"{path}/{x}/kernel", f"{name}.{x}.weight", inputs=2 if x == "o" else 1) for x in "qkvo"]


def _mlp(path: str, name: str, gated: bool) -> list[Rule]:
    names = {"gate": "wi_0", "up": "wi_1", "down": "wo"} if gated else {"up": "wi", "down": "wo"}
    return [linear(f"{path}/{ours}/kernel", f"{name}.DenseReluDense.{theirs}.weight") for ours, theirs in names.items()]


def read(given: Settings, architecture: str) -> dict[str, Any]:
    """Fields of config.model. A tied head here means that the decoder's output is scaled; see `write`."""
    multilingual = architecture == MULTILINGUAL
    tied = given.flag("tie_word_embeddings", not multilingual)
    if multilingual:
        # transformers 5 says true of every mT5 and scales none; transformers 4 scaled those of which it says true.
        tied = tied and str(given.get("transformers_version", "5")).startswith("4.")
    return {
        "name": "t5",
        "layers": given.size("num_layers", 8 if multilingual else 6),
        "decoder_layers": given.size("num_decoder_layers", given.size("num_layers", 8 if multilingual else 6)),
        "width": given.size("d_model", 512),
        "heads": given.size("num_heads", 6 if multilingual else 8),
        "head_dim": given.size("d_kv", 64),
        "mlp_width": given.size("d_ff", 1024 if multilingual else 2048),
        "context_tokens": given.size("n_positions", 512),
        "vocab_size": given.size("vocab_size", 250112 if multilingual else 32128),
        "norm_eps": given.number("layer_norm_epsilon", 1e-6),
        "activation": given.choice("feed_forward_proj", FEED_FORWARD, "gated-gelu" if multilingual else "relu"),
        "relative_buckets": given.size("relative_attention_num_buckets", 32),
        "relative_max_tokens": given.size("relative_attention_max_distance", 128),
        "tied_head": "on" if given.flag("scale_decoder_outputs", tied) else "off",
        "dropout_frac": given.dropout({"dropout_rate": 0.1}),
    }


def write(arch: Architecture, architecture: str) -> dict[str, Any]:
    """config.json without what all families share.

    transformers 5 ties the head whatever the file says, unless both tensors are stored, and takes tie_word_embeddings = false as
    "do not scale the decoder's output"; it writes true and scale_decoder_outputs = false for such a model.
    """
    del architecture
    return {
        "model_type": "t5",
        "vocab_size": arch.vocab_size,
        "d_model": arch.width,
        "d_kv": arch.head_dim,
        "d_ff": arch.mlp_width,
        "num_layers": arch.layers,
        "num_decoder_layers": arch.decoder_layers,
        "num_heads": arch.heads,
        "n_positions": arch.context_tokens,
        "layer_norm_epsilon": arch.norm_eps,
        "feed_forward_proj": next(theirs for theirs, ours in FEED_FORWARD.items() if ours == arch.activation),
        "relative_attention_num_buckets": arch.relative_buckets,
        "relative_attention_max_distance": arch.relative_max_tokens,
        "dropout_rate": arch.dropout_frac,
        "initializer_factor": 1.0,
        "is_encoder_decoder": True,
        "tie_word_embeddings": arch.tied_head,
    }


def limits(arch: Architecture) -> list[tuple[str, Any, str]]:
    """What no class of this family can express."""
    return limit(
        arch,
        ("t5",),
        positions=("relative",),
        norm=("rmsnorm",),
        norm_order=("pre",),
        activation=tuple(FEED_FORWARD.values()),
        kv_heads=(arch.heads,),
        biased=(frozenset[str](), frozenset({"norm"})),
    )


FAMILY = Family(
    name="T5",
    model_types={"t5": LM, "mt5": MULTILINGUAL},
    classes={LM: "lm", OLD_LM: "lm", MULTILINGUAL: "lm"},
    rules=rules,
    canonical=lambda name: name,
    # Once made and never used: cross-attention has no positions.
    unused=r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
    copies=dict.fromkeys(("lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"), TOKENS),
    # transformers 5 leaves it out where it is the embedding, also if the decoder's output is not scaled.
    stand_ins={"lm_head.weight": TOKENS},
    sizes=(
        "vocab_size",
        "d_model",
        "d_kv",
        "d_ff",
        "num_layers",
        "num_decoder_layers",
        "num_heads",
        "relative_attention_num_buckets",
    ),
    read=read,
    write=write,
    limits=limits,
    choose=lambda arch: LM,
)
