"""The 256 bytes of UTF-8 as tokens: no training, no unknown text, long sequences (Xue et al. 2022, arXiv:2105.13626).

The id of a byte is the byte, and the special tokens follow; ByT5 itself puts its three special tokens first.
"""

from collections.abc import Callable, Iterable

from ml_collections import ConfigDict

from jaxllm.data.tokenizers import added, chat_template, files, located
from jaxllm.data.tokenizers.added import NONE, Added
from jaxllm.data.tokenizers.chat_template import ChatTemplate
from jaxllm.data.tokenizers.located import Located


class ByteTokenizer:
    """256 bytes, then bos, eos, pad and what was added."""

    vocab_size = 259
    bos_id = 256
    eos_id = 257
    pad_id = 258

    def __init__(self, extra: Added = NONE, template: ChatTemplate | None = None, other_stop_ids: tuple[int, ...] = ()) -> None:
        self.extra, self.template = extra._replace(borders=False), template  # it has borders anyway
        ids = added.place(extra, self.vocab_size, self.bos_id, self.eos_id)
        self.mask_id, self.sentinel_ids, self.vocab_size = ids.mask_id, ids.sentinel_ids, ids.vocab_size
        self.special_tokens = added.special_tokens(ids.tokens, bos=self.bos_id, eos=self.eos_id, pad=self.pad_id, mask=self.mask_id)
        self.added_tokens, self.other_stop_ids = self.special_tokens, other_stop_ids

    def encode(self, text: str) -> list[int]:
        return list(files.utf8(text))

    def encode_with_specials(self, text: str) -> list[int]:
        """As `encode`, but what spells a special token is that token. For text of which every such token is meant."""
        return self.locate(text).ids

    def locate(self, text: str) -> Located:
        """The ids of `encode_with_specials` with their places."""
        files.utf8(text)
        return located.with_specials(text, self.special_tokens, _locate)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: list[int]) -> str:
        return added.spell(files.valid(ids, self.vocab_size), added.names(self.sentinel_ids), _decode)

    def contents(self) -> dict[str, bytes]:
        record = {"kind": "byte"} | added.record(self.extra)
        record |= {"other_stop_ids": self.other_stop_ids} if self.other_stop_ids else {}
        return files.contents(record, chat_template.contents(self.template))

    def save(self, directory: str) -> None:
        files.write(directory, self.contents())


def _locate(text: str) -> Located:
    places = [(place, place + 1) for place, character in enumerate(text) for _ in character.encode()]
    return Located(list(text.encode()), places)


def _decode(ids: list[int], first: bool) -> str:
    del first
    return bytes(part for part in ids if part < 256).decode("utf-8", errors="replace")


def train(config: ConfigDict, texts: Callable[[], Iterable[str]], extra: Added = NONE) -> ByteTokenizer:
    """The byte tokenizer; the texts are not read."""
    del config, texts
    return ByteTokenizer(extra)


def restore(saved: files.Saved) -> ByteTokenizer:
    other_stop_ids = tuple(saved.record.get("other_stop_ids", ()))
    return ByteTokenizer(added.restore(saved.record), chat_template.restore(saved), other_stop_ids)
