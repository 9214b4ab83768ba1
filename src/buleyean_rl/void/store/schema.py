"""The tables, a script a version: an older file is migrated when it is opened."""

from __future__ import annotations

MIGRATIONS = (
    """
    CREATE TABLE questions (
        id TEXT PRIMARY KEY, prompt TEXT NOT NULL, blind INTEGER NOT NULL, revealed INTEGER NOT NULL,
        created REAL NOT NULL
    );
    CREATE TABLE answers (
        question TEXT NOT NULL REFERENCES questions, slot INTEGER NOT NULL, side TEXT NOT NULL, model TEXT NOT NULL,
        text TEXT, PRIMARY KEY (question, slot)
    );
    CREATE TABLE rejections (
        id INTEGER PRIMARY KEY AUTOINCREMENT, uid TEXT NOT NULL UNIQUE, digest TEXT NOT NULL, prompt TEXT NOT NULL,
        answer TEXT NOT NULL, spans TEXT NOT NULL, count INTEGER NOT NULL, rounds INTEGER NOT NULL,
        reason TEXT NOT NULL, source TEXT NOT NULL, created REAL NOT NULL, undone REAL
    );
    CREATE INDEX rejections_by_digest ON rejections (undone, digest, id);
    """,
    """
    CREATE TABLE runs (
        id INTEGER PRIMARY KEY AUTOINCREMENT, uid TEXT NOT NULL UNIQUE, folder TEXT NOT NULL, state TEXT NOT NULL,
        records INTEGER NOT NULL, steps INTEGER NOT NULL, error TEXT NOT NULL, created REAL NOT NULL, ended REAL
    );
    CREATE TABLE points (
        run INTEGER NOT NULL REFERENCES runs, step INTEGER NOT NULL, loss REAL NOT NULL, floor REAL NOT NULL,
        gap REAL NOT NULL, PRIMARY KEY (run, step)
    );
    CREATE TABLE samples (
        run INTEGER NOT NULL REFERENCES runs, position INTEGER NOT NULL, prompt TEXT NOT NULL, before TEXT NOT NULL,
        after TEXT NOT NULL, PRIMARY KEY (run, position)
    );
    """,
    """
    ALTER TABLE rejections ADD COLUMN question TEXT;
    ALTER TABLE rejections ADD COLUMN slot INTEGER;
    CREATE INDEX rejections_by_question ON rejections (question) WHERE question IS NOT NULL
    """,
    """
    CREATE TABLE imports (
        id INTEGER PRIMARY KEY AUTOINCREMENT, uid TEXT NOT NULL UNIQUE, sha256 TEXT NOT NULL, name TEXT NOT NULL,
        format TEXT NOT NULL, records INTEGER NOT NULL, rejections INTEGER NOT NULL, created REAL NOT NULL, undone REAL
    );
    CREATE INDEX imports_by_sha256 ON imports (sha256);
    ALTER TABLE rejections ADD COLUMN import INTEGER REFERENCES imports;
    ALTER TABLE rejections ADD COLUMN drawn TEXT;
    CREATE INDEX rejections_by_import ON rejections (import) WHERE import IS NOT NULL;
    DROP INDEX rejections_by_digest;
    CREATE INDEX rejections_by_digest ON rejections (undone, digest, id, count)
    """,
    "UPDATE rejections SET count = 1, rounds = 1 WHERE source = 'page' AND count = 60 AND rounds = 60",
)
