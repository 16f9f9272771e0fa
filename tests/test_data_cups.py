"""A ball under swapped cups: problems solved again from their text, by a reader that knows nothing of the generator."""

import hashlib
import re
from collections import Counter
from itertools import pairwise

import pytest

from rtd_jax.data.encoding import encode_traces
from rtd_jax.data.generators import word_problems as synthetic
from rtd_jax.data.generators.cups import WORDS, generate
from rtd_jax.data.generators.streams import SPLITS, split_of
from rtd_jax.data.sources import SourceSettings, closed_words, load_traces
from rtd_jax.data.tiny_tokenizer import TINY_FORMAT, tiny_tokenizer
from rtd_jax.eval.chains import score_chain

TRACES = generate(600)


def read(prompt: str) -> tuple[int, str, list[tuple[str, int, int, str]]]:
    """(cup at the start, month asked for, swaps in order) of a problem."""
    start, asked = re.match(r"The ball is under cup (\d)\. Under which cup is it after (\w+)\?", prompt).groups()
    swaps = re.findall(r"(\w+) (\d)(\d) (\w+)\.", prompt)
    return int(start), asked, [(month, int(a), int(b), name) for month, a, b, name in swaps if month != "Meanwhile"]


def test_following_the_ball_gives_the_steps_and_the_answer():
    for trace in TRACES:
        cups = dict.fromkeys(range(1, 10), "")
        start, asked, swaps = read(trace.prompt)
        cups[start] = "ball"
        wanted = []
        for month, a, b, name in swaps:
            (before,) = (cup for cup, there in cups.items() if there)
            cups[a], cups[b] = cups[b], cups[a]
            (now,) = (cup for cup, there in cups.items() if there)
            wanted.append(f"{month} {a}{b} {name}: <<{before}*{a}{b}={now}>>{now}.")
            if month == asked:
                break
        assert list(trace.steps) == wanted
        assert trace.answer == str(now)
        assert score_chain(trace.completion, trace)["correct"]


def test_a_wrong_cup_is_a_wrong_step():
    trace = next(trace for trace in TRACES if trace.depth == 3)
    steps = list(trace.steps)
    now = int(steps[1][-2])
    steps[1] = steps[1].replace(f"={now}>>{now}.", f"={now % 6 + 1}>>{now % 6 + 1}.")
    score = score_chain("\n".join([*steps, trace.final]), trace)
    assert not score["correct"]
    assert score["first_error"] == 1


def test_depth_is_told_by_the_month_alone_and_most_swaps_move_the_ball():
    months, beyond, still, pairs = set(), Counter(), [], Counter()
    for trace in TRACES:
        _, asked, swaps = read(trace.prompt)
        names = [month for month, *_ in swaps]
        assert names.index(asked) == trace.depth - 1
        beyond[len(swaps) - trace.depth] += 1
        months |= {(trace.depth, asked)}
        numbers = re.findall(r" (\d\d) ", trace.prompt)
        assert len(set(numbers)) == len(numbers)  # a fact is found by its number
        pairs[len(numbers) - len(swaps)] += 1
        cups = [int(step[-2]) for step in trace.steps]
        still += [a == b for a, b in pairwise(cups)]
    assert set(beyond) == {0, 1, 2}
    assert set(pairs) == {1, 2}  # on another table
    assert len(months) == 6 * 12  # every month ends problems of every depth
    assert 0.2 < sum(still) / len(still) < 0.3


def test_splits_are_disjoint_and_the_stream_is_fixed():
    prompts = {split: {t.prompt for t in generate(120, split=split)} for split in SPLITS}
    assert not prompts["train"] & prompts["test"]
    assert not prompts["train"] & prompts["validation"]
    assert all(split_of(prompt) == split for split, found in prompts.items() for prompt in found)
    assert [t.prompt for t in generate(60)] == [t.prompt for t in TRACES[:60]]
    assert generate(12, seed=1)[0].prompt != TRACES[0].prompt
    assert load_traces(SourceSettings("cups", limit=12)) == TRACES[:12]
    for changes, says in (
        ({"split": "dev"}, "split 'dev' is unknown"),
        ({"depths": (7,)}, "distinct numbers from 1 to 6"),
    ):
        with pytest.raises(ValueError, match=says):
            generate(1, **changes)


def test_both_families_take_turns_in_one_source():
    both = load_traces(SourceSettings("synthetic+cups", limit=7))
    assert both[1::2] == TRACES[:3]
    assert both[::2] == synthetic.generate(4)
    words = closed_words("synthetic+cups")
    assert words == sorted({*synthetic.WORDS, *WORDS})
    assert closed_words("synthetic") == sorted(synthetic.WORDS)


def test_a_tokenizer_of_its_own_knows_every_word_and_the_bundled_one_is_as_before():
    tokenizer = tiny_tokenizer(WORDS)
    chains, report = encode_traces(tokenizer, TRACES, TINY_FORMAT, row_length=160)
    assert not report.dropped
    for chain, trace in zip(chains, TRACES, strict=True):
        assert tokenizer.decode(chain.tokens).endswith(trace.completion + tokenizer.eos_token)
        assert chain.depth == trace.depth
    # A step begins with the tokens of the fact that it copies.
    ids = tokenizer("May 42 Tom. June 25 Mia.\nMay 42 Tom: 2.\n")["input_ids"][1:]
    assert ids[:3] == ids[8:11]
    assert len(tiny_tokenizer()) == len(tiny_tokenizer(synthetic.WORDS))
    stream = "\n".join(t.prompt + t.completion for t in synthetic.generate(60))
    assert hashlib.sha256(stream.encode()).hexdigest()[:16] == "82dfb7e57f0921e3"
