"""Numbers as people read them."""

import json
from typing import Any


def count(number: float) -> str:
    """Three digits and a unit: 987, 12.3k, 4.56M, 7.89G."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size * 0.9995:
            scaled = number / size
            return f"{scaled:.{2 if scaled < 9.995 else 1 if scaled < 99.95 else 0}f}{unit}"
    return f"{number:.0f}"


def clock(secs: float) -> str:
    """0:07, 12:34, 1:02:03, 3 days 4 h."""
    whole = round(secs)
    hours, rest = divmod(whole, 3600)
    if hours >= 48:
        return f"{hours // 24} days {hours % 24} h"
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def size(number_bytes: float) -> str:
    """Binary units: 512 B, 12.3 MiB, 4.56 GiB."""
    for unit, power in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if number_bytes >= 1 << power:
            scaled = number_bytes / (1 << power)
            return f"{scaled:.{2 if scaled < 9.995 else 1 if scaled < 99.95 else 0}f} {unit}"
    return f"{number_bytes:.0f} B"


def duration(secs: float) -> str:
    """A measured time: 0.83 s, 12.3 s, then as `clock`."""
    return f"{secs:.{2 if secs < 10 else 1}f} s" if secs < 60 else clock(secs)


def plain(value: Any) -> str:
    """A JSON value as text: a large whole number with commas, a list with commas between its parts, nothing for null."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) >= 10_000 and value == value // 1:
        return f"{value:,.0f}"
    if isinstance(value, list) and not any(isinstance(part, list | dict) or _ambiguous(part) for part in value):
        return ", ".join(map(plain, value))
    return json.dumps(value)


def _ambiguous(part: Any) -> bool:
    """Whether a text would not be seen as it is between commas."""
    return isinstance(part, str) and (part != part.strip() or "," in part or not part)
