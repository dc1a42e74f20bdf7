"""`amd finetune`: train a classifier on a pre-trained encoder, evaluate it with multiple views, and publish it."""

from __future__ import annotations

from service.cli.train import training_command

finetune = training_command("finetune")
