"""Every page is true of the tree: links, paths, commands, imports and names of tests that it gives exist."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
OURS = ("fw_model", "fw_pipeline", "tests", "benchmarks", "docs")
# Paths that only the worked example of a page has.
EXAMPLES = {
    "docs/add-a-geometry-engine.md": ("fw_pipeline/annotate/slider", "fw_pipeline.annotate.slider", "tests/annotate/test_slider")
}

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def code_of(page: Path) -> list[str]:
    """What stands in a page's code blocks and between its backticks."""
    text = page.read_text(encoding="utf-8")
    return [block for _, block in FENCE.findall(text)] + re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


def examples(page: Path) -> tuple[str, ...]:
    return EXAMPLES.get(page.relative_to(ROOT).as_posix(), ())


@cache
def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@cache
def names_in(file: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)}


@each_page
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@each_page
def test_every_module_that_is_run_can_be(page: Path) -> None:
    for code in code_of(page):
        for module in re.findall(r"-m ((?:fw_model|fw_pipeline)[\w.]*\w)", code):
            spec = find_spec(module)
            assert spec is not None, module
            if spec.submodule_search_locations:
                assert find_spec(f"{module}.__main__"), f"{module} is a package without __main__.py"
            else:
                assert '__name__ == "__main__"' in Path(str(spec.origin)).read_text(encoding="utf-8"), module


@each_page
def test_every_make_target_exists(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    for code in code_of(page):
        assert set(re.findall(r"(?:^|[;&] *)make ([a-z][\w-]*)", code, flags=re.MULTILINE)) <= targets, code


@each_page
def test_every_path_into_the_project_exists(page: Path) -> None:
    for code in code_of(page):
        for path in re.findall(rf"(?<![\w./-])(?:{'|'.join(OURS)})/[\w./-]*\w(?![\w<])", code):
            assert path.startswith(examples(page) or ("\0",)) or (ROOT / path).exists(), path


@each_page
def test_every_python_file_named_alone_is_in_the_tree(page: Path) -> None:
    """A page's own examples (`my.py`) stand in code blocks, not between backticks."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for name in re.findall(r"`([\w/]+\.py)`", text):
        assert (ROOT / name).is_file() or any(ROOT.glob(f"fw_*/**/{name}")), name


@each_page
def test_every_name_that_is_imported_or_given_in_full_exists(page: Path) -> None:
    names = []
    for language, block in FENCE.findall(page.read_text(encoding="utf-8")):
        if language == "python":
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(OURS):
                    names += [f"{node.module}.{alias.name}" for alias in node.names]
    names += [name for code in code_of(page) for name in re.findall(r"^(?:fw_model|fw_pipeline)(?:\.\w+)+", code)]
    for name in names:
        if not name.startswith(examples(page) or ("\0",)):
            assert found(name), name


def found(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            thing: object = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            thing = getattr(thing, part, None)
        return thing is not None
    return False


@each_page
def test_every_test_that_is_named_exists(page: Path) -> None:
    everywhere = {name for file in (ROOT / "tests").rglob("test_*.py") for name in names_in(file)}
    for code in code_of(page):
        for file, name in re.findall(r"(tests/[\w/]+\.py)::(\w+)", code):
            assert name in names_in(ROOT / file), f"{file}::{name}"
        if re.fullmatch(r"test_\w+", code):
            assert code in everywhere, code


def test_every_guarantee_of_the_architecture_names_its_test() -> None:
    table = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").partition("## What holds")[2]
    rows = re.findall(r"^\| (?!\*\*|what holds|--)(.+?) \| (.*) \|$", table, flags=re.MULTILINE)
    assert len(rows) > 30
    assert [what for what, tests in rows if not re.fullmatch(r"`tests/\S+::\w+`(, `tests/\S+::\w+`)*", tests)] == []


def test_contributing_explains_every_make_target() -> None:
    (phony,) = re.findall(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert [target for target in phony.split() if f"| `make {target}` |" not in table] == []


def test_the_licence_is_whole_and_named() -> None:
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License\n                           Version 2.0" in licence
    assert len(licence.split()) == 1581  # the text of apache.org, its appendix included
    assert 'license = "Apache-2.0"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_notice_names_the_licence_of_every_weight_the_readme_does() -> None:
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Licences of the weights")[2]
    rows = re.findall(r"^\| (?!weights|--)(.+?) \| (.+?) \|$", table, flags=re.MULTILINE)
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    assert len(rows) >= 4
    for weights, licence in rows:
        for name in weights.split("; "):
            assert re.search(rf"^  {re.escape(name)} +{re.escape(licence)}$", notice, flags=re.MULTILINE), name


def test_the_models_example_runs_and_gives_the_shapes_it_says() -> None:
    page = (ROOT / "docs" / "model.md").read_text(encoding="utf-8")
    (example,) = [block for language, block in FENCE.findall(page) if language == "python"]
    *lines, values, said = example.strip().splitlines()
    code = "\n".join([*lines, f"print(', '.join(str(list(shape)) for shape in ({values})))"])
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == said.removeprefix("# "), done.stderr
