"""Everything that makes an ONNX file, and the PyTorch model it is traced from. Importing this loads no torch."""
