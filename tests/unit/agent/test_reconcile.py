"""What to start, end and forward follows from what is wanted, what runs and what ever ran."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pscluster.agent.process import LastSent
from pscluster.agent.supervisor import Actions, reconcile
from pscluster.v1.plan_pb2 import Credentials, Plan, ProcessSpec


def spec(process_id: str, generation: int | None = None, stop: bool = False) -> ProcessSpec:
    made = ProcessSpec(process_id=process_id)
    if generation is not None:
        made.plan.CopyFrom(plan(generation, stop))
    return made


def plan(generation: int, stop: bool = False) -> Plan:
    return Plan(generation=generation, stop=stop)


def test_starts_what_is_new_and_ends_what_is_not_wanted() -> None:
    new = spec("new")
    assert reconcile([new, spec("kept")], {"kept": LastSent(), "old": LastSent()}, {"kept", "old"}) == Actions(
        start=(new,), stop=("old",)
    )


def test_never_starts_a_process_twice() -> None:
    assert reconcile([spec("ran")], {}, {"ran"}) == Actions()


def test_a_process_named_twice_is_started_once() -> None:
    assert len(reconcile([spec("a"), spec("a")], {}, set()).start) == 1


def test_forwards_a_first_plan_a_newer_one_and_a_changed_one() -> None:
    for held, given_plan in ((None, plan(1)), (plan(1), plan(2)), (plan(2), plan(2, stop=True))):
        wanted = spec("a", given_plan.generation, given_plan.stop)
        assert reconcile([wanted], {"a": LastSent(plan=held)}, {"a"}).forward == (("a", given_plan),)


def test_forwards_no_equal_no_older_and_no_missing_plan() -> None:
    assert reconcile([spec("a", 2)], {"a": LastSent(plan=plan(2))}, {"a"}) == Actions()
    assert reconcile([spec("a", 1, stop=True)], {"a": LastSent(plan=plan(2))}, {"a"}) == Actions()
    assert reconcile([spec("a")], {"a": LastSent(plan=plan(2))}, {"a"}) == Actions()


def secured(certificate: bytes) -> ProcessSpec:
    return ProcessSpec(process_id="a", credentials=Credentials(key_pem=b"SECRET", certificate_pem=certificate))


def test_other_credentials_are_sent_to_a_running_process_once() -> None:
    first, second = secured(b"1"), secured(b"2")
    for held in (None, first.credentials):
        actions = reconcile([second], {"a": LastSent(credentials=held)}, {"a"})
        assert actions == Actions(renew=(("a", second.credentials),))
        assert reconcile([second], {"a": LastSent(credentials=second.credentials)}, {"a"}) == Actions()


def test_a_process_keeps_its_credentials_when_an_assignment_has_none() -> None:
    assert reconcile([spec("a")], {"a": LastSent(credentials=secured(b"1").credentials)}, {"a"}) == Actions()


def test_keys_are_not_shown() -> None:
    actions = reconcile([secured(b"1")], {"a": LastSent()}, set())
    started = reconcile([secured(b"1")], {}, set())
    shown = f"{actions} {started} {LastSent(credentials=secured(b'1').credentials)}"
    assert "SECRET" not in shown


NAMES = st.sampled_from("abcdef")
PLANS = st.none() | st.integers(0, 3)


@given(wanted=st.dictionaries(NAMES, PLANS), running=st.dictionaries(NAMES, PLANS), ran=st.sets(NAMES))
def test_applying_the_actions_leaves_nothing_to_do(
    wanted: dict[str, int | None], running: dict[str, int | None], ran: set[str]
) -> None:
    desired = [spec(name, generation) for name, generation in wanted.items()]
    held = {name: LastSent(plan=None if g is None else plan(g)) for name, g in running.items()}
    ever = ran | set(running)
    actions = reconcile(desired, held, ever)
    for started in actions.start:
        assert started.process_id not in ever
        held[started.process_id] = LastSent(plan=started.plan if started.HasField("plan") else None)
        ever.add(started.process_id)
    for name in actions.stop:
        assert name not in wanted
        del held[name]
    for name, newer in actions.forward:
        held[name] = LastSent(plan=newer)
    assert set(held) <= set(wanted)
    assert reconcile(desired, held, ever) == Actions()
