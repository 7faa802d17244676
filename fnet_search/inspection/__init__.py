"""What is done to the networks of a recorded run: layer analysis, another quantization, latency.

Belongs here: work on trained networks after the search. No training.
Read first: `analysis.py`.
"""
