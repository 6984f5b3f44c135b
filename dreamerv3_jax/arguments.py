"""What the commands of the command line share: how options are read and mistakes answered."""

import argparse
import difflib
from collections.abc import Iterable
from typing import NoReturn

import ml_collections

from dreamerv3_jax import presets, settings
from dreamerv3_jax.errors import UserError, nearest

PROGRAM = 'dreamerv3-jax'


def split_overrides(arguments: list[str]) -> tuple[list[tuple[str, str | None]], list[str]]:
    """Separates `--config.key=value` and `--config.key value` from the other arguments."""
    overrides: list[tuple[str, str | None]] = []
    rest: list[str] = []
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        if not argument.startswith('--config.'):
            rest.append(argument)
            continue
        key, equals, text = argument.removeprefix('--config.').partition('=')
        value: str | None = text
        if not equals:
            separate = bool(remaining) and not remaining[0].startswith('--')
            value = remaining.pop(0) if separate else None
        overrides.append((key, value))
    return overrides, rest


class Parser(argparse.ArgumentParser):
    """Parses the options of one command and answers mistakes with a `UserError`.

    Options that look like one of `keys`, names of settings, are answered with how to write it.
    """

    def __init__(self, keys: Iterable[str] = ()) -> None:
        super().__init__(add_help=False, allow_abbrev=False)
        self._keys = list(keys)

    def parse(self, arguments: list[str]) -> argparse.Namespace:
        """Parses the arguments; what is left over is a mistake."""
        options, unknown = self.parse_known_args(arguments)
        if not unknown:
            return options
        name = unknown[0].partition('=')[0]
        if not name.startswith('-'):
            raise UserError(f'{name!r} is one argument too many; options are written --name=value.')
        known = [string for action in self._actions for string in action.option_strings]
        key = settings.nearest_key(name.lstrip('-'), self._keys)
        if key and not difflib.get_close_matches(name, known, cutoff=0.9):
            raise UserError(f'There is no option {name}; did you mean --config.{key}?')
        raise UserError(f'There is no option {name}{nearest(name, [*known, "--help"])}')

    def error(self, message: str) -> NoReturn:
        """Answers a mistake that argparse has found."""
        raise UserError(f'{message.removeprefix("argument ").replace(": ", " ", 1)}.')


def build_config(
    spec: str, overrides: list[tuple[str, str | None]]
) -> tuple[ml_collections.ConfigDict, str]:
    """Returns the settings, changed by the overrides, and the preset's name."""
    if not spec:
        raise UserError(
            f'Choose a preset, as in --config=quickstart; "{PROGRAM} presets" lists them.'
        )
    # The size decides about other settings, so it has to be known first.
    for key, value in overrides:
        if key == 'size':
            if not value:
                raise UserError('--config.size needs a value, as in --config.size=size12m.')
            spec = f'{presets.split_spec(spec)[0]}:{value}'
    config = presets.load_config(spec)
    for key, value in overrides:
        if key != 'size':
            settings.override(config, key, value)
    return config, presets.source_name(spec)


def whole_number(text: str) -> int:
    """Type of an option that takes a whole number."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f'takes a whole number, not {text!r}') from None
