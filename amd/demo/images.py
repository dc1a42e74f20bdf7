"""Draw a student's masking and reconstruction: input, student view, teacher view, reconstructed clip.

Only `draw_run` depends on runs and storage.
Shapes: B samples, T frames, H height, W width, N tokens, P pixel values per token, R reconstructed tokens.
"""

from __future__ import annotations

import io

import torch
from torch import Tensor

from amd.config import TrainConfig
from amd.demo.report import pictures_url
from amd.lab.layers import student_view, teacher_view
from amd.losses import normalized_pixels, reconstructed_pixels
from amd.masks import sample_token_sets
from amd.models.student import Student
from amd.reconstruction import as_clips
from amd.storage import join, write_bytes
from amd.tokens import TokenSets, patchify, put_tokens, take_tokens
from amd.training.checkpoints.store import CheckpointStore
from amd.visualization import Views, as_bytes, draw


@torch.inference_mode()
def views(student: Student, clips: Tensor, sets: TokenSets, config: TrainConfig) -> Views:
    """Run the student on uint8 clips (B, 3, T, H, W). Raises ValueError if the student has no decoder."""
    clip = config.clip
    pixels = patchify(clips, clip.tubelet, clip.patch)  # (B, N, P) uint8
    output = student(normalized_pixels(take_tokens(pixels, sets.student_visible), clip), sets)
    if output.reconstructed is None:
        raise ValueError("objective.weights.reconstruction=0: this student has no decoder; choose a run with a decoder")
    original = take_tokens(pixels, sets.reconstructed)
    shown = as_bytes(reconstructed_pixels(output.reconstructed, original, clip, config.objective.pixels))  # (B, R, P)
    visible = student_view(pixels, sets, clip)
    teacher = None
    if config.objective.kind == "amd":
        teacher = as_clips(teacher_view(pixels, sets, clip), clip)
    return Views(
        clips, as_clips(visible, clip), teacher, as_clips(put_tokens(visible, sets.reconstructed, shown), clip)
    )


def draw_run(root: str, folder: str, config: TrainConfig, clips: Tensor, note: str = "") -> str:
    """Render evenly spaced samples of `clips` with the run's newest checkpoint.

    `note` is appended to the caption. Saves the image under `root`/demo and returns the image's URL.
    """
    store = CheckpointStore(join(folder, "checkpoints"), config.checkpoint)
    found = store.load_newest()
    if found is None:
        raise FileNotFoundError(f"{folder}: contains no checkpoint to render images from")
    step, snapshot = found
    student = Student(config).eval()
    student.load_state_dict(snapshot.tensors["model"])
    wide = config.clip.frames > 1
    shown = clips[torch.linspace(0, len(clips) - 1, 6 if wide else 10).long()]
    draws = torch.Generator().manual_seed(0)  # students with equal ratios get the same masks
    sets = sample_token_sets(config.mask, config.clip.grid, len(shown), draws)
    visible, tokens = sets.student_visible.shape[1], config.clip.grid.tokens
    caption = f"{'it' if config.objective.kind == 'mae' else 'the student'} sees {visible} of {tokens} tokens"
    if config.objective.kind == "amd":
        caption += f", its teacher {visible + sets.teacher_only.shape[1]} (blue: teacher-only)"
    caption += f"; {note}" if note else ""
    title = f"{config.name or 'student'}, after {step} steps"
    page = draw(views(student, shown, sets, config), title, caption, zoom=3 if wide else 4, across=3 if wide else None)
    data = io.BytesIO()
    page.save(data, "PNG")
    url = join(pictures_url(root), f"{config.name or 'student'}.png")
    write_bytes(url, data.getvalue())
    return url
