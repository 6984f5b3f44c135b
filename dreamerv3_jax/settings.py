"""Changes settings from the command line and checks them before anything starts."""

import ast
import contextlib
import difflib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from dreamerv3_jax.config import AgentConfig
from dreamerv3_jax.configs import base
from dreamerv3_jax.errors import UserError, nearest

_KINDS = {int: 'a whole number', float: 'a number', bool: 'true or false', str: 'text'}
_KEYWORDS = 'env.kwargs.'  # the one group whose keys are the environment's business
_CHOICES = {
    'env.vectorization': ('auto', 'sync', 'async', 'native'),
    'env.autoreset': ('next_step', 'same_step'),
}
MOST_SEED = 2**32 - 1
_MOST = 2**31 - 1  # JAX counts with 32 bits
_AT_LEAST = {
    'seed': 0,
    'env.num_envs': 1,
    'env.repeat': 1,
    'replay.batch_size': 1,
    'replay.batch_length': 2,
    'run.steps': 1,
    'mesh.fsdp': 1,
    'hosts.count': 0,
    'hosts.index': 0,
}
_AT_MOST = {
    'seed': MOST_SEED,
    'env.num_envs': 2**16,
    'run.steps': None,
    'replay.capacity': None,  # as there is memory
}
_POSITIVE = (
    'replay.train_ratio',
    'run.log_every',
    'run.checkpoint_every',
    'env.timeout',
)


def override(config: ml_collections.ConfigDict, key: str, text: str | None) -> None:
    """Sets one field of a configuration, in place, from text.

    The value takes the type of the field; whole numbers may be written as `1e6`. A new key is
    allowed in `env.kwargs` only, with a Python literal as value and anything else taken as text.

    Args:
      config: the settings.
      key: a dotted name, such as `replay.batch_size`.
      text: the value, or None where none was given, which switches on a boolean field.

    Raises:
      UserError: the key does not exist or the value does not fit its field.
    """
    fields = dict(_flatten(config))
    kind = type(fields.get(key))
    if key.startswith(_KEYWORDS):
        _set_keyword(config, key, text)
        return
    if key not in fields:
        raise UserError(_unknown_key(key, fields))
    if text is None and kind is not bool:
        raise UserError(f'--config.{key} needs a value, as in --config.{key}={fields[key]}.')
    value = 'true' if text is None else _plain_digits(text) if kind is int else text
    arguments = ['', f'--config.{key}={value}']  # absl takes the first for the program's name
    flag_values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict(
            'config', config, flag_values=flag_values, lock_config=False, sys_argv=arguments
        )
        flag_values(arguments)
    except (flags.Error, TypeError, ValueError):
        raise UserError(f'--config.{key} takes {_KINDS[kind]}, not {text!r}.') from None


def validate(config: ml_collections.ConfigDict) -> None:
    """Checks that the settings are complete, of the right types and possible together.

    Raises:
      UserError: with the setting to change.
    """
    expected = dict(_flatten(base.get_config()))
    fields = {key: value for key, value in _flatten(config) if not key.startswith(_KEYWORDS)}
    for key, value in fields.items():
        if key not in expected:
            raise UserError(_unknown_key(key, expected))
        kind = type(expected[key])
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise UserError(f'config.{key} takes {_KINDS[kind]}, not {value!r}.')
        if kind is float and not math.isfinite(value):
            raise UserError(f'config.{key} must be finite, not {value}.')
    missing = sorted(set(expected) - set(fields))
    if missing:
        raise UserError(f'The settings lack {", ".join(missing)}; start from configs/base.py.')
    _check_keys(config.env.kwargs.to_dict())
    AgentConfig.from_mapping(config.agent.to_dict())
    _check_ranges(fields)


def _check_keys(value: Any) -> None:
    """Refuses what would come back from JSON as something else."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            if not isinstance(key, str):
                raise UserError(
                    f'config.env.kwargs has a dictionary with the key {key!r}; a run is kept as '
                    f'JSON, where keys are text: make it {str(key)!r}.'
                )
            _check_keys(part)
    elif isinstance(value, list | tuple):
        for part in value:
            _check_keys(part)


def run_folder(config: ml_collections.ConfigDict, preset: str) -> Path:
    """Returns where a run is kept: by default where the same command would look for it again."""
    if config.logdir:
        return path_of(config.logdir)
    environment = re.sub(r'[^\w.-]+', '_', config.env.id)
    return path_of(f'runs/{preset}-{environment}-{config.size}-seed{config.seed}')


def path_of(name: str) -> Path:
    """Returns the path that a user wrote, `~` resolved.

    Raises:
      UserError: there can be no such path.
    """
    try:
        path = Path(name).expanduser()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.stat()
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, 'strerror', None) or str(error).rstrip('.')
        raise UserError(f'{name!r} is no path that can be used: {reason}.') from error
    return path


def _check_ranges(fields: dict[str, Any]) -> None:
    if not fields['env.id'].strip():
        raise UserError('Name the environment, as in --config.env.id=CartPole-v1.')
    for key, choices in _CHOICES.items():
        if fields[key] not in choices:
            raise UserError(
                f'config.{key} cannot be {fields[key]!r}{nearest(fields[key], choices)}'
            )
    for key, least in _AT_LEAST.items():
        if fields[key] < least:
            raise UserError(f'config.{key} must be at least {least}, not {fields[key]}.')
    for key in _POSITIVE:
        if fields[key] <= 0:
            raise UserError(f'config.{key} must be positive, not {fields[key]}.')
    for key, value in fields.items():
        most = _AT_MOST.get(key, _MOST)
        if type(value) is int and most is not None and value > most:
            raise UserError(f'config.{key} must be at most {most}, not {value}.')
    side = fields['env.image_size']
    if side and (side % 16 or not 48 <= side <= 256):
        raise UserError(
            f'config.env.image_size must be 0 or a multiple of 16 from 48 to 256, not {side}.'
        )
    devices = fields['mesh.data']
    if devices < 1 and devices != -1:
        raise UserError(
            f'config.mesh.data must be a number of devices, or -1 for all, not {devices}.'
        )
    count, named = fields['hosts.count'], fields['hosts.coordinator']
    if fields['hosts.index'] >= max(count, 1):
        raise UserError(
            f'config.hosts.index counts from 0 and must be below config.hosts.count={count}, '
            f'not {fields["hosts.index"]}.'
        )
    port = re.fullmatch(r'\S+:([1-9]\d{0,4})', named)
    right = port and int(port[1]) < 2**16 if count > 1 else not named
    if not right:
        raise UserError(
            'config.hosts.coordinator (address:port of the first host) and config.hosts.count go '
            f'together, as in --config.hosts.coordinator=10.0.0.1:1234 --config.hosts.count=2; '
            f'they are {named!r} and {count}.'
        )
    sequences = max(fields['env.num_envs'], fields['replay.batch_size'])
    least = sequences * (fields['replay.batch_length'] + 1)
    if fields['replay.capacity'] < least:
        raise UserError(
            f'config.replay.capacity must hold a batch and a sequence of every environment, '
            f'{least} steps, not {fields["replay.capacity"]}.'
        )


def _flatten(config: ml_collections.ConfigDict, prefix: str = '') -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            yield from _flatten(value, f'{prefix}{name}.')
        else:
            yield f'{prefix}{name}', value


def _set_keyword(config: ml_collections.ConfigDict, key: str, text: str | None) -> None:
    name = key.removeprefix(_KEYWORDS)
    if not name.isidentifier():
        raise UserError(f'--config.{key} does not name an argument of the environment.')
    if text is None:
        if not isinstance(config.env.kwargs.get(name), bool):
            raise UserError(f'--config.{key} needs a value, as in --config.{key}=1.')
        text = 'true'
    try:
        value = ast.literal_eval({'true': 'True', 'false': 'False'}.get(text, text))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = text
    arguments = config.env.kwargs
    if isinstance(arguments.get(name), bool):
        if isinstance(value, str):
            raise UserError(f'--config.{key} takes true or false, not {text!r}.')
        value = bool(value) if value in (0, 1) else value
    try:
        with config.unlocked():
            if name in arguments:  # another type than before would be refused
                del arguments[name]
            arguments[name] = value
    except (TypeError, ValueError, KeyError):
        raise UserError(f'--config.{key} cannot be set to {text!r}.') from None


def _plain_digits(text: str) -> str:
    """Writes a whole number in scientific notation out, and leaves other text alone."""
    try:
        number = float(text)
        return str(int(number)) if 'e' in text.lower() and number.is_integer() else text
    except ValueError:
        return text


def _unknown_key(key: str, fields: dict[str, Any]) -> str:
    members = [field for field in fields if field.startswith(f'{key}.')]
    if members or f'{key}.' == _KEYWORDS:
        example = members[0] if members else f'{key}.NAME'
        return f'config.{key} is a group of settings; set one of them, as in --config.{example}=...'
    close = nearest_key(key, fields)
    hint = f'; did you mean config.{close}?' if close else '; configs/base.py lists them all.'
    return f'There is no setting config.{key}{hint}'


def names() -> list[str]:
    """Returns the dotted names of all settings."""
    return [key for key, _ in _flatten(base.get_config())]


def nearest_key(key: str, keys: Iterable[str]) -> str:
    """Returns the setting whose name, or the last part of it, is most like `key`; '' if none is."""
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.75)
    leaves = {name.rpartition('.')[2]: name for name in keys}
    if not close:
        leaf = key.rpartition('.')[2]
        close = [leaves[name] for name in difflib.get_close_matches(leaf, leaves, n=1)]
    return close[0] if close else ''
