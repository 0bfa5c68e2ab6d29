"""BERT (`model.name = "bert"`): names of its tensors and keys of its config.json in transformers."""

from typing import Any

from jaxllm.interop.family import ACTIVATIONS, Family, Settings, limit, name_of, prefixed
from jaxllm.interop.rules import Rule, bias, linear, same
from jaxllm.models.architecture import Architecture

LAYER = "bert.encoder.layer.{layer}"
LM, PRETRAINING, MODEL = "BertForMaskedLM", "BertForPreTraining", "BertModel"
SEQUENCE, TOKENS = "BertForSequenceClassification", "BertForTokenClassification"
CHOSEN = {"lm": LM, "classify": SEQUENCE, "tag": TOKENS, "none": MODEL}
WORDS, HEAD = "bert.embeddings.word_embeddings.weight", "cls.predictions"


def rules(architecture: str, arch: Architecture) -> list[Rule]:
    """The name table. Norms come behind the sub-block they belong to."""
    del arch
    table = [
        same("embed/tokens", WORDS),
        same("embed/positions", "bert.embeddings.position_embeddings.weight"),
        same("embed/token_types", "bert.embeddings.token_type_embeddings.weight"),
        *_norm("embed/norm", "bert.embeddings.LayerNorm"),
        *_dense("layers/attention/q", f"{LAYER}.attention.self.query"),
        *_dense("layers/attention/k", f"{LAYER}.attention.self.key"),
        *_dense("layers/attention/v", f"{LAYER}.attention.self.value"),
        *_dense("layers/attention/o", f"{LAYER}.attention.output.dense", inputs=2),
        *_norm("layers/attention/norm", f"{LAYER}.attention.output.LayerNorm"),
        *_dense("layers/mlp/up", f"{LAYER}.intermediate.dense"),
        *_dense("layers/mlp/down", f"{LAYER}.output.dense"),
        *_norm("layers/mlp/norm", f"{LAYER}.output.LayerNorm"),
        *_dense("pooler", "bert.pooler.dense"),
    ]
    if architecture in (SEQUENCE, TOKENS):
        return [*table, same("head/kernel", "classifier.weight"), same("head/bias", "classifier.bias")]
    return [
        *table,
        *_dense("head/dense", f"{HEAD}.transform.dense"),
        *_norm("head/norm", f"{HEAD}.transform.LayerNorm"),
        same("head/bias", f"{HEAD}.bias"),
    ]


def _dense(path: str, name: str, inputs: int = 1) -> list[Rule]:
    return [linear(f"{path}/kernel", f"{name}.weight", inputs), bias(f"{path}/bias", f"{name}.bias")]


def _norm(path: str, name: str) -> list[Rule]:
    return [same(f"{path}/scale", f"{name}.weight"), same(f"{path}/bias", f"{name}.bias")]


def canonical(name: str) -> str:
    """With the prefix, and with the newer names of LayerNorm's tensors."""
    name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
    return prefixed("bert", "cls|classifier")(name)


def read(given: Settings, architecture: str) -> dict[str, Any]:
    """Fields of config.model."""
    if architecture in (LM, PRETRAINING):
        given.only("tie_word_embeddings", True)
    given.only("position_embedding_type", "absolute")
    given.only("is_decoder", False)
    given.only("add_cross_attention", False)
    return {
        "name": "bert",
        "layers": given.size("num_hidden_layers", 12),
        "width": given.size("hidden_size", 768),
        "heads": given.size("num_attention_heads", 12),
        "mlp_width": given.size("intermediate_size", 3072),
        "context_tokens": given.size("max_position_embeddings", 512),
        "vocab_size": given.size("vocab_size", 30522),
        "token_types": given.size("type_vocab_size", 2),
        "norm_eps": given.number("layer_norm_eps", 1e-12),
        "activation": given.choice("hidden_act", ACTIVATIONS, "gelu"),
        "tied_head": "on",
        "dropout_frac": given.dropout({"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}),
    }


def write(arch: Architecture, architecture: str) -> dict[str, Any]:
    """config.json without what all families share."""
    del architecture
    return {
        "model_type": "bert",
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.width,
        "num_hidden_layers": arch.layers,
        "num_attention_heads": arch.heads,
        "intermediate_size": arch.mlp_width,
        "max_position_embeddings": arch.context_tokens,
        "type_vocab_size": arch.token_types,
        "layer_norm_eps": arch.norm_eps,
        "hidden_act": name_of(arch.activation),
        "hidden_dropout_prob": arch.dropout_frac,
        "attention_probs_dropout_prob": arch.dropout_frac,
        "initializer_range": arch.init_std,
        "position_embedding_type": "absolute",
        "tie_word_embeddings": True,
    }


def limits(arch: Architecture) -> list[tuple[str, Any, str]]:
    """What no class of this family can express."""
    return limit(
        arch,
        ("bert",),
        positions=("learned",),
        norm=("layernorm",),
        norm_order=("post",),
        activation=("gelu", "gelu_tanh", "relu", "silu"),
        kv_heads=(arch.heads,),
        head_dim=(arch.width // arch.heads,),
        # Untied, transformers has a second bias, and which one counts differs between its versions.
        tied_head=(True,) if arch.head == "lm" else (True, False),
        biased=(frozenset({"qkv", "o", "mlp", "norm"}),),
    )


FAMILY = Family(
    name="BERT",
    model_types={"bert": LM},
    classes={LM: "lm", PRETRAINING: "lm", SEQUENCE: "classify", TOKENS: "tag", MODEL: "none"},
    rules=rules,
    canonical=canonical,
    # The pooler and the next-sentence head that a masked language model was trained with.
    unused=r".*position_ids|bert\.pooler\..*|cls\.seq_relationship\..*",
    copies={f"{HEAD}.decoder.weight": WORDS, f"{HEAD}.decoder.bias": f"{HEAD}.bias"},
    stand_ins={},
    sizes=("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "max_position_embeddings", "type_vocab_size"),
    read=read,
    write=write,
    limits=limits,
    choose=lambda arch: CHOSEN[arch.head],
)
