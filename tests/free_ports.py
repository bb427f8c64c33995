"""Finds ports for processes that listen."""

import socket


def free_port() -> int:
    """Find a port that nothing listens at now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]
