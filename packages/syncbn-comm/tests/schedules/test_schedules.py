"""Random failures under random schedules: no deadlock, rounds never mix, the first cause is never lost."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest

from syncbn_comm import (
    BrokenSyncError,
    ReplicaGroup,
    ReplicaLeftError,
    SyncError,
    SyncMaster,
    SyncTimeoutError,
)

SCHEDULES = 24_000
LINE_SCHEDULES = 6_000
CHUNKS = 12
CHUNK_NUMBERS = [0, *(pytest.param(chunk, marks=pytest.mark.full) for chunk in range(1, CHUNKS))]
MASTER_SEEDS = [range(600), pytest.param(range(600, 2_000), marks=pytest.mark.full)]
REGISTRATION_SEEDS = [range(1_000), pytest.param(range(1_000, 3_000), marks=pytest.mark.full)]
EVENTS = ("raise", "leave", "abort", "combine", "elsewhere")


class Injected(Exception):
    pass


@dataclass
class Plan:
    """Which event happens to which replica before which round; all of it follows from the seed."""

    seed: int
    replicas: int = 0
    rounds: int = 0
    timeouts: float = 0.0
    events: dict[tuple[int, int], str] = field(default_factory=dict)  # (rank, turn) -> event

    def __post_init__(self) -> None:
        rng = random.Random(self.seed)
        self.replicas = rng.randint(2, 4)
        self.rounds = rng.randint(1, 3)
        self.timeouts = rng.choice((0.0, 0.0, 0.0, 0.05))
        for _ in range(rng.choice((0, 1, 1, 2))):
            event = rng.choice(EVENTS)
            rank = 0 if event == "combine" else rng.randrange(self.replicas)
            self.events[rank, rng.randrange(self.rounds)] = event

    @property
    def first_failing_turn(self) -> int:
        return min((turn for _, turn in self.events), default=self.rounds)

    def expected_result(self, rank: int, turn: int) -> Any:
        return rank, [(other, (other, turn)) for other in range(self.replicas)]


@dataclass
class Run:
    """One group under one schedule, and the outcome of each replica."""

    plan: Plan
    group: ReplicaGroup
    injected: list[BaseException] = field(default_factory=list)
    results: dict[int, list[Any]] = field(default_factory=dict)
    errors: dict[int, BaseException] = field(default_factory=dict)

    def replica(self, rank: int) -> None:
        results = self.results[rank] = []
        try:
            with self.group.member(rank) as replica:
                for turn in range(self.plan.rounds):
                    event = self.plan.events.get((rank, turn))
                    if event == "leave":
                        return
                    if event == "raise":
                        raise self.inject()
                    if event == "abort":
                        self.group.abort(self.inject(), rank=rank)
                    where = f"only {rank}" if event == "elsewhere" else f"place {turn % 2}"
                    combine = self.fail if event == "combine" else self.combine
                    results.append(replica.exchange((rank, turn), combine, where=where))
        except Exception as error:
            self.errors[rank] = error

    def inject(self) -> Injected:
        self.injected.append(Injected(len(self.injected)))
        return self.injected[-1]

    def fail(self, messages: Any) -> Any:
        raise self.inject()

    @staticmethod
    def combine(messages: list[Any]) -> list[Any]:
        return [(rank, (rank, messages)) for rank, _ in messages]


def check(run: Run) -> None:
    plan, failure = run.plan, run.group.failure
    finished = {len(results) for results in run.results.values()}
    assert len(finished) == 1, "a round took place for some replicas and not for others"
    (turns,) = finished
    assert turns == plan.first_failing_turn or (turns < plan.first_failing_turn and plan.timeouts)
    for rank, results in run.results.items():
        assert results == [plan.expected_result(rank, turn) for turn in range(turns)], "rounds were mixed"

    if failure is None:
        stayed = [rank for rank in range(plan.replicas) if plan.events.get((rank, turns)) != "leave"]
        assert turns == plan.rounds or not stayed
        assert not run.errors
        return
    events = {event for (_, turn), event in plan.events.items() if turn == turns}
    if isinstance(failure, Injected):
        assert failure in run.injected, "the first cause was lost"
    elif isinstance(failure, SyncTimeoutError):
        assert plan.timeouts
    elif isinstance(failure, ReplicaLeftError):
        assert "leave" in events
        assert plan.events[run.group.failed_rank, turns] == "leave"
    else:
        assert type(failure) is BrokenSyncError
        assert "elsewhere" in events
    if len(plan.events) == 1 and not plan.timeouts and events != {"elsewhere"}:
        assert isinstance(failure, ReplicaLeftError if events == {"leave"} else Injected)

    for rank in range(plan.replicas):
        error = run.errors.get(rank)
        if error is None:
            assert plan.events[rank, turns] == "leave", "a failure was kept from a replica"
        elif error is not failure and error not in run.injected:
            assert isinstance(error, BrokenSyncError)
            assert error.__cause__ is failure, "the first cause was lost"
            assert error not in [run.errors.get(other) for other in range(rank)], "an error was shared"


def run_and_check(scheduler, seed, every_line):
    plan = Plan(seed)
    run = Run(plan, ReplicaGroup(plan.replicas))
    jobs = [lambda rank=rank: run.replica(rank) for rank in range(plan.replicas)]
    try:
        scheduler.run(seed, jobs, plan.timeouts, every_line)
        check(run)
    except BaseException as wrong:
        wrong.add_note(f"{plan}: {run.errors}, failure {run.group.failure!r}")
        raise


@pytest.mark.parametrize("chunk", CHUNK_NUMBERS)
def test_no_schedule_of_a_group_hangs_or_mixes_rounds_or_loses_the_first_cause(scheduler, chunk):
    for seed in range(chunk, SCHEDULES, CHUNKS):
        run_and_check(scheduler, seed, every_line=False)


@pytest.mark.parametrize("chunk", CHUNK_NUMBERS)
def test_the_same_holds_when_threads_change_at_every_line(scheduler, chunk):
    for seed in range(chunk, LINE_SCHEDULES, CHUNKS):
        run_and_check(scheduler, seed, every_line=True)


def test_one_seed_is_one_schedule(scheduler):
    def trace() -> list[int]:
        order: list[int] = []
        group = ReplicaGroup(3)

        def job(rank: int) -> None:
            for _ in range(20):
                group.member(rank).barrier()
                order.append(rank)

        scheduler.run(7, [lambda rank=rank: job(rank) for rank in range(3)])
        return order

    first = trace()
    assert first == trace()
    assert first != sorted(first)


def run_master_and_slaves(scheduler, seed, breaks):
    """Let one of 2 to 4 participants call ``breaks(master)`` after the first of three rounds."""
    rng = random.Random(seed)
    master = SyncMaster(lambda messages: [(identifier, messages) for identifier, _ in messages])
    pipes = [master.register_slave(rank) for rank in range(1, rng.randint(2, 4))]
    calls = [master.run_master, *(pipe.run_slave for pipe in pipes)]
    culprit = rng.randrange(len(calls))
    outcomes: list[list[Any]] = [[] for _ in calls]

    def job(rank: int) -> None:
        for turn in range(3):
            if turn == 1 and rank == culprit:
                breaks(master)
            try:
                outcomes[rank].append(calls[rank](rank))
            except BrokenSyncError as error:
                outcomes[rank].append(error)

    scheduler.run(seed, [lambda rank=rank: job(rank) for rank in range(len(calls))])
    whole = [(rank, rank) for rank in range(len(calls))]
    assert [outcome[0] for outcome in outcomes] == [whole] * len(calls)
    return outcomes


@pytest.mark.parametrize("seeds", MASTER_SEEDS)
def test_no_schedule_of_an_aborted_master_hangs_or_loses_the_cause(scheduler, seeds):
    for seed in seeds:
        cause = Injected()
        all_outcomes = run_master_and_slaves(scheduler, seed, lambda master, cause=cause: master.abort(cause))
        for outcomes in all_outcomes:
            assert [error.__cause__ for error in outcomes[1:]] == [cause, cause]


@pytest.mark.parametrize("seeds", MASTER_SEEDS)
def test_no_schedule_of_a_master_that_is_reset_hangs_or_serves_a_forgotten_slave(scheduler, seeds):
    for seed in seeds:
        of_master, *of_slaves = run_master_and_slaves(scheduler, seed, lambda master: master.reset())
        for outcomes in of_slaves:
            assert all("the master has been reset" in str(error) for error in outcomes[1:])
        # Its second call may have begun before the reset; its third finds an empty set.
        assert of_master[1] == [(0, 0)] or isinstance(of_master[1], BrokenSyncError)
        assert of_master[2] == [(0, 0)]


@pytest.mark.parametrize("seeds", REGISTRATION_SEEDS)
def test_no_schedule_of_a_registration_during_the_rounds_hangs_or_mixes_sets(scheduler, seeds):
    """One more thread registers slave 1 again, at any moment: it is refused, or begins a set of its own."""
    replaced, refused, ended = 0, 0, Injected()
    for seed in seeds:
        rng = random.Random(seed)
        master = SyncMaster(lambda messages: [(identifier, messages) for identifier, _ in messages])
        pipes = [master.register_slave(rank) for rank in range(1, rng.randint(2, 3))]
        calls = [master.run_master, *(pipe.run_slave for pipe in pipes)]
        outcomes: list[list[Any]] = [[] for _ in calls]

        def participant(rank, calls=calls, outcomes=outcomes):
            for turn in range(3):
                try:
                    outcomes[rank].append(calls[rank]((turn, rank)))
                except BrokenSyncError as error:
                    outcomes[rank].append(error)

        registrations: list[bool] = []

        def register(master=master, registrations=registrations):
            try:
                pipe = master.register_slave(1)
            except SyncError:
                registrations.append(False)
                return
            registrations.append(True)
            assert pipe._rendezvous is master._set
            master.abort(ended)  # nobody will use the pipe, so the master must not wait for it

        jobs = [lambda rank=rank: participant(rank) for rank in range(len(calls))]
        scheduler.run(seed, [*jobs, register], every_line=bool(seed % 2))
        complete = [(rank, (turn, rank)) for turn in range(3) for rank in range(len(calls))]
        for results in outcomes:
            for turn, result in enumerate(results):
                if not isinstance(result, BrokenSyncError):
                    assert result == complete[turn * len(calls) : (turn + 1) * len(calls)], "sets were mixed"
        assert len({sum(isinstance(r, list) for r in results) for results in outcomes}) == 1
        if registrations == [False]:
            assert all(isinstance(result, list) for results in outcomes for result in results)
        replaced += registrations == [True]
        refused += registrations == [False]
    assert replaced > 100
    assert refused > 100
