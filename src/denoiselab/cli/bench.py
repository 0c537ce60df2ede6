"""denoiselab bench"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from denoiselab.cli import parse
from denoiselab.cli.summary import columns
from denoiselab.compose import compose, plain
from denoiselab.errors import UserError, nearest

if TYPE_CHECKING:
    from denoiselab.bench.record import Record

ABOUT = """Measure the speed of training, networks and samplers. Contenders alternate in one run, networks and walks are
compared before their times are reported, and each result is a median with its 95% interval over the rounds.

    denoiselab bench part=networks output=networks.json"""


def main(arguments: list[str]) -> int:
    overrides, config_dir, multirun = parse(arguments, "bench", ABOUT)
    if multirun:
        raise UserError("-m: bench measures one thing after the other; name the parts, as in part=[networks,sampling]")
    config = plain(compose("bench", overrides, config_dir))
    parts, config = chosen(config)

    import torch

    from denoiselab.bench import run
    from denoiselab.run_folder import hardware, versions

    found, missing = [], []
    print(f"{hardware()}; torch {torch.__version__}", file=sys.stderr)
    for record in run(parts, config):
        if isinstance(record, str):
            missing.append(record)
            print(record, file=sys.stderr)
        else:
            found.append(record)
            print(table(record), end="\n\n", flush=True)
    if not found:
        raise UserError(f"nothing was measured: {'; '.join(missing)}")
    if config["output"]:
        from denoiselab.files import write_text

        content = {
            "command": " ".join(["denoiselab bench", *overrides]),
            "records": [record.as_dict() for record in found],
            "not_made": missing,
            "hardware": hardware(),
            "versions": versions() | diffusers_version(),
        }
        write_text(Path(config["output"]), json.dumps(content, indent=2) + "\n")
    return 0


def chosen(config: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """The parts that were asked for, and the configuration with ``rounds`` and ``batch`` in each part."""
    from denoiselab.bench import PARTS
    from denoiselab.bench.timing import LEAST

    asked = config["part"] if isinstance(config["part"], list) else [config["part"]]
    parts = list(PARTS) if asked == ["all"] else asked
    for part in parts:
        if part not in PARTS:
            raise UserError(f"part={part}: {nearest(str(part), [*PARTS, 'all'], 'parts')}")
        for key in ("rounds", "batch"):
            for section in (config[part], *config[part].get("models", {}).values()):
                if key in section and config[key] is not None:
                    section[key] = config[key]
        rounds = config[part]["rounds"]
        if rounds < LEAST:
            raise UserError(f"rounds={rounds}: need at least {LEAST}, for a 95% interval of a median")
    if config["device"] not in ("auto", "cpu"):
        raise UserError(f"device={config['device']}: need auto or cpu")
    if config["threads"] is not None and config["threads"] < 1:
        raise UserError(f"threads={config['threads']}: need at least 1")
    return parts, config


def table(record: Record) -> str:
    """A record for people."""
    rows = [["  time of", record.work, "quartiles", "peak memory"]]
    for name, time in record.times.items():
        low, high = time.quartiles
        peak = "" if time.peak_mib is None else f"{time.peak_mib:,.0f} MiB"
        rows.append([f"  {name}", f"{time.ms:.4g} ms", f"{low:.4g} to {high:.4g}", peak])
    if not any(row[3] for row in rows[1:]):
        rows = [row[:3] for row in rows]
    result = record.result
    low, high = result.interval
    line = f"  {result.of}: {result.median:.4g}, 95% interval {low:.4g} to {high:.4g}, {record.rounds} rounds"
    for kind, bound in record.need.items():
        line += f"; {kind.replace('_', ' ')} {bound:g}: {record.verdict}"
    return "\n".join([f"{record.part}: {record.name}", *columns(rows), line, *facts(record.facts)])


def facts(found: dict[str, Any]) -> list[str]:
    """Those that a reader of the table wants beside the times."""
    words = {
        "difference": "outputs differ by {:.1e}",
        "parameters": "{:,} parameters",
        "mean_loss": "mean loss {0[ours]:.4f} and {0[bare]:.4f}",
        "evaluation_share": "{:.0%} of the wall clock went into evaluations, which do not count",
        "teraflops": "{0[training]:.0f} TFLOP/s of {0[product]:.0f} in a matrix product",
        "rise_by_sampling": "sampling callbacks raise peak memory by {:.1%}",
        "threads": "{} CPU threads",
    }
    said = [words[key].format(value) for key, value in found.items() if key in words and value is not None]
    return ["  " + "; ".join(said)] if said else []


def diffusers_version() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return {"diffusers": version("diffusers")}
    except PackageNotFoundError:
        return {}
