"""The generator: what it promises about splits, numbers, dependence and length, and the tokenizer that goes with it."""

import re
import subprocess
import sys

import pytest
from transformers import AutoTokenizer

from rtd_jax.data.generators import word_problems as synthetic
from rtd_jax.data.generators.streams import SPLITS, split_of
from rtd_jax.data.generators.word_problems import MAX_DEPTH, MAX_VALUE, NAMES, generate, generate_rows
from rtd_jax.data.tiny_tokenizer import TINY_FORMAT, tiny_tokenizer

ALL_DEPTHS = tuple(range(1, MAX_DEPTH + 1))
MARK = re.compile(r"<<(\d+)([-+*/])(\d+)=(\d+)>>(\d+)")


@pytest.fixture(scope="module")
def problems():
    return generate(1600, ALL_DEPTHS, "train", seed=3)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def test_steps_are_right_and_each_needs_the_one_before(problems):
    for trace in problems:
        value = None
        for step in trace.steps:
            left, sign, right, result, again = MARK.search(step).groups()
            exact = {"+": "__add__", "-": "__sub__", "*": "__mul__", "/": "__truediv__"}[sign]
            assert getattr(float(left), exact)(float(right)) == float(result) == float(again)
            assert value is None or left == value
            assert 0 <= int(result) <= MAX_VALUE
            value = result
        assert trace.answer == value
        assert trace.final == f"#### {value}"


SHELVES = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
SHELF = {word: index for index, word in enumerate(SHELVES, start=1)}
MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November")
MONTHS += ("December",)
MONTH = {word: index for index, word in enumerate(MONTHS)}


def _solve(question):
    """Work a problem out from its question alone: (what is asked, the result after each relevant fact)."""
    query, *facts = [part.strip() for part in re.split(r"(?<=[.?])\s", question)]
    person = re.fullmatch(r"How many \w+ does (\w+) have\?", query)
    shelf = re.fullmatch(r"How many \w+ are on shelf (\w+)\?", query)
    value, at, results = None, None, []
    for fact in facts:
        words = fact.rstrip(".").split()
        if person and words[:3] == [person[1], "starts", "with"]:
            value = int(words[3])
        elif person and words[0] in MONTH:
            assert at is None or MONTH[words[0]] == (at + 1) % 12, "months in order"
            at = MONTH[words[0]]
            value = _apply(value, words[1:])
            results.append(value)
        elif shelf and words[0] == "Shelf" and words[2] == "holds":
            at, value = SHELF[words[1]], int(words[3])
        elif shelf and words[0] == "Shelf" and SHELF[words[1]] <= SHELF[shelf[1]]:
            assert SHELF[words[1]] == at + 1, "shelves in order"
            at += 1
            value = _apply(value, words[2:])
            results.append(value)
    return "person" if person else "shelf", results


def _apply(value, words):
    match words:
        case ["all", "doubled"] | ["twice", "as", "many"]:
            return value * 2
        case ["half", "lost"] | ["half", "as", "many"]:
            return value // 2
        case [number, word] if word in ("more", "bought", "found", "earned", "won"):
            return value + int(number)
        case [number, word] if word in ("fewer", "sold", "lost", "dropped", "used"):
            return value - int(number)
    raise AssertionError(words)


def test_an_independent_solver_finds_the_same_numbers_from_the_question(problems):
    kinds = set()
    for trace in problems:
        kind, results = _solve(trace.prompt)
        kinds.add(kind)
        assert results == [int(MARK.search(step).group(4)) for step in trace.steps], trace.prompt
    assert kinds == {"person", "shelf"}


def test_every_problem_has_a_distractor_and_every_stated_number_is_another(problems):
    beyond = 0
    for trace in problems:
        _, *facts = re.split(r"(?<=[.?])\s", trace.prompt)
        relevant = {step.split(":")[0] for step in trace.steps}
        rest = [fact for fact in facts if fact.rstrip(".") not in relevant]
        assert len(rest) >= 2  # the start, and somebody else's fact
        assert any(re.match(r"(Meanwhile )?[A-Z]\w+ (has|buys|finds|sells|loses) \d", fact) for fact in rest)
        beyond += any(fact.startswith("Shelf") and " holds " not in fact for fact in rest)
        numbers = re.findall(r"\d+", trace.prompt)
        assert len(numbers) == len(set(numbers)), trace.prompt
    assert beyond > len(problems) / 8  # where to stop is told by the query alone


def test_problems_of_every_depth_start_anywhere():
    for depth in (1, 6):
        first = {re.sub(r"\d+", "", trace.steps[0]).split(":")[0] for trace in generate(600, (depth,))}
        assert {words.split()[0] for words in first} == {*MONTHS, "Shelf"}
        assert len({words.split()[1] for words in first if words.startswith("Shelf")}) == len(SHELVES) - 1 - depth


def test_depths_are_balanced_and_a_longer_list_begins_with_the_shorter():
    few, many = generate(10, (1, 3, 4), seed=5), generate(31, (1, 3, 4), seed=5)
    assert many[:10] == few
    assert [trace.depth for trace in few[:6]] == [1, 3, 4, 1, 3, 4]
    counts = [sum(trace.depth == depth for trace in many) for depth in (1, 3, 4)]
    assert counts == [11, 10, 10]


def test_splits_are_disjoint_for_all_pairs_of_seeds():
    questions = {
        split: {row["question"] for seed in (0, 1) for row in generate_rows(400, ALL_DEPTHS, split, seed)}
        for split in SPLITS
    }
    for split, found in questions.items():
        assert {split_of(question) for question in found} == {split}
    assert not questions["train"] & questions["test"]
    assert not questions["train"] & questions["validation"]
    assert not questions["validation"] & questions["test"]


def test_no_question_twice_in_a_split(monkeypatch):
    # In a world of three people and two things, thousands of one-step problems run into repeats.
    monkeypatch.setattr(synthetic, "NAMES", NAMES[:3])
    monkeypatch.setattr(synthetic, "THINGS", synthetic.THINGS[:2])
    questions = [row["question"] for row in generate_rows(6000, (1,), "train")]
    assert len(set(questions)) == len(questions)


def test_the_stream_is_the_same_in_another_process_whatever_the_hash_seed():
    code = "from rtd_jax.data.generators.word_problems import generate_rows; print(generate_rows(8, (2, 5), 'test', 7))"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": "."},
            check=True,
            capture_output=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert outputs == {f"{generate_rows(8, (2, 5), 'test', 7)}\n".encode()}
    assert generate_rows(8, (2, 5), "test", 8) != generate_rows(8, (2, 5), "test", 7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "dev"}, "split 'dev' is unknown; use one of train, validation, test"),
        ({"depths": (0, 1)}, "distinct numbers from 1 to 8"),
        ({"depths": (9,)}, "distinct numbers from 1 to 8"),
        ({"depths": (2, 2)}, "distinct numbers from 1 to 8"),
        ({"depths": ()}, "distinct numbers from 1 to 8"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(**{"count": 3, **arguments})


def test_tokenizer_gives_the_text_back_and_knows_every_word(problems, tokenizer):
    for trace in problems:
        text = TINY_FORMAT.fill(trace.prompt) + trace.completion
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text


def test_a_number_is_one_token_wherever_it_stands(tokenizer):
    ids = tokenizer("Mia has 13 apples. <<9+4=13>>13\n#### 13", add_special_tokens=False)["input_ids"]
    number = tokenizer.convert_tokens_to_ids("13")
    assert ids.count(number) == 4


def test_offsets_cover_the_text_without_gaps(problems, tokenizer):
    text = f"{problems[5].prompt}\n{problems[5].completion}"
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert "".join(text[start:end] for start, end in offsets) == text


def test_lengths_fit_the_tiny_recipe(tokenizer):
    for depth, most in ((1, 60), (6, 160)):
        for trace in generate(300, (depth,), "validation"):
            text = TINY_FORMAT.fill(trace.prompt) + trace.completion
            assert len(tokenizer(text)["input_ids"]) + 1 <= most  # and the end-of-sequence token


def test_tokenizer_survives_saving_and_has_its_special_tokens(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = f"Question: {NAMES[0]} has 9 apples.\nAnswer: {NAMES[0]} has <<9+4=13>>13 apples.\n#### 13"
    text += tokenizer.eos_token
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again(text)["input_ids"][0] == again.bos_token_id
    assert again(text)["input_ids"][-1] == again.eos_token_id
    assert again.decode(again(text)["input_ids"], skip_special_tokens=True) == text.removesuffix(tokenizer.eos_token)
    assert len({again.bos_token_id, again.eos_token_id, again.pad_token_id, again.unk_token_id}) == 4
