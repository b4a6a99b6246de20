"""Do generated worlds follow the paths they were asked for, and are they one scene?

    python -m fw_model.evaluate cameras DIR... [--estimator colmap] [--floor KNOWN...]

DIR is a saved world, or a folder of them. The requested path is held against the model's own cameras and, with an estimator,
against cameras found from the video alone with the requested lens; beside them a camera that stands and a random guess. KNOWN are
saved worlds of real video (`python -m fw_model.data export`): what the estimator itself has wrong. Prints a table and a last line
of JSON. Exit code 0, 1 when a folder could not be judged or there was none, 2 on wrong usage.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from fw_model.errors import BadFileError, explain_errors
from fw_model.evaluate.estimators import load_estimator
from fw_model.evaluate.table import as_json, as_text, evaluate


@explain_errors
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fw_model.evaluate", description="Judge generated worlds.")
    commands = parser.add_subparsers(dest="command", required=True)
    cameras = commands.add_parser("cameras", help="requested path against the world's cameras, and its consistency")
    cameras.add_argument("folders", metavar="DIR", nargs="+", type=Path, help="a saved world, or a folder of them")
    cameras.add_argument("--estimator", help="colmap, or MODULE:FUNCTION (default: none)")
    cameras.add_argument("--floor", metavar="KNOWN", nargs="+", type=Path, default=[], help="worlds with known cameras")
    args = parser.parse_args(argv)
    if args.floor and args.estimator is None:
        parser.error("--floor is what the estimator has wrong: name an --estimator")
    estimator = load_estimator(args.estimator) if args.estimator else None
    worlds, floor = worlds_in(args.folders), worlds_in(args.floor)
    result = evaluate(worlds, estimator, floor, lambda items: tqdm(items, desc="evaluate", unit="world", disable=None))
    print(as_text(result))
    print(json.dumps(as_json(result)))
    return 1 if result.unreadable or not result.consistency else 0


def worlds_in(folders: Sequence[Path]) -> list[Path]:
    """The worlds among folders and, of those that are none, below them. Raises BadFileError for a folder without any."""
    found: list[Path] = []
    for folder in folders:
        inside = [folder] if (folder / "cameras.json").is_file() else sorted(p.parent for p in folder.rglob("cameras.json"))
        if not inside:
            raise BadFileError(f"{folder}: no saved world in it (a folder with cameras.json)")
        found += inside
    return found


if __name__ == "__main__":
    sys.exit(main())
