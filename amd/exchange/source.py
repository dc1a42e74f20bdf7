"""Weights opened, from wherever they are named, with what their source says about itself: a card, a folder's config.

Knows names, folders and layouts; knows no network.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from amd.artifacts.weights import CARD, HEAD, Card, load_card
from amd.config import ClipConfig, ConfigError, EncoderConfig, TokenGrid
from amd.exchange.huggingface import HUGGING_FACE, FolderFacts, folder_facts, sidecar_facts
from amd.exchange.layouts import State, Translated, translate
from amd.exchange.official import OFFICIAL, OUR_ENCODER, OUR_STUDENT
from amd.exchange.read import read_state
from amd.models.teachers.timm import TIMM, load_timm
from amd.storage import exists, filesystem, join, resolve_root

SHOWN = 8  # keys of each kind in a message


class Source(NamedTuple):
    """Weights under our keys, and facts that shapes do not tell."""

    name: str  # as it was asked for
    weights: Translated
    facts: FolderFacts = FolderFacts()
    card: Card | None = None  # of a published encoder

    @property
    def license(self) -> str | None:
        return self.card.weights_license if self.card else self.facts.license

    @property
    def heads(self) -> int | None:
        return self.card.encoder.heads if self.card else self.facts.heads

    @property
    def grid(self) -> TokenGrid | None:
        """Of the position table."""
        return self.card.clip.grid if self.card else self.facts.grid

    @property
    def is_ours(self) -> bool:
        return self.weights.layout in (OUR_ENCODER.name, OUR_STUDENT.name)

    def head(self) -> State:
        """`weight` and `bias` of the classifier, if there is one."""
        prefix = "classifier.head."
        return {key.removeprefix(prefix): value for key, value in self.weights.state.items() if key.startswith(prefix)}

    @property
    def is_pooled(self) -> bool:
        """Whether the last norm is one of pooled tokens (fc_norm), as after fine-tuning."""
        if self.card is not None:
            return self.card.pooling == "mean_then_norm"
        return "encoder.norm.weight" not in self.weights.state and "classifier.norm.weight" in self.weights.state


def open_source(weights: str, storage: str | None, clip: ClipConfig, *, field: str = "weights") -> Source:
    """Open a published encoder's id or folder, a file or URI of any layout, a Hugging Face folder, or `timm:NAME`.

    `clip`: the size that timm builds its model for. `field`: the config's field that names the weights in messages.
    Raises ConfigError.
    """
    if weights.startswith(TIMM):
        model = load_timm(weights, clip, field=field)
        facts = FolderFacts(model.blocks[0].attn.num_heads, TokenGrid(1, clip.grid.height, clip.grid.width))
        return Source(weights, translated_state(model.state_dict(), weights), facts)
    url = published(weights, storage) or weights
    translated = translated_state(read_state(url), url)
    if not _is_folder(url):
        return Source(weights, translated, sidecar_facts(url))
    if exists(join(url, CARD)):
        state = translated.state | _published_head(url)
        return Source(weights, translated._replace(state=state), card=load_card(url))
    facts = folder_facts(url)
    if facts.problems:
        raise ConfigError([f"weights {url}: {problem}" for problem in facts.problems])
    return Source(weights, _unlost(translated, facts), facts)


def license_of(weights: str, storage: str | None) -> str | None:
    """The licence that weights hand down: of a card, of a Hugging Face folder's page, of the JSON beside an export.

    Reads no weights. None where nothing tells it.
    """
    if weights.startswith(TIMM):
        return None
    url = published(weights, storage) or weights
    if not _is_folder(url):
        return sidecar_facts(url).license
    return load_card(url).weights_license if exists(join(url, CARD)) else folder_facts(url).license


def other_network(ours: EncoderConfig, source: Source, clip: ClipConfig, field: str) -> list[str]:
    """What no shape tells: heads, pixel normalisation, the base of fixed positions."""
    problems = []
    card = source.card
    if source.heads not in (None, ours.heads):
        problems.append(f"it has {source.heads} heads: set {field}.heads={source.heads}")
    fixed = "learned" not in (ours.positions, card.encoder.positions if card else "learned")
    if card and fixed and card.encoder.position_base != ours.position_base:
        problems.append(f"set {field}.position_base={card.encoder.position_base:g}, the base of its positions")
    for name in ("mean", "std"):
        theirs = getattr(card.clip if card else source.facts, name)
        if theirs and any(abs(a - b) > 1e-6 for a, b in zip(theirs, getattr(clip, name), strict=True)):
            problems.append(f"it was trained with another pixel normalisation: set clip.{name}={list(theirs)}")
    return problems


def to_student(state: Mapping[str, Tensor]) -> Translated:
    """Foreign weights under the keys of `Student`; parts the file does not have are absent."""
    return translate(state, (*OFFICIAL, *HUGGING_FACE))


def published(name: str, storage: str | None) -> str | None:
    """The folder of a published encoder with this id, if there is one."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        return None
    folder = join(resolve_root(storage), "encoders", name)
    return folder if exists(join(folder, "encoder.safetensors")) else None


def translated_state(state: State, url: str) -> Translated:
    """The same, with messages that name where the weights came from; refuses weights that are not finite."""
    try:
        translated = to_student(state)
    except ConfigError as error:
        raise ConfigError([f"weights {url}: {line}" for line in error.problems]) from None
    broken = [key for key, tensor in state.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise ConfigError([f"weights {url}: not finite in {listed(broken)}; the run that wrote them diverged"])
    return translated


def listed(keys: list[str]) -> str:
    """The first few, and how many more."""
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return ", ".join(keys[:SHOWN]) + more


def _published_head(url: str) -> State:
    """A published encoder's head, under the keys of a classifier."""
    path = join(url, HEAD)
    return {f"classifier.head.{key}": tensor for key, tensor in read_state(path).items()} if exists(path) else {}


def _unlost(translated: Translated, facts: FolderFacts) -> Translated:
    """Zeros for attention biases that a config says were never there; any other absence is told as missing."""
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
