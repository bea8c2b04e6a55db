"""Engines that people serve with, each in a process of its own, judged by the log-probabilities that they give."""
