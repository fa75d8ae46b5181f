"""When blocks are activated: sequences worked out by hand from the definition."""
from __future__ import annotations

import math
import random

import pytest

from fedms.config import load_config
from fedms.federated.schedule import CapabilityQueue, Every, Fixed, SalState, depths_ahead, from_config


def depths(schedule, scores):
    """Depth before the first round and after each of the rounds with these scores."""
    state = schedule.start()
    seen = [state.depth]
    for score in scores:
        state = schedule.advance(state, score)
        seen.append(state.depth)
    return seen


def test_the_capability_queue_activates_when_scores_stop_rising():
    queue = CapabilityQueue(size=4, tau=0.05, depth=1, step=1, max_depth=3)
    # .1 .2 .3 .4: newer half .35, older half .15, gain .2: the oldest falls out. .2 .3 .4 .41: gain .155.
    # .3 .4 .41 .42: gain .065. .4 .41 .42 .42: gain .015 < .05: activated, emptied; four more scores are needed.
    scores = [0.1, 0.2, 0.3, 0.4, 0.41, 0.42, 0.42, 0.42, 0.42, 0.42, 0.42]
    assert depths(queue, scores) == [1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 3]


def test_a_full_queue_drops_its_oldest_score():
    queue = CapabilityQueue(size=2, tau=0.05, depth=1, step=1, max_depth=2)
    assert queue.advance(SalState(1, 1, (0.1,)), 0.5) == SalState(1, 2, (0.5,))
    assert queue.advance(SalState(1, 1, (0.5,)), 0.5) == SalState(2, 2, ())


def test_a_gain_of_exactly_tau_does_not_activate():
    queue = CapabilityQueue(size=2, tau=0.25, depth=1, step=1, max_depth=2)
    assert depths(queue, [0.25, 0.5]) == [1, 1, 1]


def test_falling_scores_activate_too():
    assert depths(CapabilityQueue(2, 0.0, 1, 1, 2), [0.9, 0.1]) == [1, 1, 2]


def test_steps_stop_at_max_depth():
    assert depths(CapabilityQueue(2, 0.1, 1, 3, 5), [0.5] * 6) == [1, 1, 4, 4, 5, 5, 5]
    assert depths(Every(n=2, depth=1, step=2, max_depth=4), [None] * 6) == [1, 1, 3, 3, 4, 4, 4]
    assert depths(Fixed(2), [0.5, 0.5]) == [2, 2, 2]


def test_the_depths_ahead_are_those_that_can_be_reached():
    assert depths_ahead(Every(2, 1, 3, 12), 1, 0, 7) == (4, 7, 10) and depths_ahead(Every(2, 1, 3, 12), 7, 5, 2) == (10,)
    assert depths_ahead(Fixed(2), 2, 0, 9) == ()
    queue = CapabilityQueue(4, 0.01, 1, 2, 6)
    assert depths_ahead(queue, 1, 0, 7) == (3,)             # the queue is full after four rounds, and again after eight
    assert depths_ahead(queue, 1, 3, 5) == (3, 5)           # it may hold three scores
    assert depths_ahead(queue, 3, 4, 5) == (5,)             # it is empty
    draw = random.Random(1)
    for _ in range(200):
        rounds = draw.randint(1, 20)
        schedule = draw.choice([Every(draw.randint(1, 4), 1, draw.randint(1, 3), 9),
                                CapabilityQueue(2 * draw.randint(1, 3), draw.choice([-0.1, 0.0, 0.1]), 1, draw.randint(1, 3), 9)])
        states = [schedule.start()]
        for _ in range(rounds):
            states.append(schedule.advance(states[-1], draw.choice([None, draw.random()])))
        for done, state in enumerate(states):
            later = {each.depth for each in states[done:]} - {state.depth}
            assert later <= set(depths_ahead(schedule, state.depth, done, rounds - done)), (schedule, states, done)


@pytest.mark.parametrize("score", [None, math.nan, math.inf])
def test_a_round_without_a_score_changes_nothing_but_the_count(score):
    queue = CapabilityQueue(2, 0.1, 1, 1, 2)
    assert queue.advance(SalState(1, 4, (0.5,)), score) == SalState(1, 5, (0.5,))


def test_run_files_name_schedules():
    def sal(*sets):
        return load_config("digits", [f"sal.{s}" for s in sets]).sal

    assert from_config(sal("schedule=all"), 4) == Fixed(4)
    assert from_config(sal("schedule=all", "max_depth=3"), 4) == Fixed(3)
    assert from_config(sal("schedule=fixed", "depth=2"), 4) == Fixed(2)
    assert from_config(sal("schedule=every", "every=3", "step=2"), 4) == Every(3, 1, 2, 4)
    assert from_config(sal("schedule=capability_queue", "queue=6", "tau=0.1"), 4) == CapabilityQueue(6, 0.1, 1, 1, 4)
    with pytest.raises(ValueError, match="sal.max_depth: got 5; the model has 4 blocks"):
        from_config(sal("max_depth=5"), 4)
    with pytest.raises(ValueError, match="sal.depth: got 5"):
        from_config(sal("depth=5", "schedule=fixed"), 4)
