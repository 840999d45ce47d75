"""Decisions as pure functions: values in, a decision with a reason out. No clock, no I/O, no random state."""
