"""What a policy sees and returns: evaluations, constraints, the history; ask and tell, ranking, the exact choice.

Comes in: What a host of any kind needs. No torch, no Optuna.
Read first: `protocol.py`.
"""
