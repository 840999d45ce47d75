"""Discrete-event simulation of many engines under one scheduling policy; the policy code is the live one.

Imports `planning`, `policy`, `cost` and models, never `protocol`. Begin with `cluster.py` (the event loop) and
`policy.py` (the interface of a policy); `registry.py` names the policies.
"""
