from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from syncbn_comm import ReplicaGroup

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(columns=st.lists(st.lists(st.integers(), min_size=3, max_size=3), min_size=1, max_size=6))
def test_many_collectives_in_a_row_agree_with_plain_python(columns):
    group = ReplicaGroup(3)

    def work(rank):
        with group.member(rank) as replica:
            own = [column[rank] for column in columns]
            return [(replica.all_reduce(x), replica.all_gather(x)) for x in own]

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(work, range(3))) == [[(sum(column), column) for column in columns]] * 3
