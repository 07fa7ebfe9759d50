"""Example inputs: in every form, and derived from what a model tells of itself."""

from __future__ import annotations

import types
from typing import Any, ClassVar

import pytest
import timm
import torch
import transformers
from feed_forward import TIE, X, mlp, plain
from oracle import Net, assert_hit, linear, ties
from torch import Tensor, nn

import pe_fx
from pe_fx import CaptureError
from pe_fx.graph.capture import capture
from pe_fx.graph.derive import derive_inputs
from pe_fx.graph.inputs import as_arguments

# ---- inputs


@pytest.mark.parametrize(
    ("given", "expected"),
    [(X, ((X,), {})), ((X, 2), ((X, 2), {})), ([X], ((X,), {})), ({"x": X}, ((), {"x": X})), ((), ((), {}))],
    ids=["tensor", "tuple", "list", "dict", "empty"],
)
def test_as_arguments(given: Any, expected: Any) -> None:
    assert str(as_arguments(given)) == str(expected)


@pytest.mark.parametrize("inputs", [X, (X,), [X], {"x": X}], ids=["tensor", "tuple", "list", "dict"])
def test_inputs_in_every_form(inputs: Any) -> None:
    assert_hit(mlp(plain), inputs if not isinstance(inputs, list) else tuple(inputs), TIE, kind="mlp")
    assert ties(pe_fx.plan(mlp(plain), inputs)) == [TIE]


def test_several_inputs_by_position() -> None:
    def forward(m: Net, x: Tensor, scale: float, y: Tensor) -> Tensor:
        return plain(m, x) * scale + y

    assert_hit(mlp(forward), (X, 0.5, torch.randn(8)), TIE, kind="mlp")


def test_several_inputs_by_keyword() -> None:
    def forward(m: Net, x: Tensor, *, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
        return plain(m, x) * scale * mask

    assert_hit(mlp(forward), {"x": X, "mask": torch.ones(5, 1)}, TIE, kind="mlp")


def test_nested_inputs() -> None:
    def forward(m: Net, batch: dict[str, Any]) -> Tensor:
        return plain(m, batch["x"][0])

    assert ties(pe_fx.plan(mlp(forward), ({"x": [X]},))) == [TIE]


def test_inputs_that_need_gradients_are_left_alone() -> None:
    x = X.clone().requires_grad_()
    capture(mlp(plain), x)
    assert x.grad is None
    assert x.grad_fn is None


class OfABatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = linear(8, 16), linear(16, 8)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.fc2(self.fc1(batch["x"]).relu())


def test_a_dict_that_is_one_argument() -> None:
    """It is what forward takes; a dict of what forward takes is its keyword arguments."""
    model = OfABatch()
    for inputs in ({"x": X}, ({"x": X},), {"batch": {"x": X}}):
        assert ties(pe_fx.plan(model, inputs)) == [TIE]
        assert pe_fx.verify(pe_fx.transform(model, inputs), inputs)


# ---- inputs that are derived


def derived(model: nn.Module) -> Any:
    return next(derive_inputs(model))


def test_derived_from_timm() -> None:
    assert derived(timm.create_model("test_resnet.r160_in1k", pretrained=False)).shape[1:] == (3, 160, 160)
    assert derived(timm.create_model("resnet18")).shape[1:] == (3, 224, 224)


def test_derived_from_transformers() -> None:
    config = transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=50)
    model = transformers.BertModel(config)
    assert derived(model)["input_ids"].dtype == torch.long
    assert {site.kind for site in pe_fx.plan(model).sites} == {"attention", "mlp"}


class Denoiser(nn.Module):
    """As diffusers' models are called."""

    config: ClassVar = {"sample_size": 32, "cross_attention_dim": 6}

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.context = nn.Conv2d(5, 8, 1), nn.Linear(6, 8)
        self.fc1, self.fc2 = linear(8, 16), linear(16, 8)

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.patches(sample).mean((2, 3)) + self.context(encoder_hidden_states).mean(1)
        return self.fc2(self.fc1(x).relu()) * timestep[:, None]


def test_derived_for_what_must_be_given_together() -> None:
    captured = capture(Denoiser())
    shapes = {name: tuple(value.shape) for name, value in captured.example_inputs.items()}
    assert shapes == {"sample": (2, 5, 32, 32), "timestep": (2,), "encoder_hidden_states": (2, 16, 6)}


class Alone(nn.Sequential):
    """A name that says nothing by itself."""

    def forward(self, sample: Tensor) -> Tensor:
        return super().forward(sample)


def test_derived_for_the_first_layer_whatever_its_input_is_called() -> None:
    assert derived(Alone(linear(8, 16))).shape == (2, 8)


class TextAndImage(nn.Module):
    dummy_inputs: ClassVar = {"input_ids": torch.ones(3, 5, dtype=torch.long)}

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.patches = nn.Embedding(9, 8), nn.Conv2d(1, 8, 16, 16)
        self.fc1, self.fc2 = linear(8, 16), linear(16, 8)

    def forward(self, input_ids: Tensor, pixel_values: Tensor | None = None) -> Tensor:
        assert pixel_values.shape[-1] == 64
        image = self.patches(pixel_values).mean((2, 3))
        return self.fc2(self.fc1(self.embedding(input_ids).mean(1) + image).relu())


def test_derived_for_text_and_image_together() -> None:
    captured = capture(TextAndImage())
    assert captured.example_inputs["input_ids"].shape == (3, 5)
    assert captured.example_inputs["pixel_values"].shape == (3, 1, 64, 64)


class Masked(nn.Module):
    dummy_inputs: ClassVar = {"input_ids": torch.ones(2, 5, dtype=torch.long)}

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.fc1, self.fc2 = nn.Embedding(9, 8), linear(8, 16), linear(16, 8)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.fc2(self.fc1(self.embedding(input_ids)).relu()) * attention_mask[..., None]


def test_derived_mask_where_the_model_makes_none() -> None:
    captured = capture(Masked())
    assert torch.equal(captured.example_inputs["attention_mask"], torch.ones(2, 5, dtype=torch.long))
    assert ties(pe_fx.plan(Masked())) == [TIE]


@pytest.mark.parametrize(
    ("layer", "width"),
    [(nn.Linear(6, 3), 6), (nn.Conv1d(4, 3, 3), 4), (nn.Conv2d(4, 3, 3), 4), (nn.Conv3d(4, 3, 3), 4)],
    ids=["linear", "conv1d", "conv2d", "conv3d"],
)
def test_derived_from_the_first_layer(layer: nn.Module, width: int) -> None:
    inputs = derived(nn.Sequential(nn.Identity(), layer, nn.Linear(99, 99)))
    assert inputs.shape[1] == width
    assert inputs.dim() == layer.weight.dim()
    assert inputs.dtype == torch.float32
    layer(inputs)


def test_derived_ids_for_an_embedding() -> None:
    model = nn.Sequential(nn.Embedding(10, 8), linear(8, 16), nn.ReLU(), linear(16, 8))
    assert derived(model).dtype == torch.long
    assert ties(pe_fx.plan(model)) == ["3.weight ← 1.weightᵀ"]


def test_derived_sequence_where_rows_do_not_fit() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        return plain(m, x).reshape(batch * length, width)

    assert ties(pe_fx.plan(mlp(forward))) == [TIE]
    assert pe_fx.verify(pe_fx.transform(mlp(forward)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_derived_inputs_have_the_models_dtype_and_device(dtype: torch.dtype) -> None:
    assert derived(linear(8, 4).to(dtype)).dtype == dtype
    assert derived(linear(8, 4).to("meta")).device.type == "meta"


def test_deriving_draws_no_random_numbers() -> None:
    models = nn.Sequential(nn.Embedding(10, 8), linear(8, 8)), linear(8, 8), nn.Conv2d(3, 4, 3)
    state = torch.get_rng_state()
    for model in models:
        assert list(derive_inputs(model))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_failure_tells_of_the_likeliest_inputs_and_what_forward_takes() -> None:
    class Sevens(nn.Linear):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return super().forward(x).reshape(-1, 7)

    with pytest.raises(CaptureError) as caught:
        capture(Sevens(8, 4))
    text = str(caught.value)
    assert "inputs derived from it (2 tried), the likeliest being 0 (2, 8): RuntimeError: shape '[-1, 7]' is invalid" in text
    assert "in eval mode" not in text, "the same error is told once"
    assert text.endswith("forward takes x, scale")


def test_nothing_to_derive_from() -> None:
    assert list(derive_inputs(nn.ReLU())) == []
    with pytest.raises(CaptureError, match="pass example_inputs"):
        capture(nn.ReLU())


# ---- derived from configurations


class Vision(nn.Module):
    """Takes images of one size, as many vision models do."""

    def __init__(self, config: Any, size: tuple[int, int], channels: int = 3) -> None:
        super().__init__()
        self.config, self.size = config, size
        self.patches = nn.Conv2d(channels, 8, 14, 14)
        self.fc1, self.fc2 = linear(8, 16), linear(16, 8)

    def forward(self, pixel_values: Tensor) -> Tensor:
        if pixel_values.shape[-2:] != self.size:
            raise ValueError("another size than the model's")
        return self.fc2(self.fc1(self.patches(pixel_values).flatten(2).transpose(1, 2)).relu())


def settings(**values: Any) -> types.SimpleNamespace:
    return types.SimpleNamespace(**values)


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (settings(image_size=518), (518, 518)),
        (settings(image_size=30), (30, 30)),
        (settings(image_size=(42, 70)), (42, 70)),
        (settings(image_size={"height": 70, "width": 42}), (70, 42)),
        (settings(vision_config=settings(img_size=98)), (98, 98)),
        ({"vision_config": {"image_size": 98}}, (98, 98)),
        (settings(image_size="large", patch_size=14), (70, 70)),
    ],
    ids=str,
)
def test_an_image_size_that_is_configured(config: Any, size: tuple[int, int]) -> None:
    assert ties(pe_fx.plan(Vision(config, size))) == [TIE]


def test_an_image_size_that_a_part_is_configured_for() -> None:
    model = nn.Sequential(Vision(settings(image_size=98), (98, 98)))
    assert ties(pe_fx.plan(model)) == ["0.fc2.weight ← 0.fc1.weightᵀ"]


@pytest.mark.parametrize("size", [30, 336])
def test_derived_for_images_from_transformers(size: int) -> None:
    shape = {"image_size": size, "patch_size": 2 if size < 100 else 14, "num_channels": 1}
    config = transformers.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, **shape)
    model = transformers.ViTModel(config)
    assert derived(model).keys() == {"pixel_values"}, "no text, whatever dummy_inputs says"
    assert derived(model)["pixel_values"].shape == (2, 1, size, size)
    assert len(pe_fx.plan(model).sites) == 2


def test_derived_for_speech_from_transformers() -> None:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = transformers.WhisperConfig(
        **sizes, encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=20, max_source_positions=24, vocab_size=50, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    captured = capture(transformers.WhisperModel(config))
    assert captured.example_inputs["input_features"].shape == (2, 20, 48)
    assert "decoder_input_ids" in captured.example_inputs


def test_derived_for_sound_at_its_rate() -> None:
    class Sound(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config, self.frames = settings(sampling_rate=800), nn.Conv1d(1, 8, 80, 80)
            self.fc1, self.fc2 = linear(8, 16), linear(16, 8)

        def forward(self, input_values: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            assert input_values.shape[1:] == (800,)
            return self.fc2(self.fc1(self.frames(input_values[:, None]).transpose(1, 2)).relu())

    assert ties(pe_fx.plan(Sound())) == [TIE]


def test_derived_from_what_weights_were_trained_on() -> None:
    models = pytest.importorskip("torchvision").models
    with torch.device("meta"):
        assert derived(models.vit_b_16()).shape == (2, 3, 224, 224)
        assert derived(models.vit_b_16(image_size=96)).shape == (2, 3, 96, 96)
        assert derived(models.inception_v3(init_weights=False)).shape == (2, 3, 299, 299)


def test_derived_for_a_detector() -> None:
    detection = pytest.importorskip("torchvision").models.detection
    images, targets = derived(detection.fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None))
    assert [image.shape for image in images] == [(3, 128, 160)] * 2
    assert all(target["boxes"].shape == (1, 4) and target["labels"].dtype is torch.long for target in targets)


def test_deriving_survives_a_property_that_raises() -> None:
    class Shy(nn.Linear):
        @property
        def config(self) -> Any:
            raise RuntimeError("not yet")

    assert derived(Shy(8, 4)).shape == (2, 8)
