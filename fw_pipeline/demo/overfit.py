"""`make overfit`: the tiny preset on one rendered clip reaches the training guide's thresholds, in minutes on a laptop.

    python -m fw_pipeline.demo.overfit [--folder DIR] [key=value ...]

Proof that losses, targets and heads can learn, through the real path: a demo video with exact depth and cameras is rendered,
cut, encoded and packed into shards; `fw_model.train` trains stage 1 on them; the checkpoint it wrote is loaded into a new
model and measured on the clip. Noise, timesteps and clip of that measurement are fixed, and pose tokens are withheld, as at
every validation. Annotation has no part in it: its errors would hide those of the training (`make demo` has both).

Prints one JSON object last. Exits 0 when every loss is below its threshold and less than half of what it was before training
(the camera loss of a short clip starts below its threshold), 1 with those that are not.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fw_model.config import Preset, load_preset
from fw_model.data.dataset import ClipDataset, collate
from fw_model.data.schema import ClipRecord
from fw_model.data.shard_writer import ShardWriter
from fw_model.errors import explain_errors
from fw_model.model.encoders import Encoders
from fw_model.model.fantasy_world import FantasyWorld
from fw_model.train.checkpoints import load_checkpoint
from fw_model.train.loop import EXIT_INTERRUPTED, Interrupted, train
from fw_model.train.objective import LOSS_NAMES, TARGETS, compute_losses, predict, validation_draws
from fw_pipeline.annotate import clips as clip_io
from fw_pipeline.annotate.truth import ground_truth_for_clip, load_ground_truth
from fw_pipeline.annotate.types import Clip, ClipDepth, ClipGeometry
from fw_pipeline.demo.render import render_demo
from fw_pipeline.demo.scenes import SHOTS, VideoPlan
from fw_pipeline.steps.results import finish_clip

# The tiny preset, told to learn one clip by heart.
OVERRIDES = (
    "stage1.steps=400",
    "stage1.global_batch=1",
    "stage1.batch_per_device=1",
    "stage1.learning_rate=1.0e-3",
    "stage1.lr_schedule=cosine",
    "stage1.pose_probability=0",  # the measurement withholds the pose tokens, so training does too
    "stage1.validation_clips=1",
    "stage1.validate_every=50",
    "stage1.save_every=400",
    "stage1.log_every=25",
    "stage1.trackers=[]",
)
DRAWS = 16  # noises and timesteps, evenly over the schedule, that the losses are means over
VIDEO = next(plan for plan in SHOTS if plan.name == "room_dolly")


def overfit(folder: Path, preset: Preset, plan: VideoPlan = VIDEO) -> dict[str, Any]:
    """Render, pack, train and measure below `folder`; a run that is there already goes on or is measured again.

    Returns loss name -> value, and `before` training the same; clip, steps and seconds.
    """
    started = time.perf_counter()
    clip_id = pack_true_clip(folder, preset, plan)
    before = measure(preset, folder / "dataset", None)
    result = train(preset, "stage1", folder / "dataset", folder / "stage1")
    after = measure(preset, folder / "dataset", folder / "stage1" / result.checkpoint)
    seconds = time.perf_counter() - started
    return {**after, "before": before, "clip": clip_id, "steps": result.steps, "seconds": round(seconds, 1)}


def missed(found: dict[str, Any]) -> list[str]:
    """What `overfit` did not reach, in words."""
    limits = {name: min(target, found["before"][name] / 2) for name, target in TARGETS.items()}
    return [f"{name} {found[name]:.4g}, wanted < {limit:.4g}" for name, limit in limits.items() if not found[name] < limit]


def pack_true_clip(folder: Path, preset: Preset, plan: VideoPlan = VIDEO) -> str:
    """Render `plan` into `folder`/videos and pack its first clip, with its exact geometry, into `folder`/dataset.

    Returns the clip's id.
    """
    videos = folder / "videos"
    (video,) = render_demo(videos, (plan,), workers=1)
    clip = clip_io.cut_clips(video, videos, preset.clip, clip_io.video_key(video.name))[0]
    frames = clip_io.read_frames(video, clip, clip.height, clip.width)
    text_len = preset.model.wan.text_len
    encoders, identities = Encoders.from_config(preset.encoders, text_len), preset.encoders.identities(text_len)
    geometry, depth = true_annotation(video, clip)
    finished = finish_clip(clip, geometry, depth)
    record = ClipRecord(
        clip_id=clip.clip_id,
        video=clip.video,
        fps=clip.fps,
        scale=float(finished.scale),
        prompt="",
        arrays={
            "latents": encoders.encode_video(frames),
            "image": encoders.encode_image(frames[0]),
            **{name: getattr(finished, name) for name in ("depth", "confidence", "intrinsics", "w2c")},
        },
        quality={},
        versions={"geometry": "truth", "depth": "truth", **identities},
    )
    with ShardWriter(folder / "dataset") as writer:
        writer.add(record, "train")
        writer.add_text("", encoders.encode_text(""), identities["text"])
    return clip.clip_id


def true_annotation(video: Path, clip: Clip) -> tuple[ClipGeometry, ClipDepth]:
    """What an annotator without error would say of a rendered clip, at the bucket's size and in metres."""
    truth = load_ground_truth(video)
    if truth is None:
        raise ValueError(f"{video}: no ground truth beside it")
    depth, intrinsics, w2c = ground_truth_for_clip(truth, clip)
    transform = clip_io.FrameTransform(clip.source_height, clip.source_width, clip.height, clip.width)
    depth = transform.depth_to_target(depth)
    sure, ones = np.ones_like(depth), np.ones(clip.frames, np.float32)
    geometry = ClipGeometry(
        w2c=w2c,
        intrinsics=transform.intrinsics_to_target(intrinsics),
        depth=depth,
        confidence=sure,
        inlier_ratio=ones,
        reprojection_error=0 * ones,
        interpolated=np.zeros(clip.frames, bool),
    )
    source = np.zeros(clip.frames, np.uint8)
    return geometry, ClipDepth(depth, sure, source=source, scale=ones, shift=0 * ones, inlier_ratio=ones, residual=0 * ones)


@torch.no_grad()
def measure(preset: Preset, dataset: Path, checkpoint: Path | None) -> dict[str, float]:
    """Mean stage 1 losses on the dataset's only clip over `DRAWS` fixed noises and timesteps, without pose tokens.

    checkpoint: of stage 1; None measures the model before any training.
    """
    model = FantasyWorld.from_preset(preset).eval()
    if checkpoint is not None:
        load_checkpoint(checkpoint, model, "stage1", preset)
    batch = collate([ClipDataset(dataset, "train", preset.model.wan.text_len)[0]]).to("cpu")
    sums = dict.fromkeys(LOSS_NAMES["stage1"], 0.0)
    for place in range(DRAWS):
        draws = validation_draws(batch, preset.stage1.seed, place, DRAWS)
        losses = compute_losses(predict(model, batch, draws), batch, draws, "stage1", preset.stage1)
        for name in sums:
            sums[name] += float(losses[name]) / DRAWS
    return sums


@explain_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 0 all reached, 1 not or an error, 75 stopped by a signal."""
    parser = argparse.ArgumentParser(prog="make overfit", description="The tiny preset learns one rendered clip by heart.")
    parser.add_argument("--folder", type=Path, help="keep the video, the dataset and the run here (default: a temporary folder)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted preset keys, e.g. stage1.steps=100")
    args = parser.parse_intermixed_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        preset = load_preset("tiny", [*OVERRIDES, *args.overrides])
        with nullcontext(args.folder) if args.folder else tempfile.TemporaryDirectory() as folder:
            found = overfit(Path(folder), preset)
    except Interrupted as stopped:
        print(f"stopped: {stopped}", file=sys.stderr)
        return EXIT_INTERRUPTED
    for line in missed(found):
        print(f"MISSED  {line}", file=sys.stderr)
    print(json.dumps({"ok": not missed(found), **found, "targets": TARGETS}))
    return 1 if missed(found) else 0


if __name__ == "__main__":
    sys.exit(main())
