"""Chains that the student writes itself: drawn for training problems, with a boundary where each of their steps ends.

What is drawn depends on the run's key, the update and the student alone. So it is not in a checkpoint: a resumed run
draws it again, where new chains are due.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from rtd_jax.apps.distill.prepare import Experiment
from rtd_jax.base.sharding import row_sharding, row_ways, to_host
from rtd_jax.data.by_length import round_up
from rtd_jax.data.encoding import EncodedChain
from rtd_jax.data.formats import stop_token_ids
from rtd_jax.data.trace import Span, Trace, conclusion_of, is_answer_line
from rtd_jax.eval.decoding import GenerateSettings, Sampling, generate
from rtd_jax.eval.decoding.placement import for_writing
from rtd_jax.train.curriculum import Stage
from rtd_jax.train.splits import Chains
from rtd_jax.train.state import TrainState


class Drawn(NamedTuple):
    """Chains of a student, those of one update after the other until new ones are due, and numbers about them."""

    chains: list[Any]  # of each update, on the devices
    tokens: list[tuple[int, int]]  # of each update's chains over all hosts, (all, predicted); 0 where not counted
    means: dict[str, float]


# (state, stage) -> what was drawn
Sampler = Callable[[TrainState, Stage], Drawn]


@dataclass(frozen=True)
class Writer:
    """Lets the current student write."""

    experiment: Experiment
    settings: GenerateSettings

    @classmethod
    def of(cls, experiment: Experiment, max_new_tokens: int, batch_size: int, sampling: Sampling) -> "Writer":
        tokenizer = experiment.tokenizer
        settings = GenerateSettings(
            max_new_tokens=max_new_tokens,
            eos_ids=stop_token_ids(tokenizer, experiment.recipe.data.text),
            vocab_size=experiment.vocab_size,
            batch_size=round_up(batch_size, row_ways(experiment.mesh)),
            pad_id=tokenizer.pad_token_id or 0,
            sampling=sampling,
        )
        return cls(experiment, settings)

    def write(self, state: TrainState, prompts: Sequence[Sequence[int]], rng: np.random.Generator) -> list[list[int]]:
        """A drawn continuation of each prompt, without the id that ends it."""
        first = int(rng.integers(2**30))  # of the draws' streams; the seed stays, because it is compiled in
        student, params = for_writing(self.experiment.student, state.params["student"], self.experiment.mesh)
        return generate(
            student,
            params,
            prompts,
            self.settings,
            streams=[first + i for i in range(len(prompts))],
            batch_sharding=row_sharding(self.experiment.mesh),
        )

    def has_ended(self, written: Sequence[int]) -> bool:
        """Whether the student ended the text, or the limit on its length did."""
        return len(written) < self.settings.max_new_tokens


def rng_of(state: TrainState) -> np.random.Generator:
    """Random numbers of the update that comes next."""
    words = np.asarray(to_host(state.rng)).ravel().tolist()
    return np.random.default_rng([*words, int(state.step)])


def draw_problems(
    groups: Sequence[tuple[Chains, float]], count: int, rng: np.random.Generator
) -> list[tuple[EncodedChain, Trace]]:
    """`count` chains of the groups, group after group; how many of each is drawn by its share.

    No chain is drawn twice where its group has enough.
    """
    # From the last group to the first, whose number is what is left.
    counts = rng.multinomial(count, [share for _, share in reversed(groups)])[::-1]
    return [
        (chains.encoded[i], chains.traces[i])
        for (chains, _), number in zip(groups, counts, strict=True)
        for i in rng.choice(len(chains.encoded), number, replace=len(chains.encoded) < number)
    ]


def prompt_of(chain: EncodedChain) -> list[int]:
    """The token ids of a chain's problem."""
    return chain.tokens[: chain.prompt_length].tolist()


def texts_of(
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[Callable[[Sequence[int]], list[str]], Callable[[Sequence[int]], str]]:
    """(ids -> the text of each, ids -> the text of all), without special tokens."""

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=True))

    text_of = cache(lambda token: decode([token]))
    return (lambda ids: [text_of(token) for token in ids]), decode


def step_ends(texts: Sequence[str], has_ended: bool, *, with_answer: bool = False) -> tuple[list[int], bool]:
    """(the token at which each finished step ends, whether the last step is the answer line or ends in it).

    A step is a line that is not blank. The line of the answer ("####") ends the chain, and is a step only
    `with_answer`. The last line is finished where the student ended the text there. Two lines that end in one token are
    one step: a boundary has a token of its own.

    Args:
      texts: the text of each written id.
      has_ended: whether the student ended the text, or the limit on its length did.
    """
    place_of = places_of(texts)
    lines = "".join(texts).split("\n")
    ends, start, is_answer = [], 0, False
    for line in lines if has_ended else lines[:-1]:
        is_answer = is_answer_line(line.strip())
        if line.strip() and (with_answer or not is_answer):
            ends.append(place_of[start + len(line.rstrip()) - 1])
        if is_answer:
            break
        start += len(line) + 1
    return list(dict.fromkeys(ends)), is_answer and with_answer


def span_ends(texts: Sequence[str], spans: Sequence[Span], has_ended: bool) -> list[int]:
    """The token at which each step ends, given the steps' characters; the last one is finished if the text is."""
    place_of = places_of(texts)
    return list(dict.fromkeys(place_of[end - 1] for _, end in (spans if has_ended else spans[:-1])))


def places_of(texts: Sequence[str]) -> list[int]:
    """The token of each character."""
    return [place for place, text in enumerate(texts) for _ in text]


def step_texts(written: Sequence[int], ends: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[str]:
    """The text of each step: of its own tokens together, as a character may take several of them."""
    return [decode(written[start:end]).strip() for start, end in pairwise([0, *(end + 1 for end in ends)])]


def drawn_chain(
    prompt: Sequence[int],
    written: Sequence[int],
    ends: Sequence[int],
    row_length: int,
    max_steps: int,
    *,
    whole: bool = False,
    texts: Sequence[str] = (),
) -> EncodedChain:
    """What the student wrote, as a chain: its own ids, and a boundary at the end of each finished step.

    Loss weights are 1 on the tokens of finished steps, or on everything written; 0 on the prompt.

    Args:
      prompt, written: token ids; the text is not tokenised again, which might give others than the student chose.
      ends: the written tokens at which steps end, `step_ends`.
      row_length: tokens of a row; what is beyond is left out, and a step that ends there too.
      max_steps: later steps are left out.
      whole: whether all written tokens have weight.
      texts: of each written id, for the steps' conclusions; without them these are the steps' last tokens.
    """
    steps = [len(prompt) + end for end in ends if len(prompt) + end < row_length][:max_steps]
    tokens = np.asarray([*prompt, *written], np.int32)[:row_length]
    weights = np.zeros(len(tokens), np.float32)
    if whole or steps:
        weights[len(prompt) : None if whole else steps[-1] + 1] = 1.0
    boundaries = np.array([len(prompt) - 1, *steps], np.int32)
    conclusions = None
    if texts:
        conclusions = np.zeros(len(tokens), np.int32)
        for number, (before, end) in enumerate(pairwise(boundaries.tolist()), start=1):
            first = before + 1
            own = texts[first - len(prompt) : end + 1 - len(prompt)]
            conclusions[[first + token for token in concluding(own)]] = number
    return EncodedChain(tokens, len(prompt), boundaries, weights, "drawn", conclusions)


def concluding(texts: Sequence[str]) -> list[int]:
    """Which tokens of a step, given the text of each, state what comes out of it; the last where no text is left."""
    start, end = conclusion_of("".join(texts).rstrip() or " ")
    return list(dict.fromkeys(places_of(texts)[start:end])) or [len(texts) - 1]
