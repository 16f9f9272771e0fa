"""The bundled teacher is what its log says it is, and solves held-out problems of every depth."""

import json
from pathlib import Path

import jax
import pytest

import rtd_jax
from rtd_jax.base.sharding import MeshSettings, make_mesh
from rtd_jax.data.generators.word_problems import generate
from rtd_jax.data.tiny_tokenizer import TINY_FORMAT, tiny_tokenizer
from rtd_jax.data.tokenizer_match import tokenizer_fingerprint
from rtd_jax.eval.evaluate import ChainEvaluator, DecodingSettings
from rtd_jax.eval.scoring import ScoringSettings
from rtd_jax.models.from_hf import load_config, load_params
from rtd_jax.models.model import DecoderModel
from rtd_jax.models.open import load_tokenizer

BUNDLED = Path(rtd_jax.__file__).parent / "bundled"
TEACHER = BUNDLED / "tiny_teacher"
DEPTHS = ("1", "2", "3", "4", "5", "6")


def test_the_log_says_97_percent_at_every_depth():
    report = json.loads((BUNDLED / "pretrain_report.json").read_text())
    chain_accuracy = report["model"]["chain_accuracy"]
    for depth in DEPTHS:
        assert chain_accuracy[depth]["n"] >= 200
        assert chain_accuracy[depth]["mean"] >= 0.97, depth
    updates = [json.loads(line)["update"] for line in (BUNDLED / "pretrain_metrics.jsonl").read_text().splitlines()]
    assert updates == sorted(updates)
    assert updates[-1] == report["updates"] == sum(phase["updates"] for phase in report["settings"]["phases"])


def test_it_is_small_and_has_the_generators_tokenizer():
    assert sum(path.stat().st_size for path in BUNDLED.rglob("*") if path.is_file()) < 4 * 2**20
    tokenizer = load_tokenizer(TEACHER)
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(tiny_tokenizer())
    assert load_config(TEACHER).vocab_size == len(tokenizer)


def test_it_solves_problems_that_the_log_did_not_see():
    # Another seed of the test split: neither trained on nor in the report. 3 wrong of 60 would be a 95% teacher.
    config = load_config(TEACHER)
    tokenizer = load_tokenizer(TEACHER)
    mesh = make_mesh(MeshSettings(fsdp=1, data=1), jax.devices()[:1])
    evaluator = ChainEvaluator(tokenizer, TINY_FORMAT, DecodingSettings(128, 60), ScoringSettings(160, 16), mesh)
    report, _ = evaluator(DecoderModel(config), load_params(TEACHER, config), generate(60, split="test", seed=7))
    assert report["chain_accuracy"]["all"]["mean"] >= 0.95
    assert report["step_accuracy"]["all"]["mean"] >= 0.97
    assert report["unfinished"] == 0
    assert report["perplexity"] == pytest.approx(1.0, abs=0.1)
