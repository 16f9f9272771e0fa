"""Chains whose steps are labelled right or wrong: what a process reward model learns from.

From files: rows of ProcessBench, PRM800K, or TRL's stepwise schema. From the generator: its problems with steps
corrupted in three ways,

- wrong result: the arithmetic of the step is wrong;
- wrong operand: the step says another number than the problem does, and computes rightly with it;
- skipped fact: a fact of the problem is left out, and the next one is applied to the value before it.

A corrupted chain goes on from the value that it wrote. Its later steps are labelled by whether the step *itself* is
right, given the problem and the value that the step before it states: each step is judged by itself, not by whether the
chain can still reach the answer.
"""

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rtd_jax.data.generators import word_problems as synthetic
from rtd_jax.data.sources import SourceSettings, read_rows
from rtd_jax.data.trace import Trace

Label = bool | None  # None: nobody has judged the step

# A step of the generator: what it says, then "<<value sign operand = result>>result."
_STEP = re.compile(r"(?P<said>.*): <<(?P<value>\d+)(?P<sign>[-+*/])(?P<operand>\d+)=(?P<result>\d+)>>(?P=result)\.")
_MAX_RESULT = 99  # numbers up to here are one token of the bundled tokenizer
_PRM800K_RATINGS = {1: True, 0: True, -1: False}  # neutral counts as right, as in the paper (arXiv:2305.20050)


@dataclass(frozen=True)
class LabelledChain:
    """A problem, the steps of a solution, and for each step whether it is right."""

    prompt: str
    steps: tuple[str, ...]
    labels: tuple[Label, ...]
    source: str = ""

    def __post_init__(self) -> None:
        if len(self.labels) != len(self.steps):
            raise ValueError(f"{self.source}: {len(self.labels)} labels for {len(self.steps)} steps; expected one each")

    def trace(self) -> Trace:
        """The chain as a trace without an answer of its own."""
        return Trace(self.prompt, self.steps, "", "", self.source)


@dataclass(frozen=True)
class LabelledSettings:
    """Where labelled chains come from; `location`, `split`, `subset`, `revision` and `limit` as of other sources."""

    schema: str  # synthetic, processbench, prm800k or stepwise
    location: str = ""  # folder, file or hub name; unused by synthetic
    split: str = "train"  # of the data set; those of synthetic are disjoint
    subset: str = ""  # the hub's configuration name
    revision: str = ""  # the hub's commit or tag; "" is the newest
    limit: int = 0  # chains; 0 takes all (synthetic needs a number)
    depths: tuple[int, ...] = (1, 2, 3, 4, 5, 6)  # of synthetic
    seed: int = 0  # of synthetic: problems and corruptions
    corruption: float = 0.25  # of synthetic: chance of each step to be made wrong

    def __post_init__(self) -> None:
        if self.schema not in ("synthetic", *PARSERS):
            raise ValueError(f"schema {self.schema!r} is unknown; use one of synthetic, {', '.join(PARSERS)}")
        if not 0.0 < self.corruption < 1.0:
            raise ValueError(f"corruption is {self.corruption}; give a share of the steps in (0, 1), e.g. 0.25")
        if self.limit < 0:
            raise ValueError(f"limit is {self.limit}; expected 0 (all) or more chains")
        if self.schema == "synthetic" and not self.limit:
            raise ValueError("limit is 0; the synthetic source is endless and needs the number of chains to make")
        if self.schema != "synthetic" and not self.location:
            raise ValueError(f"schema {self.schema!r} needs a location: a local folder or file, or a hub name")

    def unread_settings(self) -> dict[str, str]:
        of_files, of_generator = ("location", "subset", "revision"), ("depths", "seed", "corruption")
        return dict.fromkeys(of_files if self.schema == "synthetic" else of_generator, f"schema is {self.schema!r}")


def load_labelled(settings: LabelledSettings) -> list[LabelledChain]:
    """All chains of a split, in order.

    Raises:
      ValueError: names file and row of what cannot be read, or says that no step at all is labelled.
    """
    if settings.schema == "synthetic":
        traces = synthetic.generate(settings.limit, settings.depths, settings.split, settings.seed)
        rng = random.Random(f"{settings.seed}/{settings.split}/corruption")
        return [corrupt(trace, rng, settings.corruption) for trace in traces]
    # The schema of the rows is ours to parse; any other of this loader's would do here.
    source = SourceSettings("stepwise", settings.location, settings.split, settings.subset, settings.revision)
    chains: list[LabelledChain] = []
    for place, row in read_rows(source):
        chains += PARSERS[settings.schema](row, place)
        if settings.limit and len(chains) >= settings.limit:
            chains = chains[: settings.limit]
            break
    if not any(label is not None for chain in chains for label in chain.labels):
        raise ValueError(
            f"{settings.location} ({settings.split}): none of its {len(chains)} chains has a labelled step; a reward "
            "model learns from steps that somebody judged"
        )
    return chains


def corrupt(trace: Trace, rng: random.Random, rate: float) -> LabelledChain:
    """A generator's chain with each step made wrong with chance `rate`, going on from what was written.

    Raises:
      ValueError: a step that the generator did not write.
    """
    facts = []
    for index, step in enumerate(trace.steps):
        match = _STEP.fullmatch(step)
        if match is None:
            raise ValueError(f"{trace.source}: step {index + 1} is {step!r}; expected one that the generator wrote")
        facts.append(match)
    value = int(facts[0]["value"])
    steps: list[str] = []
    labels: list[Label] = []
    place = 0
    while place < len(facts):
        fact, is_right = facts[place], True
        if rng.random() < rate:
            kinds = [_wrong_result, _wrong_operand, *([_skip] if place + 1 < len(facts) else [])]
            rng.shuffle(kinds)
            made = next((found for kind in kinds if (found := kind(facts, place, value, rng)) is not None), None)
        else:
            made = None
        if made is not None:
            text, value, place, is_right = *made, False
        else:
            honest = _written(fact["said"], value, fact["sign"], int(fact["operand"]))
            if honest is None:  # the wrong value has left the numbers that a step can be written with
                break
            text, value = honest
        steps.append(text)
        labels.append(is_right)
        place += 1
    return LabelledChain(trace.prompt, tuple(steps), tuple(labels), trace.source)


_Made = tuple[str, int, int]  # the step's text, the value it states, and the place of the fact it used


def _wrong_result(facts: list[re.Match], place: int, value: int, rng: random.Random) -> _Made | None:
    fact = facts[place]
    right = _apply(value, fact["sign"], int(fact["operand"]))
    middle = value if right is None else right
    options = [middle + sign * d for d in (1, 2, 3, 5, 10) for sign in (1, -1)]
    options = [x for x in options if 0 <= x <= _MAX_RESULT]
    wrong = rng.choice(options)
    return f"{fact['said']}: <<{value}{fact['sign']}{fact['operand']}={wrong}>>{wrong}.", wrong, place


def _wrong_operand(facts: list[re.Match], place: int, value: int, rng: random.Random) -> _Made | None:
    fact = facts[place]
    if fact["sign"] in "*/":  # "all doubled" says no number
        return None
    operands = [x for x in synthetic.OPERANDS if x != int(fact["operand"])]
    rng.shuffle(operands)
    for operand in operands:
        said = re.sub(rf"\b{fact['operand']}\b", str(operand), fact["said"])
        made = _written(said, value, fact["sign"], operand)
        if made is not None:
            return *made, place
    return None


def _skip(facts: list[re.Match], place: int, value: int, rng: random.Random) -> _Made | None:
    fact = facts[place + 1]
    made = _written(fact["said"], value, fact["sign"], int(fact["operand"]))
    return None if made is None else (*made, place + 1)


def _written(said: str, value: int, sign: str, operand: int) -> tuple[str, int] | None:
    result = _apply(value, sign, operand)
    return None if result is None else (f"{said}: <<{value}{sign}{operand}={result}>>{result}.", result)


def _apply(value: int, sign: str, operand: int) -> int | None:
    """None where the result is no number from 0 to 99."""
    if sign == "/" and value % operand:
        return None
    result = {"+": value + operand, "-": value - operand, "*": value * operand, "/": value // operand}[sign]
    return result if 0 <= result <= _MAX_RESULT else None


def from_processbench(row: Mapping[str, Any], source: str = "row") -> list[LabelledChain]:
    """`problem`, `steps`, `label`: index of the first wrong step, -1 none. Nobody judged what comes after it."""
    steps, label = _texts(row, "steps", source), row.get("label")
    if not isinstance(label, int) or isinstance(label, bool) or not -1 <= label < len(steps):
        raise ValueError(
            f"{source}: field 'label' is {label!r}; expected the index of the first wrong of {len(steps)} steps, or -1"
        )
    good = len(steps) if label < 0 else label
    labels: list[Label] = [*[True] * good, *[False] * (label >= 0)]
    labels += [None] * (len(steps) - len(labels))
    return [LabelledChain(_text(row, "problem", source), steps, tuple(labels), source)]


def from_prm800k(row: Mapping[str, Any], source: str = "row") -> list[LabelledChain]:
    """`question.problem`, `label.steps[].completions[].{text, rating}` with `chosen_completion` or `human_completion`.

    The chosen completions are one chain. Every completion beside them that was rated is one more: the steps before it,
    unlabelled there because they have their labels in the first chain, and itself.
    """
    question, label = row.get("question"), row.get("label")
    if not isinstance(question, Mapping) or not isinstance(label, Mapping) or not isinstance(label.get("steps"), list):
        raise ValueError(f"{source}: expected PRM800K's fields 'question.problem' and 'label.steps'; has {sorted(row)}")
    prompt = _text(question, "problem", f"{source}: question")
    steps: list[str] = []
    labels: list[Label] = []
    others: list[LabelledChain] = []
    for number, step in enumerate(label["steps"], start=1):
        place = f"{source}: step {number}"
        completions, chosen = step.get("completions") or [], step.get("chosen_completion")
        for index, completion in enumerate(completions):
            rating = completion.get("rating")
            if rating is not None and rating not in _PRM800K_RATINGS:
                raise ValueError(f"{place}: rating is {rating!r}; expected -1, 0, 1 or null")
            if index != chosen and rating is not None:
                before: tuple[Label, ...] = (None,) * len(steps)
                text = (*steps, _line(_text(completion, "text", place)))
                others.append(LabelledChain(prompt, text, (*before, _PRM800K_RATINGS[rating]), source))
        if chosen is not None:
            if not isinstance(chosen, int) or not 0 <= chosen < len(completions):
                raise ValueError(f"{place}: chosen_completion is {chosen!r} of {len(completions)} completions")
            steps.append(_line(_text(completions[chosen], "text", place)))
            labels.append(_PRM800K_RATINGS.get(completions[chosen].get("rating")))
        elif step.get("human_completion"):
            human = step["human_completion"]
            steps.append(_line(_text(human, "text", place)))
            labels.append(_PRM800K_RATINGS.get(human.get("rating")))
        else:
            break
    chosen_chain = [LabelledChain(prompt, tuple(steps), tuple(labels), source)] if steps else []
    if not chosen_chain and not others:
        raise ValueError(f"{source}: the row has no rated completion; leave it out")
    return chosen_chain + others


def from_stepwise(row: Mapping[str, Any], source: str = "row") -> list[LabelledChain]:
    """`prompt`, `completions` (list of steps), `labels` (one bool a step; null where nobody judged)."""
    steps, labels = _texts(row, "completions", source), row.get("labels")
    if not isinstance(labels, list | tuple) or len(labels) != len(steps):
        raise ValueError(f"{source}: field 'labels' is {labels!r}; expected one for each of the {len(steps)} steps")
    for index, label in enumerate(labels):
        if label is not None and not isinstance(label, bool):
            raise ValueError(f"{source}: label {index + 1} is {label!r}; expected true, false or null")
    return [LabelledChain(_text(row, "prompt", source), steps, tuple(labels), source)]


PARSERS: dict[str, Callable[..., list[LabelledChain]]] = {
    "processbench": from_processbench,
    "prm800k": from_prm800k,
    "stepwise": from_stepwise,
}


def _text(row: Mapping[str, Any], field: str, source: str) -> str:
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{source}: field {field!r} is {value!r}; expected text")
    return value.strip()


def _texts(row: Mapping[str, Any], field: str, source: str) -> tuple[str, ...]:
    value = row.get(field)
    if not isinstance(value, list | tuple) or not value or not all(isinstance(x, str) and x.strip() for x in value):
        raise ValueError(f"{source}: field {field!r} is {value!r}; expected a list of at least one text")
    return tuple(_line(text) for text in value)


def _line(text: str) -> str:
    """One line a step, as everywhere: chains are cut back into steps at line ends."""
    return " ".join(text.split())
