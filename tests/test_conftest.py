"""Tests for the hooks in conftest.py."""

from __future__ import annotations

import pytest


def test_collecting_a_folder_again_returns_the_same_node(request: pytest.FixtureRequest) -> None:
    tests = request.node.getparent(pytest.Dir)
    first, second = (
        {node.path.name: node for node in tests.collect() if isinstance(node, pytest.Directory)} for _ in range(2)
    )
    assert first.keys() >= {"amd", "service"}
    assert all(first[name] is second[name] for name in first)
