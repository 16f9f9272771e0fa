"""Replies on disk, one line each as they arrive: a request with a reply in the log is never sent again.

<folder>/requests.json     which teacher is asked, and how; a folder holds the replies to requests of one such identity
<folder>/responses.jsonl   {"id", "sample", "text", "finish", "crc32"}, appended and synced to the disk
"""

import dataclasses
import fcntl
import json
import os
import zlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from rtd_jax.base.files import parse_json, read_object, read_record, reading, write_record
from rtd_jax.base.settings import build
from rtd_jax.data.manifest import LOG
from rtd_jax.teacher.served.requests import Finish, Reply, Request

FORMAT = 2  # of requests.json; 1 has no digest


@dataclasses.dataclass(frozen=True)
class LogLine:
    """A line of the log."""

    id: str  # of the request
    sample: int  # which of the problem's, from 0
    text: str  # of the reply
    finish: Finish  # how it ended
    crc32: int  # of the other fields

    @property
    def checksum(self) -> int:
        """What `crc32` has to be."""
        fields = {key: value for key, value in vars(self).items() if key != "crc32"}
        return zlib.crc32(json.dumps(fields, sort_keys=True).encode())


def recorded_identity(folder: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """The identity with what the folder records of it: a teacher's fingerprint may be there in its earlier form.

    Requests are named by the text of the identity, so the replies of an earlier version are found by its text only.
    """
    path = folder / "requests.json"
    before = read_object(path) if path.exists() else {}
    return {key: before[key] if before.get(key) == value else value for key, value in identity.items()}


class ResponseLog(AbstractContextManager):
    """The replies in a folder, to which more can be added; use it as a context manager.

    A last line that is incomplete, because the process was killed while writing it, is dropped. One process writes at a
    time; it holds a lock on the file, which the system releases when the process ends.

    Args:
      folder: of the log.
      identity: what decides the replies; a folder holds those of one identity.
      way_out: the flag with which a user chooses another folder.

    Raises:
      ValueError: the folder holds replies to other requests (the message names what differs) or other files, a line is
        damaged (the message names it), or another process is writing.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], way_out: str = "--workdir") -> None:
        self.path = folder / LOG
        self._check_identity(folder, identity, way_out)
        with reading(self.path):
            self._file = self.path.open("ab+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.replies = self._read()
        except (BlockingIOError, ValueError) as error:
            self._file.close()
            if isinstance(error, ValueError):
                raise
            raise ValueError(f"{self.path} is being written by another process; wait for it, or stop it") from error

    def _check_identity(self, folder: Path, identity: dict[str, Any], way_out: str) -> None:
        path, now = folder / "requests.json", json.loads(json.dumps(identity))
        if not path.exists():
            if self.path.exists():
                raise ValueError(f"{self.path} has no {path.name} beside it, which says what was asked; restore it")
            write_record(path, FORMAT, now)
            return
        before = read_record(path, FORMAT, f"restore it, or use another {way_out}", undigested=(1,))
        del before["format"]
        changed = [key for key in sorted(now.keys() | before.keys()) if before.get(key) != now.get(key)]
        if changed:
            name, *others = changed
            more = f" (and {', '.join(others)})" if others else ""
            raise ValueError(
                f"{folder} holds replies of another {name}: {before.get(name)!r}, this run has {now.get(name)!r}{more}"
                f"; use the settings it was begun with, or another {way_out}"
            )

    def _read(self) -> dict[str, Reply]:
        self._file.seek(0)
        content = self._file.read()
        whole, newline, torn = content.rpartition(b"\n")
        if torn:
            self._file.truncate(len(whole) + len(newline))
        replies: dict[str, Reply] = {}
        for number, line in enumerate(whole.split(b"\n") if newline else [], start=1):
            try:
                row = parse_json(line, "it", "")
                if not isinstance(row, dict):
                    raise ValueError(f"it is {type(row).__name__}, no object")
                entry = build(LogLine, row, "its field")
                if entry.crc32 != entry.checksum:
                    raise ValueError("its checksum differs")
            except ValueError as error:
                raise ValueError(
                    f"{self.path}:{number} is damaged: {str(error).removesuffix('; ')}; delete this line and run the "
                    "command again, which asks for it anew"
                ) from error
            replies.setdefault(entry.id, Reply(entry.text, entry.finish))
        return replies

    def add(self, replies: Sequence[tuple[Request, Reply]]) -> None:
        """Appends replies and waits until they are on the disk."""
        for request, reply in replies:
            line = LogLine(request.id, request.sample, reply.text, reply.finish, 0)
            line = dataclasses.replace(line, crc32=line.checksum)
            self._file.write(json.dumps(vars(line)).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.replies.update((request.id, reply) for request, reply in replies)

    def __exit__(self, *_: object) -> None:
        self._file.close()
