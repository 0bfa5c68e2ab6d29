"""Data sets of the Hugging Face hub, streamed: rows arrive while they are read, nothing is stored as a whole."""

import urllib.parse
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from jaxllm.data.documents import Document
from jaxllm.data.sources import fields


def read(location: str, config: ConfigDict) -> Iterator[Document]:
    """A document a row, from the fields that the objective reads, of `OWNER/NAME?config=C&split=S` (split: train unless given).

    The origin is `hf:OWNER/NAME[row]`. NAME may also be a folder in the hub's layout.
    """
    name, _, _ = parse(location)
    wanted = fields.of(config)
    for index, row in enumerate(_rows(location)):
        yield fields.document(row, wanted, f"hf:{name}[{index}]")


def _rows(location: str) -> Iterator[dict[str, Any]]:
    name, subset, split = parse(location)
    try:
        import datasets  # noqa: PLC0415
    except ImportError as error:
        raise ValueError(
            f"'hf:{location}' needs the package datasets, which is not installed.\n  Accepted: files, folders and python_docs need"
            " nothing more.\n  Run: pip install 'jaxllm[data]'"
        ) from error
    count = 0
    try:
        for row in datasets.load_dataset(name, subset, split=split, streaming=True):
            yield row
            count += 1
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        what = f"cannot be read after row {count - 1}" if count else "cannot be opened"
        raise ValueError(
            f"'hf:{location}' {what}: {error}\n  Accepted: hf:OWNER/NAME?config=C&split=S as the hub names them.\n"
            "  Check the names and the network; a private data set needs `huggingface-cli login`."
        ) from error


def parse(location: str) -> tuple[str, str | None, str]:
    """(name, config or None, split) of `OWNER/NAME?config=C&split=S`."""
    name, _, query = location.partition("?")
    options = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
    unknown = sorted(set(options) - {"config", "split"})
    if not name or unknown or (query and not options):
        what = f"unknown option '{unknown[0]}'" if unknown else "no name" if not name else f"'{query}' is not KEY=VALUE"
        raise ValueError(
            f"'hf:{location}': {what}.\n  Accepted: hf:OWNER/NAME, then ?config=C, ?split=S or ?config=C&split=S.\n"
            "  Correct the name."
        )
    return name, options.get("config"), options.get("split", "train")
