"""The only door to Redis: keys, one Lua script per state transition, calls as values, two executors.

Imports models, config, errors and the serving order of `policy`. Nothing above it imports redis. Begin with
`keys.py` (names), `calls.py` (transitions) and `lua/` (their scripts); docs/life-of-a-request.md tells the order.
"""
