"""The teacher's outputs on every chain of a data set, in memory: it is run once, however often the chains are read.

What a frozen teacher says of a chain depends on the chain alone, not on the row or the batch that it stands in. Runs of
an ensemble read the same chains in different orders, so their updates take the outputs from one table.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rtd_jax.base.sharding import to_host
from rtd_jax.base.types import Array, Batch, Params, TeacherOutputs
from rtd_jax.methods.term import Reads
from rtd_jax.models.model import DecoderModel
from rtd_jax.train.update import teacher_on

HEAD = -1  # in place of a layer: the states that the head reads
MOST_BYTES = 8 * 2**30  # of a table: on every device, and for a moment on the host as well


class TeacherTable(NamedTuple):
    """The outputs on T tokens of N chains; entry 0 of both axes is zero, for padding. States are by layer."""

    head_DV: Array
    hidden_TD: Array | None  # what the head reads; None where no term reads predictions
    token_states: dict[int, Array]  # [T, D]
    boundary_states: dict[int, Array]  # [N, K, D]


class Places(NamedTuple):
    """Where a table has the outputs on the chains of a batch; 0 where there is padding."""

    tokens_BL: Array  # int32, index into T
    chains_BC: Array  # int32, index into N


class ChainPlaces:
    """Finds chains in a table by their content: token ids, boundaries, and places in soft windows."""

    def __init__(self) -> None:
        self._found: dict[bytes, tuple[int, int]] = {}  # index of the first token, and of the chain

    def of(self, batch: Batch) -> Places:
        """The places of a batch's chains.

        Raises:
          KeyError: a chain is not in the table.
        """
        tokens_BL = np.zeros(batch.tokens_BL.shape, np.int32)
        chains_BC = np.zeros(batch.boundary_mask_BCK.shape[:2], np.int32)
        for key, row, slot, columns in _chains(batch):
            first, chains_BC[row, slot] = self._found[key]
            tokens_BL[row, columns] = np.arange(first, first + columns.stop - columns.start)
        return Places(tokens_BL, chains_BC)

    def add(self, key: bytes, first: int) -> bool:
        """Gives a chain the next number and its tokens the places from `first` on; False where it has them already."""
        return self._found.setdefault(key, (first, len(self._found) + 1)) == (first, len(self._found))


def make_table(
    teacher: DecoderModel, params: Params, batches: Iterable[tuple[Batch, Batch]], reads: Reads
) -> tuple[TeacherTable, ChainPlaces]:
    """Runs the teacher over all batches, and finds the chains in what comes out.

    Args:
      batches: (on the host, on the devices).
      reads: of the teacher, by all terms.

    Raises:
      ValueError: the table would have more than MOST_BYTES.
    """
    run = jax.jit(lambda params, batch: teacher_on(teacher, params, batch, reads))
    places, length, size = ChainPlaces(), 1, 0
    by_token: list[dict[int, np.ndarray]] = []  # of each chain, by layer; HEAD is what the head reads
    by_chain: list[dict[int, np.ndarray]] = []
    for on_host, on_devices in batches:
        found = to_host(run(params, on_devices)._replace(head_DV=None))
        tokens = found.token_states | ({HEAD: found.hidden_BLD} if reads.teacher_predictions else {})
        for key, row, slot, columns in _chains(on_host):
            if not places.add(key, length):
                continue
            length += columns.stop - columns.start
            # Copies: a view would keep the whole batch.
            by_token.append({layer: states_BLD[row, columns].copy() for layer, states_BLD in tokens.items()})
            by_chain.append({layer: x[row, slot].copy() for layer, x in found.boundary_states.items()})
            size += sum(x.nbytes for part in (by_token[-1], by_chain[-1]) for x in part.values())
            if size > MOST_BYTES:
                raise ValueError(
                    f"the teacher's outputs on the first {len(by_chain)} training chains have {size / 2**30:.1f} GiB "
                    f"already, and an ensemble keeps those on all of them in memory, at most {MOST_BYTES / 2**30:.0f} "
                    "GiB; lower data.train.limit, set teacher.cache, or train the seeds one by one"
                )

    def joined(parts: Sequence[dict[int, np.ndarray]], layer: int) -> Array:
        arrays = [part[layer] for part in parts]
        return jnp.asarray(np.concatenate([np.zeros_like(arrays[0][:1]), *arrays]))

    states = {layer: joined(by_token, layer) for layer in by_token[0]}
    boundaries = {layer: joined([{layer: x[layer][None]} for x in by_chain], layer) for layer in by_chain[0]}
    return TeacherTable(teacher.head(params), states.pop(HEAD, None), states, boundaries), places


def outputs_at(table: TeacherTable, places: Places) -> TeacherOutputs:
    """The teacher's outputs on the batch whose places these are; zeros on padding."""
    return TeacherOutputs(
        None if table.hidden_TD is None else table.hidden_TD[places.tokens_BL],
        table.head_DV,
        {layer: states_NKD[places.chains_BC] for layer, states_NKD in table.boundary_states.items()},
        {layer: states_TD[places.tokens_BL] for layer, states_TD in table.token_states.items()},
    )


def _chains(batch: Batch) -> Iterator[tuple[bytes, int, int, slice]]:
    """(content, row, index in the row, columns) of each chain of a batch on the host."""
    ids_BL = np.asarray(batch.chain_ids_BL)
    edges_BX = np.pad(ids_BL, ((0, 0), (1, 1)))
    begins = np.nonzero((ids_BL > 0) & (ids_BL != edges_BX[:, :-2]))
    _, ends = np.nonzero((ids_BL > 0) & (ids_BL != edges_BX[:, 2:]))
    for row, begin, end in zip(*(x.tolist() for x in (*begins, ends + 1)), strict=True):
        slot = int(ids_BL[row, begin]) - 1
        boundaries_K = (batch.boundary_positions_BCK[row, slot] - begin)[batch.boundary_mask_BCK[row, slot]]
        key = batch.tokens_BL[row, begin:end].tobytes() + b"/" + boundaries_K.tobytes()
        if batch.places_BL is not None:
            key += b"/" + batch.places_BL[row, begin:end].tobytes()
        yield key, row, slot, slice(begin, end)
