"""From a plan to its evaluation: the job, training and measuring it, probes, worker processes.

Comes in: What a worker does with one candidate or one layer. No study, no policy.
Read first: `evaluate.py`.
"""
