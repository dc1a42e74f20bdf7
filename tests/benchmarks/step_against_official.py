"""Compare the speed of our training step with the official one, alternating between the two.

    python tests/benchmarks/step_against_official.py --preset k400-vit-b --pairs 5

`OfficialStep` reimplements the official training step: it embeds every token with a convolution and selects tokens with
boolean masks, copies position tables once per clip, computes attention explicitly, projects twice, computes every token
of every block, and updates parameters one by one. It starts from the same weights as our step. The benchmark first
prints both losses, because a ratio is meaningless unless they agree, then one JSON line per pair of steps and the
medians.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics

import torch
from torch import Tensor, nn
from torch.nn import functional

from amd.bench.step import StepBench, seconds
from amd.config import Precision, TrainConfig, with_overrides
from amd.device import autocast
from amd.distillation import distill
from amd.models.encoder import Encoder
from amd.models.layers import Attention, Block
from amd.models.predictor import Decoder, Predictor
from amd.presets.load import find_preset
from amd.tokens import TokenSets
from amd.training.trainer.optimizer import parameter_groups


class OfficialStep:
    """The official training step, running on copies of a StepBench's weights."""

    def __init__(self, bench: StepBench, precision: Precision = "fp32") -> None:
        self.bench, self.config, self.precision = bench, bench.config, precision
        assert bench.teacher is not None
        self.student = copy.deepcopy(bench.student)
        self.teacher = copy.deepcopy(bench.teacher.encoder).float()
        self.student_kernel = self._kernel(self.student.encoder)
        self.teacher_kernel = self._kernel(self.teacher).requires_grad_(False)
        groups = parameter_groups(self.student, self.config.optim.weight_decay)
        groups[-1]["params"] = [*groups[-1]["params"], self.student_kernel]  # type: ignore[misc]
        optim = self.config.optim
        self.optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, foreach=False, fused=False)

    def _kernel(self, encoder: Encoder) -> nn.Parameter:
        clip = self.config.clip
        flat = encoder.patch_embed.weight.detach()
        cut = flat.reshape(len(flat), clip.tubelet, clip.patch, clip.patch, 3).permute(0, 4, 1, 2, 3)
        encoder.patch_embed.weight.requires_grad_(False)
        return nn.Parameter(cut.contiguous())

    def step(self, clips: Tensor, sets: TokenSets) -> Tensor:
        config, device = self.config, self.bench.device
        tokens = config.clip.grid.tokens
        videos = self._normalized(clips.to(device))
        masks = [_mask(index, tokens).cpu() for index in (sets.student_visible, sets.teacher_only)]
        visible, teacher_only = (mask.to(device, non_blocking=True) for mask in masks)
        labels = self._labels(videos, ~visible)
        with autocast(self.precision, device):
            total = self._total(videos, visible, teacher_only, labels)
        total.backward()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, config.optim.clip_norm or float("inf"), foreach=False)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total.detach()

    def _normalized(self, clips: Tensor) -> Tensor:
        mean, std = (torch.tensor(v, device=clips.device)[:, None, None, None] for v in self._colours())
        return (clips.float() / 255 - mean) / std

    def _colours(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return self.config.clip.mean, self.config.clip.std

    def _labels(self, videos: Tensor, hidden: Tensor) -> Tensor:
        """Compute the normalised pixels of all tokens, then select the hidden tokens."""
        clip = self.config.clip
        mean, std = (torch.tensor(v, device=videos.device)[:, None, None, None] for v in self._colours())
        unit = videos * std + mean
        b, c, t, h, w = unit.shape
        cut = unit.reshape(
            b, c, t // clip.tubelet, clip.tubelet, h // clip.patch, clip.patch, w // clip.patch, clip.patch
        )
        cut = cut.permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(b, clip.grid.tokens, -1, c)
        cut = (cut - cut.mean(dim=-2, keepdim=True)) / (cut.var(dim=-2, unbiased=True, keepdim=True).sqrt() + 1e-6)
        return cut.flatten(2)[hidden].reshape(b, -1, clip.token_values)

    def _total(self, videos: Tensor, visible: Tensor, teacher_only: Tensor, labels: Tensor) -> Tensor:
        student, objective = self.student, self.config.objective
        b = len(videos)
        pairs = objective.layers
        with torch.no_grad():
            x = self._embed(self.teacher, self.teacher_kernel, videos)
            x = torch.cat([x[visible].reshape(b, -1, x.shape[-1]), x[teacher_only].reshape(b, -1, x.shape[-1])], dim=1)
            shared = int(visible[0].sum())
            targets = _taps(self.teacher, x, [pair.teacher for pair in pairs])
        x = self._embed(student.encoder, self.student_kernel, videos)
        x = x[visible].reshape(b, -1, x.shape[-1])
        taps = _taps(student.encoder, x, [pair.student for pair in pairs])
        normed = student.encoder.norm(taps[-1])
        direct = [project(tap) for project, tap in zip(student.projections, taps, strict=True)]
        reprojected = [project(tap) for project, tap in zip(student.projections, taps, strict=True)]
        generated = [
            self._predict(g, z, visible, teacher_only) for g, z in zip(student.generators, reprojected, strict=True)
        ]
        decoder = student.decoder
        assert isinstance(decoder, Decoder)
        predicted = self._predict(decoder, decoder.input(normed), visible, ~visible)
        rebuilt = decoder.head(decoder.norm(predicted))
        reconstruction = functional.mse_loss(rebuilt.float(), labels)
        direct_losses = [
            functional.mse_loss(z.float(), t[:, :shared].float()) for z, t in zip(direct, targets, strict=True)
        ]
        generation_losses = [
            functional.mse_loss(z.float(), t[:, shared:].float()) for z, t in zip(generated, targets, strict=True)
        ]
        return reconstruction + torch.stack(direct_losses).mean() + torch.stack(generation_losses).mean()

    def _embed(self, encoder: Encoder, kernel: Tensor, videos: Tensor) -> Tensor:
        x = (
            functional.conv3d(videos, kernel, encoder.patch_embed.bias, stride=kernel.shape[2:])
            .flatten(2)
            .transpose(1, 2)
        )
        return x + _table(encoder.positions, x)

    def _predict(self, predictor: Predictor, x: Tensor, visible: Tensor, queried: Tensor) -> Tensor:
        b, _, width = x.shape
        positions = _table(predictor.positions, x)
        known = x + positions[visible].reshape(b, -1, width)
        x = torch.cat([known, predictor.mask_token + positions[queried].reshape(b, -1, width)], dim=1)
        for block in predictor.blocks:
            x = _block(block, x)
        return x[:, -int(queried[0].sum()) :]


def _mask(index: Tensor, tokens: int) -> Tensor:
    return torch.zeros(len(index), tokens, dtype=torch.bool, device=index.device).scatter_(1, index, True)


def _table(positions: Tensor, like: Tensor) -> Tensor:
    """Copy the position table from the CPU for every clip in every pass, as the official code does."""
    return positions.cpu()[None].expand(len(like), -1, -1).type_as(like).to(like.device).clone().detach()


def _taps(encoder: Encoder, x: Tensor, blocks: list[int]) -> list[Tensor]:
    taps = []
    for number, block in enumerate(encoder.blocks, start=1):
        x = _block(block, x)
        if number in blocks:
            taps.append(x)
    return taps


def _block(block: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(block, Block)
    x = x + _attention(block.attn, block.norm1(x))
    return x + block.mlp(block.norm2(x))


def _attention(attention: Attention, x: Tensor) -> Tensor:
    b, n, d = x.shape
    bias = torch.cat([attention.q_bias, torch.zeros_like(attention.v_bias), attention.v_bias])
    qkv = functional.linear(x, attention.qkv.weight, bias).reshape(b, n, 3, attention.heads, -1).permute(2, 0, 3, 1, 4)
    query, key, value = qkv[0] * (d // attention.heads) ** -0.5, qkv[1], qkv[2]
    weights = (query @ key.transpose(-2, -1)).softmax(dim=-1)
    out: Tensor = attention.proj((weights @ value).transpose(1, 2).reshape(b, n, d))
    return out


def compare(config: TrainConfig, batch: int, pairs: int, official_precision: Precision) -> dict[str, float]:
    bench = StepBench(config, batch)
    official = OfficialStep(bench, official_precision)
    ours_s, official_s = [], []
    for number in range(pairs + 1):
        state = bench.generator.get_state()
        clips, sets = bench.inputs()
        bench.generator.set_state(state)
        b = seconds(lambda clips=clips, sets=sets: official.step(clips, sets), bench.device)  # type: ignore[misc]
        a = seconds(bench.step, bench.device)
        if number:  # the first pair warms up
            ours_s.append(a)
            official_s.append(b)
            print(json.dumps({"official_s": round(b, 4), "ours_s": round(a, 4), "ratio": round(b / a, 3)}), flush=True)
    ratios = [b / a for a, b in zip(ours_s, official_s, strict=True)]
    return {
        "official_s": statistics.median(official_s),
        "ours_s": statistics.median(ours_s),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }


def losses(config: TrainConfig, batch: int, official_precision: Precision) -> tuple[float, float]:
    """Return the official total loss and ours at the first step, for the same weights, clips and masks."""
    bench = StepBench(config, batch)
    official = OfficialStep(bench, official_precision)
    clips, sets = bench.inputs()
    with torch.no_grad(), autocast(bench.precision, bench.device):
        ours = distill(bench.student, bench.teacher, clips, sets, config).total
    return float(official.step(clips, sets)), float(ours)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="k400-vit-b")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--official-precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, default=1, help="Number of PyTorch threads on a CPU.")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = with_overrides(
        find_preset(TrainConfig, arguments.preset).config,
        {"scaling.device": arguments.device, "scaling.precision": arguments.precision},
    )
    both = losses(config, arguments.batch, arguments.official_precision)
    print(json.dumps({"loss_official": both[0], "loss_ours": both[1]}))
    print(
        json.dumps(
            {
                "preset": arguments.preset,
                **compare(config, arguments.batch, arguments.pairs, arguments.official_precision),
            }
        )
    )


if __name__ == "__main__":
    main()
