"""The report of a run: ground truth beside prediction on held-out clips, in one HTML file that needs no network.

python -m fw_model.report --run OUTPUT_DIR --dataset DIR --output FILE.html [--clips 4]
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from fw_model.errors import explain_errors
from fw_model.report.predict import write_report

log = logging.getLogger(__name__)


@explain_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m fw_model.report", description="Ground truth beside prediction, as one HTML file."
    )
    parser.add_argument("--run", required=True, type=Path, help="output folder of fw_model.train")
    parser.add_argument("--dataset", required=True, help="folder with manifest.parquet, or its URL")
    parser.add_argument("--output", required=True, type=Path, help="HTML file to write")
    parser.add_argument("--clips", type=int, default=4, help="how many held-out clips to show (default 4)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.clips < 1:
        parser.error(f"--clips must be at least 1, got {args.clips}")
    summary = write_report(args.run, args.dataset, args.output, args.clips, args.device)
    log.info("%s", summary.path)
    print(json.dumps(summary.numbers))
    return 0


if __name__ == "__main__":
    sys.exit(main())
