"""A report of sections with sentences, tables and pictures, as Markdown and as one self-contained report.html."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from rtd_jax.apps.report.drawing import Colours, Draw, label_text, series_style, write_figure, write_page

LINES = ("-", "--", ":", "-.")


@dataclass
class Section:
    """A heading, sentences, and a table."""

    title: str
    level: int = 3  # of the heading
    text: Sequence[str] = ()
    head: Sequence[str] = ()
    rows: Sequence[Sequence[Any]] = ()


@dataclass
class Picture:
    """Lines over x, one for each name. Points are (x, y) or (x, y, low, high)."""

    name: str  # of the PNG beside the page
    title: str
    caption: str
    x: str
    y: str
    series: Mapping[str, Sequence[tuple[float, ...]]]


@dataclass
class Intervals:
    """A point with its interval for each name, one under the other, and a line at 0. Values are (x, low, high)."""

    name: str  # of the PNG beside the page
    title: str
    caption: str
    x: str
    rows: Mapping[str, tuple[float, float, float]]


def markdown_of(section: Section) -> list[str]:
    """Lines of Markdown; the first column of a table is aligned to the left, the others to the right."""
    lines = [f"{'#' * section.level} {section.title}", ""]
    for sentence in section.text:
        lines += [sentence, ""]
    if section.rows:
        for row in (section.head, ["---", *["--:"] * (len(section.head) - 1)], *section.rows):
            cells = (str(cell).replace("|", "\\|") for cell in row)
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return lines


def write_sections(
    out: Path, title: str, intro: Sequence[str], sections: Sequence[Section], pictures: Sequence[Picture | Intervals]
) -> Path:
    """Writes report.html and a PNG for each picture into `out`. Returns the page's path."""
    figures = [
        write_figure(out, x.name, x.title, x.caption, _intervals(x) if isinstance(x, Intervals) else _lines(x))
        for x in pictures
    ]
    return write_page(out, "sections.html.jinja", title=title, intro=intro, sections=sections, figures=figures)


def _lines(picture: Picture) -> Draw:
    def draw(axes: Axes, colours: Colours) -> None:
        for i, (name, points) in enumerate(picture.series.items()):
            x, y, *bounds = zip(*points, strict=True)
            style = series_style(colours, i, name, LINES[i // 4 % 4])
            if bounds:
                axes.fill_between(x, bounds[0], bounds[1], color=style["color"], alpha=0.15, linewidth=0)
            axes.plot(x, y, **style)
        axes.set(xlabel=picture.x, ylabel=picture.y)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(fontsize=8)

    return draw


def _intervals(picture: Intervals) -> Draw:
    def draw(axes: Axes, colours: Colours) -> None:
        places = range(len(picture.rows))
        for place, (x, low, high) in zip(places, picture.rows.values(), strict=True):
            colour = colours["c0"] if low > 0 else colours["c1"] if high < 0 else colours["faint"]
            axes.plot([low, high], [place, place], color=colour, linewidth=2, solid_capstyle="round")
            axes.plot([x], [place], color=colour, marker="o", markersize=5)
        axes.axvline(0, color=colours["ink"], linewidth=0.8)
        axes.set_yticks(places, [label_text(name) for name in picture.rows], fontsize=min(9, 160 / len(picture.rows)))
        axes.invert_yaxis()  # the first name is at the top
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", color=colours["faint"], alpha=0.25, linewidth=0.6)
        axes.set(xlabel=picture.x)

    return draw
