"""One page from a run, or from a folder of runs."""

from __future__ import annotations

from pathlib import Path

from denoiselab.errors import UserError
from denoiselab.files import write_text
from denoiselab.report.arms import tabulate
from denoiselab.report.page import render
from denoiselab.report.runs import DEPTH, find, read
from denoiselab.report.tables import frame, markdown
from denoiselab.report.words import notes, quoted, summary

__all__ = ["write_report"]


def write_report(folder: Path, output: Path | None = None) -> Path:
    """Write a self-contained HTML page about the runs in a folder, and its table beside it as .csv and .md.

    Args:
        folder: a run directory, or a folder that holds run directories at most three levels down.
        output: the page; FOLDER/report.html if not given.

    Returns:
        The path of the page.

    Raises:
        UserError: there is no run in the folder, or the page cannot be written.
    """
    folder = Path(folder)
    output = folder / "report.html" if output is None else Path(output)
    if output.suffix in (".csv", ".md"):
        raise UserError(f"{output}: need a name like report.html; {output.suffix} is the name of a table beside it")
    try:
        found = find(folder) if folder.is_dir() else []
        if not found:
            raise UserError(
                f"{folder}: no run here; need a run directory or a folder with runs (identity.json) in it, "
                f"at most {DEPTH} levels down"
            )
        runs = [read(path, folder) for path in found]
        table, title = tabulate(runs), folder.resolve().name
        frame_text = frame(table).to_csv(index=False)
        lines = markdown(table, title, summary(runs, table), quoted(table.arms), notes(table))
        for path, text in {
            output.with_suffix(".csv"): frame_text,
            output.with_suffix(".md"): lines,
            output: render(runs, table, title),
        }.items():
            write_text(path, _encodable(text))
    except OSError as error:
        raise UserError(f"{error.filename2 or error.filename or output}: {error.strerror or error}") from None
    return output


def _encodable(text: str) -> str:
    """Text without what UTF-8 cannot hold: JSON strings and file names can have half a surrogate pair."""
    return text.encode(errors="replace").decode()
