"""The canvas: spans of ragged batches, writing only what is valid."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_pair import make_batch

from cspd.runtime.decode.canvas import Canvas
from cspd.runtime.noise import Noise

LENGTH = 16


def empty(images: list[int]) -> Canvas:
    return Canvas.empty(Noise(5).orders(make_batch(images).images, LENGTH).int(), 2)


@st.composite
def ranges(draw):
    """Start and stop per sample of a batch, at least one of them not empty."""
    starts = draw(st.lists(st.integers(0, LENGTH - 1), min_size=1, max_size=4))
    stops = [draw(st.integers(start, LENGTH)) for start in starts]
    stops[0] = max(stops[0], starts[0] + 1)
    return starts, stops


def test_empty_canvas_takes_its_order_from_the_noise():
    canvas = empty([4, 9])
    assert canvas.tokens.shape == (2, LENGTH, 2) and not canvas.tokens.any()
    assert canvas.known == [0, 0] and not canvas.done
    assert torch.equal(canvas.sequence.long(), Noise(5).orders(torch.tensor([4, 9]), LENGTH))
    assert canvas.sequence.dtype == torch.int32


@given(ranges())
def test_span_lists_the_tokens_of_each_sample_in_order(bounds):
    starts, stops = bounds
    canvas = empty(list(range(len(starts))))
    span = canvas.span(starts, stops)
    assert span.width == max(b - a for a, b in zip(starts, stops, strict=True))
    for row, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        expected = canvas.sequence[row, start:stop].tolist()
        assert span.positions[row][span.valid[row]].tolist() == expected
        # Valid tokens come first, and padding is a position all the same.
        assert span.valid[row].tolist() == [i < stop - start for i in range(span.width)]
        assert 0 <= span.positions[row].min() and span.positions[row].max() < LENGTH


@given(ranges(), st.integers(0, 3))
def test_span_can_be_padded_further(bounds, more):
    starts, stops = bounds
    canvas = empty(list(range(len(starts))))
    narrow = canvas.span(starts, stops)
    wide = canvas.span(starts, stops, narrow.width + more)
    assert wide.width == narrow.width + more
    assert torch.equal(wide.valid[:, : narrow.width], narrow.valid)
    assert not wide.valid[:, narrow.width :].any()


@given(ranges())
def test_place_writes_valid_tokens_only(bounds):
    starts, stops = bounds
    canvas = empty(list(range(len(starts))))
    span = canvas.span(starts, stops, LENGTH)
    values = 1 + torch.arange(span.valid.numel() * 2.0).reshape(*span.valid.shape, 2)
    canvas.place(span, values)
    assert canvas.known == [0] * len(starts)
    for row, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        placed = canvas.sequence[row, start:stop].long()
        assert torch.equal(canvas.tokens[row, placed], values[row, : stop - start])
        others = torch.ones(LENGTH, dtype=torch.bool).index_fill(0, placed, False)
        assert not canvas.tokens[row, others].any()


def test_clone_is_apart():
    canvas = empty([0, 1])
    copy = canvas.clone()
    copy.place(copy.span([0, 0], [3, 3]), torch.ones(2, 3, 2))
    copy.known[0] = 3
    assert not canvas.tokens.any() and canvas.known == [0, 0]
    assert copy.tokens.sum() == 12


def test_done_when_every_sample_is():
    canvas = empty([0, 1])
    canvas.known = [LENGTH, LENGTH - 1]
    assert not canvas.done
    canvas.known = [LENGTH, LENGTH]
    assert canvas.done
