"""Prompt, picture and camera path -> a world: video, depth, points and cameras of one denoising."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fw_model.cameras import Cameras, control_latents, decode_pose, relative_to_first
from fw_model.config import Preset
from fw_model.data.dataset import pad_text
from fw_model.export.world import World
from fw_model.generate.request import BadRequest, Prepared, Request, parse_request, prepare
from fw_model.model.encoders import LATENT_CHANNELS, Encoders
from fw_model.model.encoders import Part as Encoder
from fw_model.model.fantasy_world import FantasyWorld, FantasyWorldOutput
from fw_model.train.objective import SCHEDULE, autocast
from fw_model.train.sampling import sample
from fw_model.train.trained import WhichWeights, check_trained, find_checkpoint, load_trained

Offload = Literal["model", "none"]
TILE = 256  # pixels: a tile of the published VAE's decoder takes about 2 GB in float32


@dataclass(frozen=True)
class Progress:
    """What a callback is told after each step."""

    step: int  # from 0
    steps: int
    sigma: float  # share of noise the step began with
    latents: Tensor  # [1, 16, F, h8, w8] before the step
    geometry: FantasyWorldOutput | None  # where it was read at this step


@dataclass(frozen=True)
class _Inputs:
    """What every pass is given, on the device."""

    image_latents: Tensor  # [1, 16, F, h8, w8]
    image_features: Tensor  # [1, N, C]
    camera: Tensor | None  # [1, 24, F, H, W]


class FantasyWorldPipeline:
    """A trained model with its encoders. One of them is in use at a time; see `offload`."""

    def __init__(
        self,
        model: FantasyWorld,
        preset: Preset,
        device: str = "cpu",
        offload: Offload = "model",
        made_by: dict[str, Any] | None = None,
    ) -> None:
        """
        Args:
            model: in stage 2.
            preset: what it was built and trained by.
            device: torch device.
            offload: "model" loads an encoder when it is used and lets go of it then, and keeps the model out of the device's
                memory meanwhile; "none" keeps all of them there.
            made_by: what worlds say of the weights, in their `meta`.
        """
        self.preset, self.device, self.offload = preset, torch.device(device), offload
        self.made_by = made_by or {}
        self.model = model.eval() if offload == "model" else model.to(device).eval()
        self._kept: dict[Encoder, Encoders] = {}
        self._texts: dict[str, Tensor] = {}

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | Path,
        base: str | None = None,
        device: str = "cuda" if torch.cuda.is_available() else "cpu",
        weights: WhichWeights | None = None,
        offload: Offload = "model",
    ) -> FantasyWorldPipeline:
        """From a stage 2 checkpoint alone.

        Args:
            checkpoint: a `step-N.safetensors`, or the folder of a run, whose newest is taken.
            base: another place where the base's published weights lie; by default where they lay in training.
            device: torch device.
            weights: "raw" as the last step left them, "ema" their moving average; by default the file as it is named, of a
                folder the average where there is one.
            offload: see `__init__`.

        Raises CheckpointError: missing, damaged, stage 1, another base or model version. BaseModelError.
        """
        path = find_checkpoint(Path(checkpoint), weights)
        metadata = check_trained(path, "stage2", base)
        made_by = {"checkpoint": path.name, "identity": metadata.identity, "base": metadata.base, "weights": metadata.weights}
        return cls(load_trained(path, metadata), metadata.preset, device, offload, made_by)

    @classmethod
    def seeded(cls, preset: Preset, device: str = "cpu") -> FantasyWorldPipeline:
        """An untrained model, to try the way and not the result: its videos are noise."""
        model = FantasyWorld.from_preset(preset, "stage2").set_stage("stage2")
        made_by = {"checkpoint": None, "base": preset.base.identity, "weights": f"untrained, seed {preset.stage2.seed}"}
        return cls(model, preset, device, "none", made_by)

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        image: np.ndarray | str | Path | None = None,
        cameras: Cameras | None = None,
        pose_file_path: str | Path | None = None,
        num_inference_steps: int = 50,
        callback: Callable[[Progress], None] | None = None,
        progress: bool = True,
        **settings: Any,
    ) -> World | list[World]:
        """One world a prompt (a list of prompts gives a list).

        Args:
            prompt: what is to be seen.
            image: the first picture, [H, W, 3] uint8 RGB or a file; it is resized to cover the size and cropped.
            cameras: the path, one camera a frame; or `trajectory`, a move's name; or `pose_file_path`. None of them: no camera is
                asked for.
            num_inference_steps: of the sampler.
            callback: called after every step, see `Progress`.
            progress: show a bar.
            settings: other fields of `Request`: negative_prompt, trajectory, num_frames, height, width, guidance_scale, shift,
                scheduler, camera_scale, seed, geometry_at.

        Raises BadRequest before anything is loaded. The same seed gives the same bits on one device, whatever else is asked.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        picture = image if isinstance(image, np.ndarray) else None
        raw = {"steps": num_inference_steps, **settings}
        raw |= {"image": image} if image is not None and picture is None else {}
        raw |= {"pose_file": pose_file_path} if pose_file_path is not None else {}
        if not prompts:
            raise BadRequest("prompt: none was given")
        requests = [parse_request({"prompt": one, **raw}) for one in prompts]
        prepared = [prepare(request, self.preset.clip, cameras, picture) for request in requests]
        worlds = self.run(prepared, callback, progress)
        return worlds[0] if isinstance(prompt, str) else worlds

    def run(
        self, prepared: Sequence[Prepared], callback: Callable[[Progress], None] | None = None, progress: bool = True
    ) -> list[World]:
        """Worlds of checked requests, one after the other; encoders are loaded once for all of them."""
        self.embed({text for one in prepared for text in _texts(one.request)})
        with torch.no_grad():
            given = self._encode_pictures(prepared)
            latents, outputs, scales = [], [], []
            for one, (image_latents, features) in zip(prepared, given, strict=True):
                found = self._denoise(one, image_latents, features, callback, progress)
                latents.append(found[0])
                outputs.append(found[1])
                scales.append(found[2])
            videos = self._decode(latents)
        return [
            self._world(one, video, output, scale)
            for one, video, output, scale in zip(prepared, videos, outputs, scales, strict=True)
        ]

    def embed(self, prompts: Iterable[str]) -> None:
        """Embed prompts that have not been; they are kept. Worth doing once for a list of requests: the text encoder is large."""
        new = sorted(set(prompts) - self._texts.keys())
        if not new:
            return
        encoders = self._encoder("text")
        for text in new:
            embedded = torch.from_numpy(encoders.encode_text(text))
            self._texts[text] = pad_text(embedded, self.preset.model.wan.text_len).float()
        self._release("text")

    def depth_of_picture(self, prepared: Prepared) -> Tensor:
        """[H, W] z-depth, clip units, that the model reads in a request's picture, with no camera told and hardly any noise."""
        self.embed([prepared.request.prompt])
        with torch.no_grad():
            ((image_latents, features),) = self._encode_pictures([prepared])
            self.model.to(self.device)
            inputs = _Inputs(image_latents.to(self.device), features.to(self.device), None)
            noise = torch.randn(image_latents.shape, generator=torch.Generator().manual_seed(0)).to(self.device)
            text = self._texts[prepared.request.prompt].to(self.device)[None]
            return self._at_rest(prepared, noise, text, inputs).depth[0, 0].float().cpu()

    # ---- encoders

    def _encoder(self, part: Encoder) -> Encoders:
        if part not in self._kept:
            if self.offload == "model":
                self.model.to("cpu")
            config, text_len = self.preset.encoders, self.preset.model.wan.text_len
            self._kept[part] = Encoders.from_config(config, text_len, str(self.device), (part,))
        return self._kept[part]

    def _release(self, part: Encoder) -> None:
        if self.offload == "model":
            self._kept.pop(part, None)
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _encode_pictures(self, prepared: Sequence[Prepared]) -> list[tuple[Tensor, Tensor]]:
        """Of each request: latent of its picture in frame 0 and zeros after it, and CLIP's features; zeros without a picture."""
        wan = self.preset.model.wan
        found = []
        for one in prepared:
            shape = (1, LATENT_CHANNELS, (one.frames - 1) // 4 + 1, one.height // 8, one.width // 8)
            found.append((torch.zeros(shape), torch.zeros(1, wan.image_tokens, wan.image_dim)))
        pictures = [(one.picture, given) for one, given in zip(prepared, found, strict=True) if one.picture is not None]
        for part in ("vae", "image") if pictures else ():
            encoders = self._encoder(part)
            for picture, (latents, features) in pictures:
                if part == "vae":
                    latents[0, :, :1] = torch.from_numpy(encoders.encode_video(picture[None])).float()
                else:
                    features[0] = torch.from_numpy(encoders.encode_image(picture)).float()
            self._release(part)
        return found

    def _decode(self, latents: Sequence[Tensor]) -> list[np.ndarray]:
        encoders = self._encoder("vae")
        videos = []
        for one in latents:
            large = max(one.shape[-2:]) * 8 > TILE
            videos.append(encoders.decode_video(one[0].cpu().numpy(), TILE if large else None))
        self._release("vae")
        return videos

    # ---- denoising

    def _denoise(
        self,
        one: Prepared,
        image_latents: Tensor,
        features: Tensor,
        callback: Callable[[Progress], None] | None,
        progress: bool,
    ) -> tuple[Tensor, FantasyWorldOutput, float]:
        """(latents, the geometry read last, what the path's translations were multiplied by)."""
        request = one.request
        self.model.to(self.device)
        positive, negative = (self._texts[text].to(self.device)[None] for text in _both(request))
        # drawn on the CPU: the same seed is the same noise whatever the device
        noise = torch.randn(image_latents.shape, generator=torch.Generator().manual_seed(request.seed)).to(self.device)
        inputs = _Inputs(image_latents.to(self.device), features.to(self.device), None)
        scale = self._scale(one, noise, positive, inputs)
        inputs = replace(inputs, camera=None if one.cameras is None else self._control(one, scale))
        read: dict[int, FantasyWorldOutput] = {}
        bar = tqdm(total=request.steps, desc="denoise", unit="step", disable=None if progress else True)

        def velocity(step: int, latents: Tensor, sigma: float) -> Tensor:
            geometry = None
            if step in one.geometry_at:
                read.clear()
                geometry = read[step] = self._forward(latents, sigma, positive, inputs)
            found = geometry.velocity if geometry is not None else self._velocity(latents, sigma, positive, inputs)
            assert found is not None
            found = found.float()
            if request.guidance_scale != 1:
                without = self._velocity(latents, sigma, negative, inputs).float()
                found = without + request.guidance_scale * (found - without)
            bar.update()
            if callback is not None:
                callback(Progress(step, request.steps, sigma, latents, geometry))
            return found

        with bar:
            latents = sample(velocity, noise, request.steps, request.shift, request.scheduler)
        (output,) = read.values()
        return latents, output, scale

    def _control(self, one: Prepared, scale: float) -> Tensor:
        assert one.cameras is not None
        w2c = _scaled(relative_to_first(one.cameras.w2c.double()), scale).float()
        k = one.cameras.intrinsics.float()
        with torch.autocast(self.device.type, enabled=False):  # rays need all their digits
            return control_latents(w2c[None].to(self.device), k[None].to(self.device), one.height, one.width)

    def _scale(self, one: Prepared, noise: Tensor, text: Tensor, inputs: _Inputs) -> float:
        """What the path's translations are multiplied by. "scene": the mean distance of the scene's points, in the model's units,
        which it reads from the picture with no camera told."""
        if one.request.camera_scale != "scene" or one.cameras is None:
            return 1.0 if one.request.camera_scale == "scene" else float(one.request.camera_scale)
        first = self._at_rest(one, noise, text, inputs).points[0, 0].float()
        distance = float(first.norm(dim=-1).mean())
        if not 0 < distance < float("inf"):
            raise BadRequest(f"camera_scale: the scene's mean distance came out as {distance:g}; give a number")
        return distance

    def _at_rest(self, one: Prepared, noise: Tensor, text: Tensor, inputs: _Inputs) -> FantasyWorldOutput:
        """One pass over the picture as a video that stands still, at the schedule's least noise; over noise without a picture."""
        sigma = float(SCHEDULE.sigmas[-1]) if one.picture is not None else 1.0
        latents = (1 - sigma) * inputs.image_latents[:, :, :1].expand_as(noise) + sigma * noise
        return self._forward(latents, sigma, text, inputs)

    def _forward(self, latents: Tensor, sigma: float, text: Tensor, inputs: _Inputs) -> FantasyWorldOutput:
        with autocast(self.preset.stage2, self.device):
            found: FantasyWorldOutput = self.model(*self._arguments(latents, sigma, text, inputs))
        return found

    def _velocity(self, latents: Tensor, sigma: float, text: Tensor, inputs: _Inputs) -> Tensor:
        with autocast(self.preset.stage2, self.device):
            return self.model.velocity(*self._arguments(latents, sigma, text, inputs))

    def _arguments(self, latents: Tensor, sigma: float, text: Tensor, inputs: _Inputs) -> tuple[Any, ...]:
        timestep = torch.full((len(latents),), SCHEDULE.steps * sigma, device=self.device)
        return latents, inputs.image_latents, timestep, text, inputs.image_features, inputs.camera

    # ---- what comes out

    def _world(self, one: Prepared, video: np.ndarray, output: FantasyWorldOutput, scale: float) -> World:
        w2c, intrinsics = decode_pose(output.pose_encodings[-1][0].double().cpu(), one.height, one.width)
        first, points = w2c[0], output.points[0].double().cpu()
        points = points @ first[:, :3].mT + first[:, 3]  # the world is the first camera, exactly
        asked = one.cameras
        requested = None if asked is None else replace(asked, w2c=_scaled(relative_to_first(asked.w2c.double()), scale).float())
        meta = {
            **one.request.model_dump(mode="json"),
            **self.made_by,
            "frames": one.frames,
            "camera_scale_used": scale,
            "units": "clip units: mean distance of the scene's points = 1",
        }
        return World(
            video=torch.from_numpy(video),
            depth=output.depth[0].float().cpu(),
            depth_conf=output.depth_conf[0].float().cpu(),
            points=points.float(),
            points_conf=output.points_conf[0].float().cpu(),
            cameras=Cameras(relative_to_first(w2c).float(), intrinsics.float(), (one.height, one.width)),
            requested=requested,
            fps=self.preset.clip.fps,
            meta=meta,
        )


def _texts(request: Request) -> set[str]:
    return set(_both(request))


def _both(request: Request) -> tuple[str, str]:
    return request.prompt, request.negative_prompt


def _scaled(w2c: Tensor, scale: float) -> Tensor:
    return torch.cat([w2c[..., :3], w2c[..., 3:] * scale], dim=-1)
