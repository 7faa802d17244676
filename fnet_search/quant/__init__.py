"""quint8: schemes, ranges, folding, equalization, bias correction, the integer simulator, layer statistics.

Belongs here: the rules of docs/quint8.md and what measures their effect. No search, no run folders.
Read first: `quantize.py`.
"""
