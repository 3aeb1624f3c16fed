"""The chat server with every connection of its Python to another machine, and every look-up of a name, written to the file `WATCHED` names.

The decoding child is a process of its own, without sockets to begin with.
"""

from __future__ import annotations

import os
import sys
from ipaddress import ip_address
from pathlib import Path


def is_elsewhere(event: str, args: tuple) -> str:
    """The other machine that an audit event asks for, else empty."""
    if event == "socket.getaddrinfo":
        host = args[0]
    elif event in ("socket.connect", "socket.sendto") and isinstance(args[1], tuple):
        host = args[1][0]
    else:
        return ""
    host = host.decode() if isinstance(host, bytes) else host
    if host in (None, "", "localhost"):
        return ""
    try:
        address = ip_address(host)
    except ValueError:
        return str(host)
    return "" if address.is_loopback or address.is_unspecified else str(host)


def watch(out: Path) -> None:
    """Write down what leaves this machine from now on."""

    def hook(event: str, args: tuple) -> None:
        if event.startswith("socket.") and (host := is_elsewhere(event, args)):
            with out.open("a") as f:
                f.write(f"{event} {host}\n")

    sys.addaudithook(hook)


if __name__ == "__main__":
    watch(Path(os.environ["WATCHED"]))
    from chat_app.server import main

    sys.exit(main())
