"""Marks go, meaning stays; tokens at which words and steps end."""

import numpy as np
import pytest

from rtd_jax.data.formats import TextFormat
from rtd_jax.data.tiny_tokenizer import TINY_FORMAT, tiny_tokenizer
from rtd_jax.data.trace import Trace
from rtd_jax.steps.prose import joined_steps, read, unmarked


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("He has 48/2 = <<48/2=24>>24 clips.\nShe has\n\n 3.", "He has 48/2 = 24 clips. She has 3."),
        ("1. Add them.\n2) Halve.\nStep 3: Done.\n- a\n* b", "Add them. Halve. Done. a b"),
        ("3.5 miles\n-4 degrees\n12 apples\nstep by step", "3.5 miles -4 degrees 12 apples step by step"),
        ("  \t\n ", ""),
    ],
)
def test_marks_and_line_ends_go_and_numbers_that_mean_something_stay(text, expected):
    prose = unmarked(text)
    assert prose.text == expected
    # Every character is where it came from, up to the kind of white space.
    assert [text[i] if not text[i].isspace() else " " for i in prose.origin] == list(expected)
    assert np.all(np.diff(prose.origin) > 0)


def test_steps_become_one_text_with_a_span_each():
    trace = Trace.of_steps("p", ("2 + 2 = <<2+2=4>>4", "<<>>", "So 4."), "4", "#### 4")
    text, spans = joined_steps(trace)  # a step of marks alone has nothing left; the answer's line is no step
    assert text == "2 + 2 = 4 So 4."
    assert spans == ((0, 9), (10, 15))
    assert joined_steps(trace, "marked")[0] == "2 + 2 = <<2+2=4>>4\n<<>>\nSo 4."
    assert (
        joined_steps(Trace.of_steps("p", ("He has 3.5 apples.", "So, 4!"), ""), "bare")[0] == "he has 3.5 apples so 4"
    )
    with pytest.raises(ValueError, match="nothing is left of its steps"):
        joined_steps(Trace.of_steps("p", ("<<2=2>>",), "", source="x:3"))


def test_a_boundary_is_the_token_that_covers_the_last_character_of_a_step():
    tokenizer = tiny_tokenizer()
    text, spans = joined_steps(Trace.of_steps("How many?", ("March 3 lost: <<5-3=2>>2.", "April 12 earned: 14."), "14"))
    reading = read(tokenizer, "March 3 lost.", text, TINY_FORMAT, spans)
    own = [tokenizer.decode([i]) for i in reading.tokens_L[reading.prompt_length :]]
    assert own == ["March", " ", "3", " lost", ": ", "2", ". ", "April", " ", "12", " earned", ": ", "14", "."] or (
        "".join(own) == text
    )
    assert [text[:end] for end in reading.ends_T[reading.labels_T]] == ["March 3 lost: 2.", text]
    for end, candidate in zip(reading.ends_T, reading.candidates_T, strict=True):
        assert not candidate or end == len(text) or text[end] == " "
    assert np.all(reading.candidates_T[reading.labels_T])
    with pytest.raises(ValueError, match="inside a token"):
        read(tokenizer, "March", text, TINY_FORMAT, ((0, 2),))
    with pytest.raises(ValueError, match="the text is blank"):
        read(tokenizer, "March", " \n", TextFormat())
