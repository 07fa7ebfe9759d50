"""The README's Python runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_snippets_run_in_order() -> None:
    snippets = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
    assert len(snippets) > 4
    namespace: dict[str, object] = {}
    for snippet in snippets:
        exec(compile(snippet, str(README), "exec"), namespace)


def test_documented_commands_are_marked_for_ci() -> None:
    assert re.findall(r"^<!-- ci: (\w+) -->\n```bash$", README.read_text(), re.MULTILINE) == ["run", "tests"]
