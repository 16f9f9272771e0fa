"""A report of sections with sentences, tables and pictures, as Markdown and as one self-contained report.html."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from rtd_jax.apps.report import page
from rtd_jax.base.files import replacing

TEMPLATE = "sections.html.jinja"
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
    """A picture of lines over x, one for each name; points are (x, y) or (x, y, low, high)."""

    name: str  # of the PNG beside the page
    title: str
    caption: str
    x: str
    y: str
    series: Mapping[str, Sequence[tuple[float, ...]]]


def markdown_of(section: Section) -> list[str]:
    """Lines of Markdown; the first column of a table is aligned to the left, the others to the right."""
    lines = [f"{'#' * section.level} {section.title}", ""]
    for sentence in section.text:
        lines += [sentence, ""]
    if section.rows:
        lines += [_row(section.head), _row(["---", *["--:"] * (len(section.head) - 1)])]
        lines += [*map(_row, section.rows), ""]
    return lines


def write_sections(
    out: Path, title: str, intro: Sequence[str], sections: Sequence[Section], pictures: Sequence[Picture] = ()
) -> Path:
    """Writes report.html and a PNG for each picture into `out`. Returns the page's path."""
    figures = []
    for picture in pictures:
        draw = _draw(picture)
        page._png(draw, out / f"{picture.name}.png")
        svg = page._svg(draw, picture.name)
        figures.append({"name": picture.name, "title": picture.title, "caption": picture.caption, "svg": svg})
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    text = environment.get_template(TEMPLATE).render(
        title=title, intro=intro, sections=sections, figures=figures, light=page.LIGHT
    )
    with replacing(out / "report.html") as temporary:
        temporary.write_text(text, encoding="utf-8")
    return out / "report.html"


def _draw(picture: Picture) -> page.Draw:
    def draw(axes: Axes, colours: page.Colours) -> None:
        for i, (name, points) in enumerate(picture.series.items()):
            x, y, *bounds = zip(*points, strict=True)
            style: dict[str, Any] = {"color": colours[f"c{i % 4}"], "linestyle": LINES[i // 4 % 4], "label": name}
            if bounds:
                low, high = bounds
                axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
            axes.plot(x, y, marker="osD^"[i % 4], markersize=4, **style)
        axes.set(xlabel=picture.x, ylabel=picture.y)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(fontsize=8)

    return draw


def _row(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"
