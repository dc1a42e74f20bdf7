"""Tests for the pages of an encoder."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import torch

from amd.config import TrainConfig
from amd.presets.load import load_config
from service.registry.discovery import EncoderDiscovery
from tests.support.browser.console_client import ConsoleClient
from tests.support.runs.published_students import publish_student


def test_the_code_for_python_embeds_clips(console: ConsoleClient, app: Any) -> None:
    root = app.state.settings.root
    _, url = publish_student(load_config(TrainConfig, "demo-image-mae", None, {}), Path(root), "embeds")
    EncoderDiscovery(app.state.encoders, root).register(url)
    page = console.get("/console/encoders/embeds").text
    (code,) = re.findall(r'<pre id="python-code"[^>]*>(.*?)</pre>', page, re.DOTALL)
    names: dict[str, Any] = {"clips": torch.zeros(2, 3, 1, 32, 32, dtype=torch.uint8)}
    exec(html.unescape(code), names)
    assert names["vectors"].shape == (2, 64)
