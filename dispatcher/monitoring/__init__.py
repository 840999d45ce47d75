"""Prometheus metrics of the deployment as a whole, and Flower's bounded intake of events."""
