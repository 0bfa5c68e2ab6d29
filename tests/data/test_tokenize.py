"""Tokenizers: nothing is lost, ids are those of the libraries, a saved tokenizer is the same one, errors say what fits."""

import json
import string

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxllm import config as schema
from jaxllm.data import tokenize
from jaxllm.data.tokenizers import sentencepiece as ours

LINES = [
    "def area(width, height):",
    '    """The area of a rectangle, in square metres."""',
    "    if width < 0 or height < 0:",
    "        raise ValueError('negative: 1234567890')",
    "    return width * height",
    "The quick brown fox jumps over the lazy dog; the dog sleeps.",
    "Größe, façade, naïve: words with accents.",
]
CORPUS = ["\n".join(LINES * 20), "\n\n".join(LINES * 10), "the dog\tand the fox\n" * 10]
SIZES = {"bpe": 400, "unigram": 330}


def made(kind, corpus=CORPUS, **fields):
    config = schema.base()
    config.tokenizer.kind = kind
    config.tokenizer.vocab_size = SIZES.get(kind, 4096)
    config.tokenizer.update(fields)
    return tokenize.make(config, lambda: corpus)


TRAINED = {kind: made(kind) for kind in (*SIZES, "byte")}


ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"])) | st.lists(
    st.sampled_from(
        [
            " ",
            "\n",
            "\t",
            "\r\n",
            "\u2581",
            "\u2585",
            "\0",
            "\u2047",
            "<s>",
            "</s>",
            "<unk>",
            "<0x0A>",
            "the",
            "7",
            "ü",
            "e\u0301",
            "日",
        ]
    )
).map("".join)


@pytest.mark.parametrize("kind", TRAINED)
@settings(deadline=None, max_examples=150)
@example("  leading, trailing  ")
@example("\ufeff\ufb01\u00a0 \u3000")
@given(text=ANY_TEXT)
def test_no_text_is_lost(kind, text):
    tokenizer = TRAINED[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch([text, "", text]) == [ids, [], ids]
    assert not {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id} & set(ids)
    for end in range(len(ids)):  # a prefix may end inside a character
        assert text.startswith(tokenizer.decode(ids[:end]).rstrip("\ufffd"))


@pytest.mark.parametrize("kind", SIZES)
@settings(deadline=None, max_examples=100)
@given(lines=st.lists(st.text("the dog\u2581\t\n ", max_size=30)))
def test_parts_encode_as_the_whole(kind, lines):
    """Long texts are cut after newlines; the pieces are those of the uncut text in SentencePiece itself."""
    text = "\n".join(lines)
    tokenizer = TRAINED[kind]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ours, "PART_CHARS", 8)
        cut = tokenizer.encode(text)
    assert cut == tokenizer.encode(text)
    assert len(list(ours._parts(text.replace("\u2581", "")))) <= 1
    if "\u2581" not in text:
        assert cut == tokenizer.processor.encode(text)


@pytest.mark.parametrize("kind", SIZES)
def test_what_a_trained_vocabulary_holds(kind):
    tokenizer = TRAINED[kind]
    assert tokenizer.vocab_size == SIZES[kind]
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id) == (0, 1, 2)
    pieces = [tokenizer.processor.id_to_piece(index) for index in range(tokenizer.vocab_size)]
    assert {f"<0x{byte:02X}>" for byte in range(256)} <= set(pieces)
    learnt = pieces[4 + 256 :]
    assert not any(mark in piece for piece in learnt for mark in "\n\t\r")
    assert not any(piece.isdigit() and len(piece) > 1 for piece in learnt)
    assert len(tokenizer.encode("\n")) == len(tokenizer.encode("\t")) == 1
    assert tokenizer.encode("dog\n\ndog") == [*tokenizer.encode("dog"), *tokenizer.encode("\n") * 2, *tokenizer.encode("dog")]


def test_indentation_is_learnt():
    assert len(TRAINED["bpe"].encode(" " * 8)) < 4


@pytest.mark.parametrize("kind", SIZES)
def test_training_twice_gives_the_same_bytes(kind):
    assert made(kind).contents() == TRAINED[kind].contents()


def test_the_sample_of_a_long_corpus_is_even_and_bounded():
    pieces = [f"{index:04d}" for index in range(1000)]
    assert ours._sample(pieces, 4000) == pieces
    assert ours._sample(pieces, 3999) == pieces[::2]
    assert ours._sample(pieces, 1000) == pieces[::4]
    assert ours._sample(["a" * 100], 10) == ["a" * 100]


def test_bytes():
    tokenizer = TRAINED["byte"]
    assert tokenizer.encode("hé") == [0x68, 0xC3, 0xA9]
    assert tokenizer.decode([256, 0x68, 257, 258]) == "h"
    assert tokenizer.decode([0x68, 0xC3]) == "h\ufffd"
    assert len({*range(256), tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}) == tokenizer.vocab_size == 259


def test_characters_have_the_ids_of_nanogpt():
    """The 65 characters that tinyshakespeare is written in."""
    text = string.ascii_letters + "\n !$&',-.3:;?"
    tokenizer = made("char", [text[30:], text[:40]])
    assert tokenizer.vocab_size == 65
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, None)
    # nanoGPT's data/shakespeare_char: ids are the ranks of the characters.
    assert tokenizer.encode("\n !aZz") == [0, 1, 2, 39, 38, 64]
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_character_outside_the_vocabulary_is_named():
    with pytest.raises(
        ValueError, match=r"(?s)character 'é' \(U\+00E9\) at position 2 .*of 3 characters.*Accepted: 'abc'.*'byte' or 'bpe'"
    ):
        made("char", ["abc"]).encode("abé")


def test_pieces_of_a_model_from_elsewhere_are_those_of_sentencepiece(tmp_path):
    """One with the special pieces of ALBERT: <pad> 0, <unk> 1, [CLS] 2, [SEP] 3, and without bytes for what it does not know."""
    path = tmp_path / "tokenizer.model"
    special = {"pad_id": 0, "unk_id": 1, "bos_id": 2, "bos_piece": "[CLS]", "eos_id": 3, "eos_piece": "[SEP]"}
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(LINES * 20), model_writer=file, vocab_size=80, minloglevel=2, **special
        )
    tokenizer = made("file", path=str(tmp_path))
    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    texts = ["The quick brown fox.", " spaces   inside \n", "\u2581 mark", "[CLS] is text? [SEP]", "", "naïve 日本"]
    assert tokenizer.encode_batch(texts) == [library.encode(text) for text in texts]
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(texts)] == [
        library.decode(library.encode(text)) for text in texts
    ]
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (80, 0, 2, 3)


@pytest.fixture
def tokenizer_json(tmp_path):
    """A small byte-level BPE with three special tokens, padding and truncation, as a model's folder has it."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|begin|>", "</s>", "<|fill|>"], initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(CORPUS, trainer)
    library.post_processor = tokenizers.processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    library.enable_padding(length=50)
    library.enable_truncation(20)
    library.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_tokenizer_json_gives_the_text_and_nothing_else(tokenizer_json):
    tokenizer = made("file", path=str(tokenizer_json))
    text = "the dog said </s> and <|begin|> " * 20 + "日"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {0, 1, 2} & set(ids)
    assert tokenizer.encode_batch([text, "the"]) == [ids, tokenizer.encode("the")]
    assert 0 < len(tokenizer.encode("the")) < 4  # not padded to 50
    assert tokenizer.decode(ids[:-1]).endswith("\ufffd")
    assert tokenizer.decode([0, *tokenizer.encode("dog"), 1]) == "dog"


@pytest.mark.parametrize(
    ("settings", "ids"),
    [
        (None, (0, 1, 0)),  # only </s> has a customary name; no pad token: 0
        ({"bos_token": "<|begin|>", "eos_token": {"content": "</s>"}, "pad_token": "<|fill|>"}, (0, 1, 2)),
        ({"bos_token": None, "eos_token": "<|fill|>"}, (0, 2, 0)),
        ({"eos_token": "<|nowhere|>"}, (0, None, 0)),
    ],
)
def test_special_tokens_are_found(tokenizer_json, settings, ids):
    if settings is not None:
        tokenizer_json.with_name("tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = made("file", path=str(tokenizer_json))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == ids


def test_gpt2_ids(tmp_path):
    """`Hello world` is 15496 995 in GPT-2 (Radford et al. 2019), `<|endoftext|>` is 50256. A cut of its files that has just this."""
    merges = [
        ("H", "e"),
        ("l", "l"),
        ("ll", "o"),
        ("He", "llo"),
        ("\u0120", "w"),
        ("o", "r"),
        ("l", "d"),
        ("\u0120w", "or"),
        ("\u0120wor", "ld"),
    ]
    pieces = dict.fromkeys(piece for pair in merges for piece in (*pair, "".join(pair)))
    vocabulary = {piece: index for index, piece in enumerate(pieces)} | {"Hello": 15496, "\u0120world": 995, "<|endoftext|>": 50256}
    library = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges))
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    library.add_special_tokens(["<|endoftext|>"])
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = made("file", path=str(tmp_path))
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (50257, None, 50256)


def test_saved_and_loaded_is_the_same(tmp_path, tokenizer_json):
    every = {**TRAINED, "char": made("char"), "file": made("file", path=str(tokenizer_json))}
    prints = {kind: tokenize.fingerprint(tokenizer) for kind, tokenizer in every.items()}
    assert len(set(prints.values())) == len(every)
    for kind, tokenizer in every.items():
        tokenizer.save(str(tmp_path / kind))
        again = tokenize.load(tmp_path / kind)
        assert tokenize.fingerprint(again) == prints[kind]
        assert again.encode(CORPUS[0]) == tokenizer.encode(CORPUS[0])
        assert [getattr(again, name) for name in ("vocab_size", "bos_id", "eos_id", "pad_id")] == [
            getattr(tokenizer, name) for name in ("vocab_size", "bos_id", "eos_id", "pad_id")
        ]


def test_a_fingerprint_knows_the_special_ids(tokenizer_json):
    before = tokenize.fingerprint(made("file", path=str(tokenizer_json)))
    tokenizer_json.with_name("tokenizer_config.json").write_text('{"eos_token": "<|fill|>"}')
    assert tokenize.fingerprint(made("file", path=str(tokenizer_json))) != before


@pytest.mark.parametrize("name", ["", "tokenizer.model"])
def test_a_runs_tokenizer_is_taken_over_whole(tmp_path, name):
    TRAINED["bpe"].save(str(tmp_path))
    tokenizer = made("file", path=str(tmp_path / name))
    assert tokenize.fingerprint(tokenizer) == tokenize.fingerprint(TRAINED["bpe"])
    assert tokenizer.decode(tokenizer.encode("\u2581")) == "\u2581"


@pytest.mark.parametrize("kind", SIZES)
def test_the_vocabulary_must_fit_the_corpus(kind):
    with pytest.raises(
        ValueError, match=rf"(?s)vocab_size = 9999 is more than this corpus.*\({kind}\).*Accepted: up to \d+\..*Set tok"
    ) as caught:
        made(kind, vocab_size=9999)
    most = int(str(caught.value).partition("up to ")[2].partition(".")[0])
    assert made(kind, vocab_size=most).vocab_size == most  # what the error accepts is accepted
    with pytest.raises(ValueError, match=r"(?s)vocab_size = 262 does not hold.*Accepted: \d+ or more") as caught:
        made(kind, vocab_size=262)
    least = int(str(caught.value).partition("Accepted: ")[2].partition(" ")[0])
    assert made(kind, vocab_size=least).vocab_size == least


@pytest.mark.parametrize("kind", [*SIZES, "char"])
@pytest.mark.parametrize("corpus", [[], [""], ["\n\t", "\n"]])
def test_no_text_to_train_on(kind, corpus):
    if kind == "char" and corpus[-1:] == ["\n"]:
        assert made(kind, corpus).vocab_size == 2
        return
    with pytest.raises(ValueError, match="(?s)no text to train a tokenizer on.*Accepted.*Check data.source"):
        made(kind, corpus)


@pytest.mark.parametrize("kind", [*TRAINED, "char"])
def test_ids_outside_the_vocabulary_and_array_ids(kind):
    tokenizer = made("char") if kind == "char" else TRAINED[kind]
    assert tokenizer.decode(np.asarray(tokenizer.encode("the dog"), np.int32)) == "the dog"
    for wrong in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=rf"(?s)token id {wrong} is outside.*Accepted: 0 to {tokenizer.vocab_size - 1}"):
            tokenizer.decode([0, wrong])


@pytest.mark.parametrize("kind", TRAINED)
def test_half_a_surrogate_pair_is_named(kind):
    with pytest.raises(ValueError, match=r"(?s)lone surrogate U\+D83D at character 1.*Accepted: Unicode text"):
        TRAINED[kind].encode("a\ud83d")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.model", b"version https://git-lfs", "is not a tokenizer: .*Git LFS pointer"),
        ("tokenizer.json", b'{"model": 3}', "is not a tokenizer: "),
        ("words.txt", b"a", "is no such file.*Accepted: tokenizer.json, tokenizer.model"),
        ("nothing", None, "does not exist"),
        ("tokenizer_kind.json", b"{", "the tokenizer in .* is damaged"),
        ("tokenizer_kind.json", b'{"kind": "bpe2", "files": []}', "of kind 'bpe2'.*Accepted: byte, char"),
        ("tokenizer_kind.json", b'{"kind": "char", "files": ["chars.json"]}', "is damaged: .*chars.json"),
    ],
)
def test_files_that_are_no_tokenizer(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"(?s){message}") as caught:
        made("file", path=str(tmp_path / name))
    assert "\n  Accepted: " in str(caught.value)


@pytest.mark.parametrize("kind", [*TRAINED, "char"])
def test_a_saved_tokenizer_that_was_cut_short(tmp_path, kind):
    (made("char") if kind == "char" else TRAINED[kind]).save(str(tmp_path))
    for path in tmp_path.iterdir():
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match="(?s)the tokenizer in .* is damaged.*Accepted"):
            tokenize.load(tmp_path)
        path.write_bytes(whole)
    tokenize.load(tmp_path)


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="(?s)has none of these files.*Accepted"):
        made("file", path=str(tmp_path))
    with pytest.raises(ValueError, match="(?s)no tokenizer in .*Accepted.*RUN/tokenizer"):
        tokenize.load(tmp_path)
