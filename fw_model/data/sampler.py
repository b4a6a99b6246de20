"""The order in which clips are trained on: a pure function of (seed, epoch, buckets), shared out to ranks afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray
from torch.utils.data import Sampler

Indices = NDArray[np.int64]


class ResumableBucketSampler(Sampler[list[int]]):
    """Endless micro-batches of dataset indices for one rank, resumable exactly.

    An epoch: the clips of each bucket are shuffled and cut into global batches (one optimiser step each), so buckets never
    mix within a step; then the global batches of all buckets are shuffled. The last global batch of a bucket is filled up
    from the start of that bucket's shuffled order, several times over if the bucket is smaller than a global batch: no clip
    is dropped, some are seen again. Shuffling sorts by a hash of (seed, epoch, index), so no library's random generator
    has a say in it. A million clips are shuffled in a fraction of a second.

    A global batch is cut into consecutive slices of `batch_per_rank`; in micro-step j rank r gets slice j * world_size + r.
    The union over ranks and over the `accumulation` micro-steps of a step is therefore the same for any number of ranks.

    State is (epoch, samples consumed in it by all ranks). Iterating does NOT move it, because a loader with workers
    draws ahead of training: call `advance()` once after each optimiser step. `iter()` starts at the state, so after
    `load_state_dict` a new iterator gives exactly the batches that were still to come, whatever the number of ranks.

    With `tell_epoch` an index that is given out is epoch * len(buckets) + index, for a dataset that must know the epoch to
    draw its augmentations from (seed, epoch, index), such as `online.OnlineEncodedClips`.
    """

    def __init__(
        self,
        buckets: Sequence[str],
        global_batch: int,
        batch_per_rank: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        tell_epoch: bool = False,
    ) -> None:
        """buckets: the bucket of each dataset index. Raises ValueError when there are no clips, or when the global batch is
        not a whole number of micro-batches on every rank."""
        if not buckets:
            raise ValueError("sampler: the dataset has no clips")
        if min(global_batch, batch_per_rank, world_size) < 1 or not 0 <= rank < world_size:
            raise ValueError(
                f"sampler: global batch {global_batch}, batch per rank {batch_per_rank} and world size {world_size} "
                f"must be positive and rank {rank} within 0..{world_size - 1}"
            )
        if global_batch % (batch_per_rank * world_size):
            raise ValueError(
                f"sampler: global batch {global_batch} is not a multiple of batch per rank {batch_per_rank} x {world_size} ranks"
            )
        self.global_batch, self.batch_per_rank, self.rank, self.world_size, self.seed = (
            global_batch, batch_per_rank, rank, world_size, seed,
        )  # fmt: skip
        self._epoch_stride = len(buckets) if tell_epoch else 0
        coded = pa.array(buckets, pa.string()).dictionary_encode()  # codes in the order of first use
        numbers = coded.indices.to_numpy()
        self._members = {bucket: np.flatnonzero(numbers == code) for code, bucket in enumerate(coded.dictionary.to_pylist())}
        self._buckets_digest = xxhash.xxh64_hexdigest("\n".join(buckets).encode())
        self._epoch = 0
        self._consumed = 0
        self._order: tuple[int, Indices] | None = None

    @property
    def accumulation(self) -> int:
        """Consecutive micro-batches that make one global batch on this rank."""
        return self.global_batch // (self.batch_per_rank * self.world_size)

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in an epoch."""
        return sum(-(-len(members) // self.global_batch) for members in self._members.values())

    @property
    def epoch(self) -> int:
        """Epoch of the next step, from 0."""
        return self._epoch

    def global_batches(self, epoch: int) -> Indices:
        """All global batches of an epoch in order, [steps_per_epoch, global_batch]; a row has indices of one bucket."""
        if self._order is None or self._order[0] != epoch:
            batches, ranks = [], []
            for bucket, members in self._members.items():
                shuffled = members[np.argsort(self._hashes(epoch, "clips", members), kind="stable")]
                steps = -(-len(members) // self.global_batch)
                batches.append(np.resize(shuffled, (steps, self.global_batch)))  # repeats from the start to fill up
                ranks.append(self._hashes(epoch, f"batches/{bucket}", np.arange(steps)))
            order = np.argsort(np.concatenate(ranks), kind="stable")
            self._order = epoch, np.concatenate(batches)[order]
        return self._order[1]

    def __iter__(self) -> Iterator[list[int]]:
        """This rank's micro-batches from the state on, without end."""
        epoch, step = self._epoch, self._consumed // self.global_batch
        while True:
            batches = self.global_batches(epoch)
            for batch in batches[step:]:
                for j in range(self.accumulation):
                    start = (j * self.world_size + self.rank) * self.batch_per_rank
                    yield (batch[start : start + self.batch_per_rank] + epoch * self._epoch_stride).tolist()
            epoch, step = epoch + 1, 0

    def advance(self, steps: int = 1) -> None:
        """Record that `steps` more global batches were trained on."""
        done = self._epoch * self.steps_per_epoch + self._consumed // self.global_batch + steps
        self._epoch, step = divmod(done, self.steps_per_epoch)
        self._consumed = step * self.global_batch

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state; the fields beside `epoch` and `consumed` are there to notice a resume on something else."""
        return {
            "epoch": self._epoch,
            "consumed": self._consumed,
            "seed": self.seed,
            "global_batch": self.global_batch,
            "buckets": self._buckets_digest,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state, made by any number of ranks; raises ValueError if it belongs to another order of clips."""
        expected = self.state_dict()
        if set(state) != set(expected):
            raise ValueError(f"sampler state: expected the keys {sorted(expected)}, got {sorted(state)}")
        for key, what in (("seed", "seed"), ("global_batch", "global batch"), ("buckets", "dataset (clips or buckets)")):
            if state[key] != expected[key]:
                raise ValueError(
                    f"sampler state: it was saved with another {what} ({state[key]}, now {expected[key]}), so the run cannot be "
                    "continued exactly; resume with the same one or start a new run"
                )
        epoch, consumed = int(state["epoch"]), int(state["consumed"])
        if epoch < 0 or consumed % self.global_batch or not 0 <= consumed < self.steps_per_epoch * self.global_batch:
            raise ValueError(f"sampler state: epoch {epoch}, {consumed} samples consumed is not a step of this order")
        self._epoch, self._consumed = epoch, consumed

    def _hashes(self, epoch: int, what: str, numbers: Indices) -> NDArray[np.uint64]:
        """A 64-bit hash of (seed, epoch, what, number) for each number. Ties are left to a stable sort."""
        key = f"{self.seed}/{epoch}/{what}".encode()
        first, second = (np.uint64(xxhash.xxh64_intdigest(key, seed=i)) for i in (0, 1))
        return _mix(_mix(numbers.astype(np.uint64) + first) ^ second)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The output function of splitmix64 (Steele, Lea and Flood 2014): a bijection of 64-bit numbers that scatters them."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
