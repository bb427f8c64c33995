"""What the lip encoder promises: each clip is read as if alone, and checkpoints load by renames."""

import re

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModel

from mllm.encoders import AVHubertConfig, AVHubertEncoder, build_encoder, freeze, register_av_hubert, wrap_encoder
from mllm.encoders.av_hubert import VideoResNet

BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
# Published counts (tensors, parameters) include these four tensors of the pre-training task, which no encoder needs:
# mask_emb (104), label_embs_concat (2004, 256), final_proj (256, D) and its bias (256).
PRETRAINING_TENSORS = 4


def pretraining_parameters(hidden_size: int) -> int:
    return 104 + 2004 * 256 + 256 * hidden_size + 256


def tiny(**changes: object) -> AVHubertEncoder:
    torch.manual_seed(0)
    sizes: dict = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "resnet_channels": (4, 8, 16, 32),
        "num_conv_pos_embeddings": 8,
        "num_conv_pos_embedding_groups": 4,
    }
    return AVHubertEncoder(AVHubertConfig(**{**sizes, **changes})).eval()


def clips(*lengths: int, shape: tuple[int, ...] = (1, 32, 32)) -> tuple[torch.Tensor, torch.Tensor]:
    """Random clips padded with NaN, so that any use of the padding shows."""
    generator = torch.Generator().manual_seed(1)
    batch = torch.full((len(lengths), max(lengths), *shape), float("nan"))
    for clip, length in zip(batch, lengths, strict=True):
        clip[:length] = torch.randn(length, *shape, generator=generator)
    return batch, torch.tensor(lengths)


@pytest.mark.parametrize("kernel_frames", [8, 5])
@torch.no_grad()
def test_a_clip_in_a_batch_equals_the_clip_alone(kernel_frames: int) -> None:
    encoder = tiny(num_conv_pos_embeddings=kernel_frames)
    video, lengths = clips(9, 5, 1)
    together = encoder(video, lengths=lengths)
    assert together.shape == (3, 9, 32)
    for clip, length, features in zip(video, lengths, together, strict=True):
        alone = encoder(clip[None, :length])
        torch.testing.assert_close(features[:length], alone[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_audio_and_lips_together_differ_from_each_alone() -> None:
    encoder = tiny()
    video, lengths = clips(6, 4)
    audio, _ = clips(6, 4, shape=(104,))
    both = encoder(video, audio, lengths)
    assert not torch.allclose(both[1, :4], encoder(video, lengths=lengths)[1, :4], atol=1e-3)
    torch.testing.assert_close(both[1, :4], encoder(video[1:, :4], audio[1:, :4])[0], rtol=1e-4, atol=1e-5)
    assert encoder(audio=audio, lengths=lengths).shape == both.shape


def test_what_is_absent_enters_as_zeros() -> None:
    """The trunk sees [audio; video]; with video alone the first half is exactly zero."""
    encoder = tiny()
    seen = []
    encoder.layer_norm.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    encoder(clips(3)[0])
    assert seen[0].shape[-1] == 64
    assert not seen[0][..., :32].any()
    assert seen[0][..., 32:].any()


def test_media_that_do_not_fit_each_other_are_refused() -> None:
    encoder = tiny()
    with pytest.raises(ValueError, match="got neither"):
        encoder()
    with pytest.raises(ValueError, match=r"\(1, 3\) and \(1, 4\)"):
        encoder(clips(3)[0], clips(4, shape=(104,))[0])
    with pytest.raises(ValueError, match="cut to read video alone"):
        wrap_encoder(encoder).backbone(audio=clips(3, shape=(104,))[0])


@pytest.mark.parametrize(("sizes", "tensors", "millions"), [({}, 538, 325.40), (BASE, 346, 103.33)])
def test_real_sizes_have_the_published_counts(sizes: dict, tensors: int, millions: float) -> None:
    config = AVHubertConfig(**sizes)
    with torch.device("meta"):
        encoder = AVHubertEncoder(config)
    assert len(encoder.state_dict()) + PRETRAINING_TENSORS == tensors
    parameters = sum(parameter.numel() for parameter in encoder.parameters())
    assert round((parameters + pretraining_parameters(config.hidden_size)) / 1e6, 2) == millions


def test_names_are_the_published_ones_after_renaming() -> None:
    renames = [
        (r"^encoder\.pos_conv_embed\.conv\.parametrizations\.weight\.original0$", "encoder.pos_conv.0.weight_g"),
        (r"^encoder\.pos_conv_embed\.conv\.parametrizations\.weight\.original1$", "encoder.pos_conv.0.weight_v"),
        (r"^encoder\.pos_conv_embed\.conv\.", "encoder.pos_conv.0."),
        (r"(layers\.\d+)\.attention\.", r"\1.self_attn."),
        (r"(layers\.\d+)\.layer_norm\.", r"\1.self_attn_layer_norm."),
        (r"(layers\.\d+)\.feed_forward\.intermediate_dense\.", r"\1.fc1."),
        (r"(layers\.\d+)\.feed_forward\.output_dense\.", r"\1.fc2."),
    ]
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in AVHubertEncoder(AVHubertConfig()).state_dict().items()}
    for pattern, published in renames:
        shapes = {re.sub(pattern, published, name): shape for name, shape in shapes.items()}
    published = {
        "feature_extractor_audio.proj.weight": (1024, 104),
        "feature_extractor_video.resnet.frontend3D.0.weight": (64, 1, 5, 7, 7),
        "feature_extractor_video.resnet.frontend3D.1.running_var": (64,),
        "feature_extractor_video.resnet.frontend3D.2.weight": (64,),
        "feature_extractor_video.resnet.trunk.layer1.0.conv1.weight": (64, 64, 3, 3),
        "feature_extractor_video.resnet.trunk.layer3.0.downsample.0.weight": (256, 128, 1, 1),
        "feature_extractor_video.resnet.trunk.layer3.0.downsample.1.num_batches_tracked": (),
        "feature_extractor_video.resnet.trunk.layer4.1.relu2.weight": (512,),
        "feature_extractor_video.proj.weight": (1024, 512),
        "layer_norm.weight": (2048,),
        "post_extract_proj.weight": (1024, 2048),
        "encoder.pos_conv.0.weight_g": (1, 1, 128),
        "encoder.pos_conv.0.weight_v": (1024, 64, 128),
        "encoder.pos_conv.0.bias": (1024,),
        "encoder.layers.23.self_attn.k_proj.bias": (1024,),
        "encoder.layers.23.self_attn_layer_norm.weight": (1024,),
        "encoder.layers.0.fc1.weight": (4096, 1024),
        "encoder.layers.0.fc2.weight": (1024, 4096),
        "encoder.layers.0.final_layer_norm.bias": (1024,),
        "encoder.layer_norm.weight": (1024,),
    }
    assert {name: shapes[name] for name in published} == published
    assert not [name for name in shapes if "layer1.0.downsample" in name]


def test_the_resnet_halves_the_crop_five_times_and_keeps_every_frame() -> None:
    with torch.device("meta"):
        resnet = VideoResNet((64, 128, 256, 512))
        features = resnet.frontend3D(torch.zeros(1, 1, 7, 88, 88))
        assert features.shape == (1, 64, 7, 22, 22)
        assert resnet.trunk.layer1(features[0].transpose(0, 1)).shape == (7, 64, 22, 22)
        assert resnet.trunk.layer4[0].conv1.stride == (2, 2)
        assert resnet(torch.zeros(2, 7, 1, 88, 88)).shape == (2, 7, 512)


def test_every_weight_of_the_video_path_learns_and_batch_norms_move_in_training() -> None:
    encoder = tiny().train()
    before = encoder.feature_extractor_video.resnet.trunk.layer4[1].bn2.running_mean.clone()
    encoder(torch.randn(2, 6, 1, 32, 32), lengths=torch.tensor([6, 4])).square().mean().backward()
    without = [name for name, parameter in encoder.named_parameters() if parameter.grad is None]
    assert without == ["feature_extractor_audio.proj.weight", "feature_extractor_audio.proj.bias"]
    assert not torch.equal(encoder.feature_extractor_video.resnet.trunk.layer4[1].bn2.running_mean, before)


def test_a_frozen_lip_encoder_never_moves() -> None:
    """`train()` on the model around it neither wakes dropout nor lets batch statistics drift."""
    encoder = build_encoder("video", tiny().config)
    freeze(encoder)
    around = torch.nn.Sequential(encoder).train()
    state = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    video, lengths = clips(5, 3)
    first, num_frames = around[0](video, lengths)
    second, _ = around[0](video, lengths)
    assert torch.equal(first[0], second[0])
    assert not first.requires_grad
    assert torch.equal(num_frames, lengths)
    assert around.training
    assert not any(module.training for module in encoder.modules())
    assert all(torch.equal(tensor, state[name]) for name, tensor in encoder.state_dict().items())


def test_the_positional_convolution_starts_normalised() -> None:
    """The weight equals its direction at the start: the norm was initialised from it, not left at random."""
    conv = tiny().encoder.pos_conv_embed.conv
    torch.testing.assert_close(conv.weight, conv.parametrizations.weight.original1)


def test_auto_classes_read_what_was_saved(tmp_path) -> None:
    register_av_hubert()
    register_av_hubert()
    encoder = tiny()
    encoder.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).resnet_channels == [4, 8, 16, 32]
    again = AutoModel.from_pretrained(tmp_path).eval()
    video, lengths = clips(5, 3)
    assert torch.equal(again(video, lengths=lengths)[1, :3], encoder(video, lengths=lengths)[1, :3])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden_size": 30}, "num_attention_heads=16 must divide hidden_size=30"),
        ({"hidden_size": "large"}, "expected int"),
        ({"resnet_channels": (8, 16)}, "four widths"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes: dict, message: str) -> None:
    with pytest.raises(StrictDataclassError, match=message):
        AVHubertConfig(**sizes)
