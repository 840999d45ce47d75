"""The simulated policies: length-blind ones, central queues and pools, and L4 with its parts.

Each subclasses `l4queue.sim.policy.Policy` and is named in `l4queue/sim/registry.py`. Begin with
`length_blind.py`, which is the smallest; `l4.py` calls the functions of the live system.
"""
