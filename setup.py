"""Build script. All metadata and tool settings are in pyproject.toml; here is only what must be code:
the four rooms live at the top level and reach the package as links in src/qtool (docs/decisions/0001-packaging.md).
"""

from pathlib import Path

from setuptools import find_packages, setup

ROOMS = ("quantize", "runtime", "kernels", "cli")
PACKAGE = Path(__file__).parent / "src" / "qtool"

for room in ROOMS:
    if not (PACKAGE / room / "__init__.py").is_file():
        raise SystemExit(
            f"src/qtool/{room} does not lead to {room}/: the checkout lost its symbolic links. "
            "Clone with `git -c core.symlinks=true clone`, or run "
            f"`ln -s ../../{room} src/qtool/{room}`."
        )

setup(
    packages=find_packages("src"),
    package_dir={"": "src"},
)
