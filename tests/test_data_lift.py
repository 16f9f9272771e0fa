"""Rides in a lift: problems solved again from their text, by a reader that knows nothing of the generator."""

import re

import pytest

from rtd_jax.data.encoding import encode_traces
from rtd_jax.data.generators.lift import WORDS, generate
from rtd_jax.data.generators.streams import SPLITS, split_of
from rtd_jax.data.sources import SourceSettings, closed_words, load_traces
from rtd_jax.data.tiny_tokenizer import TINY_FORMAT, tiny_tokenizer
from rtd_jax.eval.chains import score_chain

TRACES = generate(600)


def test_riding_gives_the_steps_and_the_answer():
    months = set()
    for trace in TRACES:
        floor = int(re.search(r"is on floor (\d)\.", trace.prompt).group(1))
        rides = re.findall(r"(\w+) (\d) (up|down)\.", trace.prompt)
        assert len(rides) == trace.depth
        assert len({length for _, length, _ in rides}) == len(rides)  # a ride is found by its length
        wanted = []
        for month, length, way in rides:
            sign, by = {"up": ("+", int(length)), "down": ("-", -int(length))}[way]
            wanted.append(f"{month} {length} {way}: <<{floor}{sign}{length}={floor + by}>>{floor + by}.")
            floor += by
            assert 0 <= floor <= 9
        assert list(trace.steps) == wanted
        assert trace.answer == str(floor)
        assert score_chain(trace.completion, trace)["correct"]
        months.add((trace.depth, rides[-1][0]))
    assert len(months) == 6 * 12  # every month ends problems of every depth


def test_a_wrong_floor_is_a_wrong_step():
    trace = next(trace for trace in TRACES if trace.depth == 3)
    steps = list(trace.steps)
    floor = int(steps[1][-2])
    steps[1] = steps[1].replace(f"={floor}>>{floor}.", f"={(floor + 1) % 10}>>{(floor + 1) % 10}.")
    score = score_chain("\n".join([*steps, trace.final]), trace)
    assert not score["correct"]
    assert score["first_error"] == 1


def test_splits_are_disjoint_and_the_stream_is_fixed():
    prompts = {split: {t.prompt for t in generate(120, split=split)} for split in SPLITS}
    assert not prompts["train"] & prompts["test"]
    assert not prompts["train"] & prompts["validation"]
    assert all(split_of(prompt) == split for split, found in prompts.items() for prompt in found)
    assert [t.prompt for t in generate(60)] == [t.prompt for t in TRACES[:60]]
    assert TRACES[2].prompt == "Sam is on floor 7. January 2 up. February 8 down. March 5 up."
    assert generate(12, seed=1)[0].prompt != TRACES[0].prompt
    assert load_traces(SourceSettings("lift", limit=12)) == TRACES[:12]
    with pytest.raises(ValueError, match="distinct numbers from 1 to 6"):
        generate(1, depths=(7,))


def test_a_tokenizer_of_its_own_knows_every_word():
    assert closed_words("lift") == sorted(WORDS)
    tokenizer = tiny_tokenizer(WORDS)
    chains, report = encode_traces(tokenizer, TRACES, TINY_FORMAT, row_length=160)
    assert not report.dropped
    for chain, trace in zip(chains, TRACES, strict=True):
        assert tokenizer.decode(chain.tokens).endswith(trace.completion + tokenizer.eos_token)
        assert chain.depth == trace.depth
