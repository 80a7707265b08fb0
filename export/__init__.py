"""Everything that makes an ONNX file, and the PyTorch model behind it. Importing this loads no torch."""
