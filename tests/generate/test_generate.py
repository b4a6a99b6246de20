"""Generation: the same seed gives the same bits, heads run where asked, and bad input is named before anything is loaded."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fw_model.config import Preset, load_preset
from fw_model.export.save import is_saved
from fw_model.export.world import World
from fw_model.generate import FantasyWorldPipeline
from fw_model.generate.__main__ import main
from fw_model.generate.pipeline import Progress
from fw_model.generate.preview import UNSEEN, warp
from fw_model.generate.request import BadRequest, parse_request
from fw_model.model.encoders import Encoders
from fw_model.model.fantasy_world import FantasyWorld
from fw_model.train.checkpoints import CheckpointError, checkpoint_parameters, save_checkpoint
from fw_model.train.identity import CheckpointMetadata
from fw_model.train.sampling import SCHEDULERS, sample, shifted_sigmas
from fw_model.trajectory.text import make_trajectory
from tests.helpers.made_worlds import made_world

FEW: dict[str, Any] = {"num_inference_steps": 3, "progress": False}


@pytest.fixture(scope="module")
def preset() -> Preset:
    return load_preset("tiny", ["clip.frames=9"])


@pytest.fixture(scope="module")
def pipe(preset: Preset) -> FantasyWorldPipeline:
    return FantasyWorldPipeline.seeded(preset)


def same(a: World, b: World) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("video", "depth", "points", "depth_conf")) and (
        torch.equal(a.cameras.w2c, b.cameras.w2c)
    )


# ---------------------------------------------------------------------------------------------------------- sampling


def test_the_schedule_is_the_bases_and_ends_without_noise() -> None:
    sigmas = shifted_sigmas(50, 5.0)
    assert (float(sigmas[0]), float(sigmas[-1])) == (1.0, 0.0)
    assert float(sigmas[-2]) == pytest.approx(0.0926, abs=1e-4)
    assert (sigmas.diff() < 0).all()


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_sampler_finds_the_latents_that_a_perfect_model_points_to(scheduler: Any) -> None:
    """With data at one place the flow is straight: any number of steps ends there."""
    place, noise = torch.full((1, 2, 3), 0.7), torch.randn(1, 2, 3, generator=torch.Generator().manual_seed(0))

    def velocity(step: int, latents: Tensor, sigma: float) -> Tensor:
        return (latents - place) / sigma

    assert torch.allclose(sample(velocity, noise, 6, 5.0, scheduler), place, atol=2e-3)


def test_unipc_needs_fewer_steps_than_euler() -> None:
    """Data spread like a Gaussian bends the flow; its exact end is known."""
    spread, noise = 0.3, torch.linspace(-2, 2, 9).view(1, 9, 1)

    def velocity(step: int, latents: Tensor, sigma: float) -> Tensor:
        variance = ((1 - sigma) * spread) ** 2 + sigma**2
        return latents * (sigma - (1 - sigma) * spread**2) / variance

    errors = {name: float((sample(velocity, noise, 12, 3.0, name) - spread * noise).abs().max()) for name in SCHEDULERS}
    assert errors["unipc"] < errors["euler"]
    assert errors["euler"] < 0.2


# ---------------------------------------------------------------------------------------------------------- the model


def test_velocity_alone_is_the_forward_passs_bit_for_bit(preset: Preset) -> None:
    world = FantasyWorld.from_preset(preset).set_stage("stage2").eval()
    draw = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, 3, 8, 14, generator=draw)
    wan = preset.model.wan
    given = (torch.zeros_like(latents), torch.tensor([500.0]), torch.zeros(1, wan.text_len, wan.text_dim))
    rest = (torch.zeros(1, wan.image_tokens, wan.image_dim), None)
    with torch.no_grad():
        assert torch.equal(world.velocity(latents, *given, *rest), world(latents, *given, *rest).velocity)
    with pytest.raises(ValueError, match="no velocity"):
        world.set_stage("stage1").velocity(latents, *given, *rest)


# ------------------------------------------------------------------------------------------------------- the pipeline


def test_one_seed_gives_the_same_bits_whatever_else_is_asked(pipe: FantasyWorldPipeline) -> None:
    one = pipe("a room", trajectory="pan_left", seed=4, **FEW)
    assert isinstance(one, World)
    several = pipe(["a hall", "a room"], trajectory="pan_left", seed=4, **FEW)
    assert isinstance(several, list)
    assert same(one, several[1])
    other = pipe("a room", trajectory="pan_left", seed=5, **FEW)
    assert isinstance(other, World)
    assert not torch.equal(one.video, other.video)


def test_a_world_has_the_sizes_asked_for_and_its_first_camera_is_the_world(pipe: FantasyWorldPipeline) -> None:
    world = pipe("a room", trajectory="truck_right", num_frames=5, height=48, width=80, **FEW)
    assert isinstance(world, World)
    assert world.video.shape == (5, 48, 80, 3)
    assert world.video.dtype == torch.uint8
    assert world.points.shape == (5, 48, 80, 3)
    assert torch.equal(world.cameras.w2c[0], torch.eye(3, 4))
    assert world.requested is not None
    assert torch.allclose(world.requested.w2c, make_trajectory("truck_right", 5, 48, 80).w2c)
    for name in ("depth", "points", "depth_conf", "points_conf"):
        assert getattr(world, name).isfinite().all()


def test_picture_path_prompt_and_guidance_all_matter(pipe: FantasyWorldPipeline) -> None:
    picture = np.random.default_rng(0).integers(0, 255, (64, 112, 3)).astype(np.uint8)
    asked: dict[str, dict[str, Any]] = {
        "plain": {},
        "picture": {"image": picture},
        "path": {"trajectory": "orbit_right"},
        "guidance": {"guidance_scale": 9.0},
        "negative": {"negative_prompt": "blurred"},
        "shift": {"shift": 3.0},
    }
    worlds = {name: pipe("a room", **{**FEW, **more}) for name, more in asked.items()}
    depths = {name: world.depth.sum().item() for name, world in worlds.items() if isinstance(world, World)}
    assert len(set(depths.values())) == len(asked)


def test_guidance_drops_the_text_alone_and_costs_nothing_at_one(
    pipe: FantasyWorldPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Tensor, Tensor | None]] = []
    plain = FantasyWorld.velocity

    def watched(self: FantasyWorld, latents: Tensor, image: Tensor, time: Tensor, text: Tensor, *rest: Any) -> Tensor:
        seen.append((text, rest[1]))
        return plain(self, latents, image, time, text, *rest)

    monkeypatch.setattr(FantasyWorld, "velocity", watched)
    pipe("a room", trajectory="pan_left", guidance_scale=1.0, **FEW)
    assert len(seen) == 2  # of three steps one reads geometry, by a whole pass
    seen.clear()
    pipe("a room", trajectory="pan_left", guidance_scale=3.0, **FEW)
    assert len(seen) == 2 + 3
    assert all(camera is not None for _, camera in seen)
    assert len({float(text.sum()) for text, _ in seen}) == 2


def test_geometry_is_read_at_the_steps_asked_for(pipe: FantasyWorldPipeline) -> None:
    told: list[Progress] = []
    pipe("a room", geometry_at=(0, 2), callback=told.append, **FEW)
    assert [one.geometry is not None for one in told] == [True, False, True]
    assert [round(one.sigma, 4) for one in told] == [round(float(s), 4) for s in shifted_sigmas(3, 5.0)[:-1]]


def test_scene_scale_multiplies_the_path_by_what_the_model_says_of_the_scene(pipe: FantasyWorldPipeline) -> None:
    world = pipe("a room", trajectory="truck_right", camera_scale="scene", **FEW)
    plain = pipe("a room", trajectory="truck_right", camera_scale=2.0, **FEW)
    assert isinstance(world, World)
    assert isinstance(plain, World)
    assert world.requested is not None
    assert plain.requested is not None
    used = world.meta["camera_scale_used"]
    assert used > 0
    assert world.requested.w2c[-1, 0, 3] * 2 == pytest.approx(plain.requested.w2c[-1, 0, 3].item() * used, rel=1e-5)


def test_encoders_are_held_one_at_a_time(preset: Preset, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[tuple[str, ...]] = []
    pipe = FantasyWorldPipeline(FantasyWorld.from_preset(preset).set_stage("stage2"), preset, offload="model")
    made = Encoders.from_config.__func__  # type: ignore[attr-defined]

    def watched(cls: type[Encoders], *args: Any) -> Encoders:
        alive.append(tuple(pipe._kept))
        return made(cls, *args)

    monkeypatch.setattr(Encoders, "from_config", classmethod(watched))
    picture = np.zeros((64, 112, 3), np.uint8)
    pipe("a room", image=picture, **FEW)
    assert alive == [(), (), (), ()]  # text, picture's latent, CLIP, decoding
    assert pipe._kept == {}


def test_no_tile_is_larger_than_asked_and_one_that_holds_all_changes_nothing(preset: Preset) -> None:
    encoders = Encoders.from_config(preset.encoders, preset.model.wan.text_len, "cpu", ["vae"])
    latents = np.random.default_rng(0).normal(size=(16, 2, 16, 24)).astype(np.float32)
    whole = encoders.decode_video(latents)
    assert np.array_equal(encoders.decode_video(latents, tile=192), whole)
    sizes: list[tuple[int, ...]] = []
    encoders.vae.decoder.register_forward_pre_hook(lambda _, inputs: sizes.append(tuple(inputs[0].shape[2:])))
    assert encoders.decode_video(latents, tile=64).shape == whole.shape == (5, 128, 192, 3)
    assert max(max(height, width) for _, height, width in sizes) == 8
    assert {frames for frames, _, _ in sizes} == {1}  # one latent frame after the other


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"prompt": "  "}, "prompt: it is empty"),
        ({"prompt": "a", "trajectory": "obrit_left"}, "did you mean orbit_left"),
        ({"prompt": "a", "trajectory": "pan_left", "pose_file": "a.txt"}, "both name a camera path"),
        ({"prompt": "a", "stepps": 3}, "did you mean steps"),
        ({"prompt": "a", "steps": 0}, "steps"),
        ({"prompt": "a", "camera_scale": -1.0}, "camera_scale"),
        ({"prompt": "a", "camera_scale": math.inf}, "camera_scale"),
        ({"prompt": "a", "geometry_at": [50]}, "geometry_at"),
        ({"prompt": "a", "scheduler": "ddim"}, "scheduler"),
    ],
)
def test_what_is_wrong_with_a_request_is_named(raw: dict[str, Any], said: str) -> None:
    with pytest.raises(BadRequest, match=said):
        parse_request(raw)


def test_sizes_paths_and_pictures_are_checked_before_anything_is_loaded(
    pipe: FantasyWorldPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("something was loaded")

    monkeypatch.setattr(Encoders, "from_config", never)
    path = make_trajectory("pan_left", 9, 64, 112)
    no_lens = make_trajectory("pan_left", 9, 64, 112)
    no_lens.intrinsics[3, 0, 0] = 0
    mirrored = make_trajectory("pan_left", 9, 64, 112)
    mirrored.w2c[:, 0] *= -1
    (tmp_path / "text.png").write_text("no picture")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"num_frames": 16}, "nearest: 13 or 17"),
        ({"height": 70}, "nearest: 64 or 80"),
        ({"width": 5008}, "at most 4096"),
        ({"cameras": path, "num_frames": 13}, "9 poses for 13 frames"),
        ({"cameras": no_lens}, "frame 3 has focal lengths"),
        ({"cameras": mirrored}, "no rotation"),
        ({"cameras": path, "trajectory": "pan_left"}, "a path of its own"),
        ({"image": np.zeros((4, 4), np.uint8)}, r"expected \[H, W, 3\]"),
        ({"image": tmp_path / "text.png"}, "cannot be read as a picture"),
        ({"image": tmp_path / "gone.png"}, "is not there"),
        ({"pose_file_path": tmp_path / "gone.txt"}, "is not there"),
        ({"pose_file_path": tmp_path / "text.png"}, "numbers; a row has|could not convert|is no number"),
    ]
    for more, said in cases:
        with pytest.raises(BadRequest, match=said):
            pipe("a room", **FEW, **more)


# -------------------------------------------------------------------------------------------------------- checkpoints


def write_checkpoint(path: Path, preset: Preset, stage: Any = "stage2", **changes: Any) -> Path:
    model = FantasyWorld.from_preset(preset, "stage2")
    metadata = CheckpointMetadata(stage, 10, preset, preset.base.identity, "d", "c")
    metadata = CheckpointMetadata(**{**vars(metadata), **changes})
    assert asdict(metadata)["step"] == 10
    save_checkpoint(path, checkpoint_parameters(model, stage), metadata)
    return path


def test_a_checkpoint_alone_is_enough(preset: Preset, pipe: FantasyWorldPipeline, tmp_path: Path) -> None:
    loaded = FantasyWorldPipeline.from_pretrained(write_checkpoint(tmp_path / "step-10.safetensors", preset), device="cpu")
    expected, found = (p("a room", trajectory="pan_left", **FEW) for p in (pipe, loaded))
    assert isinstance(expected, World)
    assert isinstance(found, World)
    assert same(expected, found)
    assert found.meta["checkpoint"] == "step-10.safetensors"


def test_other_checkpoints_are_refused_with_why(preset: Preset, tmp_path: Path) -> None:
    first = write_checkpoint(tmp_path / "step-1.safetensors", preset, "stage1")
    with pytest.raises(CheckpointError, match="has no video of its own"):
        FantasyWorldPipeline.from_pretrained(first)
    with pytest.raises(CheckpointError, match="drawn from its seed; give no other base"):
        FantasyWorldPipeline.from_pretrained(write_checkpoint(tmp_path / "step-2.safetensors", preset), base="elsewhere")
    with pytest.raises(CheckpointError, match="no moving average"):
        FantasyWorldPipeline.from_pretrained(tmp_path / "step-2.safetensors", weights="ema")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="train first"):
        FantasyWorldPipeline.from_pretrained(tmp_path / "empty")


# -------------------------------------------------------------------------------------------------------- the command


def run(*arguments: object) -> int:
    return main(["--preset", "tiny", "--set", "clip.frames=5", "--device", "cpu", "--steps", "2", *map(str, arguments)])


def test_the_command_makes_a_world_twice_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(np.full((50, 90, 3), 90, np.uint8)).save(tmp_path / "first.png")
    for name in "ab":
        asked = ("--prompt", "a room", "--trajectory", "orbit_360deg", "--image", tmp_path / "first.png")
        assert run(*asked, "--out", tmp_path / name) == 0
    assert "untrained" in capsys.readouterr().err
    files = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file()]
    assert len(files) > 15
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)


def test_a_list_goes_on_where_it_was_and_one_bad_line_costs_that_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ['{"name": "one", "prompt": "a room"}', "{broken", '{"prompt": ""}', '{"name": "../up", "prompt": "a"}', ""]
    lines += ['{"name": "two", "prompt": "a hall", "image": "gone.png"}', '{"name": "one", "prompt": "again"}']
    (tmp_path / "list.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert run("--requests", tmp_path / "list.jsonl", "--out", tmp_path / "out") == 1
    said = capsys.readouterr().err
    for words in ("list.jsonl:2: not JSON", "list.jsonl:3: prompt: it is empty", "list.jsonl:4: name '../up'", "named 'one'"):
        assert words in said
    assert "two: image:" in said
    assert is_saved(tmp_path / "out" / "one")
    before = (tmp_path / "out" / "one" / "meta.json").stat().st_mtime_ns
    (tmp_path / "list.jsonl").write_text(lines[0], encoding="utf-8")
    assert run("--requests", tmp_path / "list.jsonl", "--out", tmp_path / "out") == 0
    assert "there already" in capsys.readouterr().out
    assert (tmp_path / "out" / "one" / "meta.json").stat().st_mtime_ns == before
    assert run("--requests", tmp_path / "list.jsonl", "--out", tmp_path / "out", "--seed", 3) == 0  # another world
    assert json.loads((tmp_path / "out" / "one" / "meta.json").read_text())["seed"] == 3


def test_without_a_model_nothing_is_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--prompt", "a", "--out", str(tmp_path / "w")]) == 1
    assert "no model" in capsys.readouterr().err
    with pytest.raises(SystemExit) as wrong:
        main(["--out", str(tmp_path / "w")])
    assert wrong.value.code == 2


# --------------------------------------------------------------------------------------------------------- the preview


def test_a_preview_is_what_the_next_frames_show(tmp_path: Path) -> None:
    """Of a made wall, whose other frames are known: seen parts agree, the first frame is the picture."""
    world = made_world("truck_right:0.2", frames=5)
    frames = list(warp(world.video[0].numpy(), world.depth[0], world.cameras))
    known = (world.depth[0] > 0).numpy()
    assert np.array_equal(frames[0][known], world.video[0].numpy()[known])
    last, truth = frames[-1].astype(int), world.video[-1].numpy()
    seen = (frames[-1] != UNSEEN).any(-1)
    assert 0.7 < seen.mean() < 1
    assert np.median(np.abs(last - truth)[seen]) < 4


def test_the_preview_command_needs_no_model_where_depth_is_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 112, 3)).astype(np.uint8)).save(tmp_path / "first.png")
    np.save(tmp_path / "depth.npy", np.full((32, 56), 7.0))
    asked = ["--image", str(tmp_path / "first.png"), "--trajectory", "orbit_right", "--preset", "tiny", "--out"]
    asked += [str(tmp_path / "path.mp4"), "--depth"]
    assert main(["preview", *asked, str(tmp_path / "depth.npy")]) == 0
    with av.open(str(tmp_path / "path.mp4")) as container:
        assert len(list(container.decode(video=0))) == 17
    for name, data in (("zero.npy", np.zeros((4, 4))), ("flat.npy", np.zeros(4))):
        np.save(tmp_path / name, data)
        assert main(["preview", *asked, str(tmp_path / name)]) == 1
    assert main(["preview", *asked, str(tmp_path / "gone.npy")]) == 1
    said = capsys.readouterr().err
    for words in ("not a single pixel", "expected numbers", "is not there"):
        assert words in said


def test_the_model_reads_a_pictures_depth_for_a_preview(preset: Preset, tmp_path: Path) -> None:
    Image.fromarray(np.full((64, 112, 3), 90, np.uint8)).save(tmp_path / "first.png")
    checkpoint = write_checkpoint(tmp_path / "step-10.safetensors", preset)
    asked = ["--image", str(tmp_path / "first.png"), "--trajectory", "pan_left", "--preset", "tiny", "--num-frames", "5"]
    assert main(["preview", *asked, "--checkpoint", str(checkpoint), "--device", "cpu", "--out", str(tmp_path / "a.mp4")]) == 0
