"""What few bits and fewer weights cost, by method: rounding after training, training through rounding, pruning.

    python launch/study.py --config=configs/study_compression.py    # word problems, five seeds; run again to continue

KD and the trajectory on soft windows, all depths at once (of configs/study_states.py, whose runs are shared where the
workdir is one): rounded to 8, 4, 3 and 2 bits to the nearest and by GPTQ; trained through the rounding, from the start
or in the last quarter of the updates; and pruned from the teacher to the size of two of its layers (neurons only, so
that states have the teacher's width and need no map), as floats and in 3 bits.
"""

import dataclasses

from ml_collections import ConfigDict

from configs.study_states import states
from configs.study_tiny import as_config, only
from configs.study_tiny import get_config as study_tiny
from rtd_jax.apps.study.recipe import Method, Overrides

GROUP = 32  # inputs that share a scale: the tiny models' widths are 128 and 384
SCHEMES = ("int8", "int4", "w4a16_gptq", "int3", "w3a16_gptq", "int2", "w2a16_gptq")
TRAINED = ("int3", "int2")  # fewer bits than the tiny students can spare
LAST, UPDATES = 75, 300  # updates through the rounding where floats were trained before, and of a whole run
PRUNED = ("student.width=128", "student.mlp_width=128")  # 451,328 parameters; two of the four layers have 450,816


def rounded(of: str, scheme: str, **about) -> Method:
    """A method's students, rounded after training."""
    return Method((), begins_with=of, compress=(f"scheme={scheme}", f"group_size={GROUP}", "by_layer=False"), **about)


def variant(of: Method, *overrides: str, **about) -> Method:
    """A trained method with more overrides."""
    return dataclasses.replace(of, overrides=(*of.overrides, *overrides), role="control", pictured=False, **about)


def through(qtype: str) -> Overrides:
    """Training through the rounding."""
    return f"student.quantization={qtype}", f"student.group_size={GROUP}"


def compressed() -> dict[str, Method]:
    """The methods by name."""
    found = only(states(), ("kd", "alignment_soft"))
    question = {"kd": "does it help to follow soft windows, without finding steps?"}
    found["alignment_soft"] = dataclasses.replace(found["alignment_soft"], compared_with=question, pictured=True)
    for name, short in (("kd", "kd"), ("alignment_soft", "soft")):
        whole = found[name]
        for scheme in SCHEMES:
            found[f"{short}_{scheme}"] = rounded(name, scheme, compared_with={name: f"what does {scheme} cost {name}?"})
        found[f"{short}_{UPDATES - LAST}"] = variant(whole, f"total_updates={UPDATES - LAST}", compared_with={})
        for qtype in TRAINED:
            question = {f"{short}_{qtype}": f"is training through {qtype} better than rounding afterwards?"}
            found[f"{short}_through_{qtype}"] = variant(whole, *through(qtype), compared_with=question)
            found[f"{short}_then_{qtype}"] = variant(
                whole,
                *through(qtype),
                f"total_updates={LAST}",
                begins_with=f"{short}_{UPDATES - LAST}",
                compared_with=question
                | {f"{short}_through_{qtype}": f"is {qtype} in the last quarter as good as from the start?"},
            )
        found[f"{short}_pruned"] = variant(
            whole,
            "student.init=pruned",
            "student.layers=0",
            *PRUNED,
            compared_with={name: "are all layers with a third of their neurons better than half of the layers?"},
        )
        found[f"{short}_pruned_int3"] = rounded(
            f"{short}_pruned", "int3", compared_with={f"{short}_int3": "and in 3 bits?"}
        )
    return found


def get_config() -> ConfigDict:
    c = study_tiny("conditions")
    c.seeds = (0, 1, 2, 3, 4)  # of params and data order; the same for every method
    c.methods = as_config(compressed())  # by name: overrides, role and what it is compared with
    c.about.few_problems += (
        " Students are then rounded, trained through rounding, or pruned; sizes are in docs/compression.md."
    )
    return c
