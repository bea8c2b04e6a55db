"""From the parts of a page to its HTML: templates fill it, everything in them is escaped, and nothing is loaded."""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knorm.page.figures import BOX, kl_figure, nll_figure
from knorm.page.form import Page
from knorm.page.matrix import grid_of
from knorm.page.text import shown
from knorm.page.words import SIGNS, TIMED, legible, loud, told, word_of

if TYPE_CHECKING:
    from jinja2 import Environment

MOST_BYTES = 2_000_000  # of a page
_PLAIN = 1e12  # larger numbers are written with a power of ten
_TEMPLATES = Path(__file__).parent / "templates"


def check_jinja() -> None:
    """Raise ValueError, before the work, where jinja2 is not installed."""
    try:
        import jinja2  # noqa: F401
    except ImportError:
        raise ValueError("a page needs the package jinja2: pip install 'knorm[page]'") from None


def render(page: Page) -> str:
    """Write a page as HTML: the same parts give the same text.

    Args:
        page: its parts.

    Returns:
        A whole document, which loads nothing.

    Raises:
        ValueError: a page larger than MOST_BYTES.

    Example:
        >>> "<title>empty</title>" in render(
        ...     Page(title="empty", sources=[], matrices=[], frontiers=[], timings=[], curves=[], explained=[])
        ... )
        True
    """
    style, script = (_TEMPLATES.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    template = _environment().get_template("page.html.jinja")
    html = template.render(
        page=page,
        grids=[grid_of(matrix) for matrix in page.matrices],
        figures=[(frontier, [kl_figure(frontier), nll_figure(frontier)]) for frontier in page.frontiers],
        texts=[(part, shown(part)) for part in page.explained],
        style=_raw(style),
        script=_raw(script),
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    size = len(html.encode("utf-8", "replace"))
    if size > MOST_BYTES:
        raise ValueError(
            f"the page would have {size:,} bytes, but should have at most {MOST_BYTES:,}: give fewer RESULTS"
        )
    return html


def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    made.filters |= {"number": number, "printed": printed, "visible": visible, "counted": Counter}
    made.globals |= {"word_of": word_of, "loud": loud, "legible": legible, "signs": SIGNS, "box": BOX}
    made.globals |= {"told": told, "timed": TIMED}
    return made


def _raw(text: str) -> Any:
    """Mark our own style and script as safe; nothing that was read is in them."""
    from markupsafe import Markup

    return Markup(text)


def number(value: float | None, form: str = "") -> Any:
    """Write `value` for people in the format `form`, with seven digits of it for programs and for sorting.

    The form is what follows the colon in an f-string, by default all digits; of 10^12 and more, three digits are shown.
    None is a dash. What is returned is HTML, which templates do not escape again. The JSON has all digits.

    Example:
        >>> str(number(0.06884, ".3f")), str(number(None))
        ('<data value="0.06884">0.069</data>', '<span class="none">–</span>')
    """
    from markupsafe import Markup

    if value is None:
        return Markup('<span class="none">–</span>')
    return Markup('<data value="{}">{}</data>').format(
        value if isinstance(value, int) else f"{value:.7g}", printed(value, form)
    )


def printed(value: float | None, form: str = "") -> str:
    """Write `value` in the format `form` as number does, for people alone: where nothing sorts by it.

    Example:
        >>> printed(-0.06884, ".3f"), printed(None)
        ('−0.069', '–')
    """
    if value is None:
        return "–"
    return format(value, form if abs(value) < _PLAIN else ".3g").replace("-", "−")


def visible(text: str) -> str:
    """Write `text` with a sign for each space, line feed and tab, which would not be seen in a table.

    Example:
        >>> visible("a b" + chr(10))
        'a·b⏎'
    """
    return text.replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥")
