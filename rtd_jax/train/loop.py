"""The one training loop: updates on the batches of a loader; it can stop after any update.

An update is dispatched, the next batch is made while the device works on it, and its metrics are fetched only after the
next update was dispatched: the device never waits for Python. What an app does between two updates (validation,
checkpoints, drawing chains, ending a stage) is a function that the loop calls before every update.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rtd_jax.base.console import Display
from rtd_jax.base.means import Metrics
from rtd_jax.base.sharding import host_share
from rtd_jax.base.signals import Stopped, stopped
from rtd_jax.data.loader import BatchLoader, MembersLoader, NoRows
from rtd_jax.train.metrics import MetricsLog, check_finite
from rtd_jax.train.state import TrainState


@dataclass
class Loop:
    """A stretch of updates, such as a stage of the curriculum.

    Attributes:
      state: what the updates change; the newest, perhaps still being computed.
      loader: gives this process's rows of each batch; its position can be saved.
      step: (state, what the loader gave) -> (state, metrics); dispatches an update.
      where: (kind, name) of the stretch, such as ("stage", "3"); in every line of the log, and in errors.
      log_periods: a line is written after each multiple of one of these numbers of updates.
      shown: (means, tokens per second) of a line -> texts by name, for the display.
      resumed_line: `line` when the checkpoint was saved from which this loop goes on.
    """

    state: TrainState
    loader: BatchLoader | MembersLoader | NoRows
    step: Callable[[TrainState, Any], tuple[TrainState, Metrics]]
    mesh: Mesh
    where: tuple[str, Any]
    log: MetricsLog
    display: Display
    log_periods: tuple[int, ...]
    shown: Callable[[dict[str, float], float], dict[str, str]]
    resumed_line: dict[str, Any] | None = None  # the `line` of the loop that a checkpoint continues
    update: int = field(init=False)  # updates done or dispatched, over the whole run
    _pending: tuple[int, Metrics] | None = field(init=False, default=None)
    # Since the last line of the log:
    _sums: dict[str, tuple[Any, Any]] = field(init=False, default_factory=dict)  # (sum, count) of each metric
    _tokens: int = field(init=False, default=0)
    _started: float = field(init=False, default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.update = int(self.state.step)
        if self.resumed_line is not None:
            self._sums = {name: (total, count) for name, (total, count) in self.resumed_line["sums"].items()}
            self._tokens, self._started = self.resumed_line["tokens"], self._started - self.resumed_line["seconds"]

    @property
    def line(self) -> dict[str, Any]:
        """What was measured since the last line of the log, as JSON; a checkpoint between two lines has to hold it."""
        seconds = time.perf_counter() - self._started
        return {"sums": self._sums, "tokens": self._tokens, "seconds": seconds}

    def run(self, before_update: Callable[["Loop"], bool]) -> None:
        """Runs updates until `before_update`, which is called before each, returns True; then every metric is logged.

        Raises:
          ValueError: a loss or gradient is not finite; nothing after the last checkpoint was saved.
        """
        _, hosts = host_share(self.mesh)
        while not before_update(self):
            batch = next(self.loader)
            if batch is not None:
                self._tokens += int(np.count_nonzero(batch.chain_ids_BL)) * hosts
            self.state, metrics = self.step(self.state, batch)
            self.update += 1
            self.settle()
            self._pending = (self.update, metrics)
            if any(self.update % period == 0 for period in self.log_periods):
                self._write_line()
        self._write_line()

    def add_tokens(self, count: int) -> None:
        """Counts tokens of the next update that are not the loader's, for the speed in the next line."""
        self._tokens += count

    def settle(self) -> None:
        """Waits for the newest update and adds its metrics to the next line. Call it before the state is read.

        Raises:
          ValueError: one of the metrics is not finite.
        """
        if self._pending is None:
            return
        (update, metrics), self._pending = self._pending, None
        values = {}
        for name, mean in jax.device_get(metrics).items():
            added, counted = float(mean.sum), float(mean.count)
            total, count = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = (total + added, count + counted)
            values[name] = added / max(counted, 1e-30)
        check_finite(values, update, self.place)

    def write(self, scalars: dict[str, float], update: int | None = None) -> None:
        """Writes a line of the log, at the current update unless another is given."""
        kind, name = self.where
        self.log.write(self.update if update is None else update, scalars, **{kind: name})

    @property
    def place(self) -> str:
        """The stretch in words, "stage 3"."""
        return " ".join(map(str, self.where))

    def _write_line(self) -> None:
        """Logs and shows the means since the last line, if there are any, and starts the next line."""
        self.settle()
        means = {name: total / count for name, (total, count) in self._sums.items() if count > 0}
        now = time.perf_counter()
        speed = self._tokens / max(now - self._started, 1e-9)
        self._sums, self._tokens, self._started = {}, 0, now
        if means:
            self.write({**means, "perf/tokens_per_sec": speed})
            self.display.update(self.update, self.place, self.shown(means, speed))


def stopped_after(update: int) -> Stopped:
    """The end of a run that a signal asked to stop, and whose state is in a checkpoint if it has done anything yet."""
    done = f" after update {update}; saved" if update else " before the first update"
    return stopped(f"{done}; the same command continues")
