"""A random tiny teacher on disk and a recipe that trains on it in seconds, shared by the tests of the trainer."""

import json
from pathlib import Path

import jax
from jax.sharding import Mesh

from rtd_jax.apps.distill.prepare import Experiment
from rtd_jax.apps.distill.stages import Run, Trainer
from rtd_jax.apps.pretrain import SizeSettings, model_config
from rtd_jax.base.console import Display
from rtd_jax.base.sharding import MeshSettings, make_mesh
from rtd_jax.data.sources import SourceSettings
from rtd_jax.data.tiny_tokenizer import TINY_FORMAT, tiny_tokenizer
from rtd_jax.models.model import DecoderModel
from rtd_jax.models.to_hf import save_pretrained
from rtd_jax.train.checkpoints import Checkpoints
from rtd_jax.train.curriculum import CurriculumSettings
from rtd_jax.train.metrics import MetricsLog
from rtd_jax.train.optimizer import OptimizerSettings
from rtd_jax.train.recipe import (
    DataSettings,
    EvaluationSettings,
    LossSettings,
    Recipe,
    StudentSettings,
    TeacherSettings,
)

ROW_LENGTH = 96


def write_teacher(directory: Path, seed: int = 0) -> Path:
    """A Hugging Face folder with random weights: 2 layers, width 32."""
    tokenizer = tiny_tokenizer()
    config = model_config(SizeSettings(layers=2, width=32, mlp_width=48, heads=4, kv_heads=2, head_dim=8), tokenizer)
    return save_pretrained(directory, config, DecoderModel(config).init(jax.random.key(seed)), tokenizer=tokenizer)


def source(split: str, limit: int) -> SourceSettings:
    return SourceSettings(schema="synthetic", split=split, limit=limit, depths=(1, 2))


def recipe(teacher: Path, **changes) -> Recipe:
    """Two stages, 12 updates, 8 rows of 96 tokens; keyword arguments replace top-level settings."""
    settings = {
        "teacher": TeacherSettings(str(teacher), "float32", "float32"),
        "student": StudentSettings(
            "random",
            layers=2,
            width=16,
            mlp_width=24,
            heads=2,
            kv_heads=2,
            head_dim=8,
            compute_dtype="float32",
        ),
        "data": DataSettings(
            train=source("train", 80),
            validation=source("validation", 16),
            test=source("test", 8),
            text=TINY_FORMAT,
            row_length=ROW_LENGTH,
            chains_per_row=2,
        ),
        "batch_size": 8,
        "total_updates": 12,
        "loss": LossSettings(chunk_length=32),
        "optimizer": OptimizerSettings(learning_rate=1e-2, warmup_updates=2),
        "curriculum": CurriculumSettings(depths=(1, 2), validate_every=3, validation_chains=8, plateau_patience=0),
        "mesh": MeshSettings(data=1, fsdp=-1, tensor=1),
        "evaluation": EvaluationSettings(problems_per_depth=2, max_new_tokens=8, batch_size=4),
        "log_every": 2,
        "checkpoint_every": 4,
    }
    return Recipe(**(settings | changes))


def trained(experiment: Experiment, run: Run, workdir: Path) -> list[dict]:
    """Trains all stages; returns the lines of the log without what depends on the clock."""
    log = MetricsLog(workdir, int(run.state.step))
    with run.clock.span("training"):
        Trainer(experiment, run, Checkpoints(workdir, keep=2), log, Display(8, silent=True)).train_stages()
    log.close()
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("perf/")} for line in lines]


def one_device_mesh(_: MeshSettings | None = None) -> Mesh:
    return make_mesh(MeshSettings(), jax.devices()[:1])
