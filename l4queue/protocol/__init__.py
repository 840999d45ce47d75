"""The only door to Redis: keys, one Lua script per state transition, calls as values, two executors."""
