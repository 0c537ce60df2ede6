"""The demo's figures beside what they must reach; exit status 1 if one falls short.

python scripts/check_demo.py RUN
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean

N = 1000


def main(run: Path) -> int:
    found: dict[tuple[float, str], list[dict]] = {}
    for file in run.glob("evaluations/*/evaluation.json"):
        evaluation = json.loads(file.read_text())
        protocol = evaluation["protocol"]
        if protocol["n"] == N and protocol["weights"] == "ema":
            for record in evaluation["records"]:
                found.setdefault((protocol["guidance"].get("scale", 1.0), record["name"]), []).append(record)

    def average(name: str, scale: float = 1.0) -> float:
        return mean(record["value"] for record in found[scale, name])

    accuracy, distance = found[1.0, "class_accuracy"][0], found[1.0, "fd_digits"][0]
    floor = distance["controls"]["floor"]
    checks = [
        ("classifier on held-out real digits", accuracy["controls"]["held_out"], ">=", 0.985),
        ("asked label recognised, guidance 1", average("class_accuracy"), ">=", 0.97),
        ("asked label recognised, guidance 1.5", average("class_accuracy", 1.5), ">=", 0.99),
        ("classes covered", accuracy["details"]["classes_covered"], ">=", 10),
        ("FD-digits over its floor", average("fd_digits") / floor, "<=", 1.5),
        ("nearest training digit, over held-out's", average("nearest_training_ratio"), ">=", 0.8),
    ]
    for what, value, relation, bound in checks:
        ok = value >= bound if relation == ">=" else value <= bound
        print(f"{'ok ' if ok else 'NOT'} {what:42}{value:8.3f}  {relation} {bound}")
    seeds = len(found[1.0, "fd_digits"])
    print(f"    FD-digits {average('fd_digits'):.3f} (mean of {seeds} seeds of {N} samples), floor {floor:.3f}")
    print(f"    precision {average('precision'):.3f}, recall {average('recall'):.3f}")
    return int(any(not (v >= b if r == ">=" else v <= b) for _, v, r, b in checks))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
