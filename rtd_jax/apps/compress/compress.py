"""From a finished student to a smaller one in a Hugging Face folder, and a report of what that cost.

What is measured is the model that was written: the folder is read again before it is evaluated.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax

from rtd_jax.apps.compress import measured
from rtd_jax.apps.compress.methods import Method, parse_method
from rtd_jax.apps.report.sections import Section, write_sections
from rtd_jax.base.console import print_table
from rtd_jax.base.files import finite_report, read_object, write_json, write_jsonl
from rtd_jax.base.lock import one_writer
from rtd_jax.base.settings import SEED, build, check_filled, check_ranges
from rtd_jax.base.sharding import host_share, put_batch
from rtd_jax.base.types import Params
from rtd_jax.data.encoding import EncodedChain, encode_traces
from rtd_jax.data.formats import TextFormat, asked_format
from rtd_jax.data.packing import fixed_batches
from rtd_jax.data.sources import SourceSettings, load_traces
from rtd_jax.data.trace import Trace
from rtd_jax.eval.evaluate import ChainEvaluator, DecodingSettings, decoding_notes, first_of_each_depth
from rtd_jax.eval.ready import check_evaluation
from rtd_jax.models.gptq import gptq
from rtd_jax.models.pruning import prune_model, pruned_config
from rtd_jax.models.quantization_config import check_storable
from rtd_jax.models.quantized_folders import quantization_of, save_quantized
from rtd_jax.models.schemes import as_params, rounded
from rtd_jax.models.to_hf import check_replaceable, save_pretrained
from rtd_jax.models.weight_files import weight_files
from rtd_jax.train.recipe import Recipe
from rtd_jax.train.saved_models import LoadedModel, load_model, stage_checkpoint, trained_recipe
from rtd_jax.train.student import FLOAT_FOLDER, FOLDER, evenly_spaced

ROWS = 8  # of calibration text, read together


@dataclasses.dataclass(frozen=True)
class CompressSettings:
    """Which student is compressed, how, and on what the loss is measured."""

    student: str  # Hugging Face folder, hub name (NAME@REVISION too), stage checkpoint, or a run's folder
    scheme: str  # int8, int4, int3, int2, nf4, fp8, w8a16_gptq, w4a16_gptq, w3a16_gptq, w2a16_gptq or prune:<share>
    group_size: int = -1  # inputs that share a scale; 0: all of an output; -1: 128, of nf4 64, of fp8 0
    symmetric: bool = True  # no zero points; False for int8 and int4 only
    head: bool = False  # round the embedding and the head too
    out: str = "runs/compressed/student"  # Hugging Face folder that is written
    report: str = ""  # folder of the report; "" is <out>_report
    data: str = ""  # folder, file or hub name of chains; "synthetic" generates them; "" is the run's own data
    schema: Literal["gsm8k", "math", "strategyqa", "arc", "stepwise", "prose"] = "gsm8k"  # of the rows in `data`
    subset: str = ""  # the hub's configuration name
    train_split: str = "train"  # of `data`, for calibration
    test_split: str = "test"  # of `data`, for what is measured
    calibration_chains: int = 128  # chains that GPTQ and pruning read
    problems_per_depth: int = -1  # that are solved before and after; 0 measures nothing; -1: the run's own, or 60
    keep_marks: bool = False  # the <<48/2=24>> of gsm8k (generated problems always have them)
    chat: bool = False  # the tokenizer's chat template
    thinking: str = ""  # "on" or "off", with --chat, for templates that ask for it, like Qwen3's; "": as it was trained
    prompt_template: str = ""  # holds {prompt}; "" is the run's own, or the format's default
    max_new_tokens: int = 0  # most tokens decoded for a problem; 0: the run's own, or 256
    row_length: int = 1024  # tokens of a row of calibration text; longer chains are left out
    batch_size: int = 32  # problems decoded at one time
    by_layer: bool = True  # measure what each layer adds to the loss
    seed: int = 0  # of the halves on which a pruned student's maps are fitted, and of intervals of drift

    def __post_init__(self) -> None:
        check_filled(self, "student", "scheme", "out", "train_split", "test_split")
        check_ranges(self, group_size="[-1, 1e6]", calibration_chains="[1, 1e6]", problems_per_depth="[-1, 1e6]")
        check_ranges(self, max_new_tokens="[0, 1e6]", row_length="[2, 1e7]", batch_size="[1, 1e6]", seed=SEED)
        asked_format(None, chat=self.chat, prompt_template=self.prompt_template, thinking=self.thinking)  # or refuses
        _ = self.method  # refuses a scheme that does not exist
        if self.report_folder.resolve() == Path(self.out).expanduser().resolve():
            raise ValueError(f"report is {self.report!r}, as out is; a model's folder holds nothing else: give another")

    @property
    def method(self) -> Method:
        return parse_method(self.scheme, self.group_size, self.symmetric, self.head)

    @property
    def report_folder(self) -> Path:
        return Path(self.report or f"{self.out.rstrip('/')}_report").expanduser()


@one_writer(lambda settings, *_, **__: settings.report_folder, "--report")
def compress(settings: CompressSettings, note: Callable[[str], None] = print) -> Path:
    """Writes the smaller student, and report.json, report.html and generations.jsonl; returns the path of report.json.

    Raises:
      ValueError: a student, scheme or data that cannot be used, with the place and the way out. Nothing is written
        then.
    """
    started = time.monotonic()
    method, out, folder = settings.method, Path(settings.out).expanduser(), settings.report_folder
    check_replaceable(out)
    student, recipe, run = _student(settings.student)
    _check_places(out, folder, student, run)
    settings = _filled(settings, recipe)
    problems, calibration = _traces(settings, method, recipe)
    note(f"loading {student}")
    compute_dtype = recipe.student.compute_dtype if recipe else "float32"
    before = load_model(student, compute_dtype=compute_dtype)
    if method.scheme is not None:
        method.scheme.check(before.model.config)
        check_storable(method.scheme, before.model.config)
    text = _text_format(settings, before)
    chains = _encoded(settings, before, text, calibration, note)
    evaluator = ChainEvaluator(
        before.tokenizer,
        text,
        DecodingSettings(settings.max_new_tokens, settings.batch_size),
        mesh=before.mesh,
        open_from=measured.OPEN_FROM,
    )
    if problems:
        check_evaluation(evaluator, problems, {"student": before.model.config}, "")
    report: dict[str, Any] = {
        "kind": "compression",
        "title": f"{settings.student}: {method.scheme.name if method.scheme else method.name}",
        "settings": dataclasses.asdict(settings),
        "scheme": dataclasses.asdict(method.scheme) if method.scheme else {"share": method.share},
        "calibration_chains": len(chains) if method.reads_text else 0,
    }
    report["size"] = {"before": _size(student, before)}
    smaller, note_of = _made_smaller(method, before, chains, out, text, note)
    after = load_model(str(out), compute_dtype=compute_dtype)
    report["size"] |= _sizes(before, after, report["size"]["before"])
    report["config"] = {name: dataclasses.asdict(m.model.config) for name, m in (("before", before), ("after", after))}
    if problems:
        results = {}
        for name, loaded in (("before", before), ("after", after)):
            note(f"solving {len(problems)} problems with the student {name}")
            results[name] = measured.evaluate_model(loaded, problems, evaluator, decoding_notes(note, name))
        changes = measured.differences(results["before"], results["after"])
        report["before"], report["student"] = results["before"].report, results["after"].report
        report["differences"] = {depth: change.error_row() for depth, change in changes.items()}
        note("reading the reference chains with both")
        report["drift_from_before"] = measured.drift(before, after, problems, text, results["after"], settings.seed)
        if settings.by_layer and smaller is not None:
            read, _ = encode_traces(
                before.tokenizer, evenly_spaced(problems, measured.READ), text, row_length=2**31 - 1
            )
            report["parts"] = measured.loss_by_part(before, smaller, read, note)
        report["where"] = measured.where_sentence(report)
        for name, result in (("generations", results["after"]), ("generations_before", results["before"])):
            records = [{"model": "student", **record} for record in result.records]
            write_jsonl(folder / f"{name}.jsonl", finite_report(records)[0])
    # As the report of a run has it, so that a study reads both.
    report |= {"updates": 0, "stages": [], "wall_seconds": round(time.monotonic() - started, 1)}
    report, _ = finite_report(report)
    write_json(folder / "report.json", report)
    _show(report, note_of, out, folder)
    return folder / "report.json"


def _student(path: str) -> tuple[str, Recipe | None, Path | None]:
    """(what `load_model` opens, the recipe and the folder of the run that it is of; None where it is not known).

    A run's folder is named by itself, or by one of its students. By itself its newest stage is opened or, where its
    checkpoints are gone, its student.

    Raises:
      ValueError: the student has few bits already.
    """
    given = Path(path).expanduser()
    folder = given.parent if given.name in (FOLDER, FLOAT_FOLDER) else given
    stage = stage_checkpoint(path)
    run, recipe, opened = None, None, path
    if stage is not None:
        run, recipe = stage.parents[2], trained_recipe(stage)
    elif (folder / "settings.json").exists():
        run, opened = folder, path if folder != given else str(folder / FOLDER)
        recipe = build(
            Recipe, read_object(folder / "settings.json", "give a Hugging Face folder and --data"), "settings"
        )
    scheme = recipe.student.scheme if recipe and stage is not None else None
    if scheme is None and stage is None and Path(opened).expanduser().is_dir():
        scheme = quantization_of(Path(opened).expanduser())
    if scheme is not None:
        way = f"--student={run / FLOAT_FOLDER}" if run is not None else "the model that it was made from"
        raise ValueError(
            f"{path} is quantised already ({scheme.name}), and rounding twice would add two errors; give {way}"
        )
    return opened, recipe, run


def _filled(settings: CompressSettings, recipe: Recipe | None) -> CompressSettings:
    """The settings with what a run was evaluated by, where nothing is given."""
    per_depth, tokens = (
        (recipe.evaluation.problems_per_depth, recipe.evaluation.max_new_tokens) if recipe else (60, 256)
    )
    return dataclasses.replace(
        settings,
        problems_per_depth=per_depth if settings.problems_per_depth < 0 else settings.problems_per_depth,
        max_new_tokens=settings.max_new_tokens or tokens,
    )


def _check_places(out: Path, folder: Path, student: str, run: Path | None) -> None:
    """Raises ValueError where what is written would take the place of what there is, or lie inside of it."""
    taken = [Path(student).expanduser(), *([run / FOLDER, run / FLOAT_FOLDER, run / "checkpoints"] if run else [])]
    for place in (path.resolve() for path in taken if path.exists()):
        if place == out.resolve() or place in out.resolve().parents or out.resolve() in place.parents:
            raise ValueError(f"--out is {out}, but {place} is the student that is read; give a folder beside it")
        if place == folder.resolve() or place in folder.resolve().parents:
            raise ValueError(f"--report is {folder}, in the student that is read; give a folder beside it")
    before = folder / "report.json"
    if (folder / "settings.json").exists() or (
        before.exists() and read_object(before, "").get("kind") != "compression"
    ):
        raise ValueError(f"--report is {folder}, which has the report of something else; give another folder")


def _traces(settings: CompressSettings, method: Method, recipe: Recipe | None) -> tuple[list[Trace], list[Trace]]:
    """(problems to solve, chains to calibrate on), each [] where it is not needed."""
    if not settings.data and recipe is None and (method.reads_text or settings.problems_per_depth):
        raise ValueError(
            f"{settings.student} is not a run, so nothing says on which chains it is to be "
            f"{'calibrated and ' if method.reads_text else ''}measured; give --data (a folder, a file, a hub name, or "
            "synthetic)"
        )
    if settings.data:
        generated = settings.data == "synthetic"

        def source(split: str) -> SourceSettings:
            return SourceSettings(
                schema="synthetic" if generated else settings.schema,
                location="" if generated else settings.data,
                split=split,
                subset=settings.subset,
                keep_marks=settings.keep_marks or generated,
                limit=2000 if generated else 0,
            )

        test, train = source(settings.test_split), source(settings.train_split)
    elif recipe is not None:
        test, train = recipe.data.test, recipe.data.train
    else:
        return [], []
    problems = (
        first_of_each_depth(load_traces(test), settings.problems_per_depth) if settings.problems_per_depth else []
    )
    calibration = load_traces(train) if method.reads_text else []
    if method.reads_text and not calibration:
        raise ValueError(f"{settings.scheme} needs chains to be calibrated on, and there are none; give --data")
    return problems, calibration


def _text_format(settings: CompressSettings, loaded: LoadedModel) -> TextFormat:
    """The form of text: as asked for, else as the student was trained on, else the default."""
    asked = asked_format(
        loaded.text, chat=settings.chat, prompt_template=settings.prompt_template, thinking=settings.thinking
    )
    return asked or loaded.text or TextFormat()


def _encoded(
    settings: CompressSettings,
    loaded: LoadedModel,
    text: TextFormat,
    traces: Sequence[Trace],
    note: Callable[[str], None],
) -> list[EncodedChain]:
    """Calibration chains that fit a row, spread evenly over the data."""
    if not traces:
        return []
    chosen = evenly_spaced(traces, settings.calibration_chains)
    chains, dropped = encode_traces(
        loaded.tokenizer, chosen, text, row_length=settings.row_length, max_dropped_fraction=1.0
    )
    if dropped.dropped:
        note(f"{len(dropped.dropped)} of {len(chosen)} calibration chains are longer than {settings.row_length} tokens")
    if not chains:
        raise ValueError(f"no calibration chain fits into {settings.row_length} tokens; raise --row_length")
    return chains


def _made_smaller(
    method: Method,
    before: LoadedModel,
    chains: Sequence[EncodedChain],
    out: Path,
    text: TextFormat,
    note: Callable[[str], None],
) -> tuple[Params | None, str]:
    """Writes the smaller student. Returns its params as floats, if they have the old shapes, and what to do next."""
    config, kept_text = before.model.config, before.text or text
    if method.scheme is None:
        note(f"reading {len(chains)} chains to see what the student uses")
        try:
            target = pruned_config(config, method.share)
        except ValueError as error:
            raise ValueError(f"--scheme={method.name}: {error}") from error
        _, params, _ = prune_model(before.model, before.params, chains, target)
        save_pretrained(out, target, params, tokenizer=before.tokenizer, text=kept_text)
        return (
            None,
            f"train it on: --config.student.init=pretrained --config.student.layers=0 --config.student.path={out}",
        )
    scheme = method.scheme
    if method.is_gptq:
        length = max(len(chain) for chain in chains)
        batches = [
            put_batch(batch, before.mesh)
            for batch in fixed_batches(
                chains, ROWS, length, 1, 1 + max(len(c.boundaries) for c in chains), share=host_share(before.mesh)
            )
        ]
        rows = [(batch.tokens_BL, batch.positions_BL, batch.chain_ids_BL) for batch in batches]

        def progress(done: int, total: int) -> None:
            note(f"rounded {done} of {total} layers")

        params = gptq(before.model, before.params, rows, scheme, progress)
    else:
        params = jax.jit(rounded, static_argnums=1)(before.params, scheme)
    save_quantized(out, config, params, scheme, tokenizer=before.tokenizer, text=kept_text)
    return jax.jit(as_params, static_argnums=1)(params, config), f"use it: --model={out}"


def _size(path: str, loaded: LoadedModel) -> int:
    """Bytes of a student's weights: of its files, or float32 where it is a checkpoint."""
    if stage_checkpoint(path) is not None:
        return sum(x.nbytes for x in jax.tree.leaves(loaded.params))
    return _file_size(loaded.directory)


def _file_size(directory: Path) -> int:
    return sum(path.stat().st_size for path in weight_files(directory).values())


def _sizes(before: LoadedModel, after: LoadedModel, bytes_before: int) -> dict[str, Any]:
    bytes_after = _file_size(after.directory)
    counts = {name: sum(x.size for x in jax.tree.leaves(m.params)) for name, m in (("b", before), ("a", after))}
    return {
        "after": bytes_after,
        "params_before": counts["b"],
        "params_after": counts["a"],
        "bits_before": 8 * bytes_before / counts["b"],
        "bits_after": 8 * bytes_after / counts["a"],
    }


def _show(report: dict[str, Any], next_step: str, out: Path, folder: Path) -> None:
    """Writes the page, and prints its tables."""
    size = report["size"]
    intro = [f"{report['title']}, written to {out}. Scheme: {json.dumps(report['scheme'])}."]
    if "where" in report:
        sections, pictures = measured.sections_of(report)
        intro.append(f"What is lost: {report['where']}.")
    else:
        rows = [("bytes of weights", f"{size['before']:,}", f"{size['after']:,}")]
        sections, pictures = [Section("Size", 2, (), ("", "before", "after"), rows)], []
    page = write_sections(folder, report["title"], intro, sections, pictures)
    for section in sections:
        print_table(section.title, tuple(section.head), [tuple(map(str, row)) for row in section.rows])
    if "where" in report:
        print(f"lost: {report['where']}")
    print(f"{size['before']:,} bytes of weights before, {size['after']:,} after: {out}")
    print(f"report: {page}   {folder / 'report.json'}")
    print(next_step)
