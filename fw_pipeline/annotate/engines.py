"""The annotators one can choose, and what each can be told: the one place where settings become engines.

An engine's settings are a model of its own that builds it. A new engine is such a model in `GeometrySettings` or
`DepthSettings`; run config, variables and the launchpad's descriptions follow from its fields.

Models are imported here only when they are chosen, and weights are read when the first clip needs them: what is up to date
can be found out without either.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from fw_model.config import Config
from fw_pipeline.annotate.types import DepthEngine, EngineError, GeometryEngine

Dtype = Literal["float32", "bfloat16"]


class ColmapSettings(Config):
    """Structure from motion on the CPU (pycolmap), then plane-sweep stereo; needs no weights."""

    prefix: ClassVar[str] = "colmap"
    engine: Literal["colmap"] = "colmap"

    def build(self, device: str, dtype: Dtype) -> GeometryEngine:
        from fw_pipeline.annotate.colmap.engine import ColmapEngine

        return ColmapEngine(device=device)


class TracksSettings(Config):
    """Points followed through the clip, a bundle adjustment from many starts, then plane-sweep stereo; needs no weights.

    Refuses what it cannot know: a lens the pictures leave open, a camera that only turns, depth that fits reversed as well."""

    prefix: ClassVar[str] = "tracks"
    engine: Literal["tracks"] = "tracks"

    def build(self, device: str, dtype: Dtype) -> GeometryEngine:
        from fw_pipeline.annotate.bundle.engine import BundleEngine

        return BundleEngine(device=device)


class Dust3rSettings(Config):
    """Pointmaps of pairs of frames by DUSt3R, global alignment of keyframes, PnP for every other frame."""

    prefix: ClassVar[str] = "dust3r"
    engine: Literal["dust3r"] = "dust3r"
    model: str = Field(
        "naver/DUSt3R_ViTLarge_BaseDecoder_512_dpt",
        description="repository of the hub, a folder with config.json and model.safetensors, or an original .pth file",
    )
    revision: str = Field("main", description="branch, tag or commit of the repository; a commit makes a dataset reproducible")
    window: int = Field(
        2, ge=1, description="a keyframe is paired with this many following ones, and with ever rarer farther ones"
    )
    keyframe_every: int = Field(8, ge=1, description="frames between keyframes, at most")
    batch: int = Field(8, ge=1, description="images or pairs in one pass; lower it when the GPU's memory runs out")

    def build(self, device: str, dtype: Dtype) -> GeometryEngine:
        import torch

        from fw_pipeline.annotate.dust3r import Dust3rEngine

        return Dust3rEngine.from_pretrained(
            self.model,
            revision=self.revision,
            device=device,
            dtype=getattr(torch, dtype),
            window=self.window,
            keyframe_every=self.keyframe_every,
            batch=self.batch,
        )


class GeometryDepthSettings(Config):
    """The geometry's own depth as it is."""

    prefix: ClassVar[str] = "geometry_depth"
    engine: Literal["geometry"] = "geometry"

    def build(self, device: str, dtype: Dtype) -> DepthEngine:
        from fw_pipeline.annotate.depth import GeometryDepth

        return GeometryDepth()


class DepthAnythingSettings(Config):
    """A depth network, aligned to the geometry frame by frame."""

    prefix: ClassVar[str] = "depth"
    engine: Literal["depth-anything-v2"] = "depth-anything-v2"
    model: str = Field(
        "depth-anything/Depth-Anything-V2-Small-hf",
        description="repository of the hub (Small, Base, Large, or a metric one) or a folder with its three files",
    )
    revision: str = Field("main", description="branch, tag or commit of the repository; a commit makes a dataset reproducible")
    batch: int | None = Field(None, ge=1, description="frames in one pass; unset: 8 on a GPU, 1 elsewhere")

    def build(self, device: str, dtype: Dtype) -> DepthEngine:
        from fw_pipeline.annotate.depth import DepthAnythingV2

        return DepthAnythingV2(self.model, revision=self.revision, device=device, dtype=dtype, batch=self.batch)


# The engines there are. `prefix` begins the names under which an engine's fields are set from outside: `dust3r_model`.
GeometrySettings = Annotated[TracksSettings | ColmapSettings | Dust3rSettings, Field(discriminator="engine")]
DepthSettings = Annotated[GeometryDepthSettings | DepthAnythingSettings, Field(discriminator="engine")]


def require_device(device: str) -> None:
    """Raise EngineError unless torch can compute on `device` here."""
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # a torch built without CUDA asserts
        raise EngineError(
            f"device {device!r} cannot be used here: {str(error).partition(chr(10))[0]}\n"
            f"Set `device: cpu` in the run config of the resource `pipeline`, FW_DEVICE=cpu, or FW_PROFILE=laptop."
        ) from error
