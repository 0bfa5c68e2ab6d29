"""GGUF files that llama.cpp and Ollama load, of models of the LLaMA family: the inverse of `gguf.read`."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from jaxllm import models
from jaxllm.interop import families, gguf, gguf_rope, gguf_vocabulary, gguf_write, llama, weights
from jaxllm.interop.family import limit
from jaxllm.interop.imported import Imported
from jaxllm.models.architecture import Architecture
from jaxllm.types import Params, Tokenizer

THEIRS = {name: theirs for theirs, name in gguf.NAMES.items()}
# Where a name (general.name) has one of these, llama.cpp treats the tokenizer as that of Phi-3, and fails if it is another one.
RESERVED = ("phi-3", "phi3")
# Version of ggml's quantized types.
QUANTIZATION_VERSION = 2


class Plan(NamedTuple):
    """A model as a GGUF file. architecture: general.architecture. make(name) -> the tensor, of its planned shape.
    notes: lines for the user about what llama.cpp does in another way."""

    architecture: str
    entries: list[bytes]
    tensors: Mapping[str, gguf_write.Planned]
    make: Callable[[str], np.ndarray]
    notes: tuple[str, ...]


def plan(
    params: Params, arch: Architecture, tokenizer: Tokenizer | None, carried: Mapping[str, bytes], *, dtype: str, name: str
) -> Plan:
    """What `gguf_write.write` writes; nothing is computed yet. dtype: of the matrices, a key of gguf_write.KINDS; vectors are float32.

    carried: files of the model that this one comes from; name: general.name. ValueError for a model that no architecture of GGUF files
    known here can hold, with the fields that differ, for a tokenizer that llama.cpp lacks, and for rows that make no blocks.
    """
    _check(arch)
    architecture = _architecture(arch)
    vocabulary = gguf_vocabulary.make(tokenizer, carried, arch.vocab_size)
    values = _values(arch, architecture, dtype, name)
    exported = weights.export(params, families.choose(arch), arch)
    theirs = {_rename(ours): ours for ours in exported.shapes}
    tensors = {new: _planned(exported.shapes[ours], dtype) for new, ours in theirs.items()}
    divisors = gguf_rope.divisors(arch)
    if divisors is not None:
        tensors[gguf_rope.FACTORS] = gguf_write.Planned(divisors.shape, "F32")
    _check_blocks(tensors)

    def make(wanted: str) -> np.ndarray:
        if wanted == gguf_rope.FACTORS and divisors is not None:
            return divisors
        tensor = exported.make(theirs[wanted])
        if not (gguf.ARCHITECTURES[architecture] and gguf.PAIRED.fullmatch(wanted)):
            return tensor
        return pairs(tensor, arch.heads if ".attn_q." in wanted else arch.kv_heads)

    entries = [gguf_write.entry(key, value) for key, value in values.items()] + list(vocabulary.entries.values())
    return Plan(architecture, entries, tensors, make, (*_notes(arch), *vocabulary.notes))


def as_stored(config: ConfigDict, params: Params, dtype: str) -> Params:
    """The parameters after a way through a file of this dtype: rounded, with vectors as they are."""
    arch = models.build(config).config
    architecture = families.choose(arch)
    exported = weights.export(params, architecture, arch)
    return weights.load(Imported(Path(), architecture, config, None, _Stored(exported, dtype))).params


class _Stored:
    """Tensors that are stored as they are read (`imported.Tensors`)."""

    def __init__(self, exported: weights.Exported, dtype: str) -> None:
        self._make = exported.make
        self.shapes = exported.shapes
        self.dtypes = {name: _planned(shape, dtype).kind for name, shape in exported.shapes.items()}

    def read(self, name: str) -> np.ndarray:
        return gguf_write.store(name, self._make(name), self.dtypes[name]).load()


def pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows [H K, ...] of q or k put into the order 0, K/2, 1, K/2 + 1, ... in each head: the inverse of `gguf.halves`."""
    in_halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return in_halves.swapaxes(1, 2).reshape(rows.shape)


def _check(arch: Architecture) -> None:
    """ValueError that lists what no architecture known here can express."""
    # What llama.cpp has less of than transformers overrides what both lack.
    stricter = limit(arch, ("gpt", "llama"), head=("lm",), activation=("swiglu",))
    limits = {field: (value, accepted) for field, value, accepted in (*llama.limits(arch), *stricter)}
    scaling = arch.rope_scaling.kind if arch.rope_scaling else "none"
    if scaling not in (known := (*gguf_rope.KINDS, "llama3")):
        limits["model.rope_scaling"] = scaling, ", ".join(known)
    if limits:
        listed = "".join(f"\n  {field} = {value}; GGUF has {has}" for field, (value, has) in limits.items())
        raise ValueError(
            f"no architecture of GGUF files that is known here is this model (model.name = '{arch.family.name}'). LLaMA's differs"
            f" in:{listed}\n  Accepted: models that are LLaMA or Qwen2 in all of this.\n  Train one of these, or write --format hf"
            " and let llama.cpp's convert_hf_to_gguf.py try."
        )


def _architecture(arch: Architecture) -> str:
    """qwen2 where llama.cpp's own is this model: it has biases of q, k and v alone, heads that fill the width, no divisors."""
    fills = arch.heads * arch.head_dim == arch.width
    plain = arch.rope_scaling is None or arch.rope_scaling.kind != "llama3"
    return "qwen2" if arch.biased - {"norm"} == {"qkv"} and fills and plain else "llama"


def _values(arch: Architecture, architecture: str, dtype: str, name: str) -> dict[str, Any]:
    """The metadata of the model, without those of its tokenizer."""
    sizes = {
        "vocab_size": arch.vocab_size,
        "context_length": arch.context_tokens,
        "embedding_length": arch.width,
        "block_count": arch.layers,
        "feed_forward_length": arch.mlp_width,
        "attention.head_count": arch.heads,
        "attention.head_count_kv": arch.kv_heads,
        "attention.key_length": arch.head_dim,
        "attention.value_length": arch.head_dim,
        "attention.layer_norm_rms_epsilon": float(arch.norm_eps),
        **({"attention.sliding_window": arch.window_tokens} if arch.window_tokens else {}),
    }
    return {
        "general.architecture": architecture,
        "general.type": "model",
        **({} if any(word in name.lower() for word in RESERVED) else {"general.name": name}),
        "general.file_type": gguf_write.LAYOUTS[gguf_write.KINDS[dtype]][1],
        "general.quantization_version": QUANTIZATION_VERSION,
        "general.alignment": gguf_write.ALIGNMENT,
        **{f"{architecture}.{key}": value for key, value in sizes.items()},
        **gguf_rope.values(arch, architecture),
    }


def _rename(ours: str) -> str:
    """The name in a GGUF file of a tensor of transformers."""
    layer = re.search(r"\.layers\.(\d+)\.", ours)
    if layer is None:
        return THEIRS[ours]
    return THEIRS[ours.replace(layer[0], ".layers.{layer}.", 1)].format(layer=layer[1])


def _planned(shape: tuple[int, ...], dtype: str) -> gguf_write.Planned:
    return gguf_write.Planned(shape, gguf_write.KINDS[dtype] if len(shape) > 1 else "F32")


def _check_blocks(tensors: Mapping[str, gguf_write.Planned]) -> None:
    for name, planned in tensors.items():
        block = gguf_write.LAYOUTS[planned.kind][2]
        if planned.shape[-1] % block:
            raise ValueError(
                f"--dtype q8_0: rows of {name} have {planned.shape[-1]} numbers.\n  Accepted: a multiple of {block}, the numbers of a"
                " block.\n  Use --dtype float16, bfloat16 or float32."
            )


def _notes(arch: Architecture) -> tuple[str, ...]:
    """What llama.cpp computes otherwise, for all that the file says."""
    notes = []
    scaling = arch.rope_scaling
    if 0 < arch.window_tokens < arch.context_tokens:
        window = arch.window_tokens
        notes.append(f"llama.cpp passes over the sliding window of such models: its results are equal up to {window} tokens")
    if scaling and scaling.kind == "yarn" and (scaling.beta_fast, scaling.beta_slow) != (32, 1):
        betas = f"--yarn-beta-fast {scaling.beta_fast:g} --yarn-beta-slow {scaling.beta_slow:g}"
        notes.append(f"llama.cpp does not read the betas of yarn: run it with {betas}")
    if arch.bidirectional_prompt:
        notes.append("llama.cpp attends causally to a prompt, whose tokens see each other in prefix_lm")
    return tuple(notes)
