"""Data sets, recipes, networks as torch modules, numerics, the training loop, and the warm start from a parent.

Belongs here: everything on the way to float weights. No quantization, no search.
Read first: `train.py`.
"""
