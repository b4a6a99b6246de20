"""The worked example of docs/add-a-geometry-engine.md runs as it stands on the page."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "add-a-geometry-engine.md").read_text(encoding="utf-8")
# Python blocks of the page by the file that their first line names.
BLOCKS = dict(re.findall(r"^```python\n# (\S+)\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL))
ENGINE, SETTINGS = "fw_pipeline/annotate/slider/engine.py", "fw_pipeline/annotate/engines.py"
TEST = "tests/annotate/test_slider.py"

# Makes the page's engine importable under the name it would have in the project.
CONFTEST = """
from pathlib import Path
import fw_pipeline.annotate
fw_pipeline.annotate.__path__.append(str(Path(__file__).parent / "fw_pipeline" / "annotate"))
"""
# The page's settings stand below those of engines.py.
ENGINES_HEAD = """
from typing import Annotated, ClassVar, Literal
from pydantic import Field, TypeAdapter
from fw_model.config import Config
from fw_pipeline.annotate.engines import Dtype, GeometrySettings
from fw_pipeline.annotate.types import GeometryEngine
"""
SETTINGS_TEST = """

def test_every_setting_reaches_the_engine():
    engine = SliderSettings(travel=0.8, fov=50, near=1, far=9).build("cuda", "float32")
    assert (engine.travel, engine.fov, engine.near, engine.far, engine.device) == (0.8, 50, 1, 9, "cuda")
    assert (engine.name, SliderSettings.prefix) == (SliderSettings().engine, SliderSettings().engine)
    chosen = TypeAdapter(Annotated[GeometrySettings | SliderSettings, Field(discriminator="engine")])
    assert chosen.validate_python({"engine": "slider", "travel": 0.5}) == SliderSettings(travel=0.5)
"""


def test_the_page_shows_a_module_its_settings_and_its_test() -> None:
    assert list(BLOCKS) == [ENGINE, SETTINGS, TEST]


def test_the_worked_example_passes_its_own_tests(tmp_path: Path) -> None:
    files = {
        "conftest.py": CONFTEST,
        ENGINE: BLOCKS[ENGINE],
        "fw_pipeline/annotate/slider/__init__.py": "",
        TEST: BLOCKS[TEST],
        "test_settings.py": ENGINES_HEAD + BLOCKS[SETTINGS] + SETTINGS_TEST,
    }
    for name, code in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(code, encoding="utf-8")
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib", "--rootdir", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*line, str(tmp_path)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 passed" in done.stdout
