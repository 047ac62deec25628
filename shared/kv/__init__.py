"""The KV hand-off: what a request's KV looks like, who holds it until when, and how it travels in one chunk."""
