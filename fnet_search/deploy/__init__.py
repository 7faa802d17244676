"""The exported network: ONNX files, ONNX Runtime, the audit of its codes, timing.

Comes in: What runs a network elsewhere than in torch.
Read first: `export.py`.
"""
