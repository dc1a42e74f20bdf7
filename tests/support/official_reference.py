"""Reference implementation of the official AMD and MAE code in plain torch, for generating golden folders of any size.

Does not import `amd`. Uses convolutions, boolean masks, loops and an explicit softmax. Parameters have the official
names, so that state dicts have the official layout. Implements only the values that golden folders record.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def sinusoid(tokens: int, width: int) -> Tensor:
    table = np.zeros((tokens, width))
    for position in range(tokens):
        for j in range(width):
            angle = position / 10000 ** (2 * (j // 2) / width)
            table[position, j] = np.sin(angle) if j % 2 == 0 else np.cos(angle)
    return torch.tensor(table, dtype=torch.float32)


def grid_positions(height: int, width: int, dim: int) -> Tensor:
    """Return MAE's position embeddings: columns in the first half of the width, rows in the second, and zeros for the
    class token."""
    omega = 1 / 10000 ** (np.arange(dim // 4) / (dim / 4))
    rows = [
        np.concatenate([np.sin(x * omega), np.cos(x * omega), np.sin(y * omega), np.cos(y * omega)])
        for y in range(height)
        for x in range(width)
    ]
    return torch.tensor(np.stack([np.zeros(dim), *rows]), dtype=torch.float32)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        self.qkv = nn.Linear(dim, 3 * dim, bias=fused)
        if not fused:
            self.q_bias, self.v_bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        bias = self.qkv.bias if self.fused else torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        q, k, v = (x @ self.qkv.weight.T + bias).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        weights = ((q * (d // self.heads) ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, d))


class Mlp(nn.Module):
    def __init__(self, dim: int, ratio: float) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, int(dim * ratio)), nn.Linear(int(dim * ratio), dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, ratio: float = 4.0, fused: bool = False) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), Attention(dim, heads, fused)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=1e-6), Mlp(dim, ratio)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, dim: int, kernel: tuple[int, ...]) -> None:
        super().__init__()
        convolution = nn.Conv3d if len(kernel) == 3 else nn.Conv2d
        self.proj = convolution(3, dim, kernel, stride=kernel)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Tower(nn.Module):
    """A ViT that embeds all tokens, adds position embeddings and passes only the selected tokens to its blocks."""

    def __init__(self, c: dict[str, Any], kernel: tuple[int, ...], tokens: int, ratio: float) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(c["embed_dim"], kernel)
        self.blocks = nn.ModuleList(Block(c["embed_dim"], c["num_heads"], ratio) for _ in range(c["depth"]))
        self.layers = c["layers"]
        self.table = sinusoid(tokens, c["embed_dim"])

    def features(self, video: Tensor, groups: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        x = self.patch_embed(video) + self.table.to(video.dtype)
        x = torch.cat([x[keep].reshape(x.shape[0], -1, x.shape[-1]) for keep in groups], dim=1)
        taps = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i + 1 in self.layers:
                taps.append(x)
        return x, taps


class TeacherModel(Tower):
    def __init__(self, c: dict[str, Any], kernel: tuple[int, ...], tokens: int, ratio: float) -> None:
        super().__init__(c, kernel, tokens, ratio)
        self.fc_norm, self.head = nn.LayerNorm(c["embed_dim"]), nn.Linear(c["embed_dim"], 5)


class StudentEncoder(Tower):
    def __init__(self, c: dict[str, Any], kernel: tuple[int, ...], tokens: int, ratio: float, teacher: int) -> None:
        super().__init__(c, kernel, tokens, ratio)
        self.norm = nn.LayerNorm(c["embed_dim"], eps=1e-6)
        self.projection_heads = nn.ModuleList(nn.Linear(c["embed_dim"], teacher, bias=False) for _ in c["layers"])


class BlockStack(nn.Module):
    def __init__(self, dim: int, depth: int, heads: int, ratio: float, out: int | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, heads, ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        if out is not None:
            self.head = nn.Linear(dim, out)

    def forward(self, x: Tensor, last: int) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, -last:])) if hasattr(self, "head") else x[:, -last:]


class StudentModel(nn.Module):
    def __init__(self, s: dict[str, Any], teacher: int, kernel: tuple[int, ...], tokens: int, ratio: float) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.randn(1, 1, s["decoder_embed_dim"]) * 0.1)
        self.encoder = StudentEncoder(s, kernel, tokens, ratio, teacher)
        heads, depth = s["generator_num_heads"], s["generator_depth"]
        self.generators = nn.ModuleList(BlockStack(teacher, depth, heads, ratio) for _ in s["layers"])
        width, values = s["decoder_embed_dim"], 3 * int(np.prod(kernel))
        self.decoder = BlockStack(width, s["decoder_depth"], s["decoder_num_heads"], ratio, values)
        self.encoder_to_decoder = nn.Linear(s["embed_dim"], width, bias=False)
        self.tokens = [torch.randn(1, 1, teacher) * 0.1 for _ in s["layers"]]  # not parameters, as in the official code
        self.decoder_table, self.generator_table = sinusoid(tokens, width), sinusoid(tokens, teacher)

    def forward(self, video: Tensor, hidden: Tensor, diff: Tensor) -> dict[str, Any]:
        b = video.shape[0]

        def positions(table: Tensor, keep: Tensor) -> Tensor:
            return table.to(video.dtype).expand(b, -1, -1)[keep].reshape(b, -1, table.shape[-1])

        x, taps = self.encoder.features(video, [~hidden])
        normed = self.encoder.norm(x)
        projected = [head(tap) for head, tap in zip(self.encoder.projection_heads, taps, strict=True)]
        generated = []
        for generator, token, features in zip(self.generators, self.tokens, projected, strict=True):
            queries = token + positions(self.generator_table, diff)
            full = torch.cat([features + positions(self.generator_table, ~hidden), queries], dim=1)
            generated.append(generator(full, queries.shape[1]))
        queries = self.mask_token + positions(self.decoder_table, hidden)
        visible = self.encoder_to_decoder(normed) + positions(self.decoder_table, ~hidden)
        recon = self.decoder(torch.cat([visible, queries], dim=1), queries.shape[1])
        return {"recon": recon, "encoder_out_normed": normed, "dir": projected, "gen": generated}


def _perturb(model: nn.Module, generator: torch.Generator) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def _cubes(video: Tensor, t: int, p: int) -> Tensor:
    """Cut a video into tokens: (B, 3, T, H, W) -> (B, N, t*p*p, 3)."""
    b, _, frames, height, width = video.shape
    tokens = [
        video[:, :, i : i + t, y : y + p, x : x + p].permute(0, 2, 3, 4, 1).reshape(b, -1, 3)
        for i in range(0, frames, t)
        for y in range(0, height, p)
        for x in range(0, width, p)
    ]
    return torch.stack(tokens, dim=1)


def make_amd(folder: Path, config: dict[str, Any], seed: int = 0) -> None:
    """Write the tensor files and amd_meta.json of an AMD case. `config` is the `config` entry in amd_meta.json."""
    torch.manual_seed(seed)
    draws, numpy = torch.Generator().manual_seed(seed + 1), np.random.RandomState(seed)
    s, t = config["student"], config["teacher"]
    size = config["img_size"] if isinstance(config["img_size"], list) else [config["img_size"]] * 2
    p, tubelet, b = config["patch_size"], config["tubelet_size"], config["batch"]
    grid = [config["num_frames"] // tubelet, size[0] // p, size[1] // p]
    per_frame, tokens = grid[1] * grid[2], grid[0] * grid[1] * grid[2]
    kernel, ratio = (tubelet, p, p), config["mlp_ratio"]
    teacher = TeacherModel(t, kernel, tokens, ratio).eval()
    student = StudentModel(s, t["embed_dim"], kernel, tokens, ratio)
    _perturb(teacher, draws)
    _perturb(student, draws)
    unit = torch.rand(b, 3, config["num_frames"], *size, generator=draws)
    video = (unit - torch.tensor(MEAN).view(1, 3, 1, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1, 1)
    counts = [int(config["mask_ratio"] * per_frame), int(config["mask_ratio_teacher"] * per_frame)]
    codes = []
    for _ in range(b):
        code = np.array([0] * (per_frame - counts[0]) + [1] * (counts[0] - counts[1]) + [2] * counts[1])
        numpy.shuffle(code)
        codes.append(np.tile(code, grid[0]))
    code = torch.tensor(np.stack(codes))
    hidden, diff = code > 0, code == 1

    def run(precision: torch.dtype, model: StudentModel) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        clip = video.to(precision)
        with torch.no_grad():
            _, targets = copy.deepcopy(teacher).to(precision).features(clip, [~hidden, diff])
        shown, extra = int((~hidden[0]).sum()), int(diff[0].sum())
        mean, std = (torch.tensor(v).view(1, 3, 1, 1, 1) for v in (MEAN, STD))
        cubes = _cubes(clip * std + mean, tubelet, p)
        normed = (cubes - cubes.mean(-2, keepdim=True)) / (cubes.var(-2, unbiased=True, keepdim=True).sqrt() + 1e-6)
        labels = {"norm": normed, "unnorm": cubes}
        out: dict[str, Tensor] = {
            f"labels_{k}": v.flatten(2)[hidden].reshape(b, -1, v[0, 0].numel()) for k, v in labels.items()
        }
        outputs = model(clip, hidden, diff)
        out |= {"recon": outputs["recon"], "encoder_out_normed": outputs["encoder_out_normed"]}
        for i, target in enumerate(targets):
            out |= {f"teacher_dir.{i}": target[:, :shown], f"teacher_gen.{i}": target[:, -extra:]}
            out |= {f"student_dir_proj.{i}": outputs["dir"][i], f"student_gen_pred.{i}": outputs["gen"][i]}
        losses: dict[str, Tensor] = {}
        distances = {"": nn.MSELoss(), "_l1": nn.L1Loss(), "_sml1": nn.SmoothL1Loss()}
        losses["loss_mae"] = nn.functional.mse_loss(out["recon"], out["labels_norm"])
        losses["loss_mae_unnorm"] = nn.functional.mse_loss(out["recon"], out["labels_unnorm"])
        for suffix, distance in distances.items():
            for part, ours in (("dir", "student_dir_proj"), ("gen", "student_gen_pred")):
                terms = [distance(out[f"{ours}.{i}"], out[f"teacher_{part}.{i}"]) for i in range(len(targets))]
                losses[f"loss_{part}{suffix}"] = sum(terms) / len(terms)
            total = losses["loss_mae"] + losses[f"loss_dir{suffix}"] + losses[f"loss_gen{suffix}"]
            losses[f"loss_total{suffix}"] = total
        losses["loss_total_unnorm"] = losses["loss_mae_unnorm"] + losses["loss_dir"] + losses["loss_gen"]
        return out, losses

    def save(name: str, tensors: dict[str, Tensor]) -> None:
        save_file({k: v.detach().contiguous() for k, v in tensors.items()}, folder / f"{name}.safetensors")

    meta: dict[str, Any] = {"config": {**config, "grid": grid, "qkv_bias": True, "ln_eps": 1e-6}}
    save("teacher_state", teacher.state_dict())
    save("student_state", student.state_dict())
    save("student_extra", {f"generator_mask_tokens.{i}": token for i, token in enumerate(student.tokens)})
    masks = {"mask_student": hidden, "mask_teacher": code > 1, "mask_diff": diff}
    save("amd_inputs", {"video": video, **{k: v.to(torch.uint8) for k, v in masks.items()}})
    for tag, precision in (("f32", torch.float32), ("f64", torch.float64)):
        model = copy.deepcopy(student).to(precision)
        model.tokens = [token.to(precision, copy=True).requires_grad_() for token in student.tokens]
        out, losses = run(precision, model)
        losses["loss_total"].backward()
        gradients = {name: q.grad for name, q in model.named_parameters() if q.grad is not None}
        norms = {name: float(gradient.norm()) for name, gradient in gradients.items()}
        losses["grad_global_norm_without_generator_mask_tokens"] = torch.stack(
            [g.norm() for g in gradients.values()]
        ).norm()
        meta[f"losses_{tag}"] = {name: value.item() for name, value in losses.items()}
        if tag == "f64":
            meta["grad_norms_f64"] = norms
            meta["params_without_grad"] = [n for n, q in model.named_parameters() if q.grad is None]
            out = {k: v for k, v in out.items() if k not in ("labels_unnorm", "encoder_out_normed")}
        gradients |= {f"generator_mask_tokens.{i}": token.grad for i, token in enumerate(model.tokens)}
        save(f"amd_outputs_{tag}", out | losses)
        save(
            f"amd_grads_{tag}", gradients if tag == "f32" else {k: g for k, g in gradients.items() if g.numel() <= 1024}
        )
    decayed = [q for q in student.parameters() if q.ndim > 1 and q is not student.mask_token]
    rest = [q for q in student.parameters() if q.ndim == 1 or q is student.mask_token]
    groups = [{"params": rest, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.05}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    meta["five_steps"] = []
    for _ in range(5):
        _, losses = run(torch.float32, student)
        optimizer.zero_grad()
        losses["loss_total"].backward()
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 0.02)
        optimizer.step()
        keys = {"loss": "loss_total", "mae": "loss_mae", "dir": "loss_dir", "gen": "loss_gen"}
        meta["five_steps"].append({k: losses[v].item() for k, v in keys.items()} | {"gnorm": float(norm)})
    save("amd_after5steps_f32", dict(student.named_parameters()))
    meta["student_keys"] = {k: list(v.shape) for k, v in student.state_dict().items()}
    meta["teacher_keys"] = {k: list(v.shape) for k, v in teacher.state_dict().items()}
    shown, extra = int((~hidden[0]).sum()), int(diff[0].sum())
    meta["counts"] = {
        "visible_student": shown,
        "visible_teacher": shown + extra,
        "diff": extra,
        "masked_student": tokens - shown,
    }
    (folder / "amd_meta.json").write_text(json.dumps(meta))


class MaeModel(nn.Module):
    def __init__(self, c: dict[str, Any], height: int, width: int) -> None:
        super().__init__()
        d, e, p, ratio = c["embed_dim"], c["decoder_embed_dim"], c["patch_size"], c["mlp_ratio"]
        self.cls_token = nn.Parameter(torch.randn(1, 1, d) * 0.1)
        self.pos_embed = nn.Parameter(grid_positions(height, width, d)[None], requires_grad=False)
        self.mask_token = nn.Parameter(torch.randn(1, 1, e) * 0.1)
        self.decoder_pos_embed = nn.Parameter(grid_positions(height, width, e)[None], requires_grad=False)
        self.patch_embed = PatchEmbed(d, (p, p))
        self.blocks = nn.ModuleList(Block(d, c["num_heads"], ratio, fused=True) for _ in range(c["depth"]))
        self.norm = nn.LayerNorm(d, eps=1e-6)
        self.decoder_embed = nn.Linear(d, e)
        self.decoder_blocks = nn.ModuleList(
            Block(e, c["decoder_num_heads"], ratio, fused=True) for _ in range(c["decoder_depth"])
        )
        self.decoder_norm, self.decoder_pred = nn.LayerNorm(e, eps=1e-6), nn.Linear(e, 3 * p * p)

    def encode(self, images: Tensor, keep: Tensor) -> Tensor:
        x = self.patch_embed(images) + self.pos_embed[:, 1:]
        x = x.gather(1, keep[:, :, None].expand(-1, -1, x.shape[-1]))
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def decode(self, latent: Tensor, restore: Tensor) -> Tensor:
        x = self.decoder_embed(latent)
        b, n = restore.shape
        x_ = torch.cat([x[:, 1:], self.mask_token.expand(b, n + 1 - x.shape[1], -1)], dim=1)
        x_ = x_.gather(1, restore[:, :, None].expand(-1, -1, x.shape[2]))
        x = torch.cat([x[:, :1], x_], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]


def make_mae(folder: Path, config: dict[str, Any], mask_ratio: float, batch: int = 2, seed: int = 0) -> None:
    """Write mae_state, mae_golden and mae_meta.json. `config` is the `config` entry in mae_meta.json."""
    torch.manual_seed(seed)
    size = config["img_size"] if isinstance(config["img_size"], list) else [config["img_size"]] * 2
    p = config["patch_size"]
    model = MaeModel(config, size[0] // p, size[1] // p)
    _perturb(model, torch.Generator().manual_seed(seed + 1))
    images, n = torch.randn(batch, 3, *size), (size[0] // p) * (size[1] // p)
    noise = torch.rand(batch, n)
    order = noise.argsort(dim=1)
    restore, kept = order.argsort(dim=1), int(n * (1 - mask_ratio))
    mask = torch.ones(batch, n).scatter(1, order[:, :kept], 0)
    golden: dict[str, Tensor] = {
        "imgs": images,
        "noise": noise,
        "mask": mask.to(torch.uint8),
        "ids_restore": restore.int(),
    }
    for tag, precision in (("f32", torch.float32), ("f64", torch.float64)):
        net = copy.deepcopy(model).to(precision)
        pixels = _cubes(images.to(precision)[:, :, None], 1, p).flatten(2)
        latent = net.encode(images.to(precision), order[:, :kept])
        pred = net.decode(latent, restore)
        golden |= {f"{tag}.latent": latent, f"{tag}.pred": pred, f"{tag}.patchify": pixels}
        normed = (pixels - pixels.mean(-1, keepdim=True)) / (pixels.var(-1, keepdim=True) + 1e-6) ** 0.5
        for flag, target in ((0, pixels), (1, normed)):
            loss = (((pred - target) ** 2).mean(-1) * mask.to(precision)).sum() / mask.sum()
            golden[f"{tag}.loss.norm_pix_{flag}"] = loss
        loss.backward()
        golden |= {f"{tag}.grad.{name}": q.grad for name, q in net.named_parameters() if q.grad is not None}
    golden["f32.latent_unmasked"] = model.encode(images, torch.arange(n).expand(batch, -1))
    save_file({k: v.detach().contiguous() for k, v in golden.items()}, folder / "mae_golden.safetensors")
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "mae_state.safetensors")
    (folder / "mae_meta.json").write_text(json.dumps({"config": config, "mask_ratio": mask_ratio}))
