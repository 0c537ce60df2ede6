"""The command line. Each command is a module, imported when it is called, so that help and mistakes answer at once."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from pathlib import Path

from denoiselab.errors import UserError, foreseen, one_line
from denoiselab.progress import note_begin, say
from denoiselab.version import __version__

COMMANDS = {
    "train": "train a model, or with -m sweep options; re-issuing a command continues or skips",
    "study": "make the runs that a question needs, and the report that answers it",
    "sample": "draw samples from a run or a checkpoint",
    "evaluate": "measure a run or a checkpoint",
    "status": "how runs stand: done, running and for how long, failed and why",
    "report": "one page from a run or a folder of runs",
    "wandb-report": "a report on wandb's server from a folder of runs, or its description",
    "wandb-sweep": "a sweep file whose agents call `denoiselab train`",
    "preference": "which of two runs' samples people prefer: a blinded sheet, and its score",
    "encode": "turn the images of a data set into latents",
    "export": "write a run's network for diffusers, or as safetensors",
    "import": "make a run of a network that was trained elsewhere",
    "summary": "parameters, multiply-adds and memory of a network",
    "bench": "measure the speed of training, networks and samplers",
}

SWEEPING = ("train", "evaluate", "summary")
"""Commands that take -m."""

USAGE = """usage: denoiselab COMMAND [option=value ...]

A laboratory for diffusion-model ablations.

commands:
{commands}

`denoiselab COMMAND --help` lists a command's options. A first run: denoiselab train experiment=digits"""


def main(argv: list[str] | None = None) -> None:
    """Run a command and exit with its status: 0 done, 1 a run failed, 2 a mistake in the command, 3 non-finite
    loss, 74 a file cannot be read or written, 75 the run is held by another process, 128+n ended by signal n."""
    note_begin()
    arguments = sys.argv[1:] if argv is None else argv
    sys.exit(run(arguments))


def run(arguments: list[str]) -> int:
    """The exit status of a command; errors that carry a status are one line on stderr."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE.format(commands="\n".join(f"  {name:14}{what}" for name, what in COMMANDS.items())))
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"denoiselab {__version__}")
        return 0
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        from denoiselab.errors import nearest

        print(
            f"denoiselab: {command}: no such command; {nearest(command, list(COMMANDS), 'commands')}",
            file=sys.stderr,
        )
        return 2
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        if number in (signal.SIGINT, signal.SIGTERM) or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)
    try:
        module = {"import": "import_"}.get(command, command.replace("-", "_"))
        return importlib.import_module(f"denoiselab.cli.{module}").main(rest)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except BaseException as error:
        if (status := foreseen(error)) is None:
            raise
        say(f"denoiselab {command}: {one_line(error)}")
        return status


def _interrupt(signum: int, frame: object) -> None:
    from denoiselab.errors import Interrupted

    raise Interrupted(signum)


def parse(arguments: list[str], app: str, about: str) -> tuple[list[str], Path | None, bool]:
    """The overrides, --config-dir and -m of a command; prints its help and exits 0 if asked to."""
    overrides, config_dir, multirun = [], None, False
    rest = iter(arguments)
    for argument in rest:
        if argument in ("-h", "--help"):
            print(_help(app, about, config_dir))
            sys.exit(0)
        if argument in ("-m", "--multirun"):
            multirun = True
        elif argument.partition("=")[0] in ("--config-dir", "-cd"):
            value = argument.partition("=")[2] or next(rest, "")
            config_dir = Path(value)
        elif argument.startswith("-"):
            raise UserError(
                f"{argument}: no such flag; flags are -m, --config-dir DIR and --help, options are name=value"
            )
        else:
            overrides.append(argument)
    return overrides, config_dir, multirun


GROUPS = "groups (an option of a group has options of its own, as in sampler.steps=20; see conf/GROUP/):"


def _help(app: str, about: str, config_dir: Path | None) -> str:
    """A command's options: its groups with their choices, and its own file."""
    from denoiselab.compose import conf_dir, options

    text = (conf_dir() / f"{app}.yaml").read_text()
    head, _, own = text.partition("\n\n")
    lines = [
        line.strip(" -").partition("#")[0] for line in head.splitlines() if line.startswith("  - ") and ": " in line
    ]
    defaults = {group: option.strip() for group, _, option in (line.partition(": ") for line in lines)}
    known = options(config_dir)
    rows = [f"  {group}={'|'.join(known[group])}  (default {defaults[group]})" for group in defaults if group in known]
    return "\n".join(
        [
            f"usage: denoiselab {app} {'[-m] ' if app in SWEEPING else ''}[--config-dir DIR] [option=value ...]",
            "",
            about,
            "",
            *([GROUPS, *rows, ""] if rows else []),
            "options:",
            *(f"  {line}".rstrip() for line in own.strip().splitlines()),
            *(
                ["", "-m takes several values per option (seed=0,1) and runs every combination."]
                if app in SWEEPING
                else []
            ),
        ]
    )
