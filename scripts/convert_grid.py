"""Write the grid of AditMeh/Distillation (a JSON file of runs) as a sweep for `deit sweep`.

    python scripts/convert_grid.py GRID.json > sweep.json

A run of that file is {"lr", "classes", "weight", "epochs", "T"}. Its loss is
(1 - weight) T^2 CE(teacher at T) + weight CE(label), and it never sees digits that are not in
`classes`; a number n stands for the classes 0 to n. `lr` is AdamW's unless the sweep is run with
--optim.name sgd.
"""

import json
import sys
from typing import Any

KEYS = ("lr", "classes", "weight", "epochs", "T")
DIGITS = range(10)


def sweep_run(run: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a run for a sweep. Raises ValueError."""
    if run.keys() != set(KEYS):
        raise ValueError(f"should have the keys {', '.join(KEYS)}, has {', '.join(run)}")
    seen, weight = run["classes"], run["weight"]
    seen = list(range(seen + 1)) if isinstance(seen, int) else seen
    if not seen or not all(type(digit) is int and digit in DIGITS for digit in seen):
        raise ValueError(f"classes {run['classes']}: should be of 0 to 9")
    if not 0 <= weight <= 1:
        raise ValueError(f"weight {weight}: should be between 0 and 1")
    loss = {
        "loss.kind": "cross_entropy",
        "loss.head": "all",
        "loss.label_weight": weight,
        "loss.distillation_weight": round(1 - weight, 9),
        "loss.temperature": run["T"],
    }
    return {
        **({"loss": "none"} if weight == 1 else loss),
        "data.unseen_classes": [str(digit) for digit in DIGITS if digit not in seen],
        "loss.label_smoothing": 0.0,
        "optim.epochs": run["epochs"],
        "optim.lr": run["lr"],
    }


def convert(grid: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the sweep of a grid. Raises ValueError, naming the run."""
    runs = {}
    for name, run in grid.items():
        try:
            runs[name] = sweep_run(run)
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{name}: {error}") from None
    return {"runs": runs}


def main() -> int:
    """Convert the file named on the command line; print the sweep."""
    if len(sys.argv) != 2:
        sys.exit("usage: python scripts/convert_grid.py GRID.json > sweep.json")
    try:
        with open(sys.argv[1], encoding="utf-8") as file:
            sweep = convert(json.load(file))
    except (AttributeError, OSError, ValueError) as error:
        print(f"{sys.argv[1]}: {error}", file=sys.stderr)
        return 2
    print(json.dumps(sweep, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
