"""Ports on loopback that are free now and likely to be so in a minute, when what was started comes to listen there."""

from __future__ import annotations

import random
import socket

from service.stack.state import HOST

# Above those where Ray's own workers listen (10002 to 19999), below those that Linux gives to outgoing connections.
RANGE = range(20_000, 32_768)


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True


def free_ports(count: int) -> list[int]:
    """Different from each other. Chosen at random, so that two callers at once hardly meet."""
    shuffled = random.SystemRandom().sample(RANGE, len(RANGE))
    free = filter(is_free, shuffled)
    return [next(free) for _ in range(count)]
