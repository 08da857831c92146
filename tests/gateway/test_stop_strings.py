"""Stop strings, against a naive search of the whole text."""

from hypothesis import given
from hypothesis import strategies as st

from gateway.text.stop_strings import StopFilter, StopString

# A small alphabet makes overlaps and false beginnings frequent.
TEXTS = st.lists(st.text("ab ", max_size=4), max_size=12)
STOPS = st.lists(st.text("ab ", min_size=1, max_size=5), max_size=4)


def until_first_completed(text: str, stops: list[str]) -> tuple[str, bool]:
    """The text up to the stop string that is completed first, the longest of equals."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


def make_filter(stops: list[str]) -> StopFilter:
    return StopFilter([StopString.compile(stop) for stop in stops])


@given(TEXTS, STOPS)
def test_text_ends_before_the_first_completed_stop_string(
    deltas: list[str], stops: list[str]
) -> None:
    stop_filter = make_filter(stops)
    passed = ""
    for delta in deltas:
        passed += stop_filter.push(delta)
        if stop_filter.found:
            break
    passed += stop_filter.finish()
    assert (passed, stop_filter.found) == until_first_completed("".join(deltas), stops)


@given(TEXTS, STOPS)
def test_only_a_possible_beginning_is_held_back(deltas: list[str], stops: list[str]) -> None:
    stop_filter = make_filter(stops)
    passed, seen = "", ""
    for delta in deltas:
        seen += delta
        passed += stop_filter.push(delta)
        if stop_filter.found:
            break
        held = seen.removeprefix(passed)
        beginnings = (seen[start:] for start in range(len(seen)))
        begun = (text for text in beginnings if any(stop.startswith(text) for stop in stops))
        assert held == next(begun, "")


def test_stop_string_across_three_tokens_is_found() -> None:
    stop_filter = make_filter(["</answer>"])
    deltas = [stop_filter.push(text) for text in ("42 </", "ans", "wer> and")]
    assert (deltas, stop_filter.found) == (["42 ", "", ""], True)


def test_false_beginning_is_passed_on_when_it_fails() -> None:
    stop_filter = make_filter(["</answer>"])
    assert [stop_filter.push(text) for text in ("a </", "b>")] == ["a ", "</b>"]


def test_text_held_back_at_the_end_is_not_lost() -> None:
    stop_filter = make_filter(["stop"])
    assert stop_filter.push("non-st") + stop_filter.finish() == "non-st"
