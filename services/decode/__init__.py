"""The decode role: fetches a request's KV into blocks reserved for it, and decodes it to its end."""
