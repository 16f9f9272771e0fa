"""Cuts chains into steps with a boundary classifier: the teacher reads them, and the head says where steps end.

One compiled program takes a batch of texts and gives their boundaries, so hidden states never leave the device. The
steps are kept on disk, because a data set is cut once and then read by every run.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from rtd_jax.base.files import read_json, write_record
from rtd_jax.base.records import load_record, shaped
from rtd_jax.base.sharding import put_same, row_sharding
from rtd_jax.base.types import Array, Params
from rtd_jax.data.by_length import LengthBatch
from rtd_jax.data.trace import Span, Trace, check_spans, spans_of
from rtd_jax.models.model import DecoderModel
from rtd_jax.steps.classifier import BoundaryClassifier, find_boundaries
from rtd_jax.steps.prose import Reading, read, unmarked
from rtd_jax.steps.token_states import run_on_readings, unit_states

FORMAT = 1  # of a file of steps; an earlier version wrote the list of spans alone
SHARD = 256  # texts whose steps lie in one file: as many as are cut again at most, if a run is killed


@dataclass(frozen=True, eq=False)
class Detector:
    """A boundary classifier, and a way to get the teacher whose states it reads.

    Attributes:
      teacher: () -> (model, params); called only when the steps of some chain are not on disk yet.
      described: the dtypes of the teacher's weights and arithmetic, which decide what it computes.
      folder: where found steps are kept; None keeps none.
      batch_size: rows at one time, rounded up to the devices.
    """

    classifier: BoundaryClassifier
    tokenizer: PreTrainedTokenizerBase
    mesh: Mesh
    teacher: Callable[[], tuple[DecoderModel, Params]]
    described: str = ""
    folder: Path | None = None
    batch_size: int = 16
    note: Callable[[str], None] = print

    def cut(self, traces: Sequence[Trace]) -> list[Trace]:
        """The same chains with the steps that the classifier finds. Their text stays as it is, line ends included.

        Raises:
          ValueError: the steps that are kept on disk are damaged.
        """
        spans_of_traces = self.find([(trace.prompt, trace.body, trace.source) for trace in traces])
        return [replace(trace, spans=spans) for trace, spans in zip(traces, spans_of_traces, strict=True)]

    def find(self, texts: Sequence[tuple[str, str, str]]) -> list[tuple[Span, ...]]:
        """The steps of each (prompt, text, source), in characters of the text.

        Texts are read in shards; the steps of each shard are kept on disk, and a line of progress is printed.

        Raises:
          ValueError: a text is blank, or the steps that are kept on disk are damaged.
        """
        steps: list[tuple[Span, ...]] = []
        for start in range(0, len(texts), SHARD):
            steps += self._find_or_read(texts[start : start + SHARD])
            if len(texts) > SHARD:
                self.note(f"steps of {len(steps)} of {len(texts)} texts are found")
        return steps

    def _find_or_read(self, texts: Sequence[tuple[str, str, str]]) -> list[tuple[Span, ...]]:
        if self.folder is None:
            return self._find(texts)
        digest = hashlib.sha256(f"{self.classifier.fingerprint}:{self.described}".encode())
        for prompt, text, _ in texts:
            digest.update(f"{len(prompt)}:{len(text)}:{prompt}{text}".encode())
        path = self.folder / f"{digest.hexdigest()[:32]}.json"
        if path.exists():
            return _kept(path, digest.hexdigest(), texts)
        if jax.process_count() > 1:
            raise ValueError(
                f"{self.folder} does not have the steps of these chains, and {jax.process_count()} processes cannot "
                "share finding them: run launch/cache_teacher.py, or launch/segment.py, with one process first"
            )
        steps = self._find(texts)
        write_record(path, FORMAT, {"texts": digest.hexdigest(), "spans": steps})
        return steps

    def _find(self, texts: Sequence[tuple[str, str, str]]) -> list[tuple[Span, ...]]:
        proses = [unmarked(text) for _, text, _ in texts]
        readings = [
            read(self.tokenizer, prompt, prose.text, self.classifier.text, source=source)
            for (prompt, _, source), prose in zip(texts, proses, strict=True)
        ]
        steps = []
        for (_, text, _), prose, reading, ends_T in zip(texts, proses, readings, self.detect(readings), strict=True):
            ends = prose.origin[reading.ends_T[ends_T] - 1] + 1  # after the step's last character
            # A mark that was taken away from the end of a word ("24<<48/2=24>>") belongs to the word.
            steps.append(spans_of(text, [int(end) + len(re.split(r"\s", text[end:], maxsplit=1)[0]) for end in ends]))
        return steps

    def detect(self, readings: Sequence[Reading]) -> list[np.ndarray]:
        """Whether a step ends at each of the texts' own tokens: bool [T] each."""
        model, params = self.teacher()

        def boundaries_of(batch: LengthBatch) -> Array:
            parts_BL = batch.mask_BL.astype(np.int32)
            candidates_BL = np.zeros(parts_BL.shape, bool)
            for row, i in enumerate(batch.indices):
                own = slice(readings[i].prompt_length, len(readings[i].tokens_L))
                parts_BL[row, own] = 2
                candidates_BL[row, own] = readings[i].candidates_T
            placed = put_same((batch.tokens_BL, parts_BL, candidates_BL), row_sharding(self.mesh))
            return detect_batch(self.classifier, model, params, *placed)

        return run_on_readings(boundaries_of, readings, self.mesh, self.batch_size)


@dataclass(frozen=True)
class _Kept:
    """Content of a file of steps."""

    texts: str  # digest of the texts, of the classifier and of its teacher's dtypes
    spans: tuple[tuple[tuple[int, int], ...], ...]  # of each text

    def __post_init__(self) -> None:
        if any(len(span) != 2 for spans in self.spans for span in spans):
            raise ValueError("a span has not two ends")


def _kept(path: Path, digest: str, texts: Sequence[tuple[str, str, str]]) -> list[tuple[Span, ...]]:
    """The steps in a file. Raises ValueError where it is damaged, or holds those of other texts."""
    way_out = "delete it, and the steps are found and written again"
    content = read_json(path, way_out)
    if isinstance(content, list):
        kept = shaped(_Kept, {"texts": digest, "spans": content}, path, way_out)
    else:
        kept = load_record(_Kept, path, FORMAT, way_out)
    if kept.texts != digest or len(kept.spans) != len(texts):
        raise ValueError(f"{path} holds the steps of {len(kept.spans)} other texts than these {len(texts)}; {way_out}")
    for spans, (_, text, source) in zip(kept.spans, texts, strict=True):
        try:
            check_spans(spans, text, source)
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}; {way_out}") from error
    return list(kept.spans)


def detect_batch(
    classifier: BoundaryClassifier,
    model: DecoderModel,
    params: Params,
    tokens_BL: Array,
    parts_BL: Array,
    candidates_BL: Array,
) -> jax.Array:
    """Where steps end, by one forward pass of the teacher and the head. bool [B, L].

    Args:
      tokens_BL: int32, one text after its prompt a row.
      parts_BL: int32, 0 padding, 1 the prompt, 2 the text.
      candidates_BL: bool, the tokens at which a step may end.
    """
    states_BLND = unit_states(model, classifier.layers, params, tokens_BL, parts_BL > 0)
    return find_boundaries(classifier, states_BLND, candidates_BL, jnp.where(parts_BL == 2, 2, 0))
