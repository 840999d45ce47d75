"""A local deployment: its processes, their supervision, logs and metrics ports.

`up`, `demo` and `bench serve` use it. Begin with `stack.py`; `supervisor.py` knows nothing of l4queue.
"""
