"""Self-contained HTML pages and their figures.

The page itself is ``page.html.j2``, the look of its pictures ``figures.mplstyle``. Matplotlib is imported when
something is drawn: settings and tables are there without it.
"""

from __future__ import annotations

import io
import re
from base64 import b64encode
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from torchimplicit.recipes.runtime.files import replacing
from torchimplicit.recipes.runtime.table import CaptionedFigure, Claim, Record, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from torchimplicit.recipes.runtime.run import Run

# -- Pages -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A figure on a page.

    Attributes:
        media: the picture, or what plays a sound, as HTML.
        caption: what it shows.
        title: above it.
        now: what its figures are in this run.
    """

    media: Markup
    caption: str
    title: str = ""
    now: str = ""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A section of a page. Its attributes appear in their order; empty ones are left out.

    Attributes:
        heading: heading of the part.
        table, marks: figures, and a colour for the dot before each row's name.
        keys: colour, name and explanation of what is compared.
        claims, notes: claims and notes of a record.
        pictures: side by side.
        settings: option, value and meaning.
    """

    heading: str = ""
    table: Table | None = None
    marks: Sequence[str] = ()
    keys: Sequence[tuple[str, str, str]] = ()
    claims: Sequence[Claim] = ()
    notes: Sequence[str] = ()
    pictures: Sequence[Shown] = ()
    settings: Sequence[tuple[str, str, str]] = ()


def document(
    title: str,
    lead: Sequence[str],
    sections: Sequence[Section],
    *,
    date: str = "",
    notice: str = "",
    footer: Sequence[str | Markup] = (),
) -> str:
    """A whole page. All text is escaped, except :class:`~markupsafe.Markup`."""
    return _template().render(title=title, lead=lead, sections=sections, date=date, notice=notice, footer=footer)


@cache
def _template() -> Template:
    loader = PackageLoader("torchimplicit.recipes.runtime", "")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined).get_template("page.html.j2")


def record_page(record: Record, pictures: Sequence[Shown]) -> str:
    """The whole record, pictures included, in one file."""
    e = record.environment
    command = Markup("<code>{}</code>").format(record.command)
    where = f"{e.device}, {e.cores} cores, torch {e.torch_version}, torchimplicit {e.torchimplicit_version}"
    return document(
        record.title,
        [record.source, record.protocol],
        [
            *(Section(heading=sheet.title, table=sheet.table) for sheet in record.sheets),
            Section(heading="Claims" if record.claims else "", claims=record.claims),
            Section(heading="Pictures" if pictures else "", pictures=pictures),
            Section(heading="Notes" if record.notes else "", notes=record.notes),
        ],
        date=e.date,
        footer=[command, f"{record.seconds / 60:.0f} minutes on {where}."],
    )


# -- What is shown: figures inside the page, and files inside it or beside it ------------------------------------------


def saved(drawings: Sequence[CaptionedFigure], run: Run, dpi: int = 130) -> list[Shown]:
    """Write the drawings as ``figures/*.png``, and return them for the page."""
    folder = run.path / "figures"
    folder.mkdir(exist_ok=True)
    for one in drawings:
        save_figure(one.figure, folder / f"{one.name}.png", dpi)
    return [Shown(media=svg(one.figure, one.name), caption=one.caption) for one in drawings]


LARGEST_INSIDE = 4 << 20
"""Largest file, in bytes, that is embedded in the page."""

_KINDS = {".png": "image/png", ".gif": "image/gif", ".wav": "audio/wav"}


def media(path: Path, caption: str, folder: Path) -> Shown:
    """A PNG, GIF or WAV file on a page, embedded or, if large, linked beside it."""
    if path.stat().st_size > LARGEST_INSIDE:
        source = path.relative_to(folder).as_posix()
    else:
        source = f"data:{_KINDS[path.suffix]};base64,{b64encode(path.read_bytes()).decode('ascii')}"
    if path.suffix == ".wav":
        shown = Markup('<audio controls preload="none" style="width:100%" src="{}"></audio>').format(source)
    else:
        look = "width:100%;image-rendering:pixelated"
        shown = Markup('<img alt="{}" src="{}" style="{}">').format(caption, source, look)
    return Shown(media=shown, caption=caption)


def svg(figure: Figure, name: str) -> Markup:
    """The bare ``<svg>`` element in a box that scrolls, without prologue or metadata, with ids that begin with
    ``name``."""
    import matplotlib

    plain_ticks(figure)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    text = text.replace("xlink:href", "href")
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = text.replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    width, height = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text).groups()  # type: ignore[union-attr]
    # on a narrow screen a wide figure scrolls: letters of some five pixels are the smallest that can be read
    head = f'<svg viewBox="0 0 {width} {height}" style="min-width:{0.6 * float(width):.0f}px" aria-hidden="true">'
    return Markup('<div class="scroll">{}</div>').format(Markup(re.sub(r"<svg[^>]*>", head, text, count=1)))


# -- One look for every picture: matplotlib's settings, colours, and a figure with axes --------------------------------


COLOURS = ("#0b63a5", "#d1495b", "#2e8b57", "#8a5fbf", "#e69f00", "#56b4e9", "#4b5563", "#8c4a1c")
"""CIE76 distances of any two are at least 33 (9 as seen with deuteranopia, where lines and markers help)."""
LINES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (4, 1.2, 1, 1.2)), (0, (2, 1)))
MARKERS = "os^DvPX*"

STYLE = Path(__file__).with_name("figures.mplstyle")


def styled() -> AbstractContextManager[None]:
    """Apply the recipes' figure style."""
    import matplotlib.style

    return matplotlib.style.context(STYLE)


def canvas(width: float, height: float) -> Figure:
    """An empty figure, ``width`` × ``height`` inches; no global state is touched."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def axes(columns: int = 1, width: float = 6.0, height: float = 3.9) -> tuple[Figure, list[Axes]]:
    """A figure with ``columns`` axes side by side, each ``width`` × ``height`` inches."""
    figure = canvas(columns * width, height)
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def style(index: int) -> dict[str, Any]:
    """Colour, line and marker of the series ``index``: each tells the first few series apart on its own."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": LINES[index % len(LINES)],
        "marker": MARKERS[index % len(MARKERS)],
        "markersize": 4.5,
    }


def legend_beside(panel: Axes) -> None:
    """A legend to the right of a panel."""
    panel.legend(fontsize=7.5, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def plain_ticks(figure: Figure) -> None:
    """Label logarithmic axes of less than two decades by plain numbers: powers of ten run into each other there. Ticks
    that a drawing has chosen stay."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    for axis in (axis for panel in figure.axes for axis in (panel.xaxis, panel.yaxis)):
        low, high = sorted(axis.get_view_interval())
        if isinstance(axis.get_major_locator(), LogLocator) and high < 100 * low:
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 5 * low else MaxNLocator(4))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_locator(NullLocator())


def save_figure(figure: Figure, path: Path, dpi: int) -> None:
    """Write a figure as PNG, atomically."""
    plain_ticks(figure)
    with replacing(path) as draft:
        figure.savefig(draft, dpi=dpi)
