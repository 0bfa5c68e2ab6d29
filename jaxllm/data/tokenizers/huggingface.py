"""Tokenizers from a `tokenizer.json` (the format of Hugging Face tokenizers)."""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from jaxllm.data.tokenizers import added, chat_template, files
from jaxllm.data.tokenizers.chat_template import ChatTemplate
from jaxllm.data.tokenizers.located import Located

FILE = "tokenizer.json"


class HuggingFaceTokenizer:
    """A tokenizer.json and the ids of its special tokens.

    Special tokens are added by data/pack.py only: text that spells one ("</s>") is encoded as the text it is. other_stop_ids: see
    `data.tokenize.stop_ids`.
    """

    def __init__(
        self,
        definition: bytes,
        *,
        bos_id: int | None,
        eos_id: int | None,
        pad_id: int,
        mask_id: int | None = None,
        sentinel_ids: tuple[int, ...] = (),
        other_stop_ids: tuple[int, ...] = (),
        template: ChatTemplate | None = None,
    ) -> None:
        self.definition = definition
        self.template = template
        self.tokenizer = parse(definition)
        self.vocab_size = max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.bos_id, self.eos_id, self.pad_id = bos_id, eos_id, pad_id
        self.mask_id, self.sentinel_ids, self.other_stop_ids = mask_id, sentinel_ids, other_stop_ids
        self.spelled = added.names(sentinel_ids) | _letters(self.tokenizer)

    def encode(self, text: str) -> list[int]:
        files.utf8(text)
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Special tokens and their ids."""
        tokens = self.tokenizer.get_added_tokens_decoder()
        return {token.content: index for index, token in tokens.items() if token.special}

    @cached_property
    def added_tokens(self) -> dict[str, int]:
        """Tokens that no merges make, and their ids: special ones, and others, which are one token wherever a text spells them."""
        return {token.content: index for index, token in self.tokenizer.get_added_tokens_decoder().items()}

    def encode_with_specials(self, text: str) -> list[int]:
        """As `encode`, but what spells a special token is that token. For text of which every such token is meant."""
        return self.locate(text).ids

    def locate(self, text: str) -> Located:
        """The ids of `encode_with_specials` with their places."""
        files.utf8(text)
        encoding = self._locator.encode(text, add_special_tokens=False)
        return Located(encoding.ids, encoding.offsets)

    @cached_property
    def _locator(self) -> Any:
        """The library's tokenizer, as it reads special tokens, and without the post-processor: that takes spaces off the places."""
        tokenizer = parse(self.definition)
        tokenizer.encode_special_tokens, tokenizer.post_processor = False, None
        return tokenizer

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Same ids as `encode`, by all processor cores."""
        for text in texts:
            files.utf8(text)
        return [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        return added.spell(files.valid(ids, self.vocab_size), self.spelled, self._decode)

    def _decode(self, ids: list[int], first: bool) -> str:
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        # A Metaspace decoder takes the space off the start of a text, which this is not.
        opens = not first and (self.tokenizer.id_to_token(ids[0]) or "").startswith("\u2581")
        return f" {text}" if opens and not text.startswith(" ") else text

    def contents(self) -> dict[str, bytes]:
        record: dict[str, Any] = {"kind": "huggingface", "bos_id": self.bos_id, "eos_id": self.eos_id, "pad_id": self.pad_id}
        record |= {} if self.mask_id is None else {"mask_id": self.mask_id}
        record |= {"sentinel_ids": self.sentinel_ids} if self.sentinel_ids else {}
        record |= {"other_stop_ids": self.other_stop_ids} if self.other_stop_ids else {}
        return files.contents(record, {FILE: self.definition, **chat_template.contents(self.template)})

    def save(self, directory: str) -> None:
        files.write(directory, self.contents())


def restore(saved: files.Saved) -> HuggingFaceTokenizer:
    ids = {name: saved.record[name] for name in ("bos_id", "eos_id", "pad_id")}
    sentinel_ids, other_stop_ids = (tuple(saved.record.get(name, ())) for name in ("sentinel_ids", "other_stop_ids"))
    return HuggingFaceTokenizer(
        saved.files[FILE],
        **ids,
        mask_id=saved.record.get("mask_id"),
        sentinel_ids=sentinel_ids,
        other_stop_ids=other_stop_ids,
        template=chat_template.restore(saved),
    )


def with_tokens(definition: bytes, tokens: Sequence[str]) -> bytes:
    """The tokenizer.json with these special tokens: those that are no token yet get the ids above all others."""
    tokenizer = library().Tokenizer.from_buffer(definition)
    tokenizer.add_special_tokens([library().AddedToken(token, special=True, normalized=False) for token in tokens])
    return tokenizer.to_str().encode()


def _letters(tokenizer: Any) -> dict[int, str]:
    """Added tokens that a byte-level decoder would take for bytes: DeepSeek has "\u00f6" as one, the letter of a byte that no text has."""
    if not isinstance(tokenizer.decoder, library().decoders.ByteLevel):
        return {}
    tokens = {index: token.content for index, token in tokenizer.get_added_tokens_decoder().items() if not token.special}
    return {index: text for index, text in tokens.items() if tokenizer.decode([index]) != text}


def begins(tokenizer: Any) -> list[int]:
    """The ids that the post-processor of the library's tokenizer puts before a text."""
    texts = ("a", *tokenizer.get_vocab())
    text = next((text for text in texts if tokenizer.encode(text, add_special_tokens=False).ids), "")
    encoding = tokenizer.encode(text, add_special_tokens=True)
    return encoding.ids[: encoding.sequence_ids.index(0)] if text else []


def framed(definition: bytes, before: Mapping[str, int], after: Mapping[str, int]) -> bytes:
    """The tokenizer.json with a post-processor that puts these tokens (name -> id) around a text; the second of two gets no `before`."""
    values = json.loads(definition)
    values["post_processor"] = _frame(before, after) if before or after else None
    return json.dumps(values, ensure_ascii=False).encode()


def _frame(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, Any]:
    def part(name: str, tokens: Mapping[str, int], type_id: int) -> list[dict[str, Any]]:
        marks = [{"SpecialToken": {"id": token, "type_id": type_id}} for token in tokens]
        return [{"Sequence": {"id": name, "type_id": type_id}}, *marks]

    start = [{"SpecialToken": {"id": token, "type_id": 0}} for token in before]
    tokens = {**before, **after}
    return {
        "type": "TemplateProcessing",
        "single": [*start, *part("A", after, 0)],
        "pair": [*start, *part("A", after, 0), *part("B", after, 1)],
        "special_tokens": {token: {"id": token, "ids": [index], "tokens": [token]} for token, index in tokens.items()},
    }


def library() -> Any:
    """The package tokenizers; ValueError that says how to get it."""
    try:
        import tokenizers  # noqa: PLC0415
    except ImportError as error:
        raise ValueError(
            "a tokenizer.json needs the package tokenizers, which is not installed.\n  Accepted: a tokenizer.model needs nothing"
            " more.\n  Run: pip install 'jaxllm[hf]'"
        ) from error
    return tokenizers


def parse(definition: bytes) -> Any:
    """The library's tokenizer; ValueError if the bytes are none."""
    tokenizers = library()
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(definition)
    except ValueError as error:
        raise files.NotATokenizer(str(error)) from error
    # A file may ask for padding to a length and for truncation; both would change the data silently.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    return tokenizer
