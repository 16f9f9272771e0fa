"""The rows of a data file, with their values as they were written.

JSON is read row by row. No type is inferred over a column, so "2024-01-31" stays a text and 72 beside 2.5 stays 72, and
nothing is cached, so a file that was replaced is read anew. The columns of parquet files have types; what JSON has no
type for (dates, times, decimal numbers) becomes the text that a person would write.
"""

import bz2
import codecs
import gzip
import json
import lzma
import math
import re
import stat
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from rtd_jax.base.files import parse_json, parse_lines, reading

Row = dict[str, Any]

SUFFIXES = (".jsonl", ".json", ".parquet")
ROWS_AT_ONCE = 1_000  # of a table in memory
_NO_FRACTION = re.compile(r"\.0+(?=\D|$)")  # of a second: "10:30:00.000" is "10:30:00"
_WAY_OUT = "write one JSON object a line"
_PACKED: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}  # by first bytes


class WrittenFloat(float):
    """A number that remembers its text: an answer of 7.10, or one with thirty digits, is shown as it was written."""

    def __new__(cls, text: str) -> "WrittenFloat":
        number = super().__new__(cls, text)
        number._text = text
        return number

    _text: str

    def __str__(self) -> str:
        return self._text


def read_file(file: Path) -> Iterator[tuple[str, Row]]:
    """The rows of a .jsonl, .json or .parquet file, each with its place: "train.jsonl:17", a line or a row's number.

    A .json file is an array of objects, one object, or one object a line. Files of JSON may be packed by gzip, bzip2 or
    xz under the same names.

    Raises:
      ValueError: the file is missing, cannot be read, or is damaged, or a row is; names the file and the row.
    """
    if file.suffix not in SUFFIXES:
        raise ValueError(
            f"{file}: unknown kind of file; expected one of {', '.join(SUFFIXES)} (unpack it, or convert it)"
        )
    if file.is_symlink() and not file.exists():
        raise ValueError(f"{file}: a symbolic link to {file.readlink()}, which does not exist; mend the link")
    with reading(file, "give a file that exists"):
        status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
        raise ValueError(f"{file}: {kind}; expected a regular file")
    if status.st_size == 0:
        raise ValueError(f"{file}: the file is empty; expected rows")
    yield from _parquet_rows(file) if file.suffix == ".parquet" else _json_rows(file)


def _json_rows(file: Path) -> Iterator[tuple[str, Row]]:
    try:
        with reading(file), _unpacked(file) as lines:
            first = next((line for line in lines if line.strip()), b"")
        is_array = first.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
        if is_array or (file.suffix == ".json" and not _is_json(first)):
            with reading(file), _unpacked(file) as stream:
                value = parse_json(stream.read(), str(file), _WAY_OUT, _written_float)
            for number, row in enumerate(value if isinstance(value, list) else [value], start=1):
                if not isinstance(row, dict):
                    raise ValueError(f"{file}:{number}: {str(row)[:60]!r} is no JSON object; {_WAY_OUT}")
                yield f"{file}:{number}", row
            return
        with reading(file), _unpacked(file) as lines:
            yield from parse_lines(lines, str(file), _WAY_OUT, _written_float)
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{file}: damaged, it cannot be unpacked ({error}); get it again") from error


def _unpacked(file: Path) -> IO[bytes]:
    with file.open("rb") as stream:
        head = stream.read(8)
    opens = next((opens for mark, opens in _PACKED.items() if head.startswith(mark)), open)
    return opens(file, "rb")


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return False
    return True


def _written_float(text: str) -> float:
    number = WrittenFloat(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is beyond the range of a number; write it as text")
    return number


def _parquet_rows(file: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with reading(file), file.open("rb") as stream:  # opened here: the errors of Arrow's own files have no errno
        try:
            yield from table_rows(pq.ParquetFile(stream).iter_batches(batch_size=ROWS_AT_ONCE), str(file))
        except (pa.ArrowException, OSError) as error:
            if getattr(error, "errno", None):
                raise
            cause = " ".join(str(error).split())[:200]
            raise ValueError(f"{file}: damaged, or no parquet file ({cause}); write it again") from error


def table_rows(tables: Iterable[Any], name: str) -> Iterator[tuple[str, Row]]:
    """The rows of Arrow tables or batches, each with its place ("name:17"), with values as JSON would have them.

    Dates, times and decimal numbers become text ("2024-01-31"); a 32-bit 0.1 is the number 0.1, and 72.0 in a column of
    floats, which a missing value beside whole numbers makes of 72, is written 72; bytes become text where they are one.
    NaN stays, and is refused by the schema that wants a value there.

    Raises:
      ValueError: two columns have one name, or a value cannot be read; names row and column.
    """
    before = 0  # rows
    for table in tables:
        fields = table.schema.names
        if len(set(fields)) < len(fields):
            twice = next(field for field in fields if fields.count(field) > 1)
            raise ValueError(f"{name}: the column {twice!r} is there twice; rename one")
        columns = [_column(table.column(i), field, name, before) for i, field in enumerate(fields)]
        for number, values in enumerate(zip(*columns, strict=True), start=before + 1):
            yield f"{name}:{number}", dict(zip(fields, values, strict=True))
        before += len(table)


def _column(column: Any, field: str, name: str, before: int) -> list[Any]:
    import pyarrow as pa

    unreadable = (ValueError, OverflowError, pa.ArrowException)  # not UTF-8, a date after the year 9999
    try:
        return _values(column)
    except unreadable:
        for i in range(len(column)):
            try:
                _values(column.slice(i, 1))
            except unreadable as error:
                cause = " ".join(str(error).split())[:200]
                raise ValueError(
                    f"{name}:{before + i + 1}: field {field!r} cannot be read as {column.type} ({cause}); "
                    "write the row again"
                ) from error
        raise


def _values(column: Any) -> list[Any]:
    import numpy as np
    import pyarrow as pa
    import pyarrow.types as types

    if types.is_temporal(column.type) or types.is_decimal(column.type):
        texts = column.cast(pa.string()).to_pylist()
        return [text and _NO_FRACTION.sub("", text) for text in texts] if types.is_temporal(column.type) else texts
    values = column.to_pylist()
    if types.is_floating(column.type):
        narrow = column.type.to_pandas_dtype()  # the shortest text of its own precision: 0.1, not 0.10000000149

        def written(value: float) -> WrittenFloat:
            return WrittenFloat(str(np.dtype(narrow).type(value)).removesuffix(".0"))

        return [None if value is None else written(value) for value in values]
    if types.is_binary(column.type) or types.is_large_binary(column.type):
        return [None if value is None else _text_if_any(value) for value in values]
    return values


def _text_if_any(value: bytes) -> str | bytes:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return value  # an image, perhaps: an error only where a schema wants text
