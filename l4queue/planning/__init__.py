"""Decisions about the whole fleet, one round at a time: ranges of the stages and their workers. Pure.

Imports `cost`, `policy` and models, never `sim`: a replay comes in as a function. Begin with `planner.py`, then
`partition.py` (which plan) and `steady_state.py` (what a plan costs).
"""
