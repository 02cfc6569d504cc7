"""The network both halves share: torch only, no sockets, files or training."""
