"""Everything that only a GPU can tell, in one command: does it run there, as fast and as small as planned?

    python benchmarks/gpu_check.py [--parts NAME ...] [--seconds 700] [--json FILE] [--cpu]

Needs torch and this checkout; no network, no weights, no videos. Each part is a process of its own with its own time limit,
the most telling first, and prints a line of JSON for everything it measured, at once: a run that is cut off still tells what
it found. A part that fails says with what, and the others go on. The last line is the whole as JSON; exits with 1 when a part
failed. --cpu runs every part on a small model without a GPU, which is how the benchmark itself is tested.

`stage1`, `stage2` take full-size steps at 81x336x592 with random weights: seconds, tokens/s, MFU and peak memory, with every
attention kernel and compiled; `plan` is the memory plan for the same steps, counted on the CPU meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_parts import PARTS

# Seconds a part may take: about twice what it took on an H200.
LIMITS = {"stage1": 200, "stage2": 350, "train": 150, "annotate": 120, "plan": 400}
DEFAULT_LIMIT = 90
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bfloat16, from the maker's data sheets
MARK = "RESULT "  # before every line of JSON that a part prints


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all, in this order")
    parser.add_argument("--seconds", type=float, default=700, help="for all parts together; what does not begin in time is named")
    parser.add_argument("--json", type=Path, help="also write every line here")
    parser.add_argument("--cpu", action="store_true", help="a small model on the CPU")
    parser.add_argument("--run-part", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.run_part:
        return run_part(args.run_part, args.cpu)
    end = time.monotonic() + args.seconds
    log = args.json.open("a", encoding="utf-8") if args.json else None
    result: dict[str, Any] = {"failed": []}

    def tell(part: str, line: dict[str, Any]) -> None:
        text = json.dumps({"part": part, **line})
        result.setdefault(part, []).append(line)
        if line.get("error"):
            result["failed"].append(part)
        print(text, flush=True)
        if log:
            print(text, file=log, flush=True)

    beside = threading.Thread(target=lambda: one_part("plan", args.cpu, end, tell))  # on the CPU alone, disturbs no GPU
    if "plan" in args.parts:
        beside.start()
    for part in [part for part in args.parts if part != "plan"]:
        one_part(part, args.cpu, end, tell)
    if "plan" in args.parts:
        beside.join()
    for line in utilisation(result):
        tell("mfu", line)
    result["failed"] = sorted(set(result["failed"]))
    print(json.dumps(result))
    return 1 if result["failed"] else 0


def utilisation(result: dict[str, Any]) -> list[dict[str, Any]]:
    """MFU of every timed step: its FLOPs, recomputation not counted, against the card's peak; [] for a card not in the list."""
    card = next((line["device"] for line in result.get("environment", ()) if "device" in line), "")
    peak = next((peak for name, peak in PEAK_FLOPS.items() if name in card), None)
    tflops = {line["stage"]: line["tflops"] for line in result.get("plan", ()) if "tflops" in line}
    return [
        {"stage": stage, "what": line["what"], "mfu": round(tflops[stage] * 1e12 / line["seconds"] / peak, 3)}
        for stage in ("stage1", "stage2")
        for line in result.get(stage, ())
        if peak and stage in tflops and "tokens_per_second" in line
    ]


def one_part(part: str, cpu: bool, end: float, tell: Any) -> None:
    """Run a part in its own process; pass on what it says as it says it."""
    limit = min(LIMITS.get(part, DEFAULT_LIMIT), end - time.monotonic())
    if limit < 5:
        tell(part, {"error": "no time was left for it; raise --seconds"})
        return
    started = time.monotonic()
    command = [sys.executable, __file__, "--run-part", part, *(["--cpu"] if cpu else [])]
    root = str(Path(__file__).resolve().parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH", ""))))}
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as process,
    ):
        timer = threading.Timer(limit, process.kill)
        timer.start()
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(MARK):
                tell(part, json.loads(line.removeprefix(MARK)))
        code = process.wait()
        late = not timer.is_alive()
        timer.cancel()
        if code:
            errors.seek(0)
            said = f"stopped after {limit:.0f} s" if late else " | ".join(errors.read().strip().splitlines()[-6:])[-900:]
            tell(part, {"error": said or f"exit code {code}"})
    tell(part, {"part_seconds": round(time.monotonic() - started, 1)})


def run_part(part: str, cpu: bool) -> int:
    for line in PARTS[part](cpu):
        print(MARK + json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
