"""What the generators have in common: endless streams of distinct problems, and splits that never share one."""

import hashlib
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Literal

from rtd_jax.data.schemas.gsm8k import from_gsm8k
from rtd_jax.data.trace import Trace

SPLITS = ("train", "validation", "test")
DEPTHS = (1, 2, 3, 4, 5, 6)  # reasoning steps, unless asked otherwise
Wording = Literal["terse", "natural"]  # facts in a few words, as tiny models learn them; or sentences as people write
_BUCKETS = 10  # of which one each for validation and test


@dataclass(frozen=True)
class Generator:
    """Makes problems in GSM8K's row schema.

    The stream is a pure function of (seed, split, depth). A problem belongs to the split that the SHA-256 of its
    question names, so the splits are disjoint by construction, for every pair of seeds.

    Attributes:
      name: the schema that a recipe names, and the beginning of every source ("cups-train:1").
      version: names the stream; another version draws other problems from the same seed.
      problem: (rng, depth) -> a row: `question`, `answer`.
      max_depth: reasoning steps of the deepest problem.
      words: every word that the generator can write.
      options: fields of `SourceSettings` that `generate` takes.
      natural: makes a row of whole sentences of a row; None where there is no such form.
    """

    name: str
    version: str
    problem: Callable[[random.Random, int], dict[str, str]]
    max_depth: int
    words: Collection[str]
    options: tuple[str, ...] = ()
    natural: Callable[[dict[str, str]], dict[str, str]] | None = None

    def generate(
        self,
        count: int,
        depths: Sequence[int] = DEPTHS,
        split: str = "train",
        seed: int = 0,
        keep_marks: bool = True,
        wording: Wording = "terse",
    ) -> list[Trace]:
        """`count` distinct problems, depths in turn; a longer list starts with the shorter one.

        Args:
          keep_marks: leave the <<48/2=24>> in.
          wording: of the same problems.

        Raises:
          ValueError: there is no such split or depth.
        """
        rows = self.rows(count, depths, split, seed)
        if wording == "natural":
            assert self.natural is not None, "the settings' options say which generators have the form"
            rows = [self.natural(row) for row in rows]
        return [
            from_gsm8k(row, f"{self.name}-{split}:{number}", keep_marks=keep_marks)
            for number, row in enumerate(rows, start=1)
        ]

    def rows(
        self, count: int, depths: Sequence[int] = DEPTHS, split: str = "train", seed: int = 0
    ) -> list[dict[str, str]]:
        """As `generate`, as rows of GSM8K's schema: `question`, `answer`."""
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is unknown; use one of {', '.join(SPLITS)}")
        if not depths or len(set(depths)) != len(depths) or not all(1 <= depth <= self.max_depth for depth in depths):
            raise ValueError(f"depths are {tuple(depths)}; expected distinct numbers from 1 to {self.max_depth}")
        streams = [self._stream(depth, split, seed) for depth in depths]
        return [next(stream) for stream in islice(cycle(streams), count)]

    def _stream(self, depth: int, split: str, seed: int) -> Iterator[dict[str, str]]:
        """Endless rows that the split owns, no question twice."""
        digest = hashlib.sha256(f"rtd_jax {self.version}/{seed}/{split}/{depth}".encode()).digest()
        rng = random.Random(int.from_bytes(digest))
        seen: set[str] = set()
        while True:
            row = self.problem(rng, depth)
            if row["question"] not in seen and split_of(row["question"]) == split:
                seen.add(row["question"])
                yield row


def as_row(question: str, steps: Sequence[str], answer: int) -> dict[str, str]:
    """A problem in GSM8K's row schema."""
    return {"question": question, "answer": "\n".join([*steps, f"#### {answer}"])}


def split_of(question: str) -> str:
    """The split that owns a question, by a hash that is the same on every machine and in every process."""
    bucket = int.from_bytes(hashlib.sha256(question.encode()).digest()[:8]) % _BUCKETS
    return {0: "test", 1: "validation"}.get(bucket, "train")
