"""The documents of the built-in corpus: English reference prose and source code that every CPython brings.

Prose is pydoc's topics (the language reference) and the docstrings of some modules; code is the whole source of
others. The modules are named here, not searched for, so that what else is installed changes nothing; those named exist
in CPython 3.11 to 3.14, and one that a later version lacks is left out.
"""

from __future__ import annotations

import hashlib
import inspect
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_DOCSTRING_MODULES = (
    "_pydecimal _pyio bdb calendar cmd code codecs codeop configparser contextlib copy csv difflib doctest fileinput "
    "ftplib getopt gettext graphlib gzip hashlib heapq hmac imaplib inspect ipaddress linecache locale lzma "
    "mailbox mimetypes netrc ntpath numbers optparse os pdb pkgutil platform plistlib poplib posixpath pprint profile "
    "pyclbr queue quopri random runpy sched secrets selectors shelve shlex shutil signal smtplib socket socketserver "
    "statistics stringprep struct tempfile textwrap this threading timeit trace traceback types typing uuid "
    "warnings wave weakref webbrowser zipapp _threading_local _weakrefset _collections_abc "
    "asyncio/events asyncio/locks asyncio/protocols asyncio/queues asyncio/streams asyncio/tasks asyncio/transports "
    "collections/__init__ concurrent/futures/_base concurrent/futures/process "
    "email/_policybase email/charset email/header email/headerregistry email/message email/policy "
    "http/cookiejar http/cookies http/server importlib/abc json/__init__ json/decoder json/encoder "
    "logging/__init__ logging/config logging/handlers multiprocessing/managers multiprocessing/pool "
    "re/__init__ unittest/case unittest/mock unittest/suite urllib/parse urllib/robotparser "
    "wsgiref/handlers wsgiref/validate xml/dom/minidom xml/etree/ElementTree xml/sax/handler xml/sax/xmlreader "
    "xmlrpc/server"
)
_SOURCE_MODULES = (
    "argparse ast base64 bisect compileall dataclasses dis enum filecmp fractions functools genericpath glob opcode "
    "pickle pickletools pstats pydoc rlcompleter site ssl stat string subprocess symtable tabnanny tarfile "
    "token tokenize tracemalloc tty zipimport "
    "asyncio/base_events asyncio/sslproto asyncio/selector_events asyncio/unix_events ctypes/util "
    "email/_header_value_parser email/feedparser email/generator email/utils http/client importlib/_bootstrap "
    "importlib/_bootstrap_external importlib/util json/scanner multiprocessing/connection multiprocessing/util "
    "re/_compiler re/_parser sqlite3/dump tomllib/_parser unittest/loader unittest/main unittest/runner urllib/request "
    "wsgiref/simple_server xmlrpc/client"
)

DOCSTRING_MODULES = tuple(_DOCSTRING_MODULES.split())
SOURCE_MODULES = tuple(_SOURCE_MODULES.split())

MIN_DOCSTRING_CHARS = 150
# Long strings at the start of a line, after a colon's line break or at the file's start: docstrings, near enough.
_DOCSTRING = re.compile(r'(?:\A|:[ \t]*(?:#[^\n]*)?\n|\n\n)[ \t]*[rR]?"""(.*?)"""', re.DOTALL)


@dataclass(frozen=True)
class Document:
    """One document: its name ("topic:assert", "docstrings:csv", "source:enum"), kind and text."""

    name: str
    kind: Literal["prose", "code"]
    text: str

    @property
    def order(self) -> str:
        """sha256 (hex) of the name: a fixed order that no content influences."""
        return hashlib.sha256(self.name.encode()).hexdigest()

    @property
    def family(self) -> str:
        """What must not be split: a topic, or everything of one top-level module or package."""
        kind, _, name = self.name.partition(":")
        return self.name if kind == "topic" else name.split("/")[0]


def documents() -> Iterator[Document]:
    """Every document this Python has, in a fixed order."""
    for name, text in sorted(_topics().items()):
        yield Document(f"topic:{name}", "prose", text)
    library = Path(sysconfig.get_path("stdlib"))
    for module in DOCSTRING_MODULES:
        source = _source(library, module)
        if text := "\n\n".join(_docstrings(source)):
            yield Document(f"docstrings:{module}", "prose", text)
    for module in SOURCE_MODULES:
        if text := _source(library, module):
            yield Document(f"source:{module}", "code", text)


def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions split it off
        return {}
    return dict(topics)


def _source(library: Path, module: str) -> str:
    path = library / f"{module}.py"
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _docstrings(source: str) -> Iterator[str]:
    for match in _DOCSTRING.finditer(source):
        text = inspect.cleandoc(match[1])
        if len(text) >= MIN_DOCSTRING_CHARS:
            yield text
