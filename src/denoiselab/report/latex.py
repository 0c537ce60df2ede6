"""The table of arms in LaTeX, for a paper."""

from __future__ import annotations

import re
import unicodedata

from denoiselab.report.arms import Arm, Table
from denoiselab.report.claims import Answer
from denoiselab.report.statistics import plain
from denoiselab.report.words import direction

SPECIAL = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "`": r"\textasciigrave{}",
    "±": r"$\pm$",
    "×": r"$\times$",
    "−": "$-$",
    "–": "--",
    "—": "---",
    "…": r"\ldots{}",
    "↓": r"$\downarrow$",
    "↑": r"$\uparrow$",
    "Δ": r"$\Delta$",
}
"""What TeX reads as something else, or cannot print in text."""

HEAD = r"""% \usepackage{booktabs}  % in the preamble
% \usepackage[T1]{fontenc}
\begin{table}
\centering"""


def latex(table: Table, title: str, quoted: str, answers: list[Answer]) -> str:
    """A table with booktabs' rules, the best mean of a column in bold, and the half widths of 95% intervals.

    Args:
        table: of arms.
        title: of the report.
        quoted: the protocol that every number goes with.
        answers: of studies, which stand in the caption.
    """
    measured = [f"{name} {direction(table, name)}".strip() for name in table.metrics]
    heads = [*table.axes, "seeds", *measured, "network calls"]
    columns = "l" * len(table.axes) + "r" * (len(table.metrics) + 2)
    lines = [" & ".join(map(escaped, heads)) + r" \\", r"\midrule"]
    for arm in table.arms:
        cells = [escaped(arm.axes[name]) for name in table.axes]
        cells += [escaped(arm.seeds_text), *(_cell(arm, name) for name in table.metrics), escaped(plain(arm.calls))]
        lines.append(" & ".join(cells) + r" \\")
    said = [words for answer in answers for words in (answer.study.question, *map(str, answer.claims)) if words]
    intervals = "Means with the half widths of their 95% confidence intervals over seeds."
    caption = escaped(" ".join([f"{title}.", quoted, intervals, *said]))
    rows = "\n".join([rf"\begin{{tabular}}{{{columns}}}", r"\toprule", *lines, r"\bottomrule", r"\end{tabular}"])
    return f"{HEAD}\n\\caption{{{caption}}}\n{rows}\n\\end{{table}}\n"


def _cell(arm: Arm, metric: str) -> str:
    cell = arm.cells.get(metric)
    if cell is None:
        return "--"
    text = re.sub(r"(?<![\w.])-(?=\d)", "$-$", escaped(cell.text))
    return rf"\textbf{{{text}}}" if cell.best else text


def escaped(text: str) -> str:
    r"""Text that TeX prints as it is, on one line, in any document: letters lose accents that plain ASCII lacks, and
    what is left of other alphabets is a question mark.

    >>> escaped("50% of a_b")
    '50\\% of a\\_b'
    """
    decomposed = "".join(c if c in SPECIAL else unicodedata.normalize("NFKD", c) for c in " ".join(text.split()))
    kept = [c for c in decomposed if not unicodedata.combining(c)]
    return "".join(SPECIAL.get(c, c if " " <= c <= "~" else "?") for c in kept)
