"""Sound in and out of files, against the plain use of soundfile, scipy and the standard library's wave module."""

import json
import logging
import math
import os
import subprocess
import sys
import textwrap
import threading
import wave

import numpy as np
import pytest
import scipy.io.wavfile
import soundfile

from ldm2 import audio
from ldm2.audio import writing
from ldm2.edit import paste
from tests.helpers import noise, tone

FORMATS = [".wav", ".flac", ".ogg", ".opus", ".mp3"]
LOSSLESS = [(".wav", "pcm16", 16), (".wav", "pcm24", 24), (".flac", "pcm16", 16), (".flac", "pcm24", 24)]
SETTINGS = json.dumps({"prompt": 'ein "Hund" bellt,\n雨が降る', "seed": 0, "seconds": 10.24, "notes": "x" * 1500})


# --- lengths ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seconds, samples", [(0, 0), (10.24, 163_840), (10, 160_000), (1 / 16_000, 1),
                                              (2.00004, 32_001)])
def test_seconds_become_the_nearest_number_of_samples(seconds, samples):
    assert audio.seconds_to_samples(seconds, 16_000) == samples


def test_samples_become_seconds():
    assert audio.samples_to_seconds(163_840, 16_000) == 10.24


@pytest.mark.parametrize("seconds", [-0.1, math.nan, math.inf])
def test_an_impossible_length_is_named(seconds):
    with pytest.raises(ValueError, match=f"from 0 up, got {seconds}"):
        audio.seconds_to_samples(seconds, 16_000)


# --- waveforms -------------------------------------------------------------------------------------------------------

def test_channels_are_mixed_to_their_mean():
    waveform = noise(6, 100)
    np.testing.assert_allclose(audio.mix(waveform), waveform.mean(axis=0), atol=1e-7)


def test_a_single_channel_is_mixed_to_itself():
    waveform = noise(1, 100)
    assert np.array_equal(audio.mix(waveform), waveform[0])


def test_a_channel_is_taken_by_its_index():
    waveform = noise(6, 100)
    assert np.array_equal(audio.mix(waveform, channel=5), waveform[5])


@pytest.mark.parametrize("channel", [-1, 2])
def test_a_missing_channel_is_named(channel):
    with pytest.raises(ValueError, match=f"from 0 to 1 in a sound with 2 channels, got {channel}"):
        audio.mix(noise(2, 10), channel=channel)


@pytest.mark.parametrize("call", [
    lambda sound: audio.mix(sound),
    lambda sound: audio.mix(sound, channel=0),
    lambda sound: audio.resample(sound, 16_000, 16_000),
    lambda sound: audio.write("never.wav", sound, 16_000),
    lambda sound: paste.paste(sound, sound, [(0.0, 0.01)], 16_000),
    lambda sound: paste.blend_bands(sound, sound, [(100.0, 200.0)], 16_000),
    lambda sound: paste.fit_length(sound, 10),
    lambda sound: paste.extend_canvas(sound, 16_000, after=1.0),
])
@pytest.mark.parametrize("shape", [(16_000, 1), (16_000, 2), (25, 24)])
def test_channels_in_columns_are_refused(call, shape):
    with pytest.raises(ValueError, match=rf"got {shape[0]} rows of {shape[1]} samples.*sound\.T"):
        call(np.zeros(shape, np.float32))


@pytest.mark.parametrize("shape", [(2, 1), (24, 1), (25, 25), (1024, 1024), (1, 2)])
def test_few_samples_or_many_channels_are_no_reason_to_refuse_a_sound(shape):
    assert audio.mix(np.ones(shape, np.float32)).shape == shape[1:]


@pytest.mark.parametrize("rate", [8000, 11_025, 44_100, 48_000, 96_000, 192_000])
def test_resampling_keeps_level_pitch_and_position(rate):
    resampled = audio.resample(tone(1, rate), rate, 16_000)
    assert resampled.shape == (16_000,)
    np.testing.assert_allclose(resampled[1000:-1000], tone(1, 16_000)[1000:-1000], atol=1e-4)


def test_resampling_removes_what_the_lower_rate_cannot_hold():
    assert np.abs(audio.resample(tone(1, 48_000, hz=9000), 48_000, 16_000)[1000:-1000]).max() < 1e-4


def test_channels_are_resampled_apart():
    waveform = noise(3, 500)
    alone = [audio.resample(row, 44_100, 16_000) for row in waveform]
    assert np.array_equal(audio.resample(waveform, 44_100, 16_000), np.stack(alone))


@pytest.mark.parametrize("length, rate, expected", [(1, 48_000, 1), (1, 8000, 2), (2, 44_100, 1),
                                                    (44_101, 44_100, 16_000)])
def test_resampled_length_is_rounded_and_at_least_one(length, rate, expected):
    resampled = audio.resample(noise(length), rate, 16_000)
    assert resampled.shape == (expected,)
    assert resampled.dtype == np.float32


def test_the_same_rate_changes_nothing():
    waveform = noise(100)
    assert np.array_equal(audio.resample(waveform, 16_000, 16_000), waveform)


# --- reading ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("format, subtype, tolerance", [
    ("WAV", "PCM_U8", 8e-3), ("WAV", "PCM_16", 4e-5), ("WAV", "PCM_24", 2e-7), ("WAV", "PCM_32", 1e-7),
    ("WAV", "FLOAT", 0), ("WAV", "DOUBLE", 0), ("FLAC", "PCM_24", 2e-7), ("AIFF", "PCM_16", 4e-5), ("RF64", "FLOAT", 0),
    ("OGG", "VORBIS", 0.1), ("OGG", "OPUS", 0.1), ("MP3", "MPEG_LAYER_III", 0.1),
])
def test_every_kind_of_file_is_read(tmp_path, format, subtype, tolerance):
    path = tmp_path / "sound"                                                # known by its content, not by its name
    soundfile.write(path, tone(1, 16_000), 16_000, format=format, subtype=subtype)
    waveform, rate = audio.read(path)
    assert rate == 16_000
    assert waveform.dtype == np.float32
    sound_part = slice(-100) if subtype == "OPUS" else slice(None)           # libsndfile's Opus spoils the last 6 ms
    np.testing.assert_allclose(waveform[sound_part], tone(1, 16_000)[sound_part], atol=tolerance, rtol=0)


def test_six_channels_are_read_apart_or_mixed_or_picked(tmp_path):
    sound = noise(6, 40_000)                                                 # longer than one block of the reader
    soundfile.write(tmp_path / "six.wav", sound.T, 44_100, subtype="FLOAT")
    channels, rate = audio.read_channels(tmp_path / "six.wav")
    assert rate == 44_100
    assert np.array_equal(channels, sound)
    assert np.array_equal(audio.read(tmp_path / "six.wav")[0], audio.mix(sound))
    assert np.array_equal(audio.read(tmp_path / "six.wav", channel=3)[0], sound[3])


def test_a_file_is_resampled_where_asked(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(0.5, 44_100), 44_100, subtype="FLOAT")
    waveform, rate = audio.read(tmp_path / "a.wav", sample_rate=16_000)
    assert rate == 16_000
    assert np.array_equal(waveform, audio.resample(tone(0.5, 44_100), 44_100, 16_000))


def test_one_sample_and_silence_are_sounds(tmp_path):
    soundfile.write(tmp_path / "one.wav", np.zeros(1), 48_000)
    assert np.array_equal(audio.read(tmp_path / "one.wav", sample_rate=16_000)[0], np.zeros(1, np.float32))


def test_a_clipped_float_file_keeps_its_level(tmp_path):
    soundfile.write(tmp_path / "loud.wav", np.float32([0.5, 2.5, -3.0]), 16_000, subtype="FLOAT")
    assert np.array_equal(audio.read(tmp_path / "loud.wav")[0], np.float32([0.5, 2.5, -3.0]))


@pytest.mark.parametrize("subtype, encoding", [("PCM_U8", "pcm16"), ("PCM_16", "pcm16"), ("PCM_24", "pcm24"),
                                               ("PCM_32", "pcm32"), ("FLOAT", "float32"), ("DOUBLE", "float64"),
                                               ("ULAW", "pcm16")])
def test_the_described_encoding_keeps_every_sample(tmp_path, subtype, encoding):
    sound = 0.2 * np.random.default_rng(0).standard_normal((1000, 2))                               # of 64 bits
    soundfile.write(tmp_path / "in.wav", sound, 22_050, subtype=subtype)
    info = audio.describe(tmp_path / "in.wav")
    assert info == audio.FileInfo(sample_rate=22_050, channels=2, num_samples=1000, encoding=encoding)
    sound, rate = audio.read_channels(tmp_path / "in.wav")
    audio.write(tmp_path / "out.wav", sound, rate, encoding=info.encoding)
    old, new = (soundfile.read(tmp_path / name)[0] for name in ("in.wav", "out.wav"))
    assert np.array_equal(new, old)


@pytest.mark.parametrize("name", ["text.wav", "text.mp3", "text.ogg", "text.raw", "text"])
def test_a_text_file_is_refused_in_one_line(tmp_path, name, capfd):
    (tmp_path / name).write_text("This is no sound.\n" * 1000)
    with pytest.raises(ValueError, match=f"{name} cannot be read as a sound file: ") as caught:
        audio.read(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "empty.wav").touch()
    with pytest.raises(ValueError, match=r"empty\.wav is empty"):
        audio.read(tmp_path / "empty.wav")


def test_a_file_without_samples_is_refused(tmp_path):
    soundfile.write(tmp_path / "none.wav", np.zeros(0), 16_000)
    with pytest.raises(ValueError, match=r"none\.wav holds no samples"):
        audio.read(tmp_path / "none.wav")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nope\.wav does not exist"):
        audio.read(tmp_path / "nope.wav")


def test_a_folder_is_no_sound_file(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder"):
        audio.read(tmp_path)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_file_with_values_that_are_no_numbers_is_refused(tmp_path, value):
    sound = np.zeros((32_000, 2), np.float32)
    sound[24_000, 1] = sound[30_000, 0] = value
    soundfile.write(tmp_path / "bad.wav", sound, 16_000, subtype="FLOAT")
    with pytest.raises(ValueError, match=r"bad\.wav.*NaN.* 2 of .*1\.500 s"):
        audio.read(tmp_path / "bad.wav")


def test_a_missing_channel_of_a_file_is_named(tmp_path):
    soundfile.write(tmp_path / "two.wav", noise(10, 2), 16_000)
    with pytest.raises(ValueError, match=r"two\.wav: channel must be from 0 to 1 .* got 2"):
        audio.read(tmp_path / "two.wav", channel=2)


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_file_that_was_cut_short_gives_what_is_there_or_an_error(tmp_path, suffix):
    path = audio.write(tmp_path / f"cut{suffix}", noise(48_000), 16_000)
    path.write_bytes(path.read_bytes()[:path.stat().st_size * 2 // 3])
    try:
        waveform, _ = audio.read(path)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert 0 < len(waveform) < 48_000


# --- writing ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("suffix, encoding, bits", LOSSLESS)
def test_integers_of_a_lossless_file_survive_reading_and_writing(tmp_path, suffix, encoding, bits):
    full = 2 ** (bits - 1)
    values = np.concatenate([np.random.default_rng(0).integers(-full, full, 20_001), [-full, -1, 0, 1, full - 1]])
    sound = (values / full).astype(np.float32)
    audio.write(tmp_path / f"a{suffix}", sound, 16_000, encoding=encoding)
    assert np.array_equal(audio.read(tmp_path / f"a{suffix}")[0], sound)
    stored = soundfile.read(tmp_path / f"a{suffix}", dtype="int32")[0] >> (32 - bits)
    assert np.array_equal(stored, values)


def test_a_file_that_cannot_be_created_is_called_by_its_own_name(tmp_path, monkeypatch):
    def refuse(path, *arguments):
        raise OSError(28, "No space left on device", path)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OSError, match=r"No space left on device: '.*/a\.wav'"):
        audio.write(tmp_path / "a.wav", noise(10), 16_000)


def test_a_float_file_keeps_every_bit(tmp_path):
    sound = noise(2, 20_000, level=3)
    audio.write(tmp_path / "a.wav", sound, 44_100, encoding="float32")
    assert np.array_equal(audio.read_channels(tmp_path / "a.wav")[0], sound)


def test_a_wav_file_is_16_bit_pcm_by_default(tmp_path):
    audio.write(tmp_path / "a.wav", tone(1, 16_000), 16_000, metadata={"comment": "odd"})
    with wave.open(str(tmp_path / "a.wav")) as file:
        assert file.getparams()[:4] == (1, 2, 16_000, 16_000)
    rate, samples = scipy.io.wavfile.read(tmp_path / "a.wav")
    assert rate == 16_000
    assert np.array_equal(samples, np.rint(tone(1, 16_000) * 32_768))


@pytest.mark.parametrize("suffix", [".ogg", ".opus", ".mp3"])
def test_a_lossy_file_sounds_like_the_waveform(tmp_path, suffix):
    audio.write(tmp_path / f"a{suffix}", tone(1, 16_000), 16_000)
    np.testing.assert_allclose(audio.read(tmp_path / f"a{suffix}")[0][:-100], tone(1, 16_000)[:-100], atol=0.1)


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("length", [1, 3, 1151, 16_384, 16_385])
def test_every_sample_is_written(tmp_path, suffix, length):
    audio.write(tmp_path / f"a{suffix}", noise(length), 16_000)
    assert soundfile.info(tmp_path / f"a{suffix}").frames == length


@pytest.mark.parametrize("suffix", FORMATS)
def test_channels_stand_in_rows(tmp_path, suffix):
    sound = np.stack([tone(0.5, 48_000), 0.1 * tone(0.5, 48_000)])
    audio.write(tmp_path / f"a{suffix}", sound, 48_000)
    read = audio.read_channels(tmp_path / f"a{suffix}")[0]
    assert read.shape == sound.shape
    assert 8 < np.square(read[0]).sum() ** 0.5 / np.square(read[1]).sum() ** 0.5 < 12


def test_the_suffix_may_be_written_in_capitals(tmp_path):
    audio.write(tmp_path / "A.FLAC", noise(100), 16_000)
    assert soundfile.info(tmp_path / "A.FLAC").format == "FLAC"


def test_long_vorbis_files_need_little_stack(tmp_path):
    program = f"""
        import threading, numpy, sys
        from ldm2 import audio
        write = lambda: audio.write({str(tmp_path / "long.ogg")!r}, numpy.zeros(16_000 * 130, "float32"), 16_000)
        threading.stack_size(512 * 1024)
        thread = threading.Thread(target=write)
        thread.start()
        thread.join()
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(program)]).returncode == 0
    assert soundfile.info(tmp_path / "long.ogg").frames == 16_000 * 130


@pytest.mark.parametrize("suffix", FORMATS)
def test_samples_beyond_full_scale_are_clipped_with_one_warning(tmp_path, caplog, suffix):
    sound = tone(1, 16_000, level=0.9)
    sound[[100, 200]] = 1.5, -2.5
    audio.write(tmp_path / f"a{suffix}", sound, 16_000)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "2 of 16000 samples" in record.message
    assert "peak was 2.5" in record.message
    if suffix in (".wav", ".flac"):
        assert np.array_equal(audio.read(tmp_path / f"a{suffix}")[0][[100, 200]], np.float32([32_767 / 32_768, -1]))


def test_full_scale_itself_is_not_clipping(tmp_path, caplog):
    audio.write(tmp_path / "a.wav", np.float32([1, -1, 0]), 16_000)
    assert not caplog.records


@pytest.mark.parametrize("suffix, channels", [(".wav", 1), (".flac", 2)])
def test_writing_does_not_change_the_waveform(tmp_path, suffix, channels):
    sound = noise(channels, 100, level=2) * 2
    before = sound.copy()
    audio.write(tmp_path / f"a{suffix}", sound, 16_000)
    assert np.array_equal(sound, before)


def test_write_returns_the_path_and_leaves_only_that_file(tmp_path):
    assert audio.write(str(tmp_path / "a.wav"), noise(10), 16_000) == tmp_path / "a.wav"
    assert os.listdir(tmp_path) == ["a.wav"]


@pytest.mark.skipif(os.name != "posix", reason="file modes are those of POSIX")
def test_a_file_has_the_rights_that_the_umask_leaves(tmp_path):
    (tmp_path / "plain").touch()
    audio.write(tmp_path / "a.wav", noise(10), 16_000)
    assert (tmp_path / "a.wav").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_an_existing_file_is_kept_unless_overwriting_is_asked_for(tmp_path):
    audio.write(tmp_path / "a.wav", noise(10), 16_000)
    with pytest.raises(FileExistsError, match=r"a\.wav exists.*--overwrite"):
        audio.write(tmp_path / "a.wav", noise(20), 16_000)
    assert len(audio.read(tmp_path / "a.wav")[0]) == 10
    audio.write(tmp_path / "a.wav", noise(20), 16_000, overwrite=True)
    assert len(audio.read(tmp_path / "a.wav")[0]) == 20


@pytest.mark.parametrize("overwrite", ["no", "yes", 2, None])
def test_overwriting_that_is_neither_true_nor_false_is_refused(tmp_path, overwrite):
    audio.write(tmp_path / "a.wav", noise(10), 16_000)
    with pytest.raises(ValueError, match=f"overwrite must be True or False, got {overwrite!r}"):
        audio.write(tmp_path / "a.wav", noise(20), 16_000, overwrite=overwrite)
    assert len(audio.read(tmp_path / "a.wav")[0]) == 10


@pytest.mark.parametrize("hard_links", [True, False])
def test_a_file_that_appears_while_writing_is_kept(tmp_path, monkeypatch, hard_links):
    path = tmp_path / "a.wav"
    encode = writing._encode

    def slow_encode(*args):
        encode(*args)
        path.write_text("somebody else's")

    monkeypatch.setattr(writing, "_encode", slow_encode)
    if not hard_links:
        monkeypatch.setattr(os, "link", _no_links)
    with pytest.raises(FileExistsError):
        audio.write(path, noise(10), 16_000)
    assert path.read_text() == "somebody else's"
    assert os.listdir(tmp_path) == ["a.wav"]


def _no_links(source, target):
    raise PermissionError("hard links are not supported here")


def test_a_file_system_without_hard_links_serves(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", _no_links)
    audio.write(tmp_path / "a.wav", noise(10), 16_000)
    assert len(audio.read(tmp_path / "a.wav")[0]) == 10
    assert os.listdir(tmp_path) == ["a.wav"]


def test_of_many_writers_one_wins(tmp_path):
    outcomes = []

    def attempt(length):
        try:
            audio.write(tmp_path / "a.wav", noise(length), 16_000)
            outcomes.append(length)
        except FileExistsError:
            outcomes.append(None)

    threads = [threading.Thread(target=attempt, args=(1000 + i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [length for length in outcomes if length is not None]
    assert len(audio.read(tmp_path / "a.wav")[0]) == winner
    assert os.listdir(tmp_path) == ["a.wav"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_nothing_is_left_after_an_interruption(tmp_path, monkeypatch, error):
    def interrupted(*args):
        raise error

    monkeypatch.setattr(writing, "_as_stored", interrupted)
    with pytest.raises(error):
        audio.write(tmp_path / "a.wav", noise(100_000), 16_000)
    assert os.listdir(tmp_path) == []


def test_an_interrupted_overwriting_keeps_the_old_file(tmp_path, monkeypatch):
    audio.write(tmp_path / "a.wav", noise(10), 16_000)

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(writing, "_as_stored", interrupted)
    with pytest.raises(KeyboardInterrupt):
        audio.write(tmp_path / "a.wav", noise(20), 16_000, overwrite=True)
    assert len(audio.read(tmp_path / "a.wav")[0]) == 10
    assert os.listdir(tmp_path) == ["a.wav"]


@pytest.mark.skipif(os.name != "posix", reason="limits are those of POSIX")
@pytest.mark.parametrize("suffix", FORMATS)
def test_a_full_disk_is_reported_and_leaves_nothing(tmp_path, suffix):
    program = f"""
        import numpy, resource, signal
        from ldm2 import audio
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
        noise = numpy.random.default_rng(0).uniform(-0.5, 0.5, 160_000)
        try:
            audio.write({str(tmp_path / "a")!r} + {suffix!r}, noise, 16_000)
        except OSError as error:
            print("reported:", error)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert run.stdout.startswith("reported:"), run.stderr
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("waveform, message", [
    (np.zeros((2, 3, 4), np.float32), r"shape \(N,\) or \(channels, N\) .* got \(2, 3, 4\)"),
    (np.zeros(0, np.float32), r"at least one sample, got \(0,\)"),
    (np.float32(1), r"got \(\)"),
    (np.zeros((1025, 1025), np.float32), r"\.wav takes 1 to 1024 channels, got 1025"),
    (np.zeros((16_000, 2), np.float32), r"got 16000 rows of 2 samples.*sound\.T"),
    (np.zeros(10, np.int16), "floating-point samples .* got int16"),
    (np.float32([0, math.nan]), "1 NaN or infinite samples"),
    (np.float64([0, 1e300]), "1 NaN or infinite samples"),
])
def test_a_waveform_that_cannot_be_written_is_named(tmp_path, waveform, message):
    with pytest.raises(ValueError, match=message):
        audio.write(tmp_path / "a.wav", waveform, 16_000)
    assert os.listdir(tmp_path) == []


# --- checks before the work ------------------------------------------------------------------------------------------

def test_a_good_place_passes_and_nothing_is_created(tmp_path):
    audio.check_output(tmp_path / "a.wav", sample_rate=16_000)
    assert os.listdir(tmp_path) == []


def test_a_name_without_a_folder_means_the_current_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    audio.check_output("a.wav")
    audio.write("a.wav", noise(10), 16_000)
    assert os.listdir(tmp_path) == ["a.wav"]


@pytest.mark.parametrize("name", ["a.aac", "a", ".wav", "a.wav.tmp"])
def test_an_unknown_suffix_is_answered_with_the_known_ones(tmp_path, name):
    with pytest.raises(ValueError, match=r"must be one of \.wav, \.flac, \.ogg, \.opus, \.mp3, got "):
        audio.check_output(tmp_path / name)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"the folder .*nowhere does not exist"):
        audio.check_output(tmp_path / "nowhere" / "a.wav")


def test_a_folder_that_is_not_writable_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)              # root may write everywhere
    with pytest.raises(PermissionError, match="is not writable"):
        audio.check_output(tmp_path / "a.wav")


def test_a_folder_with_the_name_of_the_output_is_named(tmp_path):
    (tmp_path / "a.wav").mkdir()
    with pytest.raises(IsADirectoryError, match=r"a\.wav is a folder"):
        audio.check_output(tmp_path / "a.wav", overwrite=True)


def test_an_existing_output_is_named(tmp_path):
    (tmp_path / "a.wav").touch()
    with pytest.raises(FileExistsError, match="exists already"):
        audio.check_output(tmp_path / "a.wav")
    audio.check_output(tmp_path / "a.wav", overwrite=True)


def test_a_dangling_link_counts_as_existing(tmp_path):
    (tmp_path / "a.wav").symlink_to(tmp_path / "nothing")
    with pytest.raises(FileExistsError, match="exists already"):
        audio.check_output(tmp_path / "a.wav")


def test_a_name_that_is_too_long_is_found_early(tmp_path):
    with pytest.raises(OSError, match="too long"):
        audio.check_output(tmp_path / ("a" * 300 + ".wav"))


@pytest.mark.parametrize("disguise", ["same", "symbolic link", "hard link", "roundabout"])
def test_the_input_is_never_the_output(tmp_path, disguise):
    source = audio.write(tmp_path / "in.wav", noise(10), 16_000)
    target = tmp_path / "out.wav"
    if disguise == "symbolic link":
        target.symlink_to(source)
    elif disguise == "hard link":
        target.hardlink_to(source)
    else:
        target = source if disguise == "same" else tmp_path / ".." / tmp_path.name / "in.wav"
    with pytest.raises(ValueError, match="is the input: choose another name"):
        audio.check_output(target, overwrite=True, inputs=[source])


@pytest.mark.parametrize("suffix, rate, message", [
    (".opus", 44_100, r"of 8000, 12000, 16000, 24000, 48000 Hz, got 44100: resample, or write \.wav or \.flac"),
    (".mp3", 96_000, r"44100, 48000 Hz, got 96000: resample"),
    (".ogg", 384_000, "up to 200000 Hz, got 384000"),
    (".flac", 700_000, "up to 655350 Hz, got 700000"),
    (".wav", 0, r"positive integer \(Hz\), got 0"),
    (".wav", 16_000.5, r"positive integer \(Hz\), got 16000.5"),
])
def test_a_sample_rate_that_a_format_does_not_have_is_named(tmp_path, suffix, rate, message):
    with pytest.raises(ValueError, match=message):
        audio.check_output(tmp_path / f"a{suffix}", sample_rate=rate)


@pytest.mark.parametrize("suffix, channels, most", [(".wav", 1025, 1024), (".flac", 9, 8), (".mp3", 3, 2),
                                                    (".ogg", 0, 255)])
def test_a_number_of_channels_that_a_format_does_not_have_is_named(tmp_path, suffix, channels, most):
    with pytest.raises(ValueError, match=f"takes 1 to {most} channels, got {channels}"):
        audio.check_output(tmp_path / f"a{suffix}", channels=channels)


@pytest.mark.parametrize("suffix, encoding", [(".wav", "pcm8"), (".flac", "float32"), (".ogg", "pcm16")])
def test_an_encoding_that_a_format_does_not_have_is_named(tmp_path, suffix, encoding):
    with pytest.raises(ValueError, match=rf"the encoding of \{suffix} must be one of .*, got '{encoding}'"):
        audio.check_output(tmp_path / f"a{suffix}", encoding=encoding)


def test_write_checks_the_rate_and_the_channels_itself(tmp_path):
    with pytest.raises(ValueError, match="got 44100"):
        audio.write(tmp_path / "a.opus", noise(10), 44_100)
    with pytest.raises(ValueError, match="takes 1 to 2 channels, got 3"):
        audio.write(tmp_path / "a.mp3", noise(3, 10), 44_100)


# --- metadata --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("suffix, encoding", [(".wav", "pcm16"), (".wav", "pcm24"), (".wav", "float32"),
                                              (".flac", "pcm16"), (".ogg", None), (".opus", None), (".mp3", None)])
def test_settings_in_the_comment_come_back_identical(tmp_path, suffix, encoding):
    audio.write(tmp_path / f"a{suffix}", noise(1001), 16_000, encoding=encoding, metadata={"comment": SETTINGS})
    assert audio.read_metadata(tmp_path / f"a{suffix}")["comment"] == SETTINGS


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("length", [2047, 2048, 10_000, 16_000])
def test_long_tags_of_any_script_come_back_identical(tmp_path, suffix, length):
    text = ("雨" * (length // 3)).ljust(length - length // 3 * 2, "x")
    assert len(text.encode()) == length
    audio.write(tmp_path / f"a{suffix}", tone(0.1, 16_000), 16_000, metadata={"title": text, "comment": text})
    tags = audio.read_metadata(tmp_path / f"a{suffix}")
    assert (tags["title"], tags["comment"]) == (text, text)
    assert soundfile.info(tmp_path / f"a{suffix}").frames == 1600


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".opus"])
def test_title_and_software_come_back(tmp_path, suffix):
    metadata = {"title": "ein Hund bellt", "software": "ldm2 0.1.0"}
    audio.write(tmp_path / f"a{suffix}", noise(100), 16_000, metadata=metadata)
    assert audio.read_metadata(tmp_path / f"a{suffix}") == metadata


@pytest.mark.parametrize("encoding, length", [("pcm16", 100), ("pcm24", 101), ("float32", 101)])
def test_other_programs_read_our_wav_tags_and_samples(tmp_path, encoding, length):
    sound = noise(length)
    metadata = {"title": "Regen", "software": "ldm2", "comment": "seed 0"}
    audio.write(tmp_path / "a.wav", sound, 16_000, encoding=encoding, metadata=metadata)
    with soundfile.SoundFile(tmp_path / "a.wav") as file:
        assert file.copy_metadata() == metadata
        np.testing.assert_allclose(file.read(), sound, atol=4e-5)


def test_tags_of_other_programs_are_read(tmp_path):
    with soundfile.SoundFile(tmp_path / "a.wav", "w", 16_000, 1) as file:
        file.title, file.comment, file.artist = "Titel", "Anmerkung", "jemand"
        file.write(noise(100))
    assert audio.read_metadata(tmp_path / "a.wav") == {"title": "Titel", "comment": "Anmerkung"}


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_file_without_tags_has_none(tmp_path, suffix):
    audio.write(tmp_path / f"a{suffix}", noise(100), 16_000, metadata={"title": ""})
    metadata = audio.read_metadata(tmp_path / f"a{suffix}")
    metadata.pop("software", None)                                           # LAME always names itself
    assert metadata == {}


def test_a_tag_that_is_too_long_is_left_out_with_a_warning(tmp_path, caplog):
    audio.write(tmp_path / "a.wav", noise(100), 16_000, metadata={"title": "t", "comment": "x" * 16_001})
    assert audio.read_metadata(tmp_path / "a.wav") == {"title": "t"}
    assert "the tag comment has 16001 bytes and was left out: the limit is 16000" in caplog.text


@pytest.mark.parametrize("metadata, message", [
    ({"mood": "calm"}, "one of title, software, comment, got 'mood'"),
    ({"title": 3}, "title must be a string without zero characters, got 3"),
    ({"title": "a\0b"}, "title must be a string without zero characters"),
])
def test_a_wrong_tag_is_named(tmp_path, metadata, message):
    with pytest.raises(ValueError, match=message):
        audio.write(tmp_path / "a.wav", noise(100), 16_000, metadata=metadata)
    assert os.listdir(tmp_path) == []


def test_metadata_of_a_text_file_is_refused(tmp_path):
    (tmp_path / "text.wav").write_text("no sound")
    with pytest.raises(ValueError, match="cannot be read as a sound file"):
        audio.read_metadata(tmp_path / "text.wav")


# --- import ----------------------------------------------------------------------------------------------------------

def test_importing_audio_imports_neither_torch_nor_the_sound_libraries():
    program = "import sys, ldm2.audio; print(*({'torch', 'soundfile', 'soxr', 'scipy'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""


# --- what is no sound file, and why ----------------------------------------------------------------------------------

@pytest.mark.parametrize("start, kind", [
    (b"\0\0\0\x20ftypM4A ", "m4a"), (b"\x1aE\xdf\xa3abcd", "WebM"), (b"\xff\xf1abcd", "AAC"), (b"0&\xb2uabcd", "WMA"),
])
def test_a_format_that_libsndfile_does_not_read_is_told_how_to_convert(tmp_path, start, kind):
    (tmp_path / "x.dat").write_bytes(start + b"0" * 100)
    with pytest.raises(ValueError, match=rf"{kind}.*ffmpeg -i x\.dat x\.wav"):
        audio.read(tmp_path / "x.dat")


def test_an_address_is_no_file():
    with pytest.raises(ValueError, match=r"https://example\.org/x\.wav is an address"):
        audio.read("https://example.org/x.wav")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.wav")
    with pytest.raises(ValueError, match="is a pipe"):
        audio.read(tmp_path / "x.wav")


def test_a_sound_that_is_too_long_is_refused_by_its_header(tmp_path):
    soundfile.write(tmp_path / "x.flac", np.zeros((10_000, 8)), 10)
    with pytest.raises(ValueError, match="at most 600 s long, got 1000 s"):
        audio.read_channels(tmp_path / "x.flac", 600)
