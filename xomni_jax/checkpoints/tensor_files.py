"""Reading the weight files of a released checkpoint, tensor by tensor."""

import contextlib
import dataclasses
import pathlib
import warnings
from collections.abc import Callable, Iterator

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from xomni_jax.checkpoints.released_config import read_json
from xomni_jax.errors import InputError

_DTYPES = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
}


@dataclasses.dataclass(frozen=True)
class TensorFile:
  """One weight file: what it holds, read from its header.

  Attributes:
    path: the file.
    shapes, dtypes: by PyTorch key.
  """

  path: pathlib.Path
  shapes: dict[str, tuple[int, ...]]
  dtypes: dict[str, np.dtype]

  @contextlib.contextmanager
  def open(self) -> Iterator[Callable[[str], np.ndarray]]:
    """A function that reads one tensor; the file is mapped, not loaded."""
    if self.path.suffix == ".pt":
      yield _read_pt(self.path).__getitem__
      return
    with _safetensors(self.path) as handle:
      yield handle.get_tensor


@contextlib.contextmanager
def _safetensors(path):
  try:
    with safe_open(path, framework="numpy") as handle:
      yield handle
  except FileNotFoundError:
    raise InputError(
      f"{path}: no such file; the checkpoint lacks it, fetch it again"
    ) from None
  except (SafetensorError, OSError) as e:
    raise InputError(
      f"{path}: not a whole safetensors file ({e}); fetch it again"
    ) from None


def safetensors_file(path: pathlib.Path) -> TensorFile:
  """The header of a safetensors file.

  Raises:
    InputError: it is missing, cut short or of an unknown dtype.
  """
  shapes, dtypes = {}, {}
  with _safetensors(path) as handle:
    for key in handle.keys():  # noqa: SIM118, a handle is no dict
      info = handle.get_slice(key)
      shapes[key] = tuple(info.get_shape())
      dtypes[key] = _DTYPES.get(info.get_dtype())
      if dtypes[key] is None:
        raise InputError(
          f"{path}: {key} is {info.get_dtype()}, expected one of "
          f"{', '.join(_DTYPES)}"
        )
  return TensorFile(path, shapes, dtypes)


def _read_pt(path):
  """{key: array} of a pickled state dict, mapped where its format can be."""
  try:
    import torch
  except ImportError:
    raise InputError(
      f"{path}: reading a .pt file needs torch; install it, or put the same "
      f"tensors beside it as {path.with_suffix('.safetensors').name}"
    ) from None
  try:
    with path.open("rb") as file:
      mapped = file.read(4) == b"PK\3\4"  # before PyTorch 1.6: no zip file
    with warnings.catch_warnings(action="ignore"):  # of other pickles' versions
      state = torch.load(
        path, map_location="cpu", mmap=mapped, weights_only=True
      )
  except FileNotFoundError:
    raise InputError(f"{path}: no such file; fetch it again") from None
  except Exception as e:  # whatever a spoilt pickle may raise
    reason = str(e).strip().split("\n")[0] or type(e).__name__
    raise InputError(
      f"{path}: not a whole file of weights alone ({reason})"
    ) from None
  if not isinstance(state, dict) or not all(
    isinstance(v, torch.Tensor) for v in state.values()
  ):
    raise InputError(f"{path}: not a state dict, expected names to tensors")

  def array(key, tensor):
    tensor, kind = tensor.detach(), str(tensor.dtype).removeprefix("torch.")
    if kind not in [dtype.name for dtype in _DTYPES.values()]:
      raise InputError(
        f"{path}: {key} is {kind}, expected one of {', '.join(_DTYPES)}"
      )
    if tensor.dtype == torch.bfloat16:  # unknown to numpy, bits kept
      return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()

  return {key: array(key, tensor) for key, tensor in state.items()}


def pt_file(path: pathlib.Path) -> TensorFile:
  """A `.pt` state dict, or the `.safetensors` file in its place."""
  other = path.with_suffix(".safetensors")
  if other.exists():
    return safetensors_file(other)
  state = _read_pt(path)
  return TensorFile(
    path,
    {key: array.shape for key, array in state.items()},
    {key: array.dtype for key, array in state.items()},
  )


def folder_files(folder: pathlib.Path, stem: str) -> list[TensorFile]:
  """The safetensors files of a folder: one, or shards with an index.

  Args:
    folder: where they are.
    stem: "model" or "diffusion_pytorch_model".
  Raises:
    InputError: there are none, a shard is missing or cut short, the index
      points outside its folder, or index and shards disagree.
  """
  index = folder / f"{stem}.safetensors.index.json"
  if not index.exists():
    return [safetensors_file(folder / f"{stem}.safetensors")]
  where = read_json(index).get("weight_map")
  if not isinstance(where, dict) or not where:
    raise InputError(f"{index}: no weight_map; fetch it again")
  names = sorted({str(name) for name in where.values()})
  # Names alone are looked at: a hub cache's files are links out of the folder.
  outside = [n for n in names if pathlib.PurePath(n).name != n or n == ".."]
  if outside:
    raise InputError(
      f"{index}: points outside its folder: {', '.join(outside)}; expected "
      "plain file names"
    )
  absent = [name for name in names if not (folder / name).exists()]
  if absent:
    raise InputError(
      f"{folder}: missing shards {', '.join(absent)} of {len(names)}; "
      "fetch them again"
    )
  files = [safetensors_file(folder / name) for name in names]
  found = {key: file.path.name for file in files for key in file.shapes}
  wrong = sorted(
    key
    for key in found.keys() | where.keys()
    if found.get(key) != where.get(key)
  )
  if wrong:
    raise InputError(
      f"{index}: {len(wrong)} tensors are not in the shard it names: "
      f"{', '.join(wrong)}"
    )
  return files
