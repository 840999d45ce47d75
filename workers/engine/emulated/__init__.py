"""The emulated engine: deterministic tokens at predicted times, for fleets without GPUs.

Begin with `engine.py`; `scheduler.py` is its continuous batching.
"""
