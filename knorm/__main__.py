"""Run the command `knorm` as `python -m knorm`."""

from __future__ import annotations

from knorm.cli import main

if __name__ == "__main__":
    main()
