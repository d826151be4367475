"""How objects show themselves: as lines in a terminal, as a table in a notebook."""

from __future__ import annotations

from html import escape


class Displayed:
    """Show an object by the title and rows of its `_display_rows`; rows without a value are left out."""

    def _display_rows(self) -> tuple[str, dict[str, object]]:
        raise NotImplementedError(f"{type(self).__name__} must say what is shown of it")

    def __repr__(self) -> str:
        title, rows = self._display_rows()
        shown = {name: str(value) for name, value in rows.items() if value not in (None, "")}
        width = max(map(len, shown), default=0)
        indented = {name: value.replace("\n", "\n" + " " * (width + 4)) for name, value in shown.items()}
        return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in indented.items())])

    def _repr_html_(self) -> str:
        title, rows = self._display_rows()
        cells = "".join(
            f"<tr><th style='text-align: left'>{escape(name)}</th><td style='text-align: left'>"
            f"{escape(str(value)).replace(chr(10), '<br>')}</td></tr>"
            for name, value in rows.items()
            if value not in (None, "")
        )
        return f"<table><caption>{escape(title)}</caption>{cells}</table>"
