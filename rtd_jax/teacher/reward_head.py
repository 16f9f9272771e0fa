"""A process reward model: a small head that reads the frozen teacher's states and scores each step.

    reward of step i = sigmoid(head(features of step i))

The features are the states of some of the teacher's layers at the step's boundary, side by side, and, with `surprise`,
the mean and the largest -log p that the teacher gives to the step's own tokens. Each step is scored separately, without
the rewards of other steps. The features know the step's context (the problem and the steps before) only through the
teacher's attention.

    <folder>/head.safetensors   mean and scale of the features it was trained on, and its weights
    <folder>/head.json          the layers, which teacher and tokenizer it belongs to, digests of itself and the weights
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rtd_jax.base.boundaries import gather_boundaries, shifted_labels, step_tokens
from rtd_jax.base.files import reading, write_record
from rtd_jax.base.records import check_arrays, load_arrays, load_record, save_arrays
from rtd_jax.base.types import Array, Batch, Params
from rtd_jax.losses.policy import token_log_probs
from rtd_jax.models.model import DecoderModel

FORMAT = 3
WITHOUT_DIGEST = 2  # an earlier format, which is read too


@dataclass(frozen=True)
class RewardIdentity:
    """What a head was trained on. It can be used with nothing else."""

    teacher: str  # fingerprint of the weights
    tokenizer: str  # fingerprint
    text: str  # the form of text (`TextFormat.identity`)
    layers: tuple[int, ...]  # whose states it reads, counted from 0 (embeddings) to N (final normed states)
    surprise: bool  # whether it also reads how surprised the teacher is by the step's tokens
    width: int  # of the features

    def __post_init__(self) -> None:
        of_states = self.width - 2 * self.surprise
        is_shared = of_states % len(self.layers) == 0 if self.layers else of_states == 0
        if min(self.layers, default=0) < 0 or not 1 <= self.width < 2**31 or not is_shared:
            raise ValueError(
                f"layers is {list(self.layers)}, surprise {self.surprise} and width {self.width}; expected as many "
                "features of each layer, and two more of surprise"
            )


@dataclass(frozen=True)
class _Described:
    """Content of `head.json`."""

    sha256: str  # of head.safetensors
    identity: RewardIdentity


class RewardModel(NamedTuple):
    """A saved head."""

    head: Params
    identity: RewardIdentity
    digest: str  # SHA-256 of its weights


def init_head(key: jax.Array, width: int, hidden: int) -> Params:
    """Weights of a linear head where `hidden` is 0, else of one with a layer of `hidden` GELU units.

    The output starts at 0 (probability 1/2). "mean" and "scale" standardise the features; they are measured, not
    trained.
    """
    params = {"mean": jnp.zeros(width), "scale": jnp.ones(width), "out_bias": jnp.zeros(())}
    if hidden:
        params["inner"] = jax.random.normal(key, (width, hidden)) / jnp.sqrt(width)
        params["inner_bias"] = jnp.zeros(hidden)
    return params | {"out": jnp.zeros(hidden or width)}


def step_logits(params: Params, features: Array) -> Array:
    """Log-odds that a step is right, float32 [...], from its features [..., W]."""
    x = (jnp.asarray(features, jnp.float32) - params["mean"]) / params["scale"]
    if "inner" in params:
        x = jax.nn.gelu(x @ params["inner"] + params["inner_bias"])
    return x @ params["out"] + params["out_bias"]


def step_features(states: Sequence[Array], log_probs_BL: Array | None, batch: Batch) -> jax.Array:
    """Features of the step that ends at each boundary, float32 [B, C, K, W]; slot 0 ends no step.

    Args:
      states: [B, L, D] of each layer that is read.
      log_probs_BL: the teacher's log-probability of each token given those before it; None leaves `surprise` out.
    """
    features = [gather_boundaries(x, batch.boundary_positions_BCK).astype(jnp.float32) for x in states]
    if log_probs_BL is not None:
        inside_BCKL = step_tokens(batch)
        nats_BCKL = jnp.where(inside_BCKL, -log_probs_BL[:, None, None].astype(jnp.float32), 0.0)
        mean_BCK = jnp.sum(nats_BCKL, axis=-1) / jnp.maximum(jnp.sum(inside_BCKL, axis=-1), 1)
        surprise = jnp.stack([mean_BCK, jnp.max(nats_BCKL, axis=-1)], axis=-1)
        features.append(jnp.pad(surprise, ((0, 0), (0, 0), (1, 0), (0, 0))))
    return jax.lax.stop_gradient(jnp.concatenate(features, axis=-1))


def save_head(folder: Path, params: Params, identity: RewardIdentity) -> None:
    """Writes head.safetensors, then head.json; each file is written completely or not at all."""
    arrays = {name: np.asarray(x, np.float32) for name, x in params.items()}
    digest = save_arrays(folder / "head.safetensors", arrays)
    write_record(folder / "head.json", FORMAT, {"sha256": digest, "identity": asdict(identity)})


def load_head(folder: Path, teacher: str, tokenizer: str, text: str) -> RewardModel:
    """A saved head.

    Args:
      teacher, tokenizer: fingerprints of the teacher and tokenizer that it will be used with.
      text: the form of text that it will be used with (`TextFormat.identity`).

    Raises:
      ValueError: there is no head, it is damaged, or it was trained on another teacher, tokenizer or form of text.
    """
    way_out = "restore it from a copy, or train the reward model again with launch/reward_model.py"
    with reading(folder):
        is_there = (folder / "head.json").is_file()
    if not is_there:
        raise ValueError(
            f"{folder} holds no reward model (no head.json); train one with "
            "`python launch/reward_model.py --config=configs/reward_tiny.py` and give <its workdir>/model"
        )
    saved = load_record(_Described, folder / "head.json", FORMAT, way_out, undigested=(WITHOUT_DIGEST,))
    identity, path = saved.identity, folder / "head.safetensors"
    if identity.text != text:
        raise ValueError(
            f"the reward model {folder} was trained on another form of text: {identity.text}, this run's is {text}; "
            "give launch/reward_model.py the text settings of the run"
        )
    for name, before, now in (("teacher", identity.teacher, teacher), ("tokenizer", identity.tokenizer, tokenizer)):
        if before != now:
            raise ValueError(
                f"the reward model {folder} was trained on another {name} (fingerprint {before[:12]}, this run's is "
                f"{now[:12]}); train one on this {name} with launch/reward_model.py"
            )
    arrays = load_arrays(path, saved.sha256, way_out)
    hidden = arrays.get("inner", np.zeros(0)).shape[-1:] or (0,)
    fresh = jax.eval_shape(lambda: init_head(jax.random.key(0), identity.width, *hidden))
    check_arrays(path, arrays, {name: x.shape for name, x in fresh.items()}, way_out)
    if np.min(arrays["scale"]) <= 0:
        raise ValueError(f"{path}: 'scale' has values that are not positive; {way_out}")
    return RewardModel({name: jnp.asarray(x) for name, x in arrays.items()}, identity, saved.sha256)


def make_step_reader(
    model: DecoderModel, layers: tuple[int, ...], surprise: bool, vocab_size: int, chunk_length: int = 64
) -> Callable[[Params, Batch], jax.Array]:
    """Builds (teacher's params, batch) -> `step_features` of its steps, from one forward pass; traceable."""

    def read(params: Params, batch: Batch) -> jax.Array:
        rows = (batch.tokens_BL, batch.positions_BL, batch.attention_ids_BL)
        hidden_BLD, states = model.hidden(params, *rows, layers=layers or (-1,))
        log_probs_BL = None
        if surprise:
            sizes: Any = {"vocab_size": vocab_size, "chunk_length": chunk_length}
            predicted_BL = token_log_probs(
                hidden_BLD, model.head(params), *shifted_labels(batch), temperature=1.0, **sizes
            )
            log_probs_BL = jnp.pad(predicted_BL[:, :-1], ((0, 0), (1, 0)))  # from the position before to the token
        return step_features(states if layers else (), log_probs_BL, batch)

    return read
