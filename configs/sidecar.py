"""Servers of rewards: applications, replicas, GPU shares, batches, limits.

  ./launch/sidecar.sh ocr

serves one application in an environment of its own, on 127.0.0.1; a training
run on another machine reaches it through a tunnel, or set a host and the token
XOMNI_SIDECAR_TOKEN:

  XOMNI_SIDECAR_TOKEN=... ./launch/sidecar.sh hps --set host=0.0.0.0

Replicas are as many as a large machine has room for; on a smaller one

  ./launch/sidecar.sh ocr --set replicas=2

The judges ask a vLLM server, which is started apart:

  vllm serve CodeGoat24/UnifiedReward-qwen-7b --port 8000
  vllm serve Qwen/Qwen2.5-VL-32B-Instruct --port 8001 --tensor-parallel-size 2
"""

from ml_collections import ConfigDict


def get_config(size: str = "7b") -> ConfigDict:
  """Settings as in `xomni_jax.sidecar.settings.App`, defaults unsaid."""
  sizes = {"7b": _full, "tiny": _tiny}
  if size not in sizes:
    raise ValueError(f"size is {size!r}, expected one of {', '.join(sizes)}")
  return ConfigDict(sizes[size]())


def _full():
  """A GPU machine, or several: about one GPU beside those of vLLM."""
  return {
    "host": "127.0.0.1",
    "token_env": "XOMNI_SIDECAR_TOKEN",
    "timeout_s": 50.0,  # less than a client's try: half of its deadline, 120
    "max_items": 64,
    "max_bytes": 128 * 2**20,  # 64 PNG of 1024 px, some 1.5 MB each
    "max_pixels": 2048 * 2048,
    "applications": {
      "ocr": {
        "reward": "ocr",
        "settings": {"engine": "rapidocr", "threads": 1},
        "port": 8101,
        "replicas": 16,  # CPU: processes scale better than threads
        "max_batch": 4,
      },
      "paddleocr": {
        "reward": "ocr",
        "settings": {"engine": "paddleocr"},
        "port": 8102,
        "replicas": 2,
        "num_gpus": 0.2,
        "max_batch": 16,
      },
      "got": {
        "reward": "ocr",
        "settings": {"engine": "got", "model": "stepfun-ai/GOT-OCR-2.0-hf"},
        "port": 8103,
        "replicas": 2,
        "num_gpus": 0.2,
        "max_batch": 16,
        "timeout_s": 120.0,
      },
      "tesseract": {
        "reward": "ocr",
        "settings": {"engine": "tesseract", "threads": 1},
        "port": 8104,
        "replicas": 8,
        "max_batch": 4,
      },
      "hps": {
        "reward": "hps",
        "settings": {
          "checkpoint": "weights/HPS_v2.1_compressed.pt",
          "version": "2.1",
        },
        "port": 8105,
        "replicas": 1,
        "num_gpus": 0.2,
        "max_batch": 64,
      },
      "unified_reward": {
        "reward": "unified_reward",
        "settings": {
          "url": "http://127.0.0.1:8000/v1",
          "model": "CodeGoat24/UnifiedReward-qwen-7b",
          "max_tokens": 512,
          "extra": _VLLM,
          "concurrency": 32,
        },
        "port": 8106,
        # vLLM makes the real batches; here each image is on its own.
        "max_batch": 1,
        "max_batches": 32,
        "timeout_s": 120.0,
      },
      "qwen_alignment": {
        "reward": "qwen_alignment",
        "settings": {
          "url": "http://127.0.0.1:8001/v1",
          "model": "Qwen/Qwen2.5-VL-32B-Instruct",
          "extra": _VLLM,
          "concurrency": 32,
        },
        "port": 8107,
        "max_batch": 1,
        "max_batches": 32,
        "timeout_s": 120.0,
      },
    },
  }


# Fields of vLLM's own, pinned: the models' files set a repetition penalty of
# 1.05, and the number of pixels decides what a judge can read.
_VLLM = {
  "repetition_penalty": 1.0,
  "mm_processor_kwargs": {
    "min_pixels": 56 * 56,
    "max_pixels": 1024 * 1024 // 784 * 784,  # whole tokens of 28 px
  },
}


def _tiny():
  """Two CPU cores."""
  config = _full()
  for app in config["applications"].values():
    app |= {"replicas": 1, "num_gpus": 0.0}
    app["max_batch"] = min(8, app["max_batch"])
  return config
