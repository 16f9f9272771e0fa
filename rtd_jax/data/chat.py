"""Applies a tokenizer's chat template: a program that somebody else wrote, so it is tried within limits first."""

import functools
import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from rtd_jax.data import template_trial

# Some templates write today's date, and the data would differ from day to day: Llama-3.1's unless it is given one,
# SmolLM3's and Mistral Small's by a function.
TODAY = datetime(2024, 7, 26)
DATE = TODAY.strftime("%d %b %Y")
_CODES = "aAbBdHIjmMpSyY"
# Stands before a template that asks for the date by a function, and takes the function's place.
_STOPPED_CLOCK = (
    "{%- macro strftime_now(format) -%}{{ format"
    + "".join(f" | replace('%{code}', '{TODAY.strftime('%' + code)}')" for code in _CODES)
    + " }}{%- endmacro -%}"
)
_WALL_SECONDS = 300  # of a trial, on a machine that is busy with something else
_TRIED_TEXT = "Mia has 13 apples.\nShe buys <<13+4=17>>4 more; how many are there?\n\n" * 60  # some 4,000 characters
_TRIED_TURNS = (1, 2, 11)  # a prompt, a prompt with its answer, and both after five solved examples


def apply_template(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[tuple[str, str]], is_prompt: bool, thinking: str = ""
) -> str:
    """The text of a conversation.

    Args:
      messages: (role, text) pairs.
      is_prompt: ends with what stands before an assistant's message.
      thinking: "on" or "off" for templates that ask whether the model thinks (`enable_thinking`), "" for their own
        choice.

    Raises:
      ValueError: the tokenizer has no chat template, or the template fails, does not end, or takes too much memory.
    """
    name = f"the chat template of {tokenizer.name_or_path!r}"
    if not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template; use format kind 'plain', "
            "or an instruct model's tokenizer"
        )
    conversation = [{"role": role, "content": text} for role, text in messages]
    variables: dict[str, Any] = {"date_string": DATE, **template_switches(thinking)}
    try:
        template = tokenizer.get_chat_template()
        check_template(template, json.dumps({**tokenizer.special_tokens_map, **variables}, default=str), name)
        return str(
            tokenizer.apply_chat_template(
                conversation,
                chat_template=_STOPPED_CLOCK + template if "strftime_now" in template else template,
                tokenize=False,
                add_generation_prompt=is_prompt,
                **variables,
            )
        )
    except _LimitError as error:
        raise ValueError(str(error)) from None
    except Exception as error:  # whatever the template does wrong
        cause = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{name} fails ({type(error).__name__}: {cause}); mend its chat_template, or use format kind 'plain'"
        ) from error


def template_switches(thinking: str) -> dict[str, bool]:
    """What a template is told of thinking, for one that asks: Qwen3's and SmolLM3's do."""
    return {"enable_thinking": thinking == "on"} if thinking else {}


class _LimitError(ValueError):
    pass


@functools.cache
def check_template(template: str, variables: str, name: str) -> None:
    """Refuses a template that does not end, or that takes too much memory, before it is rendered in this process.

    It is rendered once in a process of its own, with limits (see `data/template_trial.py`): conversations of up to
    eleven messages of 4,000 characters. Endless loops, huge products and huge outputs are found, also those that grow
    with the number or the length of the messages. Not covered is a template that behaves well on these texts and badly
    on others, by chance or by intent: the real texts are rendered in this process, without limits.

    Args:
      variables: JSON, what the template reads beside the messages.
      name: of the template, for errors.

    Raises:
      ValueError: the template exceeds a limit.
    """
    roles = ("user", "assistant")
    conversations = [[{"role": roles[i % 2], "content": _TRIED_TEXT} for i in range(turns)] for turns in _TRIED_TURNS]
    asked = {"template": template, "conversations": conversations, "variables": json.loads(variables)}
    # -P keeps this folder off the path, where modules are named like those of the standard library.
    command = [sys.executable, "-P", str(Path(template_trial.__file__))]
    way_out = "mend its chat_template, or use format kind 'plain'"
    try:
        trial = subprocess.run(
            command, input=json.dumps(asked), capture_output=True, text=True, timeout=_WALL_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise _LimitError(f"{name} has not ended after {_WALL_SECONDS} s; {way_out}") from None
    if trial.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        raise _LimitError(f"{name} has not ended after {template_trial.CPU_SECONDS} s of computing; {way_out}")
    if trial.returncode == template_trial.OUT_OF_MEMORY:
        raise _LimitError(f"{name} takes more than {template_trial.MEMORY >> 20} MiB of memory; {way_out}")
    if trial.returncode == template_trial.TOO_LONG:
        raise _LimitError(
            f"{name} writes more than {template_trial.MAX_CHARACTERS:,} characters beside the messages; {way_out}"
        )
    if trial.returncode:
        last = (trial.stderr.strip().splitlines() or [f"status {trial.returncode}"])[-1]
        raise _LimitError(f"{name} could not be tried ({last[:200]}); {way_out}")
