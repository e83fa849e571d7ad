"""Buckets keep shapes, batches hold one of them, and the order is a function of (seed, epoch, step)."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from controlroom.core.errors import InputError
from controlroom.data.pictures import Picture
from controlroom.training.buckets import Bucket, BucketOrder, Buckets, Crop, crop_to
from controlroom.training.randomness import slots_of

sizes = st.integers(1, 4000)


def test_the_buckets_of_stable_diffusion() -> None:
    found = Buckets(512, 64).all
    assert Bucket(512, 512) in found and Bucket(256, 1024) in found and Bucket(640, 384) in found
    assert all(b.width * b.height <= 512 * 512 for b in found)
    assert Buckets(128, 8, longest=128, shortest=128).all == (Bucket(128, 128),)
    assert Buckets((96, 64), 8, 64, 96).of((3, 2)) == Bucket(96, 64)
    assert Bucket(96, 64).size == (64, 96)


@settings(max_examples=60, deadline=None)
@given(side=st.integers(16, 1100), step=st.sampled_from((8, 16, 64)), width=sizes, height=sizes)
def test_any_picture_has_a_bucket(side: int, step: int, width: int, height: int) -> None:
    if side < step:
        with pytest.raises(InputError):
            Buckets(side, step)
        return
    buckets = Buckets(side, step)
    for b in buckets.all:
        assert b.width % step == b.height % step == 0 and 0 < b.width * b.height <= side * side
        assert Bucket(b.height, b.width) in buckets.all
    chosen = buckets.of((width, height))
    turned = buckets.of((height, width))
    assert (turned.height, turned.width) == (chosen.width, chosen.height) or width == height
    shapes = [abs(np.log(b.width / b.height) - np.log(width / height)) for b in buckets.all]
    assert abs(np.log(chosen.width / chosen.height) - np.log(width / height)) <= min(shapes) + 1e-12


@settings(max_examples=60, deadline=None)
@given(width=sizes, height=sizes, b=st.builds(Bucket, st.integers(8, 1024), st.integers(8, 1024)))
def test_a_crop_covers_the_bucket_and_keeps_the_middle(width: int, height: int, b: Bucket) -> None:
    crop = crop_to((width, height), b)
    scale = max(b.width / width, b.height / height)
    assert crop.left == 0 or crop.top == 0
    assert abs(2 * crop.left - (width * scale - b.width)) <= 1.001
    assert abs(2 * crop.top - (height * scale - b.height)) <= 1.001
    assert crop.time_ids == (height, width, crop.top, crop.left, b.height, b.width)


def test_pixels_and_masks_are_cut_alike() -> None:
    picture = Image.new("RGB", (40, 10), "blue")
    picture.paste((255, 0, 0), (0, 0, 10, 10))
    picture.paste((0, 255, 0), (30, 0, 40, 10))
    mask = Image.new("L", (40, 10), 0)
    mask.paste(255, (10, 0, 20, 10))
    crop = crop_to(picture.size, Bucket(40, 20))
    assert crop == Crop((40, 10), Bucket(40, 20), 20, 0)
    cut = np.asarray(crop.apply(picture), int)
    assert cut.shape == (20, 40, 3) and np.abs(cut[:, 8:-8] - (0, 0, 255)).max() == 0  # Lanczos rings at the edges
    half = np.asarray(crop.apply_mask(mask))
    assert half.shape == (20, 40) and half[:, 8].min() == 255 and half[:, -8].max() == 0


ORDERS = st.tuples(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), min_size=1, max_size=24),
    st.integers(1, 5),
    st.integers(0, 2**62),
    st.integers(0, 5),
)


@settings(max_examples=80, deadline=None)
@given(order=ORDERS, leftovers=st.sampled_from(("fill", "short")))
def test_an_epoch_shows_each_picture_as_often_as_it_repeats(order, leftovers) -> None:
    pictures, batch_size, seed, epoch = order
    buckets, repeats = [b for b, _ in pictures], [r for _, r in pictures]
    made = BucketOrder(buckets, repeats, batch_size, seed, leftovers)
    per = made.steps_per_epoch
    batches = [made.batch(step) for step in range(epoch * per, (epoch + 1) * per)]
    shown = Counter(i for batch in batches for i in batch.indices[: batch.counted])
    assert shown == dict(enumerate(repeats))
    for batch in batches:
        assert len({buckets[i] for i in batch.indices}) == 1
        assert len(batch.indices) == (batch_size if leftovers == "fill" else batch.counted) and batch.counted > 0
    short = Counter(buckets[batch.indices[0]] for batch in batches if batch.counted < batch_size)
    assert all(count == 1 for count in short.values())  # at most one leftover batch a bucket
    # Asked in any order, by another process, or in shares, it is the same.
    fresh = BucketOrder(buckets, repeats, batch_size, seed, leftovers, first_slot=7)
    for step in reversed(range(epoch * per, (epoch + 1) * per)):
        expected = list(made.batch(step).indices)
        assert fresh.indices(slots_of(step, batch_size, 7)) == expected
        if batch_size % 2 == 0:
            shares = [fresh.indices(slots_of(step, batch_size, 7, rank, 2)) for rank in range(2)]
            assert shares[0] + shares[1] == expected


def test_leftovers_fill_up_with_others_first() -> None:
    order = BucketOrder([0] * 5, None, 4, seed=3)
    assert order.steps_per_epoch == 2
    last = next(b for b in (order.batch(0), order.batch(1)) if b.counted == 1)
    assert len(set(last.indices)) == 4  # one left over, three others of the bucket
    assert BucketOrder([0], None, 3, seed=0).batch(0).indices == (0, 0, 0)


def test_orders_differ_between_epochs_and_seeds_and_copies_lie_apart() -> None:
    first = BucketOrder([0] * 16, [2] * 16, 4, seed=0)
    flat = [i for step in range(8) for i in first.batch(step).indices]
    again = [i for step in range(8, 16) for i in first.batch(step).indices]
    other = [i for step in range(8) for i in BucketOrder([0] * 16, [2] * 16, 4, seed=1).batch(step).indices]
    assert flat != again and flat != other and sorted(flat) == sorted(again)
    assert all(len(set(first.batch(step).indices)) == 4 for step in range(8))


def test_bad_orders() -> None:
    for buckets, repeats, size in (([], None, 1), ([0], [0], 1), ([0], None, 0), ([0, 1], [1], 1)):
        with pytest.raises(InputError):
            BucketOrder(buckets, repeats, size, 0)
    with pytest.raises(InputError, match="to steps 0 to 1"):
        BucketOrder([0] * 8, None, 4, 0).indices(range(2, 6))
    with pytest.raises(InputError, match="smaller step"):
        Buckets(32, 64)
    with pytest.raises(InputError, match="No bucket"):
        Buckets(512, 64, shortest=600)


def test_of_pictures() -> None:
    def picture(name: str, size: tuple[int, int], repeats: int) -> Picture:
        return Picture(name, name, size, lambda: Image.new("RGB", size), repeats=repeats)

    buckets = Buckets(128, 16)
    order = BucketOrder.of([picture("a", (9, 4), 3), picture("b", (4, 9), 1)], buckets, 2, seed=0)
    assert order.steps_per_epoch == 3
    assert buckets.crop(picture("a", (900, 400), 1)).bucket == buckets.of((9, 4)) == Bucket(176, 80)
