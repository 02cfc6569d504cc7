"""rt-neds: decode behaviour from spikes while it happens."""

__version__ = "0.1.0"
