"""Finds and loads configurations: presets by name, files of the user's own by path."""

import difflib
import importlib
import inspect
import pkgutil
import types
from pathlib import Path

import ml_collections

from dreamerv3_jax import configs, startup
from dreamerv3_jax.configs import base
from dreamerv3_jax.errors import UserError, nearest
from dreamerv3_jax.settings import path_of


def names() -> list[str]:
    """Returns the names of the presets, sorted."""
    found = (module.name for module in pkgutil.iter_modules(configs.__path__))
    return sorted(name for name in found if name != 'base')


def describe(name: str) -> str:
    """Returns the first line of a preset's docstring."""
    return (inspect.getdoc(_preset_module(name)) or '').partition('\n')[0]


def of_suite(env_id: str) -> str:
    """Returns the first preset of an environment's suite, '' where it is of none."""
    suite, slash, _ = env_id.partition('/')
    ids = {name: load_config(name).env.id for name in names()} if slash else {}
    return next((name for name, found in ids.items() if found.startswith(f'{suite}/')), '')


def load_config(spec: str) -> ml_collections.ConfigDict:
    """Loads a configuration.

    Args:
      spec: `preset`, `preset:size`, `path/to/file.py` or `path/to/file.py:size`. A file defines
        `get_config()`, or `get_config(size)`, that returns what `configs/base.py` returns, changed.

    Returns:
      The settings, unlocked and independent of earlier calls.

    Raises:
      UserError: there is no such preset, file or size, or the file does not do its part.
    """
    source, size = split_spec(spec)
    if spec.endswith(':'):
        raise UserError(f'{spec!r} lacks a size; choose one of {", ".join(base.SIZES)}.')
    module = _file_module(path_of(source)) if _is_path(source) else _preset_module(source)
    get_config = getattr(module, 'get_config', None)
    if not callable(get_config):
        raise UserError(f'{source} must define get_config().')
    if size and not inspect.signature(get_config).parameters:
        raise UserError(f'get_config() of {source} takes no size; leave :{size} out.')
    if size and size not in base.SIZES:
        raise UserError(f'There is no size {size!r}{nearest(size, base.SIZES)}')
    try:
        config = get_config(size) if size else get_config()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f'get_config() of {source} failed: {_one_line(error)}.') from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(f'get_config() of {source} must return an ml_collections.ConfigDict.')
    return config


def split_spec(spec: str) -> tuple[str, str]:
    """Splits `source:size` into source and size, '' where no size is given."""
    source, colon, size = spec.rpartition(':')
    if not colon or '/' in size or '\\' in size:  # the colon of a Windows drive is none of ours
        return spec, ''
    return source, size


def source_name(spec: str) -> str:
    """Returns the preset's name, or the file's without folder and ending."""
    source, _ = split_spec(spec)
    return Path(source).stem if _is_path(source) else source


def _is_path(source: str) -> bool:
    return source.endswith('.py') or '/' in source or '\\' in source


def _preset_module(name: str) -> types.ModuleType:
    if name not in names():
        raise UserError(f'There is no preset {name!r}{nearest(name, names())}')
    return importlib.import_module(f'{configs.__name__}.{name}')


def _file_module(path: Path) -> types.ModuleType:
    """Runs a file as a module; unlike an import this leaves no byte code next to it."""
    try:
        source = path.read_text(encoding='utf-8')
    except FileNotFoundError:
        siblings = [str(other) for other in path.parent.glob('*.py')]
        close = difflib.get_close_matches(str(path), siblings, n=1)
        hint = f'did you mean {close[0]}' if close else 'give the path of a Python file'
        raise UserError(f'There is no file {path}; {hint}{"?" if close else "."}') from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'{path} cannot be read: {_one_line(error)}.') from error
    startup.find_modules_here()
    module = types.ModuleType(path.stem)
    module.__file__ = str(path)
    try:
        exec(compile(source, str(path), 'exec'), module.__dict__)
    except Exception as error:
        raise UserError(f'{path} failed: {_one_line(error)}.') from error
    return module


def _one_line(error: Exception) -> str:
    return ' '.join(f'{type(error).__name__}: {error}'.split()).rstrip('.')
