"""Paths through rooms: every problem solved again from its text, by a reader that knows nothing of the generator."""

import hashlib
import re
from collections import Counter

import pytest

from rtd_jax.data import synthetic
from rtd_jax.data.sources import SourceSettings, load_traces
from rtd_jax.data.synthetic_rooms import closed_words, generate
from rtd_jax.data.tiny_tokenizer import TINY_FORMAT, tiny_tokenizer
from rtd_jax.data.tokens import encode_traces
from rtd_jax.evaluation.chains import score_chain

TRACES = generate(600)


def read(prompt: str) -> tuple[int, list[str], dict[tuple[int, str], int], int]:
    """(start, colours, doors, facts) of a problem."""
    start, colours = re.match(r"You are in room (\d+)\. Which room is behind ([a-z, ]+)\?", prompt).groups()
    facts = re.findall(r"Room (\d+) (\d+) ([a-z]+)\.", prompt)
    doors = {(int(room), colour): int(behind) for room, behind, colour in facts}
    return int(start), colours.split(", "), doors, len(facts)


def test_following_the_doors_gives_the_steps_and_the_answer():
    for trace in TRACES:
        room, colours, doors, facts = read(trace.prompt)
        assert len({room for room, _ in doors}) == len(doors) == facts  # every room has one door
        assert len(set(colours)) == len(colours)
        assert trace.depth == len(colours)
        for colour, step in zip(colours, trace.steps, strict=True):
            behind = doors[room, colour]
            assert step == f"Room {room} {behind} {colour}."
            room = behind
        assert trace.answer == str(room)
        assert score_chain(trace.completion, trace).chain_correct


def test_a_wrong_door_is_a_wrong_step_and_loses_the_path():
    trace = next(trace for trace in TRACES if trace.depth == 3)
    steps = list(trace.steps)
    _, room, behind, colour = steps[1].split()
    steps[1] = f"Room {room} {(int(behind) + 1) % 100} {colour}"
    score = score_chain("\n".join([*steps, trace.final]), trace)
    assert not score.chain_correct
    assert score.first_error == 1


def test_neither_the_number_of_facts_nor_their_order_tells_the_depth_or_the_path():
    counts = {depth: Counter(read(t.prompt)[3] for t in TRACES if t.depth == depth) for depth in range(1, 7)}
    assert all(set(count) == {10, 11, 12, 13} for count in counts.values())
    first, shared = Counter(), Counter()
    for trace in TRACES:
        start, colours, doors, _ = read(trace.prompt)
        room, path = start, [start]
        for colour in colours:
            room = doors[room, colour]
            path.append(room)
        assert len(set(path)) == len(path)  # nobody walks in circles
        assert any(room == path[-1] for room, _ in doors)  # the end of the path has a door of its own
        elsewhere = [colour for other, colour in doors if other not in path]
        shared[sum(colour in colours for colour in elsewhere) > 0] += 1
        first[list(doors).index((start, colours[0])) < len(doors) / 2] += 1
    assert 0.4 < first[True] / len(TRACES) < 0.6
    assert shared[True] / len(TRACES) > 0.95  # a colour alone finds no door


def test_splits_are_disjoint_and_the_stream_is_fixed():
    prompts = {split: {t.prompt for t in generate(120, split=split)} for split in synthetic.SPLITS}
    assert not prompts["train"] & prompts["test"]
    assert not prompts["train"] & prompts["validation"]
    assert all(synthetic.split_of(prompt) == split for split, found in prompts.items() for prompt in found)
    assert [t.prompt for t in generate(60)] == [t.prompt for t in TRACES[:60]]
    assert generate(12, seed=1)[0].prompt != TRACES[0].prompt
    assert load_traces(SourceSettings("rooms", limit=12)) == TRACES[:12]
    for changes, says in (
        ({"split": "dev"}, "split 'dev' is unknown"),
        ({"depths": (7,)}, "distinct numbers from 1 to 6"),
    ):
        with pytest.raises(ValueError, match=says):
            generate(1, **changes)


def test_a_tokenizer_of_its_own_knows_every_word_and_the_bundled_one_is_as_before():
    tokenizer = tiny_tokenizer(closed_words())
    chains, report = encode_traces(tokenizer, TRACES, TINY_FORMAT, row_length=160)
    assert not report.dropped
    for chain, trace in zip(chains, TRACES, strict=True):
        assert tokenizer.decode(chain.tokens).endswith(trace.completion + tokenizer.eos_token)
        assert chain.depth == trace.depth
    # A step is made of the same tokens as the fact that it copies, but for its end.
    ids = tokenizer("Room 7 12 red. Room 12 40 blue.\nRoom 7 12 red.\n")["input_ids"][1:]
    assert ids[:4] == ids[10:14]
    assert len(tiny_tokenizer()) == len(tiny_tokenizer(synthetic.closed_words()))
    stream = "\n".join(t.prompt + t.completion for t in synthetic.generate(60))
    assert hashlib.sha256(stream.encode()).hexdigest()[:16] == "82dfb7e57f0921e3"
