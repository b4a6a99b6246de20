"""The frozen encoders that turn a clip into what the DiT reads: Wan's VAE, UMT5 and CLIP.

They run once per clip in the pipeline; training reads their cached output and never loads them.
`Encoders.from_config` loads the published models through diffusers and transformers, or, for `source: seeded`, builds the
same classes small and fills them from a seed, so that a laptop runs the same code with nothing to download.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Concatenate, Literal, ParamSpec

import numpy as np
import torch

from fw_model.config import EncodersConfig
from fw_model.errors import EncoderError

P = ParamSpec("P")
LATENT_CHANNELS = 16
Part = Literal["vae", "text", "image"]
PARTS: tuple[Part, ...] = ("vae", "text", "image")
# Wan's own per-channel statistics do not fit seeded VAE weights; theirs are measured once on this many noise frames.
_CALIBRATION_SHAPE = (1, 3, 5, 64, 64)


def _one_at_a_time(encode: Callable[Concatenate[Encoders, P], np.ndarray]) -> Callable[Concatenate[Encoders, P], np.ndarray]:
    """Without gradients, for one thread at a time: Wan's VAE keeps the frames before, and the tokenizer its settings, in itself
    while they work."""

    @functools.wraps(encode)
    def call(self: Encoders, *args: P.args, **kwargs: P.kwargs) -> np.ndarray:
        with self._lock, torch.no_grad():
            return encode(self, *args, **kwargs)

    return call


@dataclass
class Encoders:
    """VAE, text and image encoder with their preprocessing, on one device. Threads may share them."""

    vae: Any  # each part None where it was not asked for
    text: Any
    tokenizer: Any
    image: Any
    image_size: int
    text_len: int
    identities: dict[str, str]  # who makes the features, as `EncodersConfig.identities` says it
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)  # CLIP's published statistics
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    _lock: Any = field(default_factory=threading.Lock, init=False, repr=False, compare=False)

    @classmethod
    def from_config(cls, config: EncodersConfig, text_len: int, device: str = "cpu", parts: Collection[Part] = PARTS) -> Encoders:
        """Load or make the encoders.

        Args:
            config: which weights, and the dimensions of seeded ones.
            text_len: prompts are cut to this many tokens (512 for the published base).
            device: torch device they run on.
            parts: which of the three; the others take no memory, and calls that need them fail.

        Raises:
            EncoderError: the weights are not on disk and cannot be downloaded.
        """
        made = _make(config) if config.weights.source == "seeded" else _load(config, getattr(torch, config.dtype), parts)
        for name in PARTS:
            if name not in parts:
                made[name] = None
            else:
                made[name].to(device).eval().requires_grad_(False)
        return cls(**made, text_len=text_len, identities=config.identities(text_len))

    @_one_at_a_time
    def encode_video(self, frames: np.ndarray) -> np.ndarray:
        """frames [T, H, W, 3] uint8 RGB -> normalised latents [16, F, H/8, W/8] float16, F = 1 + (T - 1) / 4.

        The posterior's mean is used, not a sample. The VAE is causal in time: latent frame 0 depends on the first
        image alone and is that image's own latent.
        """
        video = torch.from_numpy(frames).to(self.vae.device).permute(3, 0, 1, 2)[None]
        video = video.float() / 127.5 - 1.0  # bfloat16 would round a pixel twice, before and after the division
        latents = self.vae.encode(video.to(self.vae.dtype)).latent_dist.mode().float()
        mean = torch.tensor(self.vae.config.latents_mean, device=latents.device).view(1, -1, 1, 1, 1)
        std = torch.tensor(self.vae.config.latents_std, device=latents.device).view(1, -1, 1, 1, 1)
        return ((latents - mean) / std)[0].half().cpu().numpy()

    @_one_at_a_time
    def decode_video(self, latents: np.ndarray, tile: int | None = None) -> np.ndarray:
        """Normalised latents [16, F, h8, w8] -> frames [T, 8 h8, 8 w8, 3] uint8 RGB, T = 4 (F - 1) + 1.

        The VAE decodes one latent frame after the other and keeps what it needs of those before, so memory does not grow with T.
        tile: decode the picture in overlapping tiles of this many pixels, blended: memory does not grow with its size either.
        """
        given = torch.from_numpy(latents).to(self.vae.device)[None].float()
        mean = torch.tensor(self.vae.config.latents_mean, device=given.device).view(1, -1, 1, 1, 1)
        std = torch.tensor(self.vae.config.latents_std, device=given.device).view(1, -1, 1, 1, 1)
        if tile is None:
            self.vae.disable_tiling()
        else:  # neighbours share a quarter
            self.vae.enable_tiling(tile, tile, tile * 3 // 4, tile * 3 // 4)
        pictures = self.vae.decode((given * std + mean).to(self.vae.dtype)).sample[0].float()
        return np.asarray(((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy())

    @_one_at_a_time
    def encode_text(self, prompt: str) -> np.ndarray:
        """Prompt -> UMT5 embedding [L, D] float16 of its L real tokens (the base pads with zeros to `text_len`).

        Runs of white space count as one space, none at the ends, as the base's own prompter does.
        """
        clean = " ".join(prompt.split())
        tokens = self.tokenizer(clean, truncation=True, max_length=self.text_len, return_tensors="pt").to(self.text.device)
        hidden = self.text(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        return hidden[0].float().half().cpu().numpy()

    @_one_at_a_time
    def encode_image(self, frame: np.ndarray) -> np.ndarray:
        """First frame [H, W, 3] uint8 RGB -> CLIP features [N, C] float16: the last but one layer, class token first."""
        pixels = torch.from_numpy(frame).to(self.image.device).permute(2, 0, 1)[None].float() / 255
        size = (self.image_size, self.image_size)  # the base squeezes the whole frame into the square, no crop
        pixels = torch.nn.functional.interpolate(pixels, size, mode="bicubic", align_corners=False)
        mean = torch.tensor(self.image_mean, device=pixels.device).view(1, 3, 1, 1)
        std = torch.tensor(self.image_std, device=pixels.device).view(1, 3, 1, 1)
        hidden = self.image(((pixels - mean) / std).to(self.image.dtype), output_hidden_states=True).hidden_states[-2]
        return hidden[0].float().half().cpu().numpy()


def _load(config: EncodersConfig, dtype: torch.dtype, parts: Collection[Part]) -> dict[str, Any]:
    from diffusers import AutoencoderKLWan
    from transformers import AutoTokenizer, CLIPVisionConfig, CLIPVisionModel, UMT5EncoderModel

    repo, revision = config.weights.repo, config.weights.revision
    made: dict[str, Any] = {"vae": None, "text": None, "tokenizer": None, "image": None}
    try:
        if "vae" in parts:
            made["vae"] = AutoencoderKLWan.from_pretrained(repo, subfolder="vae", revision=revision, torch_dtype=dtype)
        if "text" in parts:
            made["text"] = UMT5EncoderModel.from_pretrained(repo, subfolder="text_encoder", revision=revision, dtype=dtype)
            made["tokenizer"] = AutoTokenizer.from_pretrained(repo, subfolder="tokenizer", revision=revision)
        if "image" in parts:
            made["image"] = CLIPVisionModel.from_pretrained(repo, subfolder="image_encoder", revision=revision, dtype=dtype)
        sizes = CLIPVisionConfig.from_pretrained(repo, subfolder="image_encoder", revision=revision)
    except (OSError, ValueError) as error:
        raise EncoderError(
            f"encoders: could not load {repo!r} (revision {revision!r}): {error}\n"
            f"Needed once: subfolders vae, text_encoder, tokenizer, image_encoder (about 13 GB in bf16). Fetch them with\n"
            f"  hf download {repo} --include 'vae/*' 'text_encoder/*' 'tokenizer/*' 'image_encoder/*'\n"
            f"or set encoders.weights.repo to a local folder that holds them. To run without any download use the preset 'tiny'."
        ) from error
    if "text" in parts:
        check_embeddings(made["text"], repo)
    return made | {"image_size": sizes.image_size}


def check_embeddings(text: Any, where: str) -> None:
    """Raise EncoderError unless a loaded UMT5 encoder reads the table of embeddings that its file holds.

    The published file stores it once, as `shared`. transformers 5.0 to 5.2 leave the encoder's own uninitialised when the file's
    configuration does not tie the two, and embeddings would mean nothing.
    """
    read, stored = text.encoder.embed_tokens.weight, text.shared.weight
    if not torch.equal(read, stored) or not read.any():
        raise EncoderError(
            f"encoders: the text encoder of {where!r} does not read the embeddings that its weights hold (encoder.embed_tokens "
            "is not shared). Install the transformers that pyproject.toml asks for: pip install -e '.[dev]'"
        )


def _make(config: EncodersConfig) -> dict[str, Any]:
    from diffusers import AutoencoderKLWan
    from transformers import ByT5Tokenizer, CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.weights.seed)
        vae: Any = AutoencoderKLWan(
            base_dim=config.vae_dim,
            z_dim=LATENT_CHANNELS,
            num_res_blocks=1,
            latents_mean=[0.0] * LATENT_CHANNELS,
            latents_std=[1.0] * LATENT_CHANNELS,
        )
        vae.eval()
        text = UMT5EncoderModel(
            UMT5Config(
                vocab_size=384,  # ByT5's bytes and special tokens: a tokenizer that needs no file
                d_model=config.text_dim,
                d_kv=config.text_dim // 4,
                d_ff=2 * config.text_dim,
                num_layers=config.text_layers,
                num_heads=4,
            )
        )
        image = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=config.image_dim,
                intermediate_size=4 * config.image_dim,
                num_hidden_layers=config.image_layers,
                num_attention_heads=4,
                image_size=config.image_size,
                patch_size=config.image_patch,
            )
        )
        with torch.no_grad():
            latents = vae.encode(torch.rand(_CALIBRATION_SHAPE) * 2 - 1).latent_dist.mode().transpose(0, 1).flatten(1)
        vae.register_to_config(latents_mean=latents.mean(1).tolist(), latents_std=latents.std(1).clamp_min(1e-3).tolist())
    return {"vae": vae, "text": text, "tokenizer": ByT5Tokenizer(), "image": image, "image_size": config.image_size}
