"""What a stage returns: text for a person, JSON for a program, a table for a notebook."""

from __future__ import annotations

import html
import importlib
import reprlib
from typing import Any

_BRIEF = reprlib.Repr()
_BRIEF.maxlevel, _BRIEF.maxdict, _BRIEF.maxlist, _BRIEF.maxtuple, _BRIEF.maxstring, _BRIEF.maxother = 1, 3, 4, 4, 50, 50
_LONGEST = 300  # characters of a repr


class Shown:
    """The result of a stage. A record extends it with `@dataclass(frozen=True, repr=False)`.

    `print(result)` is the table of the command line; the repr is short; a notebook shows `table_rows()` as a table.
    """

    def to_text(self) -> str:
        """What a person reads on the terminal."""
        raise NotImplementedError

    def to_json(self) -> Any:
        """The JSON form."""
        raise NotImplementedError

    def table_rows(self) -> list[dict[str, Any]]:
        """The figures as rows of a table; none where there is no such table."""
        return []

    def to_pandas(self) -> Any:
        """The rows as a pandas.DataFrame.

        Raises:
            UsageError: pandas is not installed.
        """
        from shortstack.common.extras import need_packages

        need_packages("to_pandas", "pandas")
        return importlib.import_module("pandas").DataFrame(self.table_rows())

    def __str__(self) -> str:
        return self.to_text()

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={_BRIEF.repr(value)}" for name, value in vars(self).items())
        if len(shown) > _LONGEST:
            shown = shown[: _LONGEST - 3] + "..."
        return f"{type(self).__name__}({shown})"

    def _repr_html_(self) -> str:
        rows = self.table_rows()
        if not rows:
            return f"<pre>{html.escape(self.to_text())}</pre>"
        names = list(dict.fromkeys(name for row in rows for name in row))
        head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
        body = "".join(f"<tr>{''.join(f'<td>{_cell(row.get(name))}</td>' for name in names)}</tr>" for row in rows)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value: Any) -> str:
    return html.escape("" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value))
