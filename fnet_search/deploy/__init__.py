"""The exported network: ONNX files, ONNX Runtime, the audit of its codes, latency.

Belongs here: what runs a network outside torch.
Read first: `export.py`.
"""
