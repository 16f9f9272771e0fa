"""report.html of an evaluation, a diagnosis or a run: one self-contained page, and its pictures as PNGs beside it.

The page loads nothing: it has no scripts and no fonts.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rtd_jax.apps.report import article, pictures
from rtd_jax.apps.report.drawing import Draw, write_figure, write_page
from rtd_jax.apps.report.examples import examples
from rtd_jax.apps.report.pictures import Evaluation
from rtd_jax.apps.report.tables import depth_table, group_table, interval, percent, stage_table, total_lines
from rtd_jax.base.files import read_jsonl

CAPTIONS = {
    "choices": "The right choice has the highest log-likelihood (acc), or the highest per character (acc_norm). "
    "Bars: one standard error. Dotted: guessing.",
    "groups": "The answer right, read flexibly. Bars: one standard error.",
    "chain": "No step wrong and the answer right, in text that the model wrote freely. Bars: one standard error.",
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
    "solved": "Of the stage's validation problems; dashed: the threshold, a share of what the teacher solves.",
}


def write_report(
    out: Path,
    report: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]] = (),
    metrics: Path | None = None,
    show: Sequence[int] = (),
) -> Path:
    """Writes report.html and one PNG for each picture into `out`. Returns the page's path.

    Args:
      report: the content of report.json: "title"; "sections", {name: {model: evaluation}}, or "models" for a single
        section; "notes", sentences that are shown above all numbers; for a diagnosis also "texts", "verdict" and
        "article". Parts may be absent.
      records: of texts; a few are shown, each step with its verdict.
      metrics: metrics.jsonl of a run, for its curves by stage.
      show: numbers of problems whose texts are shown before those few; see `examples.examples`.
    """
    sections: dict[str, dict[str, Evaluation]] = dict(report.get("sections") or {"": report.get("models") or {}})
    figures = [
        write_figure(out, name, title, caption, draw)
        for name, title, caption, draw in _pictures(report, sections, metrics)
        if draw is not None
    ]
    protocol = report.get("protocol")
    return write_page(
        out,
        "report.html.jinja",
        {"percent": percent, "interval": interval},
        depth_table=depth_table,
        total_lines=total_lines,
        group_table=group_table,
        stage_table=stage_table,
        title=report["title"],
        verdict=report.get("verdict"),
        lines=[line for name, models in sections.items() for line in gap_lines(models, name)],
        notes=report.get("notes", []),
        figures=figures,
        sections={name: models for name, models in sections.items() if models},
        texts=report.get("texts", {}),
        stages=report.get("stages", []),
        examples=examples(records, show),
        protocol=json.dumps(protocol, indent=2, ensure_ascii=False) if protocol else "",
        settings=json.dumps(report.get("settings", {}), indent=2, ensure_ascii=False),
    )


def _pictures(
    report: Mapping[str, Any], sections: Mapping[str, Mapping[str, Evaluation]], metrics: Path | None
) -> Iterator[tuple[str, str, str, Draw | None]]:
    """(name, title, caption, how it is drawn) of every picture that a page can have; None where there is no data."""
    for section, models in sections.items():
        suffix, of = (f"_{section}", f" ({section})") if section else ("", "")
        yield f"choices{suffix}", f"Multiple choice{of}", CAPTIONS["choices"], pictures.choices(models)
        for kind in ("subject", "level"):
            yield f"by_{kind}{suffix}", f"Answers by {kind}{of}", CAPTIONS["groups"], pictures.groups(models, kind)
        title = f"Chain accuracy by depth{of}"
        yield f"chain_accuracy{suffix}", title, CAPTIONS["chain"], pictures.chain_accuracy(models)
        title = f"Step accuracy ^ depth{of}"
        yield f"compounding{suffix}", title, CAPTIONS["compounding"], pictures.compounding(models)
    for name, text in report.get("texts", {}).items():
        of = {"reference": "reference chains", "own": "the student's own chains"}[name]
        published = report.get("article", {}).get("cka", {}) if name == "reference" else {}
        grey = " Grey: the article's, of other models." if published else ""
        yield f"cka_{name}", f"CKA by step ({of})", CAPTIONS["cka"] + grey, pictures.cka(text, published)
        yield f"cosines_{name}", f"Cosines by step ({of})", CAPTIONS["cosines"], pictures.cosines(text)
        title = f"Does the transition cosine tell right from wrong? ({of})"
        yield f"roc_{name}", title, CAPTIONS["roc"], pictures.roc(text)
    if metrics is not None and metrics.is_file():
        lines = [line for _, line in read_jsonl(metrics)]
        yield "training_loss", "Training losses by stage", CAPTIONS["loss"], pictures.training_losses(lines)
        title, draw = "Validation coherence by stage", pictures.validation(lines, "coherence", "coherence loss")
        yield "training_coherence", title, CAPTIONS["coherence"], draw
        title, draw = "Chains solved on validation by stage", pictures.validation(lines, "solved", "share solved")
        yield "training_solved", title, CAPTIONS["solved"], draw


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
