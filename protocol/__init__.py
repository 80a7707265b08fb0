"""What client and aggregator share: topics, messages, the tensor codec, the manifest, the connection."""

import os

# ONNX Runtime reports its use to Microsoft unless this is set before its first import. Every module of ours that
# imports it imports this package before.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
