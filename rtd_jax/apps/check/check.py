"""`check`: opens models and data as a run does, without their weights, and says what is wrong with them."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import jax

from rtd_jax.apps.check.chains import ShownChain, shown_chains
from rtd_jax.apps.check.show import print_checks, write_check_page
from rtd_jax.base.files import check_writable
from rtd_jax.base.settings import check_ranges
from rtd_jax.base.sharding import MeshSettings, make_mesh
from rtd_jax.data.sources import load_traces
from rtd_jax.models.config import DecoderConfig
from rtd_jax.models.open import OpenModel, open_model
from rtd_jax.models.weights import parameter_count
from rtd_jax.steps.classifier import load_classifier
from rtd_jax.steps.select import classifier_folder, is_windows, reads_teacher
from rtd_jax.train.abstract import abstract_step, bytes_on_device
from rtd_jax.train.curriculum import stages
from rtd_jax.train.preflight import Check, Finding, chain_checks, model_checks, outcome
from rtd_jax.train.recipe import DataSettings, Recipe
from rtd_jax.train.splits import Chains, encode_split, load_splits
from rtd_jax.train.student import start_folder, student_config, student_model

Made = TypeVar("Made")
# Checks of models that others stand on, and what cannot be looked at where one of them fails.
_LOST_WITH = {
    "tokenizer": "vocabulary rows, chat template, token ids, chains",
    "same tokenizer": "special tokens, chat template, token ids, end of a chain",
    "chat template": "end of a chain, chains",
}


@dataclass(frozen=True)
class CheckSettings:
    """What is shown beside the checks, and where it is written."""

    chains: int = 3  # training chains that are shown, from the shallowest to the deepest; 0 shows none
    html: str = ""  # file into which the same is written as a page; "" writes none

    def __post_init__(self) -> None:
        check_ranges(self, chains="[0, 1000]")


class Findings(NamedTuple):
    """What was found."""

    checks: list[Check]
    chains: list[ShownChain]
    unreached: str  # what could not be looked at because of what fails, in words; "" where everything was

    @property
    def has_failed(self) -> bool:
        return any(check.status == "fail" for check in self.checks)


def check(recipe: Recipe, settings: CheckSettings) -> None:
    """Prints named checks of a recipe and some of its chains, and writes them as a page where the settings say so.

    Raises:
      ValueError: the page cannot be written.
      SystemExit: with status 1, where a check fails.
    """
    path = Path(settings.html).expanduser() if settings.html else None
    if path is not None:
        if path.is_dir():
            raise ValueError(f"--html={settings.html} is a folder; give the name of a file, such as check.html")
        check_writable(path.parent, "--html")
    found = examine(recipe, settings.chains)
    print_checks(*found)
    if path is not None:
        title = f"Check of {recipe.teacher.path} -> {recipe.student.path or recipe.student.init.replace('_', ' ')}"
        print(f"page: {write_check_page(path, title, *found)}", flush=True)
    if found.has_failed:
        raise SystemExit(1)


def examine(recipe: Recipe, count: int = 3) -> Findings:
    """Checks a recipe; `count` of its training chains are shown.

    What fails does not keep the rest from being checked, but for what stands on it.
    """
    checks: list[Check] = []

    def made(name: str, make: Callable[[], Made], describe: Callable[[Made], str]) -> Made | None:
        """What `make` makes, and an entry that says how that went."""
        results: list[Made] = []

        def find() -> Finding:
            results.append(make())
            return describe(results[0]), ()

        checks.extend(outcome(name, find))
        return results[0] if results else None

    mesh = make_mesh(MeshSettings(), jax.devices()[:1])
    teacher = made("teacher", lambda: open_model(recipe.teacher, mesh, _ignore, has_weights=False), _model_in_words)
    if teacher is None:
        return Findings(checks, [], "student, tokenizers, chains, memory")

    def student_sizes() -> DecoderConfig:
        config = student_config(recipe.student, teacher.config)
        student_model(recipe.student, config, mesh)
        recipe.objective(config, teacher.config, teacher.config.vocab_size)
        return config

    student = made("student", student_sizes, _sizes_in_words)
    if student is None:
        return Findings(checks, [], "weights, tokenizers, chains, memory")
    checks += model_checks(recipe, teacher, student, has_teacher_weights=_has_weights(recipe, teacher))
    chains: list[ShownChain] = []
    failed = {check.name for check in checks if check.status == "fail"}
    unreached = next((lost for name, lost in _LOST_WITH.items() if name in failed), "")
    if "chains" not in unreached:
        found, chains = _chains(recipe, teacher, student, count)
        checks += found
    checks += outcome("memory", lambda: _memory(recipe, teacher))
    return Findings(checks, chains, unreached)


def _ignore(_: str) -> None:
    pass


def _has_weights(recipe: Recipe, teacher: OpenModel) -> bool:
    """Whether the teacher's weights should be here: those of the hub are not downloaded for a check."""
    return Path(recipe.teacher.path).expanduser().is_dir() or any(teacher.directory.glob("*.safetensors"))


def _model_in_words(model: OpenModel) -> str:
    return f"{_sizes_in_words(model.config)} ({model.directory})"


def _sizes_in_words(config: DecoderConfig) -> str:
    return (
        f"{config.family}, {config.layers} layers, width {config.width}, {config.heads} heads ({config.kv_heads} for "
        f"keys and values), {parameter_count(config) / 1e6:,.2f}M parameters"
    )


def _chains(
    recipe: Recipe, teacher: OpenModel, student: DecoderConfig, count: int
) -> tuple[list[Check], list[ShownChain]]:
    """Checks of the chains, and those that are shown."""
    checks: list[Check] = []
    data = recipe.data
    if reads_teacher(data.segmentation):
        checks += outcome("steps", lambda: _steps_by_teacher(data))
        data = replace(data, segmentation="annotated")
    splits, problem = _loaded(data, teacher)
    if splits is None:
        return [*checks, Check("data", "fail", problem)], []
    sizes = {"teacher": teacher.config, "student": student}
    found = chain_checks(recipe, stages(recipe.curriculum), splits, sizes, teacher.tokenizer)
    if problem:
        found = [check for check in found if check.name != "longest chain"]
        checks.append(Check("longest chain", "fail", problem))
    checks += found
    checks += outcome("test problems", lambda: _test_problems(data, teacher))
    part = "window" if is_windows(data.segmentation) else "cut" if data.segmentation == "random" else "step"
    shown = shown_chains(splits["training"], count, teacher.tokenizer, data.text, data.row_length, part)
    return checks, shown


def _steps_by_teacher(data: DataSettings) -> Finding:
    folder = classifier_folder(data.segmentation)
    if folder is not None:
        load_classifier(folder)
    return "", (
        f"data.segmentation is {data.segmentation!r}, for which a run has the teacher read the chains; the steps that "
        "are shown and counted here are those of the data",
    )


def _loaded(data: DataSettings, teacher: OpenModel) -> tuple[dict[str, Chains] | None, str]:
    """Training and validation chains, and what is wrong with them; None where they cannot be made at all.

    Where more chains are too long than a run allows, those that fit are given nevertheless.
    """

    def splits(settings: DataSettings) -> dict[str, Chains]:
        return dict(zip(("training", "validation"), load_splits(settings, teacher.tokenizer), strict=True))

    try:
        return splits(data), ""
    except ValueError as error:
        problem = " ".join(str(error).split())
    try:
        return splits(replace(data, max_dropped_fraction=1.0)), problem
    except ValueError:
        return None, problem


def _test_problems(data: DataSettings, teacher: OpenModel) -> Finding:
    try:
        chains = encode_split(load_traces(data.test), data, teacher.tokenizer)
    except ValueError as error:
        raise ValueError(f"data.test: {error}") from error
    warning = (
        f"{chains.too_long} test problems are longer than a row of {data.row_length} tokens and are left out of the "
        f"evaluation; data.row_length={chains.longest} would hold all"
    )
    return f"{len(chains.traces):,}, the longest with {chains.longest} tokens", (warning,) if chains.too_long else ()


def _memory(recipe: Recipe, teacher: OpenModel) -> Finding:
    """What a device holds in any case, by the shapes that a plan compiles. What is computed on the way comes on top."""
    plan = "launch/plan.py with this recipe and --target=<hardware> has the compiler say what an update takes on top"
    planned = replace(recipe, teacher=replace(recipe.teacher, path=str(teacher.directory), revision=""))
    if recipe.student.init == "pretrained":
        folder = str(start_folder(recipe.student))
        planned = replace(planned, student=replace(recipe.student, path=folder, revision=""))
    devices = jax.devices()
    try:
        abstract = abstract_step(planned, make_mesh(recipe.mesh, devices))
    except ValueError as error:
        return "", (f"not counted on this machine: {error}. {plan}",)
    weights = () if recipe.teacher.cache else abstract.source
    leaves = jax.tree.leaves((abstract.state, weights, abstract.batch, abstract.own))
    held = sum(bytes_on_device(leaf) for leaf in leaves if leaf.sharding.memory_kind != "pinned_host")
    limit = (devices[0].memory_stats() or {}).get("bytes_limit", math.inf)
    amount = (
        f"weights, optimizer and a batch take {_in_words(held)} on each of {len(devices)} x {devices[0].device_kind}"
    )
    if held > limit:
        return "", (f"{amount}, which has {_in_words(limit)}; more devices, or less to hold. {plan}",)
    of = f" of {_in_words(limit)}" if limit < math.inf else ""
    return f"{amount}{of}; {plan}", ()


def _in_words(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"
