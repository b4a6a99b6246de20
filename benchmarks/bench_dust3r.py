"""The DUSt3R engine: passes of the network a clip, the time they take, and memory as the clip grows.

Compared with what the original does to a video: every frame paired with the next three, in both directions, both images encoded
for every pair. The engine runs whole, on exact pointmaps of a demo scene; beside each answer a network with seeded weights does
the work that is timed. Bars: at least 4 times fewer encoder passes and 4 times fewer decoder passes; memory per frame that
does not grow with the clip. With a GPU also frames/s and peak memory of the full-size network (81 frames, 512x288, bfloat16).
Prints tables and a last line of JSON; exits with 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import tracemalloc
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fw_model import metrics
from fw_pipeline.annotate.dust3r import DUSt3R, DUSt3RConfig, Dust3rEngine, Pointmap
from fw_pipeline.annotate.pairwise.align import pair_graph
from fw_pipeline.demo.scenes import SHOTS
from fw_pipeline.demo.true_pairs import Spoil, TruthNetwork, true_views

CLIP = 81  # frames
MIN_RATIO = 4.0
MAX_GROWTH = 1.2  # of memory per frame, from the second to the last length
MIDDLE = {"enc_embed_dim": 384, "enc_depth": 8, "enc_num_heads": 6, "dec_embed_dim": 256, "dec_depth": 4, "dec_num_heads": 4}


class TimedNetwork:
    """Answers with the truth after doing the work of a real network, whose seconds it counts."""

    def __init__(self, truth: TruthNetwork, real: DUSt3R, device: str) -> None:
        self.truth, self.real, self.device, self.config = truth, real, device, truth.config
        self.seconds = 0.0
        self._grid = (0, 0)

    def encode(self, images: Tensor) -> Tensor:
        self._grid = (images.shape[2] // 16, images.shape[3] // 16)
        self._timed(lambda: self.real.encode(images))
        return self.truth.encode(images)

    def decode(self, tokens1: Tensor, tokens2: Tensor) -> tuple[Pointmap, Pointmap]:
        tokens = torch.zeros(len(tokens1), *self._grid, self.real.config.enc_embed_dim, device=self.device)
        self._timed(lambda: self.real.decode(tokens, tokens))
        return self.truth.decode(tokens1, tokens2)

    def _timed(self, work: Callable[[], object]) -> None:
        start = time.perf_counter()
        work()
        if self.device != "cpu":
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - start


def clip_of(count: int, height: int, width: int) -> tuple[np.ndarray, TruthNetwork]:
    """Frames that tell views apart, and the network that knows them."""
    frames = np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    network = TruthNetwork(max(height, width), Spoil(noise=0.01))
    network.show(frames, true_views(SHOTS[0].shots[0], count, height, width))
    return frames, network


def count_passes() -> dict[str, float]:
    """Passes of one clip by the engine and by the original's way, and what the engine's are good for."""
    frames, network = clip_of(CLIP, 48, 64)
    found = Dust3rEngine(lambda: network, "truth").estimate(frames)
    plain = len(pair_graph(CLIP, window=3, long_links=False))
    truth = true_views(SHOTS[0].shots[0], CLIP, 48, 64)
    return {
        "encoder": network.encoded,
        "decoder": network.decoded,
        "plain_encoder": 2 * plain,
        "plain_decoder": plain,
        "encoder_ratio": 2 * plain / network.encoded,
        "decoder_ratio": plain / network.decoded,
        "ate_percent": 100 * metrics.ate(found.w2c, truth.w2c),
    }


@torch.no_grad()
def time_passes(count: int, height: int, width: int, real: DUSt3R, device: str) -> dict[str, float]:
    """Seconds of the network for one clip, the engine's way and the original's, and of the engine as a whole.

    The original's way is timed on an eighth of its pairs.
    """
    frames, truth = clip_of(count, height, width)
    network = TimedNetwork(truth, real, device)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    Dust3rEngine(lambda: network, "timed", device).estimate(frames)
    whole = time.perf_counter() - start
    pairs = len(pair_graph(count, window=3, long_links=False))
    some = max(1, pairs // 8 // 8)
    images = torch.rand(8, 3, height, width, device=device) * 2 - 1
    other = TimedNetwork(truth, real, device)
    for _ in range(some):
        other._timed(lambda: real(images, images))
    found = {
        "frames": count,
        "network_seconds": network.seconds,
        "plain_network_seconds": other.seconds * pairs / (8 * some),
        "engine_seconds_with_oracle": whole,
    }
    found["ratio"] = found["plain_network_seconds"] / found["network_seconds"]
    found["frames_per_second"] = count / found["network_seconds"]
    if device != "cpu":
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found


def memory_per_frame(count: int) -> float:
    """Peak megabytes of one clip of 96 x 128 beyond its frames, divided by their number; tokens are not in it."""
    frames, network = clip_of(count, 96, 128)
    tracemalloc.start()
    Dust3rEngine(lambda: network, "truth", batch=4).estimate(frames)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 1e6 / count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="shorter clips")
    quick = parser.parse_args().quick
    missed = []
    passes = count_passes()
    print(f"{f'{CLIP} frames':24}{'encoder':>9}{'decoder':>9}")
    print(f"{'window 3, no cache':24}{passes['plain_encoder']:9.0f}{passes['plain_decoder']:9.0f}")
    print(f"{'engine':24}{passes['encoder']:9.0f}{passes['decoder']:9.0f}")
    print(f"{'times fewer':24}{passes['encoder_ratio']:9.2f}{passes['decoder_ratio']:9.2f}")
    missed += [f"{kind} passes" for kind in ("encoder", "decoder") if passes[f"{kind}_ratio"] < MIN_RATIO]
    result: dict[str, object] = {"passes": passes}
    timing = {"cpu, middle size, 192x128": time_passes(17 if quick else 33, 128, 192, DUSt3R.seeded(MIDDLE, 0), "cpu")}
    if torch.cuda.is_available():
        full = DUSt3R.seeded(DUSt3RConfig().to_dict(), 0, torch.bfloat16).to("cuda")
        time_passes(9, 288, 512, full, "cuda")  # warms up
        timing["cuda, full size, 512x288, bfloat16"] = time_passes(CLIP, 288, 512, full, "cuda")
    print(f"\n{'network time of a clip':38}{'frames':>8}{'engine s':>10}{'plain s':>9}{'ratio':>7}{'frames/s':>10}")
    for name, row in timing.items():
        print(
            f"{name:38}{row['frames']:8.0f}{row['network_seconds']:10.2f}{row['plain_network_seconds']:9.2f}{row['ratio']:7.2f}"
            f"{row['frames_per_second']:10.2f}" + (f"  peak {row['peak_gib']:.2f} GiB" if "peak_gib" in row else "")
        )
    lengths = (17, 41, 81) if quick else (41, 81, 161)
    memory = {count: memory_per_frame(count) for count in lengths}
    print("\npeak memory a frame, 96x128: " + ", ".join(f"{value:.2f} MB of {count}" for count, value in memory.items()))
    if memory[lengths[-1]] > MAX_GROWTH * memory[lengths[-2]]:
        missed.append("memory per frame grows with the clip")
    for line in missed:
        print(f"MISSED  {line}", file=sys.stderr)
    result |= {"timing": timing, "memory_mb_per_frame": memory}
    print(json.dumps({"benchmark": "dust3r", "ok": not missed, "missed": missed, **result}))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
