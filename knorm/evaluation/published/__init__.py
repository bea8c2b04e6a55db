"""Numbers that others published, beside what their protocol gives here."""
