-- What may be written into the journal. Runs after install.sql.
--
-- A thaw does what the rows say, with the rights of whoever thaws: perhaps a superuser's. So a row may only be written by
-- somebody who could have done himself, at that time, what its thaw will do. And no row may keep the others from being
-- read. This holds for everybody who may write here: `install --grant`, pg_write_all_data, BYPASSRLS. (Hence triggers, and
-- neither column privileges nor row-level security; ALWAYS, so that session_replication_role is no way around. Each of
-- them calls another routine of ours, for which one must have been named: pg_write_all_data alone writes nothing.)

-- Whether we own the journal, or are a superuser.
CREATE OR REPLACE FUNCTION pgfreeze.owned()
RETURNS boolean
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT pg_has_role(c.relowner, 'USAGE') FROM pg_class c WHERE c.oid = 'pgfreeze.freezes'::regclass
$$;


-- Whether we may ALTER this database.
CREATE OR REPLACE FUNCTION pgfreeze.may_alter(the_database oid)
RETURNS boolean
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT EXISTS (SELECT FROM pg_database d WHERE d.oid = the_database AND pg_has_role(d.datdba, 'USAGE'))
$$;


-- Whether we may ALTER this role, as PostgreSQL decides it for ALTER ROLE … SET.
CREATE OR REPLACE FUNCTION pgfreeze.may_alter_role(the_role oid)
RETURNS boolean
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT EXISTS (SELECT FROM pg_roles us, pg_roles r
                    WHERE us.rolname = CURRENT_USER AND r.oid = the_role
                      AND (us.rolsuper OR us.oid = r.oid
                           OR us.rolcreaterole AND NOT r.rolsuper
                              AND (current_setting('server_version_num')::integer < 160000
                                   OR pg_has_role(r.oid, 'MEMBER WITH ADMIN OPTION'))))
$$;


-- Whether everybody can read these values: not nested deeply, and no number of thousands of digits.
CREATE OR REPLACE FUNCTION pgfreeze.readable(VARIADIC given jsonb[])
RETURNS boolean
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT NOT EXISTS (SELECT FROM unnest(given) g
                        WHERE jsonb_path_exists(g, 'strict $.**{10}')
                           OR jsonb_path_exists(g, 'strict $.** ? (@.type() == "number" && (@ > 1e20 || @ < -1e20))'))
$$;


-- Whether this is an array of objects, each of which has texts, or NULL where that is allowed, under these names.
CREATE OR REPLACE FUNCTION pgfreeze.objects(given jsonb, texts text[], or_null text[] DEFAULT '{}')
RETURNS boolean
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT COALESCE(jsonb_typeof(given) = 'array' AND NOT EXISTS (
               SELECT FROM jsonb_array_elements(CASE jsonb_typeof(given) WHEN 'array' THEN given ELSE '[]' END) o
                WHERE jsonb_typeof(o) <> 'object'
                   OR EXISTS (SELECT FROM unnest(texts) t (name) WHERE jsonb_typeof(o -> t.name) IS DISTINCT FROM 'string')
                   OR EXISTS (SELECT FROM unnest(or_null) t (name) WHERE COALESCE(jsonb_typeof(o -> t.name), '') NOT IN ('string', 'null'))),
           false)
$$;


-- Whether these are sessions, whose times can be read whatever settings the reader has.
CREATE OR REPLACE FUNCTION pgfreeze.sessions_in(given jsonb)
RETURNS boolean
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp SET "TimeZone" = 'UTC' SET "DateStyle" = 'ISO, MDY' AS $$
    SELECT pgfreeze.objects(given, '{}') AND NOT EXISTS (
        SELECT FROM jsonb_array_elements(CASE jsonb_typeof(given) WHEN 'array' THEN given ELSE '[]' END) l
         WHERE (l ->> 'pid')::integer IS NULL
            OR EXISTS (SELECT FROM (VALUES (l ->> 'backend_start'), (l ->> 'xact_start')) t (at)
                        WHERE t.at !~ '^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:.]+(Z|[+-][0-9:]+)$' OR NOT isfinite(t.at::timestamptz)))
$$;


-- Whether these times can be read, and have come by now. The clock may have been set back meanwhile, by so much.
CREATE OR REPLACE FUNCTION pgfreeze.past(back interval, VARIADIC given timestamptz[])
RETURNS boolean
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT NOT EXISTS (SELECT FROM unnest(given) t (at) WHERE t.at < '1970-01-01' OR t.at > clock_timestamp() + back)
$$;


-- Times are read and written as UTC and ISO here, so that what is accepted once can be read with every setting.
CREATE OR REPLACE FUNCTION pgfreeze.check_freeze()
RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET "TimeZone" = 'UTC' SET "DateStyle" = 'ISO, MDY' AS $$
DECLARE
    states constant text[] := '{draining,frozen,thawing,thawed}';
    ours   jsonb;
BEGIN
    IF TG_OP = 'INSERT' THEN
        -- A thaw ends these sessions.
        SELECT COALESCE(jsonb_agg(jsonb_build_object('pid', a.pid, 'backend_start', a.backend_start)), '[]') INTO ours
          FROM jsonb_array_elements(NEW.sessions) l, pg_stat_get_activity((l ->> 'pid')::integer) a
         WHERE a.backend_start = (l ->> 'backend_start')::timestamptz AND pg_has_role(a.usesysid, 'USAGE');
        IF jsonb_array_length(ours) <> jsonb_array_length(NEW.sessions) THEN
            RAISE EXCEPTION USING ERRCODE = '42501', MESSAGE = 'a session that holds locks must be there, and its role''s own';
        END IF;
        NEW.sessions := ours;
    ELSIF (NEW.token, NEW.databases, NEW.strategy, NEW.sessions, NEW.roles, NEW.admit)
          IS DISTINCT FROM (OLD.token, OLD.databases, OLD.strategy, OLD.sessions, OLD.roles, OLD.admit)
          OR array_position(states, NEW.state) < array_position(states, OLD.state) THEN
        RAISE EXCEPTION USING ERRCODE = '42501', MESSAGE = 'a freeze stays what it is, and is not begun again';
    END IF;
    IF cardinality(NEW.databases) = 0 OR array_position(NEW.databases, NULL) IS NOT NULL OR array_ndims(NEW.databases) <> 1
       OR array_position(NEW.roles, NULL) IS NOT NULL OR array_ndims(NEW.roles) <> 1 OR jsonb_typeof(NEW.terminated) <> 'object'
       OR jsonb_path_exists(NEW.terminated, 'strict $.* ? (@.type() != "number")')
       OR NOT pgfreeze.readable(NEW.sessions, NEW.older, NEW.terminated, NEW.lingering, NEW.warnings, NEW.left_over)
       OR NOT pgfreeze.sessions_in(NEW.older) OR NOT pgfreeze.sessions_in(NEW.lingering)
       OR NOT pgfreeze.objects(NEW.warnings, '{severity,code,message,remedy}')
       OR NOT pgfreeze.objects(NEW.left_over, '{what,why}')
       OR LEAST(NEW.requested_at, NEW.changed_at, NEW.barrier_at, NEW.drained_at, NEW.frozen_at, NEW.lease_until, NEW.checkpoint_at,
                NEW.restoring_at, NEW.restored_at, NEW.thawed_at) < '1970-01-01'
       OR GREATEST(NEW.requested_at, NEW.changed_at, NEW.barrier_at, NEW.drained_at, NEW.frozen_at, NEW.lease_until, NEW.checkpoint_at,
                   NEW.restoring_at, NEW.restored_at, NEW.thawed_at) >= '9999-01-01' THEN
        RAISE EXCEPTION USING ERRCODE = '22023', MESSAGE = 'nobody could read that freeze';
    END IF;
    RETURN NEW;
END $$;


CREATE OR REPLACE FUNCTION pgfreeze.check_database()
RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        -- A thaw opens it, and ends the sessions that were read-only in it.
        IF (NEW.closed OR EXISTS (SELECT FROM pgfreeze.freezes f WHERE f.token = NEW.token AND f.strategy = 'read-only'))
           AND NOT pgfreeze.may_alter(NEW.database) THEN
            RAISE EXCEPTION USING ERRCODE = '42501', MESSAGE = format('must be owner of database %I', NEW.name);
        END IF;
    ELSIF (NEW.token, NEW.database, NEW.name) IS DISTINCT FROM (OLD.token, OLD.database, OLD.name)
          OR NEW.closed AND NOT OLD.closed OR NEW.active AND NOT OLD.active THEN
        RAISE EXCEPTION USING ERRCODE = '42501', MESSAGE = 'what is frozen is written once';
    END IF;
    -- A thaw waits for readers until a while after this.
    IF NOT pgfreeze.past('1 minute', CASE WHEN TG_OP = 'INSERT' THEN NEW.restored_at ELSE NULLIF(NEW.restored_at, OLD.restored_at) END) THEN
        RAISE EXCEPTION USING ERRCODE = '22023', MESSAGE = 'nothing is restored at such a time';
    END IF;
    RETURN NEW;
END $$;


CREATE OR REPLACE FUNCTION pgfreeze.check_setting()
RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        IF NOT (NEW.role = 0 AND pgfreeze.may_alter(NEW.database) OR NEW.role <> 0 AND pgfreeze.may_alter_role(NEW.role))
           OR NEW.value::boolean IS NULL AND NEW.value IS NOT NULL THEN   -- the cast is the test
            RAISE EXCEPTION USING ERRCODE = '42501', MESSAGE = 'permission denied to alter setting';
        END IF;
    ELSIF (NEW.token, NEW.database, NEW.role, NEW.value) IS DISTINCT FROM (OLD.token, OLD.database, OLD.role, OLD.value)
          OR OLD.restored_at IS NOT NULL AND NEW.restored_at IS NULL THEN
        RAISE EXCEPTION USING ERRCODE = '42501', MESSAGE = 'what is to be restored is written once';
    END IF;
    IF NOT pgfreeze.past('1 minute', CASE WHEN TG_OP = 'INSERT' THEN NEW.restored_at ELSE NULLIF(NEW.restored_at, OLD.restored_at) END) THEN
        RAISE EXCEPTION USING ERRCODE = '22023', MESSAGE = 'nothing is restored at such a time';
    END IF;
    RETURN NEW;
END $$;


-- Who was in the way of a thaw: for the eyes of people only.
CREATE OR REPLACE FUNCTION pgfreeze.check_blocker()
RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF NOT pgfreeze.past('1 day', NEW.seen_at) THEN
        RAISE EXCEPTION USING ERRCODE = '22023', MESSAGE = 'nobody was seen at such a time';
    END IF;
    RETURN NEW;
END $$;


-- A ticket from the future would void all attempts to come.
CREATE OR REPLACE FUNCTION pgfreeze.check_ticket()
RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF TG_OP = 'INSERT' AND NOT pgfreeze.past('1 day', NEW.began_at, NEW.drawn_at, NEW.voided_at)
       OR TG_OP = 'UPDATE' AND NOT pgfreeze.past('1 day', NULLIF(NEW.began_at, OLD.began_at), NULLIF(NEW.drawn_at, OLD.drawn_at),
                                                 NULLIF(NEW.voided_at, OLD.voided_at)) THEN
        RAISE EXCEPTION USING ERRCODE = '22023', MESSAGE = 'no ticket is drawn at such a time';
    END IF;
    RETURN NEW;
END $$;


-- A look is read by whoever judges it, as a whole.
CREATE OR REPLACE FUNCTION pgfreeze.check_attestation()
RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    seen jsonb;
BEGIN
    FOREACH seen IN ARRAY ARRAY[NEW.before, NEW.after] LOOP
        IF jsonb_typeof(seen) <> 'object' OR (seen ->> 'lsn')::pg_lsn IS NULL AND seen IS NOT NULL
           OR (seen ->> 'xid')::bigint IS NULL AND seen IS NOT NULL THEN
            RAISE EXCEPTION USING ERRCODE = '22023', MESSAGE = 'nobody could read that look';
        END IF;
    END LOOP;
    IF NOT pgfreeze.past('1 day', NEW.before_at, NEW.after_at)
       OR NOT pgfreeze.readable(NEW.before, NEW.after, NEW.violations, NEW.sequences, NEW.unseen, NEW.sizes)
       OR NEW.violations IS NOT NULL AND NOT pgfreeze.objects(NEW.violations, '{code,what}', '{who,when}')
       OR EXISTS (SELECT FROM jsonb_array_elements(NEW.violations) v, jsonb_object_keys(v) k
                   WHERE k NOT IN ('code', 'what', 'who', 'when'))
       OR EXISTS (SELECT FROM unnest(ARRAY[NEW.sequences, NEW.unseen]) s
                   WHERE jsonb_typeof(s) <> 'array' OR jsonb_path_exists(s, 'strict $[*] ? (@.type() != "string")'))
       OR jsonb_typeof(NEW.sizes) NOT IN ('object', 'null')
       OR (NEW.level IS NULL) <> (NEW.after_at IS NULL) OR NEW.level IS NOT NULL AND (NEW.after IS NULL OR NEW.method IS NULL) THEN
        RAISE EXCEPTION USING ERRCODE = '22023', MESSAGE = 'nobody could read that attestation';
    END IF;
    RETURN NEW;
END $$;


CREATE OR REPLACE TRIGGER check_row BEFORE INSERT OR UPDATE ON pgfreeze.blockers
    FOR EACH ROW EXECUTE FUNCTION pgfreeze.check_blocker();
ALTER TABLE pgfreeze.blockers ENABLE ALWAYS TRIGGER check_row;
CREATE OR REPLACE TRIGGER check_row BEFORE INSERT OR UPDATE ON pgfreeze.tickets
    FOR EACH ROW EXECUTE FUNCTION pgfreeze.check_ticket();
ALTER TABLE pgfreeze.tickets ENABLE ALWAYS TRIGGER check_row;
CREATE OR REPLACE TRIGGER check_row BEFORE INSERT OR UPDATE ON pgfreeze.attestations
    FOR EACH ROW EXECUTE FUNCTION pgfreeze.check_attestation();
ALTER TABLE pgfreeze.attestations ENABLE ALWAYS TRIGGER check_row;


-- What is given back is for the owner to say: the role that froze, or superusers only.
CREATE OR REPLACE FUNCTION pgfreeze.check_revoked()
RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF NOT pgfreeze.owned() THEN
        RAISE EXCEPTION USING ERRCODE = '42501', MESSAGE = 'only the owner of the journal writes what is to be given back';
    END IF;
    RETURN CASE TG_OP WHEN 'DELETE' THEN OLD ELSE NEW END;
END $$;


-- What was written is taken away by the owner only: with a freeze that is gone from here goes what its thaw would restore.
CREATE OR REPLACE FUNCTION pgfreeze.check_removal()
RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF NOT pgfreeze.owned() THEN
        RAISE EXCEPTION USING ERRCODE = '42501', MESSAGE = 'only the owner of the journal removes rows of it';
    END IF;
    RETURN NULL;
END $$;


DO $$
DECLARE
    name text;
BEGIN
    FOREACH name IN ARRAY '{tickets,freezes,frozen_databases,prior_settings,blockers,attestations}'::pg_catalog.text[] LOOP
        EXECUTE pg_catalog.format('CREATE OR REPLACE TRIGGER check_removal BEFORE DELETE OR TRUNCATE ON pgfreeze.%I
            FOR EACH STATEMENT EXECUTE FUNCTION pgfreeze.check_removal()', name);
        EXECUTE pg_catalog.format('ALTER TABLE pgfreeze.%I ENABLE ALWAYS TRIGGER check_removal', name);
    END LOOP;
END $$;


CREATE OR REPLACE TRIGGER check_row BEFORE INSERT OR UPDATE ON pgfreeze.freezes
    FOR EACH ROW EXECUTE FUNCTION pgfreeze.check_freeze();
ALTER TABLE pgfreeze.freezes ENABLE ALWAYS TRIGGER check_row;
CREATE OR REPLACE TRIGGER check_row BEFORE INSERT OR UPDATE ON pgfreeze.frozen_databases
    FOR EACH ROW EXECUTE FUNCTION pgfreeze.check_database();
ALTER TABLE pgfreeze.frozen_databases ENABLE ALWAYS TRIGGER check_row;
CREATE OR REPLACE TRIGGER check_row BEFORE INSERT OR UPDATE ON pgfreeze.prior_settings
    FOR EACH ROW EXECUTE FUNCTION pgfreeze.check_setting();
ALTER TABLE pgfreeze.prior_settings ENABLE ALWAYS TRIGGER check_row;
