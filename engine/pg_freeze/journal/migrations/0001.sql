-- The tables of the journal. A migration that was released is never changed: what is to be different comes with the next number.

-- Half of each page is left empty: on a full disk there is still room for what a thaw has to update.

-- A ticket is drawn by each attempt before it acts. A resume draws one too, void from birth: it marks the
-- moment up to which every earlier attempt of its holder has lost the right to freeze.
CREATE TABLE pgfreeze.tickets (
    ticket    bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    act       text NOT NULL CHECK (act IN ('pause', 'resume')),
    holder    text NOT NULL,
    databases text[] NOT NULL,
    began_at  timestamptz NOT NULL,        -- the attempt, which is older than its ticket
    drawn_at  timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
    voided_at timestamptz
) WITH (fillfactor = 50);
CREATE INDEX tickets_holder ON pgfreeze.tickets (holder, ticket);

CREATE TABLE pgfreeze.freezes (
    token          uuid PRIMARY KEY,
    ticket         bigint NOT NULL REFERENCES pgfreeze.tickets,
    holder         text NOT NULL,
    databases      text[] NOT NULL,
    strategy       text NOT NULL DEFAULT 'read-only' CHECK (strategy ~ '^[a-z][a-z0-9-]*$'),
    sessions       jsonb NOT NULL DEFAULT '[]',   -- those that hold the locks: pid and backend_start
    roles          text[] NOT NULL DEFAULT '{}',  -- those whose privileges are revoked; none: everybody's
    admit          text NOT NULL CHECK (admit IN ('readers-once-drained', 'readers', 'nobody')),
    state          text NOT NULL CHECK (state IN ('draining', 'frozen', 'thawing', 'thawed')),
    requested_at   timestamptz NOT NULL,
    changed_at     timestamptz NOT NULL,   -- just before the settings were changed
    barrier_at     timestamptz,            -- just after that was committed
    older          jsonb NOT NULL DEFAULT '[]',   -- the sessions seen then: see mark_barrier
    drained_at     timestamptz,
    frozen_at      timestamptz,
    lease_until    timestamptz NOT NULL,
    checkpoint_at  timestamptz,
    checkpoint_lsn pg_lsn,
    restoring_at   timestamptz,            -- just before the prior settings came back
    restored_at    timestamptz,            -- just after that was committed
    thawed_at      timestamptz,
    thawed_by      text,
    terminated     jsonb NOT NULL DEFAULT '{}',
    lingering      jsonb NOT NULL DEFAULT '[]',
    warnings       jsonb NOT NULL DEFAULT '[]',
    readers_ended  integer NOT NULL DEFAULT 0,
    left_over      jsonb NOT NULL DEFAULT '[]'    -- what the last thaw could not restore: what, why, sqlstate
) WITH (fillfactor = 50);
CREATE INDEX freezes_open ON pgfreeze.freezes (state) WHERE state <> 'thawed';
CREATE INDEX freezes_ticket ON pgfreeze.freezes (ticket);

-- Databases and roles are remembered by OID: a rename during the freeze must not keep anything frozen.
CREATE TABLE pgfreeze.frozen_databases (
    token    uuid NOT NULL REFERENCES pgfreeze.freezes,
    database oid NOT NULL,
    name     text NOT NULL,
    closed   boolean NOT NULL,             -- whether this freeze turned datallowconn off, and no thaw has turned it on
    active   boolean NOT NULL DEFAULT true, -- until all of it is restored, roles' settings too
    restored_at timestamptz,               -- just after the database's own settings were restored
    PRIMARY KEY (token, database)
) WITH (fillfactor = 50);
CREATE UNIQUE INDEX one_freeze_per_database
    ON pgfreeze.frozen_databases (database) WHERE active;

CREATE TABLE pgfreeze.prior_settings (
    token    uuid NOT NULL REFERENCES pgfreeze.freezes,
    database oid NOT NULL,
    role     oid NOT NULL,                 -- 0: the database's own setting
    value    text,                         -- NULL: there was none
    restored_at timestamptz,
    PRIMARY KEY (token, database, role)
) WITH (fillfactor = 50);

-- Who was in the way of a thaw, and was ended or could not be. It refers to no other table: it must be possible to write
-- to it while the others are locked.
CREATE TABLE pgfreeze.blockers (
    token         uuid NOT NULL,
    pid           integer NOT NULL,        -- 0: a prepared transaction; its gid is the application
    backend_start timestamptz NOT NULL,    -- or when it was prepared
    database      text,
    role          text,
    application   text,
    state         text,
    seen_at       timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
    ended         boolean NOT NULL,
    PRIMARY KEY (token, pid, backend_start)
);


-- What was found around one snapshot: just before it, and just after.
CREATE TABLE pgfreeze.attestations (
    id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    token      uuid NOT NULL REFERENCES pgfreeze.freezes,
    before_at  timestamptz NOT NULL,
    before     jsonb NOT NULL,
    after_at   timestamptz,
    after      jsonb,
    method     text CHECK (method IN ('wal', 'transaction-ids', 'none')),
    level      text CHECK (level IN ('strict', 'quiesced', 'crash-only')),
    violations jsonb,
    sequences  jsonb,                      -- those that ran ahead
    unseen     jsonb,                      -- what was not looked at, and why
    advice     text,
    sizes      jsonb                       -- of all relations, while frozen
);
CREATE INDEX attestations_token ON pgfreeze.attestations (token, id);


-- What is revoked now. The ACL is kept as text: pg_upgrade takes no column of type aclitem.
CREATE TABLE pgfreeze.revoked (
    token   uuid NOT NULL REFERENCES pgfreeze.freezes,
    catalog oid NOT NULL,
    object  oid NOT NULL,
    attnum  smallint NOT NULL,             -- 0: not a column
    owner   oid NOT NULL,
    acl     text,                          -- as it was; NULL: there was none
    entries jsonb NOT NULL,                -- level, grantor, grantee, privilege, grantable
    PRIMARY KEY (token, catalog, object, attnum)
);
