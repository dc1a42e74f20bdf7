"""Locate published encoders in storage and read their cards. Torch-free; never reads weights.

<root>/encoders/<id>/encoder.safetensors, head.safetensors, decoder.safetensors, encoder.json, README.md
"""

from __future__ import annotations

from pydantic import ValidationError

from amd.artifacts.card import Card
from amd.config import ConfigError
from amd.storage import is_remote, join, listdir, local_path, read_json

WEIGHTS, HEAD, DECODER = "encoder.safetensors", "head.safetensors", "decoder.safetensors"
CARD, MODEL_CARD = "encoder.json", "README.md"


def encoders_url(root: str) -> str:
    """Return the folder that contains all published encoders."""
    return join(root, "encoders")


def encoder_folder(root: str, encoder_id: str) -> str:
    """Return the folder of the published encoder with this ID."""
    return join(encoders_url(root), encoder_id)


def encoder_url(root: str, id_or_url: str) -> str:
    """Return the folder of a published encoder, given its ID under the storage root, its path or its URL."""
    is_path = is_remote(id_or_url) or "/" in id_or_url or local_path(id_or_url).exists()
    return id_or_url if is_path else encoder_folder(root, id_or_url)


def load_card(url: str) -> Card:
    """Read the card in an encoder's folder. Raises ConfigError if it is missing or invalid."""
    path = join(url, CARD)
    try:
        return Card.model_validate(read_json(path))
    except FileNotFoundError:
        problem = f"{url}: not a published encoder ({CARD} is missing)"
        remedy = "check the ID or path; aliases and names of jobs are known only to a service; `amd login` selects one"
        raise ConfigError([f"{problem}; {remedy}"]) from None
    except (ValueError, ValidationError) as error:
        raise ConfigError([f"{path}: not a valid encoder card: {str(error).splitlines()[0]}"]) from None


def published_cards(root: str) -> tuple[list[Card], list[str]]:
    """Return the cards of all encoders under a storage root, newest first, and a message per unreadable card."""
    cards, problems = [], []
    for name in listdir(encoders_url(root)):
        try:
            cards.append(load_card(encoder_folder(root, name)))
        except ConfigError as error:  # e.g. the encoder is still being written, so it has no card yet
            problems += error.problems
    return sorted(cards, key=lambda card: card.created, reverse=True), problems
