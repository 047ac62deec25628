"""What every service shares: the bus, the registry, the KV hand-off, the engine, and the words for them."""

__version__ = "0.1.0"
