"""A number of bytes on the command line: 80MB, 1.5GB, 64MiB, 80000000."""

from __future__ import annotations

import re
from typing import Any

import click

from qtool.errors import UsageError

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")


class ByteSize(click.ParamType[int]):
    """Converts to int; units are decimal (MB) or binary (MiB), in any case."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """See click.ParamType.

        Raises:
            UsageError: for what is no size.
        """
        if isinstance(value, int):
            return value
        found = _SIZE.fullmatch(str(value).strip())
        unit = UNITS.get(found.group(2).upper()) if found else None
        if found is None or unit is None:
            name = param.opts[0] if param is not None else "size"
            raise UsageError(f"{name} {value}", "is no number of bytes", "write 80MB, 1.5GB or 64MiB")
        return int(float(found.group(1)) * unit)
