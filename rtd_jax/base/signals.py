"""Requests to stop: SIGTERM (a scheduler, `kill`), SIGINT (Ctrl-C) and SIGHUP (the terminal is gone).

A command that is asked to stop ends without a traceback, with one line, and with status 128 + the signal's number, as
shells have it. Training finishes its update and saves first (`finishing`, `asked`). What is written to the disk needs
no help: files are replaced whole, and `finally` removes temporary ones.

Importing this changes nothing. `stoppable` installs the handlers; the entry points use it, before slow imports.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Environment variable of a process that is to stop when its parent is gone: its stdin is then a pipe that the parent
# keeps open, which ends with the parent even where that is killed.
STOPS_WITH_PARENT = "RTD_JAX_STOPS_WITH_PARENT"


class Stopped(SystemExit):
    """A signal stops this process; `code` is its exit status. Nothing that handles errors takes it for one.

    Attributes:
      note: what a user should know: what was saved, and how to go on.
    """

    def __init__(self, number: int, note: str = ""):
        super().__init__(128 + number)
        self.number, self.note = number, note

    @property
    def line(self) -> str:
        return f"stopped by {signal.Signals(self.number).name}{self.note}"


class _State:
    """What has been asked of this process."""

    is_installed = False
    finishing = 0  # blocks that stop by themselves when they are asked to
    asked: int | None = None  # a signal that such a block was told of
    is_stopping = False  # the exception is under way
    has_parent = False  # a process that stops with its parent


def asked() -> bool:
    """Whether the block of `finishing` that runs should stop as soon as it can do so well."""
    return _State.asked is not None


def stopped(note: str) -> Stopped:
    """The exception with which a block that was asked to stop does so."""
    assert _State.asked is not None
    return Stopped(_State.asked, note)


@contextlib.contextmanager
def finishing() -> Iterator[None]:
    """Inside this block a signal only asks: the block looks at `asked` where it can stop, and raises `stopped`.

    A second signal stops it where it is.
    """
    _State.finishing += 1
    try:
        yield
    finally:
        _State.finishing -= 1
    if asked():
        raise stopped("")


@contextlib.contextmanager
def stoppable(ends_process: bool = False) -> Iterator[None]:
    """While this block runs, signals stop it by `Stopped`, whose line is printed; afterwards handlers are as before.

    It does nothing inside another such block, or outside of the main thread, where Python has no signals. A signal that
    is ignored stays so: `nohup` starts a command like that.

    Args:
      ends_process: whether a stop ends the process here, without waiting for threads or other processes.
    """
    if _State.is_installed or threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {x: signal.getsignal(x) for x in SIGNALS}
    unraisable = sys.unraisablehook
    _State.is_installed = True
    try:
        sys.unraisablehook = _try_again
        install()
        if os.environ.pop(STOPS_WITH_PARENT, None):  # not for processes that this one starts
            _State.has_parent = True
            threading.Thread(target=_watch_parent, daemon=True).start()
        yield
    except Stopped as stop:
        with contextlib.suppress(OSError, ValueError):  # after SIGHUP there may be no terminal
            sys.stdout.flush()
        with contextlib.suppress(OSError, ValueError):
            print(f"\n{stop.line}", file=sys.stderr, flush=True)
        if ends_process:
            os._exit(128 + stop.number)
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        sys.unraisablehook = unraisable
        _State.is_installed, _State.asked, _State.is_stopping, _State.has_parent = False, None, False, False


def install() -> None:
    """Installs the handlers inside `stoppable`; again where a library has put its own in their place."""
    if _State.is_installed:
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _handle)


def _handle(number: int, frame: FrameType | None) -> None:
    # A scheduler tells both parent and child, and then the parent tells the child again.
    if _State.has_parent and number == signal.SIGTERM and (_State.is_stopping or _State.asked is not None):
        return
    if _State.is_stopping:  # it takes too long
        os._exit(128 + number)
    if _State.finishing and _State.asked is None:
        _State.asked = number
        name = signal.Signals(number).name
        with contextlib.suppress(OSError):  # `print` must not be called where another may be under way
            os.write(2, f"\n{name}: finishing this update and saving; once more stops at once\n".encode())
        return
    _State.is_stopping = True
    raise Stopped(number)


def _try_again(unraisable: Any) -> None:
    """Python drops an exception that is raised in a finalizer or a callback; a stop is then tried again."""
    if not isinstance(unraisable.exc_value, Stopped):
        sys.__unraisablehook__(unraisable)
        return
    number = unraisable.exc_value.number

    def repeat() -> None:
        _State.is_stopping = False
        os.kill(os.getpid(), number)

    threading.Timer(0.05, repeat).start()


def _watch_parent() -> None:
    """Waits until the parent's end of the pipe is closed, and then asks this process to stop, unless it was asked."""
    with contextlib.suppress(OSError):
        while os.read(0, 4096):
            pass
    if _State.is_installed and _State.asked is None and not _State.is_stopping:
        os.kill(os.getpid(), signal.SIGTERM)
