"""A vocabulary small enough to check by eye, with every special token, and rows made of it."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxllm.config import base
from jaxllm.data import examples
from jaxllm.data.examples.contract import Examples

PAD, BOS, EOS, MASK = 40, 41, 42, 43
SENTINELS = (49, 48, 47, 46, 45, 44)


class Specials:
    """a = 0, b = 1, ...; a space is 26. Above 40 there are pad, bos, eos, mask and six sentinels, the first one topmost."""

    vocab_size = 50
    bos_id, eos_id, pad_id, mask_id, sentinel_ids = BOS, EOS, PAD, MASK, SENTINELS

    def encode(self, text: str) -> list[int]:
        return [26 if letter == " " else ord(letter) - ord("a") for letter in text]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: list[int]) -> str:
        return "".join(" " if index == 26 else chr(ord("a") + index) for index in ids if index <= 26)

    def contents(self) -> Mapping[str, bytes]:
        return {}

    def save(self, directory: str) -> None:
        del directory


class Borderless(Specials):
    """Without bos, eos and pad."""

    bos_id, eos_id, pad_id = None, None, 0


def made(objective: str, model: str = "bert", **data: Any) -> Examples:
    """The data side of an objective; keywords are fields of config.data."""
    config = base()
    config.train.objective, config.model.name, config.model.context_tokens = objective, model, 512
    config.data.update(data)
    return examples.make(config)


def stored(*rows: list[int], **arrays: Any) -> dict[str, np.ndarray]:
    """Rows of tokens in one segment each, with more arrays by name."""
    tokens = np.array(rows, np.int32)
    return {"tokens": tokens, "segments": np.ones_like(tokens)} | {name: np.array(rows, np.int32) for name, rows in arrays.items()}
