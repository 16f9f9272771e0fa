"""One process at a time writes in a folder: two runs in one would mix their metrics, checkpoints and models.

The lock is the system's (`flock`) on <folder>/.lock, so it ends with the process that has it, however that ends. The
file says who that is. Where a file system has no such locks, the file itself is the lock.
"""

import contextlib
import datetime
import errno
import fcntl
import functools
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax

from rtd_jax.base.files import check_writable

NAME = ".lock"
# What flock says where the file system does not have it: NFS without its lock service, Lustre without -o flock, ..
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)

Function = TypeVar("Function", bound=Callable[..., Any])


def one_writer(folder_of: Callable[..., str | Path], way_out: str = "--workdir") -> Callable[[Function], Function]:
    """Decorates a function that writes in a folder: while it runs, `locked` keeps others out.

    Args:
      folder_of: the folder, from the function's arguments.
      way_out: the flag with which a user chooses another folder.
    """

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def alone(*args: Any, **kwargs: Any) -> Any:
            with locked(Path(folder_of(*args, **kwargs)).expanduser(), way_out):
                return function(*args, **kwargs)

        return alone  # type: ignore[return-value]

    return decorate


@contextlib.contextmanager
def locked(folder: Path, way_out: str = "--workdir") -> Iterator[None]:
    """Keeps other processes, and other calls of this one, from writing in `folder`, which is made if need be.

    Of the processes of one run only the first takes the lock, for all of them.

    Raises:
      ValueError: nothing can be written in the folder, or another process is at work there; names it and the way out.
    """
    check_writable(folder, way_out)
    if jax.distributed.is_initialized() and jax.process_index() != 0:
        yield
        return
    path = folder / NAME
    descriptor = _take(path, way_out)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # before it is free: whoever takes it next makes a new file
        if descriptor is not None:
            os.close(descriptor)


def owner(folder: Path) -> str | None:
    """Who is at work in `folder`, in words; None where nobody is."""
    path = folder / NAME
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return None
    except OSError as error:
        other = _read(path)
        return _described(other) if error.errno not in _NO_LOCKS or _may_live(other) else None
    finally:
        os.close(descriptor)


def _take(path: Path, way_out: str) -> int | None:
    """The descriptor that holds the lock; None where the file system has no locks and the file itself is the lock."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)  # not into a file elsewhere
        except OSError as error:
            raise ValueError(
                f"{path} cannot be opened ({error.strerror}), so {path.parent} cannot be kept from other processes; "
                f"delete it if nobody else works there, or choose another {way_out}"
            ) from error
        has_lock = False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever had the lock before may have removed its file in the meantime: that lock keeps nobody out.
            if _is_at(descriptor, path):
                _write(path)
                has_lock = True
                return descriptor
        except OSError as error:
            if error.errno in _NO_LOCKS:
                _take_without_flock(path, way_out)
                return None
            raise ValueError(
                f"{path.parent} is in use by {_described(_read(path))}. Two runs in one folder would mix their files: "
                f"wait for that process, stop it, or choose another {way_out}"
            ) from error
        finally:
            if not has_lock:
                os.close(descriptor)


def _take_without_flock(path: Path, way_out: str) -> None:
    other = _read(path)
    if _may_live(other):
        raise ValueError(
            f"{path.parent} is in use by {_described(other)}, as {path} says. Wait for that process, stop it, or "
            f"choose another {way_out}; this file system has no locks, so delete the file if that process is gone"
        )
    _write(path)


def _write(path: Path) -> None:
    """Writes into the lock's file, which must stay the same file, who has it."""
    ours = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": " ".join(sys.argv)[:500],
        "born": _born(os.getpid()),  # tells it from a later process of the same number
    }
    try:
        path.write_text(json.dumps(ours) + "\n", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path} could not be written ({error.strerror}); free space on that disk") from error


def _read(path: Path) -> dict[str, Any]:
    """Who has the lock, as far as its file says; {} where it does not (yet)."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _described(other: dict[str, Any]) -> str:
    if not other:
        return "another process"
    return (
        f"process {other.get('pid')} on host {other.get('host')}, started {other.get('started')} "
        f"({other.get('command')})"
    )


def _may_live(other: dict[str, Any]) -> bool:
    """Whether the process that wrote the file may still run; of another host nobody can tell."""
    pid = other.get("pid")
    if type(pid) is not int or pid <= 0:
        return False
    if other.get("host") != socket.gethostname():
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # of another user
        pass
    born = _born(pid)
    return born is None or other.get("born") in (None, born)


def _born(pid: int) -> int | None:
    """When a process began, in ticks since the machine's start; None where the system does not say."""
    try:
        content = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        return int(content.rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file still has that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
