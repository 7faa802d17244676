"""Optuna: trials, samplers, storages, leases, the pruner.

Comes in: What reads or writes a study. No torch.
Read first: `trials.py`.
"""
