"""The embedded spool's tables and statements, how its database is opened, and how one of an earlier relay is brought up to date.

Settings: WAL with synchronous=FULL, so that a commit is on the disk when it returns; no automatic checkpoint, because the writer
thread chooses the moment; incremental vacuum, so that the file can shrink after a backlog.
"""

from pathlib import Path
from typing import Any

import apsw

from relay.spool.base import Selection, SpoolDamaged, SpoolError
from relay.spool.files import CONTENT_DIRECTORY, sync_directory
from relay.spool.records import number_of

DATABASE = "spool.db"
SCHEMA_VERSION = 3
_PAGE_BYTES = 4096
_HEADER_BYTES = 100  # SQLite takes what is shorter for a database that is still empty
_CACHE_KIB = 8192

_USED = """
CREATE TABLE used (             -- what upstreams were given, by slices of their quotas' windows
    upstream TEXT NOT NULL,
    seconds INTEGER NOT NULL,   -- of the window
    start INTEGER NOT NULL,     -- of the slice: seconds since the epoch
    transactions INTEGER NOT NULL,
    recipients INTEGER NOT NULL,
    PRIMARY KEY (upstream, seconds, start)
) WITHOUT ROWID;
"""
# `due` of a claimed message is when it is tried again should this process die; of a held one, when it is given up, or infinity. The
# indexes hold waiting and held mail only, so that the common message, which is put already claimed, never touches them.
SCHEMA = f"""{_USED}
CREATE TABLE message (
    id INTEGER PRIMARY KEY,
    content INTEGER NOT NULL,   -- id of the content, shared by the parts of a split message
    filed INTEGER NOT NULL,     -- 1: the content is a file
    shared INTEGER NOT NULL,    -- 1: other messages may have the same content
    upstream TEXT NOT NULL,
    route TEXT NOT NULL,
    due REAL NOT NULL,          -- seconds since the epoch
    attempts INTEGER NOT NULL,  -- begun so far
    token INTEGER,              -- of the claim, or NULL; negative: claimed for ending it, no upstream is involved
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
    summary TEXT NOT NULL,      -- JSON: to, cc, subject
    report INTEGER              -- id of the report that the same attempt made to the sender, or NULL
);
CREATE INDEX log_id ON log (id);
"""
_INDEXES = {
    "waiting": "CREATE INDEX waiting ON message (upstream, route, attempts > 0, due) WHERE token IS NULL AND held = ''",
    "held": "CREATE INDEX held ON message (due) WHERE held != '' AND token IS NULL",
    "sharing": "CREATE INDEX sharing ON message (content) WHERE shared = 1",
}

# Why a message is held without end that damage keeps from being read, changed or removed.
MISSING = "the content is missing from the spool"
STUCK = "it has ended; the spool is damaged and its record could not be removed"
LOST = "its record in the spool is damaged"

_BEGIN_ANEW = "restore it, or move it, its -wal and content/ away to begin with none"

# Version 1 stored the moment of the hold as `due` of held mail, and nobody could do anything about such mail but wait. What is held
# ends after `expire`, by default four days; but nothing shall bounce at an upgrade, so there is a day to use the new verbs. Mail
# without content stays until an operator has seen it.
_FROM_1 = """
ALTER TABLE log ADD COLUMN report INTEGER;
UPDATE message SET due = CASE held WHEN :missing THEN 9e999 ELSE max(created + 4 * 86400, :now + 86400) END WHERE held != '';
"""

USE = """INSERT INTO used VALUES (?, ?, ?, ?, ?) ON CONFLICT DO UPDATE
    SET transactions = transactions + excluded.transactions, recipients = recipients + excluded.recipients"""
USED = "SELECT upstream, seconds, start, transactions, recipients FROM used WHERE start + 2 * seconds > ? ORDER BY upstream, seconds, start"
#: Written by a clock that was ahead: it would count anew at every start until that time has come.
USED_AHEAD = """INSERT INTO used SELECT upstream, seconds, :now, sum(transactions), sum(recipients) FROM used
    WHERE start > :now GROUP BY upstream, seconds ON CONFLICT DO UPDATE
    SET transactions = transactions + excluded.transactions, recipients = recipients + excluded.recipients"""
FORGET_AHEAD = "DELETE FROM used WHERE start > :now"
FORGET_USED = "DELETE FROM used WHERE start + 2 * seconds <= ?"

# One row each, for executemany: several in one statement are a table that SQLite makes first and then reads.
PUT_MESSAGE = f"INSERT INTO message VALUES ({','.join('?' * 18)})"
PUT_CONTENT = "INSERT INTO content VALUES (?, ?)"
PUT_LOG = """INSERT INTO log (time, id, created, upstream, route, sender, recipient, status, attempt, size, reply, summary, report)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"""
END_MESSAGE = "DELETE FROM message WHERE id = ? AND token = ?"
END_CONTENT = "DELETE FROM content WHERE id = ?"

SHARING = "SELECT 1 FROM message WHERE content = ? AND shared = 1"
CONTINUE = """UPDATE message SET token = NULL, upstream = ?, route = ?, due = ?, attempts = attempts - ?, held = ?, recipients = ?,
    doubt = 0, reply = ifnull(?, reply) WHERE id = ? AND token = ?"""
CLAIMABLE = """SELECT id FROM message
    WHERE upstream = ? AND route = ? AND (attempts > 0) = ? AND due <= ? AND token IS NULL AND held = '' ORDER BY due LIMIT ?"""
LATE = "SELECT id FROM message WHERE id IN (SELECT value FROM json_each(?)) AND token IS NULL AND held = '' AND due <= ? ORDER BY id"
LATER = """SELECT id FROM message
    WHERE upstream = ? AND route = ? AND (attempts > 0) = ? AND due > ? AND token IS NULL AND held = '' LIMIT ?"""
OVERDUE = "SELECT id FROM message WHERE held != '' AND token IS NULL AND due <= ? ORDER BY due LIMIT ?"
MESSAGE = """SELECT upstream, route, content, filed, shared, attempts, doubt, created, sender, recipients, facts, prefix, size, held
    FROM message WHERE id = ? AND token IS NULL"""
CREATED = "SELECT created FROM message WHERE id = ?"
CLAIM = "UPDATE message SET token = ?, attempts = attempts + 1, due = ? WHERE id = ?"
TAKE = "UPDATE message SET token = ? WHERE id = ?"
QUARANTINE = "UPDATE message SET held = ?, due = 9e999 WHERE id = ? AND token IS NULL"
LEAVE = "UPDATE message SET token = NULL, held = ?, due = 9e999 WHERE id = ?"
EXPIRE = "UPDATE message SET token = NULL, doubt = doubt OR token > 0 WHERE id = ? AND token = ?"
# Not as (upstream, route) > (?, ?), for which SQLite reads all of the first lane.
FURTHER_ROUTES = """SELECT upstream, route, due FROM message WHERE token IS NULL AND held = '' AND upstream = ? AND route > ?
    ORDER BY upstream, route, attempts > 0, due LIMIT ?"""
FURTHER_UPSTREAMS = """SELECT upstream, route, due FROM message WHERE token IS NULL AND held = '' AND upstream > ?
    ORDER BY upstream, route, attempts > 0, due LIMIT ?"""
FIRST_RETRIED = """SELECT due FROM message WHERE token IS NULL AND held = '' AND upstream = ? AND route = ? AND (attempts > 0) = 1
    ORDER BY due LIMIT 1"""
NEXT_DUE_BUT = """SELECT upstream, route, min(due) FROM message
    WHERE token IS NULL AND held = '' AND id NOT IN (SELECT value FROM json_each(?)) GROUP BY upstream, route"""
NAMES = """SELECT id, typeof(upstream) = 'text' AND typeof(route) = 'text' AND typeof(due) = 'real', CAST(upstream AS BLOB),
    CAST(route AS BLOB) FROM message NOT INDEXED WHERE token IS NULL AND held = ''"""
FORGET_LOG = "DELETE FROM log WHERE number IN (SELECT number FROM (SELECT number, time FROM log ORDER BY number LIMIT ?2) WHERE time < ?1)"
TAKE_OVER = "UPDATE message SET token = NULL, doubt = doubt OR token > 0 WHERE token IS NOT NULL"
TAKE_OVER_ONE = f"{TAKE_OVER} AND id = ?"
CLAIMED = "SELECT id, token IS NOT NULL FROM message WHERE id > ? ORDER BY id LIMIT ?"
# A clock that was set by :step seconds. What was stored before moves along, so that nothing waits for a time that has become far, and
# nothing has grown old at a stroke. Forwards, what is older than the step was stored before it, and due at most a retry ahead of it.
STEP_FORWARD = """UPDATE message SET created = created + :step, due = CASE WHEN held != '' OR due <= :now THEN due + :step ELSE due END
    WHERE created <= :now - :step"""
STEP_BACK = """UPDATE message SET created = CASE WHEN created > :now THEN created + :step ELSE created END, due = due + :step
    WHERE due > :now OR created > :now"""
#: At a start: stored by a clock that was ahead of this one.
FROM_THE_FUTURE = """UPDATE message SET due = CASE held WHEN '' THEN :now ELSE due - (created - :now) END, created = :now
    WHERE created > :now + 60"""
LAST_ID = "SELECT max(ifnull((SELECT max(id) FROM message), 0), ifnull((SELECT max(id) FROM log), 0))"
WAITING_BYTES = "SELECT total(size) FROM message"
FILED = "SELECT content FROM message WHERE filed = 1"
CONTENT = "SELECT octets FROM content WHERE id = ?"

HOLD = "UPDATE message SET held = ?, due = 9e999 WHERE id = ?"
RELEASE = "UPDATE message SET held = '', due = ? WHERE id = ?"
RESCHEDULE = "UPDATE message SET due = min(due, ?) WHERE id = ?"
DROP = "DELETE FROM message WHERE id = ?"

# A row can be claimed and held: it is being given up. Held is what the operator must hear.
STATE = """CASE WHEN held != '' THEN 'held' WHEN token IS NOT NULL THEN 'active' WHEN attempts > 0 THEN 'deferred' ELSE 'due' END"""


def conditions(selection: Selection, *, moment: str, state: str, now: float) -> tuple[str, dict[str, Any]]:
    """What SQL can decide of a selection, beginning with AND, and its values. `Selection.admits` decides the rest.

    `moment`: the column that has the age. `state`: the expression that has the state.
    """
    values: dict[str, Any] = {}
    wanted = []
    for column, value in (("route", selection.route), ("upstream", selection.upstream)):
        if value:
            wanted.append(f"{column} = :{column}")
            values[column] = value
    if selection.state:
        wanted.append(f"{state} = :state")
        values["state"] = selection.state
    if selection.older_than is not None:
        wanted.append(f"{moment} <= :moment")
        values["moment"] = now - selection.older_than
    if selection.ids:
        # One parameter: SQLite looks named ones up one by one, so that five thousand of them cost a second a page.
        wanted.append("id IN (SELECT value FROM json_each(:ids))")
        values["ids"] = f"[{','.join(str(number_of(id)) for id in sorted(selection.ids))}]"
    return "".join(f" AND {condition}" for condition in wanted), values


def open_database(path: Path, *, now: float) -> apsw.Connection:
    """Open, create or bring up to date the database. Raises SpoolError for a schema newer than this relay, SpoolDamaged where only the
    database has gone."""
    new = not path.exists() or path.stat().st_size < _HEADER_BYTES
    if new:
        _miss(path)
    path.touch(mode=0o600)  # SQLite gives its other files the same mode
    if new:
        sync_directory(path.parent)  # before there is a log: power loss must not leave one without its database
    database = apsw.Connection(str(path))
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
            database.execute(";".join((SCHEMA, *_INDEXES.values())))
            database.pragma("user_version", SCHEMA_VERSION)
        sync_directory(path.parent)
    elif version < SCHEMA_VERSION:
        with database:
            if version == 1:
                database.execute(_FROM_1 + _INDEXES["held"], {"missing": MISSING, "now": now})
            database.execute(_USED)
            database.pragma("user_version", SCHEMA_VERSION)
    elif version > SCHEMA_VERSION:
        raise SpoolError(f"{path} was written by a newer relay (schema {version}, this one knows {SCHEMA_VERSION})")
    return database


def _miss(path: Path) -> None:
    """Raise SpoolDamaged where mail is left of a database that has gone: SQLite would remove its log, and a sweep the content."""
    log, content = path.with_name(f"{path.name}-wal"), path.parent / CONTENT_DIRECTORY
    remains = [log] if log.exists() and log.stat().st_size else []
    remains += [content] if content.is_dir() and any(content.iterdir()) else []
    if remains:
        names = " and ".join(each.name for each in remains)
        hint = f"restore it, or move {names} away, too, to begin with none"
        raise SpoolDamaged(f"{path} is missing or empty, but there is mail of its spool in {names}; {hint}")


def in_words(error: apsw.Error | OSError) -> str:
    """Why the database, or what lies beside it, cannot be opened."""
    match error:
        case apsw.NotADBError():
            return f"{DATABASE} is no database; {_BEGIN_ANEW}"
        case apsw.CorruptError():
            return f"{DATABASE} is damaged at its root; {_BEGIN_ANEW}"
        case apsw.CantOpenError():
            return f"{error}; {DATABASE}, its -wal and its -shm must belong to the user as whom relay runs"
        case OSError():
            return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    return str(error)


def rebuild_indexes(database: apsw.Connection) -> None:
    """Make the indexes of messages anew, inside a transaction.

    They are forgotten, not dropped: dropping reads each of their pages, and some cannot be read. The pages stay in the file, unused.
    Raises apsw.CorruptError, and has changed nothing then, where it is the messages themselves that cannot be read.
    """
    database.execute("SELECT count(held) FROM message NOT INDEXED").fetchall()
    database.pragma("writable_schema", True)
    try:
        database.executemany("DELETE FROM sqlite_schema WHERE type = 'index' AND name = ?", [(name,) for name in _INDEXES])
        database.execute("PRAGMA writable_schema = RESET")
        for statement in _INDEXES.values():
            database.execute(statement)
    finally:
        database.pragma("writable_schema", False)
