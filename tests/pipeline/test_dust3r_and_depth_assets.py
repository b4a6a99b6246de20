"""The GPU annotators through the very assets: the good path around a network that knows the truth, and the real classes with
weights made for the test in the published layout."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pytest

from fw_model.data.manifest import read_manifest
from fw_pipeline.annotate.clips import Clip, FrameTransform
from fw_pipeline.annotate.dust3r import DUSt3R, Dust3rEngine, network_size
from fw_pipeline.annotate.engines import Dust3rSettings
from fw_pipeline.annotate.pairwise.pair_graph import PairPrediction
from fw_pipeline.annotate.truth import ground_truth_for_clip, load_ground_truth
from fw_pipeline.annotate.types import ClipDepth
from fw_pipeline.definitions import defs
from fw_pipeline.demo.seeded_models import make_depth_anything
from fw_pipeline.demo.true_pairs import Spoil, TrueViews, TruthNetwork
from fw_pipeline.partitions import register
from fw_pipeline.steps.packing import pack
from fw_pipeline.steps.pipeline import Pipeline
from fw_pipeline.steps.results import FinishedClip
from fw_pipeline.steps.review import truth_errors
from fw_pipeline.steps.settings import settings_from_env
from fw_pipeline.steps.store import Done, load_arrays
from tests.helpers.tiny_dust3r import TINY

SIZE = 128  # long side at which the networks here read


@pytest.fixture(scope="module")
def dust3r_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dust3r")
    DUSt3R.seeded(TINY | {"img_size": [SIZE, SIZE]}, seed=0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def depth_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_depth_anything(tmp_path_factory.mktemp("depth"), seed=0)


def annotate(**config: Any) -> dg.ExecuteInProcessResult:
    """The job people launch, on all videos of the environment, with run config for the resource `pipeline`."""
    with dg.DagsterInstance.ephemeral() as instance:
        return defs.resolve_job_def("annotate_videos").execute_in_process(
            run_config={"resources": {"pipeline": {"config": config}}},
            instance=instance,
            tags=register(instance, list(Pipeline(settings_from_env()).videos)),
            raise_on_error=False,
        )


def network_truth(video: Path, clip: Clip, size: tuple[int, int]) -> TrueViews:
    """What a perfect network sees of a clip whose frames are annotated at `size`."""
    truth = load_ground_truth(video)
    assert truth is not None
    depth, intrinsics, w2c = ground_truth_for_clip(truth, clip)
    lens = intrinsics[0]
    for target in (size, network_size(*size, SIZE)):
        transform = FrameTransform(*depth.shape[1:], *target)
        depth, lens = transform.depth_to_target(depth), transform.intrinsics_to_target(lens)
    return TrueViews(depth.astype(np.float64), w2c, lens)


def knowing_network(edit: Callable[[str, PairPrediction], PairPrediction]) -> TruthNetwork:
    """A network that knows every clip of the environment's videos; `edit` gets each pair with the name of its video."""
    pipeline = Pipeline(settings_from_env())

    class Network(TruthNetwork):
        def _pair(self, first: int, second: int) -> PairPrediction:
            return edit(owner[first], super()._pair(first, second))

    network, owner = Network(SIZE, Spoil(noise=0.01)), []
    for key, video in pipeline.videos.items():
        for clip in pipeline.clips_of(key, pipeline.run("clips", key)):
            frames = pipeline._frames(key, clip)
            network.show(frames, network_truth(pipeline.settings.videos / video, clip, frames.shape[1:3]))
            owner += [video] * len(frames)
    return network


def geometry_markers(pipeline: Pipeline) -> list[Done]:
    found = [pipeline.store.done("geometry", key) for key in pipeline.videos]
    assert all(found)
    return [done for done in found if done]


def test_dust3r_and_depth_anything_annotate_the_truth_through_the_assets_and_one_bad_video_is_set_aside(
    environment: Path, depth_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, good = sorted(Pipeline(settings_from_env()).videos.values())

    def spoil(video: str, pair: PairPrediction) -> PairPrediction:
        return dataclasses.replace(pair, points_i=np.full_like(pair.points_i, np.nan)) if video == bad else pair

    engine = Dust3rEngine(lambda: knowing_network(spoil), "truth")
    monkeypatch.setattr(Dust3rSettings, "build", lambda *_: engine)
    run = annotate(geometry="dust3r", depth="depth-anything-v2", depth_model=str(depth_folder))
    assert run.success
    checks = {check.check_name: check for check in run.get_asset_check_evaluations()}
    for name in ("annotation_matches_truth", "clips_are_consistent"):
        assert checks[name].passed, (checks[name].description, checks[name].metadata)
    assert checks["annotation_matches_truth"].metadata["clips with truth"].value == 1
    settings = settings_from_env(geometry="dust3r", depth="depth-anything-v2", depth_model=str(depth_folder))
    pipeline = Pipeline(settings)
    errors = next(iter(truth_errors(pipeline).values()))
    assert errors["ate_percent"] < 1
    assert errors["absrel"] < 0.02
    for key, video in pipeline.videos.items():
        depth = pipeline.store.done("depth", key)
        assert depth is not None
        assert depth.made_by.startswith("depth-anything-v2:")
        (clip,) = depth.clips
        if video == bad:
            assert clip.set_aside is not None
            assert "not finite" in clip.set_aside
            continue
        finished = load_arrays(pipeline.store.folder("depth", key) / f"{clip.clip_id}.npz", FinishedClip)
        network = finished.source == ClipDepth.SOURCES.index("depth-anything-v2")
        assert clip.quality["network_depth"] == pytest.approx(network.mean())
        assert finished.fit_scale.shape == finished.fit_residual.shape == finished.source.shape == (17,)
    for key in pipeline.videos:
        pipeline.run("latents", key)
    assert pack(pipeline).clips == 1
    rows = {row.video: row for row in read_manifest(pipeline.store.dataset)}
    assert "not finite" in rows[bad].quarantine
    assert rows[good].quality["inlier_ratio"] > 0.9
    assert "network_depth" in rows[good].quality
    assert rows[good].versions["geometry"] == f"dust3r:{engine.version}"


def test_both_networks_with_made_weights_run_end_to_end_and_every_clip_has_a_reason(
    environment: Path, dust3r_folder: Path, depth_folder: Path
) -> None:
    config = {"geometry": "dust3r", "dust3r_model": str(dust3r_folder), "dust3r_batch": 5, "dust3r_keyframe_every": 4}
    config |= {"depth": "depth-anything-v2", "depth_model": str(depth_folder)}
    assert annotate(**config).success  # their geometry is garbage, which is no fault of the run
    for done in geometry_markers(Pipeline(settings_from_env(**config))):
        assert done.made_by.startswith("dust3r:1:local:")
        (clip,) = done.clips
        assert clip.set_aside


def test_weights_that_are_missing_stop_the_step_at_once_and_say_what_to_fetch_or_to_choose(
    environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    run = annotate(geometry="dust3r")
    assert not run.success
    (event,) = [event for event in run.all_events if event.is_step_failure]
    assert event.step_key == "geometry"
    error = event.step_failure_data.error
    assert error is not None
    message = error.to_string()
    for said in ("geometry cannot run", "hf download naver/DUSt3R", "2.3 GB", "CC BY-NC-SA", "geometry: colmap", "FW_PROFILE"):
        assert said in message
    assert not list((environment / "data" / "geometry").glob("*"))


def test_a_device_that_is_not_there_stops_the_step_and_says_so(environment: Path) -> None:
    run = annotate(device="cuda:97")
    (event,) = [event for event in run.all_events if event.is_step_failure]
    error = event.step_failure_data.error
    assert error is not None
    assert "device 'cuda:97' cannot be used here" in (error.cause or error).message
