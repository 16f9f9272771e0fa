"""Word problems with 1 to 8 dependent steps, in GSM8K's row schema.

Two families, mixed evenly. Each step restates the next fact and applies it to the result of the step before:

- ledger: one person's count of one thing, month by month ("January 4 bought."), from any month of the year on.
- shelves: each shelf holds more or fewer than the one before ("Shelf two 4 more."), from any shelf on, and the question
  names a shelf; there may be shelves beyond it, which do not count.

The first month or shelf is drawn so that none belongs to deep problems alone: a model that has learned to copy what
follows a month in shallow problems can do so in deep ones.

Distractors tell what other people have or do. No number is stated twice in a problem, so that each fact can be found by
its number: the chain is the difficulty, not the search.

`rtd_jax.data.generators.natural` has the same problems in whole sentences.
"""

import random

from rtd_jax.data.generators.natural import in_sentences
from rtd_jax.data.generators.streams import Generator, as_row

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

# What a fact says and its step repeats, by the sign of its operation: {n} is the operand, {v} the verb. A number stands
# right after its month or shelf, because a tiny model learns fastest to copy what follows a match.
LEDGER = {"+": "{n} {v}", "-": "{n} {v}", "*": "all doubled", "/": "half lost"}
SHELF = {"+": "{n} more", "-": "{n} fewer", "*": "twice as many", "/": "half as many"}
WEIGHTS = {"+": 7, "-": 7, "*": 1, "/": 1}  # how often an operation is drawn

_TEXTS = (*NAMES, *THINGS, *MONTHS, *SHELVES, *GAINS, *LOSSES, *DOINGS, *LEDGER.values(), *SHELF.values())
_FRAME = "How many does have are on shelf Shelf starts with has holds Meanwhile"
WORDS = {word for text in (*_TEXTS, _FRAME) for word in text.split() if "{" not in word}  # every word it can write


def _problem(rng: random.Random, depth: int) -> dict[str, str]:
    return (_ledger if rng.random() < 0.5 else _shelves)(rng, depth)


def _ledger(rng: random.Random, depth: int) -> dict[str, str]:
    hero, other = rng.sample(NAMES, 2)
    thing = rng.choice(THINGS)
    start, numbers = _draw_numbers(rng)
    facts, steps, value = [f"{hero} starts with {start}."], [], start
    first = rng.randrange(len(MONTHS))
    for i in range(depth):
        month = MONTHS[(first + i) % len(MONTHS)]
        sign, operand, result = _operation(rng, value, numbers)
        said = f"{month} " + LEDGER[sign].format(n=operand, v=rng.choice(GAINS if sign == "+" else LOSSES))
        facts.append(f"{said}.")
        steps.append(f"{said}: <<{value}{sign}{operand}={result}>>{result}.")
        value = result
    _add_distractors(rng, facts, depth, other, numbers)
    return as_row(" ".join([f"How many {thing} does {hero} have?", *facts]), steps, value)


def _shelves(rng: random.Random, depth: int) -> dict[str, str]:
    thing = rng.choice(THINGS)
    start, numbers = _draw_numbers(rng)
    shelves = SHELVES[rng.randrange(len(SHELVES) - depth - 1) :]
    facts, steps, value = [f"Shelf {shelves[0]} holds {start}."], [], start
    for shelf in shelves[1 : depth + 1]:
        sign, operand, result = _operation(rng, value, numbers)
        said = f"Shelf {shelf} " + SHELF[sign].format(n=operand)
        facts.append(f"{said}.")
        steps.append(f"{said}: <<{value}{sign}{operand}={result}>>{result}.")
        value = result
    if rng.random() < 0.5:  # one shelf more than is asked for: only the question says where to stop
        facts.append(f"Shelf {shelves[depth + 1]} {numbers.pop()} {rng.choice(('more', 'fewer'))}.")
    _add_distractors(rng, facts, depth, rng.choice(NAMES), numbers)
    return as_row(" ".join([f"How many {thing} are on shelf {shelves[depth]}?", *facts]), steps, value)


def _draw_numbers(rng: random.Random) -> tuple[int, list[int]]:
    """A start from 2 to 20, and the other operands in random order."""
    start = rng.randint(2, 20)
    numbers = [number for number in OPERANDS if number != start]
    rng.shuffle(numbers)
    return start, numbers


def _add_distractors(rng: random.Random, facts: list[str], depth: int, person: str, numbers: list[int]) -> None:
    """Puts one or two facts about another person among the facts. Their numbers are taken out of `numbers`."""
    for _ in range(rng.randint(1, 1 + min(1, depth // 3))):
        number, thing = numbers.pop(), rng.choice(THINGS)
        fact = rng.choice(
            (f"{person} has {number} {thing}.", f"Meanwhile {person} {rng.choice(DOINGS)} {number} {thing}.")
        )
        facts.insert(rng.randint(0, len(facts)), fact)


def _operation(rng: random.Random, value: int, numbers: list[int]) -> tuple[str, int, int]:
    """Draws (sign, operand, result) with the result in range. The operand is taken out of `numbers`."""
    while True:
        (sign,) = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))
        operand = rng.choice(numbers) if sign in "+-" else 2
        if sign == "/" and (value == 0 or value % 2):
            continue
        result = {"+": value + operand, "-": value - operand, "*": value * 2, "/": value // 2}[sign]
        if 0 <= result <= MAX_VALUE:
            if sign in "+-":
                numbers.remove(operand)
            return sign, operand, result


OPTIONS = ("keep_marks", "wording")  # of its sources
GENERATOR = Generator("synthetic", "synthetic 8", _problem, MAX_DEPTH, WORDS, OPTIONS, in_sentences)
generate, generate_rows = GENERATOR.generate, GENERATOR.rows
