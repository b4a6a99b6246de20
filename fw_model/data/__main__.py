"""`python -m fw_model.data verify DIR` and `info DIR`: exit code 0 if all is well, 1 on any fault, 2 on wrong usage."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence

from tqdm import tqdm

from fw_model.data.manifest import DatasetError, dataset_digest, read_manifest
from fw_model.data.verify import iter_faults


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fw_model.data", description="Look at a packed dataset.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("verify", help="read every clip and check its hash").add_argument("dataset", metavar="DIR")
    commands.add_parser("info", help="print what is in it").add_argument("dataset", metavar="DIR")
    args = parser.parse_args(arguments)
    try:
        return _verify(args.dataset) if args.command == "verify" else _info(args.dataset)
    except DatasetError as error:
        print(error, file=sys.stderr)
        return 1


def _verify(path: str) -> int:
    rows = read_manifest(path)
    faults = list(iter_faults(path, tqdm(rows, desc="verify", unit="clip", disable=None)))
    for fault in faults:
        print(fault, file=sys.stderr)
    print(f"{path}: {sum(not row.quarantine for row in rows)} clips read, {len(faults)} faults")
    return 1 if faults else 0


def _info(path: str) -> int:
    rows = read_manifest(path)
    good = [row for row in rows if not row.quarantine]
    shards = {row.shard for row in good}
    print(f"{path}: digest {dataset_digest(path)}, {len(shards)} shards, {sum(row.bytes for row in good):,} payload bytes")
    for (split, bucket), count in sorted(Counter((row.split, row.bucket) for row in good).items()):
        videos = len({row.video for row in good if (row.split, row.bucket) == (split, bucket)})
        print(f"  {split:5} {bucket:>12}: {count} clips of {videos} videos")
    for row in rows:
        if row.quarantine:
            print(f"  quarantined {row.clip_id} ({row.video}): {row.quarantine}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
