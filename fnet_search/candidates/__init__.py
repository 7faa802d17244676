"""From a plan to its evaluation: the job, training and measuring it, probes, worker processes.

Belongs here: what a worker does with one candidate or one layer. No study, no policy.
Read first: `evaluate.py`.
"""
