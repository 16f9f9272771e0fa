"""What is left of a method's gain when its students and the baseline's are made smaller alike."""

from rtd_jax.apps.report import article
from rtd_jax.apps.study.claims import NOT_SAID, Claim, TaskRuns, points, with_interval
from rtd_jax.apps.study.recipe import Overrides
from rtd_jax.apps.study.statistics import share_left

_FOUR_BITS = ("scheme=int4", "scheme=w4a16_gptq")  # of which the article speaks
_SHOWN = ("scheme", "group_size", "symmetric", "head")  # flags that change the student
LEFT = article.QUANTISED_GAIN / article.DEEP_GAIN


def gains_left(runs: TaskRuns) -> list[Claim]:
    """For each method and each way of compressing that the baseline had too, the gain before, after, and their ratio.

    The article's share agrees where it lies in the interval.
    """
    compressed: dict[tuple[str, Overrides], str] = {
        (runs.methods[name].begins_with, runs.methods[name].compress): name
        for name in runs.outcomes
        if name in runs.methods and runs.methods[name].compress
    }
    lines = []
    for (begun, flags), name in compressed.items():
        other = compressed.get((runs.baseline, flags))
        gain, left = runs.difference(begun, runs.baseline), runs.difference(name, other)
        if begun == runs.baseline or gain is None or left is None:
            continue
        pairs = [(runs.finished(a), runs.finished(b)) for a, b in ((begun, runs.baseline), (name, other))]
        share = share_left(pairs[0], pairs[1], runs.is_deep)
        found, verdict = "no gain that is surely above 0", "undecided"
        if share is not None:
            found = with_interval(share, ".0f", unit="%")
            verdict = "agrees" if share.low <= LEFT <= share.high else "disagrees"
        is_stated = bool(set(flags) & set(_FOUR_BITS))
        lines.append(
            Claim(
                f"`{begun}`, {', '.join(flag for flag in flags if flag.startswith(_SHOWN))}",
                f"{points(gain)} -> {points(left)}: {found}",
                f"{article.DEEP_GAIN} -> {article.QUANTISED_GAIN}: {100 * LEFT:.0f}%" if is_stated else "-",
                verdict if is_stated else NOT_SAID,
            )
        )
    return lines
