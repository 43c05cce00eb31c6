"""How much code of ours one call runs through stays within bounds; what it counts, and how, is in call_trace.py."""

import beit_fast
from benchmarks.call_trace import TARGETS, trace_forward, trace_step


def within(trace, name):
    return [count <= limit for count, limit in zip(trace.totals(), TARGETS[name], strict=True)]


def test_a_warm_forward_pass_is_short():
    trace = trace_forward("beit_fast", beit_fast.create_model)
    assert trace.totals()[0] >= 10, "nothing was traced"
    assert within(trace, "forward") == [True] * 3, trace.listing()


def test_a_pre_training_step_is_short():
    trace = trace_step()
    assert trace.totals()[0] >= 20, "nothing was traced"
    assert within(trace, "step") == [True] * 3, trace.listing()
