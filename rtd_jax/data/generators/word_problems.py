"""Word problems with 1 to 8 dependent steps, in GSM8K's row schema.

Two families, mixed evenly. Each step restates the next fact and applies it to the result of the step before:

- ledger: one person's count of one thing, month by month ("January 4 bought."), from any month of the year on.
- shelves: each shelf holds more or fewer than the one before ("Shelf two 4 more."), from any shelf on, and the question
  names a shelf; there may be shelves beyond it, which do not count.

Where a problem starts is drawn so that no month and no shelf belongs to deep problems alone: a model that copies behind
the months of shallow problems copies behind all of them.

Distractors tell what other people have or do. Within a problem every stated number is another one, so that a fact can
be told from any other by what stands in it: what is hard is the chain, not the search.

The stream is a pure function of (seed, split, depth). A problem belongs to the split that the SHA-256 of its question
names, so the splits are disjoint by construction, for every pair of seeds.
"""

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

from rtd_jax.data.trace import Trace, from_gsm8k

SPLITS = ("train", "validation", "test")
MAX_DEPTH = 8
MAX_VALUE = 50  # every number of a problem is in 0..MAX_VALUE
OPERANDS = range(2, 15)  # stated numbers, each at most once in a problem
NAMES = ("Mia", "Tom", "Ana", "Ben", "Zoe", "Max", "Eva", "Sam", "Lily", "Omar", "Ivy", "Leo")
THINGS = ("apples", "coins", "cards", "shells", "stamps", "pens", "books", "balls")
_FIRST_HALF = ("January", "February", "March", "April", "May", "June")
MONTHS = (*_FIRST_HALF, "July", "August", "September", "October", "November", "December")  # one a step of a ledger
SHELVES = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
GAINS = ("bought", "found", "earned", "won")
LOSSES = ("sold", "lost", "dropped", "used")
DOINGS = ("buys", "finds", "sells", "loses")  # of other people

# What a fact says and its step repeats: {n} is the operand, {v} the verb. A number stands right behind its month or
# shelf: a tiny model learns fastest to copy what follows a match.
LEDGER = {"gain": "{n} {v}", "lose": "{n} {v}", "double": "all doubled", "halve": "half lost"}
SHELF = {"gain": "{n} more", "lose": "{n} fewer", "double": "twice as many", "halve": "half as many"}

_SIGNS = {"gain": "+", "lose": "-", "double": "*", "halve": "/"}
_WEIGHTS = {"gain": 7, "lose": 7, "double": 1, "halve": 1}
_BUCKETS = 10  # of which one each for validation and test


T = TypeVar("T")


@dataclass(frozen=True)
class _Problem:
    question: str
    steps: tuple[str, ...]
    result: int


def generate(
    count: int,
    depths: Sequence[int] = (1, 2, 3, 4, 5, 6),
    split: str = "train",
    seed: int = 0,
    *,
    keep_marks: bool = True,
) -> list[Trace]:
    """`count` distinct problems, depths in turn; a longer list starts with the shorter one."""
    rows = generate_rows(count, depths, split, seed)
    return [from_gsm8k(row, f"synthetic-{split}:{i + 1}", keep_marks=keep_marks) for i, row in enumerate(rows)]


def generate_rows(
    count: int, depths: Sequence[int] = (1, 2, 3, 4, 5, 6), split: str = "train", seed: int = 0
) -> list[dict[str, str]]:
    """As `generate`, as rows of GSM8K's schema: `question`, `answer`."""
    problems = in_turn(_stream, count, depths, split, seed, MAX_DEPTH)
    return [{"question": p.question, "answer": "\n".join((*p.steps, f"#### {p.result}"))} for p in problems]


def in_turn(
    stream: Callable[[int, str, int], Iterator[T]],
    count: int,
    depths: Sequence[int],
    split: str,
    seed: int,
    deepest: int,
) -> list[T]:
    """`count` problems of `stream(depth, split, seed)`, depths in turn; a longer list starts with the shorter one.

    Raises:
      ValueError: a split, count or depth that does not exist.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown; use one of {', '.join(SPLITS)}")
    if count < 0:
        raise ValueError(f"count is {count}; expected 0 or more problems")
    if not depths or len(set(depths)) != len(depths) or not all(1 <= depth <= deepest for depth in depths):
        raise ValueError(f"depths are {tuple(depths)}; expected distinct numbers from 1 to {deepest}")
    streams = [
        list(islice(stream(depth, split, seed), (count - i + len(depths) - 1) // len(depths)))
        for i, depth in enumerate(depths)
    ]
    return [streams[i % len(depths)][i // len(depths)] for i in range(count)]


def distinct_rows(
    problem: Callable[[random.Random, int], dict[str, str]], name: str, depth: int, split: str, seed: int
) -> Iterator[dict[str, str]]:
    """Endless rows of `problem(rng, depth)` that the split owns, no question twice; a function of all but `problem`."""
    digest = hashlib.sha256(f"rtd_jax {name}/{seed}/{split}/{depth}".encode()).digest()
    rng = random.Random(int.from_bytes(digest))
    seen: set[str] = set()
    while True:
        row = problem(rng, depth)
        if row["question"] not in seen and split_of(row["question"]) == split:
            seen.add(row["question"])
            yield row


def split_of(question: str) -> str:
    """The split that owns a question, by a hash that is the same on every machine and in every process."""
    bucket = int.from_bytes(hashlib.sha256(question.encode()).digest()[:8]) % _BUCKETS
    return {0: "test", 1: "validation"}.get(bucket, "train")


def closed_words() -> list[str]:
    """Every word the generator can write, sorted."""
    texts = [*NAMES, *THINGS, *MONTHS, *SHELVES, *GAINS, *LOSSES, *DOINGS, *LEDGER.values(), *SHELF.values()]
    texts += ["How many does have are on shelf Shelf starts with has holds Meanwhile"]
    words = (word.strip(".,:?") for text in texts for word in text.split())
    return sorted({word for word in words if word and "{" not in word})


def _stream(depth: int, split: str, seed: int) -> Iterator[_Problem]:
    digest = hashlib.sha256(f"rtd_jax synthetic 8/{seed}/{split}/{depth}".encode()).digest()
    rng = random.Random(int.from_bytes(digest))
    seen: set[str] = set()
    while True:
        problem = (_ledger if rng.random() < 0.5 else _shelves)(rng, depth)
        if problem.question not in seen and split_of(problem.question) == split:
            seen.add(problem.question)
            yield problem


def _ledger(rng: random.Random, depth: int) -> _Problem:
    hero, other = rng.sample(NAMES, 2)
    thing = rng.choice(THINGS)
    start, numbers = _draw_numbers(rng)
    facts, steps, value = [f"{hero} starts with {start}."], [], start
    first = rng.randrange(len(MONTHS))
    for i in range(depth):
        month = MONTHS[(first + i) % len(MONTHS)]
        operation, operand, result = _operation(rng, value, numbers)
        verb = rng.choice(GAINS if operation == "gain" else LOSSES)
        said = f"{month} " + LEDGER[operation].format(n=operand, v=verb)
        facts.append(f"{said}.")
        steps.append(_step(said, value, operation, operand, result))
        value = result
    _add_distractors(rng, facts, depth, other, numbers)
    return _Problem(" ".join([f"How many {thing} does {hero} have?", *facts]), tuple(steps), value)


def _shelves(rng: random.Random, depth: int) -> _Problem:
    thing = rng.choice(THINGS)
    start, numbers = _draw_numbers(rng)
    shelves = SHELVES[rng.randrange(len(SHELVES) - depth - 1) :]
    facts, steps, value = [f"Shelf {shelves[0]} holds {start}."], [], start
    for shelf in shelves[1 : depth + 1]:
        operation, operand, result = _operation(rng, value, numbers)
        said = f"Shelf {shelf} " + SHELF[operation].format(n=operand)
        facts.append(f"{said}.")
        steps.append(_step(said, value, operation, operand, result))
        value = result
    if rng.random() < 0.5:  # goes on past the question: where to stop is told by the query alone
        facts.append(f"Shelf {shelves[depth + 1]} {numbers.pop()} {rng.choice(('more', 'fewer'))}.")
    _add_distractors(rng, facts, depth, rng.choice(NAMES), numbers)
    return _Problem(" ".join([f"How many {thing} are on shelf {shelves[depth]}?", *facts]), tuple(steps), value)


def _step(said: str, value: int, operation: str, operand: int, result: int) -> str:
    return f"{said}: <<{value}{_SIGNS[operation]}{operand}={result}>>{result}."


def _draw_numbers(rng: random.Random) -> tuple[int, list[int]]:
    """A start from 2 to 20, and the operands in random order without it."""
    start = rng.randint(2, 20)
    numbers = [number for number in OPERANDS if number != start]
    rng.shuffle(numbers)
    return start, numbers


def _add_distractors(rng: random.Random, facts: list[str], depth: int, person: str, numbers: list[int]) -> None:
    """One or two facts about somebody else, anywhere among the others; takes their numbers."""
    for _ in range(rng.randint(1, 1 + min(1, depth // 3))):
        number, thing = numbers.pop(), rng.choice(THINGS)
        fact = rng.choice(
            (f"{person} has {number} {thing}.", f"Meanwhile {person} {rng.choice(DOINGS)} {number} {thing}.")
        )
        facts.insert(rng.randint(0, len(facts)), fact)


def _operation(rng: random.Random, value: int, numbers: list[int]) -> tuple[str, int, int]:
    """Draw (operation, operand, result) with the result in range; takes the operand from `numbers`."""
    operations, odds = list(_WEIGHTS), list(_WEIGHTS.values())
    while True:
        operation = rng.choices(operations, odds)[0]
        operand = 2 if operation in ("double", "halve") else rng.choice(numbers)
        match operation:
            case "gain":
                result = value + operand
            case "lose":
                result = value - operand
            case "double":
                result = 2 * value
            case _:
                result = value // 2 if value % 2 == 0 and value > 0 else -1
        if 0 <= result <= MAX_VALUE:
            if operation in ("gain", "lose"):
                numbers.remove(operand)
            return operation, operand, result
