"""Every message on the bus and every record in Redis. Lies below bus, kv and registry, and imports none of them."""
