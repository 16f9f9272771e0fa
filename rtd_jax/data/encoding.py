"""Turns a trace into token ids and boundary positions.

The whole text is tokenised once, with character offsets. Boundary i is the token that covers the last character of step
i. Steps are not tokenised one by one, because byte-pair tokenizers merge across the end of a step (Llama-3 has ".\\n"
as one token), and the model would see ids that it never meets in whole texts. Boundary 0 is the last token of the
prompt.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from rtd_jax.data.formats import Rendered, TextFormat, render
from rtd_jax.data.trace import Trace

_TOKENISE_AT_ONCE = 512  # texts


@dataclass(frozen=True, eq=False)
class EncodedChain:
    """One chain as token ids. `boundaries[0]` is `prompt_length - 1`, `boundaries[i]` the last token of step i."""

    tokens: np.ndarray  # int32 [L]
    prompt_length: int  # tokens
    boundaries: np.ndarray  # int32 [K], strictly increasing
    loss_weights: np.ndarray  # float32 [L]; 1 on completion and closing, 0 on the prompt
    source: str = ""

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
    most_boundaries: int  # of any chain, dropped ones included
    first_dropped: str = ""  # its source and why

    def __str__(self) -> str:
        kept = f"{self.total - len(self.dropped)} of {self.total} chains kept; the longest has {self.longest} tokens"
        return f"{kept}; first dropped: {self.first_dropped}" if self.dropped else kept


def encode_trace(
    tokenizer: PreTrainedTokenizerBase, trace: Trace, text_format: TextFormat | None = None
) -> EncodedChain:
    """One chain. Raises ValueError as `encode_traces`, whatever its length."""
    return next(_encode(tokenizer, [trace], text_format or TextFormat()))


def encode_traces(
    tokenizer: PreTrainedTokenizerBase,
    traces: Sequence[Trace],
    text_format: TextFormat | None = None,
    *,
    row_length: int,
    max_boundaries: int = 0,
    max_dropped_fraction: float = 0.0,
) -> tuple[list[EncodedChain], EncodingReport]:
    """Encodes traces. Those longer than `row_length` tokens or with more than `max_boundaries` are dropped.

    Args:
      text_format: how prompt and completion become one text; the plain form by default.
      max_boundaries: of a chain, the prompt's end included; 0 allows any number.
      max_dropped_fraction: share of the chains that may be dropped.

    Raises:
      ValueError: more chains would be dropped (the error names the first one, its length, and the row length that would
        hold all), or a trace cannot be encoded faithfully: a token is unknown to the tokenizer, prompt and completion
        share a token, or two steps end on the same token.
    """
    if not 0.0 <= max_dropped_fraction <= 1.0:
        raise ValueError(f"max_dropped_fraction is {max_dropped_fraction}; expected 0 to 1")
    kept: list[EncodedChain] = []
    first_dropped, longest, most_boundaries = "", 0, 0
    dropped: list[int] = []
    for index, chain in enumerate(_encode(tokenizer, traces, text_format or TextFormat())):
        longest, most_boundaries = max(longest, len(chain)), max(most_boundaries, len(chain.boundaries))
        reason = ""
        if len(chain) > row_length:
            reason = f"{len(chain)} tokens, row_length is {row_length}"
        elif 0 < max_boundaries < len(chain.boundaries):
            reason = f"{len(chain.boundaries)} boundaries, max_boundaries is {max_boundaries}"
        if reason:
            dropped.append(index)
            first_dropped = first_dropped or f"{chain.source or f'trace {index}'} has {reason}"
        else:
            kept.append(chain)
    report = EncodingReport(len(traces), tuple(dropped), longest, most_boundaries, first_dropped)
    if len(dropped) > max_dropped_fraction * len(traces):
        raise ValueError(
            f"{len(dropped)} of {len(traces)} chains do not fit ({first_dropped}), more than max_dropped_fraction "
            f"{max_dropped_fraction}; a row_length of {longest} with max_boundaries {most_boundaries} would hold all, "
            f"or allow max_dropped_fraction={len(dropped) / len(traces):.4f}"
        )
    return kept, report


def chains_fingerprint(chains: Sequence[EncodedChain]) -> str:
    """SHA-256 over ids, boundaries and weights of the chains in order: a data set as the model sees it."""
    digest = hashlib.sha256()
    for chain in chains:
        for array in (chain.tokens, chain.boundaries, chain.loss_weights):
            digest.update(len(array).to_bytes(8, "little"))
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _encode(
    tokenizer: PreTrainedTokenizerBase, traces: Sequence[Trace], text_format: TextFormat
) -> Iterator[EncodedChain]:
    if not tokenizer.is_fast:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has no fast form, so it gives no character offsets; save it "
            "with a tokenizer.json"
        )
    for start in range(0, len(traces), _TOKENISE_AT_ONCE):
        block = traces[start : start + _TOKENISE_AT_ONCE]
        texts = [render(tokenizer, trace.prompt, trace.completion, text_format) for trace in block]
        # verbose=False: the caller compares lengths with its rows and reports what is too long.
        whole = tokenizer(
            [text.text for text in texts], add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        prompts = tokenizer([text.prompt for text in texts], add_special_tokens=False, verbose=False)
        for index, (trace, text) in enumerate(zip(block, texts, strict=True)):
            yield _chain(
                tokenizer,
                trace,
                text,
                np.asarray(whole["input_ids"][index], np.int32),
                np.asarray(whole["offset_mapping"][index], np.int64).reshape(-1, 2),
                np.asarray(prompts["input_ids"][index], np.int32),
            )


def _chain(
    tokenizer: PreTrainedTokenizerBase,
    trace: Trace,
    text: Rendered,
    tokens: np.ndarray,
    offsets: np.ndarray,
    prompt_tokens: np.ndarray,
) -> EncodedChain:
    source, prompt_length = trace.source or "trace", len(prompt_tokens)
    _refuse_unknown(tokenizer, source, text.text, tokens, offsets)
    if not prompt_length:
        raise ValueError(f"{source}: the prompt {text.prompt!r} has no tokens")
    if not np.array_equal(tokens[:prompt_length], prompt_tokens):
        # Ids are compared, because the offsets of some tokenizers leave white space out.
        raise ValueError(
            f"{source}: the end of the prompt {text.prompt[-20:]!r} and the start of the completion "
            f"{text.completion[:20]!r} share a token, so a generation would start from other ids than training saw; "
            "move the white space between them to the other side (prompt_template / completion_prefix)"
        )
    base = len(text.prompt) + text.completion_offset
    last_characters = np.array([base + end - 1 for _, end in trace.spans], np.int64)
    boundaries = np.array([prompt_length - 1, *_covering_tokens(offsets, last_characters)], np.int32)
    if np.any(np.diff(boundaries) <= 0):
        raise ValueError(
            f"{source}: steps end on tokens {boundaries[1:].tolist()} after a prompt of {prompt_length} tokens; "
            "expected each step to end on a token of its own"
        )
    weights = np.zeros(len(tokens), np.float32)
    weights[prompt_length:] = 1.0
    return EncodedChain(tokens, prompt_length, boundaries, weights, trace.source)


def _covering_tokens(offsets: np.ndarray, characters: np.ndarray) -> list[int]:
    """For each character the index of the last token that covers it (one character can take several tokens)."""
    starts, ends = offsets[:, 0], offsets[:, 1]
    found = []
    for character in characters:
        index = int(np.searchsorted(starts, character, side="right")) - 1
        while index >= 0 and ends[index] <= character:  # some tokenizers have tokens of no width
            index -= 1
        assert index >= 0, (character, offsets)
        found.append(index)
    return found


def _refuse_unknown(
    tokenizer: PreTrainedTokenizerBase, source: str, text: str, tokens: np.ndarray, offsets: np.ndarray
) -> None:
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        return
    places = np.flatnonzero(tokens == unknown)
    if len(places):
        start, end = offsets[places[0]]
        raise ValueError(
            f"{source}: {len(places)} of {len(tokens)} tokens are unknown to the tokenizer "
            f"{tokenizer.name_or_path!r}, the first is {text[start:end]!r}; use the tokenizer that belongs to this text"
        )
