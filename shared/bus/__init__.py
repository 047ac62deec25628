"""The bus: every subject, every message, and one connection to NATS. KV never travels here."""
