"""Checks in a process of their own: the parent (supervisor) and the child (worker), two ends of one protocol."""
