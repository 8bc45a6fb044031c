"""Lookup: which of many short texts have to do with a question. SQLite's full-text index, ranked by BM25.

Words are compared by their stems ("birthdays" finds "birthday"); words that every question has count for nothing.
"""

import re
import sqlite3

COMMON = set(
    "a again an and any anything are about at be been can could did do does for from give had has have how i in is it know let"
    " me mention my of on one or please quick remember remind said say she he so some still t s tell test that the their them"
    " they this to told up user us was we were what when where which who whose will with would you your".split()
)


class Index:
    def __init__(self, texts: list[str]):
        self.database = sqlite3.connect(":memory:")
        self.database.execute("create virtual table texts using fts5(text, tokenize = 'porter unicode61 remove_diacritics 2')")
        self.database.executemany("insert into texts(rowid, text) values (?, ?)", enumerate(texts))

    def search(self, question: str, most: int = 1) -> list[int]:
        """Numbers of the texts that share words with the question, best first; none if none does."""
        words = [word for word in re.findall(r"\w+", question.casefold()) if word not in COMMON]
        query = " OR ".join(f'"{word}"' for word in words)
        if not query:
            return []
        rows = self.database.execute("select rowid from texts where texts match ? order by rank, rowid limit ?", (query, most))
        return [number for (number,) in rows]
