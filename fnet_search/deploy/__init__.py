"""The exported network: ONNX files, ONNX Runtime, the audit of its codes, timing.

Belongs here: what runs a network outside torch.
Read first: `export.py`.
"""
