"""From probabilities to steps, by hand."""

import numpy as np
import pytest

from rtd_jax.data.trace import spans_of
from rtd_jax.steps.decoder import decode


def ends(probabilities, candidates=None, ids=None, threshold=0.5, min_tokens=1) -> list[int]:
    p = np.array([probabilities], float)
    candidates = np.ones_like(p, bool) if candidates is None else np.array([candidates], bool)
    ids = np.ones(p.shape, int) if ids is None else np.array([ids])
    return np.flatnonzero(decode(p, candidates, ids, threshold, min_tokens=min_tokens)[0]).tolist()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"probabilities": [0.1, 0.9, 0.2, 0.1]}, [1, 3]),  # the end is always one
        ({"probabilities": [0.1, 0.5, 0.2, 0.1]}, [1, 3]),  # the threshold itself counts
        ({"probabilities": [0.9, 0.9, 0.9, 0.9], "candidates": [0, 1, 0, 0]}, [1]),  # the last candidate is the end
        ({"probabilities": [0.1, 0.7, 0.9, 0.1, 0.1, 0.1], "min_tokens": 2}, [2, 5]),  # 0.9 beats its neighbour
        ({"probabilities": [0.1, 0.9, 0.9, 0.1, 0.1, 0.1], "min_tokens": 2}, [1, 5]),  # of equals the earliest
        ({"probabilities": [0.9, 0.1, 0.1, 0.1], "min_tokens": 2}, [3]),  # a first step of one token is too short
        ({"probabilities": [0.1, 0.1, 0.9, 0.1], "min_tokens": 2}, [3]),  # and so is such a last one
        ({"probabilities": [0.1, 0.9, 0.1, 0.1], "min_tokens": 2}, [1, 3]),  # two tokens are enough on both sides
        ({"probabilities": [0.9, 0.1, 0.9, 0.1], "ids": [1, 1, 2, 2]}, [0, 1, 2, 3]),  # each chain has its end
        ({"probabilities": [0.1, 0.8, 0.9, 0.1, 0.9], "ids": [1, 1, 2, 2, 0], "min_tokens": 2}, [1, 3]),  # alone
    ],
)
def test_decode(arguments, expected):
    assert ends(**arguments) == expected


def test_no_two_boundaries_are_closer_than_a_step_is_long():
    rng = np.random.default_rng(0)
    for _ in range(20):
        found = ends(rng.random(40), rng.random(40) < 0.7, threshold=0.3, min_tokens=5)
        assert found
        assert min(np.diff([-1, *found])) >= 5 or len(found) == 1


def test_spans_cover_all_but_white_space():
    text = " 1. He has 3\n2. She has 4. Then  5 "
    ends = np.array([12, 26, 35])
    assert [text[a:b] for a, b in spans_of(text, ends)] == ["1. He has 3", "2. She has 4.", "Then  5"]
    assert [text[a:b] for a, b in spans_of(text, ends[:1])] == ["1. He has 3\n2. She has 4. Then  5"]
    assert [text[a:b] for a, b in spans_of(text, ends[:2])] == ["1. He has 3", "2. She has 4. Then  5"]
    assert spans_of("  ", np.array([1])) == ()
