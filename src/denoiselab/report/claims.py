"""Whether what a study claims holds: paired over seeds, in every context, adjusted for the number of tests."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from denoiselab.report.arms import Arm, Table, tabulate
from denoiselab.report.matching import MOST, SEEDS, Context, Point, Side, contexts, points, settings, side, state
from denoiselab.report.options import comparable
from denoiselab.report.paired import LEVEL, Difference, difference, holm
from denoiselab.report.ranking import incomparable
from denoiselab.report.statistics import number, plain
from denoiselab.report.studies import Study, known, line

SUPPORTED, CONTRADICTED, UNDECIDED = "supported", "contradicted", "undecided"
MISSING, INCOMPARABLE, UNREADABLE = "not measured yet", "not comparable", "cannot be tested"

WORST = (UNREADABLE, CONTRADICTED, INCOMPARABLE, MISSING, UNDECIDED, SUPPORTED)
"""What stands for a claim whose contexts disagree is the first of these."""


@dataclass
class Row:
    """A claim in one context: one value of each axis that the claim leaves open."""

    context: str
    verdict: str
    why: str
    better: str = ""
    """Which direction is."""
    difference: Difference | None = None
    beside: str = ""
    """What else differs between the two arms."""
    like_data: bool = False
    """Whether both means lie where those of real data do."""

    @property
    def text(self) -> str:
        """The difference with its interval."""
        found = self.difference
        half = f" ± {number(found.half, 2)}" if found is not None and found.half is not None else ""
        return f"{number(found.mean)}{half}" if found is not None else number(None)

    @property
    def p(self) -> str:
        """Adjusted for the tests of the study."""
        return number(self.difference.adjusted if self.difference is not None else None, 2)


@dataclass
class Judged:
    """A claim, in words, and what became of it."""

    text: str
    metric: str = ""
    rows: list[Row] = field(default_factory=list)
    problem: str = ""
    """Why it cannot be tested, if it cannot."""

    @property
    def verdict(self) -> str:
        """The verdict of all contexts if they agree; otherwise never ``supported``."""
        if self.problem or not self.rows:
            return UNREADABLE
        return next(word for word in WORST if any(row.verdict == word for row in self.rows))

    def __str__(self) -> str:
        return f"{self.text}: {self.summary}{f' ({self.problem})' if self.problem else ''}."

    @property
    def in_contexts(self) -> bool:
        """Whether the rows have to say where they hold."""
        return len(self.rows) > 1 or any(row.context for row in self.rows)

    @property
    def summary(self) -> str:
        """The verdict, and in how many contexts where these disagree."""
        if self.problem or len({row.verdict for row in self.rows}) < 2:
            return self.verdict
        counts = {word: sum(row.verdict == word for row in self.rows) for word in WORST}
        return f"{', '.join(f'{word} in {n}' for word, n in counts.items() if n)} of {len(self.rows)} contexts"


@dataclass
class _Claim:
    metric: str
    better: dict[str, Any]
    than: dict[str, Any]

    @property
    def options(self) -> list[str]:
        return list(dict.fromkeys([*self.better, *self.than]))


def judge(study: Study) -> Answer:
    """A verdict for every claim of a study, the p-values adjusted over all its claims and contexts (Holm).

    A planned context that is not measured yet counts among the tests, so that no verdict weakens as a study goes on. A
    verdict waits for all planned seeds: deciding as soon as a difference shows finds one where there is none.
    """
    table = tabulate(study.runs)
    judged = [_judged(study, table, claim) for claim in study.claims]
    rows = [row for one in judged for row in one.rows]
    tests = [row for row in rows if row.verdict in (UNDECIDED, MISSING)]
    adjusted = holm([row.difference.p if row.difference and row.verdict == UNDECIDED else None for row in tests])
    for row, p in zip(tests, adjusted, strict=True):
        if row.difference is not None and p is not None:
            row.difference.adjusted = p
            row.verdict, row.why = _verdict(row, row.difference, p)
            if row.like_data:
                row.why = "; ".join(filter(None, [row.why, "both are indistinguishable from data"]))
    return Answer(study, judged)


@dataclass
class Answer:
    """A study, and what became of its claims."""

    study: Study
    claims: list[Judged]

    @property
    def text(self) -> str:
        """The answer to the question in a line."""
        if not self.claims:
            return "The study makes no claim; see the table of arms."
        if len(self.claims) == 1:
            return f"{self.claims[0].summary}.".capitalize()
        counts = {word: sum(one.verdict == word for one in self.claims) for word in reversed(WORST)}
        return f"{len(self.claims)} claims: {', '.join(f'{n} {word}' for word, n in counts.items() if n)}."

    @property
    def tests(self) -> int:
        """Among which p-values are adjusted: every row but those whose numbers are different quantities."""
        return sum(row.verdict != INCOMPARABLE for one in self.claims for row in one.rows)


def control(study: Study) -> Arm | None:
    """The arm that the first claim which can be read compares with; the first arm of the study's axes without one."""
    claim = next((claim for raw in study.claims if not isinstance(claim := _read(raw), str)), None)
    found = points(study, tabulate(study.runs), claim.options if claim else [])
    first = side(found, claim.than) if claim else found

    def place(point: Point) -> list[int]:
        axes = {name: [*map(comparable, values)] for name, values in study.axes.items() if name not in SEEDS}
        texts = {name: comparable(point.value(name)) for name in axes}
        return [axes[name].index(text) if text in axes[name] else len(axes[name]) for name, text in texts.items()]

    return min(first, key=place).arm if first else None


def _verdict(row: Row, found: Difference, p: float) -> tuple[str, str]:
    """The verdict of a test, with its reason."""
    if p <= LEVEL:
        right = (found.mean < 0) == (row.better == "lower")
        return (SUPPORTED, "") if right else (CONTRADICTED, "the difference is in the other direction")
    if found.p is not None and found.p <= LEVEL:
        return UNDECIDED, "the interval leaves out 0, but not once the number of tests is taken into account"
    return UNDECIDED, "the interval includes 0"


def _read(raw: Any) -> _Claim | str:
    """A claim as it was written, or why it cannot be read."""
    if not isinstance(raw, dict):
        return "not of the form {metric: NAME, better: {OPTION: VALUE}, than: {OPTION: VALUE}}"
    for name in ("metric", "better", "than"):
        if name not in raw:
            return f"it has no {name}"
    if not isinstance(raw["metric"], str):
        return "its metric is not a name"
    for name in ("better", "than"):
        if not isinstance(raw[name], dict) or not raw[name] or not all(isinstance(option, str) for option in raw[name]):
            return f"{name} is not of the form {{OPTION: VALUE}}"
    claim = _Claim(raw["metric"], raw["better"], raw["than"])
    both = [{o: comparable(v) for o, v in values.items()} for values in (claim.better, claim.than)]
    if both[0] == both[1]:
        return "it compares an arm with itself"
    if seeds := [o for o in claim.options if o in ("seed", "evaluation.seed")]:
        return f"{seeds[0]} is what differences are taken over"
    return claim


def _judged(study: Study, table: Table, raw: Any) -> Judged:
    claim = _read(raw)
    if isinstance(claim, str):
        return Judged(line(raw, 120), problem=claim)
    text = f"{line(claim.metric, 60)} is better with {settings(claim.better)} than with {settings(claim.than)}"
    for name in claim.options:
        if not known(study.runs, name):
            return Judged(
                text, claim.metric, problem=f"{line(name, 60)}: no run of the study has an option of this name"
            )
    measured = list(dict.fromkeys(name for arm in table.arms for name in arm.cells))
    if measured and claim.metric not in measured:
        return Judged(
            text, claim.metric, problem=f"{line(claim.metric, 60)}: not measured; known: {', '.join(measured)}"
        )
    found = points(study, table, claim.options)
    rows = []
    for context in contexts(study, table, found, claim.options):
        inside = [point for point in found if context.holds(point)]
        sides = [Side(values, side(inside, values)) for values in (claim.better, claim.than)]
        rows.append(_row(study, claim.metric, context, *sides))
    problem = (
        "" if rows else f"it leaves so much open that there are more than {MOST} contexts; name more options in it"
    )
    return Judged(text, claim.metric, rows, problem)


def _row(study: Study, metric: str, context: Context, better: Side, than: Side) -> Row:
    """A claim in a context, before p-values are adjusted."""
    for one in (better, than):
        if one.ambiguous:
            why = f"several arms fit {settings(one.values)}: {one.ambiguous}; name what tells them apart"
            return Row(context.text, INCOMPARABLE, why)
    measured = [one.measured(metric) for one in (better, than)]
    used = [point for one in (better, than) for point in one.points]
    reason = incomparable([entry for point in used for entry in point.records(metric)])
    if reason and all(measured):
        return Row(context.text, INCOMPARABLE, reason)
    both = zip((better, than), measured, strict=True)
    missing = [text for one, values in both if (text := _missing(study, context, one, values))]
    found = difference(*measured)
    row = Row(context.text, MISSING if missing else UNDECIDED, "; ".join(missing), difference=found)
    if found is None:
        row.verdict = MISSING
        row.why = row.why or "no seed is common to both"
        return row
    cells = [point.arm.cells[metric] for point in used if metric in point.arm.cells]
    row.better, row.like_data = cells[0].better, all(cell.like_data for cell in cells)
    row.beside = _beside(better.points[0], than.points[0], [*better.values, *than.values])
    if found.untested and not missing:
        row.why = f"no test: {found.untested}"
    return row


def _missing(study: Study, context: Context, one: Side, values: dict[str, dict[str, float]]) -> str:
    """Which seeds of a side have no value, and why; without a plan, those that any run of the study has count."""
    seeds = study.axes.get("seed") or [run.seed for run in study.runs if run.identity]
    left = [seed for seed in dict.fromkeys(map(plain, seeds)) if seed not in values]
    words = [f"{seed} ({why})" if (why := state(study, context, one, seed)) else seed for seed in left]
    return f"{settings(one.values)} lacks seed{'s' * (len(left) > 1)} {', '.join(words)}" if left else ""


def _beside(a: Point, b: Point, named: list[str]) -> str:
    """The settings, other than those that are named, in which two arms differ."""
    found = []
    for name, text in a.arm.axes.items():
        other = b.arm.axes.get(name, "–")
        if other != text and not any(name == option or name.startswith(f"{option}.") for option in named):
            found.append(f"{name} ({text} against {other})")
    return ", ".join(found)
