"""The tokenizer.json that is written for each of our tokenizers gives their ids; older files of other tools are read as they mean."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign_tokenizers
import pytest
import tokenizers

from jaxllm import config as schema
from jaxllm.data import tokenize
from jaxllm.data.tokenizers import byte, char, file, sentencepiece
from jaxllm.data.tokenizers.added import Added
from jaxllm.data.tokenizers.chat_template import ChatTemplate
from jaxllm.interop import tokenizer_files
from jaxllm.types import Tokenizer

ROOT = Path(__file__).resolve().parent.parent.parent
DOCUMENTS = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("\n\n")
ODD = [
    "",
    " ",
    "   ",
    "\n",
    "\t\n ",
    "\r\n",
    "aaaa aaaaaaaa",
    "١٢٣ 7",
    "\0x",
    "e\u0301",
    "日本語 🙂",
    "<0x0",
    "x</",
    "\u00a0 \u2003",
]


def texts() -> list[str]:
    """Real text, cut anywhere; random text of awkward characters; and odd ones."""
    rng, whole = random.Random(0), "\n\n".join(DOCUMENTS)
    cut = [whole[start : start + rng.randrange(1, 300)] for start in (rng.randrange(len(whole)) for _ in range(200))]
    mixed = ["".join(rng.choices("ab  \n\t.,01239éüß日本語🙂\u00a0<>x_0A", k=rng.randrange(1, 60))) for _ in range(200)]
    return DOCUMENTS + cut + mixed + ODD


def load(folder: Path, files: dict[str, bytes]) -> Tokenizer:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    config = schema.base()
    config.tokenizer.kind, config.tokenizer.path = "file", str(folder)
    return file.load(config, lambda: ())


@pytest.mark.parametrize(
    ("train", "extra", "kind"),
    [
        (sentencepiece.train_bpe, Added(), "decoder"),
        (sentencepiece.train_bpe, Added(mask=True, sentinels=5), "encoder_decoder"),
        (sentencepiece.train_unigram, Added(), "encoder"),
        (byte.train, Added(), "decoder"),
        (byte.train, Added(mask=True, sentinels=3), "encoder"),
        (sentencepiece.train_bpe, Added(tokens=("<|im_start|>", "<|im_end|>")), "decoder"),
        (byte.train, Added(tokens=("<|im_start|>", "<|im_end|>")), "decoder"),
        (char.train, Added(borders=True, tokens=("<|im_end|>",)), "decoder"),
        (char.train, Added(), "decoder"),
        (char.train, Added(mask=True, sentinels=2, borders=True), "encoder"),
    ],
)
def test_the_written_tokenizer_gives_the_same_ids(train: Callable[..., Any], extra: Added, kind: str, tmp_path: Path) -> None:
    """Alone, and with bos and eos around them as the model reads a text."""
    config = schema.base()
    config.tokenizer.vocab_size = 600
    ours = train(config, lambda: DOCUMENTS, extra)
    made = tokenizer_files.make(ours, 128, kind)
    assert set(made.files) == {"tokenizer.json", "tokenizer_config.json"} and not made.notes
    theirs = tokenizers.Tokenizer.from_buffer(made.files["tokenizer.json"])
    assert theirs.get_vocab_size() == ours.vocab_size
    known = [text for text in texts() if train is not char.train or all(letter in ours.ids for letter in text)]
    assert len(known) > 200
    for text, ids in zip(known, ours.encode_batch(known), strict=True):
        assert theirs.encode(text, add_special_tokens=False).ids == ids, text
        assert theirs.decode(ids) == text
        before, after = [ours.bos_id] * (kind != "encoder_decoder"), [ours.eos_id] * (kind != "decoder")
        assert theirs.encode(text).ids == [index for index in (*before, *ids, *after) if index is not None]
    again = load(tmp_path, dict(made.files))
    for name in ("vocab_size", "eos_id", "mask_id", "sentinel_ids"):
        assert getattr(again, name) == getattr(ours, name)
    assert all(again.special_tokens[token] == ours.special_tokens[token] for token in extra.tokens)
    assert again.bos_id == (None if kind == "encoder_decoder" else ours.bos_id)
    assert again.pad_id == (ours.pad_id if train is not char.train else 0)
    # A special token that a text spells is a text to us.
    if train is not char.train:
        assert again.encode("a</s> <pad>") == ours.encode("a</s> <pad>")


def test_a_tokenizer_from_elsewhere_keeps_its_model(tmp_path: Path) -> None:
    config = schema.base()
    config.tokenizer.vocab_size = 600
    model = sentencepiece.train_unigram(config, lambda: DOCUMENTS).model
    foreign = load(tmp_path, {"spiece.model": model, "tokenizer_config.json": b'{"extra_ids": 4}'})
    # As T5 has it: the first sentinel is the last id.
    assert (foreign.vocab_size, foreign.sentinel_ids) == (604, (603, 602, 601, 600))
    (tmp_path / "tokenizer_config.json").unlink()
    assert load(tmp_path, {}).sentinel_ids == tuple(range(699, 599, -1))
    made = tokenizer_files.make(foreign, 128, "encoder_decoder")
    assert made.files["tokenizer.model"] == model and "tokenizer.json" not in made.files
    assert made.notes == ("tokenizer.model is written without a tokenizer.json, which cannot express it exactly",)


def test_tokens_above_a_model_from_elsewhere_are_written_and_read(tmp_path: Path) -> None:
    """As a chat template adds them to Llama 2: they go into tokenizer_config.json, where transformers looks for them."""
    foreign = load(tmp_path / "one", foreign_tokenizers.llama2())
    ours = tokenize.extend(foreign, ("<|im_start|>", "<|im_end|>"), ChatTemplate("x", {}), "<|im_end|>")
    made = tokenizer_files.make(ours, 128, "decoder")
    generation = {"generation_config.json": json.dumps({"eos_token_id": list(tokenize.stop_ids(ours))}).encode()}
    again: Any = load(tmp_path / "two", dict(made.files) | generation)
    assert again.special_tokens == ours.special_tokens and again.vocab_size == ours.vocab_size == foreign.vocab_size + 2
    assert tokenize.stop_ids(again) == (foreign.eos_id, foreign.vocab_size + 1)
    text = "the cat<|im_end|>\n<|im_start|> the"
    assert again.encode_with_specials(text) == ours.encode_with_specials(text)
    assert again.encode(text) == foreign.encode(text)


def test_gpt2_files(tmp_path: Path) -> None:
    """vocab.json and merges.txt, as the library itself writes them."""
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator(DOCUMENTS, vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False)
    trained.save_model(str(tmp_path))
    ours = load(tmp_path, {})
    for text in texts():
        assert ours.encode(text) == trained.encode(text).ids
        assert ours.decode(ours.encode(text)) == text
    assert (ours.bos_id, ours.eos_id, ours.decode([0])) == (None, 0, "")
    assert ours.encode("<|endoftext|>") != [0]
    size = ours.vocab_size
    more = load(tmp_path, {"added_tokens.json": json.dumps({"<b>": size + 1, "<a>": size}).encode()})
    # They are text, unless the settings call them special.
    assert (more.vocab_size, more.encode("<b>x"), more.decode([size, *more.encode("x"), size + 1])) == (
        size + 2,
        [size + 1, *ours.encode("x")],
        "<a>x<b>",
    )
    settings = json.dumps({"additional_special_tokens": ["<b>"], "pad_token": {"content": "<a>"}}).encode()
    special = load(tmp_path, {"tokenizer_config.json": settings})
    assert (special.pad_id, special.decode([size, *special.encode("x"), size + 1])) == (size, "x")
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match=r"added_tokens.json has ids that do not follow those of vocab.json: <c>"):
        load(tmp_path, {"added_tokens.json": json.dumps({"<c>": size + 5}).encode()})
    with pytest.raises(
        ValueError, match=r"a Qwen2Tokenizer splits text by rules that are not in vocab.json; use its tokenizer.json"
    ):
        load(tmp_path, {"tokenizer_config.json": b'{"tokenizer_class": "Qwen2Tokenizer"}'})


@pytest.mark.parametrize("lower", [True, False])
def test_bert_files(lower: bool, tmp_path: Path) -> None:
    """vocab.txt, with and without case."""
    trained = tokenizers.BertWordPieceTokenizer(lowercase=lower)
    trained.train_from_iterator(DOCUMENTS, vocab_size=400, show_progress=False)
    trained.save_model(str(tmp_path))
    ours = load(tmp_path, {"tokenizer_config.json": json.dumps({"do_lower_case": lower, "mask_token": "[MASK]"}).encode()})
    for text in [*texts(), "Größe CAFÉ naïve"]:
        assert ours.encode(text) == trained.encode(text, add_special_tokens=False).ids
    names = ("[CLS]", "[SEP]", "[PAD]", "[MASK]")
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.mask_id) == tuple(trained.token_to_id(name) for name in names)
    assert ours.decode([ours.bos_id, *ours.encode("the model"), ours.eos_id]) == "the model"


@pytest.mark.parametrize(
    ("name", "text"),
    [("vocab.json", "{"), ("vocab.json", '{"a": 0}'), ("vocab.json", "[1]"), ("spiece.model", "x"), ("tokenizer.json", "{}")],
)
def test_files_that_are_no_tokenizer(name: str, text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not a tokenizer: .*[\s\S]*\n  Accepted: .*spiece.model"):
        load(tmp_path, {name: text.encode()})
