"""Soft windows: trajectories without steps, cut where the teacher's state turns.

The turn at a token is how far the direction of the teacher's final state moves there, w_t = 1 - cos(h_{t-1}, h_t). A
completion of T tokens has ceil(T / N) windows, as many as with `stride:N`, but they are equal in the way that the
direction goes in them, not in tokens. The place of a token among n windows is

    s_t = n (w_P + ... + w_{t-1} + w_t / 2) / (w_P + ... + w_{L-1})

and a window's state is a weighted mean of all states of the completion: a token weighs the more, the nearer its place
is to the window's middle (`base.boundaries.window_weights`). So no window has an edge that could be in the wrong place.
Where one token has to be named, a window ends at the last token whose place is not beyond it.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rtd_jax.base.sharding import put_same, row_sharding
from rtd_jax.base.types import Array, Params
from rtd_jax.data.by_length import LengthBatch
from rtd_jax.data.encoding import EncodedChain
from rtd_jax.models.model import DecoderModel
from rtd_jax.steps.prose import Reading
from rtd_jax.steps.token_states import kept_states, run_on_readings

FINAL = (-1,)  # the layer whose turns are read


@dataclass(frozen=True, eq=False)
class SoftWindows:
    """Cuts encoded chains into soft windows, and has a way to get the teacher whose turns say where.

    Attributes:
      tokens: of a window, on average.
      fingerprint: of the teacher's weights.
      described: the dtypes of the teacher's weights and arithmetic, which decide what it computes.
      teacher: () -> (model, params); called only when the turns of some chain are not on disk yet.
      folder: where turns are kept; None keeps none.
      batch_size: rows at one time, rounded up to the devices.
    """

    tokens: int
    fingerprint: str
    described: str
    mesh: Mesh
    teacher: Callable[[], tuple[DecoderModel, Params]]
    folder: Path | None = None
    batch_size: int = 16
    note: Callable[[str], None] = print

    def cut(self, chains: Sequence[EncodedChain]) -> list[EncodedChain]:
        """The same chains in soft windows in place of their steps. A window's conclusion is its last token.

        Raises:
          ValueError: the turns that are kept on disk are damaged, several processes would have to read them, or the
            teacher's states are not finite.
        """
        return [
            in_soft_windows(chain, turns_T, self.tokens)
            for chain, turns_T in zip(chains, self.turns(chains), strict=True)
        ]

    def turns(self, chains: Sequence[EncodedChain]) -> list[np.ndarray]:
        """The teacher's turn at each token of each completion, float16 [T] in [0, 2]. Errors as of `cut`."""
        readings = [_reading(chain) for chain in chains]
        if self.folder is None:
            found = self._read(readings) if readings else []
        else:
            key = f"{self.fingerprint}:{self.described}:turns"
            found = kept_states(self.folder, key, readings, FINAL, self._read_alone, self.note, "turns")
        return [turns_T11[:, 0, 0] for turns_T11 in found]

    def _read_alone(self, readings: Sequence[Reading]) -> list[np.ndarray]:
        if jax.process_count() > 1:
            raise ValueError(
                f"{self.folder} does not have the teacher's turns on these chains, and {jax.process_count()} processes "
                "cannot share reading them: run launch/cache_teacher.py, or this recipe, with one process first"
            )
        return self._read(readings)

    def _read(self, readings: Sequence[Reading]) -> list[np.ndarray]:
        model, params = self.teacher()

        def turns_of(batch: LengthBatch) -> Array:
            placed = put_same((batch.tokens_BL, batch.mask_BL.astype(np.int32)), row_sharding(self.mesh))
            return teacher_turns(model, params, *placed)

        found = run_on_readings(turns_of, readings, self.mesh, self.batch_size)
        for reading, turns_T11 in zip(readings, found, strict=True):
            if not np.all(np.isfinite(turns_T11)):
                raise ValueError(
                    f"{reading.text}: the teacher's hidden states on this chain are not finite, so it has no windows; "
                    "check the teacher's weights, and teacher.compute_dtype"
                )
        return found


def in_soft_windows(chain: EncodedChain, turns_T: np.ndarray, tokens: int) -> EncodedChain:
    """The chain in ceil(T / tokens) soft windows, given the turn at each of its completion's T tokens."""
    count = -(-len(turns_T) // tokens)
    places_T = places_among(turns_T, count)
    ends = chain.prompt_length + window_ends_at(places_T, count)
    return replace(
        chain,
        boundaries=np.append(chain.prompt_length - 1, ends).astype(np.int32),
        conclusions=None,
        places=np.concatenate([np.zeros(chain.prompt_length, np.float32), places_T]),
    )


def behind_another_prompt(chain: EncodedChain, cut: EncodedChain) -> EncodedChain:
    """`chain`, whose completion is that of `cut` after another prompt, in the same soft windows."""
    own = slice(cut.prompt_length, None)
    assert np.array_equal(chain.tokens[chain.prompt_length :], cut.tokens[own]), chain.source
    assert cut.places is not None, cut.source
    moved = chain.prompt_length - cut.prompt_length
    places = np.concatenate([np.zeros(chain.prompt_length, np.float32), cut.places[own]])
    return replace(chain, boundaries=cut.boundaries + np.int32(moved), conclusions=None, places=places)


def places_among(turns_T: np.ndarray, count: int) -> np.ndarray:
    """The place of each of T tokens among `count` windows of equal turning, float32 [T] in [0, count], ascending.

    Where nothing turns, all tokens count alike.
    """
    turns_T = np.asarray(turns_T, np.float64)
    if not turns_T.sum() > 0.0:
        turns_T = np.ones_like(turns_T)
    places_T = (np.cumsum(turns_T) - turns_T / 2) * (count / turns_T.sum())
    return np.minimum(places_T, count).astype(np.float32)


def window_ends_at(places_T: np.ndarray, count: int) -> np.ndarray:
    """The last token of each of `count` windows, of T >= `count` tokens: [count], strictly ascending up to T - 1.

    The last token whose place is not beyond the window, or as near to it as leaves every window a token.
    """
    numbers = np.arange(1, count + 1)
    ends = np.searchsorted(places_T, numbers, side="right") - 1
    ends = np.maximum.accumulate(np.maximum(ends - numbers, -1)) + numbers  # one token or more after the one before
    return np.minimum(ends, len(places_T) - 1 - count + numbers)


@functools.partial(jax.jit, static_argnums=0)
def teacher_turns(model: DecoderModel, params: Params, tokens_BL: Array, mask_BL: Array) -> Array:
    """How far the direction of the final normed state moves at each token, 1 - cos(h_{t-1}, h_t), 0 at the first.

    Rows hold one text each; `mask_BL` says which places hold a token. float16 [B, L, 1, 1].
    """
    positions_BL = jnp.broadcast_to(jnp.arange(tokens_BL.shape[1]), tokens_BL.shape)
    hidden_BLD = model.hidden(params, tokens_BL, positions_BL, jnp.asarray(mask_BL, jnp.int32)).astype(jnp.float32)
    unit_BLD = hidden_BLD * jax.lax.rsqrt(jnp.sum(jnp.square(hidden_BLD), axis=-1, keepdims=True) + 1e-12)
    # Half the squared distance of unit vectors: as 1 - cos, but as precise where it is small.
    turns_BL = jnp.sum(jnp.square(jnp.diff(unit_BLD, axis=1)), axis=-1) / 2
    return jnp.pad(turns_BL, ((0, 0), (1, 0)))[..., None, None].astype(jnp.float16)


def _reading(chain: EncodedChain) -> Reading:
    """The chain as `run_on_readings` takes it: tokens, of which the last T are the completion's."""
    nothing_T = np.zeros(len(chain) - chain.prompt_length, bool)
    return Reading(chain.source, chain.tokens, nothing_T.astype(np.int32), nothing_T, nothing_T)
