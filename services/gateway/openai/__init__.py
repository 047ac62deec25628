"""The HTTP API that OpenAI's clients speak: chat completions, completions, models, health and metrics."""
