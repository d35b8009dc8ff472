"""Conditioning: rows are repeated, chosen and joined without mixing them."""

from __future__ import annotations

import pytest
import torch

from ldm2.conditioning import Conditioning


def rows(*lengths: int, width: int = 3) -> Conditioning:
    """One row with contexts of these lengths, filled with the length."""
    contexts = tuple(torch.full((1, length, width), float(length)) for length in lengths)
    return Conditioning(contexts, (None,) * len(lengths))


def test_repeat_puts_copies_of_a_row_next_to_each_other():
    conditioning = Conditioning((torch.tensor([[[1.0]], [[2.0]]]),), (torch.tensor([[True], [False]]),))
    repeated = conditioning.repeat(2)
    assert repeated.contexts[0].flatten().tolist() == [1, 1, 2, 2]
    assert repeated.masks[0].flatten().tolist() == [True, True, False, False]


def test_repeating_once_is_the_same_object():
    conditioning = rows(2)
    assert conditioning.repeat(1) is conditioning


def test_repeating_zero_times_is_an_error():
    with pytest.raises(ValueError, match="at least once, got 0"):
        rows(2).repeat(0)


@pytest.mark.parametrize("chosen", [[1, 0, 1], torch.tensor([1, 0, 1])])
def test_select_takes_rows_in_the_given_order(chosen):
    conditioning = Conditioning((), (), film=torch.tensor([[1.0], [2.0]]))
    assert conditioning.select(chosen).film.flatten().tolist() == [2, 1, 2]


def test_select_takes_slices():
    conditioning = Conditioning((torch.arange(3.0).view(3, 1, 1),), (None,))
    assert conditioning.select(slice(1, None)).contexts[0].flatten().tolist() == [1, 2]


def test_join_pads_the_shorter_context_and_masks_the_padding():
    joined = Conditioning.join([rows(2), rows(3)])
    assert joined.contexts[0][0, :, 0].tolist() == [2, 2, 0]
    assert joined.masks[0].tolist() == [[True, True, False], [True, True, True]]


def test_join_of_equal_lengths_needs_no_mask():
    assert Conditioning.join([rows(2), rows(2)]).masks == (None,)


def test_join_keeps_the_masks_of_its_parts():
    masked = Conditioning((torch.zeros(1, 2, 3),), (torch.tensor([[1, 0]]),))
    joined = Conditioning.join([masked, rows(3)])
    assert joined.masks[0].tolist() == [[True, False, False], [True, True, True]]


def test_join_pads_each_context_apart():
    joined = Conditioning.join([rows(8, 2), rows(8, 5)])
    assert joined.masks[0] is None
    assert joined.masks[1].sum(dim=1).tolist() == [2, 5]


def test_join_puts_film_vectors_below_each_other():
    film = Conditioning((), (), film=torch.ones(1, 4))
    assert Conditioning.join([film, film]).film.shape == (2, 4)


def test_joining_different_kinds_is_an_error():
    with pytest.raises(ValueError, match="different kinds"):
        Conditioning.join([rows(2), Conditioning((), (), film=torch.ones(1, 4))])


def test_joining_nothing_is_an_error():
    with pytest.raises(ValueError, match="nothing to join"):
        Conditioning.join([])


def test_to_casts_values_and_leaves_masks():
    conditioning = Conditioning((torch.zeros(1, 2, 3),), (torch.tensor([[True, False]]),), film=torch.zeros(1, 4))
    half = conditioning.to(dtype=torch.float16)
    assert half.contexts[0].dtype == half.film.dtype == torch.float16
    assert half.masks[0].dtype == torch.bool


def test_batch_size_counts_rows():
    assert rows(2, 3).repeat(4).batch_size == 4


@pytest.mark.parametrize(
    ("contexts", "masks", "film", "message"),
    [
        ((), (), None, "at least one context"),
        ((torch.zeros(1, 2, 3),), (), None, "one mask or None"),
        ((torch.zeros(2, 3),), (None,), None, "rows, tokens, width"),
        ((torch.zeros(1, 2, 3),), (torch.ones(1, 3),), None, "does not fit its context"),
        ((torch.zeros(1, 2, 3),), (None,), torch.zeros(2, 4), "same number of rows"),
        ((), (), torch.zeros(1, 1, 4), "film must be"),
    ],
)
def test_shapes_that_do_not_belong_together_are_errors(contexts, masks, film, message):
    with pytest.raises(ValueError, match=message):
        Conditioning(contexts, masks, film)
