"""Looking at a run with diagnostics: each finding at an address of its own in the run's folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from denoiselab.content import by_content
from denoiselab.diagnostics.base import Diagnostic, Finding
from denoiselab.diagnostics.subject import Subject
from denoiselab.evaluation import describe
from denoiselab.progress import say
from denoiselab.run_folder import digest


@dataclass
class Kept:
    """A finding and the picture of it."""

    finding: Finding
    picture: Image.Image


def folder_of(name: str, node: dict[str, Any], subject: Subject) -> Path:
    """RUN/diagnostics/NAME/STEP-HASH, the hash over what the finding depends on beside the run and its step.

    Args:
        name: of the diagnostic.
        node: its configuration.
        subject: what it looks at.
    """
    config, run = subject.parts.config, subject.run
    groups = ("sampler", "spacing", "guidance", "evaluation", "metrics")
    own = {key: value for key, value in node.items() if key not in ("every", "budget")}
    address = digest(
        [by_content({**{group: config[group] for group in groups}, "own": own}), *run.elsewhere(subject.parts)]
    )
    return run.folder / "diagnostics" / name / f"{run.step:08d}-{address}"


def inspect(diagnostic: Diagnostic, subject: Subject, folder: Path) -> Kept:
    """Look, draw, and keep both."""
    finding = diagnostic.look(subject)
    picture = diagnostic.picture(finding)
    finding.save(folder, picture)
    return Kept(finding, picture)


def inspect_once(name: str, diagnostic: Diagnostic, node: dict[str, Any], subject: Subject, rerun: bool) -> Path:
    """The folder of a finding, made unless it exists; what was found is said on stderr."""
    folder = folder_of(name, node, subject)
    if not rerun and (folder / "finding.json").is_file():
        say(f"{name}: already looked at: {folder}")
        return folder
    kept = inspect(diagnostic, subject, folder)
    for record in kept.finding.records:
        say(describe(record))
    for alarm in kept.finding.alarms:
        say(f"  ! {name}: {alarm}")
    say(f"{name}: {folder}")
    return folder
