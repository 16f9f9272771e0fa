"""Requests to stop: one line, the shell's status, and never a traceback."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rtd_jax.base import signals

ROOT = Path(__file__).resolve().parents[1]


def ends(program: str, *sent: int, begins: str = "ready", **options) -> tuple[int, str]:
    """(status, what it printed) of a Python program that gets signals, one after each line that it prints."""
    # What runs the tests may ignore signals (`nohup`, a job in the background), and children inherit that.
    heard = "for number in signals.SIGNALS: signal.signal(number, signal.SIG_DFL)"
    text = f"import os, signal, sys, time\nfrom rtd_jax.base import signals\n{heard}\n{program}"
    process = subprocess.Popen(
        [sys.executable, "-c", text], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    assert process.stdout is not None
    shown = ""
    for number in sent:
        while begins not in (line := process.stdout.readline()):
            assert line, shown
            shown += line
        process.send_signal(number)
    shown += process.communicate(timeout=60)[0]
    return process.returncode, shown


@pytest.mark.parametrize("number", signals.SIGNALS)
def test_a_signal_ends_a_command_with_a_line_its_status_and_no_traceback(number, tmp_path):
    program = f"""
from pathlib import Path
from rtd_jax.base.files import replacing
with signals.stoppable(ends_process=True):
    with replacing(Path({str(tmp_path)!r}) / "file") as temporary:
        temporary.write_text("half")
        print("ready", flush=True)
        time.sleep(60)
"""
    status, shown = ends(program, number)
    assert status == 128 + number
    assert shown.strip() == f"stopped by {signal.Signals(number).name}"
    assert list(tmp_path.iterdir()) == []


def test_a_finishing_block_is_only_asked_and_a_second_signal_stops_it_where_it_is():
    program = """
with signals.stoppable(ends_process=True), signals.finishing():
    print("ready", flush=True)
    while not signals.asked(): time.sleep(0.01)
    print("ready again", flush=True)
    if len(sys.argv) < 2: time.sleep(60)
    raise signals.stopped("; saved")
"""
    status, shown = ends(program, signal.SIGTERM, signal.SIGINT)
    assert status == 128 + signal.SIGINT
    assert "stopped by SIGINT" in shown
    assert "Traceback" not in shown
    status, shown = ends(f"sys.argv.append('x')\n{program}", signal.SIGTERM)
    assert status == 128 + signal.SIGTERM
    assert shown.rstrip().endswith("stopped by SIGTERM; saved")


def test_a_stop_that_takes_too_long_is_ended_by_the_next_signal():
    program = """
with signals.stoppable():
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("ready", flush=True)
        time.sleep(60)
"""
    status, shown = ends(program, signal.SIGTERM, signal.SIGTERM)
    assert status == 128 + signal.SIGTERM
    assert "Traceback" not in shown


def test_a_signal_in_a_finalizer_is_not_lost():
    """Python drops exceptions there, and prints their tracebacks."""
    program = """
class Slow:
    def __del__(self):
        print("ready", flush=True)
        for _ in range(100): time.sleep(0.01)
with signals.stoppable(ends_process=True):
    Slow()
    time.sleep(60)
"""
    status, shown = ends(program, signal.SIGTERM)
    assert status == 128 + signal.SIGTERM
    assert "Traceback" not in shown


def test_what_is_ignored_stays_so():
    """`nohup` starts a command with SIGHUP ignored, so that it goes on when the terminal is closed."""
    program = """
import signal
signal.signal(signal.SIGHUP, signal.SIG_IGN)
with signals.stoppable():
    print("ready", flush=True)
    time.sleep(0.3)
    print("whole", flush=True)
"""
    assert ends(program, signal.SIGHUP) == (0, "whole\n")


def test_a_process_stops_with_its_parent():
    """The parent's end of the pipe closes even when the parent is killed; children of its own do not read it."""
    program = """
with signals.stoppable(ends_process=True):
    assert signals.STOPS_WITH_PARENT not in os.environ
    print("ready", flush=True)
    time.sleep(60)
"""
    environment = os.environ | {signals.STOPS_WITH_PARENT: "1"}
    status, shown = ends(program, stdin=subprocess.PIPE, env=environment)
    assert (status, shown.split()[-1]) == (128 + signal.SIGTERM, "SIGTERM")


def test_handlers_are_installed_by_nothing_but_the_block_and_restored_after_it():
    before = [signal.getsignal(number) for number in signals.SIGNALS]

    def stop_itself():
        with signals.stoppable():  # inside another it does nothing
            pass
        assert signal.getsignal(signal.SIGTERM) not in before
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(10)

    with pytest.raises(signals.Stopped) as caught, signals.stoppable():
        stop_itself()
    assert caught.value.code == 143
    assert [signal.getsignal(number) for number in signals.SIGNALS] == before

    def elsewhere():
        with signals.stoppable():  # not the main thread
            assert [signal.getsignal(number) for number in signals.SIGNALS] == before

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
