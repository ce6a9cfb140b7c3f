"""Refuses, when a DAG is parsed, what makes no sense whatever the run.

Airflow's rule is that ``__init__`` only assigns a templated field, since its value comes when the task runs. A constant
has its value already, and so has each keyword that is not templated. All of them are checked here, by one rule for each
keyword whatever takes it, and everything again in ``execute``, which sees what was rendered.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from inspect import Parameter, signature
from typing import Any, Final, TypeAlias
from uuid import UUID

from airflow_pg_freeze.snapshots import SnapshotRefused
from airflow_pg_freeze.snapshots import tags as tagging
from airflow_pg_freeze.snapshots.ebs_wanted import Wanted, snapshot_ids
from pg_freeze import READ_ONLY, Admit, InvalidRequest
from pg_freeze.attestation import required
from pg_freeze.durations import duration
from pg_freeze.request import NO_TIME, FreezeRequest, check_not_negative, check_positive, member
from pg_freeze.volumes import Volume, check_names

#: Takes the name and the value of a keyword, and raises what is wrong with it.
Rule: TypeAlias = Callable[[str, Any], object]

_BEGINNINGS: Final = ("{{", "{%", "{#")
_ANY: Final = "any"
#: The keywords of a freeze, which are checked together as well.
FREEZE: Final = (
    "database",
    "holder",
    "lease",
    "drain_timeout",
    "on_drain_timeout",
    "admit",
    "strategy",
    "roles",
    "require",
)


def is_constant(value: object, dag: Any = None) -> bool:
    """Whether a keyword has its value already: it is no template, no XCom, and nothing else that is resolved later.

    :param dag: may have chosen other characters for its templates.
    """
    if isinstance(value, str):
        chosen: Mapping[str, Any] = getattr(dag, "jinja_environment_kwargs", None) or {}
        other = [text for name, text in chosen.items() if name.endswith(("_start_string", "_prefix"))]
        return not any(text in value for text in (*_BEGINNINGS, *filter(None, other)))
    if isinstance(value, Mapping):
        return all(is_constant(one, dag) for one in value.values())
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(is_constant(one, dag) for one in value)
    return value is None or isinstance(value, (bool, int, float, timedelta))


def _allowed(what: str, fits: Callable[[Any], bool]) -> Rule:
    def rule(name: str, value: Any) -> None:
        if not fits(value):
            raise InvalidRequest(f"{name} is {value!r}: it must be {what}")

    return rule


def _text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _texts(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(map(_text, value))


def _one_of(*choices: str) -> Rule:
    return _allowed(f"one of {', '.join(choices)}", lambda value: getattr(value, "value", value) in choices)


def _is_uuid(value: object) -> bool:
    try:
        return isinstance(UUID(str(value)), UUID)
    except ValueError:
        return False


def _volumes(name: str, value: Any) -> None:
    _allowed("a list, such as ['btrfs:/srv/data']", _texts)(name, value)
    for one in value:
        Volume.parse(one)


def _tags(name: str, value: Any) -> None:
    fits = isinstance(value, Mapping) and all(isinstance(one, str) for pair in value.items() for one in pair)
    _allowed("a dictionary of texts", lambda _: fits or value is None)(name, value)
    tagging.checked(value or {})


def _snapshot_ids(name: str, value: Any) -> None:
    _allowed("a list of ids, or text that holds them", lambda it: _text(it) or _texts(it))(name, value)
    snapshot_ids(value)


def _attestation(name: str, value: Any) -> None:
    keys = {"level", "certified", "token"}
    _allowed(
        "the XCom of the second attestation, a dictionary with certified, level and token",
        lambda it: isinstance(it, Mapping) and keys <= it.keys(),
    )(name, value)


_TEXT: Final = _allowed("a text that is not empty", _text)
_TEXT_OR_NONE: Final = _allowed("a text, or None", lambda value: value is None or isinstance(value, str))
_FLAG: Final = _allowed("True or False", lambda value: isinstance(value, bool))
_TEXTS: Final = _allowed("a list of texts", _texts)

# A text that is not templated would be taken for true, even "false" and "{{ params.x }}".
_RULES: Final[Mapping[str, Rule]] = {
    "postgres_conn_id": _TEXT,
    "maintenance_database": _TEXT,
    "database": _allowed(
        "a name, a list of names, or None for the connection's",
        lambda value: value is None or isinstance(value, str) or _texts(value),
    ),
    "holder": _allowed("a text", lambda value: isinstance(value, str)),
    "roles": _allowed("a name or a list of names", lambda value: _text(value) or _texts(value)),
    "reader_grace": lambda name, value: check_not_negative(**{name: duration(name, value)}),
    "lease_left": lambda name, value: check_not_negative(**{name: duration(name, value)}),
    "max_wait": lambda name, value: check_positive(**{name: duration(name, value)}),
    "poke_interval": lambda name, value: check_positive(**{name: duration(name, value)}),
    "timeout": lambda name, value: check_positive(**{name: duration(name, value)}),
    "moment": _one_of("before", "after"),
    "attestation_file": _TEXT_OR_NONE,
    "volumes": _volumes,
    "directory": _TEXT_OR_NONE,
    "prefix": _TEXT,
    "lvm_size": _TEXT_OR_NONE,
    "tags": _tags,
    "instance_id": _TEXT_OR_NONE,
    "volume_ids": lambda name, value: (
        _allowed("not text: give a list", lambda it: not isinstance(it, str))(name, value) or _TEXTS(name, value)
    ),
    "exclude_volume_ids": _TEXTS,
    "snapshot_ids": _snapshot_ids,
    "attestation": _attestation,
    "token": _allowed("the token of a freeze, or None", lambda value: value is None or _is_uuid(value)),
    "db_identifier": _TEXT,
    "db_type": _one_of("instance", "cluster"),
    "db_snapshot_identifier": _TEXT_OR_NONE,
    **dict.fromkeys(("checkpoint", "switch_wal", "strict", "dead_man", "force", "required", "deferrable"), _FLAG),
    **dict.fromkeys(("wait_for_superusers", "sudo", "delete_partial", "delete_failed"), _FLAG),
    **dict.fromkeys(("copy_volume_tags", "exclude_boot_volume"), _FLAG),
}


def check_given(given: Mapping[str, Any], templated: Collection[str] = (), dag: Any = None) -> None:
    """Check keywords: each by its rule, and together what belongs together.

    :param given: names and values; what has no rule here is left alone.
    :param templated: the names whose values may be templates, or come from another task.
    :param dag: may have chosen other characters for its templates.
    :raises InvalidRequest: naming the keyword, its value and what is allowed.
    """
    known = {name: value for name, value in given.items() if name not in templated or is_constant(value, dag)}
    with at_parse():
        for name, value in known.items():
            if name in _RULES:
                _RULES[name](name, value)
        check_freeze({name: known[name] for name in FREEZE if name in known})
        if "volumes" in known:
            check_names(known["volumes"], known.get("prefix", "pg-freeze"), known.get("directory"))
        if {"instance_id", "volume_ids", "exclude_volume_ids"} <= known.keys():
            _check_target(known)


def check_constants(operator: Any) -> None:
    """Check what an operator was made with; the last thing that its ``__init__`` does.

    :raises InvalidRequest: as :func:`check_given`.
    """
    # Airflow makes an index of a mapped task from values, in the middle of the task: there execute() checks them, and
    # says which errors no retry can cure.
    if not getattr(operator, "_BaseOperator__from_mapped", False):
        given = {name: getattr(operator, name) for name in _keywords(type(operator)) if hasattr(operator, name)}
        check_given(given, operator.template_fields, getattr(operator, "_dag", None))


class Checked:
    """An operator whose constants are checked also where it is mapped, for which Airflow does not make it at parse."""

    @classmethod
    def partial(cls, **kwargs: Any) -> Any:
        """Begin a mapped task, as Airflow does."""
        return _Partial(super().partial(**kwargs), cls)  # type: ignore[misc]  # that of Airflow's operators

    @classmethod
    def check_mapped(cls, operator: Any) -> None:
        """Check what a mapped task was made with.

        :raises InvalidRequest: as :func:`check_given`.
        """
        mapped = operator.expand_input.value
        given: Mapping[str, Any] = operator.partial_kwargs
        if isinstance(mapped, Mapping):  # otherwise any keyword may come from what expand_kwargs() is given
            # The default of a holder, which is None here, is a template.
            known = {name: it for name, it in _keywords(cls).items() if it is not Parameter.empty and name != "holder"}
            given = {name: value for name, value in {**known, **given}.items() if name not in mapped}
        check_given(given, getattr(cls, "template_fields", ()), operator.dag)


class _Partial:
    def __init__(self, made: Any, kind: type[Checked]) -> None:
        self._made, self._kind = made, kind

    def expand(self, **mapped: Any) -> Any:
        return self._checked(self._made.expand(**mapped))

    def expand_kwargs(self, kwargs: Any, *, strict: bool = True) -> Any:
        return self._checked(self._made.expand_kwargs(kwargs, strict=strict))

    def _checked(self, operator: Any) -> Any:
        self._kind.check_mapped(operator)
        return operator


def _keywords(kind: type) -> Mapping[str, Any]:
    """Return the keywords that our own classes give an operator, each with its default or ``Parameter.empty``.

    A class of Airflow's may mean something else by the same name, as sensors do by ``max_wait``.
    """
    ours = [one for one in reversed(kind.__mro__) if one.__module__.startswith("airflow_pg_freeze.")]
    parameters = (one for each in ours for one in signature(each.__init__).parameters.values())  # type: ignore[misc]
    return {one.name: one.default for one in parameters if one.kind is Parameter.KEYWORD_ONLY}


def _check_target(known: Mapping[str, Any]) -> None:
    boot = bool(known.get("exclude_boot_volume"))
    volumes, excluded = tuple(known["volume_ids"]), tuple(known["exclude_volume_ids"])
    Wanted(known["instance_id"] or None, volumes, boot, excluded).checked()


def check_freeze(given: Mapping[str, Any]) -> None:
    """Check what is known of a freeze: of ``database``, ``holder``, ``lease``, ``require`` and the like, the constants.

    :raises InvalidRequest: for what makes no sense, each by itself and all together.
    """
    times = {name: duration(name, given[name]) for name in ("lease", "drain_timeout") if name in given}
    # What is not known yet gets a value that agrees with the others.
    lease = times.get("lease", max(times.get("drain_timeout", NO_TIME), NO_TIME) + timedelta(seconds=1))
    drain_timeout = times.get("drain_timeout", lease / 2)
    admit = member(Admit, given.get("admit", Admit.READERS_ONCE_DRAINED), "admit")
    known = "strategy" in given
    strategy = given.get("strategy", READ_ONLY)
    FreezeRequest.of(
        given.get("database") or [_ANY] if given.get("database") != [] else [],
        given.get("holder", _ANY),
        strategy=strategy,
        lease=lease,
        drain_timeout=drain_timeout,
        on_drain_timeout=given.get("on_drain_timeout", "terminate"),
        admit=admit,
        roles=given.get("roles", ()) if known else (),
    )
    if "require" in given:
        both = known and "admit" in given
        required(given["require"], *((strategy, admit) if both else (READ_ONLY, Admit.NOBODY)))


@contextmanager
def at_parse() -> Iterator[None]:
    """Raise what a snapshot refuses as what a request should not have asked for.

    :raises InvalidRequest: for a :class:`SnapshotRefused`.
    """
    try:
        yield
    except SnapshotRefused as error:
        raise InvalidRequest(str(error)) from error
