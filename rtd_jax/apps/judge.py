"""How well a judge of steps, by rules or served, agrees with people on solutions of ProcessBench's schema."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rtd_jax.base.console import print_table, printable
from rtd_jax.base.files import reading, write_json, write_jsonl
from rtd_jax.base.lock import one_writer
from rtd_jax.base.settings import SettingError, check_distinct, check_filled, check_ranges
from rtd_jax.data.rows import read_file
from rtd_jax.data.schemas.processbench import LabelledSolution, solution_from_processbench
from rtd_jax.data.sources import SourceSettings, load_traces
from rtd_jax.data.split_files import NoSplitError
from rtd_jax.data.trace import Trace, problem_key
from rtd_jax.eval.judge.judge import judge_steps
from rtd_jax.eval.judge.scores import agreement, score_verdicts
from rtd_jax.eval.judge.served import ServedJudgeFlags, ServedVerdict, Solution, ask_for_verdicts
from rtd_jax.eval.judge.verdicts import Judgement

JUDGES = ("rules", "openai")
SPLITS = ("test", "train")  # of the references; where a question is in both, the first counts


@dataclasses.dataclass(frozen=True)
class JudgeSettings(ServedJudgeFlags):
    """Which solutions are judged, by whom, and with which references."""

    data: str  # .jsonl, .json or .parquet file of ProcessBench's schema: problem, steps, label
    references: str = ""  # folder with gsm8k/test.jsonl and gsm8k/train.jsonl, joined by question; "" judges without
    out: str = "runs/judge"  # folder for the report, the verdicts and the log of a server's replies
    judge: tuple[str, ...] = ("rules",)  # rules (no model), openai (a served model), or both with a comma between
    limit: int = 0  # rows, from the beginning; 0 takes all

    def __post_init__(self) -> None:
        super().__post_init__()
        check_filled(self, "data", "out", "judge")
        if unknown := [name for name in self.judge if name not in JUDGES]:
            raise SettingError(f"judge is {unknown[0]!r}; expected one of {', '.join(JUDGES)}, or both with a comma")
        check_distinct(self, "judge")
        check_ranges(self, limit="[0, 1e9]")
        self.check_asked("openai" in self.judge)


@one_writer(lambda settings: settings.out, "--out")
def judge(settings: JudgeSettings) -> Path:
    """Writes verdicts.jsonl and report.json into `out`. Returns the path of report.json.

    Rows and references are read and checked before the first is judged. A server's replies are logged in `out` as they
    arrive, so that the same command, run again, asks only for those that are missing.

    Raises:
      ValueError: rows, references or a server that cannot be used, with the place and the way out.
    """
    out = Path(settings.out).expanduser()
    rows = _load(Path(settings.data).expanduser(), settings.limit)
    references = find_references(settings.references)
    joined = [references.get(problem_key(row.problem)) for row in rows]
    verdicts: dict[str, Sequence[Judgement | ServedVerdict]] = {}
    for name in settings.judge:
        if name == "rules":
            started = time.monotonic()
            verdicts[name] = [
                judge_steps(row.problem, row.steps, reference) for row, reference in zip(rows, joined, strict=True)
            ]
            print(f"{len(rows)} solutions judged by rules in {time.monotonic() - started:.1f} s", flush=True)
        else:
            solutions = [Solution(row.problem, row.steps, row.source) for row in rows]
            verdicts[name] = ask_for_verdicts(solutions, settings, out)
    report = _report(settings, rows, joined, verdicts)
    write_jsonl(out / "verdicts.jsonl", _lines(rows, joined, verdicts))
    write_json(out / "report.json", report)
    _print(report, out, rows, verdicts)
    return out / "report.json"


def _load(path: Path, limit: int) -> list[LabelledSolution]:
    rows: list[LabelledSolution] = []
    for place, row in read_file(path):
        rows.append(solution_from_processbench(row, place))
        if len(rows) == limit:
            break
    if not rows:
        raise ValueError(f"{path}: there is no row in it; expected at least one")
    return rows


def find_references(location: str) -> dict[str, Trace]:
    """The reference chains of GSM8K by `problem_key` of their questions; of its splits one may be missing."""
    if not location:
        return {}
    folder = Path(location).expanduser()
    with reading(folder, "give the folder that has gsm8k in it with --references"):
        folder.stat()
        folder = folder / "gsm8k" if (folder / "gsm8k").is_dir() else folder
    if not folder.is_dir():
        raise ValueError(f"{folder}: it is a file; give the folder that has gsm8k in it with --references")
    found: dict[str, Trace] = {}
    missing: list[NoSplitError] = []
    for split in SPLITS:
        try:
            traces = load_traces(SourceSettings("gsm8k", str(folder), split, subset="main"))
        except NoSplitError as error:
            missing.append(error)
            continue
        for trace in traces:
            found.setdefault(problem_key(trace.prompt), trace)
    if len(missing) == len(SPLITS):
        raise missing[0]
    return found


def _report(
    settings: JudgeSettings,
    rows: Sequence[LabelledSolution],
    joined: Sequence[Trace | None],
    verdicts: Mapping[str, Sequence[Judgement | ServedVerdict]],
) -> dict[str, Any]:
    """report.json: the first judge's scores, then each judge's, by generator too, and how two of them agree."""
    by_generator: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        by_generator.setdefault(row.generator or "unknown", []).append(i)

    def scores(name: str, chosen: Sequence[int]) -> dict[str, Any]:
        return score_verdicts(
            [rows[i].label for i in chosen],
            [verdicts[name][i].first_error for i in chosen],
            [problem_key(rows[i].problem) for i in chosen],
        )

    judges: dict[str, dict[str, Any]] = {}
    for name in settings.judge:
        generators = {generator: scores(name, chosen) for generator, chosen in sorted(by_generator.items())}
        judges[name] = {**scores(name, range(len(rows))), "by_generator": generators}
        replies = [verdict.outcome for verdict in verdicts[name] if isinstance(verdict, ServedVerdict)]
        if replies:
            outcomes = ("verdict", "unparsable", "unfinished", "refused")
            judges[name] |= {
                "model": settings.judge_model,
                "replies": {outcome: replies.count(outcome) for outcome in outcomes},
            }
    with_reference = sum(reference is not None for reference in joined)
    report = {
        "kind": "judge",
        "title": f"Judges of steps on {Path(settings.data).name}",
        "settings": dataclasses.asdict(settings),
        "judge": settings.judge[0],
        **judges[settings.judge[0]],
        "rows": len(rows),
        "with_reference": with_reference,
        "without_reference": len(rows) - with_reference,
        "judges": judges,
    }
    if len(settings.judge) > 1:
        first, second = ([verdict.first_error for verdict in verdicts[name]] for name in settings.judge)
        report["agreement"] = agreement(first, second, [problem_key(row.problem) for row in rows])
    return report


def _lines(
    rows: Sequence[LabelledSolution],
    joined: Sequence[Trace | None],
    verdicts: Mapping[str, Sequence[Judgement | ServedVerdict]],
) -> list[dict[str, Any]]:
    """verdicts.jsonl: one object for each row, in order."""

    def said(verdict: Judgement | ServedVerdict) -> dict[str, Any]:
        if isinstance(verdict, ServedVerdict):
            return {"first_error": verdict.first_error, "outcome": verdict.outcome, "request": verdict.request}
        return dataclasses.asdict(verdict)

    return [
        {
            "id": row.id,
            "generator": row.generator,
            "label": row.label,
            "final_answer_correct": row.final_answer_correct,
            "reference": reference.source if reference is not None else None,
            **{name: said(found[i]) for name, found in verdicts.items()},
        }
        for i, (row, reference) in enumerate(zip(rows, joined, strict=True))
    ]


def _print(
    report: Mapping[str, Any],
    out: Path,
    rows: Sequence[LabelledSolution],
    verdicts: Mapping[str, Sequence[Judgement | ServedVerdict]],
) -> None:
    columns = ("accuracy_right", "accuracy_wrong", "f1")
    for name, found in report["judges"].items():
        lines = [
            [generator, part["n_right"], part["n_wrong"], *(_cell(part, column) for column in columns)]
            for generator, part in {**found["by_generator"], "all": found}.items()
        ]
        who = f"{name}, {found['model']}" if "model" in found else name
        heads = ("generator", "right", "wrong", "right kept %", "first error found %", "F1")
        print_table(f"{who} against people (± one standard error)", heads, lines)
        if "replies" in found:
            print(", ".join(f"{outcome}: {count}" for outcome, count in found["replies"].items()))
    if "agreement" in report:
        found = report["agreement"]
        print(
            f"agreement of {' and '.join(report['judges'])} on {found['n']} rows: the same verdict "
            f"{_cell(found, 'same_verdict')} %, both right or both wrong {_cell(found, 'same_right')} %, kappa "
            f"{_cell(found, 'kappa', 2)}"
        )
    print(f"{report['with_reference']} of {report['rows']} rows have a reference")
    print(f"report: {out / 'report.json'}")
    first = report["judge"]
    others = [(row, found) for row, found in zip(rows, verdicts[first], strict=True) if row.label != found.first_error]
    if not others:
        print(f"next: {first} and people agree on every row; try harder solutions with --data")
        return
    row, found = others[0]
    said = "gives no verdict" if found.first_error is None else f"says {found.first_error}"
    print(
        f"next: read the {len(others)} rows of {out / 'verdicts.jsonl'} in which {first} and people differ; of the "
        f"first, {printable(row.id)}, people say {row.label}, and {first} {said}"
    )


def _cell(found: Mapping[str, Any], name: str, digits: int = 1) -> str:
    """A number with its standard error: "71.3 ± 2.1"; "–" where it was not measured."""
    value, stderr = found[name], found[f"{name}_stderr"]
    if value is None:
        return "–"
    return f"{value:.{digits}f}" + ("" if stderr is None else f" ± {stderr:.{digits}f}")
