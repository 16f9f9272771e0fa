"""Everything a run is told, as one tree of frozen dataclasses. The configs in configs/ are these, with comments."""

from dataclasses import dataclass, field
from typing import Literal

from rtd_jax.base.sharding import MeshSettings
from rtd_jax.data.formats import TextFormat
from rtd_jax.data.sources import SourceSettings
from rtd_jax.losses import LossWeights
from rtd_jax.losses.every_token import evenly_spaced
from rtd_jax.losses.trajectory import TransitionForm
from rtd_jax.teacher.cache import CacheSettings
from rtd_jax.train.curriculum import CurriculumSettings
from rtd_jax.train.optimizer import OptimizerSettings
from rtd_jax.train.state import Maps
from rtd_jax.train.update import StepSettings

Dtype = Literal["float32", "bfloat16"]
Remat = Literal["none", "dots", "full"]
Attention = Literal["auto", "xla", "cudnn"]


@dataclass(frozen=True)
class TeacherSettings:
    """The frozen teacher."""

    path: str  # Hugging Face folder or hub name
    param_dtype: Literal["float32", "bfloat16", "int8"] = "bfloat16"  # of weights in memory; int8: a scale per channel
    compute_dtype: Dtype = "bfloat16"  # of matrix products and hidden states
    attention: Attention = "auto"  # kernel; auto: cuDNN's where it runs, else XLA's
    sharding: Literal["fsdp", "tensor"] = "fsdp"  # what travels between devices: "fsdp" weights, "tensor" activations
    offload: bool = False  # layers in host memory, each copied to the devices when it runs
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
    compute_dtype: Dtype = "bfloat16"  # of matrix products and hidden states
    attention: Attention = "auto"  # kernel; auto: cuDNN's where it runs, else XLA's
    remat: Remat = "none"  # what the backward pass recomputes; "full" keeps one state per layer

    def __post_init__(self) -> None:
        needed = {"pretrained": ("path",), "teacher_layers": ("layers",)}.get(
            self.init, ("layers", "width", "mlp_width", "heads", "kv_heads", "head_dim")
        )
        missing = [name for name in needed if not getattr(self, name)]
        unused = [
            name
            for name in ("path", "layers", "width", "mlp_width", "heads", "kv_heads", "head_dim")
            if getattr(self, name) and name not in needed
        ]
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
    segmentation: str = "annotated"  # where steps end: "annotated", "random" (a control), "classifier:<folder>"
    steps_cache: str = "runs/steps"  # folder that keeps the steps a classifier found; "" finds them again each time
    row_length: int = 1024  # tokens
    chains_per_row: int = 8  # at most; 1 switches packing off
    max_dropped_fraction: float = 0.0  # of chains longer than a row; more is an error

    def __post_init__(self) -> None:
        prose = [x for x in (self.train, self.validation, self.test) if x is not None and x.schema == "prose"]
        if prose and not self.segmentation.startswith("classifier:"):
            raise ValueError(
                f"segmentation is {self.segmentation!r}, but the texts of {prose[0].location} have no marked steps; "
                "use 'classifier:<folder>' with a classifier that launch/boundaries.py fitted to the teacher"
            )

    def unread_settings(self) -> dict[str, str]:
        unread = {} if self.validation is None else {"validation_fraction": "data.validation is given"}
        if not self.segmentation.startswith("classifier:"):
            unread["steps_cache"] = f"data.segmentation is {self.segmentation!r}, no classifier"
        return unread


@dataclass(frozen=True)
class LossSettings:
    """L = alpha T^2 KL + (1 - alpha) CE + alignment_weight L_align + coherence_weight L_coherence, and its rivals.

    With alpha and all weights 0 the teacher is not run: fine-tuning on chains of thought.
    """

    temperature: float = 4.0  # T of the soft loss
    alpha: float = 0.7  # share of the soft loss; the labels' cross-entropy gets 1 - alpha
    alignment_weight: float = 0.3  # of the boundary alignment
    coherence_weight: float = 0.5  # of the reasoning coherence
    anchor_prompt: bool = True  # the prompt's end is h_0, so that a one-step problem has a transition
    hidden_layer: int = -1  # of the teacher, matched at the boundaries; -1 final normed state
    student_hidden_layer: int = -1  # of the student, likewise
    projections: Maps = "separate"  # f for states and g for transitions: "separate", "shared" (one map), "none"
    transition_form: TransitionForm = "direction"  # "direction": the article's cosine; "difference": lengths count too
    chunk_length: int = 32  # positions of each row whose logits exist at one time
    token_alignment_weight: float = 0.0  # a control: alignment at every token of a completion
    intermediate_weight: float = 0.0  # a baseline: intermediate layers matched at every token
    intermediate_layers: int = 4  # pairs of evenly spaced layers; read when intermediate_weight is not 0
    reward_weight: float = 0.0  # a baseline: rewards of the steps of the student's own chains (see RewardSettings)

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"loss.temperature is {self.temperature}; it must be positive, the article uses 4.0")
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(
                f"loss.alpha is {self.alpha}; it is the soft loss's share, in [0, 1]; the article uses 0.7"
            )
        if self.intermediate_layers < 1:
            raise ValueError(f"loss.intermediate_layers is {self.intermediate_layers}; FitNets-style matching uses 4")

    def weights(self) -> LossWeights:
        return LossWeights(
            self.temperature,
            self.alpha,
            self.alignment_weight,
            self.coherence_weight,
            self.token_alignment_weight,
            self.intermediate_weight,
            self.reward_weight,
        )

    @property
    def reads_teacher(self) -> bool:
        """Whether the loss on given chains has anything of the teacher in it."""
        weights = (self.alignment_weight, self.coherence_weight, self.token_alignment_weight, self.intermediate_weight)
        return bool(self.alpha or any(weights))

    def intermediate_pairs(self, student_layers: int, teacher_layers: int) -> tuple[tuple[int, int], ...]:
        """(student layer, teacher layer) matched at every token; none where their weight is 0."""
        if not self.intermediate_weight:
            return ()
        count = self.intermediate_layers
        return tuple(zip(evenly_spaced(student_layers, count), evenly_spaced(teacher_layers, count), strict=True))


@dataclass(frozen=True)
class RewardSettings:
    """How the student draws chains of its own and learns from their steps' rewards.

    Read when loss.reward_weight is not 0. Every `updates_per_refresh` updates, `samples` chains of each of `prompts`
    training problems are drawn and scored; each update takes `prompts_per_update` of these problems with all their
    chains, in turn.
    """

    model: str = ""  # folder that launch/reward_model.py wrote
    prompts: int = 32  # training problems of a refresh
    samples: int = 4  # chains of each problem
    prompts_per_update: int = 8  # of these problems, with all their chains
    updates_per_refresh: int = 8  # optimizer updates; a divisor of checkpoint_every
    temperature: float = 1.0  # of the draws, and of the policy whose ratios are clipped
    clip: float = 0.2  # by which a probability's ratio may leave 1 before its gradient stops
    max_new_tokens: int = 128  # of a drawn chain
    batch_size: int = 128  # chains drawn at one time

    def __post_init__(self) -> None:
        for name in ("prompts", "prompts_per_update", "updates_per_refresh", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"reward.{name} is {getattr(self, name)}; it must be at least 1")
        if self.samples < 2:
            raise ValueError(
                f"reward.samples is {self.samples}; advantages compare the chains of a problem, use 2 or more"
            )
        if self.prompts % self.prompts_per_update:
            raise ValueError(
                f"reward.prompts {self.prompts} is not a multiple of reward.prompts_per_update "
                f"{self.prompts_per_update}"
            )
        if self.temperature <= 0 or self.clip <= 0:
            raise ValueError(
                f"reward.temperature is {self.temperature}, reward.clip {self.clip}; both must be positive"
            )

    @property
    def rows(self) -> int:
        """Drawn chains of an update, one a row."""
        return self.prompts_per_update * self.samples


@dataclass(frozen=True)
class EvaluationSettings:
    """What is measured by free-running greedy decoding: test problems at the end, validation problems on the way."""

    problems_per_depth: int = 100  # test problems
    max_new_tokens: int = 256  # of a generated solution
    batch_size: int = 64  # problems decoded at one time
    teacher: bool = True  # evaluate the teacher beside the student
    every: int = 0  # updates between looks at validation problems, for accuracy against updates and time; 0: none
    curve_problems: int = 20  # validation problems of each depth for these looks
    drift_problems: int = 0  # validation problems of each depth on which states are compared at the end; 0: none

    def __post_init__(self) -> None:
        for name in ("every", "drift_problems"):
            if getattr(self, name) < 0:
                raise ValueError(f"evaluation.{name} is {getattr(self, name)}; 0 leaves it out, else give a number")
        if self.every and self.curve_problems < 1:
            raise ValueError(f"evaluation.curve_problems is {self.curve_problems}; it must be at least 1")

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
    resume_from: str = ""  # a stage checkpoint of another run; "" starts afresh or resumes this workdir

    def __post_init__(self) -> None:
        for name in (
            "batch_size",
            "total_updates",
            "micro_batches",
            "log_every",
            "checkpoint_every",
            "keep_checkpoints",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.loss.reward_weight:
            self._check_reward()
        curriculum = self.curriculum
        by_coherence = curriculum.enabled and (curriculum.threshold_factor or curriculum.plateau_patience)
        if not self.loss.reads_teacher and by_coherence:
            raise ValueError(
                "the loss has nothing of the teacher in it, so no coherence loss can end a stage: set "
                "curriculum.enabled=False, or curriculum.threshold_factor=0 and plateau_patience=0 for stages of equal "
                "length"
            )

    def _check_reward(self) -> None:
        if not self.reward.model:
            raise ValueError(
                "loss.reward_weight is not 0, but reward.model is empty; train one with launch/reward_model.py and "
                "give <its workdir>/model"
            )
        if self.teacher.cache:
            raise ValueError(
                "loss.reward_weight needs the teacher online: the chains that the student draws are in no cache; set "
                "teacher.cache=''"
            )
        if self.checkpoint_every % self.reward.updates_per_refresh:
            raise ValueError(
                f"checkpoint_every {self.checkpoint_every} is not a multiple of reward.updates_per_refresh "
                f"{self.reward.updates_per_refresh}: drawn chains are not in a checkpoint, so one may only be taken "
                "where new ones are due"
            )

    def unread_settings(self) -> dict[str, str]:
        """Keys that a training run does not read because of others, and why; groups say the same of their own keys."""
        loss, unread = self.loss, {}
        if not loss.reward_weight:
            unread["reward"] = "loss.reward_weight is 0"
        if not loss.intermediate_weight:
            unread["loss.intermediate_layers"] = "loss.intermediate_weight is 0"
        if not loss.reads_teacher:
            names = [f"loss.{name}" for name in ("anchor_prompt", "projections", "transition_form")]
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
        """Rows of a micro-batch; validation and scoring take no more, so that they fit where an update does."""
        return self.batch_size // self.micro_batches

    def step(self, student_layers: int, teacher_layers: int) -> StepSettings:
        """What is compiled into the update, for models of so many layers."""
        loss = self.loss
        return StepSettings(
            self.micro_batches,
            loss.anchor_prompt,
            loss.hidden_layer,
            loss.student_hidden_layer,
            loss.transition_form,
            loss.chunk_length,
            bool(loss.token_alignment_weight),
            loss.intermediate_pairs(student_layers, teacher_layers),
            not loss.reads_teacher,
            self.reward.temperature,
            self.reward.clip,
            self.optimizer.offload,
        )
