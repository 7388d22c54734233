"""Put tables made from the records into a document: `python -m benchmarks.tables README.md`.

The text between `<!-- benchmark:NAME -->` and `<!-- /benchmark -->` becomes the table of benchmarks/results/NAME.json.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from benchmarks.report import markdown
from sami_fast.report import write_text

RESULTS = Path(__file__).parent / "results"
_SECTION = re.compile(r"(<!-- benchmark:([\w.-]+) -->\n).*?(<!-- /benchmark -->)", re.DOTALL)


def fill(text: str, results: Path = RESULTS) -> str:
    """`text` with every marked section made anew.

    Raises:
        ValueError: a marker names no record, or a marker has no counterpart.
    """
    opened, closed = text.count("<!-- benchmark:"), text.count("<!-- /benchmark -->")
    if not opened == closed == len(_SECTION.findall(text)):
        raise ValueError(f"markers: expected pairs, got {opened} that open a table and {closed} that close one")

    def section(match: re.Match) -> str:
        file = results / f"{match[2]}.json"
        if not file.is_file():
            known = ", ".join(sorted(path.stem for path in results.glob("*.json"))) or "none"
            raise ValueError(f"marker {match[2]}: expected one of the records ({known})")
        return f"{match[1]}\n{markdown(json.loads(file.read_text()))}\n\n{match[3]}"

    return _SECTION.sub(section, text)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__.splitlines()[0])
    parser.add_argument("document", type=Path, nargs="+")
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a table is not up to date")
    options = parser.parse_args()
    for document in options.document:
        text = document.read_text()
        filled = fill(text)
        if filled != text and options.check:
            print(f"{document}: tables differ from the records; run: python -m benchmarks.tables {document}")
            return 1
        if filled != text:
            write_text(document, filled)
    return 0


if __name__ == "__main__":
    sys.exit(main())
