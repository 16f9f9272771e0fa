"""One system's on-policy update on given checkpoints and prompts; prints tokens/s and more. See peers.py.

python benchmarks/peer_on_policy.py <ours_on_policy | trl_on_policy | trl_distillation> <folder> <updates> <new tokens>

`folder` is that of peer_step.py. A row of its tokens.npy but for the last <new tokens> is a prompt; the student writes
as many tokens itself, at temperature 1, from the whole vocabulary, and nothing ends a text. Teacher and student then
read prompt and continuation, and the update is one of AdamW at 1e-4 on the generalised Jensen-Shannon divergence (beta
0.5, T 1) of the written tokens. All in float32 on the CPU, without recomputation. Each system says on how many written
tokens it has trained, and the divergence of each update. The first WARM_UP updates are not timed.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from measure import peak_device_memory, peak_memory, report
from peer_step import LEARNING_RATE, WARM_UP, our_update


class Updates(NamedTuple):
    """What was measured of each update, and the most memory that was held, in bytes."""

    seconds: list[float]
    drawing: list[float]  # seconds, of those above
    trained_on: list[int]  # written tokens
    losses: list[float]  # nats a written token, before the update
    peak: float


def ours(folder: Path, prompts_UBP: np.ndarray, new_tokens: int) -> Updates:
    """rtd_jax: what a run with on_policy.fraction=1 does between two updates, and the update."""
    from rtd_jax.apps.distill.own_chains import drawn_chain
    from rtd_jax.base.sharding import put_batch, row_sharding
    from rtd_jax.data.packing import one_batch
    from rtd_jax.eval.decoding import GenerateSettings, Sampling, generate

    weights = {"divergence": "jsd", "beta": 0.5, "temperature": 1.0, "alignment_weight": 0.0, "coherence_weight": 0.0}
    student, state, step, teacher_params, objective, mesh, vocab_size = our_update(
        folder, "float32", weights, {"fraction": 1.0}
    )
    _, rows, prompt_length = prompts_UBP.shape
    settings = GenerateSettings(new_tokens, (), vocab_size, rows, sampling=Sampling(1.0))
    found = Updates([], [], [], [], 0.0)
    for update, prompts_BP in enumerate(prompts_UBP.tolist()):
        started = time.perf_counter()
        streams = range(update * rows, (update + 1) * rows)
        written = generate(
            student, state.params["student"], prompts_BP, settings, streams=streams, batch_sharding=row_sharding(mesh)
        )
        drawn = time.perf_counter()
        row_length = prompt_length + new_tokens
        chains = [
            drawn_chain(prompt, ids, (), row_length, 1, whole=True)
            for prompt, ids in zip(prompts_BP, written, strict=True)
        ]
        batch, _ = one_batch(chains, rows, row_length, 1, 1)
        state, metrics = step(state, teacher_params, None, objective.coefficients(), put_batch(batch, mesh))
        found.losses.append(float(metrics["loss"].sum))
        found.seconds.append(time.perf_counter() - started)
        found.drawing.append(drawn - started)
        found.trained_on.append(int(np.count_nonzero(batch.loss_weights_BL)))
    return found._replace(peak=peak_device_memory())


def trl(folder: Path, prompts_UBP: np.ndarray, new_tokens: int, is_gkd: bool) -> Updates:
    """TRL's GKDTrainer with lmbda 1, which draws for every update; or the DistillationTrainer, which it recommends."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DistillationConfig, DistillationTrainer
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    updates, rows, prompt_length = prompts_UBP.shape
    prompts = torch.from_numpy(prompts_UBP.reshape(-1, prompt_length).astype(np.int64))
    found = Updates([], [], [], [], 0.0)

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            found.seconds.append(time.perf_counter() - self.started)

    def timed(draw: Callable[..., Any], *args: Any) -> Any:
        started = time.perf_counter()
        drawn = draw(*args)
        found.drawing.append(time.perf_counter() - started)
        return drawn

    def noted(loss: Any, written_BN: Any, mask_BN: Any) -> Any:
        """The loss, with note taken of it and of the written tokens that it is about."""
        assert tuple(written_BN.shape) == (rows, new_tokens), "a text has ended early"
        found.trained_on.append(int(mask_BN.sum()))
        found.losses.append(loss.item())
        return loss

    class Gkd(GKDTrainer):
        def generate_on_policy_outputs(self, *args: Any) -> Any:
            drawn = timed(GKDTrainer.generate_on_policy_outputs, *args)
            self.drawn_BL = drawn[0]
            return drawn

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            assert torch.equal(inputs["input_ids"], self.drawn_BL), "the loss is not about what was drawn"
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            return noted(loss, self.drawn_BL[:, prompt_length:], inputs["labels"] != -100)

    class Distillation(DistillationTrainer):
        def _tokenize_prompts(self, rows: list[int]) -> Any:
            return prompts[rows].tolist(), None, {}

        def _generate_single_turn(self, *args: Any) -> Any:
            return timed(super()._generate_single_turn, *args)

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            return noted(loss, inputs["completion_ids"], inputs["completion_mask"])

    def collate(items: list[dict[str, int]]) -> dict[str, torch.Tensor]:
        """The prompts, and place holders where GKD puts what it draws: it averages over as many labels as are here."""
        ids_BP = prompts[[item["prompt"] for item in items]]
        places_BN = torch.zeros(len(items), new_tokens, dtype=torch.int64)
        ids_BL = torch.cat([ids_BP, places_BN], dim=1)
        return {
            "input_ids": ids_BL,
            "attention_mask": torch.ones_like(ids_BL),
            "labels": torch.cat([torch.full_like(ids_BP, -100), places_BN], dim=1),
            "prompts": ids_BP,
            "prompt_attention_mask": torch.ones_like(ids_BP),
        }

    student, teacher = (
        AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32) for name in ("student", "teacher")
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher", padding_side="left")
    tokenizer.eos_token = student.config.eos_token_id = student.generation_config.eos_token_id = None
    common: dict[str, Any] = {
        "output_dir": str(folder / "trl"),
        "per_device_train_batch_size": rows,
        "max_steps": updates,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 1e-4,  # as optax.adamw has it
        "beta": 0.5,
        "temperature": 1.0,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "remove_unused_columns": False,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    data = Dataset.from_dict({"prompt": list(range(len(prompts)))})
    models = {"model": student, "teacher_model": teacher, "train_dataset": data, "processing_class": tokenizer}
    if is_gkd:
        gkd = GKDConfig(**common, lmbda=1.0, max_new_tokens=new_tokens, dataset_kwargs={"skip_prepare_dataset": True})
        trainer = Gkd(**models, args=gkd, data_collator=collate, callbacks=[Clock()])
    else:
        distillation = DistillationConfig(**common, max_completion_length=new_tokens)
        trainer = Distillation(**models, args=distillation, callbacks=[Clock()])
        trainer.eos_token_ids, trainer.generation_config.eos_token_id = [-1], None
    trainer.train()
    return found._replace(peak=peak_memory())


SYSTEMS: dict[str, Callable[[Path, np.ndarray, int], Updates]] = {
    "ours_on_policy": ours,
    "trl_on_policy": lambda *args: trl(*args, is_gkd=True),
    "trl_distillation": lambda *args: trl(*args, is_gkd=False),
}


def main() -> None:
    system, folder, updates, new_tokens = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    prompts_UBP = np.load(folder / "tokens.npy")[:updates, :, :-new_tokens]
    found = SYSTEMS[system](folder, prompts_UBP, new_tokens)
    wanted = [prompts_UBP.shape[1] * new_tokens] * updates
    assert found.trained_on == wanted, f"{system} has trained on {found.trained_on} written tokens, not on {wanted}"
    seconds = statistics.median(found.seconds[WARM_UP:])
    report(
        tokens_per_sec=wanted[0] / seconds,
        drawing_share=statistics.median(found.drawing[WARM_UP:]) / seconds,
        first_loss=statistics.mean(found.losses[:WARM_UP]),
        last_loss=statistics.mean(found.losses[-WARM_UP:]),
        peak_gb=found.peak / 1e9,
    )


if __name__ == "__main__":
    main()
