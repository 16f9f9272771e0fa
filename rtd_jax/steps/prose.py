"""Texts as a boundary classifier reads them: without the marks that give steps away.

A classifier that saw line ends would learn to look for them. So calculator marks, list numbers and bullets are removed
and every run of white space becomes one space, when a classifier is fitted, when it is evaluated and when it is used.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from rtd_jax.data.formats import TextFormat, render
from rtd_jax.data.trace import Span, Trace

# "<<48/2=24>>" anywhere, and "1. ", "2) ", "Step 3: ", "- ", "* " at the beginning of a line. White space has to follow
# these, so that "3.5 miles" and "-4 degrees" keep their beginning.
_MARKS = re.compile(
    r"<<[^<>\n]*>>|^[ \t]*(?:(?:step\s+)?\d{1,2}[.):](?=\s)|step\s+\d{1,2}\b(?=\s)|[-*•](?=\s))",
    re.MULTILINE | re.IGNORECASE,
)


@dataclass(frozen=True, eq=False)
class Prose:
    """A text without marks. Its character i was character `origin[i]` (int32) of the text that it was made from."""

    text: str
    origin: np.ndarray


def unmarked(text: str) -> Prose:
    """Removes the marks from a text, and makes each run of white space one space, with none at either end."""
    is_kept = np.ones(len(text), bool)
    for match in _MARKS.finditer(text):
        is_kept[match.start() : match.end()] = False
    characters: list[str] = []
    origin: list[int] = []
    for index in np.flatnonzero(is_kept):
        character = " " if text[index].isspace() else text[index]
        if character != " " or (characters and characters[-1] != " "):
            characters.append(character)
            origin.append(int(index))
    kept = "".join(characters).rstrip()
    return Prose(kept, np.array(origin[: len(kept)], np.int32))


# By name, what is done to a step before the teacher reads it. "marked" measures how much easier the marks make it, and
# "bare" is a control: without capital letters and . ! ? , ; : at the ends of words, neither can give a step away.
FORMS: dict[str, Callable[[str], str]] = {
    "plain": lambda step: unmarked(step).text,
    "marked": str,
    "bare": lambda step: re.sub(r"[.!?,;:]+(?=\s|$)", "", unmarked(step).text.lower()).strip(),
}


def joined_steps(trace: Trace, form: str = "plain") -> tuple[str, tuple[Span, ...]]:
    """The steps of a trace as one text, in one of `FORMS`, and the span of each step in it.

    Marked steps stand on a line each, the others follow after a space. A step of which nothing is left has no span.

    Raises:
      ValueError: nothing is left of any step.
    """
    pieces = [piece for step in trace.steps if (piece := FORMS[form](step))]
    if not pieces:
        raise ValueError(f"{trace.source or 'trace'}: nothing is left of its steps without marks; leave it out")
    text = ("\n" if form == "marked" else " ").join(pieces)
    return text, Trace.of_steps(trace.prompt, pieces, "").spans


@dataclass(frozen=True, eq=False)
class Reading:
    """A text as the teacher reads it, after its prompt: L tokens, of which the last T belong to the text.

    A token is a candidate for a boundary where a word ends: it covers the last character before white space, or the
    last character of the text.
    """

    text: str  # without its prompt
    tokens_L: np.ndarray  # int32
    ends_T: np.ndarray  # int32: where the token ends in the text, white space at its end left out
    candidates_T: np.ndarray  # bool: a word ends here
    labels_T: np.ndarray  # bool: a step ends here; all False where the steps are not known

    @property
    def prompt_length(self) -> int:
        """Number of tokens before the text."""
        return len(self.tokens_L) - len(self.ends_T)


def read(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    text: str,
    text_format: TextFormat,
    spans: tuple[Span, ...] = (),
    source: str = "text",
) -> Reading:
    """Tokenises prompt and text as one, and finds the tokens at which words end and, given spans, at which steps end.

    Raises:
      ValueError: the text is blank, or a step ends inside a token.
    """
    if not text.strip():
        raise ValueError(f"{source}: the text is blank; expected a chain of thought")
    rendered = render(tokenizer, prompt, text, text_format)
    begin = len(rendered.prompt) + rendered.completion_offset
    encoded = tokenizer(
        rendered.prompt + rendered.completion, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    tokens = np.asarray(encoded["input_ids"], np.int32)
    offsets = np.asarray(encoded["offset_mapping"], np.int64).reshape(-1, 2) - begin
    first = int(np.argmax(offsets[:, 1] > 0))
    ends_T = np.zeros(len(tokens) - first, np.int32)
    candidates_T, labels_T = np.zeros((2, len(ends_T)), bool)
    closing: dict[int, int] = {}  # where tokens end in the text -> the last token that ends there
    for place, (start, end) in enumerate(offsets[first:]):
        start = max(int(start), 0)
        if covered := text[start:end].rstrip():
            ends_T[place] = start + len(covered)
            closing[start + len(covered)] = place
        elif place:
            ends_T[place] = ends_T[place - 1]
    for end, place in closing.items():
        candidates_T[place] = end == len(text) or text[end].isspace()
    for number, (_, end) in enumerate(spans, start=1):
        if end not in closing:
            raise ValueError(
                f"{source}: step {number} ends at character {end} of {len(text)}, inside a token; tokens end there "
                "only if white space follows"
            )
        labels_T[closing[end]] = True
    return Reading(text, tokens, ends_T, candidates_T, labels_T)
