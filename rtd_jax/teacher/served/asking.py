"""Asks a model for the replies that a log lacks, and says how that goes."""

import time
from collections.abc import Sequence

from rtd_jax.teacher.served.log import ResponseLog
from rtd_jax.teacher.served.requests import Backend, Reply, Request

PROGRESS_INTERVAL = 5.0  # seconds between two lines of progress


def ask_for_missing(
    backend: Backend, requests: Sequence[Request], log: ResponseLog, about: str, noun: str
) -> dict[str, Reply]:
    """The replies to `requests` by id; those that are not in the log are asked for, and added to it as they arrive.

    Args:
      backend: whoever replies.
      requests: each id once.
      log: of replies to requests of one identity.
      about: the requests in words, for the first line that is printed.
      noun: what replies are called in the lines of progress.

    Raises:
      ValueError: the model cannot be reached, or refuses; what was answered before stays in the log.
    """
    missing = {request.id for request in requests if request.id not in log.replies}
    print(f"{about}: {len(missing)} to be asked for", flush=True)
    if missing:
        progress = Progress(len(missing), noun)

        def record(replies: Sequence[tuple[Request, Reply]]) -> None:
            log.add(replies)
            progress.add(len(replies))

        backend.complete(requests, missing, record)
    return {request.id: log.replies[request.id] for request in requests}


class Progress:
    """Prints, now and then, how many replies there are, how fast they come, and the time that is left."""

    def __init__(self, total: int, noun: str) -> None:
        self._total, self._noun, self._done = total, noun, 0
        self._started = self._last = time.monotonic()

    def add(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._last >= PROGRESS_INTERVAL or self._done == self._total:
            self._last = now
            rate = self._done / max(now - self._started, 1e-9)
            left = (self._total - self._done) / rate
            print(f"{self._done} of {self._total} {self._noun}, {rate:.1f}/s, {left:.0f} s left", flush=True)
