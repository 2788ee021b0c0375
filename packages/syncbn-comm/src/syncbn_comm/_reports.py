"""What went wrong at a rendezvous, in words: who, where, which call, and what to make of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from syncbn_comm._party import Party, State

Calls = Mapping[str | None, int]


def left(gone: Iterable[Party], parties: Iterable[Party], calls: Calls) -> str:
    """Say that parties have finished which others wait for."""
    waiting = _by_place(_waiting(parties))
    if len(waiting) > 1:
        return f"{_names(gone)} finished while others wait: {_listed(waiting, calls)}"
    ((where, waiters),) = waiting.items()
    verb = "is" if len(waiters) == 1 else "are"
    place = _next_call(where, calls)
    return f"{_names(gone)} finished without reaching {place}; {_names(waiters)} {verb} waiting"


def split(parties: Iterable[Party], calls: Calls) -> str:
    """Say that everybody waits, but not at one place."""
    return (
        "all replicas that still run are waiting, but at different places: "
        f"{_listed(_by_place(parties), calls)}"
    )


def timed_out(party: Party, timeout: float | None, parties: Iterable[Party], calls: Calls) -> str:
    """Say how many arrived in time where ``party`` waits, and where the others are."""
    parties = list(parties)
    missing = [other for other in parties if other.state is State.RUNNING or other.where != party.where]
    report = (
        f"timed out after {timeout} s at {_quoted(party.where)}: "
        f"{len(parties) - len(missing)} of {len(parties)} replicas arrived"
    )
    if not missing:
        return f"{report}, but the combine callback has not returned"
    where = "; ".join(f"{_names([other])} {_whereabouts(other, calls)}" for other in missing)
    return f"{report} (missing: {', '.join(str(other.identifier) for other in missing)}); {where}"


def failed(failure: BaseException, party: Party | None, calls: Calls) -> str:
    """Say who failed, where, and why in short."""
    who = "aborted" if party is None else f"{_names([party])} failed {_moment(party, calls)}"
    kind, words = type(failure).__name__, _first_line(failure)
    return f"{who}: {kind}: {words:.200}" if words else f"{who}: {kind}"


def misused(party: Party, where: str) -> str:
    """Say why ``party`` cannot go to ``where``."""
    name, place = _names([party]), _quoted(where)
    if party.state is State.LEFT:
        return f"expected a replica that still runs at {place}, got {name}, which has left"
    return f"expected one call of {name} at a time, got one at {place} while it is at {_quoted(party.where)}"


def cannot_enter(party: Party) -> str:
    """Say why no ``with`` block of ``party`` can begin."""
    if party.state is State.LEFT:
        return f"expected a replica that still runs, got {_names([party])}, which has left"
    return f"expected a replica that no other thread has entered, got {_names([party])}"


def described_group(name: str | None, parties: list[Party], broken: str | None) -> str:
    """Describe a group for ``repr``: its size, who is active, who has left, what broke it."""
    active = [party for party in parties if party.entered]
    left = [party for party in parties if party.state is State.LEFT]
    words = [f"ReplicaGroup{_of(name, '')}, {_count(parties, 'replica')}"]
    words += [f"active: {_identifiers(active)}"] if active else []
    words += [f"left: {_identifiers(left)}"] if left else []
    words += [f"broken: {broken}"] if broken is not None else []
    return f"<{'; '.join(words)}>"


def described_master(name: str | None, slaves: list[Party], broken: str | None) -> str:
    """Describe a master for ``repr``: its slaves, and what broke the round."""
    words = f"SyncMaster{_of(name, '')}, {_count(slaves, 'slave')}"
    words += f": {_identifiers(slaves)}" if slaves else ""
    words += f"; broken: {broken}" if broken is not None else ""
    return f"<{words}>"


def described_member(name: str | None, party: Party, size: int, calls: Calls) -> str:
    """Describe one member of a group as its ``repr``: rank, group, what it does."""
    does = party.state.name.lower()
    if party.state in (State.WAITING, State.COMBINING):
        does += f" at {_next_call(party.where, calls)}"
    return f"<Replica {party.identifier} (of 0 to {size - 1}){_of(name, ' of')}, {does}>"


def _count(parties: list[Party], noun: str) -> str:
    return f"{len(parties)} {noun}{'' if len(parties) == 1 else 's'}"


def _identifiers(parties: Iterable[Party]) -> str:
    return ", ".join(str(party.identifier) for party in parties)


def _of(name: str | None, before: str) -> str:
    return f"{before} '{name}'" if name else ""


def _first_line(failure: BaseException) -> str:
    try:
        return str(failure).strip().partition("\n")[0]
    except Exception:  # the words are the user's code: were they to fail here, the others would wait on
        return "(its message cannot be shown)"


def _moment(party: Party, calls: Calls) -> str:
    if party.where is None:
        return "before its first rendezvous"
    if party.state is State.WAITING:
        return f"while waiting at {_next_call(party.where, calls)}"
    if party.state is State.COMBINING:
        return f"while combining at {_next_call(party.where, calls)}"
    return f"after {_last_call(party.where, calls)}"


def _whereabouts(party: Party, calls: Calls) -> str:
    if party.where is None:
        return "has not come to any rendezvous"
    if party.state is State.RUNNING:
        return f"was last at {_last_call(party.where, calls)}"
    return f"waits at {_next_call(party.where, calls)}"


def _waiting(parties: Iterable[Party]) -> list[Party]:
    return [party for party in parties if party.state is State.WAITING]


def _by_place(parties: Iterable[Party]) -> dict[str | None, list[Party]]:
    places: dict[str | None, list[Party]] = {}
    for party in parties:
        places.setdefault(party.where, []).append(party)
    return places


def _listed(places: Mapping[str | None, list[Party]], calls: Calls) -> str:
    return ", ".join(f"{_names(waiters)} at {_next_call(where, calls)}" for where, waiters in places.items())


def _names(parties: Iterable[Party]) -> str:
    identifiers = [str(party.identifier) for party in parties]
    return f"replica{'s' if len(identifiers) > 1 else ''} {', '.join(identifiers)}"


def _last_call(where: str | None, calls: Calls) -> str:
    return f"{_quoted(where)} (call {calls.get(where, 0)})"


def _next_call(where: str | None, calls: Calls) -> str:
    return f"{_quoted(where)} (call {calls.get(where, 0) + 1})"


def _quoted(where: str | None) -> str:
    return f"'{where}'" if where else "an unnamed place"
