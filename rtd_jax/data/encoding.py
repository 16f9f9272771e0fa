"""Turns a trace into token ids and boundary positions.

The whole text is tokenised once, with character offsets. Boundary i is the token that covers the last character of step
i; boundary 0 is the last token of the prompt. Of its tokens those are a step's conclusion that cover a character of it
(`data.trace.conclusion_of`). Steps are not tokenised one by one, because byte-pair tokenizers merge across the end of a
step (Llama-3 has ".\\n" as one token), and the model would see ids that it never meets in whole texts.
"""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from rtd_jax.data.formats import Rendered, TextFormat, check_end, render, special_ids
from rtd_jax.data.trace import Trace, conclusion_of

_TOKENISE_AT_ONCE = 512  # texts


@dataclass(frozen=True, eq=False)
class EncodedChain:
    """One chain as token ids. `boundaries[0]` is `prompt_length - 1`, `boundaries[i]` the last token of step i."""

    tokens: np.ndarray  # int32 [L]
    prompt_length: int  # tokens
    boundaries: np.ndarray  # int32 [K], strictly increasing
    loss_weights: np.ndarray  # float32 [L]; 1 on completion and closing, 0 on the prompt
    source: str = ""
    conclusions: np.ndarray | None = None  # int32 [L]; i on the tokens of step i's conclusion. None: each step's last
    places: np.ndarray | None = None  # float32 [L]; see `steps.soft`, 0 on the prompt. None: steps with hard boundaries

    @property
    def depth(self) -> int:
        """Number of steps: one less than the number of boundaries."""
        return len(self.boundaries) - 1

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class EncodingReport:
    """Which chains did not fit into a row. A chain is kept whole, or dropped and counted here, never cut short."""

    total: int
    dropped: tuple[int, ...]  # indices of the traces left out, in order
    longest: int  # tokens of the longest chain, dropped ones included
    first_dropped: str  # its source and why; "" where none is dropped

    def __str__(self) -> str:
        kept = f"{self.total - len(self.dropped)} of {self.total} chains kept; the longest has {self.longest} tokens"
        return f"{kept}; first dropped: {self.first_dropped}" if self.dropped else kept


def encode_traces(
    tokenizer: PreTrainedTokenizerBase,
    traces: Sequence[Trace],
    text_format: TextFormat,
    *,
    row_length: int,
    max_dropped_fraction: float = 0.0,
) -> tuple[list[EncodedChain], EncodingReport]:
    """Encodes traces. Those longer than `row_length` tokens are dropped.

    Args:
      text_format: how prompt and completion become one text.
      max_dropped_fraction: share of the chains that may be dropped.

    Raises:
      ValueError: more chains would be dropped (the error names the first one, its length, and the row length that would
        hold all), the texts have no end, or a trace cannot be encoded faithfully: a token is unknown to the tokenizer,
        a special token stands in the text, prompt and completion share a token, or a step has no token of its own.
    """
    if not 0.0 <= max_dropped_fraction <= 1.0:
        raise ValueError(f"max_dropped_fraction is {max_dropped_fraction}; expected 0 to 1")
    if not tokenizer.is_fast:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has no fast form, so it gives no character offsets; save it "
            "with a tokenizer.json"
        )
    check_end(tokenizer, text_format)
    special = np.array(special_ids(tokenizer))
    chains: list[EncodedChain] = []
    for start in range(0, len(traces), _TOKENISE_AT_ONCE):
        block = traces[start : start + _TOKENISE_AT_ONCE]
        texts = [render(tokenizer, trace.prompt, trace.completion, text_format, source=trace.source) for trace in block]
        # verbose=False: lengths are compared with the row, and what is too long is reported.
        options: dict[str, Any] = {"add_special_tokens": False, "verbose": False}
        whole = tokenizer([text.text for text in texts], return_offsets_mapping=True, **options)
        prompts = tokenizer([text.prompt for text in texts], **options)
        columns = block, texts, whole["input_ids"], whole["offset_mapping"], prompts["input_ids"]
        chains += map(functools.partial(_encode, tokenizer, special), *columns)
    dropped = tuple(i for i, chain in enumerate(chains) if len(chain) > row_length)
    longest, first = max(map(len, chains), default=0), ""
    if dropped:
        chain = chains[dropped[0]]
        first = f"{chain.source or f'trace {dropped[0]}'} has {len(chain)} tokens, row_length is {row_length}"
    if len(dropped) > max_dropped_fraction * len(chains):
        raise ValueError(
            f"{len(dropped)} of {len(chains)} chains do not fit ({first}), more than max_dropped_fraction "
            f"{max_dropped_fraction}; a row_length of {longest} would hold all, or allow "
            f"max_dropped_fraction={len(dropped) / len(chains):.4f}"
        )
    kept = [chain for chain in chains if len(chain) <= row_length]
    return kept, EncodingReport(len(chains), dropped, longest, first)


def chains_fingerprint(chains: Sequence[EncodedChain]) -> str:
    """SHA-256 over ids, boundaries, weights and places of the chains in order: a data set as the model sees it."""
    digest = hashlib.sha256()
    for chain in chains:
        places = () if chain.places is None else (chain.places,)
        for array in (chain.tokens, chain.boundaries, chain.loss_weights, *places):
            digest.update(len(array).to_bytes(8, "little"))
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _encode(
    tokenizer: PreTrainedTokenizerBase,
    special_tokens: np.ndarray,
    trace: Trace,
    text: Rendered,
    ids: list[int],
    offsets: list[tuple[int, int]],
    prompt_ids: list[int],
) -> EncodedChain:
    source, prompt_length = trace.source or "trace", len(prompt_ids)
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    if tokenizer.unk_token_id in ids and tokenizer.unk_token_id not in special:
        start, end = offsets[ids.index(tokenizer.unk_token_id)]
        raise ValueError(
            f"{source}: {ids.count(tokenizer.unk_token_id)} of {len(ids)} tokens are unknown to the tokenizer "
            f"{tokenizer.name_or_path!r}, the first is {text.text[start:end]!r}; use the tokenizer that belongs to "
            "this text"
        )
    if not prompt_length:
        raise ValueError(f"{source}: the prompt {trace.prompt!r} has no tokens; expected at least one")
    if ids[:prompt_length] != prompt_ids:
        # Ids are compared, because the offsets of some tokenizers leave white space out.
        raise ValueError(
            f"{source}: the end of the prompt {text.prompt[-20:]!r} and the start of the completion "
            f"{text.completion[:20]!r} share a token, so a generation would start from other ids than training saw; "
            "move the white space between them to the other side (prompt_template / completion_prefix)"
        )
    starts, ends = np.asarray(offsets, np.int64).reshape(-1, 2).T
    wide = np.flatnonzero(ends > starts)  # some tokenizers have tokens that cover no character
    base = len(text.prompt) + text.completion_offset
    spans = base + np.array(trace.spans)
    first_characters, last_characters = spans[:, 0], spans[:, 1] - 1
    # Of the tokens that cover a character the last one is taken: a character can take several tokens. A normaliser can
    # leave a step's last characters to no token (of "e" and an accent that become one, it names the "e" only): then it
    # is the last token before them that belongs to the step.
    step_ends = wide[np.searchsorted(starts[wide], last_characters, side="right") - 1]
    boundaries = np.array([prompt_length - 1, *step_ends], np.int32)
    wrong = np.flatnonzero((ends[step_ends] <= first_characters) | (np.diff(boundaries) <= 0))
    if len(wrong):
        raise ValueError(
            f"{source}: step {wrong[0] + 1}, {trace.steps[wrong[0]][-60:]!r}, has no token of its own at its "
            f"end: steps end on tokens {boundaries[1:].tolist()} after a prompt of {prompt_length} tokens; expected "
            "each step to end on a token of its own, so join it with its neighbour, or leave the row out"
        )
    own = wide[(starts[wide] >= base) & (starts[wide] < base + len(trace.completion))]
    for token in own[np.isin(np.array(ids)[own], special_tokens)]:  # a normaliser made it of other characters
        raise ValueError(
            f"{source}: {text.text[starts[token] : ends[token]]!r} is read as a special token of the tokenizer "
            f"{tokenizer.name_or_path!r}, not as text; leave the row out, or write it in another way"
        )
    weights = (np.arange(len(ids)) >= prompt_length).astype(np.float32)
    chain = EncodedChain(np.array(ids, np.int32), prompt_length, boundaries, weights, trace.source)
    stated = [first + np.array(conclusion_of(step)) for (first, _), step in zip(spans, trace.steps, strict=True)]
    return replace(chain, conclusions=_conclusions(boundaries, stated, starts, ends))


def _conclusions(
    boundaries_K: np.ndarray, spans: Sequence[np.ndarray], starts_L: np.ndarray, ends_L: np.ndarray
) -> np.ndarray:
    """int32 [L]: i on the tokens of step i that cover a character of its conclusion; on its last where none does."""
    numbers_L = np.zeros(len(starts_L), np.int32)
    for number, (start, end) in enumerate(spans, start=1):
        own = np.arange(boundaries_K[number - 1] + 1, boundaries_K[number] + 1)
        stating = own[(starts_L[own] < end) & (ends_L[own] > start)]
        numbers_L[stating if len(stating) else own[-1:]] = number
    return numbers_L
