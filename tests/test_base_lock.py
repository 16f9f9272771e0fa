"""One process at a time in a folder, and a lock that outlives nobody."""

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from rtd_jax.base import lock
from rtd_jax.base.lock import locked, one_writer, owner

HOLDS = """
import sys, time
from pathlib import Path
from rtd_jax.base.lock import locked
with locked(Path(sys.argv[1])):
    print("has it", flush=True)
    time.sleep(600)
"""


def no_flock(monkeypatch, number=errno.ENOLCK):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)


def write_lock(folder: Path, **changes) -> None:
    ours = {"host": socket.gethostname(), "pid": os.getpid(), "born": None, "started": "yesterday", "command": "train"}
    (folder / lock.NAME).write_text(json.dumps(ours | changes))


def test_a_second_process_is_refused_by_the_first_ones_name_and_a_dead_one_keeps_nobody_out(tmp_path):
    """The message has host, process, start and the way out; SIGKILL leaves the file, and the folder is free."""
    command = [sys.executable, "-c", HOLDS, str(tmp_path)]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == "has it\n"
        words = rf"{tmp_path} is in use by process {first.pid} on host {socket.gethostname()}, started 20.*--out"
        with pytest.raises(ValueError, match=words), locked(tmp_path, "--out"):
            pass
        assert str(first.pid) in (owner(tmp_path) or "")
    finally:
        first.kill()
        first.wait()
    assert (tmp_path / lock.NAME).exists()
    assert owner(tmp_path) is None
    with locked(tmp_path):
        assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()


def test_a_lock_leaves_nothing_behind_whatever_ends_the_block(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path / "run"):
        raise KeyError
    assert list((tmp_path / "run").iterdir()) == []
    with locked(tmp_path / "run"):
        pass


def test_a_decorated_function_has_the_folder_for_itself(tmp_path):
    @one_writer(lambda name, folder: folder, "--out")
    def write(name, folder):
        with pytest.raises(ValueError, match=f"in use by process {os.getpid()}"), locked(folder):
            pass
        return name

    assert write("a", folder=tmp_path) == "a"
    assert write.__name__ == "write"


def test_only_the_first_of_a_runs_processes_takes_the_lock(tmp_path, monkeypatch):
    """The others go on with the folder that the first one has."""
    with locked(tmp_path):
        monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(jax, "process_index", lambda: 1)
        with locked(tmp_path):
            assert (tmp_path / lock.NAME).exists()
        assert (tmp_path / lock.NAME).exists()
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    with locked(tmp_path), pytest.raises(ValueError, match="in use"), locked(tmp_path):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_without_locks_of_the_file_system_the_file_says_who_is_there(tmp_path, monkeypatch, number):
    """A live process keeps others out, a dead one does not, and of another host's the user has to know."""
    no_flock(monkeypatch, number)
    with locked(tmp_path):
        assert owner(tmp_path) is not None
        words = f"process {os.getpid()} .*delete the file if that process is gone"
        with pytest.raises(ValueError, match=words), locked(tmp_path):
            pass
    assert not (tmp_path / lock.NAME).exists()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for gone in ({"pid": dead.pid}, {"born": 1}, {"pid": 10**30}, {"pid": -1}, {"pid": "x"}):
        write_lock(tmp_path, **gone)
        with locked(tmp_path):
            pass
    for content in ("", "[]", "{", '{"pid": null}'):
        (tmp_path / lock.NAME).write_text(content)
        with locked(tmp_path):
            pass
    write_lock(tmp_path, host="elsewhere", pid=1)
    with pytest.raises(ValueError, match="process 1 on host elsewhere, started yesterday"), locked(tmp_path):
        pass


def test_a_folder_that_cannot_be_locked_is_named(tmp_path):
    (tmp_path / lock.NAME).mkdir()
    with pytest.raises(ValueError, match=r"\.lock cannot be opened \(Is a directory\)"), locked(tmp_path):
        pass
    (tmp_path / "file").write_text("")
    words = r"cannot write in .*file: .*choose another folder with --out"
    with pytest.raises(ValueError, match=words), locked(tmp_path / "file", "--out"):
        pass


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path):
    mine = tmp_path / "mine.txt"
    mine.write_text("years of work")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(mine)
    with pytest.raises(ValueError, match=r"run/.lock cannot be opened .*; delete it"), locked(tmp_path / "run"):
        pass
    assert mine.read_text() == "years of work"
