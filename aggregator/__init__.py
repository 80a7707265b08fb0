"""The server of a federation: rounds, admission of updates, strategies, durable store, embedded broker."""
