"""What every encoder promises: the facts known without weights, and features that depend on the own input only."""

import math

import pytest
import torch
from blocks import encoder_block
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    HubertConfig,
    LlamaConfig,
    Siglip2VisionConfig,
    SiglipConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
    Wav2Vec2Config,
    WavLMConfig,
    WhisperConfig,
)

from mllm.encoders import (
    ENCODERS,
    AVHubertConfig,
    backbone_class,
    backbone_config,
    build_encoder,
    encoder_facts,
    freeze,
    wrap_encoder,
)

TRUNK: dict = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
IMAGE: dict = {**TRUNK, "image_size": 40, "patch_size": 8}
CONVS: dict = {"conv_dim": (16, 16, 16), "conv_kernel": (10, 3, 2), "conv_stride": (5, 4, 2)}
WAVE: dict = {**TRUNK, **CONVS, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4}
STABLE: dict = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
WHISPER: dict = {
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "num_mel_bins": 8,
    "max_source_positions": 20,
    "decoder_layers": 1,
    "decoder_attention_heads": 4,
    "vocab_size": 50,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "decoder_start_token_id": 0,
}
VISION_CONFIGS = {
    "clip": CLIPVisionConfig(**IMAGE),
    "siglip": SiglipVisionConfig(**IMAGE),
    "dinov2": Dinov2Config(**{key: value for key, value in IMAGE.items() if key != "intermediate_size"}),
    "registers": Dinov2WithRegistersConfig(**IMAGE, num_register_tokens=4),
    "dinov3": DINOv3ViTConfig(**IMAGE, num_register_tokens=4),
}
WAVES = {
    "hubert": HubertConfig(**WAVE),
    "hubert_large": HubertConfig(**WAVE, **STABLE),
    "wav2vec2": Wav2Vec2Config(**WAVE),
    "wavlm": WavLMConfig(**WAVE),
    "wavlm_large": WavLMConfig(**WAVE, **STABLE),
}
AV_HUBERT = AVHubertConfig(
    **TRUNK, resnet_channels=(4, 8, 16, 32), num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=4
)
AV_HUBERT_AUDIO = backbone_config(AV_HUBERT, "audio")
NAFLEX = Siglip2VisionConfig(**TRUNK, patch_size=8, num_patches=25)
CONFIGS = {
    **VISION_CONFIGS,
    "siglip2": NAFLEX,
    **WAVES,
    "whisper": WhisperConfig(**WHISPER),
    "lips": AV_HUBERT,
    "listening": AV_HUBERT_AUDIO,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_facts_from_the_config_are_those_of_the_module(name: str) -> None:
    facts = encoder_facts(CONFIGS[name])
    with torch.device("meta"):
        encoder = build_encoder(facts.medium, CONFIGS[name]).eval()
    assert encoder.hidden_size == facts.hidden_size == 32
    assert getattr(encoder, "grid", None) == facts.grid
    assert getattr(encoder, "frames_per_second", None) == facts.frames_per_second
    assert type(encoder.backbone) is backbone_class(CONFIGS[name])
    assert {parameter.device.type for parameter in encoder.parameters()} == {"meta"}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_smallest_input_reaches_every_weight_that_can_train(name: str) -> None:
    """A process without this medium runs it, so it must pass in training mode and cover what other processes use."""
    config = CONFIGS[name]
    medium = encoder_facts(config).medium
    block = encoder_block(config, {"feature_layer": 2} if medium == "image" else {})
    encoder = build_encoder(medium, config, block).train()
    values, lengths = encoder.smallest_input()
    features = encoder(values) if lengths is None else encoder(values, lengths)[0]
    features.sum().backward()
    learning = {n for n, p in encoder.named_parameters() if p.requires_grad and p.grad is not None}
    unused = {n for n, p in encoder.named_parameters() if p.requires_grad} - learning
    assert all(name.endswith("mask_token") for name in unused), "only what DINO's pre-training hides patches with"


@pytest.mark.parametrize("name", VISION_CONFIGS)
@torch.no_grad()
def test_an_encoder_gives_one_feature_per_patch_of_the_layer_that_was_asked_for(name: str) -> None:
    config = VISION_CONFIGS[name]
    torch.manual_seed(0)
    whole = backbone_class(config)(config).eval()
    images = torch.randn(2, 3, 40, 40)
    hidden = whole(images, output_hidden_states=True).hidden_states
    encoder = wrap_encoder(whole, encoder_block(whole.config, {"feature_layer": -2})).eval()
    features = encoder(images)
    assert encoder.grid == (5, 5)
    assert features.shape == (2, 25, 32)
    torch.testing.assert_close(features, hidden[-2][:, -25:])
    assert not [name for name, _ in whole.named_parameters() if ".2." in name], "the layer behind is still there"


@torch.no_grad()
def test_class_tokens_go_and_patches_stay_in_reading_order() -> None:
    """Changing the image's last patch changes no feature but its own, when nothing mixes patches."""
    config = CLIPVisionConfig(**IMAGE)
    backbone = CLIPVisionModel(config).eval()
    for layer in backbone.encoder.layers:
        layer.self_attn.out_proj.weight.zero_()
    encoder = wrap_encoder(backbone, encoder_block(backbone.config, {"feature_layer": 1}))
    images = torch.zeros(1, 3, 40, 40)
    changed = images.clone()
    changed[..., 32:, 32:] = 1.0
    different = (encoder(changed) - encoder(images)).abs().amax(dim=2)[0] > 1e-6
    assert different.nonzero().tolist() == [[24]]


@torch.no_grad()
def test_the_final_norm_can_be_kept() -> None:
    torch.manual_seed(0)
    whole = SiglipVisionModel(SiglipVisionConfig(**IMAGE)).eval()
    images = torch.randn(1, 3, 40, 40)
    normed = whole(images).last_hidden_state
    encoder = wrap_encoder(whole, encoder_block(whole.config, {"feature_layer": -1, "final_norm": True}))
    torch.testing.assert_close(encoder(images), normed)
    assert not hasattr(whole, "head")


@pytest.mark.parametrize("name", VISION_CONFIGS)
def test_another_image_size_gives_another_grid(name: str) -> None:
    block = encoder_block(VISION_CONFIGS[name], {"image_size": [48, 32]})
    encoder = build_encoder("image", VISION_CONFIGS[name], block).eval()
    assert encoder.grid == encoder_facts(VISION_CONFIGS[name], block).grid == (6, 4)
    assert encoder(torch.zeros(1, 3, 48, 32)).shape == (1, 24, 32)
    with pytest.raises(ValueError, match=r"images are \(40, 40\) pixels"):
        encoder(torch.zeros(1, 3, 40, 40))


@pytest.mark.parametrize("name", VISION_CONFIGS)
@pytest.mark.parametrize("size", [(24, 64), (44, 43)])
@torch.no_grad()
def test_images_that_are_not_square_are_read_as_the_encoder_itself_reads_them(name: str, size: tuple[int, int]) -> None:
    """Positions are those of the encoder, resized (CLIP, SigLIP, DINOv2) or rotary (DINOv3); the rest is cut."""
    torch.manual_seed(0)
    whole = backbone_class(VISION_CONFIGS[name])(VISION_CONFIGS[name]).eval()
    images = torch.randn(2, 3, *size)
    options = {"interpolate_pos_encoding": True} if name in ("clip", "siglip") else {}
    hidden = whole(images, output_hidden_states=True, **options).hidden_states[-2]
    rows, columns = size[0] // 8, size[1] // 8
    encoder = wrap_encoder(whole, encoder_block(whole.config, {"image_size": list(size)})).eval()
    assert encoder.grid == (rows, columns)
    features = encoder(images)
    torch.testing.assert_close(features, hidden[:, -rows * columns :])
    mirrored = encoder(images.flip(3)).unflatten(1, (rows, columns)).flip(2).flatten(1, 2)
    assert not torch.allclose(features, mirrored, atol=1e-4)  # positions are there, and a row is a row


def test_a_size_is_refused_for_patches_and_patches_for_a_size() -> None:
    with pytest.raises(
        ValueError, match=r"model.image.encoder.max_num_patches is 64 .* clip_vision_model; it goes with siglip2"
    ):
        build_encoder("image", VISION_CONFIGS["clip"], encoder_block(VISION_CONFIGS["clip"], {"max_num_patches": 64}))
    with pytest.raises(ValueError, match="smaller than one patch"):
        build_encoder("image", VISION_CONFIGS["clip"], encoder_block(VISION_CONFIGS["clip"], {"image_size": [4, 40]}))


@pytest.mark.parametrize("feature_layer", [0, 4, -4])
def test_layers_that_do_not_exist_are_refused(feature_layer: int) -> None:
    with pytest.raises(ValueError, match=r"allowed: 1\.\.3 or -3\.\.-1"):
        build_encoder(
            "image", VISION_CONFIGS["clip"], encoder_block(VISION_CONFIGS["clip"], {"feature_layer": feature_layer})
        )


@torch.no_grad()
def test_whisper_counts_a_clip_to_its_true_length() -> None:
    config = CONFIGS["whisper"]
    encoder = build_encoder("audio", config).eval()
    samples = torch.tensor([320, 639, 640, 6400])
    features, num_frames = encoder(torch.randn(4, 8, 40), samples)
    assert features.shape == (4, 20, 32)
    assert num_frames.tolist() == [1, 1, 2, 20]
    assert num_frames.tolist() == [encoder_facts(config).num_frames(count) for count in samples.tolist()]
    assert encoder.frames_per_second == 50


@pytest.mark.parametrize("num_samples", [0, 319, 6720])
def test_whisper_refuses_clips_that_do_not_fit_its_window(num_samples: int) -> None:
    with pytest.raises(ValueError, match="allowed are 320 to 6719 samples"):
        encoder_facts(CONFIGS["whisper"]).num_frames(num_samples)


@pytest.mark.parametrize("name", WAVES)
@torch.no_grad()
def test_a_waveform_in_a_batch_equals_the_waveform_alone(name: str) -> None:
    """Also for the models whose first norm averages over time, and whatever the padding holds."""
    torch.manual_seed(0)
    encoder = build_encoder("audio", WAVES[name]).eval()
    waves = torch.full((2, 900), float("nan"))
    waves[0], waves[1, :530] = torch.randn(900), torch.randn(530)
    together, num_frames = encoder(waves, torch.tensor([900, 530]))
    facts = encoder_facts(WAVES[name])
    for row, num_samples in enumerate((900, 530)):
        alone = encoder.backbone(waves[row : row + 1, :num_samples]).last_hidden_state[0]
        assert len(alone) == num_frames[row] == facts.num_frames(num_samples)
        torch.testing.assert_close(together[row, : len(alone)], alone, rtol=1e-4, atol=1e-5)
    assert facts.frames_per_second == 16000 / math.prod(CONVS["conv_stride"]) == 400


def test_waveforms_too_short_for_one_frame_are_refused() -> None:
    facts = encoder_facts(HubertConfig())
    assert facts.num_frames(400) == 1
    assert facts.frames_per_second == 50
    with pytest.raises(ValueError, match="needs at least 400"):
        facts.num_frames(399)


def test_videos_without_frames_are_refused() -> None:
    assert encoder_facts(AV_HUBERT).num_frames(7) == 7
    with pytest.raises(ValueError, match="at least 1 frame"):
        encoder_facts(AV_HUBERT).num_frames(0)


@pytest.mark.parametrize("name", ["clip", "wavlm", "whisper", "lips"])
def test_freezing_holds_through_train(name: str) -> None:
    config = CONFIGS[name]
    encoder = build_encoder(encoder_facts(config).medium, config)
    assert encoder.train().backbone.training
    freeze(encoder)
    torch.nn.ModuleList([encoder]).train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_backbones_and_media_that_do_not_fit_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'llama'; allowed: clip_vision_model, .*av_hubert"):
        encoder_facts(LlamaConfig())
    with pytest.raises(ValueError, match="whisper reads audio, not video; for video: av_hubert"):
        build_encoder("video", CONFIGS["whisper"])
    with pytest.raises(ValueError, match="add_adapter"):
        encoder_facts(Wav2Vec2Config(**WAVE, add_adapter=True))
    assert {config.model_type for config in CONFIGS.values()} == set(ENCODERS)


def test_the_vision_half_of_a_two_encoder_config_is_found() -> None:
    both = SiglipConfig(vision_config=IMAGE)
    assert backbone_config(both).model_type == "siglip_vision_model"
    assert backbone_config(AV_HUBERT) is AV_HUBERT
    assert backbone_config(AV_HUBERT, "video") is AV_HUBERT
    assert AV_HUBERT_AUDIO.to_dict() == {**AV_HUBERT.to_dict(), "model_type": "av_hubert_audio"}


def test_published_encoders_have_their_published_grids() -> None:
    assert encoder_facts(CLIPVisionConfig(image_size=336, patch_size=14)).grid == (24, 24)
    assert encoder_facts(SiglipVisionConfig(image_size=384, patch_size=16)).grid == (24, 24)
    dino = Dinov2Config(image_size=518)
    assert encoder_facts(dino, encoder_block(dino, {"image_size": [224, 224]})).grid == (16, 16)
