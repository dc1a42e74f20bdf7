"""Find free loopback ports that are likely to remain free until a newly started process listens on them."""

from __future__ import annotations

import random
import socket

from service.stack.state import HOST

# Above the ports of Ray's workers (10002 to 19999) and below those that Linux assigns to outgoing connections.
PORT_RANGE = range(20_000, 32_768)


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True


def free_ports(count: int) -> list[int]:
    """Return distinct free ports, chosen at random so that concurrent callers rarely collide."""
    shuffled = random.SystemRandom().sample(PORT_RANGE, len(PORT_RANGE))
    free = filter(is_free, shuffled)
    return [next(free) for _ in range(count)]
