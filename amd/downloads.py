"""Download remote files once per node: processes that need the same file at about the same time share one copy.

One process downloads while the others wait for its file lock. The kernel releases the lock when its holder dies, and
only complete downloads are renamed into place, so a process that is killed at any moment neither blocks other processes
nor leaves a partial file.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from amd.file_lock import exclusive_lock
from amd.storage import StorageError, file_version, filesystem, is_remote, local_path

KEEP_S = 600.0  # copies that no process has requested for this long are removed by the next request
LOCKS = 16  # lock files, which are never removed: a process may be waiting for them


def shared_copy(url: str) -> Path:
    """Return a local path with the content of a file: the file itself, or a copy shared by the node's processes.

    Open the file promptly: later calls remove copies that have not been requested for KEEP_S seconds, although files
    that are already open remain readable. A file that has changed in the store is downloaded again. Raises the store's
    errors.
    """
    if not is_remote(url):
        return local_path(url)
    name = hashlib.sha256(f"{url}\n{file_version(url)}".encode("utf-8", "surrogateescape")).hexdigest()
    folder = _folder()
    path = folder / name
    with exclusive_lock(folder / f"lock-{int(name, 16) % LOCKS:02d}"):
        _remove_unused(folder)
        if not path.exists():
            fs, remote = filesystem(url)
            incoming = folder / f"{name}.incoming"  # overwrites what a killed process left behind
            fs.get_file(remote, str(incoming))
            os.replace(incoming, path)
        os.utime(path)
    return path


def _folder() -> Path:
    """Return this user's download folder on this node. Raises StorageError if another user owns it."""
    folder = Path(tempfile.gettempdir()) / f"amd-downloads-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise StorageError(f"{folder} belongs to another user; remove it, or set TMPDIR to another folder")
    return folder


def _remove_unused(folder: Path) -> None:
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            if not path.name.startswith("lock-") and time.time() - path.stat().st_mtime > KEEP_S:
                path.unlink()
