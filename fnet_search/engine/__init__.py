"""The search loop and a whole run: request, preparation, record, sharing between processes, winner, reporting.

Belongs here: what connects policy, workers and record.
Read first: `search_loop.py`.
"""
