"""`l4queue bench queue`: what the queue itself costs, beside other task queues. Begin with `command.py`."""
