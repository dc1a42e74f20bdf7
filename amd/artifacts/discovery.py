"""Where published encoders lie below a storage root, and their cards. Torch-free: whoever only asks needs no weights.

    <root>/encoders/<id>/encoder.safetensors, head.safetensors, decoder.safetensors, encoder.json, README.md

Knows nothing of networks; `artifacts` writes and loads them.
"""

from __future__ import annotations

from pydantic import ValidationError

from amd.artifacts.card import Card
from amd.config import ConfigError
from amd.storage import is_remote, join, listdir, local_path, read_json

WEIGHTS, HEAD, DECODER = "encoder.safetensors", "head.safetensors", "decoder.safetensors"
CARD, TEXT = "encoder.json", "README.md"


def encoders_url(root: str) -> str:
    return join(root, "encoders")


def encoder_folder(root: str, encoder_id: str) -> str:
    return join(encoders_url(root), encoder_id)


def encoder_url(root: str, id_or_url: str) -> str:
    """The folder of a published encoder as a person names it: an id below the storage root, or a path or URL."""
    is_path = is_remote(id_or_url) or "/" in id_or_url or local_path(id_or_url).exists()
    return id_or_url if is_path else encoder_folder(root, id_or_url)


def load_card(url: str) -> Card:
    """Raises ConfigError where there is no readable card."""
    path = join(url, CARD)
    try:
        return Card.model_validate(read_json(path))
    except FileNotFoundError:
        raise ConfigError([f"{url}: no encoder is published there ({CARD} is missing)"]) from None
    except (ValueError, ValidationError) as error:
        raise ConfigError([f"{path}: not an encoder's card: {str(error).splitlines()[0]}"]) from None


def published_cards(root: str) -> tuple[list[Card], list[str]]:
    """The cards of all encoders below a storage root, newest first, and what is wrong with those not readable."""
    cards, problems = [], []
    for name in listdir(encoders_url(root)):
        try:
            cards.append(load_card(encoder_folder(root, name)))
        except ConfigError as error:  # a folder without a card is one that is still being written
            problems += error.problems
    return sorted(cards, key=lambda card: card.created, reverse=True), problems
