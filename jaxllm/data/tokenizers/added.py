"""Special tokens that no text contains, as an objective or the config asks for them: they get the ids above a tokenizer's own ones."""

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

# What the special tokens of a tokenizer are called that has no names of its own.
NAMES = {"bos": "<s>", "eos": "</s>", "pad": "<pad>", "mask": "<mask>"}


class Added(NamedTuple):
    """How many there are of each. borders: a bos and an eos, for a tokenizer that has none (char). tokens: others, by their names."""

    mask: bool = False
    sentinels: int = 0
    borders: bool = False
    tokens: tuple[str, ...] = ()


NONE = Added()


class Ids(NamedTuple):
    """Where they are, and the size of the vocabulary with them."""

    bos_id: int | None
    eos_id: int | None
    mask_id: int | None
    sentinel_ids: tuple[int, ...]
    tokens: dict[str, int]
    vocab_size: int


def place(added: Added, base: int, bos_id: int | None = None, eos_id: int | None = None) -> Ids:
    """Ids from `base` on: bos and eos as far as they are missing, the mask, the sentinels in falling order, the other tokens.

    These come last, so that those that are added later move no id.
    """
    after = base
    if added.borders and bos_id is None:
        bos_id, after = after, after + 1
    if added.borders and eos_id is None:
        eos_id, after = after, after + 1
    mask_id = after if added.mask else None
    after += added.mask
    top = after + added.sentinels
    tokens = {token: top + order for order, token in enumerate(added.tokens)}
    return Ids(bos_id, eos_id, mask_id, tuple(range(top - 1, after - 1, -1)), tokens, top + len(tokens))


def record(added: Added) -> dict[str, Any]:
    """The fields of `added` that are in use, for a tokenizer's record; the inverse of `restore`."""
    return {"added": {name: value for name, value in added._asdict().items() if value}} if any(added) else {}


def restore(saved: Mapping[str, Any]) -> Added:
    """From a tokenizer's record."""
    fields = saved.get("added", {})
    return Added(**fields | {"tokens": tuple(fields.get("tokens", ()))})


def special_tokens(tokens: Mapping[str, int], **ids: int | None) -> dict[str, int]:
    """Names of special tokens, and their ids: bos, eos, pad and mask as far as there is one, and the added `tokens`."""
    return {NAMES[name]: index for name, index in ids.items() if index is not None} | dict(tokens)


def names(sentinel_ids: Sequence[int]) -> dict[int, str]:
    """id -> `<extra_id_N>`."""
    return {index: f"<extra_id_{order}>" for order, index in enumerate(sentinel_ids)}


def spell(ids: list[int], spelled: Mapping[int, str], decode: Callable[[list[int], bool], str]) -> str:
    """The text of ids, some of which are `spelled`. `decode(ids, first)` is that of the ids between them."""
    if not spelled:
        return decode(ids, True)
    parts: list[str] = []
    for known, group in groupby(ids, spelled.__contains__):
        run = list(group)
        parts += [spelled[index] for index in run] if known else [decode(run, not parts)]
    return "".join(parts)
