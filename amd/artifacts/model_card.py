"""Render a card as Markdown with Hugging Face front matter. Accesses no files.

Exporters pass instructions for loading the exported format.
"""

from __future__ import annotations

import json
from typing import Any

from amd.artifacts.card import Card, Score

UNKNOWN_LICENSE = "unknown"

PROTOCOLS = {
    "test": "fine-tuned, test set",
    "linear": "linear probe",
    "knn": "nearest neighbours",
    "few_shot": "few-shot probe",
    "attentive": "attentive probe",
    "detection": "action detection",
}


def model_card(card: Card, usage: str | None = None) -> str:
    """Return the text of README.md. `usage`: loading instructions in Markdown, by default for this package."""
    parts = [
        _front_matter(card),
        f"# {card.id}",
        *([_warning(card)] if card.is_non_commercial else []),
        _summary(card),
        f"## Use\n\n{usage or _own_usage(card)}",
        f"## Input\n\n{_input(card)}",
        f"## Lineage\n\n{_lineage(card)}",
        f"## Scores\n\n{_scores(card)}",
        f"## Licence\n\n{_license(card)}",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(card: Card) -> str:
    kind = "image" if card.clip.is_image else "video"
    task = f"{kind}-classification" if card.head else ("image-feature-extraction" if kind == "image" else "other")
    lines = [
        f"license: {_quoted((card.weights_license or UNKNOWN_LICENSE).lower())}",
        f"pipeline_tag: {task}",
        "tags:",
        *(f"- {tag}" for tag in ("vision", kind, "vit", "masked-autoencoder", *(["amd"] * (card.objective == "amd")))),
    ]
    return "\n".join(["---", *lines, "---"])


def _quoted(text: str) -> str:
    """Return a YAML scalar, quoted if necessary (JSON strings are valid YAML)."""
    return text if text.replace("-", "").replace(".", "").isalnum() else json.dumps(text)


def _warning(card: Card) -> str:
    return (
        f"> **Non-commercial use only ({card.weights_license}).** This licence is inherited from the teacher's or "
        "the initial weights; it also applies to everything derived from this encoder."
    )


def _summary(card: Card) -> str:
    encoder, clip = card.encoder, card.clip
    size = f"ViT-{encoder.size}" if encoder.size in ("S", "B", "L", "H") else "ViT"
    network = f"A plain {size}: {encoder.depth} blocks, width {encoder.width}, {encoder.heads} heads"
    network += ", a class token" if encoder.class_token else ""
    inputs = f"{clip.size[0]}x{clip.size[1]} images" if clip.is_image else f"clips of {_clip(card)}"
    training = {
        "amd": "pre-trained by Asymmetric Masked Distillation from a larger teacher",
        "mae": "pre-trained as a masked autoencoder",
        "finetune": "fine-tuned for classification",
        "detection": "fine-tuned for action detection",
        None: "imported",
    }[card.objective]
    kind = "actions for each box" if card.objective == "detection" else "classes"
    outputs = f"logits for {card.head.classes} {kind}" if card.head else f"an embedding of {encoder.width} values"
    return f"{network}; {training}. Its input is {inputs}; its output is {outputs}."


def _clip(card: Card) -> str:
    clip = card.clip
    return (
        f"{clip.frames} frames of {clip.size[0]}x{clip.size[1]} pixels, every {_nth(clip.sampling_rate_frames)} frame"
    )


def _nth(number: int) -> str:
    return {1: "single", 2: "second", 3: "third"}.get(number, f"{number}th")


def _own_usage(card: Card) -> str:
    shape = "3, " + ", ".join(map(str, (card.clip.frames, *card.clip.size)))
    if card.objective == "detection":
        return (
            "```python\nfrom amd.artifacts.weights import whole_clips\n"
            "from amd.downstream.supervised.detection.model import load_detector\n\n"
            f"model, card = load_detector(folder)  # clips (batch, {shape}) uint8\n"
            "# boxes (n, 5): row of the batch, x1, y1, x2, y2 in pixels\n"
            "logits = model(*whole_clips(model.encoder, card.clip, clips), boxes)  # (n, actions)\n```"
        )
    load = "model, card = load_classifier(folder)" if card.head else "encoder, card = load_encoder(folder)"
    name = "load_classifier, whole_clips" if card.head else "encode, load_encoder"
    call = (
        "logits = model(*whole_clips(model.encoder, card.clip, clips))"
        if card.head
        else "vectors = encode(encoder, card.clip, clips, card.pooling)"
    )
    result = f"(batch, {card.head.classes if card.head else card.encoder.width})"
    return (
        f"```python\nfrom amd.artifacts.weights import {name}\n\n{load}\n"
        f"{call}  # clips (batch, {shape}) uint8 -> {result}\n```\n\n"
        f"From the command line: `amd embed --encoder {card.id} FILE`." + _own_decoder(card)
    )


def _own_decoder(card: Card) -> str:
    if card.decoder is None:
        return ""
    return (
        "\n\nThe decoder from pre-training is included (`decoder.safetensors`; `load_decoder(folder, card)`). It "
        f"reconstructs the pixels of hidden tokens; in training, {card.decoder.mask_ratio:.0%} were hidden "
        f"({card.decoder.mask_strategy} masking). Deployments use it for `/reconstructions`."
    )


def _input(card: Card) -> str:
    clip = card.clip
    rows = [
        "RGB pixels in [0, 1], normalised by mean and standard deviation:",
        f"mean {list(clip.mean)}, standard deviation {list(clip.std)}.",
        f"Frames are scaled ({card.interpolation}) and center-cropped to {clip.size[0]}x{clip.size[1]}.",
    ]
    if not clip.is_image:
        rows.append(f"A clip is {_clip(card)} of the source.")
    pooled = {
        "mean": "The embedding is the mean over all tokens after the last norm, without the class token.",
        "mean_then_norm": "The embedding is the last norm of the mean of all tokens, without the class token.",
    }[card.pooling]
    return " ".join([*rows, pooled])


def _lineage(card: Card) -> str:
    rows: dict[str, Any] = {"created": f"{card.created:%Y-%m-%d}", "run": card.run, "steps": card.steps}
    rows["initial weights"] = _origin(card.start) if card.start else None
    rows["teacher"] = _origin(card.teacher) if card.teacher else None
    rows |= {"data": card.data.get("train"), "samples": card.data.get("samples")}
    rows["data digest"] = card.data.get("digest")
    rows["code"] = ", ".join(f"{name} {version}" for name, version in card.versions.items()) or None
    rows["weights sha256"] = card.sha256
    return "\n".join(f"- {name}: {_plain(value)}" for name, value in rows.items() if value is not None)


def _origin(facts: dict[str, Any]) -> str:
    """Describe the origin of weights in one line, including the teacher that they were distilled from."""
    name = facts.get("id") or facts.get("preset") or facts.get("weights") or "unknown"
    encoder = facts.get("encoder") or {}
    size = f" (width {encoder['width']}, {encoder['depth']} blocks)" if {"width", "depth"} <= set(encoder) else ""
    teacher = facts.get("teacher")
    return f"{name}{size}" + (f", distilled from {_origin(teacher)}" if isinstance(teacher, dict) else "")


def _scores(card: Card) -> str:
    if not card.scores:
        return "No scores yet."
    header = "| protocol | data | samples | views | values |\n|---|---|---|---|---|"
    return "\n".join([header, *(_row(score) for score in card.scores)])


def _row(score: Score) -> str:
    values = ", ".join(f"{name.removeprefix('eval/')} {value:.2f}" for name, value in score.values.items())
    chosen = ", checkpoint chosen on the same data" if score.settings.get("selected_on_test") else ""
    cells = (PROTOCOLS[score.protocol] + chosen, score.data, score.samples, score.views or "", values)
    return f"| {' | '.join(_plain(cell).replace('|', '/') for cell in cells)} |"


def _license(card: Card) -> str:
    if card.weights_license is None:
        return (
            "No licence is inherited from a teacher or from initial weights; the training data may have its own terms."
        )
    more = "Commercial use is not allowed." if card.is_non_commercial else ""
    return f"{card.weights_license}, inherited from the teacher's or the initial weights. {more}".rstrip()


def _plain(value: object) -> str:
    """Collapse whitespace, so that the text fits on one line."""
    return " ".join(str(value).split())
