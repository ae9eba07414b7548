"""`results/report.html`: one page with everything in it, made from what `results/` holds.

`report.html` is its layout (Jinja2, which escapes every value), `style.css` its look, `script.js` what sorts,
filters and reads out. It loads nothing: fonts are the system's, images and data lie inside.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from src.files import write_atomically
from src.page import text
from src.page.read import Results, read_results
from src.page.sections import context

HERE = Path(__file__).resolve().parent
FILTERS = (
    *("in_percent", "in_points", "interval", "signed_interval"),
    *("count", "short", "duration", "probability"),
)


def write_page(results: Path) -> Path:
    """Write `results/report.html` and return its path. The same results give the same bytes.

    Raises `SetupError` where `results` holds no arm, or one that cannot be read.
    """
    path = Path(results) / "report.html"
    page = render(read_results(Path(results)))
    write_atomically(path, lambda partial: partial.write_text(page, encoding="utf-8", newline="\n"))
    return path


def render(found: Results) -> str:
    """The page as text."""
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {
        "ensure_ascii": False,
        "allow_nan": False,
        "separators": (",", ":"),
    }
    environment.filters |= {name: getattr(text, name) for name in FILTERS}
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("style.css", "script.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = environment.get_template("report.html")
    return page.render(
        style=Markup(style), script=Markup(script), script_sha256=digest, found=found, **context(found)
    )
