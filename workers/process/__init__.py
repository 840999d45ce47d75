"""Care for a worker's processes: exclusive devices, and children that die with their parent.

Imports settings, errors and `l4queue.hardware`; `workers.__main__`, `loop` and `host` use it. Begin with
`devices.py`.
"""
