"""Traffic for the simulator: traces read from CSV and seeded synthetic workloads. Begin with `trace.py`."""
