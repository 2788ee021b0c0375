"""What went wrong at a rendezvous, in words: which replica, at which place, in which call."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping

from syncbn_comm._participant import Participant, State

Calls = Mapping[str | None, int]


def left(gone: Iterable[Participant], participants: Iterable[Participant], calls: Calls) -> str:
    """Say that participants have finished while others wait for them."""
    waiting = _by_place(_waiting(participants))
    if len(waiting) > 1:
        return f"{_names(gone)} finished while others wait: {_listed(waiting, calls)}"
    ((where, waiters),) = waiting.items()
    verb = "is" if len(waiters) == 1 else "are"
    place = _next_call(where, calls)
    return f"{_names(gone)} finished without reaching {place}; {_names(waiters)} {verb} waiting"


def split(participants: Iterable[Participant], calls: Calls) -> str:
    """Say that everybody waits, but not at the same place."""
    return (
        "all replicas that still run are waiting, but at different places: "
        f"{_listed(_by_place(participants), calls)}"
    )


def timed_out(
    participant: Participant, timeout: float | None, participants: Iterable[Participant], calls: Calls
) -> str:
    """Say how many arrived in time at the place where ``participant`` waits, and where the others are."""
    everybody = list(participants)
    missing = [
        other for other in everybody if other.state is State.RUNNING or other.where != participant.where
    ]
    report = (
        f"timed out after {timeout} s at {_quoted(participant.where)}: "
        f"{len(everybody) - len(missing)} of {len(everybody)} replicas arrived"
    )
    if not missing:
        return f"{report}, but the combine callback has not returned"
    where = "; ".join(f"{_names([other])} {_whereabouts(other, calls)}" for other in missing)
    return f"{report} (missing: {_identifiers(missing)}); {where}"


def failed(failure: BaseException, participant: Participant | None, calls: Calls) -> str:
    """Say which participant failed, at which place, and the first line of the reason."""
    who = (
        "aborted" if participant is None else f"{_names([participant])} failed {_moment(participant, calls)}"
    )
    kind, words = type(failure).__name__, _first_line(failure)
    return f"{who}: {kind}: {words:.200}" if words else f"{who}: {kind}"


def misused(participant: Participant, where: str) -> str:
    """Say why ``participant`` cannot wait at ``where``."""
    name, place = _names([participant]), _quoted(where)
    if participant.state is State.LEFT:
        return f"expected a replica that still runs at {place}, got {name}, which has left"
    busy = _quoted(participant.where)
    return f"expected one call of {name} at a time, got one at {place} while it is at {busy}"


def cannot_enter(participant: Participant) -> str:
    """Say why no ``with`` block of ``participant`` can begin."""
    if participant.state is State.LEFT:
        return f"expected a replica that still runs, got {_names([participant])}, which has left"
    return f"expected a replica that no other thread has entered, got {_names([participant])}"


def too_late(identifier: Hashable, participants: Iterable[Participant]) -> str:
    """Say that ``identifier`` registers during a round."""
    participants = list(participants)
    if any(participant.state is State.COMBINING for participant in participants):
        moment = "during the callback"
    else:
        waiters = _waiting(participants)
        moment = f"while {_names(waiters)} {'waits' if len(waiters) == 1 else 'wait'}"
    return f"expected {identifier!r} to register before the round, got a registration {moment}"


def described_group(name: str | None, participants: list[Participant], broken: str | None) -> str:
    """Describe a group for ``repr``: its size, who is active, who has left, what broke it."""
    active = [participant for participant in participants if participant.entered]
    left = [participant for participant in participants if participant.state is State.LEFT]
    words = [f"ReplicaGroup{_named(name)}, {_count(participants, 'replica')}"]
    words += [f"active: {_identifiers(active)}"] if active else []
    words += [f"left: {_identifiers(left)}"] if left else []
    words += [f"broken: {broken}"] if broken is not None else []
    return f"<{'; '.join(words)}>"


def described_member(name: str | None, participant: Participant, size: int, calls: Calls) -> str:
    """Describe one member of a group for ``repr``: its rank, its group, what it is doing."""
    does = participant.state.name.lower()
    if participant.state in (State.WAITING, State.COMBINING):
        does += f" at {_next_call(participant.where, calls)}"
    of = f" of{_named(name)}" if name else ""
    return f"<Replica {participant.identifier} (of 0 to {size - 1}){of}, {does}>"


def described_master(name: str | None, slaves: list[Participant], broken: str | None) -> str:
    """Describe a master for ``repr``: its slaves, and what broke the round."""
    words = f"SyncMaster{_named(name)}, {_count(slaves, 'slave')}"
    words += f": {_identifiers(slaves)}" if slaves else ""
    words += f"; broken: {broken}" if broken is not None else ""
    return f"<{words}>"


def _first_line(failure: BaseException) -> str:
    try:
        return str(failure).strip().partition("\n")[0]
    except Exception:  # this calls the user's code: if it raised here, the others would wait on
        return "(its message cannot be shown)"


def _moment(participant: Participant, calls: Calls) -> str:
    if participant.where is None:
        return "before it synchronized for the first time"
    if participant.state is State.WAITING:
        return f"while waiting at {_next_call(participant.where, calls)}"
    if participant.state is State.COMBINING:
        return f"while combining at {_next_call(participant.where, calls)}"
    return f"after {_last_call(participant.where, calls)}"


def _whereabouts(participant: Participant, calls: Calls) -> str:
    if participant.where is None:
        return "has not synchronized yet"
    if participant.state is State.RUNNING:
        return f"was last at {_last_call(participant.where, calls)}"
    return f"waits at {_next_call(participant.where, calls)}"


def _waiting(participants: Iterable[Participant]) -> list[Participant]:
    return [participant for participant in participants if participant.state is State.WAITING]


def _by_place(participants: Iterable[Participant]) -> dict[str | None, list[Participant]]:
    places: dict[str | None, list[Participant]] = {}
    for participant in participants:
        places.setdefault(participant.where, []).append(participant)
    return places


def _listed(places: Mapping[str | None, list[Participant]], calls: Calls) -> str:
    return ", ".join(f"{_names(waiters)} at {_next_call(where, calls)}" for where, waiters in places.items())


def _names(participants: Iterable[Participant]) -> str:
    participants = list(participants)
    return f"replica{'' if len(participants) == 1 else 's'} {_identifiers(participants)}"


def _identifiers(participants: Iterable[Participant]) -> str:
    return ", ".join(str(participant.identifier) for participant in participants)


def _count(participants: list[Participant], noun: str) -> str:
    return f"{len(participants)} {noun}{'' if len(participants) == 1 else 's'}"


def _named(name: str | None) -> str:
    return f" '{name}'" if name else ""


def _last_call(where: str | None, calls: Calls) -> str:
    return f"{_quoted(where)} (call {calls.get(where, 0)})"


def _next_call(where: str | None, calls: Calls) -> str:
    return f"{_quoted(where)} (call {calls.get(where, 0) + 1})"


def _quoted(where: str | None) -> str:
    return f"'{where}'" if where else "an unnamed place"
