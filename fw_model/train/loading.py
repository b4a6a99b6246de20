"""Batches for the loop: prepared ahead by threads, waited for with an eye on the clock, so that a stalled disk has a name.

Threads, not processes: mapping a clip, hashing it and copying several into a batch are single calls that let go of Python's
lock, so threads of one process do them side by side, and nothing has to be handed from one process to another.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, wait

import torch

from fw_model.data.dataset import collate
from fw_model.data.opening import Clips
from fw_model.data.sampler import ResumableBucketSampler
from fw_model.data.schema import Batch
from fw_model.errors import TrainingError

AHEAD = 2  # micro-batches that every worker prepares before they are asked for
_LAST_SECONDS = 5.0  # for reads under way when training ends


class Batches:
    """This rank's micro-batches from the sampler's state on, without end.

    They come in the sampler's order whatever the number of workers. A read that never returns cannot be interrupted, but
    the loop can give up on it. Close it, or leave it as a context manager, to let the threads end.
    """

    def __init__(
        self,
        clips: Clips,
        sampler: ResumableBucketSampler,
        workers: int,
        patience: float,
        pin_memory: bool = False,
    ) -> None:
        """workers: threads that read ahead, 0 to read each batch when it is asked for; patience: seconds without a batch
        before `next` gives up; pin_memory: put batches where the current GPU fetches them without waiting for the copy."""
        self.waited = 0.0  # seconds spent waiting since `take_wait`
        self._clips = clips
        self._order = iter(sampler)
        self._patience = patience
        self._ahead = AHEAD * workers
        self._device = torch.cuda.current_device() if pin_memory else None
        self._pending: deque[tuple[list[int], Future[Batch]]] = deque()
        self._asked: queue.SimpleQueue[tuple[list[int], Future[Batch]] | None] = queue.SimpleQueue()
        # Daemons: one that hangs in a read must not keep the process from ending.
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(max(1, workers))]
        for thread in self._threads:
            thread.start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __next__(self) -> Batch:
        """The next micro-batch.

        Raises TrainingError naming clips and shards when none comes in time, and what a worker met as it is: DatasetError
        for a damaged clip.
        """
        started = time.perf_counter()
        while len(self._pending) <= self._ahead:
            request: tuple[list[int], Future[Batch]] = next(self._order), Future()
            self._pending.append(request)
            self._asked.put(request)
        due, batch = self._pending.popleft()
        wait([batch], self._patience)
        self.waited += time.perf_counter() - started
        if not batch.done():
            raise TrainingError(
                f"no batch for {self._patience:g} s (stall_seconds), waiting for {self._words(due)}. Look whether disk and "
                "network answer, then run the same command again to go on from the last state"
            )
        return batch.result()

    def take_wait(self) -> float:
        """Seconds spent waiting for batches since this was last asked."""
        waited, self.waited = self.waited, 0.0
        return waited

    def close(self) -> None:
        """Let the threads end, and wait a few seconds for those that are at a batch."""
        for _, batch in self._pending:
            batch.cancel()
        for _ in self._threads:
            self._asked.put(None)
        deadline = time.monotonic() + _LAST_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _work(self) -> None:
        if self._device is not None:
            torch.cuda.set_device(self._device)  # a new thread's is the first GPU, whichever the run is on
            torch.set_num_threads(1)  # of this thread: the copy into pinned memory takes no core from the others
        while (request := self._asked.get()) is not None:
            due, batch = request
            if not batch.set_running_or_notify_cancel():
                continue
            try:
                loaded = collate([self._clips[index] for index in due])
                batch.set_result(loaded if self._device is None else loaded.pin_memory())
            except BaseException as error:  # whatever it is, it is the loop's to raise
                batch.set_exception(error)

    def _words(self, due: list[int]) -> str:
        rows = [self._clips.rows[index % len(self._clips)] for index in due]  # a sampler may tell the epoch, too
        return ", ".join(f"clip {row.clip_id} in {self._clips.path}/{row.shard}" for row in rows)
