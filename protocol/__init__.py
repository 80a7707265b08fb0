"""What client and aggregator share: topics, messages, the tensor codec, the manifest, the connection."""
