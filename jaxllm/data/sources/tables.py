"""CSV, TSV and Parquet files, one document a row."""

import csv
from collections.abc import Iterator

from ml_collections import ConfigDict

from jaxllm.data.documents import Document
from jaxllm.data.sources import text
from jaxllm.data.sources.jsonl import field_text

# The csv module refuses fields above 128 KiB by default; documents are longer than that.
FIELD_CHARS = 2**31 - 1
PARQUET_ROWS = 256


def read_csv(location: str, config: ConfigDict) -> Iterator[Document]:
    """The column `data.text_field` of each row; the first one names the columns. The origin is `file:line` (where the row ends)."""
    field = config.data.text_field
    separator = "\t" if location.lower().removesuffix(".gz").endswith(".tsv") else ","
    csv.field_size_limit(FIELD_CHARS)
    rows = csv.reader((line.text for line in text.lines(location)), delimiter=separator, strict=True)
    try:
        header = next(filter(None, rows), None)
        if header is None:
            return
        if field not in header:
            raise ValueError(_no_column(location, field, header))
        column = header.index(field)
        for row in rows:
            if not row:
                continue
            if len(row) != len(header):
                raise ValueError(
                    f"{location}:{rows.line_num} has {len(row)} cells, but the header has {len(header)}.\n"
                    f"  Accepted: one cell a column. Put a cell that contains a '{separator}' or a line break into double quotes."
                )
            yield Document(row[column], f"{location}:{rows.line_num}")
    except csv.Error as error:
        raise ValueError(
            f"{location}:{rows.line_num} is not CSV: {error}.\n  Accepted: RFC 4180, with '{separator}' between the cells.\n"
            "  Double the quotes inside a quoted cell, and close every quote."
        ) from error


def read_parquet(location: str, config: ConfigDict) -> Iterator[Document]:
    """The column `data.text_field` of each row. The origin is `file[row]`."""
    try:
        import pyarrow  # noqa: PLC0415
        import pyarrow.parquet  # noqa: PLC0415
    except ImportError as error:
        raise ValueError(
            f"'{location}' needs pyarrow, which is not installed.\n  Accepted: text, JSONL and CSV need nothing more.\n"
            "  Run: pip install 'jaxllm[data]'"
        ) from error
    field = config.data.text_field
    try:
        with pyarrow.parquet.ParquetFile(location) as file:
            if field not in file.schema_arrow.names:
                raise ValueError(_no_column(location, field, file.schema_arrow.names))
            row = 0
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=[field]):
                for value in batch.column(field).to_pylist():
                    origin = f"{location}[{row}]"
                    yield Document(field_text({field: value}, field, origin), origin)
                    row += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"'{location}' is not a whole Parquet file: {error}\n  Accepted: Parquet, with text in UTF-8.\n"
            "  Fetch it again, or correct its suffix."
        ) from error


def _no_column(location: str, field: str, columns: list[str]) -> str:
    return (
        f"'{location}' has no column '{field}'.\n  Accepted: {', '.join(columns)}.\n"
        "  Set data.text_field to the column that holds the text."
    )
