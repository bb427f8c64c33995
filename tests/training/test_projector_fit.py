"""The closed form against a plain least-squares fit, on toy models and real files; and what is no caption."""

import logging
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from blocks import merged
from caption_fit import WORDS, fit
from torch.utils.data import DataLoader

from mllm.budget import Budget
from mllm.config.model import ModelConfig
from mllm.training.initialization.projector_fit import RIDGES, fit_projectors

LINEAR = {"projector": "linear"}


def plain_ridge(x: np.ndarray, targets: np.ndarray, penalty: float) -> tuple[np.ndarray, float]:
    """What ridge regression predicts, the last input free, and its error by generalised cross-validation."""
    free = np.diag([penalty * len(x)] * (x.shape[1] - 1) + [0.0])
    hat = x @ np.linalg.solve(x.T @ x + free, x.T)
    predicted = hat @ targets
    return predicted, float(np.square(predicted - targets).sum() / (1 - np.trace(hat) / len(x)) ** 2)


def soft_tokens(model: Any, settings: ModelConfig, budget: str, row: int) -> torch.Tensor:
    """The soft tokens (K, H) of the only medium of a row, by the processor and the model as in generation."""
    processor = tiny.processor(settings)
    medium = budget.partition("=")[0]
    batch = tiny.batch(processor, [([tiny.random_media(medium, 20 + row, seed=row)], "")], for_training=True)
    inputs = processor.expand(batch, [[Budget.parse(budget)]], left_padding=False).inputs
    embeds = model.model.embed(inputs["input_ids"], inputs)
    return embeds[inputs["input_ids"] == processor.placeholder_ids[medium]].detach()


def words_of(model: Any, row: int) -> torch.Tensor:
    """Embeddings (n, H) of the words of a caption, punctuation left out."""
    ids = tiny.TOKENIZER(" " + WORDS[row % 7], add_special_tokens=False)["input_ids"]
    ids = [i for i in ids if any(c.isalnum() for c in tiny.TOKENIZER.decode([i]))]
    return model.get_input_embeddings()(torch.tensor(ids)).detach()


def test_the_sum_of_soft_tokens_is_the_ridge_regression_of_the_sum_of_words() -> None:
    settings = tiny.settings(("image",), image={**LINEAR, "budgets": [64, 16, 1]})
    model, [report] = fit(settings, ["image"])
    # A plain fit by numpy, on features that come from the encoder itself; the bias stands beside 64 patches each.
    values = torch.stack([tiny.random_media("image", seed=i).values for i in range(14)])
    features = model.model.encode("image", values).values.sum(1).detach().double().numpy()
    targets = np.stack([words_of(model, i).sum(0).double().numpy() for i in range(14)])
    x = np.concatenate([features, np.full((14, 1), 64.0)], axis=1)
    fits = {ridge: plain_ridge(x, targets, ridge * features.var(0).mean()) for ridge in RIDGES}
    best = min(fits, key=lambda ridge: fits[ridge][1])
    assert report.ridge == best
    predicted, error = fits[best]
    around = np.square(targets - targets.mean(0)).sum()
    assert report.explained == pytest.approx(1 - error / around, abs=1e-4)
    assert report.num_items == 14
    summed = np.stack([soft_tokens(model, settings, "image=64", i).sum(0).double().numpy() for i in range(14)])
    scale = (summed * predicted).sum() / np.square(predicted).sum()
    np.testing.assert_allclose(summed, scale * predicted, rtol=2e-3, atol=2e-3 * np.abs(summed).max())


def test_captions_that_say_nothing_of_what_they_show_are_not_learned_by_heart() -> None:
    """Images are noise and captions go round: whatever is fitted, other captions gain nothing."""
    _, [report] = fit(tiny.settings(("image",), image={**LINEAR, "budgets": [64, 1]}), ["image"], rows=range(30))
    assert report.ridge > 1
    assert report.explained < 0.05


def test_soft_tokens_of_the_smallest_budget_are_as_long_as_words() -> None:
    settings = tiny.settings(("image",), image={**LINEAR, "budgets": [64, 16, 4]})
    model, _ = fit(settings, ["image"])
    soft = torch.cat([soft_tokens(model, settings, "image=4", i) for i in range(14)])
    words = torch.cat([words_of(model, i) for i in range(14)])
    torch.testing.assert_close(soft.square().sum(1).mean(), words.square().sum(1).mean(), rtol=1e-3, atol=0.0)


def test_a_image_in_haar_order_is_fitted_as_the_map_it_is() -> None:
    """Details are differences and do not add up to the image; where the map's own sums are fitted, maps agree."""
    raster, haar = (
        merged(LINEAR, {"compressor": {"order": order}, "budgets": [64, 16, 1]}) for order in ("raster", "haar")
    )
    plain, _ = fit(tiny.settings(("image",), image=raster), ["image"])
    nested, _ = fit(tiny.settings(("image",), image=haar), ["image"])
    assert nested.model.compressors["image"].order == "haar"
    first, other = (m.model.compressors["image"].projectors[0][0] for m in (plain, nested))
    torch.testing.assert_close(other.weight, first.weight)
    torch.testing.assert_close(other.bias, first.bias)


def test_queries_are_fitted_to_what_they_would_read_of_single_features() -> None:
    """The sum of single features' tokens is the ridge regression; the bias stands in the layer before."""
    image = {"compressor": {"kind": "query", "num_queries": 16, "start": "pyramid"}, "budgets": [16, 4, 1]}
    settings = tiny.settings(("image",), image=image)
    model, [report] = fit(settings, ["image"])
    assert report.name == "image=16"
    query = model.model.compressors["image"]
    assert query.proj.shape == (16, 32)
    features = model.model.encode(
        "image", torch.stack([tiny.random_media("image", seed=i).values for i in range(14)])
    ).values
    with torch.no_grad():
        values = query.values(features)
        summed = (values @ query.proj).sum(1).double()
    targets = torch.stack([words_of(model, i).sum(0).double() for i in range(14)])
    x = values.sum(1).double().numpy()
    predicted, _ = plain_ridge(np.append(x, np.full((14, 1), 64.0), 1), targets.numpy(), report.ridge * x.var(0).mean())
    expected = torch.from_numpy(predicted - predicted.mean(0))
    similarity = torch.nn.functional.cosine_similarity((summed - summed.mean(0)).flatten(), expected.flatten(), dim=0)
    assert similarity > 0.99
    soft = torch.cat([soft_tokens(model, settings, "image=1", i) for i in range(14)])
    words = torch.cat([words_of(model, i) for i in range(14)])
    torch.testing.assert_close(soft.square().sum(1).mean(), words.square().sum(1).mean(), rtol=0.2, atol=0.0)


def test_what_patches_say_is_found_from_sums_alone() -> None:
    """Words are planted as directions of features; the fit sees only whole images and finds every patch's word."""
    settings = tiny.settings(("image",), image={**LINEAR, "budgets": [64, 1]})
    model, processor = tiny.model(settings), tiny.processor(settings)
    names = ["red", "blue", "square", "circle"]
    ids = [tiny.TOKENIZER(f" {name}", add_special_tokens=False)["input_ids"] for name in names]
    assert [len(one) for one in ids] == [1, 1, 1, 1]
    directions = torch.linalg.qr(torch.randn(16, 4, generator=torch.Generator().manual_seed(0)))[0].T

    def shown(row: int) -> list[int]:
        return np.random.default_rng(row).choice(4, size=1 + row % 3, replace=False).tolist()

    class Planted(torch.nn.Module):
        """An encoder that shows word w of image number `row` in patch 10 w."""

        hidden_size = 16

        def __init__(self) -> None:
            super().__init__()
            self.bias = torch.nn.Parameter(torch.full((16,), 0.2))

        def forward(self, values: torch.Tensor) -> torch.Tensor:
            features = self.bias.expand(len(values), 64, 16).clone()
            for item, row in enumerate(values[:, 0, 0, 0].long().tolist()):
                for word in shown(row):
                    features[item, 10 * word] += directions[word]
            return features

    model.model.vision_tower = Planted()
    batches = []
    for start in range(0, 60, 10):
        images = [tiny.LoadedMedia("image", torch.full((3, 64, 64), float(start + i))) for i in range(10)]
        rows = [([one], " ".join(names[w] for w in shown(start + i))) for i, one in enumerate(images)]
        batches.append({"batch": tiny.batch(processor, rows, for_training=True)})
    loader: Any = DataLoader(batches, batch_size=None)  # pyright: ignore[reportArgumentType]
    [report] = fit_projectors(model, processor, loader, num_counted=len(batches))
    assert report.explained > 0.99
    table = model.get_input_embeddings().weight.detach()
    soft = model.model.compressors["image"].projectors[0](directions + model.model.vision_tower.bias)
    nearest = torch.nn.functional.cosine_similarity(soft[:, None], table[None], dim=-1).argmax(1)
    assert nearest.tolist() == [one[0] for one in ids]


@pytest.mark.parametrize("hidden", [0, 24])
def test_every_budget_of_a_stream_has_its_own_fit_where_it_has_its_own_projector(hidden: int) -> None:
    layers = {"kind": "mlp", "hidden_size": hidden} if hidden else {"kind": "linear"}
    audio = {"projector": {**layers, "per_budget": True}, "budgets": ["/4", "/8"]}
    settings = tiny.settings(("image", "audio"), audio={**tiny.MEDIA["audio"], **audio}, image=LINEAR)
    before = tiny.model(settings).state_dict()
    model, reports = fit(settings, ["audio", "image"])
    assert [report.name for report in reports] == ["audio=/4", "audio=/8", "image=64"]
    assert [report.num_items for report in reports] == [7, 7, 7]
    changed = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    last = "0" if hidden == 0 else "2"
    fitted = [f"audio.projectors.0.{last}", f"audio.projectors.1.{last}", "image.projectors.0.0"]
    assert changed == {f"model.compressors.{layer}.{part}" for layer in fitted for part in ("weight", "bias")}


def test_a_caption_too_short_for_a_budget_is_left_out_of_its_fit_alone(caplog: pytest.LogCaptureFixture) -> None:
    """Row i has 20 + i frames: the first four make no token of 24."""
    audio = merged(tiny.MEDIA["audio"], {"projector": {"kind": "linear", "per_budget": True}, "budgets": ["/4", "/24"]})
    settings = tiny.settings(("audio",), audio=audio)
    caplog.set_level(logging.WARNING, "mllm")
    model, reports = fit(settings, ["audio"], batch_size=2)
    assert [(report.name, report.num_items) for report in reports] == [("audio=/4", 14), ("audio=/24", 10)]
    assert [record.getMessage() for record in caplog.records] == [
        "4 captions are too short for audio=/24 and are left out of its fit"
    ]
    without, _ = fit(settings, ["audio"], batch_size=2, rows=range(4, 14))
    name = "model.compressors.audio.projectors.{}.0.weight"
    torch.testing.assert_close(model.state_dict()[name.format(1)], without.state_dict()[name.format(1)])
    assert not torch.allclose(model.state_dict()[name.format(0)], without.state_dict()[name.format(0)])


def test_the_fit_does_not_depend_on_batches() -> None:
    settings = tiny.settings(("image", "audio"), image=LINEAR)
    one, _ = fit(settings, ["audio", "image"], batch_size=14)
    many, _ = fit(settings, ["audio", "image"], batch_size=1)
    for (name, expected), value in zip(one.state_dict().items(), many.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(ValueError, match=r"end in a linear layer, got LayerNorm; set projector.norm to false"):
        fit(tiny.settings(("image",), image={"projector": {"norm": True}}), ["image"])
    with pytest.raises(ValueError, match=r"fits one projector, not a mixture; use projector.kind mlp"):
        fit(tiny.settings(("image",), image={"projector": {"kind": "moe", "num_experts": 2}}), ["image"])
    windows = {"compressor": {"kind": "query", "num_queries": 4, "window_frames": 16}, "budgets": ["/4", "/8"]}
    with pytest.raises(ValueError, match=r"cannot fit a query here; allowed: pool, stack, and query on images"):
        fit(tiny.settings(("audio",), audio=windows), ["audio"])
    with pytest.raises(ValueError, match=r"cannot fit a hybrid here; allowed: pool, stack, and query on images"):
        fit(tiny.settings(("image",), image={"compressor": "hybrid"}), ["image"])
    settings = tiny.settings(("image",))
    two = tiny.batch(
        tiny.processor(settings),
        [([tiny.random_media("image"), tiny.random_media("image")], "both")],
        for_training=True,
    )
    loader: Any = DataLoader([{"batch": two}], batch_size=None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"'row0' of data.captions shows 2 media items; a caption has one"):
        fit_projectors(tiny.model(settings), tiny.processor(settings), loader, num_counted=1)
