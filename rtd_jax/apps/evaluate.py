"""Any Llama on GSM8K, MATH, StrategyQA, ARC or generated problems, by depth; or text that something else wrote."""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rtd_jax.apps.report.page import gap_lines, write_report
from rtd_jax.apps.report.tables import depth_table, group_table, percent, total_lines
from rtd_jax.base.console import print_table
from rtd_jax.base.files import check_writable, write_json, write_jsonl
from rtd_jax.base.settings import SEED, check_distinct, check_filled, check_ranges
from rtd_jax.base.sharding import row_sharding, row_ways
from rtd_jax.data.formats import render
from rtd_jax.data.schemas.arc import ChoiceQuestion
from rtd_jax.data.trace import Trace, answer_line
from rtd_jax.eval.chains import score_texts
from rtd_jax.eval.choices import choice_log_likelihoods, score_choices
from rtd_jax.eval.decoding import Sampling
from rtd_jax.eval.evaluate import ChainEvaluator, DecodingSettings, Progress
from rtd_jax.eval.metrics import MODEL_KEYS, make_report
from rtd_jax.eval.scored import Record
from rtd_jax.eval.scoring import ScoringSettings
from rtd_jax.eval.tasks import EXAMPLES_SEED, TASKS, Problems, load_problems
from rtd_jax.models.open import FloatDtype, WeightDtype
from rtd_jax.train.saved_models import LoadedModel, load_model

OPEN_FROM = 5  # depths 1, 2, 3, 4, 5+
SCORING_ROWS = 8  # of 512 tokens, read together on each device
NOTE_SECONDS = 10.0  # between two progress lines of one kind


@dataclasses.dataclass(frozen=True)
class EvaluateSettings:
    """What is evaluated on what."""

    model: tuple[str, ...] = ()  # Hugging Face folders, hub names, stage checkpoints, runs' folders; commas between
    tasks: tuple[str, ...] = ("gsm8k",)  # of gsm8k, math, strategyqa, arc_challenge, synthetic
    data_root: str = ""  # folder with gsm8k/test.jsonl and so on; "" is the hub
    generations: str = ""  # JSONL of texts to score in place of a model's
    out: str = "runs/evaluation"  # folder for the report
    limit: int = 0  # problems of each task, from the beginning; 0 takes all
    few_shot: int = -1  # solved examples before each problem; -1 takes the task's usual number
    few_shot_seed: int = EXAMPLES_SEED  # of the drawing of solved examples; lm-evaluation-harness has 1234
    levels: tuple[int, ...] = (3, 4, 5)  # of MATH, 1 to 5
    revision: str = ""  # commit, tag or branch of the data on the hub; "" takes the pinned ones
    chat: bool = False  # the tokenizer's chat template
    temperature: float = 0.0  # of decoding; 0 is greedy
    top_p: float = 1.0  # draw from the most probable tokens that together reach this
    samples: int = 1  # texts for each problem
    seed: int = 0  # of sampled decoding
    max_new_tokens: int = 256  # most tokens decoded for a problem
    batch_size: int = 32  # problems decoded at one time
    dtype: WeightDtype = "float32"  # of weights in memory; int8 is weight-only
    compute_dtype: FloatDtype = "float32"  # of products and hidden states

    def __post_init__(self) -> None:
        unknown = [task for task in self.tasks if task not in TASKS]
        if unknown or not self.tasks:
            raise ValueError(f"tasks are {self.tasks}; use some of {', '.join(TASKS)}")
        if bool(self.model) == bool(self.generations):
            raise ValueError("give either models (--model) or texts to score (--generations)")
        if len(set(self.model)) < len(self.model):
            raise ValueError(f"models are {self.model}; give each of them once")
        if self.samples > 1 and self.temperature <= 0:
            raise ValueError(f"samples is {self.samples} but decoding is greedy, so all are alike; set a temperature")
        check_ranges(self, limit="[0, 1e7]", few_shot="[-1, 1000]", few_shot_seed=SEED, levels="[1, 5]", seed=SEED)
        check_ranges(self, samples="[1, 1e4]", temperature="[0, 100]", top_p="(0, 1]")
        check_ranges(self, max_new_tokens="[1, 1e6]", batch_size="[1, 1e6]")
        check_distinct(self, "tasks", "levels")
        check_filled(self, "out", "levels")


def evaluate(settings: EvaluateSettings, note: Callable[[str], None] = print) -> Path:
    """Writes report.json, report.html, PNGs and generations.jsonl into `out`. Returns the path of report.json.

    Raises:
      ValueError: a model, data or texts that cannot be used, with the place and the way out.
    """
    out = Path(settings.out).expanduser()
    check_writable(out)
    sections: dict[str, dict[str, Any]] = {}
    protocol: dict[str, Any] = {}
    records: list[Record] = []
    if settings.generations:
        evaluations = _rescore(Path(settings.generations).expanduser())
    else:
        evaluations = _measure(settings, protocol, note)
    for task, name, evaluation, scored in evaluations:
        sections.setdefault(task, {})[name] = evaluation
        records += [{"model": name, "task": task, **record} for record in scored]
    names = {name for models in sections.values() for name in models}
    report = {
        "kind": "evaluation",
        "title": f"Evaluation of {', '.join(sorted(names))}",
        "settings": dataclasses.asdict(settings),
        "protocol": protocol,
        "sections": sections,
    }
    write_jsonl(out / "generations.jsonl", records)
    write_json(out / "report.json", report)
    write_report(out, report, records)
    for task, models in sections.items():
        _print(task, models)
    print(f"report: {out / 'report.html'}   {out / 'report.json'}")
    return out / "report.json"


Scores = tuple[dict[str, Any], list[Record]]  # a report of one model on one task, and its records


def _measure(
    settings: EvaluateSettings, protocol: dict[str, Any], note: Callable[[str], None]
) -> Iterator[tuple[str, str, *Scores]]:
    """(task, model, report, records), one model after the other, so that memory holds one at a time.

    Writes into `protocol` how each task is asked.
    """
    names: set[tuple[str, str]] = set()
    for path in settings.model:
        note(f"loading {path}")
        loaded = load_model(path, settings.dtype, settings.compute_dtype)
        for task in settings.tasks:
            problems = load_problems(
                task,
                data_root=settings.data_root,
                limit=settings.limit,
                few_shot=settings.few_shot,
                chat=settings.chat,
                levels=settings.levels if task == "math" else (),
                seed=settings.few_shot_seed,
                revision=settings.revision,
                trained_on=loaded.text,
            )
            name = path if (task, loaded.name) in names else loaded.name
            names.add((task, name))
            protocol[task] = problems.protocol
            measure = _choose if TASKS[task].is_choice else _solve
            yield task, name, *measure(settings, task, problems, loaded, note)


def _solve(
    settings: EvaluateSettings, task: str, problems: Problems, loaded: LoadedModel, note: Callable[[str], None]
) -> Scores:
    """Problems that are solved in steps: decoded freely, and their reference chains read."""
    traces = [item for item in problems.items if isinstance(item, Trace)]
    rendered = [
        render(loaded.tokenizer, trace.prompt, trace.completion, text, turns)
        for trace, text, turns in zip(traces, problems.texts, problems.turns, strict=True)
    ]
    evaluator = ChainEvaluator(
        loaded.tokenizer,
        problems.texts[0],
        DecodingSettings(
            settings.max_new_tokens,
            settings.batch_size,
            Sampling(settings.temperature, settings.top_p, settings.seed) if settings.temperature > 0 else None,
            settings.samples,
            TASKS[task].stops,
        ),
        ScoringSettings(batch_size=SCORING_ROWS * row_ways(loaded.mesh)),
        loaded.mesh,
        OPEN_FROM,
        problems.text_format,
    )
    return evaluator(
        loaded.model,
        loaded.params,
        traces,
        rendered,
        progress=_progress(note, f"{loaded.name}, {task}: %d of %d texts decoded"),
        scoring_progress=_progress(note, f"{loaded.name}, {task}: %d of %d reference chains read"),
    )


def _choose(
    settings: EvaluateSettings, task: str, problems: Problems, loaded: LoadedModel, note: Callable[[str], None]
) -> Scores:
    """Questions with choices: the log-likelihood of each choice's text."""
    questions = [item for item in problems.items if isinstance(item, ChoiceQuestion)]
    pairs = []
    for question, text, turns in zip(questions, problems.texts, problems.turns, strict=True):
        prompt = render(loaded.tokenizer, question.question, "", text, turns).prompt
        between = " " if text.kind == "plain" else ""  # a chat's turn begins without a space
        pairs.append((prompt, [between + choice for choice in question.choices]))
    log_likelihoods = choice_log_likelihoods(
        loaded.model,
        loaded.params,
        loaded.tokenizer,
        pairs,
        ScoringSettings(batch_size=SCORING_ROWS * row_ways(loaded.mesh)),
        batch_sharding=row_sharding(loaded.mesh),
        progress=_progress(note, f"{loaded.name}, {task}: %d of %d choices read"),
    )
    return score_choices(questions, log_likelihoods, problems.text_format)


def _progress(note: Callable[[str], None], line: str) -> Progress:
    """Lines of progress, at most one in `NOTE_SECONDS`; `line` holds %d twice, for what is done and for all."""
    last = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal last
        if done == total or time.monotonic() - last > NOTE_SECONDS:
            last = time.monotonic()
            note(line % (done, total))

    return progress


def _rescore(path: Path) -> Iterator[tuple[str, str, *Scores]]:
    """(task, model, report, records) of the rows of a JSONL file; records of this program give the whole report again.

    A row holds a text (prompt, reference, answer, text) or choices (prompt, choices, answer, log_likelihoods), and may
    name its model and task.
    """
    groups: dict[tuple[str, str], list[tuple[dict[str, Any], str]]] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    for number, line in enumerate(lines, start=1):
        place = f"{path}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{place}: damaged JSON ({error}); expected one JSON object a line") from error
        if not isinstance(row, dict):
            raise ValueError(f"{place}: {line[:60]!r} is no JSON object; expected one JSON object a line")
        groups.setdefault((row.get("task", ""), row.get("model", path.stem)), []).append((row, place))
    if not groups:
        raise ValueError(f"{path}: the file is empty; expected one JSON object a line")
    for (task, model), rows in groups.items():
        yield task, model, *(_rescore_choices if "choices" in rows[0][0] else _rescore_texts)(rows)


def _rescore_texts(rows: Sequence[tuple[dict[str, Any], str]]) -> Scores:
    problems: dict[Any, tuple[Trace, list[str], list[dict[str, Any]]]] = {}
    for row, place in rows:
        trace, text = _trace_and_text(row, place)
        _, texts, rows_of_problem = problems.setdefault(row.get("problem", trace.prompt), (trace, [], []))
        texts.append(text)
        rows_of_problem.append(row)
    traces, texts_of, rows_of = zip(*problems.values(), strict=True)
    finished = [[bool(row.get("finished", True)) for row in rows_of_problem] for rows_of_problem in rows_of]
    records = score_texts(traces, texts_of, finished)
    for record in records:
        row = rows_of[record["problem"]][record["sample"]]
        record |= {key: row[key] for key in MODEL_KEYS if key in row}
    return make_report(records, OPEN_FROM), records


def _rescore_choices(rows: Sequence[tuple[dict[str, Any], str]]) -> Scores:
    questions = []
    for row, place in rows:
        if not all(key in row for key in ("prompt", "choices", "answer", "log_likelihoods")):
            raise ValueError(f"{place}: a row of choices has prompt, choices, answer (an index) and log_likelihoods")
        questions.append(ChoiceQuestion(row["prompt"], tuple(row["choices"]), row["answer"], place))
    log_likelihoods = [row["log_likelihoods"] for row, _ in rows]
    return score_choices(questions, log_likelihoods, rows[0][0].get("text_format", ""))


def _trace_and_text(row: dict[str, Any], place: str) -> tuple[Trace, str]:
    """The problem of a row with its reference chain, and the text that was written for it."""
    missing = [key for key in ("prompt", "reference", "answer") if key not in row]
    if not ("text" in row or "completions" in row):
        missing.append("text")
    if missing:
        raise ValueError(
            f"{place}: {missing[0]!r} is missing; a row has prompt, reference (a list of steps), answer, and text (or "
            "completions, a list of steps, and final)"
        )
    answer = str(row["answer"])
    # MATH's reference states its answer in a box and has no line for it; that decides how its answers are read.
    in_box = any("\\boxed" in step or "\\fbox" in step for step in row["reference"])
    final = answer_line(answer) if answer and not in_box else ""
    text = row["text"] if "text" in row else "\n".join([*row["completions"], row.get("final", "")])
    trace = Trace.of_steps(row["prompt"], row["reference"], answer, final, place)
    return dataclasses.replace(trace, subject=row.get("subject", ""), level=row.get("level", 0)), text


def _print(task: str, models: dict[str, Any]) -> None:
    """Prints the tables of one task."""
    for name, evaluation in models.items():
        if "accuracy_norm" in evaluation:
            shares = f"acc {percent(evaluation['accuracy'])}, acc_norm {percent(evaluation['accuracy_norm'])}"
            print(f"{task}: {name}: {shares} % of {evaluation['questions']} questions (± one standard error)")
            continue
        print_table(f"{task or 'texts'}: {name} (± one standard error)", *depth_table(evaluation))
        for line in total_lines(evaluation):
            print(line)
        for kind, groups in evaluation.get("groups", {}).items():
            print_table(f"{task}: {name}, by {kind}", *group_table(kind, groups))
    for line in gap_lines(models, task):
        print(line)
