"""Writes tables in Markdown.

Knows Markdown. Does not know what cells hold.
"""

from collections.abc import Sequence


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, of_numbers: bool = True) -> str:
    """Write a table in Markdown, without a line break behind its last row.

    Args:
        head: the titles of the columns.
        rows: as many cells each as there are titles.
        of_numbers: align every column but the first to the right, as numbers are read; False aligns all to the left.
    """
    rule = ["---", *["---:" if of_numbers else "---"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))
