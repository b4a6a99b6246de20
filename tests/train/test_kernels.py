"""The attention that was asked for is the one that runs, what cannot run is refused first, and float32 keeps its digits."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fw_model.errors import TrainingError
from fw_model.train import loop as train
from fw_model.train import run as training_run
from fw_model.train.identity import run_identity
from fw_model.train.kernels import KERNELS, attention_kernel, chosen_attention
from tests.helpers.training import no_model, small_preset

ONE_STEP = ("stage1.steps=1", "stage1.warmup_steps=0", "stage1.validate_every=10")


def test_every_attention_of_a_run_is_the_chosen_kernels_and_the_log_says_which(
    dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validation, training, and what the backward pass recomputes."""
    ran: list[tuple[int, bool]] = []
    attention = F.scaled_dot_product_attention

    def spy(*args: Any, **kwargs: Any) -> Any:
        ran.append((torch._fused_sdp_choice(*args, **kwargs), torch._C._current_graph_task_id() >= 0))
        return attention(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    with caplog.at_level(logging.INFO):
        train.train(
            small_preset(*ONE_STEP, "stage1.attention=math", "stage1.gradient_checkpointing=true"), "stage1", dataset, tmp_path
        )
    assert {kernel for kernel, _ in ran} == {KERNELS["math"].value}
    assert {in_backward for _, in_backward in ran} == {False, True}
    assert "attention: math on cpu; blocks not compiled" in [record.message for record in caplog.records]


def test_left_alone_torch_chooses_and_the_log_says_what(dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        train.train(small_preset(*ONE_STEP), "stage1", dataset, tmp_path)
    assert "attention: flash (torch's choice) on cpu; blocks not compiled" in [record.message for record in caplog.records]


def test_kernel_that_does_not_run_here_is_refused_with_those_that_do(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_run.FantasyWorld, "from_preset", no_model)
    with pytest.raises(
        TrainingError, match="attention: cudnn does not run on cpu with heads of 16 .*\nChoose auto or one of: flash, math"
    ):
        train.train(small_preset("stage1.attention=cudnn"), "stage1", dataset, tmp_path)


def test_a_run_may_go_on_with_another_kernel() -> None:
    """It is no part of what decides the weights, as little as the number of GPUs is."""
    digests = {run_identity(small_preset(f"stage1.attention={name}"), "stage1", "data").config_digest for name in KERNELS}
    assert len(digests) == 1


def test_the_choice_ends_with_the_run() -> None:
    q = torch.randn(1, 2, 8, 16)
    before = torch._fused_sdp_choice(q, q, q)
    with attention_kernel("math"):
        assert torch._fused_sdp_choice(q, q, q) == KERNELS["math"].value
        F.scaled_dot_product_attention(q, q, q)
    assert torch._fused_sdp_choice(q, q, q) == before


def test_answer_is_of_the_runs_own_precision_and_heads() -> None:
    preset = small_preset()
    for precision in ("float32", "bfloat16"):
        config = preset.stage1.model_copy(update={"precision": precision})
        assert chosen_attention(config, preset.model.wan, torch.device("cpu")) == "flash"
