"""Does a student diverge from its teacher along its chains of reasoning, and is that why it fails?

Both models read the same chains; their states at step boundaries are compared step by step, and the differences are
related to the places where the student goes wrong. The models may differ in width, depth and tokenizer, or be the same.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rtd_jax.apps.diagnose.findings import ARTICLE, verdict
from rtd_jax.apps.report.page import write_report
from rtd_jax.apps.report.tables import interval
from rtd_jax.base.console import print_table, printable
from rtd_jax.base.files import finite_report, null_notes, write_json, write_jsonl
from rtd_jax.base.lock import one_writer
from rtd_jax.base.settings import LAYER, SEED, check_filled, check_ranges
from rtd_jax.base.types import StepState
from rtd_jax.data.encoding import EncodedChain, encode_traces
from rtd_jax.data.formats import TextFormat, asked_format
from rtd_jax.data.sources import SourceSettings, load_traces
from rtd_jax.data.tokenizer_match import tokenizer_fingerprint
from rtd_jax.data.trace import Trace
from rtd_jax.eval.drift import BoundaryStates, Map, cross_fitted, measure, transitions
from rtd_jax.eval.evaluate import ChainEvaluator, DecodingSettings, decoding_notes
from rtd_jax.eval.own_chains import OwnChain, own_chains
from rtd_jax.eval.scored import Record
from rtd_jax.eval.states import boundary_states, cached_key, cached_states, open_cache
from rtd_jax.models.from_hf import resolve
from rtd_jax.models.open import FloatDtype, WeightDtype
from rtd_jax.steps.classifier import load_classifier
from rtd_jax.steps.detector import Detector
from rtd_jax.steps.select import classifier_folder
from rtd_jax.teacher.cache import TeacherCache
from rtd_jax.train.saved_models import LoadedModel, load_model, stage_checkpoint


@dataclasses.dataclass(frozen=True)
class DiagnoseSettings:
    """What is compared, and on which chains."""

    teacher: str  # Hugging Face folder, hub name (NAME@REVISION too), stage checkpoint, or a run's folder
    student: str  # of the kinds of --teacher; may be the teacher itself
    cache: str = ""  # teacher cache to read the teacher's states from; its weights are then not loaded
    data: str = "synthetic"  # folder or file or hub name of chains; "synthetic" generates problems
    schema: Literal["gsm8k", "math", "strategyqa", "arc", "stepwise", "prose", "synthetic"] = "gsm8k"  # of the rows
    split: str = "test"  # of `data`
    subset: str = ""  # the hub's configuration name
    limit: int = 200  # chains; 0 takes all
    keep_marks: bool = False  # the <<48/2=24>> of gsm8k (synthetic problems always have them)
    segmentation: str = "annotated"  # where steps end; or "classifier:<folder>", of this teacher
    out: str = "runs/diagnosis"  # folder for the report
    teacher_dtype: WeightDtype = "float32"  # of the teacher's weights in memory; int8 is weight-only
    student_dtype: WeightDtype = "float32"  # of the student's weights in memory
    compute_dtype: FloatDtype = "float32"  # of products and hidden states
    teacher_layer: int = -1  # 0 embeddings, i output of layer i, -1 final normed state
    student_layer: int = -1  # as --teacher_layer
    step_state: StepState = "end"  # a step's state: at its last token, the mean over its tokens or its conclusion's
    maps: Literal["auto", "saved", "fitted", "identity"] = "auto"  # f and g; auto: saved where they fit, else fitted
    chat: bool = False  # the tokenizer's chat template
    thinking: str = ""  # "on" or "off", with --chat, for templates that ask for it, like Qwen3's; "": as it was trained
    prompt_template: str = ""  # holds {prompt}; "" is the run's own, or the format's default
    max_new_tokens: int = 256  # most tokens decoded for a problem
    row_length: int = 1024  # tokens; longer chains are left out and counted
    batch_size: int = 32  # problems decoded at one time
    decode_teacher: bool = False  # also let the teacher solve the problems: do both fail the same ones?
    resamples: int = 200  # for intervals
    seed: int = 0  # of intervals and of the halves that maps are fitted on

    def __post_init__(self) -> None:
        check_filled(self, "teacher", "student", "data", "split", "out")
        check_ranges(self, max_new_tokens="[1, 1e6]", row_length="[2, 1e7]", batch_size="[1, 1e6]", limit="[0, 1e7]")
        check_ranges(self, teacher_layer=LAYER, student_layer=LAYER, seed=SEED)
        asked_format(None, chat=self.chat, prompt_template=self.prompt_template, thinking=self.thinking)  # or refuses
        if self.cache and self.decode_teacher:
            raise ValueError(
                "decode_teacher needs the teacher's weights, which are not loaded with a cache; leave out --cache or "
                "--decode_teacher"
            )
        if self.cache and self.teacher_dtype != "float32":
            raise ValueError(
                f"teacher_dtype {self.teacher_dtype!r} is of weights that are not loaded with a cache; leave it out"
            )
        if self.segmentation != "annotated" and classifier_folder(self.segmentation) is None:
            raise ValueError(
                f"segmentation is {self.segmentation!r}; a diagnosis compares states where steps end: use 'annotated' "
                "or 'classifier:<folder>'"
            )
        check_ranges(self, resamples="[20, 1e6]")


@one_writer(lambda settings, *_, **__: settings.out, "--out")
def diagnose(settings: DiagnoseSettings, note: Callable[[str], None] = print) -> Path:
    """Runs a diagnosis; writes report.json, report.html, PNGs and generations.jsonl. Returns the path of report.json.

    Raises:
      ValueError: models, data or settings that cannot be used, with the way out.
    """
    out = Path(settings.out).expanduser()
    for path in (settings.teacher, settings.student):
        if stage_checkpoint(path) is None:
            resolve(path)  # raises for a misspelt name before minutes are spent on the other model
    traces, classifier = _traces(settings), classifier_folder(settings.segmentation)
    if classifier is not None:
        load_classifier(classifier)
    teacher, cache = None, None
    if settings.cache:
        teacher = load_model(settings.teacher, compute_dtype=settings.compute_dtype, weights=False)
        cache = open_cache(settings.cache, teacher, settings.teacher_layer, settings.step_state)
    note(f"loading {'' if teacher else f'{settings.teacher} and '}{settings.student}")
    teacher = teacher or load_model(settings.teacher, settings.teacher_dtype, settings.compute_dtype)
    student = load_model(settings.student, settings.student_dtype, settings.compute_dtype)
    pair = Pair(settings, student, teacher, text_format(settings, student, teacher), note)
    notes = other_formats(pair.text, student, teacher)
    traces = _cut(settings, teacher, traces, note)
    traces, encoded = pair.encode(traces, settings.row_length)
    if cache is not None:
        traces, encoded = _in_cache(cache, settings.cache, traces, encoded, note)

    models = {"student": student} | ({"teacher": teacher} if settings.decode_teacher else {})
    decoding = DecodingSettings(settings.max_new_tokens, settings.batch_size)
    evaluations: dict[str, Any] = {}
    records: dict[str, list[Record]] = {}
    for role, loaded in models.items():
        evaluator = ChainEvaluator(loaded.tokenizer, pair.text, decoding, mesh=loaded.mesh)
        name, progress = loaded.name if role == "student" else f"{loaded.name}, teacher", decoding_notes(note, role)
        evaluations[name], records[role] = evaluator(loaded.model, loaded.params, traces, progress=progress)

    note(f"reading the reference chains with {'both models' if cache is None else 'the student'}")
    failed = {role: np.array([not record["correct"] for record in records[role]]) for role in models}
    forced = [record["teacher_forced"] for record in records["student"]]
    reference, maps = pair.compare(encoded, forced, failed["student"], cache)
    note(f"projections: {maps}")
    texts = {"reference": reference}
    if cache is not None:
        note("the student's own chains are not compared: no cache has the teacher's states on them")
    else:
        texts |= pair.compare_own(records["student"])
    both_fail = int(np.sum(failed["student"] & failed["teacher"])) if "teacher" in models else None
    notes += [
        f"{text['not_finite']} boundaries of the {name} chains are left out: a state there is not finite in one of the "
        "models (weights or activations overflow; try --compute_dtype=float32)"
        for name, text in texts.items()
        if "not_finite" in text
    ]
    report = {
        "kind": "diagnosis",
        "title": f"{student.name} against {teacher.name}",
        "settings": dataclasses.asdict(settings) | {"text": dataclasses.asdict(pair.text)},
        "teacher": _described(teacher, settings.teacher_layer) | _source(cache),
        "student": _described(student, settings.student_layer),
        "maps": maps,
        "models": evaluations,
        "texts": texts,
        "verdict": verdict(texts, failed["student"], both_fail),
        "article": ARTICLE,
    }
    report, places = finite_report(report)
    report["notes"] = notes + null_notes(places)
    generations = finite_report([{"model": models[r].name, **record} for r in models for record in records[r]])[0]
    write_jsonl(out / "generations.jsonl", generations)
    write_json(out / "report.json", report)
    write_report(out, report, generations[: len(traces)])
    print_diagnosis(report, out)
    return out / "report.json"


@dataclasses.dataclass(frozen=True)
class Pair:
    """The two models, and how they read texts."""

    settings: DiagnoseSettings
    student: LoadedModel
    teacher: LoadedModel
    text: TextFormat
    note: Callable[[str], None]

    def encode(self, traces: Sequence[Trace], row_length: int) -> tuple[list[Trace], list[list[EncodedChain]]]:
        """The traces that fit a row of both models, and their tokens by the student's and the teacher's tokenizer."""
        encoded, dropped = [], set()
        for loaded in (self.student, self.teacher):
            chains, report = encode_traces(
                loaded.tokenizer, traces, self.text, row_length=row_length, max_dropped_fraction=1.0
            )
            places = (i for i in range(len(traces)) if i not in set(report.dropped))
            encoded.append(dict(zip(places, chains, strict=True)))
            dropped |= set(report.dropped)
        if dropped:
            self.note(f"{len(dropped)} of {len(traces)} chains are longer than {row_length} tokens and are left out")
        kept = [i for i in range(len(traces)) if i not in dropped]
        if len(kept) < 2:
            raise ValueError(f"{len(kept)} of {len(traces)} chains fit into {row_length} tokens; raise --row_length")
        return [traces[i] for i in kept], [[chains[i] for i in kept] for chains in encoded]

    def compare(
        self,
        encoded: Sequence[Sequence[EncodedChain]],
        steps_right: Sequence[Sequence[bool | None]],
        failed: np.ndarray,
        cache: TeacherCache | None = None,
    ) -> tuple[dict[str, Any], str]:
        """The drift along chains that both read (see `drift.measure`), and a sentence on where the maps come from."""
        form = self.settings.step_state
        student_CKS, mask_CK = boundary_states(self.student, encoded[0], self.settings.student_layer, form)
        if cache is None:
            teacher_CKD, _ = boundary_states(self.teacher, encoded[1], self.settings.teacher_layer, form)
        else:
            teacher_CKD, _ = cached_states(cache, encoded[1])
        states = BoundaryStates(student_CKS, teacher_CKD, mask_CK)
        maps, origin = self._maps(states)
        options = {"resamples": self.settings.resamples, "seed": self.settings.seed}
        return measure(states, maps, steps_right, failed, **options), origin

    def compare_own(self, records: Sequence[Record]) -> dict[str, Any]:
        """{"own": drift along the chains that the student wrote}; {} where fewer than two of them can be read."""
        own = readable(own_chains(records), (self.student, self.teacher), self.text, self.note)
        if len(own) < 2:
            return {}
        self.note("reading the student's own chains with both models")
        indices, traces, labels = zip(*own, strict=True)
        kept, encoded = self.encode(traces, 2 * self.settings.row_length)
        chosen = [traces.index(trace) for trace in kept]
        failed = np.array([not records[indices[i]]["correct"] for i in chosen])
        return {"own": self.compare(encoded, [labels[i] for i in chosen], failed)[0]}

    def _maps(self, states: BoundaryStates) -> tuple[tuple[Sequence[Map], Sequence[Map]], str]:
        """The maps (f, g) of each chain from the student's to the teacher's width, and a sentence on their origin."""
        student, teacher, settings, count = self.student, self.teacher, self.settings, len(states.mask_CK)
        layers = (
            student.model.config.layer_index(settings.student_layer),
            teacher.model.config.layer_index(settings.teacher_layer),
        )
        unfit = ""
        if student.f is None or student.g is None:
            unfit = "the student is not a stage checkpoint, so it has no projections of its own"
        elif student.layers != layers:
            unfit = f"they join the layers {student.layers} of student and teacher, not {layers}"
        elif student.step_state != settings.step_state:
            unfit = f"they join states of steps made by step_state {student.step_state!r}, not {settings.step_state!r}"
        elif student.teacher_fingerprint != teacher.fingerprint():
            unfit = "they lead to another teacher"
        if settings.maps == "saved" and unfit:
            raise ValueError(f"the saved projections cannot be used: {unfit}; use --maps=fitted")
        if settings.maps in ("auto", "saved") and not unfit:
            return ([student.f] * count, [student.g] * count), "the run's own f and g"
        if settings.maps == "identity":
            return ([None] * count, [None] * count), "identity"
        fitted = cross_fitted(states, settings.seed), cross_fitted(transitions(states), settings.seed)
        return fitted, "linear maps fitted on one half of the chains and used on the other"


def text_format(settings: DiagnoseSettings, *models: LoadedModel) -> TextFormat:
    """The form of text: as asked for, else as a run among the models was trained on, else the default."""
    trained = next((model.text for model in models if model.text is not None), None)
    asked = asked_format(
        trained, chat=settings.chat, prompt_template=settings.prompt_template, thinking=settings.thinking
    )
    return asked or trained or TextFormat()


def other_formats(text: TextFormat, *models: LoadedModel) -> list[str]:
    """A sentence for each model that was trained on another form of text than both are asked in."""
    return [
        f"{model.name} was trained on another form of text, {model.text.template!r}, than the one that both models "
        f"read, {text.template!r}: some of what differs between them may be that"
        for model in models
        if model.text is not None and model.text.identity != text.identity
    ]


def print_diagnosis(report: dict[str, Any], out: Path) -> None:
    """Prints the tables and the verdict."""
    measures = ("cka", "cka_debiased", "cka_same_chains", "boundary_cosine", "transition_cosine")
    for name, text in report["texts"].items():
        title = f"Both models read the {'reference' if name == 'reference' else 'student own'} chains"
        same = f"of {text['same_chains']['chains']} chains"
        rows = [
            (step["step"] or "prompt", step["chains"], *(interval(step[key]) for key in measures))
            for step in text["steps"]
        ]
        print_table(title, ("step", "chains", "CKA", "debiased", same, "cos f", "cos g"), rows)
        for key, relation in text["relation"].items():
            values = (f"{k} {interval(v) if isinstance(v, dict) else v}" for k, v in relation.items())
            print(f"{key}: {', '.join(values)}")
    print(f"verdict: {report['verdict']['sentence']}")
    for line in report["verdict"]["evidence"]:
        print(f"  - {line}")
    for line in report["notes"]:
        print(f"warning: {printable(line)}")
    print(f"report: {out / 'report.html'}   {out / 'report.json'}")


def _traces(settings: DiagnoseSettings) -> list[Trace]:
    synthetic = settings.data == "synthetic"
    return load_traces(
        SourceSettings(
            schema="synthetic" if synthetic else settings.schema,
            location="" if synthetic else settings.data,
            split=settings.split,
            subset=settings.subset,
            limit=settings.limit or (600 if synthetic else 0),
            keep_marks=settings.keep_marks or synthetic,
        )
    )


def _cut(
    settings: DiagnoseSettings, teacher: LoadedModel, traces: list[Trace], note: Callable[[str], None]
) -> list[Trace]:
    """The reference chains, cut into steps by a classifier where the settings name one.

    The student's own chains keep one step a line.
    """
    folder = classifier_folder(settings.segmentation)
    if folder is None:
        return traces
    classifier = load_classifier(folder)
    classifier.check_teacher(teacher.fingerprint(), tokenizer_fingerprint(teacher.tokenizer), settings.teacher)
    note(f"cutting {len(traces)} chains with {folder}")
    detector = Detector(classifier, teacher.tokenizer, teacher.mesh, lambda: (teacher.model, teacher.params), note=note)
    return detector.cut(traces)


def readable(
    own: Sequence[OwnChain], models: Sequence[LoadedModel], text: TextFormat, note: Callable[[str], None]
) -> list[OwnChain]:
    """The student's own chains that every model's tokenizer can encode.

    A weak student may write what another model's vocabulary does not have.
    """
    kept, reason = [], ""
    for item in own:
        try:
            for loaded in models:
                encode_traces(loaded.tokenizer, [item[1]], text, row_length=2**31 - 1)
            kept.append(item)
        except ValueError as error:
            reason = reason or str(error)
    if reason:
        note(f"{len(own) - len(kept)} of the student's {len(own)} own chains are left out; the first: {reason}")
    return kept


def _in_cache(
    cache: TeacherCache,
    folder: str,
    traces: Sequence[Trace],
    encoded: Sequence[list[EncodedChain]],
    note: Callable[[str], None],
) -> tuple[list[Trace], list[list[EncodedChain]]]:
    """The chains whose records a cache holds; the others are counted and left out."""
    kept = [i for i, chain in enumerate(encoded[1]) if cached_key(chain) in cache]
    if len(kept) < 2:
        raise ValueError(
            f"{len(kept)} of {len(traces)} chains are in the teacher cache {folder}: another split or data set (a "
            "cache has its recipe's training and validation chains, so --split=train), another form of text "
            "(--prompt_template, --chat, --keep_marks), or chains that were longer than the recipe's rows"
        )
    if len(kept) < len(traces):
        note(f"{len(traces) - len(kept)} of {len(traces)} chains are not in the teacher cache and are left out")
    return [traces[i] for i in kept], [[chains[i] for i in kept] for chains in encoded]


def _described(loaded: LoadedModel, layer: int) -> dict[str, Any]:
    config = loaded.model.config
    return {
        "name": loaded.name,
        "layers": config.layers,
        "width": config.width,
        "layer_read": config.layer_index(layer),
    }


def _source(cache: TeacherCache | None) -> dict[str, str]:
    """The storage of the cached states, where the teacher was not run."""
    if cache is None:
        return {}
    return {"cache": f"{cache.identity.teacher_dtypes}, states stored as {cache.identity.states}"}
