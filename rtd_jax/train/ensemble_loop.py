"""The training loop of an ensemble: batches of all members at a time, and a log for each of them."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from rtd_jax.train.loop import Loop
from rtd_jax.train.metrics import MetricsLog, check_finite


@dataclass
class EnsembleLoop(Loop):
    """A loop whose metrics have a sum and a count for each member, [R].

    A member whose loss or gradient is not finite is left out from then on; the others go on.

    Attributes:
      logs: of the members; they take the place of `log`.
      failures: members that were left out, and why.
    """

    logs: Sequence[MetricsLog] = ()
    failures: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._sums = {name: (np.asarray(total), np.asarray(count)) for name, (total, count) in self._sums.items()}

    @property
    def line(self) -> dict[str, Any]:
        sums = {name: (total.tolist(), count.tolist()) for name, (total, count) in self._sums.items()}
        return super().line | {"sums": sums}

    def settle(self) -> None:
        """Waits for the newest update and adds its metrics to the next line. Call it before the state is read.

        Raises:
          ValueError: no member is left whose metrics are finite.
        """
        if self._pending is None:
            return
        (update, metrics), self._pending = self._pending, None
        values = {}
        for name, mean in jax.device_get(metrics).items():
            added_R, counted_R = (np.asarray(x, np.float64) for x in mean)
            total_R, count_R = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = (total_R + added_R, count_R + counted_R)
            values[name] = added_R / np.maximum(counted_R, 1e-30)
        broken_R = np.any(~np.isfinite(list(values.values())), axis=0)
        for member in np.flatnonzero(broken_R).tolist():
            self.check_member(member, {name: float(value_R[member]) for name, value_R in values.items()}, update)

    def check_member(self, member: int, values: dict[str, float], update: int) -> None:
        """Leaves a member out where one of the values is not finite.

        Raises:
          ValueError: it was the last one.
        """
        if member in self.failures:
            return
        try:
            check_finite(values, update, self.place)
        except ValueError as error:
            self.failures[member] = str(error)
            self.display.note(f"member {member} is left out: {error}")
        if len(self.failures) == len(self.logs):
            raise ValueError(f"all members of the ensemble failed, the first of them so: {self.failures[0]}")

    def write_member(self, member: int, scalars: dict[str, float]) -> None:
        """Writes a line of a member's log at the current update, unless it was left out."""
        if member not in self.failures:
            kind, name = self.where
            self.logs[member].write(self.update, scalars, **{kind: name})

    def _write_line(self) -> None:
        """Logs the means since the last line of each member, and shows the mean of those."""
        self.settle()
        now, sums = time.perf_counter(), self._sums
        speed = self._tokens / max(now - self._started, 1e-9)
        self._sums, self._tokens, self._started = {}, 0, now
        shown: dict[str, list[float]] = {}
        for member in set(range(len(self.logs))) - self.failures.keys():
            means = {
                name: float(total[member] / count[member]) for name, (total, count) in sums.items() if count[member] > 0
            }
            if means:
                self.write_member(member, {**means, "perf/tokens_per_sec": speed})
            for name, mean in means.items():
                shown.setdefault(name, []).append(mean)
        if shown:
            averages = {name: float(np.mean(means)) for name, means in shown.items()}
            self.display.update(self.update, self.place, self.shown(averages, speed))
