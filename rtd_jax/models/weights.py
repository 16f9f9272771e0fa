"""The table of Llama weights: the place of each in our params, its name in Hugging Face checkpoints, and its axes.

Loading reads the table in one direction, saving in the other. The axes also give the shapes and, by the rules of
`rtd_jax.base.sharding`, the shardings. A Hugging Face axis that is the product of two of ours is written
`heads*head_dim`.
"""

from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np

from rtd_jax.base.types import Params
from rtd_jax.models.config import LlamaConfig

AnyArray = TypeVar("AnyArray", jax.Array, np.ndarray)


@dataclass(frozen=True)
class Weight:
    """One row of the table."""

    path: tuple[str, ...]  # of keys in the params
    name: str  # of the Hugging Face tensor; with {layer} where there is one per layer
    here: tuple[str, ...]  # axes of one layer's array in the params
    there: tuple[tuple[str, ...], ...]  # axes of the Hugging Face tensor, each a product of ours
    inputs: tuple[str, ...]  # axes that its matrix product sums over; none for a norm

    @property
    def stacked(self) -> bool:
        """Whether the params hold all layers in one array, whose first axis is 'layers'."""
        return "{layer}" in self.name

    @property
    def axes(self) -> tuple[str, ...]:
        """Logical axes of the array in the params."""
        return ("layers", *self.here) if self.stacked else self.here

    def names(self, config: LlamaConfig) -> list[str]:
        """The tensor names in a checkpoint, in the order of the layers."""
        return [self.name.format(layer=i) for i in range(config.layers)] if self.stacked else [self.name]

    def shape(self, config: LlamaConfig) -> tuple[int, ...]:
        """Shape of the array in the params."""
        sizes = axis_sizes(config)
        return tuple(sizes[axis] for axis in self.axes)

    def hf_shape(self, config: LlamaConfig) -> tuple[int, ...]:
        """Shape of one tensor in the checkpoint."""
        sizes = axis_sizes(config)
        return tuple(int(np.prod([sizes[axis] for axis in group])) for group in self.there)

    def from_hf(self, tensor: AnyArray, config: LlamaConfig) -> AnyArray:
        """A tensor of the checkpoint in the layout of the params (of one layer)."""
        sizes, flat = axis_sizes(config), self._flat
        return tensor.reshape([sizes[axis] for axis in flat]).transpose([flat.index(axis) for axis in self.here])

    def to_hf(self, array: AnyArray, config: LlamaConfig) -> AnyArray:
        """The inverse of `from_hf`."""
        return array.transpose([self.here.index(axis) for axis in self._flat]).reshape(self.hf_shape(config))

    @property
    def _flat(self) -> tuple[str, ...]:
        return tuple(axis for group in self.there for axis in group)


def _row(path: str, name: str, here: str, there: str | None = None, inputs: str = "embed") -> Weight:
    groups = tuple(tuple(group.split("*")) for group in (there or here).split())
    return Weight(tuple(path.split(".")), name, tuple(here.split()), groups, tuple(inputs.split()))


TABLE: tuple[Weight, ...] = (
    _row("embedding", "model.embed_tokens.weight", "vocab embed"),
    _row("layers.attention_norm.scale", "model.layers.{layer}.input_layernorm.weight", "norm", inputs=""),
    _row(
        "layers.attention.q",
        "model.layers.{layer}.self_attn.q_proj.weight",
        here="embed heads head_dim",
        there="heads*head_dim embed",
    ),
    _row(
        "layers.attention.k",
        "model.layers.{layer}.self_attn.k_proj.weight",
        here="embed kv_heads head_dim",
        there="kv_heads*head_dim embed",
    ),
    _row(
        "layers.attention.v",
        "model.layers.{layer}.self_attn.v_proj.weight",
        here="embed kv_heads head_dim",
        there="kv_heads*head_dim embed",
    ),
    _row(
        "layers.attention.o",
        "model.layers.{layer}.self_attn.o_proj.weight",
        here="heads head_dim embed",
        there="embed heads*head_dim",
        inputs="heads head_dim",
    ),
    _row("layers.mlp_norm.scale", "model.layers.{layer}.post_attention_layernorm.weight", "norm", inputs=""),
    _row("layers.mlp.gate", "model.layers.{layer}.mlp.gate_proj.weight", here="embed mlp", there="mlp embed"),
    _row("layers.mlp.up", "model.layers.{layer}.mlp.up_proj.weight", here="embed mlp", there="mlp embed"),
    _row(
        "layers.mlp.down",
        "model.layers.{layer}.mlp.down_proj.weight",
        here="mlp embed",
        there="embed mlp",
        inputs="mlp",
    ),
    _row("norm.scale", "model.norm.weight", "norm", inputs=""),
    _row("head", "lm_head.weight", here="embed vocab", there="vocab embed"),
)


def table(config: LlamaConfig) -> tuple[Weight, ...]:
    """The rows for a model of this config: without the head where the embedding is tied."""
    return tuple(weight for weight in TABLE if not (config.tied_embeddings and weight.path == ("head",)))


def axis_sizes(config: LlamaConfig) -> dict[str, int]:
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


def logical_axes(params: Params) -> dict[str, Any]:
    """For a params tree (or its abstract form), the same nested dict with a tuple of axis names at each leaf.

    Names: 'layers', 'vocab', 'embed', 'heads', 'kv_heads', 'head_dim', 'mlp', 'norm'. Tuples are pytrees themselves:
    map over this tree with `is_leaf=lambda x: isinstance(x, tuple)`.

    Raises:
      ValueError: a leaf is not a Llama weight.
    """
    axes = {weight.path: weight.axes for weight in TABLE}

    def named(path: tuple, leaf: Any) -> tuple[str, ...]:
        # Both parts of a quantised array have all its axes; along those that share one scale, the scale has length 1.
        keys = tuple(entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey))
        if keys not in axes or len(axes[keys]) != np.ndim(leaf):
            raise ValueError(
                f"{'.'.join(map(str, keys))} {np.shape(leaf)} is not a Llama weight; "
                "expected a tree as made by LlamaModel.init"
            )
        return axes[keys]

    return jax.tree_util.tree_map_with_path(named, params)


def leaf(tree: dict[str, Any], path: tuple[str, ...]) -> Any:
    """The entry of a nested dict at `path`."""
    for key in path:
        tree = tree[key]
    return tree


def nested(leaves: dict[tuple[str, ...], Any]) -> dict[str, Any]:
    """A nested dict from paths."""
    tree: dict[str, Any] = {}
    for path, value in leaves.items():
        branch = tree
        for key in path[:-1]:
            branch = branch.setdefault(key, {})
        branch[path[-1]] = value
    return tree
