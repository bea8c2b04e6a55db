"""The laws, a module per family; importing this package enters every check into registry.CHECKS."""

from importlib import import_module

FAMILIES = (
    "count",
    "provenance",
    "order",
    "identity",
    "protection",
    "independence",
    "selection",
    "numerics",
    "memory",
    "seen",
    "cache",
    "perplexity",
    "schedule",
)
for _family in FAMILIES:  # in the order of the catalogue
    import_module(f"knorm.laws.catalogue.{_family}")
