import pytest

from demo.steps import Steps
from demo_fakes import Heard

WHOLE = "the whole demonstration"


def test_work_inside_a_step_moves_the_whole_by_its_share():
    heard = Heard()
    with Steps(heard, {"short": 1, "long": 9}) as steps:
        with steps.take("short", tasks=1):
            pass
        assert heard.done[WHOLE] == (1, 10)
        with steps.take("long", tasks=2) as inner:
            with inner.task("first", 4, "items") as advance:
                advance(1)
                assert heard.done[WHOLE][0] == pytest.approx(1 + 9 / 2 / 4)
                advance(3)
            assert heard.done[WHOLE][0] == pytest.approx(1 + 4.5)
    assert heard.done[WHOLE] == (pytest.approx(10), 10)
    assert heard.done["first"] == (4, 4)


def test_more_pieces_than_expected_do_not_overrun_and_unknown_totals_do_not_count():
    heard = Heard()
    with Steps(heard, {"a": 2, "b": 2}) as steps:
        with steps.take("a", tasks=1) as inner:
            for _ in range(3):
                with inner.task("piece", 1) as advance:
                    advance()
            with inner.task("of unknown length", None) as advance:
                advance(50)
        assert heard.done[WHOLE][0] == pytest.approx(2)
        with steps.take("b", tasks=1) as inner:
            inner.note("heard")
    assert heard.notes == ["heard"]
    assert heard.done[WHOLE][0] == pytest.approx(4)


def test_a_failing_step_does_not_claim_to_be_done():
    heard = Heard()

    def fail():
        with Steps(heard, {"a": 2}) as steps, steps.take("a", tasks=1):
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fail()
    assert heard.done[WHOLE][0] == 0
