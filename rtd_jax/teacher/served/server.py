"""Chains from a server with OpenAI's completions API: vLLM, SGLang, `transformers serve`, or a hosted one."""

from collections.abc import Sequence, Set
from typing import Any

from rtd_jax.data.chat import template_switches
from rtd_jax.data.formats import TextFormat
from rtd_jax.teacher.served.client import Client, NoReply, WaysOut, said
from rtd_jax.teacher.served.requests import (
    Finish,
    OpenAISettings,
    Record,
    Reply,
    Request,
    SamplingSettings,
    before_stop,
)


class OpenAIBackend(Client[Request, Reply]):
    """Asks for completions or chats.

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
        ways_out = WaysOut(
            address=f"see that {group}base_url is that of an OpenAI-compatible API (it ends in /v1)",
            refused=f"mend {group}model, {group}base_url, the key or the sampling; or leave such requests out with "
            f"{group}skip_refused=True",
        )
        super().__init__(settings, ways_out)
        self._text, self._sampling = text, sampling

    def identity(self) -> dict[str, Any]:
        return {"backend": "openai", "model": self._settings.model, "extra_body": self._extra()}

    def complete(self, requests: Sequence[Request], missing: Set[str], record: Record) -> None:
        wanted = [request for request in requests if request.id in missing]
        self.ask(wanted, lambda request, reply: record([(request, reply)]))

    def named(self, request: Request) -> tuple[str, str]:
        return request.id, request.problem.source or request.id

    def refused(self) -> Reply:
        return Reply("", "refused")

    def read(self, request: Request, answer: Any) -> Reply:
        return self._reply(answer)

    async def send(self, client: Any, request: Request) -> Any:
        sampling, prompt = self._sampling, self._text.fill(request.problem.prompt)
        options: dict[str, Any] = {
            "model": self._settings.model,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            "seed": request.seed,
            "extra_headers": {"X-Request-Id": request.id},  # to find the chain in the server's own log
            "extra_body": self._extra() or None,
        }
        if sampling.stop:
            options["stop"] = list(sampling.stop)
        if self._text.kind == "chat":
            return await client.chat.completions.create(messages=[{"role": "user", "content": prompt}], **options)
        return await client.completions.create(prompt=prompt, **options)

    def _extra(self) -> dict[str, Any]:
        """What is sent beside the API's own fields: the settings', and the switch of a chat's thoughts."""
        switches = template_switches(self._text.thinking) if self._text.kind == "chat" else {}
        extra = self._settings.extra()
        given = extra.get("chat_template_kwargs", {})
        if not switches or not isinstance(given, dict):
            return extra
        return extra | {"chat_template_kwargs": switches | given}

    def _reply(self, completion: Any) -> Reply:
        """The reply in a completion.

        A model that thinks out of sight may have written nothing yet when it is cut, or call a tool in place of an
        answer: its text is null then, and counts as empty.

        Raises:
          NoReply: the server's answer is complete, but is no reply, or does not say how the text ended.
        """
        if not hasattr(completion, "choices"):
            raise NoReply(f"what is no completion: {said(completion)}", is_foreign=True)
        choices = completion.choices or []
        if len(choices) != 1 or not hasattr(choices[0], "finish_reason"):
            raise NoReply(f"{len(choices)} choices in place of one: {said(completion)}")
        finish, message = choices[0].finish_reason, getattr(choices[0], "message", None)
        if finish == "content_filter" or getattr(message, "refusal", None):
            return Reply("", "refused")
        holder, field = (message, "content") if self._text.kind == "chat" else (choices[0], "text")
        if not hasattr(holder, field):
            raise NoReply(f"a {self._text.kind} reply without the field {field!r}: {said(choices[0])}", is_foreign=True)
        text = getattr(holder, field)
        if not isinstance(text, str | None):
            raise NoReply(f"text that is {type(text).__name__}: {said(text)}")
        if finish not in _ENDS:
            raise NoReply(f"finish_reason {finish!r}, so whether the text is whole is not known: {said(text)}")
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
