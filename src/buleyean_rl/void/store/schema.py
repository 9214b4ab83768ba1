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
    """
    CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);
    CREATE TABLE conversations (
        id TEXT PRIMARY KEY, title TEXT NOT NULL, created REAL NOT NULL, changed REAL NOT NULL, deleted REAL
    );
    CREATE INDEX conversations_by_change ON conversations (changed) WHERE deleted IS NULL;
    CREATE TABLE batches (
        id TEXT PRIMARY KEY, name TEXT NOT NULL, models TEXT NOT NULL, paused INTEGER NOT NULL, created REAL NOT NULL,
        deleted REAL
    );
    CREATE TABLE turns (
        id TEXT PRIMARY KEY, conversation TEXT REFERENCES conversations, batch TEXT REFERENCES batches,
        position INTEGER NOT NULL, prompt TEXT NOT NULL, system TEXT NOT NULL, temperature REAL NOT NULL,
        max_tokens INTEGER NOT NULL, blind INTEGER NOT NULL, revealed INTEGER NOT NULL, created REAL NOT NULL,
        verdict TEXT, rejection INTEGER REFERENCES rejections
    );
    CREATE INDEX turns_by_conversation ON turns (conversation, position) WHERE conversation IS NOT NULL;
    CREATE INDEX turns_by_batch ON turns (batch, position) WHERE batch IS NOT NULL;
    INSERT INTO conversations SELECT id, substr(prompt, 1, 80), created, created, NULL FROM questions;
    INSERT INTO turns SELECT id, id, NULL, 0, prompt, '', 0, 128, blind, revealed, created, NULL, NULL FROM questions;
    ALTER TABLE answers RENAME TO old_answers;
    CREATE TABLE answers (
        id INTEGER PRIMARY KEY AUTOINCREMENT, turn TEXT NOT NULL REFERENCES turns, slot INTEGER NOT NULL,
        attempt INTEGER NOT NULL, model TEXT NOT NULL, name TEXT NOT NULL, context TEXT NOT NULL,
        temperature REAL NOT NULL, seed INTEGER NOT NULL, state TEXT NOT NULL, text TEXT NOT NULL, error TEXT NOT NULL,
        drawn TEXT, subject TEXT NOT NULL, UNIQUE (turn, slot, attempt)
    );
    INSERT INTO answers
        SELECT NULL, question, slot, 0, CASE side WHEN 'base' THEN 'base' ELSE replace(model, ' ', '-') END, model,
        json_text(prompt), 0, 0, CASE WHEN text IS NULL THEN 'waiting' ELSE 'done' END, COALESCE(text, ''), '', NULL,
        subject_of(json_text(prompt), COALESCE(text, ''))
        FROM old_answers JOIN questions ON question = questions.id;
    CREATE INDEX answers_unfinished ON answers (state) WHERE state IN ('waiting', 'writing');
    DROP TABLE old_answers;
    DROP TABLE questions;
    DROP INDEX rejections_by_question;
    DROP INDEX rejections_by_digest;
    ALTER TABLE rejections DROP COLUMN question;
    ALTER TABLE rejections DROP COLUMN slot;
    ALTER TABLE rejections ADD COLUMN subject TEXT NOT NULL DEFAULT '';
    UPDATE rejections SET subject = subject_of(prompt, answer);
    CREATE INDEX rejections_by_subject ON rejections (subject, undone);
    CREATE INDEX rejections_by_digest ON rejections (digest);
    CREATE INDEX rejections_active ON rejections (id) WHERE undone IS NULL AND count > 0;
    ALTER TABLE runs ADD COLUMN name TEXT NOT NULL DEFAULT '';
    ALTER TABLE runs ADD COLUMN rejections INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE runs ADD COLUMN decision TEXT;
    ALTER TABLE runs ADD COLUMN pair_before TEXT;
    ALTER TABLE runs ADD COLUMN deleted REAL;
    UPDATE runs SET name = 'run ' || id, rejections = records, decision = 'kept';
    ALTER TABLE samples ADD COLUMN unlearned INTEGER
    """,
    "ALTER TABLE samples ADD COLUMN spans TEXT NOT NULL DEFAULT '[]'",
)
