"""Packs several chains into a row, and rows into a Batch of fixed shapes.

grain does the packing. Each token carries the number of its boundary (i + 1 for boundary i of its chain, 0 for none),
so that boundary positions can be read off the packed row wherever a chain lies in it.
"""

from collections.abc import Sequence

import grain
import jax
import numpy as np

from rtd_jax.base.types import Batch
from rtd_jax.data.encoding import EncodedChain

Features = dict[str, np.ndarray]
CHAIN_FEATURES = ("tokens", "loss_weights", "boundary_numbers", "conclusions")


def feature_names(chains: Sequence[EncodedChain]) -> tuple[str, ...]:
    """What `token_features` gives for these chains.

    Raises:
      ValueError: some of them have soft windows, and others steps.
    """
    soft = [chain.places is not None for chain in chains]
    if any(soft) and not all(soft):
        raise ValueError(
            f"{sum(soft)} of {len(chains)} chains have places in soft windows, and {chains[soft.index(False)].source} "
            "has none; give a batch chains of one kind"
        )
    return (*CHAIN_FEATURES, "places") if any(soft) else CHAIN_FEATURES


def token_features(chain: EncodedChain) -> Features:
    """Features of one length, [L] each: those of `CHAIN_FEATURES`, and `places` where the chain has soft windows."""
    numbers = np.zeros(len(chain), np.int32)
    numbers[chain.boundaries] = np.arange(1, len(chain.boundaries) + 1)
    weights = chain.loss_weights.astype(np.float32)
    weights[0] = 0.0  # no token of its chain comes before it to predict it
    conclusions = np.maximum(numbers - 1, 0) if chain.conclusions is None else chain.conclusions
    tokens = chain.tokens.astype(np.int32)
    features = {"tokens": tokens, "loss_weights": weights, "boundary_numbers": numbers, "conclusions": conclusions}
    return features if chain.places is None else features | {"places": chain.places.astype(np.float32)}


def pack(
    chains: "grain.IterDataset[Features]",
    rows: int,
    row_length: int,
    chains_per_row: int | None,
    names: Sequence[str] = CHAIN_FEATURES,
) -> "grain.IterDataset[Features]":
    """Puts each chain into the first of `rows` open rows that has room for it.

    When a chain fits into none of them, all rows are given out in order and new ones are opened. So the rows of one
    batch are filled together, except for the last ones of a finite data set.

    Args:
      chains: features [T, ...] of one length T each.
      chains_per_row: at most; None sets no limit.
      names: of the features.
    """
    return grain.experimental.FirstFitPackIterDataset(
        chains,
        length_struct=dict.fromkeys(names, row_length),
        num_packing_bins=rows,
        shuffle_bins=False,
        max_sequences_per_bin=chains_per_row,
    )


def packed_rows(
    items: Sequence[Features], row_length: int, *, open_rows: int, chains_per_row: int | None = None
) -> list[Features]:
    """Every item once: the rows that `pack` makes of features at hand.

    Args:
      items: features [T, ...] of one length T <= `row_length` each, all of the same names.
      open_rows: 1 keeps the items in order; as many as there are items puts each into the first row with room.

    Returns:
      Rows [L, ...] of each feature, zeros after the last item; with `<name>_segment_ids`, the item's number in its row
      from 1 on and 0 where there is none, and `<name>_positions`, which start at 0 in each item. int32 [L].
    """
    if not items:
        return []
    source = grain.MapDataset.source(items).to_iter_dataset(grain.ReadOptions(num_threads=0))
    return list(pack(source, open_rows, row_length, chains_per_row, tuple(items[0])))


def to_batch(packed: Features, chains_per_row: int, max_boundaries: int) -> Batch:
    """Makes a Batch of packed features, [B, L] each, which have grain's segment ids and positions."""
    chain_ids_BL = packed["tokens_segment_ids"].astype(np.int32)
    numbers_BL = packed["boundary_numbers"]
    shape = (len(chain_ids_BL), chains_per_row, max_boundaries)
    positions_BCK = np.zeros(shape, np.int32)
    mask_BCK = np.zeros(shape, np.bool_)
    row, column = np.nonzero(numbers_BL)
    slot = (row, chain_ids_BL[row, column] - 1, numbers_BL[row, column] - 1)
    positions_BCK[slot] = column
    mask_BCK[slot] = True
    return Batch(
        tokens_BL=packed["tokens"].astype(np.int32),
        positions_BL=packed["tokens_positions"].astype(np.int32),
        chain_ids_BL=chain_ids_BL,
        loss_weights_BL=packed["loss_weights"].astype(np.float32),
        boundary_positions_BCK=positions_BCK,
        boundary_mask_BCK=mask_BCK,
        conclusions_BL=packed["conclusions"].astype(np.int32),
        places_BL=packed["places"].astype(np.float32) if "places" in packed else None,
    )


def fixed_batches(
    chains: Sequence[EncodedChain],
    rows: int,
    row_length: int,
    chains_per_row: int,
    max_boundaries: int,
    *,
    share: tuple[int, int] = (0, 1),
) -> list[Batch]:
    """Every chain once, in order, for validation. The last batch is filled up with empty rows (chain id 0).

    With several processes each gets its `share` of the rows of every batch, as from `BatchLoader`.
    """
    check_fit(chains, rows, row_length, chains_per_row, max_boundaries, share)
    if not chains:
        return []
    items = [token_features(chain) for chain in chains]
    packed = packed_rows(items, row_length, open_rows=rows, chains_per_row=chains_per_row)
    packed += [{name: np.zeros_like(value) for name, value in packed[0].items()}] * (-len(packed) % rows)
    stacked = {name: np.stack([row[name] for row in packed]) for name in packed[0]}
    whole = to_batch(stacked, chains_per_row, max_boundaries)
    count = len(packed) // rows
    return [host_rows(host_rows(whole, (i, count)), share) for i in range(count)]


def one_batch(
    chains: Sequence[EncodedChain], rows: int, row_length: int, chains_per_row: int, max_boundaries: int
) -> tuple[Batch, int]:
    """(the chains in `rows` rows, how many have found room): each goes into the first row that has room for it.

    Rows that no chain needs are empty (chain id 0); chains that would need more rows are left out.
    """
    check_fit(chains, rows, row_length, chains_per_row, max_boundaries)
    items = [token_features(chain) for chain in chains]
    packed = packed_rows(items, row_length, open_rows=max(1, len(items)), chains_per_row=chains_per_row)[:rows]
    packed += [{name: np.zeros_like(value) for name, value in packed[0].items()}] * (rows - len(packed))
    batch = to_batch(
        {name: np.stack([row[name] for row in packed]) for name in packed[0]}, chains_per_row, max_boundaries
    )
    return batch, int(sum(batch.chain_ids_BL.max(axis=1)))


def host_rows(batch: Batch, share: tuple[int, int]) -> Batch:
    """The rows of a global batch that one process feeds. `share` is (index, count) of equal, contiguous parts."""
    index, count = share
    rows = len(batch.tokens_BL) // count
    return jax.tree.map(lambda array: array[index * rows : (index + 1) * rows], batch)


def check_fit(
    chains: Sequence[EncodedChain],
    rows: int,
    row_length: int,
    chains_per_row: int,
    max_boundaries: int,
    share: tuple[int, int] = (0, 1),
) -> None:
    """Raises ValueError where the chains do not go into such rows together, or processes cannot share the rows."""
    index, count = share
    assert 0 <= index < count, share
    for name, value in (("rows", rows), ("chains_per_row", chains_per_row)):
        if value < 1:
            raise ValueError(f"{name} is {value}; expected at least 1")
    if rows % count:
        raise ValueError(
            f"{rows} rows cannot be shared equally among {count} hosts; use {max(rows // count, 1) * count} rows"
        )
    feature_names(chains)
    for chain in chains:
        if len(chain) > row_length:
            raise ValueError(f"{chain.source}: {len(chain)} tokens do not fit into a row of {row_length}")
        if len(chain.boundaries) > max_boundaries:
            raise ValueError(
                f"{chain.source}: {len(chain.boundaries)} boundaries, but max_boundaries is {max_boundaries}"
            )
