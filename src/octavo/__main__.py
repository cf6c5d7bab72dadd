"""`python -m octavo COMMAND`, which launchers such as `accelerate launch -m octavo` need."""

from __future__ import annotations

from octavo.cli import main

if __name__ == "__main__":
    main()
