"""A small LLaMA in a GGUF file, written as llama.cpp's converter does it, and the same weights as our parameters."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

LAYERS, WIDTH, HEADS, KV_HEADS, HEAD_DIM, MLP, VOCAB, CONTEXT = 2, 64, 4, 2, 16, 96, 300, 64
THETA, EPS = 50000.0, 1e-5
TEMPLATE = (
    "{% for message in messages %}{{ '<|start|>' + message['role'] + '\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
SPECIALS = ("<|text|>", "<|start|>", "<|end|>")


def byte_letters() -> list[str]:
    """The visible character that byte-level vocabularies spell each byte with (Radford et al. 2019, GPT-2's encoder.py)."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    spelled = {byte: chr(byte) for byte in visible} | {byte: chr(256 + order) for order, byte in enumerate(hidden)}
    return [spelled[byte] for byte in range(256)]


MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or", "l d", "Ġwor ld", "1 2", "12 3", "Ã ©", "Ġ Ġ"]
TOKENS = [*SPECIALS, *byte_letters(), *(merge.replace(" ", "") for merge in MERGES)]


def tokenizer_values(pre: str | None = "gpt-2", **changes: Any) -> dict[str, Any]:
    """Metadata of a byte-level tokenizer; `changes` replaces values or (None) leaves them out."""
    values = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3] * len(SPECIALS) + [1] * (len(TOKENS) - len(SPECIALS)),
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }
    values |= {f"tokenizer.{key}": value for key, value in changes.items()}
    return {key: value for key, value in values.items() if value is not None}


def model_values(architecture: str = "llama", **changes: Any) -> dict[str, Any]:
    """Metadata of the model; `changes` by the part of the key behind the architecture, with __ for dots."""
    values = {
        "block_count": LAYERS,
        "context_length": CONTEXT,
        "embedding_length": WIDTH,
        "feed_forward_length": MLP,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.layer_norm_rms_epsilon": EPS,
        "rope.freq_base": THETA,
        "rope.dimension_count": HEAD_DIM,
    }
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    return {f"{architecture}.{key}": value for key, value in values.items() if value is not None}


def tensors(rng: np.random.Generator, *, tied: bool = True, bias: bool = False) -> dict[str, np.ndarray]:
    """Weights by their names in GGUF files, [outputs, inputs], with q and k in the order of transformers."""

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(0, 0.1, shape).astype(np.float32)

    out = {"token_embd.weight": normal(VOCAB, WIDTH), "output_norm.weight": 1 + normal(WIDTH)}
    if not tied:
        out["output.weight"] = normal(VOCAB, WIDTH)
    for layer in range(LAYERS):
        rows = {"q": HEADS * HEAD_DIM, "k": KV_HEADS * HEAD_DIM, "v": KV_HEADS * HEAD_DIM}
        out |= {f"blk.{layer}.attn_{x}.weight": normal(count, WIDTH) for x, count in rows.items()}
        out |= {f"blk.{layer}.attn_{x}.bias": normal(count) for x, count in rows.items() if bias}
        out[f"blk.{layer}.attn_output.weight"] = normal(WIDTH, HEADS * HEAD_DIM)
        out |= {f"blk.{layer}.ffn_{x}.weight": normal(MLP, WIDTH) for x in ("gate", "up")}
        out[f"blk.{layer}.ffn_down.weight"] = normal(WIDTH, MLP)
        out |= {f"blk.{layer}.{x}_norm.weight": 1 + normal(WIDTH) for x in ("attn", "ffn")}
    return out


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """What the converter does to q and k of a "llama": feature i and i + K/2 of a head become rows 2i and 2i + 1."""
    out = np.empty_like(rows)
    size = rows.shape[0] // heads
    for head in range(heads):
        for i in range(size // 2):
            out[head * size + 2 * i] = rows[head * size + i]
            out[head * size + 2 * i + 1] = rows[head * size + i + size // 2]
    return out


def stored(weights: Mapping[str, np.ndarray], architecture: str = "llama") -> dict[str, np.ndarray]:
    """The weights as a file of this architecture has them."""
    if architecture != "llama":
        return dict(weights)
    heads = {"attn_q": HEADS, "attn_k": KV_HEADS}
    parts = {name: name.split(".")[2] if name.startswith("blk") else "" for name in weights}
    return {name: permute(array, heads[parts[name]]) if parts[name] in heads else array for name, array in weights.items()}


def write(
    path: Path,
    weights: Mapping[str, np.ndarray],
    values: Mapping[str, Any],
    *,
    architecture: str = "llama",
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
) -> Path:
    """Writes the file; matrices are stored as `kind`, vectors as float32."""
    writer = gguf.GGUFWriter(path, architecture)
    adders = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in values.items():
        adders[type(value)](key, value)
    for name, array in weights.items():
        chosen = kind if array.ndim == 2 and array.dtype == np.float32 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(array, chosen), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def params(weights: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Our parameter tree of these weights (layers unrolled), by hand: kernels are [inputs, outputs], split into heads."""

    def kernel(name: str, *shape: int) -> dict[str, np.ndarray]:
        out = {"kernel": weights[f"{name}.weight"].T.reshape(shape)}
        return out | ({"bias": weights[f"{name}.bias"].reshape(shape[1:])} if f"{name}.bias" in weights else {})

    def layer(blk: str) -> dict[str, Any]:
        return {
            "attention": {
                "norm": {"scale": weights[f"{blk}.attn_norm.weight"]},
                "q": kernel(f"{blk}.attn_q", WIDTH, HEADS, HEAD_DIM),
                "k": kernel(f"{blk}.attn_k", WIDTH, KV_HEADS, HEAD_DIM),
                "v": kernel(f"{blk}.attn_v", WIDTH, KV_HEADS, HEAD_DIM),
                "o": {"kernel": weights[f"{blk}.attn_output.weight"].T.reshape(HEADS, HEAD_DIM, WIDTH)},
            },
            "mlp": {
                "norm": {"scale": weights[f"{blk}.ffn_norm.weight"]},
                "gate": kernel(f"{blk}.ffn_gate", WIDTH, MLP),
                "up": kernel(f"{blk}.ffn_up", WIDTH, MLP),
                "down": kernel(f"{blk}.ffn_down", MLP, WIDTH),
            },
        }

    out = {
        "embed": {"tokens": weights["token_embd.weight"]},
        "layers": [layer(f"blk.{index}") for index in range(LAYERS)],
        "norm": {"scale": weights["output_norm.weight"]},
    }
    return out | ({"head": {"kernel": weights["output.weight"]}} if "output.weight" in weights else {})
