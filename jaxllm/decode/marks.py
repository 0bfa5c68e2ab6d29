"""Text in which places are marked, such as `[MASK]` or `<extra_id_0>`: each mark is one token, the rest is encoded as always."""

import re
from collections.abc import Iterator, Mapping

from jaxllm.data.tokenizers.byte import ByteTokenizer
from jaxllm.data.tokenizers.char import CharTokenizer
from jaxllm.types import Tokenizer

SENTINEL = re.compile(r"<extra_id_(\d+)>")
MASKS = ("[MASK]", "<mask>")


def encode(tokenizer: Tokenizer, text: str, marks: Mapping[str, int]) -> list[int]:
    """The ids of the text, where each of `marks` is its id.

    The space before a mark is left out, unless each character is a token: it belongs to the token that the mark stands for.
    """
    if not marks:
        return tokenizer.encode(text)
    drops_space = not isinstance(tokenizer, ByteTokenizer | CharTokenizer)
    longest_first = sorted(marks, key=len, reverse=True)
    ids: list[int] = []
    parts = re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text)
    for place, part in enumerate(parts):
        if place % 2:
            ids.append(marks[part])
        else:
            before_mark = drops_space and place + 1 < len(parts)
            ids += tokenizer.encode(part.removesuffix(" ") if before_mark else part)
    return ids


def sentinels(tokenizer: Tokenizer, text: str) -> dict[str, int]:
    """The sentinels that stand in the text; ValueError for one that the tokenizer lacks, if it has any at all."""
    ids = tokenizer.sentinel_ids
    found = {mark[0]: int(mark[1]) for mark in SENTINEL.finditer(text)} if ids else {}
    for mark, number in found.items():
        if number >= len(ids):
            raise ValueError(
                f"{mark} in a prompt, for a tokenizer with {len(ids)} sentinels.\n  Accepted: <extra_id_0> to <extra_id_{len(ids) - 1}>."
                "\n  Number the hidden places from 0 on."
            )
    return {mark: ids[number] for mark, number in found.items()}


def masks(tokenizer: Tokenizer) -> dict[str, int]:
    """Every way to write the mask: [MASK], <mask> and as the tokenizer itself spells it. Empty without a mask token."""
    if tokenizer.mask_id is None:
        return {}
    return dict.fromkeys((*MASKS, *_spellings(tokenizer, tokenizer.mask_id)), tokenizer.mask_id)


def spell(tokenizer: Tokenizer, token: int) -> str:
    """What one id stands for; a special token, which no text contains, by its name."""
    return tokenizer.decode([token]) or next(_spellings(tokenizer, token), f"<{token}>")


def _spellings(tokenizer: Tokenizer, token: int) -> Iterator[str]:
    special: Mapping[str, int] = getattr(tokenizer, "special_tokens", {})
    return (text for text, index in special.items() if index == token)
