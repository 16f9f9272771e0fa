"""A timer with named sections, for the time that a run spends on each of them."""

import contextlib
import time
from collections.abc import Collection, Iterator


class Clock:
    """Seconds by section. Sections may lie inside one another: each second counts for the innermost only."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = time.monotonic()

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Counts the time of the block for section `name`."""
        self._settle()
        self._open.append(name)
        try:
            yield
        finally:
            self._settle()
            self._open.pop()

    def seconds(self) -> dict[str, float]:
        """The seconds of each section so far, in the order of first use."""
        self._settle()
        return {name: round(value, 2) for name, value in self._seconds.items()}

    def total(self, without: Collection[str] = ()) -> float:
        """Seconds of all sections but those named."""
        self._settle()
        return sum(value for name, value in self._seconds.items() if name not in without)

    def _settle(self) -> None:
        now = time.monotonic()
        if self._open:
            self._seconds[self._open[-1]] = self._seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now
