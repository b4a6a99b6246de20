"""Worlds from the command line:

    python -m fw_model.generate --checkpoint FILE --prompt "a room" --image first.png --trajectory orbit_360deg --out DIR
    python -m fw_model.generate --checkpoint FILE --requests worlds.jsonl --out DIR
    python -m fw_model.generate preview --image first.png --trajectory orbit_right --depth depth.npy --out path.mp4

FILE is a stage 2 checkpoint, or the folder of a run. With `--preset tiny` and no checkpoint the model is drawn from its seed:
that tries the way, and the videos are noise. A `.jsonl` has a request a line, with the names of the options below:

    {"name": "room", "prompt": "a room", "trajectory": "pan_left"}

Each goes into DIR/NAME, and what is whole there and was asked for alike is not made again. Exit code 0 when every world was made
or was there, 1 when one was not, 2 on wrong usage.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fw_model.config import load_preset
from fw_model.errors import Explained, explain_errors
from fw_model.generate.pipeline import FantasyWorldPipeline
from fw_model.generate.request import parse_request
from fw_model.generate.requests_file import Job, make_all, read_requests
from fw_model.train.sampling import SCHEDULERS
from fw_model.train.trained import check_trained, find_checkpoint


class NoModel(Explained, ValueError):
    """Neither a checkpoint nor a preset that needs none."""


@explain_errors
def main(argv: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else list(argv)
    if words[:1] == ["preview"]:
        from fw_model.generate import preview

        return preview.main(words[1:])
    parser = _parser()
    args = parser.parse_args(words)
    if (args.prompt is None) == (args.requests is None):
        parser.error("give --prompt, or --requests with a list of them")
    given = {name: value for name, value in vars(args).items() if name in REQUEST and value is not None}
    if args.requests is not None:
        jobs, bad = read_requests(args.requests, args.out, given)
    else:
        jobs, bad = [Job(args.out.name, args.out, parse_request(given, "request"))], []
    for fault in bad:
        print(fault, file=sys.stderr)
    if args.checkpoint is None:  # everything is checked before the model is built
        if args.preset is None:
            raise NoModel("no model: --checkpoint names none", "Train stage 2 first, or try the way with --preset tiny")
        preset = load_preset(args.preset, args.set)
        print(f"note: no checkpoint: preset {preset.name!r} untrained, from its seed; the videos will be noise", file=sys.stderr)
    else:
        preset = check_trained(find_checkpoint(args.checkpoint, args.weights), "stage2", args.base).preset
    failed = make_all(jobs, preset.clip, lambda: _pipeline(args, preset), str(args.checkpoint or f"seeded:{preset.name}"))
    return 1 if failed or bad else 0


REQUEST = (
    "prompt",
    "negative_prompt",
    "image",
    "trajectory",
    "pose_file",
    "num_frames",
    "height",
    "width",
    "steps",
    "guidance_scale",
    "shift",
    "scheduler",
    "camera_scale",
    "seed",
)


def _pipeline(args: argparse.Namespace, preset: Any) -> FantasyWorldPipeline:
    if args.checkpoint is None:
        return FantasyWorldPipeline.seeded(preset, args.device)
    return FantasyWorldPipeline.from_pretrained(args.checkpoint, args.base, args.device, args.weights, args.offload)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fw_model.generate", description="Make worlds from prompts and camera paths.")
    model = parser.add_argument_group("the model")
    model.add_argument("--checkpoint", type=Path, help="step-N.safetensors of stage 2, or the folder of a run")
    model.add_argument("--base", help="where the base's weights lie, if elsewhere than in training")
    model.add_argument("--weights", choices=("raw", "ema"), help="a step's own, or their average (default: as the file is named)")
    model.add_argument("--preset", help="without a checkpoint: untrained, from its seed")
    model.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override of that preset")
    model.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    model.add_argument(
        "--offload", choices=("model", "none"), default="model", help="model (default): one network at a time on the device"
    )
    world = parser.add_argument_group("the world")
    world.add_argument("--prompt")
    world.add_argument("--requests", type=Path, metavar="FILE.jsonl", help="a request a line; options given here hold for all")
    world.add_argument("--out", type=Path, required=True, metavar="DIR", help="the world's folder; of a list, the worlds' parent")
    world.add_argument("--negative-prompt")
    world.add_argument("--image", type=Path, help="the first picture")
    world.add_argument("--trajectory", help="a camera move by name: orbit_360deg, pan_left, ...")
    world.add_argument("--pose-file", type=Path, help="a camera path: rows of 12, 16 or 19 numbers")
    world.add_argument("--num-frames", type=int, help="4k+1 (default: as trained)")
    world.add_argument("--height", type=int, help="pixels, a multiple of 16 (default: as trained)")
    world.add_argument("--width", type=int)
    world.add_argument("--steps", type=int, help="of denoising (default 50)")
    world.add_argument("--guidance-scale", type=float, help="towards the prompt (default 5; 1: one pass a step)")
    world.add_argument("--shift", type=float, help="of the noise schedule (default 5)")
    world.add_argument("--scheduler", choices=SCHEDULERS, help="default euler")
    world.add_argument(
        "--camera-scale", type=_scale, help="times the path's translations, or 'scene': the scene's mean distance (default 1)"
    )
    world.add_argument("--seed", type=int, help="default 0")
    return parser


def _scale(text: str) -> float | str:
    return text if text == "scene" else float(text)


if __name__ == "__main__":
    sys.exit(main())
