"""What imports load: two libraries that once clashed, a light Dagster side. Who may import whom: test_architecture.py."""

import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
ENCODE = "import numpy as np; assert cv2.imencode('.png', np.zeros((8, 8, 3), np.uint8))[0]"


@pytest.mark.parametrize("order", ["import pycolmap, cv2", "import cv2, pycolmap"])
def test_opencv_encodes_images_whichever_of_it_and_pycolmap_comes_first(order: str) -> None:
    subprocess.run([sys.executable, "-c", f"{order}; {ENCODE}"], check=True, timeout=120)


def test_loading_the_graph_does_not_load_torch_or_colmap() -> None:
    heavy = "{'torch', 'transformers', 'diffusers', 'pycolmap', 'cv2'}"
    code = f"import sys, fw_pipeline.definitions; found = {heavy} & set(sys.modules); assert not found, found"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120, cwd=PROJECT)


def test_the_annotation_core_does_not_load_dagster() -> None:
    code = "import sys, fw_pipeline.steps.pipeline, fw_pipeline.steps.training_plan; assert 'dagster' not in sys.modules"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120, cwd=PROJECT)
