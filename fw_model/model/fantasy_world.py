"""FantasyWorld: a frozen camera-controlled video DiT and a trainable geometry branch in one pass (arXiv 2509.21657).

Shape suffixes: B clips, F latent frames, T = 4(F-1)+1 video frames, H x W pixels, h x w patch grid (H/16 x W/16),
N = F*h*w patch tokens, G geometry tokens, D = dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fw_model.config import ModelConfig, Preset, Stage
from fw_model.model.attention import Part, init_weights
from fw_model.model.backbone import Conditioning, WanBackbone
from fw_model.model.camera_head import CameraHead
from fw_model.model.geometry import GeoDiT, LatentBridge, PoseEncoder, SpecialTokens
from fw_model.model.heads import DPTHead, frames_of
from fw_model.model.interaction import BiCrossAttention, CameraAdapter
from fw_model.model.rope import Rotary, prepend_identity, rope_3d
from fw_model.model.wan_weights import SPATIAL_STRIDE

# Modules by what trains them. Names are prefixes of checkpoint keys.
GEOMETRY_MODULES = ("pose_encoder", "bridge", "tokens", "geodit", "depth_head", "point_head", "camera_head")
INTERACTION_MODULES = ("camera_adapters", "interaction")
_TOKEN_STD = 0.02


@dataclass(frozen=True)
class FantasyWorldOutput:
    """What one pass gives. Geometry is float32, in clip units, world = first camera, poses as pose encodings."""

    velocity: Tensor | None  # [B, 16, F, H/8, W/8]; None in stage 1, where the base is not run to its end
    depth: Tensor  # [B, T, H, W] positive z-depth
    depth_conf: Tensor  # [B, T, H, W] greater than 1
    points: Tensor  # [B, T, H, W, 3]
    points_conf: Tensor  # [B, T, H, W] greater than 1
    pose_encodings: list[Tensor]  # per refinement iteration [B, T, 9]: translation, quaternion xyzw, fov_h, fov_w


class FantasyWorld(nn.Module):
    """The base, its geometry branch and what joins them.

    Starts in stage 1. The base is always frozen and in evaluation mode; `set_stage` decides what else trains and whether
    the branches exchange anything.
    """

    stage: Stage

    def __init__(self, config: ModelConfig, base: WanBackbone | None = None) -> None:
        """Build the architecture.

        Args:
            config: shapes.
            base: the frozen video model; by default one with torch's random weights.

        The new weights are undefined until `initialise`; `from_preset` does both.
        """
        super().__init__()
        # cuDNN's default, TF32, keeps 10 of 23 bits: heads and camera say float32 where it matters, all else is bfloat16 anyway.
        torch.backends.cudnn.allow_tf32 = False
        wan, geometry = config.wan, config.geometry
        self.config = config
        self.base = base if base is not None else WanBackbone(wan)
        self.pose_encoder = PoseEncoder(wan, geometry.pose_rank)
        self.bridge = LatentBridge(wan.dim, geometry)
        self.tokens = SpecialTokens(wan.dim, geometry.num_registers)
        self.geodit = GeoDiT(config)
        self.depth_head = DPTHead(wan.dim, geometry, "depth")
        self.point_head = DPTHead(wan.dim, geometry, "points")
        self.camera_head = CameraHead(wan.dim, geometry)
        self.camera_adapters = nn.ModuleList([CameraAdapter(wan.dim) for _ in range(geometry.pcb_blocks)])
        self.interaction = nn.ModuleList([BiCrossAttention(wan.dim, geometry, wan.eps) for _ in range(config.num_geodit)])
        self.gradient_checkpointing = False
        self.set_stage("stage1")

    @classmethod
    def from_preset(cls, preset: Preset, stage: Stage = "stage1") -> FantasyWorld:
        """Load or make the base as `preset.base` says, build the rest and start it from the base.

        The same preset gives the same weights, drawn by the seed of `stage`; torch's global random state is neither read nor
        changed. New weights are float32, the base keeps the dtype it is stored in.

        Raises:
            BaseModelError: the base is missing (says what to download) or another model (says which).
        """
        wan = preset.model.wan
        if preset.base.source == "seeded":
            base = WanBackbone.seeded(wan, preset.base.seed)
        else:
            base = WanBackbone.from_pretrained(preset.base.repo, wan, preset.base.revision)
        with torch.device("meta"):
            model = cls(preset.model, base)
        for name in GEOMETRY_MODULES + INTERACTION_MODULES:
            model.get_submodule(name).to_empty(device="cpu")
        model.initialise(preset.stage(stage).seed)
        return model

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Give every new weight its starting value; the base must have its weights and is left alone."""
        generator = torch.Generator().manual_seed(seed)
        for name in GEOMETRY_MODULES + INTERACTION_MODULES:
            init_weights(self.get_submodule(name), generator)
        for tokens in (self.tokens.camera, self.tokens.registers):
            tokens.copy_(_TOKEN_STD * torch.randn(tokens.shape, generator=generator))
        self.geodit.init_from_base(self.base)
        for head in (self.depth_head, self.point_head, self.camera_head):
            head.reset_output()
        for module in self.modules():
            if isinstance(module, CameraAdapter | BiCrossAttention):
                module.reset()

    # ---- what trains

    def set_stage(self, stage: Stage, train_geometry: bool = True) -> FantasyWorld:
        """Choose what runs and what trains.

        Stage 1: the geometry branch trains; the base runs up to the bridge only and nothing flows back to the video.
        Stage 2: camera adapters and cross-attention run and train; with `train_geometry` the geometry branch trains too,
        without it these alone do, as in the paper.
        """
        self.stage = stage
        trained: tuple[str, ...] = GEOMETRY_MODULES if stage == "stage1" or train_geometry else ()
        trained += INTERACTION_MODULES if stage == "stage2" else ()
        self.requires_grad_(False)
        for name in trained:
            self.get_submodule(name).requires_grad_(True)
        return self

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Name -> parameter of everything that trains in this stage, in a fixed order; a checkpoint stores exactly these."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def enable_gradient_checkpointing(self, enabled: bool = True) -> None:
        """Recompute activations block by block in the backward pass: less memory, the same gradients."""
        self.gradient_checkpointing = enabled
        self.depth_head.gradient_checkpointing = self.point_head.gradient_checkpointing = enabled

    def train(self, mode: bool = True) -> FantasyWorld:
        super().train(mode)
        self.base.eval()
        return self

    # ---- running

    def forward(
        self,
        latents: Tensor,
        image_latents: Tensor,
        timestep: Tensor,
        text: Tensor,
        image_features: Tensor,
        camera: Tensor | None,
        *,
        pose_mask: Tensor | None = None,
        camera_mask: Tensor | None = None,
    ) -> FantasyWorldOutput:
        """Run one denoising step of the video together with its geometry.

        Args:
            latents, image_latents, timestep, text, image_features: as for `WanBackbone.forward`.
            camera: [B, 24, F, H, W] control latents, or None for no camera.
            pose_mask: [B] bool; False keeps that clip's pose tokens from the geometry branch. They reach the base's
                control adapter and the stage-2 camera adapters in any case. None: all are seen.
            camera_mask: [B] bool; False runs that clip as if `camera` were None. None: all have their camera.

        Raises:
            ValueError: shapes that do not fit; names the nearest sizes that do.
        """
        velocity, features, tokens_BGD, grid = self._branches(
            latents, image_latents, timestep, text, image_features, camera, pose_mask, camera_mask
        )
        return self._decode(velocity, features, tokens_BGD, grid)

    def velocity(
        self,
        latents: Tensor,
        image_latents: Tensor,
        timestep: Tensor,
        text: Tensor,
        image_features: Tensor,
        camera: Tensor | None,
    ) -> Tensor:
        """`forward` without its heads, a tenth of a pass: [B, 16, F, H/8, W/8], the same bits.

        Raises ValueError as `forward`, and in stage 1, which has no velocity.
        """
        if self.stage != "stage2":
            raise ValueError("stage 1 does not run the base to its end: there is no velocity; call set_stage('stage2') first")
        velocity, *_ = self._branches(latents, image_latents, timestep, text, image_features, camera, None, None)
        assert velocity is not None
        return velocity

    def _branches(
        self,
        latents: Tensor,
        image_latents: Tensor,
        timestep: Tensor,
        text: Tensor,
        image_features: Tensor,
        camera: Tensor | None,
        pose_mask: Tensor | None,
        camera_mask: Tensor | None,
    ) -> tuple[Tensor | None, list[Tensor], Tensor, tuple[int, int, int]]:
        """Velocity (None in stage 1), what the dense heads read, geometry tokens, grid of patches."""
        check_clip_size(frames_of(latents.shape[2]), latents.shape[-2] * SPATIAL_STRIDE, latents.shape[-1] * SPATIAL_STRIDE)
        joined = self.stage == "stage2"
        pose_BND = None if camera is None else self.pose_encoder(camera)
        if camera_mask is not None:
            pose_mask = camera_mask if pose_mask is None else pose_mask & camera_mask
        with torch.set_grad_enabled(joined and torch.is_grad_enabled()):
            hidden_BND, cond = self.base.embed(latents, image_latents, timestep, text, image_features, camera, camera_mask)
            if joined:  # what a gamma of 1e-5 adds would be rounded away in bfloat16
                hidden_BND = hidden_BND.float()
            for i, adapter in enumerate(self.camera_adapters):
                if joined and pose_BND is not None:
                    hidden_BND = adapter(hidden_BND, pose_BND, camera_mask)
                hidden_BND = self._run(self.base.block, i, hidden_BND, cond)

        frames = cond.grid[0]
        tokens_BGD = self.tokens(self._run(self.bridge, hidden_BND, cond.grid), frames)

        time = self.geodit.time_vectors(cond.time)
        rotary = self.geodit.rotary(cond.grid, self.tokens.count, hidden_BND.device)
        features: list[Tensor] = []
        positions = self._exchange_positions(cond.grid, hidden_BND.device) if joined else None
        for i, block in enumerate(self.geodit.blocks):
            part: Part = None if positions is None else "attention"
            tokens_BGD = self._run(block, tokens_BGD, time, rotary, frames, pose_BND, pose_mask, part)
            if positions is not None:
                hidden_BND = self._run(self.base.block, self.config.geometry.pcb_blocks + i, hidden_BND, cond, part)
                second_half = partial(self._exchange_and_feed, i, time=time, rotary=rotary, cond=cond, positions=positions)
                hidden_BND, tokens_BGD = self._run(second_half, hidden_BND, tokens_BGD)
            if i + 1 in self.config.geometry.head_layers:
                features += [tokens_BGD] * self.config.geometry.head_layers.count(i + 1)
        velocity = self.base.head(hidden_BND, cond) if joined else None
        return velocity, features, tokens_BGD, cond.grid

    def _exchange_positions(self, grid: tuple[int, int, int], device: torch.device) -> tuple[Rotary, Rotary]:
        """Of video tokens and of geometry tokens, in the width of the exchange's heads."""
        width = self.config.geometry.cross_dim // self.config.geometry.cross_heads
        video = rope_3d(width, grid, device)
        return video, prepend_identity(video, grid[0], self.tokens.count)

    def _exchange_and_feed(
        self,
        i: int,
        hidden_BND: Tensor,
        tokens_BGD: Tensor,
        *,
        time: Tensor,
        rotary: Rotary,
        cond: Conditioning,
        positions: tuple[Rotary, Rotary],
    ) -> tuple[Tensor, Tensor]:
        """What follows the attention of pair i. Recomputed as one: two more tensors a pair would be kept otherwise."""
        hidden_BND, tokens_BGD = self.interaction[i](hidden_BND, tokens_BGD, *positions)
        hidden_BND = self.base.block(self.config.geometry.pcb_blocks + i, hidden_BND, cond, "feed_forward")
        return hidden_BND, self.geodit.blocks[i](tokens_BGD, time, rotary, cond.grid[0], part="feed_forward")

    def _decode(
        self, velocity: Tensor | None, features: list[Tensor], tokens_BGD: Tensor, grid: tuple[int, int, int]
    ) -> FantasyWorldOutput:
        per_frame = tokens_BGD.unflatten(1, (grid[0], -1))
        patches = [x.unflatten(1, (grid[0], -1))[:, :, self.tokens.count :].flatten(1, 2) for x in features]
        depth, depth_conf = self.depth_head(patches, grid)
        points, points_conf = self.point_head(patches, grid)
        return FantasyWorldOutput(
            velocity=velocity,
            depth=depth,
            depth_conf=depth_conf,
            points=points,
            points_conf=points_conf,
            pose_encodings=self.camera_head(per_frame[:, :, 0]),
        )

    def _run(self, function: Callable[..., Any], *inputs: Any) -> Any:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
        return function(*inputs)


def check_clip_size(frames: int, height: int, width: int) -> None:
    """Refuse clips the model cannot take.

    Raises:
        ValueError: T is not 4k+1 or a side is not a multiple of 16; the message gives the nearest sizes that fit.
    """
    problems = []
    if frames < 1 or frames % 4 != 1:
        low = max(1, (frames - 1) // 4 * 4 + 1)
        problems.append(f"{frames} frames: must be 4k+1 (4 frames make one latent); nearest: {low} or {low + 4}")
    for name, side in (("height", height), ("width", width)):
        if side < 16 or side % 16:
            low = side // 16 * 16
            nearest = f"{low} or {low + 16}" if low >= 16 else "16"
            problems.append(f"{name} {side}: must be a multiple of 16; nearest: {nearest}")
    if problems:
        raise ValueError("clip size does not fit the model: " + "; ".join(problems))
