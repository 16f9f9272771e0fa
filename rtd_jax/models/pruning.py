"""Structured pruning: which hidden units, neurons, attention groups and layers of a model a smaller one keeps.

What is kept is what matters most on calibration chains, as in Minitron (Muralidharan et al. 2024, arXiv:2407.14679):

    hidden unit:      the sum over all RMSNorms of  mean |output of the unit|
    neuron:           mean |silu(gate) up|,         in each layer by itself
    attention group:  mean ||mixed values||_2,      in each layer by itself; a key/value head and its query heads
    layer:            the loss on the chains' labels without the layer, less that with it

Means are over the tokens of the chains. What is kept stays in its order. An RMSNorm divides by the root mean square of
its units, which is another one when some of them are gone. So its scale is multiplied by the ratio of the two:

    c^2 = 1 + mean over the kept units of m - mean over all units of m,    m = mean x^2 / (mean square of x + eps).

It is exact where the units that go are zero at every token.
"""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from qwix import QArray

from rtd_jax.base.boundaries import shifted_labels
from rtd_jax.base.types import Array, Batch, Params
from rtd_jax.data.by_length import round_up
from rtd_jax.data.encoding import EncodedChain
from rtd_jax.data.packing import fixed_batches
from rtd_jax.models.calibration import embed, layer_inputs, layer_params
from rtd_jax.models.config import DecoderConfig
from rtd_jax.models.families import FAMILIES
from rtd_jax.models.model import DecoderModel
from rtd_jax.models.weights import parameter_count, table

PRUNED_SIZES = ("layers", "width", "mlp_width", "kv_heads")  # of a DecoderConfig, that pruning can make smaller
_ROWS = 8  # chains at one time
_LARGE = 1024  # hidden units, from which on sizes are multiples of 128 instead of 8
_TOLERANCE = 0.1  # of the wanted parameters, by which the nearest sizes may miss them


class Importance(NamedTuple):
    """How much each part of a model matters on some chains. float64, on the host."""

    units_D: np.ndarray
    neurons_NF: np.ndarray
    groups_NG: np.ndarray
    squares: dict[str, np.ndarray]  # m of "attention_norm" and "mlp_norm" [N, D], and of the final "norm" [D]
    layers_N: np.ndarray | None  # rise of the loss in nats per label; None where it was not asked for


class Kept(NamedTuple):
    """What a pruned model has of the whole one: indices into the whole one, from 0, increasing. Its layers are M."""

    layers_M: np.ndarray
    units_S: np.ndarray
    neurons_MF: np.ndarray
    groups_MG: np.ndarray
    heads_MH: np.ndarray


class Pruned(NamedTuple):
    """A pruned model: its sizes, its params, float32, and what it was in the whole one."""

    config: DecoderConfig
    params: Params
    kept: Kept


def prune_model(model: DecoderModel, params: Params, chains: Sequence[EncodedChain], target: DecoderConfig) -> Pruned:
    """Prunes a model to the sizes of `target` (`pruned_config`), by importance on the chains.

    The order of the chains and their batches depend on nothing else, so that params which lie on one device give the
    same result whatever mesh a run has.

    Raises:
      ValueError: there is no chain, the params are quantised, or `target` is no pruned form of the model.
    """
    _check(params, model.config, target)
    measured = importance(model, params, chains, of_layers=target.layers < model.config.layers)
    return Pruned(target, *prune(params, model.config, measured, target))


def pruned_config(
    config: DecoderConfig, share: float = 0.0, *, layers: int = 0, width: int = 0, mlp_width: int = 0, kv_heads: int = 0
) -> DecoderConfig:
    """The sizes of a pruned model with about `share` of the parameters of `config`, embedding and head included.

    Sizes that are given, not 0, are taken as they are. Of the others, `layers` and `kv_heads` stay those of `config`;
    with a share, `width` and `mlp_width` are scaled together to multiples of 8 (of 128 from a width of 1024 on), and
    then `mlp_width` is chosen again to come nearest to the share. Without a share they stay too. `head_dim` and the
    query heads of a group are never changed. The width of a Llama is a multiple of its query heads.

    Raises:
      ValueError: a share outside of (0, 1), a size above that of `config`, nothing to prune, a share that the given
        sizes leave nothing to be reached with, or a width that transformers does not read. It begins with the name of
        the argument.
    """
    given = {"layers": layers, "width": width, "mlp_width": mlp_width, "kv_heads": kv_heads}
    for name, size in given.items():
        if not 0 <= size <= getattr(config, name):
            raise ValueError(
                f"{name} is {size}, but the model to be pruned has {getattr(config, name)}; expected 1 to "
                f"{getattr(config, name)}, or 0 to leave it open"
            )
    fixed: dict[str, Any] = {name: size for name, size in given.items() if size}
    if kv_heads:
        fixed["heads"] = kv_heads * (config.heads // config.kv_heads)
    if config.layers_differ and 0 < layers < config.layers:
        raise ValueError(
            f"layers is {layers}, but the layers of this {config.family} differ (rotary embedding, sliding window), so "
            "which remain cannot be left to their importance; leave layers at 0, or take layers evenly "
            "(student.init=teacher_layers)"
        )
    base = replace(config, **fixed)
    if not share:
        if base == config:
            raise ValueError("share is 0, and no size is smaller than the model's: nothing would be pruned; give one")
        base.check_readable()
        return base
    if not 0 < share < 1:
        raise ValueError(f"share is {share}; expected a number above 0 and below 1, of the model's parameters")
    if width and mlp_width:
        raise ValueError(
            f"share is {share}, but width and mlp_width, by which it is reached, are given; leave out one of the three"
        )
    wanted = share * parameter_count(config)

    def nearest(configs: list[DecoderConfig]) -> DecoderConfig:
        return min(configs, key=lambda one: (abs(parameter_count(one) - wanted), -parameter_count(one)))

    def scaled(size: int) -> DecoderConfig:
        ideal = config.mlp_width * size / config.width
        neurons = min(_sizes(config, config.mlp_width), key=lambda one: abs(one - ideal))
        return replace(base, width=size, mlp_width=mlp_width or neurons)

    heads = base.heads if FAMILIES[config.family].whole_heads else 1
    widths = [size for size in _sizes(config, config.width) if size % heads == 0] or [config.width]
    found = nearest([scaled(size) for size in ([width] if width else widths)])
    if not mlp_width:
        found = nearest([replace(found, mlp_width=size) for size in _sizes(config, config.mlp_width)])
    if found == config:
        raise ValueError(f"share is {share}, so near to 1 that nothing would be pruned; give a smaller one")
    if abs(parameter_count(found) - wanted) > _TOLERANCE * wanted:
        others = ", ".join(f"{name} {size}" for name, size in given.items() if size)
        raise ValueError(
            f"share is {share}, {wanted:,.0f} of {parameter_count(config):,} parameters, but the nearest sizes "
            f"{f'with {others} ' if others else ''}have {parameter_count(found):,} (width {found.width}, mlp_width "
            f"{found.mlp_width}); give a share near {parameter_count(found) / parameter_count(config):.2f}"
            f"{', or other sizes' if others else ''}"
        )
    found.check_readable()
    return found


def _sizes(config: DecoderConfig, largest: int) -> list[int]:
    """The sizes that an axis can be pruned to: multiples, and the whole."""
    multiple = 128 if config.width >= _LARGE else 8
    return [*range(multiple, largest, multiple), largest]


def importance(
    model: DecoderModel, params: Params, chains: Sequence[EncodedChain], *, of_layers: bool = False
) -> Importance:
    """Measures how much the parts of a model matter on the chains.

    Args:
      of_layers: measure layers too, for which the model of N layers is run about N / 2 times more.

    Raises:
      ValueError: there is no chain.
    """
    if not chains:
        raise ValueError("there is no chain to measure importance on; give at least one")
    length = round_up(max(len(chain) for chain in chains), 64)
    boundaries = max(len(chain.boundaries) for chain in chains)
    sums: Any = None
    for batch in fixed_batches(chains, _ROWS, length, 1, boundaries):
        found = jax.tree.map(lambda x: np.asarray(x, np.float64), _sums(model, params, batch, of_layers))
        sums = found if sums is None else jax.tree.map(np.add, sums, found)
    means = {name: jax.tree.map(lambda x: x / sums["tokens"], sums[name]) for name in ("layers", "final")}
    by_layer = {name: np.stack([layer[name] for layer in means["layers"]]) for name in means["layers"][0]}
    losses_N = np.stack(sums["without"]) - sums["loss"] if of_layers else None
    return Importance(
        by_layer["units"].sum(axis=0) + means["final"]["units"],
        by_layer["neurons"],
        by_layer["groups"],
        {name: by_layer[name] for name in ("attention_norm", "mlp_norm")} | {"norm": means["final"]["norm"]},
        None if losses_N is None else losses_N / max(float(sums["labels"]), 1.0),
    )


def _sums(model: DecoderModel, params: Params, batch: Batch, of_layers: bool) -> dict[str, Any]:
    """Sums over the tokens, or labels, of a batch."""
    rest = {name: value for name, value in params.items() if name != "layers"}
    count, places = model.config.layers, (batch.positions_BL, batch.chain_ids_BL)
    x_BLD, of_layer, without = embed(model, rest, batch.tokens_BL), [], []
    for layer in range(count):
        if of_layers:
            skipped_BLD = x_BLD
            for later in range(layer + 1, count):
                skipped_BLD, _ = layer_inputs(model, later, layer_params(params, later), skipped_BLD, *places)
            without.append(_final_sums(model, rest, skipped_BLD, batch)["loss"])
        x_BLD, found = _layer_sums(model, layer, layer_params(params, layer), x_BLD, *places)
        of_layer.append(found)
    final = _final_sums(model, rest, x_BLD, batch)
    tokens, labels = np.sum(batch.chain_ids_BL > 0), np.sum(batch.loss_weights_BL)
    loss = final.pop("loss")
    return {"layers": of_layer, "final": final, "without": without, "loss": loss, "tokens": tokens, "labels": labels}


@functools.partial(jax.jit, static_argnums=0)
def _layer_sums(
    model: DecoderModel, layer: int, weights: Params, x_BLD: jax.Array, positions_BL: Array, chain_ids_BL: Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The states after a layer, and what the importance of its parts is made of, summed over tokens."""
    after_BLD, read = layer_inputs(model, layer, weights, x_BLD, positions_BL, chain_ids_BL)
    o_HED = weights["attention"]["o"].astype(x_BLD.dtype)
    between_BLD = x_BLD + jnp.einsum("BLHE,HED->BLD", read.mixed_BLHE, o_HED)
    if model.config.output_bias:
        between_BLD = between_BLD + weights["attention"]["o_bias"].astype(x_BLD.dtype)
    groups = (*x_BLD.shape[:2], model.config.kv_heads, -1)  # the query heads of a group are next to each other
    total = functools.partial(_token_sum, jnp.asarray(chain_ids_BL) > 0)
    return after_BLD, {
        "units": total(jnp.abs(read.attention_BLD)) + total(jnp.abs(read.mlp_BLD)),
        "neurons": total(jnp.abs(read.neurons_BLF)),
        "groups": total(jnp.linalg.norm(read.mixed_BLHE.astype(jnp.float32).reshape(groups), axis=-1)),
        "attention_norm": total(jnp.square(_normed(x_BLD, model.config.norm_eps))),
        "mlp_norm": total(jnp.square(_normed(between_BLD, model.config.norm_eps))),
    }


@functools.partial(jax.jit, static_argnums=0)
def _final_sums(model: DecoderModel, rest: Params, x_BLD: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    """The same of the last norm, and the loss on the labels, summed over them, in nats."""
    normed_BLD = _normed(x_BLD, model.config.norm_eps)
    scale_11D = rest["norm"]["scale"].astype(jnp.float32)[None, None]
    final_BLD = (normed_BLD * scale_11D).astype(x_BLD.dtype)
    total = functools.partial(_token_sum, jnp.asarray(batch.chain_ids_BL) > 0)

    def loss(row: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        final_LD, labels_L, weights_L = row
        log_probs_LV = jax.nn.log_softmax(model.logits(rest, final_LD))
        found_L = jnp.take_along_axis(log_probs_LV, labels_L[:, None], axis=1)[:, 0]
        return -jnp.sum(jnp.where(weights_L > 0, weights_L * found_L, 0.0))

    losses_B = jax.lax.map(loss, (final_BLD, *shifted_labels(batch)))  # row by row: logits of one fit into memory
    return {"units": total(jnp.abs(final_BLD)), "norm": total(jnp.square(normed_BLD)), "loss": jnp.sum(losses_B)}


def _normed(x: jax.Array, eps: float) -> jax.Array:
    """What an RMSNorm makes of x before its scale, float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


def _token_sum(mask_BL: jax.Array, x_BLX: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(mask_BL[..., None], x_BLX.astype(jnp.float32), 0.0), axis=(0, 1))


def prune(params: Params, config: DecoderConfig, measured: Importance, target: DecoderConfig) -> tuple[Params, Kept]:
    """The params of a model of the `target` sizes with the most important parts of `params`, and what they were.

    Args:
      config: of `params`.
      measured: of the same model; of its layers too, where some of them go.

    Raises:
      ValueError: the params are quantised, or `target` is no pruned form of `config`.
    """
    _check(params, config, target)
    flat = flatten_dict(params)
    kept = _kept(config, measured, target)
    pruned = {}
    for weight in table(config):
        chosen = {"embed": kept.units_S, "norm": kept.units_S}
        if weight.stacked:
            layers = [
                _cut(flat[weight.path][layer], weight.param_axes, chosen | own)
                for layer, own in zip(kept.layers_M, _of_layers(kept), strict=True)
            ]
            array = np.stack(layers)
        else:
            array = _cut(flat[weight.path], weight.param_axes, chosen)
        if weight.param_axes == ("norm",):
            squares = measured.squares[weight.path[-2]]
            array = array * _ratio(squares[kept.layers_M] if weight.stacked else squares, kept.units_S)
        pruned[weight.path] = jnp.asarray(array, jnp.float32)
    return unflatten_dict(pruned), kept


def _check(params: Params, config: DecoderConfig, target: DecoderConfig) -> None:
    """Raises ValueError where params are quantised, or `target` differs from `config` in more than smaller sizes."""
    quantised = [".".join(path) for path, leaf in flatten_dict(params).items() if isinstance(leaf, QArray)]
    if quantised:
        raise ValueError(f"{quantised[0]} is quantised; prune a model with float weights, and quantise it afterwards")
    sizes = {name: getattr(target, name) for name in (*PRUNED_SIZES, "heads")}
    whole = {name: getattr(config, name) for name in sizes}
    too_large = [f"{name} {size} of {whole[name]}" for name, size in sizes.items() if size > whole[name]]
    if too_large:
        raise ValueError(f"a pruned model cannot have {', '.join(too_large)}; give sizes as `pruned_config` makes them")
    if replace(config, **sizes) != target or target.heads * config.kv_heads != config.heads * target.kv_heads:
        raise ValueError(
            "a pruned model differs from the whole one in layers, width, mlp_width and whole attention groups only; "
            "give sizes as `pruned_config` makes them"
        )


def _kept(config: DecoderConfig, measured: Importance, target: DecoderConfig) -> Kept:
    layers_M = np.arange(config.layers)
    if target.layers < config.layers:
        assert measured.layers_N is not None, "layers are chosen by their importance"
        layers_M = _most(measured.layers_N, target.layers)
    groups_MG = _most(measured.groups_NG[layers_M], target.kv_heads)
    own = np.arange(config.heads // config.kv_heads)
    heads_MH = (groups_MG[..., None] * len(own) + own).reshape(len(layers_M), -1)
    neurons_MF = _most(measured.neurons_NF[layers_M], target.mlp_width)
    return Kept(layers_M, _most(measured.units_D, target.width), neurons_MF, groups_MG, heads_MH)


def _most(importance: np.ndarray, count: int) -> np.ndarray:
    """Indices of the largest along the last axis, increasing; of equal ones the first."""
    return np.sort(np.argsort(-importance, axis=-1, kind="stable")[..., :count], axis=-1)


def _of_layers(kept: Kept) -> list[dict[str, np.ndarray]]:
    """What each layer keeps of its own axes, by their names in the table of weights."""
    own = zip(kept.neurons_MF, kept.groups_MG, kept.heads_MH, strict=True)
    return [{"mlp": neurons, "kv_heads": groups, "heads": heads} for neurons, groups, heads in own]


def _cut(array: Array, axes: Sequence[str], chosen: dict[str, np.ndarray]) -> np.ndarray:
    cut = np.asarray(array, np.float32)
    for number, axis in enumerate(axes):
        cut = np.take(cut, chosen[axis], axis=number) if axis in chosen else cut
    return cut


def _ratio(squares: np.ndarray, units_S: np.ndarray) -> np.ndarray:
    """c of the module's docstring, [..., 1]."""
    kept, whole = squares[..., units_S].mean(axis=-1), squares.mean(axis=-1)
    return np.sqrt(1.0 + kept - whole)[..., None]
