"""The benchmarks: where their problems are, how they are asked, and which solved examples stand before each.

Prompts, stop texts and the drawing of examples are lm-evaluation-harness' (0.4.13; `gsm8k`, `minerva_math`,
`arc_challenge`): the prompt of a GSM8K or ARC problem is the harness' own, letter by letter. It has no StrategyQA,
which is asked like GSM8K. MATH's examples come from its training split, because the harness' four are MATH's text,
which is not ours to hand on.
"""

import dataclasses
import functools
import hashlib
import itertools
import random
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rtd_jax.data.formats import TextFormat, asked_format
from rtd_jax.data.schemas import SCHEMAS
from rtd_jax.data.schemas.arc import ChoiceQuestion, choices_from_arc
from rtd_jax.data.sources import SourceSettings, load_rows, load_traces
from rtd_jax.data.trace import Trace, problem_key

SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)
SYNTHETIC_PROBLEMS = 600  # where no limit is given; also as many to draw examples from
EXAMPLES_SEED = 1234  # the harness' default

Item = Trace | ChoiceQuestion
Turns = Sequence[tuple[str, str]]  # (question as asked, answer)


@dataclasses.dataclass(frozen=True)
class Task:
    """A benchmark: how it is asked by default, and where the hub has it."""

    schema: str
    shots: int
    location: str = ""  # hub name
    subsets: tuple[str, ...] = ("",)  # hub configurations that are read one after the other
    split: str = "test"
    examples: str = "train"  # split of the solved examples
    revision: str = ""  # hub commit; "" is the newest
    prompt: str = "Question: {prompt}\nAnswer:"
    stops: tuple[str, ...] = ()

    @property
    def is_choice(self) -> bool:
        return self.schema == "arc"


TASKS = {
    "gsm8k": Task(
        "gsm8k",
        5,
        "openai/gsm8k",
        ("main",),
        revision="e53f048856ff4f594e959d75785d2c2d37b678ee",
        stops=("Question:", "</s>", "<|im_end|>"),
    ),
    "math": Task(
        "math",
        4,
        "EleutherAI/hendrycks_math",
        SUBJECTS,
        revision="21a5633873b6a120296cce3e2df9d5550074f4a3",
        prompt="Problem:\n{prompt}\n\nSolution:",
        stops=("Problem:",),
    ),
    # One split only: examples are drawn from it too, never the problem itself.
    "strategyqa": Task("strategyqa", 5, "tasksource/strategy-qa", split="train", stops=("Question:",)),
    "arc_challenge": Task(
        "arc", 0, "allenai/ai2_arc", ("ARC-Challenge",), revision="210d026faf9955653af8916fad021475a3f00453"
    ),
    "synthetic": Task("synthetic", 0),
}


@dataclasses.dataclass(frozen=True)
class Problems:
    """What a model is asked, in which form, and with which solved examples before each problem.

    In a chat the examples are `turns`; in plain text they are part of the problem's `TextFormat`.
    """

    items: Sequence[Item]
    texts: Sequence[TextFormat]
    turns: Sequence[Turns]
    text_format: str  # for reports: "plain, 5-shot"
    protocol: Mapping[str, Any]  # for reports: where all of it comes from
    form: TextFormat  # of every problem, without the solved examples


def load_problems(
    name: str,
    *,
    data_root: str = "",
    limit: int = 0,
    few_shot: int = -1,
    chat: bool = False,
    levels: Sequence[int] = (),
    seed: int = EXAMPLES_SEED,
    revision: str = "",
    prompt_template: str = "",
    thinking: str = "",
    trained_on: TextFormat | None = None,
) -> Problems:
    """The problems of a task.

    Args:
      name: one of `TASKS`.
      data_root: folder with `<name>/<split>.jsonl` and so on; "" is the hub.
      limit: problems, from the beginning (of MATH in seven files: of each subject in turn); 0 takes all.
      few_shot: solved examples before each problem; -1 takes the task's usual number.
      chat: ask through the tokenizer's chat template; each example is a turn of its own.
      levels: of MATH; () takes all.
      seed: of the drawing of examples.
      revision: hub commit, tag or branch; "" takes the one in `TASKS`.
      prompt_template: in the place of the task's own; what is written follows it after a space, or on its new line.
      thinking: of a chat, "on" or "off" for templates that ask for it; "": as `trained_on` says.
      trained_on: form of synthetic problems, where neither `chat` nor `prompt_template` says another.

    Raises:
      ValueError: data that cannot be read, or too few rows to draw the examples from.
    """
    task = TASKS[name]
    shots = task.shots if few_shot < 0 else few_shot
    asked = asked_format(
        trained_on, chat=chat, prompt_template=prompt_template or (task.prompt if chat else ""), thinking=thinking
    )
    own = trained_on if name == "synthetic" else None
    text = asked or own or TextFormat("plain", task.prompt)
    sources = _sources(name, data_root, revision or task.revision)
    items: list[Item]
    if name == "synthetic":
        items = [*load_traces(SourceSettings("synthetic", split="test", limit=limit or SYNTHETIC_PROBLEMS))]
    elif task.is_choice:
        rows = load_rows(dataclasses.replace(sources[0], split=task.split, limit=limit))
        items = [choices_from_arc(row, place) for place, row in rows]
    else:
        parts = [
            load_traces(dataclasses.replace(source, split=task.split, limit=limit, levels=tuple(levels)))
            for source in sources
        ]
        # A limit cuts the subjects alike, not the last ones away.
        in_turn = itertools.chain.from_iterable(itertools.zip_longest(*parts)) if limit else itertools.chain(*parts)
        items = [item for item in in_turn if item is not None][: limit or None]
    turns, pool = _examples(task, sources, items, text, shots, seed) if shots else ([()] * len(items), 0)
    drawn = f"drawn for each problem from {task.examples} ({pool} rows) by random.Random({seed}).sample, in order"
    protocol = {
        "data": [f"{source.location}{':' * bool(source.subset)}{source.subset}" for source in sources],
        "revision": sources[0].revision or None,
        "split": task.split,
        "problems": len(items),
        "fingerprint": hashlib.sha256("".join(map(_identity, items)).encode()).hexdigest()[:16],
        "levels": list(levels),
        "prompt": text.template,
        "completion_prefix": text.completion_prefix,
        "context": text.context,
        "chat_template": text.kind == "chat",
        "few_shot": shots,
        "examples": drawn if shots else None,
        "stop_texts": list(task.stops),
        **({"thinking": text.thinking} if text.thinking else {}),
    }
    text_format = f"{text.kind}, {shots}-shot"
    if text.kind == "chat":
        return Problems(items, [text] * len(items), turns, text_format, protocol, text)
    contexts = ["".join(f"{asked}{text.completion_prefix}{answer}\n\n" for asked, answer in pairs) for pairs in turns]
    texts = [dataclasses.replace(text, context=text.context + context) for context in contexts]
    return Problems(items, texts, [()] * len(items), text_format, protocol, text)


def _sources(name: str, data_root: str, revision: str) -> list[SourceSettings]:
    """Where the rows of a task lie: one entry for each subset that has files of its own."""
    task = TASKS[name]
    if name == "synthetic":
        return [SourceSettings("synthetic", limit=1)]
    if not data_root:
        return [SourceSettings(task.schema, task.location, subset=x, revision=revision) for x in task.subsets]
    folder = Path(data_root).expanduser() / name
    if not folder.is_dir():
        raise ValueError(
            f"{folder}: no such folder; --data_root needs {name}/{task.split}.jsonl in it (or .parquet), with the "
            f"fields of {task.location} on the hub"
        )
    whole = len(task.subsets) > 1 and not (folder / task.subsets[0]).is_dir()
    return [SourceSettings(task.schema, str(folder), subset=x) for x in ([""] if whole else task.subsets)]


def _examples(
    task: Task, sources: Sequence[SourceSettings], items: Sequence[Item], text: TextFormat, shots: int, seed: int
) -> tuple[list[Turns], int]:
    """The solved examples of each problem, and of how many rows they were drawn.

    As the harness' ContextSampler: one generator goes through the problems in order. Where examples come from the split
    of the problems, one more is drawn and the problem itself taken out. A problem is itself wherever its row stands,
    and no example comes twice: where a row is repeated, others are drawn in its place, by a generator of their own.
    """
    if task.schema == "synthetic":
        pool: list[Any] = list(load_traces(SourceSettings("synthetic", split="train", limit=SYNTHETIC_PROBLEMS)))
    else:
        pool = [row for source in sources for row in load_rows(dataclasses.replace(source, split=task.examples))]
    has_itself = task.split == task.examples
    if len(pool) < shots + has_itself:
        raise ValueError(
            f"{len(pool)} rows of {task.examples} are too few to draw {shots} solved examples; lower few_shot"
        )

    @functools.cache
    def example(i: int) -> tuple[Hashable, tuple[str, str]]:
        if task.schema == "synthetic":
            item, answer = pool[i], pool[i].completion
        elif task.is_choice:
            item = choices_from_arc(pool[i][1], pool[i][0])
            answer = item.choices[item.answer]
        else:
            (place, row), read = pool[i], SCHEMAS[task.schema].trace
            assert read is not None
            item = read(row, place)
            # GSM8K's as published: four rows of its training split have white space that a Trace does not keep.
            answer = row["answer"] if task.schema == "gsm8k" else item.completion
        question = item.question if isinstance(item, ChoiceQuestion) else item.prompt
        return _content(item), (text.template.replace("{prompt}", question), answer)

    draw = random.Random(seed)
    examples: list[Turns] = []
    for number, item in enumerate(items):
        own = _content(item)
        chosen: dict[Hashable, tuple[str, str]] = {}
        drawn = draw.sample(range(len(pool)), shots + has_itself)
        for i in itertools.chain(drawn, _others(len(pool), f"{seed} {number}")):
            if len(chosen) == shots:
                break
            content, solved = example(i)
            if content != own:
                chosen.setdefault(content, solved)
        if len(chosen) < shots:
            raise ValueError(
                f"{item.source}: {task.examples} has {len(chosen)} other problems (one that is there twice counts "
                f"once), too few to draw {shots} solved examples; lower few_shot"
            )
        examples.append(list(chosen.values()))
    return examples, len(pool)


def _others(count: int, seed: str) -> Iterator[int]:
    """All numbers below `count` in random order; shuffled only where they are asked for."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    yield from order


def _content(item: Item) -> Hashable:
    """Equal for two items that are one problem, wherever their rows stand."""
    if isinstance(item, ChoiceQuestion):
        return problem_key(item.question), frozenset(map(problem_key, item.choices))
    return problem_key(item.prompt)


def _identity(item: Item) -> str:
    """The text that the fingerprint of the problems is made from; its form is fixed, so that reports are comparable."""
    if isinstance(item, ChoiceQuestion):
        return repr(dataclasses.replace(item, source=""))
    return (
        f"Trace(prompt={item.prompt!r}, steps={item.steps!r}, answer={item.answer!r}, final={item.final!r}, source='', "
        f"subject={item.subject!r}, level={item.level!r}, text='')"
    )
