"""Care for a worker's processes: exclusive devices, and children that die with their parent."""
