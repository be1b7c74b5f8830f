"""Two settings in pairs of seeds: `python extras/compare.py BEFORE AFTER`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from extras import several
from utils import UserError

ROWS = {**several.TITLES, "val_loss": "Validation loss", "test_loss": "Test loss"}


def load_pairs(before: Path, after: Path) -> list[list[dict[str, Any]]]:
    """The checkpoints of the runs that have the same name in both folders.

    Raises UserError if there are fewer than two, or their images differ.
    """
    paths = [{path.parent.name: path for path in utils.find_runs(out)} for out in (before, after)]
    names = sorted(paths[0].keys() & paths[1].keys())
    if len(names) < 2:
        raise UserError(f"{before} and {after} have fewer than two seeds or folds in common")
    pairs = [[utils.load_checkpoint(of_folder[name]) for of_folder in paths] for name in names]
    for a, b in pairs:
        for name in ("train_size", "val_size", "folds"):
            if a["recipe"][name] != b["recipe"][name]:
                raise UserError(f"{a['path']} and {b['path']} have another {name}")
        if a["data_crc"] != b["data_crc"]:
            raise UserError(f"{a['path']} and {b['path']} are of different data")
    return pairs


def main(argv: list[str] | None = None) -> None:
    parser = utils.Parser("Compare two settings in pairs of equal seeds or folds.")
    add = parser.add_argument
    add("before", type=Path, help="folder of train.py --runs or --folds")
    add("after", type=Path, help="that of another setting")
    add("--test", action="store_true", help="the test set's figures, too")
    args = parser.parse_args(argv)

    pairs = load_pairs(args.before, args.after)
    metrics = [run["metrics"] for pair in pairs for run in pair]
    measured = [name for name in ROWS if all(name in its for its in metrics)]
    if not args.test:
        measured = [name for name in measured if name.startswith("val")]
    if not measured:
        raise UserError("these runs held out no images: train with --val-size or --folds")
    print(f"{len(pairs)} pairs".ljust(24) + "    before     after   difference")
    for name in measured:
        before, after = zip(*([run["metrics"][name] for run in pair] for pair in pairs))
        found = several.statistics_of([y - x for x, y in zip(before, after)])
        form = ".5f" if "loss" in name else ".3%"
        means = (f"{sum(values) / len(values):10{form}}" for values in (before, after))
        verdict = "" if abs(found["mean"]) > 2 * found["sem"] else "  no difference"
        difference = f"{found['mean']:+{form}} ± {found['sem']:{form}}{verdict}"
        print(f"{ROWS[name]:24}{''.join(means)}   {difference}")


if __name__ == "__main__":
    utils.run_script(main)
