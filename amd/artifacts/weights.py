"""Save, load and run published encoders: `encoder.safetensors` with its card, `encoder.json`, and a `README.md`.

Does not import training; serving, probes and exports load encoders through this module.
Shapes: B batch, T frames, H height, W width, D width of the encoder.
"""

from __future__ import annotations

import hashlib

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from amd.artifacts.card import Card as Card
from amd.artifacts.card import DecoderCard as DecoderCard
from amd.artifacts.card import HeadCard as HeadCard
from amd.artifacts.card import Pooling as Pooling
from amd.artifacts.card import Score as Score
from amd.artifacts.discovery import CARD as CARD
from amd.artifacts.discovery import DECODER as DECODER
from amd.artifacts.discovery import HEAD as HEAD
from amd.artifacts.discovery import MODEL_CARD as MODEL_CARD
from amd.artifacts.discovery import WEIGHTS as WEIGHTS
from amd.artifacts.discovery import encoder_url as encoder_url
from amd.artifacts.discovery import load_card as load_card
from amd.artifacts.discovery import published_cards as published_cards
from amd.artifacts.model_card import model_card
from amd.config import ClipConfig, ConfigError
from amd.losses import normalized_pixels
from amd.models.classifier import Classifier
from amd.models.encoder import Encoder
from amd.models.predictor import Decoder
from amd.storage import exists, join, read_bytes, write_bytes, write_json
from amd.tokens import patchify


def save_encoder(
    url: str, encoder: Encoder, card: Card, head: nn.Linear | None = None, decoder: Decoder | None = None
) -> Card:
    """Publish an encoder to the folder `url`; the card is written last, so a folder with a card is complete.

    `head`: classifier of a fine-tuned encoder, described by `card.head`. `decoder`: decoder of an encoder trained with
    reconstruction, described by `card.decoder`. Returns the card with the digests of the weights.
    """
    card, files = serialize_encoder(encoder, card, head, decoder)
    for name, data in files.items():
        write_bytes(join(url, name), data)
    write_card(url, card)
    return card


def serialize_encoder(
    encoder: Encoder, card: Card, head: nn.Linear | None = None, decoder: Decoder | None = None
) -> tuple[Card, dict[str, bytes]]:
    """Return the card with the digests of the weights, and the serialised weights by file name."""
    files = {WEIGHTS: _bytes_of(encoder)}
    card = card.model_copy(update={"sha256": _sha256(files[WEIGHTS])})
    if head is not None:
        assert card.head is not None, "card.head must describe the head"
        files[HEAD] = _bytes_of(head)
        card = card.model_copy(update={"head": card.head.model_copy(update={"sha256": _sha256(files[HEAD])})})
    if decoder is not None:
        assert card.decoder is not None, "card.decoder must describe the decoder"
        files[DECODER] = _bytes_of(decoder)
        card = card.model_copy(update={"decoder": card.decoder.model_copy(update={"sha256": _sha256(files[DECODER])})})
    return card, files


def write_card(url: str, card: Card) -> None:
    """Write or replace the model card and then the card in the folder `url`."""
    write_bytes(join(url, MODEL_CARD), model_card(card).encode())
    write_json(join(url, CARD), card.model_dump(mode="json"))


def _bytes_of(network: nn.Module) -> bytes:
    return save_tensors({key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()})


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def load_encoder(url: str) -> tuple[Encoder, Card]:
    """Load an encoder with its card, in eval mode on the CPU.

    Raises ConfigError if weights are missing, damaged or inconsistent with the card.
    """
    card = load_card(url)
    encoder = Encoder(card.encoder, card.clip.grid, card.clip.token_values)
    _load(join(url, WEIGHTS), encoder, card.sha256)
    return encoder.eval(), card


def load_classifier(url: str) -> tuple[Classifier, Card]:
    """Load a fine-tuned encoder with its head and card, in eval mode on the CPU.

    Raises ConfigError if the encoder has no head, or if weights are missing, damaged or inconsistent with the card.
    """
    card = load_card(url)
    if card.objective == "detection":
        raise ConfigError([f"{url}: this head classifies boxes, not whole clips; use `load_detector` to load it"])
    if card.head is None:
        raise ConfigError([f"{url}: this encoder has no classifier; fine-tune it first (`amd finetune`)"])
    classifier = Classifier(card.encoder, card.clip.grid, card.clip.token_values, card.head.classes)
    _load(join(url, WEIGHTS), classifier.encoder, card.sha256)
    classifier.head = load_head(url, card)
    return classifier.eval(), card


def load_head(url: str, card: Card) -> nn.Linear:
    """Load the head published with an encoder. Raises ConfigError if it is missing or damaged."""
    assert card.head is not None, "callers check that the encoder has a head"
    head = nn.Linear(card.encoder.width, card.head.classes)
    _load(join(url, HEAD), head, card.head.sha256)
    return head


def load_decoder(url: str, card: Card) -> Decoder:
    """Load the decoder published with an encoder, in eval mode on the CPU.

    Raises ConfigError if the encoder was published without a decoder, or if the decoder file is missing, damaged or
    inconsistent with the card.
    """
    if card.decoder is None:
        raise ConfigError([f"{url}: this encoder was published without a decoder; it cannot reconstruct pixels"])
    decoder = Decoder(card.encoder, card.decoder.network, card.clip.grid, card.clip.token_values)
    _load(join(url, DECODER), decoder, card.decoder.sha256)
    return decoder.eval()


def _load(path: str, network: nn.Module, sha256: str | None) -> None:
    if not exists(path):
        raise ConfigError([f"{path}: file not found next to its card; publish the encoder again"])
    data = read_bytes(path)
    if sha256 not in (None, _sha256(data)):
        raise ConfigError([f"{path}: the weights do not match the card (sha256 differs); publish the encoder again"])
    try:
        network.load_state_dict(load_tensors(data))
    except Exception as error:
        raise ConfigError([f"{path}: does not match its card: {str(error).splitlines()[0]}"]) from None


def encode(encoder: Encoder, clip: ClipConfig, clips: Tensor, pooling: Pooling = "mean") -> Tensor:
    """Embed whole clips: (B, 3, T, H, W) uint8 or normalised float -> (B, D)."""
    tokens, index = whole_clips(encoder, clip, clips)
    if pooling == "mean_then_norm":
        last = len(encoder.blocks)
        raw = encoder(tokens, index, intermediates=(last,), final=False).intermediates[0]
        normed: Tensor = encoder.norm(raw.mean(dim=1))
        return normed
    final = encoder(tokens, index).final
    assert final is not None
    pooled: Tensor = final[:, final.shape[1] - encoder.grid.tokens :].mean(dim=1)
    return pooled


def whole_clips(encoder: Encoder, clip: ClipConfig, clips: Tensor) -> tuple[Tensor, Tensor]:
    """Return the normalised tokens of clips (B, 3, T, H, W) and the token indices: (B, N, P) and (B, N)."""
    pixels = patchify(clips, clip.tubelet, clip.patch)
    index = torch.arange(encoder.grid.tokens, device=clips.device).expand(clips.shape[0], -1)
    return normalized_pixels(pixels, clip), index
