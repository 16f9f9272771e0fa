"""One system's distillation step on given checkpoints and tokens; prints tokens/s and peak memory. See peers.py.

python benchmarks/peer_step.py <ours_kd | ours_rtd | tunix | trl> <folder> <updates> <float32 | bfloat16>

`folder` holds teacher/ and student/ (Hugging Face folders) and tokens.npy, int32 [updates, B, L]. Every system trains
with AdamW at 1e-4; nobody recomputes activations. float32 is all in float32, on the CPU. bfloat16 is the teacher in
bfloat16 and, for ours and TRL, products in bfloat16 over float32 weights of the student; Tunix computes in the type of
its weights, so its student has bfloat16 weights and moments. The first WARM_UP updates are not timed.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from measure import peak_device_memory, peak_memory, random_batch, report

WARM_UP = 3
LEARNING_RATE = 1e-4
STEP_TOKENS = 40  # of a reasoning step, where there are steps


class OurUpdate(NamedTuple):
    """rtd_jax's update, and what it is called with."""

    student: Any
    state: Any
    step: Any
    teacher_params: Any
    objective: Any
    mesh: Any
    vocab_size: int


def our_update(folder: Path, dtype: str, weights: dict[str, Any], on_policy: dict[str, Any] | None = None) -> OurUpdate:
    """rtd_jax's update, with keys of `loss` and of `on_policy` as given."""
    import jax
    import optax

    from rtd_jax.base.sharding import MeshSettings, make_mesh
    from rtd_jax.methods import LossSettings
    from rtd_jax.methods.own_chains import OnPolicySettings
    from rtd_jax.methods.term import Setup
    from rtd_jax.models.from_hf import load_config, load_params
    from rtd_jax.models.model import DecoderModel
    from rtd_jax.train.state import create_state
    from rtd_jax.train.update import make_train_step

    teacher, student = (
        DecoderModel(load_config(folder / name), compute_dtype=dtype) for name in ("teacher", "student")
    )
    teacher_params = load_params(folder / "teacher", teacher.config, dtype=dtype)
    key = jax.random.PRNGKey(0)
    mesh, vocab_size = make_mesh(MeshSettings()), teacher.config.vocab_size
    setup = Setup(
        student.config, teacher.config, vocab_size, mesh=mesh, on_policy=OnPolicySettings(**(on_policy or {}))
    )
    objective = LossSettings(**weights).objective(setup)
    params = {
        "student": load_params(folder / "student", student.config),
        **objective.init_params(key, student.config.width, teacher.config.width),
    }
    optimizer = optax.adamw(LEARNING_RATE)
    state = create_state(params, optimizer, key)
    step = make_train_step(student, teacher, optimizer, objective, mesh=mesh)
    return OurUpdate(student, state, step, teacher_params, objective, mesh, vocab_size)


def ours(
    folder: Path, tokens_UBL: np.ndarray, dtype: str, weights: dict[str, Any], boundaries: bool
) -> tuple[list[float], float]:
    """rtd_jax's update, with keys of `loss` as given."""
    _, state, step, teacher_params, objective, _, vocab_size = our_update(folder, dtype, weights)
    batch = random_batch(*tokens_UBL.shape[1:], vocab_size, STEP_TOKENS, boundaries)
    seconds = []
    for tokens_BL in tokens_UBL:
        started = time.perf_counter()
        batch = batch._replace(tokens_BL=tokens_BL)
        state, metrics = step(state, teacher_params, batch, objective.coefficients())
        assert np.isfinite(float(metrics["loss"].sum))
        seconds.append(time.perf_counter() - started)
    return seconds, peak_device_memory()


def tunix(folder: Path, tokens_UBL: np.ndarray, dtype: str) -> tuple[list[float], float]:
    """google-tunix' DistillationTrainer with its logit strategy: forward KL at T 4 and labels, alpha 0.7."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx
    from transformers import AutoConfig
    from tunix.distillation import distillation_trainer
    from tunix.distillation.strategies import logit
    from tunix.models.llama3 import model as llama3
    from tunix.models.llama3.params import create_model_from_safe_tensors

    def load(name: str) -> nnx.Module:
        config = AutoConfig.from_pretrained(folder / name)
        sizes = llama3.ModelConfig(
            num_layers=config.num_hidden_layers,
            vocab_size=config.vocab_size,
            embed_dim=config.hidden_size,
            hidden_dim=config.intermediate_size,
            num_heads=config.num_attention_heads,
            head_dim=config.head_dim,
            num_kv_heads=config.num_key_value_heads,
            rope_theta=1_000_000,  # what its rotary embedding uses, whatever is said here
            norm_eps=config.rms_norm_eps,
        )
        return create_model_from_safe_tensors(str(folder / name), sizes, dtype=jnp.dtype(dtype))

    rows, length = tokens_UBL.shape[1:]
    vocab_size = AutoConfig.from_pretrained(folder / "teacher").vocab_size
    positions_BL = jnp.broadcast_to(jnp.arange(length), (rows, length))
    causal_BLL = jnp.broadcast_to(jnp.tri(length, dtype=bool), (rows, length, length))

    def forward(model: nnx.Module, input_tokens: Any, input_mask: Any) -> Any:
        del input_mask
        return model(input_tokens, positions_BL, None, causal_BLL)[0]

    def labels(input_tokens: Any, input_mask: Any) -> Any:
        del input_mask
        return jax.nn.one_hot(jnp.roll(input_tokens, -1, axis=1), vocab_size)

    strategy = logit.LogitStrategy(forward, forward, labels, temperature=4.0, alpha=0.7)
    settings = distillation_trainer.TrainingConfig(eval_every_n_steps=10**9, max_steps=len(tokens_UBL))
    trainer = distillation_trainer.DistillationTrainer(
        load("student"), load("teacher"), strategy, optax.adamw(LEARNING_RATE), settings
    )
    pulled: list[float] = []

    def batches():
        for tokens_BL in tokens_UBL:
            pulled.append(time.perf_counter())
            yield distillation_trainer.TrainingInput(input_tokens=tokens_BL, input_mask=np.ones_like(tokens_BL))

    trainer.train(batches())
    jax.block_until_ready(nnx.state(trainer.model))
    pulled.append(time.perf_counter())
    # It works ahead, so a batch is pulled before the one before it is done: the mean over all is exact, parts are not.
    mean = (pulled[-1] - pulled[WARM_UP]) / (len(pulled) - 1 - WARM_UP)
    return [*np.diff(pulled)[:WARM_UP].tolist(), *[mean] * (len(tokens_UBL) - WARM_UP)], peak_device_memory()


def trl(folder: Path, tokens_UBL: np.ndarray, dtype: str) -> tuple[list[float], float]:
    """TRL's GKDTrainer off-policy with forward KL (lmbda 0, beta 0); pure KL at T 1, no labels."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    rows, length = tokens_UBL.shape[1:]
    flat = torch.from_numpy(tokens_UBL.reshape(-1, length).astype(np.int64))
    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if not settings.use_cpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - self.started)

    def collate(items: list[dict[str, int]]) -> dict[str, torch.Tensor]:
        ids = flat[[item["row"] for item in items]]
        ones = torch.ones_like(ids)
        return {
            "input_ids": ids,
            "attention_mask": ones,
            "labels": ids,
            "prompts": ids[:, :1],
            "prompt_attention_mask": ones[:, :1],
        }

    settings = GKDConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=rows,
        max_steps=len(tokens_UBL),
        learning_rate=LEARNING_RATE,
        lmbda=0.0,
        beta=0.0,
        bf16=dtype == "bfloat16",
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        use_cpu=dtype == "float32",
        dataloader_num_workers=0,
        disable_tqdm=True,
    )
    trainer = GKDTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "student", dtype=torch.float32),
        teacher_model=AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=getattr(torch, dtype)),
        args=settings,
        train_dataset=Dataset.from_dict({"row": list(range(len(flat)))}),
        processing_class=AutoTokenizer.from_pretrained(folder / "teacher"),
        data_collator=collate,
        callbacks=[Clock()],
    )
    trainer.train()
    return seconds, peak_memory() if settings.use_cpu else torch.cuda.max_memory_allocated()


# What a system needs for each update, in seconds, and the most memory it held, in bytes.
SYSTEMS: dict[str, Callable[[Path, np.ndarray, str], tuple[list[float], float]]] = {
    "ours_kd": lambda folder, tokens, dtype: ours(
        folder, tokens, dtype, {"alignment_weight": 0.0, "coherence_weight": 0.0}, False
    ),
    "ours_rtd": lambda folder, tokens, dtype: ours(folder, tokens, dtype, {}, True),
    "tunix": tunix,
    "trl": trl,
}


def main() -> None:
    system, folder, updates, dtype = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    tokens_UBL = np.load(folder / "tokens.npy")[:updates]
    seconds, peak = SYSTEMS[system](folder, tokens_UBL, dtype)
    timed = statistics.median(seconds[WARM_UP:])
    report(tokens_per_sec=tokens_UBL[0].size / timed, peak_gb=peak / 1e9)


if __name__ == "__main__":
    main()
