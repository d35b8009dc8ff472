"""What a step is trained on hangs on seed, step and row alone."""

import pytest
import torch

from ldm2.training.batches import Batches, split
from ldm2.training.encoding import Example, Examples, Store


@pytest.fixture
def store(tmp_path):
    """Six clips of 10 frames, of which clip i is i everywhere; two captions each."""
    store = Store(tmp_path)
    for i in range(6):
        store.put(f"clip{i}", {"mean": torch.full((2, 10, 3), float(i)), "logvar": torch.full((2, 10, 3), -30.0)})
        for j in range(2):
            store.put(f"text{i}{j}", {"context0": torch.full((1, 2 + j, 4), float(i))})
    store.put("nothing", {"context0": torch.full((1, 2, 4), -1.0)})
    return store


def batches(store, **options):
    examples = [Example(f"clip{i}", (f"text{i}0", f"text{i}1")) for i in range(6)]
    fixed = {"rows": 6, "frames": 10, "scaling": 2.0, "total": 1000, "drop": 0.0, "seed": 0}
    return Batches(examples, "nothing", store, **(fixed | options))


def test_a_step_is_the_same_in_one_batch_or_in_several(store):
    whole = batches(store).take(3, 0, 6)
    parts = [batches(store).take(3, first, 2) for first in (0, 2, 4)]
    for name in ("x_0", "eps", "t"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts])), name
    rows = [row for part in parts for row in part.conditioning.contexts[0][:, 0, 0].tolist()]
    assert whole.conditioning.contexts[0][:, 0, 0].tolist() == rows


def test_steps_differ_and_seeds_do(store):
    first = batches(store).take(0, 0, 6)
    assert not torch.equal(first.eps, batches(store).take(1, 0, 6).eps)
    assert not torch.equal(first.eps, batches(store, seed=1).take(0, 0, 6).eps)


def test_each_epoch_has_each_clip_once_with_its_own_caption_and_scaled(store):
    for step in range(4):
        batch = batches(store).take(step, 0, 6)
        clips = batch.x_0[:, 0, 0, 0] / 2
        assert sorted(clips.round().tolist()) == [0, 1, 2, 3, 4, 5]
        assert torch.equal(batch.conditioning.contexts[0][:, 0, 0], clips.round())


def test_crops_of_all_places_come(store):
    long = {"mean": torch.arange(8.0)[None, :, None].expand(2, 8, 3), "logvar": torch.full((2, 8, 3), -30.0)}
    store.put("clip0", long)
    only = Batches([Example("clip0", ("text00",))], "nothing", store, rows=64, frames=5, scaling=1.0, total=10,
                   drop=0.0, seed=0)
    batch = only.take(0, 0, 64)
    starts = batch.x_0[:, 0, 0, 0].round()
    assert sorted(set(starts.tolist())) == [0, 1, 2, 3]
    torch.testing.assert_close(batch.x_0[:, 0, :, 0] - starts[:, None], torch.arange(5.0).expand(64, 5), atol=1e-5,
                               rtol=0)


def test_captions_are_dropped_as_often_as_asked(store):
    many = batches(store, rows=600, drop=0.1).take(0, 0, 600)
    dropped = (many.conditioning.contexts[0][:, 0, 0] == -1).float().mean()
    assert dropped == pytest.approx(0.1, abs=0.04)


def test_latents_are_drawn_from_their_distribution(store):
    store.put("clip0", {"mean": torch.zeros(2, 10, 3), "logvar": torch.full((2, 10, 3), 2.0)})
    only = Batches([Example("clip0", ("text00",))], "nothing", store, rows=50, frames=10, scaling=1.0, total=10,
                   drop=0.0, seed=0)
    assert only.take(0, 0, 50).x_0.std() == pytest.approx(torch.e, rel=0.05)


def test_a_share_of_the_clips_is_kept_aside():
    examples = Examples(tuple(Example(str(i), ()) for i in range(10)), "", ())
    kept, aside = split(examples, 0.2, 0)
    assert (len(kept), len(aside)) == (8, 2)
    assert set(kept) | set(aside) == set(examples.all)
    assert split(examples, 0.01, 0)[1] and not split(examples, 0.0, 0)[1]


def test_a_damaged_file_counts_as_not_there(store):
    assert store.has("clip0") and not store.has("other")
    store.path("clip0").write_bytes(store.path("clip0").read_bytes()[:50])
    assert not store.has("clip0")
    with pytest.raises(OSError, match="is damaged"):
        store.get("clip0")


def test_sounds_of_the_models_own_are_mixed_in_as_often_as_asked(store):
    own = [Example("clip5", ("text50", "text51"))]
    many = Batches([Example("clip0", ("text00",))], "nothing", store, rows=400, frames=10, scaling=1.0, total=10,
                   drop=0.0, seed=0, own=(own, 0.25)).take(0, 0, 400)
    assert (many.x_0[:, 0, 0, 0].round() == 5).float().mean() == pytest.approx(0.25, abs=0.06)
    assert torch.equal(many.conditioning.contexts[0][:, 0, 0], many.x_0[:, 0, 0, 0].round())
    assert torch.equal(many.kept, many.x_0[:, 0, 0, 0].round() == 5)


@pytest.mark.parametrize(("own", "kept"), [(((), 0.5), 0.0), (([Example("clip5", ("text50",))], 0.0), 0.25)])
def test_what_has_no_caption_is_kept_where_anything_is(store, own, kept):
    many = Batches([Example("clip0", ("text00",))], "nothing", store, rows=400, frames=10, scaling=1.0, total=10,
                   drop=0.25, seed=0, own=own).take(0, 0, 400)
    assert many.kept.float().mean() == pytest.approx(kept, abs=0.06)
    assert not (many.kept & (many.conditioning.contexts[0][:, 0, 0] == 0)).any()
