"""Is there a curriculum that does no harm? What ends a stage, and which depths it holds.

    python launch/study.py --config=configs/study_curricula.py    # word problems and the lift; run again to continue

What its methods have in common with configs/study_tiny.py are the same runs, in the same workdir.
"""

from ml_collections import ConfigDict

from configs.study_tiny import ALIGNED, COHERENT, KD, STAGED, as_config, methods, only
from configs.study_tiny import get_config as study_tiny
from rtd_jax.apps.study.recipe import Method

# Curricula whose stages hold all depths up to their own equally, by what ends a stage.
SOLVED = ("curriculum.ends_by=solved", "curriculum.mixture=equal")
SHARES = ("curriculum.ends_by=share", "curriculum.mixture=equal")


def curricula() -> dict[str, Method]:
    """Is there a curriculum that does no harm? `kd_curriculum` has equal shares too, of stages that replay."""
    found = only(methods(), ("kd", "rtd", "rtd_no_curriculum", "kd_curriculum"))
    found["kd_curriculum_share"] = Method(
        (*KD[:2], *SHARES),
        compared_with={
            "kd": "does a curriculum of equal shares help where stages hold all depths up to their own?",
            "kd_curriculum": "is it better to hold all depths up to a stage's own than to replay some?",
        },
        **STAGED,
    )
    found["kd_curriculum_solved"] = Method(
        (*KD[:2], *SOLVED),
        compared_with={
            "kd": "does a curriculum help whose stages end by chains solved?",
            "kd_curriculum_share": "do chains solved end stages better than equal shares do?",
        },
        **STAGED,
    )
    found["rtd_curriculum_solved"] = Method(
        SOLVED,
        compared_with={
            "rtd": "do chains solved end stages better than coherence does?",
            "rtd_no_curriculum": "does the curriculum that ends by chains solved help RTD?",
        },
        **ALIGNED,
        **COHERENT,
        **STAGED,
    )
    return found


def get_config() -> ConfigDict:
    c, lift = study_tiny("conditions"), study_tiny("lift")
    c.tasks.lift = lift.tasks.lift  # which has problems enough for every stage
    c.about.lift = lift.about.lift  # for the report
    c.methods = as_config(curricula())  # by name: overrides, role, components and what it is compared with
    return c
