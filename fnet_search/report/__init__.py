"""The results of a run for people: the outcome, figures, drawings, CSV tables, HTML pages.

Belongs here: what draws and writes from data. No torch, no Optuna.
Read first: `outcome.py`.
"""
