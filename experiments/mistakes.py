"""Puts each known mistake into a copy of the code and sees the tests fail.

python experiments/mistakes.py [WORD ...]

Takes some minutes; words select the mistakes that contain them. Exits with 1 if a mistake is not
noticed, or if a text to replace is gone.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parent.parent


class Mistake(NamedTuple):
    name: str
    file: str  # below dreamerv3_jax
    right: str
    wrong: str
    tests: str  # file of tests, with -k after a blank


MISTAKES = (
    Mistake(
        'lambda-return off by one', 'returns.py',
        'reward[:, 1:], continue_[:, 1:], value[:, 1:]',
        'reward[:, :-1], continue_[:, 1:], value[:, 1:]', 'test_returns.py',
    ),
    Mistake(
        'gradient of the norm left out', 'nets/layers.py',
        'x * inverse_rms(x, axes)', 'x * jax.lax.stop_gradient(inverse_rms(x, axes))',
        'test_layers.py',
    ),
    Mistake(
        'action paired with the wrong step', 'world_model.py',
        'lambda x: x[:, :-1], batch.action', 'lambda x: x[:, 1:], batch.action',
        'test_total_loss.py',
    ),
    Mistake(
        'free bits per group', 'losses.py',
        'dynamics = jnp.sum(distributions.categorical_kl(sg(log_posterior), log_prior), -1)',
        'dynamics = jnp.sum(jnp.maximum(free_nats, '
        'distributions.categorical_kl(sg(log_posterior), log_prior)), -1)', 'test_losses.py',
    ),
    Mistake(
        'KL without unimix', 'rssm.py',
        "dynamics(params, latent.deter, method='prior'), unimix)",
        "dynamics(params, latent.deter, method='prior'), 0.0)", 'test_rssm.py',
    ),
    Mistake(
        'balance of the KL losses swapped', 'losses.py',
        'return jnp.maximum(free_nats, dynamics), jnp.maximum(free_nats, representation)',
        'return jnp.maximum(free_nats, representation), jnp.maximum(free_nats, dynamics)',
        'test_losses.py',
    ),
    Mistake(
        'previous action not reset', 'rssm.py',
        'kept = jnp.where(is_first[..., None], jnp.zeros((), action.dtype), action)',
        'kept = action', 'test_rssm.py',
    ),
    Mistake(
        'state not reset', 'rssm.py',
        'deter, stoch = (_mask(jnp.logical_not(is_first), x) for x in latent)',
        'deter, stoch = latent', 'test_rssm.py',
    ),
    Mistake(
        'reset one step late under next-step autoreset', 'envs/native.py',
        'first = self._ended  #', 'first = np.zeros_like(self._ended)  #', 'test_envs.py -k native',
    ),
    Mistake(
        'time limit taken for death by the environment', 'envs/stream.py',
        'last=True, terminal=bool(terminated))', 'last=True, terminal=True)', 'test_envs.py',
    ),
    Mistake(
        'time limit taken for death by the return', 'returns.py',
        'live = (1.0 - is_terminal[:, 1:].astype(jnp.float32)) * discount',
        'live = (1.0 - is_last[:, 1:].astype(jnp.float32)) * discount', 'test_returns.py',
    ),
    Mistake(
        'continue of the start missing from the weights', 'returns.py',
        'return jnp.cumprod(continue_, 1)',
        'return jnp.cumprod(continue_.at[:, 0].set(1.0), 1)', 'test_returns.py',
    ),
    Mistake(
        'two-hot decode by a plain sum', 'transforms.py',
        'return jnp.sum(difference * positive, -1) / jnp.sum(weights, -1)',
        'return jnp.sum(weights / jnp.sum(weights, -1, keepdims=True) * '
        'np.sort(bins).reshape((1,) * (logits.ndim - 1) + (-1,)), -1)', 'test_transforms.py',
    ),
    Mistake(
        'large values clipped', 'transforms.py',
        'value = jnp.clip(value, ordered[0], ordered[-1])', 'value = jnp.clip(value, -20.0, 20.0)',
        'test_transforms.py',
    ),
    Mistake(
        'fan-in of one block', 'nets/layers.py',
        'truncated_normal(self.inputs), shape)',
        'truncated_normal(self.inputs // self.blocks), shape)', 'test_layers.py',
    ),
    Mistake(
        'another epsilon in RMSNorm', 'nets/layers.py', 'RMS_EPSILON = 1e-4', 'RMS_EPSILON = 1e-6',
        'test_layers.py',
    ),
    Mistake(
        'carry of the scan in float32', 'rssm.py',
        'jnp.exp(log_probs)).astype(dtype)', 'jnp.exp(log_probs))', 'test_rssm.py',
    ),
    Mistake(
        'latents written one step early', 'replay.py',
        'trained = np.arange(CONTEXT, self._sequence)',
        'trained = np.arange(0, self._sequence - CONTEXT)', 'test_replay.py',
    ),
    Mistake(
        'latents written over newer steps', 'replay.py',
        'held = self._held(stream, position)  # [B, T]',
        'held = np.ones(position.shape, bool)  # [B, T]', 'test_replay.py',
    ),
    Mistake(
        'latents never written', 'learner.py',
        'self._replay.update_latents(index, *map(sharding.own_rows, latents))',
        'pass', 'test_corridor.py',
    ),
    Mistake(
        'acting with the first parameters', 'learner.py',
        'self._agent.acting_params(self.state) if self._agent.acting else None',
        'jax.tree.map(np.array, self.acting_params)',
        'test_corridor.py',
    ),
    Mistake(
        "acting with another environment's state", 'policy.py',
        'return PolicyState(latent, actions), actions',
        'return jax.tree.map(lambda x: x[::-1], PolicyState(latent, actions)), actions',
        'test_policy.py',
    ),
    Mistake(
        'evaluation samples', 'evaluation.py',
        'self._seed, self._mode = seed, not sample', 'self._seed, self._mode = seed, False',
        'test_corridor.py',
    ),
    Mistake(
        'frames skipped beyond the end', 'envs/stream.py',
        'if terminated or truncated:\n                break', 'if False:\n                break',
        'test_envs.py -k repeat',
    ),
    Mistake(
        'first Atari frame mixed with black or old ones', 'envs/atari.py',
        'self._screens = [self._ale.getScreenRGB()]',
        'self._screens = [*self._screens[-1:], self._ale.getScreenRGB()]',
        'test_suites.py -k first_frame',
    ),
    Mistake(
        'no gradient of the replay critic in the model', 'actor_critic.py',
        'networks, params, latent, batch, result[:, 0], imagined',
        'networks, params, sg(latent), batch, result[:, 0], imagined',
        'test_mistakes.py',
    ),
    Mistake(
        'gradient of the actor in the model', 'actor_critic.py',
        'params, slow_critic, start = sg((params, slow_critic, start))',
        'slow_critic = sg(slow_critic)', 'test_mistakes.py',
    ),
)  # fmt: skip


def noticed(mistake: Mistake) -> str:
    """'yes' if the tests fail with the mistake, else what happened."""
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder) / 'copy'
        ignored = shutil.ignore_patterns('.git', '.venv', 'runs', '__pycache__', '.*_cache')
        shutil.copytree(ROOT, copy, ignore=ignored)
        path = copy / 'dreamerv3_jax' / mistake.file
        source = path.read_text()
        if source.count(mistake.right) != 1:
            return f'the text to replace stands {source.count(mistake.right)} times'
        path.write_text(source.replace(mistake.right, mistake.wrong))
        tests, *options = mistake.tests.split()
        command = [sys.executable, '-m', 'pytest', '-x', '-q', f'tests/{tests}', *options]
        result = subprocess.run(
            command,
            cwd=copy,
            env=os.environ | {'PYTHONPATH': str(copy)},
            capture_output=True,
            text=True,
        )
        if result.returncode == 1:  # tests ran, and some failed
            return 'yes'
        return 'NO' if result.returncode == 0 else result.stdout[-500:]


def main(words: list[str]) -> int:
    chosen = [m for m in MISTAKES if not words or any(word in m.name for word in words)]
    missed = 0
    for mistake in chosen:
        started = time.monotonic()
        answer = noticed(mistake)
        missed += answer != 'yes'
        seconds = time.monotonic() - started
        print(f'{answer:4} {mistake.name} ({mistake.tests}, {seconds:.0f} s)', flush=True)
    print(f'{len(chosen) - missed} of {len(chosen)} mistakes noticed')
    return 1 if missed else 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
