"""The OpenAI-compatible server: routes, streams, metrics and the chat page."""
