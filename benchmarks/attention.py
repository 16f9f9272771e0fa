"""One layer's attention on a GPU, in the forms that packed rows can take: seconds forward, and forward and backward.

python benchmarks/attention.py  # one NVIDIA GPU, a minute; prints a table

Rows as the recipes have them, with the heads of Llama-3-8B. The chains are equally long and fill their rows.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.gpu.attention import mha
from measure import markdown_table

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
REPEATS, TRIES = 20, 5


@dataclass(frozen=True)
class Rows:
    """`rows` of `chains` chains of `chain` tokens each; `longest` is the room that a chain gets when it lies apart."""

    rows: int
    chains: int
    chain: int
    longest: int

    @property
    def length(self) -> int:
        return self.chains * self.chain

    def __str__(self) -> str:
        return f"{self.rows} x {self.length:,}, {self.chains} chain{'s' * (self.chains > 1)} a row"

    def ids_BL(self) -> jax.Array:
        return jnp.broadcast_to(1 + jnp.arange(self.length) // self.chain, (self.rows, self.length))


SHAPES = (Rows(8, 1, 1024, 1024), Rows(8, 4, 256, 512), Rows(2, 1, 4096, 4096), Rows(2, 8, 512, 1024))


def masked(rows: Rows, q: Any, k: Any, v: Any, kernel: str = "cudnn") -> jax.Array:
    """As packed rows have it: a mask of all pairs."""
    ids = rows.ids_BL()
    mask = (ids[:, :, None] == ids[:, None]) & jnp.tri(rows.length, dtype=bool)
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], implementation=kernel)  # type: ignore[arg-type]


def causal(rows: Rows, q: Any, k: Any, v: Any) -> jax.Array:
    """As rows of one chain have it: no mask."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def apart(rows: Rows, q: Any, k: Any, v: Any) -> jax.Array:
    """Each chain gets a row of its own for the attention alone, with room for the longest one."""
    starts = jnp.arange(rows.chains) * rows.chain  # known here; as of any packed row
    places = jnp.clip(starts[:, None] + jnp.arange(rows.longest), 0, rows.length - 1)

    def spread(x: jax.Array) -> jax.Array:
        return x[:, places].reshape(-1, rows.longest, *x.shape[2:])

    lengths = jnp.full(rows.rows * rows.chains, rows.chain, jnp.int32)
    mixed = jax.nn.dot_product_attention(
        *(spread(x) for x in (q, k, v)),
        is_causal=True,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation="cudnn",
    )
    mixed = mixed.reshape(rows.rows, rows.chains * rows.longest, *mixed.shape[2:])
    at = jnp.arange(rows.length)
    return mixed[:, (at // rows.chain) * rows.longest + at % rows.chain]


def offsets(rows: Rows, q: Any, k: Any, v: Any) -> jax.Array:
    """cuDNN's own form of packed rows, which jax.nn does not offer."""
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    lengths = jnp.full((rows.rows, rows.chains), rows.chain, jnp.int32)
    starts = jnp.broadcast_to(jnp.arange(rows.chains + 1, dtype=jnp.int32) * rows.chain, (rows.rows, rows.chains + 1))
    return dot_product_attention(
        q, k, v, None, None, lengths, lengths, starts, starts, scale=HEAD_DIM**-0.5, mask_type=MaskType.PADDING_CAUSAL
    )


def triton(rows: Rows, q: Any, k: Any, v: Any) -> jax.Array:
    """The Triton kernel of jax.experimental.pallas, with ids of chains; keys and values are repeated for every head."""
    k, v = (jnp.repeat(x, HEADS // KV_HEADS, axis=2) for x in (k, v))
    return mha(q, k, v, rows.ids_BL().astype(jnp.int32), sm_scale=HEAD_DIM**-0.5, causal=True)


FORMS: dict[str, Callable[..., jax.Array]] = {
    "cuDNN, a mask": masked,
    "cuDNN, causal": causal,
    "cuDNN, chains apart": apart,
    "cuDNN, offsets": offsets,
    "Triton, ids": triton,
    "XLA, a mask": lambda *given: masked(*given, kernel="xla"),
}


def seconds(function: Callable[..., Any], *given: Any) -> float:
    """Median of several runs of `REPEATS` calls, per call."""
    jax.block_until_ready(function(*given))
    found = []
    for _ in range(TRIES):
        started = time.perf_counter()
        for _ in range(REPEATS):
            result = function(*given)
        jax.block_until_ready(result)
        found.append((time.perf_counter() - started) / REPEATS)
    return statistics.median(found)


def measured(rows: Rows, form: Callable[..., jax.Array]) -> tuple[float, float, float]:
    """Seconds forward, seconds forward and backward, and the largest difference to XLA's attention."""
    keys = jax.random.split(jax.random.PRNGKey(0), 4)
    q, k, v, d = (
        jax.random.normal(key, (rows.rows, rows.length, heads, HEAD_DIM), jnp.bfloat16)
        for key, heads in zip(keys, (HEADS, KV_HEADS, KV_HEADS, HEADS), strict=True)
    )
    forward = jax.jit(lambda q, k, v: form(rows, q, k, v))

    @jax.jit
    def both(q: jax.Array, k: jax.Array, v: jax.Array, d: jax.Array) -> Any:
        mixed, backward = jax.vjp(lambda *qkv: form(rows, *qkv), q, k, v)
        return mixed, backward(d)

    wanted = masked(rows, q, k, v, kernel="xla").astype(jnp.float32)
    difference = float(jnp.max(jnp.abs(forward(q, k, v).astype(jnp.float32) - wanted)))
    return seconds(forward, q, k, v), seconds(both, q, k, v, d), difference


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    table = []
    for rows in SHAPES:
        # What causal attention inside chains needs: 4 x pairs x heads x width forward, and 2.5 times that backward.
        flops = 4.0 * rows.rows * rows.chains * rows.chain**2 / 2 * HEADS * HEAD_DIM
        for name, form in FORMS.items():
            if form is causal and rows.chains > 1:
                continue  # it would be another attention
            try:
                once, both, difference = measured(rows, form)
            except Exception as error:
                print(rows, name, "failed:", str(error)[:300], flush=True)
                continue
            cells = f"{1e3 * once:.3f}", f"{1e3 * both:.3f}", f"{flops / once / 1e12:.0f}"
            table.append((f"{rows}: {name}", *cells, f"{3.5 * flops / both / 1e12:.0f}", f"{difference:.3f}"))
            print(*table[-1], sep=" | ", flush=True)
    columns = ("", "ms forward", "ms both", "TFLOP/s forward", "TFLOP/s both", "largest difference")
    print(markdown_table(columns, table), f"\n\nOn {jax.devices()[0].device_kind}, JAX {jax.__version__}.")


if __name__ == "__main__":
    main()
