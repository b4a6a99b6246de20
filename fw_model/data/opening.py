"""Opening a dataset for a preset: the one place that checks that they fit, for cached latents and for pictures."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch

from fw_model.config import AugmentConfig, ClipConfig, ConfigError, Preset, Stage, StageConfig
from fw_model.data.augment import frames_needed
from fw_model.data.dataset import ClipDataset
from fw_model.data.manifest import ClipRow, read_manifest
from fw_model.data.online import OnlineEncodedClips, check_pictures
from fw_model.errors import BUILD_DATASET, DatasetError, EncoderError, TrainingError
from fw_model.model.encoders import Encoders

log = logging.getLogger(__name__)

Clips = ClipDataset | OnlineEncodedClips  # what training reads


def open_dataset(
    dataset: str | Path, preset: Preset, stage: Stage = "stage1", device: torch.device | str = "cpu"
) -> tuple[Clips, Clips]:
    """(training clips, validation clips) of a dataset made for this preset's base and encoders.

    With the stage's `encode_online` the encoders are loaded to `device`. Without validation clips the training clips stand
    in, and a warning says so.

    Raises:
        DatasetError: missing, empty, made by other encoders, or of pictures where latents are wanted and vice versa.
        ConfigError: `encode_online` as it cannot work.
        TrainingError: features of another width than the base takes, clips of another size than the preset's, encoders that
            are not there.
    """
    config = preset.stage(stage)
    try:
        clips, validation_clips = (
            open_online(dataset, preset, config, device) if config.encode_online else _open_cached(dataset, preset)
        )
    except EncoderError as error:
        raise TrainingError(str(error)) from error
    if validation_clips.split == "train":
        log.warning("%s has no validation clips (that takes two videos): validating on training clips", dataset)
    return clips, validation_clips


def _open_cached(dataset: str | Path, preset: Preset) -> tuple[ClipDataset, ClipDataset]:
    wan = preset.model.wan
    versions = preset.encoders.identities(wan.text_len)
    clips, validation_clips = (ClipDataset(dataset, split, wan.text_len, versions=versions) for split in ("train", "val"))
    for row in (row for split in (clips, validation_clips) for row in split.rows.distinct("bucket", "arrays")):
        found = (clips.text_width, tuple(row.arrays["image"][1]))
        if found != (wan.text_dim, (wan.image_tokens, wan.image_dim)):
            raise TrainingError(
                f"{dataset}: clip {row.clip_id} has text features of width {found[0]} and image features {found[1]}, the base "
                f"of preset {preset.name!r} takes {wan.text_dim} and {(wan.image_tokens, wan.image_dim)}; pack the dataset with "
                f"this preset: {BUILD_DATASET}"
            )
        _check_latents(dataset, row, preset.clip, wan.out_dim)
    return clips, validation_clips if len(validation_clips) else clips


def _check_latents(dataset: str | Path, row: ClipRow, clip: ClipConfig, channels: int) -> None:
    """Refuse a clip that is not of the preset's size, or whose latents are not the VAE's of that size."""
    height, width, frames = row.size
    if row.bucket not in clip.buckets:
        raise TrainingError(
            f"{dataset}: clip {row.clip_id} is in bucket {row.bucket}, the preset's are {' and '.join(clip.buckets)}; train "
            f"at the dataset's size: clip.size={height}x{width} clip.frames={frames}, or pack it at the preset's: {BUILD_DATASET}"
        )
    expected = (channels, (frames - 1) // 4 + 1, height // 8, width // 8)
    found = tuple(row.arrays["latents"][1])
    if found != expected:
        raise TrainingError(
            f"{dataset}: clip {row.clip_id} of bucket {row.bucket} has latents {list(found)}, Wan's VAE gives {list(expected)}; "
            f"pack it again: {BUILD_DATASET}"
        )


def open_online(
    path: str | Path, preset: Preset, config: StageConfig, device: torch.device | str
) -> tuple[OnlineEncodedClips, OnlineEncodedClips]:
    """(training clips, validation clips) of a dataset of pictures; without any of its own, validation gets the training
    clips. Training clips are augmented as the stage says, validation clips never.

    All is checked that can be before the encoders are loaded.

    Raises:
        DatasetError: missing, empty, of latents, or of clips that do not fit the preset's size or the strides.
        ConfigError: encoders on a GPU with data workers, or of other sizes than the base takes.
        EncoderError: the encoders' weights are not there.
    """
    device, augment, wan = torch.device(device), config.augment, preset.model.wan
    if device.type != "cpu" and config.workers:
        raise ConfigError(
            f"encode_online: the encoders run on {device}, where encoding ahead takes memory and time from the step; "
            f"set workers: 0 (it is {config.workers})"
        )
    manifest = read_manifest(path)
    rows = manifest.select(manifest.equal("quarantine", "")).distinct("split", "bucket", "arrays")
    for row in rows:
        check_pictures(path, row, preset.clip.frames, augment)
        _check_picture_size(path, row, preset, augment)
    for stride in augment.strides if augment else ():
        longest = max((row.size[2] for row in rows), default=0)
        if (needed := frames_needed(preset.clip.frames, stride)) > longest:
            raise DatasetError(
                f"{path}: augment.strides: a stride of {stride} needs clips of {needed} frames to give {preset.clip.frames}, the "
                f"longest has {longest}; leave {stride} out, or pack with clip.frames={needed} and train with "
                f"clip.frames={preset.clip.frames}"
            )
    if not any(row.split == "train" for row in rows):
        raise DatasetError(f"{path}: no clip in its train split; see: python -m fw_model.data info {path}")
    encoders = Encoders.from_config(preset.encoders, wan.text_len, str(device))
    tokens, width = encoders.encode_image(np.zeros((16, 16, 3), np.uint8)).shape
    found, wanted = (encoders.encode_text("").shape[1], tokens, width), (wan.text_dim, wan.image_tokens, wan.image_dim)
    if found != wanted:
        raise ConfigError(
            f"preset {preset.name!r}: the encoders give text of width {found[0]} and image features {found[1:]}, the base takes "
            f"{wanted[0]} and {wanted[1:]}"
        )
    size = sum(p.nbytes for part in (encoders.vae, encoders.text, encoders.image) for p in part.parameters())
    log.info(
        "encoding while training: VAE, UMT5 and CLIP stay on %s (%.0f MB in every process), VAE and CLIP run for every clip of "
        "every step; data_seconds in metrics.jsonl says what that costs. Latents that are cached cost a read",
        *(device, size / 1e6),
    )
    training = OnlineEncodedClips(path, "train", encoders, preset.clip.frames, augment, config.seed)
    held_out = "val" if any(row.split == "val" for row in rows) else "train"
    return training, OnlineEncodedClips(path, held_out, encoders, preset.clip.frames)


def _check_picture_size(path: str | Path, row: ClipRow, preset: Preset, augment: AugmentConfig | None) -> None:
    """Refuse a clip of another size than the preset's, or longer than it where nothing says which frames are meant."""
    height, width, frames = row.size
    if preset.clip.bucket(height, width)[:2] != (height, width):
        raise DatasetError(
            f"{path}: clip {row.clip_id} is in bucket {row.bucket}, the preset's are {' and '.join(preset.clip.buckets)}; train "
            f"at the dataset's size: clip.size={height}x{width}"
        )
    if augment is None and frames != preset.clip.frames:
        raise DatasetError(
            f"{path}: clip {row.clip_id} has {frames} frames, the preset's clips {preset.clip.frames}; train with "
            f"clip.frames={frames}, or with augment, which draws windows from longer clips"
        )
