"""Open weights by name, path or URL, together with the metadata of their source (a card or a folder's config).

Resolves names, folders and layouts; builds no models.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from amd.artifacts.weights import CARD, HEAD, Card, load_card
from amd.config import ClipConfig, ConfigError, EncoderConfig, TokenGrid, listed
from amd.exchange.huggingface import HUGGING_FACE, FolderFacts, folder_facts, sidecar_facts
from amd.exchange.layouts import State, Translated, translate
from amd.exchange.official import OFFICIAL, OUR_ENCODER, OUR_STUDENT
from amd.exchange.read import read_state
from amd.models.teachers.timm import TIMM, load_timm
from amd.storage import exists, filesystem, join, resolve_root

SHOWN = 8  # per message


class Source(NamedTuple):
    """Weights translated to our keys, and metadata that tensor shapes do not reveal."""

    name: str  # as the caller wrote it
    weights: Translated
    facts: FolderFacts = FolderFacts()
    card: Card | None = None  # of a published encoder
    field: str = "weights"  # config field that contains the name

    def __str__(self) -> str:
        return f"{self.field}={self.name}"

    @property
    def license(self) -> str | None:
        return self.card.weights_license if self.card else self.facts.license

    @property
    def heads(self) -> int | None:
        return self.card.encoder.heads if self.card else self.facts.heads

    @property
    def grid(self) -> TokenGrid | None:
        """Token grid of the position table."""
        return self.card.clip.grid if self.card else self.facts.grid

    @property
    def position_grid(self) -> tuple[int, int] | None:
        """Rows and columns for which a published encoder's fixed 2-D position table was computed."""
        if self.card is None or self.card.encoder.positions != "sincos_2d":
            return None
        return self.card.encoder.position_grid or (self.card.clip.grid.height, self.card.clip.grid.width)

    @property
    def is_ours(self) -> bool:
        return self.weights.layout in (OUR_ENCODER.name, OUR_STUDENT.name)

    def head(self) -> State:
        """Return the `weight` and `bias` of the classifier; empty if there is none."""
        prefix = "classifier.head."
        return {key.removeprefix(prefix): value for key, value in self.weights.state.items() if key.startswith(prefix)}

    @property
    def is_pooled(self) -> bool:
        """Whether the last norm applies to pooled tokens (fc_norm), as after fine-tuning."""
        if self.card is not None:
            return self.card.pooling == "mean_then_norm"
        return "encoder.norm.weight" not in self.weights.state and "classifier.norm.weight" in self.weights.state


def open_source(weights: str, storage: str | None, clip: ClipConfig, *, field: str = "weights") -> Source:
    """Open a published encoder by ID or folder, a weights file in any layout, a Hugging Face folder, or `timm:NAME`.

    `clip`: input size of a timm model. `field`: config field to report in error messages.
    Raises ConfigError if the weights cannot be read.
    """
    if weights.startswith(TIMM):
        model = load_timm(weights, clip, field=field)
        facts = FolderFacts(model.blocks[0].attn.num_heads, TokenGrid(1, clip.grid.height, clip.grid.width))
        return Source(weights, translated_state(model.state_dict(), weights, field=field), facts, field=field)
    url = published(weights, storage) or weights
    translated = translated_state(read_state(url, field=field), url, field=field)
    if not _is_folder(url):
        return Source(weights, translated, sidecar_facts(url, field=field), field=field)
    if exists(join(url, CARD)):
        state = translated.state | _published_head(url, field)
        return Source(weights, translated._replace(state=state), card=load_card(url), field=field)
    facts = folder_facts(url, field=field)
    if facts.problems:
        raise ConfigError([f"{field}={url}: {problem}" for problem in facts.problems])
    return Source(weights, _fill_absent_biases(translated, facts), facts, field=field)


def license_of(weights: str, storage: str | None, *, field: str = "weights") -> str | None:
    """Return the licence of weights: from a card, a Hugging Face model card, or the JSON file next to an export.

    Reads no weights. Returns None if no licence is stated. `field`: config field to report in error messages.
    """
    if weights.startswith(TIMM):
        return None
    url = published(weights, storage) or weights
    if not _is_folder(url):
        return sidecar_facts(url, field=field).license
    if exists(join(url, CARD)):
        return load_card(url).weights_license
    return folder_facts(url, field=field).license


def config_mismatches(ours: EncoderConfig, source: Source, clip: ClipConfig, section: str) -> list[str]:
    """List mismatches that shapes do not reveal: number of heads, pixel normalisation, base of fixed position
    embeddings.

    `section`: config section of the encoder, for error messages.
    """
    problems = []
    card = source.card
    if source.heads not in (None, ours.heads):
        problems.append(f"it has {source.heads} heads: set {section}.heads={source.heads}")
    fixed = "learned" not in (ours.positions, card.encoder.positions if card else "learned")
    if card and fixed and card.encoder.position_base != ours.position_base:
        problems.append(
            f"set {section}.position_base={card.encoder.position_base:g}, the base of its position embeddings"
        )
    for name in ("mean", "std"):
        theirs = getattr(card.clip if card else source.facts, name)
        if theirs and any(abs(a - b) > 1e-6 for a, b in zip(theirs, getattr(clip, name), strict=True)):
            problems.append(f"it was trained with a different pixel normalisation: set clip.{name}={list(theirs)}")
    return problems


def to_student(state: Mapping[str, Tensor]) -> Translated:
    """Translate third-party weights to the keys of `Student`; parts missing from the file are omitted from the
    result."""
    return translate(state, (*OFFICIAL, *HUGGING_FACE))


def published(name: str, storage: str | None) -> str | None:
    """Return the folder of the published encoder with this ID, or None if there is none."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        return None
    folder = join(resolve_root(storage), "encoders", name)
    return folder if exists(join(folder, "encoder.safetensors")) else None


def translated_state(state: State, url: str, *, field: str = "weights") -> Translated:
    """Translate weights and name their source in errors. Raises ConfigError for unknown keys or non-finite values."""
    try:
        translated = to_student(state)
    except ConfigError as error:
        raise ConfigError([f"{field}={url}: {line}" for line in error.problems]) from None
    broken = [key for key, tensor in state.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise ConfigError(
            [f"{field}={url}: NaN or infinite values in {listed(broken, SHOWN)}; the run that produced them diverged"]
        )
    return translated


def _published_head(url: str, field: str) -> State:
    """Read a published encoder's head and return it under a classifier's keys."""
    path = join(url, HEAD)
    return (
        {f"classifier.head.{key}": tensor for key, tensor in read_state(path, field=field).items()}
        if exists(path)
        else {}
    )


def _fill_absent_biases(translated: Translated, facts: FolderFacts) -> Translated:
    """Fill in zeros for absent attention biases if the source's config states that attention has none."""
    if not facts.unbiased:
        return translated
    state = dict(translated.state)
    for key, tensor in translated.state.items():
        if key.endswith("attn.qkv.weight"):
            for part in ("q_bias", "v_bias"):
                state.setdefault(key.replace("qkv.weight", part), tensor.new_zeros(tensor.shape[1]))
    return translated._replace(state=state)


def _is_folder(url: str) -> bool:
    fs, path = filesystem(url)
    return bool(fs.isdir(path))
