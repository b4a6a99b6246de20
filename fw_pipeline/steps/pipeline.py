"""The steps from a video to what is packed, one method each, free of Dagster.

    clips -> geometry -> depth -> pack (see `packing`)
         \\-> latents ----------/

A step does one video at a time, skips it when its result is already there and made from the same inputs, and either
finishes it, sets the video or single clips aside with a reason (`VideoSetAside`, `ClipSetAside`), or raises.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import astuple
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fw_model.config import Preset
from fw_model.data.online import encode_video
from fw_model.errors import ANNOTATE_VIDEOS, MissingInput, did_you_mean
from fw_model.files import file_hash, printable, whole_file, write_json
from fw_pipeline.annotate import clips as clip_io
from fw_pipeline.annotate import quality
from fw_pipeline.annotate.audit.verdict import AUDIT_VERSION
from fw_pipeline.annotate.engines import require_device
from fw_pipeline.annotate.folder import why_outside
from fw_pipeline.annotate.lens import calibration_files
from fw_pipeline.annotate.shots import SHOTS_VERSION
from fw_pipeline.annotate.types import (
    Clip,
    ClipGeometry,
    ClipSetAside,
    DepthEngine,
    GeometryEngine,
    Measured,
    VideoSetAside,
)
from fw_pipeline.annotate.whole_video import WholeVideo
from fw_pipeline.steps.inventory import PUT_VIDEOS, equal_bytes, require_folder
from fw_pipeline.steps.prompts import PromptError, Prompts
from fw_pipeline.steps.results import EncodedClip, EncodedText, PicturesClip, finish_clip
from fw_pipeline.steps.settings import Settings
from fw_pipeline.steps.store import (
    ClipStatus,
    Done,
    StepName,
    Store,
    load_arrays,
    save_arrays,
    write_done,
)
from fw_pipeline.steps.video_files import unreadable

CODE_VERSION = 3  # raise when a step's results change for the same inputs


class Pipeline:
    """All steps under one configuration. Models are built on first use and kept for the following videos."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.preset: Preset = settings.load_preset()
        self.store = Store(settings.data)
        self.prompts = Prompts(settings.videos)
        # The dataset holds pictures, no latents or embeddings: they are encoded while training.
        self.pictures = self.preset.encode_online()
        self.encoder_ids = self.preset.encoders.identities(self.preset.model.wan.text_len)
        self._hashes: dict[str, str] = {}
        self._unreadable: dict[str, str] = {}

    @cached_property
    def geometry_engine(self) -> GeometryEngine:
        return self.settings.geometry.build(self.settings.device, self.settings.dtype)

    @cached_property
    def depth_engine(self) -> DepthEngine:
        return self.settings.depth.build(self.settings.device, self.settings.dtype)

    @cached_property
    def encoders(self) -> Any:
        from fw_model.model.encoders import Encoders

        return Encoders.from_config(self.preset.encoders, self.preset.model.wan.text_len, self.settings.device)

    @cached_property
    def videos(self) -> dict[str, str]:
        """Video key -> path relative to the videos folder, for every file that looks like a video (listed once)."""
        folder = require_folder(self.settings.videos)
        return {clip_io.video_key(path): path for path in clip_io.find_videos(folder, self.settings.linked_folders)}

    @cached_property
    def copies(self) -> dict[str, str]:
        """Keys of the videos whose bytes another one has, too -> that one's key."""
        root, links = self.settings.videos, self.settings.links
        # One that is set aside for its name or for where it is must not be the one that is kept.
        keys = {
            path: key
            for key, path in self.videos.items()
            if printable(path) == path and not why_outside(root / path, root, links)
        }
        same = equal_bytes(root, keys, lambda path: self._hash(keys[path]))
        return {keys[path]: keys[kept] for path, kept in same.items()}

    def require_videos(self) -> dict[str, str]:
        """`videos`, or MissingInput when the folder has none."""
        if not self.videos:
            raise MissingInput(f"no videos in {self.settings.videos}", PUT_VIDEOS)
        return self.videos

    # ---- the steps -------------------------------------------------------------------------------------------------

    def run(self, step: StepName, key: str) -> Done:
        """Bring one step of one video up to date and return its marker.

        Raises MissingInput when the step before it has not run. Any other exception is a fault of the step: nothing is
        written and the old result, if any, stays.
        """
        wanted = self.fingerprint(step, key)
        done = self.store.done(step, key)
        if step == "latents":
            self._embed_texts(key)
        if done is not None and done.fingerprint == wanted:
            return done
        started = time.perf_counter()
        work: Callable[[str, Path], Done] = {
            "clips": self._clips,
            "geometry": self._geometry,
            "depth": self._depth,
            "latents": self._latents,
        }[step]
        with self.store.writing(step, key) as folder:
            done = work(key, folder).model_copy(update={"fingerprint": wanted, "seconds": time.perf_counter() - started})
            write_done(folder, done)
        return done

    def is_stale(self, step: StepName, key: str) -> bool:
        """True when the step's result is missing or was made from other inputs, settings or code."""
        done = self.store.done(step, key)
        try:
            if done is None or done.fingerprint != self.fingerprint(step, key):
                return True
        except (MissingInput, OSError):  # of an OSError the step itself will tell
            return True
        return step == "latents" and any(not self.text_file(prompt).is_file() for prompt in self.texts_of(key))

    def fingerprint(self, step: StepName, key: str) -> str:
        """Hash of everything the step's result depends on."""
        if step == "clips":
            parts: list[Any] = [SHOTS_VERSION, self._hash(key), self.preset.clip.model_dump(mode="json"), self._calibration(key)]
            # Only what is so is named, so that no other video's result is stale.
            parts += [{"same as": self.copies[key]}] if key in self.copies else []
            parts += [links] if any(links := astuple(self.settings.links)) else []
        elif step == "geometry":
            engine = made_by(self.geometry_engine)
            parts = [self.marker("clips", key).fingerprint, engine, self.settings.annotation_long_side, AUDIT_VERSION]
        elif step == "depth":
            parts = [self.marker("geometry", key).fingerprint, made_by(self.depth_engine)]
        else:
            ids = ["pictures"] if self.pictures else [self.encoder_ids[part] for part in ("vae", "image")]
            parts = [self.marker("clips", key).fingerprint, *ids, self._prompt_fault(key)]
        return hashlib.sha256(json.dumps([CODE_VERSION, step, *parts], sort_keys=True).encode()).hexdigest()[:16]

    def _clips(self, key: str, folder: Path) -> Done:
        done = Done(video=self.shown(key), fingerprint="", made_by=f"clips:{CODE_VERSION}")
        try:
            self._hash(key)
            if reason := self._unreadable.get(key):
                raise VideoSetAside(reason)
            clips = clip_io.cut_clips(self.video_path(key), self.settings.videos, self.preset.clip, key, self.settings.links)
            if kept := self.copies.get(key):  # last: a file that is no good has its own reason
                raise VideoSetAside(f"{self.shown(key)}: the same bytes as {self.shown(kept)}, and kept once")
        except VideoSetAside as error:
            return done.model_copy(update={"set_aside": printable(str(error))})
        (folder / "clips.json").write_text(json.dumps(clip_io.clips_to_json(clips)), encoding="utf-8")
        return done.model_copy(update={"clips": [ClipStatus(clip_id=clip.clip_id) for clip in clips]})

    def _geometry(self, key: str, folder: Path) -> Done:
        engine = self.geometry_engine
        require_device(self.settings.device)
        whole = WholeVideo(engine, self.clips_of(key, self.marker("clips", key)), lambda clip: self._frames(key, clip))

        def annotate(clip: Clip) -> Measured:
            geometry, measured = whole.accept(clip)
            save_arrays(folder / f"{clip.clip_id}.npz", geometry)
            return measured

        return self._each_clip("clips", key, made_by(engine), annotate)

    def _depth(self, key: str, folder: Path) -> Done:
        engine = self.depth_engine
        require_device(self.settings.device)
        before = {status.clip_id: Measured(status.quality, status.motion) for status in self.marker("geometry", key).clips}

        def annotate(clip: Clip) -> Measured:
            geometry = load_arrays(self.store.folder("geometry", key) / f"{clip.clip_id}.npz", ClipGeometry)
            result = engine.estimate(self._frames(key, clip), geometry)
            numbers = quality.check_depth(result, geometry)
            finished = finish_clip(clip, geometry, result)
            save_arrays(folder / f"{clip.clip_id}.npz", finished)
            valid = float((finished.depth > 0).mean())
            return before[clip.clip_id] | Measured(numbers | {"valid_fraction": valid, "scale": float(finished.scale)})

        return self._each_clip("geometry", key, made_by(engine), annotate)

    def _latents(self, key: str, folder: Path) -> Done:
        made_by = "pictures" if self.pictures else self.preset.encoders.weights.identity
        if fault := self._prompt_fault(key):
            return Done(video=self.marker("clips", key).video, fingerprint="", made_by=made_by, set_aside=fault)

        def encode(clip: Clip) -> Measured:
            frames = clip_io.read_frames(self.video_path(key), clip, clip.height, clip.width)
            if self.pictures:
                pictures = PicturesClip(encode_video(frames, clip.fps))
                save_arrays(folder / f"{clip.clip_id}.npz", pictures)
                return Measured({"video_bytes": float(pictures.video.nbytes)})
            encoded = EncodedClip(self.encoders.encode_video(frames), self.encoders.encode_image(frames[0]))
            save_arrays(folder / f"{clip.clip_id}.npz", encoded)
            return Measured({"latent_std": float(encoded.latents.astype(np.float32).std())})

        return self._each_clip("clips", key, made_by, encode)

    def _embed_texts(self, key: str) -> None:
        """Embed the video's prompt and the empty one, unless that was done before, for this or any other video."""
        for prompt in self.texts_of(key):
            file = self.text_file(prompt)
            if not file.is_file():
                with whole_file(file) as temporary:
                    save_arrays(temporary, EncodedText(self.encoders.encode_text(prompt)))

    def texts_of(self, key: str) -> list[str]:
        """The prompts whose embeddings a video's clips need: its own and the empty one."""
        return [] if self.pictures or self._prompt_fault(key) else sorted({"", self.prompt_of(key)})

    def text_file(self, prompt: str) -> Path:
        """Where a prompt's embedding lies."""
        made_from = json.dumps([CODE_VERSION, self.encoder_ids["text"], prompt])
        return self.store.text(hashlib.sha256(made_from.encode()).hexdigest()[:32])

    def _each_clip(self, source: StepName, key: str, made_by: str, work: Callable[[Clip], Measured]) -> Done:
        """Run `work` on every clip that the step before let through; a ClipSetAside sets that clip aside, no other."""
        before = self.marker(source, key)
        done = Done(video=before.video, fingerprint="", made_by=made_by, set_aside=before.set_aside)
        statuses = []
        for clip in self.clips_of(key, before):
            try:
                measured, reason = work(clip), None
            except ClipSetAside as error:
                measured, reason = error.measured, str(error)
            numbers = {name: float(value) for name, value in measured.numbers.items()}
            statuses.append(ClipStatus(clip_id=clip.clip_id, set_aside=reason, quality=numbers, motion=measured.motion))
        statuses += [status for status in before.clips if status.set_aside]
        return done.model_copy(update={"clips": statuses})

    def misspelt_prompts(self) -> dict[str, str]:
        """Videos that tables of prompts name and the folder lacks -> where, and the nearest name there is."""
        return self.prompts.unknown(self.videos.values())

    # ---- reading what is there -------------------------------------------------------------------------------------

    def clips_of(self, key: str, done: Done) -> list[Clip]:
        """The clips of a video that `done`'s step did not set aside."""
        path = self.store.folder("clips", key) / "clips.json"
        if not path.is_file():
            return []
        aside = {status.clip_id for status in done.clips if status.set_aside}
        clips = clip_io.clips_from_json(json.loads(path.read_text(encoding="utf-8")))
        return [clip for clip in clips if clip.clip_id not in aside]

    def marker(self, step: StepName, key: str) -> Done:
        """The marker of a finished step of a video; MissingInput when it has not been made."""
        done = self.store.done(step, key)
        if done is None:
            raise MissingInput(f"{key}: {step} has not been made yet", f"Run: {ANNOTATE_VIDEOS}")
        return done

    def video_path(self, key: str) -> Path:
        """The video's file. MissingInput when it is gone."""
        return self.settings.videos / self._video(key)

    def shown(self, key: str) -> str:
        """A video's path inside the folder as it can be logged and stored."""
        return printable(self._video(key))

    def _video(self, key: str) -> str:
        if key not in self.videos:
            raise MissingInput(
                f"{key}: its video is not, or no longer, in {self.settings.videos}{did_you_mean(key, self.videos)}",
                "Put it back; the next launch retires its partition",
            )
        return self.videos[key]

    def _hash(self, key: str) -> str:
        """xxh64 of the video file, or why it cannot be read (kept in `_unreadable`), which is tried again by every process.

        It is read again only when its size or time of change is another than when it was read.
        """
        if key not in self._hashes:
            path, file = self.video_path(key), self.store.hash_of(key)
            if reason := unreadable(path):
                self._unreadable[key] = self._hashes[key] = reason
                return reason
            found = path.stat()
            stamp = {"bytes": found.st_size, "mtime_ns": found.st_mtime_ns}
            known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
            if {name: known.get(name) for name in stamp} != stamp:
                known = {**stamp, "xxh64": file_hash(path)[1]}
                write_json(file, known)
            self._hashes[key] = known["xxh64"]
        return self._hashes[key]

    def _calibration(self, key: str) -> list[str]:
        """Name and xxh64 of the files beside the video that may hold its lens."""
        return [f"{path.name}:{file_hash(path)[1]}" for path in calibration_files(self.video_path(key))]

    def prompt_of(self, key: str) -> str:
        """A video's prompt. Raises PromptError when it cannot be read."""
        return self.prompts.of(self._video(key))

    def _prompt_fault(self, key: str) -> str:
        """Why the video's prompt cannot be read; "" when it can."""
        try:
            self.prompt_of(key)
        except PromptError as error:
            return str(error)
        return ""

    def _frames(self, key: str, clip: Clip) -> np.ndarray:
        """The clip's frames at the annotation size [T, h, w, 3] uint8."""
        height, width = clip_io.annotation_size(clip, self.settings.annotation_long_side)
        return clip_io.read_frames(self.video_path(key), clip, height, width)


def made_by(engine: GeometryEngine | DepthEngine) -> str:
    """Engine and version, as markers and the manifest name them."""
    return f"{engine.name}:{engine.version}"
