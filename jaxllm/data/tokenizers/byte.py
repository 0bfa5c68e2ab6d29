"""The 256 bytes of UTF-8 as tokens: no training, no unknown text, long sequences (Xue et al. 2022, arXiv:2105.13626).

The id of a byte is the byte, and the special tokens follow; ByT5 itself puts its three special tokens first.
"""

from collections.abc import Callable, Iterable

from ml_collections import ConfigDict

from jaxllm.data.tokenizers import files


class ByteTokenizer:
    """256 bytes, then bos, eos and pad."""

    vocab_size = 259
    bos_id = 256
    eos_id = 257
    pad_id = 258

    def encode(self, text: str) -> list[int]:
        return list(files.utf8(text))

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: list[int]) -> str:
        return bytes(part for part in files.valid(ids, self.vocab_size) if part < 256).decode("utf-8", errors="replace")

    def contents(self) -> dict[str, bytes]:
        return files.contents({"kind": "byte"}, {})

    def save(self, directory: str) -> None:
        files.write(directory, self.contents())


def train(config: ConfigDict, texts: Callable[[], Iterable[str]]) -> ByteTokenizer:
    """The byte tokenizer; the texts are not read."""
    del config, texts
    return ByteTokenizer()


def restore(saved: files.Saved) -> ByteTokenizer:
    del saved
    return ByteTokenizer()
