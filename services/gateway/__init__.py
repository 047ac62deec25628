"""The gateway: takes requests over HTTP and NATS, and takes each through prefill and decode to its last token."""
