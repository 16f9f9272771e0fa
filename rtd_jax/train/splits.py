"""The training and validation chains of a recipe, cut into steps and encoded."""

import functools
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
from rtd_jax.models.model import DecoderModel
from rtd_jax.models.open import OpenModel
from rtd_jax.steps.classifier import load_classifier
from rtd_jax.steps.detector import Detector
from rtd_jax.steps.select import classifier_folder, in_windows, recut, soft_of, stride_of
from rtd_jax.steps.soft import SoftWindows, behind_another_prompt
from rtd_jax.train.curriculum import CurriculumSettings, Stage, stages
from rtd_jax.train.recipe import DataSettings, Recipe


@dataclass(frozen=True)
class Chains:
    """The chains of a split that fit into a row, as traces and encoded, in the same order.

    The steps of the traces are those that a person or a classifier marked; they decide the depth. Random boundaries (a
    control) and windows, of so many tokens or soft ones, are in the encoded chains only.
    """

    traces: tuple[Trace, ...]
    encoded: tuple[EncodedChain, ...]
    too_long: int = 0  # chains left out, because they do not fit into a row
    longest: int = 0  # tokens of the longest chain, those left out included; 0 of a part of a split

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
    data: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    detector: Detector | None = None,
    windows: SoftWindows | None = None,
) -> tuple[Chains, Chains]:
    """The training and validation chains, encoded; cut by the detector before, or into soft windows afterwards."""
    assert (windows is not None) == bool(soft_of(data.segmentation)), data.segmentation
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
    train, validation = encode_split(traces, data, tokenizer), encode_split(held_out, data, tokenizer)
    if windows is None:
        return train, validation
    return (
        replace(train, encoded=tuple(windows.cut(train.encoded))),
        replace(validation, encoded=tuple(windows.cut(validation.encoded))),
    )


def encode_split(traces: Sequence[Trace], data: DataSettings, tokenizer: PreTrainedTokenizerBase) -> Chains:
    """Encodes traces and leaves out those longer than a row. Raises ValueError where they are too many."""
    encoded, report = encode_cut(
        tokenizer, traces, data, row_length=data.row_length, max_dropped_fraction=data.max_dropped_fraction
    )
    dropped = set(report.dropped)
    kept = tuple(trace for i, trace in enumerate(traces) if i not in dropped)
    return Chains(kept, tuple(encoded), len(dropped), report.longest)


def encode_cut(
    tokenizer: PreTrainedTokenizerBase,
    traces: Sequence[Trace],
    data: DataSettings,
    *,
    text: TextFormat | None = None,
    **options: Any,
) -> tuple[list[EncodedChain], EncodingReport]:
    """`encode_traces`, with the boundaries that `data.segmentation` names, and the recipe's form of text or another.

    But for soft windows, for which the teacher has to read what is encoded here: until then chains have their steps.
    """
    chosen, form = recut(traces, data.segmentation), data.text if text is None else text
    encoded, report = encode_traces(tokenizer, chosen, form, **options)
    stride = stride_of(data.segmentation)
    return in_windows(encoded, stride) if stride else encoded, report


def prefixed_chains(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, train: Sequence[Trace], held_out: Chains
) -> list[EncodedChain]:
    """The chains of `held_out` behind solved training examples, of any length: the other context of the calibration.

    The examples are the first of the training chains; a chain whose own problem is among them has the next one. Soft
    windows are those of the chain as it is, so that the same ones are compared.

    Raises:
      ValueError: there are not as many other problems among the training chains.
    """
    text, count, traces = recipe.data.text, recipe.curriculum.calibration_shots, held_out.traces
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
    return [
        encoded[i] if chain.places is None else behind_another_prompt(encoded[i], chain)
        for i, chain in enumerate(held_out.encoded)
    ]


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

    return Detector(
        classifier,
        teacher.tokenizer,
        teacher.mesh,
        functools.partial(_loaded, recipe, teacher),
        described=recipe.teacher.precision,
        folder=_steps_folder(recipe),
        note=teacher.note,
    )


def make_windows(recipe: Recipe, teacher: OpenModel) -> SoftWindows | None:
    """What cuts the recipe's chains into soft windows; None where they have steps, or windows of a fixed length.

    Raises:
      ValueError: the teacher's turns cannot be kept.
    """
    tokens = soft_of(recipe.data.segmentation)
    if not tokens:
        return None
    return SoftWindows(
        tokens,
        teacher.fingerprint,
        recipe.teacher.precision,
        teacher.mesh,
        functools.partial(_loaded, recipe, teacher),
        folder=_steps_folder(recipe),
        note=teacher.note,
    )


def _loaded(recipe: Recipe, teacher: OpenModel) -> tuple[DecoderModel, Params]:
    if recipe.teacher.cache and not teacher.is_loaded:
        teacher.note("some chains have not been cut yet, so the teacher is loaded in spite of its cache")
    return teacher.model, teacher.params


def _steps_folder(recipe: Recipe) -> Path | None:
    """Where steps and turns are kept. Raises ValueError where nothing can be written there."""
    if not recipe.data.steps_cache:
        return None
    folder = Path(recipe.data.steps_cache).expanduser()
    check_writable(folder, "--config.data.steps_cache")
    return folder
