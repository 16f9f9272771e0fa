"""What ends a run from outside: a full disk, a signal, a second run in its folder. None of them changes a bit of it."""

import errno
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file
from tensorboardX.event_file_writer import EventsWriter
from tiny_run import recipe, write_teacher

from rtd_jax.apps.distill.run import train
from rtd_jax.apps.distill.stages import Trainer
from rtd_jax.base import signals
from rtd_jax.base.lock import locked
from rtd_jax.eval import evaluate
from rtd_jax.train.loop import Loop
from rtd_jax.train.metrics import MetricsLog
from rtd_jax.train.recipe import EvaluationSettings


def log_of(workdir: Path) -> list[dict]:
    """Every line of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("perf/")} for line in lines]


def rolling(workdir: Path) -> set[str]:
    return {path.name for path in (workdir / "checkpoints" / "rolling").iterdir()}


def signal_at(update: int, number: int, monkeypatch) -> None:
    """Sends this process a signal while it works on an update."""
    settle, waiting = Loop.settle, [number]

    def settle_and_send(self):
        if self.update == update and waiting:
            os.kill(os.getpid(), waiting.pop())
        settle(self)

    monkeypatch.setattr(Loop, "settle", settle_and_send)


def diverged(score):
    """The scores of references by a model that gives them next to no probability."""
    return lambda *args, **kwargs: [
        found | {"reference_nats": found["reference_nats"] * 1e6} for found in score(*args, **kwargs)
    ]


def full_disk_at(event: int, monkeypatch) -> None:
    """A disk that is full from the n-th event of TensorBoard on, counted from 0."""
    write, count = EventsWriter.write_event, iter(range(10**9))

    def write_or_fail(self, content):
        if next(count) >= event:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, content)

    monkeypatch.setattr(EventsWriter, "write_event", write_or_fail)


def test_a_full_disk_and_a_signal_end_a_run_which_then_goes_on_with_the_same_bits(tmp_path, monkeypatch, capsys):
    """The full disk is an error at its update, with the checkpoint before it intact; a signal saves between two lines
    of the log. The student and the log are those of a run that nothing ended."""
    few = EvaluationSettings(problems_per_depth=1, max_new_tokens=4, batch_size=4, teacher=False)
    settings = recipe(write_teacher(tmp_path / "teacher"), log_every=3, checkpoint_every=5, evaluation=few)
    train(settings, tmp_path / "whole")

    workdir = tmp_path / "run"
    with monkeypatch.context() as patch:
        full_disk_at(6, patch)
        words = r"metrics.jsonl or .*tensorboard could not be written at update 6: No space left on device. Free space"
        with pytest.raises(ValueError, match=words):
            train(settings, workdir)
    assert rolling(workdir) == {"5"}

    with monkeypatch.context() as patch, signals.stoppable():
        signal_at(8, signal.SIGTERM, patch)
        with pytest.raises(signals.Stopped) as caught:
            train(settings, workdir)
    assert caught.value.code == 143
    assert caught.value.note == " after update 8; saved; the same command continues"
    assert rolling(workdir) == {"5", "8"}
    assert not (workdir / "report.json").exists()

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "score_references", diverged(evaluate.score_references))
        train(settings, workdir)
    assert log_of(workdir) == log_of(tmp_path / "whole")
    ours, theirs = (load_file(path / "student" / "model.safetensors") for path in (workdir, tmp_path / "whole"))
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)

    # A student with an infinite perplexity is reported all the same, with null and the reason.
    report = json.loads((workdir / "report.json").read_text())
    assert report["student"]["perplexity"] is None
    assert report["student"]["perplexity_by_depth"]["all"]["mean"] is None
    assert "student.perplexity is inf" in report["not_finite"]
    assert "report.json has null" in capsys.readouterr().out
    assert (workdir / "report.html").exists()

    with locked(workdir), pytest.raises(ValueError, match=f"{workdir} is in use by process {os.getpid()} on host"):
        train(settings, workdir)


def test_a_state_that_is_not_finite_is_not_saved_because_a_signal_asks_for_it(tmp_path, monkeypatch):
    settings = recipe(write_teacher(tmp_path / "teacher"))
    update = Trainer._update

    def broken(self, state, batch):
        state, found = update(self, state, batch)
        return state, {name: mean._replace(sum=mean.sum * np.nan) for name, mean in found.items()}

    monkeypatch.setattr(Trainer, "_update", broken)
    with signals.stoppable():
        signal_at(1, signal.SIGTERM, monkeypatch)
        with pytest.raises(ValueError, match="non-finite at update 1"):
            train(settings, tmp_path / "run")
    assert not list((tmp_path / "run").glob("checkpoints/*/*"))


def test_a_log_is_whole_after_every_write_and_closes_on_a_full_disk(tmp_path, monkeypatch):
    log = MetricsLog(tmp_path)
    log.write(1, {"loss": 2.0, "odd": float("inf")}, stage="1")
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss" in events.read_bytes()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"update": 1, "stage": "1", "loss": 2.0, "odd": None}

    class Full:
        def write(self, _):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        flush = close = lambda self: self.write("")

    log._file = Full()
    with pytest.raises(ValueError, match="at update 2: No space left on device"):
        log.write(2, {"loss": 1.0})
    log.close()


def test_what_a_kill_leaves_in_a_log_is_dropped_and_damage_before_it_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"update": 1}\n{"update": 2}\n{"update": 3}\n{"upd\0\0\n\0')
    MetricsLog(tmp_path, 2).close()
    assert path.read_bytes() == b'{"update": 1}\n{"update": 2}\n'
    for line in (b"[1]", b'{"update": "1"}', b'{"update": NaN}', b"{", b"\xff"):
        path.write_bytes(b'{"update": 1}\n' + line + b'\n{"update": 2}\n')
        with pytest.raises(ValueError, match=r"metrics.jsonl:2: .*delete this line"):
            MetricsLog(tmp_path, 2)


def test_a_run_that_learns_from_drawn_chains_stops_only_where_new_ones_are_due():
    """Drawn chains are not in a checkpoint; a run that is resumed elsewhere would draw others."""
    trainer = object.__new__(Trainer)
    trainer._recipe = SimpleNamespace(updates_per_refresh=4)  # type: ignore[assignment]
    trainer._draw = None
    assert all(trainer._can_stop(SimpleNamespace(update=update)) for update in (5, 8))  # type: ignore[arg-type]
    trainer._draw = lambda *_: ([], {})
    assert not trainer._can_stop(SimpleNamespace(update=5))  # type: ignore[arg-type]
    assert trainer._can_stop(SimpleNamespace(update=8))  # type: ignore[arg-type]
