"""constraints.txt fits pyproject.toml, and `make constraints` renews it without losing what was pinned on purpose."""

from __future__ import annotations

import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
KEPT = "# why\ntorch==2.13.0\n# Below: the rest\n"

# Stands in for python: `-m venv FOLDER` makes a folder with a pip that installs nothing and freezes what is said here.
PYTHON = """#!/bin/bash
mkdir -p "$3/bin"
cat > "$3/bin/pip" <<'PIP'
#!/bin/bash
[ "$1" = install ] && { echo "$@" > installed.txt; exit %d; }
printf '%%s\\n' absl-py==2.5.2 nvidia-cublas==13.0 torch==2.13.0+cpu triton==3.6.0 zipp==5.0
PIP
chmod +x "$3/bin/pip"
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "constraints.txt").write_text(KEPT + "absl-py==1.0\ngone==1.0\n")
    return tmp_path


def make_constraints(project: Path, pip_returns: int) -> int:
    python = project / "python"
    python.write_text(PYTHON % pip_returns)
    python.chmod(0o755)
    line = ["make", "-s", "constraints", f"PYTHON={python}"]
    return subprocess.run(line, cwd=project, capture_output=True, timeout=60, check=False).returncode


def test_renewing_keeps_what_stands_above_the_line_and_fits_every_machine(project: Path) -> None:
    assert make_constraints(project, 0) == 0
    assert (project / "constraints.txt").read_text() == KEPT + "absl-py==2.5.2\nzipp==5.0\n"
    assert "kept.txt" in (project / "installed.txt").read_text()  # the kept pins bind the fresh install


def test_an_install_that_fails_leaves_the_list_as_it_was(project: Path) -> None:
    before = (project / "constraints.txt").read_text()
    assert make_constraints(project, 1) != 0
    assert (project / "constraints.txt").read_text() == before


def test_every_dependency_is_pinned_to_a_version_within_its_range() -> None:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = table["dependencies"] + [line for extra in table["optional-dependencies"].values() for line in extra]
    lines = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()]
    pins = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines if line)}
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement
    assert pins[canonicalize_name("torch")] == "2.13.0"  # without +cpu, so that pip takes the machine's own build
