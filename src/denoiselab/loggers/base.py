"""What dashboards share: rows, curves over t, pictures, tables, and the history of a run that goes on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from PIL import Image

from denoiselab.errors import foreseen
from denoiselab.loggers.curves import curves, picture
from denoiselab.loggers.evaluations import Evaluations, evaluations
from denoiselab.loggers.history import history
from denoiselab.loggers.json_lines import JsonLines

SPREADS = ("_se", "/count")
"""Ends of the names of lists that dashboards show in tables alone."""


def flat(values: dict[str, Any]) -> dict[str, Any]:
    """Numbers by name; a list becomes name/00, name/01, ..."""
    found = {}
    for name, value in values.items():
        if not isinstance(value, list):
            found[name] = value
        elif not name.endswith(SPREADS):
            found |= {f"{name}/{index:02d}": number for index, number in enumerate(value)}
    return {name: number for name, number in found.items() if number is not None}


class Dashboard(Logger):
    """A logger that also shows pictures and tables; a subclass writes ``log_metrics``, ``show``, ``table``,
    ``evaluated`` and ``close``."""

    waiting: bool
    """Whether it has nothing of this run yet, or somebody waits for it: a run that is done is then shown all the
    same."""

    def row(self, values: dict[str, Any], step: int, drawn: bool = True) -> None:
        """Log numbers and lists of numbers; errors by t also as a table and, unless told otherwise, as a picture."""
        self.log_metrics(flat(values), step)
        if table := curves(values):
            self.table("buckets", table, step)
            if drawn:
                self.show("buckets", picture(table, f"held-out and training error, step {step}"), step)

    def show(self, name: str, picture: Image.Image, step: int) -> None:
        """Log a picture as pictures/NAME."""
        raise NotImplementedError

    def table(self, name: str, table: dict[str, list[Any]], step: int) -> None:
        """Log a table, columns by name, as tables/NAME; nothing where a dashboard shows none."""

    def evaluated(self, found: Evaluations) -> None:
        """Log what was measured after training."""
        raise NotImplementedError

    def close(self, status: int) -> None:
        """End the run's record with the process's exit status."""
        raise NotImplementedError

    def replay(self, folder: Path, after: int, upto: int) -> None:
        """Log what a run's folder holds of steps after < step <= upto. Errors by t are drawn for the newest step."""
        items = history(folder, after, upto)
        drawn = max((item.step for item in items if item.kind == "row" and curves(item.read())), default=-1)
        for item in items:
            if item.kind == "row":
                self.row(item.read(), item.step, drawn=item.step == drawn)
            elif item.kind == "picture":
                self.show(item.name, item.read(), item.step)
            else:
                self.table(item.name, item.read(), item.step)


@contextmanager
def finishing(loggers: list[Logger]) -> Iterator[None]:
    """Close dashboards at the end with the status that the process will exit with: 0; an error's own, which is 128 + n
    for signal n; or 1.

    Args:
        loggers: of a run; those that are in the list at the end, which is then empty.
    """
    status = 1
    try:
        yield
        status = 0
    except BaseException as error:
        status = foreseen(error) or 1
        raise
    finally:
        for logger in loggers:
            if isinstance(logger, Dashboard):
                logger.close(status)
        loggers.clear()


def evaluated(loggers: Sequence[Logger], made: Path, new: bool) -> None:
    """Log what was measured of a run.

    Args:
        loggers: of the run.
        made: RUN/evaluations/HASH, of the newest evaluation.
        new: whether it was made now; one of before is for those dashboards that do not have the run yet.
    """
    found = evaluations(made)
    for logger in loggers:
        if (isinstance(logger, JsonLines) and (new or logger.lacks(made))) or (
            isinstance(logger, Dashboard) and (new or logger.waiting)
        ):
            logger.evaluated(found)
