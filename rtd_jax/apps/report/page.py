"""report.html: one self-contained page, and its pictures as PNGs beside it.

Pictures are inline SVG whose colours are CSS variables, so that they follow the reader's light or dark scheme. The page
loads nothing: it has no scripts and no fonts.
"""

import io
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib

matplotlib.use("Agg")  # no display is needed
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rtd_jax.apps.report import article
from rtd_jax.apps.report.points import (
    SERIES,
    Colours,
    Draw,
    Evaluation,
    choices,
    groups,
    interval,
    line_style,
    percent,
    plus_minus,
)
from rtd_jax.base.files import replacing

TEMPLATE = "report.html.jinja"
# Placeholder colours that occur nowhere else; the page has CSS variables in their place, a PNG the light colours.
LIGHT = {"ink": "#1f2328", "faint": "#8b949e", "c0": "#2563c9", "c1": "#c2560c", "c2": "#177245", "c3": "#8a3ab9"}
STAND_INS = {name: f"#01020{i}" for i, name in enumerate(LIGHT)}
EXAMPLES = 6  # chains shown in full


def write_report(
    out: Path, report: Mapping[str, Any], examples: Sequence[Mapping[str, Any]] = (), metrics: Path | None = None
) -> Path:
    """Writes report.html and one PNG a picture into `out`. Returns the page's path.

    Args:
      report: the content of report.json: "title"; "sections", {name: {model: EvaluationReport as a dict}}, or "models"
        for a single section; for a diagnosis also "texts", "verdict" and "article". Parts may be absent.
      examples: generation records; a few are shown, with the first wrong step marked.
      metrics: metrics.jsonl of a run, for its curves by stage.
    """
    sections: dict[str, dict[str, Evaluation]] = dict(report.get("sections") or {"": report.get("models") or {}})
    figures: list[dict[str, str]] = []

    def add(name: str, title: str, caption: str, draw: Draw | None) -> None:
        if draw is not None:
            figures.append({"name": name, "title": title, "caption": caption, "svg": _svg(draw, name)})
            _png(draw, out / f"{name}.png")

    for section, models in sections.items():
        suffix, of = (f"_{section}", f" ({section})") if section else ("", "")
        add(f"choices{suffix}", f"Multiple choice{of}", CAPTIONS["choices"], choices(models))
        for kind in ("subject", "level"):
            add(f"by_{kind}{suffix}", f"Answers by {kind}{of}", CAPTIONS["groups"], groups(models, kind))
        add(f"chain_accuracy{suffix}", f"Chain accuracy by depth{of}", CAPTIONS["chain"], _chain_accuracy(models))
        add(f"compounding{suffix}", f"Step accuracy ^ depth{of}", CAPTIONS["compounding"], _compounding(models))
    for name, text in report.get("texts", {}).items():
        of = {"reference": "reference chains", "own": "the student's own chains"}[name]
        published = report.get("article", {}) if name == "reference" else {}
        grey = " Grey: the article's, of other models." if published.get("cka") else ""
        add(f"cka_{name}", f"CKA by step ({of})", CAPTIONS["cka"] + grey, _cka(text, published.get("cka", {})))
        add(f"cosines_{name}", f"Cosines by step ({of})", CAPTIONS["cosines"], _cosines(text))
        add(f"roc_{name}", f"Does the transition cosine tell right from wrong? ({of})", CAPTIONS["roc"], _roc(text))
    if metrics is not None and metrics.is_file():
        lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
        add("training_loss", "Training losses by stage", CAPTIONS["loss"], _losses(lines))
        add("training_coherence", "Validation coherence by stage", CAPTIONS["coherence"], _coherence(lines))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"percent": percent, "plus_minus": plus_minus, "interval": interval}
    page = environment.get_template(TEMPLATE).render(
        title=report["title"],
        verdict=report.get("verdict"),
        lines=[line for name, models in sections.items() for line in gap_lines(models, name)],
        figures=figures,
        sections={name: models for name, models in sections.items() if models},
        texts=report.get("texts", {}),
        stages=report.get("stages", []),
        examples=_examples(examples),
        protocol=json.dumps(report["protocol"], indent=2, ensure_ascii=False) if report.get("protocol") else "",
        settings=json.dumps(report.get("settings", {}), indent=2, ensure_ascii=False),
        light=LIGHT,
    )
    with replacing(out / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    return out / "report.html"


CAPTIONS = {
    "choices": "The right choice has the highest log-likelihood (acc), or the highest per character (acc_norm). "
    "Bars: one standard error. Dotted: guessing.",
    "groups": "The answer right, read flexibly. Bars: one standard error.",
    "chain": "Every intermediate result and the answer right, in text that the model wrote freely. "
    "Bars: one standard error.",
    "compounding": "Solid: measured chain accuracy. Dashed: what its teacher-forced step accuracy would give if "
    "steps failed independently. Measured below dashed: one error leads to the next.",
    "cka": "How alike the two models arrange the problems at the end of each step. 95% intervals over chains. Biased "
    "CKA rises by itself where chains are few; use the debiased one.",
    "cosines": "Student against teacher through f (states) and g (transitions into the step). 95% intervals over "
    "chains.",
    "roc": "The cosine of a transition as a score for the next step, the same step, or (its mean) the whole chain "
    f"being right. AUROC in brackets; 0.5 is chance, and the article reports {article.AUROC} for the steps that "
    "follow. Depth is not held fixed here; the table has the values within depth.",
    "loss": "Means between log lines. Vertical lines: a stage ends.",
    "coherence": "Coherence loss on the stage's validation chains; dashed: the teacher-calibrated threshold.",
}


def gap_lines(models: Mapping[str, Evaluation], section: str = "") -> list[str]:
    """For each model the article's comparison in one line: accuracy of steps and of chains at four steps and more."""
    lines = []
    for name, evaluation in models.items():
        forced = bool(evaluation.get("gap"))
        found = evaluation.get("gap") or evaluation.get("gap_free")
        if found:
            lines.append(
                f"{section + ': ' if section else ''}{name}: {percent(found['steps'])}% of steps right "
                f"({'teacher-forced' if forced else 'free-running'}), but {percent(found['chains'])}% of whole chains, "
                f"at four steps and more: a gap of {percent(found['difference'])} points (the article's KD student: "
                f"{article.DEEP_STEP_ACCURACY}, {article.DEEP_CHAIN_ACCURACY}, {article.GAP})"
            )
    return lines


def _chain_accuracy(models: Mapping[str, Evaluation]) -> Draw | None:
    depths = _depths(models)
    if not depths:
        return None

    def draw(axes: Axes, colours: Colours) -> None:
        for i, (name, evaluation) in enumerate(models.items()):
            table = evaluation["chain_accuracy"]
            x = [depths.index(key) + 0.08 * (i - (len(models) - 1) / 2) for key in depths if key in table]
            y = [100 * table[key]["mean"] for key in depths if key in table]
            errors = [100 * (table[key]["stderr"] or 0.0) for key in depths if key in table]
            axes.errorbar(x, y, errors, label=name, capsize=3, **line_style(colours, i))
        _by_depth(axes, depths, "chains right, %")

    return draw


def _compounding(models: Mapping[str, Evaluation]) -> Draw | None:
    depths = _depths(models)
    models = {
        name: e
        for name, e in models.items()
        if e.get("independent_chain_accuracy") or e.get("independent_chain_accuracy_free")
    }
    if not depths or not models:
        return None

    def draw(axes: Axes, colours: Colours) -> None:
        for i, (name, evaluation) in enumerate(models.items()):
            kind = "independent_chain_accuracy" if evaluation.get("independent_chain_accuracy") else ""
            expected = evaluation[kind or "independent_chain_accuracy_free"]
            measured = evaluation["chain_accuracy"]
            for table, style, label in ((measured, "-", name), (expected, "--", f"{name}: step ^ depth")):
                keys = [key for key in depths if key in table]
                y = [100 * table[key]["mean"] for key in keys]
                errors = [100 * (table[key]["stderr"] or 0.0) for key in keys]
                x = [depths.index(key) for key in keys]
                axes.errorbar(x, y, errors, label=label, capsize=3, **line_style(colours, i, style))
        _by_depth(axes, depths, "chains right, %")

    return draw


def _cka(text: Mapping[str, Any], published: Mapping[str, float]) -> Draw | None:
    steps = [step for step in text["steps"] if step["step"] >= 1 and step["cka"] and step["cka"]["value"] is not None]
    if not steps:
        return None

    def draw(axes: Axes, colours: Colours) -> None:
        if published:
            x, y = [int(step) for step in published], list(published.values())
            axes.plot(x, y, "--", color=colours["faint"], label="article")
            for i in (0, -1):
                place: Any = {"xytext": (0, -4), "textcoords": "offset points", "ha": "center", "va": "top"}
                axes.annotate(f"{y[i]:.2f}", (x[i], y[i]), fontsize=9, **place)
        same = f"debiased, the same {text['same_chains']['chains']} chains"
        kinds = (("cka", "biased"), ("cka_debiased", "debiased"), ("cka_same_chains", same))
        for i, (key, label) in enumerate(kinds):
            _intervals(axes, [(s["step"], s[key]) for s in steps], colours, i, label)
        _by_step(axes, "linear CKA", upper=1.05)

    return draw


def _cosines(text: Mapping[str, Any]) -> Draw | None:
    def draw(axes: Axes, colours: Colours) -> None:
        for i, (key, label) in enumerate((("boundary_cosine", "states, f"), ("transition_cosine", "transitions, g"))):
            _intervals(axes, [(s["step"], s[key]) for s in text["steps"] if s["step"] >= 1], colours, i, label)
        _by_step(axes, "cosine, student to teacher", upper=1.05)

    return draw


def _roc(text: Mapping[str, Any]) -> Draw | None:
    names = {"next_step": "next step", "same_step": "same step", "chain": "whole chain"}
    curves = {key: points for key, points in text["roc"].items() if points}
    if not curves:
        return None

    def draw(axes: Axes, colours: Colours) -> None:
        axes.plot([0, 1], [0, 1], "--", color=colours["faint"], linewidth=1)
        for i, (key, points) in enumerate(curves.items()):
            area = text["relation"][key]["auroc"]["value"]
            axes.plot(*zip(*points, strict=True), color=colours[SERIES[i]], label=f"{names[key]} ({area:.2f})")
        axes.set(xlabel="wrong ones taken for right", ylabel="right ones found", xlim=(0, 1), ylim=(0, 1.02))
        axes.legend(loc="lower right")

    return draw


def _losses(lines: Sequence[Mapping[str, Any]]) -> Draw | None:
    wanted = {"distill/kl_div_T1": "KL at T = 1", "distill/alignment": "alignment", "distill/coherence": "coherence"}
    wanted = {key: label for key, label in wanted.items() if any(line.get(key) for line in lines)}
    if not wanted:
        return None

    def draw(axes: Axes, colours: Colours) -> None:
        for i, (key, label) in enumerate(wanted.items()):
            points = [(line["update"], line[key]) for line in lines if line.get(key)]
            axes.plot(*zip(*points, strict=True), color=colours[SERIES[i]], label=label)
        _by_update(axes, lines, colours, "loss")

    return draw


def _coherence(lines: Sequence[Mapping[str, Any]]) -> Draw | None:
    points = [line for line in lines if line.get("validation/coherence")]
    if not points:
        return None

    def draw(axes: Axes, colours: Colours) -> None:
        for i, stage in enumerate(dict.fromkeys(line["stage"] for line in points)):
            of_stage = [line for line in points if line["stage"] == stage]
            x = [line["update"] for line in of_stage]
            style = line_style(colours, i)
            axes.plot(x, [line["validation/coherence"] for line in of_stage], label=f"stage {stage}", **style)
            style |= {"linestyle": "--", "marker": "", "alpha": 0.7}
            axes.plot(x, [line["validation/threshold"] for line in of_stage], **style)
        _by_update(axes, lines, colours, "coherence loss")

    return draw


def _depths(models: Mapping[str, Evaluation]) -> list[str]:
    keys = {key for evaluation in models.values() for key in evaluation.get("chain_accuracy", {}) if key != "all"}
    return sorted(keys, key=lambda key: int(key.rstrip("+")))


def _intervals(axes: Axes, points: Sequence[tuple[int, Any]], colours: Colours, i: int, label: str) -> None:
    known = [(x, found) for x, found in points if found is not None and found["value"] is not None]
    if not known:
        return
    y = [found["value"] for _, found in known]
    below, above = (
        [0.0 if found[end] is None else abs(found["value"] - found[end]) for _, found in known]
        for end in ("low", "high")
    )
    x = [x + 0.06 * (i - 1) for x, _ in known]
    axes.errorbar(x, y, [below, above], label=label, capsize=3, **line_style(colours, i))


def _by_depth(axes: Axes, depths: Sequence[str], label: str) -> None:
    axes.set(xlabel="reasoning steps of the problem", ylabel=label, ylim=(-3, 103), xticks=range(len(depths)))
    axes.set_xticklabels(depths)
    axes.legend()


def _by_step(axes: Axes, label: str, upper: float) -> None:
    lowest = float(axes.dataLim.intervaly[0])
    lowest = min(0.0, max(lowest, -0.25)) if math.isfinite(lowest) else 0.0  # wide intervals may leave the picture
    axes.set(xlabel="step", ylabel=label, ylim=(lowest - 0.02, upper))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()


def _by_update(axes: Axes, lines: Sequence[Mapping[str, Any]], colours: Colours, label: str) -> None:
    axes.set(xlabel="update", ylabel=label, yscale="log")
    for before, line in itertools.pairwise(lines):
        if "stage" in line and line["stage"] != before.get("stage"):
            axes.axvline(before["update"], color=colours["faint"], linewidth=0.8, linestyle=":")
    axes.legend()


def _figure(draw: Draw, colours: Colours) -> Figure:
    ink = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), colours["ink"])
    style: Any = {
        "font.size": 10,
        "axes.edgecolor": colours["faint"],
        "svg.fonttype": "none",
        "legend.frameon": False,
        **ink,
    }
    style |= {"axes.spines.top": False, "axes.spines.right": False, "font.family": "sans-serif"}
    with plt.rc_context(style):
        figure, axes = plt.subplots(figsize=(5.6, 3.6), layout="constrained")
        axes.grid(axis="y", color=colours["faint"], alpha=0.25, linewidth=0.6)
        draw(axes, colours)
        plt.close(figure)
    return figure


def _svg(draw: Draw, name: str) -> str:
    text = io.StringIO()
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):  # ids differ from those of other pictures
        _figure(draw, STAND_INS).savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    for colour, stand_in in STAND_INS.items():
        svg = svg.replace(stand_in, f"var(--{colour})")
    svg = re.sub(r'(?<=font: )[^"]*?(\d+(?:\.\d+)?px)[^";]*', r"\1 system-ui, sans-serif", svg)
    return re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", svg, count=1).replace('height="259.2pt"', "", 1)


def _png(draw: Draw, path: Path) -> None:
    with replacing(path) as temporary:
        _figure(draw, LIGHT).savefig(temporary, format="png", dpi=150, facecolor="white")


def _examples(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Wrong chains of various depths, then right ones; each line is before, at or after the first wrong step."""
    written = [record for record in records if "first_error" in record]  # choices have no text
    wrong = sorted((r for r in written if r["first_error"] >= 0), key=lambda r: r["depth"])
    right = sorted((r for r in written if r["first_error"] < 0), key=lambda r: -r["depth"])
    spaced = [wrong[i * (len(wrong) - 1) // max(EXAMPLES - 3, 1)] for i in range(EXAMPLES - 2)] if wrong else []
    chosen = [*{id(r): r for r in spaced}.values(), *right][:EXAMPLES]
    found = []
    for record in chosen:
        lines = [*record["completions"], record["final"] or "(no answer line)"]
        first = record["first_error"]
        standing = [
            "before" if first < 0 or i < first else "wrong" if i == first else "after" for i in range(len(lines))
        ]
        found.append({**record, "lines": list(zip(lines, standing, strict=True))})
    return found
