"""The search loop and a whole run: request, preparation, record, sharing between processes, winner, reporting.

Comes in: What brings policy, workers and record together.
Read first: `search_loop.py`.
"""
