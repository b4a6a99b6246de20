"""Worlds while training: held-out clips' prompts, first pictures and paths, generated every so often with the weights of then.

What they are made from never changes, noise included: one sees the weights change. Nothing of it touches training's draws.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fw_model.cameras import Cameras, control_latents, decode_pose, relative_to_first
from fw_model.data.dataset import collate
from fw_model.data.schema import Batch
from fw_model.export.pictures import depth_colours, depth_range, jpeg
from fw_model.export.world import World
from fw_model.files import write_bytes
from fw_model.model.encoders import Encoders
from fw_model.model.fantasy_world import FantasyWorldOutput
from fw_model.train.objective import SCHEDULE, autocast, generator_for
from fw_model.train.run import Run
from fw_model.train.sampling import sample

log = logging.getLogger(__name__)
GUIDANCE, SHIFT = 5.0, 5.0  # as generation's own defaults


def samples_folder(output: Path, step: int) -> Path:
    """Where the worlds of a step lie."""
    return output / "samples" / f"step-{step:06d}"


def newest_sheets(output: Path) -> tuple[int, dict[str, bytes]]:
    """(step, clip id -> JPEG of frames above depth) of the newest worlds of a run; (0, {}) where it makes none."""
    folders = sorted((output / "samples").glob("step-*")) if (output / "samples").is_dir() else []
    for folder in reversed(folders):
        if found := {path.stem: path.read_bytes() for path in sorted(folder.glob("*.jpg"))}:
            return int(folder.name.removeprefix("step-")), found
    return 0, {}


@torch.no_grad()
def write_samples(run: Run) -> None:
    """Generate and save, on the main process, and give the trackers a picture of each.

    Every process must call it: a sharded model is gathered by all together.
    """
    main = run.accelerator.is_main_process
    made: list[tuple[Batch, Tensor, FantasyWorldOutput]] = []
    run.model.eval()
    with run.average.in_place() if run.average is not None else nullcontext():
        for index in range(min(run.config.sample_clips, len(run.validation_clips))):
            batch = collate([run.validation_clips[index]])
            made.append((batch, *_denoise(run, batch.to(run.accelerator.device), index)))
    run.model.train()
    if main:
        encoders = Encoders.from_config(run.preset.encoders, run.preset.model.wan.text_len, str(run.accelerator.device), ["vae"])
        for batch, latents, output in made:
            world = _world(run, batch, encoders.decode_video(latents[0].cpu().numpy(), tile=256), output)
            folder = samples_folder(run.output, run.progress.step)
            world.save(folder / batch.clip_ids[0])
            picture = sheet(world)
            write_bytes(folder / f"{batch.clip_ids[0]}.jpg", jpeg(picture, longest=1600))
            _show(run, batch.clip_ids[0], picture)
        log.info("step %d: %d worlds in %s", run.progress.step, len(made), samples_folder(run.output, run.progress.step))
    run.accelerator.wait_for_everyone()


def _denoise(run: Run, batch: Batch, index: int) -> tuple[Tensor, FantasyWorldOutput]:
    """(latents, geometry of the last step) of one clip's prompt, first picture and path."""
    config, device = run.config, batch.latents.device
    image_latents = torch.zeros_like(batch.latents)
    image_latents[:, :, 0] = batch.latents[:, :, 0]
    with torch.autocast(device.type, enabled=False):
        camera = control_latents(batch.w2c, batch.intrinsics, *batch.depth.shape[-2:])
    noise = torch.randn(batch.latents.shape, generator=generator_for("samples", config.seed, index)).to(device)
    last: list[FantasyWorldOutput] = []

    def velocity(step: int, latents: Tensor, sigma: float) -> Tensor:
        timestep = torch.full((1,), SCHEDULE.steps * sigma, device=device)
        found = []
        for text in (batch.text, run.empty_text[None].to(batch.text)):
            with autocast(config, device):  # the whole pass: a sharded model's hooks are on it
                output = run.model(latents, image_latents, timestep, text, batch.image, camera)
            found.append(output.velocity.float())
            if text is batch.text:
                last[:] = [output]
        return found[1] + GUIDANCE * (found[0] - found[1])

    return sample(velocity, noise, config.sample_steps, SHIFT), last[0]


def _world(run: Run, batch: Batch, video: np.ndarray, output: FantasyWorldOutput) -> World:
    height, width = batch.depth.shape[-2:]
    w2c, intrinsics = decode_pose(output.pose_encodings[-1][0].double().cpu(), height, width)
    points = output.points[0].double().cpu() @ w2c[0, :, :3].mT + w2c[0, :, 3]
    path = Cameras(relative_to_first(batch.w2c[0].double()).float(), batch.intrinsics[0].float(), (height, width))
    return World(
        video=torch.from_numpy(video),
        depth=output.depth[0].float().cpu(),
        depth_conf=output.depth_conf[0].float().cpu(),
        points=points.float(),
        points_conf=output.points_conf[0].float().cpu(),
        cameras=Cameras(relative_to_first(w2c).float(), intrinsics.float(), (height, width)),
        requested=path,
        fps=run.preset.clip.fps,
        meta={"clip": batch.clip_ids[0], "step": run.progress.step, "run": run.identity.name},
    )


def sheet(world: World, frames: int = 5) -> np.ndarray:
    """Frames from first to last above their depth, [2 H, frames W, 3] uint8."""
    near, far = depth_range(world.depth)
    chosen = np.unique(np.rint(np.linspace(0, len(world.video) - 1, frames)).astype(int))
    columns = [np.vstack([world.video[t].numpy(), depth_colours(world.depth[t].numpy(), near, far)]) for t in chosen]
    return np.hstack(columns)


def _show(run: Run, name: str, picture: np.ndarray) -> None:
    for tracker in run.accelerator.trackers:
        if hasattr(tracker, "log_images"):  # those that can show pictures; tensorboard wants to be told the order of axes
            order = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({f"samples/{name}": picture[None]}, step=run.progress.step, **order)
