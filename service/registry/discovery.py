"""Encoder discovery: keep the database in sync with the encoder cards under the storage root.

The cards are authoritative, however an encoder was published: by a job, an import, `amd train` outside the service, or
a copied folder. Deleting an encoder removes its card and other files, and is recorded in the database.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator

from amd.artifacts.discovery import CARD, encoder_folder, encoders_url, load_card
from amd.config import ConfigError
from amd.storage import exists, files, is_remote, join, remove
from service.db.models import RegisteredEncoder
from service.registry.ownership import StorageOwners
from service.registry.store import EncoderStore

logger = logging.getLogger(__name__)

SCAN_INTERVAL_S = 30.0
LOCAL_SCAN_INTERVAL_S = 2.0  # listing a local folder costs no requests
LISTING_SHARE = 0.01  # maximum share of the time spent listing; a root with many encoders is scanned less often
READ_BUDGET_S = 5.0  # time limit per scan for reading cards, so that the reconciler is not delayed


class EncoderDiscovery:
    """Keeps one database row per card. A scan without changes costs one listing and one query."""

    def __init__(self, store: EncoderStore, root: str, clock: Callable[[], float] = time.time) -> None:
        self._store, self._root, self._clock = store, root, clock
        self._owners = StorageOwners(store.engine, root)
        self._unreadable: dict[str, str] = {}  # card stamps by encoder ID; logged once, then skipped
        self._last_scan = float("-inf")
        self._listing_s = 0.0  # duration of the last listing

    def scan(self) -> None:
        """Scan if the interval has passed or a job has succeeded since the last scan, or if cards remain to be read.

        The files of deleted encoders are always removed. Raises StorageError.
        """
        self._remove_deleted()
        now = self._clock()
        if now - self._last_scan < self._interval_s() and not self._store.job_succeeded_since(self._last_scan):
            return
        self._last_scan = now
        known = self._store.stamps()  # before the listing, so that an encoder published in between is not dropped
        started = time.monotonic()
        cards = dict(self._cards())
        self._listing_s = time.monotonic() - started
        began = self._clock()  # after the listing: one that takes longer than the budget must not prevent all reads
        for encoder_id, stamp in cards.items():
            if stamp not in (known.get(encoder_id), self._unreadable.get(encoder_id)):
                if self._clock() - began > READ_BUDGET_S:
                    self._last_scan = float("-inf")  # read the rest in the next scan, without waiting
                    break
                self._read(encoder_id, stamp)
        missing = known.keys() - cards.keys()
        if missing and (cards or self._root_is_available()):
            self._store.remove_missing(missing)

    def _interval_s(self) -> float:
        if is_remote(self._root):
            return SCAN_INTERVAL_S
        return min(SCAN_INTERVAL_S, max(LOCAL_SCAN_INTERVAL_S, self._listing_s / LISTING_SHARE))

    def _remove_deleted(self) -> None:
        for encoder_id in self._store.pending_deletions():
            url = encoder_folder(self._root, encoder_id)
            remove(join(url, CARD))  # first: an encoder without a card is not published
            remove(url)
            self._store.finish_deletion(encoder_id)

    def register(self, folder: str) -> None:
        """Index an encoder reported by a job, without a full scan. Raises StorageError."""
        encoder_id = folder.rstrip("/").rpartition("/")[2]
        facts = files(folder).get(CARD) if folder == encoder_folder(self._root, encoder_id) else None
        if facts is not None:
            self._read(encoder_id, facts.stamp)

    def _cards(self) -> Iterator[tuple[str, str]]:
        """Yield (encoder ID, card stamp) for each published encoder."""
        for path, facts in files(encoders_url(self._root)).items():
            folder, _, file = path.partition("/")
            if file == CARD:
                yield folder, facts.stamp

    def _root_is_available(self) -> bool:
        """Return whether an empty listing can be trusted: the listing of an unmounted disk is also empty."""
        return is_remote(self._root) or exists(encoders_url(self._root))

    def _read(self, encoder_id: str, stamp: str) -> None:
        try:
            card = load_card(encoder_folder(self._root, encoder_id))
        except ConfigError as error:
            logger.warning("skipping an encoder with an invalid card: %s", error)
            self._unreadable[encoder_id] = stamp
            return
        self._unreadable.pop(encoder_id, None)
        owner = self._owners.of_card(card)
        self._store.upsert(
            RegisteredEncoder(
                id=encoder_id,
                project=owner.project,
                job_id=owner.job_id,
                created_at=card.created.timestamp(),
                card=card.model_dump(mode="json"),
                stamp=stamp,
                seen_at=self._clock(),
            )
        )
