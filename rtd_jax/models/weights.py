"""The table of weights: the path of each in our params, its name in Hugging Face checkpoints, and its axes.

Loading reads the table in one direction, saving in the other. The axes also give the shapes and, by the tables of
`rtd_jax.base.sharding`, the shardings. A Hugging Face axis that is the product of two of ours is written
`heads*head_dim`.
"""

import math
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from rtd_jax.base.types import Params
from rtd_jax.models.config import DecoderConfig

AnyArray = TypeVar("AnyArray", jax.Array, np.ndarray)


@dataclass(frozen=True)
class Weight:
    """One row of the table."""

    path: tuple[str, ...]  # of keys in the params
    name: str  # of the Hugging Face tensor; with {layer} where there is one per layer
    param_axes: tuple[str, ...]  # of one layer's array in the params
    hf_axes: tuple[tuple[str, ...], ...]  # of the Hugging Face tensor, each a product of ours
    inputs: tuple[str, ...]  # axes that its matrix product sums over; none for a norm or a bias
    needs: str = ""  # flag of the config without which a model does not have it; "" where all have it
    rank: int = 0  # length of the axis 'rank', which adapters have

    @property
    def stacked(self) -> bool:
        """Whether the params hold all layers in one array, whose first axis is 'layers'."""
        return "{layer}" in self.name

    @property
    def axes(self) -> tuple[str, ...]:
        """Logical axes of the array in the params."""
        return ("layers", *self.param_axes) if self.stacked else self.param_axes

    def names(self, config: DecoderConfig) -> list[str]:
        """The tensor names in a checkpoint, in the order of the layers."""
        return [self.name.format(layer=i) for i in range(config.layers)] if self.stacked else [self.name]

    def shape(self, config: DecoderConfig) -> tuple[int, ...]:
        """Shape of the array in the params."""
        sizes = self._sizes(config)
        return tuple(sizes[axis] for axis in self.axes)

    def hf_shape(self, config: DecoderConfig) -> tuple[int, ...]:
        """Shape of one tensor in the checkpoint."""
        sizes = self._sizes(config)
        return tuple(int(np.prod([sizes[axis] for axis in group])) for group in self.hf_axes)

    def from_hf(self, tensor: AnyArray, config: DecoderConfig) -> AnyArray:
        """Converts a tensor of the checkpoint to the layout of one layer's params."""
        sizes, flat = self._sizes(config), self._flat
        return tensor.reshape([sizes[axis] for axis in flat]).transpose([flat.index(axis) for axis in self.param_axes])

    def to_hf(self, array: AnyArray, config: DecoderConfig) -> AnyArray:
        """Converts one layer's array to the layout of the checkpoint: the inverse of `from_hf`."""
        return array.transpose([self.param_axes.index(axis) for axis in self._flat]).reshape(self.hf_shape(config))

    def to_matrix(self, array: jax.Array) -> jax.Array:
        """One layer's array as [outputs, inputs], in the order of the checkpoint. Not for a norm or a bias."""
        transposed = array.transpose([self.param_axes.index(axis) for axis in self._flat])
        return transposed.reshape(int(np.prod(transposed.shape[: len(self.hf_axes[0])])), -1)

    def from_matrix(self, matrix: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """The inverse of `to_matrix`; `shape` is that of one layer's array."""
        flat = self._flat
        tensor = matrix.reshape([shape[self.param_axes.index(axis)] for axis in flat])
        return tensor.transpose([flat.index(axis) for axis in self.param_axes])

    def _sizes(self, config: DecoderConfig) -> dict[str, int]:
        return axis_sizes(config) | {"rank": self.rank}

    @property
    def _flat(self) -> tuple[str, ...]:
        return tuple(axis for group in self.hf_axes for axis in group)


def _row(path: str, name: str, axes: str, hf_axes: str | None = None, inputs: str = "embed", needs: str = "") -> Weight:
    prefix = "model.layers.{layer}." if path.startswith("layers.") else ""
    suffix = "bias" if path.endswith("_bias") else "weight"
    groups = tuple(tuple(group.split("*")) for group in (hf_axes or axes).split())
    return Weight(
        tuple(path.split(".")), f"{prefix}{name}.{suffix}", tuple(axes.split()), groups, tuple(inputs.split()), needs
    )


def _bias(path: str, name: str, axes: str, hf_axes: str | None = None, needs: str = "qkv_bias") -> Weight:
    return _row(f"layers.{path}_bias", name, axes, hf_axes, "", needs)


TABLE: tuple[Weight, ...] = (
    _row("embedding", "model.embed_tokens", "vocab embed"),
    _row("layers.attention_norm.scale", "input_layernorm", "norm", inputs=""),
    _row("layers.attention.q", "self_attn.q_proj", "embed heads head_dim", "heads*head_dim embed"),
    _row("layers.attention.k", "self_attn.k_proj", "embed kv_heads head_dim", "kv_heads*head_dim embed"),
    _row("layers.attention.v", "self_attn.v_proj", "embed kv_heads head_dim", "kv_heads*head_dim embed"),
    _row("layers.attention.o", "self_attn.o_proj", "heads head_dim embed", "embed heads*head_dim", "heads head_dim"),
    _bias("attention.q", "self_attn.q_proj", "heads head_dim", "heads*head_dim"),
    _bias("attention.k", "self_attn.k_proj", "kv_heads head_dim", "kv_heads*head_dim"),
    _bias("attention.v", "self_attn.v_proj", "kv_heads head_dim", "kv_heads*head_dim"),
    _bias("attention.o", "self_attn.o_proj", "embed", needs="output_bias"),
    _row("layers.attention.q_norm.scale", "self_attn.q_norm", "head_dim", inputs="", needs="qk_norm"),
    _row("layers.attention.k_norm.scale", "self_attn.k_norm", "head_dim", inputs="", needs="qk_norm"),
    _row("layers.mlp_norm.scale", "post_attention_layernorm", "norm", inputs=""),
    _row("layers.mlp.gate", "mlp.gate_proj", "embed mlp", "mlp embed"),
    _row("layers.mlp.up", "mlp.up_proj", "embed mlp", "mlp embed"),
    _row("layers.mlp.down", "mlp.down_proj", "mlp embed", "embed mlp", "mlp"),
    _bias("mlp.gate", "mlp.gate_proj", "mlp", needs="mlp_bias"),
    _bias("mlp.up", "mlp.up_proj", "mlp", needs="mlp_bias"),
    _bias("mlp.down", "mlp.down_proj", "embed", needs="mlp_bias"),
    _row("norm.scale", "model.norm", "norm", inputs=""),
    _row("head", "lm_head", "embed vocab", "vocab embed"),
)


def _low_rank(weight: Weight) -> tuple[Weight, Weight]:
    """The two thin matrices A and B that an adapter has beside a matrix, under the names of `peft`."""
    outputs, inputs = weight.hf_axes
    place = (*weight.path[:-1], f"{weight.path[-1]}_adapter")
    name = f"base_model.model.{weight.name.removesuffix('.weight')}"
    return (
        Weight((*place, "a"), f"{name}.lora_A.weight", (*inputs, "rank"), (("rank",), inputs), inputs),
        Weight((*place, "b"), f"{name}.lora_B.weight", ("rank", *outputs), (outputs, ("rank",)), ("rank",)),
    )


# The rows of an adapter, (A, B) by the short name of the matrix that it changes: every matrix of the layers.
ADAPTER_TABLE = {x.path[-1]: _low_rank(x) for x in TABLE if x.stacked and x.inputs}
BASE, ADAPTER = "base", "adapter"  # the two parts of the params of a model with an adapter

EMBEDDING, HEAD = TABLE[0], TABLE[-1]
ROWS = {weight.path: weight for weight in TABLE}


def is_norm(path: tuple[str, ...]) -> bool:
    """Whether it is the scale of an RMSNorm, which begins at one."""
    return path[-1] == "scale"


def is_bias(path: tuple[str, ...]) -> bool:
    """Whether it is a bias, which begins at zero."""
    return path[-1].endswith("_bias")


def table(config: DecoderConfig) -> tuple[Weight, ...]:
    """The rows for a model of this config: without the head where the embedding is tied, and what else it has not."""
    return tuple(
        weight
        for weight in TABLE
        if not (config.tied_embeddings and weight.path == ("head",))
        and (not weight.needs or getattr(config, weight.needs))
    )


def axis_sizes(config: DecoderConfig) -> dict[str, int]:
    """Length of each logical axis."""
    return {
        "layers": config.layers,
        "vocab": config.vocab_size,
        "embed": config.width,
        "norm": config.width,
        "heads": config.heads,
        "kv_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "mlp": config.mlp_width,
    }


def parameter_count(config: DecoderConfig) -> int:
    """Numbers in the params of a model of this config."""
    return sum(math.prod(weight.shape(config)) for weight in table(config))


def logical_axes(params: Params) -> dict[str, Any]:
    """For a params tree (or its abstract form), the same nested dict with a tuple of axis names at each leaf.

    Names: 'layers', 'vocab', 'embed', 'heads', 'kv_heads', 'head_dim', 'mlp', 'norm', 'rank'. Tuples are pytrees
    themselves: map over this tree with `is_leaf=lambda x: isinstance(x, tuple)`.

    Raises:
      ValueError: a leaf is no weight of the table.
    """
    if set(params) == {BASE, ADAPTER}:
        return {part: logical_axes(params[part]) for part in params}
    axes = {weight.path: weight.axes for weight in (*TABLE, *(row for pair in ADAPTER_TABLE.values() for row in pair))}

    def name_axes(path: tuple[str, ...], array: Any) -> tuple[str, ...]:
        if path not in axes or len(axes[path]) != np.ndim(array):
            raise ValueError(
                f"{'.'.join(path)} {np.shape(array)} is no weight of a model; expected what DecoderModel.init makes"
            )
        return axes[path]

    # Both parts of a quantised array have all its axes; along those that share one scale, the scale has length 1.
    return unflatten_dict(
        {
            path: jax.tree.map(lambda part, path=path: name_axes(path, part), leaf)
            for path, leaf in flatten_dict(params).items()
        }
    )
