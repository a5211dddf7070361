"""Peak rates of devices, by the name that the driver or JAX gives them."""

# Memory bandwidth in TB/s and dense bf16 TFLOP/s of what JAX counts as one
# device: NVIDIA's data sheets, and Google's pages on TPU versions.
_PEAKS = {
  "A100-SXM4-40GB": (1.555, 312),
  "A100-PCIE-40GB": (1.555, 312),
  "A100 80GB PCIe": (1.935, 312),
  "A100-SXM4-80GB": (2.039, 312),
  "L4": (0.300, 121),
  "L40S": (0.864, 362),
  "H100 PCIe": (2.0, 756),
  "H100 NVL": (3.9, 835),
  "H100": (3.35, 989),  # SXM, "H100 80GB HBM3"
  "H200 NVL": (4.8, 835),
  "H200": (4.8, 989),
  "B200": (8.0, 2250),
  "TPU v4": (1.228, 275),
  "TPU v5 lite": (0.819, 197),
  "TPU v5e": (0.819, 197),
  "TPU v5": (2.765, 459),
  "TPU v5p": (2.765, 459),
  "TPU v6 lite": (1.640, 918),
  "TPU v6e": (1.640, 918),
  "TPU7x": (3.690, 1153.5),  # a chip has 2307, and is two devices
}


def rates(device: str) -> tuple[float | None, float | None]:
  """(TB/s, bf16 TFLOP/s) of a device by name; None where it is not known."""
  # As whole words, so that L4 is not found in L40S; a MIG slice has only a
  # share of its device's peak.
  names = [
    n for n in _PEAKS if f" {n} " in f" {device} " and "MIG" not in device
  ]
  return _PEAKS[max(names, key=len)] if names else (None, None)


def flops(device: str) -> float:
  """Dense bf16 FLOP/s of a device by name; 0: not known."""
  return (rates(device)[1] or 0.0) * 1e12
