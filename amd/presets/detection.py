"""Action detection presets for AVA 2.2, a transfer task from the paper. Torch-free.

Values that neither the paper nor its code states are marked "our default".
"""

from __future__ import annotations

from typing import Any

from amd.config import DetectionConfig, validate
from amd.presets.preset import GPU_CPUS, GPU_READERS, UNSET, Preset
from amd.presets.pretraining import VIDEO


def _ava(size: str, *, base_lr: float, layer_decay: float, gpus: int) -> DetectionConfig:
    values: dict[str, Any] = {
        "clip": {**VIDEO, "sampling_rate_frames": 4},
        "encoder": {"size": size, "init": "trunc_normal", "drop_path": 0.2},
        "weights": f"{UNSET} an AMD ViT-{size} pre-trained on K400",
        "data": {
            "train": f"{UNSET} ava_train_v2.2.csv",
            "val": f"{UNSET} ava_val_v2.2.csv, or null",
            "boxes": f"{UNSET} a person detector's csv for val, or null",
            "excluded": f"{UNSET} ava_val_excluded_timestamps_v2.2.csv, or null",
            "label_map": f"{UNSET} ava_action_list_v2.2.pbtxt",
            "evaluated": f"{UNSET} ava_action_list_v2.2_for_activitynet_2019.pbtxt, or null",
            "flip": True,
            **GPU_READERS,
        },
        "optim": {"batch_size": 128, "base_lr": base_lr, "min_lr": 1e-6, "layer_decay": layer_decay},
        "schedule": {"epochs": 30, "warmup_epochs": 5},
        "evaluation": {"every_epochs": 10, "batch_size": 6, "checkpoint": "last", "size": (256, 464)},
        "scaling": {"workers": gpus, "device": "cuda", **GPU_CPUS},
    }
    return validate(DetectionConfig, values)


def _presets() -> dict[str, Preset[DetectionConfig]]:
    source = "VideoMAE-Action-Detection's scripts/ava from unsupervised K400; AMD has no recipe; no colour jitter"
    recipes = {
        "S": _ava("S", base_lr=1e-3, layer_decay=0.6, gpus=16),
        "B": _ava("B", base_lr=2.5e-4, layer_decay=0.75, gpus=32),
    }
    found = [
        Preset(f"ava-vit-{size.lower()}", f"ViT-{size} on AVA 2.2", source, f"{config.scaling.workers[0]} GPUs", config)
        for size, config in recipes.items()
    ]
    return {preset.name: preset for preset in found}


DETECTION_PRESETS = _presets()
