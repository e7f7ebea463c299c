"""What HTTP can carry: addresses and keys as users give them."""

from __future__ import annotations

from urllib.parse import urlsplit


def is_address(url: str) -> bool:
    """Whether a client can ask there: http or https, a host, and a port that is one."""
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is none, half an IPv6 address
        return False
    return sound and url.isascii() and url.isprintable() and " " not in url


def fits_header(key: str) -> bool:
    """Whether a key arrives as it was sent: printable ASCII without space around it."""
    return key.isascii() and key.isprintable() and key == key.strip()
