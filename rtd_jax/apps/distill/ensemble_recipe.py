"""What an ensemble is trained by, and which runs cannot be one."""

import dataclasses
from dataclasses import dataclass

import jax

from rtd_jax.base.settings import SEED, check_distinct, check_ranges
from rtd_jax.train.curriculum import (
    stages,
)
from rtd_jax.train.recipe import Recipe


class NoEnsemble(ValueError):
    """The runs cannot be one program; the message says why, and the way out."""


@dataclass(frozen=True)
class EnsembleRecipe(Recipe):
    """A recipe whose runs differ in their seed. `seed` is not read; `mesh` neither: members are spread over `data`."""

    seeds: tuple[int, ...] = ()  # of the members: params and data order
    side_by_side: int = 0  # members of a device computed together; 0: all of them, on CPUs one after another

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, seeds=SEED, side_by_side="[0, 1e6]")
        check_distinct(self, "seeds")

    def unread_settings(self) -> dict[str, str]:
        own = {"seed": "seeds are those of the members", "mesh": "members are spread over all devices"}
        return super().unread_settings() | own

    def member(self, seed: int) -> Recipe:
        """The recipe of the single run with this seed."""
        values = {x.name: getattr(self, x.name) for x in dataclasses.fields(Recipe)}
        return Recipe(**(values | {"seed": seed}))


def check_ensemble(recipe: EnsembleRecipe) -> None:
    """Raises NoEnsemble where a recipe's runs cannot be one program, or ValueError where it has no seeds."""
    if not recipe.seeds:
        raise ValueError("seeds is empty; give those of the members, such as --config.seeds=(0,1,2,3)")
    draws = "each run draws chains of its own between updates"
    reasons = {
        "a stage of the curriculum ends when its own run is ready": len(stages(recipe.curriculum)) > 1,
        "curriculum.ends_by is 'solved', and runs solve alone": recipe.curriculum.measures == "solved",
        "curriculum.spend_budget is False, so runs end at different updates": not recipe.curriculum.spend_budget,
        f"loss.reward_weight is not 0, and {draws}": bool(recipe.loss.reward_weight),
        f"on_policy.fraction is not 0, and {draws}": bool(recipe.own_rows),
        f"micro_batches is {recipe.micro_batches}, not 1": recipe.micro_batches > 1,
        "optimizer.offload is True": recipe.optimizer.offload,
        "student.adapter.rank is not 0, and each member would hold the frozen weights": bool(
            recipe.student.adapter.rank
        ),
        "resume_from is given": bool(recipe.resume_from),
        "there are several processes": jax.process_count() > 1,
    }
    for reason, holds in reasons.items():
        if holds:
            raise NoEnsemble(
                f"runs of this recipe cannot be one program: {reason}. Train the seeds one by one with the train "
                "command (a study: --config.ensemble=0), or change that setting"
            )
