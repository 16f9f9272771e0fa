"""What compressing a student cost: chains, steps and perplexity by depth, drift, bytes, and in which layer it is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from rtd_jax.apps.report.sections import Intervals, Section
from rtd_jax.apps.report.tables import interval, number
from rtd_jax.base.sharding import row_sharding
from rtd_jax.base.types import Params
from rtd_jax.data.encoding import EncodedChain, encode_traces
from rtd_jax.data.formats import TextFormat
from rtd_jax.data.tokenizer_match import vocab_size
from rtd_jax.data.trace import Trace
from rtd_jax.eval.drift import BoundaryStates, Map, cross_fitted, measure, transitions
from rtd_jax.eval.estimates import Estimate, depth_buckets, estimate
from rtd_jax.eval.evaluate import ChainEvaluator
from rtd_jax.eval.scored import Record
from rtd_jax.eval.scoring import ScoringSettings, score_chains
from rtd_jax.eval.states import boundary_states
from rtd_jax.train.saved_models import LoadedModel

OPEN_FROM = 5  # depths 1, 2, 3, 4, 5+
DEEP = 4  # steps of a chain whose loss the closing sentence names
READ = 64  # chains on which each layer's own share of the loss is measured


@dataclass(frozen=True)
class Measured:
    """A model's evaluation: the report of `ChainEvaluator`, and its records."""

    report: dict[str, Any]
    records: list[Record]


def evaluate_model(
    loaded: LoadedModel, problems: Sequence[Trace], evaluator: ChainEvaluator, progress: Callable[[int, int], None]
) -> Measured:
    """Free-running chains, teacher-forced steps and perplexity on the problems."""
    return Measured(*evaluator(loaded.model, loaded.params, problems, progress=progress))


def differences(before: Measured, after: Measured) -> dict[str, Estimate]:
    """{depth: share of chains right after less before, paired by problem}; "4+" and "all" too."""
    changes = np.array(
        [float(b["correct"]) - float(a["correct"]) for a, b in zip(before.records, after.records, strict=True)]
    )
    depths = [record["depth"] for record in before.records]
    places = dict(depth_buckets(depths, OPEN_FROM))
    deep = [i for i, depth in enumerate(depths) if depth >= DEEP]
    places |= ({f"{DEEP}+": deep} if deep else {}) | {"all": list(range(len(depths)))}
    return {depth: estimate(changes[rows]) for depth, rows in places.items() if len(rows)}


def drift(
    before: LoadedModel, after: LoadedModel, problems: Sequence[Trace], text: TextFormat, measured: Measured, seed: int
) -> dict[str, Any]:
    """The compressed student against itself before, on the reference chains; see `rtd_jax.eval.drift.measure`.

    Of models of one width the identity joins the states; of a pruned one linear maps, each fitted on one half of the
    chains and used on the other.
    """
    chains, _ = encode_traces(before.tokenizer, problems, text, row_length=2**31 - 1)
    (after_CKS, mask_CK), (before_CKD, _) = boundary_states(after, chains), boundary_states(before, chains)
    states = BoundaryStates(after_CKS, before_CKD, mask_CK)
    maps: tuple[list[Map], list[Map]] = ([None] * len(chains), [None] * len(chains))
    if after_CKS.shape[-1] != before_CKD.shape[-1]:
        maps = cross_fitted(states, seed), cross_fitted(transitions(states), seed)
    failed = np.array([not record["correct"] for record in measured.records])
    steps_right = [record["teacher_forced"] for record in measured.records]
    return measure(states, maps, steps_right, failed, resamples=100, seed=seed)


def loss_by_part(
    loaded: LoadedModel, after: Params, chains: Sequence[EncodedChain], note: Callable[[str], None]
) -> dict[str, float]:
    """Nats a token that rounding one part alone adds on the chains: each layer, all attentions, all MLPs, and all.

    Args:
      loaded: the student before.
      after: its params rounded, as floats.
    """
    settings = ScoringSettings(row_length=max(512, *(len(chain) for chain in chains)))
    tokens = [chain.tokens.tolist() for chain in chains]

    def nats(params: Params) -> float:
        scores = score_chains(
            loaded.model,
            params,
            tokens,
            settings,
            vocab_size=vocab_size(loaded.tokenizer),
            batch_sharding=row_sharding(loaded.mesh),
        )
        predicted = [score.log_probs[chain.prompt_length :] for score, chain in zip(scores, chains, strict=True)]
        return -float(np.concatenate(predicted).mean(dtype=np.float64))

    before = loaded.params
    layers, changed = before["layers"], after["layers"]
    parts: dict[str, Params] = {
        f"layer {i + 1}": {**before, "layers": _with_layer(layers, changed, i)}
        for i in range(loaded.model.config.layers)
    }
    parts |= {f"every {name}": {**before, "layers": {**layers, name: changed[name]}} for name in ("attention", "mlp")}
    parts["everything"] = after
    note(f"reading {len(chains)} chains with each of {len(parts) - 3} layers rounded alone")
    whole = nats(before)
    return {name: nats(params) - whole for name, params in parts.items()}


@jax.jit
def _with_layer(layers: Params, changed: Params, number: int) -> Params:
    return jax.tree.map(lambda x, y: x.at[number].set(y[number]), layers, changed)


def sections_of(report: dict[str, Any]) -> tuple[list[Section], list[Intervals]]:
    """The tables of a report, and the differences as a picture."""
    before, after = report["before"], report["student"]
    chains = [
        (
            depth,
            row["n"],
            _percent(row),
            _percent(after["chain_accuracy"][depth]),
            _points(report["differences"][depth]),
        )
        for depth, row in before["chain_accuracy"].items()
    ]
    deep = f"{DEEP}+"
    if deep in report["differences"]:
        row = report["differences"][deep]
        chains.append((deep, row["n"], "", "", _points(row)))
    rows = [("perplexity", *(number(model["perplexity"], 4) for model in (before, after)))]
    rows += [
        (f"{words} %", *(_percent(model[name]["all"]) for model in (before, after)))
        for name, words in (
            ("chain_accuracy", "chains right"),
            ("step_accuracy", "steps right, given the right prefix"),
        )
        if before.get(name)
    ]
    size = report["size"]
    rows += [
        ("bytes of weights", f"{size['before']:,}", f"{size['after']:,}"),
        ("bits a parameter", f"{size['bits_before']:.2f}", f"{size['bits_after']:.2f}"),
    ]
    found = [
        Section("Chains right by depth", 2, (), ("depth", "problems", "before %", "after %", "change"), chains),
        Section("Over all depths", 2, (), ("", "before", "after"), rows),
    ]
    if report.get("drift_from_before"):
        found.append(_drift_section(report["drift_from_before"]))
    if report.get("parts"):
        parts = [(name, f"{1000 * nats:.3f}") for name, nats in report["parts"].items()]
        text = ("What is added to the cross-entropy of reference chains where one part alone is compressed.",)
        found.append(Section("Where it is", 2, text, ("part", "millinats a token"), parts))
    rows_of = {
        f"{depth} step{'' if depth == '1' else 's'}": (100 * x["mean"], *(100 * y for y in _ends(x)))
        for depth, x in report["differences"].items()
        if x["stderr"] is not None
    }
    picture = Intervals(
        "differences",
        "Chains right: after less before",
        "Points, paired by problem, with 95% intervals.",
        "points",
        rows_of,
    )
    return found, [picture] if rows_of else []


def _drift_section(found: dict[str, Any]) -> Section:
    measures = ("cka_debiased", "boundary_cosine", "transition_cosine")
    rows = [
        (step["step"] or "prompt", step["chains"], *(interval(step[key]) for key in measures))
        for step in found["steps"]
    ]
    return Section(
        "Drift",
        2,
        ("The compressed student against itself before, on reference chains. A cosine of 1 is no drift.",),
        ("step", "chains", "debiased CKA", "cosine of states", "cosine of transitions"),
        rows,
    )


def where_sentence(report: dict[str, Any]) -> str:
    """One line: what is lost, at which depth most, and in which part of the model it is."""
    changes = {k: v for k, v in report["differences"].items() if k not in ("all", f"{DEEP}+")}
    worst = min(changes, key=lambda depth: changes[depth]["mean"])
    sentence = (
        f"all chains {_points(report['differences']['all'])} points, most at depth {worst}: {_points(changes[worst])}"
    )
    steps = [step for step in (report.get("drift_from_before") or {}).get("steps", ()) if step["transition_cosine"]]
    steps = [step for step in steps if step["transition_cosine"]["value"] is not None]
    if steps:
        step = min(steps, key=lambda step: step["transition_cosine"]["value"])
        cosine = step["transition_cosine"]["value"]
        sentence += f"; transitions keep their direction least into step {step['step']} (cosine {cosine:.3f})"
    layers = {k: v for k, v in (report.get("parts") or {}).items() if k.startswith("layer ")}
    if layers:
        name = max(layers, key=layers.__getitem__)
        sentence += f"; of the layers {name} alone adds most, {1000 * layers[name]:.2f} millinats a token"
    return sentence


def _percent(row: dict[str, Any]) -> str:
    return f"{100 * row['mean']:.1f}"


def _ends(row: dict[str, Any]) -> tuple[float, float]:
    """The ends of the 95% interval of a row with a standard error."""
    kept = Estimate.with_error(row["mean"], row["stderr"], row["n"])
    return kept.low, kept.high


def _points(row: dict[str, Any]) -> str:
    if row["stderr"] is None:
        return f"{100 * row['mean']:+.1f}"
    low, high = _ends(row)
    return f"{100 * row['mean']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
