"""The training and validation chains of a recipe, cut into steps and encoded."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from rtd_jax.base.files import check_writable
from rtd_jax.base.types import Params
from rtd_jax.data.by_length import round_up
from rtd_jax.data.encoding import EncodedChain, EncodingReport, encode_traces
from rtd_jax.data.formats import TextFormat, solved_examples
from rtd_jax.data.sources import load_traces
from rtd_jax.data.trace import Trace, problem_key
from rtd_jax.models.model import LlamaModel
from rtd_jax.models.open import OpenModel
from rtd_jax.steps.classifier import load_classifier
from rtd_jax.steps.detector import Detector
from rtd_jax.steps.select import classifier_folder, in_windows, recut, stride_of
from rtd_jax.train.curriculum import CurriculumSettings, Stage, stages
from rtd_jax.train.recipe import DataSettings, Recipe


@dataclass(frozen=True)
class Chains:
    """The chains of a split that fit into a row, as traces and encoded, in the same order.

    The steps of the traces are those that a person or a classifier marked; they decide the depth. Random boundaries (a
    control) and windows of so many tokens are in the encoded chains only.
    """

    traces: tuple[Trace, ...]
    encoded: tuple[EncodedChain, ...]
    too_long: int = 0  # chains left out, because they do not fit into a row

    def of_stage(self, stage: Stage, limit: int | None = None) -> "Chains":
        """The chains whose depth belongs to a stage, or the first `limit` of them."""
        chosen = [i for i, trace in enumerate(self.traces) if stage.holds(trace.depth)][:limit]
        return self._only(chosen)

    def before(self, stage: Stage) -> "Chains":
        """The chains that are less deep than a stage's."""
        return self._only([i for i, trace in enumerate(self.traces) if trace.depth < stage.low])

    def mixture(self, stage: Stage, settings: CurriculumSettings) -> list[tuple["Chains", float]]:
        """The groups of chains that a stage trains on, its own first, and the share of the drawn chains of each.

        With `mixture="equal"` a group has the depths of one stage up to this one, in the data's own proportions where
        these are several, and every group the same share.
        """
        if settings.mixture == "equal":
            groups = [self.of_stage(other) for other in stages(settings)[stage.index :: -1]]
            return [(group, 1.0 / len(groups)) for group in groups]
        earlier = self.before(stage)
        replay = settings.replay if earlier.traces else 0.0
        own = (self.of_stage(stage), 1.0 - replay)
        return [own, (earlier, replay)] if replay else [own]

    def _only(self, chosen: Sequence[int]) -> "Chains":
        return Chains(tuple(self.traces[i] for i in chosen), tuple(self.encoded[i] for i in chosen))


def load_splits(
    data: DataSettings, tokenizer: PreTrainedTokenizerBase, detector: Detector | None = None
) -> tuple[Chains, Chains]:
    """The training and validation chains, cut by the detector if there is one, and encoded."""
    traces = load_traces(data.train)
    if data.validation is not None:
        held_out = load_traces(data.validation)
    else:
        # By a stable hash of the prompt, so that the split survives new rows and another order.
        groups: dict[bool, list[Trace]] = {True: [], False: []}
        for trace in traces:
            hashed = int.from_bytes(hashlib.sha256(trace.prompt.encode()).digest()[:8], "big") / 2**64
            groups[hashed < data.validation_fraction].append(trace)
        held_out, traces = groups[True], groups[False]
        if not held_out or not traces:
            raise ValueError(
                f"data.validation_fraction {data.validation_fraction} leaves {len(traces)} training and "
                f"{len(held_out)} validation traces; both need some"
            )
    if detector is not None:
        traces, held_out = detector.cut(traces), detector.cut(held_out)
    return encode_split(traces, data, tokenizer), encode_split(held_out, data, tokenizer)


def encode_split(traces: Sequence[Trace], data: DataSettings, tokenizer: PreTrainedTokenizerBase) -> Chains:
    """Encodes traces and leaves out those longer than a row. Raises ValueError where they are too many."""
    encoded, report = encode_cut(
        tokenizer, traces, data, row_length=data.row_length, max_dropped_fraction=data.max_dropped_fraction
    )
    dropped = set(report.dropped)
    kept = tuple(trace for i, trace in enumerate(traces) if i not in dropped)
    return Chains(kept, tuple(encoded), len(dropped))


def encode_cut(
    tokenizer: PreTrainedTokenizerBase,
    traces: Sequence[Trace],
    data: DataSettings,
    *,
    text: TextFormat | None = None,
    **options: Any,
) -> tuple[list[EncodedChain], EncodingReport]:
    """`encode_traces`, with the boundaries that `data.segmentation` names, and the recipe's form of text or another."""
    chosen, form = recut(traces, data.segmentation), data.text if text is None else text
    encoded, report = encode_traces(tokenizer, chosen, form, **options)
    stride = stride_of(data.segmentation)
    return in_windows(encoded, stride) if stride else encoded, report


def prefixed_chains(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, train: Sequence[Trace], traces: Sequence[Trace]
) -> list[EncodedChain]:
    """The chains of `traces` behind solved training examples, of any length: the other context of the calibration.

    The examples are the first of the training chains; a chain whose own problem is among them has the next one.

    Raises:
      ValueError: there are not as many other problems among the training chains.
    """
    text, count = recipe.data.text, recipe.curriculum.calibration_shots
    pool: dict[str, Trace] = {}  # one more than are needed: where a chain's own problem is among them, it is left out
    for shot in train:
        if len(pool) <= count:
            pool.setdefault(problem_key(shot.prompt), shot)
    groups: dict[tuple[str, ...], list[int]] = {}  # chains by their examples
    for i, trace in enumerate(traces):
        keys = tuple(key for key in pool if key != problem_key(trace.prompt))[:count]
        if len(keys) < count:
            raise ValueError(
                f"curriculum.calibration_shots is {count}, but the training data have {len(keys)} other problems than "
                f"that of {trace.source or 'a validation chain'}; lower it"
            )
        groups.setdefault(keys, []).append(i)
    encoded: dict[int, EncodedChain] = {}
    for keys, members in groups.items():
        context = solved_examples(text, [(pool[key].prompt, pool[key].completion) for key in keys])
        behind = replace(text, context=text.context + context)
        chosen = [traces[i] for i in members]
        chains, _ = encode_cut(tokenizer, chosen, recipe.data, text=behind, row_length=2**31 - 1)
        encoded |= zip(members, chains, strict=True)
    return [encoded[i] for i in range(len(traces))]


def row_length_of(chains: Sequence[EncodedChain]) -> int:
    """Tokens of a row that holds the longest of the chains, a multiple of 64."""
    return round_up(max(len(chain) for chain in chains), 64)


def make_detector(recipe: Recipe, teacher: OpenModel) -> Detector | None:
    """The detector that cuts the recipe's chains into steps; None where no classifier does.

    Raises:
      ValueError: the classifier is missing or damaged, or was fitted to another teacher; or steps cannot be kept.
    """
    folder = classifier_folder(recipe.data.segmentation)
    if folder is None:
        return None
    classifier = load_classifier(folder)
    name = f"the recipe's teacher {teacher.directory}"
    classifier.check_teacher(teacher.fingerprint, teacher.tokenizer_fingerprint, name)

    def load() -> tuple[LlamaModel, Params]:
        if recipe.teacher.cache and not teacher.is_loaded:
            teacher.note("some chains have not been cut yet, so the teacher is loaded in spite of its cache")
        return teacher.model, teacher.params

    steps = Path(recipe.data.steps_cache).expanduser() if recipe.data.steps_cache else None
    if steps is not None:
        check_writable(steps, "--config.data.steps_cache")
    return Detector(
        classifier,
        teacher.tokenizer,
        teacher.mesh,
        load,
        described=recipe.teacher.precision,
        folder=steps,
        note=teacher.note,
    )
