"""Cuts the texts of any JSONL into steps, with a boundary classifier and its teacher or by rules."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rtd_jax.base.files import check_writable, write_jsonl
from rtd_jax.base.settings import SettingError, check_filled, check_ranges
from rtd_jax.base.sharding import MeshSettings, make_mesh
from rtd_jax.data.prose import prose_steps
from rtd_jax.data.schemas.schema import answer_field, fields_of, one_line, shown
from rtd_jax.data.sources import SourceSettings, read_rows
from rtd_jax.data.trace import split_answer
from rtd_jax.models.open import FloatDtype, ModelSettings, open_model
from rtd_jax.steps.classifier import load_classifier
from rtd_jax.steps.detector import Detector


@dataclasses.dataclass(frozen=True)
class SegmentSettings:
    """Which texts are cut, and what cuts them: a classifier with its teacher, or rules, which need neither."""

    teacher: str = ""  # Hugging Face folder or hub name (NAME@REVISION too); the one that the classifier was fitted to
    classifier: str = ""  # folder that launch/boundaries.py wrote
    data: str = ""  # .jsonl, .json or .parquet file, or hub name
    out: str = "runs/segments/steps.jsonl"  # stepwise JSONL
    split: str = "train"  # of a hub's data set
    text_field: str = "text"  # what is cut
    prompt_field: str = "prompt"  # what it answers; "" where rows have none
    param_dtype: FloatDtype = "float32"  # of the teacher's weights in memory
    compute_dtype: FloatDtype = "float32"  # of matrix products and hidden states
    batch_size: int = 16  # rows that the teacher reads at one time
    keep: str = "runs/steps"  # folder of the steps found so far, so that a killed run goes on; "" keeps nothing
    rules: Literal["", "prose"] = ""  # prose: cut by the rules of data/prose.py, without a teacher and a classifier

    def __post_init__(self) -> None:
        check_filled(self, "data", "out", "text_field")
        models = {"teacher": self.teacher, "classifier": self.classifier}
        if given := [name for name, value in models.items() if value and self.rules]:
            raise SettingError(f"rules is {self.rules!r}, which reads no {given[0]}; leave out --rules or --{given[0]}")
        if missing := [name for name, value in models.items() if not value and not self.rules]:
            raise SettingError(
                f"{missing[0]} is empty; give --teacher and the --classifier that was fitted to it, or cut by rules "
                "with --rules=prose"
            )
        check_ranges(self, batch_size="[1, 1e6]")


def segment(settings: SegmentSettings) -> Path:
    """Cuts every text into steps; writes one row each with `prompt`, `completions` and what else the row had.

    A last line `#### 72` is the answer's, and becomes `answer` where the row has none. All rows are read and checked
    before the first text is cut. Steps that rules find are written on one line each, as `stepwise` reads them back.

    Raises:
      ValueError: files, fields, teacher or classifier that cannot be used, with the way out.
    """
    out = Path(settings.out).expanduser()
    check_writable(out.parent)
    if out.is_dir():
        raise ValueError(f"{out} is a folder; give the name of a file with --out")
    find = _by_rules if settings.rules else _by_classifier(settings)
    texts, cut = [], []
    for place, row in read_rows(SourceSettings("prose", settings.data, settings.split)):
        text, stated = split_answer(_field(row, settings.text_field, place, "text_field"))
        prompt = _field(row, settings.prompt_field, place, "prompt_field") if settings.prompt_field else ""
        if not text:
            raise ValueError(f"{place}: field {settings.text_field!r} has no reasoning in it; leave the row out")
        texts.append((prompt.strip(), text, place))
        kept = {key: value for key, value in row.items() if key not in (settings.text_field, settings.prompt_field)}
        _check_kept(kept, place)
        cut.append(kept | {"prompt": prompt.strip(), "completions": []})
        if stated and not answer_field(row, place):
            cut[-1]["answer"] = stated
    for row, steps in zip(cut, find(texts), strict=True):
        row["completions"] = steps
    write_jsonl(out, cut)
    print(f"{len(cut)} texts, {sum(len(row['completions']) for row in cut)} steps: {out}", flush=True)
    return out


_Text = tuple[str, str, str]  # prompt, text, place


def _by_rules(texts: Sequence[_Text]) -> list[list[str]]:
    return [[one_line(text[start:end]) for start, end in prose_steps(text)] for _, text, _ in texts]


def _by_classifier(settings: SegmentSettings) -> Callable[[Sequence[_Text]], list[list[str]]]:
    """What cuts texts with the classifier. Raises ValueError where it or its teacher cannot be used."""
    classifier = load_classifier(Path(settings.classifier))
    note = functools.partial(print, flush=True)
    runtime = ModelSettings(settings.teacher, settings.param_dtype, settings.compute_dtype)
    teacher = open_model(runtime, make_mesh(MeshSettings()), note)
    classifier.check_teacher(teacher.fingerprint, teacher.tokenizer_fingerprint, settings.teacher)

    def cut(texts: Sequence[_Text]) -> list[list[str]]:
        detector = Detector(
            classifier,
            teacher.tokenizer,
            teacher.mesh,
            lambda: (teacher.model, teacher.params),
            described=runtime.precision,
            folder=Path(settings.keep).expanduser() if settings.keep else None,
            batch_size=settings.batch_size,
            note=note,
        )
        found = detector.find(texts)
        return [[text[start:end] for start, end in spans] for (_, text, _), spans in zip(texts, found, strict=True)]

    return cut


def _field(row: Any, name: str, place: str, setting: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise ValueError(
            f"{place}: field {name!r} is {shown(value)}; expected text. The row has {fields_of(row)}; "
            f"name the field with --{setting}"
        )
    return value


def _check_kept(kept: Mapping[str, Any], place: str) -> None:
    """Refuses fields that cannot be written as JSON, or that would mean something else in a row of found steps."""
    for name, value in kept.items():
        if name in ("completions", "labels") and value is not None:
            raise ValueError(
                f"{place}: the row has a field {name!r}, which belongs to steps that it had before; rename or remove it"
            )
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"{place}: field {name!r} is {shown(value)}, which cannot be written as JSON ({error}); write it as "
                "text, or leave the field out"
            ) from error
