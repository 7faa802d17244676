"""Work on the networks of a recorded run: layer analysis, requantization, latency.

Belongs here: what is measured or changed on trained networks after the search. No training.
Read first: `analysis.py`.
"""
