"""CSV, TSV and Parquet files, one document a row."""

import csv
from collections.abc import Iterator
from contextlib import closing

from ml_collections import ConfigDict

from jaxllm.data.documents import Document
from jaxllm.data.sources import fields, text

# The csv module refuses fields above 128 KiB by default; documents are longer than that.
FIELD_CHARS = 2**31 - 1
PARQUET_ROWS = 256


def read_csv(location: str, config: ConfigDict) -> Iterator[Document]:
    """A document a row, from the columns that the objective reads; the first row names them. The origin is `file:line` (its end)."""
    wanted = fields.of(config)
    separator = "\t" if location.lower().removesuffix(".gz").endswith(".tsv") else ","
    csv.field_size_limit(FIELD_CHARS)
    with closing(text.lines(location)) as lines:
        rows = csv.reader((line.text for line in lines), delimiter=separator, strict=True)
        try:
            header = next(filter(None, rows), None)
            if header is None:
                return
            fields.check_columns(location, header, wanted)
            for row in rows:
                if not row:
                    continue
                if len(row) != len(header):
                    raise ValueError(
                        f"{location}:{rows.line_num} has {len(row)} cells, but the header has {len(header)}.\n"
                        f"  Accepted: one cell a column. Put a cell that contains a '{separator}' or a line break into double quotes."
                    )
                yield fields.document(dict(zip(header, row, strict=True)), wanted, f"{location}:{rows.line_num}")
        except csv.Error as error:
            raise ValueError(
                f"{location}:{rows.line_num} is not CSV: {error}.\n  Accepted: RFC 4180, with '{separator}' between the cells.\n"
                "  Double the quotes inside a quoted cell, and close every quote."
            ) from error


def read_parquet(location: str, config: ConfigDict) -> Iterator[Document]:
    """A document a row, from the columns that the objective reads. The origin is `file[row]`."""
    try:
        import pyarrow  # noqa: PLC0415
        import pyarrow.parquet  # noqa: PLC0415
    except ImportError as error:
        raise ValueError(
            f"'{location}' needs pyarrow, which is not installed.\n  Accepted: text, JSONL and CSV need nothing more.\n"
            "  Run: pip install 'jaxllm[data]'"
        ) from error
    wanted = fields.of(config)
    try:
        with pyarrow.parquet.ParquetFile(location) as file:
            fields.check_columns(location, file.schema_arrow.names, wanted)
            row = 0
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=list(wanted.settings) or None):
                for values in batch.to_pylist():
                    yield fields.document(values, wanted, f"{location}[{row}]")
                    row += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"'{location}' is not a whole Parquet file: {error}\n  Accepted: Parquet, with text in UTF-8.\n"
            "  Fetch it again, or correct its suffix."
        ) from error
