"""The tables behind files, finetuning jobs and adapters, and the database that holds them.

SQLite by default, in WAL mode, so that a process that is killed loses nothing that was committed;
PostgreSQL by URL. Nothing here is an object-relational mapping: rows are rows.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from weft.base.errors import ConfigError

SCHEMA_VERSION = 2
_BUSY_TIMEOUT_S = 30
_LOCK_KEY = 0x57454654
"""Of the advisory lock: "WEFT"."""
_DRIVERS = {"postgresql": "postgresql+psycopg", "postgres": "postgresql+psycopg"}

metadata = sa.MetaData()

settings = sa.Table(
    "weft_settings",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
)
files = sa.Table(
    "weft_files",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("tenant", sa.Text, nullable=False, index=True),
    sa.Column("filename", sa.Text, nullable=False),
    sa.Column("purpose", sa.Text, nullable=False),
    sa.Column("num_bytes", sa.BigInteger, nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("number", sa.BigInteger, nullable=False),
)
jobs = sa.Table(
    "weft_jobs",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("number", sa.BigInteger, nullable=False),
    sa.Column("tenant", sa.Text, nullable=False, index=True),
    sa.Column("tenant_weight", sa.Float, nullable=False),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("base_model", sa.Text, nullable=False),
    sa.Column("suffix", sa.Text, nullable=False),
    sa.Column("status", sa.Text, nullable=False, index=True),
    sa.Column("training_file", sa.Text, nullable=False),
    sa.Column("validation_file", sa.Text),
    sa.Column("seed", sa.BigInteger, nullable=False),
    sa.Column("resolved", sa.JSON, nullable=False),
    sa.Column("metadata", sa.JSON),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("finished_at", sa.BigInteger),
    sa.Column("error_code", sa.Text),
    sa.Column("error_message", sa.Text),
    sa.Column("fine_tuned_model", sa.Text),
    sa.Column("result_file", sa.Text),
    sa.Column("step", sa.BigInteger, nullable=False),
    sa.Column("num_steps", sa.BigInteger, nullable=False),
    sa.Column("trained_tokens", sa.BigInteger, nullable=False),
    sa.Column("epoch_tokens", sa.BigInteger, nullable=False),
)
events = sa.Table(
    "weft_job_events",
    metadata,
    sa.Column("number", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
    sa.Column("job_id", sa.Text, nullable=False, index=True),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("level", sa.Text, nullable=False),
    sa.Column("type", sa.Text, nullable=False),
    sa.Column("message", sa.Text, nullable=False),
    sa.Column("step", sa.BigInteger),
    sa.Column("data", sa.JSON),
)
checkpoints = sa.Table(
    "weft_job_checkpoints",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("job_id", sa.Text, nullable=False, index=True),
    sa.Column("step", sa.BigInteger, nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("metrics", sa.JSON, nullable=False),
    sa.UniqueConstraint("job_id", "step"),
)
adapters = sa.Table(
    "weft_adapters",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("tenant", sa.Text, nullable=False, index=True),
    sa.Column("base_model", sa.Text, nullable=False),
    sa.Column("job_id", sa.Text, nullable=False),
    sa.Column("version", sa.BigInteger, nullable=False),
    sa.Column("directory", sa.Text, nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
)


class Database:
    """A database that this process alone uses, its tables in place.

    SQLite is guarded by the lock on the data directory that it lies in, PostgreSQL by a lock of its
    own.

    Raises:
        ConfigError: the URL is of another kind of database, it cannot be reached, another server
            uses it, or its tables were made by another version.
    """

    def __init__(self, url: str) -> None:
        self.engine = _open(url)
        self._lock: Connection | None = None
        if self.engine.dialect.name == "postgresql":
            self._lock = self.engine.connect()
            taken = self._lock.execute(sa.select(sa.func.pg_try_advisory_lock(_LOCK_KEY))).scalar()
            self._lock.commit()  # The lock is the session's; no transaction stays open.
            if not taken:
                self.close()
                raise ConfigError(
                    "another server uses this database; stop it, or choose another with "
                    "--database-url"
                )

    def close(self) -> None:
        """Disconnect; idempotent."""
        if self._lock is not None:
            self._lock.invalidate()
            self._lock.close()
            self._lock = None
        self.engine.dispose()


def _open(url: str) -> Engine:
    try:
        parsed = sa.make_url(url)
    except ArgumentError as error:
        raise ConfigError(f"the database URL is not one: {error}") from None
    driver = _DRIVERS.get(parsed.drivername, parsed.drivername)
    shown = parsed.render_as_string(hide_password=True)
    if not driver.startswith(("sqlite", "postgresql")):
        raise ConfigError(f"the database {shown} is not supported; give sqlite:// or postgresql://")
    try:
        engine = sa.create_engine(parsed.set(drivername=driver))
        if driver.startswith("sqlite"):
            event.listen(engine, "connect", _configure_sqlite)
        metadata.create_all(engine)
        _check_version(engine, shown)
    except ImportError as error:
        raise ConfigError(
            f"the database {shown} needs a driver: {error}; install psycopg[binary]"
        ) from error
    except SQLAlchemyError as error:
        reason = str(getattr(error, "orig", None) or error).strip()
        raise ConfigError(f"the database {shown} cannot be used: {reason}") from error
    return engine


def _configure_sqlite(connection: Any, _: object) -> None:
    cursor = connection.cursor()
    # NORMAL: a commit survives the process; only a power cut may take the latest ones, whole.
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.execute(f"PRAGMA busy_timeout={_BUSY_TIMEOUT_S * 1000}")
    cursor.close()


def _check_version(engine: Engine, shown: str) -> None:
    with engine.begin() as connection:
        found = connection.execute(
            sa.select(settings.c.value).where(settings.c.name == "schema")
        ).scalar()
        if found is None:
            connection.execute(settings.insert().values(name="schema", value=str(SCHEMA_VERSION)))
        elif found != str(SCHEMA_VERSION):
            raise ConfigError(
                f"the database {shown} has tables of version {found}; this Weft knows version "
                f"{SCHEMA_VERSION}: choose another --data-dir or --database-url"
            )
