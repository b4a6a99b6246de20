"""The base's checkpoint: which keys it has, what a file that is not it is, and how files are found and read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from torch import Tensor

from fw_model.config import WanConfig
from fw_model.errors import Explained

PATCH = (1, 2, 2)  # latent frames x latent rows x latent columns of one token
SPATIAL_STRIDE = 8  # pixels per latent pixel
_LISTED = 8  # offending keys named in an error

Shape = tuple[int, ...]


class BaseModelError(Explained, RuntimeError):
    """Base weights that are missing, unreadable or of another model; the message says which and what to do."""


def original_shapes(config: WanConfig) -> dict[str, Shape]:
    """Key -> shape of every tensor of the published checkpoint, for this configuration (989 keys at full size)."""
    dim, ffn = config.dim, config.ffn_dim
    shapes: dict[str, Shape] = {"patch_embedding.weight": (dim, config.in_dim, *PATCH), "patch_embedding.bias": (dim,)}

    def linear(key: str, out: int, fan_in: int) -> None:
        shapes[f"{key}.weight"], shapes[f"{key}.bias"] = (out, fan_in), (out,)

    def norm(key: str, width: int) -> None:
        shapes[f"{key}.weight"], shapes[f"{key}.bias"] = (width,), (width,)

    def convolution(key: str, out: int, fan_in: int, size: int) -> None:
        shapes[f"{key}.weight"], shapes[f"{key}.bias"] = (out, fan_in, size, size), (out,)

    linear("text_embedding.0", dim, config.text_dim)
    linear("text_embedding.2", dim, dim)
    linear("time_embedding.0", dim, config.freq_dim)
    linear("time_embedding.2", dim, dim)
    linear("time_projection.1", 6 * dim, dim)
    for i in range(config.num_layers):
        block = f"blocks.{i}"
        shapes[f"{block}.modulation"] = (1, 6, dim)
        for attention, names in (("self_attn", "qkvo"), ("cross_attn", ("q", "k", "v", "o", "k_img", "v_img"))):
            for name in names:
                linear(f"{block}.{attention}.{name}", dim, dim)
            shapes[f"{block}.{attention}.norm_q.weight"] = shapes[f"{block}.{attention}.norm_k.weight"] = (dim,)
        shapes[f"{block}.cross_attn.norm_k_img.weight"] = (dim,)
        norm(f"{block}.norm3", dim)
        linear(f"{block}.ffn.0", ffn, dim)
        linear(f"{block}.ffn.2", dim, ffn)
    shapes["head.modulation"] = (1, 2, dim)
    linear("head.head", config.out_dim * PATCH[0] * PATCH[1] * PATCH[2], dim)
    norm("img_emb.proj.0", config.image_dim)
    linear("img_emb.proj.1", config.image_dim, config.image_dim)
    linear("img_emb.proj.3", dim, config.image_dim)
    norm("img_emb.proj.4", dim)
    convolution("control_adapter.conv", dim, config.control_channels * SPATIAL_STRIDE**2, 2)
    convolution("control_adapter.residual_blocks.0.conv1", dim, dim, 3)
    convolution("control_adapter.residual_blocks.0.conv2", dim, dim, 3)
    return shapes


def module_key(original_key: str) -> str:
    """Published key -> key of WanBackbone's state dict, by diffusers' own converter (its keys pass unchanged)."""
    if original_key.startswith("control_adapter."):
        return original_key
    if _is_diffusers_key(original_key):
        return f"transformer.{original_key}"
    (converted,) = convert_wan_transformer_to_diffusers({original_key: None})  # renames keys; a value is not looked at
    return f"transformer.{converted}"


def _is_diffusers_key(key: str) -> bool:
    """Whether a key is diffusers' name for a tensor the published file names otherwise.

    The text norm of a block is `norm3` in the published file and `norm2` in diffusers; neither has the other.
    """
    marks = ("condition_embedder.", "proj_out.", ".attn1.", ".attn2.", ".ffn.net.", "scale_shift_table", ".norm2.")
    return any(mark in key for mark in marks)


def check_is_base(found: Mapping[str, Shape], config: WanConfig, where: str) -> None:
    """Refuse anything but the base, saying what it is.

    Args:
        found: key -> shape as found, published or diffusers names.
        config: the expected shape of the base.
        where: file or repository, for the message.

    Raises:
        BaseModelError: a key is missing, unknown, or has another shape.
    """
    expected = {module_key(key): (key, shape) for key, shape in original_shapes(config).items()}
    seen = {module_key(key): (key, tuple(shape)) for key, shape in found.items()}
    missing = [key for own, (key, _) in expected.items() if own not in seen]
    unknown = [key for own, (key, _) in seen.items() if own not in expected]
    wrong = [
        f"{key} {_times(seen[own][1])} instead of {_times(shape)}"
        for own, (key, shape) in expected.items()
        if own in seen and seen[own][1] != shape
    ]
    if not (missing or unknown or wrong):
        return
    lines = [
        f"{where} is not the base this model is built on (Wan2.1-Fun-V1.1-1.3B-Control-Camera's architecture: "
        f"{config.num_layers} blocks of dim {config.dim}, in_dim {config.in_dim}, camera control adapter).",
        f"It looks like: {describe_checkpoint(dict(seen.values()), config)}.",
    ]
    for title, keys in (("missing", missing), ("not part of the base", unknown), ("wrong shape", wrong)):
        if keys:
            lines.append(f"{title} ({len(keys)}): {', '.join(keys[:_LISTED])}{', ...' if len(keys) > _LISTED else ''}")
    raise BaseModelError("\n".join(lines))


def describe_checkpoint(found: Mapping[str, Shape], config: WanConfig) -> str:
    """Say in words which model a Wan-like checkpoint is, from its keys and shapes."""
    patch = found.get("patch_embedding.weight")
    if patch is None or len(patch) != 5:
        return "no Wan video transformer at all (it has no 5-dimensional patch_embedding.weight)"
    kinds = {
        16: "a text-to-video model (T2V)",
        32: "a model with image latents and no mask, as the camera-controlled base",
        36: "an image-to-video or inpainting model (I2V/InP)",
        48: "a Fun-Control model driven by a control video",
    }
    numbers = [int(key.split(".")[1]) for key in found if key.startswith("blocks.") and key.split(".")[1].isdigit()]
    kind = kinds.get(patch[1], "an unknown kind of Wan model")
    notes = [f"{kind}, in_dim {patch[1]}, dim {patch[0]}, {max(numbers, default=-1) + 1} blocks"]
    if not any(key.startswith("control_adapter.") for key in found):
        notes.append("without the camera control adapter (control_adapter.*)")
    if not any("k_img" in key or "add_k_proj" in key for key in found):
        notes.append("without image cross-attention")
    if patch[0] != config.dim:
        notes.append(f"of another width than the {config.dim} expected")
    return ", ".join(notes)


def find_weight_files(source: str, revision: str = "main") -> list[Path]:
    """The files that hold a base's weights.

    Args:
        source: a .safetensors/.pth/.pt/.bin file, a folder (single file, or shards beside an index), or a hub repository.
        revision: branch, tag or commit of the repository.

    Raises:
        BaseModelError: nothing there, or the repository cannot be reached; says what to download and its size.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if not path.is_dir():
        if path.is_absolute() or source.startswith((".", "~")):
            raise BaseModelError(f"{path}: no such file or folder; it should hold the base's weights (see base.repo)")
        path = _download(source, revision)
    for folder in (path, path / "transformer"):
        files = _files_in(folder)
        if files:
            return files
    raise BaseModelError(
        f"{path}: no weights of the video transformer here; expected diffusion_pytorch_model.safetensors, "
        "shards with diffusion_pytorch_model.safetensors.index.json, or a single .pth file"
    )


def _files_in(folder: Path) -> list[Path]:
    indexes = sorted(folder.glob("*.index.json"))
    if indexes:
        try:
            names = sorted(set(json.loads(indexes[0].read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise BaseModelError(f"{indexes[0]}: not an index of weight shards ({error!r}); download it again") from error
        for name in names:
            if Path(name).name != name:
                raise BaseModelError(f"{indexes[0]}: weight file {name!r} points outside its folder")
            if not (folder / name).is_file():
                raise BaseModelError(f"{indexes[0]}: names the shard {name!r}, which is not there; download it again")
        return [folder / name for name in names]
    for pattern in ("diffusion_pytorch_model*.safetensors", "*.safetensors", "*.pth", "*.pt", "*.bin"):
        files = sorted(folder.glob(pattern))
        if len(files) == 1:
            return files
        if files:
            raise BaseModelError(
                f"{folder}: {len(files)} files match {pattern} and no index says which belong together; name one file"
            )
    return []


def _download(repo: str, revision: str) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["diffusion_pytorch_model*.safetensors", "diffusion_pytorch_model*.safetensors.index.json"]
    patterns += [f"transformer/{pattern}" for pattern in patterns]
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise BaseModelError(
            f"base model {repo!r} (revision {revision!r}) is neither a local file or folder nor available from the hub: {error}\n"
            f"It is needed once: 1.6 billion parameters, about 3.2 GB in bf16. Fetch it on a machine with network access:\n"
            f"  hf download {repo} --revision {revision} --include 'diffusion_pytorch_model*'\n"
            f"or set base.repo to a local file or folder that holds it. To run without any download use the preset 'tiny'."
        ) from error


def read_shapes(files: list[Path]) -> dict[str, Shape]:
    """Key -> shape over all files, without reading the tensors of safetensors files."""
    return {key: tuple(tensor.shape) for file in files for key, tensor in _tensors(file, shapes_only=True)}


def read_tensors(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    """(key, tensor) one at a time, so that a checkpoint is never in memory twice. No pickled code is ever run."""
    for file in files:
        yield from _tensors(file, shapes_only=False)


def _tensors(file: Path, shapes_only: bool) -> Iterator[tuple[str, Tensor]]:
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 (not a dict)
                    if shapes_only:
                        yield key, torch.empty(opened.get_slice(key).get_shape(), device="meta")
                    else:
                        yield key, opened.get_tensor(key)
        except SafetensorError as error:
            raise BaseModelError(f"{file}: not a readable safetensors file ({error}); download it again") from error
        return
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises several unrelated types for a damaged or unsafe file
        raise BaseModelError(f"{file}: not a readable weights file ({error})") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise BaseModelError(f"{file}: expected a plain dictionary of tensors")
    yield from state.items()


def _times(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "scalar"
