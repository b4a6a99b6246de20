"""What a person can mend is told in words with exit code 1; a fault of the code keeps its stack."""

from __future__ import annotations

import ast
import errno
import importlib
from pathlib import Path

import pytest

from fw_model.errors import DatasetError, Explained, MissingDatasetError, explain_errors

PROJECT = Path(__file__).parents[1]
COMMANDS = sorted(
    path
    for room in ("fw_model", "fw_pipeline")
    for path in (PROJECT / room).rglob("*.py")
    if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in ast.parse(path.read_text("utf-8")).body)
)


def failing(error: BaseException) -> int:
    @explain_errors
    def main() -> int:
        raise error

    return main()


def test_an_explained_error_is_its_words_and_its_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    assert failing(DatasetError("shard 3 is damaged", "Pack again")) == 1
    assert capsys.readouterr().err == "error: shard 3 is damaged\nPack again\n"


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.ENOSPC, errno.ENOTDIR, errno.ENAMETOOLONG])
def test_what_the_system_refuses_is_told_with_the_file(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert failing(OSError(number, "refused", "/a/file")) == 1
    assert capsys.readouterr().err.startswith("error: /a/file: refused. ")


@pytest.mark.parametrize("fault", [ValueError("x"), KeyError("x"), OSError(errno.EIO, "broken", "/a/file")])
def test_a_fault_of_the_code_keeps_its_stack(fault: Exception) -> None:
    with pytest.raises(type(fault)):
        failing(fault)


def test_a_missing_dataset_is_still_a_missing_file() -> None:
    error = MissingDatasetError("no dataset at d")
    assert isinstance(error, Explained)
    assert isinstance(error, FileNotFoundError)
    assert str(error) == "no dataset at d"


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: str(path.relative_to(PROJECT)))
def test_every_command_explains_its_errors(path: Path) -> None:
    name = ".".join(path.relative_to(PROJECT).with_suffix("").parts)
    assert hasattr(importlib.import_module(name).main, "__wrapped__"), f"{name}.main is not decorated with explain_errors"
