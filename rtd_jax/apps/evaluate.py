"""Any model on GSM8K, MATH, StrategyQA, ARC or generated problems, by depth; or text that something else wrote."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rtd_jax.apps.report.page import gap_lines, write_report
from rtd_jax.apps.report.tables import depth_table, group_table, percent, total_lines
from rtd_jax.base.console import print_table, printable
from rtd_jax.base.files import finite_report, null_notes, write_json, write_jsonl
from rtd_jax.base.lock import one_writer
from rtd_jax.base.settings import SEED, SettingError, check_distinct, check_filled, check_ranges
from rtd_jax.base.sharding import row_sharding, row_ways
from rtd_jax.data.formats import TextFormat, asked_format, render
from rtd_jax.data.schemas.arc import ChoiceQuestion
from rtd_jax.data.trace import Trace
from rtd_jax.eval.choices import choice_log_likelihoods, score_choices
from rtd_jax.eval.decoding import Sampling
from rtd_jax.eval.evaluate import ChainEvaluator, DecodingSettings, Progress
from rtd_jax.eval.judge.served import ServedJudgeFlags, check_log
from rtd_jax.eval.judged_texts import add_verdicts
from rtd_jax.eval.metrics import make_report
from rtd_jax.eval.scored import Record
from rtd_jax.eval.scoring import ScoringSettings
from rtd_jax.eval.tasks import EXAMPLES_SEED, TASKS, Problems, load_problems
from rtd_jax.eval.written import Scores, rescore
from rtd_jax.models.open import FloatDtype, WeightDtype
from rtd_jax.train.saved_models import LoadedModel, check_model, load_model, trained_text

OPEN_FROM = 5  # depths 1, 2, 3, 4, 5+
SCORING_ROWS = 8  # of 512 tokens, read together on each device
NO_TEXTS = "judge is 'openai', but choices have no texts to judge; name another task, or leave --judge out"
NOTE_SECONDS = 10.0  # between two progress lines of one kind


@dataclasses.dataclass(frozen=True)
class EvaluateSettings(ServedJudgeFlags):
    """What is evaluated on what."""

    model: tuple[
        str, ...
    ] = ()  # Hugging Face folders, hub names (NAME@REVISION too), checkpoints, runs; commas between
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
    thinking: str = ""  # "on" or "off", with --chat, for templates that ask for it, like Qwen3's; "": as it was trained
    prompt_template: str = ""  # holds {prompt}; "" is the task's own, and of synthetic problems the models' own
    temperature: float = 0.0  # of decoding; 0 is greedy
    top_p: float = 1.0  # draw from the most probable tokens that together reach this
    samples: int = 1  # texts for each problem
    seed: int = 0  # of sampled decoding
    max_new_tokens: int = 256  # most tokens decoded for a problem
    batch_size: int = 32  # problems decoded at one time
    dtype: WeightDtype = "float32"  # of weights in memory; int8 is weight-only
    compute_dtype: FloatDtype = "float32"  # of products and hidden states
    show: tuple[int, ...] = ()  # problems that report.html shows first, by number from 0; commas between
    judge: Literal["rules", "openai"] = "rules"  # of steps; openai asks a served model beside the rules

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.revision and self.data_root:
            raise SettingError(
                f"revision is {self.revision!r}, of data on the hub, but data_root is {self.data_root!r}, which is "
                "local; leave one of them out"
            )
        unknown = [task for task in self.tasks if task not in TASKS]
        if unknown or not self.tasks:
            raise ValueError(f"tasks are {self.tasks}; use some of {', '.join(TASKS)}")
        if bool(self.model) == bool(self.generations):
            raise ValueError("give either models (--model) or texts to score (--generations)")
        if len(set(self.model)) < len(self.model):
            raise ValueError(f"models are {self.model}; give each of them once")
        asked_format(None, chat=self.chat, prompt_template=self.prompt_template, thinking=self.thinking)  # or refuses
        if self.samples > 1 and self.temperature <= 0:
            raise ValueError(f"samples is {self.samples} but decoding is greedy, so all are alike; set a temperature")
        check_ranges(self, limit="[0, 1e7]", few_shot="[-1, 1000]", few_shot_seed=SEED, levels="[1, 5]", seed=SEED)
        check_ranges(self, show="[0, 1e7]", samples="[1, 1e4]", temperature="[0, 100]", top_p="(0, 1]")
        check_ranges(self, max_new_tokens="[1, 1e6]", batch_size="[1, 1e6]")
        check_distinct(self, "tasks", "levels", "show")
        check_filled(self, "out", "levels")
        self.check_asked(self.judge == "openai")
        if self.judge == "openai" and self.model and all(TASKS[task].is_choice for task in self.tasks):
            raise ValueError(NO_TEXTS)


@one_writer(lambda settings, *_, **__: settings.out, "--out")
def evaluate(settings: EvaluateSettings, note: Callable[[str], None] = print) -> Path:
    """Writes report.json, report.html, PNGs and generations.jsonl into `out`. Returns the path of report.json.

    Raises:
      ValueError: a model, data or texts that cannot be used, with the place and the way out.
    """
    out = Path(settings.out).expanduser()
    sections: dict[str, dict[str, Any]] = {}
    protocol: dict[str, Any] = {}
    notes: list[str] = []
    records: list[Record] = []
    if settings.judge == "openai":
        check_log(settings, out / "judge")
    if settings.generations:
        evaluations = rescore(Path(settings.generations).expanduser(), OPEN_FROM)
    else:
        evaluations = _measure(settings, protocol, notes, note)
    for task, name, (evaluation, scored) in evaluations:
        sections.setdefault(task, {})[name] = evaluation
        records += [{"model": name, "task": task, **record} for record in scored]
    if settings.generations:
        _check_show(settings.show, max((record["problem"] + 1 for record in records if "text" in record), default=0))
    if settings.judge == "openai":
        _judge(settings, out / "judge", sections, records)
    names = {name for models in sections.values() for name in models}
    for task, models in sections.items():
        notes += unequal_conditions(task, models, [record for record in records if record["task"] == task])
    report, places = finite_report(
        {
            "kind": "evaluation",
            "title": f"Evaluation of {', '.join(sorted(names))}",
            "settings": dataclasses.asdict(settings),
            "protocol": protocol,
            "sections": sections,
        }
    )
    report["notes"] = notes + null_notes(places)
    records = finite_report(records)[0]
    write_jsonl(out / "generations.jsonl", records)
    write_json(out / "report.json", report)
    write_report(out, report, records, show=settings.show)
    for task, models in report["sections"].items():
        _print(task, models, protocol.get(task))
    for line in report["notes"]:
        print(f"warning: {printable(line)}")
    print(f"report: {out / 'report.html'}   {out / 'report.json'}")
    return out / "report.json"


def _measure(
    settings: EvaluateSettings, protocol: dict[str, Any], notes: list[str], note: Callable[[str], None]
) -> Iterator[tuple[str, str, Scores]]:
    """(task, model, (report, records)), one model after the other, so that memory holds one at a time.

    All models of a task are asked the same in the same form; `protocol` gets how, and `notes` what a reader must know.
    """
    trained = {path: trained_text(path) for path in settings.model}  # also finds a misspelt name before any is loaded
    asked: dict[str, Problems] = {}
    for task in settings.tasks:
        asked[task] = load_problems(
            task,
            data_root=settings.data_root,
            limit=settings.limit,
            few_shot=settings.few_shot,
            chat=settings.chat,
            levels=settings.levels if task == "math" else (),
            seed=settings.few_shot_seed,
            revision=settings.revision,
            prompt_template=settings.prompt_template,
            thinking=settings.thinking,
            trained_on=next((text for text in trained.values() if text is not None), None),
        )
        protocol[task] = dict(asked[task].protocol)
    solved = [len(problems.items) for task, problems in asked.items() if not TASKS[task].is_choice]
    _check_show(settings.show, max(solved, default=0))
    if "synthetic" in asked:
        protocol["synthetic"]["trained_on"] = standing = {
            printable(path): _standing(text, asked["synthetic"].form) for path, text in trained.items()
        }
        notes += [
            f"synthetic: {path} was trained on {seen}; all models of a table are asked in one form, so its numbers are "
            "lower than in its own (--prompt_template, --chat and the order of --model decide)"
            for path, seen in standing.items()
            if seen.startswith("another")
        ]
        if set(standing.values()) == {NOT_KNOWN} and not (settings.prompt_template or settings.chat):
            notes.append(
                "synthetic: no model says on which form of text it was trained, so all are asked in the task's own, "
                f"{asked['synthetic'].form.template!r}; if that is another, give theirs with --prompt_template"
            )
        if len(set(standing.values())) > 1:
            notes += [
                f"synthetic: {path} does not say on which form of text it was trained"
                for path, seen in standing.items()
                if seen == NOT_KNOWN
            ]
    for path in settings.model[1:]:  # hours may pass until they are loaded
        check_model(path)
    names: set[tuple[str, str]] = set()
    for path in settings.model:
        note(f"loading {path}")
        loaded = load_model(path, settings.dtype, settings.compute_dtype)
        for task, problems in asked.items():
            name = printable(path if (task, printable(loaded.name)) in names else loaded.name)
            names.add((task, name))
            measure = _choose if TASKS[task].is_choice else _solve
            yield task, name, measure(settings, task, problems, loaded, note)


def _check_show(show: Sequence[int], count: int) -> None:
    """Refuses problems to be shown that no task has; `count` is that of the task with most, choices left out.

    Raises:
      ValueError: names the number, and how many problems there are.
    """
    if show and not count:
        raise ValueError(f"show is {show}, but choices have no steps to show; name another task, or leave --show out")
    for number in show:
        if number >= count:
            raise ValueError(f"show is {number}; expected numbers from 0 and below {count}, the number of problems")


def _judge(
    settings: EvaluateSettings, folder: Path, sections: dict[str, dict[str, Any]], records: list[Record]
) -> None:
    """Adds a served model's verdicts to the records, and to the report what is measured on them."""
    texts = [record for record in records if "text" in record]  # and no choices
    if not texts:
        raise ValueError(NO_TEXTS)
    path = folder / "generations.jsonl"
    write_jsonl(path, finite_report(records)[0])
    print(f"texts to be judged: {path}; --generations={path} in place of --model goes on without the models")
    add_verdicts(texts, settings, folder)
    for task, models in sections.items():
        for name in models:
            own = [record for record in texts if (record["task"], record["model"]) == (task, name)]
            if own:
                models[name] = make_report(own, OPEN_FROM)


NOT_KNOWN = "a form that its folder does not say"


def _standing(trained: TextFormat | None, asked: TextFormat) -> str:
    """On what a model was trained, beside the form in which it is asked."""
    if trained is None:
        return NOT_KNOWN
    if trained.identity == asked.identity:
        return "this form"
    return f"another form, {trained.template!r}{' in a chat' if trained.kind == 'chat' else ''}"


CONDITIONS = {  # key of an evaluation: in words
    "text_format": "form of text",
    "decoding": "decoding",
    "max_new_tokens": "tokens decoded at most",
    "samples": "samples of a problem",
    "problems": "number of problems",
    "questions": "number of questions",
    "judged_by": "served judge",
}


def unequal_conditions(task: str, models: Mapping[str, Any], records: list[Record]) -> list[str]:
    """A sentence for each condition in which the models of one table differ, as far as their reports tell."""
    lines = []
    for key, words in CONDITIONS.items():
        values = {name: evaluation.get(key, "not known") for name, evaluation in models.items()}
        if len(set(values.values())) > 1:
            lines.append(f"the {words} differs: " + ", ".join(f"{name} {value}" for name, value in values.items()))
    prompts: dict[str, set[str]] = {name: set() for name in models}
    seen_of: dict[tuple[str, str], set[Any]] = {}  # values in the rows of one model, which files that were joined mix
    for record in records:
        prompts[record["model"]].add(record["prompt"])
        for key in (key for key in CONDITIONS if key in record):
            seen_of.setdefault((record["model"], key), set()).add(record[key])
    lines += [
        f"the {CONDITIONS[key]} differs between the rows of {name}: {', '.join(sorted(map(str, seen)))}"
        for (name, key), seen in seen_of.items()
        if len(seen) > 1
    ]
    first, *others = prompts.items()
    lines += [f"{first[0]} and {name} were asked different problems" for name, seen in others if seen != first[1]]
    return [f"{task or 'texts'}: the models of this table are not comparable: {line}" for line in lines]


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
    try:
        return score_choices(questions, log_likelihoods, problems.text_format)
    except ValueError as error:
        raise ValueError(f"{loaded.name}, {task}: {error}; its weights or activations are not finite") from error


def _progress(note: Callable[[str], None], line: str) -> Progress:
    """Lines of progress, at most one in `NOTE_SECONDS`; `line` holds %d twice, for what is done and for all."""
    last = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal last
        if done == total or time.monotonic() - last > NOTE_SECONDS:
            last = time.monotonic()
            note(line % (done, total))

    return progress


def _print(task: str, models: dict[str, Any], protocol: Mapping[str, Any] | None) -> None:
    """Prints the tables of one task."""
    if protocol:
        print(f"{task}: every model asked as {protocol['prompt']!r}{' in a chat' if protocol['chat_template'] else ''}")
    for name, evaluation in models.items():
        if "accuracy_norm" in evaluation:
            shares = f"acc {percent(evaluation['accuracy'])}, acc_norm {percent(evaluation['accuracy_norm'])}"
            print(f"{task}: {name}: {shares} % of {evaluation['questions']} questions (± one standard error)")
            continue
        form = f"{evaluation['text_format']}, " if evaluation.get("text_format") else ""
        print_table(f"{task or 'texts'}: {name} ({form}± one standard error)", *depth_table(evaluation))
        for line in total_lines(evaluation):
            print(line)
        for kind, groups in evaluation.get("groups", {}).items():
            print_table(f"{task}: {name}, by {kind}", *group_table(kind, groups))
    for line in gap_lines(models, task):
        print(line)
