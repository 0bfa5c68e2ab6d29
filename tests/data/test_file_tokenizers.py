"""Tokenizers in the files of other tools: what begins a text, and which special tokens there are."""

import json
from pathlib import Path
from typing import Any

import foreign_tokenizers
import pytest
import tokenizers
from ml_collections import ConfigDict
from tokenizers import processors

from jaxllm.data import tokenize
from jaxllm.data.tokenizers import file


def load(folder: Path, files: dict[str, bytes]) -> Any:
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return file.load(ConfigDict({"tokenizer": {"path": str(folder)}}), list)


@pytest.mark.parametrize("case", foreign_tokenizers.CASES)
def test_what_begins_a_text(case: str, tmp_path: Path) -> None:
    given = foreign_tokenizers.CASES[case]
    found = load(tmp_path, given.files)
    made = getattr(found, "tokenizer", None) or found.processor
    spell = getattr(made, "id_to_token", None) or made.id_to_piece
    assert (None if found.bos_id is None else spell(found.bos_id)) == given.begins
    # What a text is encoded to has nothing around it.
    assert found.decode(found.encode("the cat")) == "the cat"
    assert len(found.encode("the cat")) <= 5
    found.save(str(tmp_path / "saved"))
    assert tokenize.load(tmp_path / "saved").bos_id == found.bos_id


def test_several_tokens_before_a_text_are_refused(tmp_path: Path) -> None:
    def two(made: tokenizers.Tokenizer) -> Any:
        tokens = [(token, made.token_to_id(token)) for token in ("<s>", "</s>")]
        return processors.TemplateProcessing(single="<s> </s> $A", special_tokens=tokens)

    with pytest.raises(ValueError, match=r"begins a text with 2 special tokens, <s> </s>.\n  Accepted: none or one"):
        load(tmp_path, foreign_tokenizers.tokenizer_json(two))


@pytest.mark.parametrize(
    ("settings", "older", "eos"),
    [
        (b"{}", b'{"eos_token": {"content": "<|im_start|>"}}', "<|im_start|>"),
        (b'{"eos_token": "</s>"}', b'{"eos_token": "<|im_start|>"}', "<|im_start|>"),
        (b'{"eos_token": "</s>", "added_tokens_decoder": {}}', b'{"eos_token": "<|im_start|>"}', "</s>"),
    ],
)
def test_the_older_file_of_special_tokens(settings: bytes, older: bytes, eos: str, tmp_path: Path) -> None:
    files = foreign_tokenizers.tokenizer_json() | {"tokenizer_config.json": settings, "special_tokens_map.json": older}
    found = load(tmp_path, files)
    assert found.tokenizer.id_to_token(found.eos_id) == eos


@pytest.mark.parametrize("made", [foreign_tokenizers.tokenizer_json, foreign_tokenizers.llama2])
@pytest.mark.parametrize(
    ("generation", "config", "others"),
    [
        (None, None, ()),
        ({"eos_token_id": [7, None, 5, 7, 9]}, {"eos_token_id": 8}, (7, 5, 9)),
        ({"eos_token_id": 6}, None, (6,)),
        ({"bos_token_id": 6}, {"eos_token_id": [None, 5]}, (5,)),
        # No tokens: a number without one, and what is no number.
        ({"eos_token_id": [4096, -1, "x", True, 5]}, None, (5,)),
    ],
)
def test_what_ends_a_text_besides_eos(made: Any, generation: Any, config: Any, others: tuple[int, ...], tmp_path: Path) -> None:
    """None stands for the tokenizer's own eos."""
    eos = load(tmp_path, made()).eos_id
    for name, values in (("generation_config.json", generation), ("config.json", config)):
        if values is not None:
            (tmp_path / name).write_text(json.dumps(values).replace("null", str(eos)))
    found = load(tmp_path, made())
    found.save(str(tmp_path / "saved"))
    for tokenizer in (found, tokenize.load(tmp_path / "saved")):
        assert tokenize.stop_ids(tokenizer) == (eos, *others)


def test_settings_that_are_no_object(tmp_path: Path) -> None:
    for text in (b"[1]", b"{"):
        with pytest.raises(
            ValueError, match=r"tokenizer_config.json' is no JSON object[\s\S]*\n  Accepted: the tokenizer_config.json"
        ):
            load(tmp_path, foreign_tokenizers.tokenizer_json() | {"tokenizer_config.json": text})


@pytest.mark.parametrize("name", ["added_tokens.json", "tokenizer_config.json"])
def test_tokens_that_a_sentencepiece_model_lacks_are_named(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = '{"<|im_end|>": 32000}' if name == "added_tokens.json" else '{"added_tokens_decoder": {"7": {"content": "<|im_end|>"}}}'
    load(tmp_path, foreign_tokenizers.CASES["Llama 2"].files | {name: text.encode()})
    assert "lacks ['<|im_end|>'], which were added to it" in caplog.text
    caplog.clear()
    load(tmp_path, {name: text.replace("<|im_end|>", "<s>").encode()})
    assert "lacks" not in caplog.text
