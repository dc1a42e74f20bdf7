"""`amd detect`: train an action detector on a pre-trained encoder, evaluate its frame-mAP on AVA, and publish it."""

from __future__ import annotations

from service.cli.train import training_command

detect = training_command("detect")
