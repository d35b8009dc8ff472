"""Packaging of ldm2. Nothing is compiled or downloaded by it."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
INIT = (HERE / "ldm2" / "__init__.py").read_text().splitlines()
VERSION = next(line.split('"')[1] for line in INIT if line.startswith("__version__"))

PLOT = ["matplotlib>=3.8"]
TTS = ["phonemizer>=3.3"]
KERNELS = ["triton>=3.3; sys_platform == 'linux'"]
TEST = ["pytest>=8", "diffusers==0.42.1", "scipy>=1.11", *PLOT, *KERNELS]

setup(
    name="ldm2",
    version=VERSION,
    description="AudioLDM2 written anew: text in, sound, music or speech out",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["ldm2", "ldm2.*"]), "ldm2_kernels"],
    package_dir={"ldm2_kernels": "kernels/ldm2_kernels"},
    package_data={"ldm2": ["tiny/**/*"]},
    install_requires=[
        "torch>=2.6",
        "safetensors>=0.5",
        "huggingface_hub>=1.0",
        "transformers>=5.0,<6",
        "numpy>=1.26",
        "soundfile>=0.13",
        "soxr>=0.5",
        "tqdm>=4.60",
    ],
    extras_require={"plot": PLOT, "tts": TTS, "kernels": KERNELS, "test": TEST},
    entry_points={"console_scripts": ["ldm2=ldm2.__main__:main"]},
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "License :: OSI Approved :: Apache Software License",
        "Topic :: Multimedia :: Sound/Audio :: Sound Synthesis",
    ],
)
