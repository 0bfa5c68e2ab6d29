"""Older tokenizer files as a tokenizer.json: GPT-2's vocab.json with merges.txt, and BERT's vocab.txt."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxllm.data.tokenizers import files, huggingface

BYTE_LEVEL, MERGES, WORDS = "vocab.json", "merges.txt", "vocab.txt"
ADDED = "added_tokens.json"
# Classes in transformers that split text as it is done here.
BYTE_LEVEL_CLASSES, WORD_CLASSES = ("GPT2Tokenizer",), ("BertTokenizer",)
END = "<|endoftext|>"
WORD_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def definition(path: Path, settings: Mapping[str, Any]) -> bytes:
    """The tokenizer.json that means the same as the file at `path`, with what tokenizer_config.json (`settings`) says of it.

    NotATokenizer for other contents, and for the class of a tokenizer that splits text by other rules, which are not in the file.
    """
    huggingface.library()
    words = path.name == WORDS
    known, given = (WORD_CLASSES if words else BYTE_LEVEL_CLASSES), settings.get("tokenizer_class")
    if given is not None and str(given).removesuffix("Fast") not in known:
        raise files.NotATokenizer(f"a {given} splits text by rules that are not in {path.name}; use its tokenizer.json")
    try:
        tokenizer, specials = (_words if words else _byte_level)(path, settings)
        tokenizer.add_special_tokens([token for token in specials if tokenizer.token_to_id(token) is not None])
        added = path.with_name(ADDED)
        tokens = json.loads(added.read_bytes()) if added.is_file() else {}
        for token in sorted(tokens, key=tokens.__getitem__):
            (tokenizer.add_special_tokens if token in specials else tokenizer.add_tokens)([token])
        wrong = [token for token, index in tokens.items() if tokenizer.token_to_id(token) != index]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise files.NotATokenizer(f"{type(error).__name__}: {error}") from error
    if wrong:
        raise files.NotATokenizer(f"{ADDED} has ids that do not follow those of {path.name}: {', '.join(wrong[:4])}")
    before, after = _frame(words, settings)
    ids = ({token: index for token in part if (index := tokenizer.token_to_id(token)) is not None} for part in (before, after))
    return huggingface.framed(tokenizer.to_str().encode(), *ids)


def _frame(words: bool, settings: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The tokens before and after a text: BERT's always, GPT-2's bos if the settings say so."""
    if words:
        return (_text(settings.get("cls_token")) or "[CLS]",), (_text(settings.get("sep_token")) or "[SEP]",)
    return ((_text(settings.get("bos_token")) or END,), ()) if settings.get("add_bos_token") else ((), ())


def _byte_level(path: Path, settings: Mapping[str, Any]) -> tuple[Any, tuple[str, ...]]:
    """Byte-pair encoding of bytes (Radford et al. 2019, section 2.2): a line of merges.txt is a pair, the first one the most frequent."""
    tokenizers = huggingface.library()
    vocabulary = json.loads(path.read_bytes())
    lines = path.with_name(MERGES).read_text(encoding="utf-8").split("\n")
    merges = [(line.split(" ")[0], line.split(" ")[1]) for line in lines if line and not line.startswith("#version")]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=bool(settings.get("add_prefix_space", False)))
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer, (END, *_named(settings))


def _words(path: Path, settings: Mapping[str, Any]) -> tuple[Any, tuple[str, ...]]:
    """WordPiece: words and, marked with ##, what may follow inside of a word; a token a line (Devlin et al. 2018, arXiv:1810.04805)."""
    tokenizers = huggingface.library()
    tokens = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token=_text(settings.get("unk_token")) or "[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=bool(settings.get("tokenize_chinese_chars", True)),
        strip_accents=settings.get("strip_accents"),
        lowercase=bool(settings.get("do_lower_case", True)),
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = tokenizers.decoders.WordPiece(prefix="##")
    return tokenizer, (*WORD_SPECIALS, *_named(settings))


def _named(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """The special tokens that the settings name."""
    more = settings.get("additional_special_tokens") or []
    named = (settings[name] for name in settings if name.endswith("_token"))
    return tuple(text for token in (*named, *more) if (text := _text(token)))


def _text(token: Any) -> str:
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else ""
