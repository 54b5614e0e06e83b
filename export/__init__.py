"""ONNX for a target: export, checks, quantisation."""
