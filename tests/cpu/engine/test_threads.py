"""The choice of a number of threads, on machines that are made up."""

from __future__ import annotations

import pytest

from nybble.engine.threads import ThreadCount

IDLE = {1: 6e-3, 2: 4e-3, 3: 3e-3, 4: 2.5e-3}
BUSY = {1: 6e-3, 2: 20e-3, 3: 20e-3, 4: 20e-3}
HALF_BUSY = {1: 6e-3, 2: 4e-3, 3: 15e-3, 4: 20e-3}


class Machine:
    """Steps take what `seconds` says of the number of threads that is set."""

    def __init__(self, most, seconds):
        self.threads, self.seconds, self.now = most, seconds, 0.0
        self.used: list[int] = []
        self.chosen = ThreadCount(most, self.set, lambda: self.threads, lambda: self.now)

    def set(self, count):
        self.threads = count

    def run(self, steps, requests=1, scale=1.0):
        """The share of steps on each number of threads, over the last half."""
        self.used.clear()
        for _ in range(steps):
            with self.chosen.step(requests):
                self.used.append(self.threads)
                self.now += scale * self.seconds[self.threads]
        late = self.used[steps // 2 :]
        return {count: late.count(count) / len(late) for count in set(late)}


@pytest.mark.parametrize("most", [2, 4])
def test_an_idle_machine_runs_on_all_threads(most):
    assert Machine(most, IDLE).run(4000)[most] > 0.97


@pytest.mark.parametrize("most", [2, 4])
def test_a_busy_machine_soon_runs_on_one(most):
    machine = Machine(most, BUSY)
    assert machine.run(2000)[1] > 0.97
    assert machine.used.index(1) < 60 * most
    # Looking up again now and then costs little.
    begin = machine.now
    machine.run(4000)
    assert machine.now - begin < 1.1 * 4000 * BUSY[1]


def test_it_stops_where_fewer_bring_nothing():
    assert Machine(4, HALF_BUSY).run(4000)[2] > 0.9


def test_it_returns_when_the_machine_is_free_again():
    machine = Machine(2, BUSY)
    machine.run(1000)
    machine.seconds = IDLE
    assert machine.run(10000)[2] > 0.97


def test_a_machine_that_gets_busy_is_noticed_within_a_few_steps():
    machine = Machine(2, IDLE)
    machine.run(150)
    machine.seconds = BUSY
    machine.run(40)
    assert machine.used[-1] == 1


def test_steps_of_other_sizes_are_not_compared():
    machine = Machine(2, IDLE)
    for round_ in range(40):
        many = round_ % 2
        machine.run(20, requests=64 if many else 1, scale=10.0 if many else 1.0)
        machine.run(1, requests=0, scale=100.0)
    assert machine.chosen.count == 2


def test_the_number_of_threads_is_left_as_it_was():
    machine = Machine(2, BUSY)
    machine.run(500)
    assert machine.chosen.count == 1
    assert machine.threads == 2
    with pytest.raises(ZeroDivisionError):
        fail_in_a_step(machine)
    assert machine.used[-1] == 1
    assert machine.threads == 2


def fail_in_a_step(machine):
    with machine.chosen.step(1):
        machine.used.append(machine.threads)
        raise ZeroDivisionError
