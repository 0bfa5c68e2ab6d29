"""Special tokens that an objective needs and that no text contains: they get the ids above a tokenizer's own ones."""

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple


class Added(NamedTuple):
    """How many there are of each. borders: a bos and an eos, for a tokenizer that has none (char)."""

    mask: bool = False
    sentinels: int = 0
    borders: bool = False


NONE = Added()


class Ids(NamedTuple):
    """Where they are, and the size of the vocabulary with them."""

    bos_id: int | None
    eos_id: int | None
    mask_id: int | None
    sentinel_ids: tuple[int, ...]
    vocab_size: int


def place(added: Added, base: int, bos_id: int | None = None, eos_id: int | None = None) -> Ids:
    """Ids from `base` on: bos and eos as far as they are missing, the mask, then the sentinels, whose first is the topmost id."""
    after = base
    if added.borders and bos_id is None:
        bos_id, after = after, after + 1
    if added.borders and eos_id is None:
        eos_id, after = after, after + 1
    mask_id = after if added.mask else None
    after += added.mask
    top = after + added.sentinels
    return Ids(bos_id, eos_id, mask_id, tuple(range(top - 1, after - 1, -1)), top)


def record(added: Added) -> dict[str, Any]:
    """The fields of `added` that are in use, for a tokenizer's record; the inverse of `restore`."""
    return {"added": {name: value for name, value in added._asdict().items() if value}} if any(added) else {}


def restore(saved: Mapping[str, Any]) -> Added:
    """From a tokenizer's record."""
    return Added(**saved.get("added", {}))


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
