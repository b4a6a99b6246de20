"""Depth Anything V2: the real class on seeded weights, and an oracle that knows the true disparity up to an affine map."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from scipy import ndimage
from torch import Tensor

from fw_model import metrics
from fw_pipeline.annotate.depth import DepthAnythingV2, DepthModelError, depth_anything
from fw_pipeline.annotate.depth.depth_anything import DepthAnythingNetwork
from fw_pipeline.annotate.pairwise.align import to_pixel_centres
from fw_pipeline.annotate.types import Clip, ClipDepth, ClipGeometry, ClipSetAside
from fw_pipeline.demo.scenes import SHOTS
from fw_pipeline.demo.seeded_models import make_depth_anything
from fw_pipeline.demo.true_pairs import TrueViews, true_views
from fw_pipeline.steps.results import finish_clip

RGBD = Path(__file__).parents[2].parent / "shared" / "data" / "rgbd"
GEOMETRY, NETWORK = 0, 1


class Oracle(DepthAnythingNetwork):
    """Answers with given disparities [T, h, w], frame after frame, and notes how many it is asked for at once."""

    def __init__(self, disparity: np.ndarray, metric: bool = False, short_side: int = 196) -> None:
        config = SimpleNamespace(depth_estimation_type="metric" if metric else "relative", patch_size=14)
        fake = SimpleNamespace(config=config, eval=lambda: fake, to=lambda _: fake)
        super().__init__(fake, [0.5] * 3, [0.5] * 3, "cpu", torch.float32, short_side)
        self.answers, self.asked = torch.from_numpy(disparity.astype(np.float32)), []

    def forward(self, pixels: Tensor) -> Tensor:
        first = sum(self.asked)
        self.asked.append(len(pixels))
        return F.interpolate(self.answers[first : sum(self.asked), None], pixels.shape[2:], mode="bilinear")[:, 0]


def oracle_engine(disparity: np.ndarray, metric: bool = False, **settings: float) -> DepthAnythingV2:
    engine = DepthAnythingV2(**{"batch": 3, **settings})
    vars(engine)["network"] = Oracle(disparity, metric)
    return engine


def spoilt(truth: TrueViews, outliers: float = 0.2, noise: float = 0.02, seed: int = 0) -> ClipGeometry:
    """Geometry with the true cameras and a depth that is noisy, in places wrong and in places missing, in a unit of its own."""
    rng = np.random.default_rng(seed)
    depth = 0.37 * truth.depth * (1 + noise * rng.standard_normal(truth.depth.shape))
    wrong, missing = rng.random(depth.shape) < outliers, rng.random(depth.shape) < 0.3
    depth[wrong] *= np.exp(rng.uniform(-1.5, 1.5, int(wrong.sum())))
    depth[missing] = 0
    full = np.tile(np.eye(4), (len(depth), 1, 1))
    full[:, :3] = truth.w2c
    w2c = (full @ np.linalg.inv(full[0]))[:, :3]
    w2c[:, :, 3] *= 0.37
    k = np.tile(to_pixel_centres(truth.intrinsics), (len(depth), 1, 1))
    ones = np.ones(len(depth))
    confidence = np.where(depth > 0, 0.8, 0)
    kinds = (depth.astype(np.float32), confidence.astype(np.float32))
    return ClipGeometry(w2c, k, *kinds, ones, 0 * ones, np.zeros(len(depth), bool))


def frames_for(geometry: ClipGeometry) -> np.ndarray:
    return np.zeros((*geometry.depth.shape, 3), np.uint8)


def affine(truth: np.ndarray, steady: bool, seed: int = 0) -> np.ndarray:
    """1 / truth under an affine map: new in every frame, or drifting slowly; the offset keeps it positive."""
    rng = np.random.default_rng(seed)
    time = np.linspace(0, 1, len(truth))
    scale = 2 + 0.5 * time if steady else np.exp(rng.uniform(-1, 1, len(truth)))
    offset = -0.05 + 0.01 * time if steady else rng.uniform(-0.05, 0.5, len(truth))
    return (1 / truth + offset[:, None, None]) * scale[:, None, None]


@pytest.fixture(scope="module")
def room() -> TrueViews:
    return true_views(SHOTS[0].shots[0], 8, 96, 128)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_depth_anything(tmp_path_factory.mktemp("made") / "depth")


@pytest.fixture(scope="module")
def engine(made: Path) -> DepthAnythingV2:
    return DepthAnythingV2.from_pretrained(made, batch=2, short_side=70)


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 70, 98, 3), np.uint8)


# -------------------------------------------------------------------------------------------------------------- oracle


@pytest.mark.parametrize("steady", [True, False])
@pytest.mark.parametrize("name", ["room_orbit", "hall_portrait"])
def test_depth_of_the_demo_is_right_through_the_whole_engine(name: str, steady: bool) -> None:
    truth = true_views(next(p for p in SHOTS if p.name == name).shots[0], 6, 96, 128)
    geometry = spoilt(truth)
    found = oracle_engine(affine(truth.depth, steady)).estimate(frames_for(geometry), geometry)
    assert (found.source == NETWORK).all()
    assert (found.depth > 0).all()
    assert metrics.absrel(found.depth, truth.depth, found.depth > 0) <= 0.006
    assert metrics.absrel(geometry.depth, truth.depth, geometry.depth > 0) > 0.1  # what it was aligned to
    assert np.median(found.depth / truth.depth) == pytest.approx(0.37, rel=0.003)  # in the geometry's unit
    assert (found.inlier_ratio > 0.7).all()
    assert (found.residual < 0.02).all()


@pytest.mark.skipif(not RGBD.is_dir(), reason="needs the RGB-D frames")
def test_depth_of_rgbd_frames_is_right_through_the_whole_engine() -> None:
    depth = np.stack([cv2.imread(str(path), cv2.IMREAD_UNCHANGED)[::5, ::5] / 1000 for path in sorted(RGBD.glob("depth/*.png"))])
    poses = np.array([line.split() for line in (RGBD / "trajectory.log").read_text().splitlines() if len(line.split()) == 4])
    w2c = np.linalg.inv(poses.astype(float).reshape(-1, 4, 4))[:, :3]
    known = depth > 0
    whole = np.stack([d[tuple(ndimage.distance_transform_edt(d == 0, return_indices=True)[1])] for d in depth])
    truth = TrueViews(whole, w2c, np.array([[105.0, 0, 64], [0, 105, 48], [0, 0, 1]]))
    geometry = spoilt(truth)
    geometry = replace(geometry, depth=np.where(known, geometry.depth, 0), confidence=np.where(known, geometry.confidence, 0))
    found = oracle_engine(affine(whole, steady=False)).estimate(frames_for(geometry), geometry)
    assert (found.source == NETWORK).all()
    assert metrics.absrel(found.depth, depth, known) <= 0.02
    assert np.median(np.abs(found.depth / 0.37 - depth)[known] / depth[known]) <= 0.003


def test_metres_of_the_metric_variants_become_the_geometrys_unit_by_one_factor(room: TrueViews) -> None:
    geometry = spoilt(room)
    found = oracle_engine(1.3 * room.depth, metric=True).estimate(frames_for(geometry), geometry)
    assert (found.shift == 0).all()
    np.testing.assert_allclose(1 / found.scale, 0.37 / 1.3, rtol=0.005)
    assert metrics.absrel(found.depth, room.depth, found.depth > 0) <= 0.006


def test_the_aligned_depth_makes_one_consistent_clip(room: TrueViews) -> None:
    geometry = spoilt(room)
    found = oracle_engine(affine(room.depth, steady=True)).estimate(frames_for(geometry), geometry)
    clip = Clip("a-s0-c0", "a.mp4", "0" * 16, 0, 12.0, tuple(np.arange(8) / 12), 96, 128, 96, 128)
    finished = finish_clip(clip, geometry, found)  # raises ClipSetAside when it is not
    assert (finished.source == NETWORK).all()
    assert (finished.depth > 0).mean() > 0.99


# ------------------------------------------------------------------------------------------------------------ bad input


def test_a_frame_whose_disparity_is_broken_keeps_the_geometrys_depth_and_harms_no_other(room: TrueViews) -> None:
    geometry, disparity = spoilt(room), affine(room.depth, steady=False)
    disparity[2], disparity[4] = np.nan, 0.7
    disparity[5] = np.random.default_rng(0).random(disparity[5].shape)
    found = oracle_engine(disparity).estimate(frames_for(geometry), geometry)
    assert found.source.tolist() == [1, 1, 0, 1, 0, 0, 1, 1]
    for t in (2, 4, 5):
        np.testing.assert_array_equal(found.depth[t], geometry.depth[t])
        np.testing.assert_array_equal(found.confidence[t], geometry.confidence[t])
    assert all(np.isfinite(value).all() for value in vars(found).values())
    assert (found.scale[2], found.shift[2], found.inlier_ratio[2], found.residual[2]) == (1, 0, 0, 1)
    good = found.source == NETWORK
    assert metrics.absrel(found.depth[good], room.depth[good], believe(room.depth[good])) <= 0.006


def believe(values: np.ndarray) -> np.ndarray:
    return np.ones(values.shape, bool)


@pytest.mark.parametrize("value", [np.nan, 0.0])
def test_a_network_that_says_nothing_sets_the_clip_aside(room: TrueViews, value: float) -> None:
    geometry = spoilt(room)
    with pytest.raises(ClipSetAside, match=r"not one of 8 frames could be aligned.*at least 32 are needed"):
        oracle_engine(np.full_like(room.depth, value)).estimate(frames_for(geometry), geometry)


def test_geometry_without_depth_sets_the_clip_aside(room: TrueViews) -> None:
    geometry = spoilt(room)
    empty = replace(geometry, depth=0 * geometry.depth, confidence=0 * geometry.confidence)
    with pytest.raises(ClipSetAside, match="0 confident pixels"):
        oracle_engine(1 / room.depth).estimate(frames_for(geometry), empty)


def test_a_single_frame_is_aligned_too(room: TrueViews) -> None:
    geometry = spoilt(replace(room, depth=room.depth[:1], w2c=room.w2c[:1]))
    found = oracle_engine(affine(room.depth[:1], steady=True)).estimate(frames_for(geometry), geometry)
    assert metrics.absrel(found.depth, room.depth[:1], found.depth > 0) <= 0.006


def test_what_is_infinitely_far_has_no_depth(room: TrueViews) -> None:
    geometry = spoilt(room)
    disparity = 1 / room.depth
    disparity[:, :20] = 0  # sky
    disparity[:, 20:24] = 1e-5  # nearly
    found = oracle_engine(disparity).estimate(frames_for(geometry), geometry)
    assert (found.source == NETWORK).all()
    assert (found.depth[:, :19] == 0).all()
    assert (found.confidence[:, :19] == 0).all()
    assert (found.depth[:, 21:23] == 0).all()
    assert (found.depth[:, 26:] > 0).all()
    assert found.depth.max() < 5 * geometry.depth.max()


def test_confidence_says_how_far_the_two_depths_agree(room: TrueViews) -> None:
    geometry = spoilt(room)
    found = oracle_engine(affine(room.depth, steady=True)).estimate(frames_for(geometry), geometry)
    assert found.confidence.min() >= 0
    assert found.confidence.max() <= 1
    off = np.abs(geometry.depth / 0.37 / room.depth - 1)
    agree, differ = (geometry.depth > 0) & (off < 0.02), (geometry.depth > 0) & (off > 0.3)
    assert np.median(found.confidence[agree]) > 0.85 > 0.3 > np.median(found.confidence[differ])
    unseen = found.confidence[geometry.depth == 0]
    assert 0.6 < unseen.min() <= unseen.max() < 0.9  # the frame's share of inliers


def test_frames_and_geometry_of_different_sizes_are_refused(room: TrueViews) -> None:
    geometry = spoilt(room)
    with pytest.raises(ValueError, match="do not belong together"):
        oracle_engine(1 / room.depth).estimate(frames_for(geometry)[:, :-2], geometry)


# ------------------------------------------------------------------------------------------------------------- network


@pytest.mark.parametrize(
    ("frame", "seen"),
    [
        ((288, 512), (518, 924)),
        ((512, 288), (924, 518)),
        ((480, 640), (518, 686)),
        ((336, 592), (518, 910)),
        ((720, 720), (518, 518)),
    ],
)
def test_the_network_sees_its_official_size_across_the_short_side(frame: tuple[int, int], seen: tuple[int, int]) -> None:
    assert Oracle(np.zeros((1, 1, 1)), short_side=518).input_size(*frame) == seen


def test_disparity_is_the_real_classs_predicted_depth_of_the_published_preprocessing(
    engine: DepthAnythingV2, made: Path, pictures: np.ndarray
) -> None:
    from transformers import AutoModelForDepthEstimation, DPTImageProcessorPil

    processor = DPTImageProcessorPil.from_pretrained(made, size={"height": 70, "width": 98}, keep_aspect_ratio=False)
    inputs = processor(images=list(pictures), return_tensors="pt")
    with torch.inference_mode():
        expected = AutoModelForDepthEstimation.from_pretrained(made).eval()(**inputs).predicted_depth
    found = engine.disparity(pictures)
    assert found.dtype == np.float32
    assert found.std() > 0.01
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_frames_are_never_more_at_once_than_a_batch_and_the_batch_changes_nothing(made: Path, pictures: np.ndarray) -> None:
    one, three = (DepthAnythingV2(str(made), batch=batch, short_side=42).disparity(pictures) for batch in (1, 3))
    np.testing.assert_allclose(one, three, atol=1e-4)
    oracle = oracle_engine(np.ones((8, 96, 128)))
    oracle.disparity(np.zeros((8, 96, 128, 3), np.uint8))
    assert oracle.network.asked == [3, 3, 2]


def test_the_resize_there_and_back_moves_nothing() -> None:
    class Mirror(Oracle):
        def forward(self, pixels: Tensor) -> Tensor:
            return pixels[:, 0]

    v, u = np.mgrid[:60, :90]
    ramp = np.repeat((2 * u + v)[None, ..., None], 3, axis=3).astype(np.uint8)
    for short_side in (140, 42):  # enlarged, shrunk
        network = Mirror(np.zeros((1, 1, 1)), short_side=short_side)
        seen = (network(ramp)[0].numpy() + 1) * 127.5
        np.testing.assert_allclose(seen[3:-3, 3:-3], (2 * u + v)[3:-3, 3:-3], atol=0.25)  # an eighth of a pixel


def test_bfloat16_leaves_the_head_in_full_precision(made: Path, pictures: np.ndarray) -> None:
    full, half = (DepthAnythingV2(str(made), dtype=dtype, short_side=70).disparity(pictures) for dtype in ("float32", "bfloat16"))
    assert 0 < np.abs(full - half).max() < 0.1 * full.mean()
    assert len(np.unique(half)) > 0.8 * half.size  # bfloat16 would leave some hundred values


def test_the_metric_variant_is_known_by_its_configuration(tmp_path: Path, pictures: np.ndarray) -> None:
    metric = DepthAnythingV2.from_pretrained(make_depth_anything(tmp_path / "metric", metric=True), short_side=42)
    assert metric.network.metric
    metres = metric.network(pictures).numpy()
    assert metres.max() > 1
    np.testing.assert_allclose(metric.disparity(pictures), 1 / metres, rtol=1e-5)


# ------------------------------------------------------------------------------------------------- where it comes from


def test_version_changes_with_what_changes_results_and_nothing_else(made: Path, tmp_path: Path) -> None:
    base = DepthAnythingV2()
    changed = {"model": "depth-anything/Depth-Anything-V2-Base-hf", "revision": "abc"}
    changed |= {"short_side": 266, "dtype": "bfloat16", "min_inliers": 0.5}
    versions = [base.version] + [replace(base, **{key: value}).version for key, value in changed.items()]
    assert len(set(versions)) == len(versions)
    assert base.version == replace(base, batch=16).version == replace(base, dtype=torch.float32).version
    other = make_depth_anything(tmp_path / "other", seed=1)
    assert DepthAnythingV2(str(made)).version != DepthAnythingV2(str(other)).version
    again = make_depth_anything(tmp_path / "again")
    assert DepthAnythingV2(str(made)).version == DepthAnythingV2(str(again)).version


@pytest.mark.parametrize(("size", "words"), [("Small", ["99 MB", "Apache-2.0"]), ("Large", ["1.34 GB", "CC BY-NC 4.0"])])
def test_a_network_that_is_not_there_is_named_with_its_download_size_and_licence(
    size: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repo = f"depth-anything/Depth-Anything-V2-{size}-hf"
    with pytest.raises(DepthModelError) as caught:
        DepthAnythingV2.from_pretrained(repo, "0" * 40)
    for word in [*words, f"hf download {repo} --revision {'0' * 40} config.json", "local folder"]:
        assert word in str(caught.value)


def test_a_folder_that_is_missing_or_lacks_a_file_is_named(made: Path, tmp_path: Path) -> None:
    with pytest.raises(DepthModelError, match=r"(?s)nowhere: no such folder.*hf download"):
        DepthAnythingV2.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "config.json").write_bytes((made / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")
    for use in (lambda e: e.network, lambda e: e.version):
        with pytest.raises(DepthModelError, match=r"no model.safetensors and no preprocessor_config.json here"):
            use(DepthAnythingV2(str(tmp_path)))


def test_a_damaged_or_foreign_network_is_refused(tmp_path: Path) -> None:
    folder = make_depth_anything(tmp_path / "made")
    weights, config = folder / "model.safetensors", folder / "config.json"
    whole, text = weights.read_bytes(), config.read_text()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DepthModelError, match="not a readable depth network"):
        DepthAnythingV2.from_pretrained(folder)
    weights.write_bytes(whole)
    state = load_file(weights)
    del state["head.conv1.weight"]
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(DepthModelError, match="1 weights are missing, first head.conv1.weight"):
        DepthAnythingV2.from_pretrained(folder)
    config.write_text(json.dumps(json.loads(text) | {"model_type": "dpt"}))
    with pytest.raises(DepthModelError, match="holds a dpt network"):
        DepthAnythingV2.from_pretrained(folder)


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"short_side": 0}, {"min_inliers": 2}, {"dtype": "float16"}, {"dtype": "int"}])
def test_settings_that_make_no_sense_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DepthAnythingV2(**wrong)


def test_every_published_name_tells_its_size() -> None:
    for kind in ("", "Metric-Indoor-", "Metric-Outdoor-"):
        for size, text in depth_anything.PUBLISHED.items():
            assert text in depth_anything._what_to_fetch(f"depth-anything/Depth-Anything-V2-{kind}{size.title()}-hf", "main")
    assert ClipDepth.SOURCES[NETWORK] == DepthAnythingV2().name
