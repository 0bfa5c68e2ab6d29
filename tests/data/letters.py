"""A tokenizer small enough to check by eye: one id a letter, with or without bos and eos."""

from collections.abc import Mapping


class LetterTokenizer:
    """a = 0, b = 1, ...; é takes two ids, one a byte, as byte-level tokenizers have it."""

    def __init__(self, bos: bool, eos: bool, vocab_size: int = 32):
        self.vocab_size = vocab_size
        self.bos_id = 30 if bos else None
        self.eos_id = 31 if eos else None
        self.pad_id = 29
        self.mask_id = None
        self.sentinel_ids = ()

    def encode(self, text: str) -> list[int]:
        return [index for letter in text for index in ([26, 27] if letter == "é" else [ord(letter) - ord("a")])]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: list[int]) -> str:
        raw = bytes({26: 0xC3, 27: 0xA9}.get(index, ord("a") + index) for index in ids if index < 28)
        return raw.decode("utf-8", errors="replace")

    def contents(self) -> Mapping[str, bytes]:
        return {}

    def save(self, directory: str) -> None:
        del directory
