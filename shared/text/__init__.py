"""Text and tokens: tokenising, chat templates, detokenising and stop strings, without torch or transformers."""
