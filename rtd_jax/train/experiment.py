"""From a recipe to everything a run needs in memory: models, params, chains, mesh, optimizer, step."""

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rtd_jax.base.sharding import (
    TABLES,
    activation_sharding,
    check_rows,
    in_host_memory,
    make_mesh,
    param_shardings,
    put_batch,
    row_sharding,
)
from rtd_jax.base.types import Batch, Params
from rtd_jax.data.encoding import chains_fingerprint
from rtd_jax.data.tokenizer_match import compare_tokenizers, tokenizer_fingerprint
from rtd_jax.methods.term import Objective
from rtd_jax.models.config import LlamaConfig
from rtd_jax.models.from_hf import load_config, load_params, resolve
from rtd_jax.models.model import LlamaModel
from rtd_jax.models.weights import evenly_spaced_layers, logical_axes
from rtd_jax.steps.classifier import load_classifier
from rtd_jax.steps.detector import Detector
from rtd_jax.steps.select import classifier_folder
from rtd_jax.teacher.cache import Identity, TeacherCache
from rtd_jax.teacher.reward_head import RewardModel, load_head
from rtd_jax.train.curriculum import Stage, stages
from rtd_jax.train.optimizer import make_optimizer
from rtd_jax.train.recipe import Recipe, StudentSettings, TeacherSettings
from rtd_jax.train.splits import Chains, load_splits
from rtd_jax.train.state import TrainState, create_state, state_shardings
from rtd_jax.train.update import TeacherSource, TrainStep, make_train_step


@dataclass(frozen=True)
class Experiment:
    """Everything that stays the same while a run goes on."""

    recipe: Recipe
    mesh: Mesh
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    teacher: LlamaModel | None  # None where its outputs are read from a cache, or not at all
    teacher_config: LlamaConfig
    teacher_params: Params  # empty without a teacher
    cache: TeacherCache | None
    reward: RewardModel | None  # None where no reward is learned from
    student: LlamaModel
    objective: Objective
    optimizer: optax.GradientTransformation
    step: TrainStep
    train: Chains
    validation: Chains
    detector: Detector | None  # where a classifier cuts the chains
    stages: tuple[Stage, ...]
    max_boundaries: int  # slots of a chain, the prompt's end included
    fingerprints: dict[str, str]

    def source(self, batch: Batch, states_only: bool = False) -> TeacherSource:
        """The teacher, as a step or an evaluation of this very batch takes it: its params, or its cached outputs.

        Args:
          batch: this process's rows, on the host.
          states_only: leave the predictions out.
        """
        if not (self.objective.reads_teacher or states_only):
            return {}
        if self.cache is None:
            return self.teacher_params
        dtype = self.recipe.teacher.compute_dtype
        return put_batch(self.cache.outputs(batch, states_only=states_only, dtype=dtype), self.mesh)


def prepare(recipe: Recipe, note: Callable[[str], None] = print) -> tuple[Experiment, TrainState]:
    """Everything a run needs, and its initial state. Cheap checks come first, weights last; `note` says what goes on.

    Raises:
      ValueError: anything in the recipe, the data or the checkpoints that cannot work, with the place and the way out.
    """
    mesh = make_mesh(recipe.mesh)
    check_rows(recipe.batch_size, mesh, recipe.micro_batches)
    teacher_dir = resolve(recipe.teacher.path)
    teacher_config = load_config(teacher_dir)
    tokenizer = load_tokenizer(teacher_dir)
    student_dir = resolve(recipe.student.path) if recipe.student.init == "pretrained" else None
    of_student = load_config(student_dir) if student_dir else student_config(recipe.student, teacher_config)
    if student_dir is not None:
        for line in compare_tokenizers(tokenizer, load_tokenizer(student_dir), str(teacher_dir), str(student_dir)):
            note(line)
    vocab_size = len(tokenizer)
    for name, config in (("teacher", teacher_config), ("student", of_student)):
        if config.vocab_size < vocab_size:
            raise ValueError(
                f"the tokenizer has {vocab_size} tokens but the {name}'s embedding only {config.vocab_size} rows; "
                f"give the {name} that belongs to the tokenizer in {teacher_dir}"
            )

    note("reading and tokenising the chains")
    fingerprint = weights_fingerprint(teacher_dir)
    loaded = LoadedTeacher(recipe.teacher, teacher_config, teacher_dir, mesh, note)
    detector = make_detector(recipe, loaded, fingerprint, tokenizer)
    train, validation = load_splits(recipe.data, tokenizer, detector)
    plan = tuple(stages(recipe.curriculum))
    _check_stages(plan, train, validation)
    for split, chains in (("train", train), ("validation", validation)):
        if chains.too_long:
            note(
                f"{split}: {chains.too_long} chains longer than a row of {recipe.data.row_length} tokens were left out"
            )

    cache = None
    if recipe.teacher.cache:
        identity = cache_identity(recipe, teacher_config, fingerprint, tokenizer)
        cache = TeacherCache(Path(recipe.teacher.cache).expanduser(), identity)
        note(f"the teacher is read from the cache {recipe.teacher.cache}: its weights are not loaded")
    reward = None
    if recipe.loss.reward_weight:
        check_rows(recipe.reward.rows, mesh, recipe.micro_batches, "reward.prompts_per_update x reward.samples =")
        folder, of_tokenizer = Path(recipe.reward.model).expanduser(), tokenizer_fingerprint(tokenizer)
        reward = load_head(folder, fingerprint, of_tokenizer, recipe.data.text.identity)
    needed = _needs_weights(recipe)
    teacher = loaded.model if needed else None
    student = student_model(recipe.student, of_student, mesh)
    teacher_params = loaded.params if needed else {}
    optimizer = make_optimizer(recipe.optimizer, recipe.total_updates)
    objective = recipe.objective(of_student, teacher_config, vocab_size, mesh)
    state = _initial_state(recipe, student, student_dir, teacher_dir, teacher_config, objective, optimizer, mesh)
    step = make_train_step(student, teacher, optimizer, objective, recipe.update, mesh)
    experiment = Experiment(
        recipe=recipe,
        mesh=mesh,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        teacher=teacher,
        teacher_config=teacher_config,
        teacher_params=teacher_params,
        cache=cache,
        reward=reward,
        student=student,
        objective=objective,
        optimizer=optimizer,
        step=step,
        train=train,
        validation=validation,
        detector=detector,
        stages=plan,
        max_boundaries=1 + max(t.depth for chains in (train, validation) for t in chains.traces),
        fingerprints={
            "teacher": fingerprint,
            "cache": "" if cache is None else cache.fingerprint,
            "reward": "" if reward is None else reward.digest,
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "data": chains_fingerprint((*train.encoded, *validation.encoded)),
            "student_config": _digest(repr(of_student)),
        },
    )
    return experiment, state


def _needs_weights(recipe: Recipe) -> bool:
    """Whether anything that the recipe does runs the teacher."""
    return not recipe.teacher.cache and bool(
        recipe.loss.teaches()
        or recipe.loss.reward_weight
        or recipe.evaluation.teacher
        or recipe.evaluation.drift_problems
    )


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a Hugging Face folder; never runs code from it.

    Raises:
      ValueError: there is none, or it is a slow one (no character offsets).
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
    except Exception as error:
        raise ValueError(
            f"{directory} has no tokenizer that can be loaded ({type(error).__name__}: {error}); put "
            "tokenizer.json and tokenizer_config.json beside the weights"
        ) from error
    if not tokenizer.is_fast:
        raise ValueError(f"{directory} has a slow tokenizer without character offsets; add its tokenizer.json")
    return tokenizer


def teacher_model(settings: TeacherSettings, config: LlamaConfig, mesh: Mesh) -> LlamaModel:
    """The teacher without its weights."""
    between_layers = activation_sharding(mesh, TABLES[settings.sharding])
    return LlamaModel(
        config,
        settings.compute_dtype,
        activation_sharding=between_layers,
        attention=settings.attention,
        streamed=settings.offload,
    )


def student_model(settings: StudentSettings, config: LlamaConfig, mesh: Mesh) -> LlamaModel:
    """The student without its weights."""
    return LlamaModel(
        config,
        settings.compute_dtype,
        settings.remat,
        activation_sharding=row_sharding(mesh),
        attention=settings.attention,
    )


def teacher_shardings(settings: TeacherSettings, model: LlamaModel, mesh: Mesh) -> Params:
    """Where each of the teacher's weights lies."""
    abstract = model.abstract_params(settings.param_dtype)
    shardings = param_shardings(abstract, logical_axes(abstract), mesh, TABLES[settings.sharding])
    return shardings | {"layers": in_host_memory(shardings["layers"])} if settings.offload else shardings


def load_teacher(settings: TeacherSettings, model: LlamaModel, directory: Path, mesh: Mesh) -> Params:
    """The teacher's weights, where they belong on the mesh."""
    shardings = teacher_shardings(settings, model, mesh)
    return load_params(directory, model.config, dtype=settings.param_dtype, shardings=shardings)


@dataclass(frozen=True, eq=False)
class LoadedTeacher:
    """The teacher, its weights read when they are first asked for: with a cache that may be never."""

    settings: TeacherSettings
    config: LlamaConfig
    directory: Path
    mesh: Mesh
    note: Callable[[str], None]

    @functools.cached_property
    def model(self) -> LlamaModel:
        return teacher_model(self.settings, self.config, self.mesh)

    @functools.cached_property
    def params(self) -> Params:
        self.note(f"loading the teacher from {self.directory}")
        return load_teacher(self.settings, self.model, self.directory, self.mesh)


def make_detector(
    recipe: Recipe, loaded: LoadedTeacher, fingerprint: str, tokenizer: PreTrainedTokenizerBase
) -> Detector | None:
    """What cuts the recipe's chains, where that is a classifier.

    Raises:
      ValueError: the classifier is missing or damaged, or was fitted to another teacher.
    """
    folder = classifier_folder(recipe.data.segmentation)
    if folder is None:
        return None
    classifier = load_classifier(folder)
    classifier.check_teacher(fingerprint, tokenizer_fingerprint(tokenizer), f"the recipe's teacher {loaded.directory}")

    def teacher() -> tuple[LlamaModel, Params]:
        if recipe.teacher.cache and "params" not in loaded.__dict__:
            loaded.note("some chains have not been cut yet, so the teacher is loaded in spite of its cache")
        return loaded.model, loaded.params

    return Detector(
        classifier,
        tokenizer,
        loaded.mesh,
        teacher,
        described=f"{recipe.teacher.param_dtype} weights, {recipe.teacher.compute_dtype} arithmetic",
        folder=Path(recipe.data.steps_cache).expanduser() if recipe.data.steps_cache else None,
        note=loaded.note,
    )


def cache_identity(
    recipe: Recipe, config: LlamaConfig, fingerprint: str, tokenizer: PreTrainedTokenizerBase
) -> Identity:
    """What a cache must have been written with to serve this recipe."""
    layer, *others = (
        layer if layer >= 0 else config.layers + 1 + layer for layer in (recipe.loss.hidden_layer, *recipe.cache.layers)
    )
    if not all(0 <= other <= config.layers for other in others):
        raise ValueError(
            f"cache.layers is {recipe.cache.layers}; the teacher's layers are counted from 0 (embeddings) to "
            f"{config.layers} (final states), or from the end as -1, -2, .."
        )
    return Identity(
        teacher=fingerprint,
        teacher_dtypes=f"{recipe.teacher.param_dtype} weights, {recipe.teacher.compute_dtype} arithmetic",
        tokenizer=tokenizer_fingerprint(tokenizer),
        vocab_size=len(tokenizer),
        width=config.width,
        hidden_layer=layer,
        temperature=recipe.loss.temperature,
        top_k=min(recipe.cache.top_k, len(tokenizer)),
        predictions=recipe.cache.predictions,
        states=recipe.cache.states,
        layers=tuple(sorted({layer, *others})),
    )


def _check_stages(plan: Sequence[Stage], train: Chains, validation: Chains) -> None:
    for split, chains in (("training", train), ("validation", validation)):
        for stage in plan:
            if not chains.of_stage(stage):
                have = sorted({trace.depth for trace in chains.traces})
                raise ValueError(
                    f"curriculum stage {stage.name} has no {split} chain: the chains have {have} steps. Set "
                    f"curriculum.depths to depths that exist, e.g. {tuple(have[:5])}, or add data"
                )


def student_config(student: StudentSettings, teacher: LlamaConfig) -> LlamaConfig:
    """Sizes of a student that has no checkpoint of its own: cut from the teacher, or as the settings say.

    Raises:
      ValueError: more layers than the teacher has.
    """
    if student.init == "teacher_layers":
        if not 1 <= student.layers <= teacher.layers:
            raise ValueError(f"student.layers is {student.layers}; the teacher has {teacher.layers} to take them from")
        return replace(teacher, layers=student.layers)
    return replace(
        teacher,
        layers=student.layers,
        width=student.width,
        mlp_width=student.mlp_width,
        heads=student.heads,
        kv_heads=student.kv_heads,
        head_dim=student.head_dim,
    )


def _initial_state(
    recipe: Recipe,
    student: LlamaModel,
    student_dir: Path | None,
    teacher_dir: Path,
    teacher_config: LlamaConfig,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
) -> TrainState:
    student_key, maps_key, run_key = jax.random.split(jax.random.PRNGKey(recipe.seed), 3)
    widths = (student.config.width, teacher_config.width)

    def assemble(params: Params) -> TrainState:
        return create_state({"student": params, **objective.init_params(maps_key, *widths)}, optimizer, run_key)

    abstract = jax.eval_shape(assemble, student.abstract_params())
    shardings = state_shardings(abstract, optimizer, mesh, objective.param_axes(), recipe.optimizer.offload)
    of_student = shardings.params["student"]
    if student_dir is not None:
        params = load_params(student_dir, student.config, dtype="float32", shardings=of_student)
    elif recipe.student.init == "teacher_layers":
        # From the files, not from the params in memory, which may be rounded.
        chosen = evenly_spaced_layers(teacher_config.layers, recipe.student.layers)
        params = load_params(teacher_dir, teacher_config, dtype="float32", shardings=of_student, layers=chosen)
    else:
        params = jax.jit(student.init, out_shardings=of_student)(student_key)
    return jax.jit(assemble, out_shardings=shardings, donate_argnums=0)(params)


def weights_fingerprint(directory: Path) -> str:
    """sha256 over config.json and, of each safetensors file, name, size and header (names, dtypes, shapes, offsets) and
    the first and last MiB of data: enough to tell checkpoints apart without reading 140 GB."""
    digest = hashlib.sha256((directory / "config.json").read_bytes())
    for path in sorted(directory.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            head = file.read(8)
            digest.update(head + file.read(min(int.from_bytes(head, "little"), size)) + file.read(2**20))
            file.seek(max(0, size - 2**20))
            digest.update(file.read())
    return digest.hexdigest()


def _digest(text: Any) -> str:
    return hashlib.sha256(str(text).encode()).hexdigest()
