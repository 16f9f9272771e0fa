"""Labelled chains: corruptions judged by an independent reading of the problem, and the published schemas."""

import json
import re

import pytest

from rtd_jax.data.generators.word_problems import generate
from rtd_jax.data.labelled import LabelledSettings, load_labelled
from rtd_jax.data.schemas.prm800k import labelled_from_prm800k
from rtd_jax.data.schemas.processbench import labelled_from_processbench
from rtd_jax.data.schemas.stepwise import labelled_from_stepwise
from rtd_jax.data.trace import Trace

CHAINS = load_labelled(LabelledSettings("synthetic", limit=1_200, corruption=0.3))
REFERENCE = {trace.prompt: trace for trace in generate(1_200)}


def is_right(step: str, said: str, value: int, fact: Trace | None = None) -> bool:
    """Whether a line restates `said` and computes rightly from `value`; by Python's own arithmetic."""
    text, formula, result = re.fullmatch(r"(.*): <<(.*)=(\d+)>>\d+\.", step).groups()
    first, second = re.split(r"[-+*/]", formula)
    return text == said and int(first) == value and eval(formula) == int(result) and second.isdigit()


def test_a_step_is_labelled_by_whether_it_is_right_itself():
    """Re-derived from the problem: the fact that is due, applied to the value that the line before states."""
    for chain in CHAINS:
        facts = [step.split(": <<")[0] for step in REFERENCE[chain.trace.prompt].steps]
        value = int(re.search(r"<<(\d+)", REFERENCE[chain.trace.prompt].steps[0])[1])
        due = 0
        for step, label in zip(chain.trace.steps, chain.labels, strict=True):
            assert is_right(step, facts[due], value) == label, (chain, step)
            said = step.split(": <<")[0]
            # A skipped fact is gone; the chain goes on behind the one that took its place.
            due = facts.index(said) + 1 if said in facts[due:] else due + 1
            value = int(re.search(r"=(\d+)>>", step)[1])


def test_all_kinds_of_error_are_there_and_right_steps_follow_wrong_ones():
    labels = [label for chain in CHAINS for label in chain.labels]
    assert 0.2 < labels.count(False) / len(labels) < 0.4
    assert any(right and not all(chain.labels[:i]) for chain in CHAINS for i, right in enumerate(chain.labels))
    shorter = sum(len(chain.trace.steps) < REFERENCE[chain.trace.prompt].depth for chain in CHAINS)
    assert shorter > 50  # skipped facts
    said = [
        (step.split(": <<")[0], label)
        for chain in CHAINS
        for step, label in zip(chain.trace.steps, chain.labels, strict=True)
    ]
    texts = {s.split(": <<")[0] for trace in REFERENCE.values() for s in trace.steps}
    assert sum(not label and text in texts for text, label in said) > 100  # wrong results
    assert all(chain.trace.depth == len(chain.labels) for chain in CHAINS)


def test_the_same_settings_give_the_same_chains():
    settings = LabelledSettings("synthetic", limit=20, corruption=0.3)
    assert load_labelled(settings) == CHAINS[:20]


def test_processbench_labels_end_at_the_first_error():
    row = {"problem": "p", "steps": ["a", "b\nc", "d"], "label": 1}
    (chain,) = labelled_from_processbench(row, "x:1")
    assert chain.trace.steps == ("a", "b c", "d")
    assert chain.labels == (True, False, None)
    assert labelled_from_processbench(row | {"label": -1})[0].labels == (True, True, True)
    assert labelled_from_processbench(row | {"label": 1.0})[0].labels == (True, False, None)  # of a table with gaps
    for label in (3, -2, "1", None, True, 1.5, float("nan"), [1]):
        with pytest.raises(ValueError, match=r"x:1: field 'label' is .*; expected the index of the first wrong of 3"):
            labelled_from_processbench(row | {"label": label}, "x:1")


def test_prm800k_gives_the_chosen_chain_and_every_rated_completion_beside_it():
    row = {
        "question": {"problem": "p"},
        "label": {
            "steps": [
                {"completions": [{"text": "bad", "rating": -1}, {"text": "good", "rating": 1}], "chosen_completion": 1},
                {
                    "completions": [{"text": "x", "rating": None}],
                    "human_completion": {"text": "mine", "rating": None},
                    "chosen_completion": None,
                },
                {"completions": [{"text": "so", "rating": 0}, {"text": "no", "rating": -1}], "chosen_completion": None},
            ]
        },
    }
    found = [(chain.trace.steps, chain.labels) for chain in labelled_from_prm800k(row, "x:1")]
    assert found == [
        (("good", "mine"), (True, None)),
        (("bad",), (False,)),
        (("good", "mine", "so"), (None, None, True)),
        (("good", "mine", "no"), (None, None, False)),
    ]
    with pytest.raises(ValueError, match="x:1: step 1: rating is 2; expected -1, 0, 1 or null"):
        labelled_from_prm800k({**row, "label": {"steps": [{"completions": [{"text": "a", "rating": 2}]}]}}, "x:1")

    def of_step(step):
        return {**row, "label": {"steps": [step]}}

    for nobody in (None, {}, {"text": None, "rating": None}):
        step = {"completions": [{"text": "a", "rating": 1}], "human_completion": nobody}
        assert [chain.trace.steps for chain in labelled_from_prm800k(of_step(step))] == [("a",)]
    for rating in (True, "1", [1], 0.5):
        with pytest.raises(ValueError, match=r"x:1: step 1: rating is .*; expected -1, 0, 1 or null"):
            labelled_from_prm800k(of_step({"completions": [{"text": "a", "rating": rating}]}), "x:1")
    for step in ("a", {"completions": 3}, {"completions": ["a"]}, {"completions": [], "human_completion": "a"}):
        with pytest.raises(ValueError, match=r"x:1: step 1: .*; expected"):
            labelled_from_prm800k(of_step(step), "x:1")
    for chosen in (True, 5, "0"):
        with pytest.raises(ValueError, match=r"x:1: step 1: chosen_completion is .* of 1 completions"):
            labelled_from_prm800k(of_step({"completions": [{"text": "a"}], "chosen_completion": chosen}), "x:1")
    with pytest.raises(ValueError, match="x:1: expected PRM800K's fields"):
        labelled_from_prm800k({"problem": "p"}, "x:1")


def test_files_are_read_and_refusals_name_file_and_row(tmp_path):
    path = tmp_path / "train.jsonl"
    rows = [{"prompt": "p", "completions": ["a", "b"], "labels": [True, False]}] * 2
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    chains = load_labelled(LabelledSettings("stepwise", str(tmp_path)))
    assert [chain.labels for chain in chains] == [(True, False)] * 2
    assert chains[1].trace.source.endswith("train.jsonl:2")
    assert len(load_labelled(LabelledSettings("stepwise", str(path), limit=1))) == 1
    path.write_text(json.dumps(rows[0]) + "\n" + json.dumps(rows[0] | {"labels": [True]}) + "\n")
    with pytest.raises(
        ValueError, match=r"train.jsonl:2: field 'labels' is \[True\]; expected one label for each of the 2"
    ):
        load_labelled(LabelledSettings("stepwise", str(tmp_path)))
    path.write_text(json.dumps(rows[0] | {"labels": [None, None]}) + "\n")
    with pytest.raises(ValueError, match="none of its 1 chains has a labelled step"):
        load_labelled(LabelledSettings("stepwise", str(tmp_path)))
    with pytest.raises(ValueError, match="label 1 is 'yes'; expected true, false or null"):
        labelled_from_stepwise({"prompt": "p", "completions": ["a"], "labels": ["yes"]})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"schema": "prm"}, "schema 'prm' is unknown"),
        ({"limit": 0}, "needs the number of problems"),
        ({"corruption": 0.0}, "corruption is 0.0; expected above 0 and below 1"),
        ({"schema": "prm800k"}, "needs a location"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        LabelledSettings(**({"schema": "synthetic", "limit": 5} | changes))
