"""Tokenizers as the rest of the package sees them: make one, load one, tell whether two are the same."""

import hashlib
import importlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import logging
from ml_collections import ConfigDict

from jaxllm import registry
from jaxllm.consistency import LOADED
from jaxllm.data.chat import templates
from jaxllm.data.tokenizers import chat_template, files, huggingface
from jaxllm.data.tokenizers.added import Added
from jaxllm.data.tokenizers.chat_template import ChatTemplate

if TYPE_CHECKING:
    from jaxllm.types import Tokenizer

# The kinds that a saved tokenizer may have; each is a module of data/tokenizers with `restore(saved)`.
KINDS = ("byte", "char", "huggingface", "sentencepiece")


def make(config: ConfigDict, texts: Callable[[], Iterable[str]]) -> "Tokenizer":
    """The tokenizer that `config.tokenizer` describes. Those that are trained call `texts()` once and read it to its end.

    Those that are made here get the special tokens that the objective needs, and all get those of `tokenizer.add_tokens` and of a named
    chat template. ValueError if there is no text, if `tokenizer.vocab_size` does not fit the text, or if a file's tokenizer lacks a
    special token or a chat template.
    """
    wanted = needed(config)
    made = registry.resolve("tokenizer", config.tokenizer.kind)(config, texts, wanted._replace(tokens=()))
    check(made, wanted, config)
    if registry.resolve("examples", config.train.objective)(config).converses:
        tokenizer = extend(made, wanted.tokens, templates.choose(config, made), templates.end(config))
    else:
        tokenizer = extend(made, wanted.tokens, made.template)
    rows = tokenizer.vocab_size - made.vocab_size
    if rows and config.tokenizer.kind in LOADED and not config.train.start:  # which gives them rows, and says so
        logging.warning(
            "%s added to the tokenizer, which now has %d tokens: a model that was made for it without them needs %d more rows in its"
            " embedding.",
            ", ".join(token for token in wanted.tokens if token not in made.added_tokens),
            tokenizer.vocab_size,
            rows,
        )
    return tokenizer


def needed(config: ConfigDict) -> Added:
    """The special tokens that the objective and the config need besides those that every tokenizer has."""
    added: Added = registry.resolve("examples", config.train.objective)(config).added
    return added._replace(tokens=tuple(dict.fromkeys((*added.tokens, *config.tokenizer.add_tokens))))


def extend(tokenizer: Any, tokens: Sequence[str], template: ChatTemplate | None, end: str = "") -> Any:
    """The same tokenizer with these special tokens, as far as it lacks them, above all others, and with this chat template.

    end: the one of the tokens that ends an answer, and so a text, as eos does; empty for eos alone.
    """
    lacking = [token for token in tokens if token not in tokenizer.special_tokens]
    if lacking or template != tokenizer.template:
        tokenizer = _rewrite(tokenizer, {}, lacking, template)
    return with_stops(tokenizer, [tokenizer.special_tokens[end]] if end else [])


def with_stops(tokenizer: Any, ids: Iterable[int]) -> Any:
    """The same tokenizer, with a text ending at these ids, too."""
    more = [index for index in ids if index not in stop_ids(tokenizer)]
    if not more:
        return tokenizer
    return _rewrite(tokenizer, {"other_stop_ids": [*tokenizer.other_stop_ids, *more]}, [], tokenizer.template)


def _rewrite(tokenizer: Any, changes: dict[str, Any], lacking: Sequence[str], template: ChatTemplate | None) -> Any:
    parts = dict(tokenizer.contents())
    record = json.loads(parts.pop(files.RECORD)) | changes
    if record["kind"] == "huggingface":
        parts[huggingface.FILE] = huggingface.with_tokens(parts[huggingface.FILE], lacking)
    elif lacking:
        added = record.get("added", {})
        record["added"] = added | {"tokens": [*added.get("tokens", ()), *lacking]}
    return _restore(files.Saved(record, parts | chat_template.contents(template)))


def check(tokenizer: "Tokenizer", wanted: Added, config: ConfigDict) -> None:
    """ValueError if the tokenizer lacks a special token that the objective needs."""
    lacks = ""
    if wanted.mask and tokenizer.mask_id is None:
        lacks, accepted = "has no mask token", "one whose tokenizer_config.json names a mask_token, or with [MASK] or <mask>"
    elif wanted.sentinels > (has := len(tokenizer.sentinel_ids)):
        accepted = f"one with {wanted.sentinels} sentinels or more, <extra_id_0> to <extra_id_{wanted.sentinels - 1}>"
        lacks = f"has {has} sentinels, but a row has {wanted.sentinels} hidden spans"
    elif wanted.borders and tokenizer.eos_id is None:
        lacks, accepted = "has no eos token", "one whose tokenizer_config.json names an eos_token"
    if lacks:
        raise ValueError(
            f"tokenizer.path = '{config.tokenizer.path}' {lacks}, which train.objective = '{config.train.objective}' needs.\n"
            f"  Accepted: {accepted}.\n  Use another tokenizer file, or tokenizer.kind = 'bpe', 'unigram' or 'byte', which get it added."
            + (
                "\n  Fewer are needed for shorter rows (data.row_tokens) or longer spans (data.mean_span_tokens)."
                if wanted.sentinels
                else ""
            )
        )


def start_id(tokenizer: "Tokenizer") -> int:
    """What the decoder of an encoder-decoder reads first: bos, or pad where there is no bos (as T5 has it)."""
    return tokenizer.pad_id if tokenizer.bos_id is None else tokenizer.bos_id


def stop_ids(tokenizer: "Tokenizer") -> tuple[int, ...]:
    """Ids behind which nothing more is written: eos, and what else the model's generation_config.json says ends a text."""
    others: tuple[int, ...] = getattr(tokenizer, "other_stop_ids", ())
    return others if tokenizer.eos_id is None else (tokenizer.eos_id, *others)


def special_ids(tokenizer: "Tokenizer") -> set[int]:
    """Ids that stand for no text. A pad id that also is a character's (char, or a file without a pad token) is none of them."""
    found = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_id, *tokenizer.sentinel_ids}
    if not tokenizer.decode([tokenizer.pad_id]):
        found.add(tokenizer.pad_id)
    return {index for index in found if index is not None}


def names(tokenizer: "Tokenizer", ids: Iterable[int]) -> dict[int, str]:
    """Those of the ids that `decode` leaves out, and what they are called: by the tokenizer itself, else <bos>, <eos>, <pad>, [MASK]."""
    customary = {tokenizer.pad_id: "<pad>", tokenizer.bos_id: "<bos>", tokenizer.eos_id: "<eos>", tokenizer.mask_id: "[MASK]"}
    own: dict[str, int] = getattr(tokenizer, "special_tokens", {})
    called = customary | {index: name for name, index in own.items()}
    return {index: called[index] for index in set(ids) & called.keys() if not tokenizer.decode([index])}


def load(directory: str | Path) -> "Tokenizer":
    """The tokenizer that `save(directory)` wrote; ValueError if there is none."""
    saved = files.read(directory)
    kind = saved.record.get("kind")
    if kind not in KINDS:
        raise ValueError(
            f"the tokenizer in '{directory}' is of kind {kind!r}.\n  Accepted: {', '.join(KINDS)}.\n"
            "  It was saved by another version of jaxllm: install that one, or prepare the data again."
        )
    try:
        return _restore(saved)
    except (files.NotATokenizer, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(files.damaged(directory, error)) from error


def _restore(saved: files.Saved) -> "Tokenizer":
    made: Tokenizer = importlib.import_module(f"jaxllm.data.tokenizers.{saved.record['kind']}").restore(saved)
    return made


def table_fingerprint(tokenizer: "Tokenizer", size: int) -> str:
    """Hexadecimal SHA-256 of what the first `size` ids stand for. Tokenizers that differ in the token that ends a text, in their chat
    template or in the file that they come from have the same one, if all ids are the same tokens."""
    special = names(tokenizer, range(size))
    spelled = [special[index] if index in special else tokenizer.decode([index]) for index in range(size)]
    return hashlib.sha256(json.dumps(spelled).encode()).hexdigest()


def fingerprint(tokenizer: "Tokenizer") -> str:
    """Hexadecimal SHA-256 of everything that decides the ids of a text: equal tokenizers, equal fingerprints."""
    digest = hashlib.sha256()
    for name, data in sorted(tokenizer.contents().items()):
        digest.update(f"{name} {len(data)}\n".encode() + data)
    return digest.hexdigest()
