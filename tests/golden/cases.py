"""The models that golden files are made of: one case a switch that Hugging Face files can have. Needs transformers.

Sizes are the smallest at which nothing degenerates: heads in
groups, an inner width that is no multiple of the width, two layers, four rotary frequencies where these are scaled.
"""

from dataclasses import dataclass, field
from typing import Any

import transformers

VOCAB = 32
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
# With a base of 100 the four wavelengths are 6, 20, 63 and 199 tokens: shorter than, about as long as and longer than 32 / 4 and 32.
SCALED = {**LLAMA, "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
BERT = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 24,
    "type_vocab_size": 2,
}
T5 = {
    "vocab_size": VOCAB,
    "decoder_start_token_id": 0,
    "d_model": 12,
    "d_kv": 4,
    "d_ff": 20,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 3,
}


def rope(kind: str, **fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 100.0, **fields}}


@dataclass(frozen=True)
class Case:
    """One directory: a model class, its config's fields, and what is drawn from `seed`: weights, rows and prompts of these lengths.

    Seeds of the cases with prompts are chosen so that some searches end with eos and others do not, and that their settings matter.
    """

    model: str
    fields: dict[str, Any]
    tokens: tuple[int, ...] = (12, 9)
    target_tokens: tuple[int, ...] = (9, 6)  # of an encoder-decoder
    prompt_tokens: tuple[int, ...] = ()
    seed: int = 0
    config: dict[str, Any] = field(default_factory=dict)  # written into config.json over what transformers writes

    def make_config(self) -> Any:
        cls = getattr(transformers, self.model).config_class
        return cls(**self.fields, attn_implementation="eager")


CASES = {
    "gpt2": Case(
        "GPT2LMHeadModel",
        {
            "vocab_size": VOCAB,
            "n_embd": 16,
            "n_inner": 20,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 32,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        prompt_tokens=(3, 5),
        seed=9,
    ),
    "llama": Case("LlamaForCausalLM", LLAMA, prompt_tokens=(3, 5), seed=4),
    "llama_head_dim": Case("LlamaForCausalLM", {**LLAMA, "head_dim": 6, "tie_word_embeddings": True}),
    "llama_bias": Case("LlamaForCausalLM", {**LLAMA, "attention_bias": True, "mlp_bias": True}),
    "llama_attention_bias": Case("LlamaForCausalLM", {**LLAMA, "attention_bias": True, "tie_word_embeddings": True}),
    "rope_linear": Case("LlamaForCausalLM", {**SCALED, **rope("linear", factor=4.0)}),
    "rope_dynamic": Case(
        "LlamaForCausalLM", {**SCALED, "max_position_embeddings": 10, **rope("dynamic", factor=2.0)}, tokens=(16, 4)
    ),
    "rope_llama3": Case(
        "LlamaForCausalLM",
        {
            **SCALED,
            "max_position_embeddings": 128,
            **rope("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32),
        },
    ),
    "rope_yarn": Case(
        "LlamaForCausalLM",
        {**SCALED, "max_position_embeddings": 128, **rope("yarn", factor=4.0, original_max_position_embeddings=32)},
    ),
    "mistral": Case("MistralForCausalLM", {**LLAMA, "sliding_window": 4}, tokens=(16, 11)),
    "qwen2": Case("Qwen2ForCausalLM", {**LLAMA, "tie_word_embeddings": True}),
    "bert_mlm": Case("BertForMaskedLM", BERT),
    "bert_sequence": Case("BertForSequenceClassification", {**BERT, "num_labels": 3}),
    "bert_token": Case("BertForTokenClassification", {**BERT, "num_labels": 5}),
    "bert_base": Case("BertModel", BERT),
    "t5": Case("T5ForConditionalGeneration", T5, tokens=(24, 17), target_tokens=(20, 13), prompt_tokens=(6, 9), seed=5),
    "t5_v1_1": Case(
        "T5ForConditionalGeneration",
        {
            **T5,
            "feed_forward_proj": "gated-gelu",
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 12,
            "tie_word_embeddings": False,
        },
        tokens=(16, 11),
        prompt_tokens=(6, 9),
        config={"tie_word_embeddings": False},
    ),
    "t5_inner": Case("T5ForConditionalGeneration", {**T5, "num_heads": 2, "d_kv": 8, "num_decoder_layers": 1}),
}
