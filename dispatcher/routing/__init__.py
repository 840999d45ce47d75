"""Routing of arrivals: count tokens, choose queue and order, enqueue. Begin with `service.py`."""
