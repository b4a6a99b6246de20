"""Functions run in processes of their own, forked from a server that has imported torch and the project once."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["fw_model.train", "torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict"])


def start(function: Callable[..., Any], *args: Any, log: Path, world: int = 1) -> list[BaseProcess]:
    """Start `world` processes, each leading a process group of its own and writing to `log`.<rank>.

    With more than one they are the ranks of a job on CPUs, as `accelerate launch --cpu` would start them.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [_CONTEXT.Process(target=_enter, args=(function, args, rank, world, port, log)) for rank in range(world)]
    for process in processes:
        process.start()
    return processes


def run(function: Callable[..., Any], *args: Any, log: Path, world: int = 1, timeout: float = 150) -> list[int]:
    """Start processes and wait for them; their exit codes, negative for a signal."""
    processes = start(function, *args, log=log, world=world)
    codes = []
    for process in processes:
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
        codes.append(process.exitcode or 0)
    return codes


def output(log: Path, rank: int = 0) -> str:
    """What a process wrote."""
    return Path(f"{log}.{rank}").read_text(encoding="utf-8")


def _enter(function: Callable[..., Any], args: tuple[Any, ...], rank: int, world: int, port: int, log: Path) -> None:
    os.setsid()
    with Path(f"{log}.{rank}").open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    sys.exit(function(*args))
