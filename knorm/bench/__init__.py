"""Latency that can be trusted: arms that generate in turns, counters, and verdicts on policies and commits."""
