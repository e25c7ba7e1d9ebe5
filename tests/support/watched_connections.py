"""A database connection that counts the statements which threads run on it at once.

In:  an open connection. Out: the same rows, and `most`, the largest number of statements that ran at once.
Try: `store._database = watched = WatchedConnection(store._database)`

From Python 3.12 on, two threads that run the same statement at once get each other's rows, but only now and then.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from typing import Any


class WatchedConnection:
    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection, self.running, self.most = connection, 0, 0

    def execute(self, *statement: Any) -> WatchedRows:
        self.running += 1
        self.most = max(self.most, self.running)
        time.sleep(0.001)  # another thread runs
        return WatchedRows(self, self.connection.execute(*statement))


class WatchedRows:
    def __init__(self, connection: WatchedConnection, cursor: sqlite3.Cursor) -> None:
        self.connection, self.cursor = connection, cursor

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        yield from self.cursor
        self.connection.running -= 1

    def fetchone(self) -> tuple[Any, ...] | None:
        self.connection.running -= 1
        return self.cursor.fetchone()
