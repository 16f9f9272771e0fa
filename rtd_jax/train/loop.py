"""The one loop: updates on the batches of a loader, with hooks between them, able to stop anywhere.

An update is dispatched, the next batch is made while the device works on it, and its metrics are fetched only after the
next one was dispatched: the device never waits for Python. What an app does between updates (validation, checkpoints,
drawing chains, ending a stage) are hooks; each runs before every update, in order.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jax.sharding import Mesh

from rtd_jax.base.console import Display
from rtd_jax.base.means import Metrics
from rtd_jax.base.sharding import host_share
from rtd_jax.base.types import Batch
from rtd_jax.data.loader import BatchLoader
from rtd_jax.train.metrics import MetricsLog, Window, check_finite
from rtd_jax.train.state import TrainState

# Runs before an update; a reason that it returns ends the stretch of updates there.
Hook = Callable[["Loop"], str | None]


@dataclass
class Loop:
    """A stretch of updates, such as a stage of the curriculum.

    Attributes:
      state: what the updates change; the newest, perhaps still being computed.
      loader: gives this process's rows of each batch; its position can be saved by a hook.
      step: (state, rows on the host) -> (state, metrics); dispatches an update.
      where: (kind, name) of the stretch, such as ("stage", "3"); in every line of the log, and in errors.
      log_is_due: whether a line is written after so many updates.
      shown: what the display shows of a line: (means, tokens per second) -> texts by name.
    """

    state: TrainState
    loader: BatchLoader
    step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    mesh: Mesh
    where: tuple[str, Any]
    log: MetricsLog
    display: Display
    log_is_due: Callable[[int], bool]
    shown: Callable[[dict[str, float], float], dict[str, str]]
    update: int = field(init=False)  # updates done or dispatched, over the whole run
    _window: Window = field(init=False, default_factory=Window)
    _pending: tuple[int, Metrics] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.update = int(self.state.step)

    def run(self, hooks: Sequence[Hook]) -> str:
        """Runs updates until a hook gives a reason to end; returns the reason, with every metric logged.

        Raises:
          ValueError: a loss or gradient is not finite; nothing after the last checkpoint was saved.
        """
        _, hosts = host_share(self.mesh)
        while True:
            for hook in hooks:
                reason = hook(self)
                if reason is not None:
                    self.settle()
                    self._write_line()
                    return reason
            batch = next(self.loader)
            self._window.add_tokens(int(np.count_nonzero(batch.chain_ids_BL)) * hosts)
            self.state, metrics = self.step(self.state, batch)
            self.update += 1
            self.settle()
            self._pending = (self.update, metrics)
            if self.log_is_due(self.update):
                self.settle()
                means, speed = self._write_line()
                self.display.update(self.update, self.place, self.shown(means, speed))

    def settle(self) -> None:
        """Waits for the newest update and adds its metrics to the next line; hooks call it before they read the state.

        Raises:
          ValueError: one of the metrics is not finite.
        """
        if self._pending is not None:
            (update, metrics), self._pending = self._pending, None
            check_finite(self._window.add(metrics), update, self.place)

    def write(self, scalars: dict[str, float], update: int | None = None) -> None:
        """A line of the log, at this update if no other is given."""
        kind, name = self.where
        self.log.write(self.update if update is None else update, scalars, **{kind: name})

    @property
    def place(self) -> str:
        """The stretch in words, "stage 3"."""
        return " ".join(map(str, self.where))

    def _write_line(self) -> tuple[dict[str, float], float]:
        means, speed = self._window.flush()
        if means:
            self.write({**means, "perf/tokens_per_sec": speed})
        return means, speed
