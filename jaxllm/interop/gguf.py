"""GGUF files of LLaMA-family models, as llama.cpp writes them: `read` makes them look like the files of transformers.

Two things differ. A tensor may be quantized: it is dequantized when it is read, one at a time. And in files of the architecture
"llama" the rows of q and k are in another order: llama.cpp rotates the pairs (2i, 2i + 1) of a head, transformers and we (i, i + K/2).
Letters: D width, H heads, G key/value heads, K head width, F mlp width, V vocabulary.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jaxllm import config as schema
from jaxllm.data.tokenizers.added import Added
from jaxllm.interop import directory, gguf_file, gguf_rope, gguf_tokenizer, gguf_vocabulary, gguf_write
from jaxllm.interop.gguf_file import File, Stored, listed
from jaxllm.interop.imported import Imported
from jaxllm.types import Tokenizer

# general.architecture -> whether the rows of q and k are in pairs. Mistral and SmolLM are "llama".
ARCHITECTURES = {"llama": True, "qwen2": False}
LAYER = "model.layers.{layer}"
NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "blk.{layer}.attn_norm.weight": f"{LAYER}.input_layernorm.weight",
    "blk.{layer}.ffn_norm.weight": f"{LAYER}.post_attention_layernorm.weight",
    **{
        f"blk.{{layer}}.{theirs}.{what}": f"{LAYER}.{name}_proj.{what}"
        for theirs, name in (
            *((f"attn_{x}", f"self_attn.{x}") for x in "qkv"),
            ("attn_output", "self_attn.o"),
            *((f"ffn_{x}", f"mlp.{x}") for x in ("gate", "up", "down")),
        )
        for what in ("weight", "bias")
    },
}
# Which biases there are -> model.bias.
BIASES = {"": "off", "qkv": "qkv", "qkvo": "attention", "gateupdown": "mlp", "qkvogateupdown": "on"}
PAIRED = re.compile(r"blk\.\d+\.attn_[qk]\.(weight|bias)")


class Tensors:
    """The tensors of the file under the names, and in the layout, of transformers (`imported.Tensors`)."""

    def __init__(self, stored: Mapping[str, tuple[str, Stored]], pairs: Mapping[str, int]) -> None:
        """stored: name in transformers -> name in the file, tensor. pairs: name in transformers -> heads whose rows are in pairs."""
        self._stored, self._pairs = stored, pairs
        self.shapes = {name: tensor.shape for name, (_, tensor) in stored.items()}
        self.dtypes = {name: str(gguf_file.FLOATS.get(tensor.kind, tensor.kind)) for name, (_, tensor) in stored.items()}

    def read(self, name: str) -> np.ndarray:
        array = self._stored[name][1].load()
        return halves(array, self._pairs[name]) if name in self._pairs else array


def halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows [H K, ...] of q or k, in each head in the order 0, K/2, 1, K/2 + 1, ..., put into the order 0, 1, 2, ..."""
    in_pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return in_pairs.swapaxes(1, 2).reshape(rows.shape)


def read(path: str | Path) -> Imported:
    """The model in the file at `path`, its tensors still on disk.

    ValueError for what is no GGUF file or is damaged, for an architecture, a storage type, rotary positions or a tokenizer that
    have no counterpart here, and for tensors that are missing, unexpected or of another shape than the metadata say.
    """
    file = gguf_file.read(path)
    _check_architecture(file)
    config = schema.base()
    config.model.update(_fields(file))
    config.data.row_tokens = min(config.model.context_tokens, directory.ROW_TOKENS)
    stored = _rename(file, config.model)
    described = gguf_tokenizer.read(file)
    if described is not None:
        config.tokenizer.kind, config.tokenizer.path = "file", str(file.path.absolute())
        directory.check_vocabulary(file.path, described.tokenizer, config.model.vocab_size)
    heads = {"q": config.model.heads, "k": config.model.kv_heads}
    in_pairs = ARCHITECTURES[file.get("general.architecture", str)]
    pairs = {name: heads[theirs.split("_")[1][0]] for name, (theirs, _) in stored.items() if in_pairs and PAIRED.fullmatch(theirs)}
    kinds = sorted({tensor.kind for _, tensor in stored.values() if tensor.kind not in gguf_file.FLOATS})
    return Imported(
        path=file.path,
        architecture=_class(config.model),
        config=config,
        tokenizer=None if described is None else described.tokenizer,
        tensors=Tensors(stored, pairs),
        files={} if described is None else described.files | {gguf_vocabulary.FILE: gguf_write.vocabulary(file)},
        notes=(f"weights stored as {', '.join(kinds)} are read as float32",) if kinds else (),
    )


def load_tokenizer(config: ConfigDict, texts: Callable[[], Iterable[str]], extra: Added) -> Tokenizer:
    """The tokenizer in the GGUF file `tokenizer.path`. The texts are not read, and nothing is added."""
    del texts, extra
    described = gguf_tokenizer.read(gguf_file.read(config.tokenizer.path))
    if described is None:
        raise ValueError(
            f"tokenizer.path = '{config.tokenizer.path}' has no tokenizer.\n  Accepted: a GGUF file with one.\n  Set tokenizer.path."
        )
    return described.tokenizer


def _check_architecture(file: File) -> None:
    name = file.get("general.architecture", str)
    if name in ARCHITECTURES:
        experts = file.get(f"{name}.expert_count", int, 0)
        if not experts:
            return
        what, hint = f"a mixture of {experts} experts", ""
    else:
        near = difflib.get_close_matches(name, ARCHITECTURES, n=1)
        what, hint = f"of the architecture '{name}'", f" The nearest is '{near[0]}'." if near else ""
    raise ValueError(
        f"the model in '{file.path}' is {what}.\n  Accepted: {', '.join(ARCHITECTURES)}, dense (LLaMA, Mistral, SmolLM, Qwen2 and"
        f" what is built like them).{hint}\n  Take another model."
    )


def _fields(file: File) -> dict[str, Any]:
    """The model section of our config."""
    name = file.get("general.architecture", str)
    heads, width = (file.get(f"{name}.{key}", int) for key in ("attention.head_count", "embedding_length"))
    head_dim = file.get(f"{name}.attention.key_length", int, width // heads)
    context = file.get(f"{name}.context_length", int)
    window = file.get(f"{name}.attention.sliding_window", int, 0)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (found := file.get(f"{name}.{key}", int, head_dim)) != head_dim:
            raise ValueError(
                f"'{file.path}' says {name}.{key} = {found} with heads {head_dim} wide.\n  Accepted: {head_dim}: values as wide as"
                " keys, and all of a head rotated.\n  Take another model."
            )
    rope = gguf_rope.fields(file, name, head_dim, context)
    return {
        "name": "llama",
        "layers": file.get(f"{name}.block_count", int),
        "width": width,
        "heads": heads,
        "kv_heads": file.get(f"{name}.attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "mlp_width": file.get(f"{name}.feed_forward_length", int),
        "vocab_size": _embedding(file).shape[0],
        "norm_eps": gguf_rope.decimal(file.get(f"{name}.attention.layer_norm_rms_epsilon", float)),
        "bias": _bias(file),
        "tied_head": "off" if "output.weight" in file.tensors else "on",
        "window_tokens": window if window < context else 0,
        "context_tokens": context,
        **rope,
    }


def _embedding(file: File) -> Stored:
    if "token_embd.weight" not in file.tensors:
        raise ValueError(
            f"'{file.path}' has no tensor token_embd.weight.\n  Accepted: a file with all weights of a model, not its vocabulary"
            " alone.\n  Take another file of the model."
        )
    return file.tensors["token_embd.weight"]


def _bias(file: File) -> str:
    present = [x for x in "qkv" if f"blk.0.attn_{x}.bias" in file.tensors]
    present += ["o"] * ("blk.0.attn_output.bias" in file.tensors)
    present += [x for x in ("gate", "up", "down") if f"blk.0.ffn_{x}.bias" in file.tensors]
    if "".join(present) not in BIASES:
        raise ValueError(
            f"'{file.path}' has biases for {', '.join(present)} only.\n  Accepted: none, q k v, q k v o, gate up down, or all.\n"
            "  Take another model."
        )
    return BIASES["".join(present)]


def _class(model: Any) -> str:
    """The class in transformers that a model with these fields is."""
    kind = "Qwen2" if model.bias == "qkv" else "Mistral" if model.window_tokens else "Llama"
    return f"{kind}ForCausalLM"


def _rename(file: File, model: Any) -> dict[str, tuple[str, Stored]]:
    """name in transformers -> (name in the file, tensor); ValueError that lists all that is missing, unexpected or mis-shaped."""
    expected = {
        theirs.format(layer=layer): (name.format(layer=layer), shape)
        for theirs, (name, shape) in _expected(model).items()
        for layer in (range(model.layers) if "{layer}" in theirs else [0])
    }
    present = {name: tensor for name, tensor in file.tensors.items() if name != gguf_rope.FACTORS}
    missing = [name for name in expected if name not in present]
    unexpected = [name for name in present if name not in expected]
    shapes = [
        f"{name} {present[name].shape} instead of {shape}"
        for name, (_, shape) in expected.items()
        if name in present and present[name].shape != shape
    ]
    if missing or unexpected or shapes:
        parts = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
        found = "".join(f"\n    {what}: {listed(names)}" for what, names in parts.items() if names)
        raise ValueError(
            f"the tensors in '{file.path}' are not those of the model that it describes:{found}\n  Accepted: exactly its tensors, of"
            " the shapes that its metadata say.\n  Take another file of the model."
        )
    return {name: (theirs, present[theirs]) for theirs, (name, _) in expected.items()}


def _expected(model: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
    """name in the file -> (name in transformers, shape) of every tensor that such a model has."""
    width, queries, keys = model.width, model.heads * model.head_dim, model.kv_heads * model.head_dim
    outputs = {"attn_q": queries, "attn_k": keys, "attn_v": keys, "attn_output": width}
    outputs |= {"ffn_gate": model.mlp_width, "ffn_up": model.mlp_width, "ffn_down": width}
    inputs = dict.fromkeys(outputs, width) | {"attn_output": queries, "ffn_down": model.mlp_width}
    biased = {"off": (), "qkv": ("attn_q", "attn_k", "attn_v"), "attention": tuple(outputs)[:4], "mlp": tuple(outputs)[4:]}
    has_bias = biased.get(model.bias, tuple(outputs))
    out: dict[str, tuple[str, tuple[int, ...]]] = {}
    for theirs, name in NAMES.items():
        part, _, what = theirs.removeprefix("blk.{layer}.").rpartition(".")
        if part in ("token_embd", "output"):
            if part == "token_embd" or model.tied_head == "off":
                out[theirs] = name, (model.vocab_size, width)
        elif part.endswith("norm"):
            out[theirs] = name, (width,)
        elif what == "weight":
            out[theirs] = name, (outputs[part], inputs[part])
        elif part in has_bias:
            out[theirs] = name, (outputs[part],)
    return out
