-- The strategy privileges: take write privileges away, and give back exactly those.
--
-- Runs after install.sql, and works in the database that it is installed in: a privilege can be changed from nowhere else.
-- So a freeze by this strategy has its journal, its dead-man switch and its thaw in the frozen database itself.
--
-- GRANT and REVOKE do the work, so the owner of the objects, or a member of it, can do it all. Who granted is part of a
-- privilege: what another than the owner has granted is revoked, and granted again, in its name. An object that had no
-- ACL comes back with an explicit one that says the same; only for a superuser, who may write to the catalogs, as it was.

CREATE OR REPLACE TRIGGER check_row BEFORE INSERT OR UPDATE OR DELETE ON pgfreeze.revoked
    FOR EACH ROW EXECUTE FUNCTION pgfreeze.check_revoked();
ALTER TABLE pgfreeze.revoked ENABLE ALWAYS TRIGGER check_row;


-- Everything that has an ACL by which data may be written, but for the server's own objects, temporary ones and ours.
DROP VIEW IF EXISTS pgfreeze.writers;
DROP VIEW IF EXISTS pgfreeze.acls CASCADE;
CREATE VIEW pgfreeze.acls AS
WITH schemas AS NOT MATERIALIZED (
    SELECT n.* FROM pg_catalog.pg_namespace n
     WHERE n.nspname NOT IN ('pg_catalog', 'information_schema', 'pgfreeze') AND n.nspname !~ '^pg_(toast|temp_)'
)
SELECT 'pg_catalog.pg_class'::pg_catalog.regclass::oid AS catalog, c.oid AS object, 0::smallint AS attnum, c.relowner AS owner,
       c.relacl AS acl, (CASE c.relkind WHEN 'S' THEN 's' ELSE 'r' END)::"char" AS kind,
       CASE c.relkind WHEN 'S' THEN '{USAGE,UPDATE}' WHEN 'm' THEN '{INSERT,UPDATE,DELETE,TRUNCATE,MAINTAIN}'   -- REFRESH
                      ELSE '{INSERT,UPDATE,DELETE,TRUNCATE}' END::text[] AS writing,
       CASE c.relkind WHEN 'S' THEN 'SEQUENCE' ELSE 'TABLE' END AS type, pg_catalog.format('%I.%I', n.nspname, c.relname) AS name,
       '' AS "column"
  FROM pg_catalog.pg_class c JOIN schemas n ON n.oid = c.relnamespace
 WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f', 'S') AND c.relpersistence <> 't'
 UNION ALL
SELECT 'pg_catalog.pg_attribute'::pg_catalog.regclass, a.attrelid, a.attnum, c.relowner, a.attacl, 'c', '{INSERT,UPDATE}',
       'TABLE', pg_catalog.format('%I.%I', n.nspname, c.relname), pg_catalog.format(' (%I)', a.attname)
  FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_class c ON c.oid = a.attrelid JOIN schemas n ON n.oid = c.relnamespace
 WHERE NOT a.attisdropped AND c.relpersistence <> 't'
   AND (a.attacl IS NOT NULL OR (a.attrelid, a.attnum) IN (SELECT v.object, v.attnum FROM pgfreeze.revoked v))
 UNION ALL
SELECT 'pg_catalog.pg_namespace'::pg_catalog.regclass, n.oid, 0, n.nspowner, n.nspacl, 'n', '{CREATE}',
       'SCHEMA', pg_catalog.format('%I', n.nspname), ''
  FROM schemas n
 UNION ALL
SELECT 'pg_catalog.pg_largeobject_metadata'::pg_catalog.regclass, l.oid, 0, l.lomowner, l.lomacl, 'L', '{UPDATE}',
       'LARGE OBJECT', l.oid::text, ''
  FROM pg_catalog.pg_largeobject_metadata l;


-- Each privilege to write. NULL for an ACL means the default: all for the owner.
CREATE VIEW pgfreeze.writers AS
SELECT a.catalog, a.object, a.attnum, a.owner, a.acl, a.type, a.name, x.grantor, x.grantee, x.privilege_type AS privilege,
       x.is_grantable AS grantable
  FROM pgfreeze.acls a
 CROSS JOIN LATERAL pg_catalog.aclexplode(COALESCE(a.acl, pg_catalog.acldefault(a.kind, a.owner))) x
 WHERE x.privilege_type = ANY (a.writing);


-- What a freeze has revoked, as GRANT and REVOKE name it, and whether it is there now. What was dropped meanwhile is left
-- out; whoever became the owner meanwhile stands for the former one.
CREATE OR REPLACE FUNCTION pgfreeze.revoked_entries(the_token uuid)
RETURNS TABLE (level integer, grantor name, owned boolean, what text, name text, who text, grantable boolean, present boolean,
               catalog oid, object oid, attnum smallint, privileges text[])
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT e.level, g.rolname, g.oid = a.owner,
           string_agg(e.privilege || a."column", ', ' ORDER BY e.privilege) || ' ON ' || a.type, a.name,
           CASE WHEN e.grantee = 0 THEN 'PUBLIC' ELSE format('%I', r.rolname) END, e.grantable, now.present,
           a.catalog, a.object, a.attnum, array_agg(e.privilege ORDER BY e.privilege)
      FROM pgfreeze.revoked v
      JOIN pgfreeze.acls a USING (catalog, object, attnum)
     CROSS JOIN LATERAL jsonb_to_recordset(v.entries)
             AS e (level integer, grantor oid, grantee oid, privilege text, grantable boolean)
     CROSS JOIN LATERAL (SELECT CASE WHEN e.grantor = v.owner THEN a.owner ELSE e.grantor END AS grantor,
                                CASE WHEN e.grantee = v.owner THEN a.owner ELSE e.grantee END AS grantee) AS o
      JOIN pg_roles g ON g.oid = o.grantor
      LEFT JOIN pg_roles r ON r.oid = o.grantee
     CROSS JOIN LATERAL (SELECT EXISTS (
               SELECT FROM aclexplode(COALESCE(a.acl, acldefault(a.kind, a.owner))) x
                WHERE x.grantor = o.grantor AND x.grantee = o.grantee AND x.privilege_type = e.privilege
                  AND (x.is_grantable OR NOT e.grantable)) AS present) AS now
     WHERE v.token = the_token AND (e.grantee = 0 OR r.oid IS NOT NULL)
       AND e.privilege = ANY (a.writing)   -- it becomes part of a statement
     GROUP BY e.level, g.rolname, g.oid, a.owner, a.type, a.name, a."column", a.catalog, a.object, a.attnum, e.grantee, r.rolname,
              e.grantable, now.present
$$;


-- Run one statement in the name of a grantor: as ourselves only if that is us, or the owner for whom we act but whom we may
-- not become. For of all the roles that we act for, GRANT and REVOKE take the first that may grant: perhaps another one.
CREATE OR REPLACE FUNCTION pgfreeze.execute_as(grantor name, owned boolean, statement text)
RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    me      constant name := CURRENT_USER;
    become  constant text := CASE WHEN pg_catalog.current_setting('server_version_num')::integer < 160000 THEN 'MEMBER' ELSE 'SET' END;
BEGIN
    IF grantor::text = me::text
       OR owned AND pg_catalog.pg_has_role(me, grantor, 'USAGE') AND NOT pg_catalog.pg_has_role(me, grantor, become) THEN
        EXECUTE statement;
    ELSE
        EXECUTE pg_catalog.format('SET LOCAL ROLE %I', grantor);
        EXECUTE statement;
        EXECUTE pg_catalog.format('SET LOCAL ROLE %I', me);
    END IF;
END $$;


-- Make sure that this transaction has changed nothing but what this freeze revokes. A row of a catalog that we see, and whose
-- transaction is not over, was written by ourselves. Only names lead astray, so large objects need not be looked at.
CREATE OR REPLACE FUNCTION pgfreeze.check_changed(the_token uuid)
RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    ours   constant bigint := pg_current_xact_id()::text::bigint;
    strays text;
BEGIN
    SELECT string_agg(DISTINCT pg_describe_object(c.catalog, c.object, 0), ', ') INTO strays
      FROM (SELECT 'pg_class'::regclass::oid, oid, xmin FROM pg_class
             UNION ALL SELECT 'pg_class'::regclass, attrelid, xmin FROM pg_attribute
             UNION ALL SELECT 'pg_namespace'::regclass, oid, xmin FROM pg_namespace) AS c (catalog, object, xmin)
     -- Ours, its subtransactions, and whatever has begun since.
     CROSS JOIN LATERAL (SELECT (c.xmin::text::bigint - ours % 4294967296 + 4294967296) % 4294967296 AS later) AS x
     WHERE x.later < 2147483648 AND pg_xact_status((ours + x.later)::text::xid8) = 'in progress'
       AND NOT EXISTS (SELECT FROM pgfreeze.revoked v
                        WHERE v.token = the_token AND v.object = c.object
                          AND CASE v.catalog WHEN 'pg_attribute'::regclass THEN 'pg_class'::regclass::oid ELSE v.catalog END = c.catalog);
    IF strays IS NOT NULL THEN
        RAISE EXCEPTION USING ERRCODE = '40001', MESSAGE = 'names were exchanged meanwhile: privileges were about to be changed on ' || strays;
    END IF;
END $$;


-- Grant all that is not there, or revoke all that is, in as few statements as possible: one error undoes them all. A thaw then
-- goes on one by one, whatever the error is.
CREATE OR REPLACE FUNCTION pgfreeze.change_at_once(the_token uuid, granting boolean)
RETURNS boolean
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    r record;
BEGIN
    FOR r IN WITH e AS (
                 SELECT e.level, e.grantor, e.owned, e.what, e.name, e.grantable, string_agg(DISTINCT e.who, ', ') AS who
                   FROM pgfreeze.revoked_entries(the_token) e WHERE e.present <> granting
                  GROUP BY e.level, e.grantor, e.owned, e.what, e.name, e.grantable
             )
             SELECT e.grantor, e.owned, format(pgfreeze.template(granting, e.grantable), e.what, string_agg(e.name, ', '), e.who) AS statement
               FROM e GROUP BY e.level, e.grantor, e.owned, e.what, e.who, e.grantable
              ORDER BY CASE WHEN granting THEN e.level ELSE -e.level END
    LOOP
        PERFORM pgfreeze.execute_as(r.grantor, r.owned, r.statement);
    END LOOP;
    RETURN true;
EXCEPTION WHEN OTHERS THEN
    IF NOT granting AND SQLSTATE NOT IN ('42501', '0LP01', '2BP01') THEN RAISE; END IF;
    RETURN false;
END $$;


CREATE OR REPLACE FUNCTION pgfreeze.template(granting boolean, grantable boolean)
RETURNS text
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT CASE WHEN NOT granting THEN 'REVOKE %s %s FROM %s' WHEN grantable THEN 'GRANT %s %s TO %s WITH GRANT OPTION'
                ELSE 'GRANT %s %s TO %s' END
$$;


-- The same object by object: what is refused, or fails for whatever reason, keeps nothing else back. Each is named as it is called at
-- that moment: its owner may rename it all the time. Returns whether somebody kept one of them waiting.
CREATE OR REPLACE FUNCTION pgfreeze.change_one_by_one(the_token uuid, granting boolean)
RETURNS boolean
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    kept_waiting boolean := false;
    waits        integer := 0;
    statement    text;
    r            record;
BEGIN
    FOR r IN SELECT e.level, e.grantor, e.owned, e.catalog, e.object, e.attnum, e.privileges, e.grantable, string_agg(DISTINCT e.who, ', ') AS who
               FROM pgfreeze.revoked_entries(the_token) e WHERE e.present <> granting
              GROUP BY e.level, e.grantor, e.owned, e.catalog, e.object, e.attnum, e.privileges, e.grantable
              ORDER BY CASE WHEN granting THEN e.level ELSE -e.level END
    LOOP
        FOR again IN REVERSE 20..0 LOOP
            SELECT format(pgfreeze.template(granting, r.grantable),
                          (SELECT string_agg(p || a."column", ', ') FROM unnest(r.privileges) p) || ' ON ' || a.type, a.name, r.who)
              INTO statement FROM pgfreeze.acls a WHERE a.catalog = r.catalog AND a.object = r.object AND a.attnum = r.attnum;
            EXIT WHEN NOT FOUND;   -- dropped
            BEGIN
                PERFORM pgfreeze.execute_as(r.grantor, r.owned, statement);
                EXIT;
            EXCEPTION WHEN OTHERS THEN
                -- Somebody else holds the lock, or changed the ACL: a thaw comes back to it, a freeze has to fail.
                IF NOT granting AND SQLSTATE NOT IN ('42501', '0LP01', '2BP01') THEN RAISE; END IF;
                CONTINUE WHEN again > 0 AND SQLSTATE IN ('42P01', '42703', '42704', '3F000');   -- it was renamed
                RAISE WARNING 'as %: %: %', r.grantor, statement, SQLERRM;
                kept_waiting := kept_waiting OR SQLSTATE IN ('55P03', '40P01', 'XX000', '42P01', '42703', '42704', '3F000');
                waits := waits + (SQLSTATE = '55P03')::integer;
                -- Who holds some may hold a thousand. Each waits for as long as lock_timeout, and the lease is over.
                IF waits = 3 THEN PERFORM set_config('lock_timeout', '10ms', true); END IF;
                EXIT;
            END;
        END LOOP;
    END LOOP;
    RETURN kept_waiting;
END $$;


-- In order of the levels all of it works at once; where everybody has granted to everybody, some of it only once the rest is
-- done: so try again as long as that helps. What is refused in the end is left as it is, with a warning. Returns how many that
-- are, and whether somebody kept one of them waiting.
--
-- A statement takes names, and while it waits, or the one before it, an owner may exchange the names of two objects. Then all is
-- undone, and done anew.
CREATE OR REPLACE FUNCTION pgfreeze.change_entries(the_token uuid, granting boolean, OUT left_ integer, OUT kept_waiting boolean)
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    tries  integer := 0;
    before integer;
BEGIN
    kept_waiting := false;
    LOOP
        BEGIN
            IF before IS NOT NULL OR NOT pgfreeze.change_at_once(the_token, granting) THEN
                kept_waiting := pgfreeze.change_one_by_one(the_token, granting);
            END IF;
            PERFORM pgfreeze.check_changed(the_token);
        EXCEPTION WHEN serialization_failure THEN
            IF NOT granting THEN RAISE; END IF;
            RAISE WARNING '%', SQLERRM;
            kept_waiting := true;
            tries := tries + 1;
            CONTINUE WHEN tries < 5;
        END;
        -- GRANT and REVOKE only warn if they had no right to: so look again.
        SELECT count(*) INTO left_ FROM pgfreeze.revoked_entries(the_token) e WHERE e.present <> granting;
        EXIT WHEN left_ = 0 OR left_ >= before OR tries = 5;
        before := left_;
    END LOOP;
END $$;


-- A freeze from inside leaves a mark that is seen from every database. Only a superuser may make up a setting; every role
-- may have an application_name of its own in a database. One that was there follows the mark.
--
-- Take away every mark of this database that stands for no freeze. Each role's own only, unless we may alter it: another
-- role's may stay, and its dead-man switch or its next resume takes it away.
CREATE OR REPLACE FUNCTION pgfreeze.sweep_marks()
RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    a_mark constant text := '^(pg-freeze inside [0-9a-f-]{36}( |$))+';
    here   constant text := format('IN DATABASE %I', current_database());
    r      record;
BEGIN
    FOR r IN SELECT p.rolname, substr(c.entry, length('application_name=') + 1) AS value
               FROM pg_db_role_setting s JOIN pg_database d ON d.oid = s.setdatabase JOIN pg_roles p ON p.oid = s.setrole,
                    unnest(s.setconfig) AS c (entry)
              WHERE d.datname = current_database() AND starts_with(c.entry, 'application_name=pg-freeze inside ')
                AND NOT EXISTS (SELECT FROM pgfreeze.frozen_databases f
                                 WHERE f.active AND starts_with(c.entry, 'application_name=pg-freeze inside ' || f.token))
    LOOP
        BEGIN
            IF regexp_replace(r.value, a_mark, '') = '' AND NOT r.value ~ ' $' THEN
                EXECUTE format('ALTER ROLE %I %s RESET application_name', r.rolname, here);
            ELSE
                EXECUTE format('ALTER ROLE %I %s SET application_name = %L', r.rolname, here, regexp_replace(r.value, a_mark, ''));
            END IF;
        EXCEPTION WHEN insufficient_privilege THEN
            NULL;
        END;
    END LOOP;
END $$;


CREATE OR REPLACE FUNCTION pgfreeze.mark(the_token uuid)
RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    prior text;
BEGIN
    PERFORM pgfreeze.sweep_marks();
    SELECT substr(c.entry, length('application_name=') + 1) INTO prior
      FROM pg_db_role_setting s JOIN pg_database d ON d.oid = s.setdatabase JOIN pg_roles p ON p.oid = s.setrole,
           unnest(s.setconfig) AS c (entry)
     WHERE d.datname = current_database() AND p.rolname = CURRENT_USER AND starts_with(c.entry, 'application_name=');
    EXECUTE format('ALTER ROLE %I IN DATABASE %I SET application_name = %L', CURRENT_USER, current_database(),
                   'pg-freeze inside ' || the_token || COALESCE(' ' || prior, ''));
END $$;


-- Who is a member of such a role, in whatever way, can become a superuser. Before 16 every role with CREATEROLE can, too: it
-- can make itself a member of them.
CREATE OR REPLACE FUNCTION pgfreeze.can_become_superuser(role name)
RETURNS boolean
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT EXISTS (SELECT FROM pg_roles s
                    WHERE (s.rolsuper OR s.rolname IN ('pg_execute_server_program', 'pg_write_server_files', 'pg_read_server_files')
                           OR s.rolcreaterole AND current_setting('server_version_num')::integer < 160000)
                      AND pg_has_role(role, s.oid, 'MEMBER'))
$$;


-- Take the write privileges away, in the transaction that records the freeze. Statements that began before it commits,
-- and transactions that had a lock on a table before, may still write: the drain waits for them.
CREATE OR REPLACE FUNCTION pgfreeze.engage_privileges(f pgfreeze.freezes)
RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    chosen   oid[];
    unwanted text;
BEGIN
    IF f.databases <> ARRAY[current_database()::text] THEN
        RAISE EXCEPTION USING ERRCODE = 'PF008', MESSAGE = format('the privileges of %s can only be revoked in a session of that '
            'database, and this one is in %L', f.databases, current_database());
    END IF;
    IF NOT pgfreeze.owned() THEN
        RAISE EXCEPTION USING ERRCODE = 'PF008', MESSAGE = format('the journal in %L is another role''s: freeze as its owner or as a '
            'superuser, or drop it there: DROP SCHEMA pgfreeze CASCADE;', current_database());
    END IF;
    SELECT format('pid %s', a.pid) INTO unwanted
      FROM pg_stat_activity a
     WHERE a.datname = current_database() AND a.application_name LIKE 'pg-freeze lock %' AND a.state LIKE 'idle in transaction%'
       -- Anybody can call his session so, and lock a table of his own: only who holds every table has frozen it.
       AND (SELECT bool_and(EXISTS (SELECT FROM pg_locks l WHERE l.pid = a.pid AND l.locktype = 'relation' AND l.granted
                                       AND l.database = a.datid AND l.relation = c.oid AND l.mode = 'ExclusiveLock'))
              FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
             WHERE c.relkind IN ('r', 'p') AND c.relpersistence <> 't'
               AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'pgfreeze') AND n.nspname !~ '^pg_toast')
     LIMIT 1;
    IF unwanted IS NOT NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'PF002', MESSAGE = format('%s has frozen it by locks', unwanted);
    END IF;
    -- Its apply worker would fail for want of a privilege, and disable the subscription: no thaw enables it again.
    IF current_setting('server_version_num')::integer >= 150000 THEN
        EXECUTE 'SELECT string_agg(format(''%I'', s.subname), '', '') FROM pg_subscription s JOIN pg_database d ON d.oid = s.subdbid
                  WHERE d.datname = current_database() AND s.subenabled AND s.subdisableonerr' INTO unwanted;
        IF unwanted IS NOT NULL THEN
            RAISE EXCEPTION USING ERRCODE = 'PF008', MESSAGE = format('the first row that is applied would disable the subscription %s '
                'for good, which has disable_on_error: ALTER SUBSCRIPTION %s SET (disable_on_error = false); or DISABLE it for the '
                'time of the freeze; or use another strategy', unwanted, unwanted);
        END IF;
    END IF;
    -- A freeze by the strategy read-only ends every session in the end, also the dead-man switch of this one.
    IF pgfreeze.read_only_here() THEN
        RAISE EXCEPTION USING ERRCODE = 'PF008', MESSAGE = format('%L is read-only already, perhaps by a freeze: see pg-freeze status',
                                                                  current_database());
    END IF;
    SELECT string_agg(format('%L', n.name), ', ') INTO unwanted
      FROM unnest(f.roles) AS n (name) LEFT JOIN pg_roles p ON p.rolname::text = n.name
     WHERE n.name <> 'public' AND p.oid IS NULL;
    IF unwanted IS NOT NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'PF008', MESSAGE = format('there is no role %s (what was granted to everybody is public''s)',
                                                                  unwanted);
    END IF;
    SELECT string_agg(format('%L', p.rolname), ', ') INTO unwanted
      FROM pg_roles p WHERE p.rolname::text = ANY (f.roles) AND p.rolsuper;
    IF unwanted IS NOT NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'PF008', MESSAGE = format('no privilege stops a superuser: %s', unwanted);
    END IF;
    chosen := ARRAY(SELECT p.oid FROM pg_roles p
                     WHERE NOT p.rolsuper AND (p.rolname::text = ANY (f.roles) OR f.roles = '{}')
                     UNION ALL SELECT 0 WHERE 'public' = ANY (f.roles) OR f.roles = '{}');
    INSERT INTO pgfreeze.frozen_databases (token, database, name, closed)
    SELECT f.token, d.oid, d.datname, false FROM pg_database d WHERE d.datname = current_database();
    PERFORM pgfreeze.mark(f.token);

    -- Level 1 is what the owner granted (to itself, too), level 2 what was granted by whoever has it from level 1 … Granted
    -- level by level, each finds its grantor able to grant; revoked in the opposite order, nothing rests on what goes.
    -- The right to grant is granted without the grantee's own help, hence the paths. Who may grant a privilege on a table
    -- may grant it on its columns; and who loses it on the table loses what the same grantor gave him on the columns.
    INSERT INTO pgfreeze.revoked (token, catalog, object, attnum, owner, acl, entries)
    WITH RECURSIVE w AS MATERIALIZED (SELECT * FROM pgfreeze.writers),
    paths AS (
        SELECT w.catalog, w.object, w.attnum, w.grantor, w.grantee, w.privilege, w.grantable, ARRAY[w.grantee] AS path
          FROM w WHERE w.grantor = w.owner
         UNION
        SELECT w.catalog, w.object, w.attnum, w.grantor, w.grantee, w.privilege, w.grantable, p.path || w.grantee
          FROM paths p JOIN w USING (object, privilege)
         WHERE w.grantor = p.grantee AND p.grantable AND w.grantor <> w.owner AND (w.grantee <> ALL (p.path) OR NOT w.grantable)
           AND (w.catalog = p.catalog AND w.attnum = p.attnum OR p.catalog = 'pg_class'::regclass AND w.catalog = 'pg_attribute'::regclass)
    ), levelled AS MATERIALIZED (
        SELECT catalog, object, attnum, grantor, grantee, privilege, grantable, min(cardinality(path)) AS level
          FROM paths GROUP BY 1, 2, 3, 4, 5, 6, 7
    ), taken AS (   -- and whatever rests on it
        SELECT l.* FROM levelled l WHERE l.grantee = ANY (chosen)
         UNION
        SELECT l.* FROM taken t JOIN levelled l USING (object, privilege)
         WHERE CASE WHEN t.catalog = 'pg_class'::regclass AND l.catalog = 'pg_attribute'::regclass
                    THEN l.grantor = t.grantor AND l.grantee = t.grantee OR l.grantor = t.grantee AND t.grantable AND l.level > 1
                    WHEN l.catalog = t.catalog AND l.attnum = t.attnum THEN l.grantor = t.grantee AND t.grantable AND l.level > 1
                    ELSE false END
    )
    SELECT f.token, e.catalog, e.object, e.attnum, a.owner, a.acl::text,
           jsonb_agg(jsonb_build_object('level', e.level + CASE WHEN e.attnum <> 0 THEN 1000 ELSE 0 END, 'grantor', e.grantor,
                                        'grantee', e.grantee, 'privilege', e.privilege, 'grantable', e.grantable))
      FROM taken e JOIN pgfreeze.acls a USING (catalog, object, attnum)
     GROUP BY e.catalog, e.object, e.attnum, a.owner, a.acl;

    IF (SELECT e.left_ > 0 FROM pgfreeze.change_entries(f.token, false) e) THEN
        SELECT format('%s %s from %s, which %I has granted: ', e.what, e.name, e.who, e.grantor)
               || CASE WHEN pgfreeze.can_become_superuser(CASE e.grantor WHEN 'pg_database_owner' THEN d.rolname ELSE e.grantor END)
                       THEN format('as a superuser, REVOKE %s %s FROM %s; for good, or freeze as a superuser', e.what, e.name, e.who)
                       WHEN e.grantor = 'pg_database_owner'   -- which has no other members
                       THEN format('GRANT %I TO %I; which owns the database', d.rolname, CURRENT_USER)
                       ELSE format('GRANT %I TO %I%s;', e.grantor, CURRENT_USER,
                                   CASE WHEN pg_has_role(e.grantor, 'MEMBER') THEN ' WITH SET TRUE' END) END INTO unwanted
          FROM pgfreeze.revoked_entries(f.token) e
         CROSS JOIN (SELECT o.rolname FROM pg_database b JOIN pg_roles o ON o.oid = b.datdba WHERE b.datname = current_database()) d
         WHERE e.present ORDER BY e.level DESC LIMIT 1;   -- the last one first: what others rest on cannot go before it
        RAISE EXCEPTION USING ERRCODE = 'PF008', MESSAGE = format('role %I may not revoke %s', CURRENT_USER, unwanted);
    END IF;
    -- A role may have by PUBLIC, or by another role, what it has lost itself.
    SELECT format('%s ON %s %s, granted to %s', w.privilege, w.type, w.name,
                  CASE WHEN w.grantee = 0 THEN 'PUBLIC (name it public)' ELSE w.grantee::regrole::text END) INTO unwanted
      FROM pgfreeze.writers w
      LEFT JOIN pg_roles p ON p.oid = w.grantee
     WHERE w.grantee = ANY (chosen)
        OR NOT COALESCE(p.rolsuper, false)
           AND EXISTS (SELECT FROM unnest(chosen) c (oid) WHERE c.oid <> 0 AND (w.grantee = 0 OR pg_has_role(c.oid, w.grantee, 'MEMBER')))
     LIMIT 1;
    IF unwanted IS NOT NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'PF008', MESSAGE = format('a write would still be possible: %s. If it was granted to one of the '
            'roles to freeze, role %I may not revoke it; else name that role as well, or none for everybody', unwanted, CURRENT_USER);
    END IF;
    SELECT string_agg(format('%I', p.rolname), ', ') INTO unwanted
      FROM pg_roles p
     WHERE p.oid = ANY (chosen) AND p.rolcanlogin AND p.rolname <> CURRENT_USER AND pg_has_role(p.oid, 'pg_write_all_data', 'MEMBER');
    IF unwanted IS NOT NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'PF008', MESSAGE = format('role %s writes as a member of pg_write_all_data, which no REVOKE on a '
            'table stops: REVOKE pg_write_all_data FROM %s; or use another strategy', unwanted, unwanted);
    END IF;
END $$;


CREATE OR REPLACE FUNCTION pgfreeze.same_acl(one aclitem[], other aclitem[])
RETURNS boolean
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT ARRAY(SELECT x::text FROM aclexplode(one) x ORDER BY 1) = ARRAY(SELECT x::text FROM aclexplode(other) x ORDER BY 1)
$$;


-- Give back what was revoked and is not there again, in the transaction of the thaw, or in a later one: the freeze is not
-- thawed, and nobody else can begin one, until all of it is back. What others have granted meanwhile stays. What we may not
-- grant keeps nothing else back. Returns why not all of it is back, as an SQLSTATE; NULL if it is.
CREATE OR REPLACE FUNCTION pgfreeze.release_privileges(the_token uuid)
RETURNS text
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    done record;
BEGIN
    PERFORM FROM pgfreeze.freezes f JOIN pgfreeze.frozen_databases b USING (token)
      WHERE f.token = the_token AND f.state = 'thawing' AND b.active;
    IF NOT FOUND THEN RETURN NULL; END IF;
    SELECT * INTO done FROM pgfreeze.change_entries(the_token, true);
    IF (SELECT p.rolsuper FROM pg_roles p WHERE p.rolname = CURRENT_USER) THEN
        -- It says the same already; now in the same words, or in none if there were none.
        BEGIN
            UPDATE pg_class c SET relacl = v.acl::aclitem[] FROM pgfreeze.revoked v
             WHERE v.token = the_token AND v.catalog = 'pg_class'::regclass AND v.object = c.oid AND c.relacl::text IS DISTINCT FROM v.acl
               AND pgfreeze.same_acl(c.relacl, COALESCE(v.acl::aclitem[],
                                              acldefault(CASE c.relkind WHEN 'S' THEN 's' ELSE 'r' END::"char", c.relowner)));
            UPDATE pg_attribute c SET attacl = v.acl::aclitem[] FROM pgfreeze.revoked v
             WHERE v.token = the_token AND v.catalog = 'pg_attribute'::regclass AND v.object = c.attrelid AND v.attnum = c.attnum
               AND c.attacl::text IS DISTINCT FROM v.acl AND pgfreeze.same_acl(c.attacl, v.acl::aclitem[]);
            UPDATE pg_namespace c SET nspacl = v.acl::aclitem[] FROM pgfreeze.revoked v
             WHERE v.token = the_token AND v.catalog = 'pg_namespace'::regclass AND v.object = c.oid AND c.nspacl::text IS DISTINCT FROM v.acl
               AND pgfreeze.same_acl(c.nspacl, COALESCE(v.acl::aclitem[], acldefault('n', c.nspowner)));
            UPDATE pg_largeobject_metadata c SET lomacl = v.acl::aclitem[] FROM pgfreeze.revoked v
             WHERE v.token = the_token AND v.catalog = 'pg_largeobject_metadata'::regclass AND v.object = c.oid
               AND c.lomacl::text IS DISTINCT FROM v.acl
               AND pgfreeze.same_acl(c.lomacl, COALESCE(v.acl::aclitem[], acldefault('L', c.lomowner)));
        EXCEPTION WHEN undefined_object THEN
            NULL;   -- a role was dropped or renamed meanwhile: then the words cannot be the same
        END;
    END IF;
    IF done.left_ = 0 THEN
        UPDATE pgfreeze.frozen_databases SET active = false WHERE token = the_token;
        PERFORM pgfreeze.sweep_marks();
        IF pgfreeze.owned() THEN
            DELETE FROM pgfreeze.revoked WHERE token = the_token;
        END IF;
    END IF;
    RETURN CASE WHEN done.left_ = 0 THEN NULL WHEN done.kept_waiting THEN '55P03' ELSE '42501' END;
END $$;
