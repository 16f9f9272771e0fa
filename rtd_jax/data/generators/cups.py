"""A ball under one of six cups that are swapped, in GSM8K's row schema: keeping track instead of arithmetic.

    The ball is under cup 4. Under which cup is it after March? Meanwhile 36 Ana. January 42 Tom. February 61 Mia. ...

`January 42 Tom` says that in January Tom swaps the cups 4 and 2. Each step restates the next swap and says where the
ball is now, with a mark that says where it was: `January 42 Tom: <<4*42=2>>2.` A swap of two other cups leaves the ball
where it is, and only the place of the ball tells which swaps move it, so a mistake is carried on to the end.
Distractors are swaps on another table ("Meanwhile"), and swaps after the month that is asked for.

The first month is drawn as in `generators.word_problems`. A pair of cups is written as one number, and no two facts
have the same one, so that each fact can be found by its number: the chain is the difficulty, not the search.
"""

import random

from rtd_jax.data.generators.streams import Generator, as_row
from rtd_jax.data.generators.word_problems import MONTHS, NAMES

CUPS = range(1, 7)
PAIRS = tuple(10 * a + b for a in CUPS for b in CUPS if a != b)  # 42: the cups 4 and 2; one token each
OWN_SWAPS = 0.75  # share of the swaps that move the ball
BEYOND = range(3)  # swaps after the month that is asked for
ELSEWHERE = range(1, 3)  # swaps on another table
# Every word that the generator can write.
WORDS = {*MONTHS, *NAMES, "The", "ball", "is", "under", "cup", "Under", "which", "it", "after", "Meanwhile"}


def moved(cup: int, pair: int) -> int:
    """The cup with the ball after a swap of `pair`, if it was `cup` before."""
    a, b = divmod(pair, 10)
    return {a: b, b: a}.get(cup, cup)


def _problem(rng: random.Random, depth: int) -> dict[str, str]:
    start = cup = rng.choice(CUPS)
    first = rng.randrange(len(MONTHS))
    facts, steps, taken = [], [], set()
    for i in range(depth + rng.choice(BEYOND)):
        own = rng.random() < OWN_SWAPS
        pair = rng.choice([p for p in PAIRS if p not in taken and (moved(cup, p) != cup) == own])
        taken.add(pair)
        before, cup = cup, moved(cup, pair)
        said = f"{MONTHS[(first + i) % len(MONTHS)]} {pair} {rng.choice(NAMES)}"
        facts.append(f"{said}.")
        if i < depth:
            steps.append(f"{said}: <<{before}*{pair}={cup}>>{cup}.")
            answer = cup
    asked = MONTHS[(first + depth - 1) % len(MONTHS)]
    for _ in range(rng.choice(ELSEWHERE)):
        pair = rng.choice([p for p in PAIRS if p not in taken])
        taken.add(pair)
        facts.insert(rng.randint(0, len(facts)), f"Meanwhile {pair} {rng.choice(NAMES)}.")
    question = " ".join([f"The ball is under cup {start}. Under which cup is it after {asked}?", *facts])
    return as_row(question, steps, answer)


GENERATOR = Generator("cups", "cups 3", _problem, 6, WORDS)
generate = GENERATOR.generate
