"""A person who rides a lift up and down, in GSM8K's row schema: a chain of one-digit sums, and nothing to search for.

    Mia is on floor 3. January 4 up. February 6 down. ...

Each step restates the next ride and says on which floor it ends, from 0 to 9: `January 4 up: <<3+4=7>>7.` Every ride
counts and all are asked for, so that a small model of random weights learns them in some hundred updates, where the
word problems of `rtd_jax.data.generators.word_problems` take it thousands.

A problem can start in any month, and no two of its rides are equally long, so that each ride can be found by its
length.
"""

import random

from rtd_jax.data.generators.streams import Generator, as_row
from rtd_jax.data.generators.word_problems import MONTHS, NAMES

FLOORS = range(10)
WORDS = {*MONTHS, *NAMES, "is", "on", "floor", "up", "down"}  # every word that the generator can write


def _problem(rng: random.Random, depth: int) -> dict[str, str]:
    floor = rng.choice(FLOORS)
    first = rng.randrange(len(MONTHS))
    facts, steps, left = [f"{rng.choice(NAMES)} is on floor {floor}."], [], list(FLOORS[1:])
    for i in range(depth):
        rides = [(n, sign) for n in left for sign in (1, -1) if floor + sign * n in FLOORS]
        if not rides:  # every length that is left leads out of the building
            return _problem(rng, depth)
        length, sign = rng.choice(rides)
        left.remove(length)
        said = f"{MONTHS[(first + i) % len(MONTHS)]} {length} {'up' if sign > 0 else 'down'}"
        before, floor = floor, floor + sign * length
        facts.append(f"{said}.")
        steps.append(f"{said}: <<{before}{'+' if sign > 0 else '-'}{length}={floor}>>{floor}.")
    return as_row(" ".join(facts), steps, floor)


GENERATOR = Generator("lift", "lift 1", _problem, 6, WORDS)
generate = GENERATOR.generate
