"""How commands speak: tables and lines for people, JSON for programs, progress and warnings on standard error.

On a terminal, tables are drawn by rich; elsewhere they are plain aligned text, uncut, the same every time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import click
import msgspec

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")

_COLOURS = {
    **dict.fromkeys(("COMPLETED", "covered", "ok", "at work", "create"), "green"),
    **dict.fromkeys(("FAILED", "blocked", "fail", "down", "missing"), "red"),
    **dict.fromkeys(("RETRY_WAIT", "CANCELLING", "waiting", "held", "warn", "alive", "update"), "yellow"),
    **dict.fromkeys(("PENDING", "STAGING_DATA", "SUBMITTED", "RUNNING", "COLLECTING_RESULTS", "active"), "cyan"),
}


def document(value: object) -> None:
    """Print one JSON document."""
    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2))


def line(value: object) -> None:
    """Print one JSON document of a stream, in a line of its own, at once."""
    click.echo(msgspec.json.encode(value))
    sys.stdout.flush()


def done(as_json: bool, facts: object, text: str) -> None:
    """Say what a command did: as a JSON document, or in words."""
    if as_json:
        document(facts)
    else:
        click.echo(text)


def warn(message: str) -> None:
    """Tell on standard error what stops nothing."""
    click.secho(f"warning: {message}", fg="yellow", err=True)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, empty: str) -> None:
    """Print rows under their columns; `empty` if there are none.

    Numbers stand to the right. Nothing is cut: on a terminal sentences wrap, elsewhere nothing does.
    """
    rows = list(rows)
    if not rows:
        click.echo(empty)
        return
    right = [all(isinstance(v, int | float | None) for v in column) for column in zip(*rows, strict=True)]
    cells = [["" if v is None else str(v) for v in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    if sys.stdout.isatty():
        _draw(columns, cells, right, widths)
        return
    for row in (columns, *cells):
        padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True))
        click.echo("  ".join(padded).rstrip())


_SENTENCE = 30
"""Characters from which on a text with spaces may wrap."""


def _draw(columns: Sequence[str], cells: Sequence[Sequence[str]], right: Sequence[bool], widths: Sequence[int]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    least = 0
    for n, (column, r, width) in enumerate(zip(columns, right, widths, strict=True)):
        wraps = any(len(row[n]) > _SENTENCE and " " in row[n] for row in cells)
        drawn.add_column(column, justify="right" if r else "left", overflow="fold", no_wrap=not wraps)
        least += 2 + (_SENTENCE if wraps else width)
    for row in cells:
        drawn.add_row(*(Text(cell, style=_COLOURS.get(cell, "")) for cell in row))
    console = Console()
    console.width = max(console.width, least)  # where the terminal is narrower, it wraps whole lines itself
    console.print(drawn)


def facts(pairs: Iterable[tuple[str, object]]) -> None:
    """Print what is known of one thing, one name and value per line; what is empty is left out."""
    shown = [(name, str(value)) for name, value in pairs if value not in (None, "", [], {})]
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        click.echo(f"{name.ljust(width)}  {value}")


def when(time: datetime | None) -> str:
    """A time in UTC, ISO 8601, to the second."""
    return time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ") if time else ""


def span(seconds: float | None) -> str:
    """A duration for people."""
    if seconds is None:
        return ""
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def size(count: float) -> str:
    """A number of bytes for people, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def plural(count: int, one: str, many: str = "") -> str:
    """``1 run``, ``2 runs``."""
    return f"{count} {one if count == 1 else many or one + 's'}"


@contextmanager
def progress(title: str, total: float | None = None, *, in_bytes: bool = False) -> Iterator[Callable[[float], None]]:
    """A progress bar while the block runs, if somebody looks; the value is called with each advance."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    counted: list[Any] = [] if total is None else [DownloadColumn() if in_bytes else MofNCompleteColumn()]
    columns = [TextColumn("{task.description}"), BarColumn(), *counted, TimeElapsedColumn()]
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda n: bar.advance(task, n)
