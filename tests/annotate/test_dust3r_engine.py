"""The DUSt3R engine around a network that knows the truth, and around the real class with weights made for the test."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from fw_model import metrics
from fw_pipeline.annotate.clips import FrameTransform
from fw_pipeline.annotate.dust3r import DUSt3R, Dust3rEngine, DUSt3RWeightsError
from fw_pipeline.annotate.dust3r.engine import keyframes_of, unit_confidence
from fw_pipeline.annotate.pairwise.align import pair_graph, to_pixel_centres
from fw_pipeline.annotate.pairwise.pair_graph import PairPrediction
from fw_pipeline.annotate.quality import check_consistency, check_geometry
from fw_pipeline.annotate.types import ClipGeometry, ClipSetAside
from fw_pipeline.demo.render import camera_at, cast
from fw_pipeline.demo.scenes import SCENES, SHOTS
from fw_pipeline.demo.true_pairs import Spoil, TrueViews, TruthNetwork, true_views
from tests.helpers.tiny_dust3r import TINY

RGBD = Path(__file__).parents[2].parent / "shared" / "data" / "rgbd"
ORBIT = SHOTS[0].shots[0]
COUNT, HEIGHT, WIDTH = 17, 48, 64
Edit = Callable[[PairPrediction], PairPrediction]


@cache
def truth(count: int = COUNT) -> TrueViews:
    return true_views(ORBIT, count, HEIGHT, WIDTH)


def pictures(count: int = COUNT, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Frames that differ, which is all the network that knows the truth asks of them."""
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def oracle(spoil: Spoil | None = None, edit: Edit | None = None, count: int = COUNT, **settings: int) -> Dust3rEngine:
    network = TruthNetwork(WIDTH, spoil, wrong=((0, 2), (8, 6)))
    network.show(pictures(count), truth(count))
    network.edit = edit or network.edit
    return Dust3rEngine(lambda: network, "truth", **settings)


def errors(found: ClipGeometry, true: TrueViews) -> tuple[float, float]:
    """(ATE in % of the path, AbsRel over the pixels with a depth)."""
    return 100 * metrics.ate(found.w2c, true.w2c), metrics.absrel(found.depth, true.depth, found.depth > 0)


# -------------------------------------------------------------------------------------------------------- the good path


def test_dust3r_engine_gives_the_truth_back_to_the_last_digit() -> None:
    found = oracle().estimate(pictures())
    ate, absrel = errors(found, truth())
    assert ate < 1e-4
    assert absrel < 1e-5
    np.testing.assert_array_equal(found.w2c[0], np.eye(3, 4))
    np.testing.assert_allclose(found.intrinsics, to_pixel_centres(truth().intrinsics)[None].repeat(COUNT, 0), atol=1e-3)
    assert not found.interpolated.any()
    assert (found.depth > 0).all()
    assert found.inlier_ratio.min() == 1
    assert found.reprojection_error.max() < 1e-3
    assert 0 < found.confidence.min() <= found.confidence.max() < 1
    assert check_geometry(found)["neighbour_error"] < 0.01
    check_consistency(found.depth, found.intrinsics, found.w2c)


def test_dust3r_engine_has_one_scale_though_every_pair_has_its_own() -> None:
    found = oracle(Spoil(log_scale=2.0)).estimate(pictures())
    ratio = np.median(found.depth / truth().depth, axis=(1, 2))
    assert np.ptp(ratio) < 1e-4 * ratio[0]


def test_dust3r_engine_survives_noise_outliers_and_wrong_pairs() -> None:
    found = oracle(Spoil(noise=0.01, outliers=0.1, wrong_pair="moved")).estimate(pictures())
    ate, absrel = errors(found, truth())
    assert ate <= 1.0
    assert absrel <= 0.03
    numbers = check_geometry(found)
    assert numbers["interpolated"] == 0
    assert 0.85 < numbers["inlier_ratio"] < 0.97  # a tenth of the pixels is thrown anywhere


@pytest.mark.skipif(not RGBD.is_dir(), reason="needs the RGB-D frames")
def test_dust3r_engine_on_measured_depth_with_holes() -> None:
    depth = np.stack([cv2.imread(str(path), cv2.IMREAD_UNCHANGED)[::5, ::5] / 1000 for path in sorted(RGBD.glob("depth/*.png"))])
    numbers = np.array([line.split() for line in (RGBD / "trajectory.log").read_text().splitlines() if len(line.split()) == 4])
    w2c = np.linalg.inv(numbers.astype(float).reshape(-1, 4, 4))[:, :3]
    true = TrueViews(depth, w2c, np.array([[105.0, 0, 64], [0, 105, 48], [0, 0, 1]]))
    colour = np.stack([cv2.imread(str(path))[::5, ::5, ::-1] for path in sorted(RGBD.glob("color/*"))])
    network = TruthNetwork(128, Spoil(noise=0.01))
    network.show(colour, true)
    found = Dust3rEngine(lambda: network, "truth").estimate(colour)
    ate, absrel = errors(found, true)
    assert ate <= 0.38
    assert absrel <= 0.015
    np.testing.assert_array_equal(found.depth == 0, depth == 0)
    check_geometry(found)


def test_results_are_mapped_back_through_resizing_and_crop() -> None:
    height, width = 60, 100  # read at 64 wide: 38.4 rows, of which 32 are left
    transform = FrameTransform(height, width, 32, WIDTH)
    true = true_views(ORBIT, 5, 32, WIDTH)
    network = TruthNetwork(WIDTH)
    frames = pictures(5, height, width)
    network.show(frames, true)
    found = Dust3rEngine(lambda: network, "truth").estimate(frames)
    lens = transform.intrinsics_to_source(to_pixel_centres(true.intrinsics))
    np.testing.assert_allclose(found.intrinsics[0], lens, rtol=1e-6)
    expected = np.stack([cast(SCENES[ORBIT.scene](), camera_at(ORBIT, s), lens, height, width) for s in np.linspace(0, 1, 5)])
    known = found.depth > 0
    np.testing.assert_array_equal(known.all((0, 2)), np.r_[[False] * 5, [True] * 50, [False] * 5])
    ratio = found.depth[known] / expected[known]
    assert np.median(np.abs(ratio / np.median(ratio) - 1)) < 0.001
    check_geometry(found)


def test_known_lenses_are_taken_as_they_are() -> None:
    lens = to_pixel_centres(truth().intrinsics)
    lens[0, 0] = lens[1, 1] = lens[0, 0] * 1.02
    found = oracle(Spoil(noise=0.005)).estimate(pictures(), lens)
    assert found.intrinsics[:, 0, 0] == pytest.approx(lens[0, 0])
    for bad in (lens * [[1.2, 1, 1], [1, 1, 1], [1, 1, 1]], lens + [[0, 0, 5], [0, 0, 0], [0, 0, 0]]):
        with pytest.raises(ValueError, match="square pixels with the principal point"):
            oracle().estimate(pictures(), bad)


# ----------------------------------------------------------------------------------------------------------------- cost


@pytest.mark.parametrize("count", [2, 3, 9, 17, 49, 81, 161])
def test_keyframes_reach_from_end_to_end_with_bounded_steps(count: int) -> None:
    keyframes = keyframes_of(count, 8)
    assert (keyframes[0], keyframes[-1]) == (0, count - 1)
    assert 1 <= np.diff(keyframes).min() <= np.diff(keyframes).max() <= 8
    assert len(keyframes) >= min(count, 9)


def test_dust3r_engine_encodes_every_frame_once_and_decodes_few_pairs() -> None:
    engine = oracle()
    engine.estimate(pictures())
    network = engine.network
    assert isinstance(network, TruthNetwork)
    keyframes = len(keyframes_of(COUNT, 8))
    assert network.encoded == COUNT
    assert network.decoded == len(pair_graph(keyframes, 2)) + COUNT - keyframes
    plain = len(pair_graph(81, window=3, long_links=False))  # what the original does to a clip of 81 frames: each encodes twice
    keyframes = len(keyframes_of(81, 8))
    assert 4 * (len(pair_graph(keyframes, 2)) + 81 - keyframes) <= plain
    assert 2 * plain >= 4 * 81


def test_window_step_and_batch_have_the_effect_they_say() -> None:
    few, many = oracle(window=1, keyframe_every=2), oracle(window=4, keyframe_every=1, batch=3)
    results = [engine.estimate(pictures()) for engine in (few, many)]
    assert isinstance(few.network, TruthNetwork)
    assert isinstance(many.network, TruthNetwork)
    assert few.network.decoded == len(pair_graph(9, 1)) + 8
    assert many.network.decoded == len(pair_graph(17, 4))
    for found in results:
        assert errors(found, truth())[0] < 1e-4
    one, other = (oracle(Spoil(noise=0.02), batch=batch).estimate(pictures()) for batch in (1, 16))
    np.testing.assert_array_equal(one.depth, other.depth)
    np.testing.assert_array_equal(one.w2c, other.w2c)
    for name in ("window", "keyframe_every", "batch"):
        with pytest.raises(ValueError, match=name):
            oracle(**{name: 0})


# ------------------------------------------------------------------------------------------------------------ bad input


def flat(points: np.ndarray, value: float) -> np.ndarray:
    return np.full_like(points, value)


SQUEEZED = np.float32([1e-4, 1e-4, 1])
BAD: dict[str, tuple[Edit, str]] = {
    "nan": (lambda p: replace(p, points_i=flat(p.points_i, np.nan), points_j=flat(p.points_j, np.nan)), "not finite"),
    "constant": (lambda p: replace(p, points_i=flat(p.points_i, 1), points_j=flat(p.points_j, 1)), "constant"),
    "low confidence": (
        lambda p: replace(p, confidence_i=flat(p.confidence_i, 1.02), confidence_j=flat(p.confidence_j, 1.01)),
        "confidence is low",
    ),
    "focal": (lambda p: replace(p, points_i=p.points_i * SQUEEZED, points_j=p.points_j * SQUEEZED), "focal ran away"),
}


@pytest.mark.parametrize("what", BAD)
def test_dust3r_engine_rejects_worthless_pointmaps_with_the_reason(what: str) -> None:
    edit, reason = BAD[what]
    with pytest.raises(ClipSetAside, match=reason):
        oracle(edit=edit, count=5).estimate(pictures(5))


def test_dust3r_engine_rejects_a_single_frame_and_frames_that_are_the_same() -> None:
    with pytest.raises(ClipSetAside, match="1 frame has no pair"):
        oracle().estimate(pictures()[:1])
    for same in ([0, 0], [3] * 5):
        with pytest.raises(ClipSetAside, match="does not move"):
            oracle().estimate(pictures()[same])


def scrambled(frames: set[int]) -> Edit:
    """What the network says about the second view is noise, for some frames."""

    def edit(pair: PairPrediction) -> PairPrediction:
        if pair.j not in frames:
            return pair
        noise = np.random.default_rng(pair.j).standard_normal(pair.points_j.shape).astype(np.float32)
        return replace(pair, points_j=noise + np.float32([0, 0, 4]))

    return edit


def test_a_frame_that_cannot_be_placed_is_interpolated_flagged_and_has_no_depth() -> None:
    found = oracle(edit=scrambled({5, 9})).estimate(pictures())
    np.testing.assert_array_equal(np.flatnonzero(found.interpolated), [5, 9])
    assert (found.depth[[5, 9]] == 0).all()
    assert not np.allclose(found.w2c[5], np.eye(3, 4), atol=0.01)
    assert 100 * metrics.ate(found.w2c, truth().w2c) < 1
    assert check_geometry(found)["interpolated"] == pytest.approx(2 / COUNT)


def test_a_clip_most_of_whose_frames_cannot_be_placed_is_rejected_with_the_numbers() -> None:
    with pytest.raises(ClipSetAside, match=r"camera of 5 of 17 frames could not be found .*: .*pose"):
        oracle(edit=scrambled({1, 5, 7, 9, 11})).estimate(pictures())


# ----------------------------------------------------------------------------------------------------- the real network


@pytest.mark.parametrize("head", ["linear", "dpt"])
def test_the_real_network_with_made_weights_gives_a_clip_or_a_reason(tmp_path: Path, head: str) -> None:
    DUSt3R.seeded(TINY | {"head_type": head}, seed=3).save_pretrained(tmp_path)
    engine = Dust3rEngine.from_pretrained(tmp_path, batch=4)
    with pytest.raises(ClipSetAside, match=r"pair|frames|focal|points|camera"):
        engine.estimate(pictures(6, 40, 60))
    assert isinstance(engine.network, DUSt3R)


def test_bfloat16_reaches_the_network_and_the_version(tmp_path: Path) -> None:
    DUSt3R.seeded(TINY, seed=0).save_pretrained(tmp_path)
    engine = Dust3rEngine.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert isinstance(engine.network, DUSt3R)
    assert engine.network.dtype == torch.bfloat16
    assert "bfloat16" in engine.version
    with pytest.raises(ValueError, match="float16"):
        Dust3rEngine.from_pretrained(tmp_path, dtype=torch.float16)


def test_the_version_changes_with_whatever_changes_results(tmp_path: Path) -> None:
    made = [tmp_path / name for name in ("a", "b", "c")]
    for folder, seed in zip(made, (0, 1, 0), strict=True):
        DUSt3R.seeded(TINY, seed=seed).save_pretrained(folder)
    load = Dust3rEngine.from_pretrained
    versions = [
        load("naver/x"),
        load("naver/y"),
        load("naver/x", "v2"),
        load("naver/x", dtype=torch.bfloat16),
        load("naver/x", window=3),
        load("naver/x", keyframe_every=4),
        load(made[0]),
        load(made[1]),
    ]
    assert len({engine.version for engine in versions}) == len(versions)
    assert load(made[2]).version == load(made[0]).version  # the same weights elsewhere
    assert load("naver/x", batch=2, device="cuda").version == load("naver/x").version


def test_weights_that_are_missing_are_named_when_they_are_needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for source in ("naver/DUSt3R_ViTLarge_BaseDecoder_512_dpt", str(tmp_path / "nowhere")):
        engine = Dust3rEngine.from_pretrained(source)
        assert engine.version
        with pytest.raises(DUSt3RWeightsError, match=r"2\.3 GB.*CC BY-NC-SA 4\.0") as error:
            engine.estimate(pictures(3))
        for said in ("hf download naver/DUSt3R_ViTLarge_BaseDecoder_512_dpt", "geometry: colmap", "FW_PROFILE=laptop"):
            assert said in str(error.value)


def test_confidence_is_the_sigmoid_of_what_the_head_gives() -> None:
    raw = torch.tensor([-5.0, 0.0, 2.0])
    np.testing.assert_allclose(unit_confidence((1 + raw.exp()).numpy()), torch.sigmoid(raw).numpy(), rtol=1e-5)
    np.testing.assert_array_equal(unit_confidence(np.array([np.nan, 0.0, 1.0])), [0, 0, 0])
