"""Paths through rooms with coloured doors, in GSM8K's row schema: looking up instead of reckoning.

    You are in room 7. Which room is behind red, blue? Room 31 5 blue. Room 12 40 blue. Room 7 12 red. ...

A fact is a door: its room, the room behind it, its colour. Each step looks up the door of a room and copies the fact; the
room it ends in is where the next one begins, so a wrong step loses the path. The last colour asked for says where to
stop: the room at the end has a door, too. Rooms are numbers from 0 to 99, so results and answers are read as those of
word problems. Facts are shuffled, and their number does not depend on the depth. Doors elsewhere have the path's colours
as often as any others, so a colour finds no door.

The room behind stands right after the room. With the colour between them a 4 x 128 model was still guessing after 1,800
updates: it learns soonest to copy what follows a match.

The stream is a pure function of (seed, split, depth), and splits are disjoint by the hash of the question, as in
`rtd_jax.data.synthetic`.
"""

import hashlib
import random
from collections.abc import Iterator, Sequence
from itertools import islice

from rtd_jax.data.synthetic import SPLITS, split_of
from rtd_jax.data.traces import Trace, from_gsm8k

MAX_DEPTH = 6
ROOMS = range(100)  # one token each
COLOURS = ("red", "blue", "green", "white", "black", "yellow", "brown", "pink")
FACTS = range(10, 14)  # doors of a problem, whatever its depth

Door = tuple[int, str, int]  # room, colour, room behind


def generate(
    count: int, depths: Sequence[int] = (1, 2, 3, 4, 5, 6), split: str = "train", seed: int = 0
) -> list[Trace]:
    """`count` distinct problems, depths in turn; a longer list starts with the shorter one.

    Raises:
      ValueError: a split or depth that does not exist.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown; use one of {', '.join(SPLITS)}")
    if not depths or len(set(depths)) != len(depths) or not all(1 <= depth <= MAX_DEPTH for depth in depths):
        raise ValueError(f"depths are {tuple(depths)}; expected distinct numbers from 1 to {MAX_DEPTH}")
    streams = [
        list(islice(_stream(depth, split, seed), (count - i + len(depths) - 1) // len(depths)))
        for i, depth in enumerate(depths)
    ]
    rows = [streams[i % len(depths)][i // len(depths)] for i in range(count)]
    return [from_gsm8k(row, f"rooms-{split}:{i + 1}") for i, row in enumerate(rows)]


def closed_words() -> list[str]:
    """Every word the generator can write, sorted."""
    return sorted({*COLOURS, "You", "are", "in", "room", "Which", "is", "behind", "Room"})


def _stream(depth: int, split: str, seed: int) -> Iterator[dict[str, str]]:
    digest = hashlib.sha256(f"rtd_jax rooms 3/{seed}/{split}/{depth}".encode()).digest()
    rng = random.Random(int.from_bytes(digest))
    seen: set[str] = set()
    while True:
        row = _problem(rng, depth)
        if row["question"] not in seen and split_of(row["question"]) == split:
            seen.add(row["question"])
            yield row


def _problem(rng: random.Random, depth: int) -> dict[str, str]:
    rooms = rng.sample(ROOMS, len(ROOMS))
    path, elsewhere = rooms[: depth + 1], rooms[depth + 1 :]
    colours = rng.sample(COLOURS, depth)
    doors: list[Door] = list(zip(path[:-1], colours, path[1:], strict=True))
    places = [path[-1], *elsewhere[: max(FACTS) - depth]]  # the end of the path is no dead end
    behind = elsewhere[max(FACTS) - depth :]
    for room in places[: rng.choice(FACTS) - depth]:
        doors.append((room, rng.choice((rng.choice(colours), rng.choice(COLOURS))), behind.pop()))
    steps = [_fact(door) for door in doors[:depth]]
    rng.shuffle(doors)
    asked = f"You are in room {path[0]}. Which room is behind {', '.join(colours)}?"
    question = " ".join([asked, *map(_fact, doors)])
    return {"question": question, "answer": "\n".join([*steps, f"#### {path[-1]}"])}


def _fact(door: Door) -> str:
    # In a step the same words as in the problem: what a tiny model copies, it finds by the same tokens.
    return f"Room {door[0]} {door[2]} {door[1]}."
