"""The identity of a model's weights: a digest of every byte that is read of it.

Large files are read once: their digests are kept in the user's cache folder, by everything that the file system says of
a file. A copy that keeps the modification time (`cp -p`, `rsync -t`, an archive) still changes the time of the inode's
last change, which a copy cannot set.
"""

import concurrent.futures
import contextlib
import hashlib
import os
import time
from pathlib import Path
from typing import NamedTuple

from rtd_jax.base.files import file_digest, json_digest, read_record, reading, write_record
from rtd_jax.models.weight_files import weight_files

KEPT_FROM = 64 * 2**20  # bytes; a smaller file is hashed anew in less than a second
_SETTLED = 2.0  # seconds; a file that was changed so recently may be changed again within one tick of its clock
_FORMAT = 1


class Fingerprint(str):
    """A fingerprint that is also equal to the form in which earlier versions recorded it.

    Those read the names, sizes and headers of the safetensors files and the first and last MiB of their data.
    """

    earlier: str

    def __new__(cls, value: str, earlier: str = "") -> "Fingerprint":
        made = super().__new__(cls, value)
        made.earlier = earlier or value
        return made

    def __getnewargs__(self) -> tuple[str, str]:  # type: ignore[override]  # a copy needs both
        return str(self), self.earlier

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and any(str.__eq__(form, other) for form in (self, self.earlier))

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


def weights_fingerprint(directory: Path) -> Fingerprint:
    """ "v2-" and the SHA-256 of config.json and of each file that holds weights, by name and content.

    Raises:
      ValueError: a file is missing or cannot be read.
    """
    files = weight_files(directory)
    with reading(directory / "config.json", "give the directory of a Hugging Face checkpoint"):
        config = (directory / "config.json").read_bytes()
    # Threads, because hashing releases the interpreter's lock and a shard has several GB.
    with concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(_digest, files.values()))
    whole = hashlib.sha256(config)
    for name, digest in zip(files, digests, strict=True):
        whole.update(f"\0{name}\0{digest}".encode())
    return Fingerprint(f"v2-{whole.hexdigest()}", _earlier_form(directory, config))


def _earlier_form(directory: Path, config: bytes) -> str:
    """The fingerprint of earlier versions: of config.json and of parts of each safetensors file in the folder."""
    digest = hashlib.sha256(config)
    for path in sorted(directory.glob("*.safetensors")):
        with reading(path, "download it again"):
            size = path.stat().st_size
            digest.update(f"{path.name}:{size}".encode())
            with path.open("rb") as file:
                head = file.read(8)
                digest.update(head + file.read(min(int.from_bytes(head, "little"), size)) + file.read(2**20))
                file.seek(max(0, size - 2**20))
                digest.update(file.read())
    return digest.hexdigest()


def _digest(path: Path) -> str:
    """SHA-256 of a file's bytes; of a large file it is kept, and read again while the file stays as it is."""
    with reading(path, "download it again"):
        before = _state(path)
        if before.size < KEPT_FROM:
            return file_digest(path)
        kept = _cache_folder() / "digests" / f"{json_digest(before._asdict())}.json"
        with contextlib.suppress(ValueError):  # not there, not readable, damaged
            return str(read_record(kept, _FORMAT, "")["sha256"])
        digest = file_digest(path)
        is_settled = time.time() - max(before.modified, before.changed) / 1e9 > _SETTLED
        if is_settled and _state(path) == before:
            with contextlib.suppress(OSError):  # a home that cannot be written
                write_record(kept, _FORMAT, {"file": str(path), "sha256": digest})
        return digest


class _State(NamedTuple):
    """What changes when a file is written, replaced or moved. Times in nanoseconds."""

    path: str
    size: int  # bytes
    modified: int
    changed: int  # of the inode: its content, name or permissions
    inode: int
    device: int


def _state(path: Path) -> _State:
    stat = path.stat()
    return _State(str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev)


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "rtd_jax"
