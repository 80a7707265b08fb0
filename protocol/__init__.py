"""What client and aggregator share: topics, messages, the tensor codec, the bundle manifest, the connection."""
