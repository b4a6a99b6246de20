"""Which annotators a run uses: the one place where settings become engines.

Models are imported here only when they are chosen, and weights are read when the first clip needs them: what is up to date
can be found out without either.
"""

from __future__ import annotations

from fw_pipeline.annotate.types import DepthEngine, EngineError, GeometryEngine
from fw_pipeline.steps.settings import Settings


def geometry_engine(settings: Settings) -> GeometryEngine:
    """The engine `settings.geometry` names, with its settings."""
    if settings.geometry == "colmap":
        from fw_pipeline.annotate.colmap.engine import ColmapEngine

        return ColmapEngine(device=settings.device)
    import torch

    from fw_pipeline.annotate.dust3r import Dust3rEngine

    return Dust3rEngine.from_pretrained(
        settings.dust3r_model,
        revision=settings.dust3r_revision,
        device=settings.device,
        dtype=getattr(torch, settings.dtype),
        window=settings.dust3r_window,
        keyframe_every=settings.dust3r_keyframe_every,
        batch=settings.dust3r_batch,
    )


def depth_engine(settings: Settings) -> DepthEngine:
    """The engine `settings.depth` names, with its settings."""
    from fw_pipeline.annotate.depth import DepthAnythingV2, GeometryDepth

    if settings.depth == "geometry":
        return GeometryDepth()
    return DepthAnythingV2(
        settings.depth_model,
        revision=settings.depth_revision,
        device=settings.device,
        dtype=settings.dtype,
        batch=settings.depth_batch,
    )


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
