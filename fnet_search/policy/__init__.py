"""What a policy sees and returns: evaluations, constraints, the history; ask and tell, ranking, the exact choice.

Belongs here: what any host of a policy needs. No torch, no Optuna.
Read first: `protocol.py`.
"""
