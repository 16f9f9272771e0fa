"""A person who rides a lift up and down, in GSM8K's row schema: chained one-digit sums, and nothing to search.

    Mia is on floor 3. January 4 up. February 6 down. ...

Each step restates the next ride and says on which floor it ends, from 0 to 9: `January 4 up: <<3+4=7>>7.` Every ride
counts and all are asked for, so that a small model of random weights learns them in some hundred updates, where the
word problems of `rtd_jax.data.generators.word_problems` take it thousands.

A problem starts in any month, as there, and no two of its rides are equally long, so that a ride can be found by what
stands in it.

The stream is a pure function of (seed, split, depth), and splits are disjoint by the hash of the question, as there.
"""

import random
from collections.abc import Sequence
from functools import partial

from rtd_jax.data.generators.word_problems import MONTHS, NAMES, distinct_rows, in_turn
from rtd_jax.data.trace import Trace, from_gsm8k

MAX_DEPTH = 6
FLOORS = range(10)


def generate(
    count: int, depths: Sequence[int] = (1, 2, 3, 4, 5, 6), split: str = "train", seed: int = 0
) -> list[Trace]:
    """`count` distinct problems, depths in turn; a longer list starts with the shorter one.

    Raises:
      ValueError: a split, count or depth that does not exist.
    """
    rows = in_turn(partial(distinct_rows, _problem, "lift 1"), count, depths, split, seed, MAX_DEPTH)
    return [from_gsm8k(row, f"lift-{split}:{i + 1}") for i, row in enumerate(rows)]


def closed_words() -> list[str]:
    """Every word the generator can write, sorted."""
    return sorted({*MONTHS, *NAMES, "is", "on", "floor", "up", "down"})


def _problem(rng: random.Random, depth: int) -> dict[str, str]:
    floor = rng.choice(FLOORS)
    first = rng.randrange(len(MONTHS))
    facts, steps, left = [f"{rng.choice(NAMES)} is on floor {floor}."], [], list(FLOORS[1:])
    for i in range(depth):
        rides = [(n, sign) for n in left for sign in (1, -1) if floor + sign * n in FLOORS]
        if not rides:  # every length that is left leads out of the house
            return _problem(rng, depth)
        length, sign = rng.choice(rides)
        left.remove(length)
        said = f"{MONTHS[(first + i) % len(MONTHS)]} {length} {'up' if sign > 0 else 'down'}"
        before, floor = floor, floor + sign * length
        facts.append(f"{said}.")
        steps.append(f"{said}: <<{before}{'+' if sign > 0 else '-'}{length}={floor}>>{floor}.")
    return {"question": " ".join(facts), "answer": "\n".join([*steps, f"#### {floor}"])}
