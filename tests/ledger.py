"""What faults tests inject and what came of them, counted over a whole run of pytest (`make faults`)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, Literal

import pytest

from runs import differences

Kind = Literal["process", "call", "file", "option", "argument"]
KINDS: dict[Kind, str] = {
    "process": "training processes killed, signalled or starved",
    "call": "calls, data and services that failed",
    "file": "files changed at random",
    "option": "configurations with a mistake",
    "argument": "arguments drawn at random",
}


class Faults:
    """Of one test."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def injected(self, kind: Kind, n: int = 1) -> None:
        """So many were; they count as survived if the test passes."""
        assert kind in KINDS
        self.counts[kind] += n

    def same(self, whole: Any, interrupted: Any) -> None:
        """Two states are the same, with no tolerance; one that is not is lost."""
        found = differences(whole, interrupted)
        self.counts["states compared"] += 1
        self.counts["states lost"] += bool(found)
        assert found == []

    def refused(self, marker: Path, n: int = 1) -> None:
        """Hostile files or values were refused. Their code, had it run, would have made the marker."""
        self.counts["hostile refused"] += n
        self.counts["code executed"] += marker.exists()
        assert not marker.exists()


@pytest.fixture
def faults(request: pytest.FixtureRequest) -> Any:
    found = Faults()
    yield found
    request.node.user_properties.append(("faults", dict(found.counts)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    injected: Counter[str] = Counter()
    survived: Counter[str] = Counter()
    # What the fixture found is known when it is torn down; whether the test passed, before.
    passed = {report.nodeid for report in terminalreporter.getreports("passed")}
    for report in terminalreporter.getreports("") + terminalreporter.getreports("error"):
        for name, counts in getattr(report, "user_properties", ()):
            if name == "faults" and report.when == "teardown":
                injected.update(counts)
                survived.update(counts if report.nodeid in passed else {})
    if not injected:
        return
    say = terminalreporter.write_line
    terminalreporter.section("faults")
    say(f"{'injected':>9} {'survived':>9}")
    for kind, what in KINDS.items():
        say(f"{injected[kind]:9} {survived[kind]:9}  {what}")
    say(f"{injected['states compared']:9} {'':9}  states compared, {injected['states lost']} lost")
    hostile, executed = injected["hostile refused"], injected["code executed"]
    say(f"{hostile:9} {'':9}  hostile files refused, code executed {executed} times")
