"""Discrete-event simulation of many engines under one scheduling policy; the policy code is the live one."""
