"""The frontier as a table in Markdown, for model cards."""

from typing import Any

from hybrid.checkpoints.card import markdown_table
from hybrid.evals.columns import COLUMNS, heading
from hybrid.evals.table import marked_rows, notices


def frontier_markdown(act: dict[str, Any]) -> str:
    """An act's title and rows, efficient ones marked, and what must stand beside them. ValueError as in `pareto`."""
    columns = [column for column in COLUMNS if column.place == "table"]
    rows = [[column.text(row, act) for column in columns] for row in marked_rows(act)]
    table = markdown_table([heading(column, act) for column in columns], rows)
    return "\n\n".join([f"### {act['title']}", table, *notices(act)])
