"""The report: true numbers, one file, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from fw_model.config import Stage
from fw_model.model.fantasy_world import FantasyWorld
from fw_model.report import __main__ as report
from fw_model.report import figures as visualize
from fw_model.report import page as page_module
from fw_model.report import predict
from fw_model.report.page import page
from fw_model.report.predict import ReportSummary, write_report
from fw_model.train.checkpoints import CheckpointError, load_checkpoint, read_metadata
from fw_model.train.loop import train
from fw_model.train.objective import LOSS_NAMES
from tests.helpers.made_scenes import pack_scenes
from tests.helpers.training import small_preset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_scenes(tmp_path_factory.mktemp("data") / "dataset", small_preset())


@pytest.fixture(scope="module")
def runs(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    preset = small_preset("stage1.steps=2", "stage2.steps=2")
    train(preset, "stage1", dataset, root / "stage1")
    train(preset, "stage2", dataset, root / "stage2", root / "stage1" / "step-2.safetensors")
    return {stage: root / stage for stage in ("stage1", "stage2")}


@pytest.fixture(scope="module")
def written(runs: dict[str, Path], dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ReportSummary]:
    root = tmp_path_factory.mktemp("reports")
    return {stage: write_report(run, dataset, root / f"{stage}.html", clips=2) for stage, run in runs.items()}


def own_html(path: Path) -> str:
    """The page without the text of plotly.js."""
    text = path.read_text(encoding="utf-8")
    scripts = re.findall(r"<script>.*?</script>", text, flags=re.DOTALL)
    assert sum("plotly.js v" in script for script in scripts) == 1
    return next(text.replace(script, "") for script in scripts if "plotly.js v" in script)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_report_loads_nothing_from_elsewhere(stage: Stage, written: dict[str, ReportSummary]) -> None:
    text = own_html(written[stage].path)
    assert "http://" not in text
    assert "https://" not in text
    assert all(source.startswith("data:image/png;base64,") for source in re.findall(r"src='([^']*)'", text))
    assert "default-src 'none'" in text  # whatever plotly.js would like to fetch
    assert "<link" not in text


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_report_states_run_dataset_and_numbers(
    stage: Stage, written: dict[str, ReportSummary], runs: dict[str, Path], dataset: Path
) -> None:
    text, numbers = own_html(written[stage].path), written[stage].numbers
    result = json.loads((runs[stage] / "result.json").read_text(encoding="utf-8"))
    assert f"stage {stage[-1]} · step 2" in text
    assert result["dataset_digest"] in text
    for when in ("before", "after"):
        assert all(f"<td>{result['validation'][when][name]:.4f}</td>" in text for name in LOSS_NAMES[stage])
    for name in ("absrel", "delta125", "ate", "auc30"):
        assert f"<td>{numbers[name]:.3f}</td>" in text
    assert numbers["val/total"] == result["validation"]["after"]["total"]
    assert ("diffusion_loss" in text) == (stage == "stage2")
    assert "timestep 101 of 1000" in text
    assert all(name in text for name in ("val-0", "val-1"))


def test_every_figure_of_the_page_has_its_data(written: dict[str, ReportSummary]) -> None:
    text = own_html(written["stage1"].path)
    wanted = set(re.findall(r"data-figure=([\w-]+)", text))
    found = dict(re.findall(r"<script type='application/json' id='figure-([\w-]+)'>(.*?)</script>", text, flags=re.DOTALL))
    assert wanted == found.keys() == {"losses", "calibration", "points-0", "path-0", "points-1", "path-1"}
    assert all(json.loads(figure)["data"] for figure in found.values())
    points = json.loads(found["points-0"])["data"]
    sizes = [len(base64.b64decode(trace["x"]["bdata"])) // 4 for trace in points]
    assert 0 < sizes[0] == sizes[1] <= 4000


def test_predictions_are_the_checkpoints(runs: dict[str, Path], dataset: Path) -> None:
    """Another checkpoint gives other pictures; the same one the same, to the bit."""
    path = runs["stage1"] / "step-2.safetensors"
    metadata = read_metadata(path)
    model = FantasyWorld.from_preset(metadata.preset).eval()
    clips = predict.open_dataset(dataset, metadata.preset)[1]
    untrained = predict._predict_clip(model, clips, 0, 100.0, metadata, "cpu")
    load_checkpoint(path, model, "stage1", metadata.preset)
    first, again = (predict._predict_clip(model, clips, 0, 100.0, metadata, "cpu") for _ in range(2))
    assert np.array_equal(first.predicted_depth, again.predicted_depth)
    assert not np.array_equal(first.predicted_depth, untrained.predicted_depth)


def test_all_numbers_stand_by_noise_bucket_and_clip_in_the_json_beside_the_page(written: dict[str, ReportSummary]) -> None:
    path = written["stage1"].path
    found = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert found["bands"].keys() == {"low", "middle", "high"}
    assert found["bands"]["low"]["absrel"] == pytest.approx(written["stage1"].numbers["absrel"])
    assert found["bands"]["low"]["absrel"] != found["bands"]["high"]["absrel"]
    assert set(found["clips"]) == {"val-0", "val-1"}
    assert {clip["bucket"] for clip in found["clips"].values()} == set(found["buckets"])
    for name in ("point_ratio", "agreement", "fov_degrees", "flicker", "depth_scale", "rpe", "rra15", "rta15"):
        own = [clip["low"][name] for clip in found["clips"].values()]
        assert found["bands"]["low"][name] == pytest.approx(sum(own) / len(own))
    assert len(found["calibration"]) == 10
    assert -1 <= found["rank_correlation"] <= 1
    assert "<h2>By noise</h2>" in own_html(path)


def test_cameras_are_reported_with_the_true_one_given_withheld_and_anothers_beside_a_still_one(
    written: dict[str, ReportSummary],
) -> None:
    path = written["stage1"].path
    found = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    cameras, text = found["cameras"], own_html(path)
    assert cameras.keys() == {"given", "withheld", "other", "constant"}
    assert len({case["direction_degrees"] for case in cameras.values()}) == 4
    assert cameras["given"]["rotation_degrees"] == found["bands"]["low"]["rotation_degrees"]
    for words in ("no camera given", "another clip's camera given".replace("'", "&#39;"), "gap between given and withheld"):
        assert words in text


def test_a_target_is_met_only_where_the_model_beats_the_constant() -> None:
    after = {"camera_loss": 0.04, "constant/camera_loss": 0.03}
    losses = dict.fromkeys(LOSS_NAMES["stage1"], 1.0) | {f"constant/{name}": 2.0 for name in LOSS_NAMES["stage1"]}
    for constant, met in ((0.03, False), (0.06, True)):
        data = SimpleNamespace(
            metadata=SimpleNamespace(stage="stage1"),
            validation={"before": losses, "after": {**losses, **after, "constant/camera_loss": constant}},
        )
        rows = {row["name"]: row for row in page_module._losses(data)}
        assert (rows["camera_loss"]["met"], rows["camera_loss"]["constant"]) == (met, constant)


def test_perfect_prediction_has_perfect_numbers_and_its_scale() -> None:
    rng = np.random.default_rng(0)
    depth = rng.uniform(1, 3, (4, 8, 8))
    valid = rng.random(depth.shape) > 0.3
    w2c = np.tile(np.eye(3, 4), (4, 1, 1))
    w2c[:, 0, 3] = np.arange(4)
    numbers = predict.clip_numbers(2 * depth, depth, valid, w2c, w2c)
    assert numbers["absrel"] == pytest.approx(0, abs=1e-12)
    assert (numbers["delta125"], numbers["auc30"]) == (1, 1)
    assert numbers["depth_scale"] == pytest.approx(0.5)
    assert numbers["ate"] == pytest.approx(0, abs=1e-9)


def test_static_camera_has_no_path_numbers() -> None:
    depth, still = np.ones((3, 4, 4)), np.tile(np.eye(3, 4), (3, 1, 1))
    numbers = predict.clip_numbers(depth, depth, depth > 0, still, still)
    assert np.isnan(numbers["ate"])
    assert np.isnan(numbers["auc30"])


def test_failed_report_leaves_the_old_one(
    runs: dict[str, Path], dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "report.html"
    output.write_text("old", encoding="utf-8")

    def fails(data: object) -> str:
        raise OSError("no page")

    monkeypatch.setattr(predict, "page", fails)
    with pytest.raises(OSError, match="no page"):
        write_report(runs["stage1"], dataset, output)
    assert output.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [output]


def test_names_from_the_dataset_cannot_break_the_page(
    runs: dict[str, Path], dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[predict.ReportData] = []

    def keep(data: predict.ReportData) -> str:
        seen.append(data)
        return ""

    monkeypatch.setattr(predict, "page", keep)
    monkeypatch.setattr(predict, "write_text", lambda path, data: None)
    write_report(runs["stage1"], dataset, tmp_path / "unused", clips=1)
    clip = seen[0].clips[0]
    object.__setattr__(clip, "clip_id", "</script><b>x")
    text = page(seen[0])
    assert "<b>x" not in text
    assert "&lt;b&gt;x" in text


def test_run_without_checkpoint_is_an_error_with_the_job(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CheckpointError, match="stage1_training"):
        write_report(tmp_path, dataset, tmp_path / "report.html")
    arguments = ["--run", str(tmp_path), "--dataset", str(dataset), "--output", str(tmp_path / "report.html")]
    assert report.main(arguments) == 1
    assert "stage1_training" in capsys.readouterr().err


def test_thumbnail_and_curves_are_small_pngs(written: dict[str, ReportSummary], runs: dict[str, Path]) -> None:
    rng = np.random.default_rng(0)
    noise = rng.uniform(0.5, 2, (81, 84, 148))  # the hardest to compress
    for png, limit in (
        (written["stage1"].thumbnail, 60_000),
        (visualize.thumbnail_png(noise, noise[::-1], noise > 0.6, "stage1"), 60_000),
        (visualize.loss_curve_png(runs["stage2"] / "metrics.jsonl"), 100_000),
        (visualize.loss_curve_png(Path("no such file")), 100_000),
    ):
        assert len(png) < limit
        assert Image.open(io.BytesIO(png)).format == "PNG"


def test_equal_depths_get_equal_colours_and_unknown_ones_none() -> None:
    depth = np.array([[1.0, 2.0], [3.0, np.nan]])
    rgb = visualize.colourise(depth, 1, 3, np.array([[True, True], [False, True]]))
    assert np.array_equal(rgb[0, 0], visualize.colourise(np.array([[1.0]]), 1, 3)[0, 0])
    assert np.array_equal(rgb[1, 0], rgb[1, 1])
    assert not np.array_equal(rgb[0, 1], rgb[1, 0])


def test_path_figure_lays_a_scaled_and_turned_path_over_the_truth() -> None:
    rng = np.random.default_rng(1)
    centres = np.cumsum(rng.normal(size=(6, 3)), axis=0)
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    turn *= np.sign(np.linalg.det(turn))

    def poses(c2w_rotation: np.ndarray, positions: np.ndarray) -> np.ndarray:
        rotation = np.tile(c2w_rotation.T, (len(positions), 1, 1))
        return np.concatenate([rotation, -rotation @ positions[..., None]], axis=2)

    figure = visualize.path_figure(poses(np.eye(3), centres), poses(turn, 3 * centres @ turn.T + 5))
    truth, true_frusta, predicted, frusta = (np.stack([trace.x, trace.y, trace.z], axis=1) for trace in figure.data)
    assert np.allclose(truth, predicted, atol=1e-4)
    assert np.allclose(true_frusta, frusta, atol=1e-4, equal_nan=True)
