"""A fitted boundary classifier: the network, what it was fitted to, and its folder on disk.

A folder holds `classifier.json` (settings, fingerprints, and the digests of itself and of the weights) and
`head.safetensors` (the weights). A classifier reads the states of one teacher, so it is refused with any other.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from rtd_jax.base.files import reading, write_record
from rtd_jax.base.records import check_arrays, load_arrays, load_record, save_arrays
from rtd_jax.base.types import Array, Params
from rtd_jax.data.formats import TextFormat
from rtd_jax.data.packing import packed_rows
from rtd_jax.steps.decoder import decode
from rtd_jax.steps.head import HeadSettings, Scale, boundary_logits, init_head

FORMAT = 2
WITHOUT_DIGEST = 1  # an earlier format, which is read too
JSON, WEIGHTS = "classifier.json", "head.safetensors"
ROW_LENGTH = 512  # tokens of a packed row
ROWS = 8  # of a batch that the head reads


@dataclass(frozen=True, eq=False)
class BoundaryClassifier:
    """Decides whether a step ends at a token, from the states of one teacher.

    Probability = sigmoid(slope * logit + intercept). Slope and intercept (Platt scaling on the validation chains) undo
    the weight that boundaries had in the loss, so that of tokens with probability 0.9 nine in ten end a step.
    """

    teacher: str  # fingerprint of its weights
    teacher_name: str
    tokenizer: str  # fingerprint
    layers: tuple[int, ...]  # of the teacher; 0 embeddings, i output of layer i, N final normed state
    text: TextFormat  # how prompt and text are put together for the teacher to read
    head: HeadSettings
    params: Params
    scale: Scale
    slope: float = 1.0
    intercept: float = 0.0
    threshold: float = 0.5  # a step may end at this probability or more
    min_tokens: int = 1  # of a step
    fitted: dict[str, Any] = dataclasses.field(default_factory=dict)  # data, settings and scores, for people to read

    def check_teacher(self, fingerprint: str, tokenizer: str, name: str) -> None:
        """Raises ValueError where the teacher or its tokenizer is not the one that the classifier was fitted to."""
        for kind, own, other in (("teacher", self.teacher, fingerprint), ("tokenizer", self.tokenizer, tokenizer)):
            if own != other:
                raise ValueError(
                    f"the boundary classifier was fitted to the states of {self.teacher_name} ({kind} fingerprint "
                    f"{own[:12]}), but {name} has {other[:12]}; use that teacher, or fit a classifier to this one "
                    "with launch/boundaries.py"
                )

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over everything that decides where the classifier cuts."""
        digest = hashlib.sha256(repr(sorted(self._decisive().items())).encode())
        for name, array in sorted(_arrays(self).items()):
            digest.update(name.encode() + np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def _decisive(self) -> dict[str, Any]:
        kept = ("teacher", "tokenizer", "layers", "text", "head", "slope", "intercept", "threshold", "min_tokens")
        groups = {"text": dataclasses.asdict(self.text), "head": dataclasses.asdict(self.head)}
        return {key: getattr(self, key) for key in kept} | groups


def boundary_probabilities(classifier: BoundaryClassifier, states_BLND: Array, chain_ids_BL: Array) -> jax.Array:
    """Calibrated probability that a step ends at each token of packed rows. float32 [B, L] in [0, 1]."""
    platt = classifier.slope, classifier.intercept
    return _probabilities(classifier.head, classifier.params, classifier.scale, platt, states_BLND, chain_ids_BL)


def find_boundaries(
    classifier: BoundaryClassifier, states_BLND: Array, candidates_BL: Array, chain_ids_BL: Array
) -> jax.Array:
    """The tokens at which steps end: bool [B, L]."""
    probabilities_BL = boundary_probabilities(classifier, states_BLND, chain_ids_BL)
    return decode(probabilities_BL, candidates_BL, chain_ids_BL, classifier.threshold, min_tokens=classifier.min_tokens)


@functools.partial(jax.jit, static_argnums=0)
def _probabilities(
    head: HeadSettings,
    params: Params,
    scale: Scale,
    platt: tuple[float, float],
    states_BLND: Array,
    chain_ids_BL: Array,
) -> jax.Array:
    slope, intercept = platt
    return jax.nn.sigmoid(slope * boundary_logits(head, params, scale, states_BLND, chain_ids_BL) + intercept)


def in_rows(texts: Sequence[np.ndarray], rows: int = 1) -> np.ndarray:
    """Arrays [T, ...] of texts packed into rows in order, with zeros elsewhere: [B, L, ...], B a multiple of `rows`.

    Rows have `ROW_LENGTH` tokens, or as many as the longest text.
    """
    items = [{"text": text} for text in texts]
    packed = [row["text"] for row in packed_rows(items, max(ROW_LENGTH, *map(len, texts)), open_rows=1)]
    return np.stack(packed + [np.zeros_like(packed[0])] * (-len(packed) % rows))


def row_ids(lengths: Sequence[int], rows: int = 1) -> np.ndarray:
    """Chain ids that go with `in_rows`: 1, 2, ... in the order of the texts, 0 between texts. int32 [B, L]"""
    return in_rows([np.full(length, number, np.int32) for number, length in enumerate(lengths, start=1)], rows)


def out_of_rows(array_BL: np.ndarray, lengths: Sequence[int]) -> list[np.ndarray]:
    """Undoes `in_rows`: the array [T, ...] of each text."""
    ids_BL = row_ids(lengths)
    return np.split(array_BL[: len(ids_BL)][ids_BL > 0], np.cumsum(lengths)[:-1])


def text_probabilities(classifier: BoundaryClassifier, states: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The calibrated probability at every token, from the states of each text. [T, N, D] -> float32 [T]"""
    lengths = [len(x) for x in states]
    states_BLND, ids_BL = in_rows(states, ROWS), row_ids(lengths, ROWS)
    batches = (np.split(array, len(ids_BL) // ROWS) for array in (states_BLND, ids_BL))
    results = [np.asarray(boundary_probabilities(classifier, *batch)) for batch in zip(*batches, strict=True)]
    return out_of_rows(np.concatenate(results), lengths)


def text_boundaries(
    probabilities: Sequence[np.ndarray], candidates: Sequence[np.ndarray], threshold: float, min_tokens: int
) -> list[np.ndarray]:
    """Where `decode` ends steps, from the probabilities of each text. float32 [T], bool [T] -> bool [T]"""
    lengths = [len(x) for x in probabilities]
    arrays = in_rows(probabilities), in_rows(candidates), row_ids(lengths)
    return out_of_rows(np.asarray(decode(*arrays, threshold, min_tokens=min_tokens)), lengths)


@dataclass(frozen=True)
class _Described:
    """Content of `classifier.json`, with the names of `BoundaryClassifier`."""

    teacher: str
    teacher_name: str
    tokenizer: str
    layers: tuple[int, ...]
    text: TextFormat
    head: HeadSettings
    slope: float
    intercept: float
    threshold: float
    min_tokens: int
    weights_sha256: str
    fitted: dict[str, Any]

    def __post_init__(self) -> None:
        if not self.layers or min(self.layers) < 0:
            raise ValueError(f"layers is {list(self.layers)}; expected at least one, counted from 0")
        if not 0.0 <= self.threshold <= 1.0:
            raise ValueError(f"threshold is {self.threshold}; expected a probability, 0 to 1")
        if not 1 <= self.min_tokens <= ROW_LENGTH:
            raise ValueError(f"min_tokens is {self.min_tokens}; expected 1 to {ROW_LENGTH}")


def save_classifier(folder: Path, classifier: BoundaryClassifier) -> Path:
    """Writes the folder. The JSON comes last and has the digest of the weights, so an unfinished folder is refused."""
    digest = save_arrays(folder / WEIGHTS, _arrays(classifier))
    described = {
        **classifier._decisive(),
        "teacher_name": classifier.teacher_name,
        "weights_sha256": digest,
        "fitted": classifier.fitted,
    }
    write_record(folder / JSON, FORMAT, described)
    return folder


def load_classifier(folder: Path) -> BoundaryClassifier:
    """Reads a folder of `save_classifier`.

    Raises:
      ValueError: it is missing, damaged, of another version, or its two files do not belong together.
    """
    folder, way_out = (
        folder.expanduser(),
        "restore it from a copy, or fit the classifier again with launch/boundaries.py",
    )
    with reading(folder):
        is_there = (folder / JSON).is_file()
    if not is_there:
        raise ValueError(
            f"{folder} has no {JSON}; give a folder that launch/boundaries.py wrote, e.g. "
            "rtd_jax/bundled/tiny_boundaries"
        )
    described = load_record(_Described, folder / JSON, FORMAT, way_out, undigested=(WITHOUT_DIGEST,))
    path, layers, head = folder / WEIGHTS, len(described.layers), described.head
    arrays = load_arrays(path, described.weights_sha256, way_out)
    if arrays.get("scale.mean", np.zeros(0)).ndim != 2 or not arrays["scale.mean"].size:
        raise ValueError(f"{path} has no 'scale.mean' of layers and dimensions; {way_out}")
    width = arrays["scale.mean"].shape[1]
    try:
        fresh = jax.eval_shape(functools.partial(init_head, head, layers, width))
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{folder / JSON}: head is {head}, which cannot be built ({error}); {way_out}") from error
    shapes = {".".join(map(str, name)): x.shape for name, x in flatten_dict(fresh).items()}
    check_arrays(path, arrays, shapes | dict.fromkeys(("scale.mean", "scale.deviation"), (layers, width)), way_out)
    scale = Scale(arrays.pop("scale.mean"), arrays.pop("scale.deviation"))
    if np.min(scale.deviation_ND) <= 0:
        raise ValueError(f"{path}: 'scale.deviation' has values that are not positive; {way_out}")
    flat = {
        tuple(int(part) if part.isdigit() else part for part in name.split(".")): jnp.asarray(array, jnp.float32)
        for name, array in arrays.items()
    }
    values = {field.name: getattr(described, field.name) for field in dataclasses.fields(described)}
    del values["weights_sha256"]
    return BoundaryClassifier(**values, params=unflatten_dict(flat), scale=scale)


def _arrays(classifier: BoundaryClassifier) -> dict[str, np.ndarray]:
    """Arrays by dotted names. The matrices of the input layer are float16, like the states that they read."""
    flat = {".".join(map(str, path)): np.asarray(x) for path, x in flatten_dict(classifier.params).items()}
    flat |= {name: flat[name].astype(np.float16) for name in ("of_state.kernel", "of_difference.kernel")}
    scale = classifier.scale
    return {**flat, "scale.mean": np.asarray(scale.mean_ND), "scale.deviation": np.asarray(scale.deviation_ND)}
