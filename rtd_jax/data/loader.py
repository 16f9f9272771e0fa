"""The stream of training batches: shuffled, endless, packed, and resumable at any batch.

Every process computes the same global batches and keeps its own rows. So the data does not depend on the number of
processes, and a run can be resumed with another number.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np

from rtd_jax.base.types import Batch
from rtd_jax.data.encoding import EncodedChain, chains_fingerprint
from rtd_jax.data.packing import check_fit, feature_names, host_rows, pack, to_batch, token_features

Pool = tuple[Sequence[EncodedChain], float]  # chains, and the weight with which they are drawn


class BatchLoader:
    """Endless iterator of Batch. `set_state` continues bit for bit where `get_state` was called.

    The pools are mixed by weight, chain by chain: e.g. 0.7 of the stage's depth and 0.3 of earlier depths. Each pool is
    shuffled anew in each of its epochs. Pools without chains are left out, and the others share their weight.

    Args:
      rows: of a batch, over all hosts.
      share: (index, count), the part of a batch's rows that is given out (see `rtd_jax.base.sharding.host_share`).

    Raises:
      ValueError: no pool has chains, a weight is not positive, or the chains do not fit (see `check_fit`).
    """

    def __init__(
        self,
        pools: Sequence[Pool],
        rows: int,
        row_length: int,
        chains_per_row: int,
        max_boundaries: int,
        seed: int,
        *,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        for index, (chains, weight) in enumerate(pools):
            if not weight > 0:
                raise ValueError(f"pool {index} has weight {weight}; expected more than 0 (leave the pool out instead)")
            check_fit(chains, rows, row_length, chains_per_row, max_boundaries, share)
        filled = [(chains, weight) for chains, weight in pools if len(chains)]
        if not filled:
            raise ValueError(f"none of the {len(pools)} pools has a chain; check the depths and the source of the data")
        streams = [
            grain.MapDataset.source(chains).map(token_features).shuffle(seed=_pool_seed(seed, index)).repeat()
            for index, (chains, _) in enumerate(filled)
        ]
        mixed = grain.MapDataset.mix(streams, [weight for _, weight in filled]) if len(streams) > 1 else streams[0]
        # Reader threads would not help: the chains are in memory, and packing only copies them.
        source = mixed.to_iter_dataset(grain.ReadOptions(num_threads=0))
        names = feature_names([chain for chains, _ in filled for chain in chains])
        self._iterator = iter(pack(source, rows, row_length, chains_per_row, names).batch(rows, drop_remainder=True))
        self._chains_per_row, self._max_boundaries, self._share = chains_per_row, max_boundaries, share
        parts = [f"{chains_fingerprint(chains)}*{weight!r}" for chains, weight in filled]
        parts.append(repr((rows, row_length, chains_per_row, seed)))
        self.fingerprint = hashlib.sha256("/".join(parts).encode()).hexdigest()  # of everything that decides the stream

    def __iter__(self) -> "BatchLoader":
        return self

    def __next__(self) -> Batch:
        batch = to_batch(next(self._iterator), self._chains_per_row, self._max_boundaries)
        return host_rows(batch, self._share)

    def get_state(self) -> dict[str, Any]:
        """The position after the last batch, and the fingerprint of the stream; can be written as JSON."""
        return {"fingerprint": self.fingerprint, "iterator": self._iterator.get_state()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError where the state was taken from another stream (other chains, weights, shapes or seed)."""
        if state["fingerprint"] != self.fingerprint:
            raise ValueError(
                f"the saved data position belongs to the stream {state['fingerprint'][:12]}, but the recipe's stream "
                f"is {self.fingerprint[:12]}: chains, their weights, rows, row_length, chains_per_row or seed differ; "
                "restore those settings, or start a new run"
            )
        self._iterator.set_state(dict(state["iterator"]))


class MembersLoader:
    """The batches of the members of an ensemble, stacked: [R, B, ...]. Each member has a loader with its own order."""

    def __init__(self, loaders: Sequence[BatchLoader]) -> None:
        self._loaders = loaders

    def __iter__(self) -> "MembersLoader":
        return self

    def __next__(self) -> Batch:
        return jax.tree.map(lambda *arrays: np.stack(arrays), *(next(loader) for loader in self._loaders))

    def get_state(self) -> dict[str, Any]:
        """The positions of all members, as JSON."""
        return {"members": [loader.get_state() for loader in self._loaders]}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError where a position was taken from another stream."""
        for loader, position in zip(self._loaders, state["members"], strict=True):
            loader.set_state(position)


class NoRows:
    """The stream of an update whose chains are all the student's own: nothing, and it has no position."""

    def __iter__(self) -> "NoRows":
        return self

    def __next__(self) -> None:
        return None

    def get_state(self) -> dict[str, Any]:
        """Nothing, as JSON."""
        return {}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Does nothing: what the student draws follows from the run's state."""


def _pool_seed(seed: int, index: int) -> int:
    # grain adds the epoch to the seed, so neighbouring seeds would repeat each other's order one epoch later.
    return int.from_bytes(hashlib.sha256(f"pool/{seed}/{index}".encode()).digest()[:4])
