"""The embedded spool's tables and statements, and how its database is opened.

Settings: WAL with synchronous=FULL, so that a commit is on the disk when it returns; no automatic checkpoint, because the writer
thread chooses the moment; incremental vacuum, so that the file can shrink after a backlog.
"""

from functools import cache
from pathlib import Path

import apsw

from relay.spool.base import SpoolError
from relay.spool.files import sync_directory

DATABASE = "spool.db"
SCHEMA_VERSION = 1
_PAGE_BYTES = 4096
_CACHE_KIB = 8192

# `due` of a claimed message is when it is tried again should this process die. The index holds waiting mail only, so that the
# common message, which is put already claimed, never touches it.
SCHEMA = """
CREATE TABLE message (
    id INTEGER PRIMARY KEY,
    content INTEGER NOT NULL,   -- id of the content, shared by the parts of a split message
    filed INTEGER NOT NULL,     -- 1: the content is a file
    shared INTEGER NOT NULL,    -- 1: other messages may have the same content
    upstream TEXT NOT NULL,
    route TEXT NOT NULL,
    due REAL NOT NULL,          -- seconds since the epoch
    attempts INTEGER NOT NULL,  -- begun so far
    token INTEGER,              -- of the claim, or NULL
    doubt INTEGER NOT NULL,     -- 1: a claim ended without a word: all recipients are in doubt
    held TEXT NOT NULL,         -- why nobody shall try it, or ''
    created REAL NOT NULL,
    sender TEXT NOT NULL,
    recipients TEXT NOT NULL,   -- those still to be served; see records.py
    facts TEXT NOT NULL,
    prefix BLOB NOT NULL,
    size INTEGER NOT NULL,
    reply TEXT NOT NULL         -- the last one, or ''
);
CREATE INDEX waiting ON message (upstream, route, attempts > 0, due) WHERE token IS NULL AND held = '';
CREATE INDEX sharing ON message (content) WHERE shared = 1;
CREATE TABLE content (id INTEGER PRIMARY KEY, octets BLOB NOT NULL);
CREATE TABLE log (
    number INTEGER PRIMARY KEY,
    time REAL NOT NULL,
    id INTEGER NOT NULL,
    created REAL NOT NULL,
    upstream TEXT NOT NULL,
    route TEXT NOT NULL,
    sender TEXT NOT NULL,
    recipient TEXT NOT NULL,
    status TEXT NOT NULL,
    attempt INTEGER NOT NULL,
    size INTEGER NOT NULL,
    reply TEXT NOT NULL,
    summary TEXT NOT NULL       -- JSON: to, cc, subject
);
CREATE INDEX log_id ON log (id);
"""

SHARING = "SELECT 1 FROM message WHERE content = ? AND shared = 1"
#: Statements for many rows take at most this many; each number of rows is a statement of its own in the driver's cache.
ROWS_A_STATEMENT = 32


@cache
def put_messages(count: int) -> str:
    return f"INSERT INTO message VALUES {_tuples(count, 18)}"


@cache
def put_contents(count: int) -> str:
    return f"INSERT INTO content VALUES {_tuples(count, 2)}"


@cache
def put_log(count: int) -> str:
    columns = "time, id, created, upstream, route, sender, recipient, status, attempt, size, reply, summary"
    return f"INSERT INTO log ({columns}) VALUES {_tuples(count, 12)}"


@cache
def end_messages(count: int) -> str:
    """Only where the claim is still held."""
    return f"DELETE FROM message WHERE (id, token) IN (VALUES {_tuples(count, 2)})"


@cache
def end_contents(count: int) -> str:
    return f"DELETE FROM content WHERE id IN ({','.join('?' * count)})"


def _tuples(count: int, width: int) -> str:
    return ",".join([f"({','.join('?' * width)})"] * count)


CONTINUE = """UPDATE message SET token = NULL, upstream = ?, route = ?, due = ?, attempts = attempts - ?, held = ?, recipients = ?,
    doubt = 0, reply = ifnull(?, reply) WHERE id = ? AND token = ?"""
CLAIMABLE = """SELECT id, content, filed, shared, attempts, doubt, created, sender, recipients, facts, prefix, size FROM message
    WHERE upstream = ? AND route = ? AND (attempts > 0) = ? AND due <= ? AND token IS NULL AND held = '' ORDER BY due LIMIT ?"""
CLAIM = "UPDATE message SET token = ?, attempts = attempts + 1, due = ? WHERE id = ?"
QUARANTINE = "UPDATE message SET held = ?, token = NULL WHERE id = ?"
EXPIRE = "UPDATE message SET token = NULL, doubt = 1 WHERE id = ? AND token = ?"
NEXT_DUE = "SELECT upstream, route, min(due) FROM message WHERE token IS NULL AND held = '' GROUP BY upstream, route"
FORGET_LOG = "DELETE FROM log WHERE number IN (SELECT number FROM (SELECT number, time FROM log ORDER BY number LIMIT ?2) WHERE time < ?1)"
TAKE_OVER = "UPDATE message SET token = NULL, doubt = 1 WHERE token IS NOT NULL"
LAST_ID = "SELECT max(ifnull((SELECT max(id) FROM message), 0), ifnull((SELECT max(id) FROM log), 0))"
FILED = "SELECT content FROM message WHERE filed = 1"
CONTENT = "SELECT octets FROM content WHERE id = ?"


def open_database(path: Path) -> apsw.Connection:
    """Open or create the database. Raises SpoolError for a schema newer than this relay."""
    path.touch(mode=0o600)  # SQLite gives its other files the same mode
    new = path.stat().st_size == 0
    database = apsw.Connection(str(path), statementcachesize=8 * ROWS_A_STATEMENT)
    database.set_busy_timeout(10_000)  # a reader that recovers the log after a crash holds it for a moment
    if new:
        database.pragma("page_size", _PAGE_BYTES)
        database.pragma("auto_vacuum", "incremental")
    database.pragma("journal_mode", "wal")
    database.pragma("synchronous", "full")
    database.pragma("wal_autocheckpoint", 0)
    database.pragma("cache_size", -_CACHE_KIB)
    version = database.pragma("user_version")
    if version == 0:
        with database:
            database.execute(SCHEMA)
            database.pragma("user_version", SCHEMA_VERSION)
        sync_directory(path.parent)
    elif version > SCHEMA_VERSION:
        raise SpoolError(f"{path} was written by a newer relay (schema {version}, this one knows {SCHEMA_VERSION})")
    return database
