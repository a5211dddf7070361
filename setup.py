"""Packaging. Ranges here; tested pins in requirements-tpu.txt and
launch/requirements-cpu.txt."""

import pathlib

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent

# Reading and writing `.pt` files, and parity tests: the model needs no torch.
TORCH = ["torch>=2.6"]

TRAIN = [
  "array_record>=0.8.6",
  "grain>=0.2.18",
  "httpx2>=2.16",  # asks reward servers
  "matplotlib>=3.10",  # its wheel brings the fonts of the drawn world
  "onnxruntime>=1.32",
  # rapidocr names no OpenCV, of which a server needs the one without windows.
  "opencv-python-headless>=5.0",
  "optax>=0.2.8",
  "orbax-checkpoint>=0.12.8",
  "pyarrow>=20",
  "rapidocr>=3.10",  # its wheel brings the weights of the OCR reward
  "tensorboardX>=2.6",
]
TEXT = ["tensorflow-text>=2.21"]  # imported only where a config asks for it
CHINESE = ["pylopdf-fonts-zh-cn>=0.1.1"]  # the font of Chinese signs, 17 MB

setup(
  name="xomni-jax",
  version="0.1.0",
  description="X-Omni in JAX/Flax: autoregressive image generation with RL",
  long_description=(HERE / "README.md").read_text(encoding="utf-8"),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  python_requires=">=3.11",
  packages=find_packages(include=["xomni_jax*"]),
  package_data={"xomni_jax": ["tiny/**"], "xomni_jax.data": ["words.txt"]},
  install_requires=[
    "absl-py>=2.1",
    "einops>=0.8",
    "flax>=0.12.8",
    "huggingface_hub>=1.0",
    "jax>=0.10.2",
    "jinja2>=3.1",  # chat templates
    "ml_collections>=1.1",
    "ml_dtypes>=0.5",
    "msgpack>=1.0",
    "numpy>=2.0",
    "pillow>=11",
    "protobuf>=5",
    "safetensors>=0.6",
    "sentencepiece>=0.2",
    "tokenizers>=0.22",
    "tqdm>=4.66",
    "transformers>=5.0",  # tokenizers only
  ],
  extras_require={
    "train": TRAIN,
    "cpu": [*TORCH, *TRAIN],
    "tpu": ["jax[tpu]>=0.10.2", "diffusers>=0.42", *TRAIN, *TEXT],
    "gpu": [
      "jax[cuda13]>=0.10.2",
      "diffusers>=0.42",
      *TORCH,
      *TRAIN,
      *TEXT,
    ],
    # Of a reward server; what its model needs, launch/sidecar.sh adds.
    "sidecar": [
      "fastapi>=0.115",
      "ml_collections>=1.1",  # configs/sidecar.py
      "ray[serve]>=2.60",
      "requests>=2.32",  # asks judges
      "uvicorn>=0.30",
      *TORCH,
    ],
    "eval": ["lmms-eval>=0.7.3"],
    "zh": CHINESE,
    "dev": [
      "diffusers>=0.42",
      "fastapi>=0.115",
      "import-linter>=2.1",
      "libtpu>=0.0.52; platform_machine == 'x86_64'",
      "pytest>=8.3",
      "pytest-xdist>=3.6",
      "requests>=2.32",
      "ruff>=0.12",
      "uvicorn>=0.30",
      *TORCH,
      *TRAIN,
      *TEXT,
      *CHINESE,
    ],
  },
  entry_points={"console_scripts": ["xomni=xomni_jax.cli:main"]},
)
