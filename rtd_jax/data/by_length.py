"""Texts in batches of fixed shapes, one text a row, neighbours in length together.

Batches are as long as their longest text, rounded up, so that little is padding and few programs are compiled.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class LengthBatch:
    """A batch of texts, padded on the right to one length. B rows, L tokens."""

    indices: list[int]  # which text each row holds; the rows after these are empty
    tokens_BL: np.ndarray  # int32
    lengths_B: np.ndarray  # int32, tokens of each row; 0 in an empty row

    @property
    def mask_BL(self) -> np.ndarray:
        """Which places hold a token. bool [B, L]."""
        return np.arange(self.tokens_BL.shape[1]) < self.lengths_B[:, None]


def batches_by_length(
    texts: Sequence[Sequence[int] | np.ndarray], rows: int, multiple: int, pad_id: int = 0
) -> Iterator[LengthBatch]:
    """Every text once, short ones first.

    Args:
      texts: the token ids of each text.
      rows: texts of a batch; the last batch is filled up with empty rows (see `rows_at_once`).
      multiple: tokens; the length of every batch is a multiple of it.
      pad_id: fills the rest of a row.
    """
    by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for start in range(0, len(texts), rows):
        indices = by_length[start : start + rows]
        tokens_BL = np.full((rows, round_up(len(texts[indices[-1]]), multiple)), pad_id, np.int32)
        lengths_B = np.zeros(rows, np.int32)
        for row, i in enumerate(indices):
            lengths_B[row] = len(texts[i])
            tokens_BL[row, : len(texts[i])] = texts[i]
        yield LengthBatch(indices, tokens_BL, lengths_B)


def rows_at_once(batch_size: int, texts: int, ways: int) -> int:
    """Rows of a batch: not more than there are texts, rounded up to a multiple of the devices that share them."""
    return round_up(min(batch_size, texts), ways)


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below `number`."""
    return -(-number // multiple) * multiple
