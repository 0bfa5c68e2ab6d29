"""llama.cpp loads the GGUF files that are written, and gives our logits, ids and text. `make parity-gguf`, as it needs a compiler."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import llama_cpp
import numpy as np
import pytest
import tiny_gguf
from ml_collections import ConfigDict
from random_run import write_run
from rich.console import Console

import jaxllm
from jaxllm import convert, models
from jaxllm.data.tokenizers.added import Added
from jaxllm.data.tokenizers.byte import ByteTokenizer
from jaxllm.interop import gguf_export, gguf_file, gguf_write
from jaxllm.types import Params, Tokenizer

sys.path.append(str(Path(__file__).resolve().parent.parent / "interop"))

import test_gguf_tokenizer as readers  # noqa: E402
import test_gguf_vocabulary as vocabularies  # noqa: E402
from test_gguf_export import SWITCHES, make_config  # noqa: E402

F32_CACHE = {"type_k": 0, "type_v": 0}
TOKENS = 48
# Largest difference of logits, in parts of the largest one. llama.cpp rounds the activations to the type of the weights, too.
ROUNDING = {"float32": 1e-5, "bfloat16": 3e-2, "float16": 3e-3, "q8_0": 5e-2}


def open_model(path: Path, **options: Any) -> llama_cpp.Llama:
    return llama_cpp.Llama(str(path), **{"n_ctx": 64, "verbose": False, "n_threads": 2, **F32_CACHE, **options})


def random_params(config: ConfigDict, seed: int) -> Params:
    """Weights of which none is 0 or 1."""
    params = models.build(config).init(jax.random.key(seed))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    return jax.tree.unflatten(
        tree, [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    )


def write(path: Path, config: ConfigDict, params: Params, tokenizer: Tokenizer, dtype: str = "float32") -> Path:
    plan = gguf_export.plan(params, models.build(config).config, tokenizer, {}, dtype=dtype, name=path.stem)
    gguf_write.write(path, plan.entries, plan.tensors, plan.make)
    return path


def difference(path: Path, config: ConfigDict, params: Params, count: int, **options: Any) -> float:
    """Of the logits of `count` random tokens, in parts of the largest one."""
    tokens = np.random.default_rng(3).integers(0, config.model.vocab_size, count)
    model = open_model(path, logits_all=True, **options)
    model.eval(tokens.tolist())
    expected = np.asarray(models.build(config).apply(params, tokens[None]))[0]
    return float(np.abs(np.array(model.scores[:count]) - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("name", ["plain", *SWITCHES])
def test_logits(tmp_path: Path, name: str, seed: int) -> None:
    fields = SWITCHES.get(name, {})
    config = make_config(**fields)
    params = random_params(config, seed)
    path = write(tmp_path / "tiny.gguf", config, params, ByteTokenizer())
    # What llama.cpp does not read, as the notes say.
    count = min(TOKENS, fields.get("window_tokens", TOKENS))
    options = {"yarn_beta_fast": fields["rope_beta_fast"]} if "rope_beta_fast" in fields else {}
    found = difference(path, config, params, count, **options)
    print(f"{name}: {found:.2e}")
    assert found < ROUNDING["float32"]


@pytest.mark.parametrize("dtype", gguf_write.KINDS)
def test_types(tmp_path: Path, dtype: str) -> None:
    """Against our logits of the weights as they are stored."""
    config = make_config(bias="qkv", tied_head="off")
    params = random_params(config, 0)
    path = write(tmp_path / "tiny.gguf", config, params, ByteTokenizer(), dtype)
    found = difference(path, config, gguf_export.as_stored(config, params, dtype), TOKENS)
    print(f"{dtype}: {found:.2e}")
    assert found < ROUNDING[dtype]


@pytest.mark.parametrize(
    ("dtype", "number"), [("float16", llama_cpp.LLAMA_FTYPE_MOSTLY_F16), ("q8_0", llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0)]
)
def test_bytes(tmp_path: Path, dtype: str, number: int) -> None:
    """llama.cpp's own program makes the same file of our float32."""
    config = make_config(bias="qkv", tied_head="off", rope_scaling="llama3", rope_factor=4.0)
    params = random_params(config, 0)
    exact, ours = (write(tmp_path / f"{kind}.gguf", config, params, ByteTokenizer(), kind) for kind in ("float32", dtype))
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.pure = number, True
    theirs = tmp_path / "theirs.gguf"
    assert llama_cpp.llama_model_quantize(str(exact).encode(), str(theirs).encode(), options) == 0
    found, expected = (gguf_file.read(path).tensors for path in (ours, theirs))
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor[:2] == expected[name][:2]
        np.testing.assert_array_equal(tensor.data, expected[name].data)


def tokenizers_to_compare() -> Iterator[tuple[str, Tokenizer]]:
    yield "bpe", vocabularies.BPE
    yield "bpe with sentinels", vocabularies.train(vocabularies.sentencepiece.train_bpe, extra=Added(mask=True, sentinels=3))
    yield "byte", ByteTokenizer()
    for prefix in (True, False):
        yield f"sentencepiece, {prefix}", vocabularies.spm(readers.spm_model(add_dummy_prefix=prefix))
    for prefix, normalizer in ((True, vocabularies.PREPEND), (False, vocabularies.REPLACE)):
        yield f"tokenizer.json of sentencepiece, {prefix}", vocabularies.llama2(None, normalizer)
    for name, (_, fields) in vocabularies.SPELLED.items():
        yield name, vocabularies.byte_level(**fields)
    for pre in ("default", "llama-bpe"):
        yield f"gguf, {pre}", readers.described(tiny_gguf.tokenizer_values(pre)).tokenizer


COMPARED = dict(tokenizers_to_compare())
LETTERS = (
    "aeht loswd<|>0123456789 \t\n\r'sSlL.,!-_(){}#/\\\u00a0\u3000\u00bd\u0662"
    "\u00e9\u00fc\u00df\u00e0\u0416\u65e5\u672c\ud55c\u05d0\u0928\u093f\U0001f642\u200d"
)


def texts() -> list[str]:
    """Those of the other tests, and random ones; characters in parts (NFC) and U+2581 are known to differ."""
    rng = np.random.default_rng(0)
    drawn = ["".join(rng.choice(list(LETTERS), rng.integers(1, 40))) for _ in range(400)]
    return [text for text in (*readers.TEXTS, *readers.CORPUS[:4], vocabularies.gguf_vocabulary.PROBE.replace("e\u0301", ""), *drawn)
            if "\u2581" not in text and "e\u0301" not in text]  # fmt: skip


@pytest.mark.parametrize("name", COMPARED)
def test_ids(tmp_path: Path, name: str) -> None:
    tokenizer: Any = COMPARED[name]
    config = make_config(layers=1, vocab_size=tokenizer.vocab_size + 3)
    path = write(tmp_path / "tiny.gguf", config, random_params(config, 0), tokenizer)
    model = open_model(path, vocab_only=True)
    for text in texts():
        assert model.tokenize(text.encode(), add_bos=False, special=False) == tokenizer.encode(text), repr(text)
    begins = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    assert model.tokenize(b"hello", add_bos=True, special=False) == [*begins, *tokenizer.encode("hello")]
    assert model.token_eos() == tokenizer.eos_id
    if special := getattr(tokenizer, "special_tokens", {}):
        text = "hello ".join(special)
        expected = tokenizer.encode_with_specials(text)
        assert model.tokenize(text.encode(), add_bos=False, special=True) == expected


@pytest.mark.parametrize("kind", ["bpe", "byte"])
def test_text_of_a_run(tmp_path: Path, kind: str) -> None:
    """Greedy completions of both, through the command."""
    run = write_run(tmp_path / "run", tokenizer__kind=kind, tokenizer__vocab_size=330)
    assert convert.convert(run, tmp_path / "run.gguf", "", None, Console(quiet=True), checked=True) == 0
    model, params, tokenizer = jaxllm.load(run)
    other = open_model(tmp_path / "run.gguf")
    for prompt in ("The", "1 + 1", "Gr\u00fc\u00dfe", ""):
        ours = jaxllm.generate(model, params, tokenizer, prompt, max_new_tokens=24, temperature=0)
        ids = other.tokenize(prompt.encode(), add_bos=True, special=False)
        theirs: list[int] = []
        for token in other.generate(ids, temp=0.0, repeat_penalty=1.0):
            if token == other.token_eos() or len(theirs) == 24:
                break
            theirs.append(token)
        before = tokenizer.encode(prompt)
        assert tokenizer.decode([*before, *theirs])[len(tokenizer.decode(before)) :] == ours
