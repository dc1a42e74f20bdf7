"""Learner for supervised runs: a pre-trained encoder with a new head, trained with layer decay.

Subclasses define the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from amd.config import DetectionConfig, FinetuneConfig
from amd.exchange.initialization import StartingPoint, load_starting_point
from amd.models.classifier import EncoderWithHead
from amd.models.encoder import Encoder
from amd.training.process_group import ProcessGroup
from amd.training.trainer.learner import Learner, compile_blocks, count
from amd.training.trainer.optimizer import build_optimizer, layer_scale

SupervisedConfig = FinetuneConfig | DetectionConfig
N = TypeVar("N", bound=EncoderWithHead)


class SupervisedLearner(Learner, Generic[N]):
    """Model with a head, and its optimizer, on one rank."""

    network: N

    def __init__(
        self,
        config: SupervisedConfig,
        group: ProcessGroup,
        build: Callable[[], N],
        start: Callable[[N], Any],
    ) -> None:
        """Build the model; `start` loads pre-trained weights into its encoder."""
        super().__init__(config, group)
        network = build()  # after the seed is set
        start(network)
        self.network = network.to(self.device).train()
        self.model = self.network
        if config.scaling.compile:
            compile_blocks(self.network)
        depth, decay = config.encoder.depth, config.optim.layer_decay
        self.optimizer = build_optimizer(self.network, config.optim, lambda name: layer_scale(name, depth, decay))

    @property
    def tested(self) -> N:
        """Model to evaluate and publish."""
        return self.network

    def parameter_counts(self) -> dict[str, int]:
        return {"encoder": count(self.network.encoder), "head": count(self.network.head)}


def load_start(encoder: Encoder, config: SupervisedConfig, *, final_norm: bool) -> StartingPoint | None:
    """Load the config's `weights` into an encoder; return None if none are configured. Raises ConfigError."""
    if config.weights is None:
        return None
    return load_starting_point(encoder, config.weights, config.storage, config.clip, final_norm=final_norm)
