"""The word problems in sentences: the same numbers and operations, no problem twice, chains that the judge reads."""

import random
import re

from rtd_jax.data.generators.natural import in_sentences
from rtd_jax.data.generators.streams import SPLITS
from rtd_jax.data.generators.word_problems import MAX_DEPTH, generate, generate_rows
from rtd_jax.data.sources import SourceSettings, load_traces
from rtd_jax.eval.chains import score_chain

DEPTHS = tuple(range(1, MAX_DEPTH + 1))
MARK = re.compile(r"<<\d+[-+*/]\d+=\d+>>")
ROWS = generate_rows(800, DEPTHS, "train", seed=2)


def test_the_example_of_the_docstring_is_one():
    row = {
        "question": "How many pens does Mia have? Mia starts with 9. March 4 sold. Meanwhile Ben buys 7 balls.",
        "answer": "March 4 sold: <<9-4=5>>5.\n#### 5",
    }
    found = in_sentences(row)
    assert re.search(r"\bMia (had|started with) 9 pens", found["question"])
    assert re.search(r"\bMia sold 4 pens in March\.|In March, Mia sold 4 pens\.", found["question"])
    assert re.search(r"Meanwhile, Ben bought 7 balls\.|Ben, on the other hand, bought 7 balls\.", found["question"])
    assert re.search(r"How many pens d(oes|id) Mia [^.]*\?$", found["question"])
    assert re.search(r"March.* 9 - 4 = <<9-4=5>>5 pens\.\n#### 5$", found["answer"])


def test_numbers_operations_and_their_order_are_those_of_the_problem():
    for row in ROWS:
        found = in_sentences(row)
        assert re.findall(r"\d+", found["question"]) == re.findall(r"\d+", row["question"])
        assert MARK.findall(found["answer"]) == MARK.findall(row["answer"])
        assert found["answer"].splitlines()[-1] == row["answer"].splitlines()[-1]


def test_what_happens_is_said_of_the_same_month_or_shelf():
    said = {"doubled": "doubled the number of", "twice": "twice as many"}
    said |= {word: word for word in ("lost", "half", "more", "fewer", "bought", "found", "earned", "won", "sold")}
    for row in ROWS:
        _, *facts = re.split(r"(?<=[.?]) ", row["question"])
        *told, _ = re.split(r"(?<=[.?]) ", in_sentences(row)["question"])
        assert len(told) == len(facts)
        for fact, sentence in zip(facts, told, strict=True):
            words = fact.rstrip(".").split()
            subject = " ".join(words[:2]) if words[0] == "Shelf" else words[0]
            if words[0] == "Meanwhile":
                subject = words[1]
            assert subject.lower() in sentence.lower(), (fact, sentence)
            assert all(said[word] in sentence for word in said.keys() & set(words)), (fact, sentence)
            # A shelf is compared with the one before it, and with no other.
            if words[0] == "Shelf" and "holds" not in words:
                assert len(set(re.findall(r"shelf (\w+)", sentence.lower()))) == 2


def test_two_problems_never_become_one_and_no_split_shares_one():
    rows = [row for split in SPLITS for row in generate_rows(160, DEPTHS, split)]
    assert len({in_sentences(row)["question"] for row in rows}) == len(rows)
    # Two problems that differ in one word alone.
    row = {"question": "How many pens are on shelf two? Shelf one holds 3. Shelf two 4 more.", "answer": "#### 7"}
    other = {**row, "question": row["question"].replace("more", "fewer")}
    assert in_sentences(row)["question"] != in_sentences(other)["question"]


def test_one_thing_is_in_the_singular():
    """As in "There is 3 - 2 = 1 coin on shelf two.", in every way of writing a step."""
    steps = [step for row in ROWS for step in in_sentences(row)["answer"].splitlines()[:-1]]
    ones = [step for step in steps if ">>1 " in step]
    assert {step.split()[0] for step in ones} >= {"In", "After", "Shelf", "There"}
    for step in steps:
        result, things = re.search(r">>(\d+) (\w+)", step).groups()
        assert things.endswith("s") == (result != "1"), step
        assert step.startswith("There is ") == (step.startswith("There ") and result == "1"), step


def test_a_problem_does_not_begin_with_what_happened_meanwhile():
    rows = [row for row in ROWS if "? Meanwhile " in row["question"]]
    assert rows
    for row in rows:
        person, verb = row["question"].split("? Meanwhile ")[1].split()[:2]
        done = {"buys": "bought", "finds": "found", "sells": "sold", "loses": "lost"}[verb]
        assert in_sentences(row)["question"].startswith(f"{person} {done} ")


def test_sentences_are_chosen_by_the_problem_alone_and_there_are_several():
    state = random.getstate()
    forms = [in_sentences(row) for row in ROWS]
    assert forms == [in_sentences(row) for row in reversed(ROWS)][::-1]
    assert random.getstate() == state
    blank = {re.sub(r"\d+", "#", found["answer"].splitlines()[0].split("=")[0])[:8] for found in forms}
    assert {text.split()[0] for text in blank} >= {"In", "After", "Shelf", "There"}
    # A chain keeps to one way of writing.
    for found in forms:
        *steps, _ = found["answer"].splitlines()
        ways = {bool(re.match(r"There", step)) for step in steps}, {" which makes " in step for step in steps}
        assert all(len(way) == 1 for way in ways)


def test_the_judge_accepts_the_chains_and_finds_the_step_that_is_wrong():
    """Without the calculator's marks, as a language model is to write them."""
    for trace in generate(300, DEPTHS, "validation", keep_marks=False, wording="natural"):
        assert "<<" not in trace.completion
        found = score_chain(trace.completion, trace)
        assert found["correct"]
        assert found["chain_exact"]
        assert found["steps_right"][: trace.depth] == [True] * trace.depth
        wrong = len(trace.steps) // 2
        steps = [*trace.steps]
        right = re.search(r"= (\d+) ", steps[wrong])[1]
        steps[wrong] = steps[wrong].replace(f"= {right} ", f"= {int(right) + 3} ")
        found = score_chain("\n".join([*steps, trace.final]), trace)
        assert not found["correct"]
        assert found["first_error"] == wrong


def test_a_recipe_asks_for_sentences_by_a_setting_that_other_schemas_do_not_read():
    settings = SourceSettings("synthetic", split="test", limit=12, wording="natural", keep_marks=False)
    assert load_traces(settings) == generate(12, split="test", keep_marks=False, wording="natural")
    assert "wording" not in settings.unread_settings()
    assert "wording" in SourceSettings("lift", limit=12).unread_settings()
    assert "wording" in SourceSettings("gsm8k", "folder").unread_settings()
    terse = load_traces(SourceSettings("synthetic", split="test", limit=12))
    assert terse == generate(12, split="test")
