"""Texts that a served model judged beside the rules: what it adds to a record."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rtd_jax.eval.judge.served import ServedJudgeFlags, Solution, ask_for_verdicts
from rtd_jax.eval.metrics import JUDGE_KEYS
from rtd_jax.eval.scored import Record


def verdict_fields(record: Mapping[str, Any], found: Mapping[str, Any]) -> Record:
    """What a verdict, the `JUDGE_KEYS` in `found`, says of a record; {} where it has none, or that of another text.

    judged_by: the model
    judged_text: digest of the text that it was given
    judged_first_error: the index of the first wrong step as in `chains.score_chain`; None: no verdict
    judged_steps: whether it found no wrong step
    judged: whether the chain is right: no wrong step was found, and the answer is right in any reading
    """
    if not all(key in found for key in JUDGE_KEYS) or found["judged_text"] != _digest(record):
        return {}
    no_wrong_step = found["judged_first_error"] == -1
    is_right = no_wrong_step and any(record[key] for key in ("answer_right", "answer_strict", "answer_flexible"))
    return {key: found[key] for key in JUDGE_KEYS} | {"judged_steps": no_wrong_step, "judged": is_right}


def add_verdicts(records: Sequence[Record], flags: ServedJudgeFlags, folder: Path) -> None:
    """Asks a served model for the first wrong step of each record's text, and adds `verdict_fields` to the records.

    It is given the steps that the record has, and the line that states the answer as the last of them. A text without
    a step has its first error there, and nothing is asked about it.

    Raises:
      ValueError: as `served.ask_for_verdicts`, whose log is in `folder`.
    """
    steps = [[*record["completions"], *filter(None, [record["final"]])] for record in records]
    solutions = [
        Solution(record["prompt"], own, _place(record)) for record, own in zip(records, steps, strict=True) if own
    ]
    verdicts = iter(ask_for_verdicts(solutions, flags, folder))
    for record, own in zip(records, steps, strict=True):
        first_error = next(verdicts).first_error if own else 0
        found = (flags.judge_model, _digest(record), first_error)
        record |= verdict_fields(record, dict(zip(JUDGE_KEYS, found, strict=True)))


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(record["text"].encode("utf-8", "replace")).hexdigest()[:16]


def _place(record: Mapping[str, Any]) -> str:
    """Which text a record is, in errors."""
    names = (record.get("task"), record.get("model"), f"problem {record['problem']}", f"sample {record['sample']}")
    return ", ".join(filter(None, names))
