"""Tables of one row a thing: titles, no row numbers, columns as wide as what is in them."""

import qt

__all__ = ["fitRows", "setUpTable"]


def setUpTable(table, titles: list[str], stretched: tuple[int, ...]) -> None:
    """Gives a QTableWidget its columns; those that are `stretched` share the room that is left."""
    table.setColumnCount(len(titles))
    table.setHorizontalHeaderLabels(titles)
    table.verticalHeader().setVisible(False)
    header = table.horizontalHeader()
    for column in range(len(titles)):
        resize = qt.QHeaderView.Stretch if column in stretched else qt.QHeaderView.ResizeToContents
        header.setSectionResizeMode(column, resize)


def fitRows(table, most: int) -> None:
    """Makes rows as high as their words at the present widths, and the table as high as `most` of its rows."""
    table.resizeRowsToContents()
    height = table.horizontalHeader().sizeHint.height() + 2 * table.frameWidth + 2
    height += sum(table.rowHeight(row) for row in range(min(table.rowCount, most)))
    if table.minimumHeight != height:
        table.setMinimumHeight(height)
        table.setMaximumHeight(height)
