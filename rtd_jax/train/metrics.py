"""The log of a run's metrics, metrics.jsonl and TensorBoard, and the check that they are finite."""

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import jax
from tensorboardX import SummaryWriter

from rtd_jax.base.files import replacing


class MetricsLog:
    """Appends one JSON object a line to <workdir>/metrics.jsonl, and the same scalars to <workdir>/tensorboard."""

    def __init__(self, workdir: Path, resumed_update: int = 0):
        self._is_lead = jax.process_index() == 0  # every process has the same numbers; one writes them
        if not self._is_lead:
            return
        path = workdir / "metrics.jsonl"
        _drop_after(path, resumed_update)
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=resumed_update + 1)

    def write(self, update: int, scalars: dict[str, float], **labels: Any) -> None:
        """Writes `scalars` at a global update; `labels`, such as the stage, go to the JSON line only."""
        if not self._is_lead:
            return
        self._file.write(json.dumps({"update": update, **labels, **scalars}) + "\n")
        self._file.flush()
        for name, value in scalars.items():
            self._board.add_scalar(name, value, update)

    def close(self) -> None:
        """Closes both files."""
        if self._is_lead:
            self._file.close()
            self._board.close()


def _drop_after(path: Path, update: int) -> None:
    """Removes the lines of updates that a resumed run will repeat, and a line that a kill cut in half."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError, KeyError):
            if json.loads(line)["update"] <= update:
                kept.append(line)
    with replacing(path) as temporary:
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def check_finite(metrics: dict[str, float], update: int, where: str) -> None:
    """Raises ValueError where a loss or gradient is not finite, with its name, the update and the way out."""
    broken = [name for name, value in metrics.items() if not math.isfinite(value)]
    if broken:
        raise ValueError(
            f"{', '.join(sorted(broken))} became non-finite at update {update} ({where}). Nothing after the last "
            "checkpoint was saved. Lower optimizer.learning_rate or optimizer.clip_norm, or look at that batch's data; "
            "the same command resumes from the last checkpoint"
        )
