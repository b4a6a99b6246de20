"""What lies in the videos folder, and what of it will not be read for which reason:

    python -m fw_pipeline.inventory [FOLDER] [--json]

Without FOLDER, the pipeline's own (`FW_VIDEOS`). Nothing is decoded or written. Exit code 0, also where something is amiss.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from fw_model.errors import explain_errors
from fw_pipeline.steps.inventory import take_inventory
from fw_pipeline.steps.settings import settings_from_env


@explain_errors
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fw_pipeline.inventory", description="What lies in the videos folder.")
    parser.add_argument("folder", metavar="FOLDER", nargs="?", type=Path, help="default: the pipeline's own")
    parser.add_argument("--json", action="store_true", help="print the counts as one JSON object instead of text")
    args = parser.parse_args(arguments)
    found = take_inventory(settings_from_env(videos=args.folder and args.folder.absolute()))
    print(json.dumps(found.numbers) if args.json else "\n".join(found.lines()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
