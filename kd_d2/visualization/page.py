"""Tables in Markdown and a page that shows them with pictures."""

from typing import Sequence

from .html import element, html_table

__all__ = ["html_page", "markdown_table"]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return an aligned Markdown table; numbers are right-aligned."""
    lines = [list(header)] + [list(row) for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    numeric = [all(_is_number(row[i]) for row in rows) for i in range(len(header))]

    def render(cells):
        padded = (c.rjust(w) if n else c.ljust(w) for c, w, n in zip(cells, widths, numeric))
        return "| " + " | ".join(padded) + " |"

    rule = ("-" * (w - 1) + ":" if n else "-" * w for w, n in zip(widths, numeric))
    return "\n".join([render(header), "| " + " | ".join(rule) + " |", *map(render, rows)])


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def html_page(title: str, text: str, table: str, pictures: Sequence[str]) -> str:
    """Return a self-contained page with a paragraph, a Markdown table and pictures.

    Args:
        table: as :func:`markdown_table` makes it.
        pictures: paths relative to the page.
    """
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    figures = [element("p", element("img", src=picture, alt=picture)) for picture in pictures]
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">{element("title", title)}
<style>
body {{ font-family: sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em }}
table {{ border-collapse: collapse }} th, td {{ border: 1px solid #bbb; padding: .3em .8em }}
td {{ text-align: right }} tbody th {{ text-align: left; font-weight: normal }}
img {{ max-width: 100% }}
</style></head><body>
{element("h1", title)}
{element("p", text)}
{html_table(rows[0], rows[2:])}
{"".join(figures)}
</body></html>
"""
