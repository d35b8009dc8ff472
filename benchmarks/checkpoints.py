"""Tiny random checkpoints in the published layout, and diffusers' pipeline on them as the oracle.

The parts have the structure of `cvssp/audioldm2` (three transformers per layer, eight GPT-2 vectors, VAE with factor 4,
HiFi-GAN at 16 kHz with hop 160) in small. Every parameter is random, also those that are zero or one at initialisation,
so that a layer which is skipped or misread changes the result.
"""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import tokenizers
import torch
import transformers
from torch import nn

CAPTIONS = [
    "a dog barking in the rain",
    "techno music with a strong beat and high melodic riffs",
    "low quality, average quality",
    "the sound of a hammer hitting a wooden surface",
    "a female reporter is speaking",
]

SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_end": 0.0195,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.0015,
    "clip_sample": False,
    "clip_sample_range": 1.0,
    "dynamic_thresholding_ratio": 0.995,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "thresholding": False,
    "timestep_spacing": "leading",
    "trained_betas": None,
}


def randomise(module: nn.Module, seed: int, gain: float = 1.0) -> nn.Module:
    """Fill every parameter: matrices and kernels with N(0, gain^2 / fan_in), vectors near one (norms) or near zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                parameter.copy_(values * gain * parameter[0].numel() ** -0.5)
            elif name.endswith("weight"):
                parameter.copy_(1 + 0.1 * values)
            else:
                parameter.copy_(0.1 * values)
    return module.eval()


def unet(seed: int = 0, **changes) -> diffusers.AudioLDM2UNet2DConditionModel:
    """UNet with three levels; heads 8 everywhere by the scalar, as in the published configs."""
    config = {
        "sample_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (32, 64, 96),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "transformer_layers_per_block": 1,
        "cross_attention_dim": [[None, 24, 32]] * 3,
        "attention_head_dim": 8,
        "norm_num_groups": 8,
    } | changes
    return randomise(diffusers.AudioLDM2UNet2DConditionModel(**config), seed, gain=1.2)


def vae(seed: int = 1, **changes) -> diffusers.AutoencoderKL:
    """VAE with factor 4 and 4 latent channels."""
    config = {
        "block_out_channels": (16, 32, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "in_channels": 1,
        "out_channels": 1,
        "latent_channels": 4,
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "scaling_factor": 0.4110932946205139,
    } | changes
    return randomise(diffusers.AutoencoderKL(**config), seed)


def vocoder(seed: int = 2, **changes) -> transformers.SpeechT5HifiGan:
    """HiFi-GAN: 32 mel bins -> 16 kHz, hop 160."""
    config = {
        "model_in_dim": 32,
        "sampling_rate": 16000,
        "upsample_initial_channel": 64,
        "upsample_rates": [5, 4, 2, 2, 2],
        "upsample_kernel_sizes": [16, 16, 8, 4, 4],
        "resblock_kernel_sizes": [3, 7],
        "resblock_dilation_sizes": [[1, 3], [1, 3]],
        "normalize_before": False,
    } | changes
    return randomise(transformers.SpeechT5HifiGan(transformers.SpeechT5HifiGanConfig(**config)), seed)


def clap(seed: int = 3) -> transformers.ClapModel:
    """CLAP with both branches; the audio branch takes 16 mels x 256 frames."""
    config = transformers.ClapConfig(
        text_config={
            "vocab_size": 300,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "max_position_embeddings": 80,
            "projection_dim": 16,
            "pad_token_id": 1,
        },
        audio_config={
            "spec_size": 64,
            "window_size": 4,
            "num_mel_bins": 16,
            "depths": [2, 2],
            "num_attention_heads": [2, 2],
            "num_hidden_layers": 2,
            "hidden_size": 32,
            "patch_embeds_hidden_size": 16,
            "projection_dim": 16,
            "patch_size": 2,
            "patch_stride": 2,
        },
        projection_dim=16,
    )
    return randomise(transformers.ClapModel(config), seed)


def t5(seed: int = 4) -> transformers.T5EncoderModel:
    """flan-T5 in small: gated GELU, relative positions."""
    config = transformers.T5Config(
        vocab_size=400, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    return randomise(transformers.T5EncoderModel(config), seed)


def gpt2(seed: int = 5, max_new_tokens: int = 8) -> transformers.GPT2Model:
    """GPT-2 without a head, as the published model_index.json names it."""
    config = transformers.GPT2Config(vocab_size=16, n_positions=256, n_embd=24, n_layer=2, n_head=2)
    config.max_new_tokens = max_new_tokens
    return randomise(transformers.GPT2Model(config), seed)


def projection(seed: int = 6) -> nn.Module:
    """CLAP (16) and T5 (32) states to the width of GPT-2 (24)."""
    from diffusers import AudioLDM2ProjectionModel

    return randomise(AudioLDM2ProjectionModel(text_encoder_dim=16, text_encoder_1_dim=32, langauge_model_dim=24), seed)


def vits(seed: int = 7) -> transformers.VitsModel:
    """VITS as the speech models have it, whole: 183 symbols of which the last is the end symbol."""
    config = transformers.VitsConfig(
        vocab_size=183, hidden_size=16, num_hidden_layers=2, ffn_dim=24, flow_size=8, spectrogram_bins=9,
        upsample_initial_channel=8, upsample_rates=[2], upsample_kernel_sizes=[4], resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1]], duration_predictor_filter_channels=8, duration_predictor_num_flows=1,
        prior_encoder_num_flows=1, prior_encoder_num_wavenet_layers=1, posterior_encoder_num_wavenet_layers=1,
    )
    return randomise(transformers.VitsModel(config), seed)


def speech_projection(seed: int = 6, places: int = 40) -> nn.Module:
    """CLAP (16) and phoneme states (16) to the width of GPT-2 (24), with a table of positions."""
    from diffusers import AudioLDM2ProjectionModel

    model = AudioLDM2ProjectionModel(16, 16, 24, use_learned_position_embedding=True, max_seq_length=places)
    return randomise(model, seed)


def vits_tokenizer(folder: str | Path, model_max_length: int = 40) -> transformers.VitsTokenizer:
    """Symbols 0 (padding) to 182 (end), written to `folder`; text is taken as phonemes, so that no espeak is needed."""
    letters = "_ abcdefghijklmnopqrstuvwxyzɑɐɒæɓʙβɔɕçɗɖðʤəɘɚɛɜɝɟʄɡɠɢʛɦɧħɥʜɨɪˈˌː"
    symbols = [*letters, *(chr(0x4E00 + i) for i in range(182 - len(letters))), "⚠"]
    path = Path(folder) / "vocab.json"
    path.write_text(json.dumps({symbol: i for i, symbol in enumerate(symbols)}), encoding="utf-8")
    return transformers.VitsTokenizer(
        path, pad_token="_", unk_token="_", add_blank=False, phonemize=False, model_max_length=model_max_length
    )


def save_speech(folder: str | Path, **parts) -> Path:
    """Write a speech checkpoint with the structure of anhnct/audioldm2_gigaspeech. Returns the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    speech = {
        "language_model": gpt2(max_new_tokens=12),
        "projection_model": speech_projection(),
        "text_encoder_2": vits(),
        "tokenizer_2": vits_tokenizer(folder),
        "unet": unet(cross_attention_dim=[[None, 24]] * 3),
    }
    (folder / "vocab.json").unlink()
    return save(folder, **speech | parts)


def roberta_tokenizer(model_max_length: int = 77) -> transformers.RobertaTokenizer:
    """Byte-level BPE over CAPTIONS with RoBERTa's special tokens."""
    trainer = tokenizers.ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer.train_from_iterator(CAPTIONS, vocab_size=300, min_frequency=1, special_tokens=special, show_progress=False)
    model = json.loads(trainer.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    return transformers.RobertaTokenizer(vocab=model["vocab"], merges=merges, model_max_length=model_max_length)


def t5_tokenizer(model_max_length: int = 128) -> transformers.T5Tokenizer:
    """Unigram over CAPTIONS and single letters, with T5's special tokens at the published ids."""
    trainer = tokenizers.SentencePieceUnigramTokenizer()
    letters = [chr(c) for c in range(33, 127)]
    trainer.train_from_iterator(
        CAPTIONS * 4, vocab_size=200, unk_token="<unk>", special_tokens=["<pad>", "</s>", "<unk>"],
        initial_alphabet=letters, show_progress=False,
    )
    pieces = [(piece, round(score, 1)) for piece, score in json.loads(trainer.to_str())["model"]["vocab"]]
    vocab = pieces[:3] + sorted(pieces[3:])  # order and last digits of the trainer vary
    return transformers.T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=model_max_length)


def feature_extractor() -> transformers.ClapFeatureExtractor:
    """The published front end of CLAP, coarser: 16 mels x 251 frames of 10 s at 48 kHz."""
    settings = {"feature_size": 16, "hop_length": 1920, "truncation": "rand_trunc", "padding": "repeatpad"}
    return transformers.ClapFeatureExtractor(**settings)


PARTS = {
    "feature_extractor": feature_extractor,
    "language_model": gpt2,
    "projection_model": projection,
    "text_encoder": clap,
    "text_encoder_2": t5,
    "tokenizer": roberta_tokenizer,
    "tokenizer_2": t5_tokenizer,
    "unet": unet,
    "vae": vae,
    "vocoder": vocoder,
}


def library(part: object) -> str:
    """What model_index.json calls the package of a part: "audioldm2" for classes beside diffusers' pipeline."""
    if "audioldm2" in type(part).__module__:
        return "audioldm2"
    return type(part).__module__.split(".")[0]


def save(folder: str | Path, **parts) -> Path:
    """Write a checkpoint of tiny parts in the published layout, some replaced by `parts`. Returns the folder."""
    folder = Path(folder)
    index = {"_class_name": "AudioLDM2Pipeline", "_diffusers_version": "0.21.0"}
    for name, build in PARTS.items():
        part = parts.get(name) or build()
        part.save_pretrained(folder / name)
        index[name] = [library(part), type(part).__name__]
    index["scheduler"] = ["diffusers", SCHEDULER["_class_name"]]
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER, indent=2))
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def diffusers_pipeline(folder: str | Path, dtype: torch.dtype = torch.float32) -> diffusers.AudioLDM2Pipeline:
    """diffusers' AudioLDM2Pipeline on `folder`, its GPT-2 wrapped in the class that can still generate."""
    pipeline = diffusers.AudioLDM2Pipeline.from_pretrained(folder, dtype=dtype)
    model = pipeline.language_model
    if isinstance(model, transformers.GPT2Model):
        with torch.device("meta"):
            head = transformers.GPT2LMHeadModel(model.config).eval()
        head.transformer, head.lm_head.weight = model, model.wte.weight
        pipeline.language_model = head
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
