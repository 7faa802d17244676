"""Networks as data: layers with shapes and costs, macroarchitectures as graphs, factorization plans, TOML files.

Belongs here: arithmetic on layers and plans. No torch, no training, no quantization.
Read first: `macroarchitecture.py`.
"""
