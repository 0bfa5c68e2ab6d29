"""A corpus of 40 documents, and what tests of prepare ask of its result."""

from pathlib import Path

import numpy as np

from jaxllm.data import folder
from jaxllm.data.prepare import Prepared


def document(number: int) -> str:
    return f"Document number {number} says: " + "é and so on, " * (number % 7) + "end."


class Lines(list[str]):
    """A log that can be read."""

    def __call__(self, line: str) -> None:
        self.append(line)

    @property
    def text(self) -> str:
        return "\n".join(self)


def texts(prepared: Prepared, split: str) -> list[str]:
    """The documents of a split, put together again from the targets of its rows."""
    shards = getattr(prepared, split)
    rows = shards.rows(np.arange(len(shards)))
    ids = rows["tokens"][:, 1:][rows["weights"] > 0].tolist()
    ends = [index for index, token in enumerate(ids) if token == prepared.tokenizer.eos_id]
    return [prepared.tokenizer.decode(ids[start:stop]) for start, stop in zip([0, *(end + 1 for end in ends)], ends, strict=False)]


def contents(directory: Path) -> dict[str, bytes]:
    """Everything but the record, which holds times."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != folder.RECORD
    }
