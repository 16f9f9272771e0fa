"""The checks and the chains in a terminal, and as a page."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from rtd_jax.apps.check.chains import Segment, ShownChain
from rtd_jax.apps.report.drawing import write_html
from rtd_jax.base.console import printable, wide_console
from rtd_jax.train.preflight import Check

_STYLES = {"ok": "green", "warn": "bold yellow", "fail": "bold red"}
_BAR = "│"  # between tokens, of which many have "|" in them
_MARGIN = 12  # columns for the name of a segment and its labels
_LEGEND = (
    "Tokens between bars, each above its id. The student learns to predict the tokens of rows with labels; "
    "a boundary is at the last token of a row that names one."
)


def summary(checks: Sequence[Check], unreached: str) -> str:
    """How many checks fail and warn, in words, and what could not be checked because of them."""
    fails, warns = (sum(check.status == status for check in checks) for status in ("fail", "warn"))
    counts = f"{len(checks)} checks: {fails} fail, {warns} warn"
    return f"{counts}; not checked because of what fails: {unreached}" if unreached else counts


def print_checks(checks: Sequence[Check], chains: Sequence[ShownChain], unreached: str) -> None:
    """Prints the checks, a line each, and the chains. Colours only in a terminal, and nothing is said by them alone."""
    console = wide_console()
    width = max(len(check.name) for check in checks)
    for i, chain in enumerate(chains, start=1):
        console.print(Text(f"chain {i} of {len(chains)}, {printable(chain.title)}", "bold"), soft_wrap=True)
        for segment in chain.segments:
            _print_segment(console, segment)
        console.print()
    if chains:
        console.print(Text(_LEGEND, "dim"), soft_wrap=True)
        console.print()
    for check in checks:
        status = (f"{check.status:<4}", _STYLES[check.status])
        line = Text.assemble(status, f"  {check.name:<{width}}  ", printable(check.line))
        console.print(line, soft_wrap=True)
    console.print(Text(summary(checks, unreached), "bold"), soft_wrap=True)


def _print_segment(console: Console, segment: Segment) -> None:
    margins = [segment.name, segment.labels]
    for texts, ids in _rows(segment, console.width - _MARGIN - 3):
        for cells in (texts, ids):
            margin = margins.pop(0) if margins else ""
            if margin or cells:  # a mark that found no room beside its token has no id below it
                console.print(Text.assemble(f"  {margin:<{_MARGIN}}", cells), soft_wrap=True)


def _rows(segment: Segment, room: int) -> Iterator[tuple[Text, Text]]:
    """Rows of tokens and of their ids, each token above its id, as many as have room in a row."""
    texts, ids = Text(), Text()
    for number, token in enumerate(segment.tokens):
        word, code = printable(token.text), str(token.id)
        width = max(cell_len(word), len(code))
        if texts.cell_len and texts.cell_len + width + 1 > room:
            yield texts, ids
            texts, ids = Text(), Text()
        style = ("bold green" if number % 2 else "green") if token.has_label else "dim"
        texts.append(word + " " * (width - cell_len(word)), style).append(_BAR, "dim")
        ids.append(f"{code:<{width}}{_BAR}", "dim")
    if segment.boundary is not None:
        mark = f" <- boundary {segment.boundary}"
        if texts.cell_len + len(mark) > room:
            yield texts, ids
            texts, ids = Text(), Text()
        texts.append(mark, "bold magenta")
    yield texts, ids


def write_check_page(
    path: Path, title: str, checks: Sequence[Check], chains: Sequence[ShownChain], unreached: str
) -> Path:
    """Writes the same as one self-contained page, and returns its path."""
    return write_html(
        path,
        "check.html.jinja",
        title=title,
        figures=(),
        summary=summary(checks, unreached),
        checks=checks,
        chains=chains,
    )
