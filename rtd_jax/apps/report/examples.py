"""Texts that a page shows in full: each step with its verdict, and beside a wrong step why it is wrong."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

EXAMPLES = 6  # texts that are chosen by themselves
SIGNS = {"right": "✓", "wrong": "✗", "open": "–"}  # a class of the page's style: its sign, beside the colour


@dataclass(frozen=True)
class Line:
    """A step or the answer line of a text."""

    text: str
    kind: str = ""  # a key of `SIGNS`; "" without a verdict, or "after", as `lines` says
    verdict: str = ""  # in words, with its sign
    reason: str = ""  # in words; "" where nothing is to say


def examples(records: Sequence[Mapping[str, Any]], show: Sequence[int] = ()) -> list[dict[str, Any]]:
    """All texts of the problems in `show`, then wrong chains of various depths, then right ones; each with its lines.

    Args:
      records: as `chains.score_texts` makes them, also those of earlier versions; records of choices are passed over.
      show: values of the records' `problem`.
    """
    written = [record for record in records if "first_error" in record]  # choices have no text
    asked = [record for problem in show for record in written if record.get("problem") == problem]
    wrong = sorted((r for r in written if r["first_error"] >= 0), key=lambda r: r["depth"])
    right = sorted((r for r in written if r["first_error"] < 0), key=lambda r: -r["depth"])
    spaced = [wrong[i * (len(wrong) - 1) // max(EXAMPLES - 3, 1)] for i in range(EXAMPLES - 2)] if wrong else []
    chosen = [*{id(r): r for r in spaced}.values(), *right][:EXAMPLES]
    shown = {id(r): r for r in [*asked, *chosen]}.values()
    return [{**r, "label": label(r), "lines": lines(r), "served": served_verdict(r)} for r in shown]


def label(record: Mapping[str, Any]) -> str:
    """Which text it is, and whether its chain is right: "gsm8k · problem 7 · student · 3 steps · wrong"."""
    problem = f"problem {record['problem']}" if "problem" in record else ""
    if record.get("sample"):
        problem += f", sample {record['sample']}"
    steps = f"{record['depth']} step{'' if record['depth'] == 1 else 's'}"
    standing = "right" if record["first_error"] < 0 else "wrong"
    if standing == "wrong" and record.get("answer_right"):
        standing += ", but the answer is right"
    return " · ".join(filter(None, [record.get("task"), problem, record.get("model"), steps, standing]))


def lines(record: Mapping[str, Any]) -> list[Line]:
    """The steps of a text and its answer line, as they are shown.

    Records of earlier versions say of no step but the first wrong one what it is; what follows it is "after".
    """
    texts = [*record["completions"]]
    if record["final"]:
        texts.append(record["final"])
    elif record["first_error"] == len(texts) or "verdicts" not in record:
        texts.append("(no answer line)")  # else the answer is judged with the last step
    return [_line(record, i, text) for i, text in enumerate(texts)]


def _line(record: Mapping[str, Any], i: int, text: str) -> Line:
    first = record["first_error"]
    is_answer = i == len(record["completions"]) and bool(record["final"])
    verdicts, reasons = record.get("verdicts", []), record.get("reasons", [])
    right = verdicts[i] if i < len(verdicts) else None
    if is_answer and right is None:
        right = record.get("answer_right")  # "#### 72" computes nothing, and is the answer
    reason = reasons[i] if i < len(reasons) else ""
    if right is not None or i == first:
        kind = "wrong" if i == first or not right else "right"
        what = f"{kind} answer" if is_answer else f"first {kind} step" if i == first else f"{kind} step"
        return Line(text, kind, f"{SIGNS[kind]} {what}", reason)
    if i < len(verdicts):
        return Line(text, "open", f"{SIGNS['open']} concludes nothing", reason)
    return Line(text, "after" if "verdicts" not in record and 0 <= first < i else "")


def served_verdict(record: Mapping[str, Any]) -> str:
    """What a served judge said of the text (see `judged_texts.verdict_fields`), in a sentence; "" without one."""
    if "judged_first_error" not in record:
        return ""
    first, name = record["judged_first_error"], f"Served judge {record.get('judged_by', '')}"
    if first is None:
        return f"{name}: no verdict."
    if first < 0:
        return f"{name}: no wrong step{'' if record.get('judged', True) else ', but the answer is wrong'}."
    if first >= len(record["completions"]):
        return f"{name}: the first wrong step is the answer."
    return f"{name}: the first wrong step is step {first + 1}."
