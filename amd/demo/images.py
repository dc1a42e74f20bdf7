"""What a student saw and what it made of it, as a picture: input, student's view, teacher's view, reconstruction.

Tensors in, views out; `draw_run` alone knows of runs.
Shapes: B samples shown, T frames, H height, W width, N tokens, P pixel values a token, R rebuilt.
"""

from __future__ import annotations

import io

import torch
from torch import Tensor

from amd.config import ClipConfig, TrainConfig
from amd.losses import normalized_pixels, rebuilt_pixels
from amd.masks import sample_token_sets
from amd.models.student import Student
from amd.reconstruction import as_clips, painted
from amd.storage import join, write_bytes
from amd.tokens import TokenSets, patchify, put_tokens, take_tokens
from amd.training.checkpoints.store import CheckpointStore
from amd.visualization import Views, as_bytes, draw

TEACHER_ONLY = (66, 135, 245)  # the frame around tokens that the teacher sees and the student does not


@torch.inference_mode()
def views(student: Student, clips: Tensor, sets: TokenSets, config: TrainConfig) -> Views:
    """Run the student on uint8 clips (B, 3, T, H, W). Raises ValueError for a student without a decoder."""
    clip = config.clip
    pixels = patchify(clips, clip.tubelet, clip.patch)  # (B, N, P) uint8
    answer = student(normalized_pixels(take_tokens(pixels, sets.student_visible), clip), sets)
    if answer.rebuilt is None:
        raise ValueError(
            "objective.weights.reconstruction=0: this student rebuilds no pixels, there is nothing to show"
        )
    original = take_tokens(pixels, sets.rebuilt)
    shown = as_bytes(rebuilt_pixels(answer.rebuilt, original, clip, config.objective.pixels))  # (B, R, P)
    seen = painted(pixels, sets.student_visible, clip)
    teacher = None
    if config.objective.kind == "amd":
        both = torch.cat([sets.student_visible, sets.teacher_only], dim=1)
        framed = _framed(take_tokens(pixels, sets.teacher_only), clip)
        teacher = as_clips(put_tokens(painted(pixels, both, clip), sets.teacher_only, framed), clip)
    return Views(clips, as_clips(seen, clip), teacher, as_clips(put_tokens(seen, sets.rebuilt, shown), clip))


def _framed(tokens: Tensor, clip: ClipConfig) -> Tensor:
    """Tokens (B, K, P) with a coloured rim, one pixel wide (at least a twelfth of the patch)."""
    cut = tokens.unflatten(-1, (clip.tubelet, clip.patch, clip.patch, 3)).clone()
    rim, colour = max(1, clip.patch // 12), torch.tensor(TEACHER_ONLY, dtype=torch.uint8)
    cut[..., :rim, :, :] = cut[..., -rim:, :, :] = cut[..., :, :rim, :] = cut[..., :, -rim:, :] = colour
    framed: Tensor = cut.flatten(2)
    return framed


def draw_run(root: str, folder: str, config: TrainConfig, clips: Tensor) -> str:
    """A page of clips, evenly out of `clips`, as the run's newest checkpoint sees them, in `root`/demo; its URL."""
    store = CheckpointStore(join(folder, "checkpoints"), config.checkpoint)
    found = store.load_newest()
    if found is None:
        raise FileNotFoundError(f"{folder}: no checkpoint to draw from")
    step, snapshot = found
    student = Student(config).eval()
    student.load_state_dict(snapshot.tensors["model"])
    wide = config.clip.frames > 1
    shown = clips[torch.linspace(0, len(clips) - 1, 6 if wide else 10).long()]
    draws = torch.Generator().manual_seed(0)  # the same masks for every student with the same ratios
    sets = sample_token_sets(config.mask, config.clip.grid, len(shown), draws)
    visible, tokens = sets.student_visible.shape[1], config.clip.grid.tokens
    sees = f"{'it' if config.objective.kind == 'mae' else 'the student'} sees {visible} of {tokens} tokens"
    if config.objective.kind == "amd":
        sees += f", its teacher {visible + sets.teacher_only.shape[1]} (blue: the teacher alone)"
    title = f"{config.name or 'student'}, after {step} steps"
    page = draw(views(student, shown, sets, config), title, sees, zoom=3 if wide else 4, across=3 if wide else None)
    data = io.BytesIO()
    page.save(data, "PNG")
    url = join(root, "demo", f"{config.name or 'student'}.png")
    write_bytes(url, data.getvalue())
    return url
