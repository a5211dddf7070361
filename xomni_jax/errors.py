"""What ends a command with one line instead of a traceback."""

import argparse


class InputError(ValueError):
  """Bad input from a user: a file, a config, an argument or a record.

  The message is one line that says what, got, expected and what to do. The
  command line prints it without a traceback and exits with status 2.
  """


class RunError(Exception):
  """A run that can't go on, for a reason that lies in its course.

  The message is one line; what was saved before stays.
  """


class ArgumentParser(argparse.ArgumentParser):
  """Bad arguments are an InputError: one line, without the usage."""

  def error(self, message):
    raise InputError(f"{message} (see {self.prog} --help)")
