"""How a picture gets onto a page: as inline SVG, and as a PNG beside the page.

The colours of the SVG are CSS variables, so that they follow the reader's light or dark scheme.
"""

import hashlib
import io
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rtd_jax.base.console import printable
from rtd_jax.base.files import replacing

Colours = Mapping[str, str]
Draw = Callable[[Axes, Colours], None]

LIGHT = {"ink": "#1f2328", "faint": "#8b949e", "c0": "#2563c9", "c1": "#c2560c", "c2": "#177245", "c3": "#8a3ab9"}
# Colours that occur nowhere else: in the SVG, CSS variables take their place.
STAND_INS = {name: f"#01020{i}" for i, name in enumerate(LIGHT)}
SERIES = ("c0", "c1", "c2", "c3")
MARKERS = "osD^"
LONGEST_LABEL = 40  # characters of a name in a picture, and in the name of its file


def label_text(name: str) -> str:
    """A name as matplotlib draws it letter by letter: it would take "$" for mathematics, and hide "_x" in a legend."""
    name = printable(name)
    name = name if len(name) <= LONGEST_LABEL else f"{name[: LONGEST_LABEL - 1]}…"
    return re.sub(r"^_", " _", name).replace("$", r"\$")


def file_name(name: str) -> str:
    """A name that is one plain file's in its folder, whatever text it is made of; other names, other files."""
    safe = re.sub(r"[^\w-]+", "_", name, flags=re.ASCII)[:LONGEST_LABEL]
    return safe if safe == name else f"{safe}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def series_style(colours: Colours, i: int, label: str, line: str = "-") -> dict[str, Any]:
    """Colour, marker and label of the i-th series. With `line` "" only its points are drawn."""
    return {
        "color": colours[SERIES[i % 4]],
        "marker": MARKERS[i % 4],
        "markersize": 4,
        "linestyle": line,
        "label": label_text(label),
    }


def write_figure(out: Path, name: str, title: str, caption: str, draw: Draw) -> dict[str, str]:
    """Writes <out>/<name>.png. Returns what a template shows: the name, title, caption and SVG of the picture.

    The file lies in `out` whatever the name; see `file_name`.
    """
    name = file_name(name)
    with replacing(out / f"{name}.png") as temporary:
        _figure(draw, LIGHT).savefig(temporary, format="png", dpi=150, facecolor="white")
    return {"name": name, "title": title, "caption": caption, "svg": _svg(draw, name)}


def write_page(out: Path, template: str, filters: Mapping[str, Callable] | None = None, **values: Any) -> Path:
    """Fills a template of this folder and writes it as <out>/report.html. Returns the page's path."""
    return write_html(out / "report.html", template, filters, **values)


def write_html(path: Path, template: str, filters: Mapping[str, Callable] | None = None, **values: Any) -> Path:
    """Fills a template of this folder and writes it as the file `path`, which it returns."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= filters or {}
    text = environment.get_template(template).render(light=LIGHT, **values)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def _figure(draw: Draw, colours: Colours) -> Figure:
    style: Any = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), colours["ink"])
    style |= {"font.size": 10, "font.family": "sans-serif", "axes.edgecolor": colours["faint"], "legend.frameon": False}
    style |= {"axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(5.6, 3.6), layout="constrained")
        axes = figure.subplots()
        axes.grid(axis="y", color=colours["faint"], alpha=0.25, linewidth=0.6)
        draw(axes, colours)
    return figure


def _svg(draw: Draw, name: str) -> str:
    text = io.StringIO()
    # The salt makes the ids differ from those of the other pictures of a page.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        _figure(draw, STAND_INS).savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    for colour, stand_in in STAND_INS.items():
        svg = svg.replace(stand_in, f"var(--{colour})")
    svg = re.sub(r'(?<=font: )[^"]*?(\d+(?:\.\d+)?px)[^";]*', r"\1 system-ui, sans-serif", svg)
    return re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", svg, count=1).replace('height="259.2pt"', "", 1)
