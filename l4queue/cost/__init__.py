"""The cost of time: one engine step, its fit to measurements, and the price of a move.

Imports models, config and errors only; `policy`, `planning` and `sim` build on it. Begin with `step.py`.
"""
