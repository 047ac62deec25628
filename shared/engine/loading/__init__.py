"""From a hub id or a folder to a model that is known to compute right, or a sentence that says why not."""
