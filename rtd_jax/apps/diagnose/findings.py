"""The verdict of a diagnosis, and the article's numbers that are shown beside it."""

from typing import Any

import numpy as np

from rtd_jax.apps.report import article
from rtd_jax.apps.report.tables import interval

# The article's own numbers, drawn beside what is measured.
ARTICLE = {"cka": {str(step): value for step, value in article.CKA.items()}, "auroc": article.AUROC}
SMALL = 0.005  # fall of a cosine a step; int8 rounding alone makes a smaller one significant
FEW = 8  # failures or successes; with fewer of either, no conclusion about failure is drawn

ANSWERS = {  # (is there drift, does distance from the teacher go with failure): (answer, sentence)
    (True, True): (
        "drift",
        "Coherence drift is there and goes with the failures: the student leaves the teacher's trajectory along the "
        "chain, and the further it is off, the more often it is wrong.",
    ),
    (True, False): (
        "elsewhere",
        "The student drifts along the chain, but the chains that drift more do not fail more: what makes it fail is "
        "elsewhere, so look at its step accuracy and its answers first.",
    ),
    (False, True): (
        "distance without drift",
        "The student is off the teacher's trajectory where it fails, but no further at late steps than at early ones: "
        "it is a matter of single steps, not of drift that builds up.",
    ),
    (False, False): (
        "elsewhere",
        "No coherence drift is seen, and distance from the teacher does not go with failure: look elsewhere.",
    ),
}


def verdict(texts: dict[str, Any], failed: np.ndarray, both_fail: int | None = None) -> dict[str, Any]:
    """Is coherence drift responsible for the failures? An answer, a sentence, and the evidence it rests on.

    Drift is there when the cosine of states or of transitions, or debiased CKA on the same chains, falls along the
    chain beyond its 95% interval. It goes with failure when the transition cosine tells right from wrong among chains
    of the same depth, or steps of the same place, beyond its 95% interval. Both together make drift the likely account,
    an association all the same: only training against drift can show a cause.
    """
    reference = texts["reference"]
    wrong, right = int(failed.sum()), int((~failed).sum())
    falls = [
        f"the {name} cosine falls by {-found['value']:.4f} a step (95%: {-found['high']:.4f} to {-found['low']:.4f})"
        for name in ("boundary", "transition")
        if (found := reference["decline"][f"{name}_cosine"])["high"] is not None
        and found["high"] < 0
        and -found["value"] >= SMALL
    ]
    curve = [s for s in reference["steps"] if s["step"] >= 1 and s["cka_same_chains"] is not None]
    ckas = [s["cka_same_chains"] for s in curve]
    if len(ckas) > 1 and None not in (ckas[0]["low"], ckas[-1]["high"]) and ckas[-1]["high"] < ckas[0]["low"]:
        falls.append(f"debiased CKA on the same chains falls from {ckas[0]['value']:.3f} to {ckas[-1]['value']:.3f}")
    evidence = [f"{wrong} of {len(failed)} free-running chains are wrong"]
    if both_fail is not None:
        evidence.append(f"the teacher fails {both_fail} of those {wrong} too: its failures are not the student's drift")
    evidence += falls or [
        f"no measure falls along the chain beyond its 95% interval, or cosines by less than {SMALL} a step"
    ]
    tells = []
    for name, text, key in (
        ("chains that fail from chains that do not, at the same depth", "reference", "chain"),
        ("a right next step from a wrong one, at the same place", "reference", "next_step"),
        ("chains that fail from chains that do not, at the same depth, in the student's own text", "own", "chain"),
        ("a right step of the student's own text from a wrong one, at the same place", "own", "same_step"),
    ):
        found = texts.get(text, {}).get("relation", {}).get(key)
        if not found or found["auroc_within"]["value"] is None:
            continue
        within = found["auroc_within"]
        overall = interval(found["auroc"])
        line = f"transition cosine tells {name} with AUROC {interval(within)}; not held to depth {overall}"
        evidence.append(line)
        if within["low"] is not None and within["low"] > 0.5 and found["wrong"] >= FEW:
            tells.append(line)
    starts = reference["drift_starts"]
    start = min((s for s in starts.values() if s is not None), default=None)
    if start is not None:
        evidence.append(f"the cosines lie below those of step 1 from step {start} on")
    if min(wrong, right) < FEW:
        what = "failures" if wrong < FEW else "successes"
        answer = "too few to say"
        sentence = (
            f"There are only {min(wrong, right)} {what} among {len(failed)} chains: what goes with failure cannot be "
            "told. " + ("Drift is there all the same." if falls else "No drift along the chain is seen either.")
        )
    else:
        answer, sentence = ANSWERS[bool(falls), bool(tells)]
    return {"answer": answer, "sentence": sentence, "drift_starts": start, "evidence": evidence}
