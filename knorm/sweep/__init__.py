"""Many models, methods, budgets and texts in one study: a plan, its cells, a folder of results, and engines."""
