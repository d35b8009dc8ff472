"""The text side as a whole: diffusers' pipelines are the oracle for one reference, the definition for the other."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
import transformers

from benchmarks import checkpoints
from benchmarks.checkpoints import CAPTIONS
from ldm2.checkpoints import build
from ldm2.checkpoints.reading import read_hub_folder
from ldm2.text.encoder import Conditioning, TextEncoder

SAID = "wish you have a good day"


@pytest.fixture(scope="module")
def authors(tiny_checkpoint):
    return build.text_encoder(read_hub_folder(tiny_checkpoint))


@pytest.fixture(scope="module")
def as_diffusers(tiny_checkpoint):
    return build.text_encoder(read_hub_folder(tiny_checkpoint), reference="diffusers")


@pytest.fixture(scope="module")
def speech_checkpoint(tmp_path_factory):
    return checkpoints.save_speech(tmp_path_factory.mktemp("speech"))


@pytest.fixture(scope="module")
def speech(speech_checkpoint):
    return build.text_encoder(read_hub_folder(speech_checkpoint))


def subset(checkpoint: Path, folder: Path, *names: str) -> Path:
    """A checkpoint of only some parts of another."""
    index = json.loads((checkpoint / "model_index.json").read_text())
    for name in names:
        shutil.copytree(checkpoint / name, folder / name)
    (folder / "model_index.json").write_text(json.dumps({name: index[name] for name in names}))
    return folder


@pytest.fixture(scope="module")
def clap_only(tiny_checkpoint, tmp_path_factory):
    return subset(tiny_checkpoint, tmp_path_factory.mktemp("clap"), "text_encoder", "tokenizer")


@pytest.fixture(scope="module")
def t5_only(tiny_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5")
    return subset(tiny_checkpoint, folder, "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")


def close(actual: Conditioning, expected: Conditioning, atol: float = 0.0) -> None:
    """Assert that contexts, kept tokens and film agree."""
    for one, other in zip(actual.contexts, expected.contexts, strict=True):
        torch.testing.assert_close(one, other, atol=atol, rtol=0)
    assert [None if mask is None else mask.tolist() for mask in actual.masks] == [
        None if mask is None else mask.tolist() for mask in expected.masks
    ]
    if actual.film is not None or expected.film is not None:
        torch.testing.assert_close(actual.film, expected.film, atol=atol, rtol=0)


# reference="diffusers"


@pytest.mark.parametrize(
    ("prompt", "negative", "num_waveforms"),
    [
        (CAPTIONS[0], None, 1),
        (CAPTIONS[0], "low quality", 3),
        ("a dog", CAPTIONS[1], 1),                        # a negative prompt that is cut to the length of the prompt
        (CAPTIONS, None, 2),
        (CAPTIONS[:3], CAPTIONS[2:], 2),
        (["a dog", "a dog", "rain"], ["", "low quality", ""], 1),
    ],
)
@torch.no_grad()
def test_both_sides_equal_diffusers(as_diffusers, oracle, prompt, negative, num_waveforms):
    states, mask, generated = oracle.encode_prompt(prompt, "cpu", num_waveforms, True, negative_prompt=negative)
    conditioning = as_diffusers.encode(prompt)
    unconditional = as_diffusers.encode_unconditional(conditioning, negative)
    both = Conditioning.join([unconditional.repeat(num_waveforms), conditioning.repeat(num_waveforms)])
    torch.testing.assert_close(both.contexts[0], generated, atol=5e-6, rtol=0)
    torch.testing.assert_close(both.contexts[1], states, atol=5e-6, rtol=0)
    kept = torch.ones_like(mask).bool() if both.masks[1] is None else both.masks[1]
    assert torch.equal(kept, mask.bool())


@torch.no_grad()
def test_number_of_vectors_is_an_argument(as_diffusers, oracle):
    generated = oracle.encode_prompt(CAPTIONS[0], "cpu", 1, True, max_new_tokens=5)[2]
    conditioning = as_diffusers.encode(CAPTIONS[0], num_vectors=5)
    torch.testing.assert_close(conditioning.contexts[0], generated[1:], atol=5e-6, rtol=0)
    unconditional = as_diffusers.encode_unconditional(conditioning)
    torch.testing.assert_close(unconditional.contexts[0], generated[:1], atol=5e-6, rtol=0)


def test_number_of_vectors_comes_from_the_checkpoint(tmp_path):
    folder = checkpoints.save(tmp_path, language_model=checkpoints.gpt2(max_new_tokens=3))
    assert build.text_encoder(read_hub_folder(folder)).encode("rain").contexts[0].shape == (1, 3, 24)


@pytest.mark.parametrize(
    ("prompt", "transcription", "negative", "num_waveforms"),
    [
        (CAPTIONS[4], SAID, None, 1),
        (CAPTIONS[:2], [SAID, "hello"], ["low quality", ""], 2),
        (CAPTIONS[4], "hello " * 20, "low quality", 1),   # more phonemes than places
    ],
)
@torch.no_grad()
def test_speech_equals_diffusers(speech_checkpoint, prompt, transcription, negative, num_waveforms):
    oracle = checkpoints.diffusers_pipeline(speech_checkpoint)
    encoder = build.text_encoder(read_hub_folder(speech_checkpoint), reference="diffusers")
    generated = oracle.encode_prompt(
        prompt, "cpu", num_waveforms, True, transcription=transcription, negative_prompt=negative
    )[2]
    conditioning = encoder.encode(prompt, transcription=transcription)
    unconditional = encoder.encode_unconditional(conditioning, negative)
    both = Conditioning.join([unconditional.repeat(num_waveforms), conditioning.repeat(num_waveforms)])
    assert len(both.contexts) == 1
    torch.testing.assert_close(both.contexts[0], generated, atol=5e-6, rtol=0)


@pytest.mark.parametrize("negative", [None, CAPTIONS[1]])
@torch.no_grad()
def test_film_equals_diffusers_audioldm(clap_only, negative):
    whole = transformers.ClapModel.from_pretrained(clap_only / "text_encoder")
    branch = transformers.ClapTextModelWithProjection(whole.config.text_config).eval()
    branch.text_model, branch.text_projection = whole.text_model, whole.text_projection
    tokenizer = transformers.RobertaTokenizer.from_pretrained(clap_only / "tokenizer")
    oracle = diffusers.AudioLDMPipeline(
        text_encoder=branch, tokenizer=tokenizer, unet=None, vae=None, scheduler=None, vocoder=None
    )
    encoder = build.text_encoder(read_hub_folder(clap_only), reference="diffusers")
    conditioning = encoder.encode(CAPTIONS[0])
    both = Conditioning.join([encoder.encode_unconditional(conditioning, negative), conditioning])
    expected = oracle._encode_prompt(CAPTIONS[0], "cpu", 1, True, negative)
    torch.testing.assert_close(both.film, expected, atol=1e-6, rtol=0)


# reference="authors"


def test_a_prompt_does_not_depend_on_its_neighbours(authors):
    batch = authors.encode(CAPTIONS)
    for row, caption in enumerate(CAPTIONS):
        alone, length = authors.encode(caption), authors.encode(caption).contexts[1].shape[1]
        assert torch.equal(batch.contexts[0][row], alone.contexts[0][0])
        assert torch.equal(batch.contexts[1][row, :length], alone.contexts[1][0])
        assert batch.masks[1][row].sum() == length


def test_speech_does_not_depend_on_its_neighbours(speech):
    batch = speech.encode(CAPTIONS[:3], transcription=[SAID, "hello", "a"])
    alone = speech.encode(CAPTIONS[1], transcription="hello")
    torch.testing.assert_close(batch.contexts[0][1:2], alone.contexts[0], atol=5e-6, rtol=0)


def test_padding_changes_the_vectors_of_diffusers(authors, as_diffusers):
    """The reason for the other reference."""
    difference = authors.encode(CAPTIONS).contexts[0] - as_diffusers.encode(CAPTIONS).contexts[0]
    assert difference.abs().max() > 0.1


def test_both_references_agree_on_a_single_prompt(authors, as_diffusers):
    close(authors.encode(CAPTIONS[0]), as_diffusers.encode(CAPTIONS[0]))


def test_unconditional_side_is_zeros_and_the_empty_text(authors):
    unconditional = authors.encode_unconditional(authors.encode(CAPTIONS[:2]))
    assert unconditional.contexts[0].shape == (2, 8, 24)
    assert not unconditional.contexts[0].any()
    states, _ = authors.t5([""])
    assert torch.equal(unconditional.contexts[1], states.expand(2, -1, -1))
    assert unconditional.masks == (None, None)


def test_negative_prompt_is_encoded_like_a_prompt(authors):
    conditioning = authors.encode(CAPTIONS[:2])
    close(authors.encode_unconditional(conditioning, CAPTIONS[3]), authors.encode([CAPTIONS[3]] * 2))


@pytest.mark.parametrize("empty", ["", " "])
def test_empty_negative_prompt_among_others_is_unconditional(authors, empty):
    conditioning = authors.encode(CAPTIONS[:3])
    mixed = authors.encode_unconditional(conditioning, [empty, "rain", empty])
    assert not mixed.contexts[0][[0, 2]].any()
    assert torch.equal(mixed.contexts[0][1], authors.encode("rain").contexts[0][0])
    assert mixed.masks[1].sum(dim=1).tolist()[::2] == [1, 1]


@pytest.mark.parametrize("reference", ["authors", "diffusers"])
def test_equal_prompts_are_encoded_once(tiny_checkpoint, monkeypatch, reference):
    encoder = build.text_encoder(read_hub_folder(tiny_checkpoint), reference=reference)
    seen, generate = [], encoder.generate
    monkeypatch.setattr(encoder, "generate", lambda clap, *rest: seen.append(len(clap)) or generate(clap, *rest))
    conditioning = encoder.encode(["rain", "a dog", "rain"])
    assert sum(seen) == 2
    assert torch.equal(conditioning.contexts[0][0], conditioning.contexts[0][2])
    assert not torch.equal(conditioning.contexts[0][0], conditioning.contexts[0][1])


def test_speech_says_nothing_on_the_unconditional_side(speech):
    conditioning = speech.encode(CAPTIONS[4], transcription=SAID)
    unconditional = speech.encode_unconditional(conditioning)
    assert unconditional.contexts[0].shape == (1, 12, 24)
    assert not unconditional.contexts[0].any()


def test_negative_prompt_of_speech_says_the_same_words(speech):
    conditioning = speech.encode(CAPTIONS[4], transcription=SAID)
    negative = speech.encode_unconditional(conditioning, "rain", transcription=SAID)
    close(negative, speech.encode("rain", transcription=SAID))


def test_negative_and_unconditional_speech_rows_keep_their_places(speech):
    conditioning = speech.encode(CAPTIONS[:3], transcription=SAID)
    mixed = speech.encode_unconditional(conditioning, ["", "rain", ""], transcription=SAID)
    assert not mixed.contexts[0][[0, 2]].any()
    torch.testing.assert_close(mixed.contexts[0][1:2], speech.encode("rain", transcription=SAID).contexts[0])


def test_ready_phonemes_are_taken_as_they_are(speech):
    close(speech.encode("rain", phonemes="həlˈæ"), speech.encode("rain", transcription="həlˈæ"))


def test_one_prompt_can_say_different_things(speech):
    conditioning = speech.encode(["rain", "rain"], transcription=[SAID, "hello"])
    assert not torch.equal(*conditioning.contexts[0])


@pytest.mark.parametrize(
    ("listed", "reference", "expected"),
    [(8, "authors", 512), (8, "diffusers", 8), (None, "diffusers", 512), (16, "authors", 16)],
)
def test_speech_writes_512_vectors_unless_told_otherwise(speech, listed, reference, expected, monkeypatch):
    """8, the number of the other models, is taken for left over from the conversion; diffusers would follow it."""
    monkeypatch.setattr(speech.gpt2, "config", replace(speech.gpt2.config, n_positions=1024))
    parts = {"clap": speech.clap, "phonemes": speech.phonemes, "projection": speech.projection, "gpt2": speech.gpt2}
    assert TextEncoder(**parts, num_vectors=listed, reference=reference).num_vectors == expected


# The other kinds of models


def test_clap_alone_gives_a_unit_film_vector_and_no_context(clap_only):
    conditioning = build.text_encoder(read_hub_folder(clap_only)).encode(CAPTIONS)
    assert conditioning.contexts == conditioning.masks == ()
    torch.testing.assert_close(conditioning.film.norm(dim=1), torch.ones(len(CAPTIONS)))


def test_unconditional_film_is_the_empty_text(clap_only):
    encoder = build.text_encoder(read_hub_folder(clap_only))
    conditioning = encoder.encode(CAPTIONS[:2])
    assert torch.equal(encoder.encode_unconditional(conditioning).film, encoder.clap([""]).expand(2, -1))


def test_t5_alone_gives_one_context_although_clap_is_there_for_ranking(t5_only, authors):
    encoder = build.text_encoder(read_hub_folder(t5_only))
    conditioning = encoder.encode(CAPTIONS[0])
    assert encoder.clap is None
    assert torch.equal(conditioning.contexts[0], authors.encode(CAPTIONS[0]).contexts[1])
    assert encoder.encode_unconditional(conditioning).contexts[0].shape == (1, 1, 32)


def test_t5_alone_as_diffusers_pads_the_negative_side(t5_only):
    encoder = build.text_encoder(read_hub_folder(t5_only), reference="diffusers")
    conditioning = encoder.encode(CAPTIONS[0])
    unconditional = encoder.encode_unconditional(conditioning)
    assert unconditional.contexts[0].shape == conditioning.contexts[0].shape
    assert unconditional.masks[0].sum() == 1


# Bad input


@pytest.mark.parametrize("prompt", ["", " \n", ["rain", ""]])
def test_empty_prompt_is_an_error(authors, prompt):
    with pytest.raises(ValueError, match="prompt must not be empty"):
        authors.encode(prompt)


@pytest.mark.parametrize("prompt", [["rain", 3], [None], [b"rain"]])
def test_prompt_that_is_no_string_is_an_error(authors, prompt):
    with pytest.raises(ValueError, match=r"prompt must be a string, got (int|NoneType|bytes)"):
        authors.encode(prompt)


def test_no_prompt_at_all_is_an_error(authors):
    with pytest.raises(ValueError, match="there is no prompt"):
        authors.encode([])


def test_half_a_character_is_an_error(authors):
    with pytest.raises(ValueError, match=re.escape(r"prompt contains an unpaired surrogate at index 5: '\ud800'")):
        authors.encode("rain \ud800")


@pytest.mark.parametrize("reference", ["authors", "diffusers"])
def test_negative_prompts_must_be_one_or_one_each(tiny_checkpoint, reference):
    encoder = build.text_encoder(read_hub_folder(tiny_checkpoint), reference=reference)
    with pytest.raises(ValueError, match=r"negative prompt.* 2 prompts, got 3"):
        encoder.encode_unconditional(encoder.encode(["rain", "a dog"]), ["a", "b", "c"])


def test_negative_prompt_that_is_no_string_is_an_error(authors):
    with pytest.raises(ValueError, match=r"negative.prompt.*got int"):
        authors.encode_unconditional(authors.encode("rain"), [3])


def test_transcription_for_a_model_that_does_not_speak_is_an_error(authors):
    with pytest.raises(ValueError, match="transcription is only for speech models"):
        authors.encode("rain", transcription=SAID)


@pytest.mark.parametrize(("words", "got"), [({}, "neither"), ({"transcription": SAID, "phonemes": "a"}, "both")])
def test_speech_needs_either_transcription_or_phonemes(speech, words, got):
    with pytest.raises(ValueError, match=f"give it transcription or phonemes, got {got}"):
        speech.encode("rain", **words)


def test_empty_transcription_is_an_error(speech):
    with pytest.raises(ValueError, match="transcription must not be empty"):
        speech.encode("rain", transcription="")


def test_unknown_reference_lists_the_known_ones(tiny_checkpoint):
    with pytest.raises(ValueError, match=r"reference.*authors, diffusers.*'original'"):
        build.text_encoder(read_hub_folder(tiny_checkpoint), reference="original")


# Loading


def test_only_the_text_branch_of_clap_is_loaded(authors):
    assert not [name for name, _ in authors.named_parameters() if "audio" in name]


def test_everything_loaded_is_real(authors, speech):
    for encoder in (authors, speech):
        assert not any(tensor.is_meta for tensor in [*encoder.parameters(), *encoder.buffers()])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lower_precision_stays_close(tiny_checkpoint, authors, dtype):
    encoder = build.text_encoder(read_hub_folder(tiny_checkpoint), dtype=dtype)
    conditioning, expected = encoder.encode(CAPTIONS), authors.encode(CAPTIONS)
    assert {context.dtype for context in conditioning.contexts} == {dtype}
    for one, other in zip(conditioning.contexts, expected.contexts):
        assert (one.float() - other).norm() < 0.05 * other.norm()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.float16, 0.05)])
def test_gpu_agrees_with_cpu(tiny_checkpoint, authors, dtype, tolerance):
    encoder = build.text_encoder(read_hub_folder(tiny_checkpoint), device="cuda", dtype=dtype)
    conditioning = encoder.encode(CAPTIONS).to("cpu", torch.float32)
    for one, other in zip(conditioning.contexts, authors.encode(CAPTIONS).contexts):
        assert (one - other).norm() < tolerance * other.norm()


@pytest.mark.parametrize("part", ["tokenizer", "text_encoder", "projection_model/config.json", "language_model"])
def test_missing_part_is_named(tiny_checkpoint, tmp_path, part):
    folder = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint, folder)
    path = folder / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ValueError, match=re.escape(str(path))) as raised:
        build.text_encoder(read_hub_folder(folder))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_damaged_tokenizer_is_named(tiny_checkpoint, tmp_path, content):
    """transformers would make one without words of a folder without files."""
    folder = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint, folder)
    file = folder / "tokenizer_2" / "tokenizer.json"
    file.unlink() if content is None else file.write_text(content)
    with pytest.raises(ValueError, match=re.escape(str(file.parent))) as raised:
        build.text_encoder(read_hub_folder(folder))
    assert "\n" not in str(raised.value)


def test_impossible_number_of_vectors_is_an_error(tmp_path):
    folder = checkpoints.save(tmp_path, language_model=checkpoints.gpt2(max_new_tokens=0))
    with pytest.raises(ValueError, match="max_new_tokens must be a positive integer, got 0"):
        build.text_encoder(read_hub_folder(folder))


@pytest.mark.parametrize(("limit", "message"), [
    (10**30, "room for 250 phonemes.*model_max_length 1e\\+30"),
    (251, "room for 250 phonemes.*model_max_length 251"),
])
def test_without_a_table_of_positions_the_tokenizer_must_set_a_limit_that_fits(tmp_path, limit, message):
    from diffusers import AudioLDM2ProjectionModel

    folder = checkpoints.save_speech(
        tmp_path / "speech", projection_model=AudioLDM2ProjectionModel(16, 16, 24),
        tokenizer_2=checkpoints.vits_tokenizer(tmp_path, model_max_length=limit),
    )
    with pytest.raises(ValueError, match=message):
        build.text_encoder(read_hub_folder(folder))
