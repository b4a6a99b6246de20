"""The encoders give the DiT's inputs in the shapes and with the causality that the model relies on."""

import numpy as np
import pytest
import torch

from fw_model.config import EncodersConfig, WeightsConfig, load_preset
from fw_model.errors import EncoderError
from fw_model.model.encoders import Encoders


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


def test_missing_weights_say_what_to_fetch(tmp_path) -> None:
    config = EncodersConfig(weights=WeightsConfig(source="hub", repo=str(tmp_path / "nowhere")))
    with pytest.raises(EncoderError, match="vae, text_encoder, tokenizer, image_encoder"):
        Encoders.from_config(config, 512)
