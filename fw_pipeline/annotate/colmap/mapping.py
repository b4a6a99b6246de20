"""Structure from motion over a clip's frames, by COLMAP, in a process of its own.

COLMAP's native code ends its process where Python would raise: a full disk, no memory. `solve` runs this file as a program, so
that such an end is one clip's failure. Nothing here needs torch: the child starts in a fifth of a second.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pycolmap
from PIL import Image

from fw_model.errors import Explained, explain_errors
from fw_pipeline.annotate.types import ClipSetAside

Matches = dict[tuple[int, int], np.ndarray]  # frames (i, j), i < j -> [M, 2] keypoint indices that fit one two-view geometry


class ColmapDied(Explained, RuntimeError):
    """The process that COLMAP ran in ended without a result: a fault of this clip's run, not of its pictures."""


@dataclass(frozen=True)
class SparseModel:
    """What structure from motion found. Frames that did not register have no entry in `poses`."""

    poses: dict[int, np.ndarray]  # frame -> w2c [3, 4]
    intrinsics: np.ndarray  # [3, 3] pixels of the frames
    points: np.ndarray  # [P, 3] world
    seen: dict[int, np.ndarray]  # frame -> indices into points
    observed: dict[int, tuple[np.ndarray, np.ndarray]]  # frame -> 2-D/3-D matches: pixels [M, 2], world points [M, 3]
    triangulation_angle: float  # degrees, median over the points of the widest angle each is seen under

    def save(self, path: Path) -> None:
        """As one npz; what differs in length from frame to frame lies end to end."""
        frames, seers, observers = list(self.poses), list(self.seen), list(self.observed)
        np.savez(
            path,
            frames=np.array(frames, int),
            poses=np.array([self.poses[t] for t in frames]).reshape(-1, 3, 4),
            intrinsics=self.intrinsics,
            points=self.points,
            angle=self.triangulation_angle,
            seers=np.array([(t, len(self.seen[t])) for t in seers], int).reshape(-1, 2),
            seen=_end_to_end([self.seen[t] for t in seers], np.empty(0, int)),
            observers=np.array([(t, len(self.observed[t][0])) for t in observers], int).reshape(-1, 2),
            pixels=_end_to_end([self.observed[t][0] for t in observers], np.empty((0, 2))),
            world=_end_to_end([self.observed[t][1] for t in observers], np.empty((0, 3))),
        )

    @classmethod
    def load(cls, path: Path) -> SparseModel:
        with np.load(path, allow_pickle=False) as file:
            a = {name: file[name] for name in file.files}
        poses = dict(zip(a["frames"].tolist(), a["poses"], strict=True))
        pixels, world = _apart(a["observers"], a["pixels"]), _apart(a["observers"], a["world"])
        observed = {t: (pixels[t], world[t]) for t in pixels}
        return cls(poses, a["intrinsics"], a["points"], _apart(a["seers"], a["seen"]), observed, float(a["angle"]))


def _end_to_end(arrays: list[np.ndarray], empty: np.ndarray) -> np.ndarray:
    return np.concatenate([empty, *arrays])


def _apart(lengths: np.ndarray, joined: np.ndarray) -> dict[int, np.ndarray]:
    """Rows (frame, length) and what lies end to end -> frame -> its part."""
    parts = np.split(joined, np.cumsum(lengths[:, 1])[:-1]) if len(lengths) else []
    return dict(zip(lengths[:, 0].tolist(), parts, strict=True))


def solve(frames: np.ndarray, intrinsics: np.ndarray | None, mapper: Mapper) -> SparseModel:
    """Structure from motion in a child process.

    Args:
        frames: [T, H, W, 3] uint8 RGB.
        intrinsics: [3, 3] pixels of the frames, held; None finds a focal length.
        mapper: how.

    Raises ClipSetAside with what the pictures lack; ColmapDied when the child ended without a word of that.
    """
    with tempfile.TemporaryDirectory(prefix="fw-colmap-") as name:
        folder = Path(name)
        np.save(folder / "frames.npy", frames)
        known = None if intrinsics is None else intrinsics.tolist()
        (folder / "how.json").write_text(json.dumps({"mapper": asdict(mapper), "intrinsics": known}))
        child = subprocess.run([sys.executable, "-m", __name__, name], capture_output=True, text=True, errors="replace")
        refused, found = folder / "refused.txt", folder / "model.npz"
        if child.returncode == 0 and refused.exists():
            raise ClipSetAside(refused.read_text())
        if child.returncode or not found.exists():
            free = shutil.disk_usage(folder).free / 1e6
            remedy = f"{folder.parent}, where its files were, had {free:.0f} MB free; TMPDIR=... chooses another place"
            raise ColmapDied(f"COLMAP's process {_ending(child)}", remedy)
        return SparseModel.load(found)


def _ending(child: subprocess.CompletedProcess[str]) -> str:
    """How a process ended and, where Python ended it, by which error."""
    code = child.returncode
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    raised = child.stderr.strip().rpartition("\n")[2]
    return f"{how}: {raised}" if code > 0 and raised else how  # a native end leaves a stack of addresses, which say nothing


@dataclass(frozen=True)
class Mapper:
    """COLMAP's settings, and what a clip needs to be worth mapping."""

    max_features: int = 1200
    enlarge_to: int = 640  # frames with a shorter long side are enlarged for SIFT, which finds little in small pictures
    exhaustive_up_to: int = 24  # frames; longer clips are matched in a window with links of doubling length (linear cost)
    min_registered: float = 0.8  # share of frames
    # A feature that moves less than `still` of the long side between frames half a clip apart stays where it is. Measured on
    # real clips: 0 % of the matches stay with a moving camera, 34 % to 90 % with a fixed one in front of a moving animal.
    still: float = 0.002
    max_still: float = 0.25

    def map(self, frames: np.ndarray, intrinsics: np.ndarray | None, folder: Path) -> SparseModel:
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


@explain_errors
def main(argv: list[str] | None = None) -> int:
    """The child, in a folder of `solve`'s: frames.npy and how.json -> model.npz, or refused.txt."""
    parser = argparse.ArgumentParser(description="Structure from motion in a folder that `solve` laid out.")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(argv).folder
    how = json.loads((folder / "how.json").read_text())
    intrinsics = None if how["intrinsics"] is None else np.array(how["intrinsics"])
    frames = np.load(folder / "frames.npy", mmap_mode="r", allow_pickle=False)
    try:
        Mapper(**how["mapper"]).map(frames, intrinsics, folder).save(folder / "model.npz")
    except ClipSetAside as reason:
        (folder / "refused.txt").write_text(str(reason))
    return 0


if __name__ == "__main__":
    sys.exit(main())
