"""Pre-training presets: the paper's video and image recipes, their teachers, and the demo. Torch-free.

Values that neither the paper nor its code states are marked "our default" in the preset's source.
"""

from __future__ import annotations

from typing import Any

from amd.config import TrainConfig, validate
from amd.presets.demo import DEMO_PRESETS
from amd.presets.preset import GPU_CPUS, GPU_READERS, UNSET, Preset

VIDEO = {"frames": 16, "size": 224, "patch": 16, "tubelet": 2}
IMAGE = {"frames": 1, "size": 224, "patch": 16, "tubelet": 1}
VIDEO_DECODERS = {  # as in VideoMAE: half the encoder's width, 64 per head
    "S": {"width": 192, "depth": 4, "heads": 3},
    "B": {"width": 384, "depth": 4, "heads": 6},
    "L": {"width": 512, "depth": 12, "heads": 8},
}
IMAGE_DECODER = {"width": 512, "depth": 8, "heads": 16, "input_bias": True}
IMAGE_ENCODER = {"class_token": True, "positions": "sincos_2d", "init": "xavier"}
MIDDLE_AND_LAST = [{"student": 6, "teacher": 12}, {"student": 12, "teacher": 24}]
VIDEOMAE_LICENSE = "CC-BY-NC-4.0"

K400 = {"sampling_rate_frames": 4}, {"sampling": "strided"}, 240_436
SSV2 = {"sampling_rate_frames": 2}, {"sampling": "window"}, 168_913
IN1K_SAMPLES = 1_281_167


def _video_amd(data: str, size: str) -> TrainConfig:
    clip, sampling, _ = K400 if data == "K400" else SSV2
    return validate(
        TrainConfig,
        {
            "clip": {**VIDEO, **clip},
            "student": {"encoder": {"size": size}, "decoder": VIDEO_DECODERS[size], "generator": {"depth": 2}},
            "teacher": {
                "encoder": {"size": "L"},
                "weights": f"{UNSET} VideoMAE ViT-L pre-trained on {data}",
                "weights_license": VIDEOMAE_LICENSE,
            },
            "mask": {"strategy": "tube", "student_ratio": 0.9, "teacher_ratio": 0.75},
            "objective": {"kind": "amd", "layers": MIDDLE_AND_LAST, "pixels": "per_channel"},
            "data": {"train": UNSET, "crop": "multi_scale", "repeats": 4, **GPU_READERS, **sampling},
            "optim": {"batch_size": 512, "base_lr": 1.2e-3, "min_lr": 1e-5, "clip_norm": 0.02},
            "schedule": {"epochs": 200, "warmup_epochs": 10},
            "scaling": {"workers": 32, "device": "cuda", **GPU_CPUS},
        },
    )


def _video_teacher(data: str, batch: int, epochs: int) -> TrainConfig:
    clip, sampling, _ = K400 if data == "K400" else SSV2
    return validate(
        TrainConfig,
        {
            "clip": {**VIDEO, **clip},
            "student": {"encoder": {"size": "L"}, "decoder": VIDEO_DECODERS["L"]},
            "mask": {"strategy": "tube", "student_ratio": 0.9, "teacher_ratio": 0.9},
            "objective": {"kind": "mae", "pixels": "per_channel"},
            "data": {"train": UNSET, "crop": "multi_scale", **GPU_READERS, **sampling},
            "optim": {"batch_size": batch, "base_lr": 1.5e-4, "min_lr": 1e-5},
            "schedule": {"epochs": epochs, "warmup_epochs": 40},
            "scaling": {"workers": 32, "device": "cuda", **GPU_CPUS},
        },
    )


def _image(encoder: str) -> dict[str, Any]:
    """Return the values of MAE's image recipe, shared by teacher and student."""
    return {
        "clip": IMAGE,
        "student": {"encoder": {"size": encoder, **IMAGE_ENCODER}, "decoder": IMAGE_DECODER},
        "mask": {"strategy": "random", "student_ratio": 0.75, "teacher_ratio": 0.75},
        "objective": {"kind": "mae", "pixels": "per_patch"},
        "data": {
            "train": UNSET,
            "crop": "random_resized",
            "crop_scale": (0.2, 1.0),
            "flip": True,
            "interpolation": "bicubic",
            **GPU_READERS,
        },
        "optim": {"batch_size": 4096, "base_lr": 1.5e-4, "min_lr": 0.0},
        "schedule": {"epochs": 800, "warmup_epochs": 40},
        "scaling": {"workers": 32, "device": "cuda", **GPU_CPUS},
    }


def _image_amd(size: str) -> TrainConfig:
    values = _image(size)
    values["teacher"] = {
        "encoder": {"size": "L", **IMAGE_ENCODER},
        "weights": f"{UNSET} MAE ViT-L pre-trained on IN1K (mae_pretrain_vit_large.pth)",
        "weights_license": "CC-BY-NC-4.0",
    }
    values["mask"] = {"strategy": "random", "student_ratio": 0.75, "teacher_ratio": 0.5}
    values["objective"] = {"kind": "amd", "layers": MIDDLE_AND_LAST, "pixels": "per_patch"}
    values["student"]["generator"] = {"depth": 2}
    return validate(TrainConfig, values)


def _presets() -> dict[str, Preset[TrainConfig]]:
    """Return all presets in the order in which they are listed: first the demo's, which any machine can run."""
    found = []
    for name, make in DEMO_PRESETS.items():
        note = (make.__doc__ or "").strip().split("\n")[0]
        found.append(Preset(name, note, "our default", "2 CPU cores", make()))
    for data, samples in (("K400", K400[2]), ("SSv2", SSV2[2])):
        for size, figure in {"S": {"K400": 80.1, "SSv2": 70.2}, "B": {"K400": 82.2, "SSv2": 73.3}}.items():
            found.append(
                Preset(
                    f"{data.lower()}-vit-{size.lower()}",
                    f"AMD, ViT-{size} student of a VideoMAE ViT-L, on {data}",
                    f"AMD paper and scripts/pretrain: {figure[data]} % top-1 after fine-tuning",
                    "32 GPUs of 80 GB (paper: A100)",
                    _video_amd(data, size),
                    samples,
                )
            )
        found.append(
            Preset(
                f"{data.lower()}-vit-l-teacher",
                f"VideoMAE ViT-L, the teacher for {data}",
                "VideoMAE's scripts and model zoo; workers are our default",
                "32 GPUs of 80 GB (our default)",
                _video_teacher(data, 512, 1600 if data == "K400" else 2400),
                samples,
            )
        )
    for size, top1 in {"S": 82.1, "B": 84.6}.items():
        found.append(
            Preset(
                f"in1k-vit-{size.lower()}",
                f"AMD for images, ViT-{size} student of an MAE ViT-L, on ImageNet-1K",
                f"AMD paper: {top1} % top-1, 800 epochs, middle and last block; the paper does not state the rest: "
                "teacher ratio, generator depth, learning rate, batch, warm-up, workers are our default (MAE's values)",
                "32 GPUs (our default)",
                _image_amd(size),
                IN1K_SAMPLES,
            )
        )
    found.append(
        Preset(
            "in1k-vit-l-teacher",
            "MAE ViT-L, the teacher for ImageNet-1K",
            "MAE's PRETRAIN.md; workers are our default",
            "64 V100, about 42 h (MAE's README)",
            validate(TrainConfig, _image("L")),
            IN1K_SAMPLES,
        )
    )
    return {preset.name: preset for preset in found}


PRESETS = _presets()
