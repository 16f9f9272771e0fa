"""Cuts chains as a recipe's `data.segmentation` says, where no teacher is needed for it."""

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from rtd_jax.data.encoding import EncodedChain
from rtd_jax.data.trace import Span, Trace, spans_of

_CLASSIFIER, _STRIDE, _SOFT = "classifier:", "stride:", "soft:"


def recut(traces: Sequence[Trace], segmentation: str) -> list[Trace]:
    """The same chains with the steps that `segmentation` names.

    'annotated' leaves the steps that the data's schema gave: marked ones, or in `prose` those of its rules. 'random' is
    a control (see `random_spans`). 'classifier:<folder>' leaves the steps too: a classifier needs its teacher, so it
    has cut the chains before (see `steps/detector.py`). So do 'stride:<tokens>' and 'soft:<tokens>', which cut what is
    encoded (`in_windows`, `steps/soft.py`).

    Raises:
      ValueError: there is no such segmentation.
    """
    if segmentation == "random":
        return [replace(trace, spans=random_spans(trace)) for trace in traces]
    if segmentation == "annotated" or is_windows(segmentation) or classifier_folder(segmentation) is not None:
        return list(traces)
    raise ValueError(
        f"data.segmentation is {segmentation!r}; use 'annotated', 'random', 'stride:<tokens>', 'soft:<tokens>' or "
        "'classifier:<folder>'"
    )


def random_spans(trace: Trace) -> tuple[Span, ...]:
    """As many spans as the trace has steps, ending after random words.

    A control for the question whether it is the *steps* that help, or boundaries at any place. No boundary is right by
    chance, unless the steps have too few words for that. The same trace gets the same spans in every run and on every
    machine. Words after the last span are in none.
    """
    right = {end for _, end in trace.spans}
    ends = [match.end() for match in re.finditer(r"\S+", trace.body[: trace.spans[-1][1]])]
    wrong = [end for end in ends if end not in right]
    if len(wrong) < trace.depth:  # the steps are short: some boundaries have to be right
        wrong = ends
    assert len(wrong) >= trace.depth, trace  # every step ends with a word of its own
    digest = hashlib.sha256(f"{trace.prompt}\0{trace.completion}".encode()).digest()
    chosen = sorted(random.Random(int.from_bytes(digest)).sample(wrong, trace.depth))
    return spans_of(trace.body[: chosen[-1]], chosen)


def stride_of(segmentation: str) -> int:
    """The tokens of a window of a fixed length that a segmentation names; 0 for a segmentation without such windows.

    Raises:
      ValueError: it names no number of tokens.
    """
    return _tokens_of(_STRIDE, segmentation)


def soft_of(segmentation: str) -> int:
    """The tokens that a soft window has on average, as a segmentation names them; 0 for one without soft windows.

    Raises:
      ValueError: it names no number of tokens.
    """
    return _tokens_of(_SOFT, segmentation)


def is_windows(segmentation: str) -> bool:
    """Whether chains are cut into windows, which are no steps. Raises ValueError where no number of tokens is named."""
    return bool(stride_of(segmentation) or soft_of(segmentation))


def reads_teacher(segmentation: str) -> bool:
    """Whether the teacher has to read the chains before they are cut. What it found is kept in `data.steps_cache`."""
    return segmentation.startswith((_CLASSIFIER, _SOFT))


def _tokens_of(kind: str, segmentation: str) -> int:
    if not segmentation.startswith(kind):
        return 0
    tokens = segmentation.removeprefix(kind)
    if not re.fullmatch(r"[1-9]\d{0,5}", tokens):
        raise ValueError(f"segmentation is {segmentation!r}; say how many tokens a window has, e.g. '{kind}16'")
    return int(tokens)


def in_windows(chains: Sequence[EncodedChain], stride: int) -> list[EncodedChain]:
    """The chains with a boundary after every `stride` tokens of the completion, and at its last, in place of steps.

    Trajectories without step detection: nothing of what the text says decides where a boundary is. A window's
    conclusion is its last token.
    """
    return [
        replace(
            chain, boundaries=window_ends(chain.prompt_length, len(chain), stride).astype(np.int32), conclusions=None
        )
        for chain in chains
    ]


def window_ends(prompt_length: int, length: int, stride: int) -> np.ndarray:
    """The last token of the prompt and of each window behind it, of a chain of `length` tokens."""
    ends = np.arange(prompt_length - 1, length, stride)
    return ends if ends[-1] == length - 1 else np.append(ends, length - 1)


def classifier_folder(segmentation: str) -> Path | None:
    """The folder of the boundary classifier that a segmentation names; None for a segmentation without one.

    Raises:
      ValueError: the name of the folder is missing.
    """
    if not segmentation.startswith(_CLASSIFIER):
        return None
    folder = segmentation.removeprefix(_CLASSIFIER)
    if not folder:
        raise ValueError(
            f"segmentation is {segmentation!r}; say which classifier, e.g. 'classifier:rtd_jax/bundled/tiny_boundaries'"
        )
    return Path(folder).expanduser()
