"""Which attention kernel a run computes with: the stage's knob."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fw_model.config import AttentionChoice, StageConfig, WanConfig
from fw_model.errors import TrainingError

KERNELS: dict[AttentionChoice, SDPBackend] = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def attention_kernel(choice: AttentionChoice) -> AbstractContextManager[None]:
    """Forward and backward passes inside run this attention and no other; "auto" leaves torch its order of preference.

    The choice holds for the whole process, so that what the backward pass recomputes in its own thread has it too.
    """
    return nullcontext() if choice == "auto" else sdpa_kernel(KERNELS[choice])


def chosen_attention(config: StageConfig, wan: WanConfig, device: torch.device) -> AttentionChoice:
    """The kernel that a run's self-attention gets on `device`, as torch itself answers for its heads and precision.

    Raises TrainingError for one that does not run there; the message names those that do.
    """

    def answer(choice: AttentionChoice) -> AttentionChoice | None:
        dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
        q = torch.empty(1, wan.num_heads, 128, wan.head_dim, dtype=dtype, device=device, requires_grad=True)
        with attention_kernel(choice):
            try:
                found = torch._fused_sdp_choice(q, q, q)
            except RuntimeError:  # nothing that is allowed here runs here
                return None
        return next((name for name, kernel in KERNELS.items() if kernel.value == found), None)

    found = answer(config.attention)
    if found is None or config.attention not in ("auto", found):
        there = ", ".join(name for name in KERNELS if answer(name) == name)
        raise TrainingError(
            f"attention: {config.attention} does not run on {device.type} with heads of {wan.head_dim} in {config.precision}",
            f"Choose auto or one of: {there}",
        )
    return found
