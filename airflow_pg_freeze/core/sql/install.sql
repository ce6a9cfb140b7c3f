-- The journal of airflow-pg-freeze, and the only code that thaws.
--
-- Runs in the maintenance database, as often as one likes: every object is created if missing or replaced.
-- Nothing here is SECURITY DEFINER: whoever calls a routine needs the rights for what it does. (A procedure
-- that commits may not be, and could not have SET clauses either; hence every name below is qualified, and such a
-- procedure only uses operators on exactly the types that pg_catalog has them for: of others somebody could have
-- made one in a schema of the caller's search_path, for a superuser to run.)
--
-- Errors raised here, for classification by SQLSTATE:
--   PF001  the ticket is void: a resume, or a newer attempt of the same holder, came first
--   PF002  a database is held by another freeze (DETAIL is a JSON object that describes it)
--   PF003  no dead-man switch watches this freeze
--   PF004  a named database does not exist
--   PF005  at least one freeze could not be thawed
--   PF006  the freeze to adopt has been thawed
--   PF007  a session that held the locks is gone
--   PF008  the strategy privileges cannot do its work here; the message says why, and what to do

CREATE SCHEMA IF NOT EXISTS airflow_pg_freeze;
REVOKE ALL ON SCHEMA airflow_pg_freeze FROM PUBLIC;

-- Half of each page is left empty: on a full disk there is still room for what a thaw has to update.

-- A ticket is drawn by each attempt before it acts. A resume draws one too, void from birth: it marks the
-- moment up to which every earlier attempt of its holder has lost the right to freeze.
CREATE TABLE IF NOT EXISTS airflow_pg_freeze.tickets (
    ticket    bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    act       text NOT NULL CHECK (act IN ('pause', 'resume')),
    holder    text NOT NULL,
    databases text[] NOT NULL,
    began_at  timestamptz NOT NULL,        -- the attempt, which is older than its ticket
    drawn_at  timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
    voided_at timestamptz
) WITH (fillfactor = 50);
CREATE INDEX IF NOT EXISTS tickets_holder ON airflow_pg_freeze.tickets (holder, ticket);

CREATE TABLE IF NOT EXISTS airflow_pg_freeze.freezes (
    token          uuid PRIMARY KEY,
    ticket         bigint NOT NULL REFERENCES airflow_pg_freeze.tickets,
    holder         text NOT NULL,
    databases      text[] NOT NULL,
    strategy       text NOT NULL DEFAULT 'database' CHECK (strategy IN ('database', 'lock', 'privileges')),
    sessions       jsonb NOT NULL DEFAULT '[]',   -- those that hold the locks: pid and backend_start
    roles          text[] NOT NULL DEFAULT '{}',  -- those whose privileges are revoked; none: everybody's
    admit          text NOT NULL CHECK (admit IN ('readers-once-drained', 'readers', 'nobody')),
    state          text NOT NULL CHECK (state IN ('draining', 'frozen', 'thawing', 'thawed')),
    requested_at   timestamptz NOT NULL,
    changed_at     timestamptz NOT NULL,   -- just before the settings were changed
    barrier_at     timestamptz,            -- just after that was committed
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
    readers_ended  integer NOT NULL DEFAULT 0
) WITH (fillfactor = 50);
CREATE INDEX IF NOT EXISTS freezes_open ON airflow_pg_freeze.freezes (state) WHERE state <> 'thawed';

-- Databases and roles are remembered by OID: a rename during the freeze must not keep anything frozen.
CREATE TABLE IF NOT EXISTS airflow_pg_freeze.frozen_databases (
    token    uuid NOT NULL REFERENCES airflow_pg_freeze.freezes,
    database oid NOT NULL,
    name     text NOT NULL,
    closed   boolean NOT NULL,             -- whether this freeze turned datallowconn off
    active   boolean NOT NULL DEFAULT true,
    PRIMARY KEY (token, database)
) WITH (fillfactor = 50);
CREATE UNIQUE INDEX IF NOT EXISTS one_freeze_per_database
    ON airflow_pg_freeze.frozen_databases (database) WHERE active;

CREATE TABLE IF NOT EXISTS airflow_pg_freeze.prior_settings (
    token    uuid NOT NULL REFERENCES airflow_pg_freeze.freezes,
    database oid NOT NULL,
    role     oid NOT NULL,                 -- 0: the database's own setting
    value    text,                         -- NULL: there was none
    PRIMARY KEY (token, database, role)
);


-- What was found around one snapshot: just before it, and just after.
CREATE TABLE IF NOT EXISTS airflow_pg_freeze.attestations (
    id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    token      uuid NOT NULL REFERENCES airflow_pg_freeze.freezes,
    before_at  timestamptz NOT NULL,
    before     jsonb NOT NULL,
    after_at   timestamptz,
    after      jsonb,
    method     text CHECK (method IN ('wal', 'locks', 'privileges', 'counters')),
    level      text CHECK (level IN ('strict', 'read-only', 'crash-only')),
    violations jsonb
);
CREATE INDEX IF NOT EXISTS attestations_token ON airflow_pg_freeze.attestations (token, id);


-- The sessions of a database that are not known to be harmless, read afresh at each call.
--
-- backend_type is an open list, to which extensions add their own: so the safe ones are named, all others count. Parallel
-- workers belong to their leader. A walsender is safe only while it streams, since one that was opened with
-- replication=database also runs plain SQL. NULL (hidden from us) is never safe.
DROP VIEW IF EXISTS airflow_pg_freeze.sessions;
CREATE VIEW airflow_pg_freeze.sessions AS
SELECT a.datid, a.datname, a.pid, a.usename, a.application_name, a.state, a.backend_type, a.backend_start, a.xact_start,
       (SELECT r.rolsuper FROM pg_catalog.pg_roles r WHERE r.rolname = CURRENT_USER)
       OR (a.usesysid IS NOT NULL
           AND NOT COALESCE((SELECT r.rolsuper FROM pg_catalog.pg_roles r WHERE r.oid = a.usesysid), true)
           AND (pg_catalog.pg_has_role('pg_signal_backend', 'USAGE')
                OR pg_catalog.pg_has_role(a.usesysid, 'USAGE'))) AS signalable,
       -- With track_activities off the state is 'disabled' and xact_start unknown; but whoever is in a
       -- transaction holds the lock on his own virtual transaction id.
       CASE WHEN a.state = 'disabled'
            THEN NOT EXISTS (SELECT FROM pg_catalog.pg_locks l WHERE l.pid = a.pid AND l.locktype = 'virtualxid')
            ELSE a.state IN ('idle', 'idle in transaction (aborted)') END AS expendable
  FROM pg_catalog.pg_stat_activity a
 WHERE a.pid <> pg_catalog.pg_backend_pid()
   AND a.backend_type IS DISTINCT FROM 'autovacuum worker'
   AND a.backend_type IS DISTINCT FROM 'parallel worker'
   AND NOT (a.backend_type IS NOT DISTINCT FROM 'walsender'
            AND EXISTS (SELECT FROM pg_catalog.pg_stat_replication s
                         WHERE s.pid = a.pid AND s.state IN ('catchup', 'streaming', 'backup')));


-- The sessions that are starting in a database. They have read its settings, or are about to, but pg_stat_activity does
-- not say yet to which database they belong; until it does they hold this lock, which nobody else takes in this mode.
DROP VIEW IF EXISTS airflow_pg_freeze.starting;
CREATE VIEW airflow_pg_freeze.starting AS
SELECT l.objid AS datid, d.datname, l.pid
  FROM pg_catalog.pg_locks l JOIN pg_catalog.pg_database d ON d.oid = l.objid
 WHERE l.locktype = 'object' AND l.classid = 'pg_catalog.pg_database'::pg_catalog.regclass
   AND l.mode = 'RowExclusiveLock' AND l.granted;


-- Every default_transaction_read_only = off that would override the database's own setting for some role.
-- Precedence: role in database > role > database. `prior` is what the role has in this database, if anything.
DROP VIEW IF EXISTS airflow_pg_freeze.overrides;
CREATE VIEW airflow_pg_freeze.overrides AS
WITH settings AS (
    SELECT s.setdatabase, s.setrole, pg_catalog.split_part(c.entry, '=', 2) AS value
      FROM pg_catalog.pg_db_role_setting s, pg_catalog.unnest(s.setconfig) AS c (entry)
     WHERE pg_catalog.split_part(c.entry, '=', 1) = 'default_transaction_read_only'
)
SELECT d.oid AS database, d.datname, r.oid AS role, r.rolname, inside.value AS prior
  FROM pg_catalog.pg_database d
 CROSS JOIN pg_catalog.pg_roles r
  LEFT JOIN settings inside ON inside.setdatabase = d.oid AND inside.setrole = r.oid
  LEFT JOIN settings everywhere ON everywhere.setdatabase = 0 AND everywhere.setrole = r.oid
 WHERE NOT COALESCE(inside.value, everywhere.value, 'on')::boolean
       -- Settings are those of who logs in, and only where he may: SET ROLE does not load them.
   AND r.rolcanlogin AND pg_catalog.has_database_privilege(r.oid, d.oid, 'CONNECT');


CREATE OR REPLACE FUNCTION airflow_pg_freeze.draw_ticket(
    act text, holder text, databases text[], began timestamptz)
RETURNS airflow_pg_freeze.tickets
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    drawn airflow_pg_freeze.tickets;
BEGIN
    PERFORM pg_catalog.set_config('synchronous_commit', 'local', true);
    -- One drawer at a time, or two attempts would each miss the other's ticket.
    LOCK TABLE airflow_pg_freeze.tickets IN SHARE ROW EXCLUSIVE MODE;
    -- An attempt that began before its holder resumed, or before an attempt that has drawn already, comes too
    -- late: its ticket is born void.
    INSERT INTO airflow_pg_freeze.tickets (act, holder, databases, began_at, voided_at)
    SELECT draw_ticket.act, draw_ticket.holder, draw_ticket.databases, COALESCE(draw_ticket.began, pg_catalog.clock_timestamp()),
           CASE WHEN draw_ticket.act = 'resume'
                  OR EXISTS (SELECT FROM airflow_pg_freeze.tickets r
                              WHERE r.holder = draw_ticket.holder AND r.databases && draw_ticket.databases
                                AND CASE r.act WHEN 'resume' THEN r.drawn_at >= draw_ticket.began
                                               ELSE r.began_at > draw_ticket.began END)
                THEN pg_catalog.clock_timestamp() END
    RETURNING * INTO drawn;
    -- One that is void itself voids no others: they are newer than it.
    IF drawn.act = 'pause' AND drawn.voided_at IS NOT NULL THEN RETURN drawn; END IF;
    -- Waits for a freezing transaction that has already locked its ticket.
    UPDATE airflow_pg_freeze.tickets t
       SET voided_at = pg_catalog.clock_timestamp()
     WHERE t.holder = draw_ticket.holder AND t.databases && draw_ticket.databases
       AND t.ticket < drawn.ticket AND t.voided_at IS NULL;
    RETURN drawn;
END $$;


-- Whether one of these databases is marked as frozen from inside, that is by the strategy privileges. Any role can set the
-- mark for itself: only those count who could have put a journal there.
CREATE OR REPLACE FUNCTION airflow_pg_freeze.inside(names text[])
RETURNS boolean
LANGUAGE sql VOLATILE SET search_path = pg_catalog, pg_temp AS $$
    SELECT EXISTS (SELECT FROM pg_db_role_setting s JOIN pg_database d ON d.oid = s.setdatabase, unnest(s.setconfig) AS c (entry)
                    WHERE d.datname::text = ANY (names) AND d.datname <> current_database() AND s.setrole <> 0
                      AND starts_with(c.entry, 'application_name=pg-freeze inside ')
                      AND has_database_privilege(s.setrole, d.oid, 'CREATE'))
$$;


-- Whether this database is read-only by default, perhaps by a freeze whose journal is in another one.
CREATE OR REPLACE FUNCTION airflow_pg_freeze.read_only_here()
RETURNS boolean
LANGUAGE sql VOLATILE SET search_path = pg_catalog, pg_temp AS $$
    SELECT EXISTS (SELECT FROM pg_database d JOIN pg_db_role_setting s ON s.setdatabase = d.oid AND s.setrole = 0,
                           unnest(s.setconfig) AS c (entry)
                    WHERE d.datname = current_database() AND split_part(c.entry, '=', 1) = 'default_transaction_read_only'
                      AND split_part(c.entry, '=', 2)::boolean)
$$;


-- What must be so for a freeze to begin or to be adopted, asked under locks that are held until that is committed.
CREATE OR REPLACE FUNCTION airflow_pg_freeze.may_freeze(my_ticket bigint, the_token uuid, needs_dead_man boolean)
RETURNS airflow_pg_freeze.tickets
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    t    airflow_pg_freeze.tickets;
    held airflow_pg_freeze.freezes;
BEGIN
    PERFORM set_config('synchronous_commit', 'local', true);
    SELECT * INTO t FROM airflow_pg_freeze.tickets WHERE ticket = my_ticket FOR UPDATE;
    IF t.ticket IS NULL OR t.voided_at IS NOT NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'PF001', MESSAGE = format('ticket %s of %L is void', my_ticket, t.holder);
    END IF;
    LOCK TABLE airflow_pg_freeze.freezes IN SHARE ROW EXCLUSIVE MODE;
    IF EXISTS (SELECT FROM airflow_pg_freeze.freezes WHERE token = the_token AND state IN ('thawing', 'thawed')) THEN
        RAISE EXCEPTION USING ERRCODE = 'PF006', MESSAGE = format('%s has been thawed', the_token);
    END IF;
    IF needs_dead_man AND NOT EXISTS (SELECT FROM airflow_pg_freeze.dead_men() m WHERE m.token = the_token) THEN
        RAISE EXCEPTION USING ERRCODE = 'PF003', MESSAGE = format('no dead-man switch watches %s', the_token);
    END IF;
    SELECT f.* INTO held FROM airflow_pg_freeze.freezes f
      JOIN airflow_pg_freeze.frozen_databases b ON b.token = f.token AND b.active
      JOIN pg_database p ON p.oid = b.database
     WHERE p.datname::text = ANY (t.databases) AND f.token <> the_token LIMIT 1;
    IF held.token IS NOT NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'PF002', MESSAGE = format('held by %L', held.holder), DETAIL = to_jsonb(held)::text;
    END IF;
    IF airflow_pg_freeze.inside(t.databases) THEN
        RAISE EXCEPTION USING ERRCODE = 'PF002', MESSAGE = 'its privileges are revoked, from inside';
    END IF;
    RETURN t;
END $$;


-- Freeze, or adopt the freeze that this holder already has: everything commits together, or nothing does.
-- One statement of the client, so that a client stopped midway holds no lock.
CREATE OR REPLACE FUNCTION airflow_pg_freeze.begin_freeze(
    my_ticket bigint, new_token uuid, lease interval, admit text, needs_dead_man boolean, strategy text, roles text[])
RETURNS airflow_pg_freeze.freezes
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    t         airflow_pg_freeze.tickets;
    held      airflow_pg_freeze.freezes;
    d         record;
    s         record;
    found_n   integer := 0;
    requested constant timestamptz := pg_catalog.clock_timestamp();
BEGIN
    t := airflow_pg_freeze.may_freeze(my_ticket, new_token, needs_dead_man);
    SELECT * INTO held FROM airflow_pg_freeze.freezes WHERE token = new_token;
    IF held.token IS NOT NULL THEN
        IF EXISTS (SELECT FROM airflow_pg_freeze.frozen_databases b LEFT JOIN pg_catalog.pg_database p ON p.oid = b.database
                    WHERE b.token = new_token AND p.oid IS NULL) THEN
            RAISE EXCEPTION USING ERRCODE = 'PF004', MESSAGE = 'the freeze to adopt is of a database that was dropped since: resume first';
        END IF;
        UPDATE airflow_pg_freeze.freezes f
           SET ticket = my_ticket, lease_until = GREATEST(f.lease_until, pg_catalog.clock_timestamp() + begin_freeze.lease)
         WHERE f.token = held.token
        RETURNING * INTO held;
        RETURN held;
    END IF;

    INSERT INTO airflow_pg_freeze.freezes (token, ticket, holder, databases, strategy, roles, admit, state, requested_at,
                                           changed_at, lease_until)
    VALUES (new_token, my_ticket, t.holder, t.databases, begin_freeze.strategy, begin_freeze.roles, begin_freeze.admit, 'draining',
            requested, pg_catalog.clock_timestamp(), pg_catalog.clock_timestamp() + begin_freeze.lease)
    RETURNING * INTO held;
    IF held.strategy = 'privileges' THEN
        PERFORM airflow_pg_freeze.revoke_writes(held);
        RETURN held;
    END IF;
    FOR d IN SELECT p.oid, p.datname, p.datallowconn,
                    (SELECT pg_catalog.split_part(c.entry, '=', 2)
                       FROM pg_catalog.pg_db_role_setting s, pg_catalog.unnest(s.setconfig) AS c (entry)
                      WHERE s.setdatabase = p.oid AND s.setrole = 0
                        AND pg_catalog.split_part(c.entry, '=', 1) = 'default_transaction_read_only') AS prior
               FROM pg_catalog.pg_database p WHERE p.datname::text = ANY (t.databases) ORDER BY p.oid
    LOOP
        found_n := found_n + 1;
        INSERT INTO airflow_pg_freeze.frozen_databases (token, database, name, closed)
        VALUES (new_token, d.oid, d.datname, d.datallowconn AND begin_freeze.admit <> 'readers');
        IF d.datallowconn AND begin_freeze.admit <> 'readers' THEN
            EXECUTE pg_catalog.format('ALTER DATABASE %I WITH ALLOW_CONNECTIONS false', d.datname);
        END IF;
        IF NOT COALESCE(d.prior, 'off')::boolean THEN
            INSERT INTO airflow_pg_freeze.prior_settings VALUES (new_token, d.oid, 0, d.prior);
            EXECUTE pg_catalog.format('ALTER DATABASE %I SET default_transaction_read_only = on', d.datname);
        END IF;
        FOR s IN SELECT * FROM airflow_pg_freeze.overrides o WHERE o.database = d.oid ORDER BY o.role LOOP
            INSERT INTO airflow_pg_freeze.prior_settings VALUES (new_token, d.oid, s.role, s.prior);
            EXECUTE pg_catalog.format('ALTER ROLE %I IN DATABASE %I SET default_transaction_read_only = on', s.rolname, d.datname);
        END LOOP;
    END LOOP;
    IF found_n <> pg_catalog.cardinality(t.databases) THEN
        RAISE EXCEPTION USING ERRCODE = 'PF004', MESSAGE = 'a database does not exist';
    END IF;
    RETURN held;
END $$;


-- Whether the sessions that hold the locks of a freeze are all there; with them go the locks.
CREATE OR REPLACE FUNCTION airflow_pg_freeze.locked(sessions jsonb)
RETURNS boolean
LANGUAGE sql VOLATILE SET search_path = pg_catalog, pg_temp AS $$
    SELECT NOT EXISTS (
        SELECT FROM pg_catalog.jsonb_array_elements(sessions) s
         WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_stat_get_activity((s ->> 'pid')::integer) a
                            WHERE a.backend_start = (s ->> 'backend_start')::timestamptz))
$$;


-- Record a freeze whose locks are held already: nothing else is changed, and nothing is left to undo but to let them go.
CREATE OR REPLACE FUNCTION airflow_pg_freeze.record_locked(
    my_ticket bigint, new_token uuid, lease interval, pids integer[], waited interval, needs_dead_man boolean)
RETURNS airflow_pg_freeze.freezes
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    t    airflow_pg_freeze.tickets;
    held airflow_pg_freeze.freezes;
    now_ constant timestamptz := pg_catalog.clock_timestamp();
    n    integer;
BEGIN
    t := airflow_pg_freeze.may_freeze(my_ticket, new_token, needs_dead_man);
    INSERT INTO airflow_pg_freeze.freezes (token, ticket, holder, databases, strategy, admit, state, requested_at, changed_at,
                                           barrier_at, drained_at, frozen_at, lease_until, sessions)
    SELECT new_token, my_ticket, t.holder, t.databases, 'lock', 'readers', 'frozen', now_ - waited, now_ - waited, now_, now_,
           now_, now_ + record_locked.lease,
           (SELECT COALESCE(pg_catalog.jsonb_agg(pg_catalog.jsonb_build_object('pid', a.pid, 'backend_start', a.backend_start)),
                            '[]')
              FROM pg_catalog.pg_stat_activity a WHERE a.pid = ANY (pids))
    RETURNING * INTO held;
    IF pg_catalog.jsonb_array_length(held.sessions) <> pg_catalog.cardinality(pids) THEN
        RAISE EXCEPTION USING ERRCODE = 'PF007', MESSAGE = 'a session that held the locks is gone';
    END IF;
    INSERT INTO airflow_pg_freeze.frozen_databases (token, database, name, closed)
    SELECT new_token, p.oid, p.datname, false FROM pg_catalog.pg_database p WHERE p.datname::text = ANY (t.databases);
    GET DIAGNOSTICS n = ROW_COUNT;
    IF n <> pg_catalog.cardinality(t.databases) THEN
        RAISE EXCEPTION USING ERRCODE = 'PF004', MESSAGE = 'a database does not exist';
    END IF;
    RETURN held;
END $$;


-- Drained: let the readers in if so asked, and record that. No row if the freeze is gone, or no longer this ticket's.
CREATE OR REPLACE FUNCTION airflow_pg_freeze.record_frozen(
    my_ticket bigint, terminated jsonb, lingering jsonb, warnings jsonb)
RETURNS SETOF airflow_pg_freeze.freezes
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    f airflow_pg_freeze.freezes;
    d record;
BEGIN
    PERFORM pg_catalog.set_config('synchronous_commit', 'local', true);
    PERFORM FROM airflow_pg_freeze.tickets WHERE ticket = my_ticket AND voided_at IS NULL FOR UPDATE;
    IF NOT FOUND THEN RETURN; END IF;
    LOCK TABLE airflow_pg_freeze.freezes IN SHARE ROW EXCLUSIVE MODE;
    SELECT * INTO f FROM airflow_pg_freeze.freezes
     WHERE ticket = my_ticket AND state IN ('draining', 'frozen') AND lease_until > pg_catalog.clock_timestamp();
    IF NOT FOUND THEN RETURN; END IF;
    -- Both kinds may have begun at once, neither seeing the other's; now at least one of the two does.
    IF f.strategy = 'database' AND airflow_pg_freeze.inside(f.databases) THEN
        RAISE EXCEPTION USING ERRCODE = 'PF002', MESSAGE = 'its privileges are revoked, from inside';
    ELSIF f.strategy = 'privileges' AND airflow_pg_freeze.read_only_here() THEN
        RAISE EXCEPTION USING ERRCODE = 'PF002', MESSAGE = 'it was made read-only meanwhile, perhaps by a freeze';
    END IF;
    UPDATE airflow_pg_freeze.freezes u
       SET state = 'frozen',
           drained_at = COALESCE(u.drained_at, pg_catalog.clock_timestamp()),
           frozen_at = COALESCE(u.frozen_at, pg_catalog.clock_timestamp()),
           terminated = record_frozen.terminated, lingering = record_frozen.lingering, warnings = record_frozen.warnings
     WHERE u.token = f.token
    RETURNING * INTO f;
    IF f.admit = 'readers-once-drained' THEN
        FOR d IN SELECT p.datname FROM airflow_pg_freeze.frozen_databases b
                   JOIN pg_catalog.pg_database p ON p.oid = b.database
                  WHERE b.token = f.token AND b.closed AND NOT p.datallowconn
        LOOP
            EXECUTE pg_catalog.format('ALTER DATABASE %I WITH ALLOW_CONNECTIONS true', d.datname);
        END LOOP;
    END IF;
    RETURN NEXT f;
END $$;


-- First half of a thaw, in the caller's transaction: exactly the prior settings come back. Safe to repeat.
CREATE OR REPLACE FUNCTION airflow_pg_freeze.restore_settings(
    the_token uuid, reason text, reader_grace interval DEFAULT interval '0', only_expired boolean DEFAULT false)
RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    s      record;
    target text;
BEGIN
    PERFORM pg_catalog.set_config('synchronous_commit', 'local', true);
    LOCK TABLE airflow_pg_freeze.freezes IN SHARE ROW EXCLUSIVE MODE;
    UPDATE airflow_pg_freeze.freezes
       SET state = 'thawing', restoring_at = pg_catalog.clock_timestamp(), thawed_by = reason,
           lease_until = CASE WHEN reader_grace > interval '0'
                              THEN GREATEST(lease_until, pg_catalog.clock_timestamp() + reader_grace + interval '5 s')
                              ELSE lease_until END
     WHERE token = the_token AND state IN ('draining', 'frozen')
       -- Asked under the lock: the lease may have been extended since the caller looked.
       AND (NOT only_expired OR lease_until <= pg_catalog.clock_timestamp() OR NOT airflow_pg_freeze.locked(sessions));
    IF NOT FOUND THEN
        PERFORM airflow_pg_freeze.restore_writes(the_token);   -- what an earlier thaw could not give back
        RETURN;
    END IF;
    -- The strategy lock has changed no setting: its locks go with the sessions that hold them.
    FOR s IN SELECT a.pid
               FROM airflow_pg_freeze.freezes f, pg_catalog.jsonb_array_elements(f.sessions) l,
                    pg_catalog.pg_stat_get_activity((l ->> 'pid')::integer) a
              WHERE f.token = the_token AND a.backend_start = (l ->> 'backend_start')::timestamptz
    LOOP
        PERFORM pg_catalog.pg_terminate_backend(s.pid);
    END LOOP;
    -- Joined by OID: what was dropped since needs no thaw, what was renamed gets it under its new name.
    FOR s IN SELECT d.datname, r.rolname, p.role, p.value
               FROM airflow_pg_freeze.prior_settings p
               JOIN pg_catalog.pg_database d ON d.oid = p.database
               LEFT JOIN pg_catalog.pg_roles r ON r.oid = p.role
              WHERE p.token = the_token AND (p.role = 0 OR r.oid IS NOT NULL)
    LOOP
        target := CASE WHEN s.role = 0 THEN pg_catalog.format('DATABASE %I', s.datname)
                       ELSE pg_catalog.format('ROLE %I IN DATABASE %I', s.rolname, s.datname) END;
        EXECUTE CASE WHEN s.value IS NULL
                     THEN pg_catalog.format('ALTER %s RESET default_transaction_read_only', target)
                     ELSE pg_catalog.format('ALTER %s SET default_transaction_read_only = %L', target, s.value) END;
    END LOOP;
    FOR s IN SELECT d.datname FROM airflow_pg_freeze.frozen_databases b
               JOIN pg_catalog.pg_database d ON d.oid = b.database
              WHERE b.token = the_token AND b.closed AND NOT d.datallowconn
    LOOP
        EXECUTE pg_catalog.format('ALTER DATABASE %I WITH ALLOW_CONNECTIONS true', s.datname);
    END LOOP;
    IF airflow_pg_freeze.restore_writes(the_token) = 0 THEN
        UPDATE airflow_pg_freeze.frozen_databases SET active = false WHERE token = the_token;
    END IF;
END $$;


-- Second half, after that was committed: end the sessions that are read-only still. Safe to repeat.
CREATE OR REPLACE PROCEDURE airflow_pg_freeze.end_readers(the_token uuid, reader_grace interval DEFAULT interval '0')
LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    f        airflow_pg_freeze.freezes;
    b        record;
    waiting  integer;
    ended    integer[] := '{}';
    starting integer[];
    deadline timestamptz;
BEGIN
    PERFORM pg_catalog.set_config('synchronous_commit', 'local', true);
    -- Whoever connects after the commit can write. When an earlier call died before it could note the time, a
    -- little later than it began has to do: at worst a few sessions that could write reconnect.
    UPDATE airflow_pg_freeze.freezes
       SET restored_at = COALESCE(restored_at, LEAST(pg_catalog.clock_timestamp(), restoring_at + interval '10 s'))
     WHERE token = the_token AND state = 'thawing'
       -- Not while privileges are still to be given back.
       AND NOT EXISTS (SELECT FROM airflow_pg_freeze.frozen_databases b WHERE b.token = the_token AND b.active)
    RETURNING * INTO f;
    COMMIT;
    IF f.token IS NULL THEN RETURN; END IF;
    IF f.strategy <> 'database' THEN   -- no session was made read-only
        PERFORM pg_catalog.set_config('synchronous_commit', 'local', true);
        UPDATE airflow_pg_freeze.freezes SET state = 'thawed', thawed_at = pg_catalog.clock_timestamp()
         WHERE token = the_token AND state = 'thawing';
        COMMIT;
        RETURN;
    END IF;
    deadline := f.restored_at + reader_grace;
    -- Whoever is starting now may have read the settings before they came back.
    starting := ARRAY(SELECT s.pid FROM airflow_pg_freeze.starting s
                        JOIN airflow_pg_freeze.frozen_databases d ON d.database = s.datid AND d.token = the_token);
    LOOP
        starting := ARRAY(SELECT s.pid FROM airflow_pg_freeze.starting s
                           WHERE s.pid = ANY (starting) AND pg_catalog.clock_timestamp() < deadline + interval '10 s');
        waiting := pg_catalog.cardinality(starting);
        PERFORM pg_catalog.pg_stat_clear_snapshot();
        -- Read-only are: all that are left, once drained, but for those that the pause could not end; before that,
        -- what began after the settings were changed (with admit = readers a little earlier, since a session reads its
        -- settings only after it has authenticated).
        FOR b IN SELECT a.pid, a.expendable, a.signalable
                   FROM airflow_pg_freeze.sessions a
                   JOIN airflow_pg_freeze.frozen_databases d ON d.database = a.datid AND d.token = the_token
                  WHERE a.backend_start <= f.restored_at
                    AND COALESCE(a.backend_type, '') NOT LIKE 'logical replication%'
                    AND CASE WHEN f.drained_at IS NOT NULL
                             THEN NOT EXISTS (SELECT FROM pg_catalog.jsonb_array_elements(f.lingering) l
                                               WHERE pg_catalog.jsonb_extract_path_text(l, 'pid')::integer = a.pid
                                                 AND pg_catalog.jsonb_extract_path_text(l, 'backend_start')::timestamptz
                                                     = a.backend_start)
                             ELSE a.backend_start >= f.changed_at
                                  - CASE WHEN f.admit = 'readers' THEN interval '1 s' ELSE interval '0' END END
        LOOP
            IF b.pid = ANY (ended) THEN
                CONTINUE;   -- on its way out
            ELSIF NOT b.signalable THEN
                CONTINUE;   -- a superuser's: he can see for himself that he is read-only, and we may not end him
            ELSIF b.expendable OR pg_catalog.clock_timestamp() >= deadline THEN
                PERFORM pg_catalog.pg_terminate_backend(b.pid);
                ended := pg_catalog.array_append(ended, b.pid);
            ELSE
                waiting := waiting + 1;
            END IF;
        END LOOP;
        EXIT WHEN waiting = 0;
        COMMIT;
        PERFORM pg_catalog.pg_sleep(0.05);
    END LOOP;
    PERFORM pg_catalog.set_config('synchronous_commit', 'local', true);
    UPDATE airflow_pg_freeze.freezes
       SET state = 'thawed', thawed_at = pg_catalog.clock_timestamp(), readers_ended = readers_ended + pg_catalog.cardinality(ended)
     WHERE token = the_token AND state = 'thawing';
    COMMIT;
END $$;


-- Tell whoever thaws here of the databases, or the one, that only a session of theirs can thaw.
CREATE OR REPLACE FUNCTION airflow_pg_freeze.tell_where_else(only_ text DEFAULT NULL)
RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    name text;
BEGIN
    FOR name IN SELECT d.datname FROM pg_database d
                 WHERE (only_ IS NULL OR d.datname::text = only_) AND airflow_pg_freeze.inside(ARRAY[d.datname::text])
    LOOP
        RAISE WARNING 'database "%" may be frozen from inside: connect to it, and there CALL airflow_pg_freeze.thaw(%)', name,
            quote_literal(name);
    END LOOP;
END $$;


-- Thaw the freeze that holds this database, whoever holds it: with all its databases, since a freeze of several is one.
--   CALL airflow_pg_freeze.thaw('gitlabhq');
CREATE OR REPLACE PROCEDURE airflow_pg_freeze.thaw(
    database text, reader_grace interval DEFAULT interval '0', reason text DEFAULT NULL, only_token uuid DEFAULT NULL)
LANGUAGE plpgsql AS $$
DECLARE
    tokens uuid[] := ARRAY(
        SELECT DISTINCT f.token
          FROM airflow_pg_freeze.freezes f
          JOIN airflow_pg_freeze.frozen_databases b ON b.token = f.token
          LEFT JOIN pg_catalog.pg_database d ON d.oid = b.database
         WHERE f.state <> 'thawed' AND thaw.database IN (b.name, d.datname)
           AND (thaw.only_token IS NULL OR f.token = thaw.only_token));
    one uuid;
BEGIN
    IF pg_catalog.cardinality(tokens) = 0 THEN
        RAISE NOTICE 'database "%" is not frozen, as far as the journal in "%" tells', thaw.database, pg_catalog.current_database();
    END IF;
    PERFORM airflow_pg_freeze.tell_where_else(thaw.database);
    FOREACH one IN ARRAY tokens LOOP
        PERFORM airflow_pg_freeze.restore_settings(one, COALESCE(thaw.reason, pg_catalog.concat('thaw by ', CURRENT_USER)), thaw.reader_grace);
        COMMIT;   -- killed from here on, it leaves a writable database, and the next call finishes the rest
        CALL airflow_pg_freeze.end_readers(one, thaw.reader_grace);
    END LOOP;
END $$;


-- Thaw each of these freezes; one that fails does not keep back the others, and is reported at the end.
CREATE OR REPLACE PROCEDURE airflow_pg_freeze.thaw_each(tokens uuid[], reason text, only_expired boolean)
LANGUAGE plpgsql AS $$
DECLARE
    one    uuid;
    failed text := '';
    okay   boolean;
BEGIN
    FOREACH one IN ARRAY tokens LOOP
        BEGIN
            PERFORM airflow_pg_freeze.restore_settings(one, thaw_each.reason, only_expired => thaw_each.only_expired);
            okay := true;
        EXCEPTION WHEN OTHERS THEN
            okay := false;
            failed := pg_catalog.concat(failed, pg_catalog.format(' %s: %s.', one, SQLERRM));
            RAISE WARNING 'freeze % could not be thawed: %', one, SQLERRM;
        END;
        COMMIT;   -- no commit is allowed inside the block above
        IF okay THEN
            CALL airflow_pg_freeze.end_readers(one);
        END IF;
    END LOOP;
    IF failed <> '' THEN
        RAISE EXCEPTION USING ERRCODE = 'PF005', MESSAGE = pg_catalog.concat('still frozen:', failed);
    END IF;
END $$;


-- Thaw whatever is frozen: for a server that was restored from a snapshot, and so wakes up frozen.
CREATE OR REPLACE PROCEDURE airflow_pg_freeze.thaw_all()
LANGUAGE plpgsql AS $$
DECLARE
    -- A variable: an argument of CALL may not hold a subquery.
    tokens uuid[] := ARRAY(SELECT token FROM airflow_pg_freeze.freezes WHERE state <> 'thawed' ORDER BY requested_at);
BEGIN
    CALL airflow_pg_freeze.thaw_each(tokens, pg_catalog.concat('thaw_all by ', CURRENT_USER), false);
    PERFORM airflow_pg_freeze.tell_where_else();
END $$;


-- Thaw what has outlived its lease.
CREATE OR REPLACE PROCEDURE airflow_pg_freeze.thaw_expired()
LANGUAGE plpgsql AS $$
DECLARE
    tokens uuid[] := ARRAY(SELECT token FROM airflow_pg_freeze.freezes
                            WHERE state <> 'thawed' AND (lease_until <= pg_catalog.clock_timestamp() OR NOT airflow_pg_freeze.locked(sessions))
                            ORDER BY requested_at);
BEGIN
    CALL airflow_pg_freeze.thaw_each(tokens, 'lease ended', true);
    PERFORM airflow_pg_freeze.tell_where_else();
END $$;


-- The dead-man switches at work, whichever role started them. Anybody can set the same application_name, and have a
-- statement that begins like this hang while it is parsed; so only those count who may use this schema.
CREATE OR REPLACE FUNCTION airflow_pg_freeze.dead_men()
RETURNS TABLE (token uuid, pid integer, since timestamptz)
LANGUAGE sql VOLATILE SET search_path = pg_catalog, pg_temp AS $$
    SELECT CASE WHEN a.application_name ~ '^pg-freeze dead-man [0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$'
                THEN pg_catalog.substr(a.application_name, 20)::uuid END, a.pid, a.backend_start
      FROM pg_catalog.pg_stat_activity a
     WHERE a.datname = pg_catalog.current_database() AND a.state = 'active'
       AND a.application_name LIKE 'pg-freeze dead-man %' AND a.query LIKE 'CALL airflow_pg_freeze.dead_man(%'
       AND pg_catalog.has_schema_privilege(a.usesysid, 'airflow_pg_freeze', 'USAGE')
$$;


-- End the transactions that have changed settings of a database or a role, or tables, and are idle: while one of them is
-- open, the settings, or the privileges, of a freeze cannot be restored. Only for a thaw that has waited for it, or is overdue.
CREATE OR REPLACE FUNCTION airflow_pg_freeze.end_blockers()
RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    blocker integer;
BEGIN
    FOR blocker IN SELECT a.pid
                     FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid
                    WHERE l.locktype = 'relation' AND l.granted AND a.state LIKE 'idle in transaction%'
                      AND l.relation IN ('pg_db_role_setting'::regclass, 'pg_database'::regclass,
                                         'airflow_pg_freeze.freezes'::regclass)
                      AND l.mode IN ('RowExclusiveLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')
                    UNION
                   -- No lock tells who has changed an ACL. But nobody has a transaction that writes, where nobody may write.
                   SELECT a.pid
                     FROM pg_stat_activity a
                     JOIN airflow_pg_freeze.frozen_databases f ON f.database = a.datid AND f.active
                    WHERE a.state LIKE 'idle in transaction%' AND a.backend_xid IS NOT NULL
                      AND EXISTS (SELECT FROM airflow_pg_freeze.revoked v WHERE v.token = f.token)
    LOOP
        BEGIN
            PERFORM pg_terminate_backend(blocker);
        EXCEPTION WHEN insufficient_privilege THEN
            RAISE WARNING 'pid % keeps a database frozen, and only a superuser may end it', blocker;
        END;
    END LOOP;
END $$;


-- The dead-man switch: runs in a session of its own, which its client leaves behind. It is there before the freeze
-- is, so that no death of the pause can leave a freeze unwatched; it outlives its client, since a server process
-- that runs a statement does not look at its socket (client_connection_check_interval = 0).
CREATE OR REPLACE PROCEDURE airflow_pg_freeze.dead_man(the_token uuid, my_ticket bigint, patience interval)
LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    born constant timestamptz := pg_catalog.clock_timestamp();
    f    airflow_pg_freeze.freezes;
    t    airflow_pg_freeze.tickets;
    nap  interval;
    failures integer := 0;
BEGIN
    LOOP
        nap := interval '0.5 s';
        SELECT * INTO f FROM airflow_pg_freeze.freezes WHERE token = the_token;
        IF f.token IS NULL THEN
            -- Nothing frozen yet. Void the ticket before leaving, so that its owner cannot freeze unwatched.
            SELECT * INTO t FROM airflow_pg_freeze.tickets WHERE ticket = my_ticket;
            IF t.voided_at IS NOT NULL OR born < pg_catalog.clock_timestamp() - patience THEN
                COMMIT;   -- and with it the lock on freezes: an upgrade of the journal locks tickets first
                LOCK TABLE airflow_pg_freeze.tickets IN SHARE ROW EXCLUSIVE MODE;
                PERFORM FROM airflow_pg_freeze.tickets WHERE ticket = my_ticket FOR UPDATE;
                IF NOT EXISTS (SELECT FROM airflow_pg_freeze.freezes WHERE token = the_token) THEN
                    UPDATE airflow_pg_freeze.tickets SET voided_at = pg_catalog.clock_timestamp()
                     WHERE ticket = my_ticket AND voided_at IS NULL;
                    COMMIT;
                    RETURN;
                END IF;
            END IF;
        ELSIF f.state = 'thawed' THEN
            IF f.strategy = 'privileges' THEN   -- another role's thaw could not
                PERFORM airflow_pg_freeze.sweep_marks();
                COMMIT;
            END IF;
            RETURN;
        ELSIF f.strategy = 'lock' AND f.state = 'frozen' AND NOT airflow_pg_freeze.locked(f.sessions) THEN
            -- Its holder died, and the locks with it: what is left is to say so.
            BEGIN
                PERFORM airflow_pg_freeze.restore_settings(the_token, 'lock session ended');
            EXCEPTION WHEN OTHERS THEN
                RAISE WARNING 'the dead-man switch of % tries again: %', the_token, SQLERRM;
            END;
            COMMIT;
            CALL airflow_pg_freeze.end_readers(the_token);
        ELSIF f.lease_until <= pg_catalog.clock_timestamp() OR f.strategy = 'privileges' AND f.state = 'thawing' THEN
            -- Not for ever: meanwhile nobody else could thaw either.
            PERFORM pg_catalog.set_config('lock_timeout', '1s', true);
            BEGIN
                PERFORM airflow_pg_freeze.restore_settings(the_token, 'lease ended', only_expired => true);
                failures := 0;
            EXCEPTION WHEN OTHERS THEN
                failures := failures + 1;
                RAISE WARNING 'the dead-man switch of % tries again: %', the_token, SQLERRM;
            END;
            COMMIT;   -- no commit is allowed inside the block above
            IF failures > 0 THEN PERFORM airflow_pg_freeze.end_blockers(); END IF;
            CALL airflow_pg_freeze.end_readers(the_token);
            -- Somebody else may have begun to thaw who could not give back all that was revoked.
            nap := CASE WHEN failures > 20 THEN interval '5 s' WHEN f.state = 'thawing' THEN interval '1 s' ELSE interval '0.1 s' END;
        ELSE
            nap := LEAST(nap, f.lease_until - pg_catalog.clock_timestamp());
        END IF;
        COMMIT;
        PERFORM pg_catalog.pg_sleep(GREATEST(0.01, EXTRACT(epoch FROM nap)));
        COMMIT;
    END LOOP;
END $$;
