"""One of several hosts, for `test_hosts.py`: makes five updates, then trains in a run.

python host.py INDEX COUNT PORT FOLDER
"""

import pathlib
import pickle
import sys

import jax
import test_sharding
import tiny_runs

from dreamerv3_jax import hosts, loop, sharding
from dreamerv3_jax.agent import Agent


def config(index: int, count: int, port: int, folder: pathlib.Path):
    """Settings of the run."""
    result = tiny_runs.run_config(
        'CartPole-v1',  # whose spaces are those of the updates: there is one program to compile
        size='cpu',
        logdir=str(folder / 'run'),
        env__num_envs=4,
        mesh__data=-1,
        mesh__fsdp=2,
        replay__batch_size=8,
        replay__train_ratio=4.0,  # exchanges between processes take long where they share a core
        run__steps=1_000_000,
        run__checkpoint_every=2.0,
        run__log_every=0.2,
    )
    result.hosts.update(coordinator=f'127.0.0.1:{port}', count=count, index=index)
    return result


def main() -> None:
    index, count, port = map(int, sys.argv[1:4])
    folder = pathlib.Path(sys.argv[4])
    settings = config(index, count, port, folder)
    hosts.connect(settings.hosts)
    sharding.LEAST_SHARDED = 64
    mesh = sharding.make_mesh(settings.mesh.data, settings.mesh.fsdp)
    assert mesh.size == count and len(mesh.local_devices) == 1
    agent = Agent.from_spaces(*test_sharding.SPACES, tiny_runs.agent_config(), mesh=mesh)
    state = test_sharding.first_state(agent)
    size = settings.replay.batch_size // count
    metrics = []
    for seed in range(test_sharding.UPDATES):
        batch = test_sharding.batch_of_eight(agent, seed)
        own = jax.tree.map(lambda x: x[index * size :][:size], batch)
        state, latents, values = agent.update(state, own)
        metrics.append(jax.device_get(values))
    rows = jax.tree.map(sharding.own_rows, latents)
    whole = jax.device_get(sharding.gather(mesh, state))
    (folder / f'{index}.pickle').write_bytes(pickle.dumps((whole, rows, metrics)))
    loop.train(settings, settings.logdir, 'tiny')


if __name__ == '__main__':
    main()
