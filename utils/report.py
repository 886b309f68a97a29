"""One HTML page that holds everything it shows: pictures and films are embedded, nothing is fetched, no script runs.

Pages are put together here from text, tables and files; what goes in is the caller's business.
"""

import base64
import html
import math
from pathlib import Path

from utils.errors import UserError
from utils.runs import atomic_path

MEDIA_TYPES = {'.png': 'image/png', '.svg': 'image/svg+xml', '.mp4': 'video/mp4'}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2em auto; padding: 0 1em; color: #222 }
h1, h2 { line-height: 1.2; overflow-wrap: anywhere }
h2 { margin-top: 2em; border-bottom: 1px solid #ccc; padding-bottom: .2em }
table { border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums }
th, td { overflow-wrap: anywhere; padding: .2em .8em; text-align: right; border-bottom: 1px solid #e4e4e4 }
th:first-child, td:first-child { text-align: left }
th { border-bottom: 2px solid #888 }
figure { margin: 1.5em 0 } img, video { max-width: 100%; height: auto } video { width: 400px }
figcaption { color: #555; max-width: 75ch } p { max-width: 75ch }
nav a { margin-right: 1em }
"""


def data_uri(path) -> str:
    """The content of a PNG, SVG or MP4 file as a `data:` address. Raises UserError if it cannot be read."""
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f'cannot read {path}: {error.strerror}') from error
    return f'data:{MEDIA_TYPES[path.suffix]};base64,{base64.b64encode(content).decode()}'


def format_cell(value) -> str:
    """Numbers with four significant digits, unknown values as a dash, everything else as it is."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return '–'
    if isinstance(value, float):
        return f'{value:.4g}' if 1e-3 <= abs(value) < 1e5 or value == 0 else f'{value:.2e}'
    return str(value)


class Report:
    """Sections in the order in which they are added; text is escaped wherever it enters."""

    def __init__(self, title: str):
        self._title = title
        self._sections: list[tuple[str, list[str]]] = [('', [])]

    def section(self, heading: str) -> None:
        """Starts a section: what is added from here on belongs to it."""
        self._sections.append((heading, []))

    def text(self, text: str) -> None:
        """Adds a paragraph."""
        self._add(f'<p>{html.escape(text)}</p>')

    def table(self, header, rows) -> None:
        """Adds a table; cells are numbers, strings or None."""

        def line(tag, cells):
            return f'<tr>{"".join(f"<{tag}>{html.escape(format_cell(cell))}</{tag}>" for cell in cells)}</tr>'

        body = '\n'.join(line('td', row) for row in rows)
        self._add(f'<table><thead>{line("th", header)}</thead><tbody>\n{body}\n</tbody></table>')

    def figure(self, path, caption: str) -> None:
        """Adds a picture from a PNG or SVG file."""
        media = f'<img alt="{html.escape(caption)}" src="{data_uri(path)}">'
        self._add(f'<figure>{media}<figcaption>{html.escape(caption)}</figcaption></figure>')

    def video(self, path, caption: str) -> None:
        """Adds a film from an MP4 file."""
        media = f'<video controls loop muted src="{data_uri(path)}"></video>'
        self._add(f'<figure>{media}<figcaption>{html.escape(caption)}</figcaption></figure>')

    def write(self, path) -> None:
        """Writes the page, wholly or not at all. Raises UserError if that is not possible."""
        (_, introduction), *sections = self._sections
        links = (f'<a href="#s{number}">{html.escape(heading)}</a>' for number, (heading, _) in enumerate(sections))
        parts = [*introduction, f'<nav>{" ".join(links)}</nav>']
        for number, (heading, elements) in enumerate(sections):
            parts += [f'<h2 id="s{number}">{html.escape(heading)}</h2>', *elements]
        title = html.escape(self._title)
        page = (
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            f'<style>{STYLE}</style></head><body>\n<h1>{title}</h1>\n' + '\n'.join(parts) + '\n</body></html>\n'
        )
        with atomic_path(path) as temporary:
            temporary.write_text(page, encoding='utf-8')

    def _add(self, element: str) -> None:
        self._sections[-1][1].append(element)
