"""Names of classes and their numbers."""

import re
from collections.abc import Iterable, Sequence

from jaxllm.data.documents import Document

NUMBER = re.compile(r"-?\d+")
SHOWN = 20


def distinct(names: Iterable[str]) -> tuple[str, ...]:
    """Each name once: by their value if all are whole numbers, else by their letters."""
    found = set(names)
    return tuple(sorted(found, key=int if all(map(NUMBER.fullmatch, found)) else str))


def of(document: Document) -> tuple[str, ...]:
    """The names of the class of a document, or of those of its words."""
    return document.target if isinstance(document.target, tuple) else (str(document.target),)


def index(labels: Sequence[str]) -> dict[str, int]:
    """Name -> number."""
    return {name: number for number, name in enumerate(labels)}


def check_known(found: Iterable[str], labels: Sequence[str], where: str) -> None:
    """ValueError that names what is none of the classes; `where` it was found."""
    unknown = distinct(set(found) - set(labels))
    if unknown:
        listed = ", ".join(labels[:SHOWN]) + (f" and {len(labels) - SHOWN} more" if len(labels) > SHOWN else "")
        raise ValueError(
            f"{where} has labels that the training data lacks: {', '.join(unknown[:SHOWN])}.\n  Accepted: {listed}.\n"
            "  Correct them, leave their rows out, or train on data that has them."
        )
