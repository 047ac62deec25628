"""The inference engine: transformers' model definitions with our attention over our paged KV pool.

It knows requests as `Sequence`s and nothing of the network. `EngineRunner` is what services use.
"""
