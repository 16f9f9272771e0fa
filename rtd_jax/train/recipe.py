"""All settings of a training run, as one tree of frozen dataclasses. The files in configs/ say what differs."""

from dataclasses import dataclass, field
from typing import Any, Literal

from jax.sharding import Mesh

from rtd_jax.base.settings import SEED, SettingError, check_filled, check_ranges
from rtd_jax.base.sharding import MeshSettings
from rtd_jax.data.formats import TextFormat
from rtd_jax.data.sources import SourceSettings
from rtd_jax.methods import LossSettings
from rtd_jax.methods.own_chains import OnPolicySettings, RewardSettings
from rtd_jax.methods.term import Objective, Setup
from rtd_jax.models.adapters import AdapterSettings
from rtd_jax.models.computation import AttentionKernel, Remat
from rtd_jax.models.config import DecoderConfig
from rtd_jax.models.open import FloatDtype, ModelSettings
from rtd_jax.models.pruning import PRUNED_SIZES
from rtd_jax.models.schemes import QType, Scheme
from rtd_jax.steps.select import is_windows, reads_teacher, soft_of
from rtd_jax.teacher.identity import CacheSettings
from rtd_jax.teacher.served.predictions import ServingSettings
from rtd_jax.train.curriculum import CurriculumSettings
from rtd_jax.train.optimizer import OptimizerSettings
from rtd_jax.train.update import UpdateSettings

MOST_TOKENS = 10**9  # of an update; a batch of more is a slip, and would fill the memory of the host
SIZES = ("layers", "width", "mlp_width", "heads", "kv_heads", "head_dim")  # of a student with random weights
_READ = {  # by `student.init`, beside what is read in any case; all but the sizes of a pruned student are needed
    "pretrained": ("path",),
    "teacher_layers": ("layers",),
    "random": SIZES,
    "pruned": ("share", *PRUNED_SIZES),
}
_OPTIONAL = {"pretrained": ("revision",)}  # read beside these, and never needed


@dataclass(frozen=True)
class TeacherSettings(ModelSettings):
    """The frozen teacher.

    With `served_model` it is a model behind a server. `path` then needs no weights, only its config.json and tokenizer;
    the cache holds the server's predictions and no states, and a run that trains from it needs no server.
    """

    cache: str = ""  # folder that launch/cache_teacher.py wrote: the weights are then never loaded; "" runs the teacher
    server: str = ""  # address of a server that launch/cache_teacher.py asks, such as http://localhost:8000/v1
    served_model: str = ""  # name of the teacher on that server, to which the cache is bound; "" for weights in `path`
    serving: ServingSettings = ServingSettings()  # how the server is asked


@dataclass(frozen=True)
class StudentSettings:
    """Where the student comes from. Params that are trained are float32; the optimizer needs the digits.

    `init`: "random" takes the sizes below; "teacher_layers" copies `layers` evenly spaced layers of the teacher, and
    its embeddings; "pretrained" loads `path`; "pruned" keeps what matters most of the teacher's weights on training
    chains, as many as `share` or the sizes say (`models.pruning.pruned_config`).
    """

    init: Literal["random", "teacher_layers", "pretrained", "pruned"]  # where the weights come from
    path: str = ""  # Hugging Face folder or hub name; "pretrained" only
    share: float = 0.0  # of the teacher's parameters, by width and mlp_width; "pruned" only. 0: sizes alone
    layers: int = 0  # transformer blocks; not of "pretrained". "pruned": 0 keeps all
    width: int = 0  # hidden units; "random" and "pruned" (0: by share)
    mlp_width: int = 0  # hidden units of the SwiGLU; "random" and "pruned" (0: by share)
    heads: int = 0  # query heads; "random" only
    kv_heads: int = 0  # key/value heads; "random" and "pruned", with their query heads (0 keeps all)
    head_dim: int = 0  # units of one head; "random" only
    calibration_chains: int = 64  # training chains on which importance is measured; "pruned" only
    compute_dtype: FloatDtype = "bfloat16"  # of matrix products and hidden states
    attention: AttentionKernel = "auto"  # kernel; auto: cuDNN's where it runs, else XLA's
    remat: Remat = "none"  # what the backward pass recomputes; "full" keeps one state per layer
    quantization: Literal["none", QType] = "none"  # train through matrices rounded to this, and save them rounded
    group_size: int = 128  # inputs that share a scale; 0: all of an output channel
    symmetric: bool = True  # no zero points; False for int8 and int4 only
    quantize_head: bool = False  # round the embedding and the head too
    revision: str = ""  # of `path` on the hub: commit, tag or branch; "" is the newest. A local folder has none
    adapter: AdapterSettings = AdapterSettings()  # train low-rank matrices beside frozen weights

    def __post_init__(self) -> None:
        check_ranges(self, **dict.fromkeys(SIZES, "[0, 1e6]"), share="[0, 1)", calibration_chains="[1, 1e6]")
        check_ranges(self, group_size="[0, 1e6]")
        _ = self.scheme  # refuses what does not exist
        given = [name for name in ("path", "revision", "share", *SIZES) if getattr(self, name)]
        read = (*_READ[self.init], *_OPTIONAL.get(self.init, ()))
        missing = [name for name in _READ[self.init] if name not in given] if self.init != "pruned" else []
        if self.init == "pruned" and not given:
            raise ValueError(f"init='pruned' needs share (it is {self.share}), or one of {', '.join(PRUNED_SIZES)}")
        unused = [name for name in given if name not in read]
        if missing or unused:
            needs = ", ".join(f"{name} (it is {getattr(self, name)!r})" for name in missing)
            raise ValueError(
                f"init={self.init!r} "
                + (f"needs {needs}" if missing else f"does not read {', '.join(unused)}; leave them out")
            )
        if self.adapter.rank and self.init == "random":
            raise ValueError(
                f"adapter.rank is {self.adapter.rank}, but init is 'random': what is frozen under an adapter must have "
                "learned something; set adapter.rank=0, or init='pretrained', 'teacher_layers' or 'pruned'"
            )
        if self.adapter.rank and self.scheme is not None:
            raise ValueError(
                f"adapter.rank is {self.adapter.rank} and quantization {self.quantization!r}, which trains the weights "
                "that an adapter freezes; set adapter.rank=0, or quantization='none' (adapter.base_dtype rounds the "
                "frozen weights)"
            )

    @property
    def scheme(self) -> Scheme | None:
        """How the student is rounded; None where it is not."""
        if self.quantization == "none":
            return None
        return Scheme(self.quantization, self.group_size, self.symmetric, self.quantize_head)

    def unread_settings(self) -> dict[str, str]:
        unread = {} if self.init == "pruned" else {"calibration_chains": f"student.init is {self.init!r}"}
        if self.quantization == "none":
            unread |= dict.fromkeys(("group_size", "symmetric", "quantize_head"), "student.quantization is 'none'")
        return unread

    @property
    def frozen_dtype(self) -> str:
        """Of the weights that the student begins with, as they are in memory: float32 where they are trained."""
        return self.adapter.base_dtype if self.adapter.rank else "float32"


@dataclass(frozen=True)
class DataSettings:
    """Traces, their text form, and the shape of a row."""

    train: SourceSettings
    test: SourceSettings
    validation: SourceSettings | None = None  # None: `validation_fraction` of the training traces, chosen by hash
    validation_fraction: float = 0.05  # of the training traces, where `validation` is not given
    text: TextFormat = field(default_factory=TextFormat)
    segmentation: str = "annotated"  # steps: the schema's; "classifier:<folder>", "stride:<n>", "soft:<n>" or "random"
    steps_cache: str = "runs/steps"  # folder of what the teacher found in chains (classifier, soft); "" finds it again
    row_length: int = 1024  # tokens
    chains_per_row: int = 8  # at most; 1 switches packing off
    max_dropped_fraction: float = 0.0  # of chains longer than a row; more is an error

    def __post_init__(self) -> None:
        check_ranges(self, row_length="[2, 1e7]", chains_per_row="[1, 1e5]")
        check_ranges(self, validation_fraction="(0, 1)", max_dropped_fraction="[0, 1]")
        check_filled(self, "segmentation")
        is_windows(self.segmentation)

    def unread_settings(self) -> dict[str, str]:
        unread = {} if self.validation is None else {"validation_fraction": "data.validation is given"}
        if not reads_teacher(self.segmentation):
            unread["steps_cache"] = f"data.segmentation is {self.segmentation!r}, which needs no teacher"
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
    drift_own: bool = False  # compare them on what the student writes for these problems too, and before training

    def __post_init__(self) -> None:
        check_ranges(self, problems_per_depth="[1, 1e6]", max_new_tokens="[1, 1e6]", batch_size="[1, 1e6]")
        check_ranges(self, every="[0, 1e9]", drift_problems="[0, 1e6]")
        check_ranges(self, curve_problems="[1, 1e6]" if self.every else "[0, 1e6]")

    def unread_settings(self) -> dict[str, str]:
        unread = {} if self.every else {"curve_problems": "evaluation.every is 0"}
        return unread if self.drift_problems else unread | {"drift_own": "evaluation.drift_problems is 0"}


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
    on_policy: OnPolicySettings = OnPolicySettings()
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
        self._check_states()
        self._check_drift()
        if self.teacher.cache and self.curriculum.solves_with_teacher:
            raise ValueError(
                "curriculum.ends_by is 'solved', for which the teacher solves validation problems, but it is read from "
                "teacher.cache, which cannot; set curriculum.teacher_solves to the share that it solves (1 where the "
                "chains are its own), curriculum.ends_by='share', or teacher.cache=''"
            )
        if self.on_policy.fraction:
            self._check_on_policy()
        if not self.loss.teaches() and self.curriculum.by_coherence:
            raise ValueError(
                "the loss has nothing of the teacher in it, so no coherence loss can end a stage: set "
                "curriculum.enabled=False, or curriculum.ends_by='solved', or 'share' for stages of equal length"
            )

    def _check_drift(self) -> None:
        if self.evaluation.drift_problems and self.evaluation.drift_own and self.teacher.cache:
            raise ValueError(
                "evaluation.drift_own needs the teacher online: what the student writes is in no cache; set "
                "evaluation.drift_own=False, or teacher.cache=''"
            )
        if self.evaluation.drift_problems and self.teacher.cache and is_windows(self.data.segmentation):
            raise ValueError(
                f"evaluation.drift_problems measures drift by steps, but with data.segmentation "
                f"{self.data.segmentation!r} the teacher's cache has the states of windows; set "
                "evaluation.drift_problems=0, or teacher.cache=''"
            )

    def _check_states(self) -> None:
        """Raises ValueError where the teacher's hidden states are read, and its cache has none."""
        if self.has_states:
            return
        changes: dict[str, Any] = dict.fromkeys((f"loss.{key}" for key in self.loss.reading_states()), 0)
        if self.curriculum.by_coherence:
            changes["curriculum.enabled"] = False
        if self.evaluation.drift_problems:
            changes["evaluation.drift_problems"] = 0
        why = "cache.states is 'none'"
        if self.is_served:
            why = f"the server of teacher.served_model {self.teacher.served_model!r} gives no hidden states"
            if reads_teacher(self.data.segmentation):
                tokens = soft_of(self.data.segmentation)
                changes["data.segmentation"] = f"stride:{tokens}" if tokens else "annotated"
            if self.loss.temperature != 1:
                changes["loss.temperature"] = 1
                why += ", and the mass of the tokens that it leaves out is known at temperature 1 only"
        if changes:
            wanted = ", ".join(f"{key}={value}" for key, value in changes.items())
            raise ValueError(
                f"{why}, so only logit matching can learn from this cache: set {wanted}; or have the teacher's weights "
                "write a cache with states (docs/teacher-cache.md)"
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

    def _check_on_policy(self) -> None:
        self.on_policy.rows(self.batch_size)
        if not self.loss.teaches():
            raise ValueError(
                "on_policy.fraction is not 0, but the loss has nothing of the teacher in it to teach on the "
                "chains that the student draws; set loss.alpha or a weight, or on_policy.fraction=0"
            )
        if self.teacher.cache:
            raise ValueError(
                "on_policy.fraction needs the teacher online: the chains that the student draws are in no cache; set "
                "teacher.cache=''"
            )
        if self.loss.reward_weight:
            raise ValueError(
                "on_policy.fraction and loss.reward_weight are both not 0, and each has its own way of drawing chains; "
                "set one of them to 0"
            )
        if tokens := soft_of(self.data.segmentation):
            raise ValueError(
                f"on_policy.fraction is not 0, but with data.segmentation {self.data.segmentation!r} the teacher would "
                "have to read each chain that the student draws before it can be cut; use "
                f"data.segmentation='stride:{tokens}', or on_policy.fraction=0"
            )
        if self.on_policy.steps == "classifier" and not self.data.segmentation.startswith("classifier:"):
            raise ValueError(
                f"on_policy.steps is 'classifier', but data.segmentation is {self.data.segmentation!r}; expected "
                "classifier:<folder>, or on_policy.steps='lines' or 'prose'"
            )
        if self.checkpoint_every % self.on_policy.updates_per_refresh:
            raise ValueError(
                f"checkpoint_every {self.checkpoint_every} is not a multiple of on_policy.updates_per_refresh "
                f"{self.on_policy.updates_per_refresh}: drawn chains are not in a checkpoint, so one may only be taken "
                "where new ones are due"
            )

    def unread_settings(self) -> dict[str, str]:
        """Keys that a training run does not read because of others, and why; groups say the same of their own keys."""
        unread = {}
        if not self.loss.reward_weight:
            unread["reward"] = "loss.reward_weight is 0"
        if not self.on_policy.fraction:
            unread["on_policy"] = "on_policy.fraction is 0"
        elif self.on_policy.fraction == 1.0 and self.loss.alpha:
            unread["loss.alpha"] = "on_policy.fraction is 1: all chains are the student's own, without labels"
        if not self.loss.teaches():
            names = [f"loss.{name}" for name in ("anchor_prompt", "projections", "distance")]
            names += ["loss.divergence", "loss.beta"]
            if not self.teacher.cache:
                names.append("loss.temperature")
            if not self.teacher.cache and not self.evaluation.drift_problems:
                names += [f"loss.{name}" for name in ("hidden_layer", "student_hidden_layer", "layers", "step_state")]
            names += self._read_by_validation()
            unread |= dict.fromkeys(names, "the loss has nothing of the teacher in it")
        if not self.teacher.cache:
            names = ["cache", *(f"teacher.{name}" for name in ("server", "served_model", "serving"))]
            return unread | dict.fromkeys(names, "teacher.cache is empty")
        names = ["cache.chains_per_shard", "teacher.server", "teacher.serving"]
        unread |= dict.fromkeys(names, "it is read when a cache is written")
        if self.is_served:
            names = ["cache.states", "cache.layers", "teacher.param_dtype", "teacher.compute_dtype"]
            unread |= dict.fromkeys(names, "the teacher is a server's (teacher.served_model)")
        if not self.has_states and self.loss.teaches():
            unread |= dict.fromkeys(self._read_by_validation(), "the teacher's cache has no states to validate with")
        names = [] if reads_teacher(self.data.segmentation) else ["attention", "sharding", "offload"]
        unread |= {f"teacher.{name}": "the teacher is read from teacher.cache" for name in names}
        if self.evaluation.teacher:
            unread["evaluation.teacher"] = "the teacher is read from teacher.cache, which cannot solve problems"
        return unread

    def _read_by_validation(self) -> list[str]:
        """Keys that nothing reads where the coherence loss cannot be measured."""
        settings = self.curriculum
        names = (*settings.FOR_COHERENCE, *settings.FOR_EITHER) if settings.measures == "coherence" else ()
        return [f"curriculum.{name}" for name in names]

    @property
    def is_served(self) -> bool:
        """Whether the teacher's predictions are those of a server, read from a cache."""
        return bool(self.teacher.cache and self.teacher.served_model)

    @property
    def has_states(self) -> bool:
        """Whether hidden states of the teacher can be read: online, or from a cache that has them."""
        return not self.teacher.cache or (self.cache.states != "none" and not self.is_served)

    @property
    def calibrates(self) -> bool:
        """Whether the teacher's states are compared under two contexts, for the thresholds of the coherence loss."""
        return self.has_states and self.curriculum.measures == "coherence"

    @property
    def rows_at_once(self) -> int:
        """Rows of a micro-batch. Validation and scoring take no more at one time, so they fit where an update does."""
        return self.batch_size // self.micro_batches

    @property
    def own_rows(self) -> int:
        """Rows of an update that hold chains which the student draws to be read by the teacher."""
        return self.on_policy.rows(self.batch_size)

    @property
    def data_rows(self) -> int:
        """Rows of an update that hold chains of the data."""
        return self.batch_size - self.own_rows

    @property
    def updates_per_refresh(self) -> int:
        """Updates after which the student draws new chains of its own; 0 where it never does."""
        if self.loss.reward_weight:
            return self.reward.updates_per_refresh
        return self.on_policy.updates_per_refresh if self.on_policy.fraction else 0

    @property
    def update(self) -> UpdateSettings:
        """What is compiled into the update beside the objective."""
        return UpdateSettings(self.micro_batches, self.optimizer.offload)

    def objective(
        self, student: DecoderConfig, teacher: DecoderConfig, vocab_size: int, mesh: Mesh | None = None
    ) -> Objective:
        """The objective for two models.

        Raises:
          ValueError: a layer that a model does not have.
        """
        setup = Setup(student, teacher, vocab_size, self.reward, mesh, self.on_policy, self.has_states)
        return self.loss.objective(setup)
