"""The distinct characters of the training text, sorted, as tokens.

There are no special tokens but those that are added, so that a text with 65 characters gives a vocabulary of 65.
Padding shares id 0 with a character: harmless, because padding is known by its segment 0 and its weight 0, never by its id.
"""

import json
from collections.abc import Callable, Iterable

from ml_collections import ConfigDict

from jaxllm.data.tokenizers import added, chat_template, files, located
from jaxllm.data.tokenizers.added import NONE, Added
from jaxllm.data.tokenizers.chat_template import ChatTemplate
from jaxllm.data.tokenizers.located import Located

FILE = "chars.json"


class CharTokenizer:
    """One token a character; ids follow the order of the code points."""

    pad_id = 0

    def __init__(
        self,
        characters: str,
        extra: Added = NONE,
        template: ChatTemplate | None = None,
        other_stop_ids: tuple[int, ...] = (),
    ) -> None:
        self.characters, self.extra, self.template = characters, extra, template
        ids = added.place(extra, len(characters))
        self.bos_id, self.eos_id, self.mask_id, self.sentinel_ids, tokens, self.vocab_size = ids
        self.special_tokens = added.special_tokens(tokens, bos=self.bos_id, eos=self.eos_id, mask=self.mask_id)
        self.added_tokens, self.other_stop_ids = self.special_tokens, other_stop_ids
        self.ids = {character: index for index, character in enumerate(characters)}

    def encode(self, text: str) -> list[int]:
        try:
            return [self.ids[character] for character in text]
        except KeyError as error:
            character = error.args[0]
            raise ValueError(
                f"character {character!r} (U+{ord(character):04X}) at position {text.index(character)} is not in the vocabulary"
                f" of {len(self.characters)} characters.\n  Accepted: {self.characters!r}.\n"
                "  Leave it out, or use tokenizer.kind = 'byte' or 'bpe', which represent every text."
            ) from error

    def encode_with_specials(self, text: str) -> list[int]:
        """As `encode`, but what spells a special token is that token. For text of which every such token is meant."""
        return self.locate(text).ids

    def locate(self, text: str) -> Located:
        """The ids of `encode_with_specials` with their places."""
        return located.with_specials(text, self.special_tokens, self._locate)

    def _locate(self, text: str) -> Located:
        return Located(self.encode(text), [(place, place + 1) for place in range(len(text))])

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: list[int]) -> str:
        return added.spell(files.valid(ids, self.vocab_size), added.names(self.sentinel_ids), self._decode)

    def _decode(self, ids: list[int], first: bool) -> str:
        del first
        return "".join(self.characters[index] for index in ids if index < len(self.characters))

    def contents(self) -> dict[str, bytes]:
        parts = {FILE: json.dumps(list(self.characters)).encode(), **chat_template.contents(self.template)}
        record = {"kind": "char"} | added.record(self.extra)
        record |= {"other_stop_ids": self.other_stop_ids} if self.other_stop_ids else {}
        return files.contents(record, parts)

    def save(self, directory: str) -> None:
        files.write(directory, self.contents())


def train(config: ConfigDict, texts: Callable[[], Iterable[str]], extra: Added = NONE) -> CharTokenizer:
    """All characters that occur in the texts; ValueError if there are none."""
    del config
    found: set[str] = set()
    for text in texts():
        found.update(text)
    if not found:
        raise ValueError(files.EMPTY)
    return CharTokenizer("".join(sorted(found)), extra)


def restore(saved: files.Saved) -> CharTokenizer:
    characters, other_stop_ids = "".join(json.loads(saved.files[FILE])), tuple(saved.record.get("other_stop_ids", ()))
    return CharTokenizer(characters, added.restore(saved.record), chat_template.restore(saved), other_stop_ids)
