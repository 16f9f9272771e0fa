"""AdamW under a cosine over global updates, with global-norm clipping and no decay on norms."""

from dataclasses import dataclass
from typing import Any

import jax
import optax

from rtd_jax.base.settings import check_ranges


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW and its schedule."""

    learning_rate: float = 2e-5  # per update, at the peak
    warmup_updates: int = 500  # optimizer updates
    final_fraction: float = 0.0  # of the peak, reached at the last update
    b1: float = 0.9  # decay of the first moment, per update
    b2: float = 0.95  # decay of the second moment, per update
    eps: float = 1e-8  # added to the root of the second moment
    weight_decay: float = 0.0  # on matrices only
    clip_norm: float = 1.0  # global norm of the gradient
    offload: bool = False  # the moments lie in host memory and come to the devices for the update only

    def __post_init__(self) -> None:
        check_ranges(self, learning_rate="(0, 10]", warmup_updates="[0, 1e9]", final_fraction="[0, 1]")
        check_ranges(self, b1="[0, 1)", b2="[0, 1)", eps="(0, 1]", weight_decay="[0, 100]", clip_norm="(0, inf)")


def learning_rate_schedule(settings: OptimizerSettings, total_updates: int) -> optax.Schedule:
    """Learning rate by update: a linear warm-up, then a cosine that ends at update `total_updates`."""
    warmup = min(settings.warmup_updates, total_updates // 2)  # a 20-update trial keeps the recipe's shape
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup else settings.learning_rate,
        peak_value=settings.learning_rate,
        warmup_steps=warmup,
        decay_steps=total_updates,
        end_value=settings.learning_rate * settings.final_fraction,
    )


def make_optimizer(settings: OptimizerSettings, total_updates: int) -> optax.GradientTransformation:
    """The optimizer of a recipe. It counts global updates, so micro-batches do not advance the schedule."""
    return optax.chain(
        optax.clip_by_global_norm(settings.clip_norm),
        optax.adamw(
            learning_rate_schedule(settings, total_updates),
            b1=settings.b1,
            b2=settings.b2,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            mask=decay_mask,
        ),
    )


def decay_mask(params: Any) -> Any:
    """True where weight decay applies: everything but norm scales and biases."""

    def decays(path: tuple[Any, ...], _: Any) -> bool:
        name = str(getattr(path[-1], "key", ""))
        return name != "scale" and not name.endswith("_bias")

    return jax.tree_util.tree_map_with_path(decays, params)
