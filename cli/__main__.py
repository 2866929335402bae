"""`python -m qtool.cli` is the `qtool` command."""

from __future__ import annotations

from qtool.cli.main import main

main()
