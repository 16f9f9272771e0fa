"""Chains as the student will see them: tokens with their ids, which of them carry labels, and where steps end."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from rtd_jax.data.encoding import EncodedChain
from rtd_jax.data.formats import TextFormat, render
from rtd_jax.data.trace import Trace
from rtd_jax.train.splits import Chains


@dataclass(frozen=True)
class Token:
    """A token of a chain."""

    id: int
    text: str  # the characters that it stands for, or its name where it stands for a part of one
    position: int  # in the chain, from 0
    has_label: bool  # whether the student learns to predict it


@dataclass(frozen=True)
class Segment:
    """The tokens after a boundary, up to the next one."""

    name: str
    tokens: tuple[Token, ...]
    boundary: int | None  # number of the boundary at the last token; None behind the last one

    @property
    def labels(self) -> str:
        """How many tokens carry a label, in words."""
        count = sum(token.has_label for token in self.tokens)
        if not count:
            return "no label"
        of = "" if count == len(self.tokens) else f" of {len(self.tokens)}"
        return f"{count}{of} label{'' if count == 1 else 's'}"


@dataclass(frozen=True)
class ShownChain:
    """A chain with everything that is shown of it."""

    title: str
    segments: tuple[Segment, ...]

    @property
    def text(self) -> str:
        """The whole text, special tokens included."""
        return "".join(token.text for segment in self.segments for token in segment.tokens)


def shown_chains(
    chains: Chains, count: int, tokenizer: PreTrainedTokenizerBase, text: TextFormat, row_length: int, part: str
) -> list[ShownChain]:
    """`count` of the chains at equal distances in the order of depth and length, the first and the last among them.

    Args:
      part: what lies between two boundaries: "step", "window" or "cut".
    """
    order = sorted(range(len(chains.encoded)), key=lambda i: (chains.traces[i].depth, len(chains.encoded[i])))
    places = np.round(np.linspace(0, len(order) - 1, min(count, len(order)))).astype(int)
    return [
        _shown(chains.traces[i], chains.encoded[i], tokenizer, text, row_length, part)
        for i in (order[place] for place in places)
    ]


def _shown(
    trace: Trace, chain: EncodedChain, tokenizer: PreTrainedTokenizerBase, text: TextFormat, row_length: int, part: str
) -> ShownChain:
    whole = render(tokenizer, trace.prompt, trace.completion, text, source=trace.source).text
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    assert encoded["input_ids"] == chain.tokens.tolist(), trace.source
    texts = _pieces(whole, encoded["offset_mapping"], tokenizer.convert_ids_to_tokens(encoded["input_ids"]))
    tokens = [
        Token(int(token), piece, position, bool(weight))
        for position, (token, piece, weight) in enumerate(zip(chain.tokens, texts, chain.loss_weights, strict=True))
    ]
    ends = [int(end) + 1 for end in chain.boundaries]
    segments = [
        Segment(f"{part} {number}" if number else "prompt", tuple(tokens[start:end]), number)
        for number, (start, end) in enumerate(zip([0, *ends], ends, strict=False))
    ]
    if ends[-1] < len(tokens):
        segments.append(Segment("end", tuple(tokens[ends[-1] :]), None))
    labels = sum(token.has_label for token in tokens)
    steps = f"{chain.depth} {part}{'' if chain.depth == 1 else 's'}"
    title = (
        f"{trace.source or 'a chain'}: {steps}, {len(tokens)} tokens of a row of {row_length}, {labels} with a label"
    )
    return ShownChain(title, tuple(segments))


def _pieces(whole: str, offsets: Sequence[tuple[int, int]], names: Sequence[str]) -> list[str]:
    """The characters of each token. Those that a token's offsets leave out, like a space before a word, go with it."""
    pieces, done = [], 0
    for (_, end), name in zip(offsets, names, strict=True):
        pieces.append(whole[done:end] or f"[{name}]")  # one of several tokens of a character covers none
        done = max(done, end)
    return pieces
