"""Batches for the loop: read by data workers, waited for with an eye on the clock, so that a stalled disk has a name."""

from __future__ import annotations

import os
import queue
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from fw_model.data.dataset import collate
from fw_model.data.opening import Clips
from fw_model.data.sampler import ResumableBucketSampler
from fw_model.data.schema import Batch
from fw_model.errors import TrainingError


class Batches:
    """This rank's micro-batches from the sampler's state on, without end.

    Waiting is done beside a thread that asks the loader: a read that never returns cannot be interrupted, but the loop can
    give up on it.
    """

    def __init__(
        self,
        clips: Clips,
        sampler: ResumableBucketSampler,
        workers: int,
        patience: float,
        pin_memory: bool = False,
    ) -> None:
        """workers: data processes, 0 to read in this one; patience: seconds without a batch before `next` gives up;
        pin_memory: put batches where a GPU fetches them without waiting for the copy."""
        self.waited = 0.0  # seconds spent waiting since `take_wait`
        self._clips = clips
        self._due = iter(sampler)
        self._patience = patience
        # Its own generator: without one the loader draws its workers' seed from torch's global one.
        options: dict[str, Any] = {"num_workers": workers, "worker_init_fn": _apart, "generator": torch.Generator()}
        loader = DataLoader(clips, batch_sampler=sampler, collate_fn=collate, pin_memory=pin_memory, **options)
        self._requests: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._replies: queue.SimpleQueue[Batch | BaseException] = queue.SimpleQueue()
        threading.Thread(target=_serve, args=(iter(loader), self._requests, self._replies), daemon=True).start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next micro-batch.

        Raises TrainingError naming clips and shards when none comes in time, DatasetError for a damaged clip.
        """
        started = time.perf_counter()
        due = next(self._due)
        self._requests.put(True)
        try:
            reply = self._replies.get(timeout=self._patience)
        except queue.Empty:
            raise TrainingError(
                f"no batch for {self._patience:g} s (stall_seconds), waiting for {self._words(due)}. Look whether disk and "
                "network answer, then run the same command again to go on from the last state"
            ) from None
        finally:
            self.waited += time.perf_counter() - started
        if isinstance(reply, BaseException):
            raise reply
        return reply

    def worker_died(self, error: RuntimeError) -> TrainingError | None:
        """What to say when a data worker was killed: torch then raises `error` in the main thread, wherever that is.

        None for any other error.
        """
        if "DataLoader worker" not in str(error):
            return None
        return TrainingError(
            f"{str(error).strip()} Next to be read: {self._words(next(self._due))}. Out of memory is the usual cause; fewer "
            "workers need less. Run the same command again to go on from the last state"
        )

    def take_wait(self) -> float:
        """Seconds spent waiting for batches since this was last asked."""
        waited, self.waited = self.waited, 0.0
        return waited

    def close(self) -> None:
        """Let the thread, and with it the data workers, end."""
        self._requests.put(False)

    def _words(self, due: list[int]) -> str:
        rows = [self._clips.rows[index % len(self._clips)] for index in due]  # a sampler may tell the epoch, too
        return ", ".join(f"clip {row.clip_id} in {self._clips.path}/{row.shard}" for row in rows)


def _serve(loader: Any, requests: queue.SimpleQueue[bool], replies: queue.SimpleQueue[Batch | BaseException]) -> None:
    while requests.get():
        try:
            replies.put(next(loader))
        except BaseException as error:
            replies.put(error)


def _apart(worker: int) -> None:
    """Put a data worker into a process group of its own: a Ctrl-C, or a signal to the whole group, then reaches only the
    training process, which finishes its step. The worker ends with a plain SIGTERM, not with the handler it inherited."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
