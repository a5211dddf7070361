"""The one exception that stands for bad input."""


class InputError(ValueError):
  """Bad input from a user: a file, a config, an argument or a record.

  The message is one line that says what, got, expected and what to do. The
  command line prints it without a traceback and exits with status 2.
  """
