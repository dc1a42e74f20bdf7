"""Binary responses: their schema, and headers for pictures that a job wrote."""

from __future__ import annotations

BINARY = {"schema": {"type": "string", "format": "binary"}}
WEBP = "image/webp"
PICTURE_HEADERS = {  # keep browsers from interpreting a picture as anything else
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'; sandbox",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
}
