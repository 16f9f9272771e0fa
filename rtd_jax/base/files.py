"""Files that are whole: writes that leave the old file or the new one, and reads that say what is wrong with a file.

`replacing` promises that after a crash of the process or of the machine a file is the old one or the new one, because
content and name are on the disk before it returns. Small JSON files that say what lies beside them (a manifest, a
classifier's settings) are records: they have a format number and a digest of their own content, so that a changed
character is noticed.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

_WRITTEN = (".json", ".jsonl", ".html", ".md", ".png")  # suffixes of the files that commands write into their folders
DIGEST = "digest"  # key of a record that holds the SHA-256 of everything else in it

# What a user can do about a read that failed although the file may be sound, by errno.
_WAYS_OUT = {
    errno.EACCES: "let this user read it (chmod, chown)",
    errno.EPERM: "let this user read it (chmod, chown)",
    errno.EMFILE: "allow more open files (`ulimit -n 65536`) and run again",
    errno.ENFILE: "the machine has too many files open; close other programs and run again",
    errno.ENOMEM: "the machine has too little memory; close other programs and run again",
    errno.EISDIR: "it is a folder; give a file",
    errno.ENOTDIR: "a part of its path is a file; give another path",
    errno.ENAMETOOLONG: "its name is too long for this file system; give a shorter one",
    errno.ELOOP: "its symbolic links go in a circle; remove them",
    errno.EIO: "the disk or the network file system reports an error; see `dmesg`, and run again",
    errno.ESTALE: "the network file system lost it; mount it again and run again",
    errno.ETIMEDOUT: "the network file system does not answer; run again when it does",
}


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; renames it over `path` if the block succeeds, removes it if not.

    The content is on the disk before the rename, and the rename before this returns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.", suffix=".tmp")
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes private files; a report is meant to be read by others
        to_disk(temporary)
        os.replace(temporary, path)
        to_disk(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty folder beside `folder`, which takes its place if the block succeeds, and is removed if not.

    What was in `folder` before is gone then, and unchanged otherwise. The content is on the disk before the rename.
    """
    partial = folder.parent / f".{folder.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
        partial.mkdir(parents=True)
        yield partial
        for path in (*partial.iterdir(), partial):
            to_disk(path)
        _replace_folder(folder, partial)
        to_disk(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace_folder(folder: Path, complete: Path) -> None:
    old = folder.parent / f".{folder.name}.replaced"
    had_one = folder.is_dir()
    if had_one:
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    try:
        complete.rename(folder)
    except OSError:
        if had_one:
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)  # also what a kill between two renames left


def to_disk(path: Path) -> None:
    """Waits until a file's content, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # file systems that cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically. Non-finite floats are refused (they are not JSON)."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def reading(path: Path, way_out: str = "restore it or write it again") -> Iterator[None]:
    """Turns a system error of the block into a ValueError that names `path`, the cause, and what to do about it.

    A file that may not be read, or not now, is not a damaged file: `way_out`, which may advise to delete it, is given
    only where the file is missing.
    """
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; {way_out}") from None
    except OSError as error:
        raise ValueError(f"{path}: {read_failure(error)}") from error


def read_failure(error: OSError) -> str:
    """The cause of a failed read and the way out, in words: "could not be read (Permission denied); let this ..."."""
    remedy = _WAYS_OUT.get(error.errno or 0, "see that it can be read and run again")
    return f"could not be read ({error.strerror or error}); {remedy}"


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is beyond the range of a number")
    return value


def parse_json(
    text: str | bytes,
    place: str,
    way_out: str = "restore it or write it again",
    parse_float: Callable[[str], float] | None = None,
    *,
    constants: bool = False,
) -> Any:
    """The value of a JSON text.

    NaN, Infinity and numbers like 1e999 are refused, because they are not JSON, unless `constants` lets them pass; so
    are a key that stands twice in one object, half a surrogate pair, and nesting beyond what Python can follow.

    Args:
      parse_float: makes a number with a point or an exponent from its text.

    Raises:
      ValueError: the text is not JSON or not UTF-8; names `place`, the place in it, and the way out.
    """
    try:
        text = text if isinstance(text, str) else text.decode("utf-8-sig")
        value = json.loads(
            text,
            parse_float=parse_float or (float if constants else _finite),
            parse_constant=float if constants else _refuse_constant,
            object_pairs_hook=_unique_keys,
        )
        if "\\u" in text:  # only an escape can make half a pair
            _check_encodable(value)
        return value
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: not UTF-8 ({_encoding_hint(text, error)}); {way_out}") from error
    except RecursionError:
        raise ValueError(f"{place}: its JSON is nested too deeply to be read; {way_out}") from None
    except ValueError as error:
        raise ValueError(f"{place}: not valid JSON ({error}); {way_out}") from error


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    for key, value in pairs:
        if key in keys:
            raise ValueError(f"key {key!r} stands twice in one object")
        keys[key] = value
    return keys


def _check_encodable(value: Any) -> None:
    """Raises ValueError where a text has half a surrogate pair, which JSON can escape but no UTF-8 file can hold."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            half = f"\\u{ord(value[error.start]):04x}"
            raise ValueError(
                f"half a surrogate pair, {half}, in {value[max(0, error.start - 10) : error.end]!r}"
            ) from None
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_encodable(key)
            _check_encodable(item)
    elif isinstance(value, list):
        for item in value:
            _check_encodable(item)


def _encoding_hint(text: str | bytes, error: UnicodeDecodeError) -> str:
    """Which encoding the bytes look like, and where they stop to be UTF-8."""
    content = text if isinstance(text, bytes) else b""
    if content[:2] in (b"\xff\xfe", b"\xfe\xff") or (content[1:2] == b"\0"):
        return "it looks like UTF-16, as Windows PowerShell writes; convert it: `iconv -f UTF-16 -t UTF-8`"
    start = error.start
    return (
        f"byte {content[start]:#04x} at position {start}, {content[max(0, start - 10) : start + 10]!r}; if it is "
        "Latin-1, convert it: `iconv -f LATIN1 -t UTF-8`"
    )


def read_json(path: Path, way_out: str = "restore it or write it again", *, constants: bool = False) -> Any:
    """Reads a JSON file, as strictly as `parse_json`.

    Raises:
      ValueError: the file is missing, unreadable or damaged; names the file, the place in it, and the way out.
    """
    with reading(path, way_out):
        content = path.read_bytes()
    return parse_json(content, str(path), way_out, constants=constants)


def read_object(
    path: Path, way_out: str = "restore it or write it again", *, constants: bool = False
) -> dict[str, Any]:
    """Reads a JSON file that holds an object. Raises ValueError as `read_json`, or where it holds something else."""
    value = read_json(path, way_out, constants=constants)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}; {way_out}")
    return value


def read_jsonl(path: Path, way_out: str = "write one JSON object a line") -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSON-lines file, each with its place ("rows.jsonl:17"); blank lines are left out.

    Lines end with a newline character only: U+2028 and its like are legal inside a JSON text.

    Raises:
      ValueError: the file is missing or unreadable, or a line is not a JSON object; names the file and the line.
    """
    with reading(path, "give a file that exists"), path.open("rb") as file:
        yield from parse_lines(file, str(path), way_out)


def parse_lines(
    lines: Iterable[bytes], name: str, way_out: str, parse_float: Callable[[str], float] = _finite
) -> Iterator[tuple[str, dict[str, Any]]]:
    """As `read_jsonl`, from the lines of a file that is called `name`."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{name}:{number}"
        row = parse_json(line, place, way_out, parse_float)
        if not isinstance(row, dict):
            raise ValueError(f"{place}: {line[:60]!r} is no JSON object; {way_out}")
        yield place, row


def finite_report(value: Any, path: str = "") -> tuple[Any, list[str]]:
    """`value` with None in the place of every number that is not finite, and where those numbers stood.

    JSON has no infinity and no NaN. A report keeps null, and the places as its reasons: "sections.gsm8k.run.perplexity
    is inf".
    """
    if isinstance(value, float) and not math.isfinite(value):
        return None, [f"{path or 'the value'} is {value}"]
    items: Iterable[tuple[Any, Any]]
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    else:
        return value, []
    clean, places = {}, []
    for key, item in items:
        clean[key], found = finite_report(item, f"{path}.{key}" if path else str(key))
        places += found
    return (clean if isinstance(value, dict) else list(clean.values())), places


def null_notes(places: Sequence[str]) -> list[str]:
    """A sentence on what `finite_report` replaced, for the report's reader; [] where that is nothing."""
    if not places:
        return []
    more = f", and {len(places) - 4} more" if len(places) > 4 else ""
    return [f"null in the report, because the number overflowed or is none: {', '.join(places[:4])}{more}"]


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes one JSON object a line, atomically. Non-finite floats are refused (they are not JSON)."""
    lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        file.writelines(lines)


def write_record(path: Path, format: int, content: dict[str, Any]) -> None:
    """Writes a JSON object with its format number and the digest of its content, atomically."""
    record = {"format": format, **content}
    write_json(path, {**record, DIGEST: json_digest(record)})


def read_record(path: Path, format: int, way_out: str, *, undigested: Sequence[int | None] = ()) -> dict[str, Any]:
    """The content of a JSON object that `write_record` wrote; check its shape with `base.settings.build`.

    Args:
      undigested: earlier format numbers that are read too, of files that have no digest; None is a file without number.

    Raises:
      ValueError: the file is missing, unreadable or damaged, of another format, or was changed after it was written;
        names the file and the way out.
    """
    record = read_object(path, way_out)
    seen = record.get("format")
    if type(seen) not in (int, type(None)) or seen not in (format, *undigested):
        known = " or ".join(str(number) for number in (*undigested, format) if number is not None)
        raise ValueError(f"{path} has format {seen!r}, this version reads {known}; {way_out}")
    digest = record.pop(DIGEST, None)
    if digest is None and seen in undigested:
        return record
    try:
        expected = json_digest(record)
    except RecursionError:
        raise ValueError(f"{path}: its JSON is nested too deeply to be read; {way_out}") from None
    if seen != format or digest != expected:
        raise ValueError(f"{path} was changed or damaged after it was written (its digest differs); {way_out}")
    return record


def json_digest(value: Any) -> str:
    """SHA-256, in hex, of a JSON value; the order of keys does not matter."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_writable(directory: Path, flag: str = "--workdir") -> None:
    """Checks that files can be written in `directory`, and makes it if need be; `flag` chooses another.

    Raises:
      ValueError: nothing can be written there, or a folder has a name as the files have that are written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".probe.") as probe:  # a name that no other process has
            probe.write(b"x")
            probe.flush()  # a full disk says so here
    except OSError as error:
        space = "free space, or " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise ValueError(
            f"cannot write in {directory}: {error.strerror}; {space}choose another folder with {flag}"
        ) from error
    for path in sorted(directory.iterdir()):
        if path.suffix in _WRITTEN and not path.is_file():
            raise ValueError(
                f"{path} is no file, but one may have to be written there; remove it, or choose another folder with "
                f"{flag}"
            )
