"""What a terminal of 80 columns shows must fit it, in words and not in keys."""

import re

COLUMNS = 80
# A key of a record, as no table shows it; options and files are written otherwise.
KEY = re.compile(r"(?<![\w/.-])[a-z]+(?:_[a-z0-9]+)+(?![\w/.=-])")


def check_narrow(text: str, *known: str) -> None:
    """No line of `text` is too long, and none holds a key; `known` words may have underscores."""
    lines = text.splitlines()
    assert lines and [line for line in lines if len(line.rstrip()) > COLUMNS] == []
    assert set(KEY.findall(text)) - set(known) == set()
