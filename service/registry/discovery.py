"""Published encoders, found on the storage root: its cards are the truth, the table is their index.

Knows nothing of how an encoder came there: a job's, an import's, `amd train` by hand, a folder that was copied.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator

from amd.artifacts.card import Card
from amd.artifacts.discovery import CARD, encoder_folder, encoders_url, load_card
from amd.config import ConfigError
from amd.storage import exists, files, is_remote, join, read_json
from amd.training.run_folder import FACTS, run_folder
from service.db.models import Encoder
from service.registry.store import EncoderStore

logger = logging.getLogger(__name__)

LOOK_S = 30.0
READ_S = 5.0  # of reading cards at a time: jobs are moved in between


class EncoderDiscovery:
    """Keeps a row for each card. A look where nothing has changed costs one listing and one query."""

    def __init__(self, store: EncoderStore, root: str, clock: Callable[[], float] = time.time) -> None:
        self._store, self._root, self._clock = store, root, clock
        self._unreadable: dict[str, str] = {}  # by encoder, its card's stamp: said once, and not read again
        self._looked = float("-inf")

    def look(self) -> None:
        """Every LOOK_S seconds, and at once where a job has succeeded or cards are left. Raises StorageError."""
        now = self._clock()
        if now - self._looked < LOOK_S and not self._store.has_news(self._looked):
            return
        self._looked = now
        known = self._store.stamps()  # before the listing: what is published between the two is no loss
        cards = dict(self._cards())
        for encoder_id, stamp in cards.items():
            if stamp not in (known.get(encoder_id), self._unreadable.get(encoder_id)):
                if self._clock() - now > READ_S:
                    self._looked = float("-inf")  # the rest at the next look, at once
                    break
                self._read(encoder_id, stamp)
        gone = known.keys() - cards.keys()
        if gone and (cards or self._is_there()):
            self._store.vanished(gone)

    def published(self, folder: str) -> None:
        """An encoder that a job says it has published, without a look at all others. Raises StorageError."""
        encoder_id = folder.rstrip("/").rpartition("/")[2]
        facts = files(folder).get(CARD) if folder == encoder_folder(self._root, encoder_id) else None
        if facts is not None:
            self._read(encoder_id, facts.stamp)

    def _cards(self) -> Iterator[tuple[str, str]]:
        """(encoder's id, card's stamp)."""
        for path, facts in files(encoders_url(self._root)).items():
            folder, _, file = path.partition("/")
            if file == CARD:
                yield folder, facts.stamp

    def _is_there(self) -> bool:
        """A disk that is not mounted has no encoders either, and yet none is gone."""
        return is_remote(self._root) or exists(encoders_url(self._root))

    def _read(self, encoder_id: str, stamp: str) -> None:
        try:
            card = load_card(encoder_folder(self._root, encoder_id))
        except ConfigError as error:
            logger.warning("an encoder is not shown: %s", error)
            self._unreadable[encoder_id] = stamp
            return
        self._unreadable.pop(encoder_id, None)
        owner = self._store.owner(encoder_id, self._jobs(card))
        self._store.put(
            Encoder(
                id=encoder_id,
                project=owner.project if owner is not None else None,
                job_id=owner.job_id if owner is not None else None,
                created_at=card.created.timestamp(),
                card=card.model_dump(mode="json"),
                stamp=stamp,
                seen_at=self._clock(),
            )
        )

    def _jobs(self, card: Card) -> list[str]:
        """What may be the job of the run that made it: of its own name, or, for a teacher or a trial, the run's."""
        if card.run is None:
            return []
        try:
            above = read_json(join(run_folder(self._root, card.run), FACTS)).get("job")
        except (FileNotFoundError, ValueError, AttributeError):
            above = None
        return [name for name in (card.run, above) if name]
