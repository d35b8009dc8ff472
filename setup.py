"""Packaging of ldm2. Nothing is downloaded by it; LDM2_BUILD_KERNELS=1 makes it compile the CPU kernels."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
INIT = (HERE / "ldm2" / "__init__.py").read_text().splitlines()
VERSION = next(line.split('"')[1] for line in INIT if line.startswith("__version__"))

PLOT = ["matplotlib>=3.8"]
BATCH = ["pyarrow>=15"]
RAY = ["ray[data,serve]>=2.51"]
SERVE = ["fastapi>=0.115", "uvicorn>=0.30", "python-multipart>=0.0.18", "prometheus-client>=0.20"]
UI = [*SERVE, "gradio>=6.1,<7"]
TTS = ["phonemizer>=3.3"]
KERNELS = ["triton>=3.3; sys_platform == 'linux'"]
DEV = ["ruff>=0.15", "mypy>=2.0"]
DOCS = ["mkdocs-material>=9.6", "mkdocstrings[python]>=0.29"]
# What the tests compare with, and what they drive: a browser, a notebook, a cluster on this machine.
ORACLES = ["diffusers==0.42.1", "peft>=0.18", "scipy>=1.11"]
DRIVERS = ["httpx>=0.27", "selenium>=4.20", "nbclient>=0.10", "nbformat>=5.10", "ipykernel>=6.29"]
TEST = ["pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6", *ORACLES, *DRIVERS, *PLOT, *KERNELS, *BATCH, *RAY, *UI]

BUILD_KERNELS = os.environ.get("LDM2_BUILD_KERNELS") == "1"


class BuildPackages(build_py):
    """Copies the packages; then compiles the kernels against the PyTorch of the environment that is installed into."""

    def run(self):
        super().run()
        if not BUILD_KERNELS:
            return
        folder = HERE / "kernels" / "ldm2_kernels" if self.editable_mode else Path(self.build_lib) / "ldm2_kernels"
        # PYTHONPATH is how pip hides that environment from a build: a Python without it sees its PyTorch.
        paths = os.pathsep.join([str(HERE), str(HERE / "kernels")])
        command = [sys.executable, "-m", "ldm2.build_kernels", "--folder", str(folder.resolve())]
        if subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, cwd=HERE).returncode:
            raise SystemExit("LDM2_BUILD_KERNELS=1: the CPU kernels were not built")


class LDM2(Distribution):
    def has_ext_modules(self):
        """With compiled kernels the wheel is for one kind of machine."""
        return BUILD_KERNELS


setup(
    name="ldm2",
    version=VERSION,
    description="A from-scratch PyTorch implementation of AudioLDM 2: text to sound effects, music and speech",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="the ldm2 authors",
    license="Apache-2.0",
    keywords=["AudioLDM2", "text-to-audio", "latent diffusion", "PyTorch"],
    python_requires=">=3.11",
    packages=[*find_packages(include=["ldm2", "ldm2.*"]), "ldm2_kernels", "ldm2_kernels.csrc"],
    package_dir={"ldm2_kernels": "kernels/ldm2_kernels", "ldm2_kernels.csrc": "kernels/csrc"},
    package_data={
        "ldm2": ["py.typed", "*.pyi", "tiny/**/*", "serve/page/*.css", "serve/page/*.js"],
        "ldm2_kernels": ["py.typed"],
        "ldm2_kernels.csrc": ["*.cpp", "*.h"],
    },
    cmdclass={"build_py": BuildPackages},
    distclass=LDM2,
    install_requires=[
        "torch>=2.6",
        "safetensors>=0.5",
        "huggingface_hub>=1.20",
        "transformers>=5.2,<6",
        "numpy>=1.26",
        "soundfile>=0.13",
        "soxr>=0.5",
        "tqdm>=4.63",
    ],
    extras_require={"plot": PLOT, "batch": BATCH, "ray": RAY, "serve": SERVE, "ui": UI, "tts": TTS,
                    "kernels": KERNELS, "test": TEST, "dev": DEV, "docs": DOCS},
    entry_points={"console_scripts": ["ldm2=ldm2.__main__:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "License :: OSI Approved :: Apache Software License",
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: C++",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Multimedia :: Sound/Audio :: Sound Synthesis",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
