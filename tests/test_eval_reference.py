"""Reference chains are scored at the places of their steps, also where steps repeat."""

import dataclasses

import numpy as np
import pytest
from llama3_like import llama3_like

from rtd_jax.data.formats import TextFormat, render
from rtd_jax.data.trace import Trace
from rtd_jax.eval import reference
from rtd_jax.eval.scoring import TokenScores

REPEATED = Trace.of_steps("What is it?", ("4.", "24. 4. 4.", "4."), "4", "#### 4")
PROSE = dataclasses.replace(REPEATED, body="4. 24.  4. 4. 4.", spans=((0, 2), (3, 13), (14, 16)))


@pytest.mark.parametrize(("trace", "result"), [(REPEATED, 13), (PROSE, 14)], ids=["lines", "prose"])
def test_a_repeated_step_is_scored_in_its_own_place(monkeypatch, trace, result):
    """Only the token of the last step's result is not the model's first choice."""
    assert trace.body[result:] == "4."
    tokenizer = llama3_like()
    text = render(tokenizer, trace.prompt, trace.completion, TextFormat())
    place = len(text.prompt) + text.completion_offset + result

    def score(model, params, tokens, settings, **_):
        offsets = tokenizer(text.text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        chosen = [not start <= place < end for start, end in offsets]
        assert chosen.count(False) == 1
        return [TokenScores(np.zeros(len(ids)), np.array(chosen)) for ids in tokens]

    monkeypatch.setattr(reference, "score_chains", score)
    (found,) = reference.score_references(None, {}, tokenizer, [trace], [text])
    assert found["teacher_forced"] == [True, True, False]
