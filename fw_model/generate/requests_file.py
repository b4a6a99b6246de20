"""A list of requests, a JSON object a line: one bad line costs that line, and what is there is not made again."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fw_model.config import ClipConfig
from fw_model.errors import BadFileError
from fw_model.export.save import is_saved
from fw_model.export.world import World
from fw_model.files import file_hash
from fw_model.generate.pipeline import FantasyWorldPipeline
from fw_model.generate.request import BadRequest, Prepared, Request, parse_request, prepare

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
FILES = ("image", "pose_file")  # looked for beside the list


@dataclass(frozen=True)
class Job:
    name: str
    folder: Path
    request: Request

    @property
    def texts(self) -> tuple[str, str]:
        """What is to be embedded."""
        return self.request.prompt, self.request.negative_prompt


def read_requests(path: Path, out: Path, common: dict[str, Any] | None = None) -> tuple[list[Job], list[str]]:
    """(jobs, what is wrong with the other lines, each beginning with file and line).

    A line has the fields of `Request` and a `name`, which is the world's folder below `out`; without one it is the line's number.
    `common` holds where a line says nothing else. Files are looked for beside the list.

    Raises BadFileError when the list cannot be read, or has no line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError as error:
        raise BadFileError(f"{path}: is not there") from error
    except UnicodeDecodeError as error:
        raise BadFileError(f"{path}: not a text file in UTF-8 ({error.reason} at byte {error.start})") from error
    jobs: list[Job] = []
    bad: list[str] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            job = _job(line, where, number, path.parent, out, common or {})
            if job.name in {other.name for other in jobs}:
                raise BadRequest(f"{where}: a second request named {job.name!r}; names must differ")
            jobs.append(job)
        except BadRequest as error:
            bad.append(str(error))
    if not jobs and not bad:
        raise BadFileError(f"{path}: no request in it", 'A line looks like {"name": "room", "prompt": "a room"}')
    return jobs, bad


def _job(line: str, where: str, number: int, beside: Path, out: Path, common: dict[str, Any]) -> Job:
    try:
        raw = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadRequest(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(raw, dict):
        raise BadRequest(f"{where}: expected an object with a prompt, got {type(raw).__name__}")
    name = str(raw.pop("name", f"{number:04d}"))
    if not NAME.fullmatch(name):
        raise BadRequest(f"{where}: name {name!r} is no folder's name: letters, digits, dots, dashes, at most 128")
    for key in FILES:
        if isinstance(raw.get(key), str):
            raw[key] = str(beside / raw[key])
    return Job(name, out / name, parse_request({**common, **raw}, where))


def fingerprint(prepared: Prepared, made_by: str) -> dict[str, Any]:
    """What a world is made from, in plain values, files by their hash: equal means that it need not be made again."""
    request = prepared.request.model_dump(mode="json")
    for key in FILES:
        if request[key] is not None:
            request[key] = file_hash(Path(request[key]))[1]
    return {**request, "size": [prepared.frames, prepared.height, prepared.width], "made_by": made_by}


def make_all(
    jobs: Sequence[Job], clip: ClipConfig, build: Callable[[], FantasyWorldPipeline], made_by: str, progress: bool = True
) -> int:
    """Make and save the worlds that are not there yet; returns how many could not be.

    Every request's files are read and checked before `build` loads anything.
    """
    todo: list[tuple[Job, Prepared]] = []
    failed = 0
    for job in jobs:
        try:
            prepared = prepare(job.request, clip)
        except BadRequest as error:
            failed += 1
            print(f"{job.name}: {error}", file=sys.stderr)
            continue
        if is_there(job, prepared, made_by):
            print(f"{job.folder}: there already")
        else:
            todo.append((job, prepared))
    if not todo:
        return failed
    pipeline = build()
    # all prompts at once: the text encoder is large, and loaded for this alone
    pipeline.embed(text for job, _ in todo for text in job.texts)
    for job, prepared in tqdm(todo, desc="worlds", unit="world", disable=None if progress and len(todo) > 1 else True):
        (world,) = pipeline.run([prepared], progress=progress)
        saved_with(world, prepared, made_by).save(job.folder)
        print(job.folder)
    return failed


def saved_with(world: World, prepared: Prepared, made_by: str) -> World:
    """The world with what it was made from in its `meta`."""
    return replace(world, meta={**world.meta, "fingerprint": fingerprint(prepared, made_by)})


def is_there(job: Job, prepared: Prepared, made_by: str) -> bool:
    """Whether the job's folder is a whole world that was made from just this."""
    if not is_saved(job.folder):
        return False
    meta = json.loads((job.folder / "meta.json").read_text(encoding="utf-8"))
    return bool(meta.get("fingerprint") == fingerprint(prepared, made_by))
