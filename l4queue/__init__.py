"""l4queue: length-aware serving of large language models for people who work with queues."""

from __future__ import annotations
