"""The worker's event loop: intake, generation, writes, moves, lease.

Imports `workers.engine.base`, `workers.telemetry` and the library; the one package here that talks to Redis.
Begin with `worker.py`, then `intake.py` and `session.py`. Each value has one owner: docs/architecture.md.
"""
