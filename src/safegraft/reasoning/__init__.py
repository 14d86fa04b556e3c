"""Reasoning models: where a trace understands its query, SafeKey training on that, and probing with its heads."""
