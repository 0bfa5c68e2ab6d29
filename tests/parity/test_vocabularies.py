"""Real vocabularies in GGUF files, with the ids that the tokenizers they were converted from give to 47 texts.

`make vocabularies` fetches the files (they come with llama.cpp) and sets JAXLLM_VOCABULARIES to their folder.
"""

import itertools
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ml_collections import ConfigDict

from jaxllm.data.chat import answers, encoding, render
from jaxllm.data.tokenizers import file as tokenizer_file
from jaxllm.data.tokenizers.chat_template import ChatTemplate
from jaxllm.interop import gguf_file, gguf_tokenizer

FOLDER = Path(os.environ.get("JAXLLM_VOCABULARIES", "set JAXLLM_VOCABULARIES to the folder of the ggml-vocab files"))
BORDER = "\n__ggml_vocab_test__\n"
# bos (None where none begins a text), eos, pad (0 where there is none), number of tokens. By the metadata of each file.
SPECIAL = {
    "llama-spm": (1, 2, 0, 32000),
    "llama-bpe": (128000, 128001, 0, 128256),
    "qwen2": (None, 151643, 151643, 151936),
    "deepseek-llm": (100000, 100001, 100001, 102400),
    "deepseek-coder": (32013, 32014, 32014, 32256),
    "phi-3": (1, 32000, 32000, 32064),
    "gpt-2": (None, 50256, 0, 50257),
    "falcon": (None, 11, 0, 65024),
    "mpt": (None, 0, 0, 50432),
    "starcoder": (None, 0, 0, 49152),
    "refact": (None, 0, 0, 49216),
    "command-r": (5, 255001, 0, 256000),
}
# Without texts of their own.
BARE = {"aquila": (None, 0, 0, 100008), "baichuan": (1, 2, 0, 64000), "gpt-neox": (None, 0, 0, 50432)}
REFUSED = {
    "bert-bge": "model = 'bert'",
    "gemma-4": "model = 'gemma4'",
    "nomic-bert-moe": "model = 't5'",
    "qwen35": "pre = 'qwen35'",
}
# Of SentencePiece: it reads its own mark of a space as one, and writes U+2047 for what it does not know.
SPACED = ("llama-spm", "phi-3", "baichuan")
MORE = ["", " ", "Grüße aus Köln, naïve café: ½ ÷ ø \u2581 \x00", "日本語 🙂 and\r\n\t\u00a0tabs", "x" * 3000 + " " * 300]


def path(name: str) -> Path:
    return FOLDER / f"ggml-vocab-{name}.gguf"


def described(name: str) -> gguf_tokenizer.Described:
    found = gguf_tokenizer.read(gguf_file.read(path(name)))
    assert found is not None
    return found


def vectors(name: str) -> tuple[list[str], list[list[int]]]:
    texts = Path(f"{path(name)}.inp").read_bytes().decode().split(BORDER)
    lines = Path(f"{path(name)}.out").read_text().split("\n")
    return texts, [[int(number) for number in line.split()] for line in lines]


def special(tokenizer: Any) -> tuple[Any, ...]:
    return tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size


@pytest.mark.parametrize("name", SPECIAL)
def test_ids(name: str, tmp_path: Path) -> None:
    """As given, alone and in a batch; the texts come back; and all of it again through the files that are written for other tools."""
    found = described(name)
    texts, expected = vectors(name)
    assert len(texts) == len(expected) == 47
    for part, data in found.files.items():
        (tmp_path / part).write_bytes(data)
    again = tokenizer_file.load(ConfigDict({"tokenizer": {"path": str(tmp_path)}}), list)
    for tokenizer in (found.tokenizer, again):
        assert tokenizer.encode_batch(texts) == expected
        for text, ids in zip(texts, expected, strict=True):
            assert tokenizer.encode(text) == ids, text
            assert tokenizer.decode(ids) == text
        for text in MORE:
            assert tokenizer.decode(tokenizer.encode(text)) == (text.replace("\u2581", " ") if name in SPACED else text)
        assert special(tokenizer) == SPECIAL[name]


@pytest.mark.parametrize("name", SPECIAL | BARE)
def test_special_tokens(name: str) -> None:
    """A text that spells one is text, unless it is meant; then it is one id, which decodes to nothing."""
    tokenizer: Any = described(name).tokenizer
    assert special(tokenizer) == (SPECIAL | BARE)[name]
    assert tokenizer.special_tokens
    for token, index in tokenizer.special_tokens.items():
        ids = tokenizer.encode_with_specials(f"the{token}cat")
        assert ids == [*tokenizer.encode("the"), index, *tokenizer.encode("cat")], token
        assert index not in tokenizer.encode(f"the{token}cat")
        assert tokenizer.decode(ids).replace(" ", "") == ("the\u2047cat" if token == "<unk>" and name in SPACED else "thecat")


@pytest.mark.parametrize("name", BARE)
def test_texts_come_back(name: str) -> None:
    tokenizer = described(name).tokenizer
    for text in vectors("gpt-2")[0]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


TALKS = [
    [{"role": "user", "content": "What is 2+2?"}],
    [
        {"role": "system", "content": " Be brief. "},
        {"role": "user", "content": "Hi!\n"},
        {"role": "assistant", "content": "<think>x</think> Hello."},
        {"role": "user", "content": "1 < 2 & 'é'?"},
    ],
]


def test_chat_templates() -> None:
    """70 real ones, rendered as transformers renders them, or refused as there."""
    theirs = pytest.importorskip("transformers.utils.chat_template_utils").render_jinja_template
    paths = sorted((FOLDER / "templates").glob("*.jinja"))
    assert len(paths) == 70
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    for path, messages, begin in itertools.product(paths, TALKS, (True, False)):
        template = ChatTemplate(path.read_text(encoding="utf-8"), names)
        try:
            expected = theirs([messages], chat_template=template.text, add_generation_prompt=begin, **names)[0][0]
        except Exception:
            with pytest.raises(ValueError, match="does not accept this conversation"):
                render.render(template, messages, add_generation_prompt=begin)
        else:
            assert render.render(template, messages, add_generation_prompt=begin) == expected, path.name


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    with pytest.raises(ValueError, match=rf"tokenizer.ggml.{REFUSED[name]}, whose rules are not known[\s\S]*Accepted: "):
        described(name)


@pytest.mark.parametrize("name", ["gpt-2", "llama-bpe", "qwen2", "deepseek-llm", "deepseek-coder", "command-r"])
def test_transformers_reads_what_is_written(name: str, tmp_path: Path) -> None:
    """The same ids, with the bos that begins a text."""
    transformers = pytest.importorskip("transformers")
    found = described(name)
    for part, data in found.files.items():
        (tmp_path / part).write_bytes(data)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    before = [] if found.tokenizer.bos_id is None else [found.tokenizer.bos_id]
    for text, ids in zip(*vectors(name), strict=True):
        assert theirs(text)["input_ids"] == before + ids


EXCHANGE = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "It is a."}]


def test_answers_of_real_templates() -> None:
    """An answer is found whole, with what ends it, or refused with the reason; of 70 templates 47 can be trained on one turn, 42 on two.

    The others ask for reasoning that an answer does not begin with, end an answer by the next question, or want tools.
    """
    found = {1: 0, 2: 0}
    for path, turns in itertools.product(sorted((FOLDER / "templates").glob("*.jinja")), found):
        template = ChatTemplate(path.read_text(encoding="utf-8"), {"bos_token": "<s>", "eos_token": "</s>"})
        messages = EXCHANGE * turns
        try:
            text = render.render(template, messages, add_generation_prompt=False)
            spelled = {"</s>", *re.findall(r"<[^<>\s]{1,40}>|\[/?[A-Z_]+\]", text)} - {"<think>", "</think>"}
            tokens = {token: index for index, token in enumerate(sorted(spelled))}
            talker: Any = SimpleNamespace(
                template=template, special_tokens=tokens, added_tokens=tokens, eos_id=tokens["</s>"], other_stop_ids=()
            )
            ends = encoding.answer_ends(talker)
            written, spans = answers.find(template, messages, ends)
        except ValueError:
            continue
        found[turns] += 1
        assert written == text and len(spans) == turns
        for start, stop in spans:
            assert text[start:stop].count("It is a.") == 1 and text[start:stop].endswith(tuple(ends)), path.name
            assert "What is it?" not in text[start:stop]
    assert found == {1: 47, 2: 42}
