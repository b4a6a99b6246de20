"""The rooms: who may import whom, no circles, and files that can be read in one sitting."""

from __future__ import annotations

import ast
import subprocess
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LONGEST = 400  # lines of a Python file

# Lower rooms first; a room imports from its own floor's room and from floors below. Everything in fw_model that is in no room
# is the ground floor.
FLOORS = ({"model"}, {"export"}, {"data"}, {"train"}, {"report", "describe", "generate", "evaluate"})


@dataclass(frozen=True)
class Import:
    """Module `source` imports `target` ("a.b.c", the longest part of it that is a module of ours, else as written)."""

    source: str
    target: str
    line: int
    on_loading: bool  # false inside a function or `if TYPE_CHECKING`: it runs later or never, and cannot close a circle

    def __str__(self) -> str:
        return f"{self.source}, line {self.line}: imports {self.target}"


def python_files() -> dict[str, Path]:
    """Module name -> file."""
    return {module_name(name): ROOT / name for name in tracked("*.py")}


def tracked(*patterns: str) -> list[str]:
    """Paths of the files that git tracks or would track."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    return [name for name in listed if (ROOT / name).exists()]


def module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports_of(source: str, text: str, modules: Iterable[str], package: bool = False) -> list[Import]:
    """All imports in `text`, those inside functions too. `package`: the text is that of an __init__.py."""
    known, found = set(modules), []

    def add(name: str, line: int, on_loading: bool) -> None:
        while name not in known and name.rpartition(".")[0] in known:
            name = name.rpartition(".")[0]
        found.append(Import(source, name, line, on_loading))

    def visit(node: ast.AST, on_loading: bool) -> None:
        if isinstance(node, ast.Import):
            for alias in node.names:
                add(alias.name, node.lineno, on_loading)
        elif isinstance(node, ast.ImportFrom):
            here = source.split(".") + ["__init__"] * package
            base = (
                [*here[: len(here) - node.level], *([node.module] if node.module else [])] if node.level else [node.module or ""]
            )
            for alias in node.names:
                add(".".join([*base, alias.name]), node.lineno, on_loading)
        later = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        never = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.iter_child_nodes(node):
            visit(child, on_loading and not later and not never)

    visit(ast.parse(text), True)
    return found


@pytest.fixture(scope="module")
def modules() -> dict[str, Path]:
    found = python_files()
    assert {"fw_model.config", "fw_pipeline.definitions", "tests.test_architecture", "benchmarks.bench_train"} <= found.keys()
    return found


@pytest.fixture(scope="module")
def imports(modules: dict[str, Path]) -> list[Import]:
    texts = {name: (path.read_text(encoding="utf-8"), path.name == "__init__.py") for name, path in modules.items()}
    return [found for name, (text, package) in texts.items() for found in imports_of(name, text, modules, package)]


def within(module: str, *rooms: str) -> bool:
    return any(module == room or module.startswith(f"{room}.") for room in rooms)


def wrong(imports: Iterable[Import], rule: Callable[[Import], bool]) -> list[str]:
    return [str(found) for found in imports if rule(found)]


def of_dagster(found: Import) -> bool:
    return found.target.split(".")[0].startswith("dagster")  # dagster_pipes too


def circle(imports: Iterable[Import]) -> list[str]:
    """The modules of a circle of imports that run while loading, first and last the same; [] where there is none."""
    graph: dict[str, set[str]] = {}
    for found in imports:
        if found.on_loading and found.source != found.target:
            graph.setdefault(found.source, set()).add(found.target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])[::-1]
    return []


def floor(module: str) -> int | None:
    """0 for fw_model's ground floor, 1 for `model`, ...; None outside fw_model."""
    if not within(module, "fw_model"):
        return None
    room = module.split(".")[1] if "." in module else ""
    return next((height for height, rooms in enumerate(FLOORS, start=1) if room in rooms), 0)


def test_no_import_circle(imports: list[Import]) -> None:
    """Of what is imported while loading; an import inside a function runs later and may point back within a room."""
    assert circle(imports) == []


def test_no_file_is_longer_than_it_may_be(modules: dict[str, Path]) -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in modules.values()}
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}


def test_rooms_of_the_model_import_downwards(imports: list[Import]) -> None:
    """report, describe, generate, evaluate -> train -> data -> export -> model -> ground floor, imports in functions too."""

    def upwards(found: Import) -> bool:
        above, below = floor(found.source), floor(found.target)
        return above is not None and below is not None and below > above

    assert wrong(imports, upwards) == []


def test_the_model_knows_no_pipeline(imports: list[Import]) -> None:
    assert wrong(imports, lambda i: within(i.source, "fw_model") and (of_dagster(i) or within(i.target, "fw_pipeline"))) == []


def test_steps_and_annotation_know_no_dagster(imports: list[Import]) -> None:
    rooms = ("fw_pipeline.steps", "fw_pipeline.annotate")
    assert wrong(imports, lambda i: within(i.source, *rooms) and of_dagster(i)) == []


def test_annotation_and_steps_import_downwards(imports: list[Import]) -> None:
    """steps -> annotate -> fw_model; neither knows the rooms of Dagster above them."""
    below = {
        "fw_pipeline.steps": ("fw_pipeline.steps", "fw_pipeline.annotate"),
        "fw_pipeline.annotate": ("fw_pipeline.annotate",),
    }

    # The audit's command goes through folders that higher rooms know how to read; nothing imports it.
    command = ("fw_pipeline.annotate.audit.sources", "fw_pipeline.annotate.audit.__main__")
    assert not [i for i in imports if i.target in command and i.source not in command and not within(i.source, "tests")]

    def upwards(found: Import) -> bool:
        if found.source in command:
            return False
        allowed = next((rooms for room, rooms in below.items() if within(found.source, room)), None)
        return allowed is not None and within(found.target, "fw_pipeline") and not within(found.target, *allowed)

    assert wrong(imports, upwards) == []


def test_nothing_in_production_imports_the_demo(imports: list[Import]) -> None:
    def production(module: str) -> bool:
        return within(module, "fw_model", "fw_pipeline") and not within(module, "fw_pipeline.demo")

    assert wrong(imports, lambda i: production(i.source) and within(i.target, "fw_pipeline.demo")) == []


def test_nothing_but_tests_imports_tests_and_nothing_imports_a_test_module(imports: list[Import]) -> None:
    def taken_from_a_test(found: Import) -> bool:
        if not within(found.target, "tests"):
            return False
        return not within(found.source, "tests") or any(part.startswith("test_") for part in found.target.split("."))

    assert wrong(imports, taken_from_a_test) == []


def test_files_beside_the_code_are_packed_with_it() -> None:
    """Presets and the report's page: an installed package must have them too."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]
    packed = {path for package, globs in declared.items() for glob in globs for path in (ROOT / package).glob(glob)}
    others = {ROOT / name for name in tracked("fw_model", "fw_pipeline") if not name.endswith(".py")}
    assert others == packed
    assert ROOT / "fw_model/report/page.html.j2" in packed


def test_what_reads_imports_sees_every_way_to_write_one() -> None:
    text = """
import a.b as c
from a import b, name
from . import b
from .b import name
def later():
    import a
if TYPE_CHECKING:
    from a.b import name
"""
    found = imports_of("a.x", text, {"a", "a.b", "a.x"})
    assert [(i.target, i.on_loading) for i in found] == [
        *[("a.b", True), ("a.b", True), ("a", True), ("a.b", True), ("a.b", True)],
        *[("a", False), ("a.b", False)],
    ]


def test_a_circle_is_named_unless_a_function_breaks_it() -> None:
    there, back = Import("a", "b", 1, True), Import("b", "a", 2, True)
    assert circle([there, back]) in (["a", "b", "a"], ["b", "a", "b"])
    assert circle([there, Import("b", "a", 2, False)]) == []
