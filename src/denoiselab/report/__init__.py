"""One page from a run, or from a folder of runs."""

from __future__ import annotations

from pathlib import Path

from denoiselab.errors import UserError
from denoiselab.files import write_text
from denoiselab.report.arms import tabulate
from denoiselab.report.claims import judge
from denoiselab.report.latex import latex
from denoiselab.report.page import render
from denoiselab.report.reference import compare
from denoiselab.report.runs import DEPTH, find, read
from denoiselab.report.studies import studies
from denoiselab.report.tables import frame, markdown
from denoiselab.report.words import notes, quoted, summary

__all__ = ["write_report"]


def write_report(folder: Path, output: Path | None = None) -> Path:
    """Write a self-contained HTML page about the runs in a folder, and its table beside it as .csv, .md and .tex.

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
    if output.suffix in (".csv", ".md", ".tex"):
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
        found_studies = studies(runs)
        compare(table, found_studies)
        answers = [judge(study) for study in found_studies]
        words = (summary(runs, table), quoted(table.arms))
        for path, text in {
            output.with_suffix(".csv"): frame(table).to_csv(index=False),
            output.with_suffix(".md"): markdown(table, title, *words, notes(table), answers),
            output.with_suffix(".tex"): latex(table, title, words[1], answers),
            output: render(runs, table, title, answers),
        }.items():
            write_text(path, _encodable(text))
    except OSError as error:
        raise UserError(f"{error.filename2 or error.filename or output}: {error.strerror or error}") from None
    return output


def _encodable(text: str) -> str:
    """Text without what UTF-8 cannot hold: JSON strings and file names can have half a surrogate pair."""
    return text.encode(errors="replace").decode()
