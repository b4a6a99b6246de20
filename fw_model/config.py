"""Configuration: the one home of every knob of the model, its encoders, the clips and the two training stages.

A preset is a YAML file in `fw_model/presets`. `load_preset("tiny", ["stage1.steps=10"])` reads one, applies overrides
(dotted keys, values parsed as YAML) and validates it; unknown keys are refused with the keys that exist.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from fw_model.errors import ConfigError, did_you_mean
from fw_model.preset_files import read_layers

Stage = Literal["stage1", "stage2"]
AttentionChoice = Literal["auto", "cudnn", "flash", "efficient", "math"]
Dynamic = Literal["keep", "exclude"]
TimestepChoice = Literal["shifted", "uniform", "mixed"]


class Config(BaseModel):
    """Base of every config: immutable, and a key it does not know is an error rather than a silent no-op."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class WanConfig(Config):
    """Shape of the frozen video DiT. The defaults are Wan2.1-Fun-V1.1-1.3B-Control-Camera's."""

    dim: int = 1536
    ffn_dim: int = 8960
    num_heads: int = 12
    num_layers: int = 30
    text_dim: int = 4096
    freq_dim: int = 256
    in_dim: int = 32  # 16 noise + 16 image latents, no mask channels
    out_dim: int = 16
    control_channels: int = 24  # 6 Plücker channels x 4 frames folded into one latent frame
    image_dim: int = 1280
    image_tokens: int = 257
    text_len: int = 512
    eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @model_validator(mode="after")
    def _check(self) -> WanConfig:
        if self.dim % self.num_heads:
            raise ValueError(f"dim {self.dim} is not divisible by num_heads {self.num_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head dimension {self.head_dim} must be even for rotary embeddings")
        return self


class GeometryConfig(Config):
    """Shape of the trainable geometry branch (widths equal the base's `dim` unless named here)."""

    pcb_blocks: int = 12  # base blocks before the bridge; the rest run beside one GeoDiT block each
    bridge_layers: int = 2
    bridge_heads: int = 8
    num_registers: int = 4
    head_layers: tuple[int, int, int, int] = (6, 9, 12, 18)  # 1-based GeoDiT layers read by the DPT heads
    head_channels: tuple[int, int, int, int] = (256, 256, 192, 96)  # per-stream width, shallow to deep (coarse to fine)
    head_features: int = 256  # width of the RefineNet fusion
    camera_blocks: int = 2  # transformer blocks of one camera refinement iteration
    camera_dim: int = 512
    camera_iterations: int = 4
    pose_rank: int = 128  # low-rank width of the pose encoder
    cross_dim: int = 1152  # hidden width of the IRG bidirectional cross-attention
    cross_heads: int = 12


class ModelConfig(Config):
    wan: WanConfig = WanConfig()
    geometry: GeometryConfig = GeometryConfig()

    @property
    def num_geodit(self) -> int:
        """Number of GeoDiT blocks: one beside each base block after the bridge."""
        return self.wan.num_layers - self.geometry.pcb_blocks

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        geo = self.geometry
        if not 0 < geo.pcb_blocks < self.wan.num_layers:
            raise ValueError(f"geometry.pcb_blocks must lie in 1..{self.wan.num_layers - 1}, got {geo.pcb_blocks}")
        if (
            list(geo.head_layers) != sorted(geo.head_layers)
            or not 1 <= geo.head_layers[0] <= geo.head_layers[3] <= self.num_geodit
        ):
            raise ValueError(f"geometry.head_layers must ascend within 1..{self.num_geodit}, got {geo.head_layers}")
        for name, width, heads in (
            ("geometry.bridge_heads", self.wan.dim, geo.bridge_heads),
            ("geometry.cross_heads", geo.cross_dim, geo.cross_heads),
        ):
            if width % heads:
                raise ValueError(f"{name} {heads} does not divide the width {width}")
        if (self.wan.dim // geo.bridge_heads) % 2:
            raise ValueError(f"geometry.bridge_heads {geo.bridge_heads} gives an odd head width, which has no rotary embedding")
        width = geo.cross_dim // geo.cross_heads
        if width % 2 or width < 6:
            raise ValueError(
                f"geometry.cross_dim {geo.cross_dim} in {geo.cross_heads} heads gives a head width of {width}; "
                "positions in time, height and width need an even one of at least 6"
            )
        return self


ENCODING_VERSIONS = {
    "vae": 2,  # pixels are scaled in float32
    "text": 2,  # prompts are cleaned of white space
    "image": 1,
}  # raise one when `fw_model.model.encoders` computes its features differently


class WeightsConfig(Config):
    """Where weights come from: a hub repository or local folder, or `seeded` (filled from a seed, nothing downloaded)."""

    source: Literal["hub", "seeded"] = "hub"
    repo: str = ""
    revision: str = "main"
    seed: int = 0

    @property
    def identity(self) -> str:
        """Names these weights in dataset and checkpoint metadata; two runs that differ here may not be mixed."""
        return f"{self.repo}@{self.revision}" if self.source == "hub" else f"seeded:{self.seed}"

    @model_validator(mode="after")
    def _check(self) -> WeightsConfig:
        if self.source == "hub" and not self.repo:
            raise ValueError("repo: a hub id or a local folder is needed when source is 'hub'")
        return self


class EncodersConfig(Config):
    """VAE, text and image encoders. They run once per clip in the pipeline and are never loaded while training.

    The dimensions are used for seeded weights only; hub weights bring their own configuration.
    """

    weights: WeightsConfig
    vae_dim: int = 96
    text_dim: int = 4096
    text_layers: int = 24
    image_dim: int = 1280
    image_layers: int = 32
    image_size: int = 224
    image_patch: int = 14
    dtype: Literal["float32", "bfloat16"] = "bfloat16"

    def identities(self, text_len: int) -> dict[str, str]:
        """Who makes the features: "vae", "text" and "image" -> weights, revision, size, dtype and code version in words.

        They stand in the dataset with every clip and prompt. Features may be used together, and by a training run, only
        where these are equal. `text_len`: tokens at which prompts are cut.
        """
        seeded = self.weights.source == "seeded"
        sizes = {
            "vae": f"width {self.vae_dim}",
            "text": f"width {self.text_dim} x {self.text_layers}",
            "image": f"width {self.image_dim} x {self.image_layers}, {self.image_size} px / {self.image_patch}",
        }
        named = {}
        for part, version in ENCODING_VERSIONS.items():
            facts = [sizes[part]] if seeded else []  # published weights have the sizes of their repository
            facts += [f"cut at {text_len} tokens"] if part == "text" else []
            named[part] = f"{self.weights.identity} {part} ({', '.join([*facts, self.dtype, f'v{version}'])})"
        return named


class ClipConfig(Config):
    """What a clip is: T = 4k+1 frames at a fixed rate, in a landscape or a portrait bucket.

    In a file or override `size: 288x512` stands for both sides. A dataset is made at one clip size and trained at it; see
    `fw_model.train.run.open_dataset`.
    """

    frames: int = 81
    fps: float = 16.0
    short_side: int = 336
    long_side: int = 592
    stride: int = 81  # frames from the start of one clip to the start of the next
    max_clips_per_video: int = 64

    def bucket(self, height: int, width: int) -> tuple[int, int, int]:
        """(H, W, T) of the bucket for a source of this orientation; a square source counts as landscape."""
        if height > width:
            return self.long_side, self.short_side, self.frames
        return self.short_side, self.long_side, self.frames

    @property
    def buckets(self) -> tuple[str, str]:
        """The two buckets "HxWxT" a dataset of this configuration may have: landscape and portrait."""
        return tuple("x".join(map(str, self.bucket(*sides))) for sides in ((1, 2), (2, 1)))  # type: ignore[return-value]

    @model_validator(mode="after")
    def _check(self) -> ClipConfig:
        if self.frames % 4 != 1 or self.frames < 5:
            raise ValueError(
                f"frames must be 4k+1 and at least 5 (the VAE folds 4 frames into one latent), got {self.frames}; "
                f"nearest: {max(5, (self.frames - 1) // 4 * 4 + 1)} or {max(5, (self.frames + 2) // 4 * 4 + 1)}"
            )
        for key in ("short_side", "long_side"):
            value = getattr(self, key)
            if value % 16 or value <= 0:
                raise ValueError(
                    f"{key} must be a positive multiple of 16, got {value}; nearest: "
                    f"{max(16, value // 16 * 16)} or {value // 16 * 16 + 16}"
                )
        if self.stride < 1:
            raise ValueError(f"stride must be at least 1, got {self.stride}")
        return self


class AugmentConfig(Config):
    """Changes of a clip and its geometry before it is encoded; see `fw_model.data.augment`."""

    flip: float = Field(0.0, ge=0, le=1)  # chance that a clip is mirrored
    reverse: float = Field(0.0, ge=0, le=1)  # chance that it is played backwards
    strides: tuple[int, ...] = (1,)  # every s-th frame, s drawn from these (repeat one to draw it more often)

    @model_validator(mode="after")
    def _check(self) -> AugmentConfig:
        if not self.strides or min(self.strides) < 1:
            raise ValueError(f"strides must be one or more numbers of at least 1, got {list(self.strides)}")
        return self


class StageConfig(Config):
    """One training stage."""

    steps: int = Field(ge=1)
    global_batch: int = Field(ge=1)  # clips per step: batch_per_device x accumulation x processes; accumulation is computed
    batch_per_device: int = Field(1, ge=1)
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"  # adamw8bit: bitsandbytes, 2 bytes of moments a weight, CUDA only
    offload_optimizer: bool = False  # AdamW's moments in ordinary memory, streamed to the GPU at each step: the same numbers
    learning_rate: float = Field(1e-5, gt=0)
    weight_decay: float = Field(0.01, ge=0)  # of matrices; biases, norms, gates and tokens are not decayed
    warmup_steps: int = Field(0, ge=0)
    lr_schedule: Literal["constant", "cosine"] = "constant"
    max_grad_norm: float = Field(1.0, gt=0)
    ema_decay: float = Field(0.0, ge=0, lt=1)  # 0: no moving average; else it is validated and saved beside the weights
    save_every: int = Field(1000, ge=1)  # steps from one checkpoint to the next
    keep_checkpoints: int | None = Field(None, ge=1)  # the newest that stay; None: all of them
    state_every: int = Field(200, ge=1)  # steps from one state to the next, which is what a crash costs; also with checkpoints
    keep_states: int = Field(2, ge=1)
    validate_every: int = Field(1000, ge=1)
    validation_clips: int = Field(16, ge=1)
    sample_every: int | None = Field(None, ge=1)  # stage 2: steps between worlds of held-out prompts; None: no worlds
    sample_clips: int = Field(2, ge=1)  # how many of them
    sample_steps: int = Field(25, ge=1)  # of denoising
    log_every: int = Field(10, ge=1)
    seed: int = 0
    workers: int = Field(2, ge=0)
    encode_online: bool = False  # for a dataset of pictures: VAE, CLIP and UMT5 run while training; takes memory and time
    augment: AugmentConfig | None = None  # of the training clips; with encode_online only
    precision: Literal["float32", "bfloat16"] = "bfloat16"  # of the computation; trained weights are kept in float32
    gradient_checkpointing: bool = True
    attention: AttentionChoice = "auto"  # the kernel of all attention; auto: torch chooses, and the log says what
    compile: bool = False  # torch.compile of every base and GeoDiT block
    sharding: Literal["none", "fsdp"] = "none"  # fsdp: weights, gradients and moments are shared out over the processes
    timesteps: TimestepChoice = "shifted"  # as the base was trained; uniform in sigma; mixed: half of each
    text_dropout: float = Field(0.1, ge=0, le=1)  # chance that a clip is trained on with the empty prompt in place of its own
    image_dropout: float = Field(0.1, ge=0, le=1)  # chance that its image latents are zeros
    clip_dropout: float = Field(0.1, ge=0, le=1)  # chance that its CLIP features are zeros
    camera_probability: float = Field(0.5, ge=0, le=1)  # chance that a clip has a camera at all; else it must be seen
    pose_probability: float = Field(0.5, ge=0, le=1)  # chance that a clip with a camera has pose tokens in the geometry branch
    dynamic: Dynamic = "keep"  # exclude: things that move of themselves, where the dataset knows them, are in no dense loss
    loss_quantile: float = Field(1.0, gt=0, le=1)  # depth and point errors above this quantile of their clip are left out
    lambda_geometry: float = Field(1.0, ge=0)  # weight of L_geo beside L_diff in stage 2
    camera_weight: float = Field(3.0, ge=0)
    train_geometry: bool = True  # stage 2 only: false trains the adapters and cross-attention alone, as the paper
    max_skipped: int = Field(10, ge=0)  # steps with a non-finite loss or gradient that are passed over before the run stops
    spike_factor: float = Field(4.0, gt=1)  # a loss this many times the median of the last 100 steps is reported
    stall_seconds: float = Field(300, gt=0)  # without a batch for so long the run stops and names the clips it waits for
    collective_timeout: float = Field(600, gt=0)  # seconds one process waits for another; longer than a state takes to write
    trackers: tuple[str, ...] = ("tensorboard",)  # any that accelerate knows and is installed: wandb, mlflow, ...

    @model_validator(mode="after")
    def _check(self) -> StageConfig:
        if self.optimizer == "adamw8bit" and self.offload_optimizer:
            raise ValueError("offload_optimizer keeps AdamW's moments in ordinary memory, adamw8bit makes them small: choose one")
        if self.sharding == "fsdp" and (self.optimizer == "adamw8bit" or self.offload_optimizer):
            raise ValueError("sharding: fsdp shares out the moments already; it goes with optimizer: adamw, not offloaded")
        if self.augment is not None and not self.encode_online:
            raise ValueError(
                "augment: cached latents cannot be mirrored, reversed or strided, since the VAE is causal in time and not "
                "mirror-symmetric; pack a dataset of pictures and set encode_online: true (docs/dataset.md, Augmentations)"
            )
        if self.stall_seconds >= self.collective_timeout:  # else the others give up before the one that waits says for what
            raise ValueError(
                f"stall_seconds {self.stall_seconds:g} must be less than collective_timeout {self.collective_timeout:g}"
            )
        return self


class Preset(Config):
    """Everything a run needs to know, validated as a whole."""

    name: str
    base: WeightsConfig
    model: ModelConfig
    encoders: EncodersConfig
    clip: ClipConfig
    stage1: StageConfig
    stage2: StageConfig

    def stage(self, stage: Stage) -> StageConfig:
        return self.stage1 if stage == "stage1" else self.stage2

    def encode_online(self) -> bool:
        """Whether the one dataset of both stages holds pictures; raises ConfigError when the stages do not agree on it."""
        if self.stage1.encode_online != self.stage2.encode_online:
            raise ConfigError(
                f"preset {self.name!r}: stage1.encode_online is {self.stage1.encode_online}, stage2.encode_online "
                f"{self.stage2.encode_online}, but the pipeline packs one dataset for both; set both alike"
            )
        return self.stage1.encode_online

    def digest(self, *sections: str) -> str:
        """Short stable hash of the named sections (all of them by default), for output folders and cache keys."""
        dumped = self.model_dump(mode="json", include=set(sections) if sections else None)
        return hashlib.sha256(json.dumps(dumped, sort_keys=True).encode()).hexdigest()[:12]

    @model_validator(mode="after")
    def _check(self) -> Preset:
        enc, wan = self.encoders, self.model.wan
        if enc.text_dim != wan.text_dim or enc.image_dim != wan.image_dim:
            raise ValueError(
                f"encoders give text {enc.text_dim} / image {enc.image_dim} features, "
                f"but the base takes {wan.text_dim} / {wan.image_dim}"
            )
        return self


def load_preset(name_or_path: str, overrides: list[str] | None = None, config: Path | None = None) -> Preset:
    """Read a preset by name or a YAML file by path, merge the file `config` over it, apply `a.b=value` overrides, validate.

    A file may name a preset to start from under the key `preset`; its other keys are merged over it.
    Raises ConfigError for a missing preset, an unknown key or a value that does not fit.
    """
    raw = read_layers(name_or_path, overrides or [], config)
    return parse_preset(raw, where=name_or_path if config is None else f"{name_or_path} with {config}")


def parse_preset(raw: dict[str, Any], where: str = "preset") -> Preset:
    """Validate a dictionary (e.g. one stored in a checkpoint) as a Preset; raises ConfigError naming every bad key."""
    try:
        return Preset.model_validate(raw)
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, e['loc'])) or '(whole)'}: {e['msg']}{_nearest(e)}" for e in error.errors()]
        raise ConfigError(f"{where}: not a valid preset\n" + "\n".join(lines)) from error


def _nearest(error: ErrorDetails) -> str:
    """The key that was meant, where an error is about one that does not exist."""
    if error["type"] != "extra_forbidden":
        return ""
    *above, key = error["loc"]
    place: Any = Preset
    for part in above:
        kinds = [place.model_fields[str(part)].annotation, *get_args(place.model_fields[str(part)].annotation)]
        place = next((kind for kind in kinds if hasattr(kind, "model_fields")), None)
        if place is None:
            return ""
    return did_you_mean(str(key), place.model_fields)
