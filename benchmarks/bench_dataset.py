"""The dataset against the guide layout (81 float32 npy a clip for depth and for points) and a webdataset tar of the same arrays.

The same clips of 81 x 336 x 592, written by the project's own writer, its guide-layout export and into a tar, are read one clip
at a time by as many workers: the dataset by the threads that training uses, the others by a `DataLoader` with its processes.
All files lie in the page cache when timing starts (each is read once before), so it is parsing and copying that is compared,
not the disk. The dataset's and the guide layout's clips are drawn at random; a tar is read from its start to its end. Every
batch that arrives is copied once, into memory that is used again and again, as on the way to a GPU it would be into pinned
memory: what a loader leaves to be paged in counts.

The other two deliver depth and points. The dataset delivers depth, latents, cameras and text; points are derived from depth
on the device that trains, and how long that takes here is measured and printed beside the loader's speed: on a GPU it is
part of the clips per second that the bar is held against. On a CPU it is not, because writing a clip's 193 MB of points
takes longer than loading it, whoever does it.

    python benchmarks/bench_dataset.py [--quick] [--workers 2] [--folder DIR]

Prints a table and a last line of JSON; exits with 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.utils.data import DataLoader, Dataset

from fw_model.cameras import unproject
from fw_model.data.dataset import ClipDataset
from fw_model.data.manifest import MANIFEST, write_table
from fw_model.data.sampler import ResumableBucketSampler
from fw_model.data.schema import Batch, ClipRecord
from fw_model.data.shard_writer import ShardWriter
from fw_model.train.loading import Batches
from fw_model.trajectory.text import make_trajectory
from fw_pipeline.guide_layout.exporter import export_guide

T, H, W = 81, 336, 592
TEXT, IMAGE = (64, 4096), (257, 1280)  # a prompt of 64 tokens; CLIP ViT-H
TEXT_LEN = 512
VERSION = "bench"
BARS = {"speed_up": 10.0, "bytes_ratio": 0.25, "memory_growth": 0.05, "first_batch_seconds": 3.0, "first_batch_gigabytes": 1.5}
MEMORY_CLIPS = 200
MANIFEST_ROWS = 1_000_000
SMALL = (32, 48, 5)  # clips behind the synthetic manifest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer clips and draws, the same bars")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--folder", type=Path, help="where the clips are written and removed again (default: the system's temp folder)"
    )
    parser.add_argument("--first-batch", type=Path, help=argparse.SUPPRESS)  # the subprocess that opens a large manifest
    args = parser.parse_args()
    if args.first_batch:
        print(json.dumps(first_batch(args.first_batch)))
        return 0
    folder = Path(tempfile.mkdtemp(prefix="bench_dataset_", dir=args.folder))
    try:
        result = run(folder, clips=4 if args.quick else 8, draws=16 if args.quick else 48, workers=args.workers)
    finally:
        shutil.rmtree(folder)
    return report(result)


def run(folder: Path, clips: int, draws: int, workers: int) -> dict[str, Any]:
    dataset, guide, tar = folder / "dataset", folder / "guide", folder / "clips.tar"
    names = write_dataset(dataset, clips, (H, W, T), TEXT, IMAGE)
    export_guide(dataset, guide, None)
    write_tar(tar, guide, names)
    opened = ClipDataset(dataset, "train", TEXT_LEN)
    rng = np.random.default_rng(0)
    order = [int(i) for i in rng.permutation(np.resize(np.arange(clips), draws))]
    found: dict[str, Any] = {"clips": clips, "draws": draws, "workers": workers, "size": f"{H}x{W}x{T}"}

    def ours(count: int) -> Iterator[Batch]:
        sampler = ResumableBucketSampler(opened.buckets, global_batch=1, batch_per_rank=1)
        with Batches(opened, sampler, workers, patience=600) as batches:
            yield from islice(batches, count)

    guide_files = GuideFiles(guide, names)
    rates: dict[str, list[float]] = {"dataset": [], "guide": [], "webdataset": []}
    for number in range(4):  # the first round fills the page cache; then in turns, so that a busy moment hits all three
        for name, loader in (
            ("dataset", ours(draws)),
            ("guide", DataLoader(guide_files, batch_size=None, sampler=order, num_workers=workers)),
            ("webdataset", webdataset_loader(tar, workers)),
        ):
            rate = clips_per_second(loader)
            if number:
                rates[name].append(rate)
    for name, measured in rates.items():
        found[f"{name}_clips_per_second"] = float(np.median(measured))
    found |= points_on_device(next(ours(1)))
    if found["device"] != "cpu":  # loading and deriving go on at the same time; the slower one counts
        found["dataset_clips_per_second"] = min(found["dataset_clips_per_second"], 1 / found["points_seconds"])
    found["speed_up"] = found["dataset_clips_per_second"] / found["guide_clips_per_second"]
    found["speed_up_webdataset"] = found["dataset_clips_per_second"] / found["webdataset_clips_per_second"]
    for name, path in (("dataset", dataset), ("guide", guide), ("webdataset", tar)):
        found[f"{name}_megabytes_per_clip"] = size_of(path) / clips / 1e6
    found["bytes_ratio"] = found["dataset_megabytes_per_clip"] / found["guide_megabytes_per_clip"]
    found |= memory(ours(MEMORY_CLIPS))
    found |= large_manifest(folder / "large")
    return found


# ------------------------------------------------------------------------------------------------------------- writing


def write_dataset(path: Path, clips: int, size: tuple[int, int, int], text: tuple[int, int], image: tuple[int, int]) -> list[str]:
    """Pack made clips, each in a shard of its own size or more; returns their ids."""
    names = [f"clip-{i:04d}" for i in range(clips)]
    with ShardWriter(path) as writer:
        for i, name in enumerate(names):
            writer.add(made_clip(name, i, size, image), "train")
        for prompt in ("a room", ""):
            writer.add_text(prompt, np.random.default_rng(0).normal(size=text).astype(np.float16), VERSION)
    return names


def made_clip(name: str, seed: int, size: tuple[int, int, int], image: tuple[int, int]) -> ClipRecord:
    """A clip with depth like a network's: smooth surfaces, edges and a little noise."""
    height, width, frames = size
    rng = np.random.default_rng(seed)
    cameras = make_trajectory("orbit_right", frames, height, width)
    v, u = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j].astype(np.float32)
    depth = np.empty((frames, height, width), np.float16)
    for t in range(frames):
        wall = 1 + 0.3 * np.sin(3 * u + 2 * v + 0.05 * t + seed)
        box = (np.abs(u - 0.5 - 0.003 * t) < 0.2) & (np.abs(v - 0.5) < 0.25)
        depth[t] = np.where(box, 0.6 + 0.1 * u, wall) * (1 + 0.002 * rng.standard_normal((height, width), np.float32))
    confidence = np.clip(255 - 100 * np.abs(depth.astype(np.float32) - 1), 0, 255).astype(np.uint8)
    latents = rng.standard_normal((16, 1 + (frames - 1) // 4, height // 8, width // 8), np.float32)
    return ClipRecord(
        clip_id=name,
        video=f"{name}.mp4",
        fps=16.0,
        scale=1.0,
        prompt="a room",
        arrays={
            "latents": latents.astype(np.float16),
            "image": rng.standard_normal(image, np.float32).astype(np.float16),
            "depth": depth,
            "confidence": confidence,
            "intrinsics": cameras.intrinsics.numpy(),
            "w2c": cameras.w2c.numpy(),
        },
        quality={},
        versions={"vae": VERSION, "text": VERSION, "image": VERSION},
    )


def write_tar(path: Path, guide: Path, names: list[str]) -> None:
    """webdataset's layout: `<id>.depth.npy` [T, H, W] and `<id>.points.npy` [T, H, W, 3], float32, one after the other."""
    with tarfile.open(path, "w") as tar:
        for name in names:
            for kind in ("depth", "points"):
                files = sorted((guide / kind / name).iterdir())
                buffer = BytesIO()
                np.save(buffer, np.stack([np.load(file, allow_pickle=False) for file in files]), allow_pickle=False)
                info = tarfile.TarInfo(f"{name}.{kind}.npy")
                info.size = buffer.tell()
                buffer.seek(0)
                tar.addfile(info, buffer)


def size_of(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


# ------------------------------------------------------------------------------------------------------------- loading


class GuideFiles(Dataset[dict[str, torch.Tensor]]):
    """What a careful reader of the guide layout does: each npy is read straight into its place in the clip's array."""

    def __init__(self, root: Path, names: list[str]) -> None:
        self.root, self.names = root, names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        out = {}
        for kind, shape in (("depth", (T, H, W)), ("points", (T, H, W, 3))):
            whole = np.empty(shape, np.float32)
            folder = self.root / kind / self.names[index]
            for t in range(T):
                whole[t] = np.load(folder / f"frame_{t:04d}.npy", allow_pickle=False)
            out[kind] = torch.from_numpy(whole)
        return out


def _to_tensors(sample: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {kind: torch.from_numpy(sample[f"{kind}.npy"]) for kind in ("depth", "points")}


def _every_worker(sources: Iterable[Any]) -> Iterable[Any]:
    return sources


def webdataset_loader(tar: Path, workers: int) -> Iterable[Any]:
    """One pass of every worker over the tar, as if each had a shard of this size."""
    import webdataset

    data = webdataset.WebDataset(str(tar), shardshuffle=False, workersplitter=_every_worker).decode().map(_to_tensors)
    return DataLoader(data, batch_size=None, num_workers=workers)


def clips_per_second(loader: Iterable[Any]) -> float:
    """From the first delivered batch to the last: workers' start is not counted."""
    batches: Iterator[Any] = iter(loader)
    arrived = Arrival(next(batches))
    start, count = time.perf_counter(), 0
    for batch in batches:
        arrived.take(batch)
        count += 1
    return count / (time.perf_counter() - start)


class Arrival:
    """Where a batch goes: memory of its size that the next one goes to as well."""

    def __init__(self, batch: Any) -> None:
        self.places = {
            name: torch.empty_like(tensor, memory_format=torch.contiguous_format) for name, tensor in tensors_of(batch)
        }
        self.take(batch)

    def take(self, batch: Any) -> None:
        for name, tensor in tensors_of(batch):
            self.places[name].copy_(tensor)


def tensors_of(batch: Any) -> list[tuple[str, torch.Tensor]]:
    named = batch if isinstance(batch, dict) else vars(batch)
    return [(name, value) for name, value in named.items() if isinstance(value, torch.Tensor)]


def points_on_device(batch: Any) -> dict[str, Any]:
    """Seconds to move a batch and derive its points, on the GPU if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    finish: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else lambda: None
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        moved = batch.to(device)
        points = unproject(moved.depth, moved.intrinsics, moved.w2c)
        finish()
        seconds.append(time.perf_counter() - start)
        del points
    return {"device": device, "points_seconds": min(seconds)}


# -------------------------------------------------------------------------------------------------------------- memory


def memory(loader: Iterable[Any]) -> dict[str, float]:
    """Memory of the loader and its workers (anonymous and shared, without the page cache) over MEMORY_CLIPS clips."""
    seen = []
    for _ in loader:
        seen.append(_held())
    early = max(seen[20 : MEMORY_CLIPS // 2])  # long enough to have seen as many batches ahead at once as there ever are
    late = max(seen[MEMORY_CLIPS // 2 :])
    return {"memory_megabytes": late / 1e6, "memory_growth": late / early - 1}


def _held() -> int:
    total = 0
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        try:
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
        except OSError:
            continue
        total += sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(("RssAnon", "RssShmem")))
    return total


# ------------------------------------------------------------------------------------------------------ large manifest


def large_manifest(path: Path) -> dict[str, float]:
    """A manifest of MANIFEST_ROWS clips, of which those of the first batch have payload, opened by a new process."""
    sampler = ResumableBucketSampler(["x".join(map(str, SMALL))] * MANIFEST_ROWS, global_batch=8, batch_per_rank=8)
    batch = next(iter(sampler))
    with ShardWriter(path) as writer:
        for index in batch:
            writer.add(made_clip(f"c{index:07d}", index, SMALL, (4, 8)), "train")
        for prompt in ("a room", ""):
            writer.add_text(prompt, np.zeros((3, 16), np.float16), VERSION)
    table = pq.read_table(path / MANIFEST)
    fillers = np.setdiff1d(np.arange(MANIFEST_ROWS), batch)
    many = table.take(np.zeros(len(fillers), np.int64))
    ids = [f"c{index:07d}" for index in fillers]
    for column, values in (("clip_id", ids), ("video", [f"folder/{name}.mp4" for name in ids])):
        many = many.set_column(many.column_names.index(column), table.schema.field(column), pa.array(values))
    whole = pa.concat_tables([table, many]).sort_by("clip_id").replace_schema_metadata(table.schema.metadata)
    write_table(path / MANIFEST, whole)
    del whole, many, ids
    command = [sys.executable, __file__, "--first-batch", str(path)]
    runs = [json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout) for _ in range(3)]
    return {
        "manifest_rows": MANIFEST_ROWS,
        "first_batch_seconds": float(np.median([run["seconds"] for run in runs])),
        "first_batch_gigabytes": max(run["gigabytes"] for run in runs),
    }


def first_batch(path: Path) -> dict[str, float]:
    """Seconds from opening the dataset to its first batch, and the process's largest memory."""
    start = time.perf_counter()
    dataset = ClipDataset(path, "train", TEXT_LEN)
    sampler = ResumableBucketSampler(dataset.buckets, global_batch=8, batch_per_rank=8)
    with Batches(dataset, sampler, workers=0, patience=600) as batches:
        batch = next(batches)
    seconds = time.perf_counter() - start
    if len(batch) != 8 or len(dataset) != MANIFEST_ROWS:
        raise RuntimeError(f"{len(dataset)} clips, a batch of {len(batch)}")
    status = Path("/proc/self/status").read_text(encoding="utf-8")  # ru_maxrss would count the process that started this one
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    return {"seconds": seconds, "gigabytes": peak * 1024 / 1e9}


# -------------------------------------------------------------------------------------------------------------- report


def report(found: dict[str, Any]) -> int:
    print(f"{found['clips']} clips of {found['size']}, {found['draws']} draws, {found['workers']} workers, warm page cache\n")
    print(f"{'':34}{'clips/s':>10}{'MB/clip':>10}{'dataset is':>14}")
    for name, title in (
        ("dataset", "dataset (depth, latents, cameras)"),
        ("guide", "guide layout (depth, points)"),
        ("webdataset", "webdataset tar (depth, points)"),
    ):
        rate, size = found[f"{name}_clips_per_second"], found[f"{name}_megabytes_per_clip"]
        print(f"{title:34}{rate:10.1f}{size:10.1f}{found['dataset_clips_per_second'] / rate:13.1f}x")
    print(f"\npoints from depth on {found['device']}: {1000 * found['points_seconds']:.0f} ms a clip")
    print(f"loader memory over {MEMORY_CLIPS} clips: {found['memory_megabytes']:.0f} MB, grown by {found['memory_growth']:.1%}")
    print(
        f"manifest of {found['manifest_rows']:,} rows: first batch after {found['first_batch_seconds']:.2f} s, "
        f"{found['first_batch_gigabytes']:.2f} GB"
    )
    missed = []
    for name, bar in BARS.items():
        good = found[name] >= bar if name == "speed_up" else found[name] <= bar
        if not good:
            missed.append(f"{name} {found[name]:.3g}, wanted {'at least' if name == 'speed_up' else 'at most'} {bar:g}")
    for line in missed:
        print(f"missed: {line}")
    print(json.dumps(found | {"missed": missed}))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
