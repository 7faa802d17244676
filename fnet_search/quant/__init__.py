"""quint8: schemes, ranges, folding, equalization, bias correction, the integer simulator, layer statistics.

Comes in: Rules of docs/quint8.md and what measures them. No search, no files of runs.
Read first: `quantize.py`.
"""
