"""What a run came to, for people: the outcome, figures, drawings, CSV tables, HTML pages.

Comes in: Drawing and writing from data. No torch, no Optuna.
Read first: `outcome.py`.
"""
