"""The distinct characters of the training text, sorted, as tokens.

There are no special tokens, so that a text with 65 characters gives a vocabulary of 65. Padding shares id 0 with a character:
harmless, because padding is known by its segment 0 and its weight 0, never by its id.
"""

import json
from collections.abc import Callable, Iterable

from ml_collections import ConfigDict

from jaxllm.data.tokenizers import files

FILE = "chars.json"


class CharTokenizer:
    """One token a character; ids follow the order of the code points."""

    bos_id = None
    eos_id = None
    pad_id = 0

    def __init__(self, characters: str) -> None:
        self.characters = characters
        self.vocab_size = len(characters)
        self.ids = {character: index for index, character in enumerate(characters)}

    def encode(self, text: str) -> list[int]:
        try:
            return [self.ids[character] for character in text]
        except KeyError as error:
            character = error.args[0]
            raise ValueError(
                f"character {character!r} (U+{ord(character):04X}) at position {text.index(character)} is not in the vocabulary"
                f" of {self.vocab_size} characters.\n  Accepted: {self.characters!r}.\n"
                "  Leave it out, or use tokenizer.kind = 'byte' or 'bpe', which represent every text."
            ) from error

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: list[int]) -> str:
        return "".join(self.characters[index] for index in files.valid(ids, self.vocab_size))

    def contents(self) -> dict[str, bytes]:
        return files.contents({"kind": "char"}, {FILE: json.dumps(list(self.characters)).encode()})

    def save(self, directory: str) -> None:
        files.write(directory, self.contents())


def train(config: ConfigDict, texts: Callable[[], Iterable[str]]) -> CharTokenizer:
    """All characters that occur in the texts; ValueError if there are none."""
    del config
    found: set[str] = set()
    for text in texts():
        found.update(text)
    if not found:
        raise ValueError(files.EMPTY)
    return CharTokenizer("".join(sorted(found)))


def restore(saved: files.Saved) -> CharTokenizer:
    return CharTokenizer("".join(json.loads(saved.files[FILE])))
