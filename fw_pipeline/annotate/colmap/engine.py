"""The `colmap` geometry engine: cameras by structure from motion (pycolmap, CPU), depth by plane-sweep stereo.

Needs no weights. COLMAP's pixel convention is the project's own: the centre of the upper left pixel is (0.5, 0.5).
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pycolmap
from PIL import Image

from fw_pipeline.annotate.colmap.plane_sweep import SweepSettings, depth_range, sweep_depth
from fw_pipeline.annotate.trajectory import fill_poses
from fw_pipeline.annotate.types import ClipGeometry, ClipSetAside

CODE_VERSION = 2
Matches = dict[tuple[int, int], np.ndarray]  # frames (i, j), i < j -> [M, 2] keypoint indices that fit one two-view geometry


@dataclass(frozen=True)
class SparseModel:
    """What structure from motion found. Frames that did not register have no entry in `poses`."""

    poses: dict[int, np.ndarray]  # frame -> w2c [3, 4]
    intrinsics: np.ndarray  # [3, 3] pixels of the frames
    points: np.ndarray  # [P, 3] world
    seen: dict[int, np.ndarray]  # frame -> indices into points
    observed: dict[int, tuple[np.ndarray, np.ndarray]]  # frame -> 2-D/3-D matches: pixels [M, 2], world points [M, 3]
    triangulation_angle: float  # degrees, median over the points of the widest angle each is seen under


@dataclass(frozen=True)
class ColmapEngine:
    """GeometryEngine over pycolmap and `sweep_depth`."""

    device: str = "cpu"  # of the sweep; structure from motion runs on the CPU
    max_features: int = 1200
    enlarge_to: int = 640  # frames with a shorter long side are enlarged for SIFT, which finds little in small pictures
    exhaustive_up_to: int = 24  # frames; longer clips are matched in a window with links of doubling length (linear cost)
    min_registered: float = 0.8  # share of frames
    # A feature that moves less than `still` of the long side between frames half a clip apart stays where it is. Measured on
    # real clips: 0 % of the matches stay with a moving camera, 34 % to 90 % with a fixed one in front of a moving animal.
    still: float = 0.002
    max_still: float = 0.25
    min_angle: float = 0.5  # degrees of median triangulation angle; below it depth is noise
    sweep: SweepSettings = field(default_factory=SweepSettings)
    name: str = "colmap"

    @property
    def version(self) -> str:
        return f"{CODE_VERSION}:pycolmap-{pycolmap.__version__}:{self.max_features}:{self.enlarge_to}:{self.sweep}"

    def estimate(self, frames: np.ndarray, intrinsics: np.ndarray | None = None) -> ClipGeometry:
        """Cameras and depth of a clip; see `GeometryEngine.estimate`.

        The unit is the median depth of the sparse points. Frames that do not register are interpolated and flagged.

        Raises:
            ClipSetAside: nothing to match, a camera that does not move or only turns, too few frames registered.
        """
        count, height, width, _ = frames.shape
        model = self._solved(frames, intrinsics)
        ratio, error = _fit(model, count, tolerance=2.0 * max(1.0, max(height, width) / 448))
        interpolated = np.array([t not in model.poses for t in range(count)])
        w2c = fill_poses(model.poses, count)
        w2c, points = _first_camera_world(w2c, model.points)
        z = np.concatenate([points[model.seen[t]] @ w2c[t, 2, :3] + w2c[t, 2, 3] for t in model.poses])
        unit = float(np.median(z))
        w2c[:, :, 3] /= unit
        near, far = self._ranges(points / unit, w2c, model)
        k = np.repeat(model.intrinsics[None], count, 0)
        depth, confidence = sweep_depth(frames, w2c, k, near, far, self.sweep, self.device)
        return ClipGeometry(w2c, k, depth, confidence, ratio, error, interpolated)

    def cameras(self, frames: np.ndarray, intrinsics: np.ndarray | None = None) -> np.ndarray:
        """`estimate` without its depth: w2c [T, 3, 4] with the first camera as world."""
        model = self._solved(frames, intrinsics)
        return _first_camera_world(fill_poses(model.poses, len(frames)), model.points)[0]

    def _solved(self, frames: np.ndarray, intrinsics: np.ndarray | None) -> SparseModel:
        """Structure from motion whose cameras can be trusted, or ClipSetAside."""
        count = len(frames)
        if count < 3:
            raise ClipSetAside(f"{count} frames; structure from motion needs at least 3")
        with tempfile.TemporaryDirectory(prefix="fw-colmap-") as folder:
            model = self._structure_from_motion(frames, intrinsics, Path(folder))
        if len(model.poses) < self.min_registered * count:
            raise ClipSetAside(
                f"only {len(model.poses)} of {count} frames could be placed (at least {self.min_registered:.0%} are needed)"
            )
        if model.triangulation_angle < self.min_angle:
            raise ClipSetAside(
                f"the camera turns but hardly moves: points are seen under {model.triangulation_angle:.2f} degrees "
                f"(at least {self.min_angle:g})"
            )
        return model

    def _ranges(self, points: np.ndarray, w2c: np.ndarray, model: SparseModel) -> tuple[np.ndarray, np.ndarray]:
        """(near [T], far [T]); a frame that sees too few points takes the whole clip's."""
        ranges = []
        for t in range(len(w2c)):
            seen = model.seen.get(t, np.empty(0, int))
            ranges.append(depth_range(points[seen] if len(seen) >= 50 else points, w2c[t]))
        near, far = np.array(ranges).T
        return near, far

    def _structure_from_motion(self, frames: np.ndarray, intrinsics: np.ndarray | None, folder: Path) -> SparseModel:
        _, height, width, _ = frames.shape
        scale = max(1.0, self.enlarge_to / max(height, width))
        images = folder / "images"
        images.mkdir()
        for index, frame in enumerate(frames):
            size = (round(width * scale), round(height * scale))
            picture = Image.fromarray(frame)
            if scale > 1:
                picture = picture.resize(size, Image.Resampling.BICUBIC)
            picture.save(images / f"{index:06d}.png", compress_level=1)
        across = np.array([size[0] / width, size[1] / height])
        database = folder / "database.db"
        pycolmap.logging.minloglevel = 3  # its warnings name temporary files; what matters is in our exceptions
        pycolmap.set_random_seed(0)
        self._extract(database, images, "SIMPLE_PINHOLE" if intrinsics is None else "PINHOLE")
        matches, keypoints = self._match(database, len(frames), scale)
        self._check_motion(matches, keypoints, max(height, width) * scale)
        model = self._map(database, images, folder, size, across, intrinsics)
        return _read(model, matches, keypoints, across)

    def _extract(self, database: Path, images: Path, camera_model: str) -> None:
        options = pycolmap.FeatureExtractionOptions()
        options.use_gpu, options.num_threads = False, 2
        options.sift.max_num_features = self.max_features
        options.sift.peak_threshold = 0.004  # weak texture still counts: wrong features do not survive verification
        options.sift.upright = True  # a clip's camera does not roll between frames
        reader = pycolmap.ImageReaderOptions()
        reader.camera_model = camera_model
        pycolmap.extract_features(
            database,
            images,
            camera_mode=pycolmap.CameraMode.SINGLE,
            reader_options=reader,
            extraction_options=options,
            device=pycolmap.Device.cpu,
        )

    def _match(self, database: Path, count: int, scale: float) -> tuple[Matches, list[np.ndarray]]:
        matching, verification = pycolmap.FeatureMatchingOptions(), pycolmap.TwoViewGeometryOptions()
        matching.use_gpu, matching.num_threads = False, 2
        verification.ransac.random_seed = 0
        verification.ransac.max_error = scale  # one pixel of the frame as it came
        common: dict[str, Any] = {
            "matching_options": matching,
            "verification_options": verification,
            "device": pycolmap.Device.cpu,
        }
        if count <= self.exhaustive_up_to:
            pycolmap.match_exhaustive(database, **common)
        else:
            window = pycolmap.SequentialPairingOptions()
            window.overlap, window.quadratic_overlap = 8, True
            pycolmap.match_sequential(database, pairing_options=window, **common)
        store = pycolmap.Database.open(database)
        try:
            ids = {image.image_id: int(image.name[:6]) for image in store.read_all_images()}
            keypoints: list[np.ndarray] = [np.empty((0, 2))] * count
            for image_id, index in ids.items():
                keypoints[index] = np.asarray(store.read_keypoints(image_id))[:, :2]
            found: Matches = {}
            for a in ids:
                for b in ids:
                    if ids[a] < ids[b] and store.exists_two_view_geometry(a, b):
                        pairs = np.asarray(store.read_two_view_geometry(a, b).inlier_matches)
                        if len(pairs):
                            found[ids[a], ids[b]] = pairs
        finally:
            store.close()
        return found, keypoints

    def _check_motion(self, matches: Matches, keypoints: list[np.ndarray], long_side: float) -> None:
        """Raise ClipSetAside when there is nothing to match or most of the picture stays where it is."""
        good = {pair: m for pair, m in matches.items() if len(m) >= 30}
        if len(good) < len(keypoints) // 2:
            features = int(np.median([len(k) for k in keypoints]))
            raise ClipSetAside(f"hardly any matches between frames ({features} features in a typical one): no texture, or blur")
        apart = max(1, len(keypoints) // 2)
        far = {pair: m for pair, m in good.items() if pair[1] - pair[0] >= apart} or good
        shares = []
        for (i, j), m in far.items():
            moved = np.linalg.norm(keypoints[i][m[:, 0]] - keypoints[j][m[:, 1]], axis=1)
            shares.append(float((moved < self.still * long_side).mean()))
        share = float(np.median(shares))
        if share > self.max_still:
            raise ClipSetAside(f"the camera does not move: {share:.0%} of the matched features stay where they are")

    def _map(
        self, database: Path, images: Path, folder: Path, size: tuple[int, int], across: np.ndarray, known: np.ndarray | None
    ) -> pycolmap.Reconstruction:
        """Incremental mapping, from strict to relaxed demands on the first pair; the model with most frames wins."""
        centre = np.array(size) / 2 if known is None else known[:2, 2] * across
        focal = [max(size)] if known is None else [known[0, 0] * across[0], known[1, 1] * across[1]]
        store = pycolmap.Database.open(database)
        try:
            camera = store.read_all_cameras()[0]
            camera.params = [*focal, *centre]
            camera.has_prior_focal_length = known is not None
            store.update_camera(camera)
        finally:
            store.close()
        best = None
        for attempt, (first_angle, angle, inliers) in enumerate(((4.0, 1.0, 50), (1.5, 0.5, 30))):
            options = self._mapping_options(first_angle, angle, inliers, float(across.mean()), known is not None)
            output = folder / f"model-{attempt}"
            output.mkdir()
            models = pycolmap.incremental_mapping(database, images, output, options=options)
            for model in models.values():
                if best is None or model.num_reg_images() > best.num_reg_images():
                    best = model
            if best is not None and best.num_reg_images() >= self.min_registered * len(list(images.iterdir())):
                break
        if best is None:
            raise ClipSetAside("structure from motion found no pair of frames to start from: too little motion or overlap")
        return best

    @staticmethod
    def _mapping_options(
        first_angle: float, angle: float, inliers: int, scale: float, fixed: bool
    ) -> pycolmap.IncrementalPipelineOptions:
        options = pycolmap.IncrementalPipelineOptions()
        options.num_threads, options.random_seed, options.multiple_models, options.extract_colors = 2, 0, False, False
        options.ba_refine_focal_length, options.ba_refine_extra_params = not fixed, False
        # Fewer, cheaper global adjustments: clips are short, and the last one decides.
        options.ba_global_frames_ratio = options.ba_global_points_ratio = 1.4
        options.ba_local_max_refinements, options.ba_global_max_refinements = 1, 2
        mapper = options.mapper
        mapper.random_seed, mapper.num_threads = 0, 2
        mapper.init_min_tri_angle, mapper.filter_min_tri_angle = first_angle, angle
        mapper.init_min_num_inliers, mapper.filter_max_reproj_error = inliers, 1.5 * scale
        mapper.init_max_forward_motion = 1.0
        mapper.abs_pose_refine_focal_length, mapper.abs_pose_refine_extra_params = not fixed, False
        options.triangulation.min_angle, options.triangulation.random_seed = angle, 0
        for part in (options, mapper, options.triangulation):
            part.min_focal_length_ratio, part.max_focal_length_ratio = 0.3, 4.0  # fields of view from 14 to 118 degrees
        return options


def _read(model: pycolmap.Reconstruction, matches: Matches, keypoints: list[np.ndarray], across: np.ndarray) -> SparseModel:
    """pycolmap's model in plain arrays, at the frames' own size."""
    camera = next(iter(model.cameras.values()))
    scale = np.array([[1 / across[0]], [1 / across[1]], [1]])
    intrinsics = camera.calibration_matrix() * scale
    order = {point_id: index for index, point_id in enumerate(model.points3D)}
    points = np.array([point.xyz for point in model.points3D.values()]).reshape(-1, 3)
    poses, seen = {}, {}
    point_of = [np.full(len(k), -1) for k in keypoints]
    for image in model.images.values():
        if image.has_pose:
            frame = int(image.name[:6])
            poses[frame] = image.cam_from_world().matrix()
            for index, feature in enumerate(image.points2D):
                if feature.has_point3D():
                    point_of[frame][index] = order[feature.point3D_id]
            seen[frame] = point_of[frame][point_of[frame] >= 0]
    pixels: dict[int, list[np.ndarray]] = {t: [] for t in poses}
    world: dict[int, list[np.ndarray]] = {t: [] for t in poses}
    for (i, j), pairs in matches.items():
        for here, there, a, b in ((i, j, 0, 1), (j, i, 1, 0)):
            if here in poses:
                found = point_of[there][pairs[:, b]]
                pixels[here].append(keypoints[here][pairs[found >= 0, a]] / across)
                world[here].append(points[found[found >= 0]])
    observed = {t: (np.concatenate(pixels[t]), np.concatenate(world[t])) for t in poses if pixels[t]}
    return SparseModel(poses, intrinsics, points, seen, observed, _median_angle(points, poses, seen))


def _median_angle(points: np.ndarray, poses: dict[int, np.ndarray], seen: dict[int, np.ndarray]) -> float:
    """Median over the points of the angle between the two most different directions they are seen from, in degrees."""
    low, high = np.full((len(points), 3), np.inf), np.full((len(points), 3), -np.inf)
    for t, indices in seen.items():
        ray = points[indices] + poses[t][:, :3].T @ poses[t][:, 3]
        ray /= np.linalg.norm(ray, axis=1, keepdims=True)
        low[indices], high[indices] = np.minimum(low[indices], ray), np.maximum(high[indices], ray)
    spread = np.linalg.norm(high - low, axis=1)  # the chord between directions, for the small angles at stake
    return float(np.degrees(np.median(2 * np.arcsin(np.clip(spread / 2, 0, 1))))) if len(points) else 0.0


def _fit(model: SparseModel, count: int, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    """Per frame: share of its 2-D/3-D matches within `tolerance` pixels of its pose, and the median error of those."""
    ratio, error = np.zeros(count, np.float32), np.zeros(count, np.float32)
    for t, (pixels, world) in model.observed.items():
        camera = world @ model.poses[t][:, :3].T + model.poses[t][:, 3]
        projected = camera @ model.intrinsics.T
        off = np.linalg.norm(projected[:, :2] / np.maximum(projected[:, 2:], 1e-9) - pixels, axis=1)
        inliers = (off < tolerance) & (camera[:, 2] > 0)
        ratio[t] = inliers.mean() if len(off) else 0
        error[t] = np.median(off[inliers]) if inliers.any() else tolerance
    return ratio, error


def _first_camera_world(w2c: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same scene with the first camera as world: w2c[0] is exactly the identity."""
    rotation, translation = w2c[0, :, :3], w2c[0, :, 3]
    turned = w2c[:, :, :3] @ rotation.T
    moved = np.concatenate([turned, (w2c[:, :, 3] - turned @ translation)[..., None]], -1)
    moved[0] = np.eye(3, 4)
    return moved, points @ rotation.T + translation
