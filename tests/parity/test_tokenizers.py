"""Tokenizers in the files of other tools, against AutoTokenizer: ids, and what stands before and behind a text."""

import json
from pathlib import Path
from typing import Any

import foreign_tokenizers
import pytest
import transformers
from ml_collections import ConfigDict

from jaxllm.data.chat import encoding
from jaxllm.data.tokenizers import file

# None begins with a space: transformers 5 puts no other one before it where SentencePiece does.
TEXTS = ["the cat", "the", "the\ncat  cat ", "Größe, 日本語 🙂", "cats"]
LLAMA3 = "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message.content + '</s>' }}{% endfor %}"


def both(folder: Path, files: dict[str, bytes], model_type: str) -> tuple[Any, Any]:
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    ours = file.load(ConfigDict({"tokenizer": {"path": str(folder)}}), list)
    return ours, transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("case", [case for case in foreign_tokenizers.CASES if case != "Llama 2"])
def test_ids_and_what_begins_a_text(case: str, tmp_path: Path) -> None:
    given = foreign_tokenizers.CASES[case]
    ours, theirs = both(tmp_path, given.files, given.model_type)
    for text in TEXTS:
        ids = ours.encode(text)
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids, text
        begun = ids if ours.bos_id is None else [ours.bos_id, *ids]
        whole = theirs(text)["input_ids"]
        assert whole[: len(begun)] == begun
        assert whole[len(begun) :] in ([], [ours.eos_id])


def test_a_bare_tokenizer_model(tmp_path: Path) -> None:
    """transformers 5 puts no bos before a text unless it is told to; transformers 4 did, and so do we."""
    ours, theirs = both(tmp_path, foreign_tokenizers.CASES["Llama 2"].files, "llama")
    assert theirs("the cat")["input_ids"] == ours.encode("the cat")
    assert ours.bos_id == theirs.bos_token_id


@pytest.mark.parametrize("frame", [None, foreign_tokenizers.template("<s>"), foreign_tokenizers.after_bytes])
def test_a_conversation_has_the_bos_of_its_template(frame: Any, tmp_path: Path) -> None:
    """And none before it, also where one begins a text."""
    files = foreign_tokenizers.tokenizer_json(frame, chat_template=LLAMA3)
    ours, theirs = both(tmp_path, files, "llama")
    messages = [{"role": "user", "content": "the cat"}]
    ids = encoding.encode(ours, messages)
    assert ids == theirs.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert ids.count(theirs.bos_token_id) == 1
