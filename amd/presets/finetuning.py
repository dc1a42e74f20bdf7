"""Fine-tuning presets: the paper's target data sets and the demo. Torch-free.

Values that neither the paper nor its code states are marked "our default".
"""

from __future__ import annotations

from typing import Any

from amd.config import FinetuneConfig, validate
from amd.presets.demo import ENCODER as DEMO_ENCODER
from amd.presets.demo import IMAGE as DEMO_IMAGE
from amd.presets.demo import VIDEO as DEMO_VIDEO
from amd.presets.preset import GPU_CPUS, GPU_READERS, UNSET, Preset
from amd.presets.pretraining import IMAGE, IMAGE_ENCODER, VIDEO

DENSE = {"sampling": "window"}  # official training sampler of dense data sets; the test uses strided sampling
TSN = {"sampling": "segments"}
MAE_FINAL_LR = 1e-6


def _video(
    size: str,
    pretrained_on: str,
    *,
    classes: int,
    batch: int,
    epochs: int,
    base_lr: float,
    sampling: dict[str, str],
    rate: int,
    views: tuple[int, int],
    flip: bool = True,
    layer_decay: float = 0.75,
    drop_path: float = 0.1,
    head_dropout: float = 0.0,
    min_lr: float = 1e-6,
) -> FinetuneConfig:
    values: dict[str, Any] = {
        "clip": {**VIDEO, "sampling_rate_frames": rate},
        "encoder": {"size": size, "init": "trunc_normal", "drop_path": drop_path},
        "weights": f"{UNSET} an AMD ViT-{size} pre-trained on {pretrained_on}",
        "head": {"classes": classes, "dropout": head_dropout},
        "data": {
            "train": UNSET,
            "crop": "random_resized",
            "crop_scale": (0.08, 1.0),
            "flip": flip,
            "rand_augment": "rand-m7-n4-mstd0.5-inc1",
            "repeats": 2,
            **GPU_READERS,
            **sampling,
        },
        "optim": {"batch_size": batch, "base_lr": base_lr, "min_lr": min_lr, "layer_decay": layer_decay},
        "schedule": {"epochs": epochs, "warmup_epochs": 5},
        "evaluation": {
            "checkpoint": "last",
            "views": {
                "segments": views[0],
                "crops": views[1],
                "sampling": "segments" if sampling is TSN else "dense",
            },
        },
        "scaling": {"workers": batch // 16, "device": "cuda", **GPU_CPUS},
    }
    return validate(FinetuneConfig, values)


def _image(size: str, *, epochs: int, base_lr: float, layer_decay: float) -> FinetuneConfig:
    batch = 1024
    values: dict[str, Any] = {
        "clip": IMAGE,
        "encoder": {"size": size, **IMAGE_ENCODER, "drop_path": 0.1},
        "weights": f"{UNSET} an AMD ViT-{size} pre-trained on IN1K",
        "head": {"classes": 1000},
        "data": {
            "train": UNSET,
            "crop": "random_resized",
            "crop_scale": (0.08, 1.0),
            "flip": True,
            "interpolation": "bicubic",
            "center_fraction": 0.875,
            "rand_augment": "rand-m9-mstd0.5-inc1",
            **GPU_READERS,
        },
        # MAE does not scale its final learning rate with the batch; ours is per 256 samples.
        "optim": {
            "batch_size": batch,
            "base_lr": base_lr,
            "min_lr": MAE_FINAL_LR * 256 / batch,
            "layer_decay": layer_decay,
        },
        "schedule": {"epochs": epochs, "warmup_epochs": 5},
        "evaluation": {"checkpoint": "last"},
        "scaling": {"workers": 8, "device": "cuda", **GPU_CPUS},
    }
    return validate(FinetuneConfig, values)


def _demo(modality: dict[str, Any], *, epochs: int, lr: float, test: str) -> FinetuneConfig:
    """Return a config with 10 labelled samples per class, so few that the initial weights matter; tuned on `select`."""
    data = modality["data"]["train"]
    batch = 20
    values: dict[str, Any] = {
        "clip": modality["clip"],
        "encoder": {"size": "demo-student", **DEMO_ENCODER},
        "weights": f"{UNSET} an encoder of the demo, such as `amd encoders list` shows after `make demo`",
        "data": {
            "train": f"{data}/few",
            "val": f"{data}/select",
            "test": f"{data}/{test}",
            "sampling": modality["data"].get("sampling", "strided"),
            "crop": "center",
            "loader_workers": 1,
        },
        "augment": {"mix_prob": 0.0, "erase_prob": 0.0, "label_smoothing": 0.1},
        "optim": {
            "batch_size": batch,
            "base_lr": lr * 256 / batch,
            "min_lr": 0.0,
            "clip_norm": 1.0,
            "layer_decay": 1.0,
        },
        "schedule": {"epochs": epochs, "warmup_epochs": 2},
        "evaluation": {"every_epochs": 20, "batch_size": 100},
        "checkpoint": {"keep_last": 1},
        "scaling": {"workers": 1, "threads_per_worker": 1, "device": "cpu"},
        "tracking": {"log_every_steps": 50, "tensorboard": False},
    }
    return validate(FinetuneConfig, values)


def _preset(data: str, size: str, accuracy: str, source: str, config: FinetuneConfig) -> Preset[FinetuneConfig]:
    """Return a preset for one of the paper's data sets. `accuracy`: top-1 accuracy in the paper."""
    return Preset(
        f"{data.lower()}-vit-{size.lower()}-finetune",
        f"ViT-{size} on {data}, {accuracy} in the paper",
        source,
        f"{config.scaling.workers[0]} GPUs",
        config,
    )


def _presets() -> dict[str, Preset[FinetuneConfig]]:
    k400: dict[str, Any] = {"classes": 400, "batch": 512, "sampling": DENSE, "rate": 4, "views": (5, 3)}
    ssv2: dict[str, Any] = {"classes": 174, "batch": 256, "sampling": TSN, "rate": 2, "views": (2, 3), "flip": False}
    ucf: dict[str, Any] = {
        "classes": 101,
        "batch": 128,
        "sampling": DENSE,
        "rate": 4,
        "views": (5, 3),
        "epochs": 100,
        "base_lr": 5e-4,
        "min_lr": 1e-5,
        "layer_decay": 0.7,
        "drop_path": 0.2,
        "head_dropout": 0.5,
    }
    hmdb: dict[str, Any] = {**ucf, "classes": 51, "rate": 2, "epochs": 50, "base_lr": 1e-3}
    paper = "AMD's scripts/finetune"
    ucf_source = "AMD has no recipe: VideoMAE's for ViT-B on UCF101; our default for ViT-S"
    hmdb_source = "AMD has no recipe: UCF101's, with VideoMAE's stride, rate and length from memory: our default"
    mae_source = (
        "AMD has no image recipe: MAE's FINETUNE.md for ViT-B; min_lr = 1e-6 x 256 / batch_size, as MAE's is absolute"
    )
    g2sd_source = "AMD has no image recipe: G2SD's length and rate for ViT-S, otherwise MAE's: our default"
    demo = []
    for key, modality, what in (("image", DEMO_IMAGE, "digits"), ("video", DEMO_VIDEO, "the motion of digits")):
        config = _demo(modality, epochs=60, lr=1e-3, test="test")
        summary = f"the demo's 64 x 4 encoder on {what}, 10 labelled samples per class"
        demo.append(Preset(f"demo-{key}-finetune", summary, "our default", "1 CPU core", config))
    found = [
        *demo,
        _preset("K400", "S", "80.1 %", paper, _video("S", "K400", epochs=150, base_lr=1e-3, **k400)),
        _preset("K400", "B", "82.2 %", paper, _video("B", "K400", epochs=90, base_lr=7e-4, **k400)),
        _preset("SSv2", "S", "70.2 %", paper, _video("S", "SSv2", epochs=40, base_lr=1e-3, **ssv2)),
        _preset("SSv2", "B", "73.3 %", paper, _video("B", "SSv2", epochs=30, base_lr=5e-4, **ssv2)),
        _preset("UCF101", "S", "B 97.1 %", ucf_source, _video("S", "K400", **ucf)),
        _preset("HMDB51", "S", "B 79.6 %", hmdb_source, _video("S", "K400", **hmdb)),
        _preset("UCF101", "B", "B 97.1 %", ucf_source, _video("B", "K400", **ucf)),
        _preset("HMDB51", "B", "B 79.6 %", hmdb_source, _video("B", "K400", **hmdb)),
        _preset("IN1K", "B", "84.6 %", mae_source, _image("B", epochs=100, base_lr=5e-4, layer_decay=0.65)),
        _preset("IN1K", "S", "82.1 %", g2sd_source, _image("S", epochs=200, base_lr=1e-3, layer_decay=0.75)),
    ]
    return {preset.name: preset for preset in found}


FINETUNE_PRESETS = _presets()
