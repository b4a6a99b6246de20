"""Time and memory of finding the shots of long and odd videos, each in a process of its own.

    python benchmarks/bench_ingest.py [--quick]

Videos are made on the spot; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np

# name -> (frames, frames a second, height, width, frames of a shot)
CASES = {
    "10 minutes at 30 fps": (18000, 30, 144, 256, 18000),
    "1 minute at 30 fps": (1800, 30, 144, 256, 1800),
    "240 fps": (2400, 240, 144, 256, 2400),
    "1 fps": (600, 1, 144, 256, 600),
    "odd size": (120, 24, 145, 255, 120),
    "8K": (8, 24, 4320, 7680, 8),
    "1000 shots": (12000, 24, 144, 256, 12),
}
QUICK = ("1 minute at 30 fps", "odd size", "1 fps")


def frames(count: int, height: int, width: int, shot: int) -> Iterator[np.ndarray]:
    """A camera moving right over noise; another picture every `shot` frames."""
    import cv2

    for i in range(count):
        if i % shot == 0:
            noise = np.random.default_rng(i).integers(20, 235, (height // 6 + 2, (width + 600) // 6 + 2, 3), np.uint8)
            wide = cv2.resize(noise, (width + 600, height), interpolation=cv2.INTER_LINEAR)
        left = abs((i % shot) % 1198 - 599)
        yield wide[:, left : left + width]


def make(path: Path, case: str) -> None:
    import av

    count, fps, height, width, shot = CASES[case]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps), options={"preset": "ultrafast", "crf": "20"})
        stream.height, stream.width = height, width
        stream.pix_fmt = "yuv444p" if width % 2 else "yuv420p"
        for frame in frames(count, height, width, shot):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())


def measure(path: Path) -> dict[str, float]:
    """Runs in a child: its peak memory is that of this one video."""
    from fw_pipeline.annotate.shots import scan

    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    found = scan(path)
    seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"frames": len(found.times), "shots": len(found.shots), "seconds": seconds, "mib": (peak - before) / 1024}


def folder(root: Path, count: int) -> dict[str, float]:
    from fw_pipeline.annotate.clips import find_videos

    for i in range(count):
        (root / f"{i % 100:02d}").mkdir(exist_ok=True)
        (root / f"{i % 100:02d}" / f"{i}.mp4").touch()
    start = time.perf_counter()
    return {"files": len(find_videos(root)), "seconds": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only what takes seconds")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure)))
        return
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        print(f"{'case':24}{'frames':>8}{'shots':>8}{'seconds':>9}{'ms/frame':>10}{'MiB more':>10}")
        for case in QUICK if arguments.quick else CASES:
            video = Path(temporary, "video.mp4")
            make(video, case)
            command = [sys.executable, __file__, "--measure", str(video)]
            results[case] = row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            each = 1000 * row["seconds"] / row["frames"]
            print(f"{case:24}{row['frames']:8}{row['shots']:8}{row['seconds']:9.1f}{each:10.1f}{row['mib']:10.0f}", flush=True)
            video.unlink()
        results["folder"] = folder(Path(temporary), 1000 if arguments.quick else 10000)
        print(f"a folder of {results['folder']['files']} files: {results['folder']['seconds']:.2f} s")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
