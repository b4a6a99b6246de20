"""`python -m fw_model.data verify DIR`, `info DIR` and `export DATASET CLIP DIR`.

Exit code 0 if all is well, 1 on any fault, 2 on wrong usage.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fw_model.config import load_preset
from fw_model.data.export import clip_world, decoder
from fw_model.data.manifest import dataset_digest, dataset_folder, read_manifest, read_texts
from fw_model.data.verify import iter_faults
from fw_model.errors import explain_errors


@explain_errors
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fw_model.data", description="Look at a packed dataset.")
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("verify", help="read everything, check every hash, list every fault")
    check.add_argument("dataset", metavar="DIR")
    tell = commands.add_parser("info", help="clips, buckets, splits, sizes, who made them, what was set aside and why")
    tell.add_argument("dataset", metavar="DIR")
    tell.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    export = commands.add_parser("export", help="write one clip as video, depth, cloud, cameras and a page to look at")
    export.add_argument("dataset", metavar="DATASET")
    export.add_argument("clip", metavar="CLIP", help="its id, as `info` and the manifest name it")
    export.add_argument("folder", metavar="DIR", type=Path)
    export.add_argument("--preset", default="tiny", help="whose VAE made the latents (default: tiny)")
    export.add_argument("--device", default="cpu")
    args = parser.parse_args(arguments)
    if args.command == "export":
        return _export(args.dataset, args.clip, args.folder, args.preset, args.device)
    return _verify(args.dataset) if args.command == "verify" else _info(args.dataset, args.json)


def _export(dataset: str, clip: str, folder: Path, preset: str, device: str) -> int:
    world = clip_world(dataset, clip, decoder(dataset, load_preset(preset), device))
    print(world.save(folder))
    return 0


def _verify(path: str) -> int:
    rows = read_manifest(path)
    faults = 0
    for fault in iter_faults(path, tqdm(rows, desc="verify", unit="clip", disable=None)):
        faults += 1
        tqdm.write(fault, file=sys.stderr)
    print(f"{path}: {sum(not row.quarantine for row in rows)} clips read, {faults} faults")
    if faults:
        print("Delete the damaged shards and pack again: only their clips are written anew.", file=sys.stderr)
    return 1 if faults else 0


def _info(path: str, as_json: bool) -> int:
    found = describe(path)
    if as_json:
        print(json.dumps(found, indent=1))
        return 0
    texts = found["texts"]
    print(f"{path}: digest {found['digest']}, {found['shards']} shards, {found['file_bytes']:,} bytes")
    print(f"  {found['clips']} clips of {found['videos']} videos, {found['payload_bytes']:,} bytes of payload")
    for item in found["buckets"]:
        size = f"{item['bytes']:,} bytes"
        print(f"  {item['split']:5} {item['bucket']:>12}: {item['clips']} clips of {item['videos']} videos, {size}")
    print(f"  {texts['prompts']} distinct prompts, {texts['bytes']:,} bytes of embeddings; {texts['without']} clips without one")
    for name, makers in found["made_by"].items():
        for maker, count in makers.items():
            print(f"  {name}: {maker} ({count} clips)")
    print(f"  {len(found['set_aside'])} set aside")
    for reason, count in found["reasons"].items():
        print(f"    {count} x {reason}")
    for item in found["set_aside"]:
        print(f"  set aside {item['clip_id']} ({item['video']}): {item['reason']}")
    return 0


def describe(path: str | Path) -> dict[str, Any]:
    """What is in a dataset, by its manifest and the sizes of its files: what `info --json` prints."""
    rows, texts = read_manifest(path), read_texts(path)
    good = [row for row in rows if not row.quarantine]
    aside = [row for row in rows if row.quarantine]
    groups = defaultdict(list)
    made_by: dict[str, Counter[str]] = defaultdict(Counter)
    for row in good:
        groups[row.split, row.bucket].append(row)
        for name, maker in row.versions.items():
            made_by[name][maker] += 1
    files = [file for file in dataset_folder(path).iterdir() if file.is_file()]
    return {
        "digest": dataset_digest(path),
        "clips": len(good),
        "videos": len({row.video for row in good}),
        "shards": len({row.shard for row in good}) + len({row.shard for row in texts.values()}),
        "payload_bytes": sum(row.bytes for row in good),
        "file_bytes": sum(file.stat().st_size for file in files),
        "buckets": [
            {
                "split": split,
                "bucket": bucket,
                "clips": len(members),
                "videos": len({row.video for row in members}),
                "bytes": sum(row.bytes for row in members),
            }
            for (split, bucket), members in sorted(groups.items())
        ],
        "texts": {
            "prompts": len(texts),
            "bytes": sum(row.bytes for row in texts.values()),
            "without": sum(not row.prompt for row in good),
        },
        "made_by": {name: dict(makers) for name, makers in sorted(made_by.items())},
        "reasons": dict(Counter(row.quarantine for row in aside).most_common()),
        "set_aside": [{"clip_id": row.clip_id, "video": row.video, "reason": row.quarantine} for row in aside],
    }


if __name__ == "__main__":
    sys.exit(main())
