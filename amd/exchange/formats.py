"""Export formats: which encoders each format can represent, how an export is written, and how it is run.

A writer writes files to a local path, reloads them, and returns a function that maps pixels to outputs, which
`export` compares with our encoder. Optional libraries are imported where they are used.
Shapes: B batch, N tokens, D width, C classes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from amd.artifacts.card import Card
from amd.artifacts.weights import encode
from amd.config import ConfigError
from amd.config import ExportFormat as Format
from amd.exchange.huggingface import preprocessor, videomae_folder, vit_folder
from amd.exchange.initialization import fill_from
from amd.exchange.layouts import State
from amd.exchange.official import mae_encoder, mvd_encoder, videomae_encoder
from amd.exchange.source import open_source
from amd.models.encoder import Encoder

Run = Callable[[Tensor], Tensor]  # pixels in the format of `PixelEncoder.forward` -> (B, D) or (B, C)


class PixelEncoder(nn.Module):
    """An encoder and, if present, its head as one function of normalised pixels."""

    def __init__(self, encoder: Encoder, head: nn.Linear | None, card: Card) -> None:
        super().__init__()
        self.encoder, self.head, self.card = encoder, head, card

    def forward(self, pixels: Tensor) -> Tensor:
        """Map float32 pixels (B, 3, T, H, W), or (B, 3, H, W) for images, to embeddings (B, D) or logits (B, C)."""
        clips = pixels[:, :, None] if self.card.clip.is_image else pixels
        pooled = encode(self.encoder, self.card.clip, clips, self.card.pooling)
        return pooled if self.head is None else self.head(pooled)

    def tensors(self) -> tuple[State, Tensor]:
        """Return the encoder's weights without position embeddings, and the position embeddings (N, D)."""
        state = {key: value for key, value in self.encoder.state_dict().items() if key != "positions"}
        return state, self.encoder.positions.detach()

    def head_tensors(self, prefix: str) -> State:
        return {f"{prefix}.{key}": value for key, value in self.head.state_dict().items()} if self.head else {}


class Written(NamedTuple):
    run: Run
    usage: str
    """Instructions for loading the export, in Markdown."""


class Exporter(NamedTuple):
    suffixes: tuple[str, ...]
    """Suffixes of the exported file; empty if the export is a folder."""
    obstacle: Callable[[Card], str | None]
    """Function that returns the reason why the format cannot represent an encoder, or None if it can."""
    write: Callable[[PixelEncoder, Path], Written]


def _timm_obstacle(card: Card) -> str | None:
    return (
        None
        if card.clip.is_image
        else f"timm's ViT takes images, but this encoder takes clips of {card.clip.frames} frames"
    )


def _write_timm(model: PixelEncoder, folder: Path) -> Written:
    import timm

    card, encoder = model.card, model.card.encoder
    pooled = card.pooling == "mean_then_norm"
    state, table = model.tensors()
    save(mae_encoder(state, table, card.clip, pooled=pooled) | model.head_tensors("head"), folder / "model.safetensors")
    arguments = {
        "img_size": list(card.clip.size),
        "patch_size": card.clip.patch,
        "embed_dim": encoder.width,
        "depth": encoder.depth,
        "num_heads": encoder.heads,
        "mlp_ratio": encoder.mlp_ratio,
        "class_token": encoder.class_token,
        "global_pool": "avg",
        "fc_norm": pooled,
    }
    classes = card.head.classes if card.head else 0
    _write_json(
        folder / "config.json",
        {
            "architecture": TIMM_ARCHITECTURE,
            "num_classes": classes,
            "num_features": encoder.width,
            "global_pool": "avg",
            "model_args": arguments,
            "pretrained_cfg": {
                "input_size": [3, *card.clip.size],
                "fixed_input_size": True,
                "interpolation": card.interpolation,
                "crop_pct": 1.0,
                "crop_mode": "center",
                "mean": list(card.clip.mean),
                "std": list(card.clip.std),
                "num_classes": classes,
                "pool_size": None,
                "first_conv": "patch_embed.proj",
                "classifier": "head",
            },
            **({"label_names": list(card.head.labels)} if card.head and card.head.labels else {}),
        },
    )
    reloaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return Written(
        reloaded,
        '```python\nimport timm\n\nmodel = timm.create_model("local-dir:FOLDER", pretrained=True).eval()\n```\n\n'
        "`config.json` contains the arguments under `model_args`, for use with `model.load_state_dict`.",
    )


TIMM_ARCHITECTURE = "vit_base_patch16_224"  # a plain ViT; model_args contains all differences


def _hugging_face_obstacle(card: Card) -> str | None:
    if _fits_videomae(card):
        if (card.head is not None) == (card.pooling == "mean_then_norm"):
            return None
        return f"VideoMAE does not support pooling={card.pooling} {'with' if card.head else 'without'} a head"
    if not (card.clip.is_image and card.encoder.class_token):
        kind = card.encoder.positions
        return (
            "VideoMAE has 1-D sine-cosine position embeddings with base 10000 and no class token; ViT has a class "
            f"token and takes images; this encoder has {kind} position embeddings with base "
            f"{card.encoder.position_base:g}, "
            f"{'a' if card.encoder.class_token else 'no'} class token, and {card.clip.frames} frames"
        )
    if card.head is not None or card.pooling != "mean":
        return "ViTForImageClassification uses the class token, but this encoder uses the mean of the other tokens"
    return None


def _fits_videomae(card: Card) -> bool:
    encoder = card.encoder
    return not encoder.class_token and encoder.positions == "sincos_1d" and encoder.position_base == 10_000


def _write_hugging_face(model: PixelEncoder, folder: Path) -> Written:
    transformers = _library("transformers", "huggingface")
    card = model.card
    state, table = model.tensors()
    if _fits_videomae(card):
        tensors, config = videomae_folder(state | model.head_tensors("classifier"), card)
    else:
        tensors, config = vit_folder(state, table, card)
    save(tensors, folder / "model.safetensors")
    _write_json(folder / "config.json", config)
    _write_json(folder / "preprocessor_config.json", preprocessor(card))
    name = config["architectures"][0]
    options = {"add_pooling_layer": False} if name == "ViTModel" else {}
    reloaded, loading_info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True, **options)
    mismatched = {kind: sorted(keys) for kind, keys in loading_info.items() if keys}
    if mismatched:
        raise ConfigError([f"transformers {transformers.__version__} does not load all of {name}: {mismatched}"])
    reloaded.eval()

    def run(pixels: Tensor) -> Tensor:
        if name == "ViTModel":
            hidden: Tensor = reloaded(pixels).last_hidden_state[:, 1:]
            return hidden.mean(dim=1)
        frames = pixels[:, None] if card.clip.is_image else pixels.transpose(1, 2)  # (B, T, 3, H, W)
        if card.head:
            logits: Tensor = reloaded(frames).logits
            return logits
        pooled: Tensor = reloaded(frames).last_hidden_state.mean(dim=1)
        return pooled

    call = "logits = model(pixel_values).logits" if card.head else "embedding = model(pixel_values).last_hidden_state"
    if not card.head:
        call += "[:, 1:].mean(dim=1)  # without the class token" if name == "ViTModel" else ".mean(dim=1)"
    extra = ", add_pooling_layer=False" if options else ""
    return Written(
        run,
        f'```python\nfrom transformers import AutoImageProcessor, {name}\n\nmodel = {name}.from_pretrained("FOLDER"'
        f'{extra}).eval()\nprocessor = AutoImageProcessor.from_pretrained("FOLDER")\n{call}\n```',
    )


def _write_official(model: PixelEncoder, path: Path) -> Written:
    card = model.card
    pooled = card.pooling == "mean_then_norm"
    state, table = model.tensors()
    if card.encoder.class_token and card.clip.is_image:
        layout, tensors = "MAE", mae_encoder(state, table, card.clip, pooled=pooled)
    elif _fits_videomae(card):
        layout, tensors = "VideoMAE", videomae_encoder(state, card.clip, pooled=pooled)
    else:
        layout, tensors = "MVD", mvd_encoder(state, table, card.clip, pooled=pooled)
    tensors |= model.head_tensors("head")
    if path.suffix == ".safetensors":
        save(tensors, path)
    else:
        torch.save({"model": {key: value.cpu().contiguous() for key, value in tensors.items()}}, path)
    return Written(_reimport(str(path), card), f"Keys as in the official {layout} code, under `model` in a torch file.")


def _reimport(url: str, card: Card) -> Run:
    """Reload the file as third-party weights."""
    encoder = Encoder(card.encoder, card.clip.grid, card.clip.token_values).eval()
    source = open_source(url, None, card.clip)
    fill_from(encoder, source, card.clip)
    head = None
    if card.head:
        head = nn.Linear(card.encoder.width, card.head.classes)
        head.load_state_dict(source.head())
    return PixelEncoder(encoder, head, card).eval()


ONNX_LIMIT = 1.9e9  # bytes; an ONNX file is limited to 2 GiB, larger weights go to a second file next to it


def _write_onnx(model: PixelEncoder, path: Path) -> Written:
    _library("onnx", "onnx")
    _library("onnxscript", "onnx")
    runtime = _library("onnxruntime", "onnx")
    name = model.card.output
    torch.onnx.export(
        model,
        (example(model.card, batch=2),),
        str(path),
        input_names=["pixels"],
        output_names=[name],
        dynamic_shapes={"pixels": {0: torch.export.Dim("batch")}},
        dynamo=True,
        external_data=sum(p.numel() * p.element_size() for p in model.parameters()) > ONNX_LIMIT,
        verbose=False,
    )
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(pixels: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"pixels": pixels.numpy()})[0])

    return Written(
        run,
        '```python\nimport onnxruntime\n\nsession = onnxruntime.InferenceSession("FILE")\n'
        f'{name} = session.run(["{name}"], {{"pixels": pixels}})[0]\n```',
    )


def _write_torch_export(model: PixelEncoder, path: Path) -> Written:
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (example(model.card, batch=2),), dynamic_shapes={"pixels": {0: batch}})
    torch.export.save(program, path)
    run: Run = torch.export.load(path).module()
    usage = f'model = torch.export.load("FILE").module()\n{model.card.output} = model(pixels)'
    return Written(run, f"```python\nimport torch\n\n{usage}\n```")


EXPORTERS: dict[Format, Exporter] = {
    "timm": Exporter((), _timm_obstacle, _write_timm),
    "huggingface": Exporter((), _hugging_face_obstacle, _write_hugging_face),
    "official": Exporter((".pth", ".safetensors"), lambda card: None, _write_official),
    "onnx": Exporter((".onnx",), lambda card: None, _write_onnx),
    "torch-export": Exporter((".pt2",), lambda card: None, _write_torch_export),
}


def example(card: Card, batch: int) -> Tensor:
    """Return random pixels for `PixelEncoder.forward`, identical on every call."""
    frames = () if card.clip.is_image else (card.clip.frames,)
    return torch.randn(batch, 3, *frames, *card.clip.size, generator=torch.Generator().manual_seed(0))


def save(tensors: State, path: Path) -> None:
    """Write a safetensors file whose metadata marks it as written by PyTorch."""
    save_file({key: value.cpu().contiguous() for key, value in tensors.items()}, path, metadata={"format": "pt"})


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")


def _library(name: str, extra: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise ConfigError([f"this format requires {name}: pip install 'amd-service[{extra}]'"]) from None
