"""Hold the geometry of a folder's clips against points followed through their pictures:

    python -m fw_pipeline.annotate.audit DIR [--videos FOLDER] [--numbers] [--json]

DIR is a pipeline's data folder (`FW_DATA`), whose finished clips are judged, or a guide-layout folder. Nothing is changed.
Exit code 0 when every clip passed, 1 when one was refused, could not be judged or could not be read, or there was none; 2 on
wrong usage.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from fw_model.errors import explain_errors
from fw_pipeline.annotate.audit.sources import UNREADABLE, NothingToAudit, items
from fw_pipeline.annotate.audit.verdict import Judgement


@explain_errors
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fw_pipeline.annotate.audit",
        description="Hold the geometry of a folder's clips against points followed through their pictures.",
        epilog="Exit code 0 when every clip passed, 1 when one did not, 2 on wrong usage.",
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="a pipeline's data folder, or a guide-layout folder")
    parser.add_argument("--videos", metavar="FOLDER", type=Path, help="of a data folder's videos (default: the pipeline's own)")
    parser.add_argument("--numbers", action="store_true", help="print what was measured, too")
    parser.add_argument("--json", action="store_true", help="print one JSON object, clip by clip, instead of text")
    args = parser.parse_args(arguments)
    said: dict[str, dict[str, object]] = {}
    for item in tqdm(items(args.folder, args.videos), desc="audit", unit="clip", disable=None):
        try:
            verdict = item.judge()
            judgement, words, numbers = verdict.judgement.value, str(verdict), dict(verdict.numbers)
        except UNREADABLE as error:
            judgement, words, numbers = "unreadable", f"unreadable: {error}", {}
        said[item.name] = {"judgement": judgement, "message": words, "numbers": numbers}
        if not args.json:
            tqdm.write(f"{item.name}: {words}")
            if args.numbers:
                tqdm.write("  " + "  ".join(f"{name} {value:.4g}" for name, value in numbers.items()))
    if not said:
        raise NothingToAudit(f"{args.folder}: no finished clip in it", "Annotate the videos first, or look why none was accepted")
    counts = Counter(str(one["judgement"]) for one in said.values())
    print(json.dumps({"clips": said, "counts": counts}) if args.json else _counted(counts))
    return 0 if set(counts) == {Judgement.PASS.value} else 1


def _counted(counts: Counter[str]) -> str:
    words = {"pass": "passed", "refuse": "refused", "unjudged": "could not be judged", "unreadable": "could not be read"}
    return f"{counts.total()} clips: " + ", ".join(f"{counts[name]} {word}" for name, word in words.items() if counts[name])


if __name__ == "__main__":
    sys.exit(main())
