"""config.json in the styles of several years, and what in it has no counterpart here."""

from typing import Any

import pytest

from jaxllm import config as schema
from jaxllm import models
from jaxllm.interop import families
from jaxllm.interop.family import Settings


def fields(architecture: str, **keys: Any) -> dict[str, Any]:
    """Our config.model fields for a config.json that holds nothing but `keys`."""
    return families.find(architecture).read(Settings(keys, "config.json"), architecture)


def read(architecture: str, **keys: Any) -> dict[str, Any]:
    """As `fields`, without those that an empty config.json gives, too."""
    plain = fields(architecture)
    return {name: value for name, value in fields(architecture, **keys).items() if plain.get(name, "") != value}


LLAMA, MISTRAL, QWEN = "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 2.0, "original_max_position_embeddings": 256}
YARN = {"factor": 4.0, "original_max_position_embeddings": 1024, "beta_fast": 16, "attention_factor": 1.5}
LINEAR = {"rope_scaling": "linear", "rope_factor": 4.0, "rope_original_tokens": 2048}


@pytest.mark.parametrize(
    ("architecture", "keys", "expected"),
    [
        (LLAMA, {"rope_theta": 5e5}, {"rope_theta": 5e5}),
        (LLAMA, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {"rope_theta": 5e5}),
        (LLAMA, {"rope_scaling": None, "head_dim": None, "num_key_value_heads": None}, {}),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 4.0}}, LINEAR),
        (LLAMA, {"rope_scaling": {"rope_type": "linear", "factor": 4}, "rope_theta": 10000.0}, LINEAR),
        (LLAMA, {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}, LINEAR),
        (
            LLAMA,
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            {"rope_scaling": "dynamic", "rope_factor": 2.0, "rope_original_tokens": 2048, "context_tokens": 4096},
        ),
        (
            LLAMA,
            {"rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            {
                "rope_scaling": "llama3",
                "rope_factor": 8.0,
                "rope_original_tokens": 256,
                "rope_low_freq_factor": 1.0,
                "rope_high_freq_factor": 2.0,
            },
        ),
        (
            LLAMA,
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, **YARN}},
            {
                "rope_scaling": "yarn",
                "rope_factor": 4.0,
                "rope_original_tokens": 1024,
                "rope_beta_fast": 16.0,
                "rope_beta_slow": 1.0,
                "rope_attention_factor": 1.5,
                "context_tokens": 4096,
            },
        ),
        (LLAMA, {"rms_norm_eps": 1e-3}, {"norm_eps": 1e-3}),
        ("GPT2LMHeadModel", {"layer_norm_epsilon": 1e-3}, {"norm_eps": 1e-3}),
        ("BertForMaskedLM", {"layer_norm_eps": 1e-3}, {"norm_eps": 1e-3}),
        ("T5ForConditionalGeneration", {"layer_norm_epsilon": 1e-3}, {"norm_eps": 1e-3}),
        (LLAMA, {"attention_bias": True}, {"bias": "attention"}),
        (LLAMA, {"attention_bias": True, "mlp_bias": True}, {"bias": "on"}),
        (LLAMA, {"tie_word_embeddings": True, "attention_dropout": 0.1}, {"tied_head": "on", "dropout_frac": 0.1}),
        (LLAMA, {"hidden_act": "gelu_pytorch_tanh"}, {"activation": "geglu"}),
        (LLAMA, {"sliding_window": 4}, {}),
        (MISTRAL, {"sliding_window": None}, {"window_tokens": 0}),
        (MISTRAL, {"sliding_window": 7}, {"window_tokens": 7}),
        (QWEN, {"sliding_window": 7}, {}),
        (QWEN, {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 0}, {"window_tokens": 7}),
        (QWEN, {"use_sliding_window": True, "num_hidden_layers": 4, "max_window_layers": 4}, {"layers": 4}),
        (QWEN, {"use_sliding_window": True, "num_hidden_layers": 1, "layer_types": ["full_attention"]}, {"layers": 1}),
        ("GPT2LMHeadModel", {"n_embd": 64, "n_inner": None, "n_ctx": 512}, {"width": 64, "mlp_width": 256, "context_tokens": 512}),
        ("GPT2LMHeadModel", {"activation_function": "gelu", "n_inner": 9}, {"activation": "gelu", "mlp_width": 9}),
        ("BertForMaskedLM", {"hidden_act": "gelu_new", "type_vocab_size": 3}, {"activation": "gelu_tanh", "token_types": 3}),
        ("T5ForConditionalGeneration", {"num_layers": 3}, {"layers": 3, "decoder_layers": 3}),
        ("T5ForConditionalGeneration", {"num_heads": 4}, {"heads": 4}),  # each as wide as before
        ("T5ForConditionalGeneration", {"feed_forward_proj": "gated-gelu"}, {"activation": "geglu"}),
        ("T5ForConditionalGeneration", {"tie_word_embeddings": False}, {"tied_head": "off"}),
        # As transformers 5 writes a model whose output is not scaled.
        ("T5ForConditionalGeneration", {"tie_word_embeddings": True, "scale_decoder_outputs": False}, {"tied_head": "off"}),
        ("MT5ForConditionalGeneration", {"num_layers": 3, "d_ff": 7}, {"layers": 3, "decoder_layers": 3, "mlp_width": 7}),
        ("MT5ForConditionalGeneration", {"tie_word_embeddings": True, "transformers_version": "5.24.0"}, {}),
        ("MT5ForConditionalGeneration", {"tie_word_embeddings": True, "transformers_version": "4.57.1"}, {"tied_head": "on"}),
    ],
)  # fmt: skip
def test_config_styles(architecture: str, keys: dict[str, Any], expected: dict[str, Any]) -> None:
    assert read(architecture, **keys) == expected


@pytest.mark.parametrize(
    ("architecture", "keys", "words"),
    [
        (LLAMA, {"hidden_act": "swish2"}, r"hidden_act = 'swish2'.\n  Accepted: silu, swish"),
        (LLAMA, {"hidden_size": "64"}, r"hidden_size = '64'.\n  Accepted: a whole number"),
        (LLAMA, {"num_hidden_layers": 0}, r"num_hidden_layers = 0.\n  Accepted: a whole number, 1 or more"),
        (LLAMA, {"rms_norm_eps": "tiny"}, r"rms_norm_eps = 'tiny'.\n  Accepted: a number"),
        (LLAMA, {"attention_bias": "yes"}, r"attention_bias = 'yes'.\n  Accepted: true or false"),
        (LLAMA, {"rope_scaling": {"type": "longrope", "factor": 2.0}}, r"config.json, rope_scaling: rope_type = 'longrope'"),
        (LLAMA, {"rope_scaling": [1]}, r"rope_scaling = \[1\].\n  Accepted: an object"),
        (
            LLAMA,
            {"rope_parameters": {"full": {"rope_theta": 1.0}}},
            r"rope_parameters = .*\n  Accepted: one set of values for all layers",
        ),
        (LLAMA, {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, r"partial_rotary_factor = 0.5"),
        (LLAMA, {"partial_rotary_factor": 0.5}, r"partial_rotary_factor = 0.5"),
        (LLAMA, {"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": False}}, r"truncate = False"),
        (LLAMA, {"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": 0.7}}, r"mscale = 0.7"),
        (
            QWEN,
            {"use_sliding_window": True, "num_hidden_layers": 40},
            r"max_window_layers = 28.\n  Accepted: .* all layers or in none",
        ),
        (
            QWEN,
            {"use_sliding_window": True, "num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"]},
            r"layer_types = ",
        ),
        (
            "GPT2LMHeadModel",
            {"scale_attn_by_inverse_layer_idx": True},
            r"scale_attn_by_inverse_layer_idx = True.\n  Accepted: False",
        ),
        ("BertForMaskedLM", {"position_embedding_type": "relative_key"}, r"position_embedding_type = 'relative_key'"),
        ("BertForMaskedLM", {"is_decoder": True}, r"is_decoder = True"),
        ("BertForMaskedLM", {"tie_word_embeddings": False}, r"tie_word_embeddings = False"),
        ("T5ForConditionalGeneration", {"feed_forward_proj": "gated-relu"}, r"feed_forward_proj = 'gated-relu'"),
    ],
)
def test_what_has_no_counterpart_is_refused(architecture: str, keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fields(architecture, **keys)


@pytest.mark.parametrize("name", ["gpt", "bert", "t5"])
def test_auto_means_what_an_empty_config_means(name: str) -> None:
    """Defaults of the families here and of the classes there, written down apart, are those of the published models."""
    config = schema.base()
    config.model.update({"name": name, "vocab_size": 11, "width": 8, "heads": 2, "relative_max_tokens": 20})
    plain = models.build(config).config
    architecture = {"gpt": "GPT2LMHeadModel", "bert": "BertForMaskedLM", "t5": "T5ForConditionalGeneration"}[name]
    config.model.update({field: fields(architecture)[field] for field in ("norm_eps", "activation", "tied_head")})
    assert models.build(config).config == plain
    assert plain.norm_eps == {"gpt": 1e-5, "bert": 1e-12, "t5": 1e-6}[name]


def test_dropout_of_several_places_is_noted() -> None:
    given = Settings({"resid_pdrop": 0.2, "attn_pdrop": 0.0}, "config.json")
    assert families.find("GPT2LMHeadModel").read(given, "GPT2LMHeadModel")["dropout_frac"] == 0.2
    assert given.notes == [
        "model.dropout_frac = 0.2 stands for resid_pdrop 0.2, embd_pdrop 0.1, attn_pdrop 0; it matters in training alone"
    ]
