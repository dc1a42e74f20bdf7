"""An encoder with a detection head: averages final features over time, pools them per box, and outputs action logits.

Shapes: B clips, N tokens of grid (t, h, w), D width, n boxes in all clips, C actions.
"""

from __future__ import annotations

from torch import Tensor
from torchvision.ops import roi_align

from amd.artifacts.card import Card
from amd.artifacts.weights import load_encoder, load_head
from amd.config import ClipConfig, ConfigError, DetectionHeadConfig, EncoderConfig, validate
from amd.exchange.positions import resample
from amd.models.classifier import EncoderWithHead


class Detector(EncoderWithHead):
    def __init__(self, encoder: EncoderConfig, clip: ClipConfig, actions: int, head: DetectionHeadConfig) -> None:
        super().__init__(
            encoder, clip.grid, clip.token_values, actions, dropout=head.dropout, init_scale=head.init_scale
        )
        self.clip, self.config = clip, head

    def forward(self, tokens: Tensor, index: Tensor, rois: Tensor) -> Tensor:
        """Compute logits (n, C) from tokens (B, N, P) at `index` (B, N) and boxes (n, 5).

        Columns of the boxes: clip index, x1, y1, x2, y2 in pixels.
        """
        logits: Tensor = self.head(self.dropout(self.pooled(self.map(tokens, index), rois)))
        return logits

    def map(self, tokens: Tensor, index: Tensor) -> Tensor:
        """Compute the feature map (B, D, h, w) after the final norm."""
        final = self.encoder(tokens, index).final
        assert final is not None
        grid = self.encoder.grid
        cube = final[:, final.shape[1] - grid.tokens :].unflatten(1, tuple(grid))  # (B, t, h, w, D)
        features: Tensor = cube.mean(dim=1).permute(0, 3, 1, 2)
        return features

    def pooled(self, features: Tensor, rois: Tensor) -> Tensor:
        """Max-pool each box over resolution x resolution cells: (n, D).

        Deviation: cells are aligned to pixel centres; the official RoIAlign is off by half a token.
        """
        side = self.config.resolution
        cells: Tensor = roi_align(features.float(), rois, (side, side), spatial_scale=1 / self.clip.patch, aligned=True)
        return cells.amax(dim=(2, 3))  # (n, D, side, side) -> (n, D)


def resized_detector(detector: Detector, clip: ClipConfig) -> Detector:
    """Copy a detector for use at another frame size, resampling position embeddings as in the official code."""
    if clip == detector.clip:
        return detector
    old = detector.encoder
    positions = resample(old.positions.detach(), old.grid, clip.grid)
    new = Detector(old.config, clip, detector.head.out_features, detector.config).to(positions.device)
    state = detector.state_dict()
    if "encoder.positions" in state:
        state["encoder.positions"] = positions
    else:
        new.encoder.positions = positions
    new.load_state_dict(state)
    return new.train(detector.training)


def load_detector(url: str) -> tuple[Detector, Card]:
    """Load a published detector, in eval mode on the CPU, together with its card.

    Raises ConfigError if the encoder has no detection head.
    """
    encoder, card = load_encoder(url)
    if card.objective != "detection" or card.head is None:
        raise ConfigError([f"{url}: this encoder has no detection head; train one first (`amd detect`)"])
    settings = validate(DetectionHeadConfig, card.config.get("head", {}))
    detector = Detector(card.encoder, card.clip, card.head.classes, settings)
    detector.encoder, detector.head = encoder, load_head(url, card)
    return detector.eval(), card
