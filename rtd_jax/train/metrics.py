"""Metrics on their way out: kept as (sum, count), written to metrics.jsonl and TensorBoard."""

import json
import math
import time
from pathlib import Path
from typing import Any

import jax
from tensorboardX import SummaryWriter

from rtd_jax.base.files import replacing
from rtd_jax.base.means import Mean, Metrics


class MetricsLog:
    """Appends one JSON object a line to <workdir>/metrics.jsonl, and the same scalars to <workdir>/tensorboard."""

    def __init__(self, workdir: Path, resumed_update: int = 0):
        self._writes = jax.process_index() == 0
        if not self._writes:  # every process has the same numbers; one writes them
            return
        path = workdir / "metrics.jsonl"
        _drop_after(path, resumed_update)
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=resumed_update + 1)

    def write(self, update: int, scalars: dict[str, float], **labels: Any) -> None:
        """`scalars` at a global update; `labels` (stage, kind) go to the JSON line only."""
        if not self._writes:
            return
        self._file.write(json.dumps({"update": update, **labels, **scalars}) + "\n")
        self._file.flush()
        for name, value in scalars.items():
            self._board.add_scalar(name, value, update)

    def close(self) -> None:
        """Flushes both files."""
        if self._writes:
            self._file.close()
            self._board.close()


def _drop_after(path: Path, update: int) -> None:
    """Removes the lines of updates that a resumed run will do again, and a line that a kill cut in half."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["update"] <= update:
                kept.append(line)
        except (json.JSONDecodeError, KeyError):
            continue
    with replacing(path) as temporary:
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


class Window:
    """Metrics since the last log line, and how fast they came."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}
        self._tokens = 0.0
        self._started = time.perf_counter()

    def add(self, metrics: Metrics) -> dict[str, float]:
        """Fetches one update's metrics from the device (this waits for the update) and returns them as floats."""
        fetched: dict[str, Mean] = jax.device_get(metrics)
        for name, mean in fetched.items():
            total, count = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = (total + float(mean.sum), count + float(mean.count))
        return {name: float(mean.sum) / max(float(mean.count), 1e-30) for name, mean in fetched.items()}

    def add_tokens(self, tokens: int) -> None:
        self._tokens += tokens

    def flush(self) -> tuple[dict[str, float], float]:
        """(means since the last flush, tokens per second since then); starts a new window."""
        means = {name: total / count for name, (total, count) in self._sums.items() if count > 0}
        now = time.perf_counter()
        speed = self._tokens / max(now - self._started, 1e-9)
        self._sums, self._tokens, self._started = {}, 0.0, now
        return means, speed


def check_finite(metrics: dict[str, float], update: int, where: str) -> None:
    """Stops at a loss or gradient that is not finite.

    Raises:
      ValueError: names the update, the terms that are not finite, and the way out.
    """
    broken = [name for name, value in metrics.items() if not math.isfinite(value)]
    if broken:
        raise ValueError(
            f"{', '.join(sorted(broken))} became non-finite at update {update} ({where}). Nothing after the last "
            "checkpoint was saved. Lower optimizer.learning_rate or optimizer.clip_norm, or look at that batch's data; "
            "the same command resumes from the last checkpoint"
        )
