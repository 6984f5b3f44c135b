"""The wheel holds all that a user needs outside the checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ('pyproject.toml', 'README.md', 'LICENSE', 'dreamerv3_jax', 'configs')


@pytest.mark.medium
def test_presets_work_from_a_wheel(tmp_path):
    source = tmp_path / 'source'
    source.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    command = [sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps', '--wheel-dir']
    subprocess.run([*command, tmp_path, source], check=True, capture_output=True)
    (wheel,) = tmp_path.glob('*.whl')
    installed = tmp_path / 'installed'
    zipfile.ZipFile(wheel).extractall(installed)
    assert (installed / 'dreamerv3_jax' / 'py.typed').exists()
    code = (
        'from dreamerv3_jax import cli, configs; print(configs.__file__); '
        "raise SystemExit(cli.main(['presets']))"
    )
    result = subprocess.run(
        [sys.executable, '-c', code],
        cwd=tmp_path,
        env=os.environ | {'PYTHONPATH': str(installed)},
        capture_output=True,
        text=True,
    )
    first, *rest = result.stdout.splitlines()
    assert Path(first).is_relative_to(installed), result.stderr
    assert result.returncode == 0 and any('A drone' in line for line in rest)
