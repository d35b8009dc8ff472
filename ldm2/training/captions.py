"""Captions without sounds: common ones, for a teacher that makes the sounds itself."""

from __future__ import annotations

from itertools import product

SOURCES = (
    "a dog barking", "a cat meowing", "birds singing", "a rooster crowing", "crickets chirping", "frogs croaking",
    "a horse galloping", "sheep bleating", "bees buzzing", "an owl hooting", "rain falling", "heavy rain on a roof",
    "thunder rumbling", "wind howling", "waves breaking on a beach", "a river flowing", "water dripping",
    "water pouring into a glass", "a fire crackling", "leaves rustling", "footsteps on gravel", "footsteps on snow",
    "a door creaking", "a door slamming", "knocking on wood", "glass breaking", "paper being torn", "keys jingling",
    "coins falling on a table", "typing on a keyboard", "a clock ticking", "an alarm clock ringing",
    "a telephone ringing", "a vacuum cleaner running", "a washing machine spinning", "food sizzling in a pan",
    "somebody chopping vegetables", "a kettle whistling", "a saw cutting wood", "hammering on metal",
    "a drill in a wall", "a car passing by", "a car engine starting", "a motorcycle accelerating", "a train passing",
    "a train horn", "an airplane flying over", "a helicopter hovering", "a siren of an ambulance", "a boat engine",
    "a crowd cheering", "people talking in a room", "a man speaking", "a woman speaking", "a child laughing",
    "a baby crying", "somebody whistling a tune", "people clapping", "somebody coughing", "a choir singing",
    "a church bell ringing", "a piano playing a slow melody", "an acoustic guitar", "an electric guitar solo",
    "a violin playing", "a cello playing long notes", "a flute melody", "a trumpet fanfare", "a saxophone solo",
    "a drum beat", "hand drums", "a bass line", "a synthesizer pad", "a music box", "techno music with a strong beat",
    "calm ambient music", "a jazz band", "an orchestra playing", "a folk song", "rock music with drums and guitars",
    "white noise", "a low hum", "a high beep", "a sweep of rising pitch",
)
PLACES = ("", "{}, loud and close", "{}, quiet and far away", "{} in a large hall", "{} in the rain",
          "{} with birds in the background", "{}, then silence", "a recording of {}")


def common() -> list[str]:
    """Captions of common sounds and music."""
    return [(place or "{}").format(source) for source, place in product(SOURCES, PLACES)]
