"""Chains from a server with OpenAI's completions API: vLLM, SGLang, `transformers serve`, or a hosted one."""

import asyncio
import os
from collections.abc import Sequence, Set
from typing import Any

from rtd_jax.apps.traces.requests import OpenAISettings, Record, Reply, Request, SamplingSettings, before_stop
from rtd_jax.data.formats import TextFormat

BACKOFF, LONGEST_BACKOFF = 0.5, 8.0  # seconds before a request is sent again whose reply could not be read


class OpenAIBackend:
    """Sends requests side by side, and sends one again after a temporary failure.

    The official client waits and retries after status 408, 409, 429 (as Retry-After says) and 5xx, timeouts and broken
    connections, also in the middle of a reply. A complete reply that is not a completion is retried here.
    """

    def __init__(self, settings: OpenAISettings, text: TextFormat, sampling: SamplingSettings) -> None:
        if not settings.model:
            raise ValueError("openai.model is empty; give the name under which the server has the model")
        self._settings, self._text, self._sampling = settings, text, sampling

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

        settings, where = self._settings, f"the server {self._settings.base_url}"
        for attempt in range(settings.retries + 1):
            try:
                return self._reply(await self._send(client, request))
            except (ValueError, openai.APIResponseValidationError) as error:  # not UTF-8, not JSON, or no completion
                problem = str(error)
            except openai.APIStatusError as error:
                if error.status_code in (400, 413, 422) and settings.skip_refused:
                    return Reply("", "refused")
                way_out = "run the command again to go on; what was answered is kept"
                if error.status_code in (400, 401, 403, 404, 413, 422):
                    way_out = (
                        "mend openai.model, openai.base_url, the key or the sampling; or leave such requests out "
                        "with --config.openai.skip_refused=True"
                    )
                raise ValueError(
                    f"{where} answered {error.status_code} to the request of {request.problem.source or request.id}: "
                    f"{str(error.message)[:300]}; {way_out}"
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
            f"{where} answered every one of {settings.retries + 1} attempts with what is no completion (the last: "
            f"{problem[:200]}); see that base_url is that of an OpenAI-compatible API (it ends in /v1), then run the "
            "command again"
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
        """Raises ValueError where the server's reply is complete, but not a completion."""
        try:
            (choice,) = completion.choices
            finish = choice.finish_reason
            if finish == "content_filter":
                return Reply("", "refused")
            text = choice.message.content if self._text.kind == "chat" else choice.text
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{str(completion)[:120]!r} is not one choice: {error}") from error
        if not isinstance(text, str) or finish not in ("stop", "length"):
            raise ValueError(f"text is {str(text)[:60]!r} and finish_reason {finish!r}")
        text = text.encode("utf-8", "replace").decode()  # half a surrogate pair is valid JSON, but cannot be written
        text, stopped = before_stop(text, self._sampling.stop)
        return Reply(text, "stop" if stopped else finish)
