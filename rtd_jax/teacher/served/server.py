"""Chains from a server with OpenAI's completions API: vLLM, SGLang, `transformers serve`, or a hosted one."""

import asyncio
import os
from collections.abc import Sequence, Set
from typing import Any

from rtd_jax.data.formats import TextFormat
from rtd_jax.teacher.served.requests import (
    Finish,
    OpenAISettings,
    Record,
    Reply,
    Request,
    SamplingSettings,
    before_stop,
)

BACKOFF, LONGEST_BACKOFF = 0.5, 8.0  # seconds before a request is sent again whose reply could not be read


class OpenAIBackend:
    """Sends requests side by side, and sends one again after a temporary failure.

    The official client waits and retries after status 408, 409, 429 (as Retry-After says) and 5xx, timeouts and broken
    connections, also in the middle of a reply. A complete reply that is not a completion is retried here.

    Args:
      settings: the server.
      text: in which form it is asked.
      sampling: how it replies.
      group: what stands before a setting's name where a user gives it; errors name the setting so.
    """

    def __init__(
        self, settings: OpenAISettings, text: TextFormat, sampling: SamplingSettings, group: str = "--config.openai."
    ) -> None:
        if not settings.model:
            raise ValueError(f"{group}model is empty; give the name under which the server has the model")
        self._settings, self._text, self._sampling, self._group = settings, text, sampling, group

    def identity(self) -> dict[str, Any]:
        return {"backend": "openai", "model": self._settings.model, "extra_body": self._settings.extra()}

    def complete(self, requests: Sequence[Request], missing: Set[str], record: Record) -> None:
        asyncio.run(self._complete([request for request in requests if request.id in missing], record))

    async def _complete(self, requests: Sequence[Request], record: Record) -> None:
        from openai import AsyncOpenAI  # slow to import, and the other backend does not need it

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
                    record([(request, await self._ask(client, request))])

            workers = [asyncio.create_task(worker()) for _ in range(min(settings.concurrency, len(requests)))]
            try:
                await asyncio.gather(*workers)
            finally:
                for task in workers:
                    task.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    async def _ask(self, client: Any, request: Request) -> Reply:
        import openai

        settings, group, where, problem = self._settings, self._group, f"the server {self._settings.base_url}", ""
        again = "then run the command again to go on; what was answered is kept"
        log = f"see its log for request {request.id}, {again}"
        other = f"see that {group}base_url is that of an OpenAI-compatible API (it ends in /v1), {again}"
        way_out = log
        for attempt in range(settings.retries + 1):
            try:
                return self._reply(await self._send(client, request))
            except _NoReply as error:
                problem, way_out = str(error), other if error.is_foreign else log
            except (ValueError, openai.APIResponseValidationError) as error:  # not UTF-8, or not JSON
                problem, way_out = f"what is no JSON ({str(error)[:200]})", other
            except openai.APIStatusError as error:
                if error.status_code in (400, 413, 422) and settings.skip_refused:
                    return Reply("", "refused")
                remedy = "run the command again to go on; what was answered is kept"
                if error.status_code in (400, 401, 403, 404, 413, 422):
                    remedy = (
                        f"mend {group}model, {group}base_url, the key or the sampling; or leave such requests out "
                        f"with {group}skip_refused=True"
                    )
                raise ValueError(
                    f"{where} answered {error.status_code} to the request of {request.problem.source or request.id}: "
                    f"{str(error.message)[:300]}; {remedy}"
                ) from error
            except openai.APIConnectionError as error:  # a timeout is one too
                reason = error.__cause__ or error
                raise ValueError(
                    f"{where} gave no answer in {settings.retries + 1} attempts ({type(reason).__name__}: {reason}); "
                    "see that it runs, then run the command again to go on; what was answered is kept"
                ) from error
            if attempt < settings.retries:
                await asyncio.sleep(min(BACKOFF * 2**attempt, LONGEST_BACKOFF))
        raise ValueError(
            f"{where} answered every one of {settings.retries + 1} attempts at {request.problem.source or request.id} "
            f"without a reply; the last time with {problem}; {way_out}"
        )

    async def _send(self, client: Any, request: Request) -> Any:
        sampling, prompt = self._sampling, self._text.fill(request.problem.prompt)
        options: dict[str, Any] = {
            "model": self._settings.model,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            "seed": request.seed,
            "extra_headers": {"X-Request-Id": request.id},  # to find the chain in the server's own log
            "extra_body": self._settings.extra() or None,
        }
        if sampling.stop:
            options["stop"] = list(sampling.stop)
        if self._text.kind == "chat":
            return await client.chat.completions.create(messages=[{"role": "user", "content": prompt}], **options)
        return await client.completions.create(prompt=prompt, **options)

    def _reply(self, completion: Any) -> Reply:
        """The reply in a completion.

        A model that thinks out of sight may have written nothing yet when it is cut, or call a tool in place of an
        answer: its text is null then, and counts as empty.

        Raises:
          _NoReply: the server's answer is complete, but is no reply, or does not say how the text ended.
        """
        if not hasattr(completion, "choices"):
            raise _NoReply(f"what is no completion: {_said(completion)}", is_foreign=True)
        choices = completion.choices or []
        if len(choices) != 1 or not hasattr(choices[0], "finish_reason"):
            raise _NoReply(f"{len(choices)} choices in place of one: {_said(completion)}")
        finish, message = choices[0].finish_reason, getattr(choices[0], "message", None)
        if finish == "content_filter" or getattr(message, "refusal", None):
            return Reply("", "refused")
        holder, field = (message, "content") if self._text.kind == "chat" else (choices[0], "text")
        if not hasattr(holder, field):
            raise _NoReply(
                f"a {self._text.kind} reply without the field {field!r}: {_said(choices[0])}", is_foreign=True
            )
        text = getattr(holder, field)
        if not isinstance(text, str | None):
            raise _NoReply(f"text that is {type(text).__name__}: {_said(text)}")
        if finish not in _ENDS:
            raise _NoReply(f"finish_reason {finish!r}, so whether the text is whole is not known: {_said(text)}")
        # Half a surrogate pair is valid JSON, but cannot be written.
        text = (text or "").encode("utf-8", "replace").decode()
        text, stopped = before_stop(text, self._sampling.stop)
        return Reply(text, "stop" if stopped else _ENDS[finish])


# How a text ended, by finish_reason; a model that called a tool came to its end without an answer. The last line's are
# what Together and Text Generation Inference say for "stop".
_ENDS: dict[str, Finish] = {
    **{"stop": "stop", "length": "length", "tool_calls": "stop", "function_call": "stop"},
    **dict.fromkeys(("eos", "eos_token", "stop_sequence"), "stop"),
}


class _NoReply(Exception):
    """What a server sent in place of a reply, in words; foreign, where it does not seem to be a server of this API."""

    def __init__(self, words: str, *, is_foreign: bool = False) -> None:
        super().__init__(words)
        self.is_foreign = is_foreign


def _said(value: Any) -> str:
    text = value.model_dump_json(exclude_none=True) if hasattr(value, "model_dump_json") else repr(value)
    return text if len(text) < 200 else f"{text[:197]}..."
