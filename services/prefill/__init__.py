"""The prefill role: computes a prompt's KV and first token, and holds the KV until a decode instance has fetched it."""
