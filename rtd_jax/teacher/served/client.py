"""A client of a server: requests side by side, sent again after a temporary failure, and errors with the way out."""

import abc
import asyncio
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from rtd_jax.teacher.served.requests import OpenAISettings

BACKOFF, LONGEST_BACKOFF = 0.5, 8.0  # seconds before a request is sent again whose reply could not be read
AGAIN = "run the command again to go on; what was answered is kept"

Q = TypeVar("Q")  # what is asked
A = TypeVar("A")  # the reply, as it was read


@dataclass(frozen=True)
class WaysOut:
    """What errors advise, in the words of the command that asks."""

    address: str  # where something else than such a server seems to answer
    refused: str  # where the server does not take a request
    again: str = AGAIN  # where the same command may succeed later


class NoReply(Exception):
    """What a server sent in place of a reply, in words; foreign, where it does not seem to be a server of this API."""

    def __init__(self, words: str, *, is_foreign: bool = False) -> None:
        super().__init__(words)
        self.is_foreign = is_foreign


class Unusable(Exception):
    """A whole reply that cannot be used, and would be the same if it were asked for again; with the way out."""


class Client(abc.ABC, Generic[Q, A]):
    """Sends requests side by side, and sends one again after a temporary failure.

    The official client waits and retries after status 408, 409, 429 (as Retry-After says) and 5xx, timeouts and broken
    connections, also in the middle of a reply. A complete answer that is no reply is retried here.
    """

    def __init__(self, settings: OpenAISettings, ways_out: WaysOut) -> None:
        self._settings, self._ways_out = settings, ways_out

    @abc.abstractmethod
    async def send(self, client: Any, request: Q) -> Any:
        """The answer to a request, as the official client gives it."""

    @abc.abstractmethod
    def read(self, request: Q, answer: Any) -> A:
        """The reply in an answer.

        Raises:
          NoReply: the answer is complete, but is no reply.
          Unusable: it is one, and of no use.
        """

    @abc.abstractmethod
    def named(self, request: Q) -> tuple[str, str]:
        """The request's id in the server's log, and its name in errors."""

    def refused(self) -> A:
        """What is recorded where the server does not take a request, with `skip_refused`."""
        raise NotImplementedError

    def ask(self, requests: Sequence[Q], record: Callable[[Q, A], None]) -> None:
        """Calls `record` with each request and its reply, once and in any order, as they arrive.

        Raises:
          ValueError: the server cannot be reached, refuses, or its replies are of no use.
        """
        asyncio.run(self._ask_all(requests, record))

    async def _ask_all(self, requests: Sequence[Q], record: Callable[[Q, A], None]) -> None:
        from openai import AsyncOpenAI  # slow to import, and not every command asks a server

        settings, waiting, turn = self._settings, iter(requests), asyncio.Lock()
        interval = 60 / settings.requests_per_minute if settings.requests_per_minute else 0.0  # seconds
        clock, next_start = asyncio.get_running_loop().time, 0.0
        async with AsyncOpenAI(
            base_url=settings.base_url,
            api_key=os.environ.get(settings.api_key_variable) or "none",
            timeout=settings.timeout,
            max_retries=settings.retries,
        ) as client:

            async def worker() -> None:
                nonlocal next_start
                for request in waiting:
                    async with turn:
                        await asyncio.sleep(max(0.0, next_start - clock()))
                        next_start = clock() + interval
                    record(request, await self._ask(client, request))

            workers = [asyncio.create_task(worker()) for _ in range(min(settings.concurrency, len(requests)))]
            try:
                await asyncio.gather(*workers)
            finally:
                for task in workers:
                    task.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    async def _ask(self, client: Any, request: Q) -> A:
        import openai

        settings, ways_out, where, problem = self._settings, self._ways_out, f"the server {self._settings.base_url}", ""
        id, name = self.named(request)
        log = f"see its log for request {id}, then {ways_out.again}"
        other = f"{ways_out.address}, then {ways_out.again}"
        way_out = log
        for attempt in range(settings.retries + 1):
            try:
                return self.read(request, await self.send(client, request))
            except NoReply as error:
                problem, way_out = str(error), other if error.is_foreign else log
            except Unusable as error:
                raise ValueError(f"{where} answered the request of {name} with {error}") from error
            except (ValueError, openai.APIResponseValidationError) as error:  # not UTF-8, or not JSON
                problem, way_out = f"what is no JSON ({str(error)[:200]})", other
            except openai.APIStatusError as error:
                if error.status_code in (400, 413, 422) and settings.skip_refused:
                    return self.refused()
                is_refused = error.status_code in (400, 401, 403, 404, 413, 422)
                raise ValueError(
                    f"{where} answered {error.status_code} to the request of {name}: {str(error.message)[:300]}; "
                    f"{ways_out.refused if is_refused else ways_out.again}"
                ) from error
            except openai.APIConnectionError as error:  # a timeout is one too
                reason = error.__cause__ or error
                raise ValueError(
                    f"{where} gave no answer in {settings.retries + 1} attempts ({type(reason).__name__}: {reason}); "
                    f"see that it runs, then {ways_out.again}"
                ) from error
            if attempt < settings.retries:
                await asyncio.sleep(min(BACKOFF * 2**attempt, LONGEST_BACKOFF))
        raise ValueError(
            f"{where} answered every one of {settings.retries + 1} attempts at {name} without a reply; the last time "
            f"with {problem}; {way_out}"
        )


def said(value: Any) -> str:
    """The beginning of what a server said, for errors."""
    text = value.model_dump_json(exclude_none=True) if hasattr(value, "model_dump_json") else repr(value)
    return text if len(text) < 200 else f"{text[:197]}..."
