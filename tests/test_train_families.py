"""Students of other families than Llama: trained in their own chat template, and written as their own folders."""

import json
import subprocess
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest
import torch
import transformers
from models_tiny import WINDOW, positions, random_tokens
from qwen3_like import write_qwen3
from tiny_run import recipe

from rtd_jax.apps.distill.run import train
from rtd_jax.apps.pretrain import SizeSettings, model_config
from rtd_jax.data.formats import TextFormat
from rtd_jax.data.tiny_tokenizer import tiny_tokenizer
from rtd_jax.methods.own_chains import OnPolicySettings
from rtd_jax.models.config import DecoderConfig
from rtd_jax.models.from_hf import load_config, load_params
from rtd_jax.models.model import DecoderModel
from rtd_jax.models.text_record import read_text_format
from rtd_jax.train.curriculum import CurriculumSettings
from rtd_jax.train.recipe import EvaluationSettings, LossSettings, StudentSettings
from rtd_jax.train.student import student_config

TEXT = TextFormat("chat", thinking="off")
WINDOWS = {"use_sliding_window": True, "sliding_window": 4 * WINDOW}
CASES = {
    "qwen3": (StudentSettings("teacher_layers", layers=1, compute_dtype="float32"), {}),
    "qwen2": (StudentSettings("pruned", mlp_width=24, kv_heads=1, calibration_chains=8, compute_dtype="float32"), {}),
    "smollm3": (
        StudentSettings("teacher_layers", layers=2, compute_dtype="float32"),
        {"num_hidden_layers": 3, "no_rope_layers": [1, 1, 0], **WINDOWS},
    ),
    "mistral": (
        StudentSettings(
            "random", layers=1, width=16, mlp_width=24, heads=2, kv_heads=2, head_dim=8, compute_dtype="float32"
        ),
        {"sliding_window": 4 * WINDOW},
    ),
}


def short_run(teacher, student: StudentSettings):
    """Three updates on chains of the data and the student's own, every term of the losses, stages off."""
    short = recipe(
        teacher,
        student=student,
        total_updates=3,
        batch_size=16,
        curriculum=CurriculumSettings(enabled=False, validate_every=3, validation_chains=8),
        loss=LossSettings(chunk_length=32, intermediate_weight=0.1),
        on_policy=OnPolicySettings(fraction=0.5, max_new_tokens=12),
        evaluation=EvaluationSettings(problems_per_depth=1, max_new_tokens=8, batch_size=4),
    )
    return replace(short, data=replace(short.data, text=TEXT, row_length=320, chains_per_row=1))


def test_a_llama_that_transformers_would_not_read_is_refused_before_it_is_trained():
    teacher = DecoderConfig(16, 8, 8, layers=2, heads=1, kv_heads=1, head_dim=8)
    sizes = StudentSettings("random", layers=1, width=20, mlp_width=8, heads=3, kv_heads=3, head_dim=8)
    with pytest.raises(ValueError, match=r"^student.width is 20, no multiple of the 3 query heads: .*llama; give"):
        student_config(sizes, teacher)
    assert student_config(sizes, replace(teacher, family="mistral")).width == 20
    with pytest.raises(ValueError, match=r"^width is 20, no multiple of the 3 query heads"):
        model_config(SizeSettings(layers=1, width=20, mlp_width=8, heads=3, kv_heads=3, head_dim=8), tiny_tokenizer())


@pytest.mark.slow
def test_a_model_that_may_think_is_judged_in_the_chat_that_is_asked_for(tmp_path):
    teacher, out = write_qwen3(tmp_path / "teacher"), tmp_path / "out"
    command = [sys.executable, "-m", "rtd_jax", "evaluate", f"--model={teacher}", f"--out={out}", "--tasks=synthetic"]
    flags = ["--limit=2", "--max_new_tokens=4", "--chat"]
    failed = subprocess.run([*command, *flags], capture_output=True, text=True)
    assert failed.returncode == 2
    assert "set thinking to 'off', or to 'on' for completions with thoughts" in failed.stderr
    done = subprocess.run([*command, *flags, "--thinking=off"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads((out / "report.json").read_text())
    assert report["protocol"]["synthetic"]["thinking"] == "off"


@pytest.mark.slow
@pytest.mark.parametrize("family", CASES)
def test_a_student_is_trained_and_transformers_reads_it(family, tmp_path):
    student, changes = CASES[family]
    teacher = write_qwen3(tmp_path / "teacher", family, **changes)
    train(short_run(teacher, student), tmp_path / "run")
    folder = tmp_path / "run" / "student"
    config = load_config(folder)
    assert config.family == family
    assert config.qk_norm == (family == "qwen3")
    assert config.qkv_bias == (family == "qwen2")
    assert config.unrotated_layers == ((1,) if family == "smollm3" else ())
    assert config.windowed_layers == {"smollm3": (1,), "mistral": (0,)}.get(family, ())
    assert read_text_format(folder) == TEXT

    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert theirs.config.model_type == family
    tokens = random_tokens(2, 64)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens, dtype=torch.int64)).logits.numpy()
    model, params = DecoderModel(config), load_params(folder, config)
    hidden = jax.jit(model.hidden)(params, tokens, positions(2, 64), np.ones_like(tokens))
    np.testing.assert_allclose(model.logits(params, hidden), expected, rtol=0, atol=1e-4)
