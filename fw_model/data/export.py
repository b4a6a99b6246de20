"""A clip of a dataset as a world: its video is what its latents decode to, or its pictures."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from fw_model.cameras import Cameras, unproject
from fw_model.config import Preset
from fw_model.data.manifest import ClipRow, Manifest, read_manifest
from fw_model.data.online import decode_video
from fw_model.data.shard_reader import ShardReader
from fw_model.errors import DatasetError, did_you_mean
from fw_model.export.world import World
from fw_model.model.encoders import Encoders


def clip_world(dataset: str, clip_id: str, decode: Callable[[np.ndarray], np.ndarray]) -> World:
    """
    Args:
        dataset: folder with a manifest, or its URL.
        clip_id: of a clip that was accepted.
        decode: latents [16, F, h8, w8] -> frames [T, H, W, 3] uint8; not called for a clip of pictures.

    Raises DatasetError when there is no such clip, or it was set aside (with the reason).
    """
    manifest = read_manifest(dataset)
    row = _row(manifest, dataset, clip_id)
    arrays = ShardReader(dataset, manifest=manifest).read(row)
    video = decode_video(arrays["video"].tobytes()) if "video" in arrays else decode(arrays["latents"])
    depth, w2c = torch.from_numpy(arrays["depth"]).float(), torch.from_numpy(arrays["w2c"]).float()
    intrinsics = torch.from_numpy(arrays["intrinsics"]).float()
    confidence = torch.from_numpy(arrays["confidence"]).float() / 255 if "confidence" in arrays else (depth > 0).float()
    points = torch.where((depth > 0)[..., None], unproject(depth, intrinsics, w2c), torch.zeros(()))
    height, width = depth.shape[1:]
    meta = {"prompt": row.prompt, "clip": clip_id, "source": row.video, "made_by": dict(row.versions), "scale": row.scale}
    cameras = Cameras(w2c, intrinsics, (height, width))
    return World(torch.from_numpy(video), depth, confidence, points, confidence, cameras, None, row.fps, meta)


def decoder(dataset: str, preset: Preset, device: str) -> Callable[[np.ndarray], np.ndarray]:
    """Decodes latents of a dataset with the VAE of `preset`, loaded at the first call.

    Raises DatasetError then, when the dataset was encoded with another VAE.
    """

    def decode(latents: np.ndarray) -> np.ndarray:
        ours = preset.encoders.identities(preset.model.wan.text_len)["vae"]
        theirs = {row.versions.get("vae", "") for row in read_manifest(dataset) if not row.quarantine}
        if theirs != {ours}:
            raise DatasetError(
                f"{dataset}: encoded by {', '.join(sorted(theirs))}, preset {preset.name!r} has {ours}",
                "Name the preset it was made with",
            )
        encoders = Encoders.from_config(preset.encoders, preset.model.wan.text_len, device, ["vae"])
        return encoders.decode_video(latents)

    return decode


def _row(manifest: Manifest, dataset: str, clip_id: str) -> ClipRow:
    rows = {row.clip_id: row for row in manifest}
    if clip_id not in rows:
        raise DatasetError(f"{dataset}: no clip {clip_id!r}{did_you_mean(clip_id, rows)}")
    if reason := rows[clip_id].quarantine:
        raise DatasetError(f"{dataset}: clip {clip_id} was set aside: {reason}")
    return rows[clip_id]
