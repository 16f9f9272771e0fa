"""Memory and FLOPs of the KD loss and its gradient at the sizes of Llama-3, asked of the A100's compiler; runs nothing.

python3 -m venv .venv-plan && .venv-plan/bin/pip install -q -e '.[plan-gpu,plan-tpu]'
.venv-plan/bin/python benchmarks/loss_memory.py  # half a minute on two cores; writes docs/scale.md

The sizes are those of Liger-Kernel's published benchmark: 8,192 tokens, width 4,096, vocabulary 128,256, bfloat16.
"""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from measure import ROOT, machine, markdown_table, write_section

from rtd_jax.apps.plan.program import matmul_flops, memory
from rtd_jax.apps.plan.targets import find_target, prepare_backends
from rtd_jax.base.types import Array
from rtd_jax.losses import kd, kd_token_losses

TARGET = "a100-80gb:1"
ROWS, LENGTH, WIDTH, VOCAB = 8, 1024, 4096, 128_256
TEACHERS = (4096, 8192)  # widths: the benchmark's, and Llama-3-70B's
CHUNKS = (16, 32, 64, 128)
GB = 1e9


def fused(chunk_length: int) -> Callable[..., Array]:
    return lambda *arrays: kd(*arrays, vocab_size=VOCAB, chunk_length=chunk_length)


def dense(
    student_BLS: Array, head_SV: Array, teacher_BLD: Array, head_DV: Array, labels_BL: Array, weights_BL: Array
) -> Array:
    """The same loss from whole logits, differentiated by JAX."""
    student, teacher = (
        jnp.einsum("blw,wv->blv", *pair, preferred_element_type=jnp.float32)
        for pair in ((student_BLS, head_SV), (teacher_BLD, head_DV))
    )
    soft, hard, _, _ = kd_token_losses(student, teacher, labels_BL, 4.0, VOCAB)
    return jnp.sum(weights_BL * (0.7 * soft + 0.3 * hard)) / jnp.sum(weights_BL)


def compiled(loss: Callable[..., Array], teacher_width: int, device: jax.Device) -> tuple[float, float, float]:
    """(temporaries, outputs) in bytes, and FLOPs, of the loss with its gradients of the student's states and head."""

    def shape(*sizes: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=SingleDeviceSharding(device))

    arguments = (
        shape(ROWS, LENGTH, WIDTH),
        shape(WIDTH, VOCAB),
        shape(ROWS, LENGTH, teacher_width),
        shape(teacher_width, VOCAB),
        shape(ROWS, LENGTH, dtype=jnp.int32),
        shape(ROWS, LENGTH, dtype=jnp.float32),
    )
    traced = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).trace(*arguments)
    stats = memory(traced.lower().compile())
    return stats.temporaries, stats.output, matmul_flops(traced.jaxpr.jaxpr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-write", action="store_true", help="print the table, leave docs/scale.md as it is")
    arguments = parser.parse_args()
    prepare_backends(TARGET)
    (device,) = find_target(TARGET).devices
    rows = []
    for teacher_width in TEACHERS:
        whole = compiled(dense, teacher_width, device)
        losses = {"whole logits": whole}
        losses |= {f"fused, chunk_length {n}": compiled(fused(n), teacher_width, device) for n in CHUNKS}
        for name, (temporaries, output, flops) in losses.items():
            rows.append(
                (
                    f"teacher width {teacher_width:,}: {name}",
                    f"{temporaries / GB:.1f}",
                    f"{output / GB:.1f}",
                    f"{flops / whole[2]:.4f}",
                )
            )
            print(*rows[-1], sep=" | ", flush=True)
    columns = ("loss and gradients", "temporaries, GB", "results, GB", "FLOPs / those of whole logits")
    text = markdown_table(columns, rows) + f"\n\nCompiled for an {device.device_kind} on {machine()}."
    if not arguments.no_write:
        write_section(ROOT / "docs" / "scale.md", "loss", text)


if __name__ == "__main__":
    main()
