"""The steps from a video to the packed dataset, one method each, free of Dagster.

    clips -> geometry -> depth -> pack
         \\-> latents ----------/

A step does one video at a time, skips it when its result is already there and made from the same inputs, and either
finishes it, sets the video or single clips aside with a reason (`RejectedVideo`, `RejectedClip`), or raises.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fw_model.config import Preset
from fw_model.data.online import encode_video
from fw_model.data.schema import ClipRecord
from fw_model.data.shard_writer import ShardWriter
from fw_model.data.splits import assign_splits
from fw_pipeline.annotate import clips as clip_io
from fw_pipeline.annotate import quality
from fw_pipeline.annotate.truth import compare_with_truth
from fw_pipeline.annotate.types import Clip, ClipDepth, ClipGeometry, DepthEngine, GeometryEngine, RejectedClip, RejectedVideo
from fw_pipeline.engines import depth_engine, geometry_engine, require_device
from fw_pipeline.prompts import PromptError, Prompts
from fw_pipeline.settings import Settings
from fw_pipeline.store import ClipStatus, Done, StepName, Store, load_arrays, save_arrays, whole_file, write_done

CODE_VERSION = 1  # raise when a step's results change for the same inputs


class MissingInput(RuntimeError):
    """A step was asked for before the one it needs; the message names the job to run."""


@dataclass(frozen=True)
class FinishedClip:
    """What the depth step stores of a clip: the bucket's size, clip units, ready to pack."""

    depth: np.ndarray  # [T, H, W] float16, 0 = invalid
    confidence: np.ndarray  # [T, H, W] uint8
    intrinsics: np.ndarray  # [T, 3, 3] float32
    w2c: np.ndarray  # [T, 3, 4] float32, first = identity
    scale: np.ndarray  # [] float64, annotator's units per clip unit
    # How each frame's depth came about, as in ClipDepth (1/z = fit_scale * disparity + fit_shift, in the annotator's units).
    source: np.ndarray  # [T] uint8, ClipDepth.SOURCES
    fit_scale: np.ndarray  # [T] float32
    fit_shift: np.ndarray  # [T] float32
    fit_inlier_ratio: np.ndarray  # [T] float32
    fit_residual: np.ndarray  # [T] float32


@dataclass(frozen=True)
class EncodedClip:
    """What the latents step stores of a clip; its prompt's embedding is stored once for all videos that share it."""

    latents: np.ndarray  # [16, F, H/8, W/8] float16
    image: np.ndarray  # [N, C] float16


@dataclass(frozen=True)
class PicturesClip:
    """What the latents step stores of a clip in its place when clips are encoded while training."""

    video: np.ndarray  # [N] uint8, bytes of a lossless mp4 of exactly T frames of H x W


@dataclass(frozen=True)
class EncodedText:
    """What the latents step stores of a prompt."""

    text: np.ndarray  # [L, D] float16


@dataclass
class PackResult:
    """What went into the dataset and what did not."""

    clips: int = 0
    kept: int = 0  # of them, those that were packed before and have not changed: neither read nor written
    bytes_written: int = 0
    quarantined: dict[str, str] = field(default_factory=dict)  # clip id or video -> reason
    not_annotated: list[str] = field(default_factory=list)  # videos some step has not finished yet


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

    @cached_property
    def geometry_engine(self) -> GeometryEngine:
        return geometry_engine(self.settings)

    @cached_property
    def depth_engine(self) -> DepthEngine:
        return depth_engine(self.settings)

    @cached_property
    def encoders(self) -> Any:
        from fw_model.encoders import Encoders

        return Encoders.from_config(self.preset.encoders, self.preset.model.wan.text_len, self.settings.device)

    @cached_property
    def videos(self) -> dict[str, str]:
        """Video key -> path relative to the videos folder, for every file that looks like a video (listed once)."""
        folder = self.settings.videos
        if not folder.is_dir():
            raise MissingInput(f"no videos folder at {folder}; put videos there or set FW_VIDEOS to a folder that has some")
        return {clip_io.video_key(path): path for path in clip_io.find_videos(folder)}

    def require_videos(self) -> dict[str, str]:
        """`videos`, or MissingInput when the folder has none."""
        if not self.videos:
            raise MissingInput(f"no videos in {self.settings.videos}; put some there or set FW_VIDEOS to a folder that has some")
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
        except MissingInput:
            return True
        return step == "latents" and any(not self._text_file(prompt).is_file() for prompt in self._texts_of(key))

    def fingerprint(self, step: StepName, key: str) -> str:
        """Hash of everything the step's result depends on."""
        if step == "clips":
            parts: list[Any] = [self._hash(key), self.preset.clip.model_dump(mode="json")]
        elif step == "geometry":
            parts = [self._input("clips", key).fingerprint, made_by(self.geometry_engine), self.settings.annotation_long_side]
        elif step == "depth":
            parts = [self._input("geometry", key).fingerprint, made_by(self.depth_engine)]
        else:
            ids = ["pictures"] if self.pictures else [self.encoder_ids[part] for part in ("vae", "image")]
            parts = [self._input("clips", key).fingerprint, *ids, self._prompt_fault(key)]
        return hashlib.sha256(json.dumps([CODE_VERSION, step, *parts], sort_keys=True).encode()).hexdigest()[:16]

    def _clips(self, key: str, folder: Path) -> Done:
        video = self.videos[key]
        done = Done(video=video, fingerprint="", made_by=f"clips:{CODE_VERSION}")
        try:
            clips = clip_io.cut_clips(self._path(key), self.settings.videos, self.preset.clip, key)
        except RejectedVideo as error:
            return done.model_copy(update={"rejected": str(error)})
        (folder / "clips.json").write_text(json.dumps(clip_io.clips_to_json(clips)), encoding="utf-8")
        return done.model_copy(update={"clips": [ClipStatus(clip_id=clip.clip_id) for clip in clips]})

    def _geometry(self, key: str, folder: Path) -> Done:
        engine = self.geometry_engine
        require_device(self.settings.device)

        def annotate(clip: Clip) -> dict[str, float]:
            frames = self._frames(key, clip)
            geometry = engine.estimate(frames)
            numbers = quality.check_geometry(geometry)
            save_arrays(folder / f"{clip.clip_id}.npz", geometry)
            return numbers

        return self._each_clip("clips", key, made_by(engine), annotate)

    def _depth(self, key: str, folder: Path) -> Done:
        engine = self.depth_engine
        require_device(self.settings.device)
        measured = {status.clip_id: status.quality for status in self._input("geometry", key).clips}

        def annotate(clip: Clip) -> dict[str, float]:
            geometry = load_arrays(self.store.folder("geometry", key) / f"{clip.clip_id}.npz", ClipGeometry)
            result = engine.estimate(self._frames(key, clip), geometry)
            numbers = quality.check_depth(result, geometry)
            finished = finish_clip(clip, geometry, result)
            save_arrays(folder / f"{clip.clip_id}.npz", finished)
            valid = float((finished.depth > 0).mean())
            return measured[clip.clip_id] | numbers | {"valid_fraction": valid, "scale": float(finished.scale)}

        return self._each_clip("geometry", key, made_by(engine), annotate)

    def _latents(self, key: str, folder: Path) -> Done:
        made_by = "pictures" if self.pictures else self.preset.encoders.weights.identity
        if fault := self._prompt_fault(key):
            return Done(video=self._input("clips", key).video, fingerprint="", made_by=made_by, rejected=fault)

        def encode(clip: Clip) -> dict[str, float]:
            frames = clip_io.read_frames(self._path(key), clip, clip.height, clip.width)
            if self.pictures:
                pictures = PicturesClip(encode_video(frames, clip.fps))
                save_arrays(folder / f"{clip.clip_id}.npz", pictures)
                return {"video_bytes": float(pictures.video.nbytes)}
            encoded = EncodedClip(self.encoders.encode_video(frames), self.encoders.encode_image(frames[0]))
            save_arrays(folder / f"{clip.clip_id}.npz", encoded)
            return {"latent_std": float(encoded.latents.astype(np.float32).std())}

        return self._each_clip("clips", key, made_by, encode)

    def _embed_texts(self, key: str) -> None:
        """Embed the video's prompt and the empty one, unless that was done before, for this or any other video."""
        for prompt in self._texts_of(key):
            file = self._text_file(prompt)
            if not file.is_file():
                file.parent.mkdir(parents=True, exist_ok=True)
                with whole_file(file) as temporary:
                    save_arrays(temporary, EncodedText(self.encoders.encode_text(prompt)))

    def _texts_of(self, key: str) -> list[str]:
        return [] if self.pictures or self._prompt_fault(key) else sorted({"", self._prompt(key)})

    def _text_file(self, prompt: str) -> Path:
        made_from = json.dumps([CODE_VERSION, self.encoder_ids["text"], prompt])
        return self.store.text(hashlib.sha256(made_from.encode()).hexdigest()[:32])

    def _each_clip(self, source: StepName, key: str, made_by: str, work: Callable[[Clip], dict[str, float]]) -> Done:
        """Run `work` on every clip that the step before let through; a RejectedClip sets that clip aside, no other."""
        before = self._input(source, key)
        done = Done(video=before.video, fingerprint="", made_by=made_by, rejected=before.rejected)
        statuses = []
        for clip in self.clips_of(key, before):
            try:
                statuses.append(ClipStatus(clip_id=clip.clip_id, quality=work(clip)))
            except RejectedClip as error:
                statuses.append(ClipStatus(clip_id=clip.clip_id, quarantined=str(error)))
        statuses += [status for status in before.clips if status.quarantined]
        return done.model_copy(update={"clips": statuses})

    # ---- the dataset -----------------------------------------------------------------------------------------------

    def pack(self, progress: Callable[[Iterable[str]], Iterable[str]] = iter) -> PackResult:
        """Bring the sharded dataset up to date: every annotated clip in it, every one set aside in its manifest with the reason.

        Clips that were packed before and have not changed are neither read nor written.
        Raises MissingInput when not a single clip is ready.
        """
        result = PackResult()
        ready: dict[str, str] = {}
        for key, video in self.videos.items():
            if any(self.is_stale(step, key) for step in ("clips", "geometry", "depth", "latents")):
                result.not_annotated.append(video)
            else:
                ready[key] = video
        reasons = {key: self._reasons(key) for key in ready}
        usable = {key: clips for key in ready if (clips := self._good_clips(key, reasons[key]))}
        if not usable:
            listing = [f"  {video}: {reason}" for key, video in ready.items() for reason in reasons[key].values()]
            raise MissingInput(
                f"no annotated clip to pack from {self.settings.videos} ({len(ready)} videos annotated, "
                f"{len(result.not_annotated)} not). Run: python -m fw_pipeline.launch annotate_videos\n" + "\n".join(listing)
            )
        splits = assign_splits([ready[key] for key in sorted(usable)], self.settings.val_percent)
        with ShardWriter(self.store.dataset) as writer:
            for key in progress(ready):
                for name, reason in reasons[key].items():
                    result.quarantined[name] = reason
                    writer.quarantine(name, ready[key], reason)
                if key in usable:
                    self._pack_texts(key, writer)
                    source = self._source(key)
                    for clip in usable[key]:
                        if writer.keep(clip.clip_id, splits[clip.video], source, self._prompt(key)):
                            result.kept += 1
                        else:
                            writer.add(self._record(key, clip), splits[clip.video], source)
                        result.clips += 1
        result.bytes_written = writer.bytes_written
        return result

    def _reasons(self, key: str) -> dict[str, str]:
        """Clip id, or the video's key for the whole of it -> why it is set aside."""
        depth, latents = self._input("depth", key), self._input("latents", key)
        if rejected := depth.rejected or latents.rejected:
            return {key: rejected}
        return {status.clip_id: status.quarantined for status in (*latents.clips, *depth.clips) if status.quarantined}

    def _good_clips(self, key: str, reasons: dict[str, str]) -> list[Clip]:
        if key in reasons:
            return []
        return [clip for clip in self.clips_of(key, self._input("depth", key)) if clip.clip_id not in reasons]

    def _source(self, key: str) -> str:
        """Digest of all that the packed clips of a video are made from, but for the prompt, which is no part of them."""
        parts = [CODE_VERSION, *(self._input(step, key).fingerprint for step in ("depth", "latents"))]
        parts += [] if self.pictures else [self.encoder_ids["text"]]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def _pack_texts(self, key: str, writer: ShardWriter) -> None:
        for prompt in self._texts_of(key):
            if not writer.keep_text(prompt, self.encoder_ids["text"]):
                writer.add_text(prompt, load_arrays(self._text_file(prompt), EncodedText).text, self.encoder_ids["text"])

    def _record(self, key: str, clip: Clip) -> ClipRecord:
        geometry, depth = self._input("geometry", key), self._input("depth", key)
        measured = {status.clip_id: status.quality for status in depth.clips}
        finished = load_arrays(self.store.folder("depth", key) / f"{clip.clip_id}.npz", FinishedClip)
        kind = PicturesClip if self.pictures else EncodedClip
        encoded = load_arrays(self.store.folder("latents", key) / f"{clip.clip_id}.npz", kind)
        names = ("depth", "confidence", "intrinsics", "w2c")
        return ClipRecord(
            clip_id=clip.clip_id,
            video=clip.video,
            fps=clip.fps,
            scale=float(finished.scale),
            prompt=self._prompt(key),
            arrays={name: getattr(finished, name) for name in names} | vars(encoded),
            quality=measured[clip.clip_id],
            versions={"geometry": geometry.made_by, "depth": depth.made_by} | ({} if self.pictures else self.encoder_ids),
        )

    def misspelt_prompts(self) -> dict[str, str]:
        """Videos that prompts.csv names and the folder lacks -> where. A file that cannot be read sets videos aside instead."""
        try:
            return self.prompts.unknown(set(self.videos.values()))
        except PromptError:
            return {}

    # ---- checks ----------------------------------------------------------------------------------------------------

    def finished_clips(self) -> Iterator[tuple[str, Clip, FinishedClip]]:
        """(video key, clip, arrays) of every clip in the folder that came through the depth step."""
        for key in self.videos:
            done = self.store.done("depth", key)
            for clip in self.clips_of(key, done) if done is not None else []:
                yield key, clip, load_arrays(self.store.folder("depth", key) / f"{clip.clip_id}.npz", FinishedClip)

    def truth_errors(self) -> dict[str, dict[str, float]]:
        """Clip id -> errors against ground truth, for the clips whose video has one."""
        errors = {
            clip.clip_id: compare_with_truth(self._path(key), clip, finished.depth.astype(np.float32), finished.w2c)
            for key, clip, finished in self.finished_clips()
        }
        return {clip_id: numbers for clip_id, numbers in errors.items() if numbers is not None}

    def consistency_faults(self) -> dict[str, str]:
        """Clip id -> what is inconsistent, for the finished clips that are not."""
        faults = {}
        for _, clip, finished in self.finished_clips():
            try:
                quality.check_consistency(finished.depth.astype(np.float32), finished.intrinsics, finished.w2c)
            except RejectedClip as error:
                faults[clip.clip_id] = str(error)
        return faults

    # ---- reading what is there -------------------------------------------------------------------------------------

    def clips_of(self, key: str, done: Done) -> list[Clip]:
        """The clips of a video that `done`'s step did not set aside."""
        path = self.store.folder("clips", key) / "clips.json"
        if not path.is_file():
            return []
        aside = {status.clip_id for status in done.clips if status.quarantined}
        clips = clip_io.clips_from_json(json.loads(path.read_text(encoding="utf-8")))
        return [clip for clip in clips if clip.clip_id not in aside]

    def _input(self, step: StepName, key: str) -> Done:
        done = self.store.done(step, key)
        if done is None:
            raise MissingInput(f"{key}: {step} has not been made yet. Run: python -m fw_pipeline.launch annotate_videos")
        return done

    def _path(self, key: str) -> Path:
        if key not in self.videos:
            raise MissingInput(f"{key}: its video is no longer in {self.settings.videos}; put it back or delete the partition")
        return self.settings.videos / self.videos[key]

    def _hash(self, key: str) -> str:
        if key not in self._hashes:
            self._hashes[key] = clip_io.file_xxh64(self._path(key))
        return self._hashes[key]

    def _prompt(self, key: str) -> str:
        return self.prompts.of(self.videos[key])

    def _prompt_fault(self, key: str) -> str:
        """Why the video's prompt cannot be read; "" when it can."""
        try:
            self._prompt(key)
        except PromptError as error:
            return str(error)
        return ""

    def _frames(self, key: str, clip: Clip) -> np.ndarray:
        """The clip's frames at the annotation size [T, h, w, 3] uint8."""
        height, width = clip_io.annotation_size(clip, self.settings.annotation_long_side)
        return clip_io.read_frames(self._path(key), clip, height, width)


def made_by(engine: GeometryEngine | DepthEngine) -> str:
    """Engine and version, as markers and the manifest name them."""
    return f"{engine.name}:{engine.version}"


def finish_clip(clip: Clip, geometry: ClipGeometry, result: ClipDepth) -> FinishedClip:
    """From the annotation size and units to the bucket's size and clip units.

    The annotation size has the bucket's aspect, so this is one scaling; depth is sampled, never averaged across edges.
    Raises RejectedClip when the packed clip would not be consistent (see quality.check_consistency).
    """
    _, height, width = result.depth.shape
    transform = clip_io.FrameTransform(height, width, clip.height, clip.width)
    intrinsics = transform.intrinsics_to_target(geometry.intrinsics)
    depth, w2c, scale = quality.to_clip_units(transform.depth_to_target(result.depth), intrinsics, geometry.w2c)
    finished = FinishedClip(
        depth=depth.astype(np.float16),
        confidence=np.round(transform.depth_to_target(result.confidence) * 255).astype(np.uint8),
        intrinsics=intrinsics.astype(np.float32),
        w2c=w2c.astype(np.float32),
        scale=np.asarray(scale, np.float64),
        source=result.source,
        fit_scale=result.scale,
        fit_shift=result.shift,
        fit_inlier_ratio=result.inlier_ratio,
        fit_residual=result.residual,
    )
    quality.check_consistency(finished.depth.astype(np.float32), finished.intrinsics, finished.w2c)
    return finished
