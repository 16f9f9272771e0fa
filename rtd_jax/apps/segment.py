"""Cuts the texts of any JSONL into steps with a boundary classifier and its teacher."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

from rtd_jax.base.files import check_writable, write_jsonl
from rtd_jax.base.settings import check_filled, check_ranges
from rtd_jax.base.sharding import MeshSettings, make_mesh
from rtd_jax.data.sources import SourceSettings, read_rows
from rtd_jax.data.trace import split_answer
from rtd_jax.models.open import FloatDtype, ModelSettings, open_model
from rtd_jax.steps.classifier import load_classifier
from rtd_jax.steps.detector import Detector


@dataclasses.dataclass(frozen=True)
class SegmentSettings:
    """Which texts are cut, and the classifier and teacher that cut them."""

    teacher: str  # Hugging Face folder or hub name; the one that the classifier was fitted to
    classifier: str  # folder that launch/boundaries.py wrote
    data: str  # .jsonl, .json or .parquet file, or hub name
    out: str = "runs/segments/steps.jsonl"  # stepwise JSONL
    split: str = "train"  # of a hub's data set
    text_field: str = "text"  # what is cut
    prompt_field: str = "prompt"  # what it answers; "" where rows have none
    param_dtype: FloatDtype = "float32"  # of the teacher's weights in memory
    compute_dtype: FloatDtype = "float32"  # of matrix products and hidden states
    batch_size: int = 16  # rows that the teacher reads at one time
    keep: str = "runs/steps"  # folder of the steps found so far, so that a killed run goes on; "" keeps nothing

    def __post_init__(self) -> None:
        check_filled(self, "teacher", "classifier", "data", "out", "text_field")
        check_ranges(self, batch_size="[1, 1e6]")


def segment(settings: SegmentSettings) -> Path:
    """Cuts every text into steps; writes one row each with `prompt`, `completions` and what else the row had.

    A last line `#### 72` is the answer's, and becomes `answer` where the row has none.

    Raises:
      ValueError: files, fields, teacher or classifier that cannot be used, with the way out.
    """
    out = Path(settings.out).expanduser()
    check_writable(out.parent)
    classifier = load_classifier(Path(settings.classifier))
    note = functools.partial(print, flush=True)
    runtime = ModelSettings(settings.teacher, settings.param_dtype, settings.compute_dtype)
    teacher = open_model(runtime, make_mesh(MeshSettings()), note)
    classifier.check_teacher(teacher.fingerprint, teacher.tokenizer_fingerprint, settings.teacher)
    rows = list(read_rows(SourceSettings("prose", settings.data, settings.split)))
    if not rows:
        raise ValueError(f"{settings.data} has no rows")
    texts, cut = [], []
    for place, row in rows:
        text, stated = split_answer(_field(row, settings.text_field, place, "text_field"))
        prompt = _field(row, settings.prompt_field, place, "prompt_field") if settings.prompt_field else ""
        if not text:
            raise ValueError(f"{place}: field {settings.text_field!r} has no reasoning in it; leave the row out")
        texts.append((prompt.strip(), text, place))
        kept = {key: value for key, value in row.items() if key not in (settings.text_field, settings.prompt_field)}
        cut.append(kept | {"prompt": prompt.strip(), "completions": []})
        if stated:
            cut[-1].setdefault("answer", stated)
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
    for row, (_, text, _), spans in zip(cut, texts, detector.find(texts), strict=True):
        row["completions"] = [text[start:end] for start, end in spans]
    write_jsonl(out, cut)
    note(f"{len(cut)} texts, {sum(len(row['completions']) for row in cut)} steps: {out}")
    return out


def _field(row: Any, name: str, place: str, setting: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise ValueError(
            f"{place}: field {name!r} is {value!r}; expected text. The row has {', '.join(sorted(row))}; "
            f"name the field with --{setting}"
        )
    return value
