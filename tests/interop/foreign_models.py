"""Tiny random models of every family, and a hand-written directory of one of them."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from jaxllm import config as schema
from jaxllm import models
from jaxllm.types import Model, Params

SIZES = {"layers": 2, "width": 8, "heads": 4, "mlp_width": 12, "context_tokens": 16, "vocab_size": 11, "norm_eps": 1e-3}
GPT = {"name": "gpt", "init_std": 0.05}
LLAMA = {"name": "llama", "kv_heads": 2, "head_dim": 6, "init_std": 0.05}
CLASSIFY = {"head": "classify", "classes": 3}
# name -> (class in transformers, fields of config.model)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", GPT),
    "gpt2 untied": ("GPT2LMHeadModel", GPT | {"tied_head": "off", "activation": "gelu"}),
    "gpt2 classes": ("GPT2ForSequenceClassification", GPT | CLASSIFY),
    "llama": ("LlamaForCausalLM", LLAMA),
    "llama tied": ("LlamaForCausalLM", LLAMA | {"tied_head": "on", "activation": "geglu"}),
    "llama biases": ("LlamaForCausalLM", LLAMA | {"bias": "on"}),
    "llama3": ("LlamaForCausalLM", LLAMA | {"rope_scaling": "llama3", "rope_factor": 8.0, "rope_original_tokens": 4}),
    "llama yarn": (
        "LlamaForCausalLM",
        LLAMA | {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_tokens": 4, "rope_attention_factor": 1.2},
    ),
    "llama dynamic": ("LlamaForCausalLM", LLAMA | {"rope_scaling": "dynamic", "rope_factor": 4.0, "rope_original_tokens": 4}),
    "llama linear": ("LlamaForCausalLM", LLAMA | {"rope_scaling": "linear", "rope_factor": 2.0, "rope_theta": 5e5}),
    "llama classes": ("LlamaForSequenceClassification", LLAMA | CLASSIFY),
    "mistral": ("MistralForCausalLM", LLAMA | {"window_tokens": 5}),
    "qwen2": ("Qwen2ForCausalLM", LLAMA | {"bias": "qkv"}),
    "qwen2 window": ("Qwen2ForCausalLM", LLAMA | {"bias": "qkv", "window_tokens": 5}),
    "bert": ("BertForMaskedLM", {"name": "bert"}),
    "bert classes": ("BertForSequenceClassification", {"name": "bert"} | CLASSIFY),
    "bert tags": ("BertForTokenClassification", {"name": "bert", "head": "tag", "classes": 3}),
    "bert alone": ("BertModel", {"name": "bert", "head": "none", "token_types": 3}),
    "t5": ("T5ForConditionalGeneration", {"name": "t5", "head_dim": 6, "decoder_layers": 3}),
    "t5 1.1": ("T5ForConditionalGeneration", {"name": "t5", "activation": "geglu", "tied_head": "off", "relative_buckets": 8}),
}


def make(fields: dict[str, Any], **more: Any) -> tuple[Any, Model, Params]:
    """(config, model, params): normal numbers, each of its own, without compiling anything."""
    config = schema.base()
    config.model.update(SIZES | fields | more)
    model = models.build(config)
    rng = np.random.default_rng(0)
    template = jax.eval_shape(model.init, jax.random.key(0))
    return config, model, jax.tree.map(lambda leaf: jax.numpy.asarray(rng.normal(size=leaf.shape), "float32"), template)


# A LLaMA whose files are written by hand, with the library of the format.
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-5,
}


def llama_tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    shapes = {"model.embed_tokens.weight": (11, 8), "model.norm.weight": (8,), "lm_head.weight": (11, 8)}
    for layer in range(2):
        name = f"model.layers.{layer}"
        shapes |= {f"{name}.self_attn.{x}_proj.weight": (4 if x in "kv" else 8, 8) for x in "qkvo"}
        shapes |= {f"{name}.mlp.{x}_proj.weight": (12, 8) for x in ("gate", "up")} | {f"{name}.mlp.down_proj.weight": (8, 12)}
        shapes |= {f"{name}.{x}_layernorm.weight": (8,) for x in ("input", "post_attention")}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def write_llama(directory: Path, tensors: dict[str, np.ndarray] | None = None, **keys: Any) -> Path:
    """The directory; `keys` change its config.json, a value of ... takes the key out."""
    directory.mkdir(parents=True, exist_ok=True)
    values = {key: value for key, value in (CONFIG | keys).items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(values))
    save_file(llama_tensors() if tensors is None else tensors, directory / "model.safetensors", {"format": "pt"})
    return directory
