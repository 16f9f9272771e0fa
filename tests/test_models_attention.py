"""Which attention kernel is asked for, and that cuDNN's takes what the model gives it.

No GPU is needed: the program is lowered for one, which applies every rule of shape, type and mask.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from rtd_jax.base.types import Batch
from rtd_jax.models import attention
from rtd_jax.models.attention import attention_kernel
from rtd_jax.models.config import DecoderConfig
from rtd_jax.models.model import DecoderModel
from rtd_jax.teacher.online import student_outputs

CONFIG = DecoderConfig(64, 64, 128, layers=2, heads=4, kv_heads=2, head_dim=16)
CALL = "__cudnn$fmhaScaleBiasSoftmax"


@pytest.fixture
def a100(monkeypatch):
    """What JAX asks of the machine before it calls cuDNN, answered as an A100 would."""
    monkeypatch.setattr(attention, "_on_nvidia_ampere", lambda: True)
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 90_800)
    for name in ("check_compute_capability", "is_cuda_compute_capability_equal"):
        monkeypatch.setattr(cudnn, name, lambda capability: capability == "8.0")


@pytest.mark.parametrize(
    ("length", "head_dim", "dtype", "kernel"),
    [
        (1024, 128, "bfloat16", "cudnn"),
        (1024, 64, "float32", "xla"),  # no kernel for float32
        (1023, 64, "bfloat16", "xla"),
        (1024, 256, "bfloat16", "xla"),
        (1024, 12, "bfloat16", "xla"),
        (1, 128, "bfloat16", "xla"),
    ],
)
def test_auto_asks_for_cudnn_where_it_runs(a100, length, head_dim, dtype, kernel):
    assert attention_kernel("auto", length, head_dim, jnp.dtype(dtype)) == kernel
    assert attention_kernel("xla", length, head_dim, jnp.dtype(dtype)) == "xla"


def test_without_such_a_gpu_it_is_xla():
    assert attention_kernel("auto", 1024, 128, jnp.dtype("bfloat16")) == "xla"
    assert attention_kernel("cudnn", 1024, 128, jnp.dtype("bfloat16")) == "cudnn"  # asked for: JAX says what is missing
    with pytest.raises(ValueError, match="attention 'flash' is not an implementation; use 'auto', 'xla' or 'cudnn'"):
        DecoderModel(CONFIG, attention="flash")


def lowered_for_gpu(function, *shapes) -> str:
    return jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


def ids(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_packed_rows_go_through_cudnn_forward_and_backward(a100, remat):
    def loss(attention, params, *rows):
        model = DecoderModel(CONFIG, "bfloat16", remat, attention=attention)
        return jnp.sum(model.hidden(params, *rows).astype(jnp.float32) ** 2)

    arguments = (DecoderModel(CONFIG).abstract_params(), *(ids(2, 128),) * 3)
    text = lowered_for_gpu(jax.grad(functools.partial(loss, "auto")), *arguments)
    assert f"{CALL}Backward" in text
    by_xla = lowered_for_gpu(jax.grad(functools.partial(loss, "xla")), *arguments)
    assert CALL not in by_xla
    scores = "2x2x2x128x128"  # of every head; groups of two share keys
    assert scores in by_xla
    assert scores not in text


def test_rows_of_one_chain_are_causal_without_a_mask(a100):
    """So that cuDNN skips what no token sees; rows with room for two chains keep their mask."""
    student = DecoderModel(CONFIG, "bfloat16", "full")

    def loss(params, batch):
        return jnp.sum(student_outputs(student, params, batch).hidden_BLS.astype(jnp.float32) ** 2)

    params = student.abstract_params()
    for chains, is_masked in ((1, False), (2, True)):
        slots = jax.ShapeDtypeStruct((2, chains, 3), jnp.int32)
        text = lowered_for_gpu(jax.grad(loss), params, Batch(*(ids(2, 128),) * 4, slots, slots))
        assert "__cudnn$fmha" in text
        assert ("ScaleBias" in text) == is_masked


def test_prompts_are_read_by_cudnn_and_tokens_added_by_xla(a100):
    model = DecoderModel(CONFIG, "bfloat16")
    params = model.abstract_params("bfloat16")
    # Causal without a mask: cuDNN's own, which skips what is not seen.
    assert "__cudnn$fmhaSoftmax" in lowered_for_gpu(lambda *x: model.prefill(*x, 64), params, ids(2, 64), ids(2))
    cache = jax.eval_shape(lambda *x: model.prefill(*x, 64), params, ids(2, 64), ids(2))[1]
    assert "__cudnn" not in lowered_for_gpu(lambda *x: model.decode(*x), params, cache, ids(2), ids(2))
