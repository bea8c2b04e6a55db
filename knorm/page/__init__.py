"""One static page of what was found: its parts, its figures, and the templates that show them."""
