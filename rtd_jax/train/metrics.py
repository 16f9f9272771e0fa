"""The log of a run's metrics, metrics.jsonl and TensorBoard, and the check that they are finite."""

import contextlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from rtd_jax.base.files import finite_report, parse_json, reading, replacing

FILE, BOARD = "metrics.jsonl", "tensorboard"


class MetricsLog:
    """Appends one JSON object a line to <workdir>/metrics.jsonl, and the same scalars to <workdir>/tensorboard.

    Every line is on the disk before `write` returns: no thread of TensorBoard's writes later, because where a disk is
    full such a thread would end, and the run would wait for it for ever.
    """

    def __init__(self, workdir: Path, resumed_update: int = 0):
        self._is_lead = jax.process_index() == 0  # every process has the same numbers; one writes them
        if not self._is_lead:
            return
        self._path, self._board_path = workdir / FILE, workdir / BOARD
        _drop_after(self._path, resumed_update)
        with self._writing(f"after update {resumed_update}"):
            self._file = self._path.open("a", encoding="utf-8")
            self._board_path.mkdir(exist_ok=True)
            # Two files may begin in one second, and the time in their names has no more digits.
            self._board = EventsWriter(str(self._board_path / "events"), f".{time.time_ns()}")
            # What TensorBoard has read of later updates is of a run that was killed, and is repeated.
            start = SessionLog(status=SessionLog.START)
            self._board.write_event(Event(step=resumed_update + 1, wall_time=time.time(), session_log=start))
            self._board.flush()

    def write(self, update: int, scalars: dict[str, float], **labels: Any) -> None:
        """Writes `scalars` at a global update; `labels`, such as the stage, go to the JSON line only.

        Raises:
          ValueError: they cannot be written; names the file, the update and the way out.
        """
        if not self._is_lead:
            return
        line, _ = finite_report({"update": update, **labels, **scalars})
        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        with self._writing(f"at update {update}"):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
            self._board.write_event(Event(step=update, wall_time=time.time(), summary=Summary(value=values)))
            self._board.flush()

    def close(self) -> None:
        """Closes both files. What they hold was written before."""
        if self._is_lead:
            for file in (self._file, self._board):
                with contextlib.suppress(OSError):
                    file.close()

    @contextlib.contextmanager
    def _writing(self, when: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ValueError(
                f"{self._path} or {self._board_path} could not be written {when}: {error.strerror or error}. Free "
                "space, or see that this user may write there. Earlier checkpoints are intact: the same command "
                "resumes from the last one"
            ) from error


def _drop_after(path: Path, update: int) -> None:
    """Removes the lines of updates that a resumed run will repeat, and what a kill left behind them.

    Raises:
      ValueError: a line that would be kept is not one of a log.
    """
    if not path.exists():
        return
    with reading(path):
        lines = path.read_bytes().split(b"\n")
    kept: list[bytes] = []
    damaged, way_out = "", "delete this line; later ones are sound"
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line, f"{path}:{number}", way_out)
            if not isinstance(row, dict) or type(row.get("update")) is not int:
                raise ValueError(f"{path}:{number}: {line[:60]!r} is no object with an update; {way_out}")
        except ValueError as error:
            damaged = damaged or str(error)
            continue
        if row["update"] <= update:
            if damaged:  # a kill cuts the last line only
                raise ValueError(damaged)
            kept.append(line)
    with replacing(path) as temporary:
        temporary.write_bytes(b"".join(line + b"\n" for line in kept))


def check_finite(metrics: dict[str, float], update: int, where: str) -> None:
    """Raises ValueError where a loss or gradient is not finite, with its name, the update and the way out."""
    broken = [name for name, value in metrics.items() if not math.isfinite(value)]
    if broken:
        raise ValueError(
            f"{', '.join(sorted(broken))} became non-finite at update {update} ({where}). Nothing after the last "
            "checkpoint was saved. Lower optimizer.learning_rate or optimizer.clip_norm, or look at that batch's data; "
            "the same command resumes from the last checkpoint"
        )
