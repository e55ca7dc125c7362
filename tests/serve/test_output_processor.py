"""Detokenising, stop strings and log-probabilities, without any engine."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.fake_engine import EOS
from weft.engine.request import FinishReason, Request, SequenceUpdate, TokenLogprobs
from weft.engine.sampling import SamplingParams
from weft.model.tokenizer import Tokenizer
from weft.serve.output_processor import RequestProcessor, StopScanner


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Tokenizer:
    return Tokenizer.from_directory(model_dir)


def _processor(tokenizer: Tokenizer, **sampling: object) -> RequestProcessor:
    request = Request(
        id="r",
        prompt_token_ids=(65,),
        sampling=SamplingParams(**{"max_tokens": 100, **sampling}),  # type: ignore[arg-type]
    )
    return RequestProcessor(request, tokenizer, prompt="A")


def _update(tokens: bytes | tuple[int, ...], choice: int = 0, **more: object) -> SequenceUpdate:
    return SequenceUpdate(
        request_id="r",
        choice=choice,
        new_token_ids=tuple(tokens),
        **more,  # type: ignore[arg-type]
    )


def _expected(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The stop string whose last character comes first; of those that end together the longest."""
    for end in range(1, len(text) + 1):
        matches = [stop for stop in stops if text[:end].endswith(stop)]
        if matches:
            stop = max(matches, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@given(
    text=st.text(alphabet="abc", max_size=30),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), min_size=1, max_size=4),
    include=st.booleans(),
    data=st.data(),
)
def test_stop_strings_depend_on_the_text_alone(
    text: str, stops: list[str], include: bool, data: st.DataObject
) -> None:
    scanner = StopScanner(tuple(stops), include=include)
    out, rest = "", text
    while rest and scanner.matched is None:
        size = data.draw(st.integers(1, len(rest)))
        out += scanner.push(rest[:size])
        rest = rest[size:]
        # What is out can never have to be taken back.
        assert _expected(text, stops, include)[0].startswith(out)
    if scanner.matched is None:
        out += scanner.flush()
    assert (out, scanner.matched) == _expected(text, stops, include)


@given(
    text=st.text(alphabet="abc", max_size=20),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), min_size=1, max_size=4),
    min_tokens=st.integers(0, 20),
)
def test_a_stop_string_counts_from_where_it_ends(
    tokenizer: Tokenizer, text: str, stops: list[str], min_tokens: int
) -> None:
    expected, reason = text, None
    for end in range(min_tokens + 1, len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            reason = max(ended, key=len)
            expected = text[: end - len(reason)]
            break
    processor = _processor(tokenizer, stop=tuple(stops), min_tokens=min_tokens)
    (choice,) = processor.choices
    for position, byte in enumerate(text.encode(), start=1):
        last = FinishReason.LENGTH if position == len(text) else None
        if processor.push(_update((byte,), finish_reason=last)) is None:
            break
        assert expected.startswith(choice.text)
    assert (choice.text, choice.stop_reason) == (expected, reason)


def test_text_that_may_begin_a_stop_string_is_held_back(tokenizer: Tokenizer) -> None:
    processor = _processor(tokenizer, stop=("END.",))
    texts = [processor.push(_update(piece)) for piece in (b"xE", b"N", b"D", b"!")]
    assert [delta.text for delta in texts if delta] == ["x", "", "", "END!"]


def test_a_stop_string_across_tokens_ends_the_choice(tokenizer: Tokenizer) -> None:
    processor = _processor(tokenizer, stop=("END.",))
    processor.push(_update(b"abE"))
    delta = processor.push(_update(b"ND.tail"))
    assert delta is not None
    assert (delta.finish_reason, delta.stop_reason) == (FinishReason.STOP, "END.")
    assert processor.choices_to_finish == [0]
    assert processor.is_finished
    output = processor.output().outputs[0]
    assert (output.text, bytes(output.token_ids)) == ("ab", b"abEND.")
    assert processor.push(_update(b"late")) is None, "the engine ran on; nobody may hear of it"


def test_a_stop_string_may_stay_in_the_text(tokenizer: Tokenizer) -> None:
    processor = _processor(tokenizer, stop=("END.",), include_stop_str_in_output=True)
    processor.push(_update(b"abEND.tail"))
    assert processor.output().outputs[0].text == "abEND."


def test_min_tokens_protects_from_stop_strings(tokenizer: Tokenizer) -> None:
    processor = _processor(tokenizer, stop=("x",), min_tokens=3)
    processor.push(_update(b"xxxabx"))
    assert processor.output().outputs[0].text == "xxxab"


def test_held_back_text_comes_at_the_end(tokenizer: Tokenizer) -> None:
    processor = _processor(tokenizer, stop=("END.",))
    delta = processor.push(_update(b"aEN", finish_reason=FinishReason.LENGTH))
    assert delta is not None
    assert delta.text == "aEN"
    assert delta.finish_reason is FinishReason.LENGTH
    assert processor.choices_to_finish == [], "the engine knows"


@pytest.mark.parametrize("stop", [(), ("never",)])
def test_characters_wait_for_their_last_byte(tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
    processor = _processor(tokenizer, stop=stop)
    texts = [processor.push(_update((byte,))) for byte in "aé🙂".encode()]
    assert [delta.text for delta in texts if delta] == ["a", "", "é", "", "", "", "🙂"]


def test_an_unfinished_character_becomes_a_replacement_character(tokenizer: Tokenizer) -> None:
    processor = _processor(tokenizer)
    processor.push(_update("é".encode()[:1], finish_reason=FinishReason.LENGTH))
    assert processor.output().outputs[0].text == "\ufffd"


def test_eos_and_stop_tokens_are_not_text(tokenizer: Tokenizer) -> None:
    processor = _processor(tokenizer, skip_special_tokens=False)
    processor.push(_update((*b"ab", EOS), finish_reason=FinishReason.STOP))
    output = processor.output().outputs[0]
    assert (output.text, output.token_ids, output.stop_reason) == ("ab", (97, 98, EOS), None)

    processor = _processor(tokenizer, stop_token_ids=(99,))
    processor.push(_update(b"abc", finish_reason=FinishReason.STOP, stop_token_id=99))
    output = processor.output().outputs[0]
    assert (output.text, output.stop_reason) == ("ab", 99)

    processor = _processor(tokenizer, stop_token_ids=(99,), include_stop_str_in_output=True)
    processor.push(_update(b"abc", finish_reason=FinishReason.STOP, stop_token_id=99))
    assert processor.output().outputs[0].text == "abc"


def test_choices_end_on_their_own(tokenizer: Tokenizer) -> None:
    processor = _processor(tokenizer, n=2, stop=("!",))
    processor.push(_update(b"a!", choice=0))
    assert not processor.is_finished
    processor.push(_update(b"b", choice=1, finish_reason=FinishReason.LENGTH))
    assert processor.is_finished
    assert [choice.text for choice in processor.output().outputs] == ["a", "b"]


def test_logprobs_are_kept_for_kept_tokens(tokenizer: Tokenizer) -> None:
    processor = _processor(tokenizer, stop=("b",), logprobs=1, prompt_logprobs=0)
    entries = tuple(
        TokenLogprobs(token_id=token, logprob=-float(i + 1), rank=3, top=((120, -0.1),))
        for i, token in enumerate(b"abc")
    )
    processor.push(_update(b"abc", logprobs=entries))
    output = processor.output()
    choice = output.outputs[0]
    assert choice.logprobs is not None
    assert len(choice.logprobs) == 2
    assert choice.cumulative_logprob == -3.0
    assert choice.logprobs[0][97].rank == 3
    assert choice.logprobs[0][120].decoded_token == "x"
    assert output.prompt_logprobs == (None,)
