"""Requests for worlds in a folder -> worlds of the finished stage 2, free of Dagster."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np

from fw_model.errors import MissingInput
from fw_model.export.pictures import depth_colours, depth_range
from fw_model.export.world import World
from fw_model.files import write_text
from fw_model.generate import FantasyWorldPipeline
from fw_model.generate.request import BadRequest, prepare
from fw_model.generate.requests_file import Job, is_there, read_requests, saved_with
from fw_model.metrics import relative_pose_errors
from fw_model.train.trained import check_trained
from fw_pipeline.steps.settings import Settings
from fw_pipeline.steps.training_plan import plan_training

PICTURE_SIDE = 220  # pixels of a frame in a world's picture


@dataclass(frozen=True)
class Requests:
    """Every request of the folder's lists, by key, and the lines that are none."""

    jobs: dict[str, Job] = field(default_factory=dict)
    bad: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Made:
    """One world that is there now, or why it is not."""

    key: str
    folder: Path
    fault: str = ""
    kept: bool = False  # it was there
    numbers: dict[str, float] = field(default_factory=dict)
    picture: bytes = b""  # PNG below 100 kB


def read_folder(settings: Settings) -> Requests:
    """All `*.jsonl` of `settings.requests`; a request's key is its list's name and its own. MissingInput without a list."""
    lists = sorted(settings.requests.glob("*.jsonl")) if settings.requests.is_dir() else []
    if not lists:
        raise MissingInput(
            f"no lists of requests (*.jsonl) in {settings.requests}",
            'Write one; a line looks like {"name": "room", "prompt": "a room", "trajectory": "pan_left"} (docs/generate.md)',
        )
    found = Requests()
    for path in lists:
        jobs, bad = read_requests(path, settings.data / "worlds" / path.stem)
        found.bad.extend(bad)
        found.jobs.update({f"{path.stem}.{job.name}": job for job in jobs})
    return found


def make_worlds(settings: Settings, requests: Requests, keys: Sequence[str]) -> Iterator[Made]:
    """The worlds of some requests, one after the other; one that fails stops no other. What is there is kept.

    Raises MissingInput when stage 2 has not finished.
    """
    plan = plan_training(settings, "stage2")
    result = plan.result()
    if result is None:
        raise MissingInput(f"stage2 has not finished in {plan.output}", "Run: dagster job execute -j stage2_training")
    checkpoint = plan.output / str(result["checkpoint"])
    metadata = check_trained(checkpoint, "stage2")
    pipeline: FantasyWorldPipeline | None = None
    for key in keys:
        if key not in requests.jobs:
            yield Made(key, settings.data / "worlds", f"no request of that name is in {settings.requests} any more")
            continue
        job = requests.jobs[key]
        try:
            prepared = prepare(job.request, metadata.preset.clip)
        except BadRequest as error:
            yield Made(key, job.folder, str(error))
            continue
        if is_there(job, prepared, metadata.identity):
            yield Made(key, job.folder, kept=True)
            continue
        if pipeline is None:
            pipeline = FantasyWorldPipeline.from_pretrained(checkpoint, device=settings.device)
            pipeline.embed(text for one in keys if one in requests.jobs for text in requests.jobs[one].texts)
        (world,) = pipeline.run([prepared])
        saved_with(world, prepared, metadata.identity).save(job.folder)
        yield Made(key, job.folder, numbers=numbers_of(world), picture=contact_sheet(world))


def numbers_of(world: World) -> dict[str, float]:
    """What a look at the world says: sizes of its scene, and how far its own cameras are from the path asked for."""
    known = world.depth[world.depth > 0]
    numbers = {"frames": float(len(world.video)), "median_depth": float(known.median()) if len(known) else 0.0}
    if world.requested is not None:
        rotation, direction = relative_pose_errors(world.cameras.w2c.numpy(), world.requested.w2c.numpy())
        numbers |= {"rotation_degrees": float(rotation.mean()), "direction_degrees": float(direction.mean())}
    return {name: value for name, value in numbers.items() if np.isfinite(value)}


def contact_sheet(world: World, frames: int = 3) -> bytes:
    """Frames from first to last above their depth, as a PNG below 100 kB."""
    near, far = depth_range(world.depth)
    chosen = np.unique(np.rint(np.linspace(0, len(world.video) - 1, frames)).astype(int))
    columns = [np.vstack([world.video[t].numpy(), depth_colours(world.depth[t].numpy(), near, far)]) for t in chosen]
    side = PICTURE_SIDE
    while True:
        scale = side / max(world.video.shape[1:3])
        size = [max(1, round(length * scale)) for length in columns[0].shape[1::-1]]
        sheet = np.hstack([cv2.resize(column, size, interpolation=cv2.INTER_AREA) for column in columns])
        png = bytes(cv2.imencode(".png", np.ascontiguousarray(sheet[..., ::-1]))[1])
        if len(png) < 100_000:
            return png
        side = side * 3 // 4  # noise hardly compresses


def write_example(settings: Settings) -> Path | None:
    """A list with one request: the first accepted clip's first frame, its prompt, and a turn around it. None without a clip."""
    from fw_pipeline.annotate.clips import read_frames
    from fw_pipeline.steps.pipeline import Pipeline
    from fw_pipeline.steps.review import finished_clips

    pipeline = Pipeline(settings)
    for key, clip, _ in finished_clips(pipeline):
        frame = read_frames(pipeline.video_path(key), clip, clip.height, clip.width)[0]
        settings.requests.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(settings.requests / "first.png"), np.ascontiguousarray(frame[..., ::-1]))
        request = {
            "name": "first",
            "prompt": pipeline.prompt_of(key) or "a room",
            "image": "first.png",
            "trajectory": "orbit_right",
            "height": clip.height,
            "width": clip.width,
            "steps": 20,
        }
        path = settings.requests / "demo.jsonl"
        write_text(path, json.dumps(request) + "\n")
        return path
    return None
