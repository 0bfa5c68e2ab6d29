"""Tokens of a text with the places of their characters, special tokens included."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple


class Located(NamedTuple):
    """spans: the characters [start, stop) that each id stands for. Ids that share a character all have it; some stand for none."""

    ids: list[int]
    spans: list[tuple[int, int]]


def join(parts: Iterable[tuple[str, Located]]) -> Located:
    """One after the other: each text and its tokens."""
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    place = 0
    for text, part in parts:
        ids += part.ids
        spans += [(start + place, stop + place) for start, stop in part.spans]
        place += len(text)
    return Located(ids, spans)


def with_specials(text: str, tokens: Mapping[str, int], locate: Callable[[str], Located]) -> Located:
    """What spells one of the special `tokens` is that token; what stands between two of them is taken by itself, by `locate`."""
    pattern = "|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))
    parts = [part for part in re.split(f"({pattern})", text) if part] if tokens else [text]
    return join((part, Located([tokens[part]], [(0, len(part))]) if part in tokens else locate(part)) for part in parts)
