"""Binary responses: their schema, and headers for images written by a job."""

from __future__ import annotations

BINARY = {"schema": {"type": "string", "format": "binary"}}
WEBP = "image/webp"
PICTURE_HEADERS = {  # keep browsers from interpreting an image as anything else
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'; sandbox",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
}
