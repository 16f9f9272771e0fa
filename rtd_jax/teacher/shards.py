"""The shards of a teacher cache: which chains are where, and a record's bytes, checked.

    <folder>/shard-<hash>.array_record   records, in ArrayRecord's format
    <folder>/shard-<hash>.json           which cache it belongs to, and the keys and checksums of its records

A checksum is taken over the key and the record, so that a record under another's key is noticed.
"""

import contextlib
import errno
import os
import re
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from rtd_jax.base.files import read_failure, reading, replacing, write_record
from rtd_jax.base.records import load_record

FORMAT = 3
UNBOUND = 2  # an earlier format: a shard does not say whose it is, and checksums leave out the keys
_MOST_OPEN = 64  # files; a cache may have thousands of shards, and a process is often allowed 256 files


@dataclass(frozen=True)
class Listed:
    """Content of a shard's JSON."""

    bytes: int  # size of the .array_record
    keys: tuple[str, ...]  # SHA-256 of each chain, in hex
    crc32: tuple[int, ...]  # of each record, begun with its key
    cache: str = ""  # digest of the identity of the cache that the shard was written for; "" in format 2

    def __post_init__(self) -> None:
        if self.bytes < 0 or len(self.keys) != len(self.crc32) or len(set(self.keys)) != len(self.keys):
            raise ValueError(
                f"bytes is {self.bytes}, with {len(self.keys)} keys ({len(set(self.keys))} different) and "
                f"{len(self.crc32)} checksums; expected as many checksums as different keys"
            )
        for key in self.keys:
            if not re.fullmatch("[0-9a-f]{64}", key):
                raise ValueError(f"key {key[:80]!r} is no SHA-256 in hex")
        if any(not 0 <= checksum < 2**32 for checksum in self.crc32):
            raise ValueError(f"crc32 has {min(self.crc32)} to {max(self.crc32)}; expected 0 to {2**32 - 1}")


class Place(NamedTuple):
    """Where a chain's record is."""

    shard: str  # name of the files, without suffix
    row: int
    checksum: int
    start: int  # CRC-32 that the checksum was begun with: that of the key; 0 in format 2


def write_shard(folder: Path, name: str, cache: str, records: Sequence[tuple[str, bytes]]) -> None:
    """Writes (key, record) pairs, then their list, which makes them part of the cache with this identity's digest."""
    path = folder / f"{name}.array_record"
    with replacing(path) as temporary:
        writer = ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
        for _, record in records:
            writer.write(record)
        writer.close()
        size = temporary.stat().st_size
    checksums = [zlib.crc32(record, zlib.crc32(key.encode())) for key, record in records]
    listed = {"cache": cache, "bytes": size, "keys": [key for key, _ in records], "crc32": checksums}
    write_record(folder / f"{name}.json", FORMAT, listed)


def shard_names(folder: Path) -> list[str]:
    """The names of a folder's shards that have a list, without suffix. Raises ValueError: it cannot be read."""
    with reading(folder, "give a folder that exists"):
        return sorted(
            name.removesuffix(".json")
            for name in os.listdir(folder)
            if name.startswith("shard-") and name.endswith(".json")
        )


def index_shards(folder: Path, cache: str, *, unbound: bool) -> dict[str, Place]:
    """Where the record of each key is.

    Args:
      cache: digest of the identity that every shard must have been written for.
      unbound: whether shards of format 2, which do not say it, are taken too.

    Raises:
      ValueError: a shard that is missing, of another size, damaged, or of another cache; it is named.
    """
    places: dict[str, Place] = {}
    for name in shard_names(folder):
        listed = _listed(folder / f"{name}.json")
        if not listed.cache and not unbound:
            raise ValueError(
                f"{folder / name}.json is of format {UNBOUND} and does not say which cache it belongs to; keep it with "
                f"the manifest.json that it was written with, or move {name}.* out and write its chains again"
            )
        if listed.cache and listed.cache != cache:
            raise ValueError(
                f"{folder / name}.json belongs to another teacher cache (of another teacher, tokenizer, layers or "
                f"storage: identity {listed.cache[:12]}, this folder's is {cache[:12]}); move {name}.* back to the "
                "folder that it came from"
            )
        _check_size(folder / f"{name}.array_record", listed.bytes)
        for row, (key, checksum) in enumerate(zip(listed.keys, listed.crc32, strict=True)):
            start = zlib.crc32(key.encode()) if listed.cache else 0
            places.setdefault(key, Place(name, row, checksum, start))
    return places


def _listed(path: Path) -> Listed:
    return load_record(Listed, path, FORMAT, rewriting(path.stem), undigested=(None,))


def _check_size(path: Path, size: int) -> None:
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        found = -1
    except OSError as error:
        raise ValueError(f"{path}: {read_failure(error)}") from error
    if found != size:
        state = f"has {found} bytes" if found >= 0 else "is missing"
        raise ValueError(f"{path} {state}, {path.stem}.json says {size}; {rewriting(path.stem)}")


def rewriting(name: str) -> str:
    """The way out of a damaged shard."""
    return f"delete {name}.* and run launch/cache_teacher.py again, which writes what is missing"


class ShardReaders:
    """Reads records by their place. Files are opened as they are needed, and a few are kept open."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._readers: OrderedDict[str, ArrayRecordReader] = OrderedDict()  # the last one was used last

    def read(self, place: Place) -> bytes:
        """The record at a place.

        Raises:
          ValueError: the file cannot be read now, or the record is damaged; the message says which of the two.
        """
        was_open = place.shard in self._readers
        reader = self._reader(place.shard)
        try:
            (record,) = reader.read([place.row])
            if zlib.crc32(record, place.start) != place.checksum:
                raise RuntimeError("its checksum differs")
            return record
        except Exception as error:  # the reader raises many kinds
            self._close(place.shard)
            if was_open:  # the file may have been replaced since it was opened
                return self.read(place)
            path = self._folder / f"{place.shard}.array_record"
            text = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            if re.match(r"\w+\(\) failed:", text):  # a system call, as the library reports it
                raise ValueError(
                    f"{path}: could not be read ({text}); see that it can be read and run again"
                ) from error
            raise ValueError(f"{path}: record {place.row} is damaged ({text}); {rewriting(place.shard)}") from error

    def _reader(self, name: str) -> ArrayRecordReader:
        if name in self._readers:
            self._readers.move_to_end(name)
            return self._readers[name]
        while len(self._readers) >= _MOST_OPEN:
            self._close(next(iter(self._readers)))
        path = self._folder / f"{name}.array_record"
        self._check_opens(path)
        self._readers[name] = ArrayRecordReader(str(path), "readahead_buffer_size:0")
        return self._readers[name]

    def _check_opens(self, path: Path) -> None:
        """Raises ValueError with the system's reason where a file cannot be opened: the reader would not say it."""
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE) or not self._readers:
                with reading(path, rewriting(path.stem)):
                    raise
            self._close(next(iter(self._readers)))  # and try again with one file less
            self._check_opens(path)
        else:
            os.close(descriptor)

    def _close(self, name: str) -> None:
        reader = self._readers.pop(name, None)
        if reader is not None:
            with contextlib.suppress(Exception):  # that of a damaged file reports the damage again
                reader.close()
