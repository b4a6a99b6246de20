"""The guide layout from the command line:

    python -m fw_pipeline.guide_layout import DIR DATASET [--depth-kind auto|z|disparity] [--size 336x592x81] [--skip-bad]
    python -m fw_pipeline.guide_layout export DATASET DIR [--split train] [--camera-numbers 19] [--without-videos]

Exit code 0 if all is well, 1 when samples are bad or something is missing, 2 on wrong usage.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from fw_model.errors import explain_errors
from fw_model.model.encoders import Encoders
from fw_pipeline.guide_layout.exporter import VideoSource, export_guide
from fw_pipeline.guide_layout.finish import Size
from fw_pipeline.guide_layout.importer import ImportPlan, import_guide
from fw_pipeline.steps.settings import Settings, settings_from_env
from fw_pipeline.steps.store import Store


@explain_errors
def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    settings = settings_from_env(preset=getattr(args, "preset", None), device=getattr(args, "device", None))
    return _import(args, settings) if args.command == "import" else _export(args, settings)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fw_pipeline.guide_layout", description="Import and export the guide layout.")
    commands = parser.add_subparsers(dest="command", required=True)
    read = commands.add_parser("import", help="check a guide-layout folder and pack it into a dataset")
    read.add_argument("folder", metavar="DIR", type=Path, help="holds metadata.json, videos/, depth/, points/, camera_params/")
    read.add_argument("dataset", metavar="DATASET", type=Path)
    read.add_argument(
        "--depth-kind", choices=("auto", "z", "disparity"), default="auto", help="what depth/ holds (default: auto)"
    )
    read.add_argument(
        "--size",
        type=_size,
        default=None,
        metavar="HxWxT",
        help="cut and resize to this, or to the preset's clips with --size preset (default: as the samples are)",
    )
    read.add_argument("--skip-bad", action="store_true", help="leave bad samples out, listed with reasons in the manifest")
    read.add_argument("--val-percent", type=float, help="share of videos held out (default: the pipeline's)")
    read.add_argument("--preset", help="whose encoders make the latents (default: the pipeline's)")
    read.add_argument("--device", help="torch device of the encoders (default: the pipeline's)")
    write = commands.add_parser("export", help="write a dataset as a guide-layout folder")
    write.add_argument("dataset", metavar="DATASET", type=Path)
    write.add_argument("folder", metavar="DIR", type=Path, help="must be new or empty")
    write.add_argument("--split", choices=("train", "val"), help="only this one (default: both)")
    write.add_argument(
        "--camera-numbers",
        type=int,
        choices=(12, 19),
        default=12,
        help="in a row of camera_params (default: 12, lens in metadata.json)",
    )
    write.add_argument("--videos", type=Path, help="the folder the clips' videos are in (default: the pipeline's)")
    write.add_argument("--data", type=Path, help="the pipeline's data folder, which says how clips were cut (default: its own)")
    write.add_argument("--without-videos", action="store_true", help="leave videos/ out")
    return parser


def _size(text: str) -> Size | str:
    if text == "preset":
        return text
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r}: expected HxWxT, e.g. 336x592x81, or preset")
    return int(match[1]), int(match[2]), int(match[3])


def _shown(size: Size) -> str:
    return "x".join(map(str, size))


def _import(args: argparse.Namespace, settings: Settings) -> int:
    preset = settings.load_preset()
    text_len = preset.model.wan.text_len
    size: Size | Callable[[int, int], Size] | None = preset.clip.bucket if args.size == "preset" else args.size
    percent = settings.val_percent if args.val_percent is None else args.val_percent
    plan = ImportPlan(args.depth_kind, size, args.skip_bad, percent)
    result = import_guide(
        args.folder,
        args.dataset,
        lambda: Encoders.from_config(preset.encoders, text_len, settings.device),
        preset.encoders,
        text_len,
        plan,
        progress=lambda items, what: tqdm(items, desc=what, unit="sample", disable=None),
    )
    for note in result.notes:
        print(note)
    for fault in result.faults:
        print(fault, file=sys.stderr)
    trained = {preset.clip.bucket(0, 1), preset.clip.bucket(1, 0)}
    for clip_size in sorted(result.sizes - trained):
        print(
            f"note: clips of {_shown(clip_size)}; preset {preset.name!r} trains on {' or '.join(map(_shown, sorted(trained)))}: "
            f"import with --size preset, or set clip.frames, clip.short_side and clip.long_side"
        )
    kinds = Counter("disparity" if "read as disparity" in note else "z-depth" for note in result.notes)
    print(
        f"{args.dataset}: {result.clips} clips of {result.samples} samples ({result.kept} unchanged), "
        f"{' and '.join(f'{n} with {kind}' for kind, n in kinds.items())}, {len({f.sample for f in result.faults})} left out"
    )
    return 0


def _export(args: argparse.Namespace, settings: Settings) -> int:
    source = VideoSource(args.videos or settings.videos, Store(args.data or settings.data))
    count = export_guide(
        args.dataset,
        args.folder,
        None if args.without_videos else source,
        args.split,
        args.camera_numbers,
        progress=lambda rows: tqdm(rows, desc="export", unit="clip", disable=None),
    )
    print(f"{args.folder}: {count} clips")
    return 0


if __name__ == "__main__":
    sys.exit(main())
