from __future__ import annotations

from pathlib import Path

import pytest

from service.credentials import KeyFileError, environment_key


def test_the_key_takes_precedence_over_the_key_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AMD_KEY", raising=False)
    monkeypatch.delenv("AMD_KEY_FILE", raising=False)
    assert environment_key() is None
    (tmp_path / "key").write_text("from file\n")
    monkeypatch.setenv("AMD_KEY_FILE", str(tmp_path / "key"))
    assert environment_key() == "from file"
    monkeypatch.setenv("AMD_KEY", "from environment")
    assert environment_key() == "from environment"


@pytest.mark.parametrize(("content", "problem"), [(None, "cannot be read"), (b"\xff\xfe", "is not a text file")])
def test_an_unreadable_key_file_is_reported_with_its_variable(
    content: bytes | None, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if content is not None:
        (tmp_path / "key").write_bytes(content)
    monkeypatch.delenv("AMD_KEY", raising=False)
    monkeypatch.setenv("AMD_KEY_FILE", str(tmp_path / "key"))
    with pytest.raises(KeyFileError, match=f"^AMD_KEY_FILE={tmp_path / 'key'}: {problem}"):
        environment_key()
