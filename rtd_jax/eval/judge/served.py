r"""A served model as judge: it is asked for the first wrong step of a solution, in ProcessBench's format.

The format is that of ProcessBench (arXiv:2412.06559): the problem, the solution's steps as paragraphs between tags that
number them from 0, and the request for the index of the first wrong one, or -1, in \boxed{}. The sentences are ours.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rtd_jax.base.console import printable
from rtd_jax.base.settings import SettingError, check_ranges
from rtd_jax.data.formats import TextFormat
from rtd_jax.data.schemas.math import last_box
from rtd_jax.data.trace import Problem
from rtd_jax.teacher.served.asking import ask_for_missing
from rtd_jax.teacher.served.log import ResponseLog
from rtd_jax.teacher.served.requests import Finish, OpenAISettings, Reply, SamplingSettings, make_requests
from rtd_jax.teacher.served.server import OpenAIBackend

PROMPT = r"""Below are a problem and a solution of it. The solution is divided into paragraphs; each stands between tags
that have its index, counted from 0.

[Problem]

{problem}

[Solution]

{solution}

Check the solution paragraph by paragraph. If a paragraph has an error, answer with the index of the first paragraph
that has one. If none has an error, answer with -1.

End with your answer, the index alone, in \boxed{{}}."""
_INDEX = re.compile(r"(?:\\text\w*\{)?\s*<?(?:paragraph[\s_\\]*)?\s*(-?\d{1,9})\s*>?\s*\}?")
_SIGNS = str.maketrans("\u2212\u2013", "--")  # a minus sign, and the dash that is written for one


@dataclass(frozen=True, kw_only=True)
class ServedJudgeFlags:
    """The flags that say which server judges, and how it is asked; of commands with --judge=openai."""

    judge_base_url: str = "http://localhost:8000/v1"  # of the server of --judge=openai, such as the one of the teacher
    judge_model: str = ""  # as that server names it
    judge_api_key_variable: str = "OPENAI_API_KEY"  # environment variable with the key; unset where none is needed
    judge_max_tokens: int = 2048  # of a verdict with the reasoning before it
    judge_concurrency: int = 16  # requests sent side by side; an interrupted run loses at most so many
    judge_requests_per_minute: int = 0  # at most so many are started; 0 is no limit
    judge_timeout: float = 600.0  # seconds for one reply
    judge_retries: int = 8  # of a request with a temporary failure, 0.5 to 8 s apart or as the server says
    judge_extra_body: str = ""  # further fields of a request as a JSON object, such as '{"top_k": 1}'
    judge_skip_refused: bool = False  # a request that the server refuses (400, 413, 422) is no verdict, and no end

    def __post_init__(self) -> None:
        check_ranges(self, judge_max_tokens="[1, 1e6]", judge_concurrency="[1, 1e4]", judge_timeout="(0, 1e6]")
        check_ranges(self, judge_requests_per_minute="[0, 1e9]", judge_retries="[0, 1e6]")
        try:
            self.server()
        except ValueError as error:
            raise SettingError(f"judge_{error}") from error

    def server(self) -> OpenAISettings:
        """The server as its client knows it."""
        return OpenAISettings(
            base_url=self.judge_base_url,
            model=self.judge_model,
            api_key_variable=self.judge_api_key_variable,
            concurrency=self.judge_concurrency,
            requests_per_minute=self.judge_requests_per_minute,
            timeout=self.judge_timeout,
            retries=self.judge_retries,
            extra_body=self.judge_extra_body,
            skip_refused=self.judge_skip_refused,
        )

    def check_asked(self, is_asked: bool) -> None:
        """Raises SettingError where the server is to judge and its model has no name, or the reverse."""
        if is_asked and not self.judge_model:
            raise SettingError("judge_model is empty; give the name under which the server of --judge=openai has it")
        if self.judge_model and not is_asked:
            raise SettingError(f"judge_model is {self.judge_model!r}, but no server is to judge; add --judge=openai")


class Solution(NamedTuple):
    """What is judged."""

    problem: str
    steps: Sequence[str]  # at least one
    source: str = ""  # names it in errors


class ServedVerdict(NamedTuple):
    """What the served model said of a solution."""

    first_error: int | None  # index of the first wrong step; -1: all are right; None: the reply has no such index
    finish: Finish  # how the reply ended
    request: str  # its id in the log

    @property
    def outcome(self) -> str:
        """'verdict'; else why there is none: 'refused', 'unfinished' (cut) or 'unparsable'."""
        if self.first_error is not None:
            return "verdict"
        return {"refused": "refused", "length": "unfinished"}.get(self.finish, "unparsable")


def prompt_for(solution: Solution) -> str:
    """What the model is asked."""
    tagged = (f"<paragraph_{i}>\n{step.strip()}\n</paragraph_{i}>" for i, step in enumerate(solution.steps))
    return PROMPT.format(problem=solution.problem.strip(), solution="\n\n".join(tagged))


def read_index(text: str, steps: int) -> int | None:
    r"""The index in the last \boxed{} of a reply, from -1 to `steps` - 1; None where there is no such index.

    What a model thinks aloud between <think> tags is no part of its reply.
    """
    _, _, reply = text.rpartition("</think>")
    box = None if "<think>" in reply else last_box(reply)
    index = _INDEX.fullmatch(box.translate(_SIGNS).strip(" $")) if box else None
    return int(index[1]) if index and -1 <= int(index[1]) < steps else None


def check_log(flags: ServedJudgeFlags, folder: Path) -> None:
    """Refuses a folder whose log is another judge's, or damaged; for commands that work for long before they ask."""
    if (folder / "requests.json").exists():
        with ResponseLog(folder, _asked(flags)[1], "--out"):
            pass


def ask_for_verdicts(solutions: Sequence[Solution], flags: ServedJudgeFlags, folder: Path) -> list[ServedVerdict]:
    """The served model's verdicts, in order. Those that the log in `folder` has are not asked for again.

    Solutions that are alike are asked about once. The model is asked for its most probable reply.

    Raises:
      ValueError: the server cannot be used, or the log is another model's; what was answered before is in the log.
    """
    backend, identity = _asked(flags)
    prompts = [prompt_for(solution) for solution in solutions]
    problems: dict[str, Problem] = {}
    for prompt, solution in zip(prompts, solutions, strict=True):
        problems.setdefault(prompt, Problem(prompt, "", source=solution.source))
    requests = make_requests([*problems.values()], 1, 0, identity)
    folder.mkdir(parents=True, exist_ok=True)
    with ResponseLog(folder, identity, "--out") as log:
        number = f"{len(solutions)} solutions, {len(requests)} requests to {printable(flags.judge_model)}"
        replies = ask_for_missing(backend, requests, log, number, "verdicts")
    ids = {request.problem.prompt: request.id for request in requests}

    def verdict(reply: Reply, solution: Solution, request: str) -> ServedVerdict:
        index = None if reply.finish == "refused" else read_index(reply.text, len(solution.steps))
        return ServedVerdict(index, reply.finish, request)

    return [
        verdict(replies[ids[prompt]], solution, ids[prompt])
        for prompt, solution in zip(prompts, solutions, strict=True)
    ]


def _asked(flags: ServedJudgeFlags) -> tuple[OpenAIBackend, dict[str, Any]]:
    """Who is asked, and all that decides the replies."""
    sampling, text = SamplingSettings(1, 0.0, 1.0, flags.judge_max_tokens), TextFormat("chat")
    backend = OpenAIBackend(flags.server(), text, sampling, "--judge_")
    how = {"temperature": sampling.temperature, "top_p": sampling.top_p, "max_tokens": sampling.max_tokens}
    return backend, {**backend.identity(), "sampling": how, "text": {"kind": text.kind, "prompt": PROMPT}}
