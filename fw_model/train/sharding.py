"""Sharding a model over processes with torch's `fully_shard` (FSDP2), and tensors between their whole and sharded form.

accelerate's own FSDP silently becomes plain data parallelism on CPUs, so it could never be tested without GPUs; this is the
same on a CPU mesh and on a GPU mesh.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

if TYPE_CHECKING:
    from fw_model.model.fantasy_world import FantasyWorld


def data_mesh(device: torch.device, processes: int) -> DeviceMesh:
    """All processes of the job in one dimension; the process group must be there."""
    return init_device_mesh(device.type, (processes,))


def shard(model: FantasyWorld, mesh: DeviceMesh) -> FantasyWorld:
    """Share out the weights of `model`, in place, over a mesh; gradients and optimizer state follow them.

    A unit is gathered when it runs and let go again: every Wan block, GeoDiT block, bridge layer, head, cross-attention and
    camera adapter; what is left of the geometry branch is gathered once for the whole pass. Wan blocks are frozen in one dtype,
    the rest trains in another, so no unit mixes them. What the base has outside its blocks (embeddings, control adapter,
    output: 5 % of it) is frozen, small and read piece by piece, and stays whole on every process.

    Weights are gathered and gradients reduced in the dtype they are stored in, so that float32 islands see the same numbers
    as without sharding; autocast lowers the precision of the computation afterwards.

    Args:
        model: on its device, in its stage, with its weights: the same on every process.
        mesh: one-dimensional.
    """
    units: list[nn.Module] = [
        *model.base.transformer.blocks,
        *model.bridge.layers,
        *model.geodit.blocks,
        *model.interaction,
        *model.camera_adapters,
        model.depth_head,
        model.point_head,
        model.camera_head,
    ]
    # Heads give views of what they computed. Nothing changes them in place, which is what torch warns of.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for unit in units:
        fully_shard(unit, mesh=mesh)
    whole = {parameter for parameter in model.base.parameters() if not isinstance(parameter, DTensor)}
    # Not torch's default for the outermost unit, which keeps it gathered after a pass without gradients: weights changed in
    # between (a moving average put in place) would not be seen.
    fully_shard(model, mesh=mesh, ignored_params=whole, reshard_after_forward=True)
    return model


def whole_on_main(tensors: Mapping[str, Tensor], main: bool) -> dict[str, Tensor]:
    """The whole tensors in ordinary memory, on the main process; {} on others. All processes must call it together.

    Only one whole tensor is on the device at a time.
    """
    whole: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        full = tensor.detach()
        if isinstance(full, DTensor):
            full = full.full_tensor()
        if main:
            whole[name] = full.to("cpu")
    return whole


@torch.no_grad()
def laid_out_as(tensor: Tensor, like: Tensor) -> Tensor:
    """A copy of a whole CPU tensor, where `like` is and sharded as it is. Nothing is sent between processes."""
    if not isinstance(like, DTensor):
        return tensor.to(like.device, copy=True)
    mesh = like.device_mesh
    part = distribute_tensor(tensor.to(mesh.device_type), mesh, like.placements, src_data_rank=None)
    return torch.empty_like(like.detach(), dtype=tensor.dtype).copy_(part)  # the part alone is a view of the whole
