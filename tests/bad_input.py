"""What the tests of bad input share."""


def models(tree, flux=True):
  flags = ["--model", tree / "xomni"]
  return [*flags, "--flux", tree / "flux1"] if flux else flags


def truncate(path):
  data = path.read_bytes()
  path.write_bytes(data[: len(data) // 2])
