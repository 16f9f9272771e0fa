"""How well a segmentation finds the ends of steps, with 95% intervals from a bootstrap over chains."""

from typing import Any

import numpy as np

from rtd_jax.eval.estimates import bootstrap, bootstraps
from rtd_jax.steps.scores import Places, counts, precision_recall_f1


def boundary_scores(found: Places, right: Places, *, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Precision, recall and F1, exact and within 1 and 2 tokens, each with its interval.

    `all` counts every step's end. `inner` leaves out each chain's last one, which is a boundary by construction and
    needs no finding.

    Raises:
      ValueError: there are no chains.
    """
    if not right:
        raise ValueError("there are no chains to score; check the data")
    result: dict[str, Any] = {"chains": len(right), "boundaries": int(sum(map(len, right)))}
    for kind, cut in (("all", None), ("inner", -1)):
        result[kind] = {}
        for tolerance in (0, 1, 2):
            counts_C3 = counts([f[:cut] for f in found], [r[:cut] for r in right], tolerance)
            scores = bootstraps(
                lambda chains, counts_C3=counts_C3: precision_recall_f1(counts_C3[chains]),  # type: ignore[misc]
                np.arange(len(right)),
                resamples=resamples,
                seed=seed,
            )
            result[kind]["exact" if not tolerance else f"within_{tolerance}"] = {
                name: {"value": score.value, "low": score.low, "high": score.high}
                for name, score in zip(("precision", "recall", "f1"), scores, strict=True)
            }
    return result


def step_counts(found: Places, right: Places, *, resamples: int = 1000, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Found minus annotated number of steps, by annotated number (8 and more together): mean, mean absolute, exact."""
    depths = np.array([len(r) for r in right])
    errors = np.array([len(f) for f in found]) - depths
    result = {}
    for depth in sorted({min(int(d), 8) for d in depths}):
        chosen = errors[depths == depth] if depth < 8 else errors[depths >= 8]
        mean = bootstrap(
            lambda chains, chosen=chosen: float(np.mean(chosen[chains])),  # type: ignore[misc]
            np.arange(len(chosen)),
            resamples=resamples,
            seed=seed,
        )
        result[str(depth) if depth < 8 else "8+"] = {
            "chains": len(chosen),
            "mean_error": {"value": mean.value, "low": mean.low, "high": mean.high},
            "mean_absolute_error": float(np.abs(chosen).mean()),
            "exact": float((chosen == 0).mean()),
        }
    return result
