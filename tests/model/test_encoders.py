"""The encoders give the DiT's inputs in the shapes and with the causality that the model relies on."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fw_model.config import EncodersConfig, WeightsConfig, load_preset
from fw_model.errors import EncoderError
from fw_model.model.encoders import Encoders, check_embeddings


@pytest.fixture(scope="module")
def encoders() -> Encoders:
    preset = load_preset("tiny")
    return Encoders.from_config(preset.encoders, preset.model.wan.text_len)


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (9, 32, 48, 3), dtype=np.uint8)


def test_shapes_are_those_the_preset_promises(encoders: Encoders, frames: np.ndarray) -> None:
    wan = load_preset("tiny").model.wan
    assert encoders.encode_video(frames).shape == (16, 3, 4, 6)
    assert encoders.encode_image(frames[0]).shape == (wan.image_tokens, wan.image_dim)
    assert encoders.encode_text("a room with a window, seen from a slowly moving camera").shape == (wan.text_len, wan.text_dim)
    assert encoders.encode_text("").shape == (1, wan.text_dim)


def test_the_first_latent_frame_is_the_first_images_own_latent(encoders: Encoders, frames: np.ndarray) -> None:
    alone = encoders.encode_video(frames[:1])
    np.testing.assert_allclose(encoders.encode_video(frames)[:, :1], alone, atol=1e-2)
    changed = frames.copy()
    changed[1:] = 0
    np.testing.assert_allclose(encoders.encode_video(changed)[:, :1], alone, atol=1e-2)


def test_made_encoders_are_the_same_everywhere_and_leave_the_global_generator_alone(frames: np.ndarray) -> None:
    preset = load_preset("tiny")
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first, second = (Encoders.from_config(preset.encoders, 32).encode_video(frames) for _ in range(2))
    assert torch.rand(1) == expected
    np.testing.assert_array_equal(first, second)


def test_latents_have_unit_order_of_magnitude(encoders: Encoders, frames: np.ndarray) -> None:
    assert 0.3 < encoders.encode_video(frames).astype(np.float32).std() < 3


def test_white_space_does_not_change_a_prompt(encoders: Encoders) -> None:
    clean = encoders.encode_text("a room, seen from a camera")
    np.testing.assert_array_equal(encoders.encode_text("  a room,\n\tseen  from a camera "), clean)


def test_pixels_are_scaled_in_float32(encoders: Encoders) -> None:
    """In bfloat16 x / 127.5 - 1 is off by up to a grey level for a third of the levels."""
    seen: list[torch.Tensor] = []

    class Vae:
        device, dtype, config = torch.device("cpu"), torch.bfloat16, encoders.vae.config

        def encode(self, video: torch.Tensor) -> None:
            seen.append(video)
            raise InterruptedError

    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=-1)
    with pytest.raises(InterruptedError):
        replace(encoders, vae=Vae()).encode_video(levels)
    exact = torch.from_numpy(levels[0, ..., 0]).float() / 127.5 - 1
    assert torch.equal(seen[0][0, 0, 0], exact.bfloat16())
    assert not torch.equal(torch.from_numpy(levels[0, ..., 0]).bfloat16() / 127.5 - 1, exact.bfloat16())


def test_a_text_encoder_that_does_not_read_its_embeddings_is_refused(encoders: Encoders, tmp_path: Path) -> None:
    """As transformers 5.0 to 5.2 load the published file, whose configuration does not tie them."""
    encoders.text.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = type(encoders.text).from_pretrained(tmp_path)
    check_embeddings(loaded, "here")
    loaded.encoder.embed_tokens = torch.nn.Embedding.from_pretrained(torch.zeros_like(loaded.shared.weight))
    with pytest.raises(EncoderError, match="'here' does not read the embeddings"):
        check_embeddings(loaded, "here")
    loaded.shared = loaded.encoder.embed_tokens
    with pytest.raises(EncoderError, match="does not read"):
        check_embeddings(loaded, "here")


def test_missing_weights_say_what_to_fetch(tmp_path) -> None:
    config = EncodersConfig(weights=WeightsConfig(source="hub", repo=str(tmp_path / "nowhere")))
    with pytest.raises(EncoderError, match="vae, text_encoder, tokenizer, image_encoder"):
        Encoders.from_config(config, 512)
