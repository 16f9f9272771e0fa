"""All settings of a training run, as one tree of frozen dataclasses. The files in configs/ say what differs."""

from dataclasses import dataclass, field
from typing import Literal

from jax.sharding import Mesh

from rtd_jax.base.settings import SEED, SettingError, check_filled, check_ranges
from rtd_jax.base.sharding import MeshSettings
from rtd_jax.data.formats import TextFormat
from rtd_jax.data.sources import SourceSettings
from rtd_jax.methods import LossSettings
from rtd_jax.methods.own_chains import RewardSettings
from rtd_jax.methods.term import Objective, Setup
from rtd_jax.models.config import LlamaConfig
from rtd_jax.models.decoder import AttentionKernel, Remat
from rtd_jax.models.open import FloatDtype, ModelSettings, OpenModel
from rtd_jax.teacher.cache import CacheSettings, Identity
from rtd_jax.train.curriculum import CurriculumSettings
from rtd_jax.train.optimizer import OptimizerSettings
from rtd_jax.train.update import UpdateSettings

MOST_TOKENS = 10**9  # of an update; a batch of more is a slip, and would fill the memory of the host
SIZES = ("layers", "width", "mlp_width", "heads", "kv_heads", "head_dim")  # of a student with random weights


@dataclass(frozen=True)
class TeacherSettings(ModelSettings):
    """The frozen teacher."""

    cache: str = ""  # folder that launch/cache_teacher.py wrote: the weights are then never loaded; "" runs the teacher


@dataclass(frozen=True)
class StudentSettings:
    """Where the student comes from. Params are float32; the optimizer needs the digits.

    `init`: "random" takes the sizes below; "teacher_layers" copies `layers` evenly spaced layers of the teacher, and
    its embeddings; "pretrained" loads `path`.
    """

    init: Literal["random", "teacher_layers", "pretrained"]  # where the weights come from
    path: str = ""  # Hugging Face folder or hub name; "pretrained" only
    layers: int = 0  # transformer blocks; "random" and "teacher_layers"
    width: int = 0  # hidden units; "random" only
    mlp_width: int = 0  # hidden units of the SwiGLU; "random" only
    heads: int = 0  # query heads; "random" only
    kv_heads: int = 0  # key/value heads; "random" only
    head_dim: int = 0  # units of one head; "random" only
    compute_dtype: FloatDtype = "bfloat16"  # of matrix products and hidden states
    attention: AttentionKernel = "auto"  # kernel; auto: cuDNN's where it runs, else XLA's
    remat: Remat = "none"  # what the backward pass recomputes; "full" keeps one state per layer

    def __post_init__(self) -> None:
        check_ranges(self, **dict.fromkeys(SIZES, "[0, 1e6]"))
        needed = {"pretrained": ("path",), "teacher_layers": ("layers",), "random": SIZES}[self.init]
        given = [name for name in ("path", *SIZES) if getattr(self, name)]
        missing = [name for name in needed if name not in given]
        unused = [name for name in given if name not in needed]
        if missing or unused:
            raise ValueError(
                f"init={self.init!r} "
                + (f"needs {', '.join(missing)}" if missing else f"does not read {', '.join(unused)}; leave them out")
            )


@dataclass(frozen=True)
class DataSettings:
    """Traces, their text form, and the shape of a row."""

    train: SourceSettings
    test: SourceSettings
    validation: SourceSettings | None = None  # None: `validation_fraction` of the training traces, chosen by hash
    validation_fraction: float = 0.05  # of the training traces, where `validation` is not given
    text: TextFormat = field(default_factory=TextFormat)
    segmentation: str = "annotated"  # steps: "annotated" (by the schema), "random" (a control), "classifier:<folder>"
    steps_cache: str = "runs/steps"  # folder that keeps the steps a classifier found; "" finds them again each time
    row_length: int = 1024  # tokens
    chains_per_row: int = 8  # at most; 1 switches packing off
    max_dropped_fraction: float = 0.0  # of chains longer than a row; more is an error

    def __post_init__(self) -> None:
        check_ranges(self, row_length="[2, 1e7]", chains_per_row="[1, 1e5]")
        check_ranges(self, validation_fraction="(0, 1)", max_dropped_fraction="[0, 1]")
        check_filled(self, "segmentation")

    def unread_settings(self) -> dict[str, str]:
        unread = {} if self.validation is None else {"validation_fraction": "data.validation is given"}
        if not self.segmentation.startswith("classifier:"):
            unread["steps_cache"] = f"data.segmentation is {self.segmentation!r}, no classifier"
        return unread


@dataclass(frozen=True)
class EvaluationSettings:
    """What is measured by greedy decoding: test problems at the end, validation problems in midrun evaluations."""

    problems_per_depth: int = 100  # test problems
    max_new_tokens: int = 256  # of a generated solution
    batch_size: int = 64  # problems decoded at one time
    teacher: bool = True  # evaluate the teacher beside the student
    every: int = 0  # updates between midrun evaluations, for accuracy against updates and time; 0: none
    curve_problems: int = 20  # validation problems of each depth in a midrun evaluation
    drift_problems: int = 0  # validation problems of each depth on which states are compared at the end; 0: none

    def __post_init__(self) -> None:
        check_ranges(self, problems_per_depth="[1, 1e6]", max_new_tokens="[1, 1e6]", batch_size="[1, 1e6]")
        check_ranges(self, every="[0, 1e9]", drift_problems="[0, 1e6]")
        check_ranges(self, curve_problems="[1, 1e6]" if self.every else "[0, 1e6]")

    def unread_settings(self) -> dict[str, str]:
        return {} if self.every else {"curve_problems": "evaluation.every is 0"}


@dataclass(frozen=True)
class Recipe:
    """A run. `total_updates` and every other count of updates are optimizer updates, not micro-batches."""

    teacher: TeacherSettings
    student: StudentSettings
    data: DataSettings
    batch_size: int  # rows per update
    total_updates: int  # over all stages
    cache: CacheSettings = CacheSettings()
    loss: LossSettings = LossSettings()
    reward: RewardSettings = RewardSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    curriculum: CurriculumSettings = CurriculumSettings()
    mesh: MeshSettings = MeshSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    micro_batches: int = 1  # per update; changes memory, not the update
    seed: int = 0  # of params and data order
    log_every: int = 10  # updates
    checkpoint_every: int = 500  # updates between rolling checkpoints
    keep_checkpoints: int = 2  # rolling ones; stage checkpoints are all kept
    checkpoint_digest: bool = True  # saved arrays get digests, checked on restoring: one pass over the state's bytes
    resume_from: str = ""  # a stage checkpoint of another run; "" starts afresh or resumes this workdir

    def __post_init__(self) -> None:
        check_ranges(self, batch_size="[1, 1e6]", total_updates="[1, 1e9]", micro_batches="[1, 1e6]", seed=SEED)
        check_ranges(self, log_every="[1, 1e9]", checkpoint_every="[1, 1e9]", keep_checkpoints="[1, 1e6]")
        if self.batch_size * self.data.row_length > MOST_TOKENS:
            raise SettingError(
                f"batch_size is {self.batch_size} with data.row_length {self.data.row_length}; expected at most "
                f"{MOST_TOKENS:,} tokens in an update"
            )
        if self.loss.reward_weight:
            self._check_reward()
        curriculum = self.curriculum
        by_coherence = curriculum.enabled and (curriculum.threshold_factor or curriculum.plateau_patience)
        if not self.loss.teaches() and by_coherence:
            raise ValueError(
                "the loss has nothing of the teacher in it, so no coherence loss can end a stage: set "
                "curriculum.enabled=False, or curriculum.threshold_factor=0 and plateau_patience=0 for stages of equal "
                "length"
            )

    def _check_reward(self) -> None:
        if not self.reward.model:
            raise ValueError(
                "loss.reward_weight is not 0, but reward.model is empty; train one with launch/reward_model.py and "
                "give <its workdir>/model, or give 'judge' for problems whose answers are numbers"
            )
        if self.teacher.cache and not self.reward.by_judge:
            raise ValueError(
                "loss.reward_weight needs the teacher online, on which the reward model is a head: the chains that the "
                "student draws are in no cache; set teacher.cache='', or reward.model='judge'"
            )
        if self.checkpoint_every % self.reward.updates_per_refresh:
            raise ValueError(
                f"checkpoint_every {self.checkpoint_every} is not a multiple of reward.updates_per_refresh "
                f"{self.reward.updates_per_refresh}: drawn chains are not in a checkpoint, so one may only be taken "
                "where new ones are due"
            )

    def unread_settings(self) -> dict[str, str]:
        """Keys that a training run does not read because of others, and why; groups say the same of their own keys."""
        unread = {}
        if not self.loss.reward_weight:
            unread["reward"] = "loss.reward_weight is 0"
        if not self.loss.teaches():
            names = [f"loss.{name}" for name in ("anchor_prompt", "projections", "transition_form")]
            names += ["loss.divergence", "loss.beta"]
            if not self.teacher.cache:
                names.append("loss.temperature")
            if not self.teacher.cache and not self.evaluation.drift_problems:
                names += ["loss.hidden_layer", "loss.student_hidden_layer"]
            names += [f"curriculum.{name}" for name in self.curriculum.READ_BY_VALIDATION]
            unread |= dict.fromkeys(names, "the loss has nothing of the teacher in it")
        if not self.teacher.cache:
            unread["cache"] = "teacher.cache is empty"
            return unread
        unread["cache.chains_per_shard"] = "it is read when a cache is written"
        names = [] if self.data.segmentation.startswith("classifier:") else ["attention", "sharding", "offload"]
        unread |= {f"teacher.{name}": "the teacher is read from teacher.cache" for name in names}
        if self.evaluation.teacher:
            unread["evaluation.teacher"] = "the teacher is read from teacher.cache, which cannot solve problems"
        return unread

    @property
    def rows_at_once(self) -> int:
        """Rows of a micro-batch. Validation and scoring take no more at one time, so they fit where an update does."""
        return self.batch_size // self.micro_batches

    @property
    def update(self) -> UpdateSettings:
        """What is compiled into the update beside the objective."""
        return UpdateSettings(self.micro_batches, self.optimizer.offload)

    def objective(
        self, student: LlamaConfig, teacher: LlamaConfig, vocab_size: int, mesh: Mesh | None = None
    ) -> Objective:
        """The objective for two models.

        Raises:
          ValueError: a layer that a model does not have.
        """
        return self.loss.objective(Setup(student, teacher, vocab_size, self.reward, mesh))


def cache_identity(recipe: Recipe, teacher: OpenModel) -> Identity:
    """What a teacher cache must have been written with, for this recipe to read it.

    Raises:
      ValueError: the recipe names a layer that the teacher does not have.
    """
    layer = teacher.config.layer_index(recipe.loss.hidden_layer)
    try:
        others = [teacher.config.layer_index(other) for other in recipe.cache.layers]
    except ValueError as error:
        raise ValueError(f"cache.layers is {recipe.cache.layers}: {error}") from error
    return Identity(
        teacher=teacher.fingerprint,
        teacher_dtypes=recipe.teacher.precision,
        tokenizer=teacher.tokenizer_fingerprint,
        vocab_size=teacher.vocab_size,
        width=teacher.config.width,
        hidden_layer=layer,
        temperature=recipe.loss.temperature,
        top_k=min(recipe.cache.top_k, teacher.vocab_size),
        predictions=recipe.cache.predictions,
        states=recipe.cache.states,
        layers=tuple(sorted({layer, *others})),
    )
