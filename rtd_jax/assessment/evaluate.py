"""Any Llama on GSM8K, MATH, StrategyQA or generated problems, by reasoning depth; or text that something else wrote."""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from rtd_jax.assessment.models import Dtype, load_model
from rtd_jax.common.files import check_writable, write_json, write_jsonl
from rtd_jax.common.sharding import row_sharding, row_ways
from rtd_jax.data.formats import TextFormat, render, solved_examples, stop_token_ids
from rtd_jax.data.sources import SourceSettings, load_traces
from rtd_jax.data.traces import Trace
from rtd_jax.evaluation.evaluate import Record, evaluate_model, score_texts
from rtd_jax.generation.decode import Sampling
from rtd_jax.reporting.page import gap_lines, percent, write_report
from rtd_jax.training.display import print_table

OPEN_FROM = 5  # depths 1, 2, 3, 4, 5+
# Prompts and stop texts as lm-evaluation-harness has them (gsm8k.yaml, minerva_math); StrategyQA is written alike.
PROMPTS = {"math": "Problem:\n{prompt}\n\nSolution:"}
STOPS = {"gsm8k": ("Question:", "</s>", "<|im_end|>"), "math": ("Problem:",), "strategyqa": ("Question:",)}
HUB = {"gsm8k": ("openai/gsm8k", "main", "test", "train"), "strategyqa": ("", "", "train", "train")}
SHOTS = {"gsm8k": 5, "math": 4, "strategyqa": 5, "synthetic": 0}


@dataclasses.dataclass(frozen=True)
class EvaluateSettings:
    """What is evaluated on what. `few_shot` -1 takes the task's usual number."""

    model: str = ""  # Hugging Face folder, hub name, stage checkpoint or a run's folder
    tasks: tuple[str, ...] = ("gsm8k",)
    data_root: str = ""  # folder with gsm8k/test.jsonl and so on; "" is the hub
    generations: str = ""  # JSONL of texts to score in place of a model's
    out: str = "runs/evaluation"
    limit: int = 0  # problems of each task; 0 takes all
    few_shot: int = -1  # solved examples before each problem, the first of the training split
    chat: bool = False  # the tokenizer's chat template
    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0
    samples: int = 1  # of each problem
    seed: int = 0
    max_new_tokens: int = 256
    batch_size: int = 32
    dtype: Dtype = "float32"
    compute_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        unknown = [task for task in self.tasks if task not in SHOTS]
        if unknown or not self.tasks:
            raise ValueError(f"tasks are {self.tasks}; use some of {', '.join(SHOTS)}")
        if bool(self.model) == bool(self.generations):
            raise ValueError("give either a model (--model) or texts to score (--generations)")
        if self.samples > 1 and self.temperature <= 0:
            raise ValueError(f"samples is {self.samples} but decoding is greedy, so all are alike; set a temperature")


def evaluate(settings: EvaluateSettings, note: Callable[[str], None] = print) -> Path:
    """Writes report.json, report.html, PNGs and generations.jsonl into `out`. Returns the path of report.json.

    Raises:
      ValueError: a model, data or texts that cannot be used, with the place and the way out.
    """
    out = Path(settings.out).expanduser()
    check_writable(out)
    sections, records = _rescored(settings) if settings.generations else _measured(settings, note)
    name = settings.model or settings.generations
    report = {
        "kind": "evaluation",
        "title": f"Evaluation of {name}",
        "settings": dataclasses.asdict(settings),
        "sections": sections,
    }
    write_jsonl(out / "generations.jsonl", records)
    write_json(out / "report.json", report)
    write_report(out, report, records)
    for task, models in sections.items():
        _print(task, models)
    print(f"report: {out / 'report.html'}   {out / 'report.json'}")
    return out / "report.json"


def _measured(settings: EvaluateSettings, note: Callable[[str], None]) -> tuple[dict[str, Any], list[Record]]:
    loaded = load_model(settings.model, settings.dtype, settings.compute_dtype)
    sampling = Sampling(settings.temperature, settings.top_p, settings.seed) if settings.temperature > 0 else None
    ways = row_ways(loaded.mesh)
    sections: dict[str, Any] = {}
    records: list[Record] = []
    for task in settings.tasks:
        traces, text, shots = _problems(task, settings, loaded.text)

        def rendered(trace: Trace, text: TextFormat = text) -> Any:
            return render(loaded.tokenizer, trace.prompt, trace.completion, text)

        report, found = evaluate_model(
            loaded.model,
            loaded.params,
            loaded.tokenizer,
            traces,
            render=rendered,
            stop_ids=stop_token_ids(loaded.tokenizer, text),
            max_new_tokens=settings.max_new_tokens,
            text_format=f"{text.kind}, {shots}-shot",
            stop_texts=STOPS.get(task, ()),
            sampling=sampling,
            samples=settings.samples,
            open_from=OPEN_FROM,
            batch_size=-(-settings.batch_size // ways) * ways,
            scoring_batch_size=ways,
            batch_sharding=row_sharding(loaded.mesh),
            progress=functools.partial(_progress, note, task),
        )
        sections[task] = {loaded.name: report.to_dict()}
        records += [{"model": loaded.name, "task": task, **record} for record in found]
    return sections, records


def _progress(note: Callable[[str], None], task: str, done: int, total: int) -> None:
    note(f"{task}: {done} of {total} texts decoded")


def _problems(
    task: str, settings: EvaluateSettings, trained_on: TextFormat | None
) -> tuple[list[Trace], TextFormat, int]:
    """Problems, their text form with the solved examples in it, and how many of these there are."""
    shots = SHOTS[task] if settings.few_shot < 0 else settings.few_shot
    text = TextFormat("chat" if settings.chat else "plain", PROMPTS.get(task, "Question: {prompt}\nAnswer:"))
    if task == "synthetic":
        text = trained_on or text
        problems = load_traces(SourceSettings("synthetic", split="test", limit=settings.limit or 600))
        examples = load_traces(SourceSettings("synthetic", split="train", limit=shots)) if shots else []
    else:
        problems, examples = _split(task, settings, shots)
    context = solved_examples(text, [(trace.prompt, trace.completion) for trace in examples])
    return problems, dataclasses.replace(text, context=context), shots


def _split(task: str, settings: EvaluateSettings, shots: int) -> tuple[list[Trace], list[Trace]]:
    location, subset, test, train = HUB.get(task, ("", "", "test", "train"))
    if settings.data_root:
        location, subset = str(Path(settings.data_root).expanduser() / task), ""
    if not location:
        raise ValueError(f"{task} needs --data_root=<folder>, with {task}/{test}.jsonl in it")
    same = test == train  # then the examples are the first rows, and are not asked again
    limit = settings.limit + shots if settings.limit and same else settings.limit
    problems = load_traces(SourceSettings(task, location, test, subset, limit=limit))
    if same:
        return problems[shots:], problems[:shots]
    return problems, load_traces(SourceSettings(task, location, train, subset, limit=shots)) if shots else []


def _rescored(settings: EvaluateSettings) -> tuple[dict[str, Any], list[Record]]:
    """Scores of texts in a JSONL file: prompt, reference (steps), answer, and text or completions; and model, task."""
    path = Path(settings.generations).expanduser()
    groups: dict[tuple[str, str], dict[str, tuple[Trace, list[str], list[bool]]]] = {}
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
        trace, text = _row(row, place)
        group = groups.setdefault((row.get("task", ""), row.get("model", path.stem)), {})
        _, of_problem, finished = group.setdefault(trace.prompt, (trace, [], []))
        of_problem.append(text)
        finished.append(bool(row.get("finished", True)))
    sections: dict[str, Any] = {}
    records: list[Record] = []
    for (task, model), group in groups.items():
        traces, texts, done = zip(*group.values(), strict=True)
        scores, found = score_texts(traces, texts, done, open_from=OPEN_FROM)
        sections.setdefault(task, {})[model] = dataclasses.asdict(scores)
        records += [{"model": model, "task": task, **record} for record in found]
    return sections, records


def _row(row: Any, place: str) -> tuple[Trace, str]:
    missing = [key for key in ("prompt", "reference", "answer") if not isinstance(row, dict) or key not in row]
    if missing or not ("text" in row or "completions" in row):
        raise ValueError(
            f"{place}: {(missing or ['text'])[0]!r} is missing; a row has prompt, reference (a list of steps), answer, "
            "and text (or completions, a list of steps, and final)"
        )
    answer = str(row["answer"])
    final = f"#### {answer}" if answer else ""
    text = row["text"] if "text" in row else "\n".join([*row["completions"], row.get("final", "")])
    return Trace(row["prompt"], tuple(row["reference"]), answer, final, place), text


def _print(task: str, models: dict[str, Any]) -> None:
    keys: Sequence[str] = ("chain_accuracy", "answer_strict", "answer_flexible", "step_accuracy", "step_accuracy_free")
    for name, found in models.items():
        rows = [
            (depth, entry["n"], *(percent(found.get(key, {}).get(depth)) for key in keys))
            for depth, entry in found["chain_accuracy"].items()
        ]
        columns = ("depth", "texts", "chain %", "answer strict", "answer flexible", "step forced", "step free")
        print_table(f"{task or 'texts'}: {name} (± one standard error)", columns, rows)
        for key in ("exact_match_strict", "exact_match_flexible"):
            if found.get(key):
                print(f"{key}: {percent(found[key]['all'])}")
    for line in gap_lines(models, task):
        print(line)
