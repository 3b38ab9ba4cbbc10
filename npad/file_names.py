"""How the name of a file is shown. Names are bytes: some are no text, others would move the cursor.

What a person reads (the terminal, errors, the report) shows a name by `shown`. What a program reads
(CSV, JSON) holds it as it is, so that the file can be opened by it.
"""

from __future__ import annotations

import os
from unicodedata import category

__all__ = ["shown"]


def shown(name: str | os.PathLike[str]) -> str:
    r"""A name on one line of text that can be printed and encoded; done twice, it changes no more.

    Parameters
    ----------
    name : as Python gives it, or a text that holds such names

    Returns
    -------
    str
        With ``\n``, ``\x1b`` or ``\u202e`` for what is not seen, and ``\xff`` for a byte that is no
        text.
    """
    text = os.fspath(name)
    return text if text.isprintable() else "".join(map(_seen, text))


def _seen(c: str) -> str:
    if c.isprintable() or category(c) == "Zs":  # the spaces of other scripts
        return c
    if "\udc80" <= c <= "\udcff":  # in place of a byte
        return f"\\x{ord(c) - 0xDC00:x}"
    return c.encode("unicode_escape").decode()
