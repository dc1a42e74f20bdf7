"""Compare exports with timm, transformers, ONNX Runtime and torch.export (export.py, formats.py, huggingface.py)."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

import amd.exchange.export as export_module
from amd.artifacts.weights import Card, HeadCard, encode, load_classifier, save_encoder, whole_clips
from amd.config import ClipConfig, ConfigError, EncoderConfig, validate
from amd.exchange import formats
from amd.exchange.export import ExportReport, export
from amd.exchange.formats import EXPORTERS
from amd.exchange.initialization import load_starting_point
from amd.models.encoder import Encoder
from tests.support.runs.peers import close

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
IMAGE = ClipConfig(frames=1, tubelet=1, size=(16, 24), patch=4, mean=MEAN, std=STD)
VIDEO = ClipConfig(frames=4, tubelet=2, size=(16, 24), patch=4, mean=MEAN, std=STD)
BASE = {"width": 48, "depth": 2, "heads": 3}
MAE = {**BASE, "class_token": True, "positions": "sincos_2d"}
HEAD = HeadCard(classes=5, labels=("a", "b", "c", "d", "e"))


def publish(folder: Path, values: dict[str, Any], clip: ClipConfig, **fields: Any) -> tuple[Encoder, nn.Linear | None]:
    torch.manual_seed(3)
    encoder = Encoder(validate(EncoderConfig, values), clip.grid, clip.token_values).eval()
    head = nn.Linear(48, 5) if fields.get("head") else None
    with torch.no_grad():
        for module in (encoder, head or encoder.norm):
            for parameter in module.parameters():
                parameter += 0.2 * torch.randn(parameter.shape)
    pooling = "mean_then_norm" if head else "mean"
    card = Card(**({"id": "e1", "encoder": encoder.config, "clip": clip, "pooling": pooling} | fields))
    save_encoder(str(folder), encoder, card, head)
    return encoder, head


def pixels_of(clip: ClipConfig, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *(() if clip.is_image else (clip.frames,)), *clip.size)


@torch.no_grad()
def expected(encoder: Encoder, head: nn.Linear | None, clip: ClipConfig, pixels: Tensor) -> Tensor:
    clips = pixels[:, :, None] if clip.is_image else pixels
    if head is None:
        return encode(encoder, clip, clips)
    return head(encode(encoder, clip, clips, "mean_then_norm"))


def rejection_message(folder: Path, format: Any, output: Path | str) -> str:
    with pytest.raises(ConfigError) as caught:
        export(str(folder), format, str(output))
    return str(caught.value)


@pytest.mark.parametrize("head", [None, HEAD])
@pytest.mark.parametrize(
    "values", [MAE, BASE | {"positions": "learned"}, MAE | {"positions": "sincos_2d", "position_base": 100.0}]
)
def test_timm_loads_an_exported_folder_and_returns_the_same_output(
    tmp_path: Path, values: dict, head: HeadCard | None
) -> None:
    encoder, linear = publish(tmp_path / "e1", values, IMAGE, head=head)
    report = export(str(tmp_path / "e1"), "timm", str(tmp_path / "out"))
    assert report.deviation < 1e-5
    pixels = pixels_of(IMAGE)
    wanted = expected(encoder, linear, IMAGE, pixels)
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    with torch.no_grad():
        close(model(pixels), wanted)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    plain = timm.create_model(config["architecture"], num_classes=config["num_classes"], **config["model_args"]).eval()
    plain.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"), strict=True)
    with torch.no_grad():
        close(plain(pixels), wanted)
    settings = timm.data.resolve_model_data_config(model)
    assert tuple(settings["mean"] + settings["std"]) == MEAN + STD
    assert settings["input_size"] == (3, 16, 24)


@pytest.mark.parametrize("clip", [VIDEO, IMAGE])
def test_transformers_loads_a_video_encoder_and_returns_the_same_features(tmp_path: Path, clip: ClipConfig) -> None:
    encoder, _ = publish(tmp_path / "e1", BASE, clip)
    assert export(str(tmp_path / "e1"), "huggingface", str(tmp_path / "out")).deviation < 1e-5
    model = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
    assert isinstance(model, transformers.VideoMAEModel)
    pixels = pixels_of(clip)
    frames = pixels[:, None] if clip.is_image else pixels.transpose(1, 2)
    with torch.no_grad():
        close(model(frames).last_hidden_state.mean(1), expected(encoder, None, clip, pixels))


def test_transformers_loads_a_video_classifier_with_its_labels(tmp_path: Path) -> None:
    encoder, head = publish(tmp_path / "e1", BASE, VIDEO, head=HEAD)
    export(str(tmp_path / "e1"), "huggingface", str(tmp_path / "out"))
    model = transformers.AutoModelForVideoClassification.from_pretrained(tmp_path / "out").eval()
    pixels = pixels_of(VIDEO)
    with torch.no_grad():
        close(model(pixels.transpose(1, 2)).logits, expected(encoder, head, VIDEO, pixels))
    assert [model.config.id2label[i] for i in range(5)] == list("abcde")


@pytest.mark.parametrize("values", [MAE, MAE | {"positions": "learned"}])
def test_transformers_loads_an_image_encoder_as_vit(tmp_path: Path, values: dict[str, Any]) -> None:
    encoder, _ = publish(tmp_path / "e1", values, IMAGE)
    export(str(tmp_path / "e1"), "huggingface", str(tmp_path / "out"))
    model = transformers.ViTModel.from_pretrained(tmp_path / "out", add_pooling_layer=False).eval()
    pixels = pixels_of(IMAGE)
    with torch.no_grad():
        close(model(pixels).last_hidden_state[:, 1:].mean(1), expected(encoder, None, IMAGE, pixels))


@pytest.mark.parametrize(("clip", "values"), [(IMAGE, MAE), (VIDEO, BASE)])
def test_the_exported_processor_normalises_as_the_card_specifies(
    tmp_path: Path, clip: ClipConfig, values: dict
) -> None:
    publish(tmp_path / "e1", values, clip)
    export(str(tmp_path / "e1"), "huggingface", str(tmp_path / "out"))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    picture = np.random.default_rng(0).integers(0, 256, (16, 40, 3), dtype=np.uint8)  # no resizing: shorter side 16
    given = [Image.fromarray(picture)] * clip.frames
    values = processor(given if not clip.is_image else given[0], return_tensors="pt")["pixel_values"]
    values = values.reshape(-1, 3, 16, 24)
    middle = torch.from_numpy(picture[:, 8:32]).permute(2, 0, 1).float() / 255
    wanted = (middle - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    close(values, wanted.expand_as(values))


OFFICIAL = [
    (BASE, VIDEO, "encoder.blocks.0.attn.q_bias"),
    (BASE | {"positions": "learned"}, VIDEO, "pos_embed"),
    (BASE | {"positions": "sincos_3d"}, VIDEO, "pos_embed"),
    (BASE | {"positions": "sincos_2d", "position_base": 100.0, "class_token": True}, VIDEO, "pos_embed"),
    (MAE, IMAGE, "blocks.1.attn.qkv.bias"),
    (MAE | {"positions": "learned"}, IMAGE, "cls_token"),
]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(("values", "clip", "key"), OFFICIAL)
def test_an_export_in_the_official_layout_is_reimported_bit_for_bit(
    tmp_path: Path, values: dict[str, Any], clip: ClipConfig, key: str, suffix: str
) -> None:
    encoder, _ = publish(tmp_path / "e1", values, clip)
    output = tmp_path / f"out{suffix}"
    assert export(str(tmp_path / "e1"), "official", str(output)).deviation == 0
    state = load_file(output) if suffix == ".safetensors" else torch.load(output, weights_only=True)["model"]
    assert key in state
    back = Encoder(encoder.config, clip.grid, clip.token_values)
    load_starting_point(back, str(output), None, clip)
    own = encoder.state_dict()
    assert all(torch.equal(own[key], value) for key, value in back.state_dict().items())


def test_a_classifier_is_exported_in_the_layout_of_official_fine_tuning(tmp_path: Path) -> None:
    _, head = publish(tmp_path / "e1", BASE, VIDEO, head=HEAD)
    export(str(tmp_path / "e1"), "official", str(tmp_path / "out.pth"))
    state = torch.load(tmp_path / "out.pth", weights_only=True)["model"]
    assert {"fc_norm.weight", "head.weight", "patch_embed.proj.weight", "blocks.0.attn.v_bias"} <= set(state)
    assert "norm.weight" not in state
    assert head is not None
    assert torch.equal(state["head.weight"], head.weight)


@pytest.mark.parametrize(
    ("values", "clip", "head"),
    [(BASE, VIDEO, None), (MAE, IMAGE, HEAD), (MAE | {"positions": "learned"}, VIDEO, HEAD)],
)
def test_onnx_runs_with_any_batch_size(tmp_path: Path, values: dict, clip: ClipConfig, head: HeadCard | None) -> None:
    encoder, linear = publish(tmp_path / "e1", values, clip, head=head)
    export(str(tmp_path / "e1"), "onnx", str(tmp_path / "out.onnx"))
    session = onnxruntime.InferenceSession(str(tmp_path / "out.onnx"), providers=["CPUExecutionProvider"])
    for batch in (1, 4):
        pixels = pixels_of(clip, batch)
        (got,) = session.run(["logits" if head else "embedding"], {"pixels": pixels.numpy()})
        close(torch.from_numpy(got), expected(encoder, linear, clip, pixels))


def test_large_onnx_weights_are_written_to_a_second_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, _ = publish(tmp_path / "e1", BASE, VIDEO)
    monkeypatch.setattr(formats, "ONNX_LIMIT", 0)
    report = export(str(tmp_path / "e1"), "onnx", str(tmp_path / "moved" / "out.onnx"))
    assert sorted(report.files) == ["out.onnx", "out.onnx.data", "out.onnx.json"]
    session = onnxruntime.InferenceSession(str(tmp_path / "moved" / "out.onnx"), providers=["CPUExecutionProvider"])
    pixels = pixels_of(VIDEO)
    (got,) = session.run(None, {"pixels": pixels.numpy()})
    close(torch.from_numpy(got), expected(encoder, None, VIDEO, pixels))


def test_torch_export_runs_with_any_batch_size(tmp_path: Path) -> None:
    encoder, head = publish(tmp_path / "e1", MAE, IMAGE, head=HEAD)
    export(str(tmp_path / "e1"), "torch-export", str(tmp_path / "out.pt2"))
    assert zipfile.is_zipfile(tmp_path / "out.pt2")
    model = torch.export.load(tmp_path / "out.pt2").module()
    for batch in (1, 5):
        pixels = pixels_of(IMAGE, batch)
        with torch.no_grad():
            close(model(pixels), expected(encoder, head, IMAGE, pixels))


def test_an_unsupported_encoder_is_rejected_with_a_list_of_formats_that_support_it(tmp_path: Path) -> None:
    publish(tmp_path / "video", BASE | {"positions": "sincos_3d"}, VIDEO)
    message = rejection_message(tmp_path / "video", "timm", tmp_path / "out")
    assert "timm's ViT takes images, but this encoder takes clips of 4 frames" in message
    assert "formats that can: official, onnx, torch-export" in message
    assert "this encoder has sincos_3d position embeddings" in rejection_message(
        tmp_path / "video", "huggingface", tmp_path / "out"
    )
    publish(tmp_path / "image", MAE, IMAGE, head=HEAD)
    message = rejection_message(tmp_path / "image", "huggingface", tmp_path / "out")
    assert "uses the class token" in message
    assert "timm, official, onnx, torch-export" in message
    publish(tmp_path / "pooled", BASE, VIDEO, pooling="mean_then_norm")
    assert "does not support pooling" in rejection_message(tmp_path / "pooled", "huggingface", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_invalid_output_path_is_rejected_before_writing(tmp_path: Path) -> None:
    publish(tmp_path / "e1", BASE, VIDEO)
    assert "must end in .pth or .safetensors" in rejection_message(tmp_path / "e1", "official", tmp_path / "out.bin")
    (tmp_path / "out.onnx").write_text("mine")
    assert "already exists" in rejection_message(tmp_path / "e1", "onnx", tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx").read_text() == "mine"
    assert "choose one of timm" in rejection_message(tmp_path / "e1", "gguf", tmp_path / "out")


def test_an_export_whose_output_differs_is_never_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(tmp_path / "e1", BASE, VIDEO)
    accurate = EXPORTERS["official"]

    def write_inaccurate(model: formats.PixelEncoder, path: Path) -> formats.Written:
        written = accurate.write(model, path)
        return written._replace(run=lambda pixels: written.run(pixels) * 1.0001)

    monkeypatch.setitem(EXPORTERS, "official", accurate._replace(write=write_inaccurate))
    message = rejection_message(tmp_path / "e1", "official", tmp_path / "out.pth")
    assert "differs from the published encoder by 1.0e-04" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e1"]


def test_a_missing_library_is_reported_with_the_extra_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path / "e1", BASE, VIDEO)
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    assert "pip install 'amd-service[onnx]'" in rejection_message(tmp_path / "e1", "onnx", tmp_path / "out.onnx")


def test_the_sidecar_describes_input_output_and_licence(tmp_path: Path) -> None:
    teacher = {"weights": "videomae.pth"}
    publish(tmp_path / "e1", BASE, VIDEO, head=HEAD, weights_license="CC-BY-NC-4.0", teacher=teacher)
    report = export(str(tmp_path / "e1"), "torch-export", str(tmp_path / "out.pt2"))
    facts = json.loads((tmp_path / "out.pt2.json").read_text())
    assert facts["input"]["shape"] == [None, 3, 4, 16, 24]
    assert facts["input"]["mean"] == list(MEAN)
    assert facts["output"]["kind"] == "logits"
    assert facts["output"]["labels"] == list("abcde")
    assert (facts["weights_license"], facts["non_commercial"], facts["teacher"]) == ("CC-BY-NC-4.0", True, teacher)
    assert facts["deviation"] == report.deviation
    export(str(tmp_path / "e1"), "huggingface", str(tmp_path / "out"))
    page = (tmp_path / "out" / "README.md").read_text()
    assert page.startswith("---\nlicense: cc-by-nc-4.0\n")
    assert "VideoMAEForVideoClassification" in page
    point = load_starting_point(
        load_classifier(str(tmp_path / "e1"))[0].encoder, str(tmp_path / "out"), None, VIDEO, section="encoder"
    )
    assert point.weights_license == "cc-by-nc-4.0"


def test_an_export_is_written_to_s3(tmp_path: Path, s3_root: str) -> None:
    encoder, _ = publish(tmp_path / "e1", BASE, VIDEO)
    for format, name in (("official", "out.safetensors"), ("huggingface", "folder")):
        report = export(str(tmp_path / "e1"), format, f"{s3_root}/exports/{name}")
        assert isinstance(report, ExportReport)
        back = Encoder(encoder.config, VIDEO.grid, VIDEO.token_values)
        load_starting_point(back, f"{s3_root}/exports/{name}", None, VIDEO)
        assert all(torch.equal(a, b) for a, b in zip(back.parameters(), encoder.parameters(), strict=True))


def test_the_model_to_export_matches_the_published_classifier(tmp_path: Path) -> None:
    publish(tmp_path / "e1", BASE, VIDEO, head=HEAD)
    model = export_module._load(str(tmp_path / "e1"))
    classifier, card = load_classifier(str(tmp_path / "e1"))
    pixels = pixels_of(VIDEO)
    with torch.no_grad():
        close(model(pixels), classifier(*whole_clips(classifier.encoder, card.clip, pixels)))
