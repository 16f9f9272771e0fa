"""Which chains are kept: those that end by themselves in the right answer, without duplicates, balanced by depth."""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rtd_jax.base.settings import check_ranges
from rtd_jax.data.prose import prose_steps
from rtd_jax.data.schemas.math import last_box
from rtd_jax.data.schemas.schema import one_line
from rtd_jax.data.sentences import sentences
from rtd_jax.data.trace import Problem, is_answer_line, stated_answer
from rtd_jax.eval.answers import answer_matches, parse_number, states_number
from rtd_jax.eval.chains import split_solution
from rtd_jax.eval.estimates import depth_key
from rtd_jax.eval.judge.final import final_number
from rtd_jax.eval.judge.judge import judge_steps
from rtd_jax.teacher.served.requests import Reply, Request

OPEN_FROM = 5  # depths are counted as 1, 2, 3, 4, 5+, the stages of the curriculum
OUTCOMES = ("kept", "wrong", "unsound", "duplicate", "unfinished", "unparsable", "surplus", "refused")


@dataclass(frozen=True)
class SelectionSettings:
    """Which replies are kept. Another selection can be made from the same log without asking the teacher again."""

    # stated: a number after ####, in the last box, after "the answer is", or the last one; any other answer after ####.
    reading: Literal["stated", "strict", "flexible"] = "stated"  # strict: only after ####; flexible, for MATH: anywhere
    steps: Literal["lines", "sentences", "prose"] = "lines"  # sentences: cut as MATH's; prose: by data/prose.py's rules
    sound: bool = False  # keep only chains without a false step, as the step judge reads their arithmetic
    per_problem: int = 0  # chains kept for one problem at most; 0 keeps all
    max_depth_share: float = 1.0  # share of all kept chains that one depth (1, 2, 3, 4, 5+) may have
    tokenizer: str = ""  # folder or hub name: a chain with tokens that it does not know is unparsable; "": no check

    def __post_init__(self) -> None:
        check_ranges(self, per_problem="[0, 1e6]", max_depth_share="(0, 1]")


@dataclass(frozen=True)
class Selected:
    """The kept rows of the `stepwise` schema in the order of the requests, and the outcomes of all requests.

    `counts[depth][outcome]` is by the depth of the problem's own reference chain ("0": it has none), and for "all";
    `kept_by_depth` is by the depth of the kept chain.
    """

    rows: list[dict[str, Any]]
    counts: dict[str, dict[str, int]]
    kept_by_depth: dict[str, int]


def select(
    requests: Sequence[Request],
    replies: Mapping[str, Reply],
    settings: SelectionSettings,
    known: Callable[[str], bool] = lambda text: True,
) -> Selected:
    """Sorts every reply into one of `OUTCOMES`; `known` says whether the tokenizer knows all tokens of a text.

      wrong: it states another answer
      unsound: its answer is right, but a step is false (asked for by `sound`)
      unfinished: it was cut at max_tokens
      unparsable: it has no step, states no answer, or is not `known`
      duplicate: right, but the same text as an earlier chain of its problem, up to white space and case
      surplus: right, but beyond `per_problem` or `max_depth_share`
      refused: the server did not take the request

    Raises:
      ValueError: the right chains have too few depths for `max_depth_share`.
    """
    chains: list[_Chain] = []
    seen: set[tuple[str, str]] = set()
    kept_of_problem: Counter[str] = Counter()
    for request in requests:
        prompt = request.problem.prompt
        outcome, steps = judge(request.problem, replies[request.id], settings)
        if outcome == "kept" and not known("\n".join(steps)):
            outcome = "unparsable"
        if outcome == "kept":
            text = re.sub(r"\s+", " ", " ".join(steps)).lower()
            if (prompt, text) in seen:
                outcome = "duplicate"
            elif 0 < settings.per_problem <= kept_of_problem[prompt]:
                outcome = "surplus"
            seen.add((prompt, text))
        chains.append(_Chain(request, outcome, steps, kept_of_problem[prompt]))
        kept_of_problem[prompt] += outcome == "kept"

    by_depth: dict[str, list[_Chain]] = {}
    for chain in chains:
        if chain.outcome == "kept":
            by_depth.setdefault(depth_key(len(chain.steps), OPEN_FROM), []).append(chain)
    cap = depth_cap([len(kept) for kept in by_depth.values()], settings.max_depth_share)
    for kept in by_depth.values():
        # The first chain of every problem comes before the second of any; equals are in random order, by a hash.
        kept.sort(key=lambda chain: (chain.rank, hashlib.sha256(chain.request.id.encode()).digest()))
        for chain in kept[cap:]:
            chain.outcome = "surplus"

    counts: dict[str, dict[str, int]] = {}
    for chain in chains:
        for key in (depth_key(chain.request.problem.depth, OPEN_FROM), "all"):
            counts.setdefault(key, dict.fromkeys(OUTCOMES, 0))[chain.outcome] += 1
    rows = [chain.row() for chain in chains if chain.outcome == "kept"]
    kept_by_depth = {key: min(len(kept), cap) for key, kept in sorted(by_depth.items())}
    return Selected(rows, dict(sorted(counts.items())), kept_by_depth)


@dataclass
class _Chain:
    request: Request
    outcome: str
    steps: list[str]
    rank: int  # how many chains of its problem were kept before it

    def row(self) -> dict[str, Any]:
        problem = self.request.problem
        return {
            "prompt": problem.prompt,
            "completions": self.steps,
            "answer": problem.answer,
            "depth": len(self.steps),
            "source": problem.source,
            "request": self.request.id,
            "sample": self.request.sample,
        }


def judge(problem: Problem, reply: Reply, settings: SelectionSettings) -> tuple[str, list[str]]:
    """(outcome, steps) of one reply by itself: kept, wrong, unsound, unfinished, unparsable or refused."""
    if reply.finish == "refused":
        return "refused", []
    lines, answer_line = split_solution(reply.text)
    # Each on one line, as the stepwise schema reads it back.
    cut = _steps(reply.text, lines, settings)
    steps = [one_line(step) for step in cut]
    if reply.finish == "length":
        return "unfinished", steps
    # What a model writes after its answer line is not part of the chain.
    text = "\n".join([*lines, answer_line]) if answer_line else reply.text
    if not steps or not _states_answer(problem, text, settings.reading):
        return "unparsable", steps
    if not _is_right(problem, text, settings.reading):
        return "wrong", steps
    is_unsound = settings.sound and judge_steps(problem.prompt, [*cut, answer_line]).first_error >= 0
    return "unsound" if is_unsound else "kept", steps


def _is_right(problem: Problem, text: str, reading: str) -> bool:
    number = parse_number(problem.answer) if reading == "stated" else None
    if number is not None and final_number(text) == number:
        return True
    match = answer_matches(problem, text)
    return match.strict or (reading == "flexible" and match.flexible)


def _steps(text: str, lines: list[str], settings: SelectionSettings) -> list[str]:
    """The steps of a text with the given lines before its answer line."""
    if settings.steps == "lines":
        return lines
    if settings.steps == "sentences":
        return sentences("\n".join(lines))
    laid_out = text.splitlines(keepends=True)  # blank lines and indents say which lines belong together
    answer = next((i for i, line in enumerate(laid_out) if is_answer_line(line.strip())), len(laid_out))
    body = "".join(laid_out[:answer])
    return [body[start:end] for start, end in prose_steps(body)]


def _states_answer(problem: Problem, text: str, reading: str) -> bool:
    """Whether the text states an answer of the kind that the problem asks for, right or wrong."""
    if parse_number(problem.answer) is not None:
        return states_number(text, is_strict=reading == "strict") or (
            reading == "stated" and final_number(text) is not None
        )
    stated = bool(stated_answer(text)) or last_box(text) is not None
    return stated or (reading == "flexible" and bool(text.strip()))


def depth_cap(counts: Sequence[int], share: float) -> int:
    """The largest number c such that no depth has more than `share` of the chains when c are kept for each depth.

    Raises:
      ValueError: even with equal numbers for all depths, each has more than `share`.
    """
    counts = [count for count in counts if count]
    if not counts or share >= 1:
        return max(counts, default=0)
    if share * len(counts) < 1:
        raise ValueError(
            f"selection.max_depth_share is {share}, but the right chains have {len(counts)} depths, so one has at "
            f"least {1 / len(counts):.2f} of them; raise it, or ask for more depths"
        )
    return next(c for c in range(max(counts), 0, -1) if c <= share * sum(min(count, c) for count in counts) + 1e-9)
