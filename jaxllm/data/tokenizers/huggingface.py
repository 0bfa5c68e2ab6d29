"""Tokenizers from a `tokenizer.json` (the format of Hugging Face tokenizers)."""

from typing import Any

from jaxllm.data.tokenizers import files

FILE = "tokenizer.json"


class HuggingFaceTokenizer:
    """A tokenizer.json and the ids of its special tokens.

    Special tokens are added by data/pack.py only: text that spells one ("</s>") is encoded as the text it is.
    """

    def __init__(self, definition: bytes, *, bos_id: int | None, eos_id: int | None, pad_id: int) -> None:
        self.definition = definition
        self.tokenizer = parse(definition)
        self.vocab_size = max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.bos_id, self.eos_id, self.pad_id = bos_id, eos_id, pad_id

    def encode(self, text: str) -> list[int]:
        files.utf8(text)
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Same ids as `encode`, by all processor cores."""
        for text in texts:
            files.utf8(text)
        return [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(files.valid(ids, self.vocab_size), skip_special_tokens=True)

    def contents(self) -> dict[str, bytes]:
        record = {"kind": "huggingface", "bos_id": self.bos_id, "eos_id": self.eos_id, "pad_id": self.pad_id}
        return files.contents(record, {FILE: self.definition})

    def save(self, directory: str) -> None:
        files.write(directory, self.contents())


def restore(saved: files.Saved) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(saved.files[FILE], **{name: saved.record[name] for name in ("bos_id", "eos_id", "pad_id")})


def parse(definition: bytes) -> Any:
    """The library's tokenizer; ValueError if the bytes are none."""
    try:
        import tokenizers  # noqa: PLC0415
    except ImportError as error:
        raise ValueError(
            "a tokenizer.json needs the package tokenizers, which is not installed.\n  Accepted: a tokenizer.model needs nothing"
            " more.\n  Run: pip install 'jaxllm[data]'"
        ) from error
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(definition)
    except ValueError as error:
        raise files.NotATokenizer(str(error)) from error
    # A file may ask for padding to a length and for truncation; both would change the data silently.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    return tokenizer
