"""The simulated engine: continuous batching as in vLLM V1, advanced in closed form between events.

Begin with `instance.py`; `batch.py` holds its state, `request.py` one request with its time stamps.
"""
