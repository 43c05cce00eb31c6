"""Whether a server can be reached at all, found out before anything waits for it."""

import socket
import threading
import urllib.request
from urllib.parse import urlsplit

PATIENCE_S = 2.0
"""How long a server may take to accept a connection, name lookup included."""


def is_reachable(url: str) -> bool:
    """Whether the server of a URL accepts a connection in time. True where a proxy would be asked in its place."""
    parts = urlsplit(url)
    if parts.scheme in urllib.request.getproxies() or "all" in urllib.request.getproxies():
        return True
    connected: list[bool] = []

    def connect() -> None:
        try:
            port = parts.port or (80 if parts.scheme == "http" else 443)
            socket.create_connection((parts.hostname or "", port), timeout=PATIENCE_S).close()
            connected.append(True)
        except OSError:
            connected.append(False)

    thread = threading.Thread(target=connect, daemon=True)  # a name lookup has no time limit of its own
    thread.start()
    thread.join(PATIENCE_S)
    return connected == [True]
