"""Optuna: trials, samplers, storages, leases, the pruner.

Belongs here: what reads or writes a study. No torch.
Read first: `trials.py`.
"""
